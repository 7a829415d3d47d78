"""What this process holds, and how it is given back."""

from ebbtide.memory.probe import (
    Limit,
    MemorySnapshot,
    Pressure,
    anonymous_bytes,
    snapshot,
)
from ebbtide.memory.reaper import Reclaimed, reclaim

__all__ = [
    "Limit",
    "MemorySnapshot",
    "Pressure",
    "Reclaimed",
    "anonymous_bytes",
    "reclaim",
    "snapshot",
]
