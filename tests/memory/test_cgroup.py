"""Finding this process's cgroups, and the memory and CPUs they allow."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbtide.memory import cgroup

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1_MEMORY = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
V1_CPU = "36 31 0:33 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
UNIFIED = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
OTHER = "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw"


class Tree:
    """A made-up /proc and /sys."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, files: dict[str, str]) -> Tree:
        for name, text in files.items():
            path = self.root / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return self

    def process(self, entries: list[str], mounts: list[str]) -> Tree:
        lines = {"/proc/self/cgroup": entries, "/proc/self/mountinfo": [OTHER, *mounts]}
        return self.put({name: "".join(f"{line}\n" for line in of) for name, of in lines.items()})

    def levels(self, controller: str, version: cgroup.Version) -> list[str]:
        found = cgroup.levels(controller, version, self.root)
        return ["/" + os.path.relpath(level.path, self.root) for level in found]

    def limits(self) -> list[int]:
        return [level.limit for level in cgroup.memory_levels(self.root)]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


# Finding the levels


def test_levels_go_from_the_own_cgroup_up_to_the_mount(tree: Tree) -> None:
    tree.process(["0::/a/b"], [V2]).put({"/sys/fs/cgroup/a/b/cgroup.procs": ""})
    assert tree.levels("memory", 2) == ["/sys/fs/cgroup/a/b", "/sys/fs/cgroup/a", "/sys/fs/cgroup"]


def test_a_cgroup_namespace_shows_the_mount_point_alone(tree: Tree) -> None:
    tree.process(["0::/"], [V2]).put({"/sys/fs/cgroup/cgroup.procs": ""})
    assert tree.levels("memory", 2) == ["/sys/fs/cgroup"]


def test_a_container_mounted_at_its_own_cgroup_counts_from_there(tree: Tree) -> None:
    mount = V2.replace(" / /sys", " /docker/abc /sys")
    tree.process(["0::/docker/abc/job"], [mount]).put({"/sys/fs/cgroup/job/cgroup.procs": ""})
    assert tree.levels("memory", 2) == ["/sys/fs/cgroup/job", "/sys/fs/cgroup"]


def test_a_path_that_only_starts_with_the_same_letters_is_not_below_the_mount_root(
    tree: Tree,
) -> None:
    mount = V2.replace(" / /sys", " /docker/ab /sys")
    tree.process(["0::/docker/abc/d"], [mount]).put({"/sys/fs/cgroup/d/cgroup.procs": ""})
    assert tree.levels("memory", 2) == ["/sys/fs/cgroup"]


@pytest.mark.parametrize("path", ["/docker/abc", "/../sibling", "/kubepods/pod1/c1"])
def test_a_path_that_does_not_show_falls_back_to_the_mount_point(tree: Tree, path: str) -> None:
    mount = V2.replace(" / /sys", " /elsewhere /sys")
    tree.process([f"0::{path}"], [mount]).put({"/sys/fs/cgroup/memory.max": "5\n"})
    (tree.root / "sys/fs/sibling").mkdir()
    assert tree.levels("memory", 2) == ["/sys/fs/cgroup"]


def test_a_path_of_the_host_under_a_whole_mount_falls_back_to_what_is_there(tree: Tree) -> None:
    tree.process(["0::/docker/abc"], [V2]).put({"/sys/fs/cgroup/memory.max": "5\n"})
    assert tree.levels("memory", 2) == ["/sys/fs/cgroup"]


def test_a_mount_root_outside_the_namespace_falls_back_to_the_mount_point(tree: Tree) -> None:
    tree.process(["0::/"], [V2.replace(" / /sys", " /../.. /sys")])
    tree.put({"/sys/fs/cgroup/memory.max": "5\n"})
    assert tree.levels("memory", 2) == ["/sys/fs/cgroup"]


def test_escaped_characters_in_a_mount_point_are_read(tree: Tree) -> None:
    mount = V2.replace("/sys/fs/cgroup", "/my\\040groups\\134x")
    tree.process(["0::/"], [mount]).put({"/my groups\\x/memory.max": "4096\n"})
    assert tree.limits() == [4096]


