"""The cache is that of all Hugging Face libraries: what they brought is used, and the reverse."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import huggingface_hub
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
    answers,
    assert_same_as_folder,
    everything_below,
    files_asked,
    looked_up,
    of_folder,
    ranges,
    snapshot,
)

EXTERNAL = MODELS / "tiny-external"


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk without symbolic links."""

    def fail(self: Path, target: object, target_is_directory: bool = False) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", fail)


# What the library brought


def test_what_the_library_downloaded_is_used_without_downloading_it_again(
    hub: Hub, tiny: str, cache: Path
) -> None:
    huggingface_hub.snapshot_download(NAME, endpoint=hub.endpoint)
    before = len(files_asked(hub))
    assert_same_as_folder()
    assert_same_as_folder(dtype="q8")
    assert files_asked(hub)[before:] == []
    assert looked_up(hub)[-2:] == ["main", "main"]


def test_what_the_library_downloaded_is_used_offline_and_what_it_did_not_is_not_found(
    hub: Hub, tiny: str, cache: Path
) -> None:
    for name in sorted(NEEDED):
        huggingface_hub.hf_hub_download(NAME, name, endpoint=hub.endpoint)
    before = len(hub.requests)
    assert_same_as_folder(local_files_only=True)
    with pytest.raises(ebbtide.ModelNotFoundError, match=r"It has these dtypes: fp32;"):
        ebbtide.pipeline(TASK, NAME, dtype="q8", local_files_only=True)
    assert len(hub.requests) == before


def test_a_blob_that_the_library_brought_for_another_commit_is_used(
    hub: Hub, tiny: str, cache: Path
) -> None:
    huggingface_hub.snapshot_download(NAME, endpoint=hub.endpoint, revision=tiny)
    files = {one: (TINY / one).read_bytes() for one in everything_below(TINY)}
    hub.add(NAME, {**files, "README.md": b"new"}, lfs=["*.onnx"])
    before = len(files_asked(hub))
    assert_same_as_folder()
    assert files_asked(hub)[before:] == []


# What Ebbtide brought


def test_what_ebbtide_downloaded_the_library_finds_and_does_not_download_again(
    hub: Hub, tiny: str, cache: Path
) -> None:
    answers()
    for name in NEEDED:
        found = huggingface_hub.try_to_load_from_cache(NAME, name)
        assert isinstance(found, str)
        assert Path(found).read_bytes() == (TINY / name).read_bytes()
    before = len(ranges(hub))
    path = huggingface_hub.hf_hub_download(NAME, ONNX, endpoint=hub.endpoint)
    assert path == str(snapshot(cache, tiny) / ONNX)
    assert len(ranges(hub)) == before
    offline = huggingface_hub.hf_hub_download(NAME, ONNX, local_files_only=True)
    assert offline == path


def test_the_library_finds_nothing_wrong_with_a_cache_that_ebbtide_filled(
    hub: Hub, tiny: str, cache: Path
) -> None:
    answers()
    hub.add_folder(NAME, TINY, revision="v1")
    hub.add_folder("org/other", EXTERNAL)
    answers(revision="v1")
    answers("org/other", revision="main")
    found = huggingface_hub.scan_cache_dir(cache)
    assert found.warnings == []
    repos = {one.repo_id: one for one in found.repos}
    assert set(repos) == {NAME, "org/other"}
    (revision,) = repos[NAME].revisions
    assert (revision.commit_hash, revision.refs) == (tiny, {"main", "v1"})
    assert {one.file_path.relative_to(revision.snapshot_path).as_posix()
            for one in revision.files} == NEEDED  # fmt: skip


@pytest.mark.parametrize("pattern", ["*/config.json", "/cdn/*"])
def test_the_library_finds_nothing_wrong_with_a_cache_that_a_failed_load_left(
    hub: Hub, tiny: str, cache: Path, pattern: str
) -> None:
    answers()
    hub.add(NAME, {"config.json": b"{}\n", ONNX: b"moved on"}, lfs=["*.onnx"])
    hub.fault(pattern, status=500, times=None)
    with pytest.raises(ebbtide.DownloadError):
        ebbtide.pipeline(TASK, NAME)
    assert huggingface_hub.scan_cache_dir(cache).warnings == []


