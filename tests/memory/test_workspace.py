"""Working memory of runs: what is learned of it by shape, and who may run when."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbtide.cancellation import CancelToken, EbbtideThread
from ebbtide.errors import OutOfBudgetError, PipelineCancelledError
from ebbtide.memory.ledger import Activity
from ebbtide.memory.needs import Needs
from ebbtide.memory.workspace import SMALL, Allowance, Graph, Workspace, guess

MB = 1_000_000

SHAPES = st.tuples(st.integers(1, 512), st.integers(1, 8192))
SEEN = st.lists(st.tuples(SHAPES, st.integers(0, 1 << 33)), min_size=1, max_size=20)


def learned(seen: list[tuple[tuple[int, int], int]]) -> Needs:
    needs = Needs()
    for (batch, length), peak in seen:
        needs.observe(batch, length, peak)
    return needs


# What a run takes


def test_of_a_graph_that_never_ran_nothing_is_known() -> None:
    assert Needs().estimate(1, 8) is None


@given(SEEN, SHAPES, st.integers(0, 64), st.integers(0, 512))
def test_more_rows_or_longer_ones_are_never_thought_to_take_less(
    seen: list[Any], shape: tuple[int, int], rows: int, longer: int
) -> None:
    needs = learned(seen)
    batch, length = shape
    less, more = needs.estimate(batch, length), needs.estimate(batch + rows, length + longer)
    assert less is not None
    assert more is not None
    assert less <= more


@given(SEEN)
def test_no_run_is_thought_to_take_less_than_a_smaller_one_took(seen: list[Any]) -> None:
    needs = learned(seen)
    for (batch, length), peak in seen:
        for more in (0, 1, 100):
            estimate = needs.estimate(batch + more, length + more)
            assert estimate is not None
            assert estimate >= peak


@given(SEEN, st.randoms(use_true_random=False), SHAPES)
def test_the_order_of_what_was_seen_makes_no_difference(
    seen: list[Any], dice: Any, shape: tuple[int, int]
) -> None:
    other = list(seen)
    dice.shuffle(other)
    assert learned(seen) == learned(other)
    assert learned(seen).estimate(*shape) == learned(other).estimate(*shape)


@given(SEEN, SHAPES)
def test_what_is_kept_as_plain_data_says_the_same(seen: list[Any], shape: tuple[int, int]) -> None:
    needs = learned(seen)
    again = Needs.of(json.loads(json.dumps(needs.as_dict())))
    assert again == needs
    assert again.estimate(*shape) == needs.estimate(*shape)


def test_entries_stay_few_whatever_is_observed() -> None:
    needs = Needs()
    for number in range(1, 3000):
        needs.observe(1 + number % 7, number, number)
    assert len(needs.as_dict()["entries"]) < 150


def test_more_tokens_are_extrapolated_by_their_ratio_and_longer_rows_by_that_as_well() -> None:
    needs = Needs()
    needs.observe(4, 100, 10 * MB)
    assert needs.estimate(8, 100) == 20 * MB
    assert needs.estimate(4, 200) == 40 * MB
    assert needs.estimate(1, 100) == 5 * MB


def test_a_shape_counts_as_covered_by_one_that_is_not_much_larger() -> None:
    needs = Needs()
    needs.observe(4, 128, MB)
    assert needs.covers(512, 128)
    assert needs.covers(160, 40)
    assert not needs.covers(2048, 128)
    assert not needs.covers(512, 512)
    assert not needs.covers(8, 8)


# Who may run


class World:
    """A workspace in a process that is made up: runs take what they are told to."""

    def __init__(self, budget: int = 100 * MB, other: int = 10 * MB) -> None:
        self.anonymous = other
        self.trims = 0
        self.after_trim = budget
        self.activity = Activity()
        self.workspace = Workspace(self.activity, lambda: self.anonymous, self.trim)
        self.allowance: Allowance | None = Allowance(budget, other)
        self.workspace.limit = lambda: self.allowance
        self.graph = Graph("model", 100_000)
        self.threads: list[threading.Thread] = []

    def trim(self) -> None:
        self.trims += 1
        self.anonymous = min(self.anonymous, self.after_trim)

    def knows(self, *shapes: tuple[int, int]) -> None:
        """What a run of 100 tokens, or of another shape, takes; a quarter is added to it."""
        for tokens, peak in shapes:
            self.workspace.needs_of("model").observe_tokens(tokens, 100, peak)

    def start(self, tokens: int, token: CancelToken | None = None, **gates: Any) -> Started:
        run = Started(self, tokens, token or CancelToken("run"), **gates)
        self.threads.append(run.thread)
        run.thread.start()
        return run


class Started:
    """A run on a thread of its own, which goes on until it is told to end."""

    def __init__(
        self, world: World, tokens: int, token: CancelToken, told: Callable[[], object] = int
    ) -> None:
        self.began = threading.Event()
        self.may_end = threading.Event()
        self.error: BaseException | None = None

        def work() -> None:
            try:
                with world.workspace.admitted(world.graph, tokens, 100, token):
                    told()
                    self.began.set()
                    self.may_end.wait(20)
            except BaseException as error:
                self.error = error

        self.thread = EbbtideThread(target=work, daemon=True)

    def end(self) -> None:
        self.may_end.set()
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    for thread in made.threads:
        thread.join(20)
        assert not thread.is_alive(), "a run waits for ever"


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do."""
    pause = threading.Event()
    for _ in range(20_000):
        if condition():
            return
        pause.wait(0.001)
    raise AssertionError("it did not happen")


