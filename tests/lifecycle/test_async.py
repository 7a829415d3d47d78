"""4.8: on an event loop everything is as on threads, and the loop is never held up."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ebbtide
from ebbtide import PipelineCancelledError, PipelineDisposedError, State
from ebbtide.cancellation import OneShot, call_all
from ebbtide.memory.ledger import ledger
from ebbtide.memory.reaper import reaper
from ebbtide.models.tokenizer import Tokenizer


async def until(semaphore: threading.Semaphore) -> None:
    """Wait for a run to have begun, without holding the loop up."""
    assert await asyncio.to_thread(semaphore.acquire, timeout=30)


async def turns(count: int = 50) -> None:
    """Let the loop go round."""
    for _ in range(count):
        await asyncio.sleep(0)


class Slow:
    """A run that goes on after its cancellation until it is released, as a long kernel does."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.ended = threading.Event()

    def __call__(self) -> None:
        assert self.release.wait(30), "the test never released the run"
        self.ended.set()


@pytest.mark.parametrize("inputs", ["the sea", ["the sea", "a longer text about the wind"]])
def test_acall_gives_what_the_call_gives(tiny_bert: Path, inputs: Any) -> None:
    with ebbtide.pipeline("feature-extraction", tiny_bert) as pipe:
        for options in ({}, {"pooling": "mean", "normalize": True}, {"batch_size": 1}):
            found = asyncio.run(pipe.acall(inputs, **options))
            assert np.array_equal(found, pipe(inputs, **options))


def test_acalls_at_the_same_time_each_get_their_own_result(tiny_bert: Path) -> None:
    texts = [f"text {number} " + "word " * number for number in range(24)]
    with ebbtide.pipeline("feature-extraction", tiny_bert) as pipe:
        expected = [pipe(text, pooling="mean") for text in texts]

        async def main() -> list[Any]:
            return await asyncio.gather(*(pipe.acall(text, pooling="mean") for text in texts))

        found = asyncio.run(main())
    assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_the_errors_of_an_acall_are_those_of_the_call(tiny_bert: Path) -> None:
    with ebbtide.pipeline("feature-extraction", tiny_bert) as pipe:
        with pytest.raises(ebbtide.InputError, match=r"lone surrogate|Unicode"):
            asyncio.run(pipe.acall("a \ud800 lone surrogate"))
        with pytest.raises(ebbtide.OptionError, match="pooling"):
            asyncio.run(pipe.acall("text", poolin="mean"))  # type: ignore[call-arg]
        with pytest.raises(ebbtide.InputError, match="Unknown pooling"):
            asyncio.run(pipe.acall("text", pooling="average"))  # type: ignore[arg-type]
    with pytest.raises(PipelineDisposedError, match="Make a new one"):
        asyncio.run(pipe.acall("text"))


def test_the_loop_goes_on_while_a_native_run_goes_on(waiting) -> None:
    pipe, session = waiting()

    async def main() -> None:
        task = asyncio.create_task(pipe.acall("the sea"))
        await until(session.entered)
        await turns()
        assert not task.done()
        session.go.set()
        assert (await task).ndim == 3

    asyncio.run(main())
    pipe.dispose()


def test_cancelling_the_task_terminates_the_native_run(tiny_bert: Path) -> None:
    started = threading.Semaphore(0)
    ended: list[str] = []
    with ebbtide.pipeline("feature-extraction", tiny_bert) as pipe:
        session = pipe._model._session.value.native
        native = session._native

        class Told:
            def run(self, *arguments: Any) -> Any:
                started.release()
                try:
                    return native.run(*arguments)
                except Exception as error:
                    ended.append(str(error))
                    raise

        async def main() -> None:
            texts = ["word " * 500] * 256
            task = asyncio.create_task(pipe.acall(texts, pooling="mean", batch_size=256))
            await until(started)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert len(ended) == 1, "the run had ended when the cancellation came through"
            assert "terminate" in ended[0]
            assert pipe._lifecycle.running == {}

        session._native = Told()
        try:
            asyncio.run(main())
        finally:
            session._native = native
        assert pipe("still there", pooling="mean").shape == (1, 32)


