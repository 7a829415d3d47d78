"""Structured output: whatever the scores are, what is written has the form that was asked for."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import decoders, models, normalizers

from ebbtide.cancellation import CancelToken
from ebbtide.errors import (
    InputError,
    MissingExtraError,
    PipelineDisposedError,
    UnsupportedModelError,
)
from ebbtide.models.structured import Structure, Vocabulary
from ebbtide.models.structured_form import Form
from ebbtide.models.tokenizer import Tokenizer

from .loaded import tokenizer_of

LLAMA = "gen-llama"
END = 357
"""The token that ends a text of gen-llama."""

PROMPT = 3
SEEDS = st.integers(0, 2**32 - 1)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 4},
        "size": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["rock", "sand", None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "size", "kind"],
    "additionalProperties": False,
}

Scores = NDArray[np.float32]


@contextmanager
def vocabulary_of(tokenizer: Tokenizer) -> Iterator[Vocabulary]:
    lease = Vocabulary.acquire(tokenizer, CancelToken("the test"))
    assert lease.value is not None
    try:
        yield lease.value
    finally:
        assert not lease.release()


@pytest.fixture(scope="module")
def tokenizer() -> Iterator[Tokenizer]:
    with tokenizer_of(LLAMA) as made:
        yield made


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> Iterator[Vocabulary]:
    with vocabulary_of(tokenizer) as made:
        yield made


def random_scores(seed: int, rows: int, size: int) -> Iterator[Scores]:
    generator = np.random.default_rng(seed)
    while True:
        yield generator.standard_normal((rows, size)).astype(np.float32)


def written(
    structure: Structure,
    scores: Iterator[Scores],
    rows: int = 1,
    end: int = END,
    most: int = 400,
) -> list[list[int]]:
    """What the best allowed tokens make of each row, without its end."""
    processor = structure.begin(prompt_length=PROMPT, eos=[end])
    ids = np.full((rows, PROMPT), 5, np.int64)
    ended = np.zeros(rows, bool)
    for _ in range(most):
        best = processor(ids, next(scores)).argmax(axis=1)
        best[ended] = 0
        ended |= best == end
        ids = np.concatenate([ids, best[:, None]], axis=1)
        if ended.all():
            found = (row[PROMPT:].tolist() for row in ids)
            return [row[: row.index(end)] for row in found]
    raise AssertionError(f"rows did not end: {ids[:, PROMPT:].tolist()}")


def texts(
    spec: object, vocabulary: Vocabulary, tokenizer: Tokenizer, seed: int, rows: int = 1
) -> list[str]:
    structure = Structure.of(spec, vocabulary)
    found = written(structure, random_scores(seed, rows, structure.size), rows)
    return [tokenizer.decode(one) for one in found]


def allowed(scores: Scores, row: int = 0) -> set[int]:
    return set(np.flatnonzero(np.isfinite(scores[row])).tolist())


def processed(structure: Structure, *rows: Sequence[int], size: int | None = None) -> Scores:
    """The scores of a fresh generation in which each row has these new tokens."""
    ids = np.array([[5] * PROMPT + list(row) for row in rows], np.int64)
    scores = np.zeros((len(rows), size or structure.size), np.float32)
    return structure.begin(prompt_length=PROMPT, eos=[END])(ids, scores)


def is_of_schema(value: Any) -> bool:
    return (
        {"name", "size", "kind"} <= set(value) <= {"name", "size", "kind", "tags"}
        and 1 <= len(value["name"]) <= 4
        and type(value["size"]) is int
        and 0 <= value["size"] <= 120
        and value["kind"] in ("rock", "sand", None)
        and all(type(one) is bool for one in value.get("tags", []))
        and len(value.get("tags", [])) <= 2
    )


# Whatever the scores are


@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_what_is_written_is_json_of_the_schema(
    seed: int, vocabulary: Vocabulary, tokenizer: Tokenizer
) -> None:
    for text in texts(SCHEMA, vocabulary, tokenizer, seed, rows=2):
        assert is_of_schema(json.loads(text)), text
        assert Structure.of(SCHEMA, vocabulary).parse(text) == json.loads(text)


@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_what_is_written_matches_the_expression(
    seed: int, vocabulary: Vocabulary, tokenizer: Tokenizer
) -> None:
    pattern = re.compile(r"(tide|ebb)-[0-9a-f]{2,6}/?\.")
    (text,) = texts(pattern, vocabulary, tokenizer, seed)
    assert pattern.fullmatch(text), text


@given(
    seed=SEEDS,
    choices=st.lists(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=8),
        min_size=1,
        max_size=5,
    ),
)
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_one_of_the_choices(
    seed: int, choices: list[str], vocabulary: Vocabulary, tokenizer: Tokenizer
) -> None:
    structure = Structure.of(choices, vocabulary)
    (ids,) = written(structure, random_scores(seed, 1, structure.size))
    assert tokenizer.decode(ids, skip_special_tokens=False) in choices


def test_every_choice_can_be_written(vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    choices = ["ebb", "ebb tide", 'flood "x"\\', "</s>", "\n", "日本"]
    found = set()
    for seed in range(60):
        found.update(texts(choices, vocabulary, tokenizer, seed))
    assert found == set(choices)


@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_what_is_written_is_of_the_grammar(
    seed: int, vocabulary: Vocabulary, tokenizer: Tokenizer
) -> None:
    grammar = 'start: sum\nsum: NUMBER | NUMBER "+" NUMBER\nNUMBER: /[1-9][0-9]?/'
    (text,) = texts({"grammar": grammar}, vocabulary, tokenizer, seed)
    assert re.fullmatch(r"[1-9][0-9]?(\+[1-9][0-9]?)?", text), text


def test_a_sentencepiece_vocabulary_writes_the_choices_too() -> None:
    with tokenizer_of("gen-t5") as tokenizer, vocabulary_of(tokenizer) as vocabulary:
        structure = Structure.of({"regex": "(a|b){2,3}!"}, vocabulary)
        for seed in range(10):
            (ids,) = written(structure, random_scores(seed, 1, structure.size), end=1)
            text = tokenizer.decode(ids)
            assert re.fullmatch("(a|b){2,3}!", text.removeprefix(" "))
            assert structure.parse(text) == text.removeprefix(" ")


def test_a_vocabulary_with_a_token_for_each_byte_writes_json(tmp_path: Path) -> None:
    tokens = ["<s>", "</s>", *(f"<0x{one:02X}>" for one in range(256)), "\u2581", *"abc{}"]
    native = tokenizers.Tokenizer(
        models.BPE(
            vocab={one: number for number, one in enumerate(tokens)}, merges=[], byte_fallback=True
        )
    )
    native.normalizer = normalizers.Replace(" ", "\u2581")
    native.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    native.add_special_tokens(["<s>", "</s>"])
    native.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text("{}")
    with tokenizer_of(tmp_path) as tokenizer, vocabulary_of(tokenizer) as vocabulary:
        structure = Structure.of(SCHEMA, vocabulary)
        for seed in range(10):
            (ids,) = written(structure, random_scores(seed, 1, structure.size), end=1)
            assert is_of_schema(structure.parse(tokenizer.decode(ids)))
        structure = Structure.of(["\u65e5 a"], vocabulary)
        (ids,) = written(structure, random_scores(0, 1, structure.size), end=1)
        assert structure.parse(tokenizer.decode(ids)) == "\u65e5 a"


# The rows


def test_rows_of_a_batch_are_independent_of_one_another(vocabulary: Vocabulary) -> None:
    structure = Structure.of(SCHEMA, vocabulary)
    alone = [written(structure, random_scores(seed, 1, structure.size))[0] for seed in range(4)]
    streams = [random_scores(seed, 1, structure.size) for seed in range(4)]
    together = (np.concatenate(scores) for scores in zip(*streams, strict=True))
    assert written(structure, together, rows=4) == alone


@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_rows_that_are_reordered_copied_and_dropped_get_what_their_tokens_allow(
    seed: int, vocabulary: Vocabulary
) -> None:
    structure = Structure.of(SCHEMA, vocabulary)
    processor = structure.begin(prompt_length=PROMPT, eos=[END])
    generator = np.random.default_rng(seed)
    ids = np.full((3, PROMPT), 5, np.int64)
    for _ in range(25):
        scores = generator.standard_normal((len(ids), structure.size)).astype(np.float32)
        found = processor(ids, scores)
        fresh = structure.begin(prompt_length=PROMPT, eos=[END])
        np.testing.assert_array_equal(found, fresh(ids, scores))
        again = generator.integers(0, len(ids), generator.integers(1, 5))
        drawn = generator.gumbel(size=(len(again), structure.size))
        ids = np.concatenate([ids[again], (found[again] + drawn).argmax(1)[:, None]], axis=1)


def test_groups_of_rows_may_be_shown_one_after_another(vocabulary: Vocabulary) -> None:
    structure = Structure.of(["abc", "abd"], vocabulary)
    processor = structure.begin(prompt_length=PROMPT, eos=[END])
    ids = np.full((1, PROMPT), 5, np.int64)
    for letter in "ab":
        for _ in range(2):
            found = processor(ids, np.zeros((1, structure.size), np.float32))
            assert allowed(found)
        (number,) = vocabulary.greedy(letter)
        ids = np.append(ids, [[number]], axis=1)
    assert {*vocabulary.greedy("c"), *vocabulary.greedy("d")} == allowed(
        processor(ids, np.zeros((1, structure.size), np.float32))
    )


def test_several_tokens_at_once_are_taken_in(vocabulary: Vocabulary) -> None:
    structure = Structure.of({"regex": "abcd"}, vocabulary)
    processor = structure.begin(prompt_length=PROMPT, eos=[END])
    scores = np.zeros((1, structure.size), np.float32)
    ids = np.full((1, PROMPT), 5, np.int64)
    processor(ids, scores)
    ids = np.append(ids, [vocabulary.greedy("a") + vocabulary.greedy("b")], axis=1)
    assert allowed(processor(ids, scores)) == set(vocabulary.greedy("c"))


def test_a_row_that_ended_keeps_its_scores(vocabulary: Vocabulary) -> None:
    structure = Structure.of(["a", "b"], vocabulary)
    letter = vocabulary.greedy("a")
    found = processed(structure, [*letter, END, 0], [*letter, END, END], [*letter, END, 5])
    assert np.all(found == 0)


def test_the_prompt_is_no_part_of_the_form(vocabulary: Vocabulary) -> None:
    structure = Structure.of(["a"], vocabulary)
    processor = structure.begin(prompt_length=2, eos=[END])
    ids = np.array([[END, 9], [7, 300]], np.int64)
    found = processor(ids, np.zeros((2, structure.size), np.float32))
    assert [allowed(found, row) for row in (0, 1)] == [set(vocabulary.greedy("a"))] * 2


def test_the_scores_that_came_in_are_not_changed(vocabulary: Vocabulary) -> None:
    structure = Structure.of(["a"], vocabulary)
    scores = np.arange(structure.size, dtype=np.float32)[None]
    before = scores.copy()
    found = structure.begin(prompt_length=1, eos=END)(np.zeros((1, 1), np.int64), scores)
    np.testing.assert_array_equal(scores, before)
    (letter,) = vocabulary.greedy("a")
    assert found[0, letter] == before[0, letter]
    assert found.dtype == np.float32


# The end


def test_only_the_end_is_allowed_once_the_text_is_complete(vocabulary: Vocabulary) -> None:
    structure = Structure.of({"type": "boolean"}, vocabulary)
    assert allowed(processed(structure, vocabulary.greedy("true"))) == {END}


def test_no_end_is_allowed_before_the_text_is_complete(vocabulary: Vocabulary) -> None:
    structure = Structure.of(SCHEMA, vocabulary)
    ids = vocabulary.greedy('{"name": "a", "size": 7, "kind": null}')
    for count in range(len(ids)):
        assert END not in allowed(processed(structure, ids[:count]))
    assert END in allowed(processed(structure, ids))


def test_a_text_that_may_end_or_go_on_is_allowed_both(vocabulary: Vocabulary) -> None:
    structure = Structure.of({"regex": "a+"}, vocabulary)
    (letter,) = vocabulary.greedy("a")
    assert {letter, END} <= allowed(processed(structure, [letter]))


def test_a_token_of_text_that_ends_a_row_is_no_text(vocabulary: Vocabulary) -> None:
    structure = Structure.of({"regex": "[ab]{2}"}, vocabulary)
    (end,) = vocabulary.greedy("a")
    processor = structure.begin(prompt_length=0, eos=[end])
    scores = np.zeros((1, structure.size), np.float32)
    assert end not in allowed(processor(np.zeros((1, 0), np.int64), scores))


def test_several_tokens_may_end_a_text(vocabulary: Vocabulary) -> None:
    structure = Structure.of(["a"], vocabulary)
    processor = structure.begin(prompt_length=0, eos=[END, 356, 10**6])
    ids = np.array([vocabulary.greedy("a")], np.int64)
    found = processor(ids, np.zeros((1, structure.size), np.float32))
    assert allowed(found) == {END, 356}


def test_without_a_token_that_ends_a_text_there_is_an_error(vocabulary: Vocabulary) -> None:
    with pytest.raises(InputError, match=r"no token ends a text of this model.*eos_token_id"):
        Structure.of(["a"], vocabulary).begin(prompt_length=0, eos=[])


# The vocabulary


@pytest.mark.parametrize("more", [1, 31, 32, 1000])
def test_scores_of_more_ids_than_the_tokenizer_has_are_not_allowed(
    more: int, vocabulary: Vocabulary
) -> None:
    structure = Structure.of({"type": "string"}, vocabulary)
    for ids in ([], vocabulary.greedy('"tide'), vocabulary.greedy('"tide"')):
        found = processed(structure, ids, size=structure.size + more)
        assert found.shape == (1, structure.size + more)
        assert allowed(found) == allowed(processed(structure, ids))


def test_scores_of_fewer_ids_than_the_tokenizer_has_do(vocabulary: Vocabulary) -> None:
    structure = Structure.of({"type": "string"}, vocabulary)
    every = allowed(processed(structure, vocabulary.greedy('"tide')))
    assert allowed(processed(structure, vocabulary.greedy('"tide'), size=100)) == {
        one for one in every if one < 100
    }


def test_no_special_token_is_let_through_as_text(
    vocabulary: Vocabulary, tokenizer: Tokenizer
) -> None:
    structure = Structure.of({"type": "string"}, vocabulary)
    found = allowed(processed(structure, vocabulary.greedy('"tide')))
    assert len(found) > 200
    assert found.isdisjoint({tokenizer.token_id(one) for one in tokenizer.added()})


def test_what_must_come_is_written_as_the_tokenizer_writes_it(
    vocabulary: Vocabulary, tokenizer: Tokenizer
) -> None:
    text = "the harbour and the tide"
    structure = Structure.of([text], vocabulary)
    (ids,) = written(structure, random_scores(0, 1, structure.size))
    assert ids == tokenizer.prompt(text, add_special_tokens=False)
    assert len(ids) < len(text)


@pytest.mark.parametrize("text", ["</s>", "a</s>b <s>", "e\u0301<pad>"])
def test_what_must_come_may_look_like_a_special_token(
    text: str, vocabulary: Vocabulary, tokenizer: Tokenizer
) -> None:
    structure = Structure.of([text], vocabulary)
    (ids,) = written(structure, random_scores(0, 1, structure.size))
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_pipelines_that_share_a_tokenizer_share_its_vocabulary(tokenizer: Tokenizer) -> None:
    with vocabulary_of(tokenizer) as one, vocabulary_of(tokenizer) as other:
        assert one is other


def test_a_vocabulary_that_slept_is_made_again(tokenizer: Tokenizer) -> None:
    with vocabulary_of(tokenizer) as vocabulary:
        before = Structure.of(["ebb"], vocabulary)
        if vocabulary.sleep():
            pytest.fail("something still holds it")
        assert vocabulary.made() is not None
        after = Structure.of(["ebb"], vocabulary)
        assert allowed(processed(before, [])) == allowed(processed(after, []))


def test_a_vocabulary_that_is_closed_says_so() -> None:
    with tokenizer_of("gen-gpt2") as tokenizer:
        with vocabulary_of(tokenizer) as vocabulary:
            pass
        with pytest.raises(PipelineDisposedError, match="Make a new pipeline"):
            Structure.of(["a"], vocabulary)


def test_a_tokenizer_whose_tokens_do_not_spell_text_is_refused() -> None:
    with (
        tokenizer_of("tiny-bert") as tokenizer,
        pytest.raises(UnsupportedModelError, match=r"do not spell text.*use another model"),
    ):
        Vocabulary.acquire(tokenizer, CancelToken("the test"))


def test_a_vocabulary_without_the_characters_says_so() -> None:
    with tokenizer_of("gen-t5") as tokenizer, vocabulary_of(tokenizer) as vocabulary:
        with pytest.raises(InputError, match="no tokens that write the choice '日本'"):
            Structure.of(["日本"], vocabulary)
        structure = Structure.of({"type": "object"}, vocabulary)
        with pytest.raises(InputError, match="no token with which the text could go on"):
            written(structure, random_scores(0, 1, structure.size), end=1)


def test_without_the_library_the_command_that_brings_it_is_named(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ebbtide\[structured\]'") as caught:
        Vocabulary.acquire(tokenizer, CancelToken("the test"))
    assert caught.value.extra == "structured"


def test_reading_what_is_asked_for_loads_no_library(fresh_process: Any) -> None:
    said = fresh_process(
        """
        import sys
        from ebbtide.models.structured import Form
        Form.of(["yes", "no"]), Form.of({"type": "object"})
        print("llguidance" in sys.modules)
        """
    )
    assert said.strip() == "False"


# What is asked for


class Rock:
    """As pydantic's models are used."""

    def __init__(self, value: Any) -> None:
        self.value = value

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return SCHEMA

    @classmethod
    def model_validate_json(cls, text: str) -> Rock:
        value = json.loads(text)
        if value["size"] > 100:
            raise ValueError("too large")
        return cls(value)


