"""What a manager knows of one pipeline, loaded or not, and of those who ask for it.

Two sides meet here, and neither takes a lock. A user's thread that finds a slot open notes its hold
first and looks whether the slot is open second; the desk closes it first and looks at the holds
second. So either the user sees that it is closed and asks the desk, or the desk sees the hold and
leaves the pipeline alone. All else is written by the desk's thread alone.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from ebbtide.cancellation import call_all
from ebbtide.manager.policy import Entry, Use
from ebbtide.receipts import DisposalReceipt


class Phase(enum.Enum):
    """Where a slot's pipeline is."""

    EMPTY = "empty"
    LOADING = "loading"
    READY = "ready"
    FALLING_ASLEEP = "falling asleep"
    ASLEEP = "asleep"
    WAKING = "waking"
    EVICTING = "evicting"


@dataclasses.dataclass(frozen=True, slots=True)
class Size:
    """What a pipeline takes, in bytes; estimated before its first load, measured after it.

    Attributes:
        awake: Anonymous memory once it is loaded; its share, where something is shared.
        asleep: What of that stays while it sleeps.
        peak: Anonymous memory at most while it is loaded; at least ``awake``.
        mapped: Bytes of prepared files that it maps.
        frees: What of ``awake`` comes back when it goes; less where others own some of it.
        devices: Bytes on each device that has memory of its own, as ``cuda:0``.
        is_measured: Whether these figures were measured.
    """

    awake: int
    asleep: int = 0
    peak: int = 0
    mapped: int = 0
    frees: int | None = None
    devices: Mapping[str, int] = dataclasses.field(default_factory=dict)
    is_measured: bool = False

    @property
    def loading(self) -> int:
        """What a load is charged with while it goes on."""
        return max(self.awake, self.peak)

    @property
    def given_back(self) -> int:
        """What comes back when it goes."""
        return self.awake if self.frees is None else min(self.awake, self.frees)


@dataclasses.dataclass(eq=False, slots=True)
class Hold:
    """One lease of a pipeline.

    Attributes:
        site: Where it was asked for, as ``(file, line)``.
        since: When it was given, in seconds of the manager's clock.
        keep_alive: For how many seconds the pipeline is kept once it is returned.
        lease: What its user has.
    """

    site: tuple[str, int]
    since: float
    keep_alive: float
    lease: weakref.ref[Any] | None = None

    @property
    def place(self) -> str:
        """Where it was asked for, as ``file:line``."""
        return f"{self.site[0]}:{self.site[1]}"


