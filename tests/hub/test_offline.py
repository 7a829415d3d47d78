"""Without a network: what is cached is used, and what is not is a typed error."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import ebbtide
from ebbtide.hub import Repository
from ebbtide.hub.cache import FileInfo

from .loopback import Hub
from .served import (
    NAME,
    ONNX,
    TASK,
    TINY,
    answers,
    assert_same_as_folder,
    files_asked,
    looked_up,
    snapshot,
)

Patch = pytest.MonkeyPatch

OFFLINE: dict[str, Callable[[Patch], dict[str, Any]]] = {
    "the setting": lambda patch: patch.setattr(ebbtide.settings, "offline", True) or {},
    "HF_HUB_OFFLINE": lambda patch: patch.setattr(constants, "HF_HUB_OFFLINE", True) or {},
    "local_files_only": lambda patch: {"local_files_only": True},
}


@pytest.fixture(params=OFFLINE)
def offline(request: pytest.FixtureRequest, monkeypatch: Patch) -> Callable[[], dict[str, Any]]:
    """Leaves the network alone from its call on; returns the options of a load."""
    return lambda: OFFLINE[request.param](monkeypatch)


def test_offline_the_cache_is_used_and_nothing_is_asked(
    hub: Hub, tiny: str, cache: Path, offline: Callable[[], dict[str, Any]]
) -> None:
    answers()
    before = len(hub.requests)
    options = offline()
    assert_same_as_folder(**options)
    assert_same_as_folder(revision=tiny, **options)
    assert len(hub.requests) == before


def test_offline_a_file_that_the_model_has_and_the_cache_has_not_is_a_download_error(
    hub: Hub, tiny: str, cache: Path, offline: Callable[[], dict[str, Any]]
) -> None:
    answers()
    before = len(hub.requests)
    options = offline()
    with pytest.raises(ebbtide.DownloadError) as caught:
        ebbtide.pipeline(TASK, NAME, dtype="q8", **options)
    error = caught.value
    assert (error.model, error.file) == (NAME, "onnx/model_quantized.onnx")
    assert (error.status, error.unreachable) == (None, False)
    assert str(cache) in str(error)
    assert "Load it once with the network" in str(error)
    with pytest.raises(ebbtide.ModelNotFoundError, match="It has these dtypes: fp32, fp16, q8"):
        ebbtide.pipeline(TASK, NAME, dtype="q1", **options)
    assert len(hub.requests) == before


def test_offline_a_model_or_a_revision_that_the_cache_has_not_is_not_found(
    hub: Hub, tiny: str, cache: Path, offline: Callable[[], dict[str, Any]]
) -> None:
    options = offline()
    for name, revision in ((NAME, "main"), (NAME, tiny), ("org/other", "main")):
        with pytest.raises(ebbtide.ModelNotFoundError) as caught:
            ebbtide.pipeline(TASK, name, revision=revision, **options)
        assert caught.value.model == name
        for words in (name, revision, str(cache), "Load it once with the network"):
            assert words in str(caught.value)
    assert hub.requests == []
    assert not cache.exists()


@pytest.mark.parametrize("variable", ["EBBTIDE_OFFLINE", "HF_HUB_OFFLINE"])
def test_the_environment_takes_a_process_offline(
    hub: Hub, tiny: str, cache: Path, child: Any, variable: str
) -> None:
    answers()
    before = len(hub.requests)
    script = f"""
        import ebbtide
        with ebbtide.pipeline("{TASK}", "{NAME}") as pipe:
            print(pipe("the tide").shape)
    """
    assert "(1, 5, 32)" in child(script, environ={variable: "1"}).succeeds()
    assert len(hub.requests) == before


@pytest.mark.parametrize("how", ["offline", "pinned"])
def test_a_cached_model_is_loaded_without_the_clients_network_part(
    hub: Hub, tiny: str, cache: Path, child: Any, how: str
) -> None:
    answers()
    options = {"offline": "local_files_only=True", "pinned": f"revision='{tiny}'"}[how]
    script = f"""
        import sys
        import ebbtide
        with ebbtide.pipeline("{TASK}", "{NAME}", {options}) as pipe:
            pipe("the tide")
        print(ebbtide.model_files("{TASK}", "{NAME}", {options}).to_download)
        print(ebbtide.cached_models()[0].name)
        loaded = {{name.partition(".")[0] for name in sys.modules}}
        print(sorted(loaded & {{"httpx", "httpx2", "httpcore", "httpcore2", "requests", "tqdm"}}))
        print([name for name in ("huggingface_hub.hf_api", "huggingface_hub.file_download",
                                 "ebbtide.hub.download") if name in sys.modules])
    """
    assert child(script).succeeds().split("\n") == ["0", NAME, "[]", "[]", ""]


def test_where_the_hub_cannot_be_reached_what_is_cached_is_used_and_the_log_says_so(
    hub: Hub, tiny: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answers()
    assert not caplog.records
    hub.close()
    assert_same_as_folder()
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("ebbtide.hub", logging.WARNING)
    for words in (NAME, hub.endpoint, "Using what the cache has of it"):
        assert words in record.getMessage()


@pytest.mark.parametrize("status", [429, 500, 503])
def test_where_the_hub_answers_with_an_error_what_is_cached_is_used_and_the_log_says_so(
    hub: Hub, tiny: str, cache: Path, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    answers()
    hub.fault("/api/models/*", status=status, times=None)
    assert_same_as_folder()
    assert f"({status})" in caplog.text
    assert "Using what the cache has of it" in caplog.text


def test_where_the_hub_cannot_be_reached_a_file_that_is_not_cached_is_a_download_error(
    hub: Hub, tiny: str, cache: Path
) -> None:
    answers()
    hub.close()
    with pytest.raises(ebbtide.DownloadError) as caught:
        ebbtide.pipeline(TASK, NAME, dtype="q8")
    assert (caught.value.file, caught.value.unreachable) == ("onnx/model_quantized.onnx", True)


@pytest.mark.parametrize("cached", ["nothing", "another revision"])
def test_where_the_hub_cannot_be_reached_and_nothing_is_cached_there_is_an_error(
    hub: Hub, tiny: str, cache: Path, cached: str
) -> None:
    if cached == "another revision":
        answers(revision=tiny)
    hub.close()
    with pytest.raises(ebbtide.DownloadError) as caught:
        ebbtide.pipeline(TASK, NAME)
    error = caught.value
    assert (error.model, error.file, error.status) == (NAME, None, None)
    assert error.unreachable
    for words in (NAME, hub.endpoint, "Is there a connection"):
        assert words in str(error)


def test_a_branch_that_moved_stays_what_it_was_offline_until_what_a_load_needs_is_there(
    hub: Hub, tiny: str, cache: Path
) -> None:
    answers()
    hub.add(NAME, {"config.json": (TINY / "config.json").read_bytes(), ONNX: b"new"}, lfs=["*nx"])
    hub.fault("/cdn/*", status=500, times=None)
    with pytest.raises(ebbtide.DownloadError):
        ebbtide.pipeline(TASK, NAME)
    ebbtide.model_files(TASK, NAME)
    assert_same_as_folder(local_files_only=True)


def test_a_model_that_was_only_looked_at_is_known_offline(hub: Hub, tiny: str, cache: Path) -> None:
    seen = ebbtide.model_files(TASK, NAME)
    assert ebbtide.model_files(TASK, NAME, local_files_only=True) == seen
    with pytest.raises(ebbtide.DownloadError, match="Load it once with the network"):
        ebbtide.pipeline(TASK, NAME, local_files_only=True)


def test_a_file_that_was_taken_out_of_the_cache_is_downloaded_again(
    hub: Hub, tiny: str, cache: Path
) -> None:
    answers()
    before = len(files_asked(hub))
    link = snapshot(cache, tiny) / ONNX
    link.resolve().unlink()
    assert_same_as_folder()
    assert files_asked(hub)[before:] == [ONNX]
    link.unlink()
    assert_same_as_folder()
    assert files_asked(hub)[before:] == [ONNX]


# What a cache says of itself is not believed where it is damaged


NO_LISTS = {
    "empty": b"", "binary": b"\x00\xff\x80", "list": b"[]", "map": b"{}", "null": b"null",
    "number": b"0", "text": b'"abc"', "cut": b'[["config.json", 1, "aaa', "deep": b"[" * 100_000,
    "short": b'[["config.json", 1]]', "endless": b'[["a", 1e999, "%s"]]' % (b"a" * 40),
    "outside": b'[["../../x", 1, "%s"]]' % (b"a" * 40), "no name": b'[[1, 1, "%s"]]' % (b"a" * 40),
    "no hash": b'[["config.json", 1, "../../x"]]', "hash of lists": b'[["a", 1, [1]]]',
}  # fmt: skip
NO_COMMITS = (b"", b"\x00\xff\x80", b"main", b"../../../etc", b"a" * 39, b"a" * 41, b"A" * 40)


@pytest.mark.parametrize("damage", NO_LISTS)
def test_a_damaged_list_of_what_a_commit_has_is_none(tmp_path: Path, damage: str) -> None:
    place = Repository(tmp_path, NAME)
    sound = {"config.json": FileInfo("config.json", 1, "a" * 40)}
    place.remember("c" * 40, sound)
    assert place.listing("c" * 40) == sound
    (path,) = tmp_path.rglob("*.json")
    path.write_bytes(NO_LISTS[damage])
    assert place.listing("c" * 40) is None


@pytest.mark.parametrize("damage", NO_COMMITS)
def test_a_damaged_ref_is_none(tmp_path: Path, damage: bytes) -> None:
    place = Repository(tmp_path, NAME)
    place.refer("main", "c" * 40)
    assert place.commit_of("main") == "c" * 40
    (tmp_path / "models--org--tiny/refs/main").write_bytes(damage)
    assert place.commit_of("main") is None


def test_a_damaged_list_is_done_without_offline_and_repaired_by_the_next_look_up(
    hub: Hub, tiny: str, cache: Path
) -> None:
    answers()
    (listing,) = cache.rglob(".ebbtide/*.json")
    sound = listing.read_bytes()
    listing.write_bytes(b"")
    assert_same_as_folder(local_files_only=True)
    before = len(looked_up(hub))
    assert_same_as_folder(revision=tiny)
    assert looked_up(hub)[before:] == [tiny]
    assert listing.read_bytes() == sound


def test_a_damaged_ref_is_not_found_offline_and_repaired_by_the_next_load(
    hub: Hub, tiny: str, cache: Path
) -> None:
    answers()
    (ref,) = cache.rglob("refs/main")
    ref.write_bytes(b"\x00\xff\x80")
    with pytest.raises(ebbtide.ModelNotFoundError):
        ebbtide.pipeline(TASK, NAME, local_files_only=True)
    assert_same_as_folder()
    assert ref.read_text() == tiny


def test_a_list_without_the_files_it_names_asks_for_them(hub: Hub, tiny: str, cache: Path) -> None:
    answers()
    shutil.rmtree(snapshot(cache, tiny))
    shutil.rmtree(snapshot(cache, tiny).parent.parent / "blobs")
    assert_same_as_folder()
    assert_same_as_folder(revision=tiny, local_files_only=True)
