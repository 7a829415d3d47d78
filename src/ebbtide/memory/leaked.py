"""Pipelines that nobody can reach or nobody uses, where they were made, and what holds them."""

from __future__ import annotations

import dataclasses
import time
import weakref
from typing import Any

from ebbtide.errors import InputError
from ebbtide.lifecycle import Lifecycle, live
from ebbtide.memory.holders import Held, Holder, held


@dataclasses.dataclass(frozen=True, slots=True)
class Leak:
    """A live pipeline that nobody can reach, or nobody has used.

    Attributes:
        pipeline: Which one, for people.
        site: Where it was made, as ``file:line``; of a manager's, where it was leased.
        charged: Bytes that disposing it would give back.
        idle: Seconds since its last call ended, or since it was made.
        why: Why it is one, in words.
        holders: What holds it, the nearest first.
    """

    pipeline: str
    site: str
    charged: int
    idle: float
    why: str
    holders: tuple[Holder, ...]

    def __str__(self) -> str:
        """A few lines for a person, in MB of 1,000,000 bytes."""
        lines = [
            f"{self.pipeline}, made at {self.site}: {self.charged / 1e6:.1f} MB,"
            f" not used for {self.idle:.0f} s",
            f"  {self.why}",
        ]
        for one in self.holders:
            lines += [f"    {'  ' * depth}{step}" for depth, step in enumerate(one.chain)]
        return "\n".join(lines)


def leaks(idle: float | None = None) -> tuple[Leak, ...]:
    """Name each live pipeline that nobody can reach, or nobody has used for ``idle`` seconds.

    Nobody can reach a pipeline in a cycle that waits for a garbage collection, or one that only
    the tracebacks of kept exceptions hold. All else can be reached, and whether it is a leak is
    told by its use alone. Never one: a pipeline that runs a call, is being loaded or disposed, or
    is in a local variable of a function that led to this call, alone or in a container, a context
    manager or a stream.

    It looks through every object that Python's garbage collector tracks, some times over: about ten
    milliseconds a pipeline in a small process, and never more than some seconds.

    Args:
        idle: Seconds without a call after which a pipeline counts as unused; None for never.

    Returns:
        The leaks, the oldest first.

    Raises:
        InputError: ``idle`` is negative, or no number.

    Example:
        >>> leaks()
        ()
    """
    if idle is not None and not idle >= 0:
        raise InputError(f"idle takes seconds, 0 or more, or None, not {idle!r}.", value=idle)
    found = []
    for lifecycle in lifecycles():
        if not lifecycle.running:
            leak = _leak(lifecycle, idle)
            if leak is not None:
                found.append(leak)
    return tuple(found)


def lifecycles() -> list[Lifecycle]:
    """Those of all pipelines that take calls, the oldest first; they hold no pipeline."""
    return [life for life in (one._lifecycle for one in live()) if life.takes_calls]


def left_behind(lifecycle: Lifecycle) -> Leak | None:
    """A pipeline as a leak, though it be in use; None if it is gone, or a manager keeps it."""
    if lifecycle.lent is not None:
        return _lent(lifecycle, lifecycle.lent(), 0.0)
    about = _held(lifecycle)
    if about is None:
        return None
    return _described(lifecycle, about, _why(about) or _held_by(about))


def _leak(lifecycle: Lifecycle, idle: float | None) -> Leak | None:
    if lifecycle.lent is not None:
        return _lent(lifecycle, lifecycle.lent(), idle)
    about = _held(lifecycle)
    why = None if about is None else _unwanted(lifecycle, about, idle)
    return None if about is None or why is None else _described(lifecycle, about, why)


def _lent(
    lifecycle: Lifecycle, leases: list[tuple[weakref.ref[Any], str]], idle: float | None
) -> Leak | None:
    """A manager's pipeline: no leak, unless a lease of it is one."""
    for lease, site in leases:
        about = held(lease)
        why = None if about is None else _unwanted(lifecycle, about, idle)
        if about is not None and why is not None:
            why = f"a lease that was not returned, {why}"
            return dataclasses.replace(_described(lifecycle, about, why), site=site)
    return None


def _unwanted(lifecycle: Lifecycle, about: Held, idle: float | None) -> str | None:
    """Why nobody needs something; None where somebody may."""
    why = _why(about)
    if why is None and not about.in_use and idle is not None:
        unused = _unused(lifecycle)
        why = f"not used for {unused:.0f} s, {_held_by(about)}" if unused >= idle else None
    return why


def _held(lifecycle: Lifecycle) -> Held | None:
    return None if lifecycle.owner is None else held(lifecycle.owner)


def _unused(lifecycle: Lifecycle) -> float:
    return max(0.0, time.monotonic() - lifecycle.used)


def _why(about: Held) -> str | None:
    """Why nobody can reach a pipeline; None where somebody can."""
    if about.unreachable:
        return "unreachable, waits for a collection" + "".join(f": in {x}" for x in about.holders)
    kept = all(one.kind == "traceback" for one in about.holders)
    return _held_by(about) if kept and not about.in_use else None


def _held_by(about: Held) -> str:
    first, *more = about.holders
    return f"held by {first}" + (f", and {len(more)} more" if more else "")


def _described(lifecycle: Lifecycle, about: Held, why: str) -> Leak:
    file, line = lifecycle.site
    return Leak(
        pipeline=lifecycle.label,
        site=f"{file}:{line}",
        charged=lifecycle.charged,
        idle=_unused(lifecycle),
        why=why,
        holders=about.holders,
    )
