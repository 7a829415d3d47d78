"""What a manager says of itself: what there is, and what would happen. Plain data, and in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from ebbtide.manager.accounts import COUNT, MAPPED, WORDS, Books, mb, some
from ebbtide.manager.policy import Plan
from ebbtide.manager.slots import Phase, Slot
from ebbtide.memory.probe import anonymous_bytes

Verdict = Literal["ready", "fits", "makes room", "waits", "never"]


@dataclasses.dataclass(frozen=True, slots=True)
class PipelineStatus:
    """One pipeline of a manager. Bytes and seconds.

    Attributes:
        key: Its name: the task, the model, and what was chosen.
        phase: ``empty`` (not loaded), ``loading``, ``ready``, ``falling asleep``, ``asleep``,
            ``waking`` or ``evicting``.
        anonymous: What it is charged with now.
        mapped: What it maps of prepared files.
        leases: How many hold it.
        pinned: Whether it is to stay.
        uses: How often it was leased.
        idle: Seconds since it was leased or returned last; None where it never was.
        keep: Seconds until it goes if nobody uses it; infinite for ever, None where it is in use.
        reload_seconds: How long its load took, or is thought to take.
        measured: Whether its bytes were measured; else they are estimated.
    """

    key: str
    phase: str
    anonymous: int
    mapped: int
    leases: int
    pinned: bool
    uses: int
    idle: float | None
    keep: float | None
    reload_seconds: float
    measured: bool


@dataclasses.dataclass(frozen=True, slots=True)
class ManagerStatus:
    """A manager at one moment. In bytes of anonymous memory, but where said otherwise.

    ``budget`` = ``floor`` + ``pipelines`` + ``workspace`` + ``free``.

    Attributes:
        budget: What the whole process may hold.
        floor: What it holds beside pipelines and calls.
        pipelines: What pipelines are charged with; loads in full from their begin.
        workspace: What is kept for calls: what they took of late, or have reserved.
        free: What a load may take; negative where the budget is overdrawn.
        measured: What the process was measured to hold.
        mapped: Bytes of prepared files that are mapped, beside the budget.
        devices: For each device with memory of its own, the bytes held and those that may be.
        waiting: How many wait for a pipeline.
        counts: How often what happened, by the kinds of events, as ``loading`` and ``disposed``.
        entries: Each pipeline that was asked for, the largest first.
    """

    budget: int
    floor: int
    pipelines: int
    workspace: int
    free: int
    measured: int
    mapped: int
    devices: Mapping[str, tuple[int, int | None]]
    waiting: int
    counts: Mapping[str, int]
    entries: tuple[PipelineStatus, ...]

    def __str__(self) -> str:
        """A few lines and a table for a person."""
        lines = [
            f"budget {mb(self.budget)} = floor {mb(self.floor)} + pipelines {mb(self.pipelines)}"
            f" + workspace {mb(self.workspace)} + free {mb(self.free)}; measured"
            f" {mb(self.measured)}, mapped {mb(self.mapped)}, {self.waiting} waiting"
        ]
        lines += [
            f"{device}: {mb(held)}" + (f" of {mb(most)}" if most is not None else "")
            for device, (held, most) in self.devices.items()
        ]
        for one in self.entries:
            facts = [one.phase, mb(one.anonymous)]
            facts += [f"{mb(one.mapped)} mapped"] if one.mapped else []
            facts += [some(one.leases, "lease")] if one.leases else []
            facts += ["pinned"] if one.pinned else []
            if one.idle is not None:
                facts.append(f"used {some(one.uses, 'time')}, {one.idle:.0f} s ago")
            lines.append(f"  {one.key}: {', '.join(facts)}")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True, slots=True)
class Explanation:
    """What a request would meet now, before anything happens. In bytes of anonymous memory.

    Attributes:
        key: The pipeline.
        verdict: ``ready`` (loaded, at once), ``fits`` (is loaded at once), ``makes room`` (others
            sleep or go first), ``waits`` (for leases to be returned, or for who waits already), or
            ``never``.
        needed: What its load takes at most.
        free: What there is.
        budget: What the whole process may hold.
        plans: What would sleep and what would be evicted, by account: ``bytes``, ``count``,
            ``mapped``, or a device.
        reason: Why, in words.
        measured: Whether ``needed`` was measured by an earlier load; else it is estimated.
    """

    key: str
    verdict: Verdict
    needed: int
    free: int
    budget: int
    plans: Mapping[str, Plan]
    reason: str
    measured: bool

    @property
    def sleep(self) -> tuple[str, ...]:
        """The keys of what would sleep."""
        return tuple(dict.fromkeys(key for plan in self.plans.values() for key in plan.sleep))

    @property
    def evict(self) -> tuple[str, ...]:
        """The keys of what would be evicted."""
        return tuple(dict.fromkeys(key for plan in self.plans.values() for key in plan.evict))

    def __str__(self) -> str:
        """Lines for a person."""
        lines = [f"{self.key}: {self.verdict}: {self.reason}"]
        for account, plan in self.plans.items():
            steps = [f"{step.action} {step.key}: {WORDS[COUNT]}" for step in plan.steps]
            told = steps if account == COUNT else str(plan).splitlines()
            lines += [f"  {line}" for line in told]
        return "\n".join(lines)


def status_of(books: Books, waiting: int, counts: Mapping[str, int]) -> ManagerStatus:
    """What there is now, on any thread."""
    slots = list(books)
    floor, workspace, charged = books.floor, books.workspace, books.charged
    named = {device: None for slot in slots if slot.size for device in slot.size.devices}
    entries = sorted((_status(slot, books.clock()) for slot in slots), key=lambda x: -x.anonymous)
    return ManagerStatus(
        budget=books.budget,
        floor=floor,
        pipelines=charged,
        workspace=workspace,
        free=books.budget - floor - workspace - charged,
        measured=anonymous_bytes(),
        mapped=books.mapped,
        devices={
            name: (books.on(name), books.devices.get(name)) for name in {**books.devices, **named}
        },
        waiting=waiting,
        counts=dict(counts),
        entries=tuple(entries),
    )


def _status(slot: Slot, now: float) -> PipelineStatus:
    still = slot.is_still and not slot.holds
    was_used = slot.use.turn > 0
    return PipelineStatus(
        key=slot.key,
        phase=slot.phase.value,
        anonymous=slot.charge,
        mapped=slot.mapped,
        leases=len(slot.holds),
        pinned=slot.is_pinned,
        uses=slot.use.count if was_used else 0,
        idle=now - slot.use.at if was_used else None,
        keep=(math.inf if slot.is_pinned else slot.keep_until - now) if still else None,
        reload_seconds=slot.reload_seconds,
        measured=slot.size is not None and slot.size.is_measured,
    )


def explanation_of(books: Books, waiting: int, slot: Slot) -> Explanation:
    """What asking for a slot would do now, on any thread."""
    assert slot.size is not None
    verdict, reason, plans = _verdict(books, waiting, slot)
    return Explanation(
        key=slot.key,
        verdict=verdict,
        needed=max(0, books.needs(slot)),
        free=books.free,
        budget=books.budget,
        plans=plans,
        reason=reason,
        measured=slot.size.is_measured,
    )


def _verdict(books: Books, waiting: int, slot: Slot) -> tuple[Verdict, str, dict[str, Plan]]:
    if slot.phase is Phase.READY and slot.wishes:
        return "waits", "somebody wants it asleep or gone", {}
    if slot.phase is Phase.READY:
        return "ready", "it is loaded", {}
    if slot.phase not in (Phase.EMPTY, Phase.ASLEEP):
        return "waits", f"it is {slot.phase.value}", {}
    never = books.never(slot)
    if never is not None:
        return "never", str(never).removeprefix(f"{slot.key} "), {}
    missing = books.missing(slot, later=True)
    plans = {
        name: (books.plan_most if name == MAPPED else books.plan)(name, count, slot)
        for name, count in missing.items()
        if count > 0
    }
    sums = f"{mb(books.needs(slot))} are needed, and {mb(max(0, books.free))} are free"
    if waiting:
        return "waits", f"{waiting} wait already; {sums}", plans
    short = [name for name, plan in plans.items() if name != MAPPED and not plan.enough]
    if short:
        reason = f"{sums}; too little may go for {' and '.join(WORDS.get(x, x) for x in short)}"
        return "waits", reason, plans
    return ("makes room" if plans else "fits"), sums, plans
