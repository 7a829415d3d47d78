"""Which words are texts, and which are options of the call."""

from __future__ import annotations

import dataclasses
import inspect
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbtide.cli.words import call_options, generation_options, groups, split
from ebbtide.errors import EbbtideError, InputError, OptionError
from ebbtide.generation import GenerationConfig
from ebbtide.pipelines import TASKS

TASK = "feature-extraction"


@pytest.mark.parametrize(
    ("words", "texts", "options"),
    [
        ("one two", ["one", "two"], {}),
        ("one --pooling mean two", ["one", "two"], {"pooling": "mean"}),
        ("--pooling=mean one", ["one"], {"pooling": "mean"}),
        ("--normalize one", ["one"], {"normalize": True}),
        ("--normalize true one", ["one"], {"normalize": True}),
        ("--normalize False one", ["one"], {"normalize": False}),
        ("--no-normalize one", ["one"], {"normalize": False}),
        ("--normalize=false one", ["one"], {"normalize": False}),
        ("one --normalize --quantize", ["one"], {"normalize": True, "quantize": True}),
        ("--normalize --pooling cls one", ["one"], {"normalize": True, "pooling": "cls"}),
        ("--batch-size 8 one", ["one"], {"batch_size": 8}),
        ("--batch_size -1 one", ["one"], {"batch_size": -1}),
        ("--pooling none --pooling max one", ["one"], {"pooling": "max"}),
    ],
)
def test_texts_and_options_are_told_apart(
    words: str, texts: list[str], options: dict[str, object]
) -> None:
    assert split(TASK, words.split()) == (texts, options)


@pytest.mark.parametrize(
    ("task", "word", "value"),
    [
        ("text-classification", "--top-k=none", None),
        ("text-classification", "--top-k=3", 3),
        ("text-classification", "--function-to-apply=none", "none"),
        ("text-classification", "--text-pair=a, b", "a, b"),
        ("token-classification", "--ignore-labels=O, B-PER", ["O", "B-PER"]),
        ("token-classification", "--ignore-labels=", []),
        ("token-classification", "--stride=0", 0),
        ("question-answering", "--context=1984", "1984"),
        ("question-answering", "--context=one, two", "one, two"),
        ("fill-mask", "--targets=12,true", ["12", "true"]),
        ("zero-shot-classification", "--candidate-labels=sea, city", "sea, city"),
        ("zero-shot-classification", "--entailment-label=none", "none"),
        ("zero-shot-classification", "--hypothesis-template=5 {}", "5 {}"),
        ("text-generation", "--temperature=0.5", 0.5),
        ("text-generation", "--max-new-tokens=none", None),
        ("text-generation", "--early-stopping=never", "never"),
        ("text-generation", "--early-stopping=true", True),
        ("text-generation", "--stop-strings=., !", [".", "!"]),
        ("text-generation", "--suppress-tokens=1,22", [1, 22]),
        ("translation", "--src-lang=en", "en"),
    ],
)
def test_a_value_is_of_the_kind_that_the_signature_says(
    task: str, word: str, value: object
) -> None:
    needed = ["--context=x"] * (task == "question-answering")
    needed += ["--candidate-labels=x"] * (task == "zero-shot-classification")
    _, options = split(task, [*needed, word])
    name = word[2:].partition("=")[0].replace("-", "_")
    assert options[name] == value
    assert type(options[name]) is type(value)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("question-answering x", "needs --context, as in: ebbtide run question-answering"),
        ("question-answering x --context", "--context needs a value"),
        ("zero-shot-classification x", "needs --candidate-labels"),
        ("zero-shot-classification x --multi-label=1", "takes True or False, not '1'"),
        ("text-classification x --top-k many", "a whole number or none, not 'many'"),
        ("text-classification x --top-k=2.5", "a whole number or none, not '2.5'"),
        ("fill-mask x --top-k none", "a whole number, not 'none'"),
        ("text-generation x --temperature warm", "temperature takes a number, not 'warm'"),
        ("text-generation x --suppress-tokens=1,b", "takes whole numbers with commas, not '1,b'"),
        ("text-generation x --do-smaple", "Did you mean 'do_sample'?"),
        ("fill-mask x --text-pair y", "no option 'text_pair'"),
        ("ner x --aggregation-strategy frist", "Did you mean 'first'?"),
        ("sentiment-analysis x --function-to-apply sofmax", "Did you mean 'softmax'?"),
    ],
)
def test_a_value_that_the_signature_does_not_take_is_an_error(words: str, named: str) -> None:
    task, *rest = words.split()
    with pytest.raises(EbbtideError, match=re.escape(named)):
        split(task, rest)


@given(st.lists(st.text().filter(lambda text: not text.startswith("--"))))
def test_a_word_without_two_dashes_is_a_text_as_it_is(texts: list[str]) -> None:
    assert split(TASK, texts) == (texts, {})


@given(st.lists(st.text(), max_size=30), st.integers(1, 7))
def test_groups_lose_nothing_and_hold_so_many(texts: list[str], size: int) -> None:
    found = list(groups(iter(texts), size))
    assert [text for group in found for text in group] == texts
    assert all(len(group) == size for group in found[:-1])


def test_an_option_that_the_call_lacks_is_an_error() -> None:
    with pytest.raises(OptionError, match="Did you mean 'quantize'"):
        split(TASK, ["--quantise"])
    with pytest.raises(InputError, match="Known: binary, ubinary"):
        split(TASK, ["--precision"])


@pytest.mark.parametrize("task", TASKS)
def test_the_options_are_those_of_the_signature(task: str) -> None:
    _, _, *parameters = inspect.signature(TASKS[task].pipeline.__call__).parameters
    known = call_options(task)
    if "options" in parameters:
        known = {name: one for name, one in known.items() if name not in generation_options()}
    found = [name for name in known if name not in ("text_pair", "src_lang", "tgt_lang")]
    assert found == [name for name in parameters if name not in ("unknown", "streamer", "options")]


def test_the_options_of_a_generation_are_all_that_can_be_typed() -> None:
    every = {field.name for field in dataclasses.fields(GenerationConfig)}
    assert every - generation_options().keys() == {
        "bad_words_ids", "sequence_bias", "exponential_decay_length_penalty", "logits_processor",
        "stopping_criteria", "prefix_allowed_tokens_fn",
    }  # fmt: skip
    for task in ("text-generation", "text2text-generation", "summarization", "translation"):
        assert generation_options().keys() <= call_options(task).keys()


@pytest.mark.parametrize("task", TASKS)
def test_a_default_is_a_value_of_its_option(task: str) -> None:
    kinds = {
        "flag": bool, "number": int, "decimal": float, "numbers": tuple, "word": str, "text": str,
        "texts": tuple,
    }  # fmt: skip
    for option in call_options(task).values():
        if option.default is not None and not option.needed:
            assert type(option.default) is kinds[option.kind]
        if option.kind == "word" and option.default is not None:
            assert option.default in option.values
