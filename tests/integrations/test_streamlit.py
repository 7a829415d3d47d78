"""Pipelines in Streamlit: reruns keep them, and the cache's end is theirs, as is the server's."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("streamlit")

import streamlit as st
from streamlit.testing.v1 import AppTest
from tests.integrations.served import NOTED

import ebbtide
from ebbtide.integrations import streamlit as integration

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "tests" / "models"
MODEL = str(MODELS / "tiny-bert")
OTHER = str(MODELS / "tiny-bert-st")
EXAMPLE = ROOT / "examples" / "streamlit_app" / "app.py"
LIMIT = 60.0

APP = """
import streamlit as st
from ebbtide.integrations.streamlit import cached_pipeline

model = st.text_input("model", {model!r})
pipe = cached_pipeline("feature-extraction", model, {options})
st.write(f"{{id(pipe)}} {{len(pipe('the tide'))}}")
"""


@pytest.fixture(autouse=True)
def _cleared() -> Iterator[None]:
    yield
    integration.clear()
    for pipe in ebbtide.live():
        pipe.dispose()


def app(options: str = "") -> AppTest:
    return AppTest.from_string(APP.format(model=MODEL, options=options), default_timeout=LIMIT)


def shown(found: AppTest) -> str:
    assert not found.exception, found.exception
    return str(found.markdown[0].value)


def test_a_rerun_gets_the_same_pipeline() -> None:
    found = app().run()
    first = shown(found)
    assert shown(found.run()) == first
    assert len(ebbtide.live()) == 1
    assert shown(app().run()) == first


def test_clearing_the_cache_disposes_the_pipeline_and_the_next_run_loads_another() -> None:
    found = app().run()
    (pipe,) = ebbtide.live()
    integration.clear()
    assert pipe.dispose().verified
    assert ebbtide.live() == []
    shown(found.run())
    assert len(ebbtide.live()) == 1


def test_clearing_all_of_streamlits_resources_disposes_it_too() -> None:
    app().run()
    (pipe,) = ebbtide.live()
    st.cache_resource.clear()
    assert pipe.state in {ebbtide.State.DISPOSING, ebbtide.State.DISPOSED}
    pipe.dispose()
    assert ebbtide.live() == []


def test_what_makes_room_for_another_is_disposed() -> None:
    found = app("max_entries=1").run()
    (first,) = ebbtide.live()
    found.text_input[0].set_value(OTHER).run()
    shown(found)
    assert first.dispose() is not None
    (second,) = ebbtide.live()
    assert second.model == OTHER


def test_options_that_differ_are_pipelines_that_differ() -> None:
    a = shown(app("max_entries=3").run())
    b = shown(app("max_entries=3, prepare=False").run())
    assert a != b
    assert len(ebbtide.live()) == 2


def test_one_that_was_disposed_by_hand_is_loaded_again() -> None:
    found = app().run()
    (pipe,) = ebbtide.live()
    pipe.dispose()
    assert shown(found.run())
    assert len(ebbtide.live()) == 1


def test_a_call_that_runs_when_its_pipeline_is_let_go_ends_first() -> None:
    app().run()
    (pipe,) = ebbtide.live()
    begun, cleared = threading.Event(), threading.Event()

    def progress(done: int, count: int | None) -> None:
        begun.set()
        cleared.wait(LIMIT)

    results: list[Any] = []
    caller = threading.Thread(
        target=lambda: results.append(pipe(["a", "b"], batch_size=1, progress=progress))
    )
    caller.start()
    assert begun.wait(LIMIT)
    integration.clear()
    cleared.set()
    caller.join(LIMIT)
    assert len(results[0]) == 2
    pipe.dispose()


class Browser:
    """An open connection, and what the server has said on it."""

    def __init__(self) -> None:
        self.text = ""
        self.stack = contextlib.ExitStack()

    def close(self) -> None:
        self.stack.close()


class Server:
    """``streamlit run`` of an app, whose browsers are websockets."""

    def __init__(self, script: Path, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        (folder / "noted.py").write_text(NOTED)
        self.noted = folder / "receipts"
        self.noted.touch()
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "streamlit", "run", str(script)),
                *("--server.port", str(self.port), "--server.address", "127.0.0.1"),
                *("--server.headless", "true", "--browser.gatherUsageStats", "false"),
                *("--server.fileWatcherType", "none"),
            ],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(folder)]),
                "NOTED": str(self.noted),
                "MODEL": MODEL,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if f":{self.port}" in line:
                break
        else:
            pytest.fail("the server did not start")

    def browse(self) -> Browser:
        """A browser's connection, after its first run has ended."""
        from streamlit.proto.BackMsg_pb2 import BackMsg
        from streamlit.proto.ForwardMsg_pb2 import ForwardMsg

        client = pytest.importorskip("websockets.sync.client")
        browser = Browser()
        found = browser.stack.enter_context(
            client.connect(
                f"ws://127.0.0.1:{self.port}/_stcore/stream", open_timeout=LIMIT, max_size=None
            )
        )
        message = BackMsg()
        message.rerun_script.query_string = ""
        found.send(message.SerializeToString())
        while True:
            told = ForwardMsg.FromString(found.recv(timeout=LIMIT))
            browser.text += str(told)
            if told.WhichOneof("type") == "script_finished":
                assert "exception {" not in browser.text, browser.text
                return browser

    def stop(self, number: int) -> int:
        self.process.send_signal(number)
        assert self.process.stdout is not None
        self.said = self.process.stdout.read()
        return self.process.wait(LIMIT)

    def receipts(self) -> list[str]:
        return self.noted.read_text().splitlines()


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    made: list[Server] = []
    yield made
    for one in made:
        if one.process.poll() is None:
            one.process.kill()
        one.process.communicate()


def app_file(folder: Path, options: str = "") -> Path:
    path = folder / "app.py"
    path.write_text(APP.format(model=MODEL, options=options) + "\nimport noted\n")
    return path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_server_disposes_what_it_has_and_ends_normally(
    servers: list[Server], tmp_path: Path, number: int
) -> None:
    servers.append(server := Server(app_file(tmp_path), tmp_path))
    server.browse()
    server.browse()
    assert server.receipts() == []
    assert server.stop(number) == 0, server.said
    (receipt,) = server.receipts()
    assert receipt.startswith("released")


def test_a_sessions_own_pipeline_is_disposed_when_the_session_ends(
    servers: list[Server], tmp_path: Path
) -> None:
    servers.append(server := Server(app_file(tmp_path, "scope='session'"), tmp_path))
    first, second = server.browse(), server.browse()
    os.mkfifo(fifo := tmp_path / "fifo")
    server.noted.unlink()
    server.noted.symlink_to(fifo)
    first.close()
    assert fifo.read_text().startswith("released")  # waits until the server has written it
    server.noted.unlink()
    server.noted.touch()
    assert server.stop(signal.SIGTERM) == 0
    assert len(server.receipts()) == 1
    second.close()


def test_the_example_runs(servers: list[Server], tmp_path: Path) -> None:
    servers.append(server := Server(EXAMPLE, tmp_path))
    texts = server.browse().text
    assert "Bread is baked at four." in texts
    assert re.search(r"\d MB", texts)
    assert server.stop(signal.SIGINT) == 0
