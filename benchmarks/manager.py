"""A manager under load: 40 models in a budget for 10, and what its own doing costs.

    python benchmarks/manager.py [--parts load,prepared,acquire,choice,estimates,alive]
        [--seconds 300] [--folder FOLDER] [--cgroup] [--megabytes 50] [--count 40]

- ``load``: 32 threads and 200 tasks of an event loop on 40 models of at least 50 MB of anonymous
  memory each, loaded from the originals, in a budget for 10 of them. Printed is by how much the
  process's anonymous memory, sampled each 2 ms from another process, was over the budget at most.
- ``prepared``: the same with prepared copies, which weigh little, and a budget that calls fill.
- ``acquire``: a lease of what is loaded, taken and returned; its percentiles in one thread.
- ``choice``: what goes, chosen among 1,000 pipelines.
- ``estimates``: what models are expected to take before a load, and what they took.
- ``alive``: when a pipeline goes whose keep-alive ends.

With ``--cgroup`` (as root, version 1) the first two run in a memory cgroup of 1.2 times the budget.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import collections
import contextlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from tools.large_models import model as write_model

THREADS, TASKS = 32, 200
TASK = "feature-extraction"
WORDS = [
    "the",
    "tide",
    "goes",
    "out",
    "and",
    "the",
    "boats",
    "lie",
    "on",
    "the",
    "sand",
    "until",
    "it",
    "comes",
    "in",
    "again",
]

WATCH = """
import os, sys, time
page, path, most, count = os.sysconf("SC_PAGE_SIZE"), f"/proc/{sys.argv[1]}/statm", 0, 0
limit = int(sys.argv[2])
over = 0
while True:
    try:
        fields = open(path).read().split()
        if not fields: break
    except OSError:
        break
    here = (int(fields[1]) - int(fields[2])) * page
    count += 1
    over += here > limit
    if here > most:
        most = here
        print(most, flush=True)
    time.sleep(0.002)
