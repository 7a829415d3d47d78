"""What each model type writes is what transformers writes on the same weights, to the token.

The goldens are made by ``tools/make_generators.py``, which says how.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ebbtide

GOLDENS = Path(__file__).parent.parent / "goldens" / "generation"
MODELS = Path(__file__).parent.parent / "models"
TYPES = sorted(
    path.stem for path in GOLDENS.glob("*.json") if (MODELS / f"gen-{path.stem}").is_dir()
)


@cache
def golden(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDENS / f"{kind}.json").read_text())
    return found


def is_causal(kind: str) -> bool:
    return bool(golden(kind)["kind"] == "causal")


def load(kind: str) -> Any:
    folder = MODELS / f"gen-{kind}"
    if not is_causal(kind):
        return ebbtide.pipeline("text2text-generation", folder)
    merged = (folder / "onnx" / "decoder_model_merged.onnx").exists()
    name = "decoder_model_merged" if merged else None
    return ebbtide.pipeline("text-generation", folder, model_file_name=name)


def options_of(case: dict[str, Any]) -> dict[str, Any]:
    options = dict(case["options"])
    if "sequence_bias" in options:
        options["sequence_bias"] = [(tuple(ids), bias) for ids, bias in options["sequence_bias"]]
    return options


def written(pipe: Any, case: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    prompts = case["prompts"]
    if pipe.task == "text-generation":
        options["return_full_text"] = False
    found = pipe(prompts if len(prompts) > 1 else prompts[0], details=True, **options)
    return [row for one in found for row in (one if isinstance(one, list) else [one])]


def assert_equal(rows: list[dict[str, Any]], case: dict[str, Any]) -> None:
    assert len(rows) == len(case["ids"])
    for row, expected in zip(rows, case["ids"], strict=True):
        ids = row["token_ids"]
        assert ids == expected[: len(ids)], "another token"
        assert len(set(expected[len(ids) :])) <= 1, "it ended before its time"
    if "scores" in case and "score" in rows[0]:
        np.testing.assert_allclose([row["score"] for row in rows], case["scores"], atol=1e-4)


@pytest.mark.parametrize("kind", TYPES)
def test_every_case_is_written_to_the_token(kind: str) -> None:
    with load(kind) as pipe:
        for case in golden(kind)["cases"]:
            if "language" not in case:
                assert_equal(written(pipe, case, **options_of(case)), case)


@pytest.mark.parametrize("kind", TYPES)
def test_without_a_cache_the_same_is_written(kind: str) -> None:
    with load(kind) as pipe:
        for case in golden(kind)["cases"]:
            if case["name"] in ("single-1", "batch"):
                rows = written(pipe, case, **{**options_of(case), "use_cache": False})
                assert_equal(rows, case)


STATES = {"lfm2", "granitemoehybrid"}
"""Types with states that cannot be taken back: see tests/pipelines/test_text_generation.py."""


@pytest.mark.parametrize("kind", [kind for kind in TYPES if is_causal(kind) and kind not in STATES])
def test_guesses_from_the_prompt_change_nothing(kind: str) -> None:
    with load(kind) as pipe:
        for case in golden(kind)["cases"]:
            if case["name"].startswith(("single", "ends")):
                options = {**options_of(case), "prompt_lookup_num_tokens": 4}
                assert_equal(written(pipe, case, **options), case)
