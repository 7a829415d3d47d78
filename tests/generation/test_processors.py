"""Scores come out as they do with `transformers`, and chance falls as the scores say."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ebbtide.errors import InputError
from ebbtide.generation import processors as room
from ebbtide.generation.config import GenerationConfig
from ebbtide.generation.processors import guided, log_softmax, processors, sample, softmax
from ebbtide.generation.steps import Ids, Scores

GOLDENS = Path(__file__).parent.parent / "goldens" / "generation"
RECORD = json.loads((GOLDENS / "processors.json").read_text(encoding="utf-8"))
with np.load(GOLDENS / "processors.npz") as _file:
    ARRAYS = dict(_file)
CASES: list[dict[str, Any]] = RECORD["cases"]
KINDS = sorted({case["processor"] for case in CASES})

scores_of = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=30),
    elements=st.sampled_from([-np.inf, -7.5, -1.0, -0.5, 0.0, 0.25, 0.5, 3.0, 20.0])
    | st.floats(-30, 30, width=32),
)


def given_options(case: dict[str, Any]) -> dict[str, Any]:
    """A case's options, with arrays for their names."""
    options = {}
    for name, value in case["options"].items():
        is_array = isinstance(value, str) and value.startswith("@")
        options[name] = ARRAYS[value[1:]] if is_array else value
    if "biases" in options:
        options["biases"] = [(tuple(run), bias) for run, bias in options["biases"]]
    return options


def assert_same(found: Scores, expected: Scores, what: object, *, equals: bool = False) -> None:
    """Compare scores; with equals, never mind which of equal tokens a cut through them has left."""
    assert found.dtype == np.float32, what
    if equals:
        found, expected = np.sort(found, axis=1), np.sort(expected, axis=1)
    assert np.array_equal(np.isneginf(found), np.isneginf(expected)), what
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5, err_msg=str(what))


def has_equals(scores: Scores) -> bool:
    return any(len(set(row.tolist())) < len(row) for row in scores)


@pytest.mark.parametrize("first_sorted", [2, 1024])
@pytest.mark.parametrize("kind", KINDS)
def test_a_processor_gives_the_scores_that_transformers_gives_and_leaves_its_input(
    kind: str, first_sorted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "FIRST_SORTED", first_sorted)
    for number, case in enumerate(case for case in CASES if case["processor"] == kind):
        ids, scores = ARRAYS[case["ids"]], ARRAYS[case["scores"]]
        before = scores.copy()
        options = given_options(case)
        if kind == "guided":
            found = guided(scores, options["unconditional"], options["scale"])
        else:
            found = getattr(room, kind)(ids, scores, **options)
        equals = kind in {"top_p", "min_p", "typical_p"} and has_equals(scores)
        assert_same(found, ARRAYS[case["expected"]], (number, case["options"]), equals=equals)
        assert np.array_equal(scores, before, equal_nan=True)


@pytest.mark.parametrize("chain", RECORD["chains"], ids=lambda chain: str(chain["options"])[:60])
def test_all_processors_of_options_together_give_what_transformers_gives(
    chain: dict[str, Any],
) -> None:
    config = GenerationConfig.of({}, chain["options"])
    prompt = chain["prompt_length"]
    assert config.last_length(prompt) == chain["longest"]
    scores = ARRAYS[chain["scores"]]
    for process in processors(
        config, prompt_length=prompt, encoder_ids=ARRAYS[chain["encoder_ids"]]
    ):
        scores = process(ARRAYS[chain["ids"]], scores)
    equals = config.do_sample and has_equals(ARRAYS[chain["scores"]])
    assert_same(scores, ARRAYS[chain["expected"]], chain["options"], equals=equals)


def names(config: GenerationConfig, prompt_length: int = 3) -> list[str]:
    """The names of a configuration's processors."""
    found = processors(config, prompt_length=prompt_length, encoder_ids=np.ones((1, 3), np.int64))
    return [one.func.__name__ if isinstance(one, partial) else one.__name__ for one in found]  # type: ignore[attr-defined]


def test_taking_the_best_token_needs_no_processor() -> None:
    assert names(GenerationConfig()) == []
    assert (
        names(GenerationConfig.of({"eos_token_id": 3, "temperature": 0.6, "top_p": 0.9}, {})) == []
    )


