"""A pipeline sleeps and wakes: its memory is back in between, and no call sees a difference."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ebbtide
from ebbtide import LoadError, PipelineDisposedError, State
from ebbtide.cancellation import CancelToken
from ebbtide.lifecycle import Lifecycle
from ebbtide.memory import reaper as reaper_module
from ebbtide.memory.ledger import ledger
from ebbtide.runtime import graph as graphs

TEXT = "the sea"


def load(model: Path, **options: Any) -> Any:
    return ebbtide.pipeline("feature-extraction", model, **options)


def session(pipe: Any) -> Any:
    """The native session of a pipeline; None while it sleeps."""
    return pipe._model._session.value.native


def tokenizer(pipe: Any) -> Any:
    """The native tokenizer of a pipeline; None while it sleeps deeply."""
    return pipe.tokenizer.lease.value._kept


@pytest.fixture
def model(tiny_bert: Path, tmp_path: Path) -> Path:
    """A model of the test's own, to take away and to change."""
    shutil.copytree(tiny_bert, tmp_path / "model")
    return tmp_path / "model"


def test_it_sleeps_and_the_next_call_wakes_it(tiny_bert: Path) -> None:
    with load(tiny_bert) as pipe:
        expected = pipe(TEXT)
        receipt = pipe.sleep()
        assert pipe.state is State.SLEEPING
        assert session(pipe) is None
        assert receipt.charged > 0
        assert receipt.verified
        assert "asleep: its tokenizer stays" in receipt.reasons
        assert "sleeping" in repr(pipe)
        assert np.array_equal(pipe(TEXT), expected)
        assert pipe.state is State.READY
        assert session(pipe) is not None


def test_it_is_woken_before_a_call_needs_it(tiny_bert: Path) -> None:
    with load(tiny_bert) as pipe:
        pipe.wake()
        assert pipe.state is State.READY
        pipe.sleep()
        pipe.wake()
        assert pipe.state is State.READY
        assert session(pipe) is not None
        pipe.wake()


def test_it_sleeps_and_wakes_on_an_event_loop(tiny_bert: Path) -> None:
    async def main() -> None:
        async with await ebbtide.apipeline("feature-extraction", tiny_bert) as pipe:
            expected = await pipe.acall(TEXT)
            receipt = await pipe.asleep(deep=True)
            assert receipt.verified
            assert pipe.state is State.SLEEPING
            await pipe.awake()
            assert pipe.state is State.READY
            await pipe.asleep()
            assert np.array_equal(await pipe.acall(TEXT), expected)

    asyncio.run(main())


def test_a_deep_sleep_frees_the_tokenizer_as_well(tiny_bert: Path) -> None:
    with load(tiny_bert) as pipe:
        expected = pipe(TEXT)
        pipe.sleep()
        assert tokenizer(pipe) is not None
        receipt = pipe.sleep(deep=True)
        assert tokenizer(pipe) is None
        assert "asleep: its tokenizer stays" not in receipt.reasons
        assert all(one.asleep for one in pipe.memory.holdings)
        assert np.array_equal(pipe(TEXT), expected)
        assert tokenizer(pipe) is not None


def test_the_tokenizer_of_a_deep_sleeper_is_read_when_it_is_used(tiny_bert: Path) -> None:
    with load(tiny_bert) as pipe:
        expected = pipe.tokenizer.ids(TEXT)
        pipe.sleep(deep=True)
        assert pipe.tokenizer.ids(TEXT) == expected


def test_a_sleeper_is_charged_with_nothing_and_wakes_with_its_charge(tiny_bert: Path) -> None:
    with load(tiny_bert) as pipe:
        pipe.sleep(deep=True)
        assert pipe.memory.exclusive == pipe.memory.anonymous == 0
        assert "asleep" in str(pipe.memory)
        pipe.wake()
        assert pipe.memory.anonymous > 0
        assert not any(one.asleep for one in pipe.memory.holdings)


def test_sleeping_twice_gives_back_nothing_more(tiny_bert: Path) -> None:
    with load(tiny_bert) as pipe:
        pipe.sleep()
        assert pipe.sleep().charged == 0
        assert pipe.state is State.SLEEPING


def test_a_sleeper_is_disposed(tiny_bert: Path) -> None:
    pipe = load(tiny_bert)
    pipe.sleep(deep=True)
    assert pipe.dispose().verified
    assert pipe.state is State.DISPOSED
    for use in (pipe.sleep, pipe.wake, lambda: pipe(TEXT)):
        with pytest.raises(PipelineDisposedError):
            use()
    assert ledger._entries == {}


