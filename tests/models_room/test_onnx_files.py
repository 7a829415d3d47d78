"""Which file a dtype, a device and a config lead to, and what is said where there is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import ebbtide
from ebbtide.hub import ModelFiles
from ebbtide.models.config import ModelConfig
from ebbtide.models.onnx_files import choose
from ebbtide.runtime import dtypes

MODELS = Path(__file__).parent.parent / "models"

SUFFIXES = {
    "fp32": "model",
    "fp16": "model_fp16",
    "q8": "model_quantized",
    "int8": "model_int8",
    "uint8": "model_uint8",
    "q4": "model_q4",
    "q4f16": "model_q4f16",
    "q2": "model_q2",
    "q2f16": "model_q2f16",
    "q1": "model_q1",
    "q1f16": "model_q1f16",
    "bnb4": "model_bnb4",
}


def model(folder: Path, *names: str, config: dict[str, Any] | None = None) -> ModelFiles:
    """A folder with empty files of these names: choosing reads none of them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **(config or {})}))
    return ModelFiles(name="a/model", folder=folder)


def chosen(files: ModelFiles, stem: str = "model", **options: Any) -> tuple[str, str]:
    options = {"dtype": None, "device": "cpu", "subfolder": "onnx", **options}
    found = choose(files, ModelConfig.read(files), stem, **options)
    return found.name, found.dtype


@pytest.mark.parametrize(("dtype", "name"), SUFFIXES.items())
def test_each_dtype_has_its_suffix(tmp_path: Path, dtype: str, name: str) -> None:
    files = model(tmp_path, *(f"onnx/{one}.onnx" for one in SUFFIXES.values()))
    assert chosen(files, dtype=dtype) == (f"onnx/{name}.onnx", dtype)
    assert set(dtypes.SUFFIXES) == set(SUFFIXES)


@pytest.mark.parametrize("dtype", [None, "auto"])
def test_without_a_dtype_the_exact_file_comes_first(tmp_path: Path, dtype: str | None) -> None:
    files = model(tmp_path, *(f"onnx/{one}.onnx" for one in SUFFIXES.values()))
    assert chosen(files, dtype=dtype) == ("onnx/model.onnx", "fp32")


@pytest.mark.parametrize("device", ["cpu", "cuda", "dml", "coreml", "auto"])
def test_auto_goes_down_the_devices_order_and_misses_no_dtype(tmp_path: Path, device: str) -> None:
    order = dtypes.auto_order(device)
    assert sorted(order) == sorted(SUFFIXES)
    files = model(tmp_path, *(f"onnx/{one}.onnx" for one in SUFFIXES.values()))
    for dtype in order:
        assert chosen(files, device=device) == (f"onnx/{SUFFIXES[dtype]}.onnx", dtype)
        (tmp_path / "onnx" / f"{SUFFIXES[dtype]}.onnx").unlink()
    with pytest.raises(ebbtide.ModelNotFoundError, match="no ONNX file at all"):
        chosen(files, device=device)


def test_a_cpu_prefers_eight_bits_and_a_gpu_half_floats(tmp_path: Path) -> None:
    files = model(tmp_path, "onnx/model_fp16.onnx", "onnx/model_quantized.onnx")
    assert chosen(files, device="cpu")[1] == "q8"
    assert chosen(files, device="cuda")[1] == "fp16"


def test_the_config_names_a_dtype_where_the_caller_does_not(tmp_path: Path) -> None:
    config = {"transformers.js_config": {"dtype": "q4"}}
    files = model(tmp_path, "onnx/model.onnx", "onnx/model_q4.onnx", config=config)
    assert chosen(files) == ("onnx/model_q4.onnx", "q4")
    assert chosen(files, dtype="auto") == ("onnx/model_q4.onnx", "q4")
    assert chosen(files, dtype="fp32") == ("onnx/model.onnx", "fp32")


