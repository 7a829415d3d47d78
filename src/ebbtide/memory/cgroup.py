"""Which control groups hold this process, and what memory and CPU they allow it.

Linux only: elsewhere there is no ``/proc/self/cgroup``, so no level is found and nothing is
limited. Every function takes ``root``, the directory that holds ``proc`` and ``sys``, so that a
test can hand it a made-up tree.

A file that is missing, unreadable or malformed never raises. It counts as not being there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "CgroupEntry",
    "CgroupMount",
    "Level",
    "MemoryLevel",
    "Root",
    "Version",
    "cpu_count",
    "cpu_quota",
    "levels",
    "memory_levels",
    "natural_number",
    "parse_cgroup",
    "parse_mountinfo",
    "read_text",
]

Root = str | os.PathLike[str]
Version = Literal[1, 2]

# Version 1 has no word for "unlimited": it prints the largest page-aligned signed 64-bit number
# (9223372036854771712 with 4 KiB pages, less with larger pages). No machine has 2**60 bytes.
_UNLIMITED = 2**60


@dataclass(frozen=True, slots=True)
class CgroupEntry:
    """One line of ``/proc/self/cgroup``: the path of this process in one hierarchy.

    Version 2 has a single line and names no controllers on it.
    """

    version: Version
    controllers: frozenset[str]
    path: str


@dataclass(frozen=True, slots=True)
class CgroupMount:
    """One mounted cgroup hierarchy from ``/proc/self/mountinfo``.

    ``root`` is the cgroup that shows at ``mount_point``: "/" for a whole hierarchy, the
    container's own cgroup where only that part was mounted.
    """

    version: Version
    controllers: frozenset[str]
    root: str
    mount_point: str


@dataclass(frozen=True, slots=True)
class Level:
    """One cgroup directory, this process's own or an ancestor's, as a path that can be opened."""

    version: Version
    path: str


@dataclass(frozen=True, slots=True)
class MemoryLevel:
    """What one cgroup level with a memory limit says, in bytes.

    ``usage`` is None where the level does not tell it. ``reclaimable`` is the part of ``usage``
    that the kernel gives back first: inactive file pages, and on version 2 reclaimable slab.
    Active file pages are left out. They can be dropped too, but a process that keeps losing the
    files it is reading has already run out of memory in every way that matters to it.
    """

    version: Version
    path: str
    limit: int
    usage: int | None
    reclaimable: int

    @property
    def available(self) -> int | None:
        """Bytes that can still be taken at this level: 0 to ``limit``, None if unknown."""
        if self.usage is None:
            return None
        held = self.usage - min(self.reclaimable, self.usage)
        return max(0, self.limit - held)


def parse_cgroup(text: str) -> list[CgroupEntry]:
    """Read the text of ``/proc/self/cgroup``; lines that make no sense are skipped."""
    entries = []
    for line in text.split("\n"):
        # Only the first two colons separate: the path may hold more of them.
        number, first, rest = line.partition(":")
        controllers, second, path = rest.partition(":")
        if not first or not second or not path.startswith("/"):
            continue
        if controllers:
            entries.append(CgroupEntry(1, frozenset(controllers.split(",")), path))
        elif number == "0":
            entries.append(CgroupEntry(2, frozenset(), path))
    return entries


def parse_mountinfo(text: str) -> list[CgroupMount]:
    """Read the cgroup mounts out of the text of ``/proc/self/mountinfo``.

    Other file systems and lines that make no sense are skipped. Where two mounts share a mount
    point the later one hides the earlier, so only the later is returned.
    """
    mounts: dict[str, CgroupMount] = {}
    for line in text.split("\n"):
        fields = line.split(" ")
        # Six fixed fields, any number of optional ones, then "-", type, source, options.
        try:
            dash = fields.index("-", 6)
        except ValueError:
            continue
        if len(fields) < dash + 4:
            continue
        root, mount_point = _unescape(fields[3]), _unescape(fields[4])
        if not root.startswith("/") or not mount_point.startswith("/"):
            continue
        mounts.pop(mount_point, None)
        if fields[dash + 1] == "cgroup2":
            mounts[mount_point] = CgroupMount(2, frozenset(), root, mount_point)
        elif fields[dash + 1] == "cgroup":
            controllers = frozenset(fields[dash + 3].split(","))
            mounts[mount_point] = CgroupMount(1, controllers, root, mount_point)
    return list(mounts.values())


def levels(controller: str, version: Version, root: Root = "/") -> Iterator[Level]:
    """Yield this process's cgroup in one hierarchy, then its ancestors up to the mount.

    ``controller`` (such as "memory") picks the hierarchy on version 1 and is ignored on version
    2, which has only one. Nothing is yielded where the hierarchy is not mounted. Where the path
    of this process does not show under any mount, as in a container that was given only its own
    part of the tree, the mount point stands for it.
    """
    base = os.fspath(root)
    entry = next(
        (
            entry
            for entry in parse_cgroup(read_text(base, "/proc/self/cgroup"))
            if entry.version == version and (version == 2 or controller in entry.controllers)
        ),
        None,
    )
    if entry is None:
        return
    mounts = [
        mount
        for mount in parse_mountinfo(read_text(base, "/proc/self/mountinfo"))
        if mount.version == version and (version == 2 or controller in mount.controllers)
    ]
    if not mounts:
        return

    # A hierarchy may be mounted more than once. The best view of it is one that shows this
    # process's own directory, and among those the one that starts nearest to the top.
    def rank(mount: CgroupMount) -> tuple[bool, int]:
        below = _below(entry.path, mount.root)
        seen = below is not None and os.path.isdir(_join(base, mount.mount_point, *below))
        return (not seen, len(mount.root))

    mount = min(mounts, key=rank)
    below = _below(entry.path, mount.root) or ()
    for depth in range(len(below), -1, -1):
        path = _join(base, mount.mount_point, *below[:depth])
        if os.path.isdir(path):
            yield Level(version, path)


def memory_levels(root: Root = "/") -> Iterator[MemoryLevel]:
    """Yield every visible cgroup level that limits this process's memory, own level first.

    Version 2 comes before version 1; at most one of them has the memory controller. On version
    2 the limit is ``memory.max``: ``memory.high`` slows a process but never refuses it memory.
    On version 1 it is the smaller of ``memory.limit_in_bytes`` and ``hierarchical_memory_limit``
    in ``memory.stat``. The latter also covers ancestors that cannot be seen from here; their
    usage stays unknown, so this level's own usage stands in for it.
    """
    for level in levels("memory", 2, root):
        limit = _limit(read_text(level.path, "/memory.max"))
        if limit is None:
            continue
        stat = _table(read_text(level.path, "/memory.stat"))
        yield MemoryLevel(
            version=2,
            path=level.path,
            limit=limit,
            usage=natural_number(read_text(level.path, "/memory.current")),
            reclaimable=stat.get("inactive_file", 0) + stat.get("slab_reclaimable", 0),
        )
    for above, level in enumerate(levels("memory", 1, root)):
        # Old kernels let a group keep its limit to itself; then nothing above binds us either.
        if above and read_text(level.path, "/memory.use_hierarchy").strip() == "0":
            return
        stat = _table(read_text(level.path, "/memory.stat"))
        limits = [
            limit
            for limit in (
                _limit(read_text(level.path, "/memory.limit_in_bytes")),
                _limit(str(stat.get("hierarchical_memory_limit", ""))),
            )
            if limit is not None
        ]
        if not limits:
            continue
        yield MemoryLevel(
            version=1,
            path=level.path,
            limit=min(limits),
            usage=natural_number(read_text(level.path, "/memory.usage_in_bytes")),
            reclaimable=stat.get("total_inactive_file", 0),
        )


def cpu_quota(root: Root = "/") -> float | None:
    """Return how many CPUs' worth of time the cgroups allow, or None where they set no quota.

    The smallest over this cgroup and its visible ancestors of ``cpu.max`` (version 2) and
    ``cpu.cfs_quota_us / cpu.cfs_period_us`` (version 1). It may be a fraction, also below 1.
    """
    quotas = []
    for level in levels("cpu", 2, root):
        fields = read_text(level.path, "/cpu.max").split()
        if len(fields) == 2:
            quotas.append(_quota(fields[0], fields[1]))
    for level in levels("cpu", 1, root):
        quota = read_text(level.path, "/cpu.cfs_quota_us")
        quotas.append(_quota(quota, read_text(level.path, "/cpu.cfs_period_us")))
    return min((quota for quota in quotas if quota is not None), default=None)


def cpu_count(root: Root = "/") -> int:
    """Return how many CPUs this process can keep busy: at least 1.

    The CPUs it may be scheduled on (all of the machine's where the system has no affinity),
    but no more than `cpu_quota` rounded up.
    """
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    quota = cpu_quota(root)
    if quota is not None:
        count = min(count, math.ceil(quota))
    return max(1, count)


def _below(path: str, mount_root: str) -> tuple[str, ...] | None:
    """Return the steps from ``mount_root`` down to ``path``, None where it does not lead there.

    A path outside the reader's cgroup namespace starts with "/..": it cannot be followed.
    """
    steps = [step for step in path.split("/") if step]
    top = [step for step in mount_root.split("/") if step]
    if ".." in steps or ".." in top or steps[: len(top)] != top:
        return None
    return tuple(steps[len(top) :])


def _join(base: str, mount_point: str, *steps: str) -> str:
    return os.path.join(base, mount_point.lstrip("/"), *steps)


def _unescape(field: str) -> str:
    r"""Undo mountinfo's octal escapes, such as ``\040`` for a space."""
    head, *tail = field.split("\\")
    parts = [head]
    for part in tail:
        digits = part[:3]
        if len(digits) == 3 and digits[0] in "0123" and all(d in "01234567" for d in digits):
            parts.append(chr(int(digits, 8)) + part[3:])
        else:
            parts.append("\\" + part)
    return "".join(parts)


def read_text(base: str, path: str) -> str:
    """Return the text of a file, "" where it cannot be read."""
    try:
        with open(os.path.join(base, path.lstrip("/")), "rb") as file:
            return os.fsdecode(file.read())
    except (OSError, ValueError):  # ValueError: a name with a NUL or a lone surrogate in it
        return ""


def natural_number(text: str) -> int | None:
    """Return the plain non-negative decimal number that ``text`` is, else None."""
    text = text.strip()
    # The kernel writes at most 20 digits; int() would also take signs, "_" and other scripts'.
    if len(text) <= 20 and text.isascii() and text.isdigit():
        return int(text)
    return None


def _limit(text: str) -> int | None:
    number = natural_number(text)
    return number if number is not None and number < _UNLIMITED else None


def _quota(quota: str, period: str) -> float | None:
    allowed, out_of = natural_number(quota), natural_number(period)
    return allowed / out_of if allowed and out_of else None


def _table(text: str) -> dict[str, int]:
    """Read lines of a name and a number, such as ``memory.stat``."""
    table = {}
    for line in text.split("\n"):
        name, _, value = line.partition(" ")
        number = natural_number(value)
        if number is not None:
            table[name] = number
    return table