@pytest.mark.parametrize("timeout", [-1, float("nan")])
def test_a_wrong_timeout_is_refused(tiny_bert: Path, timeout: float) -> None:
    with load(tiny_bert) as pipe, pytest.raises(ebbtide.InputError, match="timeout"):
        pipe.sleep(timeout=timeout)


def test_it_waits_for_running_calls_and_is_told_of_the_last(
    waiting: Any, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ebbtide.settings, "idle_trim", None)  # which wakes the reaper too
    pipe, native = waiting()
    running = call(pipe)
    native.entered.acquire()
    receipts: list[Any] = []
    sleeper = threading.Thread(target=lambda: receipts.append(pipe.sleep()))
    sleeper.start()
    assert pipe.state is State.READY
    native.go.set()
    sleeper.join(10)  # much less than it has for its calls
    assert not sleeper.is_alive()
    assert isinstance(running.end(), np.ndarray)
    assert pipe.state is State.SLEEPING
    assert receipts[0].verified
    pipe.dispose()


def test_a_call_that_comes_at_the_last_moment_waits_for_the_sleep_and_wakes_it(
    waiting: Any, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, native = waiting()
    native.go.set()
    waking = threading.Event()
    calls: list[Any] = []
    ran: list[bool] = []
    original, wake = reaper_module.Reaper._send_to_sleep, Lifecycle.wake

    def noted(*arguments: Any) -> None:
        waking.set()
        wake(*arguments)

    def late(*arguments: Any) -> Any:
        calls.append(call(pipe))  # nothing ran a moment ago
        assert waking.wait(30)
        ran.append(native.entered.acquire(timeout=0.2))
        return original(*arguments)

    monkeypatch.setattr(Lifecycle, "wake", noted)
    monkeypatch.setattr(reaper_module.Reaper, "_send_to_sleep", late)
    assert pipe.sleep().verified
    assert isinstance(calls[0].end(), np.ndarray)
    assert ran == [False]
    assert pipe.state is State.READY
    pipe.dispose()


def test_a_call_that_comes_as_it_is_sent_to_sleep_is_not_said_to_have_been_cancelled(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ebbtide.pipeline("feature-extraction", tiny_bert) as pipe:
        life, token = pipe._lifecycle, CancelToken("late")
        left = reaper_module._left_by_calls

        def let_one_in(*arguments: Any) -> Any:
            life.enter(token)
            return left(*arguments)

        monkeypatch.setattr(reaper_module, "_left_by_calls", let_one_in)
        receipt = pipe.sleep()
        life.leave(token)
        monkeypatch.undo()
        assert receipt.reasons == ("asleep: its tokenizer stays",)


def test_it_stays_awake_where_a_call_runs_all_the_time(waiting: Any, call: Any) -> None:
    pipe, native = waiting()
    running = call(pipe)
    native.entered.acquire()
    receipt = pipe.sleep(timeout=0)
    assert receipt.reasons == ("1 calls were running all the time: it stays awake",)
    assert (receipt.released, receipt.verified) == (0, False)
    assert pipe.state is State.READY
    native.go.set()
    assert isinstance(running.end(), np.ndarray), "a call is never cancelled for a sleep"
    pipe.dispose()


def test_a_dispose_ends_a_sleep_that_waits(waiting: Any, call: Any) -> None:
    pipe, native = waiting()
    running = call(pipe)
    native.entered.acquire()
    outcome: list[Any] = []

    def sleep() -> None:
        try:
            outcome.append(pipe.sleep())
        except PipelineDisposedError as error:
            outcome.append(error)

    sleeper = threading.Thread(target=sleep)
    sleeper.start()
    pipe.dispose(cancel=True)
    sleeper.join(30)
    assert not sleeper.is_alive()
    assert isinstance(outcome[0], PipelineDisposedError)
    assert isinstance(running.end(), ebbtide.PipelineCancelledError)


def test_asked_for_from_inside_a_call_it_sleeps_once_that_has_ended(
    waiting: Any, call: Any
) -> None:
    receipts: list[Any] = []
    pipe, _ = waiting(inside=lambda: receipts.append(pipe.sleep()))
    call(pipe).end()
    assert "once that has ended" in receipts[0].reasons[0]
    pipe.sleep()  # after the one that was asked for
    assert pipe.state is State.SLEEPING
    pipe.dispose()


def test_of_two_owners_the_last_to_sleep_frees(tiny_bert: Path) -> None:
    with load(tiny_bert) as first, load(tiny_bert) as second:
        expected = second(TEXT)
        receipt = first.sleep()
        assert receipt.charged == 0
        assert "shared with 1" in receipt.reasons
        assert session(first) is session(second) is not None
        assert first.state is State.SLEEPING
        assert second.state is State.READY
        assert second.memory.exclusive > 0, "now it is the only one that uses it"
        assert second.sleep().charged > 0
        assert session(first) is None
        assert np.array_equal(first(TEXT), expected)
        assert second.state is State.SLEEPING
        assert np.array_equal(second(TEXT), expected)


def test_disposing_the_one_that_is_awake_has_the_other_sleep_on(tiny_bert: Path) -> None:
    first, second = load(tiny_bert), load(tiny_bert)
    expected = first(TEXT)
    native = weakref.ref(session(first))
    first.sleep(deep=True)
    second.dispose()
    assert native() is None
    assert np.array_equal(first(TEXT), expected)
    first.dispose()
    assert ledger._entries == {}


def test_disposing_the_one_that_sleeps_leaves_the_other_awake(tiny_bert: Path) -> None:
    with load(tiny_bert) as awake:
        expected = awake(TEXT)
        asleep = load(tiny_bert)
        asleep.sleep(deep=True)
        assert asleep.dispose().charged == 0
        assert np.array_equal(awake(TEXT), expected)


def test_a_load_of_the_same_model_finds_a_sleeper_and_wakes_what_they_share(
    tiny_bert: Path,
) -> None:
    with load(tiny_bert) as first:
        expected = first(TEXT)
        first.sleep(deep=True)
        with load(tiny_bert) as second:
            assert np.array_equal(second(TEXT), expected)
            assert first.state is State.SLEEPING
            assert session(first) is session(second)
        assert session(first) is None
        assert np.array_equal(first(TEXT), expected)


@pytest.mark.parametrize("name", ["onnx/model.onnx", "tokenizer.json"])
def test_a_model_that_is_gone_is_told_and_it_sleeps_on_until_it_is_back(
    model: Path, name: str
) -> None:
    with load(model) as pipe:
        expected = pipe(TEXT)
        pipe.sleep(deep=True)
        (model / name).rename(model / "away")
        for use in (pipe.wake, lambda: pipe(TEXT)):
            with pytest.raises(LoadError, match=Path(name).name):
                use()
            assert pipe.state is State.SLEEPING
            assert session(pipe) is None
        (model / "away").rename(model / name)
        assert np.array_equal(pipe(TEXT), expected)
        assert pipe.state is State.READY


@pytest.mark.parametrize("name", ["onnx/model.onnx", "tokenizer.json"])
def test_a_model_that_is_another_one_is_told_and_never_used(model: Path, name: str) -> None:
    with load(model) as pipe:
        expected = pipe(TEXT)
        pipe.sleep(deep=True)
        (model / name).rename(model / "away")
        other = model / "onnx/model_int8.onnx" if name.endswith("onnx") else model / "config.json"
        shutil.copyfile(other, model / name)
        with pytest.raises(LoadError, match="has changed since the pipeline was loaded"):
            pipe(TEXT)
        assert pipe.state is State.SLEEPING
        os.replace(model / "away", model / name)
        assert np.array_equal(pipe(TEXT), expected)


def test_external_data_that_are_others_are_told(tiny_bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "external"
    shutil.copytree(tiny_bert.parent / "tiny-external", folder)
    data = folder / "onnx/model.onnx_data"
    with load(folder) as pipe:
        expected = pipe(TEXT)
        pipe.sleep()
        data.rename(tmp_path / "away")
        data.write_bytes(bytes((tmp_path / "away").stat().st_size))
        with pytest.raises(LoadError, match=r"model\.onnx_data has changed"):
            pipe(TEXT)
        (tmp_path / "away").replace(data)
        assert np.array_equal(pipe(TEXT), expected)


@pytest.mark.parametrize("name", ["onnx/model.onnx", "tokenizer.json"])
def test_a_wake_that_fails_leaves_nothing_awake(model: Path, name: str) -> None:
    with load(model) as pipe:
        expected = pipe(TEXT)
        pipe.sleep(deep=True)
        (model / name).rename(model / "away")
        with pytest.raises(LoadError):
            pipe.wake()
        assert tokenizer(pipe) is None
        assert session(pipe) is None
        assert pipe.memory.anonymous == 0
        (model / "away").rename(model / name)
        assert np.array_equal(pipe(TEXT), expected)


def test_calls_that_come_while_it_is_sent_to_sleep_are_all_right(tiny_bert: Path) -> None:
    with load(tiny_bert) as pipe, load(tiny_bert) as other:
        texts = [f"{TEXT} {number}" for number in range(4)]
        expected = [pipe(text) for text in texts]
        enough = threading.Event()
        wrong: list[Any] = []

        def hammer(number: int) -> None:
            rounds = 0
            while not enough.is_set() or rounds < 5:
                rounds += 1
                user = pipe if number % 2 else other
                if not np.array_equal(user(texts[number]), expected[number]):
                    wrong.append(number)

        def send(pipe: Any, deep: bool) -> None:
            for _ in range(15):
                receipt = pipe.sleep(deep=deep, timeout=5)
                if receipt.retained and receipt.charged == receipt.retained:
                    continue  # it was in use all the time

        threads = [threading.Thread(target=hammer, args=(number,)) for number in range(4)]
        senders = [
            threading.Thread(target=send, args=(one, deep))
            for one in (pipe, other)
            for deep in (True, False)
        ]
        for thread in (*threads, *senders):
            thread.start()
        for thread in senders:
            thread.join(90)
        enough.set()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in (*threads, *senders))
        assert wrong == []


def test_several_threads_may_ask_at_once(tiny_bert: Path) -> None:
    with load(tiny_bert) as pipe:
        receipts: list[Any] = []
        threads = [threading.Thread(target=lambda: receipts.append(pipe.sleep())) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(receipts) == 8
        assert sum(receipt.charged > 0 for receipt in receipts) == 1
        assert pipe.state is State.SLEEPING


def test_nothing_of_ours_is_a_cycle(tiny_bert: Path) -> None:
    load(tiny_bert).dispose()
    gc.collect()
    gc.disable()
    try:
        pipe = load(tiny_bert)
        pipe(TEXT)
        natives = [weakref.ref(session(pipe))]
        pipe.sleep(deep=True)
        assert natives[0]() is None
        pipe.wake()
        natives.append(weakref.ref(session(pipe)))
        natives.append(weakref.ref(pipe._model._session.value))
        natives.append(weakref.ref(pipe._lifecycle))
        pipe.dispose()
        natives.append(weakref.ref(pipe))
        del pipe
        assert [one() for one in natives] == [None] * 5
    finally:
        gc.enable()


def test_a_wake_that_is_cancelled_leaves_it_asleep(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening, go = threading.Event(), threading.Event()
    original: Callable[..., Any] = graphs.open_session

    def slow(*arguments: Any) -> Any:
        opening.set()
        assert go.wait(30)
        arguments[-1].check()
        return original(*arguments)

    async def main() -> None:
        pipe = await ebbtide.apipeline("feature-extraction", tiny_bert)
        expected = await pipe.acall(TEXT)
        await pipe.asleep()
        monkeypatch.setattr(graphs, "open_session", slow)
        task = asyncio.create_task(pipe.awake())
        await asyncio.to_thread(opening.wait, 30)
        task.cancel()
        await asyncio.sleep(0)
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pipe.state is State.SLEEPING
        monkeypatch.setattr(graphs, "open_session", original)
        assert np.array_equal(await pipe.acall(TEXT), expected)
        await pipe.adispose()

    asyncio.run(main())


def test_a_forked_child_neither_wakes_nor_hangs(fresh_process: Any) -> None:
    out = fresh_process(
        """
        import os, warnings, ebbtide
        warnings.simplefilter("ignore", DeprecationWarning)
        pipe = ebbtide.pipeline("feature-extraction", MODEL)
        pipe.sleep(deep=True)
        child = os.fork()
        if not child:
            for use in (pipe.wake, pipe.sleep, lambda: pipe("a")):
                try:
                    use()
                except ebbtide.PipelineInheritedError:
                    print("inherited", flush=True)
            with ebbtide.pipeline("feature-extraction", MODEL) as new:
                new.sleep()
                new("a")
            os._exit(0)
        print(os.waitpid(child, 0)[1])
        pipe("a")
        pipe.dispose()
        """
    )
    assert out.split() == ["inherited"] * 3 + ["0"]


def test_the_memory_of_sleepers_is_back(fresh_process: Any) -> None:
    out = fresh_process(
        """
        from ebbtide import memory
        import ebbtide
        def load(number):
            options = {"threads": 1, "entries": {"of.this.test": str(number)}}
            return ebbtide.pipeline("feature-extraction", MODEL, session_options=options)
        def cycle():
            for pipe in pipes:
                pipe(["the sea"] * 8)
            awake = memory.anonymous_bytes()
            receipts = [pipe.sleep(deep=True) for pipe in pipes]
            return awake, memory.anonymous_bytes(), receipts
        pipes = [load(number) for number in range(16)]
        cycle()  # what the first one takes is taken
        _, floor, _ = cycle()
        for _ in range(5):
            awake, asleep, receipts = cycle()
        print(awake - asleep, asleep - floor, all(one.verified for one in receipts))
        ebbtide.dispose_all()
        """
    )
    back, drift, verified = out.split()
    assert int(back) > 6_000_000, "sixteen sessions of 0.6 MB each"
    assert int(drift) < 1_000_000
    assert verified == "True"
