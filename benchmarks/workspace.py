"""Does admission keep runs inside a budget, what does it cost, and how good are the estimates?

    python benchmarks/workspace.py MODEL [--pipelines 10] [--threads 32] [--seconds 10]
        [--native-threads 8] [--budget 250] [--only full|estimates|overhead]

MODEL is a folder. Its copies (links, so they take no disk) are made in a temporary folder, with
prepared graphs, and each part runs in a fresh process.

- full: one pipeline a copy, and user threads that run lists of mixed lengths on all of them, first
  without a limit, then with one that the working memory fills. Peaks are anonymous bytes of the
  process, read every 2 ms by the process that started it. Throughput is words a second.
- estimates: shapes by chance, run alone after a trim: the measured peak over the estimate.
- overhead: one short text, with the limit and without in turns: microseconds more, median of the
  rounds, with the quartiles. And the admission of a run alone, with nothing to wait for.

MB are 1,000,000 bytes. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

MB = 1_000_000
WORDS = (
    "the", "tide", "goes", "out", "and", "leaves", "boats", "of", "harbour", "lying", "on", "their",
    "sides",
)  # fmt: skip
PAGE = os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--pipelines", type=int, default=10)
    parser.add_argument("--threads", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--native-threads", type=int, default=8)
    parser.add_argument("--budget", type=int, default=250, help="MB for the process")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=("full", "estimates", "overhead"))
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--copies", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        PARTS[options.part](options)
        return
    with tempfile.TemporaryDirectory() as folder:
        options.copies = Path(folder)
        for number in range(options.pipelines):
            shutil.copytree(options.model, Path(folder) / f"{number}", copy_function=_link)
        result: dict[str, Any] = {}
        for name in ("prepared", "free", "limited", "estimates", "overhead"):
            group = "full" if name in ("free", "limited") else name
            if name == "prepared" or options.only in (None, group):
                result[name] = start(name, options)
        result.pop("prepared")
    if "limited" in result:
        free, limited = result["free"], result["limited"]
        print(f"{options.threads} threads, {options.pipelines} pipelines, {options.seconds:.0f} s")
        for name, one in (("no limit", free), ("limited", limited)):
            print(f"  {name:<10} peak {one['peak']:8.1f} MB {one['words']:8.0f} words a second")
        over = limited["peak"] / options.budget - 1
        print(
            f"  budget {options.budget} MB: the peak is {over:+.1%} of it; trims {limited['trims']}"
        )
        print(f"  throughput {limited['words'] / free['words']:.2f} of that without a limit")
    if "estimates" in result:
        print("measured peak over estimate, and estimate over peak:", result["estimates"])
    if "overhead" in result:
        print("one short text, us more with a limit (quartiles):", result["overhead"])
    print(json.dumps(result))


def _link(source: str, target: str) -> None:
    """Another name, or a small copy for what pipelines tell apart by its place."""
    if Path(source).suffix == ".onnx":
        os.symlink(Path(source).resolve(), target)
    else:
        shutil.copy2(source, target)


def start(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one part in a process of its own, and watch what it holds."""
    command = [sys.executable, *sys.argv, "--part", part, "--copies", str(options.copies)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        peak, ended = [0], threading.Event()

        def watch() -> None:
            while not ended.wait(0.002):
                try:
                    fields = Path(f"/proc/{child.pid}/statm").read_text().split()
                except (OSError, IndexError):
                    return
                if len(fields) > 2:
                    peak[0] = max(peak[0], (int(fields[1]) - int(fields[2])) * PAGE)

        found: dict[str, Any] = {}
        assert child.stdout is not None
        thread = threading.Thread(target=watch)
        for line in child.stdout:
            if line.startswith("{"):
                found = json.loads(line)
                if found.get("watch"):
                    thread.start()
            else:
                print(f"  [{part}] {line}", end="")
        ended.set()
        if thread.ident is not None:
            thread.join()
    if child.returncode:
        raise SystemExit(f"{part} ended with {child.returncode}")
    return {**found, "peak": peak[0] / MB}


def pipelines(options: argparse.Namespace) -> list[Any]:
    import ebbtide

    ebbtide.settings.native_threads = options.native_threads
    folders = sorted(options.copies.iterdir())
    return [ebbtide.pipeline("feature-extraction", one, prepare="now") for one in folders]


def text(dice: random.Random, words: int) -> str:
    return " ".join(dice.choices(WORDS, k=words))


def limit(budget: int, other: int) -> None:
    from ebbtide.memory.workspace import Allowance, workspace

    allowance = Allowance(budget, other)
    workspace.limit = lambda: allowance


def floor() -> int:
    from ebbtide.memory import anonymous_bytes, reclaim

    reclaim()
    return anonymous_bytes()


def prepared(options: argparse.Namespace) -> None:
    for pipe in pipelines(options):
        pipe.dispose()
    print("{}")


def full(options: argparse.Namespace, *, limited: bool) -> None:
    from ebbtide.memory.allocator import allocator
    from ebbtide.memory.workspace import workspace

    pipes = pipelines(options)
    for pipe in pipes:
        pipe("the tide", pooling="mean")
    other = floor()
    trims = [0]
    if limited:
        limit(options.budget * MB, other)

        def counted() -> None:
            trims[0] += 1
            allocator.trim()

        workspace._trim = counted
    print(json.dumps({"watch": True}), flush=True)
    stop = time.monotonic() + options.seconds
    done = [0] * options.threads
    failures: list[str] = []

    def work(number: int) -> None:
        dice = random.Random(number)
        while time.monotonic() < stop:
            count = dice.choice((1, 1, 1, 4, 16))
            sizes = [dice.choice((5, 20, 60, 180, 500)) for _ in range(count)]
            some = [text(dice, size) for size in sizes]
            try:
                dice.choice(pipes)(some, pooling="mean")
            except Exception as error:  # counted, and the first is shown
                failures.append(f"{type(error).__name__}: {error}")
            else:
                done[number] += sum(sizes)

    began = time.monotonic()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(options.threads)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    seconds = time.monotonic() - began
    if failures:
        print(f"{len(failures)} failed: {failures[0]}")
    print(
        json.dumps(
            {
                "words": sum(done) / seconds,
                "least": min(done),
                "failed": len(failures),
                "floor": other / MB,
                "trims": trims[0],
            }
        )
    )


def estimates(options: argparse.Namespace) -> None:
    import numpy as np

    import ebbtide
    from ebbtide.cancellation import CancelToken
    from ebbtide.memory.allocator import allocator
    from ebbtide.memory.workspace import Sampler, workspace
    from ebbtide.runtime import native_threads

    ebbtide.settings.idle_trim = None  # no call goes on here, so it would come into runs
    pipe = pipelines(options)[0]
    other = floor()
    limit(4000 * MB, other)
    graph = pipe._model._session.value
    token = CancelToken("estimates")
    outputs = [graph.outputs[0].name]
    dice = random.Random(5)

    def shape() -> tuple[int, int]:
        length = int(8 * 64 ** dice.random())
        return max(1, int(2048 / length * dice.random())), length

    def feeds(batch: int, length: int) -> dict[str, Any]:
        ones = np.ones((batch, length), np.int64)
        return {one.name: ones * (one.name != "token_type_ids") for one in graph.inputs}

    def work() -> list[tuple[int, int]]:
        for batch, length in (shape() for _ in range(40)):
            graph.run(feeds(batch, length), outputs, token)
        known = graph.known_as(graph._use)
        found = []
        for batch, length in (shape() for _ in range(40)):
            estimate, _ = workspace.expected(known, batch * length, length)
            allocator.trim()
            with Sampler() as sampler:
                graph._use.session.run(feeds(batch, length), outputs, token)
            found.append((sampler.peak, estimate))
        return found

    found = native_threads.submit(work, token, lambda: None).wait()
    large = [(peak, estimate) for peak, estimate in found if max(peak, estimate) > 2 * MB]
    over = sorted(peak / estimate for peak, estimate in large)
    off = sorted(abs(peak - estimate) / MB for peak, estimate in found)
    cuts = {"p50": 0.5, "p95": 0.95}
    print(
        json.dumps(
            {name: round(over[int(cut * (len(over) - 1))], 2) for name, cut in cuts.items()}
            | {"least": round(over[0], 2), "most": round(over[-1], 2)}
            | {f"off_{n}_mb": round(off[int(c * (len(off) - 1))], 1) for n, c in cuts.items()}
            | {"entries": len(workspace.needs_of(graph.known_as(graph._use).key)._known)}
        )
    )


def overhead(options: argparse.Namespace) -> None:
    from ebbtide.memory.workspace import Allowance, workspace

    pipe = pipelines(options)[0]
    allowance = Allowance(4000 * MB, floor())
    found: dict[str, list[float]] = {}
    cases = {
        "small": "the tide goes out and leaves the boats",
        "counted": text(random.Random(1), 90),
    }
    for name, given in cases.items():
        workspace.limit = lambda: allowance
        for _ in range(5):
            pipe(given, pooling="mean")
        more = []
        for number in range(options.rounds):
            times = {}
            for limited in (True, False) if number % 2 else (False, True):
                workspace.limit = (lambda: allowance) if limited else None
                block = []
                for _ in range(40):
                    started = time.perf_counter()
                    pipe(given, pooling="mean")
                    block.append(time.perf_counter() - started)
                times[limited] = statistics.median(block)
            more.append((times[True] - times[False]) * 1e6)
        low, middle, high = statistics.quantiles(more, n=4)
        found[name] = [round(one, 1) for one in (middle, low, high)]
    print(json.dumps(found | {"gate": gates(pipe, lambda: allowance)}))


def gates(pipe: Any, allowance: Any) -> dict[str, float]:
    """Microseconds of a run's admission alone, with nobody else there."""
    import numpy as np

    from ebbtide.cancellation import CancelToken
    from ebbtide.memory.workspace import workspace
    from ebbtide.runtime import native_threads

    graph = pipe._model._session.value
    token = CancelToken("gates")

    def work() -> dict[str, float]:
        needs = workspace.needs_of(graph.known_as(graph._use).key)
        needs.observe(1, 8, 100_000)
        needs.observe(1, 90, 5 * MB)
        found = {}
        for name, length, limit in (("none", 8, None), ("small", 8, 1), ("counted", 90, 1)):
            workspace.limit = allowance if limit else None
            feeds = {one.name: np.ones((1, length), np.int64) for one in graph.inputs}
            blocks = []
            for _ in range(51):
                started = time.perf_counter()
                for _ in range(200):
                    with graph._admitted(graph._use, feeds, token):
                        pass
                blocks.append((time.perf_counter() - started) / 200 * 1e6)
            found[name] = round(statistics.median(blocks), 2)
        return found

    return native_threads.submit(work, token, lambda: None).wait()


PARTS = {
    "prepared": prepared,
    "free": lambda options: full(options, limited=False),
    "limited": lambda options: full(options, limited=True),
    "estimates": estimates,
    "overhead": overhead,
}


if __name__ == "__main__":
    main()
