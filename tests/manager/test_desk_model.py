"""Random steps of a manager's life, against what is promised after each of them.

Users and hands are a random generator's. A user takes and returns leases also in the middle of what
the desk does, at each of its looks at the clock, the memory, or its listeners.
"""

from __future__ import annotations

import collections
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
from tests.manager.conftest import Pipe, World

from ebbtide.errors import (
    AcquireTimeoutError,
    ManagerBusyError,
    ManagerClosedError,
    OutOfBudgetError,
    PipelineInUseError,
)
from ebbtide.manager import desk
from ebbtide.manager.accounts import BYTES, COUNT, MAPPED, WINDOW
from ebbtide.manager.desk import OVERTAKEN
from ebbtide.manager.policy import Entry, Need, Policy
from ebbtide.manager.slots import Ask, Hold, Phase, Settled, Size, Slot, Wish
from ebbtide.receipts import DisposalReceipt

BUDGET = 100


def largest(entries: Sequence[Entry], need: Need, now: float) -> dict[str, float]:
    """A policy of a user's."""
    return {entry.key: -entry.bytes_awake for entry in entries}


POLICIES: tuple[Policy, ...] = ("cost", "lru", "lfu", "ttl", largest)

NEVER_OR_LATE = (
    AcquireTimeoutError,
    ManagerBusyError,
    ManagerClosedError,
    OutOfBudgetError,
    MemoryError,
    OSError,
)


