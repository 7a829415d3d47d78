"""What a live view sees of this process, read cheaply on a thread of its own.

It keeps no pipeline alive, and changes nothing: a look reads what managers and pipelines say of
themselves. Managers, and pipelines that no manager has, are looked for every `POLL` seconds, so one
that lives for less may be missed; what a manager did is read from its timeline, which misses
nothing.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
import queue
import time
from collections.abc import Callable, Mapping

from ebbtide.cancellation import EbbtideThread
from ebbtide.errors import InputError
from ebbtide.lifecycle import Disposable, Lifecycle, State, live, on_fork
from ebbtide.manager.accounts import mb
from ebbtide.manager.core import Core, cores
from ebbtide.manager.status import ManagerStatus, PipelineStatus, status_of
from ebbtide.memory.probe import MemorySnapshot, anonymous_bytes, snapshot
from ebbtide.memory.timeline import Event, Sample
from ebbtide.receipts import DisposalReceipt

log = logging.getLogger("ebbtide.manager")

POLL = 0.1
"""Seconds between two looks for new pipelines, and for the highest memory."""
SPAN = 300.0
"""Seconds of memory that are kept."""
SNAPSHOT = 2.0
"""Seconds for which limits and pressure, which take a millisecond to read, count as new."""
LAST = 10
"""How many events and receipts are kept."""

_TALLIED = {
    "loading": "load", "waking": "wake", "sleeping": "sleep", "disposed": "disposal",
    "failed": "failed load", "leaked": "leaked lease", "pressure": "pressure signal",
}  # fmt: skip
"""The events that are counted, by what they are counted as."""
_UNTOLD = frozenset({"created", "leased", "returned"})
_ALARMS = frozenset({"failed", "leaked", "pressure"})


@dataclasses.dataclass(frozen=True, slots=True)
class Happening:
    """Something that happened.

    Attributes:
        time: When, in seconds since 1970.
        seconds: When, in seconds since the view began.
        kind: What, as a `ManagerEvent` has it, or ``made`` or ``woke``.
        pipeline: To which pipeline; empty where to none.
        words: What, for a person.
    """

    time: float
    seconds: float
    kind: str
    pipeline: str
    words: str

    @property
    def is_alarm(self) -> bool:
        """Whether it is nothing that should happen."""
        return self.kind in _ALARMS


@dataclasses.dataclass(frozen=True, slots=True)
class Waiting:
    """Somebody who waits for a pipeline: for which, and for how many seconds so far."""

    pipeline: str
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Given:
    """What came back in all: receipts, how many are verified, and bytes."""

    receipts: int = 0
    verified: int = 0
    released: int = 0
    charged: int = 0
    last: tuple[tuple[str, str], ...] = ()
    """The last receipts: whose, and what they say."""


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """This process at one moment. Bytes and seconds.

    Attributes:
        seconds: Since the view began.
        anonymous: Anonymous memory that the process holds.
        peak: The most that it was seen to hold.
        memory: Limits and pressure; at most two seconds old.
        history: What it held of late, the oldest first; ``seconds`` count from the view's begin.
        managers: Every manager that is not closed.
        alone: Pipelines that no manager has. ``leases`` are their running calls.
        waiting: Who waits for a pipeline, the eldest first.
        happened: How many things happened.
        happenings: The last of them, the oldest first.
        tally: How often what happened, each in a word.
        given: What came back.
    """

    seconds: float
    anonymous: int
    peak: int
    memory: MemorySnapshot
    history: tuple[Sample, ...]
    managers: tuple[ManagerStatus, ...]
    alone: tuple[PipelineStatus, ...]
    waiting: tuple[Waiting, ...]
    happened: int
    happenings: tuple[Happening, ...]
    tally: Mapping[str, int]
    given: Given

    @property
    def pipelines(self) -> list[PipelineStatus]:
        """Every pipeline: those that are there first, the largest first among them."""
        found = [one for status in self.managers for one in status.entries]
        found += self.alone
        return sorted(found, key=lambda one: (one.phase == "empty", -one.anonymous, one.key))


class Looker:
    """Looks at this process, and remembers what changed from look to look.

    Args:
        clock: Seconds; a test gives its own.
        managers: The managers there are; a test gives its own.

    Example:
        >>> Looker().look().anonymous > 0
        True
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        managers: Callable[[], list[Core]] = cores,
    ) -> None:
        self._clock = clock
        self._began = clock()
        self._began_at = time.time()
        self._managers = managers
        self._cores: dict[int, Core] = {}
        self._heard: dict[int, Event] = {}
        self._alone: dict[int, tuple[Lifecycle, str, State]] = {}
        self._history: collections.deque[Sample] = collections.deque()
        self._snapshot: MemorySnapshot | None = None
        self._snapshot_until = -math.inf
        self._peak = 0
        self._happened = 0
        self._happenings: collections.deque[Happening] = collections.deque(maxlen=LAST)
        self._tally: collections.Counter[str] = collections.Counter()
        self._given = Given()

    def poll(self) -> int:
        """See who is there now; returns the anonymous bytes. Takes some microseconds."""
        anonymous = anonymous_bytes()
        self._peak = max(self._peak, anonymous)
        for core in self._managers():
            if id(core) not in self._cores:
                self._cores[id(core)] = core
                self._remember(core)
        self._watch_alone()
        return anonymous

    def look(self) -> Facts:
        """Everything there is to see now."""
        now = self._clock()
        anonymous = self.poll()
        if self._snapshot is None or now >= self._snapshot_until:
            self._snapshot, self._snapshot_until = snapshot(), now + SNAPSHOT
        memory = self._snapshot
        self._keep(now - self._began, anonymous, memory)
        open_now = self._managers()
        for core in tuple(self._cores.values()):
            self._hear(core)
            if core not in open_now:  # closed, and all that it did is heard
                del self._cores[id(core)]
                self._heard.pop(id(core), None)
        managers, waiting = [], []
        for core in open_now:
            asks = tuple(core.desk.waiting)
            managers.append(status_of(core.books, len(asks), core.counts))
            since = core.books.clock()
            waiting += [Waiting(ask.slot.key, max(0.0, since - ask.since)) for ask in asks]
        return Facts(
            seconds=now - self._began,
            anonymous=anonymous,
            peak=self._peak,
            memory=memory,
            history=tuple(self._history),
            managers=tuple(managers),
            alone=tuple(self._status_of_alone()),
            waiting=tuple(sorted(waiting, key=lambda one: -one.seconds)),
            happened=self._happened,
            happenings=tuple(sorted(self._happenings, key=lambda one: one.time)),
            tally=dict(self._tally),
            given=self._given,
        )

    # The past

    def _keep(self, seconds: float, anonymous: int, memory: MemorySnapshot) -> None:
        sample = Sample(
            seconds, anonymous, memory.file_backed, memory.swapped, memory.limit.bytes,
            memory.available,
        )  # fmt: skip
        history = self._history
        history.append(sample)
        while history[0].seconds < seconds - SPAN:
            history.popleft()

    def _remember(self, core: Core) -> None:
        """Take what a manager's timeline has from before this began."""
        timeline = core.monitor.timeline
        ahead = timeline.began - self._began_at
        first = self._history[0].seconds if self._history else 0.0
        for sample in reversed(timeline.samples):
            seconds = sample.seconds + ahead
            if seconds < first and seconds > self._clock() - self._began - SPAN:
                self._history.appendleft(dataclasses.replace(sample, seconds=seconds))
                self._peak = max(self._peak, sample.anonymous)

    # Events

    def _hear(self, core: Core) -> None:
        timeline = core.monitor.timeline
        events = timeline.events
        last, fresh = self._heard.get(id(core)), []
        for event in reversed(events):
            if event is last:
                break
            fresh.append(event)
        if events:
            self._heard[id(core)] = events[-1]
        for event in reversed(fresh):
            if event.kind not in _UNTOLD:
                self._tell(timeline.began + event.seconds, event.kind, event.label, event.facts)

    def _tell(self, at: float, kind: str, name: str, facts: Mapping[str, object]) -> None:
        if kind == "pressure":  # its label says how hard
            name, facts = "", {"level": name, **facts}
        if kind in _TALLIED:
            self._tally[_TALLIED[kind]] += 1
        receipt = facts.get("receipt")
        if isinstance(receipt, DisposalReceipt):
            given = self._given
            self._given = Given(
                given.receipts + 1,
                given.verified + receipt.verified,
                given.released + receipt.released,
                given.charged + receipt.charged,
                (*given.last, (name, str(receipt)))[-LAST:],
            )
        self._happened += 1
        words, seconds = in_words(kind, facts), at - self._began_at
        self._happenings.append(Happening(at, seconds, kind, name, words))

    # Pipelines without a manager

    def _watch_alone(self) -> None:
        """Tell what became of the pipelines that were seen, and see those that are new."""
        for pipe in live():
            life = pipe._lifecycle
            if id(life) not in self._alone and not self._is_managed(life):
                self._alone[id(life)] = life, _key(pipe), State.LOADING
        for number, (life, key, before) in tuple(self._alone.items()):
            if life.lent is not None:  # a manager has heard of it meanwhile
                del self._alone[number]
                continue
            state, now = life.state, time.time()
            if life.receipt is not None:
                facts = {"receipt": life.receipt, "error": life.error}
                del self._alone[number]
                self._tell(now, "disposed", key, facts)
            elif state is not before:
                self._alone[number] = life, key, state
                if state is State.READY:
                    kind = "woke" if before is State.SLEEPING else "made"
                    self._tally["load" if kind == "made" else "wake"] += 1
                    self._tell(now, kind, key, {"bytes": life.charged})
                elif state is State.SLEEPING:
                    self._tell(now, "sleeping", key, {})

    def _is_managed(self, life: Lifecycle) -> bool:
        """Whether a manager has it, or is about to: its load has ended, and it has not heard."""
        if life.lent is not None:
            return True
        slots = [slot for core in self._managers() for slot in core.books]
        return any(slot.loading is not None and slot.loading.lifecycle is life for slot in slots)

    def _status_of_alone(self) -> list[PipelineStatus]:
        alone = [pipe for pipe in live() if id(pipe._lifecycle) in self._alone]
        return [_status(pipe) for pipe in alone]


