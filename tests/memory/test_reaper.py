"""The reaper, step by step: it has no thread here, and a clock of the test's own."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from ebbtide._settings import settings
from ebbtide.cancellation import CancelToken
from ebbtide.errors import DisposalError
from ebbtide.lifecycle import Disposable, Lifecycle, Request, State, _live
from ebbtide.memory import reaper as reaper_module
from ebbtide.memory.ledger import Activity
from ebbtide.memory.reaper import GRACE, Reaper


class Resource:
    """Something that a lifecycle owns: a size, and what happens when it is released."""

    def __init__(self, order: list[str], name: str = "one", charge: int = 0, others: int = 0):
        self.order = order
        self.name = name
        self.charge = charge
        self.others = others
        self.failing: Exception | None = None

    def release(self) -> Sequence[Any]:
        self.order.append(self.name)
        if self.failing is not None:
            raise self.failing
        return ()

    def shared_with(self) -> int:
        return self.others

    def leak(self) -> None:
        raise AssertionError("nothing was forked")


class Stage:
    """A reaper with a clock that the test sets, and lifecycles for it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.reaper = Reaper(clock=lambda: self.now)
        self.lives: list[Lifecycle] = []
        self.order: list[str] = []

    def life(self, name: str = "one", charge: int = 0, calls: int = 0) -> Lifecycle:
        life = Lifecycle(f"The pipeline {name}", self.reaper, (__file__, 7))
        life.state = State.DISPOSING
        life.resources.append(Resource(self.order, name, charge))
        for number in range(calls):
            life.running[CancelToken(f"{name} {number}")] = None
        self.lives.append(life)
        return life

    def ask(self, life: Lifecycle, deadline: float, **more: Any) -> None:
        self.reaper.request(Request(life, deadline, more.pop("collect", False), **more))

    def step(self, now: float | None = None) -> None:
        if now is not None:
            self.now = now
        self.reaper._step(0)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setattr(reaper_module.allocator, "trim", lambda: "trimmed")
    found = Stage()
    yield found
    for life in found.lives:
        _live.pop(id(life), None)


def cancelled(life: Lifecycle) -> list[bool]:
    return [token.cancelled for token in life.running]


def test_what_nobody_uses_is_disposed_at_once_whatever_its_deadline(stage: Stage) -> None:
    life = stage.life()
    stage.ask(life, deadline=1000)
    stage.step()
    assert life.receipt is not None
    assert life.receipt.method == "trimmed"
    assert stage.order == ["one"]
    assert stage.reaper._patience() is None


def test_running_calls_are_cancelled_at_the_deadline_and_not_before(stage: Stage) -> None:
    life = stage.life(calls=3)
    stage.ask(life, deadline=5)
    assert stage.reaper._patience() is None, "it has not heard of it yet"
    stage.step(now=0)
    assert stage.reaper._patience() == 5
    stage.step(now=4.99)
    assert cancelled(life) == [False] * 3
    assert stage.reaper._patience() == pytest.approx(0.01)
    stage.step(now=5)
    assert cancelled(life) == [True] * 3
    assert life.receipt is None
    assert stage.reaper._patience() == GRACE


def test_a_drain_ends_with_the_last_call(stage: Stage) -> None:
    life = stage.life(calls=2)
    stage.ask(life, deadline=5)
    stage.step()
    first, second = life.running
    life.leave(first)
    assert stage.reaper._queue.empty(), "one is still running"
    stage.step()
    assert life.receipt is None
    life.leave(second)
    assert stage.reaper._queue.qsize() == 1
    stage.step()
    assert life.receipt is not None
    assert life.receipt.reasons == () or "calls had not ended" not in str(life.receipt)


def test_calls_that_outlast_the_grace_are_left_and_the_receipt_says_so(stage: Stage) -> None:
    life = stage.life(calls=2)
    stage.ask(life, deadline=5)
    stage.step(now=5)
    stage.step(now=5 + GRACE - 0.01)
    assert life.receipt is None
    stage.step(now=5 + GRACE)
    assert life.receipt is not None
    assert f"2 cancelled calls had not ended after {GRACE:.0f} s" in str(life.receipt)
    assert stage.reaper._patience() is None


def test_a_second_request_brings_the_deadline_forward(stage: Stage) -> None:
    life = stage.life(calls=1)
    stage.ask(life, deadline=1000)
    stage.step()
    stage.ask(life, deadline=0)
    stage.step(now=1)
    assert cancelled(life) == [True]
    assert stage.reaper._patience() == GRACE


def test_a_second_request_never_puts_the_deadline_off(stage: Stage) -> None:
    life = stage.life(calls=1)
    stage.ask(life, deadline=5)
    stage.ask(life, deadline=1000)
    stage.step()
    assert stage.reaper._patience() == 5
    stage.step(now=5)
    for deadline in (5, 1000, 0):
        stage.ask(life, deadline=deadline)
        stage.step(now=6)
    assert stage.reaper._patience() == GRACE - 1, "the grace runs on as it did"