class Adapter:
    """As pydantic's `TypeAdapter` is used."""

    def json_schema(self) -> dict[str, Any]:
        return {"type": "array", "items": {"type": "integer"}}

    def validate_json(self, text: str) -> set[int]:
        return set(json.loads(text))


@pytest.mark.parametrize(
    ("spec", "kind", "value"),
    [
        (["a", "b"], "choices", ("a", "b")),
        (("a",), "choices", ("a",)),
        ({"choices": ["a"]}, "choices", ("a",)),
        (re.compile("a+"), "regex", "a+"),
        (re.compile("a.", re.IGNORECASE | re.DOTALL), "regex", "(?is:a.)"),
        ({"regex": "a+"}, "regex", "a+"),
        ({"regex": re.compile("a+")}, "regex", "a+"),
        ({"grammar": 'start: "a"'}, "grammar", 'start: "a"'),
        (SCHEMA, "json_schema", SCHEMA),
        ({"enum": [1, 2]}, "json_schema", {"enum": [1, 2]}),
        ({"json_schema": SCHEMA}, "json_schema", SCHEMA),
        ({"json_schema": json.dumps(SCHEMA)}, "json_schema", SCHEMA),
        ({"json_schema": {}}, "json_schema", {}),
        (Rock, "json_schema", SCHEMA),
        ({"json_schema": Rock}, "json_schema", SCHEMA),
        (Adapter(), "json_schema", {"type": "array", "items": {"type": "integer"}}),
        ({"type": "json_object"}, "json_schema", {"type": "object"}),
        (
            {"type": "json_schema", "json_schema": {"name": "rock", "schema": SCHEMA}},
            "json_schema",
            SCHEMA,
        ),
    ],
)
def test_each_way_to_ask_is_read(spec: object, kind: str, value: Any) -> None:
    form = Form.of(spec)
    assert (form.kind, form.value) == (kind, value)
    assert Form.of(form) is form


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"regx": "a"}, "unknown key 'regx'. Did you mean 'regex'?"),
        ({"json": {}}, "unknown key 'json'. Did you mean 'json_schema'?"),
        ({"choice": ["a"]}, "unknown key 'choice'. Did you mean 'choices'?"),
        ({"qqqq": 1}, "nothing is known by these keys: 'qqqq'"),
        ({}, "nothing is known by these keys: none"),
        ({"regex": "a", "choices": ["a"]}, "'regex' comes alone, and not with 'choices'"),
        ({"regex": "a", "type": "object"}, "'regex' comes alone, and not with 'type'"),
        ("a+", "structured takes no str. Pass a pydantic model"),
        (b"a", "structured takes no bytes"),
        (None, "structured takes no NoneType"),
        ([], "a list of one or more texts"),
        (["a", 1], "a list of one or more texts"),
        (["a", ""], "a list of one or more texts"),
        ({"choices": "abc"}, "a list of one or more texts"),
        ({"regex": ""}, "a regular expression is a text that is not empty"),
        ({"grammar": 5}, "a grammar is a text that is not empty, not int"),
        ({"json_schema": "{"}, "the JSON schema is no JSON: Expecting"),
        ({"json_schema": 5}, "a JSON schema is a mapping"),
        ({"json_schema": {"enum": [{1}]}}, "cannot be written as JSON"),
        ({"json_schema": {"const": float("nan")}}, "cannot be written as JSON"),
        ({"type": "json_schema"}, "needs {'json_schema': {'schema': ...}}"),
        (re.compile(b"a"), "of text, not of bytes"),
        (["\ud800"], "'\\ud800' is no valid Unicode"),
        ({"regex": "\ud800"}, "'\\ud800' is no valid Unicode"),
        ({"grammar": "\ud800"}, "'\\ud800' is no valid Unicode"),
        (re.compile("a # b", re.VERBOSE), "flags re.I and re.S alone, not re.VERBOSE"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_with_what_can(spec: object, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Form.of(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"type": "objct"}, "JSON schema cannot be used: at #: Invalid type: objct."),
        (
            {"properties": {"a": {"items": {"type": "string", "format": "nope"}}}},
            "at #/properties/a/items: Unknown format: nope.",
        ),
        (
            {"$defs": {"P": {"items": {"uniqueItems": True}}}, "$ref": "#/$defs/P"},
            "at #/$defs/P/items: Unimplemented keys",
        ),
        (
            {"anyOf": [{"type": "null"}, {"type": "string", "minLength": 5, "maxLength": 2}]},
            "",
        ),
        ({"$ref": "#/$defs/x"}, "at #: Pointer '/$defs/x' does not exist."),
        (
            {"type": "integer", "minimum": 3, "maximum": 1},
            "Unsatisfiable schema: minimum (3) is greater than maximum (1).",
        ),
        ({"regex": "abc(a"}, "expression cannot be used: at character 4: unclosed group."),
        ({"regex": "a(?=b)"}, "at character 2: look-around"),
        ({"regex": r"(a)\1"}, "at character 4: backreferences are not supported."),
        ({"regex": r"[^\s\S]"}, "no text of this model's tokens has the form"),
        ({"grammar": "start: foo"}, 'at line 1, column 8: unknown name: "foo".'),
        ({"grammar": 'start: "a"\nb: )'}, "at line 2, column 4: expecting rule"),
        ({"grammar": 'x: "a"'}, "grammar cannot be used: no start rule found."),
    ],
)
def test_what_is_wrong_is_said_with_where(
    spec: object, message: str, vocabulary: Vocabulary
) -> None:
    if not message:  # one of several ways is enough
        assert Structure.of(spec, vocabulary).parse("null") is None
        return
    with pytest.raises(InputError, match=re.escape(message)):
        Structure.of(spec, vocabulary)