def _key(pipe: Disposable) -> str:
    task, model = getattr(pipe, "task", None), getattr(pipe, "model", None)
    return f"{task} {model}" if task and model else pipe._lifecycle.label


def _status(pipe: Disposable) -> PipelineStatus:
    life = pipe._lifecycle
    memory = getattr(pipe, "memory", None)
    holdings = memory.holdings if memory is not None else ()
    return PipelineStatus(
        key=_key(pipe),
        phase="asleep" if life.state is State.SLEEPING else life.state.value,
        anonymous=memory.anonymous if memory is not None else life.charged,
        mapped=sum([one.mapped for one in holdings]),
        leases=len(life.running),
        pinned=False,
        uses=0,
        idle=max(0.0, time.monotonic() - life.used),
        keep=None,
        reload_seconds=0.0,
        measured=True,
    )


def in_words(kind: str, facts: Mapping[str, object]) -> str:
    """What happened to a pipeline, for a person.

    Example:
        >>> in_words("ready", {"bytes": 93_000_000, "estimated": 91_000_000, "seconds": 0.12})
        'ready after 0.12 s: 93.0 MB, 91.0 MB were expected'
    """

    def size(name: str) -> str:
        count = facts.get(name)
        return mb(count) if isinstance(count, int) else "?"

    receipt, error = facts.get("receipt"), facts.get("error")
    if kind == "loading":
        return f"loading, {size('bytes')} expected"
    if kind == "ready":
        expected = f", {size('estimated')} were expected" if facts.get("estimated") else ""
        return f"ready after {facts.get('seconds')} s: {size('bytes')}{expected}"
    if kind in ("made", "woke"):
        return f"{kind}: {size('bytes')}"
    if kind == "waking":
        return f"waking, for {size('bytes')}"
    if kind == "evicting":
        return f"being evicted, for {size('bytes')}"
    if kind in ("disposed", "sleeping"):
        word = "asleep" if kind == "sleeping" else kind
        failed = f" ({error})" if error else ""
        return (f"{word}: {receipt}" if receipt is not None else word) + failed
    if kind == "failed":
        retried = "; room is made, and it is tried again" if facts.get("retried") else ""
        return f"load failed: {error}{retried}"
    if kind == "leaked":
        return f"a lease was never returned; it was asked for at {facts.get('site')}"
    if kind == "pressure":
        return f"memory pressure ({facts.get('level')}), told by {facts.get('source')}"
    return f"{kind}: {', '.join(f'{name} {value}' for name, value in facts.items())}"


