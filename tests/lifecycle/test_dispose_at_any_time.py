"""4.1 and 4.2: any time, any thread; in use."""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ebbtide
from ebbtide import PipelineCancelledError, PipelineDisposedError, State
from ebbtide.cancellation import own_thread
from ebbtide.memory import reaper as reaper_module
from ebbtide.runtime import native_threads


def test_a_second_dispose_returns_the_first_receipt(tiny_bert: Path) -> None:
    pipe = ebbtide.pipeline("feature-extraction", tiny_bert)
    receipt = pipe.dispose()
    assert pipe.dispose() is receipt
    assert pipe.state is State.DISPOSED


def test_disposes_from_many_threads_share_one_receipt(waiting, call) -> None:
    pipe, session = waiting()
    running = call(pipe)
    session.entered.acquire()
    receipts: list[object] = []
    threads = [threading.Thread(target=lambda: receipts.append(pipe.dispose())) for _ in range(8)]
    for thread in threads:
        thread.start()
    session.go.set()
    for thread in threads:
        thread.join(30)
    running.end()
    assert len(receipts) == 8
    assert len({id(one) for one in receipts}) == 1
    assert session.closed == 1


def test_a_new_call_is_refused_at_once_while_a_running_one_is_drained(waiting, call) -> None:
    pipe, session = waiting()
    running = call(pipe)
    session.entered.acquire()
    disposing = threading.Thread(target=pipe.dispose)
    disposing.start()
    while pipe.state is State.READY:
        time.sleep(0)
    with pytest.raises(PipelineDisposedError, match=r"disposing.*Make a new one"):
        pipe("refused")
    assert session.closed == 0
    session.go.set()
    disposing.join(30)
    assert running.end().ndim == 3
    assert session.closed == 1


def test_calls_that_outlast_the_timeout_are_cancelled(waiting, call) -> None:
    pipe, session = waiting()
    running = call(pipe)
    session.entered.acquire()
    receipt = pipe.dispose(timeout=0.01)
    assert isinstance(running.end(), PipelineCancelledError)
    assert receipt.verified


def test_cancel_cancels_at_once_what_runs_and_what_waits_for_a_thread(waiting, call) -> None:
    pipe, session = waiting()
    calls = [call(pipe) for _ in range(12)]
    session.entered.acquire()
    pipe.dispose(cancel=True)
    outcomes = [one.end() for one in calls]
    assert all(isinstance(one, PipelineCancelledError | PipelineDisposedError) for one in outcomes)
    assert session.closed == 1


def test_a_later_dispose_with_cancel_ends_the_wait_of_an_earlier_one(waiting, call) -> None:
    pipe, session = waiting()
    running = call(pipe)
    session.entered.acquire()
    patient = threading.Thread(target=lambda: pipe.dispose(timeout=1000))
    patient.start()
    while pipe.state is State.READY:
        time.sleep(0)
    pipe.dispose(cancel=True)
    patient.join(30)
    assert not patient.is_alive()
    assert isinstance(running.end(), PipelineCancelledError)


def test_a_native_run_is_stopped_by_its_own_terminate(tiny_bert: Path, call) -> None:
    """A run of some seconds ends long before it would, and says it was cancelled."""
    with ebbtide.pipeline("feature-extraction", tiny_bert) as other:
        pipe = ebbtide.pipeline("feature-extraction", tiny_bert)
        started = threading.Event()
        session = pipe._model._session.value.native
        inner = session._native.run

        class Told:
            def run(self, *arguments):
                started.set()
                return inner(*arguments)

        session._native, native = Told(), session._native
        running = threading.Thread(target=lambda: outcomes.append(_caught(pipe)), daemon=True)
        outcomes: list[object] = []
        running.start()
        assert started.wait(30)
        session._native = native
        pipe.dispose(cancel=True)
        running.join(30)
        assert isinstance(outcomes[0], PipelineCancelledError)
        assert other("unharmed", pooling="mean").shape == (1, 32)


def _caught(pipe: ebbtide.FeatureExtractionPipeline) -> object:
    try:
        return pipe(["word " * 600] * 1024, pooling="mean", batch_size=1024)
    except ebbtide.EbbtideError as error:
        return error


def test_a_suspended_stream_is_closed_by_dispose_and_is_not_waited_for(tiny_bert: Path) -> None:
    pipe = ebbtide.pipeline("feature-extraction", tiny_bert)
    texts = iter(["one", "two", "three"])
    stream = pipe(texts, pooling="mean")
    assert next(stream).shape == (1, 32)
    assert pipe.dispose(timeout=1000).verified
    with pytest.raises(PipelineDisposedError):
        next(stream)
    assert list(stream) == []


