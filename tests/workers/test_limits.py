"""A child's room: a cgroup of its own where one can be made, else the system's limit on data."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ebbtide.memory.cgroup import Level
from ebbtide.workers import limits
from ebbtide.workers.limits import Room

V1 = ("memory.limit_in_bytes", "memory.swappiness", "memory.oom_control", "cgroup.procs")
V2 = ("memory.max", "memory.swap.max", "memory.events", "cgroup.procs")
Tree = Callable[..., Path]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """Makes a tree of two cgroups, in which new ones have the kernel's files, where they may."""

    def make(version: int, files: tuple[str, ...], *, below: str = "own") -> Path:
        own = tmp_path / "own"
        own.mkdir()

        def levels(controller: str, asked: int, root: str = "/") -> Iterator[Level]:
            if asked == version:
                yield Level(version, str(own))  # type: ignore[arg-type]
                yield Level(version, str(tmp_path))  # type: ignore[arg-type]

        mkdir, rmdir = os.mkdir, os.rmdir

        def make_one(path: str) -> None:
            mkdir(path)
            if Path(path).parent.name == (below if below == "own" else tmp_path.name):
                for name in files:
                    (Path(path) / name).write_text("")

        def remove_one(path: str) -> None:
            for one in Path(path).iterdir():
                one.unlink()  # as the kernel's own files go
            rmdir(path)

        monkeypatch.setattr(limits.cgroup, "levels", levels)
        monkeypatch.setattr(limits.os, "mkdir", make_one)
        monkeypatch.setattr(limits.os, "rmdir", remove_one)
        return own

    return make


def test_nothing_is_made_where_nothing_is_limited(tree: Tree) -> None:
    own = tree(1, V1)
    room = Room(None)
    assert room.rlimit is None
    assert list(own.iterdir()) == []
    assert not room.was_overrun(-signal.SIGKILL, b"bad_alloc")


@pytest.mark.parametrize(("version", "files"), [(1, V1), (2, V2)])
def test_a_cgroup_below_the_own_one_has_the_limit_and_the_child(
    tree: Tree, version: int, files: tuple[str, ...]
) -> None:
    own = tree(version, files)
    room = Room(123_000)
    (folder,) = own.iterdir()
    assert room.rlimit is None
    assert (folder / files[0]).read_text() == "123000"
    assert (folder / files[1]).read_text() == "0"
    room.let_in(4711)
    assert (folder / "cgroup.procs").read_text() == "4711"
    (folder / "cgroup.procs").write_text("")
    room.close()
    assert list(own.iterdir()) == []


def test_on_version_2_a_cgroup_beside_the_own_one_does_as_well(tree: Tree, tmp_path: Path) -> None:
    own = tree(2, V2, below="above")
    room = Room(123_000)
    assert room.rlimit is None
    assert list(own.iterdir()) == []
    (folder,) = [one for one in tmp_path.iterdir() if one != own]
    assert (folder / "memory.max").read_text() == "123000"
    room.close()
    assert list(tmp_path.iterdir()) == [own]


@pytest.mark.parametrize("version", [1, 2])
def test_where_none_can_be_limited_the_child_holds_itself_to_it(
    tree: Tree, tmp_path: Path, version: int
) -> None:
    own = tree(version, ())
    room = Room(123_000)
    assert room.rlimit == 123_000
    assert list(tmp_path.rglob("ebbtide-*")) == []
    room.close()
    assert own.exists()


def test_where_the_child_cannot_be_let_in_it_holds_itself_to_it(tree: Tree) -> None:
    own = tree(1, V1[:-1])
    room = Room(123_000)
    room.let_in(4711)
    assert room.rlimit == 123_000
    assert list(own.iterdir()) == []


@pytest.mark.parametrize(
    ("version", "files", "text", "status", "overrun"),
    [
        (1, V1, "oom_kill_disable 0\nunder_oom 0\noom_kill 1", -signal.SIGKILL, True),
        (1, V1, "oom_kill_disable 0\nunder_oom 0\noom_kill 0", -signal.SIGKILL, False),
        (2, V2, "low 0\nmax 7\noom 1\noom_kill 2\n", -signal.SIGKILL, True),
        (2, V2, "low 0\nmax 7\noom 1\noom_kill 0\n", -signal.SIGKILL, False),
        (2, V2, "oom_kill 1", -signal.SIGABRT, False),
        (2, V2, "", -signal.SIGKILL, False),
    ],
)
def test_the_kernels_count_says_whether_it_ended_the_child(
    tree: Tree, version: int, files: tuple[str, ...], text: str, status: int, overrun: bool
) -> None:
    own = tree(version, files)
    room = Room(123_000)
    (folder,) = own.iterdir()
    (folder / files[2]).write_text(text)
    assert room.was_overrun(status, b"bad_alloc") is overrun
    room.close()


@pytest.mark.parametrize(
    ("status", "tail", "overrun"),
    [
        (-signal.SIGABRT, b"memory allocation of 7 bytes failed", True),
        (-signal.SIGABRT, b"what():  std::bad_alloc", True),
        (1, b"MemoryError", True),
        (-signal.SIGABRT, b"assertion failed", False),
        (0, b"MemoryError", False),
        (None, b"MemoryError", False),
    ],
)
def test_without_a_cgroup_its_last_words_say_it(
    tree: Tree, status: Any, tail: bytes, overrun: bool
) -> None:
    tree(1, ())
    assert Room(123_000).was_overrun(status, tail) is overrun


def test_what_a_child_left_in_its_cgroup_is_ended(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tree(1, V1)
    room = Room(123_000)
    (folder,) = own.iterdir()
    ended: list[tuple[int, int]] = []
    remove = os.rmdir

    def busy(path: str) -> None:
        if not ended:
            raise OSError(16, "Device or resource busy")
        remove(path)

    monkeypatch.setattr(limits.os, "rmdir", busy)
    monkeypatch.setattr(limits.os, "kill", lambda *one: ended.append(one))
    (folder / "cgroup.procs").write_text(f"4711\n{os.getpid()}\n")
    room.close()
    assert ended == [(4711, signal.SIGKILL)]
    assert list(own.iterdir()) == []
