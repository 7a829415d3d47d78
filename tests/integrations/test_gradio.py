"""Pipelines in Gradio: they live as long as the demo's server, or as long as a session."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio")
pytest.importorskip("gradio_client")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    import gradio as gr
    from gradio_client import Client

    gc.collect()

from tests.integrations.served import NOTED, until

import ebbtide
from ebbtide.errors import InputError, OptionError, PipelineDisposedError
from ebbtide.integrations.gradio import SessionPipelines, SharedPipeline

pytestmark = pytest.mark.filterwarnings("ignore")  # of what Gradio itself calls

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "tests" / "models" / "tiny-bert")
EXAMPLE = ROOT / "examples" / "gradio_app" / "app.py"
LIMIT = 60.0
QUIET = {"prevent_thread_lock": True, "quiet": True, "server_name": "127.0.0.1"}


@pytest.fixture(autouse=True)
def _at_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.setenv("GRADIO_IS_E2E_TEST", "yes")  # it hears of a closed tab at once, not in 15 s
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Gradio leaves event loops behind, one set for this thread
        asyncio.set_event_loop(None)
        gc.collect()


def told(pipe: Any) -> threading.Event:
    """An event that is set once a pipeline has its receipt."""
    done = threading.Event()
    pipe._lifecycle.on_finished(done.set)
    return done


@pytest.fixture
def shared() -> SharedPipeline:
    return SharedPipeline("feature-extraction", MODEL)


@pytest.fixture
def demo(shared: SharedPipeline) -> Iterator[gr.Blocks]:
    with gr.Blocks() as demo:
        text, size = gr.Textbox(), gr.Textbox()
        text.submit(lambda one: str(shared(one).shape), text, size, api_name="shape")
    yield demo
    demo.close(verbose=False)


def test_it_is_loaded_at_the_launch_and_disposed_at_the_close(
    shared: SharedPipeline, demo: gr.Blocks
) -> None:
    assert ebbtide.live() == []
    _, url, _ = demo.launch(app_kwargs={"lifespan": shared.lifespan}, **QUIET)
    (pipe,) = ebbtide.live()
    done = told(pipe)
    client = Client(url, verbose=False)
    assert re.match(r"\(1, \d+, 32\)", client.predict("the tide", api_name="/shape"))
    client.close()
    demo.close(verbose=False)
    assert done.wait(LIMIT)
    assert ebbtide.live() == []
    with pytest.raises(InputError, match="while its demo's server runs"):
        shared("the tide")


def test_a_demo_may_be_launched_again(shared: SharedPipeline, demo: gr.Blocks) -> None:
    for _ in range(2):
        demo.launch(app_kwargs={"lifespan": shared.lifespan}, **QUIET)
        (pipe,) = ebbtide.live()
        done = told(pipe)
        assert len(shared("the tide")) == 1
        demo.close(verbose=False)
        assert done.wait(LIMIT)


def test_an_option_that_does_not_exist_fails_before_the_launch() -> None:
    with pytest.raises(OptionError, match="dtype"):
        SharedPipeline("feature-extraction", MODEL, dtyp="fp32")  # type: ignore[call-arg]


def test_a_demo_inside_an_application_lives_as_long_as_that(
    shared: SharedPipeline, demo: gr.Blocks
) -> None:
    fastapi = pytest.importorskip("fastapi")
    app = gr.mount_gradio_app(fastapi.FastAPI(lifespan=shared.lifespan), demo, path="/demo")

    async def serve() -> None:
        async with app.router.lifespan_context(app):
            assert len(ebbtide.live()) == 1
        assert ebbtide.live() == []

    asyncio.run(serve())


class Sessions:
    """A demo whose sessions each have a pipeline, and what each was told of its own."""

    def __init__(self) -> None:
        self.ended: list[threading.Event] = []
        with gr.Blocks() as self.demo:
            self.pipes: SessionPipelines[Any] = SessionPipelines(
                self.demo, "feature-extraction", MODEL
            )
            text, size = gr.Textbox(), gr.Textbox()
            text.submit(self.place, text, size, api_name="place")
        _, self.url, _ = self.demo.launch(app_kwargs={"lifespan": self.pipes.lifespan}, **QUIET)

    def place(self, text: str, request: gr.Request) -> str:
        pipe = self.pipes.get(request)
        assert len(pipe(text)) == 1
        return str(id(pipe))


@pytest.fixture
def sessions() -> Iterator[Sessions]:
    sessions = Sessions()
    yield sessions
    sessions.demo.close(verbose=False)


def test_each_session_has_its_own_until_it_ends(sessions: Sessions) -> None:
    first, second = (Client(sessions.url, verbose=False) for _ in range(2))
    places = [client.predict("tide", api_name="/place") for client in (first, first, second)]
    assert places[0] == places[1] != places[2]
    ended = {str(id(pipe)): told(pipe) for pipe in ebbtide.live()}
    assert len(sessions.pipes) == len(ended) == 2
    first.close()
    assert ended[places[0]].wait(LIMIT)
    assert second.predict("tide", api_name="/place") == places[2]
    sessions.demo.close(verbose=False)
    assert ended[places[2]].wait(LIMIT)
    second.close()
    assert len(sessions.pipes) == 0


def test_a_call_that_comes_after_the_close_is_refused(sessions: Sessions) -> None:
    class Request:
        session_hash = "late"

    sessions.demo.close(verbose=False)
    with pytest.raises(PipelineDisposedError, match="has ended"):
        sessions.pipes.get(Request())  # type: ignore[arg-type]


ENDING = """
import runpy, sys
import ebbtide
from ebbtide.lifecycle import Lifecycle