# What a text says


def test_a_text_is_given_as_what_was_asked_for(vocabulary: Vocabulary) -> None:
    text = '{"name": "a", "size": 7, "kind": null}'
    value = {"name": "a", "size": 7, "kind": None}
    assert Structure.of(SCHEMA, vocabulary).parse(text) == value
    rock = Structure.of(Rock, vocabulary).parse(text)
    assert isinstance(rock, Rock)
    assert rock.value == value
    assert Structure.of(Adapter(), vocabulary).parse("[1, 2, 1]") == {1, 2}
    assert Structure.of(["ebb", "flood"], vocabulary).parse("ebb") == "ebb"
    assert Structure.of({"regex": "[0-9]+x"}, vocabulary).parse("12x") == "12x"
    assert Structure.of({"grammar": 'start: "a" "b"'}, vocabulary).parse("ab") == "ab"


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (SCHEMA, '{"name": "a", "si'),
        (SCHEMA, ""),
        (Rock, '{"name": "a", "size": 7'),
        (Rock, '{"name": "a", "size": 101, "kind": null}'),
        (["ebb", "flood"], "eb"),
        ({"regex": "[0-9]+x"}, "12"),
        ({"regex": "[0-9]+x"}, "12xx"),
        ({"grammar": 'start: "a" "b"'}, "a"),
    ],
)
def test_a_text_that_is_not_finished_says_nothing(
    spec: object, text: str, vocabulary: Vocabulary
) -> None:
    assert Structure.of(spec, vocabulary).parse(text) is None