class Model(World):
    """A world, and what its users know: what they hold, asked for and were told."""

    def __init__(self, seed: int) -> None:
        self.random = roll = random.Random(seed)
        self.samples: collections.deque[tuple[float, int]] = collections.deque()
        self.is_racing = False
        super().__init__(
            BUDGET,
            base=10,
            policy=POLICIES[seed % len(POLICIES)],
            most_waiting=roll.choice([1000, 1000, 12]),
            most=roll.choice([None, None, 5]),
            mapped_limit=roll.choice([None, 60]),
            devices={"cuda:0": 40, "cuda:1": 30} if seed % 3 == 1 else None,
        )
        self.held: dict[Hold, Slot] = {}
        self.asks: list[Ask] = []
        self.wishes: list[Wish] = []
        self.rooms: list[Settled] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self.forced: set[str] = set()
        self.made: list[DisposalReceipt] = []
        """The receipts that the hands gave, and those of them that were told."""
        self.told: list[DisposalReceipt] = []
        self.untold = -math.inf
        """When a user's own disposal was over last, and not told yet."""
        for number in range(14):
            awake = roll.choice([4, 8, 15, 25, 40, 60, 95 if number == 3 else 30])
            more: dict[str, Any] = {"peak": awake + roll.choice([0, 0, awake // 3])}
            more["mapped"] = roll.choice([0, 20, 40])
            more["frees"] = roll.choice([None, None, awake - awake // 4])
            if roll.random() < 0.5:
                more["devices"] = {roll.choice(["cuda:0", "cuda:1"]): roll.choice([8, 20, 30])}
            self.slot(f"m{number:02}", awake, awake // roll.choice([4, 10]), known=False, **more)
        self.slots = list(self.books)
        self.on_begin = self.begins
        self.is_racing = True

    # What users do in the middle of what the desk does

    def race(self) -> None:
        if self.is_racing and self.random.random() < 0.06:
            idle = [slot for slot in self.slots if slot.is_open and not slot.holds]
            if self.held and self.random.random() < 0.5:
                self.return_one()
            else:
                self.take(self.random.choice(idle or self.slots))

    def clock(self) -> float:
        self.race()
        return self.now

    def anonymous(self) -> int:
        self.race()
        self.samples.append((self.now, self.base + self.calls - self.reserved))
        while self.samples[0][0] < self.now - WINDOW:
            self.samples.popleft()
        return super().anonymous()

    def tell(self, kind: str, slot: Slot | None, **facts: Any) -> None:
        self.counts[kind] += 1
        if kind in ("sleeping", "disposed"):
            self.told.append(facts["receipt"])
        self.race()

    def _shrink(self, key: str, to: int, retained: int) -> DisposalReceipt:
        self.made.append(super()._shrink(key, to, retained))
        return self.made[-1]

    # What holds when something begins

    def begins(self, kind: str, slot: Slot) -> None:
        """What is promised at the moment that something begins."""
        books, about = self.books, f"{kind} {slot.key}"
        assert not [task for task in self.hands.tasks if task.slot is slot and not task.is_users], (
            f"{about}: something goes on with it already"
        )
        self.counts[f"hands {kind}"] += 1
        if kind == "size":
            assert slot.size is None
            return
        assert slot.size is not None
        if kind in ("load", "wake"):
            assert not slot.is_open
            assert self.real.get(slot.key, 0) == (slot.size.asleep if kind == "wake" else 0)
            assert books.charged + books.floor + books.workspace <= BUDGET, f"{about}: over"
            # What is there now, and all that this load takes; and, whatever else is under way, all
            # charges beside what the process held at least of late. (Where a user disposed a
            # pipeline, less is measured for a moment than is charged.)
            asked = slot.size.loading - self.real.get(slot.key, 0)
            assert super().anonymous() + asked <= BUDGET
            if self.now > self.untold + WINDOW:
                assert min(base for _, base in self.samples) + books.charged <= BUDGET
            for device, limit in books.devices.items():
                assert books.on(device) <= limit, f"{about}: {device}"
            if books.most is not None:
                live = [one for one in books if one.phase is not Phase.EMPTY]
                assert len(live) <= books.most, f"{about}: too many"
            self.begins_in_turn(slot)
        else:
            assert not slot.is_open
            if kind != "force":
                assert not slot.holds, f"{about}: it is leased"
                assert slot.wishes or not slot.is_pinned, f"{about}: it is pinned"
            else:
                assert slot.key in self.forced

    def begins_in_turn(self, slot: Slot) -> None:
        """Who waits longer than the time of grace is not overtaken by a load behind it."""
        order = sorted(self.desk.waiting, key=lambda one: one.turn)
        first = next(place for place, ask in enumerate(order) if ask.slot is slot)
        for ask in order[:first]:
            if waits_for_room(ask):
                assert self.now - ask.since < OVERTAKEN, (
                    f"{slot.key} overtakes {ask.slot.key}, which waits for {self.now - ask.since} s"
                )

    # Steps

    def take(self, slot: Slot) -> None:
        """Ask for a lease, as `Lease` does."""
        roll = self.random
        keep_alive = roll.choice([0.0, 1.0, 20.0, math.inf, math.inf])
        hold = Hold(slot.site, 0.0, keep_alive)
        was_open = slot.is_open and not is_doomed(slot)
        slot.keep_alive = keep_alive
        pipe = slot.enter(hold)
        assert (pipe is not None) == was_open, "who finds it open does not wait"
        if pipe is not None:
            assert pipe is slot.pipe
            self.given(slot, hold)
        elif len(self.asks) < 25:
            timeout = roll.choice([math.inf, math.inf, 0.0, 1.0, 5.0, 30.0])
            self.wait(
                Ask(slot, hold, roll.choice([0, 0, 0, 1, -1, 5]), self.now, self.now + timeout)
            )

    def wait(self, ask: Ask) -> None:
        self.asks.append(ask)
        ask.on_settled(lambda: self.answered(ask))
        self.posted.append(lambda: self.desk.ask(ask))

    def answered(self, ask: Ask) -> None:
        """An ask is answered, and once."""
        self.asks.remove(ask)
        self.counts["answered"] += 1
        if ask.error is not None:
            assert isinstance(ask.error, NEVER_OR_LATE), ask.error
            self.counts[type(ask.error).__name__] += 1
        else:
            assert ask.value is ask.slot.pipe
            assert not ask.value.is_doomed, "who asks is given one that takes calls"
            assert ask.slot.phase is Phase.READY
            if ask.hold is not None:
                self.given(ask.slot, ask.hold)

    def given(self, slot: Slot, hold: Hold) -> None:
        assert hold not in self.held
        self.held[hold] = slot
        slot.use = self.history.used(slot.key, self.now)
        self.counts["given"] += 1

    def return_one(self) -> None:
        hold = self.random.choice(list(self.held))
        self.release(self.held.pop(hold), hold)

    def withdraw(self, ask: Ask) -> None:
        """Who is interrupted while it waits asks no more."""
        hold = ask.hold

        def withdrawn() -> None:
            if hold is not None:
                self.held.pop(hold, None)
            self.desk.withdraw(ask)

        self.posted.append(withdrawn)

    def wished(self, slot: Slot, action: str, timeout: float) -> None:
        wish = Wish(slot, action, self.now + timeout)
        self.wishes.append(wish)
        wish.on_settled(lambda: self.granted(wish))
        if action == "force":
            self.forced.add(slot.key)
            wish.on_settled(lambda: self.forced.discard(slot.key))
        self.posted.append(lambda: self.desk.wish(wish))

    def granted(self, wish: Wish) -> None:
        self.wishes.remove(wish)
        if wish.error is not None:
            assert isinstance(wish.error, PipelineInUseError)
            assert wish.error.sites
            self.counts["PipelineInUseError"] += 1
        else:
            assert wish.value is None or wish.value in self.made

    def make_some_room(self) -> None:
        made = Settled()
        self.rooms.append(made)
        made.on_settled(lambda: self.rooms.remove(made))
        missing = self.random.randint(1, 60)
        self.posted.append(lambda: self.desk.make_room(missing, made))

    def grow(self) -> None:
        """What is loaded takes more and more."""
        for task in self.hands.tasks:
            size = task.slot.size
            if task.kind in ("load", "wake") and size is not None:
                least = size.asleep if task.kind == "wake" else 0
                self.real[task.slot.key] = self.random.randint(least, size.loading)

    def hands_do(self) -> None:
        """One of the things that go on ends, well or badly."""
        roll = self.random
        task = roll.choice(self.hands.tasks)
        how: dict[str, Any] = {}
        size = self.sizes[task.slot.key]
        if task.kind in ("size", "load", "wake"):
            chance = roll.random()
            if chance < 0.05:
                how["error"] = OSError("a file is damaged")
            elif chance < 0.12:
                how["error"] = MemoryError("no memory")
            elif chance < 0.2 and task.kind == "load":
                awake = max(size.asleep, roll.choice([size.awake - 3, size.awake + 3]))
                how["size"] = Size(awake, size.asleep, awake, size.mapped, None, size.devices, True)
        elif task.is_users:
            self.untold = self.now
        elif task.kind == "sleep":
            how["asleep"] = roll.random() > 0.15
        if task.kind in ("sleep", "dispose") and roll.random() < 0.05:
            how["retained"] = roll.randint(1, 3)
        self.finish(task, **how)

    def user_disposes(self) -> None:
        there = [slot for slot in self.slots if slot.phase is Phase.READY and not is_doomed(slot)]
        if there:
            self.dispose_behind(self.random.choice(there))
            self.counts["disposed behind"] += 1

    def resize(self) -> None:
        """A pipeline goes over to its prepared copy, say."""
        there = [slot for slot in self.slots if slot.phase is Phase.READY and not is_doomed(slot)]
        if there:
            slot = self.random.choice(there)
            size = self.sizes[slot.key]
            awake = max(size.asleep, size.awake + self.random.choice([-6, -3, 3]), 2)
            new = Size(awake, min(size.asleep, awake), awake, size.mapped, None, size.devices, True)
            self.sizes[slot.key] = new

            def resized() -> None:
                if slot.phase is Phase.READY and not is_doomed(slot):
                    self.real[slot.key] = new.awake
                self.desk.resized(slot, new)

            self.posted.append(resized)

    def step(self) -> None:
        """One thing happens."""
        roll = self.random
        chance, slot = roll.random(), self.slots[min(int(roll.expovariate(0.3)), 13)]
        late = roll.choice([0.0, 1.0, 10.0, math.inf])
        if chance < 0.34:
            self.take(slot)
        elif chance < 0.58:
            if self.held:
                self.return_one()
        elif chance < 0.80:
            self.grow()
            if self.hands.tasks:
                self.hands_do()
        elif chance < 0.90:
            self.now += roll.choice([0.01, 0.1, 0.5, 1.0, 3.0, 12.0])
        elif chance < 0.91:
            if self.asks:
                self.withdraw(roll.choice(self.asks))
        elif chance < 0.92:
            self.wait(Ask(slot, None, 0, self.now, self.now + late))
        elif chance < 0.935:
            pinned = roll.random() < 0.3
            self.posted.append(lambda: self.desk.pin(slot, pinned))
        elif chance < 0.96:
            self.wished(slot, roll.choice(["sleep", "evict"]), late)
        elif chance < 0.963:
            self.wished(slot, "force", math.inf)
        elif chance < 0.97:
            missing = roll.choice([0, 0, 20])
            self.posted.append(lambda: self.desk.pressed(missing))
        elif chance < 0.975:
            self.make_some_room()
        elif chance < 0.98:
            self.user_disposes()
        elif chance < 0.985:
            self.resize()
        elif chance < 0.99:
            self.base = roll.choice([5, 10, 20])
        else:
            self.calls = roll.choice([0, 0, 10, 20])
            self.reserved = roll.choice([0, self.calls])
        if roll.random() < 0.7:
            self.drain()
            self.check()

    # What holds after each step

    def check(self) -> None:
        """What is promised whenever the desk has nothing to do."""
        racing, self.is_racing = self.is_racing, False
        self.check_promises()
        self.is_racing = racing

    def check_promises(self) -> None:
        books, desk = self.books, self.desk
        under_way = [task for task in self.hands.tasks if not task.is_users]
        for slot in books:
            assert set(slot.holds) == {hold for hold, of in self.held.items() if of is slot}, (
                f"a lease of {slot.key} is lost"
            )
            doing = [task.kind for task in under_way if task.slot is slot]
            assert len(doing) <= 1
            assert (slot.phase is Phase.READY) <= (slot.pipe is not None)
            if slot.is_to_be_had and not desk.is_closed:
                assert slot.is_open, f"{slot.key} is ready, and lets nobody in"
            assert slot.is_open <= (slot.phase is Phase.READY)
            idle = slot.is_still and not (slot.holds or slot.is_pinned)
            if idle:
                assert slot.keep_until > self.now, f"{slot.key} is kept too long"
                assert desk.wakes_at <= slot.keep_until
            if slot.is_still:
                assert all(wish.deadline > self.now for wish in slot.wishes)
                assert not slot.wishes or slot.holds, f"what was wished of {slot.key} is not done"
        for ask in desk.waiting:
            assert not ask.is_settled
            assert ask.deadline > self.now
            assert desk.wakes_at <= ask.deadline
        assert set(desk.waiting) == set(self.asks), "an ask is lost"
        if not any(slot.is_sizing for slot in books) and all(
            slot.is_still or slot.phase is Phase.EMPTY for slot in books
        ):
            self.check_that_nobody_waits_needlessly()

    def check_that_nobody_waits_needlessly(self) -> None:
        order = sorted(self.desk.waiting, key=lambda one: one.turn)
        head = next((ask for ask in order if waits_for_room(ask)), None)
        if head is None:
            return
        books = self.books
        assert books.never(head.slot) is None
        missing = books.missing(head.slot, later=False)
        could = [one for one in books.takeable() if one is not head.slot]
        possible = {
            BYTES: sum(
                one.size.asleep if one.phase is Phase.ASLEEP else one.size.given_back
                for one in could
                if one.size
            ),
            COUNT: len(could),
            **{device: sum(one.on(device) for one in could) for device in books.devices},
        }
        assert any(
            count > 0 and possible[account] < count
            for account, count in missing.items()
            if account != MAPPED
        ), f"{head.slot.key} waits, and nothing stands against it: {missing}, {possible}"

    def settle_down(self) -> None:
        """All leases are returned, all calls end and all hands finish: nobody waits any more."""
        self.is_racing = False
        self.calls = self.reserved = 0
        for slot in self.slots:
            slot.is_pinned = False
        for _ in range(3000):
            self.drain()
            self.check()
            if self.held:
                self.return_one()
            elif self.hands.tasks:
                self.finish(self.random.choice(self.hands.tasks))
            elif self.desk.waiting or self.wishes:
                self.now += 1.0
            else:
                break
        assert not self.asks, "nobody waits for ever"
        assert not self.wishes
        assert not self.rooms

    def close(self) -> None:
        """Close in the middle of it all."""
        for _ in range(30):
            self.take(self.random.choice(self.slots))
        self.drain()
        self.is_racing = False
        waiting = tuple(self.desk.waiting)
        self.posted.append(self.desk.close)
        self.drain()
        assert all(isinstance(ask.error, ManagerClosedError) for ask in waiting)
        for slot in self.slots:
            assert slot.enter(Hold(slot.site, 0.0, 0.0)) is None, "nothing is given out any more"
            self.wished(slot, self.random.choice(["evict", "force"]), 5.0)
        self.drain()
        for _ in range(3000):
            self.check()
            if self.hands.tasks:
                self.finish(self.random.choice(self.hands.tasks))
            elif self.held:
                self.return_one()
                self.drain()
            else:
                break
        assert [slot.phase for slot in self.slots] == [Phase.EMPTY] * len(self.slots)
        assert self.books.charged == self.books.leaving == 0
        assert not (self.asks)
        assert not (self.wishes)
        assert not (self.rooms)
        assert not (self.hands.tasks)
        assert super().anonymous() == self.base + self.calls

    def check_counts(self) -> None:
        """What was told is what was done."""
        counts = self.counts
        assert counts["loading"] == counts["hands load"]
        assert counts["waking"] == counts["hands wake"]
        assert counts["evicting"] == counts["hands dispose"] + counts["hands force"]
        begun = counts["loading"] + counts["waking"]
        assert counts["ready"] <= begun <= counts["ready"] + counts["failed"] + counts["disposed"]
        assert counts["evicting"] <= counts["disposed"] + counts["disposed behind"]
        assert {id(one) for one in self.told} <= {id(one) for one in self.made}
        assert len({id(one) for one in self.told}) == len(self.told), "each is told once"
        assert counts["sleeping"] + counts["disposed"] == len(self.told)
        assert sum(one.charged for one in self.told) == sum(
            one.released + one.retained for one in self.told
        )


def is_doomed(slot: Slot) -> bool:
    return isinstance(slot.pipe, Pipe) and slot.pipe.is_doomed


def waits_for_room(ask: Ask) -> bool:
    """Whether an ask waits for nothing but room."""
    slot = ask.slot
    return (
        slot.phase in (Phase.EMPTY, Phase.ASLEEP)
        and slot.size is not None
        and not slot.is_sizing
        and not slot.wishes
    )


def live(seed: int, steps: int) -> collections.Counter[str]:
    """A manager's whole life."""
    model = Model(seed)
    for _ in range(steps):
        model.step()
    if seed % 2:
        model.settle_down()
        model.is_racing = True
    model.close()
    model.check_counts()
    return model.counts


def test_what_a_manager_promises_holds_after_each_of_20_000_random_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts: collections.Counter[str] = collections.Counter()
    for seed in range(10):
        if seed == 5:
            monkeypatch.setattr(desk, "MOST_KNOWN", 6)
        counts += live(seed, 2_000)
    for seen in (
        "given", "ready", "waking", "sleeping", "disposed", "failed", "disposed behind",
        "hands force", "forgotten", "AcquireTimeoutError", "ManagerBusyError", "OutOfBudgetError",
        "ManagerClosedError", "PipelineInUseError", "MemoryError", "OSError",
    ):  # fmt: skip
        assert counts[seen] > 0, f"no {seen} in all these steps"


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10, 50))
def test_it_holds_for_many_more_seeds(seed: int) -> None:
    live(seed, 20_000)
