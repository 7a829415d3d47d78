"""The sums that a manager keeps: what is held, what a slot needs, and what could come free for it.

The sum: what the process holds beside the pipelines, and the charges of all slots, a load's in full
from its begin and a disposal's until its receipt, are at most the budget. What lies beside is
measured: the least of late is the floor, and what came on top of it was the calls'.

There are further accounts: how many pipelines there are; bytes on each device that has memory of
its own; and bytes of prepared files that are mapped, which go back to the system by themselves,
so that more of them than fit stop nothing but have others sleep.

Nothing here changes a slot, so that any thread may ask.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple

from ebbtide.errors import AcquireTimeoutError, OutOfBudgetError, PipelineInUseError
from ebbtide.manager.policy import Entry, Need, Plan, Policy, choose
from ebbtide.manager.slots import Phase, Slot

log = logging.getLogger("ebbtide.manager")

WINDOW = 10.0
"""Seconds for which what was measured beside the pipelines counts."""
_TOGETHER = 0.1
"""Seconds of which the measurements are kept as one."""
_ASLEEP = (Phase.ASLEEP, Phase.FALLING_ASLEEP)

PINNED: Final = "pinned pipelines"
BYTES: Final = "bytes"
COUNT: Final = "count"
MAPPED: Final = "mapped"
"""Accounts; each other is a device's."""
WORDS: Final = {BYTES: "memory", COUNT: "max_pipelines", MAPPED: "room for mapped files"}


class _Seen(NamedTuple):
    """What was measured in a tenth of a second."""

    first: float
    last: float
    most: int
    least: int
    idle: int
    sure: int

    def and_(self, now: float, most: int, least: int, calls: int) -> _Seen:
        return _Seen(
            min(self.first, now),
            now,
            min(self.most, most),
            max(self.least, least),
            max(self.idle, most - calls),
            max(self.sure, least - calls),
        )


_NOTHING = _Seen(math.inf, 0.0, sys.maxsize, 0, 0, 0)


class Beside:
    """What the process was measured to hold beside its pipelines, of late.

    Attributes:
        floor: What is there whatever runs; without what calls reserved that ran all the time.
        high: What was there at most, with what calls took.
        sure: What is there at least, whatever loads and calls under way hold.
    """

    def __init__(self) -> None:
        self.floor = self.high = self.sure = 0
        self._seen: tuple[_Seen, ...] = ()

    def saw(self, now: float, most: int, least: int, calls: int = 0) -> None:
        """Note a measurement, and forget those that are old.

        Of two threads that do so at the same time, one may have done it in vain.

        Args:
            now: The time.
            most: All bytes but those of pipelines that nothing goes on with.
            least: All bytes but what every slot is charged with, a load's to come included.
            calls: What calls under way have reserved: it may be in both.
        """
        seen = [one for one in self._seen if one.last >= now - WINDOW]
        newest = seen.pop() if seen and now - seen[-1].first < _TOGETHER else _NOTHING
        seen.append(newest.and_(now, max(0, most), max(0, least), calls))
        self._seen = tuple(seen)
        lowest = min([one.most for one in seen])
        self.floor = min(lowest, max([one.idle for one in seen]))
        self.high = max([one.least for one in seen])
        self.sure = min(lowest, max([one.sure for one in seen]))


