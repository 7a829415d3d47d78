"""The kernel's own signals that memory runs short, as descriptors to poll.

Linux has four, and a process may have any of them or none. Pressure stall triggers tell that tasks
wait for memory (documentation of the kernel: ``accounting/psi``). On cgroup version 2
``memory.events`` tells that a limit was met; on version 1 an eventfd is written as usage crosses a
threshold, and another as reclaim finds it hard (``admin-guide/cgroup-v1/memory``). A file that is
missing or may not be written gives no signal, and never raises.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from ebbtide.memory import cgroup

__all__ = [
    "LIMIT_SHARE",
    "CounterSignal",
    "EventsSignal",
    "PressureLevel",
    "Signal",
    "SignalGoneError",
    "StallSignal",
    "open_signals",
]

PressureLevel = Literal["some", "full", "limit"]

LIMIT_SHARE = 0.05
"""A limit counts as met where no more than this share of it is left."""

TIGHT = 0.25
"""Version 1's pressure level is believed where no more than this share of the limit is left.

It tells how hard reclaim works, and writing a large file made it "critical" with 70 % to spare.
"""

_POLLPRI = getattr(select, "POLLPRI", 2)
_POLLIN = getattr(select, "POLLIN", 1)
_POLLERR = getattr(select, "POLLERR", 8)

# Stalled time and window in microseconds, the quickest first. Without CAP_SYS_RESOURCE the kernel
# takes only windows that are whole multiples of 2 s (since Linux 6.5).
_TRIGGERS: dict[PressureLevel, tuple[tuple[int, int], ...]] = {
    "some": ((150_000, 1_000_000), (300_000, 2_000_000)),
    "full": ((100_000, 1_000_000), (200_000, 2_000_000)),
}


class SignalGoneError(Exception):
    """The signal's source is no more, as when its cgroup was removed. Never leaves this room."""


@dataclass(slots=True)
class Signal:
    """One descriptor that wakes the monitor.

    Attributes:
        fd: What to poll; the signal owns it.
        source: Where it comes from, such as "psi (machine)".
        level: What it means by itself; None where only a sample tells whether it means anything.
        believed_below: The share of the limit that may be left at most for it to be believed.
    """

    fd: int
    source: str
    level: PressureLevel | None
    believed_below: float = 1.0

    @property
    def mask(self) -> int:
        """What to poll for."""
        return int(_POLLPRI)

    def take(self, found: int) -> PressureLevel | None:
        """Answer the descriptor after a poll found something.

        Args:
            found: The mask that the poll returned.

        Returns:
            How hard memory is pressed, None where a sample has to tell.

        Raises:
            SignalGoneError: It will not come again.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Close the descriptor."""
        with suppress(OSError):
            os.close(self.fd)


@dataclass(slots=True)
class StallSignal(Signal):
    """A pressure stall trigger: closing it ends it, and a poll that returns has answered it."""

    def take(self, found: int) -> PressureLevel | None:
        """Say the trigger's level; an error means that its cgroup is gone."""
        if found & _POLLERR:
            raise SignalGoneError
        return self.level


@dataclass(slots=True)
class EventsSignal(Signal):
    """A version 2 ``memory.events``: it is ready whenever one of its counters has moved.

    ``max`` and ``high`` also count where only cached files had to go, which is every day's work,
    so they only wake. A kill, or an allocation that failed, needs no second look.
    """

    seen: int = 0

    def __post_init__(self) -> None:
        self.seen = self._count()

    def take(self, found: int) -> PressureLevel | None:
        """Read the counters, which also readies the file for its next poll."""
        seen = self._count()
        grown, self.seen = seen > self.seen, seen
        return "limit" if grown else None

    def _count(self) -> int:
        try:
            table = cgroup._table(os.fsdecode(os.pread(self.fd, 4096, 0)))
        except OSError as error:
            raise SignalGoneError from error
        return table.get("oom", 0) + table.get("oom_kill", 0)


