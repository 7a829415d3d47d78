"""The understanding tasks against two oracles: transformers in torch, and Transformers.js.

tools/make_tasks.py makes the models, and writes down what the oracles answer. Where the two
differ, Ebbtide follows transformers.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import shutil
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers

import ebbtide

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "models"
GOLDENS = ROOT / "goldens" / "tasks"

NEAR = 1e-4
"""How far a score may be off."""
TIE = 2e-4
"""Scores that are nearer to each other than this may come in any order."""

# What is known

SEPARATORS = (
    "xlm/span-best_three", "xlm/span-batch", "xlm/span-special", "xlm/span-special_tokens",
    "xlm/span-impossible", "xlm/span-tokens", "xlm/span-short_answers", "xlm/span-one_token",
    "xlm/span-windows*", "xlm/span-tiny_context",
)  # fmt: skip
"""Where transformers takes separators for answers: XLM's are its `cls_token` too."""

DIFFERENCES: Mapping[str, str] = {
    "*/value-*": "takes the softmax of a single score, which is 1",
    "*/rank-*": "takes the softmax of a single score, which is 1",
    "*-truncated": "cuts off the closing special token with what is too much",
    "*/span-windows": "reads one window of a context",
    "xlm/span-*": "keeps the separators out of the softmax",
    "*/nli-commas": "takes a text with commas for one label",
    "*/token-simple_ignored": "leaves ignored labels out before it joins neighbours",
    "albert/*-special_blanks": "makes one space of blanks, none at the ends: `remove_space`",
    "albert/*-special_odd": "makes one space of blanks, none at the ends: `remove_space`",
    "albert/span-special": "makes one space of blanks, none at the ends: `remove_space`",
}
"""Where Transformers.js does something else than transformers, and its answers are not compared.

Less than the whole answer is compared where it
  - leaves out tokens that decode to nothing, such as unknown ones (token-classification);
  - gives words as they decode, and no places (token-classification, question-answering);
  - fills in the first mask only, and drops the others from the text (fill-mask);
  - gives spans of tokens, of any length, and takes unknown tokens for special (question-answering);
and texts that do not fit into a window are not compared at all.
"""

PADDED = ("mobilebert/*", "bert/tail")
"""Models whose answers depend on how much padding there is, so on the batch: the oracles' is ours.

MobileBERT looks at a token's neighbours, the first of the padding too; the other has its padding
before the text, and no positions to leave it out.
"""

REFUSED: Mapping[str, frozenset[str]] = {
    "text-classification": frozenset(
        {"data2vec-text", "ernie", "megatron-bert", "rembert", "roberta-prelayernorm"}
    ),
    "token-classification": frozenset(
        {
            "albert", "data2vec-text", "ernie", "megatron-bert", "mobilebert", "rembert",
            "roberta-prelayernorm", "squeezebert",
        }
    ),
    "question-answering": frozenset(
        {"data2vec-text", "ernie", "megatron-bert", "modernbert", "rembert", "roberta-prelayernorm"}
    ),
    "fill-mask": frozenset(
        {"data2vec-text", "ernie", "megatron-bert", "rembert", "roberta-prelayernorm"}
    ),
}  # fmt: skip
"""The types that Transformers.js does not do a task for."""

# The goldens


def read(name: str) -> Any:
    return json.loads((GOLDENS / f"{name}.json").read_text(encoding="utf-8"))


def unpacked(value: Any) -> Any:
    """Tables as lists of records again."""
    if isinstance(value, dict):
        if value.keys() == {"columns", "rows"}:
            names = value["columns"]
            return [dict(zip(names, map(unpacked, row), strict=True)) for row in value["rows"]]
        return {key: unpacked(one) for key, one in value.items()}
    return [unpacked(one) for one in value] if isinstance(value, list) else value


TYPES = sorted(path.stem for path in GOLDENS.glob("*.json") if path.stem != "cases")
GOLDEN: dict[str, dict[str, Any]] = {
    f"{kind}/{head}": golden for kind in TYPES for head, golden in read(kind)["models"].items()
}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    texts: {task: {case["name"]: case for case in cases} for task, cases in tasks.items()}
    for texts, tasks in read("cases").items()
}


