"""What is told of a load while it goes on, and the bars that show it on a terminal."""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ebbtide
from ebbtide.hub.events import Bars

from .loopback import Hub
from .served import NAME, NEEDED, ONNX, TASK, TINY, answers, child_output, part_of

SIZES = {name: (TINY / name).stat().st_size for name in NEEDED}
CUT = 100_000

Event = ebbtide.ProgressEvent


def told(**options: Any) -> list[Event]:
    """The events of a load."""
    events: list[Event] = []
    answers(progress=events.append, **options)
    return events


def by_file(events: list[Event]) -> dict[str, list[Event]]:
    found = defaultdict(list)
    for event in events:
        if "file" in event:
            found[event["file"]].append(event)
    return found


def test_each_file_is_told_from_its_beginning_to_its_end_and_the_pipeline_last(
    hub: Hub, tiny: str, cache: Path
) -> None:
    events = told()
    assert events[-1] == {"status": "ready", "task": TASK, "model": NAME}
    assert [one["status"] for one in events].count("ready") == 1
    files = by_file(events)
    assert set(files) == NEEDED
    for name, of_file in files.items():
        status = [one["status"] for one in of_file]
        assert status[:2] == ["initiate", "download"]
        assert status[-1] == "done"
        assert set(status[2:-1]) == {"progress"}
        assert of_file[0] == {"status": "initiate", "name": NAME, "file": name}
        loaded = [one["loaded"] for one in of_file[2:-1]]
        assert loaded == sorted(loaded)
        assert loaded[0] == 0
        assert loaded[-1] == SIZES[name]
        assert {one["total"] for one in of_file[2:-1]} == {SIZES[name]}
        for one in of_file[2:-1]:
            assert one["progress"] == pytest.approx(100 * one["loaded"] / SIZES[name])


def test_the_progress_of_all_is_the_sum_of_what_is_downloaded_together(
    hub: Hub, tiny: str, cache: Path
) -> None:
    events = told()
    together = [one for one in events if one["status"] == "progress_total"]
    assert [set(one["files"]) for one in together[:1]] == [{"config.json"}]
    for before, after in itertools.pairwise(events):
        if before["status"] == "progress":  # one of all after each of one file
            assert after["status"] == "progress_total"
            assert after["files"][before["file"]]["loaded"] == before["loaded"]
    for one in together:
        assert one["name"] == NAME
        assert one["loaded"] == sum(part["loaded"] for part in one["files"].values())
        assert one["total"] == sum(SIZES[name] for name in one["files"])
        assert one["progress"] == pytest.approx(100 * one["loaded"] / one["total"])
    assert set(together[-1]["files"]) == NEEDED - {"config.json"}
    assert together[-1]["progress"] == 100.0
    assert len({id(one["files"]) for one in together}) == len(together)


def test_a_file_that_is_resumed_begins_at_what_was_there(hub: Hub, tiny: str, cache: Path) -> None:
    part = part_of(cache)
    part.parent.mkdir(parents=True)
    part.write_bytes((TINY / ONNX).read_bytes()[:CUT])
    progress = [one for one in by_file(told())[ONNX] if one["status"] == "progress"]
    assert progress[0]["loaded"] == CUT
    assert progress[0]["progress"] == pytest.approx(100 * CUT / SIZES[ONNX])
    assert progress[-1]["loaded"] == SIZES[ONNX]


def test_a_file_that_begins_again_is_told_from_its_beginning(
    hub: Hub, tiny: str, cache: Path
) -> None:
    hub.fault("/cdn/*", cut_after=CUT)
    hub.fault("/cdn/*", ignore_range=True)
    loaded = [one["loaded"] for one in by_file(told())[ONNX] if one["status"] == "progress"]
    again = loaded.index(CUT) + 1
    assert loaded[again] < CUT
    assert loaded[-1] == SIZES[ONNX]


def test_of_what_is_cached_and_of_a_folder_only_that_it_is_ready_is_told(
    hub: Hub, tiny: str, cache: Path
) -> None:
    answers()
    assert told() == [{"status": "ready", "task": TASK, "model": NAME}]
    assert told(local_files_only=True) == [{"status": "ready", "task": TASK, "model": NAME}]
    assert told(model=TINY) == [{"status": "ready", "task": TASK, "model": str(TINY)}]


