"""Tokens are taken one after another, rows end one by one, and guesses change only the speed."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ebbtide.cancellation import CancelToken
from ebbtide.errors import InputError, PipelineCancelledError
from ebbtide.generation.config import GenerationConfig
from ebbtide.generation.loop import Written, write
from ebbtide.generation.processors import guided, log_softmax, processors, softmax
from ebbtide.generation.steps import Ids, Scores

VOCABULARY = 12
PAD = 0
EOS = 3

Logits = Callable[[Sequence[int]], NDArray[np.float32]]


def hashed(row: Sequence[int]) -> NDArray[np.float32]:
    """Logits that depend on all tokens of a row."""
    drawn = hashlib.shake_128(bytes(row)).digest(4 * VOCABULARY)
    return (np.frombuffer(drawn, "<u4") / 2**32 * 5).astype(np.float32)


def no_end(row: Sequence[int]) -> NDArray[np.float32]:
    found = hashed(row)
    found[[PAD, EOS]] = -9
    return found


def recited(*texts: Sequence[int]) -> Logits:
    """A model that knows some texts by heart, and writes on the one that a row begins."""

    def logits(row: Sequence[int]) -> NDArray[np.float32]:
        found = np.zeros(VOCABULARY, np.float32)
        for text in texts:
            if list(text[: len(row)]) == list(row) and len(row) < len(text):
                found[text[len(row)]] = 5
        return found

    return logits


class FakeSteps:
    """A model that remembers its rows, and notes what it was asked."""

    def __init__(self, logits: Logits = hashed, seen: Sequence[Sequence[int]] = ()) -> None:
        self.logits = logits
        self.rows: list[list[int]] = [list(row) for row in seen]
        self.shown: list[list[list[int]]] = []
        self.lasts: list[bool] = []
        self.selected: list[list[int]] = []
        self.cropped: list[int] = []
        self.closed = 0

    @property
    def length(self) -> int:
        return len(self.rows[0]) if self.rows else 0

    takes_back = True

    def forward(self, ids: Ids, token: CancelToken, *, last: bool = True) -> NDArray[np.float32]:
        self.shown.append(ids.tolist())
        self.lasts.append(last)
        if not self.rows:
            self.rows = [[] for _ in ids]
        found = np.empty((*ids.shape, VOCABULARY), np.float32)
        for number, (row, new) in enumerate(zip(self.rows, ids.tolist(), strict=True)):
            for place, one in enumerate(new):
                row.append(one)
                found[number, place] = self.logits(row)
        return found[:, -1:] if last else found

    def select(self, rows: NDArray[np.int64]) -> None:
        self.selected.append(rows.tolist())
        self.rows = [list(self.rows[row]) for row in rows]

    def crop(self, length: int) -> None:
        assert 0 < length <= self.length
        self.cropped.append(length)
        self.rows = [row[:length] for row in self.rows]

    def close(self) -> None:
        self.closed += 1


class Clock:
    """Goes on by a second each time it is looked at."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def options(**given: Any) -> GenerationConfig:
    usual = {"eos_token_id": [EOS], "pad_token_id": PAD, "max_new_tokens": 8}
    return GenerationConfig.of({}, usual | given)


def written(
    prompt: Sequence[Sequence[int]],
    steps: FakeSteps | None = None,
    config: GenerationConfig | None = None,
    **given: Any,
) -> list[Written]:
    config = config or options()
    ids = np.array(prompt, np.int64)
    given.setdefault("last_length", config.last_length(ids.shape[1]))
    given.setdefault("token", CancelToken("test"))
    if "processors" not in given:
        given["processors"] = processors(config, prompt_length=ids.shape[1])
    return list(write(steps or FakeSteps(), ids, config, **given))


def tokens(found: Sequence[Written]) -> list[list[int]]:
    """What was written of each row."""
    return np.stack([one.ids for one in found], axis=1).tolist()