def case_of(model: str, name: str) -> dict[str, Any]:
    golden = GOLDEN[model]
    return CASES[golden["texts"]][golden["task"]][name]


def inputs_of(model: str, name: str) -> list[Any]:
    """A case's inputs, with the model's own mask token."""
    return filled(case_of(model, name)["inputs"], mask_token(model))


def filled(value: Any, mask: str) -> Any:
    if isinstance(value, str):
        return value.replace("{mask}", mask)
    return [filled(one, mask) for one in value] if isinstance(value, list) else value


@functools.cache
def mask_token(model: str) -> str:
    path = MODELS / model / "tokenizer_config.json"
    return str(json.loads(path.read_text(encoding="utf-8"))["mask_token"])


def known(model: str, name: str, table: Sequence[str] | Mapping[str, str]) -> str | None:
    """The pattern of a table that a case falls under."""
    found = (pattern for pattern in table if fnmatch.fnmatch(f"{model}-{name}", pattern))
    return next(found, None)


# Ebbtide's answers


@functools.cache
def answers(model: str) -> Mapping[str, Any]:
    """What Ebbtide answers to every case of a model, loaded once; an error where it raises one.

    The spans that Transformers.js gives come under ``raw-`` and the name of the case.
    """
    golden = GOLDEN[model]
    task = "text-classification" if golden["task"] == "rank" else golden["task"]
    found: dict[str, Any] = {}
    with ebbtide.pipeline(task, MODELS / model) as pipe:
        for name in golden["transformers"]:
            case, inputs = case_of(model, name), inputs_of(model, name)
            method = getattr(pipe, case["method"]) if "method" in case else pipe
            calls = {name: (method, case["options"])}
            if task == "question-answering" and name in golden.get("transformers_js", {}):
                calls[f"raw-{name}"] = pipe, {"align_to_words": False, "max_answer_len": 1000}
            for key, (call, options) in calls.items():
                if any(fnmatch.fnmatch(model, pattern) for pattern in PADDED):
                    options = {**options, "batch_size": 32}
                try:
                    found[key] = call(*inputs, **options)
                except ebbtide.EbbtideError as error:
                    found[key] = error
    return found


def answer(model: str, name: str) -> Any:
    found = answers(model)[name]
    if isinstance(found, Exception):
        raise found
    return found


# Comparing


def agree(found: Any, expected: Any, *, ranked: bool) -> None:
    """Check one answer against another.

    Args:
        found: Ebbtide's.
        expected: An oracle's.
        ranked: Whether a list of records is in the order of their scores.
    """
    if isinstance(expected, dict) and "labels" in expected:
        assert found["sequence"] == expected["sequence"]
        assert found.keys() == expected.keys()
        agree_ranked(labelled(found), labelled(expected))
    elif isinstance(expected, dict):
        assert identity(found) == identity(expected)
        assert found["score"] == pytest.approx(expected["score"], abs=NEAR, rel=0)
    elif ranked and expected and isinstance(expected[0], dict):
        agree_ranked(found, expected)
    else:
        assert len(found) == len(expected), (found, expected)
        for one, other in zip(found, expected, strict=True):
            agree(one, other, ranked=ranked)


