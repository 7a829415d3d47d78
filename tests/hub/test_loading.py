"""A model by its id: the same as its folder, of one commit, and only what is needed of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ebbtide

from .loopback import Hub
from .served import (
    MODELS,
    NAME,
    NEEDED,
    ONNX,
    TASK,
    TINY,
    TOKENIZER,
    answers,
    assert_same_as_folder,
    commits_asked,
    files_asked,
    looked_up,
    of_folder,
    ranges,
)


def test_a_model_by_its_id_gives_the_same_as_its_folder(hub: Hub, tiny: str, cache: Path) -> None:
    assert_same_as_folder()
    with ebbtide.pipeline(TASK, NAME) as pipe:
        assert (pipe.model, pipe.dtype) == (NAME, "fp32")


@pytest.mark.parametrize(
    ("options", "onnx"),
    [
        ({}, "onnx/model.onnx"),
        ({"dtype": "q8"}, "onnx/model_quantized.onnx"),
        ({"dtype": {"model": "fp16"}}, "onnx/model_fp16.onnx"),
        ({"model_file_name": "model_q4"}, "onnx/model_q4.onnx"),
    ],
    ids=["default", "q8", "by file", "by name"],
)
def test_only_the_files_that_the_task_and_the_dtype_need_are_downloaded_each_once(
    hub: Hub, tiny: str, cache: Path, options: dict[str, Any], onnx: str
) -> None:
    with ebbtide.pipeline(TASK, NAME, **options):
        assert len(looked_up(hub)) == 1
    assert sorted(files_asked(hub)) == sorted({"config.json", onnx, *TOKENIZER})
    assert len(hub.requests) == 1 + 5 + 1  # the look-up, the files, and the large one at the CDN
    assert hub.encodings == {"identity"}  # a part of what is compressed is no part of the file


@pytest.mark.parametrize(
    ("task", "folder", "further"),
    [
        ("feature-extraction", "tiny-bert-st", {
            "modules.json", "1_Pooling/config.json", "sentence_bert_config.json",
        }),
        ("fill-mask", "bert/mask", set()),
        ("feature-extraction", "tiny-external", {"onnx/model.onnx_data"}),
    ],
)  # fmt: skip
def test_a_task_takes_the_further_files_that_it_reads_and_no_others(
    hub: Hub, cache: Path, task: str, folder: str, further: set[str]
) -> None:
    hub.add_folder(NAME, MODELS / folder)
    text = "the [MASK]"
    found = answers(NAME, task, text)
    assert sorted(files_asked(hub)) == sorted({*NEEDED, *further})
    expected = answers(MODELS / folder, task, text)
    assert np.array_equal(found, expected) if task == TASK else found == expected


def test_a_model_whose_onnx_file_lies_beside_its_config_is_found(hub: Hub, cache: Path) -> None:
    hub.add_folder(NAME, MODELS / "tiny-distilbert")
    assert_same_as_folder(NAME, MODELS / "tiny-distilbert")
    assert "model.onnx" in files_asked(hub)


def test_a_small_model_of_a_single_name_and_with_files_of_the_same_content_loads(
    hub: Hub, cache: Path
) -> None:
    files = {one.relative_to(TINY).as_posix(): one.read_bytes() for one in TINY.rglob("*.json")}
    weights = (TINY / ONNX).read_bytes()
    hub.add("tiny", {**files, ONNX: weights, "onnx/model_quantized.onnx": weights}, lfs=["*.onnx"])
    assert_same_as_folder("tiny")
    assert np.array_equal(answers("tiny", dtype="q8"), of_folder())
    assert len(ranges(hub)) + len(ranges(hub, "onnx/model_quantized.onnx")) == 1


def test_all_files_are_of_one_commit_also_when_the_branch_moves_between_two_of_them(
    hub: Hub, tiny: str, cache: Path
) -> None:
    def move(event: ebbtide.ProgressEvent) -> None:
        if event["status"] == "done" and event["file"] == "config.json":
            hub.add(NAME, {"config.json": b"{}", ONNX: b"another model"}, lfs=["*.onnx"])

    with ebbtide.pipeline(TASK, NAME, progress=move) as pipe:
        found = pipe("the tide")
    assert np.array_equal(found, of_folder())
    assert commits_asked(hub) == {tiny}


def test_a_branch_that_moved_is_loaded_as_it_is_now_and_what_did_not_change_is_not_asked_for(
    hub: Hub, tiny: str, cache: Path
) -> None:
    answers()
    config = (TINY / "config.json").read_bytes()
    files = {one.relative_to(TINY).as_posix(): one.read_bytes() for one in TINY.rglob("*.*")}
    moved = hub.add(NAME, {**files, "config.json": config + b"\n"}, lfs=["*.onnx"])
    before = len(files_asked(hub))
    answers()
    assert moved != tiny
    assert looked_up(hub) == ["main", "main"]
    assert files_asked(hub)[before:] == ["config.json"]
    assert commits_asked(hub) == {tiny, moved}


@pytest.mark.parametrize("kind", ["branch", "tag", "commit", "branch with a slash"])
def test_a_revision_is_a_branch_a_tag_or_a_commit(
    hub: Hub, tiny: str, cache: Path, kind: str
) -> None:
    hub.add(NAME, {"config.json": b"{}"})  # main goes on
    hub.tag(NAME, "v1.0", tiny)
    hub.add_folder(NAME, TINY, revision="old")
    hub.add_folder(NAME, TINY, revision="refs/pr/1")
    revision = {"branch": "old", "tag": "v1.0", "commit": tiny}.get(kind, "refs/pr/1")
    assert_same_as_folder(revision=revision)
    assert looked_up(hub) == [revision]
    with pytest.raises(ebbtide.ModelNotFoundError, match=r"has no onnx/model\.onnx"):
        ebbtide.pipeline(TASK, NAME)


def test_a_second_load_asks_the_hub_once_and_downloads_nothing(
    hub: Hub, tiny: str, cache: Path
) -> None:
    answers()
    first = len(hub.requests)
    assert_same_as_folder()
    assert [one.path for one in hub.requests[first:]] == [
        f"/api/models/{NAME}/revision/main?blobs=true"
    ]


def test_a_commit_that_is_cached_is_loaded_without_a_request(
    hub: Hub, tiny: str, cache: Path
) -> None:
    answers(revision="main")
    first = len(hub.requests)
    assert_same_as_folder(revision=tiny)
    assert len(hub.requests) == first
    assert_same_as_folder(revision=tiny, dtype="q8")  # another file of it is downloaded at once
    assert files_asked(hub)[5:] == ["onnx/model_quantized.onnx"]
    assert looked_up(hub) == ["main"]


def test_a_model_that_was_renamed_is_found_by_its_old_name(
    hub: Hub, tiny: str, cache: Path
) -> None:
    hub.rename(NAME, "org/new")
    assert_same_as_folder(NAME)


def test_another_cache_is_used_where_it_is_named(
    hub: Hub, tiny: str, tmp_path: Path, cache: Path
) -> None:
    assert_same_as_folder(cache_dir=tmp_path / "other")
    assert not cache.exists()
    assert (tmp_path / "other" / "models--org--tiny" / "refs" / "main").read_text() == tiny


def test_a_dtype_that_is_not_there_names_those_that_are_and_downloads_none_of_them(
    hub: Hub, tiny: str, cache: Path
) -> None:
    with pytest.raises(ebbtide.ModelNotFoundError) as caught:
        ebbtide.pipeline(TASK, NAME, dtype="q2")
    assert "fp32, fp16, q8, int8, uint8, q4, q4f16, bnb4" in str(caught.value)
    assert caught.value.missing == ("onnx/model_q2.onnx", "model_q2.onnx")
    assert files_asked(hub) == ["config.json"]


def test_a_model_without_an_onnx_file_says_how_to_have_one(hub: Hub, cache: Path) -> None:
    hub.add(NAME, {"config.json": b"{}", "model.safetensors": b"weights"})
    with pytest.raises(ebbtide.ModelNotFoundError, match="no ONNX file at all"):
        ebbtide.pipeline(TASK, NAME)
    hub.add(NAME, {"config.json": b"{}", "onnx/encoder.onnx": b"weights"})
    with pytest.raises(ebbtide.ModelNotFoundError, match=r"Its ONNX files are onnx/encoder\.onnx"):
        ebbtide.pipeline(TASK, NAME)
    assert "onnx/encoder.onnx" not in files_asked(hub)


def test_a_model_without_files_lacks_its_config(hub: Hub, cache: Path) -> None:
    hub.add(NAME, {})
    with pytest.raises(ebbtide.ModelNotFoundError, match=r"has no config\.json"):
        ebbtide.pipeline(TASK, NAME)


@pytest.mark.parametrize(
    "options",
    [
        {"revision": ""}, {"revision": "../main"}, {"revision": "/etc/passwd"}, {"revision": 3},
        {"revision": "a b"}, {"local_files_only": "yes"}, {"cache_dir": 3},
    ],
)  # fmt: skip
def test_an_option_that_cannot_be_used_is_refused_before_any_request(
    hub: Hub, tiny: str, cache: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(ebbtide.InputError, match=next(iter(options))):
        ebbtide.pipeline(TASK, NAME, **options)
    assert hub.requests == []