def test_the_processors_stand_in_the_order_of_transformers() -> None:
    config = GenerationConfig(
        sequence_bias=(((1,), 1.0),),
        encoder_repetition_penalty=2.0,
        repetition_penalty=2.0,
        no_repeat_ngram_size=2,
        encoder_no_repeat_ngram_size=2,
        bad_words_ids=((2,),),
        eos_token_id=(3,),
        min_new_tokens=2,
        prefix_allowed_tokens_fn=lambda number, ids: [1],
        forced_bos_token_id=1,
        forced_eos_token_id=(3,),
        remove_invalid_values=True,
        exponential_decay_length_penalty=(1, 1.5),
        suppress_tokens=(1,),
        begin_suppress_tokens=(2,),
        logits_processor=(lambda ids, scores: scores,),
        do_sample=True,
        temperature=0.5,
        top_p=0.5,
        min_p=0.5,
        typical_p=0.5,
        epsilon_cutoff=0.5,
        eta_cutoff=0.5,
        renormalize_logits=True,
    )
    assert names(config) == [
        "sequence_bias",
        "encoder_repetition_penalty",
        "repetition_penalty",
        "no_repeat_ngram",
        "encoder_no_repeat_ngram",
        "sequence_bias",
        "min_length",
        "prefix_allowed",
        "forced",
        "forced",
        "finite",
        "exponential_decay",
        "suppressed",
        "suppressed",
        "of_caller",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "typical_p",
        "epsilon_cutoff",
        "eta_cutoff",
        "normalised",
    ]


@pytest.mark.parametrize("option", ["encoder_repetition_penalty", "encoder_no_repeat_ngram_size"])
def test_an_option_about_the_input_is_refused_where_there_is_none(option: str) -> None:
    with pytest.raises(InputError, match=option):
        processors(GenerationConfig.of({}, {option: 2}), prompt_length=1)


# What stays and what goes


@given(scores_of, st.integers(1, 40))
def test_top_k_keeps_the_best_and_their_equals(scores: Scores, count: int) -> None:
    found = room.top_k(np.zeros((len(scores), 1), np.int64), scores, count=count)
    for before, after in zip(scores, found, strict=True):
        least = np.sort(before)[::-1][min(count, len(before)) - 1]
        assert np.array_equal(after, np.where(before >= least, before, -np.inf))


@given(scores_of, st.floats(0, 1, exclude_max=True), st.integers(1, 4), st.integers(1, 6))
def test_top_p_keeps_the_fewest_best_tokens_with_its_share(
    scores: Scores, share: float, keep: int, first_sorted: int
) -> None:
    assume((scores > -np.inf).any(axis=1).all())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "FIRST_SORTED", first_sorted)
        found = room.top_p(np.zeros((len(scores), 1), np.int64), scores, share=share, keep=keep)
    for before, after, chances in zip(scores, found, softmax(scores).astype(float), strict=True):
        kept = after > -np.inf
        assert np.array_equal(after[kept], before[kept])
        possible = int((before > -np.inf).sum())
        assert kept.sum() >= min(keep, possible)
        assert chances[kept].sum() >= share - 1e-5
        if kept.sum() > keep:
            assert chances[kept].sum() - chances[kept].min() < share + 1e-5
        if not kept.all():
            assert before[kept].min() >= before[~kept].max()


@given(scores_of)
def test_of_equal_tokens_top_p_leaves_the_one_that_would_be_taken_for_the_best(
    scores: Scores,
) -> None:
    assume((scores > -np.inf).any(axis=1).all())
    found = room.top_p(np.zeros((len(scores), 1), np.int64), scores, share=0.0)
    assert np.array_equal((found > -np.inf).argmax(axis=1), scores.argmax(axis=1))
    assert ((found > -np.inf).sum(axis=1) == 1).all()


@given(scores_of, st.integers(1, 3), st.sampled_from(["min_p", "typical_p", "epsilon", "eta"]))
def test_every_cut_leaves_some_tokens_and_changes_no_score_of_them(
    scores: Scores, keep: int, kind: str
) -> None:
    assume((scores > -np.inf).any(axis=1).all())
    ids = np.zeros((len(scores), 1), np.int64)
    cut: dict[str, Callable[..., Scores]] = {
        "min_p": partial(room.min_p, share=1.0),
        "typical_p": partial(room.typical_p, share=0.01),
        "epsilon": partial(room.epsilon_cutoff, least=0.99),
        "eta": partial(room.eta_cutoff, least=0.99),
    }
    found = cut[kind](ids, scores, keep=keep)
    for before, after in zip(scores, found, strict=True):
        kept = after > -np.inf
        assert np.array_equal(after[kept], before[kept])
        assert kept.sum() >= min(keep, (before > -np.inf).sum())