def test_runs_that_fit_together_run_together(world: World) -> None:
    world.knows((100, 32 * MB))
    first, second = world.start(100), world.start(100)
    assert first.began.wait(20)
    assert second.began.wait(20)
    assert world.workspace.reserved == 80 * MB
    first.end()
    second.end()
    assert world.workspace.reserved == 0
    assert world.workspace.peak(60) == 80 * MB


def test_a_run_waits_until_another_has_ended_and_what_that_left_is_trimmed(world: World) -> None:
    world.knows((100, 48 * MB))
    first = world.start(100)
    assert first.began.wait(20)
    second = world.start(100)
    until(lambda: world.workspace.waiting == 1)
    assert not second.began.is_set()
    assert world.trims == 0
    world.anonymous, world.after_trim = 58 * MB, 10 * MB
    first.end()
    assert second.began.wait(20)
    assert world.trims == 1
    second.end()


def test_the_oldest_waiter_goes_first_though_a_smaller_run_would_fit(world: World) -> None:
    world.knows((100, 48 * MB), (1600, 60 * MB), (10, 8 * MB))
    first = world.start(100)
    assert first.began.wait(20)
    large = world.start(1600)
    until(lambda: world.workspace.waiting == 1)
    small = world.start(10)
    until(lambda: world.workspace.waiting == 2)
    assert not small.began.is_set()
    first.end()
    assert large.began.wait(20)
    small.may_end.set()
    large.end()
    small.end()
    assert small.began.is_set()


def test_a_run_that_waits_ends_when_it_is_cancelled_and_the_next_has_its_turn(
    world: World,
) -> None:
    world.knows((100, 48 * MB), (1600, 60 * MB), (10, 8 * MB))
    first = world.start(100)
    assert first.began.wait(20)
    token = CancelToken("waits")
    large = world.start(1600, token)
    until(lambda: world.workspace.waiting == 1)
    small = world.start(10)
    until(lambda: world.workspace.waiting == 2)
    token.cancel()
    large.thread.join(20)
    assert isinstance(large.error, PipelineCancelledError)
    assert small.began.wait(20)
    small.end()
    first.end()


def test_a_cancellation_takes_no_lock(world: World) -> None:
    world.knows((100, 48 * MB))
    first = world.start(100)
    assert first.began.wait(20)
    token = CancelToken("waits")
    second = world.start(100, token)
    until(lambda: world.workspace.waiting == 1)
    with world.workspace._lock:  # a signal handler may come while this thread holds it
        token.cancel()
    second.thread.join(20)
    assert isinstance(second.error, PipelineCancelledError)
    first.end()