def test_a_cancelled_task_ends_only_after_the_run_and_leaves_a_pipeline_that_works(
    waiting,
) -> None:
    slow = Slow()
    pipe, session = waiting(slow)

    async def main() -> None:
        task = asyncio.create_task(pipe.acall("the sea"))
        await until(session.entered)
        task.cancel()
        await turns()
        assert not task.done(), "it gave up a run that was still going on"
        slow.release.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()
        assert slow.ended.is_set()
        assert pipe._lifecycle.running == {}
        session.inside = lambda: None
        assert (await pipe.acall("again")).ndim == 3

    asyncio.run(main())
    pipe.dispose()


def test_a_task_that_is_cancelled_twice_still_waits_for_the_run(waiting) -> None:
    slow = Slow()
    pipe, session = waiting(slow)

    async def main() -> None:
        task = asyncio.create_task(pipe.acall("the sea"))
        await until(session.entered)
        for _ in range(2):
            task.cancel()
            await turns()
            assert not task.done()
        slow.release.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert slow.ended.is_set()

    asyncio.run(main())
    pipe.dispose()


def test_who_cancels_all_tasks_of_the_loop_does_not_cut_the_wait_short(waiting) -> None:
    """As `asyncio.run` does at its end: no task of Ebbtide's own may be among them."""
    slow = Slow()
    pipe, session = waiting(slow)

    async def main() -> None:
        mine = asyncio.create_task(pipe.acall("the sea"))
        await until(session.entered)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await turns()
        early = mine.done()
        slow.release.set()
        with pytest.raises(asyncio.CancelledError):
            await mine
        assert not early, "the task ended while its native run went on"
        assert slow.ended.is_set()

    asyncio.run(main())
    pipe.dispose()


def test_a_run_that_a_cancellation_meets_at_its_very_end_is_still_a_cancellation(
    waiting,
) -> None:
    pipe, session = waiting()

    async def main() -> None:
        task = asyncio.create_task(pipe.acall("the sea"))
        await until(session.entered)
        running = next(iter(pipe._lifecycle.running))
        session.go.set()
        while running in pipe._lifecycle.running:
            time.sleep(0)  # the loop is held up, so the outcome waits while the task is cancelled
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    pipe.dispose()


@pytest.mark.parametrize("way", ["wait_for", "timeout"])
def test_a_timeout_stops_the_run_and_is_a_timeout(waiting, way: str) -> None:
    pipe, session = waiting()

    async def impatient() -> None:
        async with asyncio.timeout(0.01):
            await pipe.acall("the sea")

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await (impatient() if way == "timeout" else asyncio.wait_for(pipe.acall("sea"), 0.01))
        assert pipe._lifecycle.running == {}
        assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]

    asyncio.run(main())
    assert session.go.is_set(), "only the cancellation let it go"
    pipe.dispose()


def test_a_task_group_that_fails_cancels_its_calls(waiting) -> None:
    pipe, session = waiting()

    async def fail() -> None:
        await until(session.entered)
        raise ValueError("the other task failed")

    calls: list[asyncio.Task[Any]] = []

    async def together() -> None:
        async with asyncio.TaskGroup() as group:
            calls.extend(group.create_task(pipe.acall("the sea")) for _ in range(4))
            group.create_task(fail())

    async def main() -> None:
        with pytest.raises(ExceptionGroup, match="unhandled"):
            await together()
        assert len(calls) == 4
        assert all(one.cancelled() for one in calls)
        assert pipe._lifecycle.running == {}

    asyncio.run(main())
    pipe.dispose()