@dataclass(slots=True)
class CounterSignal(Signal):
    """An eventfd that the kernel adds to, version 1's way."""

    @property
    def mask(self) -> int:
        """What to poll for."""
        return int(_POLLIN)

    def take(self, found: int) -> PressureLevel | None:
        """Empty the counter."""
        try:
            emptied = os.read(self.fd, 8)
        except BlockingIOError:
            return None
        except OSError as error:
            raise SignalGoneError from error
        if not emptied:
            raise SignalGoneError
        return self.level


def open_signals(root: cgroup.Root = "/") -> list[Signal]:
    """Open every signal that this kernel gives this process.

    Args:
        root: The directory that holds ``proc`` and ``sys``; other than "/" it is for tests.
    """
    opened: list[Signal] = []
    try:
        for make in (_stalls, _events, _counters):
            for signal in make(root):
                opened.append(signal)  # noqa: PERF402 (kept one by one, to be closed on an error)
    except BaseException:
        for signal in opened:
            signal.close()
        raise
    return opened


def _stalls(root: cgroup.Root) -> Iterator[Signal]:
    """Triggers of this process's own cgroup, of the machine where that has none."""
    places = [("psi (machine)", os.path.join(os.fspath(root), "proc/pressure/memory"))]
    own = next(cgroup.levels("memory", 2, root), None)
    if own is not None:
        places.insert(0, ("psi (cgroup v2)", os.path.join(own.path, "memory.pressure")))
    for level, triggers in _TRIGGERS.items():
        for source, path in places:
            fd = _first(_trigger(path, f"{level} {stall} {window}") for stall, window in triggers)
            if fd is not None:
                yield StallSignal(fd, source, level)
                break


def _trigger(path: str, text: str) -> Callable[[], int]:
    def attempt() -> int:
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode() + b"\0")
        except BaseException:
            os.close(fd)
            raise
        return fd

    return attempt


def _first(attempts: Iterator[Callable[[], int]]) -> int | None:
    for attempt in attempts:
        with suppress(OSError):
            return attempt()
    return None


def _events(root: cgroup.Root) -> Iterator[Signal]:
    for level in cgroup.memory_levels(root):
        if level.version == 2:
            with suppress(OSError):
                path = os.path.join(level.path, "memory.events")
                fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    yield EventsSignal(fd, "cgroup v2 events", None)
                except SignalGoneError:
                    os.close(fd)


def _counters(root: cgroup.Root) -> Iterator[Signal]:
    if not hasattr(os, "eventfd"):
        return
    for level in cgroup.memory_levels(root):
        if level.version != 1:
            continue
        threshold = int(level.limit * (1 - LIMIT_SHARE))
        watched: tuple[tuple[str, str, str, PressureLevel | None], ...] = (
            ("cgroup v1 threshold", "memory.usage_in_bytes", str(threshold), None),
            ("cgroup v1 pressure level", "memory.pressure_level", "medium", "some"),
            ("cgroup v1 pressure level", "memory.pressure_level", "critical", "full"),
        )
        for source, file, more, means in watched:
            fd = _register(level.path, file, more)
            if fd is not None:
                yield CounterSignal(fd, source, means, TIGHT)


def _register(group: str, file: str, more: str) -> int | None:
    """Have version 1 write to a new eventfd; the two other files are needed only meanwhile."""
    opened: list[int] = []
    counter = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        watched = os.open(os.path.join(group, file), os.O_RDONLY | os.O_CLOEXEC)
        opened.append(watched)
        control = os.open(os.path.join(group, "cgroup.event_control"), os.O_WRONLY | os.O_CLOEXEC)
        opened.append(control)
        os.write(control, f"{counter} {watched} {more}".encode())
    except OSError:
        os.close(counter)
        return None
    finally:
        for fd in opened:
            os.close(fd)
    return counter