class Books:
    """All slots of a manager, and its sums.

    Args:
        budget: Anonymous bytes of the whole process.
        policy: What goes first.
        clock: Seconds.
        anonymous: Reads the anonymous bytes of the process.
        reserved: Reads the bytes that calls under way have reserved.
        devices: Bytes of each device that has memory of its own; one that is missing is unbounded.
        mapped_limit: Bytes of mapped files; None for unbounded.
        most: How many pipelines there may be.
        share_for_calls: The share of the budget that no load takes, so that calls can go on.
    """

    def __init__(
        self,
        budget: int,
        policy: Policy,
        clock: Callable[[], float],
        anonymous: Callable[[], int],
        reserved: Callable[[], int] = lambda: 0,
        *,
        devices: Mapping[str, int] | None = None,
        mapped_limit: int | None = None,
        most: int | None = None,
        share_for_calls: float = 0.0,
    ) -> None:
        self.budget = budget
        self.policy = policy
        self.clock = clock
        self.devices = dict(devices or {})
        self.mapped_limit = mapped_limit
        self.most = most
        self.share_for_calls = share_for_calls
        self.slots: dict[str, Slot] = {}
        self._anonymous = anonymous
        self._reserved = reserved
        self._beside = Beside()

    def __iter__(self) -> Iterator[Slot]:
        return iter(tuple(self.slots.values()))

    # What is held

    @property
    def charged(self) -> int:
        """The anonymous bytes that all slots are charged with."""
        return sum([slot.charge for slot in self])

    @property
    def leaving(self) -> int:
        """The anonymous bytes that are being given back."""
        return sum([slot.leaving for slot in self])

    @property
    def floor(self) -> int:
        """What the process holds whatever is loaded or runs."""
        return self._beside.floor

    @property
    def workspace(self) -> int:
        """What is kept for calls: what they took of late, or what those under way reserved."""
        return max(self._kept, self._beside.high - self.floor, self._reserved())

    @property
    def _kept(self) -> int:
        """What is kept for calls in any case."""
        return int(self.budget * self.share_for_calls)

    @property
    def free(self) -> int:
        """The bytes that a load may take now; negative where the budget is overdrawn."""
        return self.budget - self.floor - self.workspace - self.charged

    @property
    def for_calls(self) -> int:
        """The bytes that all calls under way may take together."""
        return self.budget - self.floor - self.charged

    @property
    def staying(self) -> int:
        """The bytes that calls cannot have, whatever is returned and goes."""
        return self.floor + sum([slot.charge for slot in self if slot.is_pinned])

    @property
    def mapped(self) -> int:
        """The bytes of prepared files that all slots map."""
        return sum([slot.mapped for slot in self])

    def on(self, device: str) -> int:
        """The bytes that all slots hold on a device."""
        return sum([slot.on(device) for slot in self])

    def measure(self) -> None:
        """Look at what the process holds."""
        anonymous = self._anonymous()
        inside = [slot for slot in self if not slot.is_outside]
        still = sum([slot.charge for slot in inside if slot.is_still])
        charged = sum([slot.charge for slot in inside])
        self._beside.saw(self.clock(), anonymous - still, anonymous - charged, self._reserved())

    # What a slot needs

    def needs(self, slot: Slot) -> int:
        """The anonymous bytes that come on top when a slot is loaded or woken."""
        return slot.size.loading - slot.charge if slot.size is not None else 0

    def missing(self, slot: Slot, *, later: bool) -> dict[str, int]:
        """What each account lacks for a slot to be loaded or woken; at most 0 where it fits.

        Args:
            slot: Which.
            later: Count what is being given back as gone already.
        """
        size = slot.size
        assert size is not None
        others = [one for one in self if one is not slot]
        if later:
            others = [one for one in others if one.phase is not Phase.EVICTING]
        awake = [one for one in others if not (later and one.phase is Phase.FALLING_ASLEEP)]
        missing = {BYTES: self.needs(slot) - self.free - (self.leaving if later else 0)}
        if self.most is not None and slot.phase is Phase.EMPTY:
            live = [one for one in others if one.phase is not Phase.EMPTY]
            missing[COUNT] = len(live) + 1 - self.most
        if self.mapped_limit is not None and size.mapped:
            held = sum([one.mapped for one in awake])
            missing[MAPPED] = min(held, held + size.mapped - self.mapped_limit)
        for device, count in size.devices.items():
            if device in self.devices:
                held = sum([one.on(device) for one in awake])
                missing[device] = held + count - self.devices[device]
        return missing

    def fits(self, slot: Slot) -> bool:
        """Whether a slot may be loaded or woken at once."""
        missing = self.missing(slot, later=False)
        return all(count <= 0 for account, count in missing.items() if account != MAPPED)

    def never(self, slot: Slot) -> OutOfBudgetError | None:
        """Why a slot can never fit, whatever goes and ends; None where it can."""
        size = slot.size
        assert size is not None
        pinned = [
            one
            for one in self
            if one.is_pinned
            and one is not slot
            and one.phase not in (Phase.EMPTY, Phase.EVICTING)
            and all(wish.action == "sleep" for wish in one.wishes)
        ]
        asleep = [one for one in pinned if one.wishes or one.phase in _ASLEEP]
        awake = [one for one in pinned if one not in asleep]
        for device, count in size.devices.items():
            held = sum([one.on(device) for one in awake])
            if device in self.devices and count + held > self.devices[device]:
                rest = {PINNED: held}
                return out_of_budget(slot.key, count, rest, self.devices[device], device)
        if self.most is not None and slot.phase is Phase.EMPTY and len(pinned) >= self.most:
            return OutOfBudgetError(
                f"{slot.key} can never fit: all {self.most} pipelines that this manager may have"
                " are pinned. Unpin one, or raise max_pipelines.",
                needed=size.loading,
                available=0,
                budget=self.budget,
            )
        held = sum([one.size.awake for one in awake if one.size])
        held += sum([one.size.asleep for one in asleep if one.size])
        floor = self._beside.sure
        if size.loading + floor + held + self._kept <= self.budget:
            return None
        rest = {"the process without pipelines": floor, PINNED: held, "calls": self._kept}
        return out_of_budget(slot.key, size.loading, rest, self.budget)

    # What could go

    def takeable(self, but: Slot | None = None, *, leased: bool = False) -> list[Slot]:
        """The slots that may be put to sleep or evicted now, ``but`` one.

        Args:
            but: Which may not.
            leased: Those as well that may once their leases are returned.
        """
        ready, asleep, now = Phase.READY, Phase.ASLEEP, self.clock()
        return [
            slot
            for slot in tuple(self.slots.values())  # with no calls: there may be many
            if ((phase := slot.phase) is ready or phase is asleep)
            and slot is not but
            and not slot.is_pinned
            and not slot.wishes
            and slot.restless_until <= now
            and (not slot.holds or (leased and slot.asked_back_until <= now))
        ]

    def plan(
        self, account: str, missing: int, but: Slot | None = None, *, leased: bool = False
    ) -> Plan:
        """What to put to sleep and what to evict, so that so much of an account comes free.

        Args:
            account: Which.
            missing: How much.
            but: For which slot: it does not go for itself.
            leased: Count what is leased as what may go.
        """
        slots = self.takeable(but, leased=leased)
        if account == BYTES:
            entries = _described(slots)
        else:
            entries = [self._entry(slot, account) for slot in slots]
            entries = [entry for entry in entries if entry.bytes_awake]
        need = Need(max(0, missing))
        try:
            return choose(self.policy, entries, need, self.clock())
        except Exception:
            if not callable(self.policy):
                raise
            log.exception("The policy failed; 'cost' chooses in its place.")
            return choose("cost", entries, need, self.clock())

    def plan_most(self, account: str, missing: int, but: Slot | None = None) -> Plan:
        """The same; where there is not so much, for all that there is."""
        plan = self.plan(account, missing, but)
        return plan if plan.enough else self.plan(account, plan.possible, but)

    def _entry(self, slot: Slot, account: str) -> Entry:
        """A slot as a policy sees it that is to free something else than anonymous bytes."""
        held = 1 if account == COUNT else slot.mapped if account == MAPPED else slot.on(account)
        return Entry(
            slot.key,
            held,
            0,
            slot.reload_seconds,
            slot.wake_seconds,
            slot.use,
            sleepable=account != COUNT,
            keep_until=slot.keep_until,
        )

    # What is said

    def too_late(self, slot: Slot, waited: float) -> AcquireTimeoutError:
        """What somebody hears whose deadline is over."""
        held = [one for one in self if one.holds]
        why = f"it was {slot.phase.value}"
        if slot.is_sizing:
            why = "its files were being looked up or downloaded"
        elif slot.phase in (Phase.EMPTY, Phase.ASLEEP) and slot.size is not None:
            short = [name for name, lack in self.missing(slot, later=False).items() if lack > 0]
            why = (
                f"{mb(self.needs(slot))} were needed, {mb(max(0, self.free))} were free, and"
                f" {mb(sum([one.charge for one in held]))} were in use by"
                f" {some(len(held), 'pipeline')}"
            )
            why += "".join(f"; {WORDS.get(name, name)} was short" for name in short)
        return AcquireTimeoutError(
            f"{slot.key} was not to be had within {waited:.1f} s: {why}. Return leases sooner, wait"
            " longer, or raise the budget.",
            pipeline=slot.key,
            seconds=waited,
        )

    def in_use(self, slot: Slot) -> PipelineInUseError:
        """What somebody hears who wanted a pipeline gone that is leased."""
        sites = tuple(hold.place for hold in tuple(slot.holds))
        return PipelineInUseError(
            f"{slot.key} is still leased ({some(len(sites), 'lease')}): {', '.join(sites[:5])}."
            " Return the leases, or wait longer.",
            pipeline=slot.key,
            sites=sites,
        )