@given(st.data(), st.integers(1, 4), st.integers(1, 12))
def test_no_run_of_tokens_comes_twice_and_no_other_token_is_forbidden(
    data: st.DataObject, size: int, length: int
) -> None:
    row = data.draw(st.lists(st.integers(0, 3), min_size=length, max_size=length))
    found = room.no_repeat_ngram(np.array([row]), np.zeros((1, 4), np.float32), size=size)
    runs = [tuple(row[start : start + size]) for start in range(length - size + 1)]
    for token in range(4):
        new = tuple([*row, token][-size:])
        assert (found[0, token] == -np.inf) == (new in runs)


@given(hnp.arrays(np.int64, (3, 5), elements=st.integers(0, 7)), st.floats(0.25, 4))
def test_a_penalty_touches_the_tokens_of_its_row_and_no_others(ids: Ids, penalty: float) -> None:
    scores = np.linspace(-2, 2, 24, dtype=np.float32).reshape(3, 8)
    found = room.repetition_penalty(ids, scores, penalty=penalty)
    for row in range(3):
        for token in range(8):
            factor = penalty if scores[row, token] < 0 else 1 / penalty
            expected = scores[row, token] * (factor if token in ids[row] else 1)
            assert found[row, token] == pytest.approx(expected, rel=1e-5)


def test_each_beam_is_held_to_what_its_own_input_says() -> None:
    read = np.array([[1, 1], [2, 2]])
    scores = np.ones((4, 4), np.float32)
    ids = np.zeros((4, 1), np.int64)
    found = room.encoder_repetition_penalty(ids, scores, penalty=2.0, encoder_ids=read)
    assert found.tolist() == [[1, 2, 1, 1]] * 2 + [[1, 1, 2, 1]] * 2
    found = room.encoder_no_repeat_ngram(ids, scores, size=1, encoder_ids=read)
    assert np.isneginf(found).argmax(axis=1).tolist() == [1, 1, 2, 2]


def test_the_function_of_a_prefix_gets_the_number_of_the_input_and_a_copy_of_the_row() -> None:
    asked = []

    def allowed(number: int, row: Any) -> list[int]:
        asked.append((number, row.tolist()))
        row[:] = 0
        return [number + 1]

    ids = np.arange(8).reshape(4, 2)
    found = room.prefix_allowed(ids, np.ones((4, 3), np.float32), function=allowed, num_beams=2)
    assert asked == [(0, [0, 1]), (0, [2, 3]), (1, [4, 5]), (1, [6, 7])]
    assert found.argmax(axis=1).tolist() == [1, 1, 2, 2]
    assert np.isneginf(found).sum() == 8
    assert ids.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_search_by_groups_asks_about_the_beams_of_one_group() -> None:
    config = GenerationConfig.of(
        {},
        {
            "num_beams": 4,
            "num_beam_groups": 2,
            "diversity_penalty": 1.0,
            "prefix_allowed_tokens_fn": lambda number, ids: [number],
        },
    )
    (process,) = processors(config, prompt_length=1)
    found = process(np.zeros((4, 1), np.int64), np.ones((4, 3), np.float32))
    assert found.argmax(axis=1).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("returned", [[], [1.5], [3], [-1], ["a"]])
def test_a_prefix_that_allows_no_token_of_the_model_is_refused(returned: list[Any]) -> None:
    with pytest.raises(InputError, match="prefix_allowed_tokens_fn"):
        room.prefix_allowed(
            np.zeros((1, 1), np.int64), np.ones((1, 3), np.float32), function=lambda *_: returned
        )


@pytest.mark.parametrize(
    "process",
    [
        partial(room.sequence_bias, biases=[((1, 3), 1.0)]),
        partial(room.forced, tokens=(3,), length=1),
    ],
)
def test_a_token_that_the_model_does_not_have_is_refused(
    process: Callable[[Ids, Scores], Scores],
) -> None:
    with pytest.raises(InputError, match="names the token 3") as caught:
        process(np.zeros((1, 1), np.int64), np.ones((1, 3), np.float32))
    assert caught.value.value == 3


def test_a_callers_processor_gets_copies_and_comes_before_the_draw() -> None:
    def spoil(ids: Ids, scores: Scores) -> Any:
        ids[:] = 9
        scores[:] = 4
        return scores.astype(np.float64)

    config = GenerationConfig.of({}, {"logits_processor": spoil, "temperature": 0.5})
    ids, scores = np.zeros((1, 1), np.int64), np.ones((1, 3), np.float32)
    found = scores
    for process in processors(config, prompt_length=1):
        found = process(ids, found)
    assert found.tolist() == [[8, 8, 8]]
    assert found.dtype == np.float32
    assert ids.tolist() == [[0]]
    assert scores.tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("returned", [None, np.ones(3), np.ones((1, 3), bool), "scores"])
