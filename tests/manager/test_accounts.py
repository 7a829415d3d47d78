"""The sums of a manager: what counts, what is missing, what can never fit."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.manager.conftest import World

from ebbtide.errors import OutOfBudgetError
from ebbtide.manager.accounts import BYTES, COUNT, MAPPED, WINDOW, Beside, mb
from ebbtide.manager.policy import Entry, Need
from ebbtide.manager.slots import Phase, Size, Slot
from ebbtide.manager.status import explanation_of, status_of

# What lies beside the pipelines


def test_the_least_of_late_is_the_floor_and_what_came_on_top_is_the_calls() -> None:
    beside = Beside()
    for at, bytes_ in ((0.0, 30), (1.0, 50), (2.0, 35)):
        beside.saw(at, bytes_, bytes_)
    assert (beside.floor, beside.high) == (30, 50)


def test_a_measurement_counts_for_ten_seconds() -> None:
    beside = Beside()
    beside.saw(0.0, 10, 10)
    beside.saw(1.0, 90, 90)
    beside.saw(WINDOW, 50, 50)
    assert (beside.floor, beside.high) == (10, 90)
    beside.saw(WINDOW + 0.5, 50, 50)
    assert (beside.floor, beside.high) == (50, 90)
    beside.saw(WINDOW + 1.5, 50, 50)
    assert (beside.floor, beside.high) == (50, 50)


def test_however_often_it_is_measured_ten_seconds_count() -> None:
    beside = Beside()
    beside.saw(0.0, 90, 90)
    beside.saw(0.05, 95, 85)
    for number in range(20_000):
        beside.saw(0.2 + number * 0.0004, 20, 20)
    assert (beside.floor, beside.high) == (20, 90)
    assert len(beside._seen) <= 10 * WINDOW + 2


def test_less_than_nothing_is_nothing() -> None:
    beside = Beside()
    beside.saw(0.0, -5, -9)
    assert (beside.floor, beside.high, beside.sure) == (0, 0, 0)


@given(
    st.integers(0, 100),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 50), st.integers(0, 50)), min_size=1),
)
def test_calls_under_way_are_never_in_the_floor_and_what_they_took_is_in_the_sum(
    base: int, samples: list[tuple[float, int, int]]
) -> None:
    beside, now = Beside(), 0.0
    for gap, reserved, held in samples:
        now += gap
        held = min(held, reserved)
        beside.saw(now, base + held, base + held, reserved)
        assert beside.sure <= base
        assert beside.floor <= base
        assert beside.high >= base + held


def test_calls_that_run_all_the_time_count_once(world: World) -> None:
    world.base, world.calls, world.reserved = 20, 30, 30
    for _ in range(30):
        world.now += 1.0
        world.books.measure()
    books = world.books
    assert (books.floor, books.workspace, books.free) == (20, 30, 50)
    assert books.for_calls == 80


def test_a_load_under_way_is_counted_once_and_in_full(world: World) -> None:
    slot = world.slot("a", 40)
    world.base = 10
    world.ask(slot)
    world.real["a"] = 25
    world.books.measure()
    assert world.books.charged == 40
    assert (world.books.floor, world.books.workspace) == (10, 0)


def test_what_calls_reserved_is_kept_for_them_before_they_take_it(world: World) -> None:
    world.reserved = 30
    assert world.books.workspace == 30
    assert world.books.free == 70
    assert world.books.for_calls == 100


# What slots are charged with


@pytest.mark.parametrize(
    ("phase", "was_asleep", "charge", "mapped", "device"),
    [
        (Phase.EMPTY, False, 0, 0, 0),
        (Phase.LOADING, False, 50, 7, 9),
        (Phase.READY, False, 40, 7, 9),
        (Phase.FALLING_ASLEEP, False, 40, 7, 9),
        (Phase.ASLEEP, False, 5, 0, 0),
        (Phase.WAKING, False, 50, 7, 9),
        (Phase.EVICTING, False, 40, 7, 9),
        (Phase.EVICTING, True, 5, 0, 0),
    ],
)
def test_a_slot_is_charged_until_its_receipt_comes(
    world: World, phase: Phase, was_asleep: bool, charge: int, mapped: int, device: int
) -> None:
    slot = world.slot("a", 40, 5, peak=50, mapped=7, devices={"cuda:0": 9})
    slot.phase, slot.was_asleep = phase, was_asleep
    assert (slot.charge, slot.mapped, slot.on("cuda:0")) == (charge, mapped, device)
    assert (world.books.charged, world.books.mapped) == (charge, mapped)
    assert slot.on("cuda:1") == 0


def test_the_status_adds_up_to_the_budget(world: World) -> None:
    world.base, world.calls = 10, 5
    world.lease(world.loaded("a", 40, mapped=3))
    world.desk.pin(world.loaded("b", 20), True)
    world.books.measure()
    status = status_of(world.books, 2, {"loads": 1})
    assert status.budget == status.floor + status.pipelines + status.workspace + status.free
    assert (status.pipelines, status.waiting, status.mapped) == (60, 2, 3)
    assert [entry.key for entry in status.entries] == ["a", "b"]
    assert "2 waiting" in str(status)
    assert "a: ready, 0.0 MB, 0.0 MB mapped, 1 lease, used 2 times, 0 s ago" in str(status)


# What is missing


def test_what_is_being_given_back_counts_as_gone_only_for_later(world: World) -> None:
    gone = world.loaded("gone", 60)
    world.wish(gone, "evict")
    slot = world.slot("a", 80)
    assert world.books.missing(slot, later=False)[BYTES] == 40
    assert world.books.missing(slot, later=True)[BYTES] == -20
    assert not world.books.fits(slot)


def test_what_others_own_too_does_not_come_back_when_one_of_them_goes(world: World) -> None:
    shared = world.loaded("shared", 60, frees=20, ago=9.0)
    world.loaded("alone", 30, ago=1.0)
    (entry,) = [slot.as_entry() for slot in world.books if slot is shared]
    assert entry.bytes_awake == 20
    plan = world.books.plan(BYTES, 35)
    assert plan.possible == 50
    assert sorted(plan.sleep) == ["alone", "shared"]
    world.wish(shared, "evict")
    assert shared.leaving == 20
    assert shared.charge == 60


def test_of_what_others_own_too_nothing_more_comes_back_by_a_sleep(world: World) -> None:
    shared = world.loaded("shared", 60, 30, frees=20)
    assert shared.as_entry().bytes_asleep == 20
    world.wish(shared, "sleep")
    assert shared.leaving == 0


def test_what_does_not_map_puts_nobody_to_sleep_for_mapping() -> None:
    world = World(100, mapped_limit=10, most=3, devices={"cuda:0": 10})
    assert set(world.books.missing(world.slot("a", 1), later=True)) == {BYTES, COUNT}
    mapping = world.slot("b", 1, mapped=3, devices={"cuda:0": 1, "cuda:7": 1})
    assert set(world.books.missing(mapping, later=True)) == {BYTES, COUNT, MAPPED, "cuda:0"}


def test_a_slot_does_not_go_for_itself(world: World) -> None:
    slot = world.loaded("a", 90, 30)
    world.wish(slot, "sleep")
    world.done("sleep", slot)
    world.lease(world.loaded("busy", 20))
    ask = world.ask(slot)
    assert not ask.is_settled
    assert world.doing() == []
    assert slot.phase is Phase.ASLEEP
    assert "waits" in str(explanation_of(world.books, 0, slot))


# What can never fit


def never(world: World, slot: Slot) -> str:
    world.books.measure()
    found = world.books.never(slot)
    return "" if found is None else str(found)


def test_what_exactly_fills_the_budget_fits() -> None:
    world = World(100, base=20)
    assert not never(world, world.slot("a", 80))
    assert never(world, world.slot("b", 81))
    assert never(world, world.slot("c", 80, peak=81))


def test_what_is_pinned_stays_and_what_is_not_may_go(world: World) -> None:
    other = world.loaded("other", 40)
    slot = world.slot("a", 70)
    assert not never(world, slot)
    other.is_pinned = True
    assert "for pinned pipelines" in never(world, slot)
    other.phase = Phase.EMPTY
    world.real.clear()
    assert not never(world, slot)


def test_a_pinned_pipeline_counts_with_what_it_will_hold_in_the_end(world: World) -> None:
    pinned = world.slot("pinned", 30, 5, peak=60)
    pinned.is_pinned = True
    slot = world.slot("a", 70)
    world.ask(pinned)
    assert not never(world, slot), "its load takes 60 at most, and then 30"
    world.done("load", pinned)
    assert not never(world, slot)
    assert never(world, world.slot("b", 71))
    world.lease(pinned)
    world.wish(pinned, "sleep")
    assert not never(world, world.books.slots["b"]), "it is to sleep"
    assert never(world, world.slot("c", 96))
    world.wish(pinned, "evict")
    assert not never(world, world.books.slots["c"]), "it is to go"


def test_what_calls_and_loads_hold_for_the_moment_makes_nothing_impossible(world: World) -> None:
    world.base, world.calls, world.reserved = 10, 30, 30
    slot = world.slot("a", 80)
    loading = world.slot("loading", 40)
    world.ask(loading)
    world.real["loading"] = 30
    for _ in range(30):
        world.now += 1.0
        world.books.measure()
    assert not never(world, slot)
    world.base = 25
    for _ in range(30):
        world.now += 1.0
        world.real["loading"] = 40
        world.books.measure()
    assert never(world, slot)


def test_what_was_given_back_makes_it_possible_at_once(world: World) -> None:
    world.base = 50
    slot = world.slot("a", 80)
    assert never(world, slot)
    world.base = 10
    assert not never(world, slot)


def test_a_device_that_is_too_small_is_named() -> None:
    world = World(1000, devices={"cuda:0": 100_000_000})
    pinned = world.loaded("pinned", 1, devices={"cuda:0": 60_000_000})
    slot = world.slot("a", 1, devices={"cuda:0": 50_000_000})
    assert not never(world, slot)
    pinned.is_pinned = True
    assert "the budget of cuda:0 is 100.0 MB" in never(world, slot)
    assert not never(world, world.slot("b", 1, devices={"cuda:1": 10**12}))
    world.lease(pinned)
    world.wish(pinned, "sleep")
    assert not never(world, slot)


def test_where_all_that_there_may_be_are_pinned_nothing_else_fits() -> None:
    world = World(1000, most=1)
    pinned = world.loaded("pinned", 5)
    slot = world.slot("a", 5)
    assert not never(world, slot)
    pinned.is_pinned = True
    assert "all 1 pipelines that this manager may have are pinned" in never(world, slot)
    assert not never(world, pinned)
    world.wish(pinned, "evict")
    assert not never(world, slot)


def test_the_error_has_the_sum_and_what_could_be_had() -> None:
    world = World(100_000_000, base=10_000_000)
    world.loaded("pinned", 20_000_000).is_pinned = True
    world.books.measure()
    error = world.books.never(world.slot("a", 80_000_000))
    assert isinstance(error, OutOfBudgetError)
    assert (
        "a can never fit: 80.0 MB for it + 10.0 MB for the process without pipelines + 20.0 MB for"
        " pinned pipelines = 110.0 MB, and the budget of memory is 100.0 MB" in str(error)
    )
    assert (error.needed, error.available, error.budget) == (80_000_000, 70_000_000, 100_000_000)


# What a request would meet


def test_an_explanation_says_what_would_happen_and_changes_nothing(world: World) -> None:
    old = world.loaded("old", 60)
    slot = world.slot("a", 80)
    found = explanation_of(world.books, 0, slot)
    assert (found.verdict, found.sleep, found.evict) == ("makes room", ("old",), ())
    assert (found.needed, found.free) == (80, 40)
    assert "sleep old" in str(found)
    assert old.is_open
    assert explanation_of(world.books, 0, old).verdict == "ready"
    assert explanation_of(world.books, 0, world.slot("b", 40)).verdict == "fits"
    assert explanation_of(world.books, 3, world.slot("c", 40)).verdict == "waits"
    assert explanation_of(world.books, 0, world.slot("d", 101)).verdict == "never"
    world.lease(old)
    assert explanation_of(world.books, 0, slot).verdict == "waits"
    world.wish(old, "evict")
    assert explanation_of(world.books, 0, old).verdict == "waits"


def test_an_explanation_has_what_would_sleep_for_mapping_though_it_is_not_enough() -> None:
    world = World(200, mapped_limit=100)
    world.loaded("idle", 5, mapped=40)
    world.lease(world.loaded("busy", 5, mapped=40))
    found = explanation_of(world.books, 0, world.slot("a", 5, mapped=90))
    assert (found.verdict, found.sleep) == ("makes room", ("idle",))


def test_what_is_explained_is_what_then_happens(world: World) -> None:
    for number in range(5):
        world.loaded(f"m{number}", 20, 2, ago=10.0 - number)
    slot = world.slot("a", 50)
    found = explanation_of(world.books, 0, slot)
    world.ask(slot)
    assert [("sleep", key) for key in found.sleep] == world.doing()


def test_a_policy_is_told_of_a_slot_as_it_is_now(world: World) -> None:
    slot = world.loaded("a", 40, 5)
    seen: list[Entry] = []

    def looking(entries: Sequence[Entry], need: Need, now: float) -> list[str]:
        seen.extend(entries)
        return []

    world.books.policy = looking

    def told() -> Entry:
        world.books.plan(BYTES, 1)
        return seen[-1]

    assert told() is told(), "what is as it was is not described anew"
    slot.keep_until = 5.0
    assert told().keep_until == 5.0
    slot.use = world.history.used("a", world.now)
    assert told().use is slot.use
    slot.resize(Size(30, 5))
    assert told().bytes_awake == 30
    slot.phase = Phase.ASLEEP
    assert told().asleep


def test_bytes_are_written_in_megabytes() -> None:
    assert mb(1_250_000) == "1.2 MB"
