"""What does a process of its own cost a pipeline, and does it leave anything?

    python benchmarks/isolation.py MODEL [--dtype fp32] [--threads N] [--rounds 200] [--cycles 300]
        [--only overhead,arrays,starts,kills,cycles,replicas]

MODEL is a folder or an installed model. The questions:

- overhead: one short text to a vector, by the pipeline in process and by the same isolated. The
  two sides are two processes that take turns in small blocks, of which the first calls are not
  counted; a round gives the difference of the blocks' medians. An echo is a call that does nothing.
  ONNX Runtime's threads spin for 50 ms after a run, on a core that the other side would lack: so a
  side begins when those of the other are quiet.
- arrays: 64 MB of numbers there and back, and then the first reading of a number of each page.
- starts: from the call of `pipeline` to a pipeline that has answered, and `dispose`, for a new
  Python and for a fork server that is there already; in process beside them.
- kills: from ``kill -9`` of a child that runs a call to the error, and from there to the next
  answer.
- cycles: load, run, dispose, again and again. What the process has grown by, and what is left of
  children, descriptors, threads and names in shared memory.
- replicas: what each of four over one prepared copy takes in private memory, beside a process that
  has imported everything and loaded nothing. And short texts a second: 1, 2 and 4 replicas of one
  thread against one pipeline in process with two threads, four callers each. The sides take turns
  in blocks; a round gives the quotient of the blocks.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEXT = "The tide goes out and leaves the boats."
SIDES = ("here", "there")
BOUNDS = {"overhead_ms": 0.4, "gigabytes_a_second": 1.5, "end_ms": 500.0, "drift_mb": 1.0}
BOUNDS |= {"replica_mb": 25.0, "two_replicas": 1.0}
CALLERS = 4
SPINNING = 0.06
FIRST = 3
NO_MODEL = """
import tokenizers
from ebbtide.memory.probe import anonymous_bytes
from ebbtide.runtime import library
from ebbtide.workers import service
library.onnxruntime()
print(anonymous_bytes())
"""


def load(options: argparse.Namespace, isolate: Any) -> Any:
    import ebbtide

    return ebbtide.pipeline(
        "feature-extraction",
        options.model,
        dtype=options.dtype,
        isolate=isolate,
        session_options={"threads": options.threads},
    )


def answer(pipe: Any) -> Any:
    return pipe(TEXT, pooling="mean", normalize=True)


def timed(function: Callable[[], Any], count: int) -> list[float]:
    """Milliseconds of each call."""
    times = []
    for _ in range(count):
        started = time.perf_counter()
        function()
        times.append((time.perf_counter() - started) * 1e3)
    return times


def serve(options: argparse.Namespace) -> None:
    """A side: one line in says how many calls of what, one line of JSON out has their times."""
    pipe = load(options, options.side == "there")
    for line in sys.stdin:
        what, count = line.split()
        call = (lambda: pipe.echo(TEXT)) if what == "echo" else (lambda: answer(pipe))
        print(json.dumps(timed(call, int(count))), flush=True)
    pipe.dispose()


class Side:
    """One side, in a process of its own."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        command = [sys.executable, __file__, options.model, "--dtype", options.dtype]
        if options.threads is not None:
            command += ["--threads", str(options.threads)]
        self.process = subprocess.Popen(
            [*command, "--side", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def block(self, what: str, count: int) -> float:
        """The median of some calls, without the first few, which follow the other side's."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        time.sleep(SPINNING)
        self.process.stdin.write(f"{what} {count + FIRST}\n")
        self.process.stdin.flush()
        times: list[float] = json.loads(self.process.stdout.readline())
        return statistics.median(times[FIRST:])

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def overhead(options: argparse.Namespace) -> dict[str, float]:
    sides = {name: Side(name, options) for name in SIDES}
    for side in sides.values():
        side.block("answer", 20)
    blocks: dict[str, list[float]] = {"here": [], "there": [], "echo": []}
    order, dice = list(blocks), random.Random(11)
    for _ in range(options.rounds):
        dice.shuffle(order)
        for name in order:
            what = "echo" if name == "echo" else "answer"
            side = sides["here" if name == "here" else "there"]
            blocks[name].append(side.block(what, 9))
    for side in sides.values():
        side.end()
    more = [there - here for here, there in zip(blocks["here"], blocks["there"], strict=True)]
    low, middle, high = statistics.quantiles(more, n=4)
    found = {
        "here_ms": statistics.median(blocks["here"]),
        "there_ms": statistics.median(blocks["there"]),
        "echo_ms": statistics.median(blocks["echo"]),
        "overhead_ms": middle,
        "q1": low,
        "q3": high,
    }
    print(
        f"in process {found['here_ms']:.2f} ms, isolated {found['there_ms']:.2f} ms:"
        f" {middle:.3f} ms more (quartiles {low:.3f} to {high:.3f}), echo"
        f" {found['echo_ms']:.3f} ms; bound {BOUNDS['overhead_ms']} ms"
    )
    return found


def arrays(options: argparse.Namespace) -> dict[str, float]:
    import numpy as np

    value = np.random.default_rng(7).random(8_000_000)
    with load(options, True) as pipe:
        ways, reads = [], []
        for _ in range(12):
            started = time.perf_counter()
            found = pipe.echo(value)
            ways.append((time.perf_counter() - started) / 2)
            started = time.perf_counter()
            seen = found[::512].sum()
            reads.append((time.perf_counter() - started) * 1e3)
            assert seen == value[::512].sum()
            assert found[-1] == value[-1]
            del found
    rate = value.nbytes / statistics.median(ways[2:]) / 1e9
    best = value.nbytes / min(ways) / 1e9
    read = statistics.median(reads[2:])
    print(
        f"64 MB each way: {rate:.2f} GB/s, at best {best:.2f}; bound"
        f" {BOUNDS['gigabytes_a_second']}; the first reading of all its pages {read:.1f} ms"
    )
    return {"gigabytes_a_second": rate, "best": best, "first_reading_ms": read}


def starts(options: argparse.Namespace) -> dict[str, float]:
    from ebbtide.workers.options import IsolateOptions

    found: dict[str, float] = {}
    for name, isolate in (
        ("here", False),
        ("spawn", IsolateOptions()),
        ("fork-server", IsolateOptions(start="fork-server")),
    ):
        begins, ends, sizes = [], [], []
        for _ in range(6):
            started = time.perf_counter()
            pipe = load(options, isolate)
            answer(pipe)
            begins.append((time.perf_counter() - started) * 1e3)
            sizes.append(pipe.memory.anonymous / 1e6)
            started = time.perf_counter()
            pipe.dispose()
            ends.append((time.perf_counter() - started) * 1e3)
        found |= {
            f"{name}_start_ms": statistics.median(begins[1:]),
            f"{name}_end_ms": max(ends),
            f"{name}_mb": statistics.median(sizes),
        }
        print(
            f"{name:12} first answer after {found[f'{name}_start_ms']:6.0f} ms (the first time"
            f" {begins[0]:.0f}), dispose at most {max(ends):4.0f} ms,"
            f" {found[f'{name}_mb']:.1f} MB anonymous"
        )
    return found


def kills(options: argparse.Namespace) -> dict[str, float]:
    import ebbtide

    told, again = [], []
    texts = [TEXT * 40] * 2_000
    with load(options, True) as pipe:
        for _ in range(5):
            answer(pipe)
            ended: list[float] = []

            def work(ended: list[float] = ended) -> None:
                try:
                    pipe(texts)
                except ebbtide.EbbtideError:
                    ended.append(time.perf_counter())

            thread = threading.Thread(target=work)
            thread.start()
            time.sleep(0.3)
            started = time.perf_counter()
            os.kill(pipe.pid, signal.SIGKILL)
            thread.join()
            told.append((ended[0] - started) * 1e3)
            started = time.perf_counter()
            answer(pipe)
            again.append((time.perf_counter() - started) * 1e3)
    found = {"error_after_ms": max(told), "next_answer_ms": statistics.median(again)}
    print(
        f"kill -9: the error after at most {found['error_after_ms']:.0f} ms, the next answer"
        f" {found['next_answer_ms']:.0f} ms after it"
    )
    return found


def left() -> dict[str, Any]:
    """What this process has beside its memory."""
    children: list[str] = []
    for task in Path("/proc/self/task").iterdir():
        children += (task / "children").read_text().split()
    return {
        "children": len(children),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "shared memory": len(os.listdir("/dev/shm")),
    }


def cycles(options: argparse.Namespace) -> dict[str, Any]:
    import ebbtide
    from ebbtide.workers.options import IsolateOptions

    isolate = IsolateOptions(start=options.start)
    receipts = slowest = 0
    before: dict[str, Any] = {}
    floor = 0
    for cycle in range(-5, options.cycles):
        if not cycle:
            ebbtide.memory.reclaim()
            floor, before = ebbtide.memory.anonymous_bytes(), left()
        pipe = load(options, isolate)
        answer(pipe)
        started = time.perf_counter()
        receipt = pipe.dispose()
        if cycle >= 0:
            slowest = max(slowest, round((time.perf_counter() - started) * 1e3))
            receipts += any(one.startswith("there: ") for one in receipt.reasons)
    del pipe
    ebbtide.memory.reclaim()
    drift = (ebbtide.memory.anonymous_bytes() - floor) / 1e6
    after = left()
    print(
        f"{options.cycles} cycles ({options.start}): {drift:+.2f} MB (bound"
        f" {BOUNDS['drift_mb']}), {receipts} with the child's receipt, the slowest end {slowest} ms"
        f" (bound {BOUNDS['end_ms']:.0f}); before {before}, after {after}"
    )
    return {
        "drift_mb": drift,
        "receipts": receipts,
        "slowest_end_ms": slowest,
        "left": {name: after[name] - before[name] for name in after},
    }


def anonymous_of(pid: int) -> float:
    """MB of anonymous memory that a process has, none of which it shares."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise LookupError(pid)


def a_second(pipe: Any, seconds: float) -> float:
    """Short texts a second, from several callers."""
    end = time.perf_counter() + seconds
    counts: list[int] = []

    def work() -> None:
        count = 0
        while time.perf_counter() < end:
            answer(pipe)
            count += 1
        counts.append(count)

    started = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(CALLERS)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    return sum(counts) / (time.perf_counter() - started)


def replicas(options: argparse.Namespace) -> dict[str, Any]:
    import ebbtide
    from ebbtide.workers.options import IsolateOptions

    alone = [sys.executable, "-c", NO_MODEL]
    no_model = int(subprocess.run(alone, capture_output=True, text=True, check=True).stdout) / 1e6
    with tempfile.TemporaryDirectory() as ebbtide.settings.cache_dir:
        ebbtide.settings.prepare = "now"
        sides: dict[str, Any] = {}
        for count in (1, 2, 4):
            ebbtide.settings.threads = count  # so that each has one
            sides[str(count)] = load(options, IsolateOptions(replicas=count))
            sides[str(count)].wake()
        for _ in range(40):
            answer(sides["4"])
        sizes = [anonymous_of(pid) - no_model for pid in sides["4"].pids]
        source = {one.source for one in sides["4"].memory.holdings if one.source}
        ebbtide.settings.threads = 2
        sides["in process"] = load(options, False)
        for pipe in sides.values():
            a_second(pipe, 0.5)
        rates: dict[str, list[float]] = {name: [] for name in sides}
        order, dice = list(sides), random.Random(11)
        for _ in range(max(4, options.rounds // 10)):
            dice.shuffle(order)
            for name in order:
                rates[name].append(a_second(sides[name], 0.5))
        for pipe in sides.values():
            pipe.dispose()
    found: dict[str, Any] = {"no_model_mb": no_model, "replica_mb": sizes}
    print(
        f"a process with no model {no_model:.1f} MB; each of four replicas ({', '.join(source)})"
        f" {min(sizes):.1f} to {max(sizes):.1f} MB more; bound {BOUNDS['replica_mb']:.0f} MB"
    )
    here = rates.pop("in process")
    print(f"in process, two threads: {statistics.median(here):.0f} texts a second")
    for name, there in rates.items():
        quotients = [one / two for one, two in zip(there, here, strict=True)]
        low, middle, high = statistics.quantiles(quotients, n=4)
        found[f"replicas_{name}"] = {"a_second": statistics.median(there), "quotient": middle}
        print(
            f"{name} of one thread: {statistics.median(there):.0f} a second, {middle:.2f} times"
            f" (quartiles {low:.2f} to {high:.2f})"
            + (f"; bound {BOUNDS['two_replicas']}" if name == "2" else "")
        )
    return found


def main() -> None:
    # What is measured is the original: a prepared copy that is there by chance is not used.
    os.environ.update(EBBTIDE_PREPARE="off", EBBTIDE_CACHE_DIR="no-store")
    questions: dict[str, Callable[[argparse.Namespace], Any]] = {
        "overhead": overhead, "arrays": arrays, "starts": starts, "kills": kills, "cycles": cycles,
        "replicas": replicas,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--threads", type=int, help="threads of a run; by default all CPUs")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--cycles", type=int, default=300)
    parser.add_argument("--start", default="spawn", choices=("spawn", "fork-server"))
    parser.add_argument("--only", default=",".join(questions))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve(options)
        return
    print(json.dumps({name: questions[name](options) for name in options.only.split(",")}))


if __name__ == "__main__":
    main()