def test_dispose_from_inside_its_own_call_cancels_it_and_completes(waiting, call) -> None:
    receipts = []

    def inside() -> None:
        receipts.append(pipe.dispose())

    pipe, session = waiting(inside)
    assert isinstance(call(pipe).end(), PipelineCancelledError)
    final = pipe.dispose()
    assert session.closed == 1
    assert final.verified
    assert "unwinds" in str(receipts[0])


def test_dispose_of_another_pipeline_from_inside_a_call_does_not_wait(waiting, call) -> None:
    """Its calls may be queued behind this very one, so waiting for them could last for ever."""
    pipe, session = waiting(lambda: None)
    other, other_session = waiting()
    session.inside = other.dispose
    busy = [call(other) for _ in range(6)]
    other_session.entered.acquire()
    asking = call(pipe)
    other_session.go.set()
    assert asking.end().ndim == 3
    outcomes = [one.end() for one in busy]
    assert all(isinstance(one, PipelineDisposedError) or one.ndim == 3 for one in outcomes)
    assert other.dispose().verified
    pipe.dispose()


def test_dispose_from_the_source_of_a_stream_ends_the_stream(tiny_bert: Path) -> None:
    pipe = ebbtide.pipeline("feature-extraction", tiny_bert)

    def texts():
        yield "one"
        pipe.dispose()
        yield "two"

    stream = pipe(texts(), pooling="mean")
    next(stream)
    with pytest.raises(PipelineDisposedError):
        next(stream)


def test_a_finalizer_on_the_thread_that_holds_the_ledgers_lock_cannot_deadlock(waiting) -> None:
    """The worst moment: garbage is collected while the reaper or a load holds the lock."""
    from ebbtide.cancellation import CancelToken
    from ebbtide.memory.ledger import ledger

    pipe, session = waiting()
    disposed = []

    class Owner:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            disposed.append(pipe.dispose())

    def hold_and_collect() -> None:
        assert own_thread.is_own
        with ledger._lock:
            gc.collect()

    gc.disable()
    try:
        Owner()
        native_threads.submit(hold_and_collect, CancelToken("test"), lambda: None).wait()
    finally:
        gc.enable()
    assert len(disposed) == 1
    pipe.dispose()
    assert session.closed == 1


def test_a_signal_handler_may_dispose_in_the_middle_of_the_main_threads_call(
    fresh_process,
) -> None:
    out = fresh_process(
        """
        import signal, threading, ebbtide
        pipe = ebbtide.pipeline("feature-extraction", MODEL)
        def handler(number, frame):
            print(pipe.dispose(cancel=True).released > 1e6)
        signal.signal(signal.SIGUSR1, handler)
        started = threading.Event()
        session = pipe._model._session.value
        run = session.run
        def told(*arguments):
            started.set()
            return run(*arguments)
        session.run = told
        def interrupt():
            started.wait(30)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
        threading.Thread(target=interrupt).start()
        try:
            pipe(["word " * 600] * 512, batch_size=512)
        except ebbtide.PipelineCancelledError:
            print("cancelled")
        print(pipe.state.value)
        """
    )
    assert out.split() == ["True", "cancelled", "disposed"]


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """What a handler does that interrupts a thread as it hands a call over."""
    handlers: list[Callable[[], object]] = []
    submit = native_threads.submit

    def submit_interrupted(*arguments: Any) -> Any:
        job = submit(*arguments) if own_thread.is_own else None
        while handlers and job is None:
            handlers.pop()()
        return job or submit(*arguments)

    monkeypatch.setattr(native_threads, "submit", submit_interrupted)
    return handlers


def test_a_dispose_that_interrupts_the_handing_over_of_a_call_does_not_wait_for_it(
    tiny_bert: Path, interrupted: list[Callable[[], object]]
) -> None:
    pipe = ebbtide.pipeline("feature-extraction", tiny_bert)
    receipts = []
    interrupted.append(lambda: receipts.append(pipe.dispose(timeout=1000)))
    with pytest.raises(PipelineCancelledError):
        pipe("the sea")
    assert "unwinds" in str(receipts[0])
    assert pipe.dispose().verified


def test_a_sleep_that_interrupts_the_handing_over_of_a_call_does_not_wait_for_it(
    tiny_bert: Path, interrupted: list[Callable[[], object]]
) -> None:
    with ebbtide.pipeline("feature-extraction", tiny_bert) as pipe:
        receipts = []
        interrupted.append(lambda: receipts.append(pipe.sleep(timeout=1000)))
        assert pipe("the sea", pooling="mean").shape == (1, 32)
        assert "once that has ended" in str(receipts[0])


