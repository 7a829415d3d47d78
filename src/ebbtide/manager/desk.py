"""Who gets what, when, and what goes for it: all decisions of a manager, made on one thread.

The desk knows no thread, pipeline or file. What is to be done in the world it has done by its
`Hands`, which answer later, by a call on the same thread; so it never waits, and a test drives it
with a clock and hands of its own. Its sums are its `Books`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy as copy_of
from typing import Any, Protocol

from ebbtide.errors import EbbtideError, ManagerBusyError, ManagerClosedError
from ebbtide.manager.accounts import BYTES, MAPPED, Books
from ebbtide.manager.policy import Plan
from ebbtide.manager.slots import Ask, Phase, Settled, Size, Slot, Wish
from ebbtide.receipts import DisposalReceipt

STARVED = 2.0
"""Seconds that the first in the queue waits for leases, before they are asked back."""
ASKING_BACK = 2.0
"""Seconds for which nobody gets a lease of what is asked back."""
SPARED = 10.0
"""Seconds for which something is not asked back again, or not put to sleep, where that failed."""
OVERTAKEN = 2.0
"""Seconds for which the first in the queue lets those pass who fit in what is free."""

MOST_KNOWN = 1000
"""Pipelines that are not loaded and of which is known what they take and how they were used."""

_LOADING = frozenset({Phase.LOADING, Phase.WAKING})

Tell = Callable[..., object]


class Hands(Protocol):
    """What does in the world what the desk decides. Each answers the desk later, on its thread."""

    def size_up(self, slot: Slot) -> None:
        """Find what a pipeline will take, files downloaded; then `Desk.sized` or `Desk.failed`."""

    def load(self, slot: Slot) -> None:
        """Load it; then `Desk.loaded`, or `Desk.failed` once what it took is given back."""

    def stop_load(self, slot: Slot) -> None:
        """Have a load fail soon."""

    def wake(self, slot: Slot) -> None:
        """Wake it; then `Desk.woken` or `Desk.failed`."""

    def put_to_sleep(self, slot: Slot) -> None:
        """Have it sleep; then `Desk.slept`."""

    def dispose(self, slot: Slot, *, cancel: bool) -> None:
        """Dispose it; then `Desk.disposed`."""


class Desk:
    """Decides for all slots of a manager. Everything is called on one thread.

    Args:
        hands: Who does what is decided.
        books: The slots, and the sums.
        tell: Told what happens: a word, the slot, and facts.
        most_waiting: How many may wait.
        most_loads: How many may be loaded or woken at once. Each reserves what it takes meanwhile,
            and more than there are threads to load on would reserve it for nothing.

    Attributes:
        waiting: Who waits, in the order they came.
        listens: Whether it is to be told of each lease that is returned.
        wakes_at: When it looks at the clock again, if nothing happens before.
    """

    def __init__(
        self,
        hands: Hands,
        books: Books,
        tell: Tell = lambda kind, slot, **facts: None,
        most_waiting: float = 1000,
        most_loads: float = math.inf,
    ) -> None:
        self.hands = hands
        self.books = books
        self.most_waiting = most_waiting
        self.most_loads = most_loads
        self.waiting: list[Ask] = []
        self.listens = False
        self.wakes_at = math.inf
        self.is_closed = False
        self._rooms: list[Settled] = []
        self._tell = tell
        self._asked = 0

    # What is asked for

    def ask(self, ask: Ask) -> None:
        """Somebody waits for a pipeline."""
        if ask.is_settled:
            return
        if self.is_closed:
            ask.settle(error=closed())
        elif len(self.waiting) >= self.most_waiting and not ask.slot.is_to_be_had:
            ask.settle(
                error=ManagerBusyError(
                    f"{len(self.waiting)} wait for pipelines already, which is the most that this"
                    " manager lets wait (max_waiting). Try again later, or ask for fewer at once."
                )
            )
        else:
            ask.slot = self.books.slots.setdefault(ask.slot.key, ask.slot)
            self._asked += 1
            ask.number = self._asked
            if not self._is_asked_for(ask.slot):
                ask.slot.has_retried = False
            self.waiting.append(ask)
            self.pump()

    def withdraw(self, ask: Ask) -> None:
        """Somebody waits no more; what was given to them meanwhile is returned."""
        if ask.hold is not None:
            ask.slot.holds.pop(ask.hold, None)
        self._settle(ask, error=closed())
        self.pump()

    def wish(self, wish: Wish) -> None:
        """Somebody wants a pipeline gone or asleep."""
        slot = wish.slot
        if slot.phase is Phase.EMPTY or (wish.action == "sleep" and slot.phase is Phase.ASLEEP):
            wish.settle(None)
            return
        slot.wishes.append(wish)
        if wish.action == "force" and slot.phase is Phase.LOADING:
            self.hands.stop_load(slot)
        self.pump()

    def pin(self, slot: Slot, pinned: bool) -> None:
        """Have a slot stay, or no more."""
        slot.is_pinned = pinned
        self.pump()

    def close(self) -> None:
        """Give nothing out any more, and say so to all who wait."""
        self.is_closed = True
        for ask in tuple(self.waiting):
            self._settle(ask, error=closed())
        for slot in self.books:
            slot.is_open = False
            if slot.phase is Phase.LOADING:
                self.hands.stop_load(slot)

    def fail_all(self, error: Exception) -> None:
        """Something went wrong that should not: tell all who wait."""
        for ask in tuple(self.waiting):
            self._settle(ask, error=again(error))

    def forget(self) -> None:
        """In a forked child: nobody waits."""
        self.waiting, self._rooms = [], []
        self.listens, self.wakes_at = False, math.inf

    # What the hands answer

    def sized(self, slot: Slot, size: Size, reload_seconds: float) -> None:
        """It is known what a pipeline will take, and how long its load."""
        slot.is_sizing = False
        slot.reload_seconds = reload_seconds
        slot.resize(size)
        self.pump()

    def loaded(self, slot: Slot, pipe: Any, size: Size) -> None:
        """A pipeline is loaded."""
        slot.pipe = pipe
        slot.has_retried = False
        slot.reload_seconds = self.books.clock() - slot.began
        slot.wake_seconds = slot.wake_seconds or slot.reload_seconds
        self._is_ready(slot, size, slot.reload_seconds)

    def woken(self, slot: Slot, size: Size) -> None:
        """A pipeline that slept is awake."""
        slot.wake_seconds = self.books.clock() - slot.began
        self._is_ready(slot, size, slot.wake_seconds)

    def _is_ready(self, slot: Slot, size: Size, seconds: float) -> None:
        slot.phase = Phase.READY
        slot.resize(size)
        slot.keep_until = self.books.clock() + slot.keep_alive
        self._open(slot)
        self._tell(
            "ready", slot, bytes=size.awake, estimated=slot.estimated, seconds=round(seconds, 3)
        )
        self.books.measure()
        self.pump()

    def resized(self, slot: Slot, size: Size) -> None:
        """A pipeline takes more or less than it did, as when it went over to its prepared copy."""
        if slot.is_still:
            slot.resize(size)
            self.pump()

    def failed(self, slot: Slot, error: BaseException) -> None:
        """A pipeline could not be sized up, loaded or woken; nothing of it is left."""
        was, slot.is_sizing = slot.phase, False
        if was is Phase.WAKING:
            slot.phase = Phase.ASLEEP
        elif was is Phase.LOADING:
            slot.phase = Phase.EMPTY
        retried = (
            isinstance(error, MemoryError)
            and was in (Phase.WAKING, Phase.LOADING)
            and not slot.has_retried
            and not slot.wishes
            and self._is_asked_for(slot)
        )
        slot.has_retried = retried
        self._tell("failed", slot, error=f"{type(error).__name__}: {error}", retried=retried)
        self.books.measure()
        if retried:
            self._carry_out(self.books.plan_most(BYTES, self.books.needs(slot), slot))
        else:
            for ask in [one for one in self.waiting if one.slot is slot]:
                self._settle(ask, error=again(error))
        if slot.phase is Phase.EMPTY:
            self._grant(slot, None)
        self.pump()

    def slept(self, slot: Slot, receipt: DisposalReceipt, size: Size, *, asleep: bool) -> None:
        """A pipeline sleeps; or could not, since calls of it ran."""
        slot.leaving = 0
        slot.resize(size)
        slot.phase = Phase.ASLEEP if asleep else Phase.READY
        if asleep:
            self._tell("sleeping", slot, receipt=receipt)
        else:
            slot.restless_until = self.books.clock() + SPARED
        self._grant(slot, receipt, "sleep")
        self._open(slot)
        self.books.measure()
        self._room_made()
        self.pump()

    def disposed(
        self, slot: Slot, receipt: DisposalReceipt | None, error: BaseException | None = None
    ) -> None:
        """A pipeline is gone: it was evicted, or somebody disposed it."""
        slot.phase = Phase.EMPTY
        slot.is_open = False
        slot.leaving = 0
        slot.pipe = None
        self._tell("disposed", slot, receipt=receipt)
        self._grant(slot, receipt, error=error)
        self.books.measure()
        self._room_made()
        self.pump()

    def _grant(
        self,
        slot: Slot,
        receipt: DisposalReceipt | None,
        action: str | None = None,
        error: BaseException | None = None,
    ) -> None:
        """Tell those whose wish came true."""
        granted = [one for one in slot.wishes if action is None or one.action == action]
        slot.wishes = [one for one in slot.wishes if one not in granted]
        for wish in granted:
            wish.settle(receipt, error)

    # What time does

    def tick(self) -> None:
        """Look at the clock: deadlines, and pipelines that nobody wants any more."""
        self.wakes_at = math.inf  # before anything is looked at: who changes it later, tells
        now = self.books.clock()
        for ask in [one for one in self.waiting if one.deadline <= now]:
            self._settle(ask, error=self.books.too_late(ask.slot, now - ask.since))
        for slot in self.books:
            late = [one for one in slot.wishes if one.deadline <= now]
            if slot.is_still and slot.holds:
                for wish in late:
                    slot.wishes.remove(wish)
                    if wish.is_own:
                        slot.asked_back_until = now + SPARED
                    wish.settle(error=self.books.in_use(slot))
            elif late:  # its last lease was returned in this moment
                self._try_wishes(slot)
            self._open(slot)
            if slot.keep_until <= now and not (slot.holds or slot.is_pinned or slot.wishes):
                self._evict(slot)
        if self.waiting:
            self.pump()
        self._forget_some()
        self.wakes_at = self._next()

    def _forget_some(self) -> None:
        """Know no more of those that were not used for the longest time, where they are many."""
        if len(self.books.slots) <= MOST_KNOWN * 1.1:
            return
        asked = {ask.slot for ask in self.waiting}
        idle = [one for one in self.books if one.is_forgettable and one not in asked]
        idle.sort(key=lambda one: one.use.at)
        for slot in idle[: len(self.books.slots) - MOST_KNOWN]:
            del self.books.slots[slot.key]
            self._tell("forgotten", slot)

    def _next(self) -> float:
        """When something is due; leases that are returned may make it sooner."""
        due = [ask.deadline for ask in self.waiting]
        if self.waiting:
            due.append(self.books.clock() + OVERTAKEN)
        for slot in self.books:
            if slot.is_still:
                due += [wish.deadline for wish in slot.wishes]
                if not slot.holds and not slot.is_pinned:
                    due.append(slot.keep_until)
        return min(due, default=math.inf)

    def pressed(self, missing: int) -> tuple[str, ...]:
        """Memory runs short: put to sleep, or evict, what is worth least.

        Args:
            missing: Anonymous bytes that are to come free; 0 where the kernel only told that tasks
                wait: then what maps files goes first, one a time.

        Returns:
            The keys of what goes.
        """
        self.books.measure()
        if self.books.leaving:
            return ()
        plan = self.books.plan(MAPPED, 1) if missing <= 0 else None
        if plan is None or not plan.steps:
            plan = self.books.plan_most(BYTES, max(1, missing))
        self._carry_out(plan)
        return tuple(step.key for step in plan.steps)

    def make_room(self, missing: int, made: Settled) -> None:
        """Have that many bytes come free for calls; ``made`` is told once, whether any did."""
        if missing > self.books.leaving:
            self._carry_out(self.books.plan_most(BYTES, missing - self.books.leaving))
        if self.books.leaving:
            self._rooms.append(made)
        else:
            made.settle(False)

    def _room_made(self) -> None:
        while self._rooms and not self.books.leaving:
            self._rooms.pop().settle(True)

    # How it is decided

    def pump(self) -> None:
        """Go through those who wait, and do what can be done."""
        self.listens = True  # before any hold is looked at: who returns one later, tells
        if self.waiting:
            self.books.measure()
        for slot in self.books:
            if slot.wishes:
                self._try_wishes(slot)
        now, since = self.books.clock(), math.inf
        blocked: set[Slot] = set()
        starved: Slot | None = None
        for ask in sorted(self.waiting, key=lambda one: one.turn):
            slot = ask.slot
            if ask.is_settled:
                continue
            if slot.is_to_be_had:
                self._give(ask)
            elif slot.is_sizing or slot.wishes or slot.phase not in (Phase.EMPTY, Phase.ASLEEP):
                continue
            elif slot.size is None:
                slot.is_sizing = True
                self.hands.size_up(slot)
            elif slot in blocked or not self._admit(slot, first=not blocked, late=now - since):
                if not blocked and now - ask.since >= STARVED:
                    starved = slot
                blocked.add(slot)
                since = min(since, ask.since)
        if starved is not None:
            self._ask_back(starved)
        self.listens = bool(self.waiting) or any(slot.wishes for slot in self.books)

    def _give(self, ask: Ask) -> None:
        if ask.hold is not None:
            ask.hold.since = self.books.clock()
            ask.slot.holds[ask.hold] = None
        self._settle(ask, ask.slot.pipe)

    def _settle(self, ask: Ask, value: Any = None, error: BaseException | None = None) -> None:
        if ask in self.waiting:
            self.waiting.remove(ask)
        ask.settle(value, error)

    def _admit(self, slot: Slot, *, first: bool, late: float) -> bool:
        """Begin a load, or have go what must go before it; False where it has to wait.

        Args:
            slot: Which.
            first: Whether nobody waits before it; else nothing goes for it.
            late: For how long others wait before it, at most.
        """
        never = self.books.never(slot)
        if never is not None:
            for ask in [one for one in self.waiting if one.slot is slot]:
                self._settle(ask, error=again(never))
            return True
        if slot.has_retried and self.books.leaving:
            return False  # memory ran out: what goes for it is to be gone first
        if len([one for one in self.books if one.phase in _LOADING]) >= self.most_loads:
            return False
        if not first:
            fits = late < OVERTAKEN and self.books.fits(slot)
            if fits:
                self._begin(slot)
            return fits
        is_done = False
        while not is_done:  # again where something was leased in the moment that it was chosen
            missing = self.books.missing(slot, later=True)
            if not all(
                self.books.plan(account, count, slot).enough
                for account, count in missing.items()
                if count > 0 and account != MAPPED
            ):
                return False
            is_done = True
            for account in missing:  # what goes for one account is gone for the next
                count = self.books.missing(slot, later=True)[account]
                if count > 0:
                    plan = self.books.plan_most if account == MAPPED else self.books.plan
                    is_done = self._carry_out(plan(account, count, slot)) and is_done
        fits = self.books.fits(slot)
        if fits:
            self._begin(slot)
        return fits

    def _ask_back(self, slot: Slot) -> None:
        """Let nobody else have, for a while, what the first in the queue needs of what is leased.

        What is used all the time would else be leased all the time, by one after another.
        """
        if self.books.leaving or any(wish.is_own for one in self.books for wish in one.wishes):
            return
        until = self.books.clock() + ASKING_BACK
        for account, count in self.books.missing(slot, later=True).items():
            if count > 0 and account != MAPPED:
                for step in self.books.plan(account, count, slot, leased=True).steps:
                    one = self.books.slots[step.key]
                    if one.holds and not one.wishes:
                        one.wishes.append(Wish(one, step.action, until, is_own=True))
                        one.is_open = False

    def _begin(self, slot: Slot) -> None:
        """Load it, or wake it."""
        assert slot.size is not None
        slot.began = self.books.clock()
        slot.estimated = slot.size.awake
        if slot.phase is Phase.ASLEEP:
            slot.phase = Phase.WAKING
            self._tell("waking", slot, bytes=slot.size.awake - slot.size.asleep)
            self.hands.wake(slot)
        else:
            slot.phase = Phase.LOADING
            self._tell("loading", slot, bytes=slot.size.awake)
            self.hands.load(slot)

    def _is_asked_for(self, slot: Slot) -> bool:
        return any(ask.slot is slot for ask in self.waiting)

    def _open(self, slot: Slot) -> None:
        """Let users in, if it is ready and nobody wants it gone."""
        slot.is_open = slot.is_to_be_had and not self.is_closed

    # What goes

    def _carry_out(self, plan: Plan) -> bool:
        """Do what a plan says, but for what was leased in this moment; whether nothing was."""
        is_done = True
        for step in plan.steps:
            slot = self.books.slots[step.key]
            done = self._sleep(slot) if step.action == "sleep" else self._evict(slot)
            is_done = done and is_done
        return is_done

    def _sleep(self, slot: Slot) -> bool:
        """Put it to sleep, unless somebody holds it; whether it is done."""
        if slot.phase is Phase.READY and slot.close():
            assert slot.size is not None
            slot.phase = Phase.FALLING_ASLEEP
            slot.leaving = max(0, slot.size.given_back - slot.size.asleep)
            self.hands.put_to_sleep(slot)
            return True
        return False

    def _evict(self, slot: Slot, *, cancel: bool = False) -> bool:
        """Have it disposed, unless somebody holds it; whether it is done."""
        if slot.is_still and (slot.close() or cancel):
            assert slot.size is not None
            slot.is_open = False
            slot.was_asleep = slot.phase is Phase.ASLEEP
            slot.phase = Phase.EVICTING
            slot.leaving = slot.size.asleep if slot.was_asleep else slot.size.given_back
            self._tell("evicting", slot, bytes=slot.leaving)
            self.hands.dispose(slot, cancel=cancel)
            return True
        return False

    def _try_wishes(self, slot: Slot) -> None:
        """Do what somebody wishes of a slot, once nobody holds it; nobody is let in before."""
        if not slot.is_still:
            return
        slot.is_open = False
        wanted = {one.action for one in slot.wishes}
        if "force" in wanted:
            self._evict(slot, cancel=True)
        elif not slot.holds:
            if "evict" in wanted:
                self._evict(slot)
            elif slot.phase is Phase.READY:
                self._sleep(slot)
            else:
                self._grant(slot, None, "sleep")


def closed() -> ManagerClosedError:
    """What everyone hears once a manager is closed."""
    return ManagerClosedError("The manager is closed. Make a new PipelineManager.")


def again(error: BaseException) -> BaseException:
    """An error for one more to raise: each has its own, so that no traceback is of two threads."""
    if not isinstance(error, EbbtideError):
        return error
    copy = copy_of(error)
    copy.__cause__ = error.__cause__
    return copy
