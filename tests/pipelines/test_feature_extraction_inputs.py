"""What cannot be used is refused at once, with a typed error that says what can."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ebbtide

MODELS = Path(__file__).parent.parent / "models"


@pytest.fixture
def pipe() -> Any:
    with ebbtide.pipeline("feature-extraction", MODELS / "tiny-bert") as made:
        yield made


# What pipeline() is asked for


@pytest.mark.parametrize(
    ("task", "near"),
    [("feature-extracton", "feature-extraction"), ("embedings", "embeddings"), ("zzz", None)],
)
def test_an_unknown_task_names_the_nearest(task: str, near: str | None) -> None:
    with pytest.raises(ebbtide.InputError) as caught:
        ebbtide.pipeline(task, MODELS / "tiny-bert")
    assert caught.value.value == task
    assert caught.value.nearest == near
    assert "feature-extraction, embeddings" in str(caught.value)


@pytest.mark.parametrize("task", [None, 3, ["feature-extraction"], b"embeddings"])
def test_a_task_that_is_no_text_is_refused(task: Any) -> None:
    with pytest.raises(ebbtide.InputError, match="Unknown task"):
        ebbtide.pipeline(task, MODELS / "tiny-bert")


@pytest.mark.parametrize(
    ("option", "near"), [("devise", "device"), ("d_type", "dtype"), ("modell", "model")]
)
def test_an_unknown_option_of_pipeline_is_a_type_error_that_names_the_nearest(
    option: str, near: str
) -> None:
    with pytest.raises(TypeError) as caught:
        ebbtide.pipeline("embeddings", **{option: "x"})
    assert isinstance(caught.value, ebbtide.OptionError)
    assert (caught.value.option, caught.value.nearest) == (option, near)
    assert repr(near) in str(caught.value)


def test_an_unknown_option_of_apipeline_is_refused_likewise() -> None:
    with pytest.raises(ebbtide.OptionError, match="'device'"):
        asyncio.run(ebbtide.apipeline("embeddings", devise="cpu"))


@pytest.mark.parametrize(
    ("options", "near"),
    [
        ({"dtype": "q9"}, "q8"),
        ({"dtype": "float16"}, None),
        ({"dtype": {"model": "fp23"}}, "fp32"),
        ({"device": "cudda"}, "cuda"),
        ({"device": "cuda:x"}, "cuda:N"),
        ({"device": "cpu:1"}, "cpu"),
        ({"device": {"model": "dlm"}}, "dml"),
    ],
)
def test_an_unknown_dtype_or_device_names_the_nearest(
    options: dict[str, Any], near: str | None
) -> None:
    with pytest.raises(ebbtide.InputError) as caught:
        ebbtide.pipeline("embeddings", MODELS / "tiny-bert", **options)
    assert near is None or caught.value.nearest == near
    assert "Known: auto" in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": 8},
        {"dtype": ["q8"]},
        {"dtype": {"model": 8}},
        {"dtype": {"decoder": "q8"}},
        {"dtype": {1: "q8"}},
        {"device": 0},
        {"device": {"model": None}},
        {"use_external_data_format": "yes"},
        {"use_external_data_format": {"model": "yes"}},
        {"session_options": {"threads": 0}},
        {"session_options": {"optimization": "most"}},
    ],
)
def test_an_option_of_the_wrong_kind_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ebbtide.InputError):
        ebbtide.pipeline("embeddings", MODELS / "tiny-bert", **options)


@pytest.mark.parametrize("model", ["", "  ", "a\0b", 3, 3.5, b"tiny-bert", ["tiny-bert"]])
def test_a_model_that_is_no_name_and_no_path_is_refused(model: Any) -> None:
    with pytest.raises(ebbtide.InputError, match="model takes a folder or a model's name"):
        ebbtide.pipeline("embeddings", model)


@pytest.mark.parametrize("model", ["a" * 5000, Path("a" * 300), "~nobody-of-this-name/model"])
def test_a_path_that_the_system_itself_refuses_is_a_model_not_found(model: Any) -> None:
    with pytest.raises(ebbtide.ModelNotFoundError):
        ebbtide.pipeline("embeddings", model)


# What a call is given

BAD_INPUTS: list[tuple[Any, str]] = [
    (None, "NoneType"),
    (3, "int"),
    (2.5, "float"),
    ({"text": "tide"}, "dict"),
    ({"tide"}, "set"),
    (b"tide", "bytes: decode"),
    (bytearray(b"tide"), "bytes: decode"),
    (memoryview(b"tide"), "bytes: decode"),
    ([], "empty list"),
    ((), "empty list"),
    (np.array([], str), "empty list"),
    (["tide", 3, None], "Input 1 is no text: int"),
    (["tide", "sea", None], "Input 2 is no text: NoneType"),
    (("tide", b"sea"), "Input 1 is no text: bytes"),
    ([["tide"]], "Input 0 is no text: list"),
    (np.array(["tide", "sea"]).astype(bytes), "Input 0 is no text: bytes_"),
    (np.array([["tide"]]), "ndarray"),
    (np.array("tide"), "ndarray"),
    (np.array([1.0]), "Input 0 is no text: float64"),
    ("low \ud800 tide", "cannot be tokenised"),
    (["tide", "\udfff"], "cannot be tokenised"),
]


@pytest.mark.parametrize(("inputs", "words"), BAD_INPUTS, ids=lambda one: ascii(one)[:40])
def test_what_is_no_text_is_refused_and_named(pipe: Any, inputs: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        pipe(inputs, pooling="mean")
    assert isinstance(caught.value, ebbtide.InputError)
    assert pipe("tide", pooling="mean").shape == (1, 32)


@pytest.mark.parametrize(("inputs", "words"), BAD_INPUTS, ids=lambda one: ascii(one)[:40])
def test_acall_refuses_what_a_call_refuses(pipe: Any, inputs: Any, words: str) -> None:
    with pytest.raises(ebbtide.InputError, match=words):
        asyncio.run(pipe.acall(inputs, pooling="mean"))


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True, "8"])
def test_a_batch_size_that_is_no_number_from_one_is_refused(pipe: Any, batch_size: Any) -> None:
    with pytest.raises(ebbtide.InputError, match="batch_size takes a whole number from 1"):
        pipe("tide", batch_size=batch_size)


@pytest.mark.parametrize(
    "options", [{"normalize": "yes"}, {"normalize": 1}, {"quantize": None}, {"quantize": "binary"}]
)
def test_a_switch_takes_true_and_false_alone(pipe: Any, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(TypeError, match=f"{name} takes True or False") as caught:
        pipe("tide", **options)
    assert isinstance(caught.value, ebbtide.OptionError)
    assert caught.value.option == name


@pytest.mark.parametrize(
    ("options", "near"),
    [
        ({"pooling": "meen"}, "mean"),
        ({"pooling": "last-token"}, "last_token"),
        ({"pooling": None}, None),
        ({"pooling": ["mean"]}, None),
        ({"precision": "ubinari"}, "ubinary"),
        ({"precision": "int8"}, None),
    ],
)
def test_an_unknown_pooling_or_precision_names_the_nearest(
    pipe: Any, options: dict[str, Any], near: str | None
) -> None:
    with pytest.raises(ebbtide.InputError) as caught:
        pipe("tide", **options)
    (value,) = options.values()
    assert caught.value.value == value
    assert near is None or caught.value.nearest == near


@pytest.mark.parametrize(
    ("option", "near"), [("poolin", "pooling"), ("normalise", "normalize"), ("batchsize", None)]
)
def test_an_unknown_option_of_a_call_is_a_type_error_that_names_the_nearest(
    pipe: Any, option: str, near: str | None
) -> None:
    for call in (pipe, lambda *given, **more: asyncio.run(pipe.acall(*given, **more))):
        with pytest.raises(TypeError) as caught:
            call("tide", **{option: 1})
        assert isinstance(caught.value, ebbtide.OptionError)
        assert caught.value.option == option
        assert near is None or caught.value.nearest == near


# Texts of ten million characters


@pytest.mark.parametrize("model", ["tiny-bert", "tiny-roberta"])
def test_ten_megabytes_of_words_are_cut_to_the_window(model: str) -> None:
    text = "tide harbour gull " * 560_000
    assert len(text) > 10_000_000
    first = " ".join(text.split(" ", 10_000)[:10_000])
    with ebbtide.pipeline("embeddings", MODELS / model) as pipe:
        assert pipe.tokenizer.ids(text) == pipe.tokenizer.ids(first)
        for pooling in ("mean", "eos"):
            assert np.array_equal(pipe(text, pooling=pooling), pipe(first, pooling=pooling))


@pytest.mark.parametrize(
    ("model", "character"),
    [
        ("tiny-bert", "x"),
        ("tiny-bert", " "),
        ("tiny-roberta", "x"),
        ("tiny-roberta", " "),
        ("tiny-roberta", "\N{WATER WAVE}"),
    ],
    ids=ascii,
)
def test_ten_million_characters_without_a_word_are_refused_in_bounded_memory(
    fresh_process: Any, model: str, character: str
) -> None:
    seen = fresh_process(
        f"""
        import time
        import ebbtide

        def peak():
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

        with ebbtide.pipeline("embeddings", {str(MODELS / model)!r}) as pipe:
            pipe("tide " * 20_000, pooling="mean")
            text = {character!a} * 10_000_000
            before, started = peak(), time.process_time()
            try:
                shape = pipe(text, pooling="mean").shape
            except ebbtide.InputError as error:
                assert "10,000,000 characters is too long" in str(error), error
                assert "Split it" in str(error)
            else:
                assert shape == (1, 32)
            grown, took = peak() - before, time.process_time() - started
            assert grown < 450_000, f"{{grown}} kB more at the peak"
            assert took < 15, f"{{took}} seconds"
            assert pipe("tide", pooling="mean").shape == (1, 32)
        print("bounded", grown, took)
        """
    )
    print(seen)
    assert "bounded" in seen