"""


@contextlib.contextmanager
def watched(limit: int) -> Iterator[list[int]]:
    """The highest anonymous memory of this process, as another one sees it."""
    most: list[int] = [0]
    command = [sys.executable, "-c", WATCH, str(os.getpid()), str(limit)]
    watcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert watcher.stdout is not None
    reader = threading.Thread(target=lambda: most.extend(int(x) for x in watcher.stdout or ()))
    reader.start()
    try:
        yield most
    finally:
        watcher.kill()
        watcher.wait()
        reader.join()


class Load:
    """Threads and tasks that use a manager until the time is over, and what they saw."""

    def __init__(
        self, manager: Any, models: list[str], options: dict[str, Any], words: int
    ) -> None:
        self.manager = manager
        self.models = models
        self.options = options
        self.words = words
        self.calls = 0
        self.errors: collections.Counter[str] = collections.Counter()
        self.waits: list[float] = []
        self.loading: collections.Counter[str] = collections.Counter()
        self.twice = 0
        self.wrong: list[str] = []
        self.receipts: list[Any] = []
        weights = [1 / (rank + 1) ** 0.9 for rank in range(len(models))]
        self.weights = weights

    def hear(self, event: Any) -> None:
        key = event.pipeline
        if event.kind == "loading":
            self.loading[key] += 1
            self.twice += self.loading[key] > 1
        elif event.kind in ("ready", "failed"):
            self.loading[key] = 0
        elif event.kind in ("disposed", "sleeping") and event.facts.get("receipt") is not None:
            self.receipts.append(event.facts["receipt"])

    def _plan(self, dice: random.Random) -> tuple[str, dict[str, Any], Any]:
        model = dice.choices(self.models, self.weights)[0]
        asked = {
            "priority": dice.choice([0, 0, 0, 1]),
            "timeout": dice.choice([None, None, None, 20.0]),
            "keep_alive": dice.choice([None, None, 2.0, 0]),
        }
        texts = [" ".join(dice.choices(WORDS, k=dice.randint(2, self.words))) for _ in range(8)]
        return model, asked, texts[: dice.randint(1, 8)]

    def thread(self, number: int, until: float) -> None:
        dice = random.Random(number)
        while time.monotonic() < until:
            model, asked, texts = self._plan(dice)
            asked_at = time.monotonic()
            try:
                with self.manager.acquire(TASK, model, **asked, **self.options) as pipe:
                    self.waits.append(time.monotonic() - asked_at)
                    pipe(texts)
                    self.calls += 1
            except Exception as error:
                self._failed(error)

    async def task(self, number: int, until: float) -> None:
        dice = random.Random(10_000 + number)
        while time.monotonic() < until:
            model, asked, texts = self._plan(dice)
            try:
                if dice.random() < 0.05:  # one who gives up
                    async with asyncio.timeout(dice.random() * 0.5):
                        await self._use(model, asked, texts)
                else:
                    await self._use(model, asked, texts)
            except TimeoutError as error:
                self.errors[type(error).__name__] += 1
            except Exception as error:
                self._failed(error)

    async def _use(self, model: str, asked: dict[str, Any], texts: list[str]) -> None:
        asked_at = time.monotonic()
        async with self.manager.acquire(TASK, model, **asked, **self.options) as pipe:
            self.waits.append(time.monotonic() - asked_at)
            await pipe.acall(texts)
            self.calls += 1

    def _failed(self, error: Exception) -> None:
        name = type(error).__name__
        self.errors[name] += 1
        if name not in ("AcquireTimeoutError",) and len(self.wrong) < 5:
            self.wrong.append(f"{name}: {error}")

    def run(self, seconds: float) -> None:
        until = time.monotonic() + seconds

        async def tasks() -> None:
            await asyncio.gather(*[self.task(number, until) for number in range(TASKS)])

        threads = [
            threading.Thread(target=self.thread, args=(number, until)) for number in range(THREADS)
        ]
        threads.append(threading.Thread(target=lambda: asyncio.run(tasks())))
        for one in threads:
            one.start()
        for one in threads:
            one.join()


def under_load(given: argparse.Namespace, *, prepared: bool) -> dict[str, Any]:
    from ebbtide import PipelineManager, live, settings
    from ebbtide.memory import anonymous_bytes

    folder = given.folder / ("prepared" if prepared else "originals")
    width = 4096 if prepared else 1024
    models = []
    for number in range(given.count):
        place = folder / f"m{number:03d}"
        if not (place / "onnx" / "model.onnx").exists():
            write_model(place, given.megabytes + number % 4 * 5, width=width, seed=number)
        models.append(str(place))
    options: dict[str, Any] = {"prepare": False}
    if prepared:
        from ebbtide import prepare

        options = {}
        for one in models:
            prepare(TASK, one)
    spare = 100e6 if prepared else (given.megabytes + 8) * 1e6 * 12
    if prepared:
        settings.native_threads = 8  # so that calls fill the budget
    budget = int(anonymous_bytes() + 40e6 + spare)
    if given.cgroup:
        enter_group(int(budget * 1.2))
    manager = PipelineManager(budget, remember=False)
    load = Load(manager, models, options, words=200 if prepared else 40)
    began = time.monotonic()
    with watched(budget) as most, manager.subscribe(load.hear):
        load.run(given.seconds)
        status = manager.status()
        receipts = manager.close()
        seconds = time.monotonic() - began
    load.receipts += list(receipts.values())
    waits = sorted(load.waits)
    peak = max(most)
    over = (peak - budget) / budget
    odd = [one for one in load.receipts if not one.verified]
    made = {
        "seconds": round(seconds),
        "budget": budget,
        "peak": peak,
        "over": round(over, 4),
        "calls": load.calls,
        "counts": status.counts,
        "errors": dict(load.errors),
        "loaded_twice": load.twice,
        "left": len(live()),
        "leases_left": sum(one.leases for one in status.entries),
        "receipts": len(load.receipts),
        "unverified": len(odd),
        "wait_p50": round(waits[len(waits) // 2], 4),
        "wait_p99": round(waits[int(len(waits) * 0.99)], 3),
        "wait_most": round(waits[-1], 2),
    }
    name = "prepared" if prepared else "originals"
    print(f"\n{given.count} models, {name}, {THREADS} threads and {TASKS} tasks, {seconds:.0f} s")
    print(f"  budget {budget / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB: {over:+.1%}")
    for key in list(made)[4:]:
        print(f"  {key.replace('_', ' ')}: {made[key]}")
    for text in load.wrong:
        print(f"  {text}")
    for one in odd[:3]:
        print(f"  not verified: {one}")
    return made


def enter_group(limit: int) -> None:
    """Go into a new memory cgroup of version 1, and out of it at the process's end."""
    root = Path("/sys/fs/cgroup/memory")
    group = root / f"ebbtide-{os.getpid()}"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(limit))
    (group / "cgroup.procs").write_text(str(os.getpid()))

    def leave() -> None:
        (root / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()

    atexit.register(leave)
    print(f"in a memory cgroup of {limit / 1e6:.0f} MB")


def acquire(given: argparse.Namespace) -> dict[str, Any]:
    from ebbtide import PipelineManager

    path = write_model(given.folder / "small", 1)
    times = []
    with PipelineManager("2 GiB", remember=False) as manager:
        manager.preload(TASK, str(path), prepare=False)
        for _ in range(200_000):
            began = time.perf_counter()
            with manager.acquire(TASK, str(path), prepare=False):
                pass
            times.append(time.perf_counter() - began)
    times.sort()
    p50, p99 = times[len(times) // 2] * 1e6, times[int(len(times) * 0.99)] * 1e6
    print(f"\na cached lease, taken and returned: p50 {p50:.1f} us, p99 {p99:.1f} us")
    return {"p50_us": round(p50, 2), "p99_us": round(p99, 2)}


def choice(given: argparse.Namespace) -> dict[str, Any]:
    from ebbtide.manager.accounts import BYTES, Books
    from ebbtide.manager.policy import History
    from ebbtide.manager.slots import Phase, Size, Slot

    dice, now = random.Random(1), 0.0
    books = Books(10**12, "cost", lambda: now, lambda: 0)
    history = History()
    for number in range(1000):
        slot = Slot(f"m{number}", TASK, None, {}, ("", 0), phase=Phase.READY)
        awake = int(10 ** dice.uniform(7, 9))
        slot.resize(Size(awake, awake // 20))
        slot.reload_seconds, slot.wake_seconds = awake * 2e-9, awake * 1e-9
        books.slots[slot.key] = slot
    slots = list(books.slots.values())
    made: dict[str, Any] = {}
    for share in (0.02, 0.1, 0.5):
        times: list[float] = []
        needed = int(books.charged * share)
        for _ in range(200):
            for _ in range(20):
                now += 1
                slot = dice.choice(slots)
                slot.use = history.used(slot.key, now)
            began = time.perf_counter()
            books.plan(BYTES, needed)
            times.append(time.perf_counter() - began)
        times.sort()
        p50, p99 = times[len(times) // 2] * 1e3, times[int(len(times) * 0.99)] * 1e3
        made[f"{share:.0%}"] = {"p50_ms": round(p50, 3), "p99_ms": round(p99, 3)}
        print(f"what goes of 1,000 for {share:.0%} of their bytes: p50 {p50:.2f} ms, p99 {p99:.2f}")
    return made


def estimates(given: argparse.Namespace) -> dict[str, Any]:
    """Before the first load, by the files; before the second, by the first; and what is true."""
    from ebbtide import PipelineManager

    models = [(TASK, write_model(given.folder / f"e{size}", size)) for size in (5, 20, 60, 150)]
    for one in given.model:
        task, _, place = one.rpartition("=")
        models.append((task or TASK, Path(place)))
    rows = []
    for task, path in models:
        for prepared in (False, True):
            options: dict[str, Any] = {"prepare": "now" if prepared else False}
            with PipelineManager("8 GiB", remember=False) as manager:
                guess = manager.explain(task, str(path), **options).needed
                figures = []
                for _ in range(3):
                    with manager.acquire(task, str(path), **options) as pipe:
                        pipe("the tide goes out", **({"max_new_tokens": 4} if task != TASK else {}))
                    figures.append(manager.status().entries[0].anonymous)
                    manager.evict(task, str(path), **options)
            truth = json.loads(
                subprocess.run(
                    [sys.executable, __file__, "--truth", task, str(path), str(int(prepared))],
                    capture_output=True, text=True, check=True,
                ).stdout.splitlines()[-1]
            )  # fmt: skip
            off = max(abs(one - figures[0]) for one in figures[1:])
            off_truth = abs(figures[0] - truth)
            good = off <= max(0.15 * figures[0], 2e6) and off_truth <= max(0.15 * truth, 2e6)
            rows.append(
                {
                    "model": path.name, "prepared": prepared, "good": good, "guess": guess,
                    "first": figures[0], "again": figures[1:], "true": truth,
                }
            )  # fmt: skip
            print(
                f"{path.name:24} {'prepared' if prepared else 'original':9}"
                f" guess {guess / 1e6:7.1f} (load's peak) measured {figures[0] / 1e6:7.1f}, again"
                f" {' '.join(f'{one / 1e6:.1f}' for one in figures[1:])}, alone in a process"
                f" {truth / 1e6:7.1f} MB {'ok' if good else 'OFF'}"
            )
    return {"rows": rows, "good": all(one["good"] for one in rows)}


def truth(task: str, path: str, prepared: bool) -> None:
    """What one pipeline takes, alone in a process that has loaded another one before."""
    import ebbtide
    from ebbtide.memory import reclaim

    small = Path(__file__).parent.parent / "tests" / "models" / "tiny-bert"
    ebbtide.pipeline(TASK, small, prepare=False).dispose()
    before = reclaim().after
    pipe = ebbtide.pipeline(task, path, prepare="now" if prepared else False)
    print(reclaim().after - before)
    pipe.dispose()


def alive(given: argparse.Namespace) -> dict[str, Any]:
    from ebbtide import PipelineManager

    path = write_model(given.folder / "small", 1)
    late = []
    with PipelineManager("2 GiB", remember=False) as manager:
        evicting: list[float] = []
        gone = threading.Semaphore(0)

        def hear(event: Any) -> None:
            if event.kind == "evicting":
                evicting.append(event.time)
            else:
                gone.release()

        with manager.subscribe(hear, "evicting", "disposed"):
            for number in range(40):
                keep = 0.0 if number % 5 == 0 else random.Random(number).uniform(0.05, 1.5)
                with manager.acquire(TASK, str(path), keep_alive=keep, prepare=False) as pipe:
                    pipe("x")
                due = time.time() + keep
                gone.acquire()
                late.append(evicting[-1] - due)
    worst = max(late, key=abs)
    print(f"\nkeep-alive: went {statistics.median(late) * 1e3:.1f} ms after its time (median),"
          f" {worst * 1e3:.1f} ms at most")  # fmt: skip
    return {"median_ms": round(statistics.median(late) * 1e3, 2), "most_ms": round(worst * 1e3, 2)}


def main() -> None:
    if sys.argv[1:2] == ["--truth"]:
        truth(sys.argv[2], sys.argv[3], sys.argv[4] == "1")
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--parts", default="load,prepared,acquire,choice,estimates,alive")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--megabytes", type=float, default=52)
    parser.add_argument("--cgroup", action="store_true")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        help="a further one to estimate, as FOLDER or TASK=FOLDER",
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        given.folder = given.folder or Path(folder)
        os.environ["EBBTIDE_CACHE_DIR"] = str(given.folder / "cache")
        doing = {
            "load": lambda: under_load(given, prepared=False),
            "prepared": lambda: under_load(given, prepared=True),
            "acquire": lambda: acquire(given),
            "choice": lambda: choice(given),
            "estimates": lambda: estimates(given),
            "alive": lambda: alive(given),
        }
        found = {part: doing[part]() for part in given.parts.split(",")}
    print(json.dumps(found, default=lambda one: None if one == math.inf else str(one)))


if __name__ == "__main__":
    main()
