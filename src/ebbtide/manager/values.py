"""What a user may write for bytes, seconds and counts, understood."""

from __future__ import annotations

import math
import re

from ebbtide._settings import bytes_of
from ebbtide.errors import InputError

Bytes = str | int | float | None
"""``"2 GiB"``, bytes, a share of the limit up to 1, or None for the default."""
Seconds = str | float | None
"""``"30s"``, ``"5m"``, ``"1h"``, ``"forever"``, or seconds."""

SHARE_OF_A_GROUP = 0.8
SHARE_OF_A_MACHINE = 0.6
"""The default budget: what of the cgroup's limit, or else of the machine's memory."""

_LONGEST = 10**15
"""Seconds above this are for ever: an integer may be larger than any float."""

_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def budget_of(given: Bytes, limit: int, is_machine: bool) -> int:
    """The bytes of a budget, where ``limit`` is the cgroup's or the machine's."""
    if given is None:
        return int(limit * (SHARE_OF_A_MACHINE if is_machine else SHARE_OF_A_GROUP))
    if isinstance(given, float) and 0 < given <= 1:
        return int(limit * given)
    return size_of("budget", given)


def size_of(name: str, given: object) -> int:
    """The bytes of a size; an `InputError` says what ``name`` takes."""
    found = bytes_of(given) if isinstance(given, str) else given
    if isinstance(found, bool) or not isinstance(found, int | float) or not 1 < found < math.inf:
        raise InputError(
            f"{name} takes bytes, or text as '2 GiB' or '500 MB', or a share of the limit from 0 to"
            f" 1, not {given!r}.",
            value=given,
        )
    return int(found)


def seconds_of(name: str, given: object) -> float:
    """The seconds of a time; an `InputError` says what ``name`` takes."""
    seconds: object = given
    if isinstance(given, str):
        match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d+)?)\s*([a-z]*)\s*", given.lower())
        if given.strip().lower() == "forever":
            seconds = math.inf
        elif match and match[2] in _UNITS:
            seconds = float(match[1]) * _UNITS[match[2]]
    if isinstance(seconds, int) and seconds > _LONGEST:
        seconds = math.inf
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds >= 0:
        raise InputError(
            f"{name} takes seconds, 0 or more, or text as '30s', '5m', '1h' or 'forever', not"
            f" {given!r}.",
            value=given,
        )
    return float(seconds)


def count_of(name: str, given: object) -> int | None:
    """A count, or None; an `InputError` says what ``name`` takes."""
    if given is not None and (type(given) is not int or given < 1):
        raise InputError(f"{name} takes a whole number, 1 or more, not {given!r}.", value=given)
    return given