def test_a_dispose_of_another_that_interrupts_the_handing_over_of_a_call_waits_for_its_end(
    tiny_bert: Path, interrupted: list[Callable[[], object]]
) -> None:
    with ebbtide.pipeline("feature-extraction", tiny_bert) as pipe:
        other = ebbtide.pipeline("feature-extraction", tiny_bert)
        receipts = []
        interrupted.append(lambda: receipts.append(other.dispose()))
        assert pipe("the sea", pooling="mean").shape == (1, 32)
        assert receipts == [other.dispose()]
        assert receipts[0].verified


def test_a_handler_that_raises_as_a_call_is_handed_over_stops_the_call(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = []
    submit = native_threads.submit

    def submit_and_raise(*arguments: Any) -> Any:
        jobs.append(submit(*arguments))
        raise TimeoutError

    with ebbtide.pipeline("feature-extraction", tiny_bert) as pipe:
        with monkeypatch.context() as patch:
            patch.setattr(native_threads, "submit", submit_and_raise)
            with pytest.raises(TimeoutError):
                pipe("the sea")
        assert jobs[0].token.cancelled
        assert pipe("the sea", pooling="mean").shape == (1, 32)


def test_signals_at_every_moment_of_load_call_and_dispose_never_hang(fresh_process) -> None:
    """A timer fires five hundred times a second, and its handler disposes what there is."""
    out = fresh_process(
        """
        import signal, ebbtide
        ebbtide.settings.drain_timeout = 1000
        fired = 0
        inside = False
        def handler(number, frame):
            global fired, inside
            fired += 1
            if inside:
                return
            inside = True
            for pipe in ebbtide.live():
                if fired % 7 == 0:
                    pipe.dispose(cancel=fired % 2 == 0)
            inside = False
        ebbtide.pipeline("feature-extraction", MODEL).dispose()
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
        rounds = answered = refused = 0
        while rounds < 40 or not answered or not refused:
            rounds += 1
            try:
                pipe = ebbtide.pipeline("feature-extraction", MODEL)
                for _ in range(4):
                    assert pipe("the sea", pooling="mean").shape == (1, 32)
                    answered += 1
            except (ebbtide.PipelineDisposedError, ebbtide.PipelineCancelledError):
                refused += 1
            pipe.dispose()
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(fired > 20, ebbtide.live())
        """
    )
    assert out.strip() == "True []"


def test_ctrl_c_reaches_a_caller_in_the_middle_of_a_native_run(fresh_process) -> None:
    out = fresh_process(
        """
        import signal, threading, ebbtide
        pipe = ebbtide.pipeline("feature-extraction", MODEL)
        started = threading.Event()
        session = pipe._model._session.value
        run = session.run
        def told(*arguments):
            started.set()
            return run(*arguments)
        session.run = told
        def interrupt():
            started.wait(30)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        threading.Thread(target=interrupt).start()
        try:
            pipe(["word " * 600] * 512, batch_size=512)
        except KeyboardInterrupt:
            print("interrupted", len(pipe._lifecycle.running))
        del session.run
        print(pipe("still there", pooling="mean").shape, pipe.dispose().released > 1e6)
        """
    )
    assert out.split("\n")[:2] == ["interrupted 0", "(1, 32) True"]


def test_calls_that_never_end_do_not_hold_a_dispose_for_ever(waiting, call, monkeypatch) -> None:
    monkeypatch.setattr(reaper_module, "GRACE", 0.01)
    stuck = threading.Event()
    pipe, session = waiting(lambda: stuck.wait(30))
    running = call(pipe)
    session.entered.acquire()
    receipt = pipe.dispose(cancel=True)
    assert not receipt.quiet
    assert "1 cancelled calls had not ended" in str(receipt)
    stuck.set()
    assert isinstance(running.end(), PipelineCancelledError)


@pytest.mark.parametrize("timeout", [-1, float("nan")])
def test_a_timeout_that_is_no_time_is_refused(tiny_bert: Path, timeout: float) -> None:
    with (
        ebbtide.pipeline("feature-extraction", tiny_bert) as pipe,
        pytest.raises(ebbtide.InputError, match="seconds, 0 or more"),
    ):
        pipe.dispose(timeout=timeout)


def test_no_signal_is_used_by_ebbtide_itself() -> None:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
