"""Pipelines in workers of Celery, in each of its pools."""

from __future__ import annotations

import importlib.util
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("celery")

from celery import signals
from celery.exceptions import WorkerLostError
from tests.integrations.served import MODEL, ROOT, WRITE_RECEIPTS, Served, until

import ebbtide
from ebbtide.errors import OptionError
from ebbtide.integrations.celery import Pipelines

MORE = (
    WRITE_RECEIPTS
    + """
import signal
from tasks import app, Pipelines

app.conf.worker_lost_wait = 0.1  # seconds until a child that was killed is given up; else ten
pipelines = Pipelines(on_close=write_receipts, remember=False)

if os.environ.get("BEFORE"):
    MADE_BEFORE = ebbtide.pipeline("feature-extraction", os.environ["MODEL"])

@app.task(name="embed")
def embed(text):
    with pipelines.acquire("feature-extraction", os.environ["MODEL"]) as pipe:
        return {"width": pipe(text, pooling="mean").shape[1], "pid": os.getpid()}

@app.task(name="killed")
def killed(text):
    embed(text)
    os.kill(os.getpid(), signal.SIGKILL)

@app.task(name="before")
def before(text):
    try:
        return {"width": MADE_BEFORE(text, pooling="mean").shape[1]}
    except ebbtide.PipelineInheritedError as error:
        return {"error": str(error)}
"""
)


EXIT_CODES = {signal.SIGTERM: 0, signal.SIGINT: 1, signal.SIGQUIT: 0}
"""As Celery itself ends."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(ROOT / "examples" / "celery_app", tmp_path, dirs_exist_ok=True)
    (tmp_path / "more.py").write_text(MORE)
    monkeypatch.setenv("QUEUE", str(tmp_path / "queue"))
    return tmp_path


@pytest.fixture
def ask(folder: Path) -> Iterator[Any]:
    """Sends a task and waits for what it gives."""
    spec = importlib.util.spec_from_file_location("tasks", folder / "tasks.py")
    assert spec is not None
    assert spec.loader is not None
    tasks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tasks)
    yield lambda name, text="tide": tasks.app.send_task(name, [text]).get(timeout=30, interval=0.05)
    signals.worker_init.disconnect(tasks.pipelines._begin)
    tasks.app.close()


def work(folder: Path, module: str, *options: str, **variables: str) -> Served:
    command = ("celery", "-A", module, "worker", "--loglevel", "INFO", *options)
    return Served(folder, *command, listens=False, **variables)


def test_each_child_of_the_prefork_pool_disposes_what_it_has(folder: Path, ask: Any) -> None:
    with work(folder, "more", "--concurrency", "2") as server:
        answers = [ask("embed") for _ in range(3)]
        assert {answer["width"] for answer in answers} == {32}
        children = {answer["pid"] for answer in answers}
        assert server.process.pid not in children
        assert server.stop(signal.SIGTERM) == 0, server.output
        assert {line["pid"] for line in server.receipts} == children
        assert all(line["live"] == 0 and line["receipts"] for line in server.receipts)
        assert "Inherited" not in server.output


def test_a_child_that_is_recycled_disposes_what_it_has(folder: Path, ask: Any) -> None:
    with work(folder, "more", "--concurrency", "1", "--max-tasks-per-child", "1") as server:
        children = [ask("embed")["pid"] for _ in range(2)]
        assert len(set(children)) == 2
        until(lambda: len(server.receipts) == 2, "the receipts of both")
        assert server.stop(signal.SIGTERM) == 0, server.output
        assert [line["pid"] for line in server.receipts] == children
        assert all(line["live"] == 0 for line in server.receipts)


@pytest.mark.parametrize(
    ("pool", "how"),
    [
        ("solo", signal.SIGTERM),
        ("solo", signal.SIGINT),
        ("threads", signal.SIGTERM),
        ("gevent", signal.SIGTERM),
        ("gevent", signal.SIGINT),
    ],
)
def test_a_pool_without_children_disposes_what_it_has(
    folder: Path, ask: Any, pool: str, how: signal.Signals
) -> None:
    with work(folder, "more", "--pool", pool, "--concurrency", "2") as server:
        assert ask("embed") == {"width": 32, "pid": server.process.pid}
        assert server.stop(how) == EXIT_CODES[how], server.output
        (line,) = server.receipts
        assert (line["pid"], line["live"]) == (server.process.pid, 0)
        assert list(line["receipts"].values()) == [True]


def test_a_child_that_is_killed_in_a_task_is_replaced_and_the_next_disposes_what_it_has(
    folder: Path, ask: Any
) -> None:
    with work(folder, "more", "--concurrency", "1") as server:
        killed = ask("embed")["pid"]
        with pytest.raises(WorkerLostError):
            ask("killed")
        following = ask("embed")["pid"]
        assert following != killed
        assert server.stop(signal.SIGTERM) == 0, server.output
        (line,) = server.receipts
        assert (line["pid"], line["live"]) == (following, 0)


def test_a_worker_that_is_to_quit_at_once_ends_its_children(folder: Path, ask: Any) -> None:
    with work(folder, "more", "--concurrency", "1") as server:
        child = ask("embed")["pid"]
        assert server.stop(signal.SIGQUIT) == EXIT_CODES[signal.SIGQUIT], server.output
        (line,) = server.receipts
        assert (line["pid"], line["live"]) == (child, 0)


def test_what_was_made_before_the_fork_says_so_and_every_process_ends(
    folder: Path, ask: Any
) -> None:
    with work(folder, "more", "--concurrency", "1", BEFORE="yes") as server:
        assert "was made before this process was forked" in ask("before")["error"]
        assert ask("embed")["width"] == 32
        assert server.stop(signal.SIGINT) == 1, server.output  # as Celery ends at Ctrl-C
        assert "Inherited through a fork" in server.output
        assert len(server.receipts) == 1


def test_the_example_works_and_tells_what_came_back(folder: Path, ask: Any) -> None:
    with work(folder, "tasks", "--concurrency", "1") as server:
        assert len(ask("tasks.embed")) == 32
        assert server.stop(signal.SIGTERM) == 0, server.output
        assert "(verified)" in server.output


# Without a worker


def test_a_worker_that_starts_again_in_one_process_has_a_manager_again() -> None:
    told: list[object] = []
    pipelines = Pipelines(on_close=told.append, remember=False)
    try:
        for _ in range(2):
            signals.worker_init.send(sender=None)
            with pipelines.acquire("feature-extraction", MODEL) as pipe:
                assert pipe("tide", pooling="mean").shape == (1, 32)
            signals.worker_shutdown.send(sender=None)
            assert ebbtide.live() == []
        assert len(told) == 2
    finally:
        signals.worker_init.disconnect(pipelines._begin)


def test_an_unknown_option_is_named_where_it_is_made() -> None:
    with pytest.raises(OptionError, match="Did you mean 'budget'"):
        Pipelines(buget="1 GiB")  # type: ignore[call-arg]
