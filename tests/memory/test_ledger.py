"""What is alive, who owns it, and when a measured change belongs to one thing alone."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbtide.cancellation import CancelToken
from ebbtide.memory import ledger as ledger_module
from ebbtide.memory.ledger import Activity, Ledger, Native


class Counting(Native):
    """Something that can be closed, and counts it."""

    def __init__(self) -> None:
        self.closed = 0
        self.leaked = 0

    def close(self) -> tuple[()]:
        self.closed += 1
        return ()

    def leak(self) -> None:
        self.leaked += 1


class Figures:
    """The process's memory as the test says it is."""

    def __init__(self) -> None:
        self.now = 1000

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Figures:
    found = Figures()
    monkeypatch.setattr(ledger_module, "anonymous_bytes", found)
    monkeypatch.setattr(ledger_module.allocator, "trim", lambda: "none")
    return found


@given(st.lists(st.integers(min_value=0, max_value=5), max_size=60))
def test_a_window_is_quiet_if_nothing_overlapped_it(choices: list[int]) -> None:
    """Against plain intervals: 0 and 1 begin one more, the others close one of the open."""
    activity = Activity()
    spans: dict[Any, list[float]] = {}
    still_open: list[Any] = []
    quiet: dict[Any, bool] = {}

    def close(moment: int, which: int) -> None:
        window = still_open.pop(which % len(still_open))
        quiet[window] = window.close()[1]
        spans[window][1] = moment

    moment = 0
    for choice in choices:
        moment += 1
        if choice < 2 or not still_open:
            window = activity.begin()
            spans[window] = [moment, float("inf")]
            still_open.append(window)
        else:
            close(moment, choice)
    for _ in tuple(still_open):
        moment += 1
        close(moment, 0)
    for window, (begin, end) in spans.items():
        others = [one for other, one in spans.items() if other is not window]
        overlapped = any(start < end and begin < stop for start, stop in others)
        assert quiet[window] == (not overlapped)
    assert activity._active == {}


def test_a_window_gives_the_change_since_it_was_measured(figures: Figures) -> None:
    window = Activity().begin()
    figures.now = 1500
    window.measure()
    figures.now = 1200
    assert window.close() == (-300, True)


def test_a_forked_child_begins_with_nothing_going_on() -> None:
    activity = Activity()
    inherited = activity.begin()
    activity.forget()
    window = activity.begin()
    assert not activity.end(inherited)
    assert activity.end(window)


def test_a_load_is_charged_what_the_process_grew_by(figures: Figures) -> None:
    def load() -> Counting:
        figures.now += 400
        return Counting()

    ledger = Ledger(Activity())
    lease = ledger.acquire("key", "session", load, CancelToken("test"))
    assert (lease.charge, lease.holding.quiet, lease.holding.owners) == (400, True, 1)


def test_a_load_that_makes_the_process_smaller_is_charged_nothing(figures: Figures) -> None:
    def load() -> Counting:
        figures.now -= 400
        return Counting()

    assert Ledger(Activity()).acquire("key", "session", load, CancelToken("test")).charge == 0


def test_a_disturbed_load_is_charged_by_an_earlier_quiet_one(figures: Figures) -> None:
    def load(size: int) -> Any:
        figures.now += size
        return Counting()

    activity = Activity()
    ledger = Ledger(activity)
    ledger.acquire("key", "session", lambda: load(400), CancelToken("test")).release()
    other = activity.begin()
    disturbed = ledger.acquire("key", "session", lambda: load(9000), CancelToken("test"))
    assert (disturbed.charge, disturbed.holding.quiet) == (400, False)
    unknown = ledger.acquire("other key", "session", lambda: load(700), CancelToken("test"))
    assert (unknown.charge, unknown.holding.quiet) == (700, False)
    another_kind = ledger.acquire("key", "tokenizer", lambda: load(50), CancelToken("test"))
    assert another_kind.charge == 50
    disturbed.release()
    activity.end(other)
    again = ledger.acquire("key", "session", lambda: load(500), CancelToken("test"))
    assert (again.charge, again.holding.quiet) == (500, True)
    again.release()
    activity.begin()
    assert ledger.acquire("key", "session", lambda: load(1), CancelToken("test")).charge == 500