def test_adispose_drains_the_acalls_that_run(waiting) -> None:
    pipe, session = waiting()

    async def main() -> None:
        calls = [asyncio.create_task(pipe.acall("the sea")) for _ in range(5)]
        await until(session.entered)
        disposing = asyncio.create_task(pipe.adispose())
        while pipe.state is State.READY:
            await asyncio.sleep(0)
        with pytest.raises(PipelineDisposedError, match="disposing"):
            await pipe.acall("refused")
        assert not disposing.done()
        session.go.set()
        receipt = await disposing
        assert all(one.ndim == 3 for one in await asyncio.gather(*calls))
        assert await pipe.adispose() is receipt

    asyncio.run(main())
    assert session.closed == 1


def test_adispose_with_cancel_ends_the_acalls_that_run(waiting) -> None:
    pipe, session = waiting()

    async def main() -> None:
        calls = [asyncio.create_task(pipe.acall("the sea")) for _ in range(5)]
        await until(session.entered)
        await pipe.adispose(cancel=True)
        for one in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(one, PipelineCancelledError)

    asyncio.run(main())
    assert session.closed == 1
    assert pipe.state is State.DISPOSED


def test_adispose_tells_the_first_asker_of_a_failing_release(waiting) -> None:
    pipe, session = waiting()
    session.failing = RuntimeError("the driver is gone")
    with pytest.raises(ebbtide.DisposalError, match="driver is gone"):
        asyncio.run(pipe.adispose())
    assert asyncio.run(pipe.adispose()) is pipe.dispose()


@pytest.mark.parametrize("timeout", [-1, float("nan")])
def test_adispose_refuses_a_timeout_that_is_no_time(waiting, timeout: float) -> None:
    pipe, _ = waiting()
    with pytest.raises(ebbtide.InputError, match="0 or more"):
        asyncio.run(pipe.adispose(timeout=timeout))
    assert pipe.state is State.READY
    pipe.dispose()


def test_a_dispose_on_the_loops_own_thread_does_not_wait_for_the_loop(waiting) -> None:
    """The calls end on native threads, so the loop need not turn for the drain."""
    pipe, session = waiting()

    def let_go() -> None:
        while pipe.state is State.READY:
            time.sleep(0)
        session.go.set()

    async def main() -> None:
        calls = [asyncio.create_task(pipe.acall("the sea")) for _ in range(4)]
        await until(session.entered)
        letting = threading.Thread(target=let_go)
        letting.start()
        receipt = pipe.dispose(timeout=1000)
        letting.join()
        assert receipt.verified
        assert all(one.ndim == 3 for one in await asyncio.gather(*calls))

    asyncio.run(main())
    assert session.closed == 1


@pytest.mark.parametrize("cancel", [False, True])
def test_a_dispose_from_a_callback_of_the_loop_completes(waiting, cancel: bool) -> None:
    pipe, session = waiting()
    receipts: list[ebbtide.DisposalReceipt] = []

    async def main() -> None:
        task = asyncio.create_task(pipe.acall("the sea"))
        await until(session.entered)
        if not cancel:
            session.go.set()
        done = asyncio.Event()

        def callback() -> None:
            receipts.append(pipe.dispose(cancel=cancel))
            done.set()

        asyncio.get_running_loop().call_soon(callback)
        await done.wait()
        if cancel:
            with pytest.raises(PipelineCancelledError):
                await task
        else:
            assert (await task).ndim == 3

    asyncio.run(main())
    assert receipts[0].verified
    assert pipe.state is State.DISPOSED


def test_a_cancelled_adispose_goes_on_to_its_end(waiting) -> None:
    pipe, session = waiting()

    async def main() -> None:
        task = asyncio.create_task(pipe.acall("the sea"))
        await until(session.entered)
        disposing = asyncio.create_task(pipe.adispose(timeout=1000))
        while pipe.state is State.READY:
            await asyncio.sleep(0)
        disposing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await disposing
        assert pipe.state is State.DISPOSING
        assert session.closed == 0
        session.go.set()
        assert (await task).ndim == 3
        assert (await pipe.adispose()).verified

    asyncio.run(main())
    assert session.closed == 1