def labelled(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    pairs = zip(result["labels"], result["scores"], strict=True)
    return [{"label": label, "score": score} for label, score in pairs]


def identity(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without its score."""
    return {key: value for key, value in record.items() if key != "score"}


def agree_ranked(found: Sequence[Any], expected: Sequence[Any]) -> None:
    """The same records in the same order, but for those whose scores tie."""
    scores = [one["score"] for one in expected]
    assert [one["score"] for one in found] == pytest.approx(scores, abs=NEAR, rel=0)
    for place, one in enumerate(found):
        if identity(one) != identity(expected[place]):
            tied = [other for other in expected if abs(other["score"] - one["score"]) < TIE]
            # One that ties with the last may have been left out.
            left_out = abs(scores[-1] - one["score"]) < TIE
            assert left_out or identity(one) in map(identity, tied), (found, expected)


def in_order(model: str, name: str) -> bool:
    """Whether a list of records that a case gives is one an input, or in the order of a text."""
    one_each = isinstance(case_of(model, name)["inputs"][0], list)
    best = case_of(model, name)["options"].get("top_k", 1) == 1
    task = GOLDEN[model]["task"]
    return task == "token-classification" or (one_each and best and task != "fill-mask")


def check_transformers(found: Any, model: str, name: str) -> None:
    expected = unpacked(GOLDEN[model]["transformers"][name])
    agree(found, expected, ranked=not in_order(model, name))


# transformers


def transformers_cases() -> Iterator[Any]:
    for model, golden in GOLDEN.items():
        for name in golden["transformers"]:
            if not known(model, name, SEPARATORS):
                yield pytest.param(model, name, id=f"{model}-{name}")


@pytest.mark.parametrize(("model", "name"), list(transformers_cases()))
def test_an_answer_is_that_of_transformers(model: str, name: str) -> None:
    check_transformers(answer(model, name), model, name)


@pytest.mark.parametrize(
    "name",
    [one for one in GOLDEN["xlm/span"]["transformers"] if known("xlm/span", one, SEPARATORS)],
)
def test_a_separator_is_no_answer_as_it_is_to_transformers(name: str) -> None:
    with pytest.raises(AssertionError):
        check_transformers(answer("xlm/span", name), "xlm/span", name)
    found = list(records(answer("xlm/span", name)))
    assert found
    assert all(one["answer"] and one["end"] > one["start"] for one in found)
    assert all(0 < one["score"] <= 1 for one in found)


def records(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield value
    else:
        for one in value:
            yield from records(one)


def test_there_are_goldens_for_many_types_and_every_task() -> None:
    types_of: dict[str, set[str]] = {}
    for model, golden in GOLDEN.items():
        assert len(golden["transformers"]) >= 2
        types_of.setdefault(golden["task"], set()).add(model.partition("/")[0])
    assert types_of.keys() == CASES["prose"].keys()
    for task in ("text-classification", "token-classification", "question-answering", "fill-mask"):
        assert len(types_of[task]) >= 18


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("bert/mask", "several_masks"),
        ("roberta/mask", "single"),
        ("bert/token", "special_emoji"),
        ("bert/span", "impossible"),
        ("roberta/span", "impossible"),
    ],
)
def test_special_tokens_that_no_settings_name_are_those_of_the_type(
    model: str, name: str, tmp_path: Path
) -> None:
    """Many repositories have no more than this in their settings, as those of the first models."""
    folder = shutil.copytree(MODELS / model, tmp_path / "model")
    (folder / "special_tokens_map.json").unlink()
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    kept = {"model_max_length", "clean_up_tokenization_spaces"}
    path.write_text(json.dumps({key: settings[key] for key in kept & settings.keys()}))
    case = case_of(model, name)
    with ebbtide.pipeline(GOLDEN[model]["task"], folder) as pipe:
        found = pipe(*inputs_of(model, name), **case["options"])
    check_transformers(found, model, name)


# Transformers.js


def javascript_cases() -> Iterator[Any]:
    for model, golden in GOLDEN.items():
        for name in golden.get("transformers_js", {}):
            if name != "*" and not known(model, name, DIFFERENCES):
                yield pytest.param(model, name, id=f"{model}-{name}")


@pytest.mark.parametrize(("model", "name"), list(javascript_cases()))
def test_an_answer_is_that_of_transformers_js_where_both_do_the_same(model: str, name: str) -> None:
    compare = {
        "text-classification": compare_labels,
        "token-classification": compare_tokens,
        "question-answering": compare_spans,
        "fill-mask": compare_fillings,
        "zero-shot-classification": compare_hypotheses,
    }[GOLDEN[model]["task"]]
    task = GOLDEN[model]["task"]
    found = answer(model, f"raw-{name}" if task == "question-answering" else name)
    expected = unpacked(GOLDEN[model]["transformers_js"][name])
    given = inputs_of(model, name)
    if not isinstance(given[0], list):
        found, expected, given = [found], [expected], [[given[0]], *given[1:]]
    for one, other, text in zip(found, expected, given[0], strict=True):
        compare(model, name, one, other, text)


@functools.cache
def native(model: str) -> Any:
    """The bare tokenizer of a model."""
    return tokenizers.Tokenizer.from_file(str(MODELS / model / "tokenizer.json"))


def fits(model: str, *texts: str) -> bool:
    return len(native(model).encode(*texts)) <= GOLDEN[model]["window"]


def unknown(model: str, text: str) -> bool:
    """Whether a text has tokens that are not in the vocabulary."""
    ids = {native(model).token_to_id(token) for token in ("[UNK]", "<unk>")}
    return not ids.isdisjoint(native(model).encode(text).ids)


def letters(text: str) -> str:
    """What two spellings of one text have in common."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    return "".join(character for character in plain if character.isalnum())


def compare_labels(model: str, _name: str, found: Any, expected: Any, text: str) -> None:
    if fits(model, text):
        agree(found, expected, ranked=True)


def compare_tokens(model: str, _name: str, found: Any, expected: Any, text: str) -> None:
    if not fits(model, text):
        return
    encoding = native(model).encode(text)
    spelled = [native(model).decode([token]) for token in encoding.ids]
    if found and "entity_group" in found[0]:
        # Without tokens that decode to nothing, other neighbours are joined.
        if all(spelled[1:-1]):
            groups = [(one["entity_group"], letters(one["word"])) for one in found]
            assert groups == [(one["entity_group"], letters(one["word"])) for one in expected]
            scores = [one["score"] for one in expected]
            assert [one["score"] for one in found] == pytest.approx(scores, abs=NEAR, rel=0)
        return
    kept = [one for one in found if spelled[one["index"]]]
    assert [(one["index"], one["entity"]) for one in kept] == [
        (one["index"], one["entity"]) for one in expected
    ]
    scores = [one["score"] for one in expected]
    assert [one["score"] for one in kept] == pytest.approx(scores, abs=NEAR, rel=0)


def compare_spans(model: str, name: str, found: Any, expected: Any, asked: Any) -> None:
    inputs = inputs_of(model, name)
    question, context = (
        (asked["question"], asked["context"]) if isinstance(asked, dict) else (asked, inputs[1])
    )
    if not fits(model, question, context) or unknown(model, context):
        return
    best = expected[0] if isinstance(expected, list) else expected
    assert found["score"] == pytest.approx(best["score"], abs=NEAR, rel=0)
    if "\ufffd" not in best["answer"]:  # half a character
        # The mark of a word's beginning has the place of its first letter, and decodes to a space.
        assert letters(best["answer"]) in letters(found["answer"])
        assert len(letters(found["answer"])) - len(letters(best["answer"])) <= 1


def compare_fillings(model: str, _name: str, found: Any, expected: Any, text: str) -> None:
    if not fits(model, text):
        return
    several = isinstance(found[0], list)
    first = found[0] if several else found
    for one, other in zip(first, expected, strict=True):
        assert one["token"] == other["token"]
        assert one["token_str"].strip() == other["token_str"].strip()
        assert one["score"] == pytest.approx(other["score"], abs=NEAR, rel=0)
        if not several:
            assert one["sequence"].replace(" ", "") == other["sequence"].replace(" ", "")


def compare_hypotheses(model: str, name: str, found: Any, expected: Any, text: str) -> None:
    case = case_of(model, name)
    template = case["options"].get("hypothesis_template", "This example is {}.")
    if all(fits(model, text, template.format(label)) for label in case["inputs"][1]):
        agree(found, expected, ranked=True)


@pytest.mark.parametrize("pattern", DIFFERENCES)
def test_a_known_difference_between_the_oracles_is_one(pattern: str) -> None:
    differing = 0
    for model, golden in GOLDEN.items():
        for name, answered in golden.get("transformers_js", {}).items():
            if name != "*" and known(model, name, [pattern]):
                try:
                    check_transformers(unpacked(answered), model, name)
                except (AssertionError, KeyError):
                    differing += 1
    assert differing


def test_the_types_that_transformers_js_refuses_are_those_listed() -> None:
    refused: dict[str, set[str]] = {}
    for model, golden in GOLDEN.items():
        if "*" in golden.get("transformers_js", {}):
            refused.setdefault(golden["task"], set()).add(model.partition("/")[0])
    assert refused == REFUSED
