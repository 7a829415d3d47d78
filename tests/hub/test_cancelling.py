"""A load that is given up ends at once, leaves nothing at work, and what had come is gone on with.

The client waits half a minute for the hub in all of these, and no test does.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import WeakFileLock

import ebbtide
from ebbtide import lifecycle
from ebbtide.hub import Repository
from ebbtide.hub.cache import FileInfo
from ebbtide.memory.ledger import ledger

from .loopback import Hub
from .served import NAME, ONNX, TASK, TINY, answers, assert_same_as_folder, ended, part_of, ranges

LOOK_UP = "/api/models/*"
CDN = f"/cdn/*/{ONNX}"
CUT = 100_000


def assert_released() -> None:
    """Nothing is left of a load: no lifecycle, no session and no tokenizer."""
    assert lifecycle._live == {}
    assert ledger._entries == {}


class There:
    """Tells when so much of the large file is there."""

    def __init__(self, loaded: int = CUT) -> None:
        self.loaded = loaded
        self.reached = threading.Event()

    def __call__(self, event: ebbtide.ProgressEvent) -> None:
        if event.get("file") == ONNX and event.get("loaded") == self.loaded:
            self.reached.set()


async def cancelled_when(reached: threading.Event, **options: Any) -> None:
    """Load in a task, and cancel it when the event is set."""
    task = asyncio.ensure_future(ebbtide.apipeline(TASK, NAME, **options))
    assert await asyncio.to_thread(reached.wait, 20)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 20)


def test_a_task_that_is_cancelled_during_the_look_up_ends_at_once(
    hub: Hub, tiny: str, cache: Path
) -> None:
    held = hub.fault(LOOK_UP, hold=True)
    asyncio.run(cancelled_when(held.reached))
    assert_released()
    held.end()
    ended()
    assert not cache.exists()
    assert_same_as_folder()


def test_a_task_that_is_cancelled_during_a_stalled_download_ends_at_once_and_is_resumed_later(
    hub: Hub, tiny: str, cache: Path
) -> None:
    stalled = hub.fault(CDN, stall_after=CUT)
    there = There()
    asyncio.run(cancelled_when(there.reached, progress=there))
    assert_released()
    before = len(hub.requests)
    stalled.end()
    ended()
    assert part_of(cache).stat().st_size == CUT
    assert len(hub.requests) == before
    assert_same_as_folder()
    assert ranges(hub) == [None, f"bytes={CUT}-"]


def test_the_loop_goes_on_while_a_model_is_downloaded(hub: Hub, tiny: str, cache: Path) -> None:
    stalled = hub.fault(CDN, stall_after=CUT)
    there = There()

    async def main() -> tuple[int, ...]:
        task = asyncio.ensure_future(ebbtide.apipeline(TASK, NAME, progress=there))
        assert await asyncio.to_thread(there.reached.wait, 20)
        await asyncio.sleep(0)
        stalled.end()
        async with await task as pipe:
            return (await pipe.acall("the tide")).shape

    assert asyncio.run(main()) == (1, 5, 32)


def test_a_load_on_another_thread_that_is_cancelled_ends_at_once(
    hub: Hub, tiny: str, cache: Path
) -> None:
    stalled = hub.fault(CDN, stall_after=CUT)
    there = There()
    errors: list[BaseException] = []

    def load() -> None:
        try:
            ebbtide.pipeline(TASK, NAME, progress=there)
        except ebbtide.EbbtideError as error:
            errors.append(error)

    loading = threading.Thread(target=load)
    loading.start()
    assert there.reached.wait(20)
    (loads,) = lifecycle._live.values()
    loads.request(cancel=True)
    loading.join(20)
    assert [type(one) for one in errors] == [ebbtide.PipelineCancelledError]
    assert_released()
    stalled.end()
    ended()


def test_after_a_cancellation_nothing_more_is_asked_for_though_the_connection_breaks(
    hub: Hub, tiny: str, cache: Path
) -> None:
    refused = hub.fault(CDN, hold=True, refuse=True, times=None)
    asyncio.run(cancelled_when(refused.reached))
    refused.release.set()  # each request that now came would be refused, and tried again
    ended()
    assert ranges(hub) == [None]


def test_a_load_that_waits_for_another_processs_download_is_cancelled_and_leaves_no_thread(
    hub: Hub, tiny: str, cache: Path
) -> None:
    place = Repository(cache, NAME)
    lock = place.lock(FileInfo(ONNX, 0, part_of(cache).name.partition(".")[0]))
    lock.parent.mkdir(parents=True)
    started = threading.Event()

    def tell(event: ebbtide.ProgressEvent) -> None:
        if event["status"] == "done" and event["file"] == "tokenizer.json":
            started.set()

    with WeakFileLock(lock):
        asyncio.run(cancelled_when(started, progress=tell))
        ended()
    assert ranges(hub) == []


@pytest.mark.parametrize(
    ("call", "pattern"),
    [("pipeline", LOOK_UP), ("pipeline", CDN), ("model_files", "*/config.json")],
    ids=["during the look-up", "during a download", "while looking at a model"],
)
def test_ctrl_c_ends_the_wait_at_once_and_the_process_quietly(
    hub: Hub, tiny: str, cache: Path, child: Any, call: str, pattern: str
) -> None:
    held = hub.fault(pattern, hold=True)
    script = f"""
        import ebbtide
        try:
            ebbtide.{call}("{TASK}", "{NAME}")
        except KeyboardInterrupt:
            print("interrupted", ebbtide.live())
    """
    process = child(script)
    assert held.reached.wait(20)
    process.process.send_signal(signal.SIGINT)
    assert process.result(timeout=20) == (0, "interrupted []\n", "")
    held.end()
    assert_same_as_folder()


def test_ctrl_c_in_the_middle_of_a_file_leaves_its_part_for_the_next_process(
    hub: Hub, tiny: str, cache: Path, child: Any
) -> None:
    stalled = hub.fault(CDN, stall_after=CUT)
    script = f"""
        import ebbtide
        def tell(event):
            if event.get("file") == "{ONNX}" and event.get("loaded") == {CUT}:
                print("there", flush=True)
        ebbtide.pipeline("{TASK}", "{NAME}", progress=tell)
    """
    process = child(script)
    process.until("there")
    process.process.send_signal(signal.SIGINT)
    code, _, told = process.result(timeout=20)
    assert code != 0
    assert told.rstrip().endswith("KeyboardInterrupt")
    stalled.end()
    there = part_of(cache).stat().st_size
    assert 0 < there <= CUT
    assert_same_as_folder()
    assert ranges(hub) == [None, f"bytes={there}-"]


def test_a_process_that_ends_during_a_download_does_not_wait_for_it(
    hub: Hub, tiny: str, cache: Path, child: Any
) -> None:
    stalled = hub.fault(CDN, stall_after=CUT)
    script = f"""
        import threading
        import ebbtide
        there = threading.Event()
        def tell(event):
            if event.get("file") == "{ONNX}" and event.get("loaded") == {CUT}:
                there.set()
        def load():
            try:
                ebbtide.pipeline("{TASK}", "{NAME}", progress=tell)
            except ebbtide.PipelineCancelledError:
                print("cancelled", flush=True)
        loading = threading.Thread(target=load, daemon=True)
        loading.start()
        assert there.wait(20)
    """
    process = child(script)
    code, out, told = process.result(timeout=20)
    assert (code, told) == (0, "")
    assert out.strip() in {"", "cancelled"}
    stalled.end()


# What is told of a download may fail, and may use Ebbtide


class Refused(Exception):
    """What a callback of a user's raises."""