def test_a_pipeline_that_is_dropped_while_it_is_being_disposed_was_not_forgotten(
    waiting,
) -> None:
    """Its user asked for the disposal and gave up the wait: no warning is due."""
    pipe, session = waiting()
    lifecycle = pipe._lifecycle

    async def main(pipe: Any) -> None:
        task = asyncio.create_task(pipe.acall("the sea"))
        await until(session.entered)
        disposing = asyncio.create_task(pipe.adispose(timeout=1000))
        while pipe.state is State.READY:
            await asyncio.sleep(0)
        disposing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await disposing
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    held = threading.Event()
    reaper.later(lambda: held.wait(30))  # so that the pipeline is collected before the end
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        running = main(pipe)
        del pipe
        asyncio.run(running)
        del running
        gc.collect()
        assert lifecycle.owner() is None
        assert lifecycle.receipt is None
        held.set()
        lifecycle.wait()
        reaper.call(lambda: None)
    assert [str(one.message) for one in caught] == []
    assert session.closed == 1


def test_an_async_with_block_disposes_at_its_end(tiny_bert: Path) -> None:
    async def main() -> ebbtide.Pipeline:
        async with await ebbtide.apipeline("feature-extraction", tiny_bert) as pipe:
            assert pipe.state is State.READY
            assert (await pipe.acall("the sea", pooling="mean")).shape == (1, 32)
        assert pipe.state is State.DISPOSED
        with pytest.raises(PipelineDisposedError):
            async with pipe:
                pass
        return pipe

    assert asyncio.run(main()).dispose().charged > 0
    assert ledger._entries == {}


def test_an_async_with_block_that_raises_disposes_and_lets_the_error_through(waiting) -> None:
    pipe, session = waiting()

    async def main() -> None:
        async with pipe:
            raise KeyError("of the user's own")

    with pytest.raises(KeyError, match="of the user's own"):
        asyncio.run(main())
    assert session.closed == 1


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_suspended_async_stream_is_closed_by_dispose(tiny_bert: Path, kind: str) -> None:
    pipe = ebbtide.pipeline("feature-extraction", tiny_bert)

    async def texts() -> Any:
        for text in ("one", "two", "three"):
            yield text

    async def main() -> None:
        source = texts() if kind == "async" else iter(["one", "two", "three"])
        stream = await pipe.acall(source, pooling="mean")
        assert np.array_equal(await anext(stream), pipe("one", pooling="mean"))
        assert (await pipe.adispose(timeout=1000)).verified
        with pytest.raises(PipelineDisposedError):
            await anext(stream)
        assert [one async for one in stream] == []

    asyncio.run(main())


def test_an_async_stream_gives_one_result_an_input(tiny_bert: Path) -> None:
    async def main() -> list[Any]:
        stream = await pipe.acall(iter(texts), pooling="mean")
        return [one async for one in stream]

    texts = ["one", "two and more", "three"]
    with ebbtide.pipeline("feature-extraction", tiny_bert) as pipe:
        found = asyncio.run(main())
        expected = list(pipe(iter(texts), pooling="mean"))
    assert np.array_equal(found, expected)


