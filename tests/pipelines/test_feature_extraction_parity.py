"""The vectors are those of transformers, and those of the bare graph, whatever way in is taken."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import ebbtide
from ebbtide.pipelines import pooling as pool

TESTS = Path(__file__).parent.parent
MODELS = TESTS / "models"
GOLDENS = TESTS / "goldens"

NAMES = sorted(path.stem for path in GOLDENS.glob("*.json"))
CONTENT = {name: json.loads((GOLDENS / f"{name}.json").read_text()) for name in NAMES}
CASES = [(name, case["name"]) for name in NAMES for case in CONTENT[name]["cases"]]

CALLS: dict[str, list[dict[str, Any]]] = {
    "mean": [{"pooling": "mean"}],
    "mean_normalized": [{"pooling": "mean", "normalize": True}],
    "cls": [{"pooling": "cls"}, {"pooling": "first_token"}],
    "eos": [{"pooling": "eos"}, {"pooling": "last_token"}],
    "max": [{"pooling": "max"}],
    "mean_sqrt_len": [{"pooling": "mean_sqrt_len"}],
    "weighted_mean": [{"pooling": "weighted_mean"}],
    "sentence_embedding": [{}, {"pooling": "auto"}],
    "last_hidden_state": [{"pooling": "none"}],
    "logits": [{"pooling": "none"}],
}
"""For each kind of golden array, the calls that must give it."""

QUANTISED = ("fp16", "q8", "int8", "uint8", "q4", "q4f16", "bnb4")

TEXTS = [
    "The tide is low.",
    "",
    "Why does the water come back twice a day, and why later every day?",
    "🌊 naïve 🐟",
    "בחוף שקט",
    "Boats wait. " * 12,
    "sea",
]


def case_of(model: str, name: str) -> dict[str, Any]:
    return next(one for one in CONTENT[model]["cases"] if one["name"] == name)


def texts_of(case: dict[str, Any]) -> list[str]:
    return [
        one if isinstance(one, str) else " ".join(one["words"] * one["repeat"])
        for one in case["texts"]
    ]


def load(model: str, **options: Any) -> ebbtide.FeatureExtractionPipeline:
    return ebbtide.pipeline("feature-extraction", MODELS / model, **options)


def close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def raw_output(path: Path, ids: list[list[int]], padding: int, output: str) -> np.ndarray:
    """The same batch through a session of our own making, fed without Ebbtide."""
    width = max(map(len, ids))
    feeds = {
        "input_ids": np.array([row + [padding] * (width - len(row)) for row in ids], np.int64),
        "attention_mask": np.array([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
        "token_type_ids": np.zeros((len(ids), width), np.int64),
    }
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        path.read_bytes() if not path.with_name(path.name + "_data").exists() else str(path),
        options,
        providers=["CPUExecutionProvider"],
    )
    taken = {one.name for one in session.get_inputs()}
    (found,) = session.run([output], {key: feeds[key] for key in taken})
    return found


# transformers' own results


def test_the_goldens_cover_what_they_should() -> None:
    kinds = {case for _, case in CASES}
    assert len(NAMES) == 6
    assert {"short", "batch", "empty", "emoji_combining", "right_to_left", "truncated"} <= kinds
    assert all(
        len(text.split()) == 10_000
        for name in NAMES
        for text in texts_of(case_of(name, "truncated"))
    )
    known = {key for name, case in CASES for key in case_of(name, case)["arrays"]}
    assert known <= {*CALLS, "attention_mask"}


@pytest.mark.parametrize(("model", "name"), CASES)
def test_token_ids_are_exactly_those_of_transformers(model: str, name: str) -> None:
    case = case_of(model, name)
    limit = CONTENT[model].get("sentence_limit")
    with load(model) as pipe:
        texts = texts_of(case)
        assert pipe.tokenizer.limit == CONTENT[model]["limit"]
        assert [pipe.tokenizer.ids(text) for text in texts] == case["input_ids"]
        if limit is not None:
            cut = [pipe.tokenizer.ids(text, limit=limit) for text in texts]
            assert cut == case["sentence_input_ids"]


@pytest.mark.parametrize(("model", "name"), CASES)
def test_vectors_are_those_of_transformers(model: str, name: str) -> None:
    case = case_of(model, name)
    texts = texts_of(case)
    checked = 0
    with load(model) as pipe, np.load(GOLDENS / f"{model}.npz") as golden:
        for kind, key in case["arrays"].items():
            for options in CALLS.get(kind, []):
                close(pipe(texts, **options), golden[key], 1e-4)
                checked += 1
        if "attention_mask" in case["arrays"]:
            mask = pipe.tokenizer.batch(texts).attention_mask
            assert mask.tolist() == golden[case["arrays"]["attention_mask"]].tolist()
    assert checked >= 9


@pytest.mark.parametrize("model", NAMES)
def test_a_text_alone_gives_what_it_gives_in_a_padded_batch(model: str) -> None:
    with load(model) as pipe:
        together = pipe(TEXTS, pooling="mean")
        for text, expected in zip(TEXTS, together, strict=True):
            close(pipe(text, pooling="mean")[0], expected, 1e-5)


def test_auto_without_a_recipe_gives_a_vector_a_token() -> None:
    with load("tiny-bert") as pipe:
        assert np.array_equal(pipe("low tide"), pipe("low tide", pooling="none"))
        assert pipe("low tide").ndim == 3


def test_normalize_can_be_taken_from_auto_or_decided_by_the_caller() -> None:
    with load("tiny-bert-st") as pipe:
        own = pipe(TEXTS, normalize=False)
        scaled = pipe(TEXTS)
    assert not np.allclose(np.linalg.norm(own, axis=-1), 1)
    close(scaled, own / np.linalg.norm(own, axis=-1, keepdims=True), 1e-6)


def test_token_vectors_can_be_normalised_too() -> None:
    with load("tiny-bert") as pipe:
        vectors = pipe(TEXTS, pooling="none", normalize=True)
    close(np.linalg.norm(vectors, axis=-1), np.ones(vectors.shape[:2], np.float32), 1e-5)


# The bare graph


@pytest.mark.parametrize("model", NAMES)
def test_vectors_are_those_of_the_bare_graph(model: str) -> None:
    content = CONTENT[model]
    case = case_of(model, "batch")
    padding = 1 if model == "tiny-roberta" else 0
    expected = raw_output(
        MODELS / model / content["onnx_file"], case["input_ids"], padding, content["output"]
    )
    with load(model) as pipe:
        assert pipe.dtype == "fp32"
        close(pipe(texts_of(case), pooling="none"), expected, 1e-5)


@pytest.mark.parametrize("dtype", QUANTISED)
def test_each_smaller_file_gives_what_its_bare_graph_gives(dtype: str) -> None:
    case = case_of("tiny-bert", "batch")
    suffix = "quantized" if dtype == "q8" else dtype
    path = MODELS / "tiny-bert" / "onnx" / f"model_{suffix}.onnx"
    expected = raw_output(path, case["input_ids"], 0, "last_hidden_state")
    with load("tiny-bert", dtype=dtype) as pipe:
        assert pipe.dtype == dtype
        texts = texts_of(case)
        found = pipe(texts, pooling="none", batch_size=len(texts))
    assert found.dtype == expected.dtype
    close(found, expected, 1e-5)


@pytest.mark.parametrize("dtype", QUANTISED)
def test_a_smaller_file_stays_near_the_full_one(dtype: str) -> None:
    with load("tiny-bert") as full, load("tiny-bert", dtype=dtype) as small:
        exact = full(TEXTS, pooling="mean", normalize=True)
        near = small(TEXTS, pooling="mean", normalize=True)
    assert (exact * near).sum(axis=-1).min() > 0.9


# Lists longer than a batch


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6, 7, 100])
@pytest.mark.parametrize("options", [{"pooling": "mean"}, {"pooling": "none"}, {"pooling": "eos"}])
def test_batch_size_changes_no_result(batch_size: int, options: dict[str, Any]) -> None:
    with load("tiny-bert") as pipe:
        close(pipe(TEXTS, batch_size=batch_size, **options), pipe(TEXTS, **options), 1e-5)


def test_the_default_batch_size_splits_a_long_list_without_a_change() -> None:
    texts = [f"wave number {n} of the day" for n in range(70)]
    with load("tiny-bert-st") as pipe:
        close(pipe(texts), pipe(texts, batch_size=70), 1e-5)


# Bits


def bits_by_hand(values: np.ndarray) -> np.ndarray:
    """One bit a value above 0, the first of eight highest: written out, value by value."""
    flat = values.reshape(-1, values.shape[-1]).tolist()
    rows = []
    for row in flat:
        row_bytes = []
        for start in range(0, len(row), 8):
            byte = 0
            for value in row[start : start + 8]:
                byte = byte * 2 + (1 if value > 0 else 0)
            row_bytes.append(byte)
        rows.append(row_bytes)
    return np.array(rows).reshape(*values.shape[:-1], values.shape[-1] // 8)


@pytest.mark.parametrize("model", ["tiny-bert", "tiny-bert-st"])
@pytest.mark.parametrize("pooling", ["auto", "mean", "none"])
def test_quantize_packs_the_signs_into_bits(model: str, pooling: str) -> None:
    with load(model) as pipe:
        by_hand = bits_by_hand(pipe(TEXTS, pooling=pooling))
        unsigned = pipe(TEXTS, pooling=pooling, quantize=True, precision="ubinary")
        signed = pipe(TEXTS, pooling=pooling, quantize=True, precision="binary")
        default = pipe(TEXTS, pooling=pooling, quantize=True)
    assert unsigned.dtype == np.uint8
    assert signed.dtype == np.int8
    assert np.array_equal(unsigned, by_hand)
    assert np.array_equal(signed, by_hand - 128)
    assert np.array_equal(default, signed)


floats = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1e-38, -1e-38])
matrices = st.tuples(st.integers(1, 4), st.integers(1, 5)).flatmap(
    lambda shape: arrays.arrays(np.float32, (shape[0], shape[1] * 8), elements=floats)
)


@settings(deadline=None, max_examples=100)
@given(matrices)
def test_bits_are_right_for_any_floats(values: np.ndarray) -> None:
    by_hand = bits_by_hand(values)
    assert np.array_equal(pool.ubinary(values), by_hand)
    assert np.array_equal(pool.binary(values), by_hand - 128)


def test_bits_that_fill_no_byte_are_refused_and_the_widths_are_named() -> None:
    with load("tiny-mlm") as pipe, pytest.raises(ebbtide.InputError, match="300"):
        pipe("tide", pooling="mean", quantize=True)


# Ways in


def test_one_text_counts_as_a_list_of_one() -> None:
    with load("tiny-bert") as pipe:
        assert np.array_equal(pipe("tide", pooling="mean"), pipe(["tide"], pooling="mean"))
        assert pipe("tide", pooling="mean").shape == (1, 32)


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda texts: np.array(texts, object)])
def test_lists_tuples_and_arrays_of_texts_are_the_same(kind: Any) -> None:
    with load("tiny-bert") as pipe:
        assert np.array_equal(pipe(kind(TEXTS), pooling="mean"), pipe(TEXTS, pooling="mean"))


def test_the_numpy_text_type_is_a_text() -> None:
    with load("tiny-bert") as pipe:
        assert np.array_equal(pipe(np.str_("tide")), pipe("tide"))


def test_a_generator_is_answered_lazily_one_text_at_a_time() -> None:
    drawn: list[str] = []

    def texts() -> Iterator[str]:
        for text in TEXTS:
            drawn.append(text)
            yield text

    with load("tiny-bert") as pipe:
        answers = pipe(texts(), pooling="mean")
        assert iter(answers) is answers
        assert drawn == []
        for count, text in enumerate(TEXTS, start=1):
            vector = next(answers)
            assert drawn == TEXTS[:count]
            assert np.array_equal(vector, pipe(text, pooling="mean"))
        with pytest.raises(StopIteration):
            next(answers)


def test_the_options_of_a_generator_are_checked_before_it_runs() -> None:
    with load("tiny-bert") as pipe, pytest.raises(ebbtide.InputError, match="mean"):
        pipe(iter(TEXTS), pooling="meen")


def test_a_bad_text_in_a_generator_is_told_when_it_comes() -> None:
    with load("tiny-bert") as pipe:
        answers = pipe(iter(["tide", None]), pooling="mean")  # type: ignore[list-item]
        assert next(answers).shape == (1, 32)
        with pytest.raises(ebbtide.InputError, match="NoneType"):
            next(answers)


# The event loop


def test_acall_gives_what_a_call_gives() -> None:
    async def main() -> tuple[Any, Any]:
        one = await pipe.acall("tide", pooling="mean")
        several = await pipe.acall(TEXTS, pooling="mean")
        return one, several

    with load("tiny-bert") as pipe:
        one, several = asyncio.run(main())
        assert np.array_equal(one, pipe("tide", pooling="mean"))
        assert np.array_equal(several, pipe(TEXTS, pooling="mean"))


@pytest.mark.parametrize("kind", ["generator", "async generator"])
def test_acall_answers_generators_of_both_kinds_lazily(kind: str) -> None:
    drawn: list[str] = []

    def plain() -> Iterator[str]:
        for text in TEXTS:
            drawn.append(text)
            yield text

    async def asynchronous() -> AsyncIterator[str]:
        for text in plain():
            yield text

    async def main() -> list[np.ndarray]:
        source = plain() if kind == "generator" else asynchronous()
        answers = await pipe.acall(source, pooling="mean")
        assert drawn == []
        found = []
        async for vector in answers:
            found.append(vector)
            assert drawn == TEXTS[: len(found)]
        return found

    with load("tiny-bert") as pipe:
        found = asyncio.run(main())
        for vector, text in zip(found, TEXTS, strict=True):
            assert np.array_equal(vector, pipe(text, pooling="mean"))


def test_calls_at_the_same_time_on_one_event_loop_give_each_its_own() -> None:
    async def main() -> list[Any]:
        return await asyncio.gather(*(pipe.acall(text, pooling="mean") for text in TEXTS))

    with load("tiny-bert") as pipe:
        for vector, text in zip(asyncio.run(main()), TEXTS, strict=True):
            assert np.array_equal(vector, pipe(text, pooling="mean"))


def test_apipeline_loads_what_pipeline_loads() -> None:
    async def main() -> Any:
        async with await ebbtide.apipeline("embeddings", MODELS / "tiny-bert") as pipe:
            return await pipe.acall(TEXTS, pooling="mean")

    found = asyncio.run(main())
    with load("tiny-bert") as pipe:
        assert np.array_equal(found, pipe(TEXTS, pooling="mean"))
