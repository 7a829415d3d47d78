"""A model that cannot be used fails with a typed error, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ebbtide
from ebbtide.memory.ledger import ledger

TESTS = Path(__file__).parent.parent
GOOD = TESTS / "models" / "tiny-bert"
GRAPHS = TESTS / "runtime" / "data"

Edit = Callable[[Path], object]


def gone(name: str) -> Edit:
    return lambda folder: (folder / name).unlink()


def text(name: str, content: str | bytes) -> Edit:
    content = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(content)


def half(name: str) -> Edit:
    def edit(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return edit


def graph(name: str) -> Edit:
    return lambda folder: shutil.copy(GRAPHS / f"{name}.onnx", folder / "onnx" / "model.onnx")


def hint(key: str, value: Any) -> Edit:
    """A config.json that says something of its own in `transformers.js_config`."""

    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["transformers.js_config"] = {key: value}
        (folder / "config.json").write_text(json.dumps(config))

    return edit


BAD: dict[str, tuple[Edit, type[ebbtide.EbbtideError], tuple[str, ...]]] = {
    "no config": (
        gone("config.json"),
        ebbtide.ModelNotFoundError,
        ("config.json", "Is this a model's folder?"),
    ),
    "no tokenizer": (
        gone("tokenizer.json"),
        ebbtide.ModelNotFoundError,
        ("tokenizer.json", "save_pretrained"),
    ),
    "no graph": (
        gone("onnx/model.onnx"),
        ebbtide.ModelNotFoundError,
        ("onnx/model.onnx", "optimum-cli export onnx"),
    ),
    "half a graph": (half("onnx/model.onnx"), ebbtide.LoadError, ("model.onnx", "damaged")),
    "an empty graph": (
        text("onnx/model.onnx", b""),
        ebbtide.LoadError,
        ("model.onnx", "damaged or incomplete"),
    ),
    "a pointer to a graph": (
        text("onnx/model.onnx", "version https://git-lfs.github.com/spec/v1\n"),
        ebbtide.LoadError,
        ("model.onnx", "compare its size"),
    ),
    "a config that is not JSON": (
        text("config.json", "<!doctype html>"),
        ebbtide.LoadError,
        ("config.json is not JSON", "Compare it with its source"),
    ),
    "a config that is not UTF-8": (
        text("config.json", b'{"model_type": "\xff\xfe"}'),
        ebbtide.LoadError,
        ("config.json is not JSON",),
    ),
    "a config that is nested too deep": (
        text("config.json", "[" * 100_000),
        ebbtide.LoadError,
        ("config.json is not JSON",),
    ),
    "a config that is a list": (
        text("config.json", "[]"),
        ebbtide.LoadError,
        ("config.json is JSON, but not an object: list",),
    ),
    "a config whose hint on dtypes is no dtype": (
        hint("dtype", "q9"),
        ebbtide.EbbtideError,
        ("q9", "q8"),
    ),
    "a config whose hint on dtypes is a list": (
        hint("dtype", ["q8"]),
        ebbtide.EbbtideError,
        ("config's dtype",),
    ),
    "a config whose hint on external data is a word": (
        hint("use_external_data_format", "often"),
        ebbtide.EbbtideError,
        ("use_external_data_format",),
    ),
    "a tokenizer that is garbage": (
        text("tokenizer.json", b"\x00\xffgarbage"),
        ebbtide.LoadError,
        ("tokenizer.json is no tokenizer",),
    ),
    "a tokenizer that is half there": (
        half("tokenizer.json"),
        ebbtide.LoadError,
        ("tokenizer.json is no tokenizer", "Compare it with its source"),
    ),
    "a tokenizer without a model": (
        text("tokenizer.json", "{}"),
        ebbtide.LoadError,
        ("tokenizer.json is no tokenizer",),
    ),
    "rules of a tokenizer that are a list": (
        text("tokenizer_config.json", "[1]"),
        ebbtide.LoadError,
        ("tokenizer_config.json is JSON, but not an object",),
    ),
    "modules that are garbage": (
        text("modules.json", "garbage"),
        ebbtide.LoadError,
        ("modules.json is not JSON",),
    ),
    "modules that are an object": (
        text("modules.json", "{}"),
        ebbtide.LoadError,
        ("modules.json is JSON, but not a list",),
    ),
    "a graph that takes pictures": (
        graph("takes_pixels"),
        ebbtide.UnsupportedModelError,
        ("no text encoder", "pixel_values", "input_ids"),
    ),
    "a graph that gives scores": (
        graph("gives_scores"),
        ebbtide.UnsupportedModelError,
        ("scores", "last_hidden_state", "export the model for this task"),
    ),
}


def make(folder: Path, name: str) -> Path:
    shutil.copytree(
        GOOD, folder, ignore=lambda _, names: [one for one in names if one.startswith("model_")]
    )
    BAD[name][0](folder)
    return folder


@pytest.mark.parametrize("name", BAD)
def test_a_model_that_cannot_be_used_fails_with_a_typed_error(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "model", name)
    _, kind, words = BAD[name]
    before = len(ledger._entries)
    with pytest.raises(kind) as caught:
        ebbtide.pipeline("feature-extraction", folder)
    for word in words:
        assert word in str(caught.value)
    assert str(folder) in str(caught.value) or "hint" in name
    assert ebbtide.live() == []
    assert len(ledger._entries) == before


@pytest.mark.parametrize("name", ["no config", "no tokenizer", "no graph"])
def test_a_missing_file_is_an_attribute_of_the_error(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "model", name)
    with pytest.raises(LookupError) as caught:
        ebbtide.pipeline("feature-extraction", folder)
    assert isinstance(caught.value, ebbtide.ModelNotFoundError)
    assert caught.value.model == str(folder)
    assert caught.value.missing[0] in str(caught.value)


@pytest.mark.parametrize("name", ["half a graph", "a config that is a list", "an empty graph"])
def test_a_damaged_file_is_an_attribute_of_the_error(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "model", name)
    with pytest.raises(ebbtide.LoadError) as caught:
        ebbtide.pipeline("feature-extraction", folder)
    assert Path(caught.value.path).is_relative_to(folder)
    assert Path(caught.value.path).is_file()


def test_a_model_that_was_mended_loads_at_once(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", "half a graph")
    with pytest.raises(ebbtide.LoadError):
        ebbtide.pipeline("feature-extraction", folder)
    shutil.copy(GOOD / "onnx" / "model.onnx", folder / "onnx" / "model.onnx")
    with ebbtide.pipeline("feature-extraction", folder) as pipe:
        assert pipe("tide", pooling="mean").shape == (1, 32)


def test_a_failed_load_beside_a_live_pipeline_leaves_that_alone(tmp_path: Path) -> None:
    with ebbtide.pipeline("feature-extraction", GOOD) as pipe:
        for name in ("half a graph", "a graph that gives scores", "no config"):
            with pytest.raises(ebbtide.EbbtideError):
                ebbtide.pipeline("feature-extraction", make(tmp_path / name, name))
        assert ebbtide.live() == [pipe]
        assert pipe("tide", pooling="mean").shape == (1, 32)


ROUNDS = """
import gc, os, threading
import ebbtide
from ebbtide.memory import anonymous_bytes, reclaim