# How files lie in it


def test_files_lie_once_as_blobs_and_under_their_names_as_links(
    hub: Hub, tiny: str, cache: Path
) -> None:
    answers()
    for name in NEEDED:
        path = snapshot(cache, tiny) / name
        assert path.is_symlink()
        assert not os.path.isabs(os.readlink(path))
        assert path.resolve().parent == cache / "models--org--tiny" / "blobs"
    moved = cache.rename(cache.with_name("moved"))  # relative links move with their cache
    assert_same_as_folder(cache_dir=moved, local_files_only=True)


def test_without_links_the_files_themselves_lie_under_their_names(
    hub: Hub, tiny: str, cache: Path, no_links: None
) -> None:
    assert_same_as_folder()
    assert not (snapshot(cache, tiny) / ONNX).is_symlink()
    before = len(files_asked(hub))
    assert_same_as_folder()
    assert_same_as_folder(local_files_only=True)
    assert files_asked(hub)[before:] == []
    assert huggingface_hub.scan_cache_dir(cache).warnings == []
    assert ebbtide.cached_models()[0].dtypes == ("fp32",)


def test_nothing_temporary_is_left_after_a_load(hub: Hub, tiny: str, cache: Path) -> None:
    answers()
    kinds = {one.partition("/")[0] for one in everything_below(cache / "models--org--tiny")}
    assert kinds == {"blobs", "snapshots", "refs", ".ebbtide"}
    names = everything_below(cache)
    assert sum("/blobs/" in one for one in names) == len(NEEDED)
    assert {one for one in names if "/snapshots/" in one} == {
        f"models--org--tiny/snapshots/{tiny}/{one}" for one in NEEDED
    }
    assert {one for one in names if "/refs/" in one} == {"models--org--tiny/refs/main"}
    assert {one for one in names if "/.ebbtide/" in one} == {
        f"models--org--tiny/.ebbtide/{tiny}.json"
    }


@pytest.mark.parametrize("links", [True, False], ids=["by links", "without links"])
def test_weights_beside_the_graph_are_found_through_the_cache(
    hub: Hub, cache: Path, links: bool, request: pytest.FixtureRequest
) -> None:
    if not links:
        request.getfixturevalue("no_links")
    hub.add_folder(NAME, EXTERNAL)
    found = answers()
    assert np.array_equal(found, of_folder(EXTERNAL))
    assert np.array_equal(found, answers(local_files_only=True))


def test_weights_beside_the_graph_that_are_missing_are_named_before_they_are_needed(
    hub: Hub, cache: Path
) -> None:
    files = {one: (EXTERNAL / one).read_bytes() for one in everything_below(EXTERNAL)}
    del files["onnx/model.onnx_data"]
    hub.add(NAME, files, lfs=["*.onnx"])
    with pytest.raises(ebbtide.ModelNotFoundError) as caught:
        ebbtide.pipeline(TASK, NAME)
    assert caught.value.missing == ("onnx/model.onnx_data",)
    assert ranges(hub) == []


# What is in it


def test_the_models_in_the_cache_are_listed_with_sizes_dtypes_and_revisions(
    hub: Hub, tiny: str, cache: Path
) -> None:
    assert ebbtide.cached_models() == []
    answers()
    answers(dtype="q8")
    hub.tag(NAME, "v1")
    answers(revision="v1")
    other = hub.add_folder("org/other", EXTERNAL)
    answers("org/other", revision=other)
    found = {one.name: one for one in ebbtide.cached_models()}
    assert list(found) == ["org/other", NAME]
    one = found[NAME]
    assert one.folder == cache / "models--org--tiny"
    assert one.dtypes == ("fp32", "q8")
    assert one.revisions == (("main", tiny), ("v1", tiny))
    of_its_own = (path for path in one.folder.rglob("*") if not path.is_symlink())
    assert one.size == sum(path.stat().st_size for path in of_its_own if path.is_file())
    content = {*NEEDED, "onnx/model_quantized.onnx"}
    assert one.size > sum((TINY / name).stat().st_size for name in content)
    assert one.used > 0
    assert found["org/other"].revisions == ()
    assert ebbtide.cached_models(cache.with_name("none")) == []