def test_the_configs_dtype_may_be_a_map_by_file(tmp_path: Path) -> None:
    config = {"transformers.js_config": {"dtype": {"encoder": "q4"}}}
    names = ("onnx/model.onnx", "onnx/encoder.onnx", "onnx/encoder_q4.onnx")
    files = model(tmp_path, *names, config=config)
    assert chosen(files, "encoder") == ("onnx/encoder_q4.onnx", "q4")
    assert chosen(files, "model") == ("onnx/model.onnx", "fp32")


def test_a_hint_that_is_no_map_is_passed_over(tmp_path: Path) -> None:
    files = model(tmp_path, "onnx/model.onnx", config={"transformers.js_config": ["q8"]})
    assert chosen(files)[1] == "fp32"


def test_a_map_by_file_is_followed_and_must_name_the_file(tmp_path: Path) -> None:
    files = model(tmp_path, "onnx/model.onnx", "onnx/model_int8.onnx")
    assert chosen(files, dtype={"model": "int8", "decoder": "q4"})[1] == "int8"
    with pytest.raises(ebbtide.InputError, match="none for 'model': it has decoder, encoder"):
        chosen(files, dtype={"decoder": "q4", "encoder": "q4"})


def test_a_dtype_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    files = model(tmp_path, "onnx/model.onnx", "onnx/model_q4.onnx", "model_bnb4.onnx")
    with pytest.raises(ebbtide.ModelNotFoundError) as caught:
        chosen(files, dtype="q8")
    assert "It has these dtypes: fp32, q4, bnb4; pass one as dtype=." in str(caught.value)
    assert caught.value.missing == ("onnx/model_quantized.onnx", "model_quantized.onnx")
    assert caught.value.model == "a/model"


def test_files_of_another_name_are_named(tmp_path: Path) -> None:
    files = model(tmp_path, "onnx/encoder.onnx", "other/model.onnx")
    with pytest.raises(ebbtide.ModelNotFoundError) as caught:
        chosen(files)
    assert "onnx/encoder.onnx, other/model.onnx" in str(caught.value)
    assert "model_file_name=" in str(caught.value)
    assert "subfolder=" in str(caught.value)


def test_the_subfolder_is_looked_in_before_the_models_own_folder(tmp_path: Path) -> None:
    files = model(tmp_path, "onnx/model.onnx", "model.onnx", "gpu/model.onnx")
    assert chosen(files)[0] == "onnx/model.onnx"
    assert chosen(files, subfolder="gpu")[0] == "gpu/model.onnx"
    assert chosen(files, subfolder="")[0] == "model.onnx"
    assert chosen(files, subfolder="nowhere")[0] == "model.onnx"


def test_files_elsewhere_are_chosen_too(tmp_path: Path) -> None:
    weights = tmp_path / "weights" / "any-name"
    weights.parent.mkdir()
    weights.touch()
    folder = tmp_path / "model"
    folder.mkdir()
    plain = model(folder)
    files = ModelFiles(
        name=plain.name, folder=folder, elsewhere={"onnx/model_quantized.onnx": weights}
    )
    found = choose(
        files, ModelConfig.read(files), "model", dtype=None, device="cpu", subfolder="onnx"
    )
    assert (files.find(found.name), found.dtype) == (weights, "q8")
    assert files.onnx_names() == ["onnx/model_quantized.onnx"]


# Loaded, and not only chosen


def test_a_model_in_its_own_folder_runs() -> None:
    with ebbtide.pipeline("embeddings", MODELS / "tiny-distilbert") as pipe:
        assert pipe("tide").shape[2:] == (32,)
    with ebbtide.pipeline("embeddings", MODELS / "tiny-distilbert", subfolder="") as pipe:
        assert pipe("tide").shape[2:] == (32,)


def test_a_file_of_another_name_and_folder_runs(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODELS / "tiny-distilbert", folder)
    (folder / "gpu").mkdir()
    (folder / "model.onnx").rename(folder / "gpu" / "encoder_fp16.onnx")
    options: dict[str, Any] = {"model_file_name": "encoder", "subfolder": "gpu"}
    with ebbtide.pipeline("embeddings", folder, **options) as pipe:
        assert pipe.dtype == "fp16"
        assert pipe("tide").shape[2:] == (32,)
    with ebbtide.pipeline("embeddings", folder, dtype={"encoder": "fp16"}, **options) as pipe:
        assert pipe.dtype == "fp16"


