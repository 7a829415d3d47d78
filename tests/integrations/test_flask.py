"""Pipelines in applications of Flask, served by `flask run` and by gunicorn."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("flask")

from flask import Flask, Response
from tests.integrations.served import (
    MODEL,
    ROOT,
    WRITE_RECEIPTS,
    WRITER,
    Served,
    rewritten_until,
    until,
)

import ebbtide
from ebbtide.errors import OptionError
from ebbtide.integrations.flask import Pipelines

APP = (
    WRITE_RECEIPTS
    + """
from flask import Flask
from ebbtide.integrations.flask import Pipelines

app = Flask(__name__)
pipelines = Pipelines(app, on_close=write_receipts, remember=False)

@app.get("/embed")
def embed():
    pipe = pipelines.lease("feature-extraction", os.environ["MODEL"])
    return {"width": pipe("tide", pooling="mean").shape[1], "pid": os.getpid()}
"""
)


AS_CTRL_C = """
import signal
signal.signal(signal.SIGTERM, signal.default_int_handler)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "app.py").write_text(APP)
    return tmp_path


def test_the_development_server_disposes_what_it_has_when_it_is_interrupted(folder: Path) -> None:
    with Served(folder, "flask", "run", "--port", "{port}") as server:
        assert server.get("/embed") == {"width": 32, "pid": server.process.pid}
        assert server.stop(signal.SIGINT) == 0, server.output
        (line,) = server.receipts
        assert line["live"] == 0
        assert list(line["receipts"].values()) == [True]


def test_sigterm_ends_the_development_server_as_ctrl_c_where_the_application_says_so(
    folder: Path,
) -> None:
    (folder / "app.py").write_text(APP + AS_CTRL_C)
    with Served(folder, "flask", "run", "--port", "{port}") as server:
        assert server.get("/embed")["width"] == 32
        assert server.stop(signal.SIGTERM) == 0, server.output
        (line,) = server.receipts
        assert line["live"] == 0


def test_a_changed_file_has_the_pipelines_of_the_old_process_disposed(folder: Path) -> None:
    (folder / "watchdog.py").write_text("raise ImportError")  # its watches are few in containers
    with Served(folder, "flask", "run", "--port", "{port}", "--debug") as server:
        first = server.get("/embed")["pid"]
        assert first != server.process.pid
        receipts = "the receipts of the first process"
        (line,) = rewritten_until(folder / "app.py", lambda: server.receipts, receipts)
        assert (line["pid"], line["live"], len(line["receipts"])) == (first, 0, 1)
        until(lambda: server.replaced("/embed", first), "the next process")
        server.stop(signal.SIGINT, group=True)  # as Ctrl-C does; its parent kills it soon


@pytest.mark.parametrize("preload", [["--preload"], []])
def test_each_worker_of_gunicorn_disposes_what_it_has(folder: Path, preload: list[str]) -> None:
    pytest.importorskip("gunicorn")
    command = ("gunicorn", "app:app", "--bind", "127.0.0.1:{port}", "--threads", "4", *preload)
    with Served(folder, *command) as server:
        worker = server.get("/embed")["pid"]
        assert worker != server.process.pid
        assert server.stop(signal.SIGTERM) == 0, server.output
        (line,) = server.receipts
        assert (line["pid"], line["live"]) == (worker, 0)
        assert list(line["receipts"].values()) == [True]


def test_with_the_hooks_of_gunicorn_each_receipt_is_told_once(folder: Path) -> None:
    pytest.importorskip("gunicorn")
    hooks = "from ebbtide.integrations.gunicorn import post_fork, worker_exit"
    (folder / "gunicorn.conf.py").write_text(hooks)
    with Served(folder, "gunicorn", "app:app", "--bind", "127.0.0.1:{port}") as server:
        server.get("/embed")
        assert server.stop(signal.SIGTERM) == 0, server.output
        assert len(server.receipts) == 1
        assert server.output.count("(verified)") == 1


def test_the_example_serves_and_ends(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples" / "flask_app", tmp_path, dirs_exist_ok=True)
    with Served(tmp_path, "flask", "run", "--port", "{port}") as server:
        alike = server.get("/similarity?one=tide&other=tide")["similarity"]
        assert alike == pytest.approx(1, abs=1e-5)
        assert server.stop(signal.SIGINT) == 0, server.output
        assert "INFO:ebbtide.integrations:feature-extraction" in server.output


# Without a server


@pytest.fixture
def pipelines() -> Iterator[Pipelines]:
    made = Pipelines(max_pipelines=1, remember=False)
    yield made
    made.close()


def leases(pipelines: Pipelines) -> int:
    return sum(entry.leases for entry in pipelines.manager.status().entries)


def test_a_request_returns_what_it_was_lent_even_where_it_fails(pipelines: Pipelines) -> None:
    app = Flask("tide")
    pipelines.init_app(app)
    held = []

    @app.get("/wrong")
    def wrong() -> str:
        pipelines.lease("feature-extraction", MODEL)
        pipelines.lease("feature-extraction", MODEL)
        held.append(leases(pipelines))
        raise ValueError

    assert app.test_client().get("/wrong").status_code == 500
    assert held == [2]
    assert leases(pipelines) == 0


def test_a_stream_whose_client_has_gone_returns_what_it_acquired(pipelines: Pipelines) -> None:
    app = Flask("tide")
    pipelines.init_app(app)

    @app.get("/stream")
    def stream() -> Response:
        def pieces() -> Iterator[str]:
            with pipelines.acquire("feature-extraction", MODEL) as pipe:
                while True:
                    yield str(pipe("tide").shape)

        return Response(pieces())

    with app.test_client() as client:
        reply = client.get("/stream", buffered=False)
        pieces = iter(reply.response)
        next(pieces)
        assert leases(pipelines) == 1
        reply.close()  # as where the client has gone
    assert leases(pipelines) == 0


def test_a_client_that_finds_no_room_is_answered_503(pipelines: Pipelines) -> None:
    app = Flask("tide")
    pipelines.init_app(app)

    @app.get("/crowded")
    def crowded() -> str:
        pipelines.lease("feature-extraction", MODEL)
        pipelines.lease("feature-extraction", WRITER, timeout=0)
        return ""

    assert app.test_client().get("/crowded").status_code == 503
    assert leases(pipelines) == 0


def test_closed_pipelines_are_told_once_and_refuse_later_requests() -> None:
    told: list[object] = []
    app = Flask("tide")
    pipelines = Pipelines(app, on_close=told.append, remember=False)
    assert pipelines.close() == {}  # nothing was asked for
    assert told == []
    with app.app_context():
        pipelines.lease("feature-extraction", MODEL)
    assert len(pipelines.close()) == 1
    assert pipelines.close() == {}
    assert len(told) == 1
    assert ebbtide.live() == []
    with app.test_request_context(), pytest.raises(Exception, match="closed") as caught:
        pipelines.lease("feature-extraction", MODEL)
    assert getattr(caught.value, "code", None) == 503


def test_an_unknown_option_is_named_where_the_application_is_made() -> None:
    with pytest.raises(OptionError, match="Did you mean 'budget'"):
        Pipelines(buget="1 GiB")  # type: ignore[call-arg]
