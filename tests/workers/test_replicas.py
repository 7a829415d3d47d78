"""Several processes for one pipeline: calls spread, a crash is one's own, and all give all back."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.workers import watched
from tests.workers.watched import call, is_there, until

import ebbtide
from ebbtide.cancellation import CancelToken
from ebbtide.errors import WorkerCrashedError
from ebbtide.lifecycle import State
from ebbtide.workers.calls import Call
from ebbtide.workers.options import IsolateOptions
from ebbtide.workers.plan import Plan
from ebbtide.workers.replicas import Replicas, share_of_cpus


def where(pipe: Any) -> str:
    """The number of the process that answers, as it says itself."""
    return str(os.path.basename(call(pipe, "where")))


def wake_all(pipe: Any) -> None:
    """Have all processes there, with nothing to do."""
    pipe.wake()
    until(lambda: not any(one.under_way for one in pipe._worker.workers))


class FakeChild:
    """A process that takes calls and says nothing."""

    pid = 7

    def __init__(self) -> None:
        self.calls: dict[int, Call] = {}
        self.channel = self

    def send(self, packet: Any, *, wait: bool) -> bool:
        return True

    def say(self, message: tuple[Any, ...]) -> bool:
        return True


def fakes(count: int, **options: Any) -> Replicas:
    """Replicas that think they have processes."""
    isolate = IsolateOptions(replicas=count, **options)
    plan = Plan(label="It", loader="no:where", arguments=(), options={}, isolate=isolate)
    replicas = Replicas(plan, lambda state: None)
    for one in replicas.workers:
        one._child = FakeChild()  # type: ignore[assignment]
        one._thread = threading.current_thread()  # else it would start a process
    return replicas


def submitted(replicas: Replicas) -> tuple[int, Call]:
    """One more call, and the place of the replica that got it."""
    one = replicas._made("echo", {})
    replicas.submit(one)
    places = [
        place
        for place, worker in enumerate(replicas.workers)
        if worker._child is not None and one.number in worker._child.calls
    ]
    assert len(places) == 1
    return places[0], one


# Routing


@given(st.integers(2, 6), st.lists(st.one_of(st.none(), st.integers(0, 30)), max_size=60))
@settings(deadline=None, max_examples=60)
def test_a_busy_replica_is_not_chosen_while_another_has_less_to_do(
    count: int, steps: list[int | None]
) -> None:
    replicas = fakes(count)
    running: list[tuple[int, Call]] = []
    for step in steps:
        before = [worker.under_way for worker in replicas.workers]
        if step is None or not running:
            running.append(submitted(replicas))
            assert before[running[-1][0]] == min(before)
        else:
            place, ended = running.pop(step % len(running))
            child = replicas.workers[place]._child
            assert child is not None
            del child.calls[ended.number]


def test_calls_that_come_one_after_another_go_by_turns() -> None:
    replicas = fakes(3)
    places = []
    for _ in range(9):
        place, one = submitted(replicas)
        places.append(place)
        replicas.workers[place]._child.calls.pop(one.number)  # type: ignore[union-attr]
    assert Counter(places) == {0: 3, 1: 3, 2: 3}
    assert places[:3] == places[3:6]


def test_a_call_passes_by_what_has_no_process() -> None:
    replicas = fakes(3, restart="never")
    replicas.workers[1]._child = None
    replicas.workers[1]._over = WorkerCrashedError("It", pipeline="It", running=(), status=1)
    assert Counter(submitted(replicas)[0] for _ in range(8)) == {0: 4, 2: 4}


def test_a_call_that_waits_for_a_process_is_given_to_one_that_is_there() -> None:
    replicas = fakes(2)
    first, second = replicas.workers
    first._child = None
    one, wake = replicas._made("echo", {}), replicas._made("wake", {})
    first._held.extend((one, wake))
    first._boot = lambda: None  # type: ignore[method-assign]
    first._start_again()
    assert list(first._held) == [wake]  # which was for this one
    assert one.number in second._child.calls  # type: ignore[union-attr]


def test_it_is_ready_where_one_is_and_asleep_where_all_are() -> None:
    replicas, told = fakes(2), []
    replicas._state = told.append
    for number, state in (
        (0, State.READY), (1, State.READY), (0, State.SLEEPING), (1, State.SLEEPING),
    ):  # fmt: skip
        replicas._is_now(number, state)
    assert told == [State.READY, State.READY, State.READY, State.SLEEPING]


def test_one_that_cannot_be_started_is_let_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    replicas = fakes(2)
    idle = replicas.workers[1]
    idle._child, idle.has_crashed = None, True
    started: list[Call] = []
    monkeypatch.setattr(idle, "start", started.append)
    submitted(replicas)
    submitted(replicas)
    started[0].finish(error=ebbtide.LoadError("no room", path=""))
    submitted(replicas)
    assert len(started) == 2  # the fake is never under way, so that both calls tried
    idle.rests_until = 0.0
    submitted(replicas)
    assert len(started) == 3


@pytest.mark.parametrize(
    ("given", "threads"), [(None, 2), ({}, 2), ({"threads": 5}, 5), ({"arena": True}, 2)]
)
def test_each_has_its_share_of_the_cpus_unless_the_user_says_how_many(
    given: Any, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ebbtide.settings, "threads", 9)
    assert share_of_cpus(given, 4).threads == threads
    assert share_of_cpus(None, 40).threads == 1


def test_the_first_prepares_and_the_others_wait_for_the_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ebbtide.settings, "prepare", "background")
    replicas = fakes(4)
    assert [one.plan.options.get("prepare") for one in replicas.workers] == [None] + ["now"] * 3
    started: list[tuple[int, Call]] = []
    for place, one in enumerate(replicas.workers):
        monkeypatch.setattr(one, "start", lambda call, place=place: started.append((place, call)))
    replicas.workers[0].facts = {"model": "it"}
    replicas._open_rest()
    assert [place for place, _ in started] == [1]
    started[0][1].finish()
    assert [place for place, _ in started] == [1, 2, 3]


@pytest.mark.parametrize("options", [{"replicas": 0}, {"replicas": True}, {"replicas": 1.5}])
def test_replicas_take_a_whole_number(options: Any) -> None:
    with pytest.raises(ebbtide.InputError, match="replicas takes a whole number"):
        IsolateOptions(**options)
    with pytest.raises(ebbtide.InputError, match="lazy takes True or False"):
        IsolateOptions(lazy="yes")  # type: ignore[arg-type]


# With processes


def test_several_processes_are_one_pipeline(strange: Any) -> None:
    with strange(replicas=3) as pipe:
        expected = pipe("the sea")
        wake_all(pipe)
        pids = pipe.pids
        assert len(set(pids)) == 3
        assert "in 3 processes" in repr(pipe)
        answers = Counter(where(pipe) for _ in range(9))
        assert answers == {str(pid): 3 for pid in pids}
        assert (pipe("the sea") == expected).all()
        each = [one.anonymous for one in pipe._worker.workers]
        assert pipe.memory.anonymous == pipe._lifecycle.charged == sum(each)
        assert min(each) > 1_000_000
        assert len(pipe.memory.holdings) == 6
    receipt = pipe.dispose()
    assert receipt.verified
    assert receipt.charged == receipt.released > 3_000_000
    assert all(any(f"(pid {pid}) ended with" in one for one in receipt.reasons) for pid in pids)
    assert sum(one.startswith("there: ") for one in receipt.reasons) == 3
    assert not any(map(is_there, pids))
    assert pipe.pids == ()


def test_the_process_that_is_busy_gets_no_call_while_another_is_idle(strange: Any) -> None:
    with strange(replicas=2) as pipe:
        wake_all(pipe)
        token = CancelToken("it")
        waiting = pipe._made("wait", (), {}, token=token)
        (busy,) = [one for one in pipe._worker.workers if one.under_way]
        assert str(busy.pid) not in {where(pipe) for _ in range(6)}
        token.cancel()
        with pytest.raises(ebbtide.PipelineCancelledError):
            waiting.wait()
        assert str(busy.pid) in {where(pipe) for _ in range(6)}


def test_a_stream_stays_where_it_began_and_the_other_goes_on(strange: Any) -> None:
    with strange(replicas=2) as pipe:
        wake_all(pipe)
        stream = pipe._made("stream", (), {}, tells="stream")
        pieces = stream.events()
        assert str(next(pieces)) == "sea"
        (there,) = [one for one in pipe._worker.workers if one.under_way]
        assert str(there.pid) not in {where(pipe) for _ in range(4)}
        stream.token.cancel()
        assert list(pieces) == []
        until(lambda: not there.under_way)


def test_a_crash_of_one_fails_its_calls_alone_and_it_is_started_again(strange: Any) -> None:
    with strange(replicas=2) as pipe:
        wake_all(pipe)
        before = set(pipe.pids)
        tokens = [CancelToken("it"), CancelToken("it")]
        calls = [pipe._made("wait", (), {}, token=token) for token in tokens]
        dies, lives = (
            next(one for one in pipe._worker.workers if call.number in one._child.calls)
            for call in calls
        )
        killed = dies.pid
        os.kill(killed, signal.SIGKILL)
        with pytest.raises(WorkerCrashedError, match=rf"pid {killed}\) was ended by SIGKILL"):
            calls[0].wait()
        assert where(pipe) == str(lives.pid)  # and does not wait for the one that is started
        assert pipe.state is State.READY
        until(lambda: dies.pid not in (None, killed) and not dies.under_way)
        assert dies.pid not in before
        assert where(pipe) == str(dies.pid)  # the other is busy
        tokens[1].cancel()
        with pytest.raises(ebbtide.PipelineCancelledError):
            calls[1].wait()


def test_what_crashed_and_may_not_be_started_is_passed_by(strange: Any) -> None:
    with strange(replicas=2, restart="never") as pipe:
        wake_all(pipe)
        for left in (1, 0):
            with pytest.raises(WorkerCrashedError):
                call(pipe, "abort")
            until(lambda left=left: len(pipe.pids) == left)
            if left:
                assert len({where(pipe) for _ in range(4)}) == 1
        with pytest.raises(WorkerCrashedError, match="Make a new pipeline"):
            where(pipe)


def test_processes_that_are_idle_end_and_come_back(strange: Any) -> None:
    with strange(replicas=2, idle=0.05) as pipe:
        wake_all(pipe)
        until(lambda: pipe.state is State.SLEEPING)
        assert pipe.memory.anonymous == 0
        assert pipe.pids == ()
        assert pipe("the sea").shape == (1, 4, 32)
        wake_all(pipe)
        assert pipe.dispose().verified


def test_lazy_ones_start_once_all_others_are_busy(strange: Any) -> None:
    with strange(replicas=3, lazy=True) as pipe:
        for _ in range(4):
            pipe("the sea")
        assert len(pipe.pids) == 1
        token = CancelToken("it")
        waiting = pipe._made("wait", (), {}, token=token)
        assert pipe("the sea").shape == (1, 4, 32)  # finds the one there is busy, and uses it
        until(lambda: len(pipe.pids) == 2)
        token.cancel()
        with pytest.raises(ebbtide.PipelineCancelledError):
            waiting.wait()
        assert len(pipe.pids) == 2


def test_all_sleep_and_one_that_is_called_wakes_alone(strange: Any) -> None:
    with strange(replicas=2) as pipe:
        wake_all(pipe)
        receipt = pipe.sleep()
        assert receipt.verified, receipt
        assert pipe.state is State.SLEEPING
        assert len(pipe.pids) == 2
        assert pipe("the sea").shape == (1, 4, 32)
        assert pipe.state is State.READY
        assert sorted(one.value for one in pipe._worker._states) == ["ready", "sleeping"]


def test_an_event_loop_spreads_its_calls_too(strange: Any) -> None:
    async def work(pipe: Any) -> set[str]:
        found = [pipe._made("where", (), {}).result() for _ in range(8)]
        return set(await asyncio.gather(*found))

    with strange(replicas=2) as pipe:
        wake_all(pipe)
        assert asyncio.run(work(pipe)) == {str(pid) for pid in pipe.pids}


def test_a_load_that_fails_is_told_once_and_starts_no_other(tmp_path: Path) -> None:
    with pytest.raises(ebbtide.ModelNotFoundError):
        ebbtide.pipeline(
            "feature-extraction", tmp_path / "none", isolate=IsolateOptions(replicas=3)
        )


def test_a_replica_that_still_loads_is_killed_by_a_dispose_and_the_receipt_says_so(
    strange: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    pipe = strange("slow_again", replicas=2)
    until(lambda: all(one._own for one in pipe._worker.workers))
    receipt = pipe.dispose()
    assert receipt.verified
    assert "its pipeline was still being loaded" in receipt.reasons
    assert not [one for one in receipt.reasons if "in time" in one]


# Memory that stays


def test_a_process_that_keeps_memory_in_its_sleep_is_ended(strange: Any) -> None:
    with strange("keeping") as pipe:
        pid = pipe.pid
        receipt = pipe.sleep()
        assert not is_there(pid)
        assert receipt.verified
        assert (receipt.charged, receipt.retained) == (30_000_000, 0)
        assert receipt.released >= 30_000_000
        assert f"memory had stayed, so that its process (pid {pid}) ended" in receipt.reasons[0]
        assert "not verified" in receipt.reasons[1]
        assert pipe.state is State.SLEEPING
        assert pipe.memory.anonymous == 0
        assert pipe.pid is None  # until it is needed
        assert pipe("the sea").shape == (1, 4, 32)
        assert pipe.pid not in (None, pid)


def test_a_process_that_gives_all_back_in_its_sleep_lives_on(strange: Any) -> None:
    with strange() as pipe:
        pid = pipe.pid
        assert pipe.sleep().verified
        assert pipe.pid == pid


def test_one_that_keeps_memory_ends_after_the_calls_that_came_meanwhile(strange: Any) -> None:
    with strange("keeping") as pipe:
        pid, token = pipe.pid, CancelToken("it")
        waiting = pipe._made("wait", (), {}, token=token)
        receipt = pipe.sleep(timeout=0)
        assert "its process ends once the calls" in receipt.reasons[-1]
        assert pipe.pid == pid
        token.cancel()
        with pytest.raises(ebbtide.PipelineCancelledError):
            waiting.wait()
        until(lambda: pipe.pid is None)
        assert pipe("the sea").shape == (1, 4, 32)


def test_each_replica_that_keeps_memory_is_ended(strange: Any) -> None:
    with strange("keeping", replicas=2) as pipe:
        wake_all(pipe)
        pids = pipe.pids
        receipt = pipe.sleep()
        assert not any(map(is_there, pids))
        assert (receipt.charged, receipt.retained) == (60_000_000, 0)
        assert pipe.pids == ()
        assert pipe("the sea").shape == (1, 4, 32)


# Nothing is left

LOOK = (
    watched.LOOK
    + """
