"""What is to go when bytes are needed, under each policy."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbtide.errors import InputError
from ebbtide.manager import POLICIES, Entry, History, Need, Plan, Policy, Use, choose, expired
from ebbtide.manager.policy import EVERY, PRIOR, popularity


def by_size(entries: Sequence[Entry], need: Need, now: float) -> dict[str, float]:
    return {entry.key: -entry.bytes_awake for entry in entries}


def backwards(entries: Sequence[Entry], need: Need, now: float) -> list[str]:
    return [entry.key for entry in reversed(entries)]


policies = st.sampled_from([*POLICIES, by_size, backwards])
seconds = st.floats(0, 100)
uses = st.floats(0, 500)


@st.composite
def entries(draw: st.DrawFn) -> list[Entry]:
    found = []
    for number in range(draw(st.integers(0, 12))):
        awake = draw(st.integers(0, 60))
        found.append(
            Entry(
                f"m{number:02}",
                awake,
                draw(st.integers(0, awake)),
                reload_seconds=draw(seconds),
                wake_seconds=draw(seconds),
                use=Use(
                    draw(seconds),
                    draw(st.integers(0, 300)),
                    draw(st.integers(1, 5)),
                    draw(st.tuples(uses, uses, uses)),
                    draw(st.sampled_from([(0, -1, -1), (0, 32, 64), (96, 32, 64)])),
                    draw(st.integers(0, 2)),
                ),
                leased=draw(st.integers(0, 5)) == 0,
                pinned=draw(st.integers(0, 5)) == 0,
                loading=draw(st.integers(0, 5)) == 0,
                asleep=draw(st.integers(0, 3)) == 0,
                sleepable=draw(st.integers(0, 3)) > 0,
                keep_until=draw(st.one_of(seconds, st.just(math.inf))),
            )
        )
    return found


needs = st.integers(0, 300).map(Need)


def takeable(all_entries: list[Entry]) -> list[Entry]:
    return [one for one in all_entries if not (one.leased or one.pinned or one.loading)]


def sleeps(entry: Entry) -> bool:
    return entry.sleepable and not entry.asleep and entry.bytes_asleep < entry.bytes_awake


# What holds under every policy


@given(policies, entries(), needs)
def test_nothing_that_is_leased_pinned_or_loading_is_taken(
    policy: Policy, there: list[Entry], need: Need
) -> None:
    plan = choose(policy, there, need, 100.0)
    busy = {one.key for one in there} - {one.key for one in takeable(there)}
    assert not busy & {step.key for step in plan.steps}
    assert set(plan.kept) == busy


@given(policies, entries(), needs)
def test_a_plan_is_enough_where_anything_is_and_takes_nothing_where_nothing_is(
    policy: Policy, there: list[Entry], need: Need
) -> None:
    plan = choose(policy, there, need, 100.0)
    assert plan.possible == sum(one.held for one in takeable(there))
    assert plan.enough == (plan.possible >= need.bytes)
    assert plan.enough or plan.steps == ()


@given(policies, entries(), needs)
def test_what_a_plan_says_comes_free_is_what_its_entries_no_longer_hold(
    policy: Policy, there: list[Entry], need: Need
) -> None:
    held = {one.key: one for one in there}
    for step in choose(policy, there, need, 100.0).steps:
        entry = held[step.key]
        left = entry.bytes_asleep if step.action == "sleep" else 0
        assert step.bytes == entry.held - left > 0


@given(policies, entries(), needs)
def test_a_plan_without_any_one_of_its_steps_is_not_enough(
    policy: Policy, there: list[Entry], need: Need
) -> None:
    plan = choose(policy, there, need, 100.0)
    keys = [step.key for step in plan.steps]
    assert len(set(keys)) == len(keys)
    assert all(plan.freed - step.bytes < need.bytes for step in plan.steps)


@given(policies, entries(), needs)
def test_nothing_is_evicted_that_could_sleep_instead(
    policy: Policy, there: list[Entry], need: Need
) -> None:
    held = {one.key: one for one in there}
    plan = choose(policy, there, need, 100.0)
    for step in plan.steps:
        entry = held[step.key]
        if step.action == "evict" and sleeps(entry):
            assert plan.freed - entry.bytes_asleep < need.bytes


@given(policies, entries(), needs)
def test_what_sleeps_is_evicted_only_where_all_first_steps_are_not_enough(
    policy: Policy, there: list[Entry], need: Need
) -> None:
    held = {one.key: one for one in there}
    plan = choose(policy, there, need, 100.0)
    second = [key for key in plan.evict if held[key].asleep or sleeps(held[key])]
    firsts = sum(
        one.bytes_awake - (one.bytes_asleep if sleeps(one) else 0)
        for one in takeable(there)
        if not one.asleep
    )
    assert not second or firsts < need.bytes


@given(policies, entries(), needs, st.randoms(use_true_random=False))
def test_the_order_of_the_entries_does_not_matter(
    policy: Policy, there: list[Entry], need: Need, dice: random.Random
) -> None:
    shuffled = list(there)
    dice.shuffle(shuffled)
    assert choose(policy, shuffled, need, 100.0) == choose(policy, there, need, 100.0)


@given(entries(), needs, st.randoms(use_true_random=False))
def test_an_order_of_the_users_is_followed(
    there: list[Entry], need: Need, dice: random.Random
) -> None:
    order = [one.key for one in takeable(there)]
    dice.shuffle(order)
    places = {key: float(place) for place, key in enumerate(order)}
    plan = choose(lambda *_: order, there, need, 100.0)
    assert plan == choose(lambda *_: places, there, need, 100.0)
    assert [order.index(key) for key in plan.sleep] == sorted(map(order.index, plan.sleep))
    held = {one.key: one for one in there}
    awake = [held[key] for key in order if sleeps(held[key])]
    if plan.steps and not plan.evict:
        last = order.index(plan.sleep[-1])
        before = sum(one.bytes_awake for one in awake if order.index(one.key) < last)
        before -= sum(one.bytes_asleep for one in awake if order.index(one.key) < last)
        assert before < need.bytes, "something earlier in the order would have been enough"


# Each policy, by example


def model(key: str, **changes: Any) -> Entry:
    return dataclasses.replace(
        Entry(key, 100, 10, reload_seconds=1.0, wake_seconds=0.5, use=Use(50.0, turn=100)),
        **changes,
    )


def first(policy: Policy, *there: Entry) -> str:
    """The one that goes where one is enough."""
    (step,) = choose(policy, there, Need(50), 100.0).steps
    return step.key


def test_lru_takes_what_was_not_used_for_the_longest_time() -> None:
    old, new = model("old", use=Use(1.0, count=99)), model("new", use=Use(2.0))
    assert first("lru", new, old) == "old"


def test_lfu_takes_what_was_used_the_fewest_times_and_of_those_the_older() -> None:
    often, once = model("often", use=Use(1.0, count=2)), model("once", use=Use(9.0))
    assert first("lfu", often, once) == "once"
    assert first("lfu", often, once, model("unused", use=Use(8.0))) == "unused"


def test_ttl_takes_what_was_to_be_kept_the_shortest_time() -> None:
    short, long = model("short", keep_until=200.0), model("long", keep_until=300.0)
    assert first("ttl", long, short, model("ever")) == "short"
    assert first("ttl", long, short, model("over", keep_until=99.0)) == "over"


def test_cost_spares_what_takes_long_to_have_back() -> None:
    assert first("cost", model("a slow", wake_seconds=2.0), model("b quick")) == "b quick"


def test_cost_takes_the_larger_of_two_that_take_as_long() -> None:
    assert first("cost", model("a small"), model("b large", bytes_awake=1000)) == "b large"


def test_cost_spares_the_larger_of_two_that_take_as_long_a_byte() -> None:
    large = model("a large", bytes_awake=910, wake_seconds=5.0)
    assert first("cost", large, model("b small")) == "b small"


def test_cost_spares_what_is_used_often_although_another_is_newer() -> None:
    often = model("often", use=Use(40.0, turn=95, often=(9.0, 0.0, 0.0)))
    assert first("cost", often, model("newer")) == "newer"


def test_cost_takes_what_was_used_often_long_ago() -> None:
    once_often = model("once often", use=Use(1.0, turn=1, often=(9.0, 0.0, 0.0)))
    newer = model("newer", use=Use(90.0, turn=3000, often=(2.0, 0.0, 0.0)))
    assert first("cost", once_often, newer) == "once often"


def test_cost_takes_what_was_used_often_before_popularity_shifted() -> None:
    before = Use(1.0, turn=40, often=(30.0, 9.0, 20.0), starts=(0, 32, 16))
    after = Use(9.0, turn=99, often=(2.0, 2.0, 2.0), starts=(0, 32, 64), likeliest=2)
    there = [model("before", use=before), model("after", use=after)]
    assert first("cost", *there) == "before"
    sure_of_none = dataclasses.replace(after, likeliest=0)
    assert first("cost", there[0], model("after", use=sure_of_none)) == "after"


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=300))
def test_of_equals_cost_takes_the_least_popular(asked: list[str]) -> None:
    history = History()
    for second, key in enumerate(asked):
        newest = history.used(key, float(second))
    there = {key: model(key, use=history.of(key)) for key in asked}
    least = min(there.values(), key=lambda one: (popularity(one.use, newest), one.use.at))
    assert first("cost", *there.values()) == least.key


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=8), st.integers(1, 8))
def test_cost_goes_by_popularity_however_long_ago_the_uses_were(
    turns: list[int], count: int
) -> None:
    there = [
        model(f"m{n}", use=Use(0.0, turn, often=(n + 1.0, 0.0, 0.0)))
        for n, turn in enumerate(turns)
    ]
    newest = Use(0.0, max(turns))
    least = sorted(there, key=lambda one: (popularity(one.use, newest), one.key))[:count]
    plan = choose("cost", there, Need(90 * len(least)), 100.0)
    assert plan.sleep == tuple(one.key for one in least)


@pytest.mark.parametrize("asleep", [False, True])
def test_of_what_is_worth_the_same_cost_takes_what_was_used_last_the_longest_ago(
    asleep: bool,
) -> None:
    there = [model("a", use=Use(9.0), asleep=asleep), model("b", use=Use(8.0), asleep=asleep)]
    (step,) = choose("cost", there, Need(5), 100.0).steps
    assert step.key == "b"


def test_of_two_newest_uses_that_know_different_things_one_counts_in_any_order() -> None:
    start = Use(1.0, turn=100, often=(9.0, 1.0, 0.0), starts=(0, 32, -1))
    shift = Use(1.0, turn=100, often=(1.0, 9.0, 0.0), starts=(0, 32, -1), likeliest=1)
    there = [model("a", use=start), model("b", use=shift)]
    assert first("cost", *there) == first("cost", *reversed(there)) == "a"


def test_cost_goes_by_the_time_to_load_where_something_cannot_sleep() -> None:
    evicted = model("evicted", sleepable=False, reload_seconds=0.1)
    assert first("cost", model("sleeps"), evicted) == "evicted"


@given(entries())
def test_an_entry_tells_what_its_first_step_would_be(there: list[Entry]) -> None:
    for entry in takeable(there):
        assert entry.sleeps == sleeps(entry)
        assert entry.frees == entry.held - (entry.bytes_asleep if entry.sleeps else 0)


@pytest.mark.parametrize("policy", POLICIES)
def test_equals_go_by_name(policy: str) -> None:
    assert first(policy, model("b"), model("a"), model("c")) == "a"


@pytest.mark.parametrize("policy", POLICIES)
def test_a_small_one_is_spared_that_a_later_large_one_makes_needless(policy: str) -> None:
    small = model("small", bytes_awake=30, use=Use(1.0), wake_seconds=0.0, keep_until=1.0)
    large = model("large", use=Use(2.0, count=3), keep_until=2.0)
    assert choose(policy, [small, large], Need(80), 100.0).sleep == ("large",)


def test_what_sleeps_is_spared_too_where_a_later_one_makes_it_needless() -> None:
    small = model("small", asleep=True, use=Use(1.0))
    large = model("large", asleep=True, bytes_asleep=50, use=Use(2.0))
    assert choose("lru", [small, large], Need(50), 100.0).evict == ("large",)


def test_what_is_left_out_by_the_users_policy_is_kept() -> None:
    plan = choose(lambda *_: ["b"], [model("a"), model("b")], Need(150), 100.0)
    assert not plan.enough
    assert plan.possible == 100


def test_the_users_policy_gets_what_may_be_taken_by_name_with_the_need_and_the_time() -> None:
    seen: list[object] = []

    def mine(entries: Sequence[Entry], need: Need, now: float) -> list[str]:
        seen.append(([one.key for one in entries], need.bytes, now))
        return []

    choose(mine, [model("b"), model("a"), model("c", leased=True)], Need(5), 7.0)
    assert seen == [(["a", "b"], 5, 7.0)]


# Plans


def test_sleeping_is_enough_first_and_then_what_sleeps_is_evicted() -> None:
    there = [model("a", use=Use(1.0)), model("b", use=Use(2.0))]
    assert choose("lru", there, Need(180), 100.0).sleep == ("a", "b")
    more = choose("lru", there, Need(185), 100.0)
    assert (more.evict, more.sleep, more.freed) == (("a",), ("b",), 190)


def test_what_sleeps_already_goes_last() -> None:
    there = [model("asleep", asleep=True, use=Use(0.0)), model("awake")]
    assert choose("lru", there, Need(10), 100.0).sleep == ("awake",)
    plan = choose("lru", there, Need(95), 100.0)
    assert (plan.sleep, plan.evict) == (("awake",), ("asleep",))


def test_no_need_takes_nothing() -> None:
    plan = choose("cost", [model("a")], Need(0), 100.0)
    assert plan.enough
    assert plan.steps == ()
    assert choose("cost", [], Need(0), 100.0) == Plan((), 0, 0, {})


def test_a_plan_tells_why_in_words() -> None:
    there = [model("a", bytes_awake=5_000_000, use=Use(88.0, turn=3, count=4))]
    plan = choose("cost", there, Need(1_000_000), 100.0)
    assert str(plan) == (
        "5.0 MB come free, 1.0 MB are needed\n"
        "sleep a: frees 5.0 MB, back in 0.50 s; used 4 times, last 12 s ago (cost)"
    )
    (step,) = choose("ttl", [model("a", keep_until=90.0)], Need(95), 100.0).steps
    assert step.reason == "frees 0.0 MB, back in 1.00 s; its time ended 10 s ago (ttl)"


def test_a_plan_that_is_not_enough_tells_what_is_in_the_way() -> None:
    there = [model("a"), model("b", leased=True), model("c", pinned=True)]
    plan = choose("cost", there, Need(2_000_000), 100.0)
    assert str(plan) == (
        "2.0 MB are needed, and at most 0.0 MB can come free: b is leased, c is pinned"
    )


def test_what_is_past_its_time_is_told_but_not_what_is_held() -> None:
    there = [
        model("held", keep_until=1.0, leased=True),
        model("later", keep_until=10.0),
        model("b", keep_until=5.0),
        model("a", keep_until=7.0),
    ]
    assert expired(there, 7.0) == ("b", "a")


# Uses


def test_a_burst_of_one_model_is_one_turn_and_ages_no_other() -> None:
    history = History()
    history.used("other", 0.0)
    for second in range(100):
        burst = history.used("burst", float(second))
    assert (history.turn, burst.turn, burst.count) == (2, 2, 100)
    assert popularity(burst, burst) == PRIOR + 1
    other = history.of("other")
    assert other is not None
    assert popularity(other, burst) == pytest.approx(PRIOR + 1, abs=0.01)


def asked(history: History, models: str, turns: int, seed: int = 1) -> Use:
    """The newest use, after so many: the first model is the most popular by far."""
    dice = random.Random(seed)
    weights = [1 / (place + 1) for place in range(len(models))]
    for second in range(turns):
        use = history.used(dice.choices(models, weights)[0], float(second))
    return use


def since(use: Use) -> int:
    return use.starts[use.likeliest]


def test_a_shift_of_popularity_is_noticed_and_what_was_popular_before_weighs_nothing() -> None:
    history = History()
    assert since(asked(history, "abcdefghijkl", 600)) == 0
    shifted = history.turn
    newest = asked(history, "lkjihgfedcba", 400)
    assert abs(since(newest) - shifted) <= 2 * EVERY
    once_popular, popular = history.of("a"), history.of("l")
    assert once_popular is not None
    assert popular is not None
    assert popularity(once_popular, newest) < popularity(popular, newest) / 3


def test_no_shift_is_seen_where_popularity_stays() -> None:
    assert {since(asked(History(), "abcdefghijkl", 2000, seed)) for seed in range(5)} == {0}


def test_after_many_models_and_turns_the_likeliest_is_still_known() -> None:
    history = History()
    for second in range(20_000):
        use = history.used(f"model {second % 5000}", float(second))
    for second in range(600):
        use = history.used(f"model {second % 3}", float(second))
    assert since(use) > 20_000 - 2 * EVERY
    popular = history.of("model 0")
    assert popular is not None
    assert popularity(popular, use) > 100


def test_what_is_known_outlives_a_model_until_it_is_forgotten() -> None:
    history = History()
    use = history.used("a", 1.0)
    assert history.of("a") is use
    history.forget("a")
    history.forget("never")
    assert history.of("a") is None
    assert history.used("a", 2.0).count == 1


@given(st.floats(1, 1000), st.integers(0, 10_000), st.integers(1, 10_000))
def test_popularity_falls_with_silence_but_never_to_nothing(
    times: float, age: int, more: int
) -> None:
    use = Use(0.0, often=(times, 0.0, 0.0))
    sooner, later = (popularity(use, Use(0.0, turn=turn)) for turn in (age, age + more))
    assert sooner > later > 0


@pytest.mark.parametrize("scanned_before", [False, True])
def test_a_scan_over_all_models_leaves_the_popular_ones(scanned_before: bool) -> None:
    history = History()
    for begun in (0.0, 400.0) if scanned_before else (0.0,):
        for second in range(300):
            history.used(f"popular {second % 3}", begun + second)
        for second in range(60):
            history.used(f"scanned {second}", begun + 300.0 + second)
    keys = [*(f"popular {n}" for n in range(3)), *(f"scanned {n}" for n in range(60))]
    there = [model(key, use=history.of(key)) for key in keys]
    plan = choose("cost", there, Need(60 * 90), 800.0)
    assert all(key.startswith("scanned") for key in plan.sleep)
    assert "popular 0" in choose("lru", there, Need(60 * 90), 800.0).sleep


# What cannot be used


def test_an_unknown_policy_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"Unknown policy 'lur'\. Did you mean 'lru'") as caught:
        choose("lur", [], Need(0), 0.0)
    assert caught.value.nearest == "lru"


def test_two_entries_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match="'a' is twice among the entries"):
        choose("lru", [model("a"), model("b"), model("a")], Need(1), 0.0)


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        (["modle"], "gave 'modle', which is not a key"),
        ({"modle": 1.0}, "gave 'modle', which is not a key"),
        (["model", "model"], "'model' is twice among the keys that the policy gave"),
        ({"model": math.nan}, "gave 'model' the score nan"),
        ({"model": "high"}, "gave 'model' the score 'high'"),
        (None, "The policy gave NoneType"),
        ("model", "The policy gave str"),
        ([["model"]], "The policy gave list"),
        (7, "The policy gave int"),
    ],
)
def test_a_policy_that_gives_no_order_is_told_so(given: Any, wrong: str) -> None:
    mine: Callable[..., Any] = lambda *_: given  # noqa: E731
    with pytest.raises(InputError, match=wrong) as caught:
        choose(mine, [model("model")], Need(1), 0.0)
    assert "modle" not in wrong or caught.value.nearest == "model"


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"bytes_awake": -1}, "-1 awake"),
        ({"bytes_asleep": -1}, "-1 bytes asleep"),
        ({"bytes_asleep": 101}, "no more asleep than awake"),
        ({"bytes_awake": math.nan}, "nan awake"),
        ({"reload_seconds": -1.0}, "takes -1.0 s to load"),
        ({"wake_seconds": math.inf}, "inf s to wake"),
        ({"keep_until": math.nan}, "keep_until of 'a' is not a number"),
    ],
)
def test_an_entry_of_impossible_figures_is_refused(changes: Any, wrong: str) -> None:
    with pytest.raises(InputError, match=wrong):
        model("a", **changes)


@pytest.mark.parametrize("count", [-1, math.nan, math.inf])
def test_a_need_that_is_no_count_is_refused(count: Any) -> None:
    with pytest.raises(InputError, match=f"A need of {count} bytes"):
        Need(count)
