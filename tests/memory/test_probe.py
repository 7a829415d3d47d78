"""Reading this process's memory, its limit, and the pressure on it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbtide.memory import cgroup, probe

KB = 1024
MIB = 2**20

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads a live /proc")

MACHINE = {
    "/proc/self/status": "Name:\tpython\nVmSize:\t    4000 kB\nVmRSS:\t     900 kB\n"
    "RssAnon:\t     600 kB\nRssFile:\t     250 kB\nRssShmem:\t      50 kB\n"
    "VmData:\t    1500 kB\nVmSwap:\t      70 kB\nThreads:\t1\n",
    "/proc/meminfo": "MemTotal:       100000 kB\nMemFree:         20000 kB\n"
    "MemAvailable:    60000 kB\nHugePages_Total:       0\n",
    "/proc/self/limits": "Limit                     Soft Limit           Hard Limit\n"
    "Max data size             unlimited            unlimited            bytes     \n"
    "Max address space         unlimited            unlimited            bytes     \n",
}
V2 = {
    "/proc/self/cgroup": "0::/a/b\n",
    "/proc/self/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n",
    "/sys/fs/cgroup/a/b/memory.max": "max\n",
}
V1 = {
    "/proc/self/cgroup": "4:memory:/m\n0::/\n",
    "/proc/self/mountinfo": "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
}
PRESSURE = "some avg10={} avg60=0.10 avg300=0.00 total=7\nfull avg10={} avg60=0.0 total=3\n"


def build(root: Path, *parts: dict[str, str]) -> Path:
    for part in parts:
        for name, text in part.items():
            path = root / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return root


def soft_limits(address: int | str = "unlimited", data: int | str = "unlimited") -> dict[str, str]:
    return {
        "/proc/self/limits": f"Max data size             {data:<20} unlimited            bytes\n"
        f"Max address space         {address:<20} unlimited            bytes\n"
    }


# The process's own figures


def test_the_figures_of_the_process_come_in_bytes(tmp_path: Path) -> None:
    seen = probe.snapshot(root=build(tmp_path, MACHINE))
    assert seen.anonymous == 600 * KB
    assert seen.file_backed == 300 * KB
    assert seen.resident == 900 * KB
    assert seen.swapped == 70 * KB


def test_an_old_kernel_that_does_not_split_resident_is_split_by_statm(tmp_path: Path) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    old = {
        "/proc/self/status": f"VmRSS:\t{100 * page // KB} kB\n",
        "/proc/self/statm": "900 100 40 5 0 123 0\n",
    }
    seen = probe.snapshot(root=build(tmp_path, MACHINE, old))
    assert (seen.anonymous, seen.file_backed) == (60 * page, 40 * page)


# The limit and the room below it


def test_without_any_other_limit_the_machine_is_the_limit(tmp_path: Path) -> None:
    seen = probe.snapshot(root=build(tmp_path, MACHINE))
    assert seen.limit == probe.Limit(100000 * KB, "machine")
    assert seen.available == 60000 * KB


def test_the_smallest_limit_of_any_ancestor_holds(tmp_path: Path) -> None:
    ancestors = {
        "/sys/fs/cgroup/a/memory.max": "3000000\n",
        "/sys/fs/cgroup/a/memory.current": "1000000\n",
        "/sys/fs/cgroup/a/b/memory.max": "5000000\n",
        "/sys/fs/cgroup/a/b/memory.current": "900000\n",
    }
    seen = probe.snapshot(root=build(tmp_path, MACHINE, V2, ancestors))
    assert seen.limit == probe.Limit(3000000, "cgroup v2")
    assert seen.available == 2000000


def test_the_tightest_room_need_not_be_under_the_smallest_limit(tmp_path: Path) -> None:
    ancestors = {
        "/sys/fs/cgroup/a/memory.max": "5000000\n",
        "/sys/fs/cgroup/a/memory.current": "4900000\n",
        "/sys/fs/cgroup/a/memory.stat": "inactive_file 50000\n",
        "/sys/fs/cgroup/a/b/memory.max": "3000000\n",
        "/sys/fs/cgroup/a/b/memory.current": "900000\n",
    }
    seen = probe.snapshot(root=build(tmp_path, MACHINE, V2, ancestors))
    assert seen.limit.bytes == 3000000
    assert seen.available == 150000


def test_a_machine_short_of_memory_leaves_less_than_the_cgroup_would(tmp_path: Path) -> None:
    cgroup_and_machine = {
        "/sys/fs/cgroup/a/b/memory.max": "9000000\n",
        "/sys/fs/cgroup/a/b/memory.current": "0\n",
        "/proc/meminfo": "MemTotal: 100000 kB\nMemAvailable: 10 kB\n",
    }
    seen = probe.snapshot(root=build(tmp_path, MACHINE, V2, cgroup_and_machine))
    assert seen.limit == probe.Limit(9000000, "cgroup v2")
    assert seen.available == 10 * KB


def test_a_v1_limit_holds(tmp_path: Path) -> None:
    level = {
        "/sys/fs/cgroup/memory/m/memory.limit_in_bytes": "4000000\n",
        "/sys/fs/cgroup/memory/m/memory.usage_in_bytes": "3000000\n",
        "/sys/fs/cgroup/memory/m/memory.stat": "total_inactive_file 500000\n",
    }
    seen = probe.snapshot(root=build(tmp_path, MACHINE, V1, level))
    assert seen.limit == probe.Limit(4000000, "cgroup v1")
    assert seen.available == 1500000


def test_an_unlimited_v1_cgroup_leaves_the_machine_as_the_limit(tmp_path: Path) -> None:
    level = {
        "/sys/fs/cgroup/memory/m/memory.limit_in_bytes": "9223372036854771712\n",
        "/sys/fs/cgroup/memory/m/memory.usage_in_bytes": "3000000\n",
    }
    assert probe.snapshot(root=build(tmp_path, MACHINE, V1, level)).limit.source == "machine"


def test_a_cgroup_larger_than_the_machine_does_not_bind(tmp_path: Path) -> None:
    level = {"/sys/fs/cgroup/a/b/memory.max": f"{10**12}\n"}
    assert probe.snapshot(root=build(tmp_path, MACHINE, V2, level)).limit.source == "machine"


@pytest.mark.parametrize(
    ("limits", "room"),
    [
        (soft_limits(address=5000 * KB), 1000 * KB),  # VmSize is 4000 kB
        (soft_limits(data=5000 * KB), 3500 * KB),  # VmData is 1500 kB
    ],
)
def test_a_resource_limit_smaller_than_the_cgroup_holds_and_counts_virtual_bytes(
    tmp_path: Path, limits: dict[str, str], room: int
) -> None:
    level = {
        "/sys/fs/cgroup/a/b/memory.max": "9000000\n",
        "/sys/fs/cgroup/a/b/memory.current": "0\n",
    }
    seen = probe.snapshot(root=build(tmp_path, MACHINE, V2, level, limits))
    assert seen.limit == probe.Limit(5000 * KB, "rlimit")
    assert seen.available == room


def test_a_cgroup_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    level = {
        "/sys/fs/cgroup/a/b/memory.max": "1000\n",
        "/sys/fs/cgroup/a/b/memory.current": "5000\n",
    }
    assert probe.snapshot(root=build(tmp_path, MACHINE, V2, level)).available == 0


def test_a_cgroup_that_hides_its_usage_holds_at_least_this_process(tmp_path: Path) -> None:
    level = {"/sys/fs/cgroup/a/b/memory.max": f"{1000 * KB}\n"}
    assert probe.snapshot(root=build(tmp_path, MACHINE, V2, level)).available == 400 * KB


def test_a_kernel_without_memavailable_offers_what_is_free(tmp_path: Path) -> None:
    old = {"/proc/meminfo": "MemTotal: 100000 kB\nMemFree: 20000 kB\n"}
    assert probe.snapshot(root=build(tmp_path, MACHINE, old)).available == 20000 * KB


def test_an_empty_tree_still_gives_a_snapshot(tmp_path: Path) -> None:
    seen = probe.snapshot(root=tmp_path)
    assert seen.resident == 0
    assert seen.limit.source == "machine"
    assert seen.limit.bytes > 0
    assert 0 <= seen.available <= seen.limit.bytes
    assert seen.pressure is None


def test_malformed_files_count_as_not_there(tmp_path: Path) -> None:
    broken = {
        "/proc/self/status": "VmRSS: many kB\nRssAnon:\n:::\nVmSwap: 3 pages\n",
        "/proc/self/statm": "1 two three",
        "/proc/self/limits": "Max address space\nMax data size   -5 -5 bytes\n",
        "/sys/fs/cgroup/a/b/memory.max": "lots\n",
    }
    seen = probe.snapshot(root=build(tmp_path, MACHINE, V2, broken))
    assert (seen.resident, seen.swapped) == (0, 0)
    assert seen.limit == probe.Limit(100000 * KB, "machine")


SIZES = st.integers(0, 2**64).map(str) | st.sampled_from(["max", "", "-1", "junk"])


@settings(deadline=None, database=None, max_examples=150)
@given(
    levels=st.lists(st.tuples(SIZES, SIZES, SIZES), min_size=3, max_size=3),
    address=SIZES,
    data=SIZES,
    total=st.integers(1, 2**40),
    free=SIZES,
)
def test_the_limit_is_the_least_of_all_and_available_stays_between_zero_and_it(
    levels: list[tuple[str, str, str]], address: str, data: str, total: int, free: str
) -> None:
    groups = {}
    for where, (limit, usage, inactive) in zip(["", "/a", "/a/b"], levels, strict=True):
        groups[f"/sys/fs/cgroup{where}/memory.max"] = limit
        groups[f"/sys/fs/cgroup{where}/memory.current"] = usage
        groups[f"/sys/fs/cgroup{where}/memory.stat"] = f"inactive_file {inactive}\n"
    meminfo = {"/proc/meminfo": f"MemTotal: {total} kB\nMemAvailable: {free} kB\n"}
    with tempfile.TemporaryDirectory() as root:
        build(Path(root), MACHINE, V2, groups, soft_limits(address, data), meminfo)
        seen = probe.snapshot(root=root)
    bounds = [int(limit) for limit, _, _ in levels if limit.isdigit() and int(limit) < 2**60]
    bounds += [int(soft) for soft in (address, data) if soft.isdigit()]
    assert seen.limit.bytes == min([*bounds, total * KB])
    assert 0 <= seen.available <= seen.limit.bytes


# Pressure


def test_the_cgroups_own_pressure_is_preferred_to_the_machines(tmp_path: Path) -> None:
    both = {
        "/sys/fs/cgroup/a/b/memory.pressure": PRESSURE.format("12.50", "3.25"),
        "/proc/pressure/memory": PRESSURE.format("1.00", "0.50"),
    }
    seen = probe.snapshot(root=build(tmp_path, MACHINE, V2, both))
    assert seen.pressure == probe.Pressure(12.5, 3.25, "cgroup v2")


def test_without_a_cgroups_pressure_the_machines_is_given(tmp_path: Path) -> None:
    machine = {"/proc/pressure/memory": PRESSURE.format("1.00", "0.50")}
    seen = probe.snapshot(root=build(tmp_path, MACHINE, V2, machine))
    assert seen.pressure == probe.Pressure(1.0, 0.5, "machine")


@pytest.mark.parametrize(
    "text", ["", "some avg10=1.0\n", "some avg10=x\nfull avg10=0\n", PRESSURE.format("nan", "0")]
)
def test_pressure_that_makes_no_sense_is_none(tmp_path: Path, text: str) -> None:
    build(tmp_path, MACHINE, {"/proc/pressure/memory": text})
    assert probe.snapshot(root=tmp_path).pressure is None


def test_no_pressure_files_give_none(tmp_path: Path) -> None:
    assert probe.snapshot(root=build(tmp_path, MACHINE)).pressure is None


def test_pressure_that_is_there_but_not_supported_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path, MACHINE, V2, {"/proc/pressure/memory": "x"})
    build(tmp_path, {"/sys/fs/cgroup/a/b/memory.pressure": "x"})
    refused = []

    class Unsupported:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> Unsupported:
            return self

        def __exit__(self, *exc: object) -> None:
            pass

        def read(self) -> bytes:
            refused.append(self.name)
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    def opening(name: str, mode: str) -> object:
        if "pressure" in os.path.relpath(name, tmp_path):
            return Unsupported(name)
        return open(name, mode)

    monkeypatch.setattr(cgroup, "open", opening, raising=False)
    assert probe.snapshot(root=tmp_path).pressure is None
    assert len(refused) == 2


# What people see


def test_a_snapshot_prints_in_megabytes_of_a_million_bytes() -> None:
    limit = probe.Limit(512_000_000, "cgroup v2")
    calm = probe.MemorySnapshot(1_500_000, 250_000, 1_750_000, 0, limit, 300_040_000, None)
    assert str(calm) == (
        "resident 1.8 MB (anonymous 1.5 MB, file-backed 0.2 MB), swapped 0.0 MB; "
        "limit 512.0 MB (cgroup v2), available 300.0 MB; pressure unknown"
    )
    pressed = probe.MemorySnapshot(0, 0, 0, 0, limit, 0, probe.Pressure(12.5, 3.25, "machine"))
    assert str(pressed).endswith("; pressure some 12.50%, full 3.25% (machine)")


def test_a_snapshot_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        probe.Limit(1, "machine").bytes = 2  # type: ignore[misc]


# This machine, in a fresh process


def fresh(code: str) -> dict[str, int]:
    """Run code in a new interpreter that has imported the probe; it prints one JSON object."""
    source = str(Path(probe.__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures: dict[str, int] = json.loads(done.stdout)
    return figures


PRELUDE = """
import json, mmap, os, resource, sys, tempfile
from ebbtide.memory import probe