def until(is_so, seconds=20):
    deadline = time.monotonic() + seconds
    while not is_so() and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    return is_so()

def load(**options):
    isolate = IsolateOptions(replicas=2, **options)
    return ebbtide.pipeline("feature-extraction", MODEL, isolate=isolate)
"""
)


def test_a_kill_under_load_fails_what_ran_there_and_all_else_is_answered(
    fresh_process: Any,
) -> None:
    fresh_process(
        LOOK
        + """
load().dispose()
before = look()
pipe = load()
pipe.wake()
first = set(pipe.pids)
answered, failed, ended = [], [], threading.Event()

def work():
    while not ended.is_set():
        try:
            answered.append(pipe(["the sea"] * 40, pooling="mean").shape)
        except ebbtide.WorkerCrashedError as error:
            failed.append(error)

threads = [threading.Thread(target=work) for _ in range(6)]
for one in threads:
    one.start()
assert until(lambda: len(answered) > 20)
killed = pipe.pids[0]
os.kill(killed, signal.SIGKILL)
assert until(lambda: failed), "nobody was told"
assert until(lambda: len(pipe.pids) == 2 and killed not in pipe.pids), pipe
there = len(answered)
assert until(lambda: len(answered) > there + 20)
ended.set()
for one in threads:
    one.join()