def counts():
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

def once():
    tried = one_round()
    gc.collect()
    reclaim()
    assert ebbtide.live() == []
    return tried

for _ in range(WARM):
    once()
bytes_before, counts_before = anonymous_bytes(), counts()
for _ in range(30):
    tried = once()
grown = anonymous_bytes() - bytes_before
assert counts() == counts_before, (counts_before, counts())
assert grown < 1_000_000, f"{grown} bytes more after 30 rounds of {tried} failures"
print("nothing stayed", tried, grown)
"""


def test_thirty_rounds_of_bad_loads_leave_no_memory_no_files_and_no_threads(
    tmp_path: Path, fresh_process: Any
) -> None:
    for name in BAD:
        make(tmp_path / name, name)
    script = (
        """
import os, pathlib
import ebbtide

WARM = 3  # each native thread has had its first loads

def one_round():
    tried = 0
    for folder in sorted(pathlib.Path(os.environ["FOLDERS"]).iterdir()):
        try:
            ebbtide.pipeline("feature-extraction", folder)
        except Exception:
            tried += 1
    for options in ({"dtype": "q9"}, {"device": "cuda"}, {"dtype": "q1"}, {"devise": 1}):
        try:
            ebbtide.pipeline("feature-extraction", MODEL, **options)
        except ebbtide.EbbtideError:
            tried += 1
    return tried
"""
        + ROUNDS
    )
    seen = fresh_process(script, FOLDERS=str(tmp_path))
    assert f"nothing stayed {len(BAD) + 4}" in seen


def test_thirty_rounds_of_bad_calls_leave_no_memory_no_files_and_no_threads(
    fresh_process: Any,
) -> None:
    script = (
        """
import ebbtide

WARM = 3  # each native thread has had its first calls

CALLS = [
    (None, {}), (b"tide", {}), (3, {}), ([], {}), (["tide", 3], {}), ("\\ud800", {}),
    (["tide"] * 64 + ["\\ud800"], {}), ("tide", {"batch_size": 0}), ("tide", {"normalize": "yes"}),
    ("tide", {"pooling": "meen"}), ("tide", {"precision": "int8"}), ("tide", {"poolin": 1}),
]

def one_round():
    tried = 0
    with ebbtide.pipeline("feature-extraction", MODEL) as pipe:
        for inputs, options in CALLS:
            try:
                pipe(inputs, **options)
            except ebbtide.EbbtideError:
                tried += 1
    return tried
"""
        + ROUNDS
    )
    assert "nothing stayed 12" in fresh_process(script)
