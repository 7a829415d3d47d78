"""Pipelines where gevent's greenlets stand for threads, as in gunicorn's gevent workers."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gevent")
pytest.importorskip("gunicorn")

from tests.integrations.served import Served, until

import ebbtide
from ebbtide.cancellation import check_threads

CONFIG = "from ebbtide.integrations.gunicorn import post_fork, worker_exit\n"
PATCH = "from gevent import monkey; monkey.patch_all()\n"

APP = """
import os
from flask import Flask, request
from ebbtide.integrations.flask import Pipelines

app = Flask(__name__)
pipelines = Pipelines(app, budget="1 GiB")
busy = 0

@app.get("/embed")
def embed():
    global busy
    busy += 1
    try:
        isolate = "isolate" in request.args
        with pipelines.acquire("feature-extraction", os.environ["MODEL"], isolate=isolate) as pipe:
            texts = ["tide " * 100] * int(request.args.get("texts", "1"))
            return {"width": pipe(texts, pooling="mean").shape[1]}
    finally:
        busy -= 1

@app.get("/busy")
def how_busy():
    return {"busy": busy}
"""


def serve(folder: Path, *options: str, config: str = CONFIG) -> Served:
    (folder / "gunicorn.conf.py").write_text(config)
    (folder / "app.py").write_text(APP)
    how = ("--worker-class", "gevent", "--bind", "127.0.0.1:{port}", *options)
    return Served(folder, "gunicorn", "app:app", *how)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("path", ["/embed", "/embed?isolate"])
def test_a_worker_of_greenlets_disposes_what_it_has(
    tmp_path: Path, path: str, how: signal.Signals
) -> None:
    with serve(tmp_path) as server:
        assert server.get(path) == {"width": 32}, server.output
        assert server.stop(how) == 0, server.output
        assert server.output.count("(verified)") == 1 + ("isolate" in path), server.output


def test_a_call_in_a_process_of_its_own_lets_other_greenlets_go_on(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        assert server.get("/embed?isolate") == {"width": 32}, server.output
        found: list[Any] = []
        long = threading.Thread(target=lambda: found.append(server.get("/embed?isolate&texts=800")))
        long.start()
        until(lambda: server.get("/busy")["busy"] == 1, "an answer beside the call")
        long.join()
        assert found == [{"width": 32}]
        assert server.stop() == 0, server.output


def test_an_application_that_is_imported_before_greenlets_are_is_told_what_to_do(
    tmp_path: Path,
) -> None:
    with serve(tmp_path, "--preload") as server:
        assert server.get("/embed") == 500
        assert "at the top of gunicorn.conf.py" in server.output
        assert server.stop() == 0, server.output
    with serve(tmp_path, "--preload", config=PATCH + CONFIG) as server:
        assert server.get("/embed") == {"width": 32}, server.output
        assert server.stop() == 0, server.output


@pytest.mark.parametrize("patched", ["", "thread=False", "queue=False", "subprocess=False"])
def test_threads_that_are_partly_greenlets_are_refused(fresh_process: Any, patched: str) -> None:
    out = fresh_process(
        f"""
        import gevent.monkey
        gevent.monkey.patch_all({patched})
        import ebbtide
        for make in (
            lambda: ebbtide.pipeline("feature-extraction", MODEL).dispose(),
            lambda: ebbtide.PipelineManager(budget="1 GiB").close(),
        ):
            try:
                make()
                print("works")
            except ebbtide.LoadError as error:
                print("with no options" in str(error))
        """
    )
    assert out.split() == (["True", "True"] if patched else ["works", "works"])


def test_eventlet_is_refused_and_the_message_says_what_to_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patcher = SimpleNamespace(is_monkey_patched=lambda name: name == "thread")
    monkeypatch.setitem(sys.modules, "eventlet.patcher", patcher)
    with pytest.raises(ebbtide.LoadError, match="gthread"):
        check_threads()