def test_what_a_failed_load_told_ends_without_ready(hub: Hub, tiny: str, cache: Path) -> None:
    hub.fault("/cdn/*", status=500)
    events: list[Event] = []
    with pytest.raises(ebbtide.DownloadError):
        ebbtide.pipeline(TASK, NAME, progress=events.append)
    assert "ready" not in [one["status"] for one in events]
    assert "done" not in [one["status"] for one in by_file(events)[ONNX]]


def test_looking_at_a_model_tells_of_what_it_downloads(hub: Hub, tiny: str, cache: Path) -> None:
    events: list[Event] = []
    ebbtide.model_files(TASK, NAME, progress=events.append)
    assert {one.get("file") for one in events if "file" in one} == {"config.json"}


@pytest.mark.parametrize("wrong", ["yes", 1, 0, [], {}])
def test_what_is_no_callback_is_refused(hub: Hub, tiny: str, cache: Path, wrong: Any) -> None:
    with pytest.raises(ebbtide.InputError, match="progress takes a function") as caught:
        ebbtide.pipeline(TASK, NAME, progress=wrong)
    assert caught.value.value == wrong
    assert hub.requests == []


# Bars


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False), (None, False)])
def test_bars_are_shown_where_they_are_asked_for_and_not_where_there_is_no_terminal(
    hub: Hub, tiny: str, cache: Path, capfd: pytest.CaptureFixture[str], progress: bool | None,
    shown: bool,
) -> None:  # fmt: skip
    answers(progress=progress)
    out, err = capfd.readouterr()
    assert out == ""
    assert [name in err for name in sorted(NEEDED)] == [shown] * 5
    assert ("100%" in err) == shown


@pytest.mark.parametrize(
    "fault", [{"status": 500}, {"flip": 9}, {}], ids=["error", "wrong", "none"]
)
def test_bars_leave_the_terminal_whatever_became_of_the_download(
    hub: Hub, tiny: str, cache: Path, capfd: pytest.CaptureFixture[str], fault: dict[str, Any]
) -> None:
    if fault:
        hub.fault("/cdn/*", **fault)
    bars = Bars()
    with contextlib.suppress(ebbtide.DownloadError):
        answers(progress=bars)
    assert bars._bars == {}
    assert ONNX in capfd.readouterr().err


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """A pseudo terminal: the test's end, and a process's."""
    pty = pytest.importorskip("pty")
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    yield ours, theirs
    os.close(ours)


@pytest.mark.parametrize(("progress", "shown"), [("None", True), ("False", False)])
def test_on_a_terminal_bars_are_shown_unless_they_are_declined(
    hub: Hub, tiny: str, cache: Path, child: Any, terminal: tuple[int, int], progress: str,
    shown: bool,
) -> None:  # fmt: skip
    ours, theirs = terminal
    script = f"""
        import threading
        import ebbtide
        ebbtide.pipeline("{TASK}", "{NAME}", progress={progress}).dispose()
        print(sorted(one.name for one in threading.enumerate()
                     if not one.name.startswith("ebbtide-download")))
    """
    process = child(script, stderr=theirs)
    os.close(theirs)
    seen = child_output(ours)
    assert process.line() == "['MainThread', 'ebbtide-native-0', 'ebbtide-reaper']"
    assert process.process.wait(20) == 0
    assert [name in seen for name in sorted(NEEDED)] == [shown] * 5, seen
    assert shown or seen == ""


class Without:
    """A stderr that is no file: it can be written to."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        """Nothing to do."""


@pytest.mark.parametrize("stderr", ["none", "a stand-in", "closed"])
def test_a_stderr_that_is_none_or_closed_is_no_terminal(
    hub: Hub, tiny: str, cache: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, tmp_path: Path
) -> None:
    closed = (tmp_path / "stderr").open("w")
    closed.close()
    stand_ins = {"none": None, "a stand-in": Without(), "closed": closed}
    monkeypatch.setattr(sys, "stderr", stand_ins[stderr])
    assert answers().shape == (1, 5, 32)
