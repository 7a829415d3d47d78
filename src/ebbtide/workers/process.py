"""One child process: how it is started, heard, ended and reaped."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from ebbtide._settings import settings
from ebbtide.errors import LoadError
from ebbtide.receipts import DisposalReceipt
from ebbtide.workers.calls import Call
from ebbtide.workers.channel import Channel, ClosedError
from ebbtide.workers.messages import packet

GO: Final = b"go"
"""What a child waits for before it imports anything large: by then it is in its cgroup."""

_MAIN: Final = "ebbtide.workers.child"
_TAIL: Final = 16_384
"""Bytes of what a child printed last that are kept."""

AT_ONCE: Final = 65_536
"""Bytes that are read at once of what a child prints."""


class Child:
    """One process that runs a pipeline, as its parent sees it.

    Args:
        channel: The way to it.
        printed: Where what it prints can be read.
        pid: Its number.
        pidfd: A descriptor of it, which is readable once it has ended.

    Attributes:
        calls: What runs there, by number.
        ready: Whether its pipeline is loaded.
        ending: Whether it was asked to end.
        is_heard: Whether it may still say something.
        killed: The signal that was sent to it; empty where none was.
        used: When its last call ended, by `time.monotonic`.
        tail: What it printed last.
        stayed: The call that had it sleep, and its receipt, where memory stayed all the same.
    """

    def __init__(self, channel: Channel, printed: int, pid: int, pidfd: int) -> None:
        self.channel = channel
        socket_of(channel).setblocking(False)  # gevent's sockets wait whatever a message says
        self.printed = printed
        self.pid = pid
        self.pidfd = pidfd
        self.calls: dict[int, Call] = {}
        self.ready = False
        self.ending = False
        self.is_heard = True
        self.used = time.monotonic()
        self.tail = b""
        self.killed = ""
        self.stayed: tuple[Call, DisposalReceipt] | None = None

    def say(self, kind: str, *rest: Any) -> bool:
        """Send a message of ours; False where there is no room, or nobody who hears."""
        try:
            return self.channel.send(packet(kind, *rest), wait=False)
        except ClosedError:
            return False

    def go(self) -> None:
        """Let it begin."""
        with contextlib.suppress(OSError):
            socket_of(self.channel).send(GO)

    def read_printed(self) -> bytes:
        """What it printed since the last time; empty where there is nothing."""
        if self.printed < 0:
            return b""
        try:
            found = os.read(self.printed, AT_ONCE)
        except BlockingIOError:
            return b""
        if not found:
            self.close_printed()
        self.tail = (self.tail + found)[-_TAIL:]
        return found

    def close_printed(self) -> None:
        """Hear no more of what it prints."""
        printed, self.printed = self.printed, -1
        if printed >= 0:
            os.close(printed)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)
        self.killed = signal.Signals(number).name

    def reap(self) -> int | None:
        """Its exit status, a signal as a negative number; called once it has ended."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of all descriptors, once it is reaped."""
        self.close_printed()
        self.channel.end()
        pidfd, self.pidfd = self.pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)

    def leak(self) -> None:
        """In a forked child of ours: it is not ours, and must see its parent's end."""
        self.close_printed()
        socket_of(self.channel).close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def socket_of(channel: Channel) -> socket.socket:
    """A channel's socket."""
    return channel._end


class _Spawned(Child):
    """A child that is a new Python."""

    def __init__(self, channel: Channel, printed: int, process: subprocess.Popen[bytes]) -> None:
        super().__init__(channel, printed, process.pid, os.pidfd_open(process.pid))
        self._process = process

    def reap(self) -> int | None:
        return self._process.wait()

    def leak(self) -> None:
        super().leak()
        self._process.returncode = 0  # it is another's child here


def has_python() -> bool:
    """Whether there is a Python to run: a frozen program would start itself again."""
    return bool(sys.executable) and not getattr(sys, "frozen", False)


def check_possible(label: str) -> None:
    """Raise where no process can be started.

    Raises:
        LoadError: This system, or this interpreter, cannot.
    """
    if not sys.platform.startswith("linux"):
        raise LoadError(
            f"{label} cannot have a process of its own: that takes Linux. Leave isolate= out.",
            path=sys.executable or "",
        )
    if not has_python():
        raise LoadError(
            f"{label} cannot have a process of its own: this program is not run by a Python that"
            " could be started again. Leave isolate= out.",
            path=sys.executable or "",
        )


def environment() -> dict[str, str]:
    """This process's environment, in which a child finds this very Ebbtide."""
    found = dict(os.environ)
    home = str(Path(__file__).parent.parent.parent)
    if home not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        found["PYTHONPATH"] = os.pathsep.join(filter(None, (home, found.get("PYTHONPATH"))))
    return found


def load_request(
    loader: str, arguments: Sequence[Any], options: Mapping[str, Any], room: int | None
) -> dict[str, Any]:
    """What a child is told to load, and what it is to have of this process.

    Args:
        loader: What makes the pipeline, as ``module:function``.
        arguments: What that is called with, by position.
        options: And by name.
        room: Bytes that the child is to hold itself to; None for no limit, or where a cgroup does.
    """
    known = {
        name: one.level
        for name, one in tuple(logging.root.manager.loggerDict.items())
        if isinstance(one, logging.Logger) and one.level
    }
    return {
        "loader": loader,
        "arguments": list(arguments),
        "options": dict(options),
        "settings": {one.name: getattr(settings, one.name) for one in fields(settings)},
        "folder": _folder(),
        "path": list(sys.path),
        "environment": environment(),
        "levels": {"": logging.root.level} | known,
        "room": room,
    }


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def pipe() -> tuple[int, int]:
    """What a child prints into, and where that can be read without waiting."""
    reads, writes = os.pipe()
    os.set_blocking(reads, False)
    return reads, writes


def spawn() -> Child:
    """Start a new Python, which waits for `Child.go`. Its parent is this thread.

    Raises:
        OSError: The system has no room for it.
    """
    channel, there = Channel.pair()
    reads, writes = pipe()
    try:
        process = subprocess.Popen(  # noqa: S603 - a Python that runs a module of ours
            [sys.executable, "-P", "-m", _MAIN, str(there.fileno()), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=writes,
            stderr=writes,
            pass_fds=(there.fileno(),),
            env=environment(),
            start_new_session=True,  # a terminal's Ctrl-C is for us
        )
    except BaseException:
        os.close(reads)
        raise
    finally:
        os.close(writes)
        there.close()
    try:
        return _Spawned(channel, reads, process)
    except OSError:  # the system has no pidfds, or none free
        os.close(reads)
        process.kill()
        process.wait()
        raise