def by_hand(prompt: Sequence[int], new: int, logits: Logits = hashed) -> list[int]:
    row = list(prompt)
    for _ in range(new):
        row.append(int(logits(row).argmax()))
        if row[-1] == EOS:
            break
    return row[len(prompt) :]


# What comes next


@pytest.mark.parametrize("prompt", [[1, 2], [5], [7, 7, 7, 8]])
def test_greedy_takes_the_best_token_each_time(prompt: list[int]) -> None:
    steps = FakeSteps(no_end)
    assert tokens(written([prompt], steps)) == [by_hand(prompt, 8, no_end)]
    assert steps.shown[0] == [prompt]
    assert all(len(new[0]) == 1 for new in steps.shown[1:])
    assert steps.closed == 0


def test_each_row_of_a_batch_is_written_as_alone() -> None:
    prompts = [[1, 2], [4, 5], [6, 7]]
    found = tokens(written(prompts, FakeSteps(no_end)))
    assert found == [by_hand(one, 8, no_end) for one in prompts]


def test_no_forward_is_made_for_the_last_token() -> None:
    steps = FakeSteps(no_end)
    assert len(written([[1]], steps, options(max_new_tokens=3))) == 3
    assert len(steps.shown) == 3


def test_what_the_model_has_seen_already_is_not_shown_again() -> None:
    steps = FakeSteps(no_end, seen=[[1, 2, 4]])
    found = written([[1, 2, 4, 5, 6]], steps)
    assert steps.shown[0] == [[5, 6]]
    assert tokens(found) == [by_hand([1, 2, 4, 5, 6], 8, no_end)]


def test_a_long_row_outgrows_its_first_buffer() -> None:
    def cyclic(row: Sequence[int]) -> NDArray[np.float32]:
        found = np.zeros(VOCABULARY, np.float32)
        found[4 + len(row) % 7] = 1
        return found

    (row,) = tokens(written([[4]], FakeSteps(cyclic), options(max_new_tokens=1500)))
    assert row == [4 + length % 7 for length in range(1, 1501)]


# How rows end


def test_rows_end_one_by_one_and_are_filled_with_padding() -> None:
    model = recited([1, 5, EOS], [2, 5, 6, 7, EOS], [4, EOS])
    found = written([[1], [2], [4]], FakeSteps(model))
    assert tokens(found) == [[5, EOS, 0, 0], [5, 6, 7, EOS], [EOS, 0, 0, 0]]
    assert [one.reasons for one in found] == [
        ("", "", "stop"),
        ("stop", "", "stop"),
        ("stop", "", "stop"),
        ("stop", "stop", "stop"),
    ]


def test_padding_is_the_models_own_token() -> None:
    model = recited([1, EOS], [2, 5, 6, EOS])
    found = written([[1], [2]], FakeSteps(model), options(pad_token_id=9))
    assert tokens(found)[0] == [EOS, 9, 9]


def test_without_a_token_to_end_with_a_row_ends_at_its_length() -> None:
    config = options(max_new_tokens=3, eos_token_id=None)
    found = written([[1, 2]], FakeSteps(recited([1, 2, 3, 3, 3, 3])), config)
    assert tokens(found) == [[3, 3, 3]]
    assert [one.reasons for one in found] == [("",), ("",), ("length",)]


def test_each_of_several_tokens_ends_a_row() -> None:
    model = recited([1, 5, 6], [2, 7, 8])
    found = written([[1], [2]], FakeSteps(model), options(eos_token_id=[6, 7]))
    assert tokens(found) == [[5, 6], [7, PAD]]
    assert found[-1].reasons == ("stop", "stop")


def test_an_end_at_the_greatest_length_is_a_stop() -> None:
    found = written([[1]], FakeSteps(recited([1, 5, EOS])), options(max_new_tokens=2))
    assert found[-1].reasons == ("stop",)