class Watch:
    """Looks every ``interval`` seconds on a thread of its own, and has each look shown.

    In a forked child it has stopped.

    Args:
        show: Gets the facts, on that thread; an `OSError` ends the showing.
        interval: Seconds between two looks.
        looker: Looks; a test gives its own.

    Raises:
        InputError: The interval is not a number of at least 0.1 s.
    """

    def __init__(
        self, show: Callable[[Facts], object], interval: float, looker: Looker | None = None
    ) -> None:
        if not isinstance(interval, int | float) or not POLL <= interval <= 3600:
            raise InputError(
                f"interval takes seconds, {POLL} or more and at most an hour, not {interval!r}.",
                value=interval,
            )
        self._show = show
        self._interval = interval
        self.looker = Looker() if looker is None else looker
        self._ends: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._threads: list[EbbtideThread] = []
        self._has_failed = False

    @property
    def is_running(self) -> bool:
        """Whether it looks."""
        return bool(self._threads)

    def start(self) -> None:
        """Look from now on; does nothing where it does already."""
        if not self._threads:
            self._ends = queue.SimpleQueue()
            thread = EbbtideThread(target=self._run, name="ebbtide-live-view", daemon=True)
            self._threads.append(thread)
            _watches[id(self)] = self
            thread.start()

    def stop(self) -> bool:
        """Look a last time, and no more; whether it looked until now."""
        try:
            thread = self._threads.pop()
        except IndexError:
            return False
        _watches.pop(id(self), None)
        self._ends.put(None)
        thread.join()
        return True

    def _run(self) -> None:
        due, is_shown, is_last = -math.inf, True, False
        while is_shown and not is_last:
            try:
                self._ends.get(timeout=POLL if due > 0 else 0)
                is_last = True
            except queue.Empty:
                pass
            try:
                if is_last or time.monotonic() >= due:
                    due = time.monotonic() + self._interval
                    self._show(self.looker.look())
                else:
                    self.looker.poll()
            except OSError:
                is_shown = False  # the terminal is gone
            except Exception:
                if not self._has_failed:
                    self._has_failed = True
                    log.warning("The live view could not be shown.", exc_info=True)

    def forget(self) -> None:
        """In a forked child: nobody looks."""
        self._threads.clear()
        self._ends = queue.SimpleQueue()


_watches: dict[int, Watch] = {}


def _forget_all() -> None:
    for watch in tuple(_watches.values()):
        watch.forget()
    _watches.clear()


on_fork(_forget_all)
