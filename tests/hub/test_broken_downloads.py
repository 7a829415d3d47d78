"""A download that breaks is gone on with, at once or by a later load; what is wrong is not used."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import ebbtide

from .loopback import Hub
from .served import (
    NAME,
    ONNX,
    TASK,
    TINY,
    assert_same_as_folder,
    everything_below,
    files_asked,
    part_of,
    ranges,
    snapshot,
)

CDN = f"/cdn/*/{ONNX}"
CONFIG = f"/{NAME}/resolve/*/config.json"
SIZE = (TINY / ONNX).stat().st_size
CUT = 100_000


def failed(**options: Any) -> ebbtide.DownloadError:
    """The error of a load."""
    with pytest.raises(ebbtide.DownloadError) as caught:
        ebbtide.pipeline(TASK, NAME, **options)
    return caught.value


def leave_a_part(hub: Hub, cache: Path) -> Path:
    """Let a download end after some bytes for good, and return what is left of it."""
    hub.fault(CDN, cut_after=CUT)
    gone = hub.fault(CDN, refuse=True, times=None)
    assert failed().unreachable
    gone.end()
    part = part_of(cache)
    assert part.stat().st_size == CUT
    return part


def assert_unusable(cache: Path, commit: str, name: str) -> None:
    """Nothing of a file is left that a load would take for it."""
    assert not (snapshot(cache, commit) / name).exists()
    blobs = list(cache.glob("models--*/blobs/*"))
    assert not [one for one in blobs if one.stat().st_size == (TINY / name).stat().st_size]
    with pytest.raises(
        (ebbtide.DownloadError, ebbtide.ModelNotFoundError), match="not in the cache"
    ):
        ebbtide.pipeline(TASK, NAME, revision=commit, local_files_only=True)


# The connection


def test_a_connection_that_is_cut_is_resumed_in_the_same_load(
    hub: Hub, tiny: str, cache: Path
) -> None:
    hub.fault(CDN, cut_after=CUT // 4, times=9)  # more often than it may bring nothing
    assert_same_as_folder()
    assert ranges(hub) == [None, *(f"bytes={CUT // 4 * times}-" for times in range(1, 10))]
    assert not part_of(cache).exists()


def test_a_connection_that_is_reset_is_resumed_in_the_same_load(
    hub: Hub, tiny: str, cache: Path
) -> None:
    hub.fault(CDN, cut_after=CUT, reset=True, times=2)
    assert_same_as_folder()
    assert len(ranges(hub)) == 3


@pytest.mark.parametrize("pattern", [CDN, f"*/{ONNX}"], ids=["the CDN's", "the hub's"])
def test_a_connection_that_is_closed_without_an_answer_is_tried_again(
    hub: Hub, tiny: str, cache: Path, pattern: str
) -> None:
    hub.fault(pattern, refuse=True, times=4)
    assert_same_as_folder()


def test_a_connection_that_stalls_in_the_middle_of_a_file_is_resumed_in_the_same_load(
    hub: Hub, tiny: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.fault(CDN, stall_after=CUT)
    assert_same_as_folder()
    assert ranges(hub) == [None, f"bytes={CUT}-"]


def test_a_connection_that_always_stalls_is_given_up_and_a_later_load_succeeds(
    hub: Hub, tiny: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    stalled = hub.fault(CDN, hold=True, times=None)
    error = failed()
    assert (error.model, error.file, error.status) == (NAME, ONNX, None)
    assert error.unreachable
    stalled.end()
    assert_same_as_folder()


def test_a_hub_that_goes_away_between_the_look_up_and_a_file_is_unreachable(
    hub: Hub, tiny: str, cache: Path
) -> None:
    def close(event: ebbtide.ProgressEvent) -> None:
        if event["status"] == "initiate" and event["file"] == ONNX:
            hub.close()

    hub.fault(CDN, hold=True)
    error = failed(progress=close)
    assert error.unreachable
    assert error.file in {ONNX, "tokenizer.json", "tokenizer_config.json",
                          "special_tokens_map.json"}  # fmt: skip


def test_what_one_load_could_not_finish_the_next_resumes(hub: Hub, tiny: str, cache: Path) -> None:
    part = leave_a_part(hub, cache)
    before = len(ranges(hub))
    assert_same_as_folder()
    assert ranges(hub)[before:] == [f"bytes={CUT}-"]
    assert not part.exists()


def test_what_a_killed_process_left_the_next_one_resumes(
    hub: Hub, tiny: str, cache: Path, child: Any
) -> None:
    stalled = hub.fault(CDN, stall_after=CUT)
    script = f"""
        import ebbtide
        def tell(event):
            if event.get("file") == "{ONNX}" and event.get("loaded") == {CUT}:
                print("there", flush=True)
        ebbtide.pipeline("{TASK}", "{NAME}", progress=tell)
    """
    killed = child(script)
    killed.until("there")
    killed.process.send_signal(signal.SIGKILL)
    assert killed.result()[0] == -signal.SIGKILL
    stalled.end()
    there = part_of(cache).stat().st_size
    assert 0 < there <= CUT
    assert_same_as_folder()
    assert ranges(hub) == [None, f"bytes={there}-"]


def test_a_server_that_ignores_ranges_sends_the_file_again_and_that_is_what_is_used(
    hub: Hub, tiny: str, cache: Path
) -> None:
    hub.fault(CDN, cut_after=CUT)
    ignored = hub.fault(CDN, ignore_range=True)
    assert_same_as_folder()
    assert ignored.hits == 1
    assert ranges(hub) == [None, f"bytes={CUT}-"]


def test_a_server_that_ignores_ranges_and_always_cuts_is_given_up(
    hub: Hub, tiny: str, cache: Path
) -> None:
    hub.fault(CDN, times=None, cut_after=CUT, ignore_range=True)
    hub.fault(CDN, times=None, cut_after=CUT)
    assert failed().unreachable
    assert 5 <= len(ranges(hub)) <= 7


def test_a_part_that_the_server_says_is_none_of_the_file_is_thrown_away(
    hub: Hub, tiny: str, cache: Path
) -> None:
    part = leave_a_part(hub, cache)
    hub.fault(CDN, status=416)
    assert failed().status == 416
    assert part.stat().st_size == 0
    assert_same_as_folder()
    assert ranges(hub)[-1] is None


# The content


@pytest.mark.parametrize(
    ("pattern", "name"), [(CDN, ONNX), (CONFIG, "config.json")], ids=["sha256", "git's"]
)
def test_a_file_of_another_hash_is_an_error_and_not_used_and_the_next_load_succeeds(
    hub: Hub, tiny: str, cache: Path, pattern: str, name: str
) -> None:
    hub.fault(pattern, flip=-7)
    error = failed()
    assert (error.model, error.file, error.status) == (NAME, name, None)
    assert not error.unreachable
    assert "its hash is" in str(error)
    assert "It was thrown away: try again" in str(error)
    assert not part_of(cache, name).exists()
    assert_unusable(cache, tiny, name)
    assert_same_as_folder()


@pytest.mark.parametrize("change", [b"\0", b"more than it should be" * 9999, None],
                         ids=["one more", "many more", "one less"])  # fmt: skip
@pytest.mark.parametrize(
    ("pattern", "name"), [(CDN, ONNX), (CONFIG, "config.json")], ids=["large", "small"]
)
def test_a_file_of_another_size_is_an_error_and_not_used_and_the_next_load_succeeds(
    hub: Hub, tiny: str, cache: Path, pattern: str, name: str, change: bytes | None
) -> None:
    content = (TINY / name).read_bytes()
    hub.fault(pattern, status=200, body=content[:-1] if change is None else content + change)
    error = failed()
    assert (error.model, error.file, error.status) == (NAME, name, None)
    assert f"in place of {len(content):,}" in str(error)
    assert part_of(cache, name).stat().st_size == 0
    assert_unusable(cache, tiny, name)
    assert_same_as_folder()


def test_a_file_that_never_ends_is_not_written_on_and_on(hub: Hub, tiny: str, cache: Path) -> None:
    told: list[int] = []

    def tell(event: ebbtide.ProgressEvent) -> None:
        if event["status"] == "progress" and event["file"] == ONNX:
            told.append(event["loaded"])

    hub.fault(CDN, status=200, body=bytes(20_000_000))
    assert "in place of" in str(failed(progress=tell))
    assert max(told) < 2_000_000


def test_a_part_that_was_damaged_on_the_disk_is_found_out_by_its_hash(
    hub: Hub, tiny: str, cache: Path
) -> None:
    part = leave_a_part(hub, cache)
    content = bytearray(part.read_bytes())
    content[500] ^= 1
    part.write_bytes(content)
    assert "its hash is" in str(failed())
    assert_unusable(cache, tiny, ONNX)
    assert_same_as_folder()


@pytest.mark.parametrize("left", ["longer", "all", "all but wrong", "nothing"])
def test_a_part_of_any_length_becomes_the_file_or_is_thrown_away(
    hub: Hub, tiny: str, cache: Path, left: str
) -> None:
    part = leave_a_part(hub, cache)
    before = len(ranges(hub))
    content = (TINY / ONNX).read_bytes()
    part.write_bytes(
        {"longer": content + b"!", "all": content, "all but wrong": bytes(SIZE), "nothing": b""}[
            left
        ]
    )
    if left == "all but wrong":
        assert "its hash is" in str(failed())
    assert_same_as_folder()
    assert ranges(hub)[before:] == ([] if left == "all" else [None])


def test_a_part_of_one_commit_serves_another_that_has_the_same_file(
    hub: Hub, tiny: str, cache: Path
) -> None:
    leave_a_part(hub, cache)
    before = len(ranges(hub))
    files = {one: (TINY / one).read_bytes() for one in everything_below(TINY)}
    hub.add(NAME, {**files, "README.md": b"new"}, lfs=["*.onnx"])
    assert_same_as_folder()
    assert ranges(hub)[before:] == [f"bytes={CUT}-"]


def test_an_empty_file_is_had_without_a_request(hub: Hub, tiny: str, cache: Path) -> None:
    files = {one: (TINY / one).read_bytes() for one in everything_below(TINY)}
    hub.add(NAME, {**files, "special_tokens_map.json": b""}, lfs=["*.onnx"])
    events: list[ebbtide.ProgressEvent] = []
    with pytest.raises(ebbtide.LoadError, match="is not JSON"):
        ebbtide.pipeline(TASK, NAME, progress=events.append)
    assert "special_tokens_map.json" not in files_asked(hub)
    told = [one for one in events if one.get("file") == "special_tokens_map.json"]
    assert [one["status"] for one in told] == ["initiate", "download", "progress", "done"]
    assert told[2]["progress"] == 100.0
