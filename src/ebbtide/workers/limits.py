"""What a child may take of memory: held to it by a cgroup, or by the system's limit on data."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from typing import Final

from ebbtide.memory import cgroup

_numbers = itertools.count(1)

_SAID: Final = (
    b"memory allocation of", b"bad_alloc", b"MemoryError", b"Cannot allocate memory",
    b"out of memory", b"failed to allocate", b"Failed to allocate", b"can't start new thread",
)  # fmt: skip
"""What libraries say before they end a process that gets no memory."""

_RETRIES: Final = 20


class Room:
    """The memory that one child may take.

    Args:
        limit: Bytes; None for as much as there is.

    Attributes:
        rlimit: Bytes that the child is to hold itself to, as no cgroup does it; None: it need not.
    """

    def __init__(self, limit: int | None) -> None:
        self._folder = ""
        self._version = 0
        self.rlimit: int | None = None
        self._limit = limit
        if limit is not None and not self._make(limit):
            self.rlimit = limit

    def _make(self, limit: int) -> bool:
        """Make a cgroup below this process's own, or beside it; False where none can be made."""
        name = f"ebbtide-{os.getpid()}-{next(_numbers)}"
        for level in cgroup.levels("memory", 1):
            path = os.path.join(level.path, name)
            if _made(path, {"memory.limit_in_bytes": limit}):
                _write(path, "memory.swappiness", 0)
                _write(path, "memory.memsw.limit_in_bytes", limit)
                self._folder, self._version = path, 1
                return True
            break
        for level in itertools.islice(cgroup.levels("memory", 2), 2):
            path = os.path.join(level.path, name)
            if _made(path, {"memory.max": limit}):
                _write(path, "memory.swap.max", 0)
                self._folder, self._version = path, 2
                return True
        return False

    def let_in(self, pid: int) -> None:
        """Have a process in it, before it takes memory."""
        if self._folder and not _write(self._folder, "cgroup.procs", pid):
            self.close()
            self.rlimit = self._limit

    def was_overrun(self, status: int | None, tail: bytes) -> bool:
        """Whether a child that ended was ended for want of memory.

        Args:
            status: How it ended.
            tail: What it printed last.
        """
        if self._folder and status == -signal.SIGKILL:
            file = "memory.oom_control" if self._version == 1 else "memory.events"
            text = cgroup.read_text(self._folder, file)
            return any(
                name == "oom_kill" and count.strip() not in {"", "0"}
                for name, _, count in (line.partition(" ") for line in text.splitlines())
            )
        if self.rlimit is not None and status not in (0, None):
            return any(one in tail for one in _SAID)
        return False

    def close(self) -> None:
        """Take the cgroup away; what a child left in it ends with it."""
        folder, self._folder = self._folder, ""
        for _ in range(_RETRIES if folder else 0):
            try:
                os.rmdir(folder)
            except FileNotFoundError:
                return
            except OSError:
                self._end_rest(folder)
                time.sleep(0.02)
            else:
                return

    def _end_rest(self, folder: str) -> None:
        for line in cgroup.read_text(folder, "cgroup.procs").split():
            pid = cgroup.natural_number(line)
            if pid and pid != os.getpid():
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)


def _made(path: str, limits: dict[str, int]) -> bool:
    try:
        os.mkdir(path)
    except OSError:
        return False
    if all(_write(path, name, limit) for name, limit in limits.items()):
        return True
    with contextlib.suppress(OSError):
        os.rmdir(path)
    return False


def _write(path: str, name: str, value: int) -> bool:
    try:
        file = os.open(os.path.join(path, name), os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.write(file, str(value).encode())
    except OSError:
        return False
    finally:
        os.close(file)
    return True