def test_colons_and_spaces_in_a_cgroup_path_are_part_of_it(tree: Tree) -> None:
    tree.process(["0::/a:b c"], [V2]).put({"/sys/fs/cgroup/a:b c/memory.max": "4096\n"})
    assert tree.limits() == [4096]


def test_of_two_mounts_the_one_that_shows_the_own_cgroup_is_taken(tree: Tree) -> None:
    other = V2.replace(" / /sys/fs/cgroup", " /someone/else /mnt/theirs")
    tree.process(["0::/mine"], [other, V2])
    tree.put({"/mnt/theirs/memory.max": "1\n", "/sys/fs/cgroup/mine/memory.max": "4096\n"})
    assert tree.limits() == [4096]


def test_of_two_mounts_that_show_it_the_one_with_more_ancestors_is_taken(tree: Tree) -> None:
    narrow = V2.replace(" / /sys/fs/cgroup", " /a /mnt/a")
    tree.process(["0::/a/b"], [narrow, V2])
    tree.put({"/mnt/a/b/cgroup.procs": "", "/sys/fs/cgroup/a/b/cgroup.procs": ""})
    assert tree.levels("memory", 2)[-1] == "/sys/fs/cgroup"


def test_a_later_mount_hides_an_earlier_one_at_the_same_place() -> None:
    covered = V2 + "\n50 30 0:50 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
    assert cgroup.parse_mountinfo(covered) == []
    replaced = V2 + "\n" + V2.replace(" / /sys", " /x /sys")
    assert [mount.root for mount in cgroup.parse_mountinfo(replaced)] == ["/x"]


def test_a_v1_hierarchy_is_found_by_its_controller(tree: Tree) -> None:
    tree.process(["5:cpu,cpuacct:/c", "4:memory:/m", "0::/u"], [V1_CPU, V1_MEMORY, UNIFIED])
    tree.put({"/sys/fs/cgroup/memory/m/x": "", "/sys/fs/cgroup/cpu,cpuacct/c/x": ""})
    assert tree.levels("memory", 1) == ["/sys/fs/cgroup/memory/m", "/sys/fs/cgroup/memory"]
    assert tree.levels("cpu", 1)[0] == "/sys/fs/cgroup/cpu,cpuacct/c"
    assert tree.levels("cpuset", 1) == []


def test_without_a_cgroup_file_or_mounts_there_are_no_levels(tree: Tree) -> None:
    assert tree.levels("memory", 1) == tree.levels("memory", 2) == []
    tree.put({"/proc/self/cgroup": "0::/\n4:memory:/\n"})
    assert tree.levels("memory", 1) == tree.levels("memory", 2) == []


# Memory


def test_every_limited_ancestor_is_given_and_the_unlimited_ones_are_not(tree: Tree) -> None:
    tree.process(["0::/a/b/c"], [V2]).put(
        {
            "/sys/fs/cgroup/a/b/c/memory.max": "max\n",
            "/sys/fs/cgroup/a/b/memory.max": "3000\n",
            "/sys/fs/cgroup/a/memory.max": "2000\n",
        }
    )
    assert tree.limits() == [3000, 2000]


def test_inactive_file_pages_and_reclaimable_slab_count_as_room(tree: Tree) -> None:
    tree.process(["0::/"], [V2]).put(
        {
            "/sys/fs/cgroup/memory.max": "10000\n",
            "/sys/fs/cgroup/memory.current": "9000\n",
            "/sys/fs/cgroup/memory.stat": "anon 4000\ninactive_file 1500\nactive_file 3000\n"
            "slab_reclaimable 500\n",
        }
    )
    (level,) = cgroup.memory_levels(tree.root)
    assert (level.usage, level.reclaimable, level.available) == (9000, 2000, 3000)


def test_a_level_without_usage_does_not_know_its_room(tree: Tree) -> None:
    tree.process(["0::/"], [V2]).put({"/sys/fs/cgroup/memory.max": "10000\n"})
    (level,) = cgroup.memory_levels(tree.root)
    assert (level.usage, level.available) == (None, None)