def test_a_text_that_ends_a_row_stops_it() -> None:
    def ends_text(ids: Ids) -> NDArray[np.bool_]:
        return (ids[:, -2:] == [5, 6]).all(axis=1)

    model = recited([1, 4, 5, 6, 7], [2, 5, 7, 8, 9])
    config = options(max_new_tokens=4)
    found = written([[1], [2]], FakeSteps(model), config, ends_text=ends_text)
    assert tokens(found) == [[4, 5, 6, PAD], [5, 7, 8, 9]]
    assert found[-1].reasons == ("stop", "length")


def test_after_its_time_no_further_token_is_begun() -> None:
    found = written([[1], [2]], FakeSteps(no_end), options(max_time=3), clock=Clock())
    assert [one.reasons for one in found] == [("", ""), ("", ""), ("time", "time")]


def test_a_row_that_had_ended_keeps_its_reason_when_time_is_over() -> None:
    steps = FakeSteps(recited([1, EOS], [2, 5, 6, 7, 8]))
    found = written([[1], [2]], steps, options(max_time=2), clock=Clock())
    assert found[-1].reasons == ("stop", "time")


def test_a_criterion_of_the_callers_ends_all_rows_with_one_bool() -> None:
    config = options(stopping_criteria=[lambda ids, scores: ids.shape[1] >= 4])
    found = written([[1, 2], [4, 5]], FakeSteps(no_end), config)
    assert [one.reasons for one in found] == [("", ""), ("criterion", "criterion")]


def test_a_criterion_of_the_callers_ends_rows_one_by_one() -> None:
    seen: list[tuple[int, ...]] = []

    def criterion(ids: Ids, scores: Scores | None) -> NDArray[np.bool_]:
        assert scores is not None
        seen.append(scores.shape)
        return ids[:, -1] == 7

    model = recited([1, 7, 8, 8], [2, 5, 7, 8])
    config = options(stopping_criteria=[criterion, lambda ids, scores: False])
    found = written([[1], [2]], FakeSteps(model), config)
    assert tokens(found) == [[7, PAD], [5, 7]]
    assert found[-1].reasons == ("criterion", "criterion")
    assert seen == [(2, VOCABULARY)] * 2


@pytest.mark.parametrize("room", [0, -1])
def test_a_prompt_that_leaves_no_room_is_refused(room: int) -> None:
    steps = FakeSteps()
    with pytest.raises(InputError, match="max_new_tokens"):
        written([[1, 2, 4]], steps, last_length=3 + room)
    assert steps.shown == []


# What is done to scores


def test_the_callers_processors_come_in_their_order() -> None:
    calls: list[str] = []

    def first(ids: Ids, scores: Scores) -> Scores:
        calls.append("first")
        found = scores.copy()
        found[:, 5] = 100
        return found

    def second(ids: Ids, scores: Scores) -> Scores:
        calls.append("second")
        assert (scores[:, 5] == 100).all()
        found = scores.copy()
        found[:, 6] = scores[:, 5] + ids.shape[1]
        return found

    config = options(max_new_tokens=2, logits_processor=[first, second])
    assert tokens(written([[1]], config=config)) == [[6, 6]]
    assert calls == ["first", "second"] * 2


def test_scores_and_logits_and_logprobs_are_what_they_say() -> None:
    config = options(
        max_new_tokens=4, output_scores=True, output_logits=True, suppress_tokens=[EOS, PAD]
    )
    prompts = [[1, 2], [4, 5]]
    found = written(prompts, config=config, logprobs=True)
    rows = [list(one) for one in prompts]
    for one in found:
        logits = np.stack([hashed(row) for row in rows])
        assert np.array_equal(one.logits, logits)
        logits[:, [EOS, PAD]] = -np.inf
        assert np.array_equal(one.scores, logits)
        assert np.array_equal(one.ids, logits.argmax(axis=1))
        assert one.logprobs is not None
        assert np.allclose(one.logprobs, log_softmax(logits)[[0, 1], one.ids])
        for row, new in zip(rows, one.ids.tolist(), strict=True):
            row.append(new)