def test_what_can_never_fit_fails_and_says_the_sum(world: World) -> None:
    world.knows((100, 80 * MB))
    run = world.start(100)
    run.thread.join(20)
    error = run.error
    assert isinstance(error, OutOfBudgetError)
    assert isinstance(error, MemoryError)
    assert (error.needed, error.available, error.budget) == (100 * MB, 90 * MB, 100 * MB)
    assert "100.0 MB" in str(error)
    assert "batch_size" in str(error)
    assert world.workspace.waiting == 0
    assert world.workspace.reserved == 0


def test_room_is_asked_for_before_a_run_fails(world: World) -> None:
    world.knows((100, 80 * MB))
    asked: list[int] = []

    def make_room(wanted: int) -> bool:
        asked.append(wanted)
        world.allowance = Allowance(100 * MB, 0)
        world.anonymous = 0
        return True

    world.workspace.make_room = make_room
    run = world.start(100)
    assert run.began.wait(20)
    assert asked == [10 * MB]
    run.end()


def test_room_that_is_made_for_ever_and_never_enough_ends(world: World) -> None:
    world.knows((100, 80 * MB))
    world.workspace.make_room = lambda wanted: True
    run = world.start(100)
    run.thread.join(20)
    assert isinstance(run.error, OutOfBudgetError)


def test_what_else_the_process_holds_makes_a_run_wait_though_the_accounts_have_room(
    world: World,
) -> None:
    world.knows((100, 24 * MB))
    first = world.start(100)
    assert first.began.wait(20)
    world.anonymous = 80 * MB
    second = world.start(100)
    until(lambda: world.workspace.waiting == 1)
    assert not second.began.is_set()
    world.anonymous = 40 * MB
    world.workspace.look_again()
    assert second.began.wait(20)
    first.end()
    second.end()