def _described(slots: list[Slot]) -> list[Entry]:
    """Slots as a policy sees them: each as it was described before, where all is as it was."""
    asleep = Phase.ASLEEP
    return [
        entry
        if (entry := slot.entry) is not None
        and entry.use is slot.use
        and entry.keep_until == slot.keep_until
        and entry.asleep is (slot.phase is asleep)
        else slot.as_entry()
        for slot in slots
    ]


def out_of_budget(
    key: str, needed: int, rest: Mapping[str, int], budget: int, account: str = "memory"
) -> OutOfBudgetError:
    """The error for what can never fit, with its sum."""
    parts = [f"{mb(needed)} for it"]
    parts += [f"{mb(count)} for {name}" for name, count in rest.items() if count]
    total = needed + sum(rest.values())
    unpin = "unpin pipelines, or " if rest.get(PINNED) else "or "
    return OutOfBudgetError(
        f"{key} can never fit: {' + '.join(parts)} = {mb(total)}, and the budget of {account} is"
        f" {mb(budget)}. Raise the budget, {unpin}choose a smaller dtype.",
        needed=needed,
        available=budget - sum(rest.values()),
        budget=budget,
    )


def some(count: int, what: str) -> str:
    """A count of something for a person."""
    return f"{count} {what}" + ("" if count == 1 else "s")


def mb(count: float) -> str:
    """Bytes for a person."""
    return f"{count / 1e6:.1f} MB"