def test_what_was_not_asked_for_is_not_given() -> None:
    (one, *_) = written([[1]])
    assert (one.logprobs, one.scores, one.logits) == (None, None, None)


def test_guidance_moves_away_from_what_comes_without_the_prompt() -> None:
    prompts, scale = [[1, 2, 4], [5, 6, 7]], 2.5
    steps, without = FakeSteps(no_end), FakeSteps(no_end)
    config = options(max_new_tokens=4, guidance_scale=scale)
    found = written(prompts, steps, config, without_prompt=without)
    for row, prompt in zip(tokens(found), prompts, strict=True):
        full, bare = list(prompt), [prompt[-1]]
        for token in row:
            best = guided(no_end(full)[None], no_end(bare)[None], scale).argmax()
            assert token == best
            full.append(token)
            bare.append(token)
    assert without.shown[0] == [[4], [7]]
    assert tokens(found) != tokens(written(prompts, FakeSteps(no_end), options(max_new_tokens=4)))


def test_guidance_knows_all_rows_that_are_returned() -> None:
    without = FakeSteps(no_end)
    config = options(
        max_new_tokens=2, guidance_scale=2.0, num_return_sequences=2, do_sample=True, seed=1
    )
    written([[1, 2], [4, 5]], FakeSteps(no_end), config, without_prompt=without)
    assert without.shown[0] == [[2], [2], [5], [5]]


# Chance


def test_each_prompt_is_shown_once_for_all_its_rows() -> None:
    steps = FakeSteps(no_end)
    config = options(num_return_sequences=3, do_sample=True, seed=2, temperature=3.0)
    found = written([[1, 2], [4, 5]], steps, config)
    assert steps.shown[0] == [[1, 2], [4, 5]]
    assert steps.selected == [[0, 0, 0, 1, 1, 1]]
    rows = tokens(found)
    assert len(rows) == 6
    assert len({tuple(row) for row in rows}) > 1
    shown = [[1, 2]] * 3 + [[4, 5]] * 3
    assert steps.rows == [[*one, *row[:-1]] for one, row in zip(shown, rows, strict=True)]


def test_rows_are_repeated_where_the_model_had_seen_some_of_the_prompt() -> None:
    steps = FakeSteps(no_end, seen=[[1, 2]])
    config = options(num_return_sequences=2, do_sample=True, seed=2)
    found = written([[1, 2, 4]], steps, config)
    assert steps.selected == [[0, 0]]
    assert steps.rows == [[1, 2, 4, *row[:-1]] for row in tokens(found)]


def test_a_seed_makes_the_chance_repeatable() -> None:
    def drawn(seed: int) -> list[list[int]]:
        config = options(do_sample=True, seed=seed, temperature=2.0, max_new_tokens=12)
        return tokens(written([[1, 2], [4, 5]], FakeSteps(no_end), config))

    assert drawn(7) == drawn(7)
    assert drawn(7) != drawn(8)


def test_two_rows_of_the_same_prompt_are_drawn_apart() -> None:
    config = options(do_sample=True, seed=0, temperature=3.0, max_new_tokens=20)
    one, other = tokens(written([[1, 2], [1, 2]], FakeSteps(no_end), config))
    assert one != other