def test_a_v1_level_is_read_from_its_own_files(tree: Tree) -> None:
    tree.process(["4:memory:/m"], [V1_MEMORY]).put(
        {
            "/sys/fs/cgroup/memory/m/memory.limit_in_bytes": "10000\n",
            "/sys/fs/cgroup/memory/m/memory.usage_in_bytes": "6000\n",
            "/sys/fs/cgroup/memory/m/memory.stat": "inactive_file 1\ntotal_inactive_file 2000\n"
            "hierarchical_memory_limit 10000\n",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        }
    )
    (level,) = cgroup.memory_levels(tree.root)
    assert (level.version, level.limit, level.usage, level.available) == (1, 10000, 6000, 6000)


def test_the_v1_hierarchical_limit_tells_of_ancestors_out_of_sight(tree: Tree) -> None:
    tree.process(["4:memory:/docker/abc"], [V1_MEMORY.replace(" / /sys", " /docker/abc /sys")])
    tree.put(
        {
            "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "/sys/fs/cgroup/memory/memory.stat": "hierarchical_memory_limit 7000\n",
        }
    )
    assert tree.limits() == [7000]


def test_a_v1_parent_without_hierarchy_does_not_bind(tree: Tree) -> None:
    tree.process(["4:memory:/a/b"], [V1_MEMORY]).put(
        {
            "/sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": "10000\n",
            "/sys/fs/cgroup/memory/a/b/memory.use_hierarchy": "0\n",
            "/sys/fs/cgroup/memory/a/memory.limit_in_bytes": "5000\n",
            "/sys/fs/cgroup/memory/a/memory.use_hierarchy": "0\n",
        }
    )
    assert tree.limits() == [10000]


def test_in_a_hybrid_tree_memory_is_read_where_its_controller_is(tree: Tree) -> None:
    tree.process(["4:memory:/m", "0::/u"], [V1_MEMORY, UNIFIED]).put(
        {
            "/sys/fs/cgroup/unified/u/cgroup.procs": "",
            "/sys/fs/cgroup/memory/m/memory.limit_in_bytes": "10000\n",
        }
    )
    assert [(level.version, level.limit) for level in cgroup.memory_levels(tree.root)] == [
        (1, 10000)
    ]


@pytest.mark.parametrize(
    "number", ["9223372036854771712", "9223372036854710272", "18446744073709551615", str(2**60)]
)
def test_the_huge_numbers_of_v1_mean_no_limit(tree: Tree, number: str) -> None:
    tree.process(["4:memory:/"], [V1_MEMORY]).put(
        {
            "/sys/fs/cgroup/memory/memory.limit_in_bytes": f"{number}\n",
            "/sys/fs/cgroup/memory/memory.stat": f"hierarchical_memory_limit {number}\n",
        }
    )
    assert tree.limits() == []


@pytest.mark.parametrize("text", ["", "\n", "-1", "1.5", "1_000", "0x10", "12 34", "٣", "9" * 5000])
def test_a_malformed_limit_counts_as_not_there(tree: Tree, text: str) -> None:
    tree.process(["0::/a"], [V2]).put(
        {"/sys/fs/cgroup/a/memory.max": text, "/sys/fs/cgroup/memory.max": "4096\n"}
    )
    assert tree.limits() == [4096]


def test_a_limit_of_nothing_is_a_limit(tree: Tree) -> None:
    tree.process(["0::/"], [V2]).put({"/sys/fs/cgroup/memory.max": "0\n"})
    assert tree.limits() == [0]


def test_a_file_that_cannot_be_read_counts_as_not_there(tree: Tree) -> None:
    tree.process(["0::/a"], [V2]).put({"/sys/fs/cgroup/memory.max": "4096\n"})
    (tree.root / "sys/fs/cgroup/a/memory.max").mkdir(parents=True)  # reading a directory fails
    assert tree.limits() == [4096]


# CPUs


@pytest.mark.parametrize(
    ("text", "quota"),
    [("max 100000", None), ("150000 100000", 1.5), ("50000", None), ("1 0", None), ("x y", None)],
)
def test_the_v2_quota_is_allowed_time_over_period(
    tree: Tree, text: str, quota: float | None
) -> None:
    tree.process(["0::/"], [V2]).put({"/sys/fs/cgroup/cpu.max": f"{text}\n"})
    assert cgroup.cpu_quota(tree.root) == quota


