"""What a sentence-transformers model says of itself is followed, or refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ebbtide
from ebbtide.hub import ModelFiles
from ebbtide.models.sentence import SentenceRecipe, read_recipe

MODELS = Path(__file__).parent.parent / "models"
TEXTS = ["The tide is low this morning.", "", "Boats wait. " * 30]

TRANSFORMER = {
    "idx": 0,
    "name": "0",
    "path": "",
    "type": "sentence_transformers.models.Transformer",
}
POOLING = {"idx": 1, "name": "1", "path": "pool", "type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"idx": 2, "name": "2", "path": "n", "type": "sentence_transformers.models.Normalize"}
DENSE = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}


def sentence_model(
    folder: Path, modules: Any, pooling: Any = None, limit: Any = None
) -> tuple[Path, ModelFiles]:
    """tiny-bert, with these files of sentence-transformers added."""
    shutil.copytree(MODELS / "tiny-bert", folder, ignore=shutil.ignore_patterns("model_*"))
    (folder / "modules.json").write_text(json.dumps(modules))
    if pooling is not None:
        (folder / "pool").mkdir()
        (folder / "pool" / "config.json").write_text(json.dumps(pooling))
    if limit is not None:
        path = folder / "sentence_bert_config.json"
        path.write_text(json.dumps({"max_seq_length": limit}))
    return folder, ModelFiles(name="a/model", folder=folder)


def test_a_model_without_modules_has_no_recipe(tiny_bert: Path) -> None:
    assert read_recipe(ModelFiles(name="tiny", folder=tiny_bert)) is None


def test_the_recipe_of_a_whole_sentence_model_is_read() -> None:
    found = read_recipe(ModelFiles(name="tiny", folder=MODELS / "tiny-bert-st"))
    assert found == SentenceRecipe(("mean",), normalize=True, limit=64)


@pytest.mark.parametrize(
    ("pooling", "calls"),
    [
        ({"pooling_mode_mean_tokens": True}, ["mean"]),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ["cls"]),
        ({"pooling_mode_max_tokens": True}, ["max"]),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, ["mean_sqrt_len"]),
        ({"pooling_mode_weightedmean_tokens": True}, ["weighted_mean"]),
        ({"pooling_mode_lasttoken": True}, ["eos"]),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ["cls", "mean"]),
        (
            {
                "pooling_mode_lasttoken": True,
                "pooling_mode_max_tokens": True,
                "pooling_mode_cls_token": True,
            },
            ["cls", "max", "eos"],
        ),
        ({"pooling_mode": "mean"}, ["mean"]),
        ({"pooling_mode": "cls"}, ["cls"]),
        ({"pooling_mode": "max"}, ["max"]),
        ({"pooling_mode": "lasttoken"}, ["eos"]),
        ({"pooling_mode": "weightedmean"}, ["weighted_mean"]),
        ({"pooling_mode": "mean_sqrt_len_tokens"}, ["mean_sqrt_len"]),
    ],
)
def test_auto_does_the_poolings_that_the_model_names(
    tmp_path: Path, pooling: dict[str, Any], calls: list[Any]
) -> None:
    folder, _ = sentence_model(tmp_path / "model", [TRANSFORMER, POOLING], pooling)
    with ebbtide.pipeline("embeddings", folder) as pipe:
        parts = [pipe(TEXTS, pooling=one) for one in calls]
        found = pipe(TEXTS)
        assert found.shape == (3, 32 * len(calls))
        assert np.array_equal(found, np.concatenate(parts, axis=-1))
        assert np.array_equal(found, pipe(TEXTS, pooling="auto"))


def test_concatenated_poolings_are_normalised_as_one_vector(tmp_path: Path) -> None:
    pooling = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}
    folder, _ = sentence_model(tmp_path / "model", [TRANSFORMER, POOLING, NORMALIZE], pooling)
    with ebbtide.pipeline("embeddings", folder) as pipe:
        np.testing.assert_allclose(np.linalg.norm(pipe(TEXTS), axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("modules", "pooling", "named"),
    [
        ([TRANSFORMER, POOLING, DENSE], {"pooling_mode": "mean"}, "Dense"),
        ([TRANSFORMER, DENSE], None, "Dense"),
        ([TRANSFORMER, {"type": "our.package.Whitening"}], None, "Whitening"),
        ([TRANSFORMER, {"path": "x"}], None, "an unnamed module"),
        ([TRANSFORMER, "Pooling"], None, "an unnamed module"),
        ([TRANSFORMER, POOLING], {}, "pool/config.json"),
        ([TRANSFORMER, POOLING], None, "pool/config.json"),
        ([TRANSFORMER, POOLING], {"pooling_mode_mean_tokens": False}, "pool/config.json"),
        ([TRANSFORMER, POOLING], {"pooling_mode": ["mean"]}, "pool/config.json"),
        ([TRANSFORMER, POOLING], {"pooling_mode": "median"}, "median"),
    ],
)
def test_a_module_that_is_not_applied_refuses_auto_and_leaves_the_rest(
    tmp_path: Path, modules: Any, pooling: Any, named: str
) -> None:
    folder, _ = sentence_model(tmp_path / "model", modules, pooling)
    with ebbtide.pipeline("embeddings", folder) as pipe:
        with pytest.raises(ebbtide.UnsupportedModelError, match=named) as caught:
            pipe("tide")
        assert "Pass pooling=" in str(caught.value)
        assert caught.value.model == str(folder)
        assert pipe("tide", pooling="mean").shape == (1, 32)
        assert pipe("tide", pooling="none").ndim == 3


@pytest.mark.parametrize("content", ["[]", '{"pooling_mode": ', "7"])
def test_a_damaged_pooling_config_is_a_load_error(tmp_path: Path, content: str) -> None:
    folder, _ = sentence_model(tmp_path / "model", [TRANSFORMER, POOLING], {})
    (folder / "pool" / "config.json").write_text(content)
    with pytest.raises(ebbtide.LoadError, match=r"pool.config\.json"):
        ebbtide.pipeline("embeddings", folder)


def test_modules_without_a_pooling_leave_a_vector_a_token(tmp_path: Path) -> None:
    folder, files = sentence_model(tmp_path / "model", [TRANSFORMER, NORMALIZE])
    assert read_recipe(files) == SentenceRecipe(("none",), normalize=True, limit=None)
    with ebbtide.pipeline("embeddings", folder) as pipe:
        assert pipe("tide").ndim == 3


@pytest.mark.parametrize(
    ("limit", "read"), [(8, 8), (512, None), (100_000, None), (0, None), (-1, None), ("8", None)]
)
def test_auto_reads_as_many_tokens_as_the_model_says(
    tmp_path: Path, limit: Any, read: int | None
) -> None:
    pooling = {"pooling_mode": "mean"}
    folder, _ = sentence_model(tmp_path / "model", [TRANSFORMER, POOLING], pooling, limit)
    with ebbtide.pipeline("embeddings", folder) as pipe:
        whole, own = pipe(TEXTS, pooling="mean"), pipe(TEXTS)
        assert np.array_equal(whole, own) == (read is None)
        if read is not None:
            long = pipe.tokenizer.ids(TEXTS[2], limit=read)
            assert len(long) == read
            assert long[-1] == pipe.tokenizer.ids(TEXTS[2])[-1]


def test_a_window_of_one_token_still_gives_a_text_no_more_than_its_ends(tmp_path: Path) -> None:
    folder, _ = sentence_model(
        tmp_path / "model", [TRANSFORMER, POOLING], {"pooling_mode": "mean"}, 1
    )
    with ebbtide.pipeline("embeddings", folder) as pipe:
        assert pipe.tokenizer.ids("", limit=1) == pipe.tokenizer.ids("")
        assert pipe.tokenizer.ids("tide sea", limit=1) == pipe.tokenizer.ids("")
        assert np.array_equal(pipe(""), pipe("", pooling="mean"))