def test_a_callers_processor_that_returns_no_scores_is_refused(returned: Any) -> None:
    with pytest.raises(InputError, match="float32 of \\(1, 3\\)"):
        room.of_caller(
            np.zeros((1, 1), np.int64), np.ones((1, 3), np.float32), function=lambda *_: returned
        )


def test_an_end_that_is_forbidden_stays_so_however_long_a_row_gets() -> None:
    scores = np.array([[-np.inf, 0.0, 2.0, -2.0]], np.float32)
    ids = np.zeros((1, 9000), np.int64)
    found = room.exponential_decay(ids, scores, start=1, factor=1.5, ends=(0, 1, 2, 3, 8))
    greatest = np.finfo(np.float32).max
    assert found.tolist() == [[-np.inf, 0, greatest, greatest]]


def test_guidance_never_allows_what_the_prompt_forbids() -> None:
    given = np.array([[1.0, -np.inf, 2.0, 0.0]], np.float32)
    free = np.array([[1.0, -np.inf, -np.inf, 0.0]], np.float32)
    found = guided(given, free, 3.0)
    assert np.isneginf(found).tolist() == [[False, True, False, False]]
    assert np.isfinite(found[0, [0, 2, 3]]).all()


# Probabilities and chance


@given(scores_of)
def test_probabilities_add_up_to_one_unless_all_is_forbidden(scores: Scores) -> None:
    total = softmax(scores).sum(axis=1)
    some = (scores > -np.inf).any(axis=1)
    np.testing.assert_allclose(total, some, atol=1e-5)
    logs = log_softmax(scores)
    np.testing.assert_allclose(np.exp(logs), softmax(scores), atol=1e-6)
    assert np.array_equal(np.isneginf(logs), np.isneginf(scores))


@given(scores_of, st.integers(0, 2**32), st.integers(1, 6))
def test_a_forbidden_token_is_never_drawn(scores: Scores, seed: int, block: int) -> None:
    assume((scores > -np.inf).any(axis=1).all())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "BLOCK", block)
        drawn = sample(scores, np.random.default_rng(seed))
    assert drawn.shape == (len(scores),)
    assert drawn.dtype == np.int64
    assert (scores[np.arange(len(scores)), drawn] > -np.inf).all()


class Loaded:
    """Dice that always give the same."""

    def __init__(self, point: float) -> None:
        self.point = point

    def random(self, size: int) -> Any:
        return np.full(size, self.point)


@pytest.mark.parametrize("block", [1, 2, 3, 256])
@pytest.mark.parametrize(("point", "token"), [(0.0, 1), (0.24, 1), (0.26, 3), (1.0, 3)])
def test_the_ends_of_chance_fall_on_tokens_that_are_allowed(
    point: float, token: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "BLOCK", block)
    scores = np.log(np.array([[0.5, 0.25, 0.5, 0.75, 0.5]], np.float32))
    scores[:, ::2] = -np.inf
    assert sample(scores, Loaded(point)).tolist() == [token]  # type: ignore[arg-type]


def test_a_point_that_rounding_put_before_all_tokens_is_in_the_first_allowed_one() -> None:
    assert room._struck(np.array([0.0, 1.0, 0.0]), -1e-17) == 1


@pytest.mark.parametrize("block", [3, 256])
def test_tokens_are_drawn_as_often_as_their_probability_says(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "BLOCK", block)
    dice = np.random.default_rng(7)
    scores = np.array([0.0, 1.0, -1.0, 2.5, -np.inf, 0.5, 0.5, -2.0], np.float32)
    draws = 40_000
    drawn = np.concatenate([sample(np.tile(scores, (1000, 1)), dice) for _ in range(draws // 1000)])
    counts = np.bincount(drawn, minlength=8)
    expected = softmax(scores[None])[0].astype(float) * draws
    assert counts[4] == 0
    some = expected > 0
    chi_squared = ((counts[some] - expected[some]) ** 2 / expected[some]).sum()
    assert chi_squared < 22.46  # 6 degrees of freedom, one in a thousand


def test_each_row_takes_one_number_and_its_own_chance() -> None:
    scores = np.zeros((5, 1000), np.float32)
    drawn = sample(scores, np.random.default_rng(3))
    assert drawn.tolist() == (np.random.default_rng(3).random(5) * 1000).astype(int).tolist()


@pytest.mark.parametrize("wrong", [[-np.inf, -np.inf], [np.nan, 1.0], [np.inf, 1.0]])
def test_a_row_with_nothing_to_draw_is_refused(wrong: list[float]) -> None:
    scores = np.array([[0.0, 1.0], wrong], np.float32)
    with pytest.raises(InputError, match="remove_invalid_values"):
        sample(scores, np.random.default_rng(0))
