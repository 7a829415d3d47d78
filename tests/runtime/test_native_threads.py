"""Jobs on Ebbtide's own threads: their context, their errors, and how they are stopped."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ebbtide
from ebbtide import runtime
from ebbtide.cancellation import CancelToken, own_thread
from ebbtide.runtime import Job, SessionOptions, native_threads

VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE", default="unset")


def submit(function: Callable[[], Any], token: CancelToken | None = None) -> Job[Any]:
    return native_threads.submit(function, token or CancelToken("the test"), lambda: None)


def test_a_job_runs_on_a_thread_of_ebbtides_own() -> None:
    def where() -> tuple[str, bool]:
        return threading.current_thread().name, own_thread.is_own

    name, own = submit(where).wait()
    assert name.startswith("ebbtide-native-")
    assert own
    assert not own_thread.is_own


def test_a_job_sees_the_context_of_its_caller_and_changes_nothing_in_it() -> None:
    def work() -> str:
        seen = VARIABLE.get()
        VARIABLE.set("changed by the job")
        return seen

    token = VARIABLE.set("the caller's")
    try:
        job = submit(work)
        assert job.wait() == "the caller's"
        assert VARIABLE.get() == "the caller's"
    finally:
        VARIABLE.reset(token)
    assert submit(VARIABLE.get).wait() == "unset"


def test_jobs_of_several_threads_each_see_their_own_context() -> None:
    found: dict[str, str] = {}

    def caller(name: str) -> None:
        VARIABLE.set(name)
        found[name] = submit(VARIABLE.get).wait()

    threads = [threading.Thread(target=caller, args=(f"caller {n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {f"caller {n}": f"caller {n}" for n in range(8)}


def test_a_job_within_a_job_runs_at_once_on_the_same_thread() -> None:
    order: list[str] = []

    def inner() -> int:
        order.append("inner")
        return threading.get_ident()

    def outer() -> tuple[int, int]:
        job = submit(inner)
        order.append("submitted")
        return threading.get_ident(), job.wait()

    outer_thread, inner_thread = submit(outer).wait()
    assert outer_thread == inner_thread
    assert order == ["inner", "submitted"]


def test_cancelling_a_job_cancels_the_job_within_it() -> None:
    outer_token, inner_token = CancelToken("outer"), CancelToken("inner")
    running = threading.Event()

    def inner() -> None:
        running.set()
        while not inner_token.cancelled:
            pass
        inner_token.check()

    job = submit(lambda: submit(inner, inner_token).wait(), outer_token)
    assert running.wait(30)
    outer_token.cancel()
    with pytest.raises(ebbtide.PipelineCancelledError, match="inner"):
        job.wait()
    assert not outer_token._hooks


def test_more_jobs_than_threads_all_come_to_their_end() -> None:
    jobs = [submit(lambda n=n: n * n) for n in range(100)]
    assert [job.wait() for job in jobs] == [n * n for n in range(100)]


def test_leaving_happens_once_and_before_the_caller_goes_on() -> None:
    left: list[str] = []

    def fails() -> None:
        raise KeyError("fails")

    job = native_threads.submit(lambda: 1, CancelToken("a"), lambda: left.append("good"))
    job.wait()
    assert left == ["good"]
    bad = native_threads.submit(fails, CancelToken("b"), lambda: left.append("bad"))
    with pytest.raises(KeyError):
        bad.wait()
    assert left == ["good", "bad"]


def test_a_job_that_is_cancelled_before_its_turn_never_runs() -> None:
    token = CancelToken("early")
    token.cancel()
    ran: list[int] = []
    with pytest.raises(ebbtide.PipelineCancelledError):
        submit(lambda: ran.append(1), token).wait()
    assert ran == []


class Held:
    """Something large that a frame holds."""


def test_an_error_comes_with_its_lines_and_pins_nothing_of_its_frames() -> None:
    left: list[weakref.ref[Held]] = []

    def deepest() -> None:
        held = Held()
        left.append(weakref.ref(held))
        raise ZeroDivisionError("from the depth")

    def middle() -> None:
        held = Held()
        left.append(weakref.ref(held))
        try:
            deepest()
        except ZeroDivisionError as error:
            raise LookupError("from the middle") from error

    with pytest.raises(LookupError, match="from the middle") as caught:
        submit(middle).wait()
    names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert names[-1] == "middle"
    cause = caught.value.__cause__
    assert isinstance(cause, ZeroDivisionError)
    assert traceback.extract_tb(cause.__traceback__)[-1].name == "deepest"
    assert len(left) == 2
    assert [one() for one in left] == [None, None]


def test_a_job_that_failed_leaves_no_cycle_for_the_collector() -> None:
    def fails() -> None:
        raise ValueError("no cycle")

    gc.collect()
    gc.disable()
    try:
        error_died = []
        try:
            submit(fails).wait()
        except ValueError as error:
            holder = type("Holder", (), {})()
            error.holder = holder  # type: ignore[attr-defined]
            error_died.append(weakref.ref(holder))
            del holder
        assert error_died[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError])
def test_any_kind_of_error_reaches_the_caller_and_the_thread_goes_on(
    error: type[BaseException],
) -> None:
    def fails() -> None:
        raise error

    for _ in range(20):
        with pytest.raises(error):
            submit(fails).wait()
    assert submit(lambda: "alive").wait() == "alive"


def test_a_result_reaches_an_event_loop() -> None:
    async def main() -> list[int]:
        return await asyncio.gather(*(submit(lambda n=n: n).result() for n in range(20)))

    assert asyncio.run(main()) == list(range(20))


def test_cancelling_a_task_cancels_its_job_and_waits_for_the_end() -> None:
    token = CancelToken("the task")
    running, ended = threading.Event(), threading.Event()

    def work() -> None:
        running.set()
        while not token.cancelled:
            pass
        ended.set()

    async def main() -> None:
        task = asyncio.ensure_future(submit(work, token).result())
        while not running.is_set():
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()

    asyncio.run(main())
    assert token.cancelled


def test_an_interrupt_of_the_waiting_main_thread_cancels_the_job(fresh_process: Any) -> None:
    seen = fresh_process(
        """
        import signal, sys, threading
        from ebbtide.cancellation import CancelToken
        from ebbtide.runtime import native_threads

        main = threading.main_thread().ident
        token = CancelToken("the test")
        ended = []

        def waiting():
            return sys._current_frames()[main].f_code.co_qualname == "OneShot.wait"

        def work():
            while not waiting():
                pass
            signal.pthread_kill(main, signal.SIGINT)
            while not token.cancelled:
                pass
            ended.append(True)
            token.check()

        job = native_threads.submit(work, token, lambda: None)
        try:
            job.wait()
        except KeyboardInterrupt:
            assert ended, "the interrupt came through before the native run had ended"
            print("interrupted, cancelled and waited for")
        assert native_threads.submit(lambda: "alive", CancelToken("b"), lambda: None).wait()
        """
    )
    assert "interrupted, cancelled and waited for" in seen


class WatchedToken(CancelToken):
    """Tells when a native run has a way to be stopped, and on which thread it is."""

    __slots__ = ("attached", "thread")

    def __init__(self, label: str) -> None:
        super().__init__(label)
        self.attached = threading.Event()
        self.thread = 0

    def attach(self, hook: Callable[[], None]) -> None:
        super().attach(hook)
        self.thread = threading.get_ident()
        self.attached.set()


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="needs a thread's CPU clock")
def test_a_cancellation_from_another_thread_stops_a_native_run_in_its_middle(
    tiny_bert: Path,
) -> None:
    session = runtime.open_session(
        tiny_bert / "onnx" / "model.onnx", "cpu", SessionOptions(threads=1), CancelToken("load")
    )
    shape = (64, 512)
    feeds = {
        "input_ids": np.full(shape, 7, np.int64),
        "attention_mask": np.ones(shape, np.int64),
        "token_type_ids": np.zeros(shape, np.int64),
    }
    token = WatchedToken("the long run")
    job = submit(lambda: session.run(feeds, ["last_hidden_state"], token), token)
    assert token.attached.wait(30)
    clock = time.pthread_getcpuclockid(token.thread)
    started = time.clock_gettime(clock)
    while time.clock_gettime(clock) < started + 0.02 and not job._done:
        pass
    assert not job._done, "the run was too short to be stopped"
    token.cancel()
    with pytest.raises(ebbtide.PipelineCancelledError, match="the long run"):
        job.wait()
    small = {name: array[:1, :4] for name, array in feeds.items()}
    again = session.run(small, ["last_hidden_state"], CancelToken("next"))
    assert again[0].shape == (1, 4, 32)
    assert not session.close()


@pytest.mark.parametrize("count", [1, 3])
def test_the_number_of_native_threads_is_a_setting(fresh_process: Any, count: int) -> None:
    seen = fresh_process(
        """
        import threading
        import ebbtide
        from ebbtide.cancellation import CancelToken
        from ebbtide.runtime import native_threads
        with ebbtide.pipeline("embeddings", MODEL) as pipe:
            go = threading.Event()
            job = lambda: native_threads.submit(go.wait, CancelToken("a"), lambda: None)
            jobs = [job() for _ in range(5)]
            while len(native_threads._threads) < COUNT:
                pass
            go.set()
            for job in jobs:
                job.wait()
            names = [one.name for one in threading.enumerate()]
        print(sum(name.startswith("ebbtide-native") for name in names))
        """.replace("COUNT", str(count)),
        EBBTIDE_NATIVE_THREADS=str(count),
    )
    assert seen.strip() == str(count)


# Work that several threads share


def each(items: Any, work: Callable[[Any], Any], helpers: int = 1) -> list[Any]:
    """What comes of it, as a call on a native thread sees it."""
    token = CancelToken("the test")
    return submit(
        lambda: list(native_threads.each(items, work, token, helpers=helpers)), token
    ).wait()


def test_every_item_is_worked_on_once() -> None:
    for helpers in (0, 1, 7):
        found = each(range(100), lambda item: item * item, helpers)
        assert sorted(found) == [item * item for item in range(100)]
    assert each([], lambda item: item) == []
    assert each([1, 2], lambda item: None) == [None, None]


def test_two_threads_work_at_once_on_what_one_call_has_to_do() -> None:
    together = threading.Barrier(2, timeout=60)
    names = each(range(2), lambda item: (together.wait(), threading.current_thread().name)[1])
    assert len(set(names)) == 2


def test_nobody_waits_for_a_thread_that_is_busy_elsewhere(fresh_process: Any) -> None:
    fresh_process(
        """
        import threading, ebbtide
        from ebbtide.cancellation import CancelToken
        from ebbtide.runtime import native_threads

        ebbtide.settings.native_threads = 2
        free, busy, token = threading.Event(), threading.Event(), CancelToken("test")
        other = native_threads.submit(lambda: (busy.set(), free.wait()), token, lambda: None)
        busy.wait()

        def work():
            return list(native_threads.each(range(3), lambda item: item, token, helpers=1))

        assert native_threads.submit(work, token, lambda: None).wait() == [0, 1, 2]
        free.set()
        other.wait()
        """
    )


def test_a_job_that_comes_meanwhile_runs_before_a_helpers_next_item(fresh_process: Any) -> None:
    fresh_process(
        """
        import threading, ebbtide
        from ebbtide.cancellation import CancelToken
        from ebbtide.runtime import native_threads

        ebbtide.settings.native_threads = 2
        token, came = CancelToken("test"), threading.Event()
        both, order, first = threading.Barrier(2), [], threading.Event()

        def item(number):
            if number < 2:
                both.wait()  # one here, one on the other thread
                first.set()
            if number == (0 if threading.current_thread().name == caller else 1):
                came.wait()
            if number >= 2 and threading.current_thread().name == caller:
                done.wait()  # the other thread alone can go on: with the job that came
            return number

        def work():
            global caller
            caller = threading.current_thread().name
            return sorted(native_threads.each(range(5), item, token, helpers=1))

        done = threading.Event()
        call = native_threads.submit(work, token, lambda: None)
        first.wait()
        job = native_threads.submit(lambda: done.set(), token, lambda: None)
        came.set()
        job.wait()
        assert call.wait() == [0, 1, 2, 3, 4]
        """
    )


def test_what_fails_on_another_thread_is_raised_once_all_that_was_begun_has_ended() -> None:
    together = threading.Barrier(2, timeout=60)
    begun: list[int] = []
    caller: list[str] = []

    def work(item: int) -> int:
        begun.append(item)
        together.wait()
        if threading.current_thread().name != caller[0]:
            raise ValueError("on the other thread")
        return item

    def call() -> None:
        caller.append(threading.current_thread().name)
        for _ in native_threads.each(range(2), work, CancelToken("the test"), helpers=1):
            pass

    with pytest.raises(ValueError, match="on the other thread"):
        submit(call).wait()
    assert sorted(begun) == [0, 1]


def test_who_turns_away_waits_for_what_others_have_begun_and_begins_no_more() -> None:
    together = threading.Barrier(2, timeout=60)
    turned, ended = threading.Event(), threading.Event()
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        together.wait()
        if threading.current_thread().name != caller[0]:
            turned.wait()
            ended.set()
        return item

    caller: list[str] = []

    def call() -> bool:
        caller.append(threading.current_thread().name)
        results = native_threads.each(range(9), work, CancelToken("the test"), helpers=1)
        next(results)
        turned.set()
        results.close()
        return ended.is_set()

    assert submit(call).wait()
    assert sorted(begun) == [0, 1]


def test_a_cancelled_call_stops_what_runs_on_other_threads() -> None:
    together = threading.Barrier(3, timeout=60)
    token = CancelToken("the test")

    def work(item: int) -> None:
        together.wait()
        while not token.cancelled:
            pass
        token.check()

    job = submit(lambda: list(native_threads.each(range(9), work, token, helpers=1)), token)
    together.wait()
    token.cancel()
    with pytest.raises(ebbtide.PipelineCancelledError):
        job.wait()


def test_a_trim_has_idle_threads_empty_their_caches_and_waits_for_no_busy_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ebbtide.memory import reclaim
    from ebbtide.memory.allocator import allocator

    names: list[str] = []
    both, free = threading.Barrier(3, timeout=60), threading.Event()
    jobs = [submit(lambda: (both.wait(), free.wait())) for _ in range(2)]
    both.wait()
    monkeypatch.setattr(
        allocator, "empty_thread_cache", lambda: names.append(threading.current_thread().name)
    )
    reclaim()
    free.set()
    for job in jobs:
        job.wait()
    names.clear()
    reclaim()
    assert any(name.startswith("ebbtide-native") for name in names)
