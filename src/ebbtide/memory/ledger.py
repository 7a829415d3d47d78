"""What native things are alive in this process, who owns them, and what each was measured to take.

Two pipelines that need the same thing (the same key) own one and the same, counted by owners; the
last owner frees it. Everything here runs on threads of Ebbtide's own, so a lock may be held: no
signal handler and no wait of a user's thread can come between.
"""

from __future__ import annotations

import abc
import dataclasses
import sys
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

from ebbtide.cancellation import CancelToken
from ebbtide.lifecycle import Remains, on_fork
from ebbtide.memory.allocator import allocator
from ebbtide.memory.probe import anonymous_bytes


class Native(abc.ABC):
    """Something with memory outside Python's heap, closed once; it may sleep meanwhile."""

    @property
    def measured(self) -> int | None:
        """Bytes that it takes as measured elsewhere, alone; None where nobody has."""
        return None

    @property
    def source(self) -> str:
        """What it was loaded from, for people; empty where there is no choice."""
        return ""

    @property
    def mapped(self) -> int:
        """Bytes of a file that it maps: clean pages, which other processes share."""
        return 0

    @abc.abstractmethod
    def close(self) -> Sequence[Remains]:
        """Free it; what is still referenced by somebody comes back."""

    @abc.abstractmethod
    def leak(self) -> None:
        """After a fork, in the child: make sure it is never freed."""

    def sleep(self) -> Sequence[Remains]:
        """Free it for now; what is still referenced by somebody comes back."""
        return ()

    def wake(self, token: CancelToken) -> None:  # noqa: B027 - not everything sleeps
        """Load it again, if it is asleep."""


class Activity:
    """What goes on in this process that moves its memory: loads, runs, disposals.

    A `Window` over one of them is *quiet* if no other overlapped it; only then does the process's
    change belong to it.
    """

    def __init__(self) -> None:
        self._active: dict[Window, None] = {}
        self.latest: Window | None = None

    @property
    def is_busy(self) -> bool:
        """Whether something goes on now."""
        return bool(self._active)

    @property
    def going_on(self) -> int:
        """How many things go on now."""
        return len(self._active)

    def forget(self) -> None:
        """In a forked child: nothing goes on here."""
        self._active.clear()
        self.latest = None

    def begin(self) -> Window:
        """Note that something starts, and open a window over it."""
        window = Window(self)
        self._active[window] = None
        self.latest = window
        window.alone = len(self._active) == 1
        return window

    def end(self, window: Window) -> bool:
        """Note that it has ended; returns whether it was alone all the time."""
        self._active.pop(window, None)
        return window.is_quiet


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

    @property
    def is_quiet(self) -> bool:
        """Whether nothing else went on since it began."""
        return self.alone and self._activity.latest is self

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
    awake: int = 0
    charge: int = 0
    quiet: bool = False
    turn: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    """Held while it goes to sleep or wakes."""

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
        source: What it was loaded from: ``original`` or ``prepared``; empty for a tokenizer.
        mapped: Bytes of a prepared file that it maps: clean pages, which all processes that map
            them share, and which the system takes back by itself.
        asleep: Whether it is freed for now.
    """

    kind: str
    anonymous: int
    quiet: bool
    owners: int
    source: str
    mapped: int
    asleep: bool


class Lease(Generic[NativeT_co]):
    """One owner's hold on a native thing; released once, by its lifecycle."""

    def __init__(self, ledger: Ledger, entry: _Entry, value: NativeT_co) -> None:
        self._ledger = ledger
        self._entry: _Entry | None = entry
        self._value: NativeT_co | None = value
        self._asleep = False

    @property
    def kind(self) -> str:
        """What it is, for people; empty once released."""
        return self._entry.kind if self._entry is not None else ""

    @property
    def value(self) -> NativeT_co | None:
        """The thing itself; None once released."""
        return self._value

    @property
    def charge(self) -> int:
        """Bytes that releasing this gives back: none while others own it too."""
        entry = self._entry
        if entry is None or self._asleep:
            return 0
        return entry.charge if entry.awake == 1 else 0

    @property
    def holding(self) -> Holding | None:
        """What it is and takes; None once released."""
        entry = self._entry
        value = self._value
        if entry is None or value is None:
            return None
        return Holding(
            entry.kind,
            entry.charge,
            entry.quiet,
            entry.owners,
            value.source,
            value.mapped,
            entry.awake == 0,
        )

    def shared_with(self) -> int:
        """How many other owners there are."""
        entry = self._entry
        return entry.owners - 1 if entry is not None else 0

    def sleep(self) -> Sequence[Remains]:
        """Have no use of it for now; once no owner has, it is freed until one wakes it."""
        entry = self._entry
        if entry is None or self._asleep:
            return ()
        self._asleep = True
        return self._ledger.rest(entry)

    def wake(self, token: CancelToken) -> None:
        """Have use of it again.

        Raises:
            EbbtideError: It could not be loaded again; it stays asleep.
        """
        entry = self._entry
        if entry is not None and self._asleep:
            self._ledger.rouse(entry, token)
            self._asleep = False

    def release(self) -> Sequence[Remains]:
        """Give it up; the last owner closes the thing."""
        entry, self._entry, self._value = self._entry, None, None
        return () if entry is None else self._ledger.give_up(entry, awake=not self._asleep)

    def leak(self) -> None:
        """After a fork, in the child: see `Native.leak`."""
        if self._value is not None:
            self._value.leak()


