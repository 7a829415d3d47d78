"""Pipelines in a Django project, served by `manage.py runserver`, gunicorn and uvicorn."""

from __future__ import annotations

import asyncio
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("django")

from tests.integrations.served import MODEL, ROOT, WRITE_RECEIPTS, Served, rewritten_until, until

import ebbtide

SETTINGS = (
    WRITE_RECEIPTS
    + """
from project import *
EBBTIDE = {"on_close": write_receipts, "remember": False}
urlpatterns = [*urlpatterns, path("pid", lambda request: views.JsonResponse({"pid": os.getpid()}))]
ROOT_URLCONF = "receipts"
"""
)


AS_CTRL_C = """
import signal
signal.signal(signal.SIGTERM, signal.default_int_handler)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The example, as the project that is served; its settings also write receipts."""
    shutil.copytree(ROOT / "examples" / "django_app", tmp_path, dirs_exist_ok=True)
    (tmp_path / "receipts.py").write_text(SETTINGS)
    return tmp_path


def serve(folder: Path, *command: str) -> Served:
    return Served(folder, *command, DJANGO_SETTINGS_MODULE="receipts")


def use(server: Served) -> int:
    assert len(server.get("/embed?text=tide")["vector"]) == 32
    assert server.get("/similarity?one=tide&other=tide")["similarity"] > 0.99
    return int(server.get("/pid")["pid"])


def test_runserver_disposes_what_it_has_when_it_is_interrupted(folder: Path) -> None:
    with serve(folder, "manage", "runserver", "{port}", "--noreload") as server:
        assert use(server) == server.process.pid
        assert server.stop(signal.SIGINT) == 0, server.output
        (line,) = server.receipts
        assert line["live"] == 0
        assert list(line["receipts"].values()) == [True]


def test_sigterm_ends_runserver_as_ctrl_c_where_the_project_says_so(folder: Path) -> None:
    (folder / "manage.py").write_text(AS_CTRL_C + (folder / "manage.py").read_text())
    with serve(folder, "manage", "runserver", "{port}", "--noreload") as server:
        use(server)
        assert server.stop(signal.SIGTERM) == 0, server.output
        (line,) = server.receipts
        assert line["live"] == 0


def test_a_changed_file_has_the_pipelines_of_the_old_process_disposed(folder: Path) -> None:
    with serve(folder, "manage", "runserver", "{port}") as server:
        first = use(server)
        assert first != server.process.pid
        receipts = "the receipts of the first process"
        (line,) = rewritten_until(folder / "views.py", lambda: server.receipts, receipts)
        assert (line["pid"], line["live"], len(line["receipts"])) == (first, 0, 1)
        until(lambda: server.replaced("/pid", first), "the next process")
        assert use(server) != first
        server.stop(signal.SIGINT, group=True)  # as Ctrl-C does; its parent kills it soon


def test_each_worker_of_gunicorn_disposes_what_it_has(folder: Path) -> None:
    pytest.importorskip("gunicorn")
    command = ("gunicorn", "wsgi:application", "--bind", "127.0.0.1:{port}", "--preload")
    with serve(folder, *command) as server:
        worker = use(server)
        assert worker != server.process.pid
        assert server.stop(signal.SIGTERM) == 0, server.output
        (line,) = server.receipts
        assert (line["pid"], line["live"], len(line["receipts"])) == (worker, 0, 1)


def test_each_worker_of_uvicorn_disposes_what_it_has(folder: Path) -> None:
    pytest.importorskip("uvicorn")
    command = ("uvicorn", "asgi:application", "--port", "{port}", "--workers", "2")
    with serve(folder, *command) as server:
        until(lambda: server.output.count("Application startup complete") == 2, "both workers")
        worker = use(server)
        assert worker != server.process.pid
        assert server.stop(signal.SIGTERM) == 0, server.output
        assert server.receipts
        assert server.process.pid not in [line["pid"] for line in server.receipts]
        assert all(line["live"] == 0 and line["receipts"] for line in server.receipts)


def test_the_example_serves_and_tells_what_came_back(folder: Path) -> None:
    with Served(folder, "manage", "runserver", "{port}", "--noreload") as server:
        assert len(server.get("/embed?text=tide")["vector"]) == 32
        assert server.stop(signal.SIGINT) == 0, server.output
        assert "feature-extraction" in server.output
        assert "(verified)" in server.output


# Without a server


def test_an_unknown_setting_is_named(fresh_process: Any) -> None:
    said = fresh_process(
        """
        from django.conf import settings
        settings.configure(EBBTIDE={"buget": "1 GiB"})
        from ebbtide.integrations.django import acquire
        acquire("feature-extraction", MODEL)
        """,
        code=1,
    )
    assert "Did you mean 'budget'" in said


def test_an_asgi_application_passes_requests_on_and_may_start_again() -> None:
    from django.conf import settings

    from ebbtide.integrations import django

    if not settings.configured:
        settings.configure(EBBTIDE={"remember": False})
    seen: list[str] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])
        async with django.acquire("feature-extraction", MODEL) as pipe:
            await send(len(await pipe.acall("tide")))

    async def serve_once() -> list[Any]:
        sent: list[Any] = []
        messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

        async def receive() -> Any:
            return next(messages)

        async def send(message: Any) -> None:
            sent.append(message)

        application = django.lifespan(inner)
        await application({"type": "http"}, receive, send)
        assert len(ebbtide.live()) == 1
        await application({"type": "lifespan"}, receive, send)
        return sent[1:]

    for _ in range(2):
        assert asyncio.run(serve_once()) == [
            {"type": "lifespan.startup.complete"},
            {"type": "lifespan.shutdown.complete"},
        ]
        assert ebbtide.live() == []
    assert seen == ["http", "http"]