def test_a_load_that_another_thing_began_in_is_not_quiet(figures: Figures) -> None:
    activity = Activity()

    def load() -> Counting:
        activity.end(activity.begin())
        return Counting()

    assert not Ledger(activity).acquire("key", "session", load, CancelToken("test")).holding.quiet


def test_equal_keys_are_one_thing_until_its_last_owner_gives_it_up(figures: Figures) -> None:
    ledger = Ledger(Activity())
    native = Counting()
    leases = [
        ledger.acquire("key", "session", lambda: native, CancelToken("test")) for _ in range(3)
    ]
    assert [lease.shared_with() for lease in leases] == [2, 2, 2]
    assert all(lease.value is native for lease in leases)
    for left, lease in ((2, leases[0]), (1, leases[2])):
        for _ in range(2):
            assert lease.release() == ()
        assert (lease.value, lease.holding, lease.charge, lease.shared_with()) == (None, None, 0, 0)
        assert (native.closed, leases[1].holding.owners) == (0, left)
    leases[1].release()
    assert native.closed == 1
    assert ledger._entries == {}
    assert ledger.acquire("key", "session", Counting, CancelToken("test")).value is not native


def test_only_a_sole_owner_is_charged(figures: Figures) -> None:
    def load() -> Counting:
        figures.now += 400
        return Counting()

    ledger = Ledger(Activity())
    first = ledger.acquire("key", "session", load, CancelToken("test"))
    second = ledger.acquire("key", "session", load, CancelToken("test"))
    assert (first.charge, second.charge) == (0, 0)
    first.release()
    assert second.charge == 400


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_load_that_fails_leaves_nothing_behind(figures: Figures, error: BaseException) -> None:
    def fail() -> Counting:
        raise error

    activity = Activity()
    ledger = Ledger(activity)
    with pytest.raises(type(error)):
        ledger.acquire("key", "session", fail, CancelToken("test"))
    assert ledger._entries == {}
    assert activity._active == {}
    assert ledger.acquire("key", "session", Counting, CancelToken("test")).holding.quiet


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_load_whose_memory_cannot_be_read_leaves_nothing_behind(
    figures: Figures, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """With no descriptor left in the process, reading its memory fails."""
    reads: list[None] = []
    native = Counting()

    def failing() -> int:
        reads.append(None)
        if len(reads) == (1 if moment == "before" else 2):
            raise OSError(24, "Too many open files")
        return 1000

    activity = Activity()
    ledger = Ledger(activity)
    with monkeypatch.context() as patch:
        patch.setattr(ledger_module, "anonymous_bytes", failing)
        try:
            lease = ledger.acquire("key", "session", lambda: native, CancelToken("test"))
        except OSError:
            assert native.closed == (moment == "after")
        else:
            lease.release()
    assert ledger._entries == {}, "the next load of the same thing would wait for ever"
    assert activity._active == {}, "nothing would ever be quiet again"


def test_whoever_waits_for_a_load_that_fails_tries_for_themselves(figures: Figures) -> None:
    ledger = Ledger(Activity())
    begun, go = threading.Event(), threading.Event()
    outcomes: list[object] = []

    def fail() -> Counting:
        begun.set()
        assert go.wait(30)
        raise ValueError("the first failed")

    def first() -> None:
        try:
            ledger.acquire("key", "session", fail, CancelToken("test"))
        except ValueError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=first)]
    threads[0].start()
    assert begun.wait(30)
    leases: list[Any] = []
    loads: list[Counting] = []

    def load() -> Counting:
        loads.append(Counting())
        return loads[-1]

    for _ in range(4):
        threads.append(
            threading.Thread(
                target=lambda: leases.append(
                    ledger.acquire("key", "session", load, CancelToken("test"))
                )
            )
        )
        threads[-1].start()
    go.set()
    for thread in threads:
        thread.join(30)
    assert len(outcomes) == 1
    assert len(loads) == 1
    assert [lease.value for lease in leases] == loads * 4


def test_in_a_forked_child_a_lease_leaks_its_native_and_frees_nothing(figures: Figures) -> None:
    native = Counting()
    ledger = Ledger(Activity())
    lease = ledger.acquire("key", "session", lambda: native, CancelToken("test"))
    ledger.forget()
    lease.leak()
    assert (native.leaked, native.closed) == (1, 0)
    assert ledger.acquire("key", "session", Counting, CancelToken("test")).value is not native