finish = Lifecycle.finish

def noted(life, receipt, **more):
    print("receipt", receipt, flush=True)
    finish(life, receipt, **more)

Lifecycle.finish = noted
runpy.run_path(sys.argv[1], run_name="__main__")
print("live", ebbtide.live(), flush=True)
"""


def until_it_listens(said: Iterable[str]) -> tuple[str, str]:
    """What a server has said until it named its address, and that."""
    lines = ""
    for line in said:
        lines += line
        if found := re.search(r"http://\S+", line):
            return lines, found[0]
    pytest.fail(lines)


def test_a_file_that_is_changed_under_gradios_reload_keeps_its_pipeline(tmp_path: Path) -> None:
    script, noted = tmp_path / "watched" / "app.py", tmp_path / "receipts"
    script.parent.mkdir()
    script.write_text(f"import noted\n{EXAMPLE.read_text()}")
    (tmp_path / "noted.py").write_text(NOTED)
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", "from gradio.cli import cli; cli()", str(script)],
        cwd=script.parent,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(tmp_path)]),
            "MODEL": MODEL,
            "NOTED": str(noted),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        said, address = until_it_listens(process.stdout)

        def answer() -> str:
            client = Client(address, verbose=False)
            try:
                return str(client.predict("low water", api_name="/search"))
            finally:
                client.close()

        assert "Bread is baked at four." in answer()
        script.write_text(script.read_text().replace("at four", "at five"))
        until(lambda: "Bread is baked at five." in answer(), "the changed file")
        assert not noted.exists()
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
        said += process.stdout.read()
        assert process.wait(LIMIT) == 0, said
        (receipt,) = noted.read_text().splitlines()
        assert receipt.startswith("released")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_example_runs_and_ends_when_it_is_told_to(number: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", ENDING, str(EXAMPLE)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "MODEL": MODEL},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        said, address = until_it_listens(process.stdout)
        client = Client(address, verbose=False)
        assert "The tide goes out." in client.predict("low water", api_name="/search")
        client.close()
        process.send_signal(number)
        said += process.stdout.read()
        assert process.wait(LIMIT) == 0, said
        assert "receipt released" in said
        assert "live []" in said
    finally:
        process.kill()
        process.communicate()
