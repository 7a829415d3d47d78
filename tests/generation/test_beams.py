"""Beam search finds what Transformers finds, row by row, and asks for each prompt only once.

tools/make_beams.py writes the goldens. The toy model's logits are a hash of all tokens of a row, so
that a cache in the wrong order gives other tokens.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ebbtide.cancellation import CancelToken
from ebbtide.errors import InputError, PipelineCancelledError
from ebbtide.generation.beams import BeamResult, Processor, beam_search
from ebbtide.generation.steps import Ids, Scores

GOLDENS = Path(__file__).parent.parent / "goldens" / "generation" / "beams.json"
VOCABULARY = 17
PAD = 0
EOS = 3
STOPPING = (False, True, "never")


def toy_logits(tokens: Sequence[int], vocabulary: int = VOCABULARY) -> NDArray[np.float32]:
    """The logits of the token after these; tools/make_beams.py has the same."""
    drawn = hashlib.shake_128(bytes(tokens)).digest(4 * vocabulary)
    return (np.frombuffer(drawn, "<u4") / 2**32 * 5).astype(np.float32)


def toy_scores(tokens: Sequence[int], vocabulary: int = VOCABULARY) -> NDArray[np.float64]:
    logits = toy_logits(tokens, vocabulary).astype(np.float64)
    return logits - np.log(np.exp(logits).sum())


class ToySteps:
    """A model that remembers the tokens of its rows, and notes what it was asked."""

    def __init__(
        self,
        vocabulary: int = VOCABULARY,
        logits: Callable[[Sequence[int], int], NDArray[np.float32]] = toy_logits,
    ) -> None:
        self.vocabulary = vocabulary
        self.logits = logits
        self.rows: list[list[int]] = []
        self.shown: list[tuple[int, int]] = []
        self.selected: list[list[int]] = []
        self.closed = 0

    @property
    def length(self) -> int:
        return sum(new for _, new in self.shown)

    def forward(self, ids: Ids, token: CancelToken, *, last: bool = True) -> NDArray[np.float32]:
        token.check()
        if not self.shown:
            self.rows = [[] for _ in ids]
        assert len(ids) == len(self.rows)
        for row, new in zip(self.rows, ids.tolist(), strict=True):
            row += itertools.dropwhile(lambda one: one == PAD, new) if not self.shown else new
        self.shown.append(ids.shape)
        return np.stack([self.logits(row, self.vocabulary) for row in self.rows])[:, None]

    def select(self, rows: NDArray[np.int64]) -> None:
        self.selected.append(rows.tolist())
        self.rows = [list(self.rows[row]) for row in rows]

    def crop(self, length: int) -> None:
        raise AssertionError("beam search takes nothing back")

    def close(self) -> None:
        self.closed += 1


def padded(prompts: Sequence[Sequence[int]]) -> Ids:
    width = max(map(len, prompts))
    return np.array([[PAD] * (width - len(one)) + list(one) for one in prompts], np.int64)


def search(
    prompts: Sequence[Sequence[int]], new: int, steps: ToySteps | None = None, **options: Any
) -> BeamResult:
    ids = padded(prompts)
    usual = {"eos_ids": (EOS,), "pad_id": PAD, "token": CancelToken("test"), "num_beams": 3}
    return beam_search(
        steps or ToySteps(), ids, **usual | {"max_length": ids.shape[1] + new} | options
    )


def sequences(result: BeamResult) -> list[list[int]]:
    return [row[:end].tolist() for row, end in zip(result.ids, result.lengths, strict=True)]


def no_repeats(ids: Ids, scores: Scores) -> Scores:
    for row, tokens in zip(scores, ids.tolist(), strict=True):
        row[[two for one, two in itertools.pairwise(tokens) if one == tokens[-1]]] = -np.inf
    return scores


def repetition_penalty(penalty: float) -> Processor:
    def processor(ids: Ids, scores: Scores) -> Scores:
        for row, tokens in zip(scores, ids, strict=True):
            seen = np.unique(tokens)
            row[seen] = np.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)
        return scores

    return processor


def at_least(length: int, eos_ids: Sequence[int]) -> Processor:
    def processor(ids: Ids, scores: Scores) -> Scores:
        if ids.shape[1] < length:
            scores[:, list(eos_ids)] = -np.inf
        return scores

    return processor


def stop_at(stop_id: int) -> Callable[[Ids, Scores], NDArray[np.bool_]]:
    return lambda ids, scores: ids[:, -1] == stop_id


@functools.cache
def goldens() -> dict[str, list[dict[str, Any]]]:
    loaded: dict[str, list[dict[str, Any]]] = json.loads(GOLDENS.read_text())
    return loaded


def golden_cases() -> Iterator[Any]:
    for part in ("beams", "groups"):
        for number in range(len(goldens()[part])):
            yield pytest.param(part, number, id=f"{part}-{number}")


@pytest.mark.parametrize(("part", "number"), list(golden_cases()))
def test_it_finds_what_transformers_finds(part: str, number: int) -> None:
    case = goldens()[part][number]
    asked = dict(case["options"])
    eos_ids = tuple(asked.pop("eos_token_id") or ())
    width = max(map(len, case["prompts"]))
    processors: list[Processor] = []
    if penalty := asked.pop("repetition_penalty", None):
        processors.append(repetition_penalty(penalty))
    if asked.pop("no_repeat_ngram_size", None):
        processors.append(no_repeats)
    if least := asked.pop("min_new_tokens", None):
        processors.append(at_least(width + least, eos_ids))
    if stop_id := asked.pop("stop_id", None):
        asked["should_stop"] = stop_at(stop_id)
    new = asked.pop("max_new_tokens")
    result = search(case["prompts"], new, eos_ids=eos_ids, processors=processors, **asked)
    assert sequences(result) == case["sequences"]
    assert result.scores.tolist() == pytest.approx(case["scores"], abs=1e-4)


prompts_of = st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=5)
stoppings = st.sampled_from(STOPPING)


@given(prompts_of, st.integers(1, 8), st.booleans())
def test_one_beam_takes_the_likeliest_token_each_time(
    prompt: list[int], new: int, stopping: bool
) -> None:
    greedy = list(prompt)
    while len(greedy) < len(prompt) + new and greedy[len(prompt) :][-1:] != [EOS]:
        greedy.append(int(toy_logits(greedy).argmax()))
    result = search([prompt], new, num_beams=1, early_stopping=stopping)
    assert sequences(result) == [greedy[len(prompt) :]]


def every_sequence(prompt: list[int], new: int, vocabulary: int) -> dict[tuple[int, ...], float]:
    """The sum of the token scores of every sequence there is."""
    found: dict[tuple[int, ...], float] = {}
    open_ones: dict[tuple[int, ...], float] = {(): 0.0}
    for length in range(1, new + 1):
        longer = {
            (*ids, token): total + score
            for ids, total in open_ones.items()
            for token, score in enumerate(toy_scores([*prompt, *ids], vocabulary))
        }
        ended = {ids for ids in longer if ids[-1] == EOS or length == new}
        found |= {ids: longer[ids] for ids in ended}
        open_ones = {ids: total for ids, total in longer.items() if ids not in ended}
    return found


@settings(max_examples=40, deadline=None)
@given(prompts_of, st.integers(1, 3), st.sampled_from([-0.5, 0.0, 0.7, 1.0, 2.0]))
def test_with_enough_beams_it_finds_the_best_sequences_that_there_are(
    prompt: list[int], new: int, penalty: float
) -> None:
    every = {
        ids: total / len(ids) ** penalty for ids, total in every_sequence(prompt, new, 4).items()
    }
    best = sorted(every, key=every.__getitem__, reverse=True)[:4]
    result = search(
        [prompt],
        new,
        ToySteps(4),
        num_beams=48,
        num_return_sequences=4,
        length_penalty=penalty,
        early_stopping="never",
    )
    assert [tuple(one) for one in sequences(result)] == best
    assert result.scores.tolist() == pytest.approx([every[ids] for ids in best], abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(prompts_of, min_size=2, max_size=4),
    st.integers(1, 9),
    stoppings,
    st.sampled_from([-1.0, 0.0, 1.0, 2.0]),
    st.sampled_from([1, 2]),
    st.none() | st.integers(2, VOCABULARY - 1),
)
def test_a_row_does_not_depend_on_the_rows_beside_it(
    prompts: list[list[int]],
    new: int,
    stopping: Any,
    penalty: float,
    groups: int,
    least: int | None,
) -> None:
    options = {
        "num_beams": 4,
        "num_return_sequences": 2,
        "num_beam_groups": groups,
        "diversity_penalty": 0.8,
        "early_stopping": stopping,
        "length_penalty": penalty,
        "should_stop": least and (lambda ids, scores: ids[:, -1] >= least),
    }
    together = search(prompts, new, **options)
    alone = [search([prompt], new, **options) for prompt in prompts]
    assert sequences(together) == [one for result in alone for one in sequences(result)]
    assert together.scores.tolist() == [one for result in alone for one in result.scores.tolist()]


@settings(max_examples=60, deadline=None)
@given(
    prompts_of,
    st.integers(1, 9),
    st.integers(1, 5),
    stoppings,
    st.sampled_from([-1.0, 0.0, 0.5, 1.0]),
)
def test_a_score_is_what_the_model_gives_for_the_sequence(
    prompt: list[int], new: int, beams: int, stopping: Any, penalty: float
) -> None:
    result = search(
        [prompt],
        new,
        num_beams=beams,
        num_return_sequences=beams,
        early_stopping=stopping,
        length_penalty=penalty,
    )
    for ids, score in zip(sequences(result), result.scores.tolist(), strict=True):
        total = sum(toy_scores([*prompt, *ids[:end]])[one] for end, one in enumerate(ids))
        assert score == pytest.approx(total / len(ids) ** penalty, abs=1e-4)
    assert result.scores.tolist() == sorted(result.scores.tolist(), reverse=True)


def foretold(prompt: int, table: dict[tuple[int, ...], dict[int, float]]) -> ToySteps:
    """A model with five tokens that gives these chances after these tokens; the rest share."""

    def logits(tokens: Sequence[int], vocabulary: int) -> NDArray[np.float32]:
        chances = table.get(tuple(tokens[prompt:]), {4: 0.99})
        others = (1 - sum(chances.values())) / (vocabulary - len(chances))
        return np.log([chances.get(one, others) for one in range(vocabulary)]).astype(np.float32)

    return ToySteps(5, logits)


DETOUR: dict[tuple[int, ...], dict[int, float]] = {
    (): {1: 0.5, EOS: 0.3, 2: 0.19},
    (2,): {EOS: 0.95},
    (1,): {4: 0.99},
    (1, 4): {EOS: 0.99},
}
"""After two steps two sequences have ended, and a likelier one is on its way."""


@pytest.mark.parametrize(
    ("stopping", "penalty", "found", "count"),
    [
        (True, 1.0, [[2, EOS], [EOS]], 2),
        (False, 1.0, [[1, 4, EOS], [2, EOS]], 3),
        ("never", 1.0, [[1, 4, EOS], [2, EOS]], 3),
        (True, -1.0, [[EOS], [2, EOS]], 2),
        (False, -1.0, [[EOS], [1, 4, EOS]], 3),
        ("never", -1.0, [[EOS], [1, 4, EOS]], 3),
    ],
)
def test_a_row_goes_on_until_nothing_better_is_to_be_expected(
    stopping: Any, penalty: float, found: list[list[int]], count: int
) -> None:
    steps = foretold(20, DETOUR)
    result = search(
        [[4] * 20],
        5,
        steps,
        num_beams=2,
        num_return_sequences=2,
        early_stopping=stopping,
        length_penalty=penalty,
    )
    assert sequences(result) == found
    assert len(steps.shown) == count


@pytest.mark.parametrize("groups", [1, 2])
def test_the_model_is_asked_no_more_once_every_row_is_done(groups: int) -> None:
    steps = ToySteps()
    told: list[int] = []
    search(
        [[4, 7, 1], [5]],
        40,
        steps,
        num_beams=2,
        num_beam_groups=groups,
        diversity_penalty=0.3,
        early_stopping=True,
        on_step=told.append,
    )
    assert len(steps.shown) == len(told) < 40


def test_of_equals_the_first_token_comes_first() -> None:
    def level(ids: Ids, scores: Scores) -> Scores:
        scores[:] = -np.inf
        scores[:, [15, 2, 9]] = 0
        return scores

    result = search([[4]], 1, num_return_sequences=3, processors=[level])
    assert result.ids.tolist() == [[2], [9], [15]]


def test_what_is_shorter_than_the_longest_is_padded() -> None:
    result = search([[8, 2, 11, 6], [13]], 12, num_return_sequences=3, pad_id=15)
    assert result.ids.shape == (6, result.lengths.max())
    assert len(set(result.lengths.tolist())) > 1
    for row, end in zip(result.ids, result.lengths, strict=True):
        assert (row[end:] == 15).all()
        assert EOS not in row[: end - 1]
        assert end == 12 or row[end - 1] == EOS


def test_a_prompt_is_shown_once_for_all_its_beams() -> None:
    steps = ToySteps()
    search([[4, 7, 1], [5]], 4, steps, eos_ids=())
    assert steps.shown == [(2, 3), (6, 1), (6, 1), (6, 1)]
    assert steps.selected[0] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("groups", [1, 3])
def test_nothing_is_selected_where_the_order_stays_or_nothing_follows(groups: int) -> None:
    steps = ToySteps()
    search([[4, 7, 1]], 1, steps, num_beam_groups=groups)
    assert steps.selected == []
    search([[4, 7, 1]], 12, steps := ToySteps(), num_beam_groups=groups, eos_ids=())
    assert len(steps.selected) <= 11
    assert [0, 1, 2] not in steps.selected
    search([[4, 7, 1]], 12, steps := ToySteps(), num_beams=1)
    assert steps.selected == []


@pytest.mark.parametrize("groups", [1, 3])
def test_the_model_is_left_open(groups: int) -> None:
    steps = ToySteps()
    search([[4, 7, 1]], 5, steps, num_beam_groups=groups)
    assert steps.closed == 0


@pytest.mark.parametrize("groups", [1, 3])
def test_a_cancellation_ends_it_after_the_step(groups: int) -> None:
    token = CancelToken("test")
    steps = ToySteps()
    before: list[int] = []

    def cancel_at_the_third(count: int) -> None:
        if count == 3:
            before.append(len(steps.selected))
            token.cancel()

    with pytest.raises(PipelineCancelledError):
        search(
            [[4, 7, 1]],
            12,
            steps,
            token=token,
            num_beam_groups=groups,
            eos_ids=(),
            on_step=cancel_at_the_third,
        )
    assert len(steps.shown) == 3
    assert [len(steps.selected)] == before  # no cache was reordered for nothing


def test_a_token_that_is_cancelled_already_shows_the_model_nothing() -> None:
    token = CancelToken("test")
    token.cancel()
    steps = ToySteps()
    with pytest.raises(PipelineCancelledError):
        search([[4, 7, 1]], 3, steps, token=token)
    assert steps.shown == []


@pytest.mark.parametrize("groups", [1, 3])
def test_each_step_is_told_and_may_raise(groups: int) -> None:
    told: list[int] = []
    search([[4, 7, 1]], 4, on_step=told.append, num_beam_groups=groups, eos_ids=())
    assert told == [1, 2, 3, 4]

    def full(count: int) -> None:
        raise RuntimeError("full")

    with pytest.raises(RuntimeError, match="full"):
        search([[4, 7, 1]], 4, on_step=full, num_beam_groups=groups)


def test_processors_see_every_beam_and_what_it_said() -> None:
    seen: list[tuple[Ids, tuple[int, ...]]] = []

    def look(ids: Ids, scores: Scores) -> Scores:
        seen.append((ids.copy(), scores.shape))
        assert np.exp(scores).sum(axis=1) == pytest.approx(np.ones(len(ids)), abs=1e-5)
        return scores

    search([[4, 7, 1], [5]], 3, processors=[look], eos_ids=())
    assert [shape for _, shape in seen] == [(6, VOCABULARY)] * 3
    assert [ids.shape for ids, _ in seen] == [(6, 3), (6, 4), (6, 5)]
    assert seen[0][0].tolist() == [[4, 7, 1]] * 3 + [[0, 0, 5]] * 3
    seen.clear()
    search([[4, 7, 1], [5]], 2, processors=[look], eos_ids=(), num_beam_groups=3)
    assert [ids.shape for ids, _ in seen] == [(2, 3)] * 3 + [(2, 4)] * 3


def test_a_processor_runs_on_what_those_before_it_returned() -> None:
    def only(token: int) -> Processor:
        def processor(ids: Ids, scores: Scores) -> Scores:
            kept = np.full_like(scores, -np.inf)
            kept[:, token] = 0
            return kept

        return processor

    result = search([[4]], 3, processors=[only(6), only(9)])
    assert result.ids.tolist() == [[9, 9, 9]]
    assert result.scores.tolist() == [0]


def test_where_all_but_one_token_is_forbidden_the_first_beam_has_it() -> None:
    def forced(ids: Ids, scores: Scores) -> Scores:
        if ids.shape[1] == 1:
            scores[:, [one for one in range(VOCABULARY) if one != 6]] = -np.inf
        return scores

    result = search([[4]], 6, num_return_sequences=3, processors=[forced], eos_ids=())
    assert result.ids[:, 0].tolist() == [6, 6, 6]
    assert len({tuple(one) for one in sequences(result)}) == 3
    assert (result.scores > -100).all()


def test_where_everything_is_forbidden_it_returns_nothing() -> None:
    def forbidden(ids: Ids, scores: Scores) -> Scores:
        return np.full_like(scores, -np.inf)

    result = search([[4]], 3, num_return_sequences=2, processors=[forbidden])
    assert result.lengths.tolist() == [0, 0]
    assert result.ids.shape == (2, 0)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_criterion_can_end_everything(groups: int) -> None:
    seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def late(ids: Ids, scores: Scores) -> NDArray[np.bool_]:
        seen.append((ids.shape, scores.shape))
        return np.full(len(ids), ids.shape[1] >= 5)

    result = search(
        [[4, 7, 1], [5]],
        12,
        num_beams=4,
        num_return_sequences=4,
        num_beam_groups=groups,
        diversity_penalty=0.5,
        eos_ids=(),
        should_stop=late,
    )
    assert result.lengths.tolist() == [2] * 8
    looked_at = 16 if groups == 1 else 8
    scored = (8, VOCABULARY)
    assert seen == [((looked_at, 4), scored), ((looked_at, 5), scored)]


def test_groups_end_when_a_criterion_ends_all_beams_of_a_row() -> None:
    def some(ids: Ids, scores: Scores) -> NDArray[np.bool_]:
        long = ids.shape[1] >= 5
        return np.array([long, long, long, long, True, True, False, True])

    result = search(
        [[4, 7, 1], [5]],
        6,
        num_beams=4,
        num_return_sequences=2,
        num_beam_groups=2,
        diversity_penalty=0.5,
        eos_ids=(),
        should_stop=some,
    )
    assert result.lengths.tolist() == [2, 2, 6, 6]


def test_a_sequence_that_a_criterion_ends_has_no_end_token_added_to_it() -> None:
    result = search(
        [[4, 7, 1]],
        12,
        num_beams=4,
        num_return_sequences=4,
        num_beam_groups=2,
        diversity_penalty=0.5,
        should_stop=lambda ids, scores: np.full(len(ids), ids.shape[1] >= 5),
    )
    for one in sequences(result):
        assert len(one) == 2 or one[-1] == EOS


def test_a_group_keeps_away_from_what_those_before_it_took() -> None:
    near, far = (
        search(
            [[4, 7, 1]],
            5,
            num_beams=6,
            num_beam_groups=3,
            num_return_sequences=6,
            diversity_penalty=penalty,
            eos_ids=(),
        )
        for penalty in (0.0, 100.0)
    )
    assert len({tuple(one) for one in sequences(near)}) == 2
    assert len({one[0] for one in sequences(far)}) >= 3
    first_group = {tuple(one) for one in sequences(near)}
    assert first_group < {tuple(one) for one in sequences(far)}


def drawn_pairs(count: int, **options: Any) -> list[frozenset[int]]:
    generator = np.random.default_rng(5)
    usual = {"num_beams": 2, "num_return_sequences": 2, "do_sample": True, "generator": generator}
    return [
        frozenset(search([[4]], 1, ToySteps(5), **usual, **options).ids[:, 0].tolist())
        for _ in range(count)
    ]


def test_drawn_candidates_are_drawn_by_probability_and_not_twice() -> None:
    chance = np.exp(toy_scores([4], 5))
    count = 4000
    drawn = drawn_pairs(count)
    for one, two in itertools.combinations(range(5), 2):
        expected = chance[one] * chance[two] * (1 / (1 - chance[one]) + 1 / (1 - chance[two]))
        spread = np.sqrt(count * expected * (1 - expected))
        assert abs(drawn.count(frozenset((one, two))) - count * expected) < 4 * spread + 1


def test_what_a_processor_forbids_is_not_drawn() -> None:
    def forbid(ids: Ids, scores: Scores) -> Scores:
        scores[:, 1] = -np.inf
        return scores

    assert not any(1 in pair for pair in drawn_pairs(200, processors=[forbid]))


def test_one_seed_draws_one_result_and_another_another() -> None:
    def drawn(seed: int) -> list[list[int]]:
        generator = np.random.default_rng(seed)
        return sequences(search([[4], [7]], 8, do_sample=True, generator=generator))

    assert drawn(1) == drawn(1)
    assert len({str(drawn(seed)) for seed in range(4)}) > 1


def test_drawn_sequences_have_the_scores_that_the_model_gives_them() -> None:
    result = search([[4, 7]], 8, do_sample=True, num_return_sequences=3)
    for ids, score in zip(sequences(result), result.scores.tolist(), strict=True):
        total = sum(toy_scores([4, 7, *ids[:end]])[one] for end, one in enumerate(ids))
        assert score == pytest.approx(total / len(ids), abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 0},
        {"num_return_sequences": 0},
        {"num_return_sequences": 4},
        {"num_beam_groups": 2},
        {"num_beam_groups": 0},
        {"num_beam_groups": 3, "do_sample": True},
        {"max_length": 3},
    ],
)
def test_numbers_that_do_not_fit_are_refused(options: dict[str, Any]) -> None:
    steps = ToySteps()
    with pytest.raises(InputError):
        search([[4, 7, 1]], 5, steps, **options)
    assert steps.shown == []