def test_a_load_that_is_cancelled_releases_everything_it_had_loaded(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading = threading.Semaphore(0)
    go = threading.Event()
    original = Tokenizer.load

    def slow(*arguments: Any) -> Any:
        tokenizer = original(*arguments)
        loading.release()
        assert go.wait(30)
        return tokenizer

    monkeypatch.setattr(Tokenizer, "load", slow)

    async def main() -> None:
        task = asyncio.create_task(ebbtide.apipeline("feature-extraction", tiny_bert))
        await until(loading)
        assert len(ledger._entries) == 1
        task.cancel()
        await turns()
        assert not task.done(), "the load was still going on"
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ledger._entries == {}, "it was released when the cancellation came through"
        assert ebbtide.live() == []

    asyncio.run(main())


def test_loads_on_one_loop_go_on_at_the_same_time_as_the_loop(tiny_bert: Path) -> None:
    async def main() -> None:
        folders = [tiny_bert, tiny_bert.parent / "tiny-roberta", tiny_bert]
        pipes = await asyncio.gather(
            *(ebbtide.apipeline("feature-extraction", one) for one in folders)
        )
        assert sorted(map(id, ebbtide.live())) == sorted(map(id, pipes))
        assert len(ledger._entries) == 4
        await asyncio.gather(*(pipe.adispose() for pipe in pipes))

    asyncio.run(main())
    assert ledger._entries == {}


def test_the_errors_of_apipeline_are_those_of_pipeline(tiny_bert: Path, tmp_path: Path) -> None:
    wrong: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        (("feature-extractio", tiny_bert), {}),
        (("feature-extraction", tiny_bert), {"dtyp": "q8"}),
        (("feature-extraction", tiny_bert), {"dtype": "q3"}),
        (("feature-extraction", tiny_bert), {"dtype": "q2"}),
        (("feature-extraction", tiny_bert), {"device": "cpux"}),
        (("feature-extraction", tiny_bert), {"session_options": {"thread": 1}}),
        (("feature-extraction", tmp_path / "nowhere"), {}),
    ]
    for arguments, options in wrong:
        with pytest.raises(ebbtide.EbbtideError) as plain:
            ebbtide.pipeline(*arguments, **options)
        with pytest.raises(ebbtide.EbbtideError) as awaited:
            asyncio.run(ebbtide.apipeline(*arguments, **options))
        assert type(awaited.value) is type(plain.value)
        assert str(awaited.value).replace("apipeline()", "pipeline()") == str(plain.value)
    assert ledger._entries == {}


def test_a_loop_that_ends_by_an_exception_takes_its_calls_with_it(waiting) -> None:
    pipe, session = waiting()

    async def main() -> None:
        calls.append(asyncio.create_task(pipe.acall("the sea")))
        await until(session.entered)
        raise ValueError("of the program's own")

    calls: list[asyncio.Task[Any]] = []
    with pytest.raises(ValueError, match="of the program's own"):
        asyncio.run(main())
    assert calls[0].cancelled()
    assert pipe("another loop, or none").ndim == 3
    assert asyncio.run(pipe.acall("another loop")).ndim == 3
    assert pipe.dispose().verified


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_loop_that_is_closed_while_a_run_goes_on_harms_nothing(waiting) -> None:
    pipe, session = waiting()
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # asyncio tells of the task that it destroys
    task = loop.create_task(pipe.acall("the sea"))
    loop.run_until_complete(until(session.entered))
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    running = next(iter(pipe._lifecycle.running))
    session.go.set()
    while running in pipe._lifecycle.running:
        time.sleep(0)
    assert not task.done()
    del task
    gc.collect()
    assert pipe("the threads go on").ndim == 3
    assert pipe.dispose().verified
    assert session.closed == 1


def test_a_run_sees_the_context_variables_of_its_task(waiting) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    seen: list[str] = []

    def inside() -> None:
        seen.append(variable.get())
        variable.set("changed by the run")

    pipe, _ = waiting(inside)

    async def one(value: str) -> None:
        variable.set(value)
        await pipe.acall("the sea")
        assert variable.get() == value

    async def main() -> None:
        await asyncio.gather(one("a"), one("b"), one("c"))

    asyncio.run(main())
    assert sorted(seen) == ["a", "b", "c"]
    assert variable.get() == "none"
    pipe.dispose()


@pytest.mark.timeout(10)
def test_a_gate_whose_waiter_was_interrupted_stays_open() -> None:
    gate = OneShot()
    gate.open()
    gate._lock.acquire()  # as a signal leaves it that comes before the waiter has released it
    gate.wait()


def test_callbacks_are_called_in_the_order_they_came() -> None:
    called: list[int] = []
    callbacks: list[Any] = [lambda number=number: called.append(number) for number in range(3)]
    call_all(callbacks)
    assert called == [0, 1, 2]