def touch(view):
    total = 0
    for at in range(0, len(view), mmap.PAGESIZE):
        total += view[at]
    return total

def walked():
    for line in open("/proc/self/smaps_rollup"):
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024

probe.anonymous_bytes(), probe.snapshot(), walked()
"""


@linux
def test_anonymous_bytes_grows_with_touched_memory_and_shrinks_when_it_is_closed() -> None:
    seen = fresh("""
before, walked_before = probe.anonymous_bytes(), walked()
view = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
untouched = probe.anonymous_bytes()
for at in range(0, len(view), mmap.PAGESIZE):
    view[at] = 1
held, walked_held = probe.anonymous_bytes(), walked()
view.close()
after, walked_after = probe.anonymous_bytes(), walked()
print(json.dumps(dict(before=before, untouched=untouched, held=held, after=after,
    walked_before=walked_before, walked_held=walked_held, walked_after=walked_after)))
""")
    # The kernel may keep some pages of the count back on each CPU.
    slack = MIB + 512 * KB * (os.cpu_count() or 1)
    assert seen["untouched"] - seen["before"] < slack
    assert abs(seen["held"] - seen["before"] - 64 * MIB) < slack
    assert abs(seen["after"] - seen["before"]) < slack
    for moment in ("before", "held", "after"):
        assert abs(seen[moment] - seen["walked_" + moment]) < slack


@linux
@pytest.mark.parametrize("kind", ["file", "shared memory"])
def test_mapped_shared_pages_count_as_file_backed_and_not_as_anonymous(kind: str) -> None:
    seen = fresh(f"""
