"""Pipelines in workers of gunicorn, which forks them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gunicorn")

from tests.integrations.served import MODEL, ROOT, Served, until

import ebbtide
from ebbtide.integrations.gunicorn import worker_exit

CONFIG = """
from ebbtide.integrations.gunicorn import post_fork, worker_exit
"""

APP = """
import json, os, threading
import ebbtide

MADE_BEFORE = ebbtide.pipeline("feature-extraction", os.environ["MODEL"])
own = []

def app(environ, start_response):
    try:
        if environ["PATH_INFO"] == "/hang":
            threading.Event().wait()
        if environ["PATH_INFO"] == "/inherited":
            pipe = MADE_BEFORE
        else:
            own or own.append(ebbtide.pipeline("feature-extraction", os.environ["MODEL"]))
            pipe = own[0]
        answer = {"width": pipe("tide", pooling="mean").shape[1], "pid": os.getpid()}
    except ebbtide.EbbtideError as error:
        answer = {"error": str(error), "pid": os.getpid()}
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(answer).encode()]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "gunicorn.conf.py").write_text(CONFIG)
    (tmp_path / "app.py").write_text(APP)
    return tmp_path


def serve(folder: Path, *options: str) -> Served:
    return Served(folder, "gunicorn", "app:app", "--bind", "127.0.0.1:{port}", *options)


def disposals(server: Served) -> int:
    return server.output.count("(verified)")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_an_inherited_pipeline_says_so_and_every_process_ends_normally(
    folder: Path, how: signal.Signals
) -> None:
    with serve(folder, "--preload", "--workers", "2") as server:
        answer = server.get("/inherited")
        assert "was made before this process was forked" in answer["error"]
        assert server.get("/own")["width"] == 32
        assert server.stop(how) == 0, server.output
        assert server.output.count("Inherited through a fork") == 2
        assert "app.py:5" in server.output
        assert disposals(server) == 1


def test_a_worker_that_made_its_own_disposes_it_at_its_end(folder: Path) -> None:
    with serve(folder, "--threads", "2") as server:
        first = server.get("/inherited")
        assert first["width"] == 32  # not preloaded: each worker imports the application itself
        server.process.send_signal(signal.SIGHUP)
        until(lambda: disposals(server) == 1, "the first worker's receipt")
        assert server.get("/own")["pid"] != first["pid"]
        assert server.stop() == 0, server.output
        assert disposals(server) == 3
        assert "Inherited" not in server.output


def test_a_worker_that_is_recycled_disposes_what_it_has(folder: Path) -> None:
    with serve(folder, "--max-requests", "1", "--workers", "1") as server:
        pids = {server.get("/inherited")["pid"] for _ in range(2)}
        assert len(pids) == 2
        until(lambda: disposals(server) == 2, "the receipts of both workers")
        assert server.stop() == 0, server.output


@pytest.mark.parametrize("kind", ["sync", "gthread"])
def test_a_worker_that_is_killed_is_replaced_and_the_next_disposes_what_it_has(
    folder: Path, kind: str
) -> None:
    with serve(folder, "--worker-class", kind) as server:
        killed = server.get("/own")["pid"]
        os.kill(killed, signal.SIGKILL)
        until(lambda: server.replaced("/own", killed), "the next worker")
        assert server.stop(signal.SIGTERM) == 0, server.output
        assert disposals(server) == 2  # it imports the application itself, which makes one
        assert f"Worker {killed}: released" not in server.output


def test_a_worker_that_hangs_is_aborted_and_disposes_what_it_has(folder: Path) -> None:
    with serve(folder, "--timeout", "1") as server:
        hung = server.get("/own")["pid"]
        with contextlib.suppress(OSError):  # gunicorn answers 500, or hangs up
            server.get("/hang")
        until(lambda: server.replaced("/own", hung), "the next worker")
        until(lambda: server.output.count(f"Worker {hung}: released") == 2, "its receipts")
        assert server.stop(signal.SIGTERM) == 0, server.output
        assert disposals(server) == 4


def test_the_example_serves_and_ends(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples" / "gunicorn_app", tmp_path, dirs_exist_ok=True)
    with serve(tmp_path) as server:
        assert len(server.get("/?text=tide")) == 32
        assert server.stop() == 0, server.output
        assert disposals(server) == 1
        assert "Inherited" not in server.output


def test_the_arbiter_disposes_nothing_for_a_worker_that_has_gone() -> None:
    with ebbtide.pipeline("feature-extraction", MODEL) as pipe:
        worker_exit(SimpleNamespace(), SimpleNamespace(pid=1))
        assert pipe("tide", pooling="mean").shape == (1, 32)


def test_a_second_signal_while_a_worker_disposes_what_it_has_does_not_cut_that_short(
    fresh_process: Any,
) -> None:
    out = fresh_process(
        """
        import os, signal, threading
        from types import SimpleNamespace
        from ebbtide.integrations import gunicorn, worker_end
        begun, go = threading.Event(), threading.Event()
        def end():
            begun.set()
            go.wait()
            return ["released"]
        def leave(number, frame):
            go.set()
            raise SystemExit
        def interrupt():
            begun.wait()
            while not go.is_set():  # Python hears no signal that comes just before it blocks
                signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
                go.wait(0.1)
        worker_end.end_of_worker = end
        signal.signal(signal.SIGUSR1, leave)
        threading.Thread(target=interrupt).start()
        log = SimpleNamespace(info=lambda *words: print(words[-1]))
        try:
            gunicorn.worker_exit(SimpleNamespace(log=log), SimpleNamespace(pid=os.getpid()))
        except SystemExit:
            print("left")
        """
    )
    assert out.split() == ["released", "left"]
