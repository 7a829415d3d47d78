"""What native things are alive in this process, who owns them, and what each was measured to take.

Two pipelines that need the same thing (the same key) own one and the same, counted by owners; the
last owner frees it. Everything here runs on threads of Ebbtide's own, so a lock may be held: no
signal handler and no wait of a user's thread can come between.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, Protocol, TypeVar

from ebbtide.cancellation import CancelToken
from ebbtide.lifecycle import Remains, on_fork
from ebbtide.memory.allocator import allocator
from ebbtide.memory.probe import anonymous_bytes


class Native(Protocol):
    """Something with memory outside Python's heap, closed once."""

    def close(self) -> Sequence[Remains]:
        """Free it; what is still referenced by somebody comes back."""

    def leak(self) -> None:
        """After a fork, in the child: make sure it is never freed."""


class Activity:
    """What goes on in this process that moves its memory: loads, runs, disposals.

    A `Window` over one of them is *quiet* if no other overlapped it; only then does the process's
    change belong to it.
    """

    def __init__(self) -> None:
        self._active: dict[Window, None] = {}
        self._latest: Window | None = None

    def forget(self) -> None:
        """In a forked child: nothing goes on here."""
        self._active.clear()
        self._latest = None

    def begin(self) -> Window:
        """Note that something starts, and open a window over it."""
        window = Window(self)
        self._active[window] = None
        self._latest = window
        window.alone = len(self._active) == 1
        return window

    def end(self, window: Window) -> bool:
        """Note that it has ended; returns whether it was alone all the time."""
        self._active.pop(window, None)
        return window.alone and self._latest is window


class Window:
    """A span over which the process's anonymous memory is compared."""

    __slots__ = ("_activity", "alone", "before")

    def __init__(self, activity: Activity) -> None:
        self._activity = activity
        self.alone = False
        self.before: int | None = 0

    def measure(self) -> Window:
        """Take the figure to compare with."""
        self.before = _read()
        return self

    def change(self) -> int | None:
        """The change in bytes since `measure`; None where it cannot be read."""
        now = _read()
        return None if now is None or self.before is None else now - self.before

    def close(self) -> tuple[int, bool]:
        """The change in bytes since `measure`, and whether the window was quiet.

        What cannot be read changes nothing and proves nothing: 0, and not quiet.
        """
        change = self.change()
        quiet = self._activity.end(self)
        return (0, False) if change is None else (change, quiet)


def _read() -> int | None:
    try:
        return anonymous_bytes()
    except OSError:  # no descriptor is free
        return None


NativeT = TypeVar("NativeT", bound=Native)
NativeT_co = TypeVar("NativeT_co", bound=Native, covariant=True)


@dataclasses.dataclass(eq=False, slots=True)
class _Entry:
    """One native thing: the key it is shared by, and what is known of it."""

    key: Hashable
    kind: str
    waiting: list[threading.Event] = dataclasses.field(default_factory=list)
    value: Native | None = None
    owners: int = 0
    charge: int = 0
    quiet: bool = False

    def loaded(self) -> None:
        """Wake who waits for the load; it has ended, well or not."""
        for one in self.waiting:
            one.set()
        self.waiting.clear()


@dataclasses.dataclass(frozen=True, slots=True)
class Holding:
    """One native thing as an owner sees it.

    Attributes:
        kind: ``session`` or ``tokenizer``.
        anonymous: Bytes of anonymous memory that its load took.
        quiet: Whether that was measured while nothing else went on.
        owners: How many pipelines own it.
    """

    kind: str
    anonymous: int
    quiet: bool
    owners: int


class Lease(Generic[NativeT_co]):
    """One owner's hold on a native thing; released once, by its lifecycle."""

    def __init__(self, ledger: Ledger, entry: _Entry, value: NativeT_co) -> None:
        self._ledger = ledger
        self._entry: _Entry | None = entry
        self._value: NativeT_co | None = value

    @property
    def value(self) -> NativeT_co | None:
        """The thing itself; None once released."""
        return self._value

    @property
    def charge(self) -> int:
        """Bytes that releasing this gives back: none while others own it too."""
        entry = self._entry
        return entry.charge if entry is not None and entry.owners == 1 else 0

    @property
    def holding(self) -> Holding | None:
        """What it is and takes; None once released."""
        entry = self._entry
        if entry is None:
            return None
        return Holding(entry.kind, entry.charge, entry.quiet, entry.owners)

    def shared_with(self) -> int:
        """How many other owners there are."""
        entry = self._entry
        return entry.owners - 1 if entry is not None else 0

    def release(self) -> Sequence[Remains]:
        """Give it up; the last owner closes the thing."""
        entry, self._entry, self._value = self._entry, None, None
        return () if entry is None else self._ledger.give_up(entry)

    def leak(self) -> None:
        """After a fork, in the child: see `Native.leak`."""
        if self._value is not None:
            self._value.leak()


class Ledger:
    """Every native thing of this process, by key.

    Args:
        activity: Where loads are noted, so that their windows know whether they were quiet.
    """

    def __init__(self, activity: Activity) -> None:
        self._activity = activity
        self._quiet_charges: dict[Hashable, int] = {}
        self.forget()

    def forget(self) -> None:
        """In a forked child: nothing here is owned, and no lock is held."""
        self._lock = threading.Lock()
        self._entries: dict[Hashable, _Entry] = {}

    def acquire(
        self, key: Hashable, kind: str, load: Callable[[], NativeT], token: CancelToken
    ) -> Lease[NativeT]:
        """Own the thing of this key: the one that is alive, or a new one from ``load``.

        Args:
            key: Equal keys mean one thing; the kind is part of it.
            kind: What it is, for people.
            load: Makes it; runs once for any number of threads that ask at the same time. If it
                raises, the next who waits tries for itself.
            token: Ends the wait for somebody else's load.

        Raises:
            PipelineCancelledError: The token was cancelled.
        """
        key = (kind, key)
        while True:
            token.check()
            loaded = threading.Event()
            with self._lock:
                entry = self._entries.get(key)
                first = entry is None
                if entry is None:
                    entry = self._entries[key] = _Entry(key, kind)
                elif entry.value is not None:
                    entry.owners += 1
                    return Lease(self, entry, entry.value)  # type: ignore[arg-type]
                else:
                    entry.waiting.append(loaded)
            if first:
                return self._load(entry, load)
            token.attach(loaded.set)
            loaded.wait()
            token.detach(loaded.set)

    def _load(self, entry: _Entry, load: Callable[[], NativeT]) -> Lease[NativeT]:
        window = self._activity.begin().measure()
        try:
            value = load()
        except BaseException:
            self._activity.end(window)
            with self._lock:
                del self._entries[entry.key]
            entry.loaded()
            raise
        allocator.trim()  # a load frees much of what it takes: 445 MB fell to 326, all weights
        change, entry.quiet = window.close()
        entry.charge = max(0, change)
        if entry.quiet:
            self._quiet_charges[entry.key] = entry.charge
        else:
            entry.charge = self._quiet_charges.get(entry.key, entry.charge)
        with self._lock:
            entry.value = value
            entry.owners = 1
        entry.loaded()
        return Lease(self, entry, value)

    def give_up(self, entry: _Entry) -> Sequence[Remains]:
        """One owner less; called by leases only."""
        with self._lock:
            entry.owners -= 1
            if entry.owners:
                return ()
            del self._entries[entry.key]
            value, entry.value = entry.value, None
        return value.close() if value is not None else ()


activity = Activity()
ledger = Ledger(activity)


on_fork(activity.forget)
on_fork(ledger.forget)
