"""What each model type writes, beside what Transformers.js writes with the same ONNX file.

``tools/make_generators.py`` asked it: the same texts and chats, greedy, the same number of new
tokens, and the special tokens that the tokenizer puts around a text, which its text-generation
leaves out on its own where tokenizer_config.json has no ``add_bos_token``.

Where the two differ, Ebbtide follows `transformers`; the tables below say where, and why.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import ebbtide

GOLDENS = Path(__file__).parent.parent / "goldens" / "generation"
MODELS = Path(__file__).parent.parent / "models"

# What is known

SPACED: Mapping[str, tuple[str, frozenset[str]]] = {
    "longt5": (
        "takes spaces before commas out where tokenizer_config.json has no"
        " clean_up_tokenization_spaces; for transformers that means to leave them",
        frozenset({"single-1", "ends-1"}),
    ),
}
"""Types for which Transformers.js writes the same words with other spaces, why, and the cases."""

WRONG: Mapping[str, str] = {
    "llama-uncached": "feeds the last token alone after the first step, as if there were a cache",
}
"""Types for which Transformers.js writes something else in every case, and why."""

REFUSED: Mapping[str, tuple[str, str]] = {
    "falcon": (
        "takes multi_query in the config for a cache of one joined tensor a layer, as GPTBigCode"
        " has, and leaves the keys and values empty that the graph asks for",
        "Missing the following inputs: past_key_values.0.key",
    ),
    "pegasus": ("does not know the type", "Unsupported model type: pegasus"),
}
"""Types for which Transformers.js writes nothing, why, and what it says."""

GOLDEN: Mapping[str, dict[str, Any]] = {
    path.stem: found
    for path in sorted(GOLDENS.glob("*.json"))
    if "transformers_js" in (found := json.loads(path.read_text(encoding="utf-8")))
}
CASES = {kind: {case["name"]: case for case in golden["cases"]} for kind, golden in GOLDEN.items()}
ANSWERED = [kind for kind, golden in GOLDEN.items() if "text" in golden["transformers_js"]]


def texts(kind: str) -> dict[str, Any]:
    """What Transformers.js writes in each case; a case that fails has why instead of a text."""
    found: dict[str, Any] = GOLDEN[kind]["transformers_js"]["text"]
    return found


def agreed(kind: str) -> list[str]:
    """The cases in which Transformers.js writes what `transformers` does."""
    return [name for name, text in texts(kind).items() if text == CASES[kind][name]["text"][0]]


def written(kind: str, names: list[str]) -> dict[str, str]:
    """What Ebbtide writes in these cases, each a prompt alone."""
    folder = MODELS / f"gen-{kind}"
    shown: dict[str, Any] = {}
    if GOLDEN[kind]["kind"] == "seq2seq":
        pipe: Any = ebbtide.pipeline("text2text-generation", folder)
    else:
        merged = (folder / "onnx" / "decoder_model_merged.onnx").exists()
        name = "decoder_model_merged" if merged else None
        pipe = ebbtide.pipeline("text-generation", folder, model_file_name=name)
        shown["return_full_text"] = False
    with pipe:
        found = {}
        for name in names:
            case = CASES[kind][name]
            (one,) = pipe(case["prompts"][0], **case["options"], **shown)
            found[name] = one["generated_text"]
        return found


def squeezed(some: Mapping[str, str]) -> dict[str, str]:
    """Texts without their spaces."""
    return {name: text.replace(" ", "") for name, text in some.items()}


@pytest.mark.parametrize("kind", [kind for kind in ANSWERED if kind not in WRONG])
def test_a_text_is_that_of_transformers_js_where_that_is_right(kind: str) -> None:
    names = agreed(kind)
    assert names
    assert written(kind, names) == {name: texts(kind)[name] for name in names}


@pytest.mark.parametrize("kind", SPACED)
def test_where_transformers_js_spaces_words_otherwise_the_words_are_the_same(kind: str) -> None:
    _, names = SPACED[kind]
    found = written(kind, sorted(names))
    expected = {name: texts(kind)[name] for name in names}
    assert found != expected
    assert squeezed(found) == squeezed(expected)


@pytest.mark.parametrize("kind", [*WRONG, *REFUSED])
def test_what_transformers_js_cannot_write_is_written_as_transformers_does(kind: str) -> None:
    asked = [name for name in CASES[kind] if name.startswith(("single-", "ends-", "chat-"))]
    names = [name for name in asked if len(CASES[kind][name]["prompts"]) == 1]
    assert written(kind, names) == {name: CASES[kind][name]["text"][0] for name in names}


def test_the_texts_in_which_transformers_js_differs_are_those_listed() -> None:
    apart = {kind: {*texts(kind)} - {*agreed(kind)} for kind in ANSWERED}
    listed = {kind: {*names} for kind, (_, names) in SPACED.items()}
    listed |= {kind: {*texts(kind)} for kind in WRONG}
    assert {kind: names for kind, names in apart.items() if names} == listed


def test_the_types_for_which_transformers_js_writes_nothing_are_those_listed() -> None:
    said = {
        kind: golden["transformers_js"]["error"]
        for kind, golden in GOLDEN.items()
        if "error" in golden["transformers_js"]
    }
    assert said.keys() == REFUSED.keys()
    assert all(message in said[kind] for kind, (_, message) in REFUSED.items())


def test_it_was_asked_both_kinds_of_models_and_chats() -> None:
    assert {GOLDEN[kind]["kind"] for kind in ANSWERED} == {"causal", "seq2seq"}
    assert any("chat-1" in texts(kind) for kind in ANSWERED)
