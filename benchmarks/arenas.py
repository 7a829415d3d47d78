"""On whose threads should native code run, and what makes malloc give back what they freed?

    python benchmarks/arenas.py MODEL [--dtype fp32] [--rounds 3] [--runs 2] [--only WORD]

MODEL is a folder or an installed model. One raw `onnxruntime` session is used by sixteen user
threads that run changing shapes; then it is released, and the allocator is asked to give back what
is free. The modes differ in where a run happens, and in what malloc was told. Each mode starts in a
fresh process, once with the user threads still alive when the session goes and once with them
ended, and the modes take turns, round by round.

Memory is anonymous memory, in MB of 1,000,000 bytes, above the floor: what the same process held
after it had loaded, run once and released. Median and range over the rounds. The last line is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
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

USER_THREADS = 16
INTRA_OP_THREADS = 2
OWN_THREADS = 2

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclasses.dataclass(frozen=True)
class Mode:
    """One way to run native code, and to give back what it leaves.

    Attributes:
        title: What it is, for the table.
        policy: For runs on Ebbtide's own threads, its `settings.malloc`: "tuned" is what Ebbtide
            does, "system" is the same without the ballast. None: runs on the callers' threads.
        arena: Whether ONNX Runtime's own arena is on.
        mallopt: Told to malloc before anything else.
    """

    title: str
    policy: str | None = None
    arena: bool = False
    mallopt: tuple[tuple[int, int], ...] = ()


def thresholds(size: int) -> tuple[tuple[int, int], ...]:
    return (M_MMAP_THRESHOLD, size), (M_TRIM_THRESHOLD, size)


MODES = {
    "callers": Mode("callers' threads"),
    "callers-arena": Mode("callers', ONNX Runtime's arena", arena=True),
    "callers-one": Mode("callers', M_ARENA_MAX 1", mallopt=((M_ARENA_MAX, 1),)),
    "callers-128k": Mode("callers', thresholds 128 kB", mallopt=thresholds(128 << 10)),
    "callers-1m": Mode("callers', thresholds 1 MB", mallopt=thresholds(1 << 20)),
    "own": Mode("own threads", policy="system"),
    "own-ballast": Mode("own threads and ballast", policy="tuned"),
}
"""Each of them ends in `malloc_trim(0)`."""

COLUMNS = {
    "kept_alive": "kept, alive",
    "kept_ended": "kept, ended",
    "peak": "peak",
    "threads_s": "work s",
    "short_ms": "short ms",
    "batch_ms": "batch ms",
    "free_ms": "free ms",
    "trim_ms": "trim ms",
}


class Callers:
    """Native code runs on whatever thread asks for it."""

    def do(self, work: Callable[[], None]) -> None:
        """Run it here."""
        work()

    def end(self, box: list[Any]) -> tuple[float, float]:
        """Release the session and trim; returns the milliseconds of both."""
        malloc_trim = ctypes.CDLL(None).malloc_trim
        return clocked(box.clear), clocked(lambda: malloc_trim(0))


class Own:
    """Native code runs on Ebbtide's native threads, and ends on its reaper's."""

    def __init__(self, policy: str) -> None:
        from ebbtide._settings import settings

        settings.native_threads = OWN_THREADS  # before the threads are imported
        settings.malloc = policy  # type: ignore[assignment]
        from ebbtide.cancellation import CancelToken
        from ebbtide.memory.allocator import allocator
        from ebbtide.memory.reaper import reaper
        from ebbtide.runtime.threads import native_threads

        reaper.start()
        self.allocator, self.reaper, self.threads = allocator, reaper, native_threads
        self.token = CancelToken("the benchmark")

    def do(self, work: Callable[[], None]) -> None:
        """Run it on a native thread, and wait."""
        self.threads.submit(work, self.token, lambda: None).wait()

    def end(self, box: list[Any]) -> tuple[float, float]:
        """Release the session and trim as a disposal does; returns the milliseconds of both."""
        found: list[float] = []

        def release() -> None:
            with self.allocator.shrinking():
                box.clear()

        def released() -> None:
            releasing = threading.Thread(target=release)
            releasing.start()
            releasing.join()

        def both() -> None:
            found.append(clocked(released))
            found.append(clocked(lambda: str(self.allocator.trim())))

        self.reaper.call(both)
        return found[0], found[1]


def clocked(step: Callable[[], object]) -> float:
    started = time.perf_counter()
    step()
    return (time.perf_counter() - started) * 1e3


def anonymous() -> float:
    with open("/proc/self/statm", "rb") as file:
        fields = file.read().split()
    return (int(fields[1]) - int(fields[2])) * PAGE / 1e6


class Peak:
    """The largest anonymous memory, looked at every 5 ms while inside."""

    def __enter__(self) -> Peak:
        self.value = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self.value = max(self.value, anonymous())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


class Trial:
    """One mode in this process.

    Args:
        mode: The mode.
        path: The ONNX file.
        alive: Whether the user threads are still there when the session is released.
    """

    def __init__(self, mode: Mode, path: str, alive: bool) -> None:
        libc = ctypes.CDLL(None)
        for option, value in mode.mallopt:
            assert libc.mallopt(option, value) == 1
        import numpy
        import onnxruntime

        self.numpy, self.onnxruntime = numpy, onnxruntime
        self.mode, self.path, self.alive = mode, path, alive
        self.place = Callers() if mode.policy is None else Own(mode.policy)
        self.box: list[Any] = []

    def load(self) -> None:
        """Make the session."""
        options = self.onnxruntime.SessionOptions()
        options.intra_op_num_threads = INTRA_OP_THREADS
        options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = options.enable_mem_pattern = self.mode.arena
        self.box.append(
            self.onnxruntime.InferenceSession(
                self.path, options, providers=["CPUExecutionProvider"]
            )
        )

    def run(self, rows: int, width: int) -> None:
        """Run it once on texts of this shape."""
        ids = self.numpy.full((rows, width), 2000, self.numpy.int64)
        feeds = {"input_ids": ids, "attention_mask": ids // 2000, "token_type_ids": ids * 0}
        names = {one.name for one in self.box[0].get_inputs()}
        given = {name: feeds[name] for name in feeds if name in names}
        self.place.do(lambda: self.box[0].run(None, given) and None)

    def cycle(self, users: int, runs: int) -> dict[str, float]:
        """Load, work on many threads, work on one, release: everything that was seen."""
        self.place.do(self.load)
        go = threading.Event()
        done = threading.Barrier(users + 1)

        def work(seed: int) -> None:
            dice = random.Random(seed)
            for _ in range(runs):
                self.run(dice.randint(1, 8), dice.randint(8, 128))
            done.wait()
            if self.alive:
                go.wait()

        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(users)]
        with Peak() as peak:
            started = time.perf_counter()
            for worker in workers:
                worker.start()
            done.wait()
            seconds = time.perf_counter() - started
        if not self.alive:
            for worker in workers:
                worker.join()
        short = [clocked(lambda: self.run(1, 12)) for _ in range(30 if runs > 1 else 1)]
        batch = [clocked(lambda: self.run(32, 64)) for _ in range(3 if runs > 1 else 1)]
        free_ms, trim_ms = self.place.end(self.box)
        after = anonymous()
        go.set()
        for worker in workers:
            worker.join()
        return {
            "after": after, "peak": peak.value, "threads_s": seconds, "free_ms": free_ms,
            "short_ms": statistics.median(short), "batch_ms": statistics.median(batch),
            "trim_ms": trim_ms,
        }  # fmt: skip


def child(options: argparse.Namespace) -> None:
    """One mode in a fresh process; prints what it saw."""
    trial = Trial(MODES[options.mode], options.model, options.alive)
    floor = trial.cycle(1, 1)["after"]
    found = trial.cycle(USER_THREADS, options.runs)
    kept = "kept_alive" if options.alive else "kept_ended"
    found[kept] = found.pop("after") - floor
    found["peak"] -= floor
    print(json.dumps({"floor": floor, **found}))


def trial_of(mode: str, path: str, alive: bool, runs: int) -> dict[str, float]:
    command = [sys.executable, __file__, path, "--mode", mode, "--runs", str(runs)]
    done = subprocess.run(
        [*command, *(["--alive"] if alive else [])], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def graph_of(model: str, dtype: str) -> Path:
    from ebbtide.hub import resolve
    from ebbtide.runtime.dtypes import SUFFIXES

    files = resolve(model, task="feature-extraction", default=model)
    return Path(files.need(f"onnx/model{SUFFIXES[dtype]}.onnx", ""))


def show(rows: dict[str, dict[str, list[float]]]) -> None:
    print(f"{'':32}" + "".join(f"{title:>23}" for title in COLUMNS.values()))
    for mode, found in rows.items():
        cells = ""
        for column in COLUMNS:
            values = found[column]
            digits = 0 if column in ("batch_ms", "peak") else 1
            middle = f"{statistics.median(values):.{digits}f}"
            cells += f"{f'{middle} ({min(values):.{digits}f}-{max(values):.{digits}f})':>23}"
        print(f"{MODES[mode].title:32}{cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=2, help="runs a user thread makes, 2 or more")
    parser.add_argument("--only", default="", help="only modes whose key has this in it")
    parser.add_argument("--mode", choices=tuple(MODES), help=argparse.SUPPRESS)
    parser.add_argument("--alive", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mode:
        child(options)
        return
    path = graph_of(options.model, options.dtype)
    modes = [mode for mode in MODES if options.only in mode]
    rows: dict[str, dict[str, list[float]]] = {mode: {} for mode in modes}
    for number in range(options.rounds):
        for alive in (True, False):
            for mode in modes if number % 2 == 0 else reversed(modes):
                for name, value in trial_of(mode, str(path), alive, options.runs).items():
                    rows[mode].setdefault(name, []).append(value)
    print(
        f"{Path(options.model).name} in {options.dtype}: {USER_THREADS} user threads,"
        f" {options.runs} runs each; {options.rounds} rounds; memory in MB above the floor"
    )
    show(rows)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
