"""A disk that is full, a cache that cannot be written, and who may read what was written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ebbtide
from ebbtide.hub import download

from .loopback import Hub
from .served import (
    LINUX,
    NAME,
    ONNX,
    TASK,
    TINY,
    answers,
    assert_same_as_folder,
    files_asked,
    part_of,
    ranges,
    snapshot,
)

SIZE = (TINY / ONNX).stat().st_size
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0

LOAD = f"""
    import ebbtide
    try:
        ebbtide.pipeline("{TASK}", "{NAME}")
    except ebbtide.DownloadError as error:
        print(error.file, error.unreachable, error.status)
        print(error)
"""


class Usage:
    def __init__(self, free: int) -> None:
        self.total, self.used, self.free = 10**12, 0, free


def test_whether_there_is_room_for_a_file_is_looked_at_before_it_is_asked_for(
    hub: Hub, tiny: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: Usage(SIZE - 1))
    with pytest.raises(ebbtide.DownloadError) as caught:
        ebbtide.pipeline(TASK, NAME)
    error = caught.value
    assert (error.model, error.file, error.status) == (NAME, ONNX, None)
    assert not error.unreachable
    for words in (f"The disk of the cache {cache} is full", ONNX, "0 MB", "cache_dir=",
                  "HF_HUB_CACHE"):  # fmt: skip
        assert words in str(error)
    assert ONNX not in files_asked(hub)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: Usage(SIZE))
    assert_same_as_folder()


def test_what_is_there_of_a_file_needs_no_further_room(
    hub: Hub, tiny: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = part_of(cache)
    part.parent.mkdir(parents=True)
    part.write_bytes((TINY / ONNX).read_bytes()[:-20_000])
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: Usage(25_000))
    assert_same_as_folder()
    assert ranges(hub) == [f"bytes={SIZE - 20_000}-"]


def test_a_disk_that_cannot_be_asked_for_its_room_is_full_all_the_same(
    hub: Hub, tiny: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: object) -> Usage:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download.shutil, "disk_usage", fail)
    with pytest.raises(ebbtide.DownloadError, match="is full"):
        ebbtide.pipeline(TASK, NAME)


@pytest.mark.skipif(not LINUX, reason="a limit that Linux has")
def test_a_file_that_is_too_large_for_the_disk_is_an_error_and_leaves_no_half_of_it(
    hub: Hub, tiny: str, cache: Path, child: Any
) -> None:
    limit = """
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    """
    told = child(limit + LOAD).succeeds()
    assert told.startswith(f"{ONNX} False None\nThe disk of the cache {cache} is full")
    assert not part_of(cache).exists()
    assert_same_as_folder()


def small_disk(folder: Path) -> list[str]:
    """Runs what follows where a folder is a disk of its own, of 200 kB; nobody else sees it."""
    mount = f"mount -t tmpfs -o size=200k tmpfs '{folder}' && exec \"$@\""
    return ["unshare", "-m", "sh", "-c", mount, "sh"]


@pytest.fixture
def full(cache: Path) -> list[str]:
    cache.mkdir()
    prefix = small_disk(cache)
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a disk takes Linux and root")
    return prefix


@pytest.mark.parametrize("checked", [True, False], ids=["seen before", "while it is written"])
def test_a_full_disk_is_an_error_and_leaves_no_half_of_a_file(
    hub: Hub, tiny: str, cache: Path, child: Any, full: list[str], checked: bool
) -> None:
    unchecked = """
    import shutil
    from ebbtide.hub import download
    download._check_space = lambda *about: None
    download._AT_ONCE = 1  # else another file may find the disk full first
    """
    left = """
    import pathlib
    print([one.name for one in pathlib.Path(ebbtide.hub.default_root()).rglob("*-part")
           if one.stat().st_size > 100_000])
    """
    told = child(("" if checked else unchecked) + LOAD + left, *full).succeeds().splitlines()
    assert told[0] == f"{ONNX} False None"
    assert told[1].startswith(f"The disk of the cache {cache} is full: {ONNX} needs 0 MB")
    assert told[2] == "[]"
    assert (ONNX in files_asked(hub)) is not checked


# A cache that cannot be written


@pytest.fixture
def read_only(cache: Path) -> Iterator[list[str]]:
    """Makes the cache read-only, once it is filled, for what is run with this prefix."""
    answers()
    if not ROOT:
        folders = [cache, *sorted(one for one in cache.rglob("*") if one.is_dir())]
        for folder in folders:
            folder.chmod(0o555)
        yield []
        for folder in folders:
            folder.chmod(0o755)
        return
    for path in (cache, *cache.rglob("*")):
        os.chown(path, 65534, 65534, follow_symlinks=False)
    # To root nothing is read-only; so the process gives up what makes it so, and becomes another
    # user to the cache's owner: CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH and CAP_FOWNER.
    script = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
for capability in (1, 2, 3):
    assert libc.prctl(24, capability, 0, 0, 0) == 0
os.execv(sys.argv[1], sys.argv[1:])
"""
    yield [sys.executable, "-c", script]


