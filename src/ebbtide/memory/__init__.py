"""What this process holds, and how it is given back."""

from typing import TYPE_CHECKING

from ebbtide.memory.probe import (
    Limit,
    MemorySnapshot,
    Pressure,
    anonymous_bytes,
    snapshot,
)
from ebbtide.memory.reaper import Reclaimed, reclaim

if TYPE_CHECKING:
    from ebbtide.memory.holders import Holder
    from ebbtide.memory.leaked import Leak, leaks
    from ebbtide.memory.monitor import Monitor, PressureEvent
    from ebbtide.memory.timeline import Timeline

__all__ = [
    "Holder",
    "Leak",
    "Limit",
    "MemorySnapshot",
    "Monitor",
    "Pressure",
    "PressureEvent",
    "Reclaimed",
    "Timeline",
    "anonymous_bytes",
    "leaks",
    "reclaim",
    "snapshot",
]

_HOMES = {
    "Holder": "holders", "Leak": "leaked", "leaks": "leaked",
    "Monitor": "monitor", "PressureEvent": "monitor", "Timeline": "timeline",
}  # fmt: skip
"""Names that are imported when they are first used, and the modules that have them."""


def __getattr__(name: str) -> object:
    import importlib

    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ebbtide.memory' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"ebbtide.memory.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
