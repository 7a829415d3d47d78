"""The thread behind a manager, and the way from every other thread to it.

The desk decides on this thread alone; users' threads take no lock, but put what they ask for on a
queue and wait on a gate of their own. Who finds a pipeline ready does not come here at all.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import math
import queue
import threading
import time
import weakref
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

from ebbtide.cancellation import EbbtideThread, OneShot, check_threads, own_thread, told
from ebbtide.errors import InputError
from ebbtide.lifecycle import on_fork
from ebbtide.manager.accounts import Books
from ebbtide.manager.desk import Desk
from ebbtide.manager.estimates import Estimates
from ebbtide.manager.events import Feed
from ebbtide.manager.hands import PipelineHands
from ebbtide.manager.policy import History
from ebbtide.manager.slots import Ask, Hold, Phase, Settled, Slot, Wish
from ebbtide.memory.ledger import ledger
from ebbtide.memory.monitor import Monitor, PressureEvent, Reading, read
from ebbtide.memory.pressure import TIGHT
from ebbtide.memory.reaper import reaper
from ebbtide.memory.workspace import Allowance, workspace

log = logging.getLogger("ebbtide.manager")

LOW = 0.1
"""The share of the limit that is to be free again after the kernel told that it is near."""
FAULTS = 200
"""Pages a second that are read again from a disk, above which what maps files is to sleep."""
MOST_LOADS = 2
"""Loads at once: one that takes long holds up no other."""
SAVED_EACH = 60.0
"""Seconds after which what was learned is written, if anything happens."""
ROOM = 2.0
"""Seconds for which a call waits for others to sleep or go."""
_LONGEST_WAIT = 3600.0

_cores: weakref.WeakSet[Core] = weakref.WeakSet()


class Core:
    """What a manager is made of, without what its user holds, so that that can be collected.

    Args:
        books: The sums.
        most_waiting: How many may wait.
        kept: The file of estimates; None to keep none.
        on_pressure: Told of memory pressure, before anything is done about it.
    """

    def __init__(
        self,
        books: Books,
        most_waiting: float,
        kept: Path | None,
        on_pressure: Callable[[PressureEvent], object] | None,
    ) -> None:
        check_threads()
        self.books = books
        self.feed = Feed()
        self.history = History()
        self.estimates = Estimates(kept)
        self.counts: collections.Counter[str] = collections.Counter()
        self.monitor = Monitor(on_pressure=self._pressed, sampler=self._sample)
        self.hands = PipelineHands(self.post, self.estimates)
        self.desk = Desk(self.hands, books, self.tell, most_waiting, MOST_LOADS)
        self.hands.desk = self.desk
        self._on_pressure = on_pressure
        self._is_watching = self._is_ended = False
        self._faults = 0
        self._saved = books.clock()
        self._changes = 0
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        _cores.add(self)

    # What users' threads call

    def ask(self, slot: Slot, hold: Hold | None, priority: float, timeout: float | None) -> Ask:
        """Ask for a pipeline."""
        if own_thread.is_native:
            raise InputError(
                f"{slot.key} is not loaded, and a call of a pipeline cannot wait for another"
                " pipeline's load. Acquire it before the call."
            )
        now = self.books.clock()
        ask = Ask(slot, hold, priority, now, math.inf if timeout is None else now + timeout)
        self.post(partial(self.desk.ask, ask))
        return ask

    def wish(self, slot: Slot, action: str, timeout: float | None) -> Wish:
        """Ask for a pipeline to go, or to sleep."""
        deadline = math.inf if timeout is None else self.books.clock() + timeout
        wish = Wish(slot, action, deadline)
        self.post(partial(self.desk.wish, wish))
        return wish

    def wait(self, settled: Settled) -> Any:
        """The answer, once it is given; who is interrupted meanwhile asks no more."""
        try:
            self.hear(settled)
        except BaseException:
            self._withdraw(settled)
            raise
        return settled.outcome()

    async def await_(self, settled: Settled) -> Any:
        """The same, on an event loop."""
        try:
            await self.ahear(settled)
        except BaseException:
            self._withdraw(settled)
            raise
        return settled.outcome()

    def hear(self, settled: Settled) -> None:
        """Wait until there is an answer."""
        gate = OneShot()
        settled.on_settled(gate.open)
        gate.wait()

    async def ahear(self, settled: Settled) -> None:
        """The same, on an event loop."""
        await told(settled.on_settled)

    def _withdraw(self, settled: Settled) -> None:
        if isinstance(settled, Ask):
            self.post(partial(self.desk.withdraw, settled))

    def used(self, slot: Slot) -> None:
        """A pipeline was lent."""
        slot.use = self.history.used(slot.key, self.books.clock())
        if self.feed.hears("leased"):
            self.feed.tell("leased", slot.key, {"leases": len(slot.holds)})

    def give_back(self, slot: Slot, hold: Hold) -> None:
        """A lease ends; in finalizers and signal handlers too."""
        desk = self.desk
        slot.keep_until = self.books.clock() + hold.keep_alive
        slot.holds.pop(hold, None)
        if desk.listens or slot.keep_until < desk.wakes_at:
            self.post(desk.pump)
        if self.feed.hears("returned"):
            self.feed.tell("returned", slot.key, {"leases": len(slot.holds)})

    def tell(self, kind: str, slot: Slot | None, **facts: object) -> None:
        """Something happened."""
        key = slot.key if slot is not None else ""
        if kind == "forgotten" and slot is not None:
            self.history.forget(slot.key)
            self.hands.forget_slot(slot)
            return
        self.counts[kind] += 1
        if self._is_watching and kind in ("ready", "failed", "sleeping", "disposed"):
            workspace.look_again()
        self.monitor.note(kind, key, **facts)
        self.feed.tell(kind, key, facts)
        if kind == "loading" and not self._is_watching:
            self._begin_watching()

    def post(self, function: Callable[[], object]) -> None:
        """Have something done on the manager's thread."""
        self._queue.put(function)
        if self._is_ended:
            reaper.later(self._finish)
        elif self._thread is None:
            reaper.start()
            reaper.later(self._start)

    # The thread

    def _start(self) -> None:
        if self._thread is None:
            self._thread = EbbtideThread(target=self._run, name="ebbtide-manager", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        mine, desk = self._queue, self.desk
        while True:
            patience = min(max(0.0, desk.wakes_at - self.books.clock()), _LONGEST_WAIT)
            try:
                function = mine.get(timeout=patience)
                while True:
                    if function is None:
                        self._finish()
                        return
                    self._do(function)
                    if desk.wakes_at <= self.books.clock():
                        self._do(self._look)
                    function = mine.get_nowait()
            except queue.Empty:
                pass
            function = None
            self._do(self._look)

    def _do(self, step: Callable[[], object]) -> None:
        """One step; should it fail in a way that nobody thought of, nobody waits for ever."""
        try:
            step()
        except Exception as error:
            log.exception("The manager failed in a step; it goes on, and who waits is told.")
            self.desk.fail_all(error)

    def _finish(self) -> None:
        """Once it is closed: what is asked for all the same, which is refused."""
        with contextlib.suppress(queue.Empty):
            while True:
                function = self._queue.get_nowait()
                if function is not None:
                    self._do(function)

    def _look(self) -> None:
        """After what was asked for: what moved meanwhile, and the clock."""
        changed, self._changes = self._changes != ledger.changes, ledger.changes
        for slot in self.books:
            if slot.phase is Phase.READY and (changed or slot.is_outside):
                size = self.hands.measured(slot, slot.pipe)
                if size != slot.size:
                    self.desk.resized(slot, size)
        self.desk.tick()
        if self.books.clock() - self._saved > SAVED_EACH:
            self._save()

    def _save(self) -> None:
        self._saved = self.books.clock()
        self.estimates.save(workspace.as_dict())

    def end(self) -> None:
        """End everything that goes on; nothing is loaded any more."""
        self.monitor.stop()
        self.feed.stop()
        self._save()
        self._is_ended = True
        self._queue.put(None)
        _cores.discard(self)
        self._is_watching = False
        if not any(core._is_watching for core in cores()):
            workspace.limit, workspace.make_room = None, _make_no_room

    def closing(
        self, timeout: float, cancel: bool
    ) -> Generator[Settled, None, list[tuple[str, Any]]]:
        """The steps of closing, each to be waited for; gives receipts by key."""
        closed = Settled()
        self.post(self.desk.close)
        self.post(closed.settle)
        yield closed
        receipts = yield from self.disposing(timeout, force=True, cancel=cancel)
        self.end()
        return receipts

    def disposing(
        self, timeout: float, *, force: bool = False, cancel: bool = False
    ) -> Generator[Settled, None, list[tuple[str, Any]]]:
        """Have every pipeline go, one after another, the largest first; what is leased last."""
        until = self.books.clock() + timeout
        receipts: list[tuple[str, Any]] = []
        there = [slot for slot in self.books if slot.phase is not Phase.EMPTY]
        for slot in sorted(there, key=lambda one: (bool(one.holds), -one.charge)):
            wish = self.wish(slot, "evict", 0.0 if cancel else max(0.0, until - self.books.clock()))
            yield wish
            if wish.error is not None and force:
                wish = self.wish(slot, "force", None)
                yield wish
            receipt = wish.outcome()
            if receipt is not None:
                receipts.append((slot.key, receipt))
        return receipts

    def abandon(self) -> None:
        """Nobody holds the manager any more: all goes, what is leased once it is returned."""
        self.post(self._abandoned)

    def _abandoned(self) -> None:
        self.desk.close()
        rest = [slot for slot in self.books if slot.phase is not Phase.EMPTY]
        left = len(rest)

        def gone() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                self.end()

        for slot in rest:
            wish = Wish(slot, "evict", math.inf)
            wish.on_settled(gone)
            self.desk.wish(wish)
        if not rest:
            self.end()

    # Memory

    def _begin_watching(self) -> None:
        """With the first load: hear the kernel, and bound what calls take."""
        self.monitor.start()
        workspace.remember(self.estimates.runs)
        workspace.limit, workspace.make_room = _allowance, _make_room
        self._is_watching = True

    def make_room(self, missing: int) -> bool:
        """Have others sleep or go for a call; on a native thread, and for a bounded time."""
        made = Settled()
        gate = threading.Event()
        made.on_settled(gate.set)
        self.post(partial(self.desk.make_room, missing, made))
        return gate.wait(ROOM) and bool(made.value)

    def _sample(self) -> Reading:
        reading = read()
        faults = _major_faults()
        if faults - self._faults > FAULTS * self.monitor.interval and self.books.mapped:
            self.post(partial(self.desk.pressed, 0))
        self._faults = faults
        return reading

    def _pressed(self, event: PressureEvent) -> None:
        self.counts["pressure"] += 1
        self.feed.tell("pressure", "", {"level": event.level, "source": event.source})
        if self._on_pressure is not None:
            try:
                self._on_pressure(event)
            except Exception:
                log.exception("on_pressure failed; the manager does what it does.")
        found = event.snapshot
        missing = int(found.limit.bytes * LOW) - found.available if event.level == "limit" else 0
        if missing > 0 or found.available <= found.limit.bytes * TIGHT:  # else it is not our doing
            self.post(partial(self.desk.pressed, max(0, missing)))

    def forget(self) -> None:
        """In a forked child: nothing is loaded, lent or asked for, and no thread is here."""
        self._queue = queue.SimpleQueue()
        self._thread = None
        self._is_watching = False
        self.counts.clear()
        self.feed.forget()
        self.hands.forget()
        for slot in self.books:
            slot.forget()
        self.desk.forget()


def _tightest() -> Core | None:
    """Of all managers, that in whose budget there is least room for calls."""
    watching = [core for core in cores() if core._is_watching]
    return min(watching, key=lambda core: core.books.for_calls, default=None)


def _allowance() -> Allowance | None:
    """How much of the budget is not for calls."""
    core = _tightest()
    if core is None:
        return None
    books = core.books
    return Allowance(books.budget, books.budget - books.for_calls, books.staying)


def _make_room(missing: int) -> bool:
    core = _tightest()
    return core is not None and core.make_room(missing)


def _make_no_room(missing: int) -> bool:
    return False


def cores() -> list[Core]:
    """Every manager of this process that is not closed."""
    return list(_cores)


def _forget_all() -> None:
    for core in cores():
        core.forget()


def _major_faults() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


clock = time.monotonic

on_fork(_forget_all)
