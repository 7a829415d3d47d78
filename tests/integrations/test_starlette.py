"""Pipelines in applications of Starlette and FastAPI, served by uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from fastapi import Depends, FastAPI, WebSocket, WebSocketDisconnect
from starlette.requests import Request
from starlette.testclient import TestClient
from tests.integrations.served import MODEL, ROOT, WRITE_RECEIPTS, Served, until

import ebbtide
from ebbtide.errors import InputError, ModelNotFoundError, OptionError
from ebbtide.integrations.starlette import leased, lifespan, manager_of

APP = (
    WRITE_RECEIPTS
    + """
import asyncio, contextlib
from fastapi import Depends, FastAPI
from fastapi.responses import StreamingResponse
from starlette.requests import Request
from ebbtide.integrations.starlette import leased, lifespan, manager_of

embedder = leased("feature-extraction", os.environ["MODEL"])
crowded = leased("feature-extraction", os.environ["WRITER"], timeout=0.05)

@contextlib.asynccontextmanager
async def own(app):
    assert app.state.pipelines.status().entries[0].phase == "ready"
    yield {"tide": "out"}

app = FastAPI(lifespan=lifespan(
    own, preload=[embedder], on_close=write_receipts, max_pipelines=1, remember=False))

@app.get("/embed")
async def embed(request: Request, text: str, pipe=Depends(embedder)):
    vectors = await pipe.acall(text, pooling="mean")
    return {"width": vectors.shape[1], "tide": request.state.tide, "pid": os.getpid()}

@app.get("/sync")
def sync(text: str, pipe=Depends(embedder)):
    return {"width": pipe(text, pooling="mean").shape[1]}

@app.get("/wrong")
async def wrong(pipe=Depends(embedder)):
    raise ValueError("of the endpoint's own")

@app.get("/crowded")
async def no_room(held=Depends(embedder), pipe=Depends(crowded)):
    return {}

@app.get("/endless")
async def endless(pipe=Depends(embedder)):
    async def pieces():
        while True:
            yield str(len(await pipe.acall("tide"))).encode()
    return StreamingResponse(pieces())

@app.get("/leases")
async def leases(request: Request):
    return sum(entry.leases for entry in manager_of(request).status().entries)
