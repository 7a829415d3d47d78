"""A manager of each process: closed at its end, and none of a process's that was forked."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.integrations.served import MODEL

import ebbtide
from ebbtide.errors import InputError, OptionError
from ebbtide.integrations import per_process
from ebbtide.integrations.per_process import ProcessPipelines
from ebbtide.integrations.worker_end import end_of_worker, inherited
from ebbtide.manager import PipelineManager

USE = """
import os, sys
import ebbtide
from ebbtide.integrations.per_process import ProcessPipelines
from ebbtide.integrations.worker_end import inherited

def tell(receipts):
    verified = [receipt.verified for receipt in receipts.values()]
    print("closed", os.getpid(), verified, len(ebbtide.live()), flush=True)

pipelines = ProcessPipelines(on_close=tell, remember=False)

def use():
    with pipelines.acquire("feature-extraction", MODEL) as pipe:
        return pipe("tide", pooling="mean").shape[1]
"""


def test_the_end_of_the_process_closes_it_and_tells_what_came_back(fresh_process: Any) -> None:
    said = fresh_process(USE + "use()\nprint('used')")
    assert said.splitlines()[0] == "used"
    assert said.splitlines()[1].endswith("[True] 0")
    assert len(said.splitlines()) == 2


def test_a_process_that_exits_by_an_error_closes_it_too(fresh_process: Any) -> None:
    assert "[True] 0" in fresh_process(USE + "use()\nsys.exit(3)", code=3)


def test_a_process_that_asks_for_nothing_is_told_nothing_and_starts_nothing(
    fresh_process: Any,
) -> None:
    said = fresh_process(
        USE
        + """
import threading
print("threads", threading.active_count(), "onnxruntime" in sys.modules)
"""
    )
    assert said.splitlines() == ["threads 1 False"]


def test_each_forked_process_loads_for_itself_and_closes_its_own(fresh_process: Any) -> None:
    said = fresh_process(
        USE
        + """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
use()
for _ in range(2):
    child = os.fork()
    if child == 0:
        assert use() == 32
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
child = os.fork()
if child == 0:
    print("inherited", "Inherited through a fork" in inherited(), flush=True)
    sys.exit(7)  # it has used nothing, so it is told nothing
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert use() == 32
print("parent", os.getpid())
"""
    ).splitlines()
    closed = [line.split(maxsplit=2) for line in said if line.startswith("closed")]
    assert [rest for _, _, rest in closed] == ["[True] 0"] * 3
    assert len({pid for _, pid, _ in closed}) == 3
    assert f"parent {closed[-1][1]}" in said
    assert "inherited True" in said


def test_frameworks_that_are_not_installed_are_named_with_the_command(fresh_process: Any) -> None:
    said = fresh_process(
        """
        import importlib, sys
        from ebbtide.errors import MissingExtraError
        for name in ("celery", "django", "flask", "starlette"):
            sys.modules[name] = None
            try:
                importlib.import_module(f"ebbtide.integrations.{name}")
            except MissingExtraError as error:
                print(error.extra, error)
        """
    )
    for line, name in zip(
        said.splitlines(), ("celery", "django", "flask", "starlette"), strict=True
    ):
        assert line.startswith("frameworks ")
        assert f"need {name}" in line
        assert "pip install 'ebbtide[frameworks]'" in line


def test_the_end_of_a_worker_disposes_everything_whatever_fails(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(receipts: object) -> None:
        raise RuntimeError("the user's own")

    told: list[object] = []
    first = ProcessPipelines(on_close=fails, remember=False)
    second = ProcessPipelines(on_close=told.append, remember=False)
    for one in (first, second):
        with one.acquire("feature-extraction", MODEL):
            pass
    own = ebbtide.pipeline("feature-extraction", MODEL)
    with caplog.at_level(logging.ERROR):
        lines = end_of_worker()
    assert "could not be closed" in caplog.text
    assert len(told) == 1
    assert len(lines) == 2
    assert own.state is ebbtide.State.DISPOSED
    assert ebbtide.live() == []
    assert end_of_worker() == []


def test_it_may_be_closed_on_an_event_loop_and_opened_again() -> None:
    told: list[object] = []
    pipelines = ProcessPipelines(on_close=told.append, remember=False)

    async def use() -> None:
        async with pipelines.acquire("feature-extraction", MODEL) as pipe:
            await pipe.acall("tide")
        assert len(await pipelines.aclose()) == 1
        assert await pipelines.aclose() == {}

    asyncio.run(use())
    pipelines.reopen()
    asyncio.run(use())
    assert len(told) == 2


def test_one_that_was_never_used_may_be_dropped() -> None:
    pipelines = ProcessPipelines(remember=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        del pipelines
        gc.collect()
    assert [one for one in said if "collected" in str(one.message)] == []


def test_threads_that_come_first_at_the_same_time_get_one_manager(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipelines = ProcessPipelines(remember=False)
    both = threading.Barrier(2)
    made: list[PipelineManager] = []

    class Slow(PipelineManager):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            made.append(self)
            both.wait(30)

    monkeypatch.setattr(per_process, "PipelineManager", Slow)
    with ThreadPoolExecutor() as threads:
        first, second = threads.map(lambda _: pipelines.manager, range(2))
    assert first is second
    assert sorted(one.is_closed for one in made) == [False, True]
    pipelines.close()


def test_a_process_that_has_inherited_nothing_says_nothing() -> None:
    assert inherited() == ""


def test_a_value_that_cannot_be_used_is_told_at_once() -> None:
    with pytest.raises(InputError, match="budget"):
        ProcessPipelines(budget="plenty")


def test_an_unknown_option_is_named_at_once() -> None:
    with pytest.raises(OptionError, match="Did you mean 'budget'"):
        ProcessPipelines(buget="1 GiB")  # type: ignore[call-arg]