def test_a_run_that_was_seen_to_be_small_waits_for_nothing_and_is_not_counted(
    world: World,
) -> None:
    world.knows((100, 64 * MB), (4, SMALL // 2))
    first = world.start(100)
    assert first.began.wait(20)
    second = world.start(100)
    until(lambda: world.workspace.waiting == 1)
    small = world.start(4)
    assert small.began.wait(20)
    assert world.workspace.reserved == 80 * MB
    small.end()
    first.end()
    second.end()


# What is learned


def test_a_shape_that_is_not_known_runs_with_no_other_beside_it_and_is_learned(
    world: World,
) -> None:
    def grow() -> None:
        world.anonymous += 30 * MB

    new = world.start(100, told=grow)
    assert new.began.wait(20)
    other = world.start(4)
    until(lambda: world.workspace.waiting == 1)
    assert not other.began.is_set()
    assert world.trims == 1
    new.end()
    assert other.began.wait(20)
    other.end()
    estimate = world.workspace.needs_of("model").estimate(1, 100)
    assert estimate == 30 * MB


def test_what_was_measured_beside_a_load_is_made_do_with_and_not_kept(world: World) -> None:
    def grow() -> None:
        world.anonymous += 70 * MB

    window = world.activity.begin()
    call = world.activity.begin()
    run = world.start(100, told=grow)
    run.end()
    world.activity.end(window)
    world.activity.end(call)
    assert world.workspace.needs_of("model").estimate(1, 100) is None
    assert world.workspace.expected(world.graph, 100, 100)[1]
    world.anonymous = 10 * MB

    def grow_alone() -> None:
        world.anonymous += 20 * MB

    world.start(100, told=grow_alone).end()
    assert world.workspace.needs_of("model").estimate(1, 100) == 20 * MB


def test_where_no_descriptor_is_free_runs_go_on_and_nothing_is_learned(world: World) -> None:
    def fails() -> int:
        raise OSError("no descriptor is free")

    world.workspace._anonymous = fails
    run = world.start(100)
    run.end()
    assert run.error is None
    assert world.workspace.needs_of("model").estimate(1, 100) is None


def test_what_was_learned_is_known_after_the_program_has_ended_and_began_again() -> None:
    world, later = World(), World()
    world.knows((100, 30 * MB))
    later.workspace.remember(json.loads(json.dumps(world.workspace.as_dict())))
    assert later.workspace.needs_of("model") == world.workspace.needs_of("model")


def test_a_guess_that_does_not_fit_is_tried_alone_where_half_of_it_does(world: World) -> None:
    run = world.start(1200)  # guessed to take 120 MB
    run.end()
    assert run.error is None
    failing = World().start(4000)
    failing.thread.join(20)
    assert isinstance(failing.error, OutOfBudgetError)


def test_a_guess_grows_with_the_weights_and_with_what_is_given_for_each_token() -> None:
    assert guess(90 * MB, 384) > 163_000  # measured on MiniLM
    assert guess(181 * MB, 49_152) > 961_000  # on SmolLM2-135M in q4


def test_batches_are_cut_until_they_fit(world: World) -> None:
    world.knows((2048, 400 * MB), (512, 80 * MB), (256, 16 * MB))
    fitting = world.workspace.tokens_that_fit(world.graph, 100, 2048)
    assert fitting == 256
    assert world.workspace.tokens_that_fit(world.graph, 3000, 2048) == 2048
    world.workspace.limit = None
    assert world.workspace.tokens_that_fit(world.graph, 100, 2048) == 2048


def test_after_a_fork_nothing_is_reserved_and_what_was_learned_is_known(world: World) -> None:
    world.knows((100, 48 * MB))
    first = world.start(100)
    assert first.began.wait(20)
    lock = world.workspace._lock
    lock.acquire()
    world.workspace.forget()
    assert world.workspace.reserved == 0
    assert world.workspace.limit is None
    assert world.workspace.needs_of("model").estimate(1, 100) == 48 * MB
    lock.release()
    first.end()


# With real sessions


def test_calls_of_many_threads_stay_within_a_limit_and_give_what_they_give_without(
    fresh_process: Any,
) -> None:
    out = fresh_process(
        """
        import threading
        import numpy as np
        import ebbtide
        from ebbtide.memory import anonymous_bytes, reclaim
        from ebbtide.memory.workspace import Allowance, workspace

        ebbtide.settings.native_threads = 4
        texts = ["the sea " * (1 + 7 * number % 60) for number in range(40)]
        with ebbtide.pipeline("feature-extraction", MODEL, prepare=False) as pipe:
            expected = pipe(texts, pooling="mean")
            reclaim()
            other = anonymous_bytes()
            workspace.limit = lambda: Allowance(other + 40_000_000, other)
            found = [None] * 6

            def work(number):
                found[number] = pipe(texts, pooling="mean")

            threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
            for one in threads:
                one.start()
            for one in threads:
                one.join()
            for one in found:
                np.testing.assert_allclose(one, expected, atol=1e-5)
            assert workspace.reserved == 0
            assert workspace.waiting == 0
            assert workspace.as_dict(), "nothing was learned"
        print("all")
        """
    )
    assert out == "all\n"


def test_a_generation_in_steps_runs_with_a_limit(fresh_process: Any) -> None:
    out = fresh_process(
        """
        from pathlib import Path
        import ebbtide
        from ebbtide.memory import anonymous_bytes
        from ebbtide.memory.workspace import Allowance, workspace

        for name in ("gen-llama", "gen-llama-fused"):
            folder = Path(MODEL).parent / name
            with ebbtide.pipeline("text-generation", folder, prepare=False) as pipe:
                free = pipe("the sea", max_new_tokens=20)
                workspace.limit = lambda: Allowance(anonymous_bytes() + 200_000_000, 0)
                assert pipe("the sea", max_new_tokens=20) == free
                workspace.limit = None
        assert len(workspace.as_dict()) == 2
        print("all")
        """
    )
    assert out == "all\n"


def test_a_call_that_can_never_fit_fails_and_the_next_smaller_one_works(fresh_process: Any) -> None:
    out = fresh_process(
        """
        import ebbtide
        from ebbtide.memory import anonymous_bytes
        from ebbtide.memory.workspace import Allowance, workspace

        with ebbtide.pipeline("feature-extraction", MODEL, prepare=False) as pipe:
            other = anonymous_bytes()
            workspace.limit = lambda: Allowance(other + 1_000, other)
            try:
                pipe("the sea " * 200)
            except ebbtide.errors.OutOfBudgetError as error:
                assert error.needed > error.available == 1_000
            workspace.limit = lambda: Allowance(other + 100_000_000, other)
            pipe("the sea " * 200)
        print("all")
        """
    )
    assert out == "all\n"
