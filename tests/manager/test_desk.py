"""What a desk decides, sentence by sentence, with hands that answer when they are told to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from tests.manager.conftest import World

from ebbtide.errors import (
    AcquireTimeoutError,
    LoadError,
    ManagerBusyError,
    ManagerClosedError,
    OutOfBudgetError,
    PipelineInUseError,
)
from ebbtide.manager import desk
from ebbtide.manager.accounts import BYTES, COUNT
from ebbtide.manager.policy import Entry, Need
from ebbtide.manager.slots import Ask, Hold, Phase, Size, Slot


def is_given(ask: Ask) -> bool:
    return ask.is_settled and ask.error is None


# A load


def test_what_fits_is_sized_up_and_loaded_and_then_given(world: World) -> None:
    slot = world.slot("a", 40, known=False)
    ask = world.ask(slot)
    assert world.doing() == [("size", "a")]
    world.done("size", slot)
    assert world.doing() == [("load", "a")]
    world.done("load", slot)
    assert is_given(ask)
    assert ask.value is slot.pipe
    assert list(slot.holds) == [ask.hold]
    assert world.kinds("a") == ["loading", "ready"]


def test_all_who_ask_at_the_same_time_get_one_load(world: World) -> None:
    slot = world.slot("a", 40, known=False)
    asks = [world.ask(slot) for _ in range(5)]
    world.done("size", slot)
    assert world.doing() == [("load", "a")]
    world.done("load", slot)
    assert all(is_given(ask) for ask in asks)
    assert set(slot.holds) == {ask.hold for ask in asks}


def test_a_preload_leaves_no_lease(world: World) -> None:
    slot = world.slot("a", 40)
    ask = world.ask(slot, preload=True)
    world.done("load", slot)
    assert is_given(ask)
    assert not slot.holds


def test_a_load_that_fails_is_told_to_each_who_waits_by_an_error_of_its_own(world: World) -> None:
    slot = world.slot("a", 40)
    asks = [world.ask(slot) for _ in range(2)]
    cause = OSError("no such file")
    error = LoadError("It is damaged.", path="model.onnx")
    error.__cause__ = cause
    world.done("load", slot, error=error)
    errors = [ask.error for ask in asks]
    assert [type(one) for one in errors] == [LoadError, LoadError]
    assert errors[0] is not errors[1]
    assert all(one is not None and one.__cause__ is cause for one in errors)
    assert slot.phase is Phase.EMPTY
    assert world.events[-1][0] == "failed"


def test_what_cannot_be_sized_up_fails_and_may_be_asked_for_again(world: World) -> None:
    slot = world.slot("a", 40, known=False)
    ask = world.ask(slot)
    world.done("size", slot, error=OSError("no network"))
    assert isinstance(ask.error, OSError)
    world.ask(slot)
    assert world.doing() == [("size", "a")]


def test_what_is_measured_counts_from_then_on(world: World) -> None:
    slot = world.slot("a", 40, peak=60)
    world.ask(slot)
    assert world.books.charged == 60, "a load is charged with its peak from its begin"
    world.now += 3.0
    world.done("load", slot, size=Size(30, is_measured=True))
    assert world.books.charged == 30
    assert slot.reload_seconds == 3.0
    assert slot.estimated == 40


def test_the_seconds_to_wake_are_measured_and_until_then_those_to_load(world: World) -> None:
    slot = world.slot("a", 40)
    slot.wake_seconds = 0.0
    ask = world.ask(slot)
    world.now += 2.0
    world.done("load", slot)
    assert slot.wake_seconds == 2.0
    world.give_back(slot, ask.hold)
    world.wish(slot, "sleep")
    world.done("sleep", slot)
    world.ask(slot)
    world.now += 0.25
    world.done("wake", slot)
    assert slot.wake_seconds == 0.25
    assert slot.reload_seconds == 2.0


# Memory runs out


def test_a_load_that_runs_out_of_memory_has_others_go_first_and_tries_once_more(
    world: World,
) -> None:
    other = world.loaded("other", 30)
    slot = world.slot("a", 40)
    ask = world.ask(slot)
    world.done("load", slot, error=MemoryError())
    assert not ask.is_settled
    assert world.doing() == [("sleep", "other")], "it waits for what is given back"
    world.done("sleep", other)
    assert world.doing() == [("load", "a")]
    world.done("load", slot, error=MemoryError())
    assert isinstance(ask.error, MemoryError)
    assert world.doing() == []
    assert [facts["retried"] for kind, _, facts in world.events if kind == "failed"] == [
        True,
        False,
    ]


def test_who_asks_anew_after_that_has_a_second_try_again(world: World) -> None:
    slot = world.slot("a", 40)
    for _ in range(2):
        ask = world.ask(slot)
        world.done("load", slot, error=MemoryError())
        world.done("load", slot, error=MemoryError())
        assert isinstance(ask.error, MemoryError)


def test_a_second_try_that_nobody_waits_for_any_more_takes_none_from_the_next(
    world: World,
) -> None:
    world.loaded("other", 30)
    slot = world.slot("a", 40)
    ask = world.ask(slot)
    world.done("load", slot, error=MemoryError())
    world.desk.withdraw(ask)
    world.done("sleep", world.books.slots["other"])
    assert world.doing() == []
    again = world.ask(slot)
    world.done("load", slot, error=MemoryError())
    assert not again.is_settled


def test_what_was_loaded_at_the_second_try_has_two_the_next_time_too(world: World) -> None:
    slot = world.slot("a", 40)
    ask = world.ask(slot)
    world.done("load", slot, error=MemoryError())
    world.wish(slot, "evict")
    world.done("load", slot)
    world.done("dispose", slot)
    world.done("load", slot, error=MemoryError())
    assert not ask.is_settled
    assert world.doing() == [("load", "a")]


def test_nothing_goes_for_a_load_that_nobody_waits_for_any_more(world: World) -> None:
    world.loaded("other", 30)
    slot = world.slot("a", 40)
    world.desk.withdraw(world.ask(slot))
    world.done("load", slot, error=MemoryError())
    assert world.doing() == []


def test_a_wake_that_runs_out_of_memory_is_tried_once_more_too(world: World) -> None:
    slot = world.loaded("a", 40, 5)
    world.wish(slot, "sleep")
    world.done("sleep", slot)
    ask = world.ask(slot)
    world.done("wake", slot, error=MemoryError())
    assert world.doing() == [("wake", "a")]
    world.done("wake", slot, error=OSError())
    assert isinstance(ask.error, OSError)
    assert slot.phase is Phase.ASLEEP


# Who goes first


def test_who_has_priority_goes_first_and_among_equals_the_eldest(world: World) -> None:
    busy = world.loaded("busy", 90)
    hold = world.lease(busy)
    order = []
    for name, priority in (("old", 0), ("young", 0), ("urgent", 5), ("later", -1)):
        ask = world.ask(world.slot(name, 80), priority=priority)
        ask.on_settled(lambda name=name: order.append(name))
    world.give_back(busy, hold)
    while world.hands.tasks:
        task = world.hands.tasks[0]
        world.finish(task)
        for slot in world.books:
            for hold in tuple(slot.holds):
                world.give_back(slot, hold)
    assert order == ["urgent", "old", "young", "later"]


def test_what_fits_overtakes_what_does_not_for_two_seconds_only(world: World) -> None:
    world.lease(world.loaded("busy", 60))
    world.ask(world.slot("large", 80))
    world.ask(world.slot("small", 10))
    assert ("load", "small") in world.doing()
    world.pass_time(1.9)
    world.ask(world.slot("second", 10))
    assert ("load", "second") in world.doing()
    world.pass_time(0.1)
    world.ask(world.slot("third", 10))
    assert ("load", "third") not in world.doing()


def test_nobody_is_overtaken_longer_because_of_a_younger_one_that_is_first(world: World) -> None:
    world.lease(world.loaded("busy", 60))
    world.ask(world.slot("old", 80))
    world.pass_time(5.0)
    world.ask(world.slot("urgent", 80), priority=1)
    world.ask(world.slot("small", 10))
    assert world.doing() == []


def test_nothing_goes_for_who_only_overtakes(world: World) -> None:
    world.lease(world.loaded("busy", 60))
    world.loaded("idle", 30)
    world.ask(world.slot("large", 90))
    world.ask(world.slot("small", 20))
    assert world.doing() == []


def test_what_is_looked_up_or_wished_gone_holds_up_nobody(world: World) -> None:
    world.ask(world.slot("unknown", 40, known=False))
    world.ask(world.slot("a", 40))
    assert world.doing() == [("size", "unknown"), ("load", "a")]


def test_who_finds_a_pipeline_ready_does_not_wait_behind_others(world: World) -> None:
    busy = world.loaded("busy", 60)
    world.lease(busy)
    world.ask(world.slot("large", 80))
    world.pass_time(desk.STARVED - 0.1)
    assert busy.enter(Hold(busy.site, 0.0, 0.0)) is busy.pipe
    assert is_given(world.ask(busy))


# What is leased all the time


def test_for_who_waits_long_what_is_leased_is_asked_back_and_sleeps_when_it_is_returned(
    world: World,
) -> None:
    busy = world.loaded("busy", 60, 5)
    lease = world.lease(busy)
    waiting = world.slot("large", 80)
    ask = world.ask(waiting)
    world.pass_time(desk.STARVED)
    assert busy.enter(Hold(busy.site, 0.0, 0.0)) is None
    late = world.ask(busy)
    assert not late.is_settled
    world.give_back(busy, lease)
    world.done("sleep", busy)
    world.done("load", waiting)
    assert is_given(ask)
    assert not late.is_settled
    world.give_back(waiting, ask.hold)
    world.done("sleep" if ("sleep", "large") in world.doing() else "dispose", waiting)
    world.done("wake", busy)
    assert is_given(late)


def test_what_is_not_returned_when_it_was_asked_back_is_lent_again(world: World) -> None:
    busy = world.loaded("busy", 60)
    lease = world.lease(busy)
    world.ask(world.slot("large", 80))
    world.pass_time(desk.STARVED)
    late = world.ask(busy)
    world.pass_time(desk.ASKING_BACK)
    assert is_given(late)
    world.pass_time(1.0)
    assert busy.enter(Hold(busy.site, 0.0, 0.0)) is busy.pipe
    assert lease in busy.holds


def test_what_was_asked_back_in_vain_is_spared_and_another_asked(world: World) -> None:
    first, second = world.loaded("first", 45, ago=9.0), world.loaded("second", 45)
    leases = [world.lease(first), world.lease(second)]
    world.ask(world.slot("large", 50))
    world.pass_time(desk.STARVED)
    asked = [one for one in (first, second) if not one.is_open]
    assert len(asked) == 1
    world.pass_time(desk.ASKING_BACK)
    assert [one for one in (first, second) if not one.is_open] == [
        one for one in (first, second) if one not in asked
    ]
    assert leases


def test_nothing_is_asked_back_for_who_need_not_wait_for_it(world: World) -> None:
    busy = world.loaded("busy", 60)
    world.lease(busy)
    world.loaded("idle", 30)
    world.ask(world.slot("small", 20))
    world.pass_time(desk.STARVED)
    assert busy.is_open


def test_what_could_not_sleep_since_somebody_calls_it_is_left_alone_for_a_while(
    world: World,
) -> None:
    called, other = world.loaded("called", 50, 5, ago=90.0), world.loaded("other", 50, 5)
    asked = world.ask(world.slot("new", 40))
    assert world.doing() == [("sleep", "called")]
    world.done("sleep", called, asleep=False)
    assert world.doing() == [("sleep", "other")]
    world.done("sleep", other)
    world.done("load", asked.slot)
    assert is_given(asked)


def test_no_more_are_loaded_at_once_than_may_be(world: World) -> None:
    world.desk.most_loads = 2
    slots = [world.slot(name, 10) for name in "abc"]
    asks = [world.ask(slot) for slot in slots]
    assert world.doing() == [("load", "a"), ("load", "b")]
    world.done("load", slots[1])
    assert world.doing() == [("load", "a"), ("load", "c")]
    assert [ask.is_settled for ask in asks] == [False, True, False]


# What goes


def test_what_is_of_least_use_sleeps_before_anything_is_evicted(world: World) -> None:
    old, new = world.loaded("old", 45, 5, ago=100.0), world.loaded("new", 45, 5, ago=1.0)
    slot = world.slot("a", 40)
    world.ask(slot)
    assert world.doing() == [("sleep", "old")]
    assert not old.is_open
    assert old.phase is Phase.FALLING_ASLEEP
    world.done("sleep", old)
    assert world.doing() == [("load", "a")]
    assert new.phase is Phase.READY


def test_what_sleeps_is_evicted_where_that_is_not_enough(world: World) -> None:
    slots = [world.loaded(name, 45, 20, ago=10.0) for name in ("b", "c")]
    for slot in slots:
        world.wish(slot, "sleep")
        world.done("sleep", slot)
    world.ask(world.slot("a", 90))
    assert world.doing() == [("dispose", "b"), ("dispose", "c")]
    for slot in slots:
        world.done("dispose", slot)
    assert world.doing() == [("load", "a")]
    assert world.kinds("b") == ["sleeping", "evicting", "disposed"]


def test_nothing_that_is_leased_or_pinned_or_that_something_goes_on_with_is_taken() -> None:
    world = World(200)
    world.lease(world.loaded("leased", 40))
    world.desk.pin(world.loaded("pinned", 40), True)
    world.ask(world.slot("loading", 40))
    ask = world.ask(world.slot("a", 100))
    assert world.doing() == [("load", "loading")]
    assert not ask.is_settled


def test_nothing_goes_where_all_that_may_go_is_not_enough(world: World) -> None:
    world.lease(world.loaded("leased", 60))
    world.loaded("idle", 30)
    world.ask(world.slot("a", 80))
    assert world.doing() == []


@pytest.mark.parametrize("asleep", [0, 60], ids=["sleep", "evict"])
def test_what_was_leased_in_the_moment_that_it_was_chosen_stays(world: World, asleep: int) -> None:
    chosen = world.loaded("chosen", 60, asleep)
    looks = []

    def leasing(entries: Sequence[Entry], need: Need, now: float) -> list[str]:
        looks.append(now)
        if len(looks) == 2:  # the first look is whether there is enough
            world.lease(chosen)
        return [entry.key for entry in entries]

    world.books.policy = leasing
    world.desk.tick = lambda: None  # type: ignore[method-assign]
    ask = world.ask(world.slot("a", 80))
    assert len(looks) >= 2
    assert world.doing() == []
    assert chosen.is_open
    assert not ask.is_settled


def test_another_goes_at_once_for_what_was_leased_in_the_moment_that_it_was_chosen(
    world: World,
) -> None:
    chosen, _ = world.loaded("chosen", 40, ago=9.0), world.loaded("other", 40)
    looks = []

    def leasing(entries: Sequence[Entry], need: Need, now: float) -> list[str]:
        looks.append(now)
        if len(looks) == 2:
            world.lease(chosen)
        return [entry.key for entry in entries]

    world.books.policy = leasing
    world.desk.tick = lambda: None  # type: ignore[method-assign]
    world.ask(world.slot("a", 60))
    assert world.doing() == [("sleep", "other")]


def test_who_waits_is_served_once_a_lease_is_returned(world: World) -> None:
    busy = world.loaded("busy", 60)
    hold = world.lease(busy)
    ask = world.ask(world.slot("a", 80))
    assert world.desk.listens
    world.give_back(busy, hold)
    assert world.doing() == [("sleep", "busy")]
    world.done("sleep", busy)
    world.done("load", ask.slot)
    assert is_given(ask)
    assert not world.desk.listens


def test_a_sleep_that_calls_kept_away_leaves_the_pipeline_open(world: World) -> None:
    slot = world.loaded("a", 40, 5)
    wish = world.wish(slot, "sleep")
    world.done("sleep", slot, asleep=False)
    assert wish.is_settled
    assert slot.phase is Phase.READY
    assert slot.is_open
    assert slot.leaving == 0
    assert "sleeping" not in world.kinds("a")


def test_what_sleeps_is_woken_for_who_asks_and_only_what_it_lacks_is_needed(world: World) -> None:
    slot = world.loaded("a", 90, 30)
    world.wish(slot, "sleep")
    world.done("sleep", slot)
    world.lease(world.loaded("b", 10))
    ask = world.ask(slot)
    assert world.doing() == [("wake", "a")]
    world.done("wake", slot)
    assert is_given(ask)
    assert world.kinds("a") == ["sleeping", "waking", "ready"]


def test_what_maps_too_much_has_others_sleep_and_waits_for_nobody() -> None:
    world = World(200, mapped_limit=100)
    old = world.loaded("old", 5, mapped=60, ago=10.0)
    world.lease(world.loaded("busy", 5, mapped=30))
    world.ask(world.slot("a", 5, mapped=40))
    assert sorted(world.doing()) == [("load", "a"), ("sleep", "old")]
    world.done("sleep", old)
    assert world.books.mapped == 70


def test_what_maps_more_than_all_others_give_back_has_them_all_sleep() -> None:
    world = World(200, mapped_limit=100)
    world.loaded("idle", 5, mapped=40)
    world.lease(world.loaded("busy", 5, mapped=40))
    world.ask(world.slot("a", 5, mapped=90))
    assert sorted(world.doing()) == [("load", "a"), ("sleep", "idle")]


def test_of_so_many_pipelines_one_goes_for_the_next() -> None:
    world = World(1000, most=2)
    old, _ = world.loaded("old", 5, ago=9.0), world.loaded("new", 5)
    world.ask(world.slot("a", 5))
    assert world.doing() == [("dispose", "old")], "one that sleeps is a pipeline still"
    world.done("dispose", old)
    assert world.doing() == [("load", "a")]


@pytest.mark.parametrize(("policy", "goes"), [("ttl", "short"), ("lru", "old"), ("lfu", "rare")])
def test_the_policy_decides_for_every_account(policy: str, goes: str) -> None:
    world = World(1000, policy=policy, most=3, devices={"cuda:0": 30})
    for name, ago, keep in (("old", 9.0, 50.0), ("short", 5.0, 20.0), ("rare", 7.0, 30.0)):
        slot = world.loaded(name, 5, devices={"cuda:0": 10}, ago=ago)
        slot.keep_until = world.now + keep
        if name != "rare":
            slot.use = slot.use.again(slot.use.at, slot.use.turn)
    for account in (COUNT, "cuda:0", BYTES):
        (step,) = world.books.plan(account, 1).steps
        assert step.key == goes


def test_each_device_is_an_account_of_its_own() -> None:
    world = World(1000, devices={"cuda:0": 100})
    first = world.loaded("first", 5, devices={"cuda:0": 60}, ago=9.0)
    world.loaded("last", 5, devices={"cuda:0": 40}, ago=1.0)
    world.loaded("other", 500, devices={"cuda:1": 60}, ago=99.0)
    world.ask(world.slot("a", 5, devices={"cuda:0": 50}))
    assert world.doing() == [("sleep", "first")], "what is on another device frees nothing there"
    world.done("sleep", first)
    assert world.doing() == [("load", "a")]


def test_what_goes_for_one_account_is_not_taken_for_the_next_again() -> None:
    world = World(100, devices={"cuda:0": 200})
    both = world.loaded("both", 60, devices={"cuda:0": 60}, ago=9.0)
    world.loaded("spare", 30, devices={"cuda:0": 60})
    world.ask(world.slot("a", 60, devices={"cuda:0": 120}))
    assert world.doing() == [("sleep", "both")]
    world.done("sleep", both)
    assert world.doing() == [("load", "a")]


def test_what_is_being_given_back_is_counted_on_and_the_rest_goes_meanwhile(world: World) -> None:
    slots = [world.loaded("gone", 40), world.loaded("idle", 30), world.loaded("busy", 20)]
    world.lease(slots[2])
    world.books.measure()
    world.wish(slots[0], "evict")
    world.ask(world.slot("a", 70))
    assert world.doing() == [("dispose", "gone"), ("sleep", "idle")]
    world.done("dispose", slots[0])
    world.done("sleep", slots[1])
    assert world.doing() == [("load", "a")]


def test_a_policy_that_fails_is_replaced_and_nobody_is_forgotten(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(entries: Sequence[Entry], need: Need, now: float) -> list[str]:
        raise ZeroDivisionError

    world.books.policy = broken
    world.loaded("old", 60)
    world.ask(world.slot("a", 80))
    assert world.doing() == [("sleep", "old")]
    assert "policy failed" in caplog.text


# Who is refused


def test_what_can_never_fit_fails_at_once_with_the_sum() -> None:
    world = World(100_000_000, base=30_000_000)
    ask = world.ask(world.slot("a", 80_000_000))
    assert isinstance(ask.error, OutOfBudgetError)
    assert "80.0 MB for it + 30.0 MB for the process without pipelines = 110.0 MB" in str(ask.error)
    assert (ask.error.needed, ask.error.available) == (80_000_000, 70_000_000)
    assert ask.error.budget == 100_000_000


def test_what_can_never_fit_does_not_wait_behind_others(world: World) -> None:
    world.lease(world.loaded("busy", 60))
    world.ask(world.slot("large", 80))
    world.pass_time(10.0)
    ask = world.ask(world.slot("never", 101))
    assert isinstance(ask.error, OutOfBudgetError)


def test_all_who_ask_for_what_can_never_fit_hear_it_each_by_an_error_of_its_own(
    world: World,
) -> None:
    slot = world.slot("never", 101, known=False)
    asks = [world.ask(slot) for _ in range(2)]
    world.done("size", slot)
    assert asks[0].error is not asks[1].error
    assert not world.desk.waiting


def test_who_is_too_late_hears_the_sum() -> None:
    world = World(100_000_000)
    world.lease(world.loaded("busy", 60_000_000))
    ask = world.ask(world.slot("a", 80_000_000), timeout=5.0)
    world.pass_time(4.9)
    assert not ask.is_settled
    assert world.desk.wakes_at <= 1005.0
    world.pass_time(0.1)
    assert isinstance(ask.error, AcquireTimeoutError)
    assert ask.error.pipeline == "a"
    assert ask.error.seconds == pytest.approx(5.0)
    assert (
        "within 5.0 s: 80.0 MB were needed, 40.0 MB were free, and 60.0 MB were in use by 1"
        in str(ask.error)
    )


def test_who_is_too_late_hears_what_it_waited_for(world: World) -> None:
    slot = world.slot("a", 40, known=False)
    ask = world.ask(slot, timeout=1.0)
    world.pass_time(1.0)
    assert "its files were being looked up or downloaded" in str(ask.error)
    world.done("size", slot)
    ask = world.ask(slot, timeout=1.0)
    world.pass_time(1.0)
    assert "it was loading" in str(ask.error)
    world.done("load", slot)
    assert slot.is_open, "the load goes on, for the next"


def test_one_more_than_may_wait_is_refused_unless_it_need_not_wait() -> None:
    world = World(100, most_waiting=2)
    ready = world.loaded("ready", 60)
    world.lease(ready)
    waiting = [world.ask(world.slot(name, 80)) for name in ("a", "b")]
    assert isinstance(world.ask(world.slot("c", 10)).error, ManagerBusyError)
    assert is_given(world.ask(ready))
    world.wish(ready, "evict")
    assert isinstance(world.ask(ready).error, ManagerBusyError), "it would have to wait"
    assert not any(ask.is_settled for ask in waiting)


def test_who_withdraws_returns_what_was_given_meanwhile(world: World) -> None:
    slot = world.loaded("a", 40)
    ask = world.ask(slot)
    assert is_given(ask)
    world.desk.withdraw(ask)
    assert not slot.holds
    world.lease(world.loaded("busy", 60))
    waiting = world.ask(world.slot("b", 80))
    world.desk.withdraw(waiting)
    assert not world.desk.waiting
    assert waiting.is_settled


def test_an_ask_that_was_answered_before_it_came_changes_nothing(world: World) -> None:
    ask = Ask(world.slot("a", 10), None, 0, world.now, math.inf)
    ask.settle(error=ManagerClosedError("closed"))
    world.desk.ask(ask)
    assert world.doing() == []
    assert not world.desk.waiting


# How long it is kept


def test_what_nobody_uses_is_kept_as_long_as_was_asked_and_then_goes(world: World) -> None:
    slot = world.slot("a", 40)
    ask = world.ask(slot, keep_alive=30.0)
    world.done("load", slot)
    world.pass_time(100.0)
    assert world.doing() == [], "while it is leased no time runs"
    world.give_back(slot, ask.hold)
    assert world.desk.wakes_at == world.now + 30.0
    world.pass_time(29.9)
    assert world.doing() == []
    world.pass_time(0.1)
    assert world.doing() == [("dispose", "a")]


def test_what_is_to_be_kept_for_no_time_goes_with_its_last_lease(world: World) -> None:
    slot = world.slot("a", 40)
    ask = world.ask(slot, keep_alive=0.0)
    world.done("load", slot)
    assert is_given(ask)
    second = world.lease(slot, keep_alive=0.0)
    world.give_back(slot, ask.hold)
    assert world.doing() == []
    world.give_back(slot, second)
    assert world.doing() == [("dispose", "a")]


def test_what_was_only_preloaded_is_kept_as_long_as_was_asked(world: World) -> None:
    slot = world.slot("a", 40)
    world.ask(slot, keep_alive=7.0, preload=True)
    world.done("load", slot)
    assert world.desk.wakes_at == world.now + 7.0
    world.pass_time(7.0)
    assert world.doing() == [("dispose", "a")]


def test_what_is_pinned_is_kept_until_it_is_unpinned(world: World) -> None:
    slot = world.loaded("a", 40)
    slot.keep_until = world.now + 5.0
    world.desk.pin(slot, True)
    world.pass_time(50.0)
    assert world.doing() == []
    assert world.desk.wakes_at == math.inf, "and nobody looks at the clock for it"
    world.posted.append(lambda: world.desk.pin(slot, False))
    world.drain()
    assert world.doing() == [("dispose", "a")]


def test_where_nobody_waits_nobody_looks_at_the_clock(world: World) -> None:
    world.loaded("a", 40)
    world.drain()
    assert world.desk.wakes_at == math.inf
    world.lease(world.books.slots["a"])
    world.ask(world.slot("b", 80))
    assert world.desk.wakes_at == world.now + 2.0, "what the process holds may change by itself"


# What is wished


@pytest.mark.parametrize("action", ["sleep", "evict"])
def test_what_is_wished_waits_for_the_leases_and_nobody_is_let_in_meanwhile(
    world: World, action: str
) -> None:
    slot = world.loaded("a", 40, 5)
    hold = world.lease(slot)
    wish = world.wish(slot, action)
    assert world.doing() == []
    assert slot.enter(Hold(slot.site, 0.0, 0.0)) is None
    ask = world.ask(slot)
    assert not ask.is_settled
    world.give_back(slot, hold)
    doing = "sleep" if action == "sleep" else "dispose"
    assert world.doing() == [(doing, "a")]
    world.done(doing, slot)
    assert wish.outcome().charged == (35 if action == "sleep" else 40)
    assert world.doing() == [("wake" if action == "sleep" else "load", "a")]
    world.finish(world.hands.tasks[0])
    assert is_given(ask)


def test_a_wish_whose_time_is_over_says_who_holds_it_and_lets_users_in_again(
    world: World,
) -> None:
    slot = world.loaded("a", 40)
    world.lease(slot)
    wish = world.wish(slot, "evict", 5.0)
    assert world.desk.wakes_at == world.now + 5.0
    ask = world.ask(slot)
    world.pass_time(5.0)
    assert isinstance(wish.error, PipelineInUseError)
    assert wish.error.sites == ("app.py:1",)
    assert is_given(ask)
    assert slot.is_open


def test_a_wish_comes_true_whose_last_lease_is_returned_at_its_last_moment(world: World) -> None:
    slot = world.loaded("a", 40)
    hold = world.lease(slot)
    wish = world.wish(slot, "evict", 5.0)
    world.now += 5.0
    world.release(slot, hold)
    world.desk.tick()
    assert not wish.is_settled
    assert world.doing() == [("dispose", "a")]


def test_what_is_not_there_need_not_go(world: World) -> None:
    slot = world.slot("a", 40, 5)
    assert world.wish(slot, "evict").is_settled
    assert world.wish(slot, "sleep").is_settled
    world.ask(slot, preload=True)
    world.done("load", slot)
    world.wish(slot, "sleep")
    world.done("sleep", slot)
    assert world.wish(slot, "sleep").is_settled
    world.wish(slot, "evict")
    assert world.doing() == [("dispose", "a")]


def test_who_wants_it_asleep_and_who_wants_it_gone_are_both_told_when_it_is_gone(
    world: World,
) -> None:
    slot = world.loaded("a", 40)
    hold = world.lease(slot)
    wishes = [world.wish(slot, "sleep"), world.wish(slot, "evict")]
    world.give_back(slot, hold)
    assert world.doing() == [("dispose", "a")]
    world.done("dispose", slot)
    assert [wish.outcome().charged for wish in wishes] == [40, 40]


def test_what_is_wished_of_a_load_happens_after_it(world: World) -> None:
    slot = world.slot("a", 40)
    ask = world.ask(slot)
    wish = world.wish(slot, "evict")
    world.done("load", slot)
    assert world.doing() == [("dispose", "a")]
    world.done("dispose", slot)
    assert wish.is_settled
    world.done("load", slot)
    assert is_given(ask)


def test_a_wish_is_granted_where_the_load_fails(world: World) -> None:
    slot = world.slot("a", 40)
    world.ask(slot)
    wish = world.wish(slot, "evict")
    world.done("load", slot, error=OSError())
    assert wish.is_settled
    assert wish.error is None


def test_a_wish_to_sleep_is_granted_where_it_sleeps_on_since_it_could_not_be_woken(
    world: World,
) -> None:
    slot = world.loaded("a", 40, 5)
    world.wish(slot, "sleep")
    world.done("sleep", slot)
    world.ask(slot)
    wish = world.wish(slot, "sleep")
    assert not wish.is_settled
    world.done("wake", slot, error=OSError())
    assert wish.is_settled
    assert wish.error is None


def test_a_lease_that_is_returned_while_the_desk_looks_is_not_missed(world: World) -> None:
    slot = world.loaded("a", 40)
    hold = world.lease(slot)

    def clock() -> float:  # the desk looks at it once it has seen who holds what
        if slot.wishes and hold in slot.holds:
            world.release(slot, hold)
        return world.now

    world.books.clock = clock
    world.wish(slot, "evict")
    assert world.doing() == [("dispose", "a")]


def test_the_timer_of_a_lease_that_is_returned_while_it_is_set_is_not_missed(world: World) -> None:
    class Later(Slot):
        look = staticmethod(lambda: None)

        @property
        def is_still(self) -> bool:
            self.look()
            return super().is_still

    slot, due = world.loaded("a", 40), world.loaded("due", 20)
    hold = world.lease(slot, keep_alive=5.0)
    due.keep_until = world.now + 1.0
    later = world.books.slots["z"] = Later("z", "task", "z", {}, ("app.py", 9))
    world.drain()
    assert world.desk.wakes_at == world.now + 1.0

    looks = []

    def look() -> None:
        if due.phase is Phase.EVICTING:
            looks.append(world.desk.wakes_at)
            if len(looks) == 2:  # the second is for the timer
                world.release(slot, hold)

    later.look = look  # type: ignore[method-assign]
    world.pass_time(1.0)
    assert world.desk.wakes_at == world.now + 5.0


def test_force_waits_for_no_lease_and_stops_a_load(world: World) -> None:
    slot = world.loaded("a", 40)
    hold = world.lease(slot)
    wish = world.wish(slot, "force")
    assert ("force", "a") in world.hands.told
    assert not slot.is_open
    world.done("dispose", slot)
    assert wish.outcome().charged == 40
    world.give_back(slot, hold)
    loading = world.slot("b", 40)
    ask = world.ask(loading)
    wish = world.wish(loading, "force")
    world.done("load", loading)
    assert wish.is_settled
    assert ask.error is not None
    assert loading.phase is Phase.EMPTY


def test_a_disposal_that_failed_is_told_to_who_wished_it(world: World) -> None:
    slot = world.loaded("a", 40)
    wish = world.wish(slot, "evict")
    world.desk.disposed(slot, None, OSError("it was stuck"))
    with pytest.raises(OSError, match="stuck"):
        wish.outcome()


def test_what_a_user_disposed_is_loaded_anew_and_its_lease_is_kept(world: World) -> None:
    slot = world.loaded("a", 40)
    hold = world.lease(slot)
    world.dispose_behind(slot)
    world.done("dispose", slot)
    assert slot.enter(Hold(slot.site, 0.0, 0.0)) is None
    ask = world.ask(slot)
    world.done("load", slot)
    assert is_given(ask)
    assert set(slot.holds) == {hold, ask.hold}


def test_who_enters_in_the_moment_that_it_is_gone_holds_nothing(world: World) -> None:
    slot = world.loaded("a", 40)
    slot.pipe = None
    assert slot.enter(Hold(slot.site, 0.0, 0.0)) is None
    assert not slot.holds


# Pressure, and room for calls


def test_under_pressure_what_maps_files_sleeps_first_one_a_time() -> None:
    world = World(1000)
    old, _ = (
        world.loaded("old", 5, mapped=50, ago=9.0),
        world.loaded("new", 5, mapped=50, ago=1.0),
    )
    world.loaded("anonymous", 500, ago=99.0)
    assert world.desk.pressed(0) == ("old",)
    assert world.doing() == [("sleep", "old")]
    assert world.desk.pressed(0) == (), "what is being given back is waited for"
    world.done("sleep", old)
    assert world.desk.pressed(0) == ("new",)


def test_under_pressure_anonymous_memory_goes_where_nothing_is_mapped() -> None:
    world = World(1000)
    world.loaded("a", 100, ago=9.0)
    world.loaded("b", 100, ago=1.0)
    assert world.desk.pressed(0) == ("a",)


def test_under_pressure_so_many_bytes_go_or_all_that_may() -> None:
    world = World(1000)
    for name in ("a", "b", "c"):
        world.loaded(name, 100, 10, ago=9.0)
    world.lease(world.books.slots["c"])
    assert sorted(world.desk.pressed(150)) == ["a", "b"]
    for name in ("a", "b"):
        world.done("sleep", world.books.slots[name])
    assert sorted(world.desk.pressed(500)) == ["a", "b"]
    assert sorted(world.doing()) == [("dispose", "a"), ("dispose", "b")]


def test_room_for_calls_is_told_when_all_is_given_back() -> None:
    world = World(1000)
    slots = [world.loaded(name, 100, ago=9.0) for name in ("a", "b")]
    made = world.make_room(150)
    assert sorted(world.doing()) == [("sleep", "a"), ("sleep", "b")]
    world.done("sleep", slots[0])
    assert not made.is_settled
    world.done("sleep", slots[1])
    assert made.value is True


def test_room_for_calls_takes_no_more_than_is_missing_beside_what_is_given_back() -> None:
    world = World(1000)
    slots = [world.loaded(name, 100, ago=ago) for name, ago in (("a", 9.0), ("b", 5.0), ("c", 1.0))]
    world.wish(slots[0], "evict")
    made = world.make_room(100)
    assert world.doing() == [("dispose", "a")]
    more = world.make_room(150)
    assert world.doing() == [("dispose", "a"), ("sleep", "b")]
    world.done("dispose", slots[0])
    world.done("sleep", slots[1])
    assert made.value is more.value is True


def test_where_nothing_may_go_no_room_is_made_for_calls(world: World) -> None:
    world.lease(world.loaded("busy", 60))
    assert world.make_room(10).value is False


# The end


def test_who_waits_when_it_is_closed_hears_so_and_who_comes_later_too(world: World) -> None:
    world.lease(world.loaded("busy", 60))
    asks = [world.ask(world.slot("a", 80)), world.ask(world.slot("b", 30))]
    world.desk.close()
    asks.append(world.ask(world.slot("c", 10)))
    assert all(isinstance(ask.error, ManagerClosedError) for ask in asks)
    assert ("stop", "b") in world.hands.told
    assert ("stop", "a") not in world.hands.told


def test_once_it_is_closed_nothing_that_is_ready_is_given_out_any_more(world: World) -> None:
    slots = [world.loaded("a", 20), world.slot("b", 20), world.loaded("c", 20, 5)]
    world.ask(slots[1])
    world.wish(slots[2], "sleep")
    world.desk.close()
    assert slots[0].enter(Hold(slots[0].site, 0.0, 0.0)) is None
    world.drain()
    world.hands.tasks[0].is_stopped = False
    world.done("load", slots[1])
    world.done("sleep", slots[2], asleep=False)
    for slot in slots:
        assert slot.phase is Phase.READY
        assert slot.enter(Hold(slot.site, 0.0, 0.0)) is None


def test_a_pipeline_that_takes_more_or_less_than_before_is_counted_anew(world: World) -> None:
    busy = world.loaded("busy", 60)
    world.lease(busy)
    ask = world.ask(world.slot("a", 80))
    world.real["busy"] = 10
    world.desk.resized(busy, Size(10, is_measured=True))
    assert world.doing() == [("load", "a")]
    world.desk.resized(ask.slot, Size(1))
    assert ask.slot.size == Size(80), "what is being loaded is not counted anew"


def test_of_those_not_used_for_the_longest_time_nothing_is_known_where_they_are_many(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "MOST_KNOWN", 3)
    for number in range(4):
        slot = world.slot(f"m{number}", 10)
        slot.use = world.history.used(slot.key, world.now + number)
    there = {"ready": world.loaded("ready", 10, ago=99.0), "pinned": world.slot("pinned", 10)}
    world.desk.pin(there["pinned"], True)
    world.ask(world.slot("asked", 100))
    assert set(world.books.slots) == {"asked", "ready", "pinned"}
    again = world.ask(slot)
    assert world.books.slots[slot.key] is slot
    assert again in world.desk.waiting


def test_should_the_desk_itself_fail_all_who_wait_are_told_each_by_an_error_of_its_own(
    world: World,
) -> None:
    asks = [world.ask(world.slot(name, 10, known=False)) for name in ("a", "b")]
    world.desk.fail_all(LoadError("It broke.", path="x"))
    assert [type(ask.error) for ask in asks] == [LoadError, LoadError]
    assert asks[0].error is not asks[1].error
    assert not world.desk.waiting


def test_in_a_forked_child_nobody_waits_and_nothing_is_there(world: World) -> None:
    busy = world.loaded("busy", 60)
    world.lease(busy)
    world.wish(busy, "evict")
    world.ask(world.slot("a", 80))
    world.desk.forget()
    for slot in world.books:
        slot.forget()
    assert not world.desk.waiting
    assert world.books.charged == world.books.leaving == 0
    assert not busy.holds
    assert busy.enter(Hold(busy.site, 0.0, 0.0)) is None
    world.hands.tasks.clear()
    world.real.clear()
    ask = world.ask(busy)
    world.done("load", busy)
    assert is_given(ask)


def test_who_waits_for_long_goes_before_a_younger_one_of_a_higher_priority(world: World) -> None:
    lease = world.lease(world.loaded("busy", 90))
    old = world.ask(world.slot("old", 80))
    world.pass_time(10.5)
    world.ask(world.slot("urgent", 80), priority=1)
    world.ask(world.slot("more urgent", 80), priority=2)
    world.give_back(world.books.slots["busy"], lease)
    world.drain()
    order = sorted(world.desk.waiting, key=lambda one: one.turn)
    assert [one.slot.key for one in order] == ["more urgent", "old", "urgent"]
    assert not old.is_settled
