"""Which words are texts, and which are options of the call."""

from __future__ import annotations

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbtide.cli.words import call_options, groups, split
from ebbtide.errors import InputError, OptionError
from ebbtide.pipelines import FeatureExtractionPipeline

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
        ("--batch-size 2.5 one", ["one"], {"batch_size": 2.5}),
        ("--batch-size many one", ["one"], {"batch_size": "many"}),
        ("--pooling none --pooling max one", ["one"], {"pooling": "max"}),
    ],
)
def test_texts_and_options_are_told_apart(
    words: str, texts: list[str], options: dict[str, object]
) -> None:
    assert split(TASK, words.split()) == (texts, options)


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


def test_the_options_are_those_of_the_signature() -> None:
    signature = inspect.signature(FeatureExtractionPipeline.__call__)
    keywords = [one.name for one in signature.parameters.values() if one.kind is one.KEYWORD_ONLY]
    assert list(call_options("embeddings")) == keywords