@pytest.mark.parametrize("order", [(True, False), (False, True), (True, True)])
def test_a_collection_runs_only_if_every_request_allows_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, order: tuple[bool, bool]
) -> None:
    monkeypatch.setattr(reaper_module.gc, "collect", lambda: collections.append(None))
    collections: list[None] = []
    life = stage.life(charge=10**12)  # far more than comes back
    for collect in order:
        stage.ask(life, deadline=0, collect=collect)
    stage.step()
    assert bool(collections) == all(order)
    assert life.receipt is not None
    assert ("gc.collect" in life.receipt.method) == all(order)


def test_a_request_after_the_receipt_changes_nothing(stage: Stage) -> None:
    life = stage.life()
    stage.ask(life, deadline=0)
    stage.step()
    receipt = life.receipt
    stage.ask(life, deadline=0)
    stage.step()
    assert life.receipt is receipt
    assert stage.order == ["one"]


def test_a_forgotten_one_is_warned_of_where_it_was_made(stage: Stage) -> None:
    life = stage.life()
    stage.ask(life, deadline=0, forgotten=True)
    with pytest.warns(ResourceWarning, match=r"The pipeline one was collected") as caught:
        stage.step()
    assert (caught[0].filename, caught[0].lineno) == (__file__, 7)
    assert stage.order == ["one"]


def test_only_what_nobody_had_asked_to_dispose_is_forgotten(stage: Stage) -> None:
    """It is collected while its disposal is on its way: no warning is due."""
    life = stage.life()
    life.state = State.READY
    pipe = Disposable(life)
    life.request()
    gone = weakref.ref(pipe)
    del pipe
    assert gone() is None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stage.step()
    assert life.state is State.DISPOSED
    assert [str(one.message) for one in caught] == []