def test_what_lies_in_the_cache_beside_models_is_passed_over(
    hub: Hub, tiny: str, cache: Path
) -> None:
    answers()
    for name in ("datasets--org--data/snapshots/main", "models--org--empty/blobs", "version"):
        (cache / name).mkdir(parents=True)
    (cache / "models--org--file").write_text("not a folder")
    (cache / "models--org--tiny" / "refs" / "broken").write_bytes(b"\xff\x00")
    (cache / "models--org--tiny" / "refs" / "folder").mkdir()
    (found,) = ebbtide.cached_models()
    assert (found.name, found.revisions) == (NAME, (("main", tiny),))


def test_what_a_load_takes_is_known_before_it_and_only_the_config_is_downloaded(
    hub: Hub, tiny: str, cache: Path
) -> None:
    before = ebbtide.model_files(TASK, NAME, dtype="q8")
    onnx = "onnx/model_quantized.onnx"
    names = {"config.json", onnx, *(NEEDED - {ONNX})}
    sizes = {name: (TINY / name).stat().st_size for name in names}
    assert files_asked(hub) == ["config.json"]
    assert (before.name, before.dtype) == (NAME, "q8")
    assert before.dtypes == ("fp32", "fp16", "q8", "int8", "uint8", "q4", "q4f16", "bnb4")
    assert {one.name: one.size for one in before.files} == sizes
    assert {one.name for one in before.files if one.cached} == {"config.json"}
    assert before.size == sum(sizes.values())
    assert before.to_download == before.size - sizes["config.json"]
    answers(dtype="q8")
    after = ebbtide.model_files(TASK, NAME, dtype="q8")
    assert (after.size, after.to_download) == (before.size, 0)
    assert sorted(files_asked(hub)) == sorted(names)


def test_what_a_load_takes_has_the_weights_beside_the_graph_and_the_tasks_files(
    hub: Hub, cache: Path
) -> None:
    hub.add_folder(NAME, EXTERNAL)
    hub.add_folder("org/sentence", MODELS / "tiny-bert-st")
    names = {one.name for one in ebbtide.model_files(TASK, NAME).files}
    assert names == {*NEEDED, "onnx/model.onnx_data"}
    names = {one.name for one in ebbtide.model_files(TASK, "org/sentence").files}
    assert {"modules.json", "1_Pooling/config.json"} < names


def test_a_removed_model_is_gone_with_what_it_took_and_a_loaded_one_goes_on(
    hub: Hub, tiny: str, cache: Path
) -> None:
    hub.add_folder("org/other", EXTERNAL)
    answers("org/other")
    with ebbtide.pipeline(TASK, NAME) as pipe:
        (size,) = (one.size for one in ebbtide.cached_models() if one.name == NAME)
        assert ebbtide.remove_cached(NAME) == size
        assert np.array_equal(pipe("the tide"), of_folder())
    assert not [one for one in everything_below(cache) if "tiny" in one]
    assert [one.name for one in ebbtide.cached_models()] == ["org/other"]
    with pytest.raises(ebbtide.ModelNotFoundError, match="it has org/other"):
        ebbtide.remove_cached(NAME)
    assert_same_as_folder()


def test_only_a_models_id_is_removed(hub: Hub, tiny: str, cache: Path) -> None:
    answers()
    before = everything_below(cache.parent)
    for wrong in ("../x", "a/b/c", "", "..", None, 3, "/etc", "a--b"):
        with pytest.raises(ebbtide.InputError, match="model's id is needed"):
            ebbtide.remove_cached(wrong)  # type: ignore[arg-type]
    assert everything_below(cache.parent) == before


def test_a_file_that_goes_while_the_cache_is_looked_at_is_passed_over(
    hub: Hub, tiny: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers()
    (before,) = ebbtide.cached_models()
    original = os.lstat

    def vanish(path: Any, **options: Any) -> os.stat_result:
        if str(path).endswith(".ebbtide-part"):
            os.unlink(path)  # it became the whole file in another process
        return original(path, **options)

    (before.folder / "blobs" / ("a" * 64 + ".ebbtide-part")).write_bytes(b"part")
    monkeypatch.setattr(os, "lstat", vanish)
    (found,) = ebbtide.cached_models()
    assert found.size == before.size