"""
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "app.py").write_text(APP)
    return tmp_path


@pytest.fixture
def served(folder: Path) -> Iterator[Served]:
    with Served(folder, "uvicorn", "app:app", "--port", "{port}") as server:
        yield server


def test_a_request_is_lent_a_pipeline_and_the_end_of_the_server_disposes_it(
    served: Served,
) -> None:
    assert served.get("/embed?text=tide")["width"] == 32
    assert served.get("/embed?text=tide")["tide"] == "out"
    assert served.get("/sync?text=tide")["width"] == 32
    assert served.get("/wrong") == 500
    assert served.get("/crowded") == 503
    assert "gen-llama" in served.last_error
    assert served.get("/leases") == 0

    code = served.stop(signal.SIGTERM)
    assert code == -signal.SIGTERM, served.output  # uvicorn ends by the signal it was sent
    (line,) = served.receipts
    assert line["live"] == 0
    assert list(line["receipts"].values()) == [True]


def test_a_client_that_disconnects_from_a_stream_leaves_no_lease(served: Served) -> None:
    client = socket.create_connection(("127.0.0.1", served.port), timeout=30)
    with client:
        client.sendall(b"GET /endless HTTP/1.1\r\nHost: tide\r\n\r\n")
        assert b"200 OK" in client.recv(64)
        assert served.get("/leases") == 1
    until(lambda: served.get("/leases") == 0, "the lease")
    assert served.stop(signal.SIGINT) == 0, served.output
    assert [line["live"] for line in served.receipts] == [0]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_each_of_several_workers_disposes_what_it_has(folder: Path, how: signal.Signals) -> None:
    with Served(folder, "uvicorn", "app:app", "--port", "{port}", "--workers", "2") as server:
        until(lambda: server.output.count("Application startup complete") == 2, "both workers")
        assert server.get("/embed?text=tide")["width"] == 32
        assert server.stop(how) == 0, server.output
        pids = {line["pid"] for line in server.receipts}
        assert len(pids) == 2
        assert server.process.pid not in pids
        assert all(line["live"] == 0 and line["receipts"] for line in server.receipts)


def test_a_worker_that_is_killed_is_replaced_and_all_others_dispose_what_they_have(
    folder: Path,
) -> None:
    with Served(folder, "uvicorn", "app:app", "--port", "{port}", "--workers", "2") as server:
        until(lambda: server.output.count("Application startup complete") == 2, "both workers")
        killed = server.get("/embed?text=tide")["pid"]
        os.kill(killed, signal.SIGKILL)
        until(lambda: server.output.count("Application startup complete") == 3, "the next worker")
        assert server.get("/embed?text=tide")["pid"] != killed
        assert server.stop(signal.SIGTERM) == 0, server.output
        pids = {line["pid"] for line in server.receipts}
        assert len(pids) == 2
        assert killed not in pids
        assert all(line["live"] == 0 and line["receipts"] for line in server.receipts)


def test_a_server_that_ends_after_so_many_requests_disposes_what_it_has(folder: Path) -> None:
    command = ("uvicorn", "app:app", "--port", "{port}", "--limit-max-requests", "1")
    with Served(folder, *command) as server:
        assert server.get("/embed?text=tide")["width"] == 32
        assert server.process.wait(30) == 0, server.output
        (line,) = server.receipts
        assert line["live"] == 0
        assert list(line["receipts"].values()) == [True]


@pytest.mark.parametrize("worker", ["asgi", "uvicorn.workers.UvicornWorker"])
def test_workers_of_gunicorn_dispose_what_they_have(folder: Path, worker: str) -> None:
    pytest.importorskip("gunicorn")
    command = ("gunicorn", "app:app", "-k", worker, "--bind", "127.0.0.1:{port}", "--preload")
    with Served(folder, *command) as server:
        pid = server.get("/embed?text=tide")["pid"]
        assert server.stop(signal.SIGTERM) == 0, server.output
        (line,) = server.receipts
        assert (line["pid"], line["live"], len(line["receipts"])) == (pid, 0, 1)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_changed_file_has_the_worker_replaced_and_its_pipelines_disposed(
    folder: Path, how: signal.Signals
) -> None:
    with Served(folder, "uvicorn", "app:app", "--port", "{port}", "--reload") as server:
        until(lambda: "Application startup complete" in server.output, "the worker")
        first = server.get("/embed?text=tide")["pid"]
        (folder / "app.py").write_text(APP + "\n# changed\n")
        until(lambda: server.output.count("Application startup complete") == 2, "the next worker")
        assert [line["pid"] for line in server.receipts] == [first]
        assert server.replaced("/embed?text=tide", first)
        assert server.stop(how, group=how is signal.SIGINT) == 0, server.output
        assert [line["live"] for line in server.receipts] == [0, 0]


def test_the_example_serves_and_ends(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples" / "fastapi_app", tmp_path, dirs_exist_ok=True)
    with Served(tmp_path, "uvicorn", "main:app", "--port", "{port}") as server:
        request = urllib.request.Request(
            f"http://127.0.0.1:{server.port}/embed",
            json.dumps(["the tide goes out", "and in"]).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            assert [len(vector) for vector in json.load(reply)] == [32, 32]
        server.stop()
        assert "INFO:ebbtide.integrations:feature-extraction" in server.output
        assert "(verified)" in server.output


# Without a server


def run_lifespan(app: Any) -> None:
    async def run() -> None:
        async with app.router.lifespan_context(app):
            pass

    asyncio.run(run())


def test_an_application_without_the_lifespan_says_what_to_write() -> None:
    with pytest.raises(InputError, match=r"lifespan=ebbtide\.integrations"):
        manager_of(Request({"type": "http", "app": FastAPI()}))


def test_an_unknown_option_is_named_where_the_application_is_made() -> None:
    with pytest.raises(OptionError, match="Did you mean 'budget'"):
        lifespan(buget="1 GiB")  # type: ignore[call-arg]


def test_a_preload_that_fails_ends_the_start_and_leaves_nothing() -> None:
    told: list[object] = []
    first = leased("feature-extraction", MODEL)
    missing = leased("feature-extraction", "/no/such/model")
    app = FastAPI(lifespan=lifespan(preload=[first, missing], on_close=told.append, remember=False))
    with pytest.raises(ModelNotFoundError):
        run_lifespan(app)
    assert len(told) == 1
    assert ebbtide.live() == []


def test_the_pipelines_go_where_the_own_lifespan_fails() -> None:
    @contextlib.asynccontextmanager
    async def failing(app: Any) -> Any:
        await app.state.pipelines.apreload("feature-extraction", MODEL)
        raise RuntimeError("the user's own")
        yield

    app = FastAPI(lifespan=lifespan(failing, remember=False))
    with pytest.raises(RuntimeError, match="the user's own"):
        run_lifespan(app)
    assert app.state.pipelines.is_closed
    assert ebbtide.live() == []


def test_a_web_socket_holds_its_pipeline_until_it_is_closed() -> None:
    lent = Depends(leased("feature-extraction", MODEL))
    app = FastAPI(lifespan=lifespan(remember=False))

    @app.websocket("/talk")
    async def talk(socket: WebSocket, pipe: Any = lent) -> None:
        await socket.accept()
        with contextlib.suppress(WebSocketDisconnect):
            while True:
                vectors = await pipe.acall(await socket.receive_text(), pooling="mean")
                await socket.send_json(vectors.shape)

    def leases() -> int:
        return sum(entry.leases for entry in app.state.pipelines.status().entries)

    with TestClient(app) as client:
        with client.websocket_connect("/talk") as talking:
            talking.send_text("the tide goes out")
            assert talking.receive_json() == [1, 32]
            assert leases() == 1
        assert leases() == 0
    assert ebbtide.live() == []


def test_an_application_may_start_again() -> None:
    app = FastAPI(lifespan=lifespan(preload=[leased("feature-extraction", MODEL)], remember=False))
    run_lifespan(app)
    first = app.state.pipelines
    run_lifespan(app)
    assert app.state.pipelines is not first
    assert ebbtide.live() == []