@pytest.mark.parametrize("status", ["initiate", "download", "progress", "progress_total"])
def test_a_callback_that_raises_fails_the_load_with_its_error_and_nothing_goes_on(
    hub: Hub, tiny: str, cache: Path, status: str
) -> None:
    stalled = hub.fault(CDN, stall_after=CUT)

    def tell(event: ebbtide.ProgressEvent) -> None:
        about: Any = event.get("files", {event.get("file"): event}).get(ONNX)
        if event["status"] == status and about and about.get("loaded", CUT) == CUT:
            raise Refused

    with pytest.raises(Refused):
        ebbtide.pipeline(TASK, NAME, progress=tell)
    assert_released()
    before = len(ranges(hub))
    stalled.end()
    ended()
    assert not part_of(cache).exists() or part_of(cache).stat().st_size <= CUT
    assert not part_of(cache).with_suffix("").exists()
    assert len(ranges(hub)) <= max(before, 1)
    assert_same_as_folder()


@pytest.mark.parametrize("status", ["done", "ready"])
def test_a_callback_that_raises_when_all_is_there_fails_the_load_too(
    hub: Hub, tiny: str, cache: Path, status: str
) -> None:
    def tell(event: ebbtide.ProgressEvent) -> None:
        if event["status"] == status:
            raise Refused

    with pytest.raises(Refused):
        ebbtide.pipeline(TASK, NAME, progress=tell)
    assert_released()
    ended()
    assert_same_as_folder()


def other_uses(pipe: Any) -> dict[str, Callable[[], Any]]:
    """What else a callback may do."""
    return {
        "dispose another": lambda: pipe.dispose(),
        "use another": lambda: pipe("the tide"),
        "load another": lambda: answers(TINY),
        "look at the cache": ebbtide.cached_models,
    }


@pytest.mark.parametrize("use", ["dispose another", "use another", "load another",
                                 "look at the cache"])  # fmt: skip
@pytest.mark.parametrize("status", ["progress", "ready"])
def test_a_callback_may_use_ebbtide(
    hub: Hub, tiny: str, cache: Path, status: str, use: str
) -> None:
    with ebbtide.pipeline(TASK, TINY, dtype="q8") as pipe:
        what = other_uses(pipe)[use]

        def tell(event: ebbtide.ProgressEvent) -> None:
            if event["status"] == status:
                what()

        with ebbtide.pipeline(TASK, NAME, progress=tell) as loaded:
            assert loaded("the tide").shape == (1, 5, 32)
    assert pipe.state is ebbtide.State.DISPOSED