assert set(answered) == {(40, 32)}
assert 1 <= len(failed) <= 6 and all(f"pid {killed}" in str(one) for one in failed), failed
receipt = pipe.dispose()
assert receipt.verified, receipt
assert sum(one.startswith("there: ") for one in receipt.reasons) == 2, receipt
assert until(lambda: look() == before), (look(), before)
"""
    )


def test_each_way_to_end_leaves_nothing(fresh_process: Any) -> None:
    fresh_process(
        LOOK
        + """
import weakref

load().dispose()
before = look()

def at_once():
    return load()  # the second is still being started

def forked():
    pipe = load(start="fork-server")
    pipe.wake()
    return pipe

def lazy():
    return load(lazy=True)

def streams():
    pipe = load()
    pipe.wake()
    pipe.echo(bytes(500_000))
    return pipe

def ends(way):
    pipe = way()
    left = weakref.ref(pipe), weakref.ref(pipe._lifecycle), *map(weakref.ref, pipe._worker.workers)
    assert pipe.dispose(cancel=True).verified
    return left

gc.collect()
gc.disable()
for way in (at_once, lazy, streams, forked):
    left = ends(way)
    assert until(lambda: not any(one() for one in left)), (way, [one() for one in left])
    if way is not forked:  # its server stays for half a minute
        assert until(lambda: look() == before), (way, look(), before)
"""
    )


def test_the_end_of_the_parent_ends_all(fresh_process: Any) -> None:
    seen = fresh_process(
        LOOK
        + """
pipe = load()
pipe.wake()
print(*pipe.pids, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
""",
        code=-signal.SIGKILL,
    )
    pids = [int(one) for one in seen.split()]
    assert len(pids) == 2
    until(lambda: not any(map(is_there, pids)))
