"""Does memory come back? Cycles of load, run, dispose, beside raw onnxruntime with `del`.

    python benchmarks/release.py [MODEL] [--dtype D] [--cycles 1000] [--parts cycles]

MODEL is a folder or an installed model (by default the demo's MiniLM, int8). Ebbtide and raw
onnxruntime each run in a process of their own and take turns, cycle by cycle. All figures are
anonymous memory, in MB of 1,000,000 bytes, read from the kernel after each step. The last line is
JSON.

The raw side is what people write: an `InferenceSession` and a `Tokenizer`, default options, then
`del` and `gc.collect()`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SENTENCE = "the tide goes out and leaves the boats of the harbour lying on their sides in the mud"
WORDS = SENTENCE.split()
USER_THREADS = 16


def texts(dice: random.Random) -> list[str]:
    """A batch of changing shape: 1 to 8 texts of 4 to 90 words."""
    return [" ".join(dice.choices(WORDS, k=dice.randint(4, 90))) for _ in range(dice.randint(1, 8))]


class Ebbtide:
    """A pipeline, made, called and disposed."""

    def __init__(self, model: str, dtype: str) -> None:
        self.model, self.dtype = model, dtype
        self.held: list[object] = []

    def load(self) -> None:
        import ebbtide

        self.pipe = ebbtide.pipeline("feature-extraction", self.model, dtype=self.dtype)

    def run(self, batch: list[str]) -> object:
        return self.pipe(batch, pooling="mean", normalize=True)

    def hold(self, output: object) -> None:
        """What a caller may keep: the pipeline, its tokenizer, an output, a caught exception."""
        import ebbtide

        try:
            self.pipe(["fine", "half of a surrogate pair: \ud800"])
        except ebbtide.InputError as error:
            self.held = [self.pipe, self.pipe.tokenizer, output, error]

    def dispose(self) -> bool:
        verified: bool = self.pipe.dispose().verified
        return verified


class Raw:
    """onnxruntime and tokenizers by hand, freed with `del`."""

    def __init__(self, model: str, dtype: str) -> None:
        from ebbtide.hub import resolve
        from ebbtide.runtime.dtypes import SUFFIXES

        files = resolve(model, task="feature-extraction", default=model)
        self.path = str(files.need(f"onnx/model{SUFFIXES[dtype]}.onnx", ""))
        self.vocabulary = str(files.need("tokenizer.json", ""))
        self.held: list[object] = []

    def load(self) -> None:
        import onnxruntime
        import tokenizers

        self.tokenizer = tokenizers.Tokenizer.from_file(self.vocabulary)
        self.tokenizer.enable_padding()
        self.tokenizer.enable_truncation(512)
        self.session = onnxruntime.InferenceSession(self.path)

    def run(self, batch: list[str]) -> object:
        import numpy as np

        encoded = self.tokenizer.encode_batch(batch)
        ids = np.array([one.ids for one in encoded], np.int64)
        mask = np.array([one.attention_mask for one in encoded], np.int64)
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        hidden = self.session.run(None, feeds)[0]
        return (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True)

    def hold(self, output: object) -> None:
        """The raw side lets go of everything but an output: what it holds, it could not free."""
        self.held = [output]

    def dispose(self) -> bool:
        del self.session, self.tokenizer
        gc.collect()
        return True


def anonymous() -> float:
    from ebbtide.memory import anonymous_bytes

    return anonymous_bytes() / 1e6


def counts() -> tuple[int, int]:
    """Threads and descriptors; a thread that has ended is listed a moment longer."""
    tasks = min(len(os.listdir("/proc/self/task")) for _ in range(50))
    return tasks, len(os.listdir("/proc/self/fd"))


def cycle(side: Ebbtide | Raw, dice: random.Random, hold: bool = False) -> dict[str, Any]:
    before = anonymous()
    side.load()
    output = None
    for _ in range(3):
        output = side.run(texts(dice))
    if hold:
        side.hold(output)
    live = anonymous()
    started = time.perf_counter()
    verified = side.dispose()
    seconds = time.perf_counter() - started
    return {
        "before": before, "live": live, "after": anonymous(), "ms": seconds * 1e3,
        "verified": verified, "counts": counts(),
    }  # fmt: skip


def threads_cycle(side: Ebbtide | Raw, dice: random.Random, alive: bool) -> dict[str, Any]:
    """The same with 16 user threads that run changing shapes, and everything held."""
    before = anonymous()
    side.load()
    go = threading.Event()
    done = threading.Barrier(USER_THREADS + 1)

    def work(seed: int) -> None:
        own = random.Random(seed)
        for _ in range(4):
            side.run(texts(own))
        done.wait()
        if alive:
            go.wait()

    workers = [threading.Thread(target=work, args=(dice.random(),)) for _ in range(USER_THREADS)]
    for worker in workers:
        worker.start()
    done.wait()
    if not alive:
        for worker in workers:
            worker.join()
    side.hold(side.run(texts(dice)))
    live = anonymous()
    started = time.perf_counter()
    verified = side.dispose()
    seconds = time.perf_counter() - started
    after = anonymous()
    go.set()
    for worker in workers:
        worker.join()
    return {
        "before": before, "live": live, "after": after, "ms": seconds * 1e3, "verified": verified,
        "counts": counts(),
    }  # fmt: skip


def heap_cycles(side: Ebbtide | Raw, dice: random.Random, gigabyte: bool) -> dict[str, Any]:
    """Disposals beside a Python heap, and the longest time another thread stood still in them."""
    heap = [[number, str(number)] for number in range(6_500_000)] if gigabyte else []
    gc.collect()
    size = anonymous()
    gaps: list[float] = []
    disposing = threading.Event()
    stop = threading.Event()

    def tick() -> None:
        last = time.perf_counter()
        while not stop.is_set():
            time.sleep(0.0005)
            now = time.perf_counter()
            if disposing.is_set():
                gaps.append((now - last) * 1e3)
            last = now

    ticker = threading.Thread(target=tick)
    ticker.start()
    times = []
    for _ in range(15):
        side.load()
        side.run(texts(dice))
        disposing.set()
        started = time.perf_counter()
        side.dispose()
        times.append((time.perf_counter() - started) * 1e3)
        disposing.clear()
    stop.set()
    ticker.join()
    del heap
    return {"heap_mb": size, "ms": times, "stall_ms": max(gaps, default=0.0)}


def serve(side: Ebbtide | Raw) -> None:
    """A child: one line in says what to do, one line of JSON out says what came of it."""
    dice = random.Random(7)
    for line in sys.stdin:
        what, _, flag = line.strip().partition(" ")
        steps: dict[str, Callable[[], dict[str, Any]]] = {
            "cycle": lambda: cycle(side, dice, hold=flag == "hold"),
            "threads": lambda: threads_cycle(side, dice, flag == "alive"),
            "heap": lambda: heap_cycles(side, dice, flag == "gigabyte"),
        }
        print(json.dumps(steps[what]()), flush=True)


class Child:
    """One side, in a process of its own."""

    def __init__(self, side: str, options: argparse.Namespace) -> None:
        command = [
            sys.executable,
            __file__,
            options.model,
            "--dtype",
            options.dtype,
            "--side",
            side,
        ]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, what: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def end(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(60)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def kept(one: dict[str, Any], floor: float) -> tuple[float, float]:
    """What stayed above the floor, in MB and as a share of what was taken."""
    stayed = max(0.0, one["after"] - floor)
    return stayed, stayed / max(one["live"] - floor, 1e-9)


def cycles(options: argparse.Namespace) -> dict[str, Any]:
    sides = {name: Child(name, options) for name in ("ebbtide", "raw")}
    rows: dict[str, list[dict[str, Any]]] = {"ebbtide": [], "raw": []}
    for number in range(options.cycles + 1):
        rows["ebbtide"].append(sides["ebbtide"].ask("cycle hold" if number % 2 else "cycle"))
        if number <= options.raw_cycles:
            rows["raw"].append(sides["raw"].ask("cycle"))
    codes = {name: side.end() for name, side in sides.items()}
    result: dict[str, Any] = {"exit": codes}
    print(f"\n{options.cycles} cycles of load, 3 runs of changing shape, dispose (after the first)")
    print(f"{'':10}{'live MB':>10}{'floor':>8}{'last':>8}{'drift':>8}{'kept, worst':>22}"
          f"{'p50 ms':>8}{'p95 ms':>8}{'threads':>9}{'fds':>6}")  # fmt: skip
    for name, found in rows.items():
        floor = found[0]["after"]
        later = found[1:]
        worst = max(max(0.0, one["after"] - one["before"]) for one in later)
        share = max(
            max(0.0, one["after"] - one["before"]) / max(one["live"] - one["before"], 1e-9)
            for one in later
        )
        times = [one["ms"] for one in later]
        line = {
            "cycles": len(later),
            "live": statistics.median(one["live"] for one in later),
            "floor": floor,
            "last": later[-1]["after"],
            "drift": max(one["after"] for one in later) - floor,
            "drift_last": later[-1]["after"] - floor,
            "kept_mb": worst,
            "kept_share": share,
            "p50_ms": statistics.median(times),
            "p95_ms": percentile(times, 0.95),
            "max_ms": max(times),
            "threads": later[-1]["counts"][0] - found[0]["counts"][0],
            "descriptors": later[-1]["counts"][1] - found[0]["counts"][1],
            "verified": sum(one["verified"] for one in later),
        }
        result[name] = line
        print(f"{name:10}{line['live']:10.1f}{floor:8.1f}{line['last']:8.1f}{line['drift']:8.2f}"
              f"{worst:13.2f} MB{share:6.1%}{line['p50_ms']:8.1f}{line['p95_ms']:8.1f}"
              f"{line['threads']:+9d}{line['descriptors']:+6d}")  # fmt: skip
    print(f"ebbtide's receipts: {result['ebbtide']['verified']} of {options.cycles} verified")
    return result


def threads(options: argparse.Namespace) -> dict[str, Any]:
    sides = {name: Child(name, options) for name in ("ebbtide", "raw")}
    for side in sides.values():
        side.ask("cycle")
        side.ask("threads ended")
    floors = {name: side.ask("cycle")["after"] for name, side in sides.items()}
    result: dict[str, Any] = {}
    print(f"\nafter {USER_THREADS} user threads ran changing shapes, while the caller still holds")
    print("the pipeline, its tokenizer, an output and a caught exception: MB kept, and share")
    for state in ("alive", "ended"):
        for name, side in sides.items():
            found = [kept(side.ask(f"threads {state}"), floors[name]) for _ in range(5)]
            result[f"{name}_{state}"] = found
            cells = "  ".join(f"{mb:6.2f} ({share:.1%})" for mb, share in found)
            print(f"{name:10}{state:8}{cells}")
    for side in sides.values():
        side.end()
    return result


def heaps(options: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {}
    print("\ntime to dispose, and the longest another thread stood still meanwhile")
    for flag in ("bare", "gigabyte"):
        for name in ("ebbtide", "raw"):
            side = Child(name, options)
            side.ask("cycle")
            found = side.ask(f"heap {flag}")
            side.end()
            line = {
                "heap_mb": found["heap_mb"],
                "p50_ms": statistics.median(found["ms"]),
                "p95_ms": percentile(found["ms"], 0.95),
                "stall_ms": found["stall_ms"],
            }
            result[f"{name}_{flag}"] = line
            print(f"{name:10}beside {line['heap_mb']:7.0f} MB: p50 {line['p50_ms']:7.1f} ms,"
                  f" p95 {line['p95_ms']:7.1f} ms, stall {line['stall_ms']:7.1f} ms")  # fmt: skip
    return result


def main() -> None:
    # What is measured is the original: a prepared copy that is there by chance is not used.
    os.environ.update(EBBTIDE_PREPARE="off", EBBTIDE_CACHE_DIR="no-store")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", nargs="?", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--raw-cycles", type=int, default=100)
    parser.add_argument("--parts", default="heaps,threads,cycles", help="which of the three to run")
    parser.add_argument("--side", choices=("ebbtide", "raw"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve((Ebbtide if options.side == "ebbtide" else Raw)(options.model, options.dtype))
        return
    print(f"{Path(options.model).name} in {options.dtype}")
    parts = {"heaps": heaps, "threads": threads, "cycles": cycles}
    result = {name: parts[name](options) for name in options.parts.split(",")}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