@dataclasses.dataclass(eq=False, slots=True)
class Slot:
    """One pipeline that was asked for.

    Attributes:
        key: Its name for people and policies; no other slot has it.
        task: What it does.
        model: Which model.
        options: The options of `ebbtide.pipeline`; the newest of who asked.
        site: Where it was asked for first.
    """

    key: str
    task: str
    model: Any
    options: dict[str, Any]
    site: tuple[str, int]
    phase: Phase = Phase.EMPTY
    pipe: Any = None
    is_open: bool = False
    holds: dict[Hold, None] = dataclasses.field(default_factory=dict)
    size: Size | None = None
    estimated: int = 0
    """What its last load was reserved with."""
    use: Use = dataclasses.field(default_factory=lambda: Use(0.0))
    keep_alive: float = math.inf
    """For how many seconds it was last asked to be kept when nobody uses it."""
    keep_until: float = math.inf
    reload_seconds: float = 0.0
    wake_seconds: float = 0.0
    is_pinned: bool = False
    is_sizing: bool = False
    has_retried: bool = False
    began: float = 0.0
    """When its load, or whatever goes on, began."""
    wishes: list[Wish] = dataclasses.field(default_factory=list)
    """Who wants it gone or asleep, and waits for that."""
    loading: Any = None
    """What its load is known by to who does it."""
    restless_until: float = 0.0
    """Until when it is not to sleep: it could not, since somebody who has no lease calls it."""
    asked_back_until: float = 0.0
    """Until when its leases are not asked back again."""
    leaving: int = 0
    """The anonymous bytes that are being given back."""
    was_asleep: bool = False
    """Whether it slept when its eviction began."""
    entry: Entry | None = None

    @property
    def charge(self) -> int:
        """The bytes that count against the budget now: a load's in full, from its begin."""
        size, phase = self.size, self.phase
        if size is None or phase is Phase.EMPTY:
            return 0
        if phase is Phase.LOADING or phase is Phase.WAKING:
            return size.loading
        return size.asleep if self._is_asleep else size.awake

    @property
    def _is_asleep(self) -> bool:
        """Whether it sleeps, or did when its eviction began."""
        phase = self.phase
        return phase is Phase.ASLEEP or (phase is Phase.EVICTING and self.was_asleep)

    @property
    def mapped(self) -> int:
        """The bytes that it maps now, or will."""
        if self.size is None or self.phase is Phase.EMPTY or self._is_asleep:
            return 0
        return self.size.mapped

    def on(self, device: str) -> int:
        """The bytes that it holds on a device now, or will."""
        if self.size is None or self.phase is Phase.EMPTY or self._is_asleep:
            return 0
        return self.size.devices.get(device, 0)

    @property
    def is_outside(self) -> bool:
        """Whether its memory is another process's."""
        return bool(self.options.get("isolate"))

    @property
    def is_still(self) -> bool:
        """Whether nothing goes on with it: it is ready or asleep."""
        return self.phase is Phase.READY or self.phase is Phase.ASLEEP

    @property
    def is_forgettable(self) -> bool:
        """Whether nobody has, wants or pinned it."""
        busy = self.is_pinned or self.is_sizing or self.holds or self.wishes
        return self.phase is Phase.EMPTY and not busy

    @property
    def is_to_be_had(self) -> bool:
        """Whether who asks for it gets it at once; a user may have disposed it meanwhile."""
        return self.phase is Phase.READY and not self.wishes and self.pipe._lifecycle.takes_calls

    def enter(self, hold: Hold) -> Any:
        """The pipeline where it is ready; None where the desk is to be asked. On any thread."""
        self.holds[hold] = None
        if self.is_open:
            pipe = self.pipe
            if pipe is not None and pipe._lifecycle.takes_calls:  # else somebody disposed it
                return pipe
        self.holds.pop(hold, None)
        return None

    def close(self) -> bool:
        """Let nobody in any more, unless somebody holds it; whether nobody does. The desk's."""
        was_open, self.is_open = self.is_open, False
        if self.holds:
            self.is_open = was_open
            return False
        return True

    def as_entry(self) -> Entry:
        """What a policy is told of it; kept as well, for as long as all is as it is."""
        size = self.size
        assert size is not None
        frees = size.given_back
        self.entry = Entry(
            self.key,
            frees,
            min(size.asleep, frees),
            self.reload_seconds,
            self.wake_seconds,
            self.use,
            asleep=self.phase is Phase.ASLEEP,
            keep_until=self.keep_until,
        )
        return self.entry

    def forget(self) -> None:
        """In a forked child: nothing is loaded or lent."""
        self.is_open = self.is_sizing = False
        self.phase, self.pipe, self.loading = Phase.EMPTY, None, None
        self.holds, self.wishes = {}, []
        self.leaving = 0

    def resize(self, size: Size) -> None:
        """Take new figures."""
        self.size = size
        self.entry = None


class Settled:
    """Something that is answered once, with a value or an error; waited for without a lock."""

    def __init__(self) -> None:
        self.value: Any = None
        self.error: BaseException | None = None
        self.is_settled = False
        self._waiters: list[Callable[[], None]] = []

    def settle(self, value: Any = None, error: BaseException | None = None) -> None:
        """Answer it; what comes second changes nothing. On the desk's thread."""
        if not self.is_settled:
            self.value, self.error = value, error
            self.is_settled = True
            call_all(self._waiters)

    def on_settled(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called once it is answered; at once if it is."""
        self._waiters.append(callback)
        if self.is_settled:
            call_all(self._waiters)

    def outcome(self) -> Any:
        """The value, or the error raised."""
        error, self.error = self.error, None
        if error is not None:
            try:
                raise error
            finally:
                del error, self
        return self.value


AHEAD = 10.0
"""Seconds of waiting that a priority of 1 is worth, so that nobody waits for ever."""


class Ask(Settled):
    """Somebody who waits for a pipeline.

    Attributes:
        slot: Which.
        hold: The lease that it is to become; None where it is only to be loaded.
        priority: The higher goes first, before who has not waited long.
        number: The earlier goes first among equals.
        deadline: When it is given up, by the manager's clock.
        since: When it began.
    """

    def __init__(
        self, slot: Slot, hold: Hold | None, priority: float, since: float, deadline: float
    ) -> None:
        super().__init__()
        self.slot = slot
        self.hold = hold
        self.priority = priority
        self.since = since
        self.deadline = deadline
        self.number = 0

    @property
    def turn(self) -> tuple[float, int]:
        """Who has the least goes first."""
        return self.since - AHEAD * self.priority, self.number


class Wish(Settled):
    """Somebody who wants a pipeline gone, or asleep, and waits for its receipt.

    Attributes:
        slot: Which.
        action: "evict", "sleep", or "force".
        deadline: When it is given up, if leases are still out.
        is_own: Whether it is the desk's own.
    """

    value: DisposalReceipt | None

    def __init__(self, slot: Slot, action: str, deadline: float, *, is_own: bool = False) -> None:
        super().__init__()
        self.slot = slot
        self.action = action
        self.deadline = deadline
        self.is_own = is_own