# Weights beside the graph


def test_a_model_with_weights_beside_the_graph_runs() -> None:
    with ebbtide.pipeline("embeddings", MODELS / "tiny-external") as pipe:
        assert pipe("tide", pooling="mean").shape == (1, 32)


@pytest.mark.parametrize("declared", [None, True, 1, {"model": True}, {"model.onnx": 1}])
def test_missing_weights_are_named_before_the_load(tmp_path: Path, declared: Any) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODELS / "tiny-external", folder)
    (folder / "onnx" / "model.onnx_data").unlink()
    with pytest.raises(ebbtide.ModelNotFoundError, match=r"model\.onnx_data is missing") as caught:
        ebbtide.pipeline("embeddings", folder, use_external_data_format=declared)
    assert caught.value.missing == ("onnx/model.onnx_data",)


@pytest.mark.parametrize(
    ("declared", "missing"),
    [
        (True, ("model.onnx_data",)),
        (1, ("model.onnx_data",)),
        (2, ("model.onnx_data", "model.onnx_data_1")),
        (3, ("model.onnx_data", "model.onnx_data_1", "model.onnx_data_2")),
        ({"model": 2}, ("model.onnx_data", "model.onnx_data_1")),
        ({"model.onnx": 2, "model": 1}, ("model.onnx_data", "model.onnx_data_1")),
        (False, ()),
        (0, ()),
        ({"model_q4.onnx": True}, ()),
    ],
)
@pytest.mark.parametrize("where", ["option", "config"])
def test_weights_may_lie_in_several_files(
    tmp_path: Path, declared: Any, missing: tuple[str, ...], where: str
) -> None:
    config = {"transformers.js_config": {"use_external_data_format": declared}}
    files = model(tmp_path, "onnx/model.onnx", config=config if where == "config" else None)
    options = {"external_data": declared} if where == "option" else {}
    if missing:
        with pytest.raises(ebbtide.ModelNotFoundError) as caught:
            chosen(files, **options)
        assert caught.value.missing == tuple(f"onnx/{name}" for name in missing)
        for name in missing:
            (tmp_path / "onnx" / name).touch()
    assert chosen(files, **options)[0] == "onnx/model.onnx"


def test_the_callers_word_on_weights_is_above_the_configs(tmp_path: Path) -> None:
    config = {"transformers.js_config": {"use_external_data_format": True}}
    files = model(tmp_path, "onnx/model.onnx", config=config)
    assert chosen(files, external_data=False)[0] == "onnx/model.onnx"


@pytest.mark.parametrize("declared", ["yes", None, ["model"], 1.5, {"model": "yes"}])
def test_a_config_that_says_nonsense_of_the_weights_is_a_typed_error_or_passed_over(
    tmp_path: Path, declared: Any
) -> None:
    config = {"transformers.js_config": {"use_external_data_format": declared}}
    files = model(tmp_path, "onnx/model.onnx", "onnx/model.onnx_data", config=config)
    try:
        outcome = chosen(files)[0]
    except ebbtide.EbbtideError as error:
        outcome = str(error)
    assert outcome == "onnx/model.onnx" or "use_external_data_format" in outcome


# What config.json says of positions


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"n_positions": 1024}, 1024),
        ({"max_position_embeddings": 77, "n_positions": 1024}, 77),
        ({}, None),
        ({"max_position_embeddings": 0}, None),
        ({"max_position_embeddings": -1}, None),
        ({"max_position_embeddings": "512"}, None),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": None}, 512),
        ({"model_type": "xlm-roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "camembert", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "mpnet", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 0}, 513),
    ],
)
def test_the_positions_a_model_can_take(
    tmp_path: Path, config: dict[str, Any], positions: int | None
) -> None:
    assert ModelConfig.read(model(tmp_path, config=config)).positions == positions