def test_the_smallest_quota_of_any_ancestor_holds(tree: Tree) -> None:
    tree.process(["0::/a/b"], [V2]).put(
        {
            "/sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
            "/sys/fs/cgroup/a/cpu.max": "100000 50000\n",
        }
    )
    assert cgroup.cpu_quota(tree.root) == 2.0


@pytest.mark.parametrize(("quota", "cpus"), [("-1", None), ("25000", 0.25), ("", None)])
def test_the_v1_quota_comes_from_two_files(tree: Tree, quota: str, cpus: float | None) -> None:
    tree.process(["5:cpu,cpuacct:/c"], [V1_CPU]).put(
        {
            "/sys/fs/cgroup/cpu,cpuacct/c/cpu.cfs_quota_us": f"{quota}\n",
            "/sys/fs/cgroup/cpu,cpuacct/c/cpu.cfs_period_us": "100000\n",
        }
    )
    assert cgroup.cpu_quota(tree.root) == cpus


@pytest.mark.parametrize(
    ("quota", "count"), [("20000", 1), ("150000", 2), ("300000", 3), ("9900000", 8), ("max", 8)]
)
def test_the_cpu_count_is_the_affinity_or_the_quota_rounded_up(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, quota: str, count: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    tree.process(["0::/"], [V2]).put({"/sys/fs/cgroup/cpu.max": f"{quota} 100000\n"})
    assert cgroup.cpu_count(tree.root) == count


def test_without_affinity_the_cpus_of_the_machine_count(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert cgroup.cpu_count(tree.root) == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cgroup.cpu_count(tree.root) == 1


def test_on_this_machine_the_cpu_count_is_at_least_one() -> None:
    assert 1 <= cgroup.cpu_count() <= (os.cpu_count() or 1)


# Any text at all

# Text that looks like the real thing reaches further into the parsers than letters at random.
SIGNS = [
    ":",
    "::",
    "/",
    "/a",
    "/..",
    "-",
    " ",
    "\n",
    "\\040",
    "\\",
    "\\9",
    "\\777",
    "\0",
    "\udcff",
    "٣",
]
WORDS = ["0", "4", "memory", "cgroup", "cgroup2", "rw,memory"]
LINES = [V2, V1_MEMORY, "0::/a", "4:memory:/a"]
PIECES = st.sampled_from([*SIGNS, *WORDS, *LINES])
TEXT = st.one_of(
    st.text(st.characters(exclude_categories=())), st.lists(PIECES, max_size=30).map("".join)
)


@settings(deadline=None, database=None)
@given(TEXT)
def test_the_parsers_never_raise_and_give_only_absolute_paths(text: str) -> None:
    assert all(entry.path.startswith("/") for entry in cgroup.parse_cgroup(text))
    for mount in cgroup.parse_mountinfo(text):
        assert mount.root.startswith("/")
        assert mount.mount_point.startswith("/")


@settings(deadline=None, database=None)
@given(entries=TEXT, mounts=TEXT, number=TEXT)
def test_no_text_in_any_file_makes_a_reader_raise(entries: str, mounts: str, number: str) -> None:
    def read(base: str, path: str) -> str:
        return {"/proc/self/cgroup": entries, "/proc/self/mountinfo": mounts}.get(path, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cgroup, "read_text", read)
        patch.setattr(os.path, "isdir", lambda path: True)
        assert all(0 <= level.limit < 2**60 for level in cgroup.memory_levels("/nowhere"))
        quota = cgroup.cpu_quota("/nowhere")
        assert quota is None or quota > 0
        assert cgroup.cpu_count("/nowhere") >= 1


@given(st.text(st.sampled_from("ab \\\t\n"), max_size=20))
@settings(deadline=None, database=None)
def test_a_mount_point_survives_the_kernels_escaping(name: str) -> None:
    escaped = "".join(f"\\{ord(c):03o}" if c in " \\\t\n" else c for c in name)
    (mount,) = cgroup.parse_mountinfo(V2.replace("/sys/fs/cgroup", f"/{escaped}"))
    assert mount.mount_point == f"/{name}"


def test_a_name_no_file_can_have_reads_as_empty() -> None:
    assert cgroup.read_text("/", "/a\0b") == ""
    assert cgroup.read_text("/", "/a\ud800") == ""