def test_a_batch_is_released_largest_first_and_trimmed_once(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    trims: list[int] = []

    def trim() -> str:
        trims.append(len(stage.order))
        return "trimmed"

    monkeypatch.setattr(reaper_module.allocator, "trim", trim)
    lives = [stage.life(name, charge) for name, charge in (("b", 20), ("d", 1), ("a", 300))]
    lives.append(stage.life("c", 3))
    lives[-1].working = 10
    busy = stage.life("busy", 10**9, calls=1)
    for life in (*lives, busy):
        stage.ask(life, deadline=1000)
    stage.step()
    assert stage.order == ["a", "b", "c", "d"]
    assert trims == [4]
    assert busy.receipt is None
    receipts = [life.receipt for life in lives]
    assert [one.charged for one in receipts if one] == [20, 1, 300, 13]
    assert not any(one.quiet for one in receipts if one), "four at once: whose was the change?"


def test_a_failing_release_stops_neither_the_rest_of_it_nor_the_batch(stage: Stage) -> None:
    bad, good = stage.life("bad"), stage.life("good")
    failing = Resource(stage.order, "failing", charge=5)
    failing.failing = OSError("the driver is gone")
    bad.resources.append(failing)
    stage.ask(bad, deadline=0)
    stage.ask(good, deadline=0)
    stage.step()
    assert sorted(stage.order) == ["bad", "failing", "good"]
    assert isinstance(bad.error, DisposalError)
    assert bad.error.errors == (failing.failing,)
    assert good.error is None
    assert bad.receipt is not None
    assert not bad.receipt.verified


def test_what_had_an_owner_ends_disposed_and_a_load_ends_failed(stage: Stage) -> None:
    owned, load = stage.life("owned"), stage.life("load")
    pipe = Disposable(owned)
    for life in (owned, load):
        stage.ask(life, deadline=0)
    stage.step()
    assert pipe.state is State.DISPOSED
    assert load.state is State.FAILED


def test_a_function_that_raises_is_reported_and_the_reaper_goes_on(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", reports.append)
    error = ValueError("of a user's own")

    def fail() -> None:
        raise error

    ran: list[str] = []
    stage.reaper.later(fail)
    stage.reaper.later(lambda: ran.append("the next"))
    life = stage.life()
    stage.ask(life, deadline=0)
    stage.step()
    assert ran == ["the next"]
    assert life.receipt is not None
    assert [(one.exc_type, one.exc_value) for one in reports] == [(ValueError, error)]
    assert "reaper" in reports[0].err_msg


def test_pythons_own_hook_takes_the_report_too(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python's hook takes no report of a type but its own."""
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)

    def fail() -> None:
        raise ValueError("of a user's own")

    life = stage.life()
    stage.reaper.later(fail)
    stage.ask(life, deadline=0)
    stage.step()
    assert life.receipt is not None
    assert "ValueError: of a user's own" in capsys.readouterr().err


def test_a_hook_that_raises_itself_does_not_stop_the_reaper(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hook(report: Any) -> None:
        raise KeyError("the hook's own")

    def fail() -> None:
        raise ValueError("of a user's own")

    monkeypatch.setattr(sys, "unraisablehook", hook)
    life = stage.life()
    stage.reaper.later(fail)
    stage.ask(life, deadline=0)
    stage.step()
    assert life.receipt is not None


def test_a_warning_as_an_error_under_pythons_own_hook_hangs_nobody(fresh_process) -> None:
    out = fresh_process(
        """
        import faulthandler, ebbtide
        faulthandler.dump_traceback_later(10, exit=True)
        ebbtide.pipeline("feature-extraction", MODEL)
        with ebbtide.pipeline("feature-extraction", MODEL) as pipe:
            pipe("the reaper lives")
        print(pipe.state.value)
        """
    )
    assert "ResourceWarning" in out
    assert out.splitlines()[0] == "disposed" or out.splitlines()[-1] == "disposed"


def test_a_process_without_a_free_descriptor_can_still_dispose(fresh_process) -> None:
    """Its memory cannot be read then; it is given back all the same."""
    out = fresh_process(
        """
        import faulthandler, os, resource, ebbtide
        from ebbtide.memory.ledger import activity, ledger
        faulthandler.dump_traceback_later(10, exit=True)
        pipe = ebbtide.pipeline("feature-extraction", MODEL)
        other = ebbtide.pipeline("feature-extraction", MODEL, dtype="q8")
        pipe("the sea"), other("the sea")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.open("/dev/null", os.O_RDONLY)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            pipe("the sea")
        except OSError:
            pass
        pipe.dispose()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        print(other("the sea").ndim, other.dispose().quiet, len(activity._active))
        print(len(ledger._entries), pipe.state.value, other.state.value)
        """
    )
    assert out.splitlines() == ["3 True 0", "0 disposed disposed"]


@pytest.mark.parametrize("name", ["ebbtide-native"])
def test_a_finalizer_may_dispose_on_a_thread_of_ebbtide_that_is_only_starting(
    fresh_process, name: str
) -> None:
    """Garbage may be collected there before the thread's own function has begun."""
    out = fresh_process(
        """
        import faulthandler, gc, threading, ebbtide
        faulthandler.dump_traceback_later(10, exit=True)
        other = ebbtide.pipeline("feature-extraction", MODEL, dtype="q8")
        class Owner:
            def __init__(self):
                self.itself = self
            def __del__(self):
                other.dispose()
        inner = threading.Thread._set_ident
        def set_ident(thread):
            inner(thread)
            if thread.name.startswith(NAME):
                gc.collect()
        gc.disable()
        threading.Thread._set_ident = set_ident
        Owner()
        def use():
            with ebbtide.pipeline("feature-extraction", MODEL) as pipe:
                pipe("the sea")
        users = [threading.Thread(target=use) for _ in range(4)]
        for user in users:
            user.start()
        for user in users:
            user.join()
        gc.collect()
        print(other.dispose().charged > 0, other.state.value)
        """.replace("NAME", repr(name))
    )
    assert out.strip() == "True disposed"


@pytest.fixture
def held(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The process's bytes, the last of them being what is read; and how often it was trimmed."""
    found = [100_000_000]
    monkeypatch.setattr(reaper_module, "anonymous_bytes", lambda: found[-1])

    def trim() -> str:
        found.append(50_000_000)
        return "trimmed"

    monkeypatch.setattr(reaper_module.allocator, "trim", trim)
    monkeypatch.setattr(reaper_module, "activity", Activity())
    monkeypatch.setattr(settings, "idle_trim", 2.0)
    return found


def test_what_calls_freed_is_given_back_once_nothing_has_run_for_a_while(
    stage: Stage, held: list[int]
) -> None:
    stage.reaper.ran()
    stage.step(0.0)
    assert stage.reaper._patience() == 2.0
    stage.step(1.9)
    assert held == [100_000_000]
    stage.step(2.0)
    assert held == [100_000_000, 50_000_000]
    assert stage.reaper._patience() is None, "it sleeps until somebody calls again"


def test_a_call_in_the_meantime_puts_it_off(stage: Stage, held: list[int]) -> None:
    stage.reaper.ran()
    stage.step(0.0)
    reaper_module.activity.end(reaper_module.activity.begin())
    stage.reaper.ran()
    stage.step(2.0)
    assert len(held) == 1
    window = reaper_module.activity.begin()
    stage.step(4.0)
    stage.step(6.0)
    assert len(held) == 1, "a call goes on all the time"
    reaper_module.activity.end(window)
    stage.step(8.0)
    assert len(held) == 2


def test_a_process_that_has_grown_little_is_not_trimmed_again(
    stage: Stage, held: list[int]
) -> None:
    for now, grown in ((0.0, 0), (10.0, 3_000_000), (20.0, 5_000_000)):
        held.append(held[-1] + grown)
        stage.reaper.ran()
        stage.step(now)
        stage.step(now + 2.0)
    assert held[-2:] == [58_000_000, 50_000_000]
    assert held.count(50_000_000) == 2


def test_none_for_idle_trim_never_trims(
    stage: Stage, held: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "idle_trim", None)
    stage.reaper.ran()
    stage.step(0.0)
    assert stage.reaper._patience() is None
