"""What a summary and a translation have of their own reaches the model that writes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import ebbtide
from ebbtide.errors import InputError
from ebbtide.models.seq2seq import Seq2Seq

MODELS = Path(__file__).parent.parent / "models"
TEXT = "The tide goes out."
OF_TASKS = {
    "summarization": {"prefix": "summarize: ", "max_new_tokens": 2},
    "translation_en_to_de": {"prefix": "translate English to German: ", "max_new_tokens": 3},
    "translation_en_to_fr": {"prefix": "translate English to French: ", "max_new_tokens": 4},
}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens of each text that an encoder reads."""
    seen: list[list[int]] = []
    encode = Seq2Seq.encode

    def noted(self: Seq2Seq, batch: Any, token: Any) -> Any:
        mask = batch.attention_mask.astype(bool)
        seen.extend(row[kept].tolist() for row, kept in zip(batch.input_ids, mask, strict=True))
        return encode(self, batch, token)

    monkeypatch.setattr(Seq2Seq, "encode", noted)
    return seen


@pytest.fixture
def t5(tmp_path: Path) -> str:
    """A model whose config says what it was taught for some tasks."""
    folder = tmp_path / "t5"
    shutil.copytree(MODELS / "gen-t5", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"task_specific_params": OF_TASKS}))
    return str(folder)


@pytest.mark.parametrize(
    ("task", "languages", "named"),
    [
        ("summarization", {}, "summarization"),
        ("translation", {}, "translation_en_to_de"),
        ("translation", {"src_lang": "en", "tgt_lang": "fr"}, "translation_en_to_fr"),
    ],
)
def test_a_task_that_the_config_knows_has_its_prefix_and_its_defaults(
    t5: str, read: list[list[int]], task: str, languages: dict[str, str], named: str
) -> None:
    of_task = OF_TASKS[named]
    with ebbtide.pipeline(task, t5, prepare=False) as pipe:
        (found,) = pipe(TEXT, details=True, **languages)
        assert read == [pipe.tokenizer.ids(f"{of_task['prefix']}{TEXT}")]
    assert (len(found["token_ids"]), found["finish_reason"]) == (
        of_task["max_new_tokens"],
        "length",
    )


def test_a_translation_that_the_config_does_not_know_is_refused_with_those_it_does(t5: str) -> None:
    with (
        ebbtide.pipeline("translation", t5, prepare=False) as pipe,
        pytest.raises(InputError, match="it translates en to de, en to fr"),
    ):
        pipe(TEXT, src_lang="fr", tgt_lang="en")


def test_languages_are_told_to_what_reads_and_to_what_writes(read: list[list[int]]) -> None:
    model = str(MODELS / "gen-m2m-100")
    with ebbtide.pipeline("translation", model, prepare=False) as pipe:
        known = {code: pipe.tokenizer.token_id(f"__{code}__") for code in ("de", "fr")}
        (found,) = pipe(TEXT, src_lang="de", tgt_lang="fr", max_new_tokens=2, details=True)
    assert known["de"] in read[0]
    assert known["fr"] not in read[0]
    assert found["token_ids"][0] == known["fr"]