def critical(degrees: int, quantile: float) -> float:
    """A chi-squared quantile, by Wilson and Hilferty; ``quantile`` is of the normal one."""
    share = 2 / (9 * degrees)
    return degrees * (1 - share + quantile * math.sqrt(share)) ** 3


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 1.0, "top_k": 0},
        {"temperature": 0.5, "top_k": 0},
        {"temperature": 2.0, "top_k": 5},
        {"temperature": 1.5, "top_k": 0, "top_p": 0.8},
    ],
)
def test_tokens_come_as_often_as_their_probability_says(asked: dict[str, Any]) -> None:
    logits = np.linspace(-1, 1.5, VOCABULARY, dtype=np.float32)
    draws = 20_000
    config = options(do_sample=True, seed=11, max_new_tokens=1, eos_token_id=None, **asked)
    (found,) = written([[1]] * draws, FakeSteps(lambda row: logits), config)
    expected = softmax(logits[None] / np.float32(asked["temperature"]))[0].astype(float)
    if asked["top_k"]:
        expected[np.argsort(expected)[: -asked["top_k"]]] = 0
    if "top_p" in asked:
        best = np.argsort(-expected)
        behind = np.cumsum(expected[best]) - expected[best]
        expected[best[behind >= asked["top_p"]]] = 0
    expected *= draws / expected.sum()
    counts = np.bincount(found.ids, minlength=VOCABULARY)
    there = expected > 0
    assert counts[~there].sum() == 0
    distance = float(((counts[there] - expected[there]) ** 2 / expected[there]).sum())
    assert distance < critical(int(there.sum()) - 1, 3.09)  # one in a thousand


# How it is stopped


def test_a_cancelled_call_stops_before_the_next_forward() -> None:
    token, steps = CancelToken("test"), FakeSteps(no_end)
    going = write(steps, np.array([[1]]), options(), token=token, last_length=9)
    next(going)
    next(going)
    token.cancel()
    with pytest.raises(PipelineCancelledError):
        next(going)
    assert len(steps.shown) == 2


def test_a_call_that_was_cancelled_before_shows_the_model_nothing() -> None:
    token, steps = CancelToken("test"), FakeSteps()
    token.cancel()
    with pytest.raises(PipelineCancelledError):
        written([[1]], steps, token=token)
    assert steps.shown == []


def test_who_stops_asking_stops_it() -> None:
    steps = FakeSteps(no_end)
    going = write(steps, np.array([[1]]), options(), token=CancelToken("test"), last_length=9)
    assert len(list(itertools.islice(going, 3))) == 3
    going.close()  # type: ignore[attr-defined]
    assert len(steps.shown) == 3
    assert steps.closed == 0


def test_the_model_is_not_run_before_the_first_token_is_asked_for() -> None:
    steps = FakeSteps()
    write(steps, np.array([[1]]), options(), token=CancelToken("test"), last_length=9)
    assert steps.shown == []


# Guesses


