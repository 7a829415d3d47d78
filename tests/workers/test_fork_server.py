"""Workers that are forked from a process which has imported everything already."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.workers.watched import call, until

import ebbtide
from ebbtide.errors import WorkerCrashedError
from ebbtide.workers import forking
from ebbtide.workers.forking import fork_server
from ebbtide.workers.options import IsolateOptions

FORKED = IsolateOptions(start="fork-server")


@pytest.fixture(autouse=True)
def _no_server_is_left() -> Iterator[None]:
    yield
    fork_server.stop()
    until(lambda: fork_server.pid is None)


def load(model: Path, isolate: Any = FORKED) -> Any:
    return ebbtide.pipeline("feature-extraction", model, isolate=isolate)


def test_workers_are_forked_from_one_server_and_give_the_same(tiny_bert: Path) -> None:
    with load(tiny_bert, False) as here, load(tiny_bert) as one, load(tiny_bert) as other:
        assert (one("the sea") == here("the sea")).all()
        assert (other("the sea") == here("the sea")).all()
        parents = {Path(f"/proc/{pipe.pid}/stat").read_text().split()[3] for pipe in (one, other)}
        assert parents == {str(fork_server.pid)}
        assert one.pid != other.pid
    assert "ended with exit status 0" in one.dispose().reasons[0]
    assert "there: released" in one.dispose().reasons[1]


def test_what_the_server_has_too_is_not_charged(tiny_bert: Path) -> None:
    with load(tiny_bert) as forked, load(tiny_bert, True) as spawned:
        assert forked.memory.anonymous < spawned.memory.anonymous / 2


def test_what_the_first_call_takes_is_charged_with_its_answer(strange: Any) -> None:
    pipe = strange()
    before = pipe.memory.anonymous
    call(pipe, "fill", 40_000_000)
    assert pipe.memory.anonymous - before > 39_000_000


def test_a_crash_of_a_worker_is_told_with_its_signal(strange: Any) -> None:
    with strange(start="fork-server") as pipe:
        with pytest.raises(WorkerCrashedError, match="SIGABRT"):
            pipe._made("abort", (), {}).wait()
        assert pipe("the sea").shape == (1, 4, 32)


def test_a_server_that_is_killed_takes_its_workers_along_and_is_replaced(tiny_bert: Path) -> None:
    with load(tiny_bert) as pipe:
        pid, server = pipe.pid, fork_server.pid
        assert server is not None
        os.kill(server, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{pid}").exists())
        until(lambda: pipe.pid is None)
        assert pipe("the sea").shape == (1, 4, 32)
        assert fork_server.pid not in (None, server)


def test_a_server_without_workers_ends_after_a_while(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forking, "LINGER", 0.05)
    with load(tiny_bert) as pipe:
        assert fork_server.pid is not None
        assert pipe("the sea").shape == (1, 4, 32)
    until(lambda: fork_server.pid is None)
    with load(tiny_bert) as pipe:
        assert pipe("the sea").shape == (1, 4, 32)


def test_the_environment_is_that_of_this_process_now(
    strange: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with strange(start="fork-server"):
        monkeypatch.setenv("A_WORD", "sea")
        with strange(start="fork-server") as pipe:
            assert pipe._made("variable", ("A_WORD",), {}).wait() == "sea"


def test_a_memory_limit_holds_for_a_forked_worker_too(strange: Any) -> None:
    with strange(start="fork-server", memory_limit="100 MB") as pipe:
        with pytest.raises(ebbtide.errors.WorkerMemoryError):
            pipe._made("fill", (600_000_000,), {}).wait()
        assert pipe("the sea").shape == (1, 4, 32)
