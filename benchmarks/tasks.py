"""Does memory come back whatever the task? Mixed cycles of load, run, dispose over all tasks.

    python benchmarks/tasks.py [MODELS] [--cycles 1000]

MODELS is a folder with one model a task: sequence, token, span, mask, nli (by default the tests'
tiny BERT), and sentence (by default tiny-bert). Each cycle loads one task's pipeline, calls it with
inputs of changing shapes, sometimes with a bad one, and disposes it; the next task is drawn.
All figures are anonymous memory in MB of 1,000,000 bytes. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ebbtide
from ebbtide.memory import anonymous_bytes

SENTENCE = "the tide goes out and leaves the boats of the harbour lying on their sides"
WORDS = SENTENCE.split()
TESTS = Path(__file__).parent.parent / "tests" / "models"
FOLDERS = {
    "text-classification": "sequence",
    "token-classification": "token",
    "question-answering": "span",
    "fill-mask": "mask",
    "zero-shot-classification": "nli",
    "feature-extraction": "sentence",
}

dice = random.Random(7)


def text() -> str:
    return " ".join(dice.choices(WORDS, k=dice.randint(4, 90)))


def texts() -> list[str]:
    return [text() for _ in range(dice.randint(1, 8))]


CALLS: dict[str, Callable[[Any], object]] = {
    "text-classification": lambda pipe: pipe(texts(), top_k=None),
    "token-classification": lambda pipe: pipe(texts(), aggregation_strategy="average"),
    "question-answering": lambda pipe: pipe("What goes out?", f"{text()} {text()}", top_k=2),
    "fill-mask": lambda pipe: pipe([f"{pipe.mask_token} {one}" for one in texts()]),
    "zero-shot-classification": lambda pipe: pipe(texts(), ["sea", "land", "sky"]),
    "feature-extraction": lambda pipe: pipe(texts(), pooling="mean"),
}


def cycle(task: str, folder: Path) -> tuple[float, float, bool]:
    """Megabytes live, milliseconds of the dispose, and whether its receipt is verified."""
    pipe = ebbtide.pipeline(task, folder)
    for _ in range(3):
        CALLS[task](pipe)
    if dice.random() < 0.2:
        with contextlib.suppress(ebbtide.EbbtideError):
            pipe(b"no text")
    live = anonymous_bytes() / 1e6
    started = time.perf_counter()
    receipt = pipe.dispose()
    return live, (time.perf_counter() - started) * 1e3, receipt.verified


def counts() -> tuple[int, int]:
    tasks = min(len(os.listdir("/proc/self/task")) for _ in range(50))
    return tasks, len(os.listdir("/proc/self/fd"))


def main() -> None:
    # What is measured is the original: a prepared copy that is there by chance is not used.
    ebbtide.settings.prepare, ebbtide.settings.cache_dir = "off", "no-store"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="?", default=str(TESTS / "bert"))
    parser.add_argument("--cycles", type=int, default=1000)
    options = parser.parse_args()
    root = Path(options.models)
    folders = {task: root / name for task, name in FOLDERS.items()}
    if not folders["feature-extraction"].exists():
        folders["feature-extraction"] = TESTS / "tiny-bert"
    for task, folder in folders.items():  # each once, before anything is measured
        cycle(task, folder)
    floor, before = anonymous_bytes() / 1e6, counts()
    found: dict[str, list[tuple[float, float, bool]]] = {task: [] for task in folders}
    highest = floor
    for _ in range(options.cycles):
        task = dice.choice(list(folders))
        found[task].append(cycle(task, folders[task]))
        highest = max(highest, anonymous_bytes() / 1e6)
    last, after = anonymous_bytes() / 1e6, counts()
    print(f"{options.cycles} mixed cycles over {len(folders)} tasks, models in {root.name}")
    print(f"{'':<26}{'cycles':>8}{'live MB':>10}{'p50 ms':>9}{'p95 ms':>9}{'verified':>10}")
    for task, rows in found.items():
        times = sorted(one[1] for one in rows)
        p95 = times[int(len(times) * 0.95)] if times else 0.0
        live = max(one[0] for one in rows)
        verified = sum(one[2] for one in rows)
        row = f"{statistics.median(times):>9.1f}{p95:>9.1f}{verified:>10}"
        print(f"{task:<26}{len(rows):>8}{live:>10.1f}{row}")
    threads, descriptors = (now - then for now, then in zip(after, before, strict=True))
    print(
        f"floor {floor:.2f} MB, highest after a disposal {highest:.2f}, last {last:.2f}: drift"
        f" {highest - floor:.2f} MB; threads {threads:+d}, descriptors {descriptors:+d}"
    )
    result = {
        "cycles": options.cycles, "floor": floor, "highest": highest, "last": last,
        "threads": threads, "descriptors": descriptors,
        "verified": sum(one[2] for rows in found.values() for one in rows),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