def test_json_goes_on_with_spaces_for_no_longer_than_an_indent(vocabulary: Vocabulary) -> None:
    structure = Structure.of(SCHEMA, vocabulary)
    (line,), (space,) = vocabulary.greedy("\n"), vocabulary.greedy(" ")
    begun = vocabulary.greedy("{")
    some = [*begun, line, *[space] * 15]
    assert space in allowed(processed(structure, some))
    assert space not in allowed(processed(structure, [*some, space]))
    assert line not in allowed(processed(structure, [*begun, line]))
    assert space not in allowed(processed(structure, [*begun, space]))


# Memory

LARGE = """
import json, random
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
random.seed(0)
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
words = {"".join(random.choices("abcdefghijklmnop", k=random.randint(3, 9))) for _ in range(40000)}
vocabulary = {one: number for number, one in enumerate([*letters, *sorted(words)])}
native = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
native.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
native.decoder = decoders.ByteLevel()
folder.mkdir()
native.save(str(folder / "tokenizer.json"))
del native, vocabulary, words
"""


def test_what_a_vocabulary_takes_comes_back_when_it_is_released(
    fresh_process: Any, tmp_path: Path
) -> None:
    said = fresh_process(
        f"""
import numpy as np
from pathlib import Path
folder = Path({str(tmp_path / "large")!r})
{LARGE}
from ebbtide.cancellation import CancelToken
from ebbtide.hub import ModelFiles
from ebbtide.memory import anonymous_bytes, reclaim
from ebbtide.models.config import ModelConfig
from ebbtide.models.structured import Structure, Vocabulary
from ebbtide.models.tokenizer import Tokenizer

(folder / "config.json").write_text("{{}}")
files = ModelFiles(name="large", folder=folder)
tokenizer = Tokenizer.load(files, ModelConfig.read(files), CancelToken("the test"))

def anonymous():
    reclaim()
    return anonymous_bytes()

def use(lease):
    structure = Structure.of({{"type": "object"}}, lease.value)
    rows = structure.begin(prompt_length=0, eos=[0])
    generator = np.random.default_rng(0)
    ids = np.zeros((1, 0), np.int64)
    for _ in range(60):
        found = rows(ids, generator.standard_normal((1, structure.size)).astype(np.float32))
        ids = np.append(ids, found.argmax(axis=1)[None], axis=1)

def cycle():
    before = anonymous()
    lease = Vocabulary.acquire(tokenizer, CancelToken("the test"))
    use(lease)
    held = anonymous()
    left = lease.release()
    assert not left, left
    del lease
    return held - before, anonymous() - before

cycle()
for _ in range(4):
    print(*cycle())
"""
    )
    for line in said.strip().splitlines():
        held, left = map(int, line.split())
        assert held > 3_000_000
        assert left < 500_000, said


def test_dropping_what_was_compiled_leaves_no_cycle(vocabulary: Vocabulary) -> None:
    import gc
    import weakref

    structure = Structure.of(SCHEMA, vocabulary)
    rows = structure.begin(prompt_length=0, eos=[END])
    rows(np.zeros((1, 0), np.int64), np.zeros((1, structure.size), np.float32))
    there = [weakref.ref(structure), weakref.ref(rows)]
    gc.disable()
    try:
        del structure, rows
        assert [one() for one in there] == [None, None]
    finally:
        gc.enable()


def test_matchers_of_two_steps_at_most_are_kept(vocabulary: Vocabulary) -> None:
    structure = Structure.of({"regex": "a{1,200}"}, vocabulary)
    rows = structure.begin(prompt_length=0, eos=[END])
    ids = np.zeros((4, 0), np.int64)
    (letter,) = vocabulary.greedy("a")
    counts = []
    for _ in range(20):
        rows(ids, np.zeros((4, structure.size), np.float32))
        counts.append(len(rows._now) + len(rows._before))
        ids = np.append(ids, np.full((4, 1), letter), axis=1)
    assert max(counts) <= 8
    assert all(one == other for one, other in pairwise(counts[2:]))
