"""A manager in a memory cgroup that is little larger than its budget: the kernel never kills."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tools.large_models import models

ROOT = Path("/sys/fs/cgroup/memory")


@pytest.fixture
def group() -> Iterator[Path]:
    """A new memory cgroup of version 1; skips where none can be made."""
    made = ROOT / f"ebbtide-test-{uuid.uuid4().hex}"
    try:
        made.mkdir()
        (made / "memory.limit_in_bytes").write_text(str(1 << 30))
    except OSError as error:
        if made.is_dir():
            made.rmdir()
        pytest.skip(f"no memory cgroup of version 1 to write: {error}")
    yield made
    made.rmdir()


SCRIPT = """
    import os, random, sys, threading
    from pathlib import Path
    from ebbtide import PipelineManager
    from ebbtide.memory import anonymous_bytes, snapshot

    group, folder = Path(os.environ["GROUP"]), Path(os.environ["FOLDER"])
    paths = sorted(str(one) for one in folder.iterdir())
    BYTES = 150_000_000
    (group / "memory.limit_in_bytes").write_text(str(int(BYTES * 1.2)))
    (group / "cgroup.procs").write_text(str(os.getpid()))
    done = []

    def work(number):
        dice = random.Random(number)
        for _ in range(10):
            with manager.acquire("feature-extraction", dice.choice(paths)) as embed:
                texts = ["the tide goes out " * dice.randint(1, 60) for _ in range(6)]
                done.append(len(embed(texts)))

    with PipelineManager(budget=BYTES, remember=False) as manager:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
        for one in threads: one.start()
        for one in threads: one.join()
        print("source", snapshot().limit.source)
    print("calls", len(done))
"""


def test_the_process_is_never_killed_though_all_models_together_are_more_than_fit(
    fresh_process: Any, group: Path, tmp_path: Path
) -> None:
    sizes = [path.stat().st_size for one in models(tmp_path, 10, [20]) for path in one.rglob("*")]
    assert sum(sizes) > 190_000_000
    out = fresh_process(SCRIPT, timeout=100, GROUP=str(group), FOLDER=str(tmp_path))
    assert "calls 160" in out
    assert "source cgroup v1" in out
    killed = (group / "memory.oom_control").read_text().split()
    assert dict(zip(killed[::2], killed[1::2], strict=True)).get("oom_kill", "0") == "0"


def test_the_default_budget_is_most_of_the_cgroups_limit(fresh_process: Any, group: Path) -> None:
    out = fresh_process(
        """
        import os
        from pathlib import Path
        from ebbtide import PipelineManager
        group = Path(os.environ["GROUP"])
        (group / "cgroup.procs").write_text(str(os.getpid()))
        with PipelineManager(remember=False) as manager:
            print("budget", manager.budget)
        """,
        GROUP=str(group),
    )
    assert int(out.split("budget")[1]) == int((1 << 30) * 0.8)