if {kind!r} == "file":
    file = tempfile.TemporaryFile()
    for _ in range(32):
        file.write(bytes(1 << 20))
    file.flush()
    arguments = dict(fileno=file.fileno(), length=32 << 20, access=mmap.ACCESS_READ)
else:
    arguments = dict(fileno=-1, length=32 << 20, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
view = mmap.mmap(**arguments)
before = probe.snapshot()
if {kind!r} == "file":
    touch(view)
else:
    for at in range(0, len(view), mmap.PAGESIZE):
        view[at] = 1
held = probe.snapshot()
view.close()
after = probe.snapshot()
print(json.dumps(dict(
    held=held.file_backed - before.file_backed, after=after.file_backed - before.file_backed,
    anonymous=held.anonymous - before.anonymous)))
""")
    slack = MIB + 512 * KB * (os.cpu_count() or 1)
    assert abs(seen["held"] - 32 * MIB) < slack
    assert abs(seen["after"]) < slack
    assert abs(seen["anonymous"]) < slack


@linux
def test_a_live_snapshot_adds_up_and_stays_within_the_machine() -> None:
    seen = probe.snapshot()
    assert seen.anonymous > 0
    assert seen.anonymous + seen.file_backed == seen.resident
    assert 0 <= seen.available <= seen.limit.bytes
    assert seen.limit.bytes <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@linux
def test_a_live_resource_limit_becomes_the_limit() -> None:
    seen = fresh("""
resource.setrlimit(resource.RLIMIT_AS, (400 << 20, resource.RLIM_INFINITY))
seen = probe.snapshot()
print(json.dumps(dict(bytes=seen.limit.bytes, source=seen.limit.source, room=seen.available)))
""")
    assert (seen["bytes"], seen["source"]) == (400 * MIB, "rlimit")
    assert 0 < seen["room"] < 400 * MIB


@linux
def test_the_probe_brings_in_no_heavy_module() -> None:
    code = """
import importlib.util, sys
sys.modules["ebbtide"] = type(sys)("ebbtide"); sys.modules["ebbtide"].__path__ = [sys.argv[1]]
memory = type(sys)("ebbtide.memory"); memory.__path__ = [sys.argv[1] + "/memory"]
sys.modules["ebbtide.memory"] = memory
import ebbtide.memory.probe
print([name for name in ("numpy", "onnxruntime", "psutil", "pathlib") if name in sys.modules])
"""
    package = str(Path(probe.__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, package], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_other_systems_are_answered_by_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psutil")
    monkeypatch.setattr(probe, "_LINUX", False)
    seen = probe.snapshot()
    assert 0 < seen.anonymous <= seen.resident
    assert seen.file_backed == seen.resident - seen.anonymous
    assert seen.limit.source == "machine"
    assert 0 < seen.available <= seen.limit.bytes
    assert seen.pressure is None
    assert probe.anonymous_bytes() > 0