class Ledger:
    """Every native thing of this process, by key.

    Args:
        activity: Where loads are noted, so that their windows know whether they were quiet.

    Attributes:
        changes: Another number whenever what an owner holds may be another.
    """

    def __init__(self, activity: Activity) -> None:
        self._activity = activity
        self._quiet_charges: dict[Hashable, int] = {}
        self.changes = 0
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
                    self.changes += 1
                else:
                    entry.waiting.append(loaded)
                value = entry.value
            if first:
                return self._load(entry, load)
            if value is not None:
                return self._join(entry, value, token)  # type: ignore[arg-type]
            token.attach(loaded.set)
            loaded.wait()
            token.detach(loaded.set)

    def _load(self, entry: _Entry, load: Callable[[], NativeT]) -> Lease[NativeT]:
        window = self._activity.begin()
        allocator.trim()  # else it may lie in what calls freed, and seem to take less than it does
        window.measure()
        try:
            value = load()
        except BaseException:
            self._activity.end(window)
            with self._lock:
                del self._entries[entry.key]
            entry.loaded()
            raise
        allocator.trim()  # a load frees much of what it takes: 445 MB fell to 326, all weights
        self._charge(entry, value, window)
        with self._lock:
            entry.value = value
            entry.owners = entry.awake = 1
        entry.loaded()
        return Lease(self, entry, value)

    def _join(self, entry: _Entry, value: NativeT, token: CancelToken) -> Lease[NativeT]:
        try:
            self.rouse(entry, token)
        except BaseException:
            self.give_up(entry, awake=False)
            raise
        return Lease(self, entry, value)

    def _charge(self, entry: _Entry, value: Native, window: Window) -> None:
        """Charge a thing for what its load took, or for what it takes where that was measured.

        Of both the smaller: it may lie in pages that the process had already, and what a load freed
        need not have been given back yet.
        """
        change, quiet = window.close()
        charge, entry.quiet = max(0, change), quiet
        key = (entry.key, value.source)
        if quiet:
            self._quiet_charges[key] = charge
        else:
            charge = self._quiet_charges.get(key, charge if value.measured is None else sys.maxsize)
        entry.charge = charge if value.measured is None else min(charge, value.measured)
        self.changes += 1

    def rest(self, entry: _Entry) -> Sequence[Remains]:
        """One less has use of a thing; the last frees it for now. Called by leases only."""
        with entry.turn:
            entry.awake -= 1
            value = entry.value
            if entry.awake or value is None:
                return ()
            entry.charge = 0
            return value.sleep()

    def rouse(self, entry: _Entry, token: CancelToken) -> None:
        """One more has use of a thing; the first loads it again. Called by leases only."""
        with entry.turn:
            value = entry.value
            if not entry.awake and value is not None:
                window = self._activity.begin()
                allocator.trim()
                window.measure()
                try:
                    value.wake(token)
                except BaseException:
                    self._activity.end(window)
                    raise
                allocator.trim()
                self._charge(entry, value, window)
            entry.awake += 1

    def moved(self, value: Native) -> None:
        """Charge a thing anew that now is loaded from elsewhere, by what was measured there."""
        with self._lock:
            entries = [one for one in self._entries.values() if one.value is value]
        for entry in entries:
            if entry.awake and value.measured is not None:
                entry.charge, entry.quiet = value.measured, True
        self.changes += 1

    def give_up(self, entry: _Entry, *, awake: bool) -> Sequence[Remains]:
        """One owner less; called by leases only."""
        with self._lock:
            entry.owners -= 1
            value = entry.value
            self.changes += 1
            last = not entry.owners
            if last:
                del self._entries[entry.key]
                entry.value = None
        if last:
            return value.close() if value is not None else ()
        return self.rest(entry) if awake else ()


activity = Activity()
ledger = Ledger(activity)


on_fork(activity.forget)
on_fork(ledger.forget)