class Draft:
    """Guesses by a function of the ids, and notes what was guessed."""

    def __init__(self, guess: Callable[[list[int]], list[int]]) -> None:
        self.guess = guess
        self.asked: list[int] = []

    def __call__(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        self.asked.append(len(ids))
        return np.array(self.guess(ids.tolist()), np.int64)


def right(size: int) -> Draft:
    return Draft(lambda ids: by_hand(ids, size, no_end))


def half_right(size: int) -> Draft:
    def guess(ids: list[int]) -> list[int]:
        found = by_hand(ids, size, no_end)
        return [*found[: size // 2], *(11 if one != 11 else 10 for one in found[size // 2 :])]

    return Draft(guess)


def wrong(size: int) -> Draft:
    def guess(ids: list[int]) -> list[int]:
        (best,) = by_hand(ids, 1, no_end)
        return [11 if best != 11 else 10] * size

    return Draft(guess)


@pytest.mark.parametrize("size", [0, 1, 2, 4, 30])
@pytest.mark.parametrize("make", [right, half_right, wrong])
def test_guesses_do_not_change_what_is_written(make: Callable[[int], Draft], size: int) -> None:
    config, prompt = options(max_new_tokens=17), [1, 2, 4]
    steps = FakeSteps(no_end)
    found = written([prompt], steps, config, draft=make(size))
    assert tokens(found) == [by_hand(prompt, 17, no_end)]
    assert [one.reasons for one in found] == [("",)] * 16 + [("length",)]
    assert steps.length < 3 + 17


@pytest.mark.parametrize("size", [1, 3, 8])
def test_nor_do_they_where_tokens_are_drawn(size: int) -> None:
    config = options(max_new_tokens=17, do_sample=True, seed=5, temperature=1.5)
    plain = tokens(written([[1, 2]], FakeSteps(no_end), config))
    for make in (right, half_right, wrong):
        assert tokens(written([[1, 2]], FakeSteps(no_end), config, draft=make(size))) == plain


def test_right_guesses_save_steps() -> None:
    steps = FakeSteps(no_end)
    written([[1, 2]], steps, options(max_new_tokens=16), draft=right(4))
    # The prompt gives one token, and each further step the guesses and one more.
    assert [len(new[0]) for new in steps.shown] == [2, 5, 5, 5]
    assert steps.lasts == [True, False, False, False]
    assert steps.cropped == []


def test_wrong_guesses_are_taken_back() -> None:
    steps = FakeSteps(no_end)
    written([[1, 2]], steps, options(max_new_tokens=4), draft=wrong(3))
    # Seen are the prompt and what was taken of it; never the newest token.
    assert steps.cropped == [3, 4]
    assert steps.rows == [[1, 2, *by_hand([1, 2], 3, no_end)]]


def test_half_right_guesses_are_taken_back_by_half() -> None:
    steps = FakeSteps(no_end)
    written([[1, 2]], steps, options(max_new_tokens=8), draft=half_right(4))
    # After the first token, each step gives two that were guessed, and one that was not.
    assert steps.cropped == [5, 8]


def test_no_guess_goes_beyond_the_last_length() -> None:
    for new in range(1, 9):
        steps = FakeSteps(no_end)
        written([[1, 2]], steps, options(max_new_tokens=new), draft=right(5))
        assert steps.length <= 2 + new - 1
        assert all(len(row) <= 2 + new - 1 for row in steps.rows)


def test_a_guess_of_the_end_ends_the_row_there() -> None:
    text = [1, 5, 6, EOS]
    steps = FakeSteps(recited([*text, 7, 8, 9]))
    draft = Draft(lambda ids: [6, EOS, 7, 8])
    found = written([[1]], steps, draft=draft)
    assert tokens(found) == [[5, 6, EOS]]
    assert found[-1].reasons == ("stop",)


def test_several_rows_are_written_without_guesses() -> None:
    draft = right(3)
    written([[1], [2]], FakeSteps(no_end), draft=draft)
    assert draft.asked == []


def test_processors_see_a_guess_only_where_it_was_taken() -> None:
    seen: list[list[int]] = []

    def noted(ids: Ids, scores: Scores) -> Scores:
        seen.append(ids[0].tolist())
        return scores

    config = options(max_new_tokens=9, logits_processor=[noted])
    written([[1, 2]], FakeSteps(no_end), config, draft=half_right(4))
    text = [1, 2, *by_hand([1, 2], 9, no_end)]
    assert seen == [text[:length] for length in range(2, 11)]


@settings(max_examples=150, deadline=None)
@given(
    prompt=st.lists(st.integers(4, 11), min_size=1, max_size=6),
    guesses=st.lists(st.lists(st.integers(0, 11), max_size=5), max_size=20),
    new=st.integers(1, 15),
    mix=st.lists(st.booleans(), min_size=1, max_size=5),
)
def test_whatever_is_guessed_the_text_is_the_same(
    prompt: list[int], guesses: list[list[int]], new: int, mix: list[bool]
) -> None:
    turn, honest = iter(guesses), itertools.cycle(mix)

    def guess(ids: list[int]) -> list[int]:
        made = next(turn, [])
        return [*by_hand(ids, len(made)), *made] if next(honest) else made

    found = written([prompt], config=options(max_new_tokens=new), draft=Draft(guess))
    assert tokens(found) == [by_hand(prompt, new)]
