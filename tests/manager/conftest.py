"""A world without pipelines for the desk: a clock that is set, and hands that answer when told."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from ebbtide.errors import ManagerClosedError, PipelineDisposedError
from ebbtide.manager.accounts import Books
from ebbtide.manager.desk import Desk
from ebbtide.manager.policy import History, Policy
from ebbtide.manager.slots import Ask, Hold, Phase, Settled, Size, Slot, Wish
from ebbtide.receipts import DisposalReceipt


@dataclasses.dataclass(eq=False)
class Pipe:
    """What stands for a pipeline."""

    key: str
    is_doomed: bool = False
    """Whether its disposal was asked for, by whomever."""

    @property
    def _lifecycle(self) -> Pipe:
        return self

    @property
    def takes_calls(self) -> bool:
        return not self.is_doomed


@dataclasses.dataclass(eq=False)
class Task:
    """Something that the hands were told to do and have not answered yet."""

    kind: str
    slot: Slot
    pipe: Pipe | None = None
    is_stopped: bool = False
    is_users: bool = False
    """Whether a user disposed it behind the manager's back."""


class FakeHands:
    """Keeps what it was told to do, until the test has it done."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.tasks: list[Task] = []
        self.told: list[tuple[str, str]] = []
        """Everything that was asked of it: a word, and the pipeline."""

    def size_up(self, slot: Slot) -> None:
        self._begin("size", slot)

    def load(self, slot: Slot) -> None:
        self._begin("load", slot)

    def stop_load(self, slot: Slot) -> None:
        self.told.append(("stop", slot.key))
        for task in self.tasks:
            if task.kind == "load" and task.slot is slot:
                task.is_stopped = True

    def wake(self, slot: Slot) -> None:
        self._begin("wake", slot)

    def put_to_sleep(self, slot: Slot) -> None:
        self._begin("sleep", slot)

    def dispose(self, slot: Slot, *, cancel: bool) -> None:
        self._begin("force" if cancel else "dispose", slot)

    def _begin(self, kind: str, slot: Slot) -> None:
        pipe = slot.pipe
        self.told.append((kind, slot.key))
        self.world.on_begin(kind, slot)
        if kind in ("dispose", "force"):
            if pipe.is_doomed:
                return  # its end is told once, whoever asked for it
            kind, pipe.is_doomed = "dispose", True
        self.tasks.append(Task(kind, slot, pipe))


class World:
    """A desk, its books, and what the process would hold.

    Args:
        budget: Bytes of the whole process.
        base: What the process holds beside its pipelines.
        most_waiting: How many may wait.
        rest: As for `Books`.
    """

    def __init__(
        self,
        budget: int = 100,
        *,
        base: int = 0,
        policy: Policy = "cost",
        most_waiting: int = 1000,
        **rest: Any,
    ) -> None:
        self.now = 1000.0
        self.base = base
        self.calls = 0
        self.reserved = 0
        self.real: dict[str, int] = {}
        self.sizes: dict[str, Size] = {}
        self.events: list[tuple[str, str, Mapping[str, Any]]] = []
        self.on_begin: Callable[[str, Slot], object] = lambda kind, slot: None
        self.history = History()
        self.books = Books(
            budget, policy, self.clock, self.anonymous, lambda: self.reserved, **rest
        )
        self.hands = FakeHands(self)
        self.desk = Desk(self.hands, self.books, self.tell, most_waiting)
        self.posted: list[Callable[[], object]] = []

    # The process

    def clock(self) -> float:
        return self.now

    def anonymous(self) -> int:
        return self.base + self.calls + sum(self.real.values())

    def tell(self, kind: str, slot: Slot | None, **facts: Any) -> None:
        self.events.append((kind, slot.key if slot else "", facts))

    def kinds(self, key: str) -> list[str]:
        """What was told of a pipeline."""
        return [kind for kind, of, _ in self.events if of == key]

    # The manager's thread

    def drain(self) -> None:
        """Do what was posted, and look at the clock, as the manager's thread does."""
        while True:
            while self.posted:
                self.posted.pop(0)()
            self.desk.tick()
            if not self.posted:
                return

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.drain()

    # What users do

    def slot(
        self, key: str, awake: int, asleep: int = 0, *, known: bool = True, **size: Any
    ) -> Slot:
        """A pipeline that may be asked for; ``known`` where its size is."""
        slot = Slot(key, "task", key, {}, ("app.py", len(self.books.slots) + 1))
        self.sizes[key] = Size(awake, asleep, **size)
        self.books.slots[key] = slot
        if known:
            slot.reload_seconds, slot.wake_seconds = 1.0, 0.5
            slot.resize(self.sizes[key])
        return slot

    def loaded(
        self, key: str, awake: int, asleep: int = 0, *, ago: float = 0.0, **size: Any
    ) -> Slot:
        """A pipeline that is ready and not leased, used that many seconds ago."""
        slot = self.slot(key, awake, asleep, **size)
        slot.pipe, slot.phase, slot.is_open = Pipe(key), Phase.READY, True
        self.real[key] = awake
        slot.use = self.history.used(key, self.now - ago)
        return slot

    def lease(self, slot: Slot, *, keep_alive: float = math.inf) -> Hold:
        """A lease of what is ready, as `Lease` takes it."""
        hold = Hold(slot.site, self.now, keep_alive)
        assert slot.enter(hold) is slot.pipe
        slot.use = self.history.used(slot.key, self.now)
        return hold

    def ask(
        self,
        slot: Slot,
        *,
        priority: float = 0,
        timeout: float = math.inf,
        keep_alive: float = math.inf,
        preload: bool = False,
    ) -> Ask:
        """Somebody who waits; `Ask.hold` is the lease."""
        hold = None if preload else Hold(slot.site, 0.0, keep_alive)
        slot.keep_alive = keep_alive
        ask = Ask(slot, hold, priority, self.now, self.now + timeout)
        self.posted.append(lambda: self.desk.ask(ask))
        self.drain()
        return ask

    def give_back(self, slot: Slot, hold: Hold | None) -> None:
        """Return a lease, as the manager's core does."""
        assert hold is not None
        self.release(slot, hold)
        self.drain()

    def release(self, slot: Slot, hold: Hold) -> None:
        """The user's half of it: the manager's thread has not seen it yet."""
        slot.keep_until = self.now + hold.keep_alive
        slot.holds.pop(hold, None)
        if self.desk.listens or slot.keep_until < self.desk.wakes_at:
            self.posted.append(self.desk.pump)

    def wish(self, slot: Slot, action: str, timeout: float = math.inf) -> Wish:
        wish = Wish(slot, action, self.now + timeout)
        self.posted.append(lambda: self.desk.wish(wish))
        self.drain()
        return wish

    def make_room(self, missing: int) -> Settled:
        made = Settled()
        self.posted.append(lambda: self.desk.make_room(missing, made))
        self.drain()
        return made

    def dispose_behind(self, slot: Slot) -> None:
        """A user disposes a pipeline that is the manager's."""
        if slot.pipe is not None and not slot.pipe.is_doomed:
            slot.pipe.is_doomed = True
            self.hands.tasks.append(Task("dispose", slot, slot.pipe, is_users=True))

    # What the hands do

    def task(self, kind: str, slot: Slot) -> Task:
        (found,) = [one for one in self.hands.tasks if one.slot is slot and one.kind == kind]
        return found

    def doing(self) -> list[tuple[str, str]]:
        """What goes on: a word, and the pipeline."""
        return [(task.kind, task.slot.key) for task in self.hands.tasks]

    def done(self, kind: str, slot: Slot, **how: Any) -> None:
        """Have what goes on end, as it should or as ``how`` says; see `finish`."""
        self.finish(self.task(kind, slot), **how)

    def finish(
        self,
        task: Task,
        *,
        error: BaseException | None = None,
        size: Size | None = None,
        retained: int = 0,
        asleep: bool = True,
    ) -> None:
        """Have a task answer, as real hands do: of a pipeline that is gone, nothing.

        Args:
            task: Which.
            error: What fails it.
            size: What it is measured to take; None for what was thought.
            retained: What stays of it where it is disposed.
            asleep: Whether it sleeps, where that was asked; else calls of it ran.
        """
        self.hands.tasks.remove(task)
        slot, key, pipe = task.slot, task.slot.key, task.pipe
        mine = slot.pipe is pipe
        size = size or self.sizes[key]
        if task.kind == "size":
            if error is not None:
                self._answer(self.desk.failed, slot, error)
            else:
                self._answer(self.desk.sized, slot, size, 1.0)
        elif task.kind == "load":
            if task.is_stopped and error is None:
                error = ManagerClosedError("stopped")
            self.real[key] = size.awake if error is None else 0
            if error is None:
                self.sizes[key] = size
                self._answer(self.desk.loaded, slot, Pipe(key), size)
            else:
                self._answer(self.desk.failed, slot, error)
        elif task.kind == "wake":
            if mine and pipe is not None and pipe.is_doomed:
                error = PipelineDisposedError("It is being disposed.", pipeline=key)
            if mine and error is not None:
                self.real[key] = size.asleep
                self._answer(self.desk.failed, slot, error)
            elif mine:
                self.real[key] = size.awake
                self._answer(self.desk.woken, slot, size)
        elif task.kind == "sleep":
            if mine and pipe is not None and not pipe.is_doomed:
                receipt = self._shrink(key, size.asleep if asleep else self.real[key], retained)
                self._answer_sleep(slot, receipt, size, asleep)
        elif mine:
            self.hands.tasks = [one for one in self.hands.tasks if one.pipe is not pipe]
            stays = size.awake - size.given_back if self.real[key] == size.awake else 0
            receipt = self._shrink(key, 0, retained + stays)
            self._answer(self.desk.disposed, slot, receipt)

    def _answer(self, function: Callable[..., object], *about: Any) -> None:
        self.posted.append(lambda: function(*about))
        self.drain()

    def _answer_sleep(self, slot: Slot, receipt: DisposalReceipt, size: Size, asleep: bool) -> None:
        self.posted.append(lambda: self.desk.slept(slot, receipt, size, asleep=asleep))
        self.drain()

    def _shrink(self, key: str, to: int, retained: int) -> DisposalReceipt:
        charged = self.real[key] - to
        retained = min(retained, charged)
        self.real[key] = to
        self.base += retained
        return DisposalReceipt(
            charged, charged - retained, retained, True, not retained, 0.0, "fake"
        )


@pytest.fixture
def world() -> World:
    """A budget of 100 bytes, and nothing in it."""
    return World()