def test_a_read_only_cache_gives_what_it_has_and_a_typed_error_for_what_it_has_not(
    hub: Hub, tiny: str, cache: Path, read_only: list[str], child: Any
) -> None:
    hub.tag(NAME, "v1")
    hub.add(NAME, {"README.md": b"main goes on"}, revision="next")
    before = len(files_asked(hub))
    script = f"""
        import ebbtide
        for options in ({{}}, {{"local_files_only": True}}, {{"revision": "{tiny}"}},
                        {{"revision": "v1"}}):
            with ebbtide.pipeline("{TASK}", "{NAME}", **options) as pipe:
                print(pipe("the tide").shape, flush=True)
        for options in ({{"dtype": "q8"}}, {{"revision": "next"}}):
            try:
                ebbtide.pipeline("{TASK}", "{NAME}", **options)
            except ebbtide.EbbtideError as error:
                print(type(error).__name__, str(error)[:200].replace("\\n", " "))
        try:
            ebbtide.remove_cached("{NAME}")
        except ebbtide.DownloadError as error:
            print(error)
        print([one.name for one in ebbtide.cached_models()])
    """
    told = child(script, *read_only).succeeds().splitlines()
    assert told[:4] == ["(1, 5, 32)"] * 4
    assert told[4].startswith("DownloadError onnx/model_quantized.onnx of model")
    assert "cannot be written to the cache" in told[4]
    assert told[5].startswith("ModelNotFoundError Model 'org/tiny' has no config.json")
    assert "cannot be removed from the cache" in told[6]
    assert told[7:] == [f"['{NAME}']"]
    assert files_asked(hub)[before:] == []
    assert snapshot(cache, tiny).is_dir()


def test_a_file_in_the_place_of_the_cache_is_a_typed_error(
    hub: Hub, tiny: str, cache: Path
) -> None:
    cache.write_bytes(b"")
    with pytest.raises(ebbtide.DownloadError, match="cannot be written to the cache"):
        ebbtide.pipeline(TASK, NAME)
    assert ebbtide.cached_models() == []


def test_a_new_cache_folder_is_made(hub: Hub, tiny: str, cache: Path, tmp_path: Path) -> None:
    assert_same_as_folder(cache_dir=str(tmp_path / "a" / "b"))


def test_whom_the_umask_lets_may_read_all_of_the_cache(hub: Hub, tiny: str, cache: Path) -> None:
    before = os.umask(0o022)
    try:
        answers()
    finally:
        os.umask(before)
    modes = {
        one.relative_to(cache).as_posix(): oct(one.stat().st_mode & 0o777)
        for one in cache.rglob("*")
        if one.is_file() and ".locks" not in one.parts
    }
    assert len(modes) == 12
    assert set(modes.values()) == {"0o644"}, modes
