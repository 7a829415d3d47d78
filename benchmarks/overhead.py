"""What does a call through a pipeline cost, beside the same model by hand?

    python benchmarks/overhead.py MODEL [--dtype fp32] [--rounds 400] [--block 4] [--threads N]

MODEL is a folder or an installed model. One short text goes to a vector, mean pooled and
normalised, by five sides, each in a process of its own:

- ebbtide: `pipe(text, pooling="mean", normalize=True)`
- async: `await pipe.acall(...)` on an event loop
- inline: the same pipeline, its calls told that they are on a native thread already, so that
  nothing is handed over
- same: `tokenizer.encode`, `session.run` and numpy by hand, on the calling thread, with a session
  set up as Ebbtide sets up its own
- defaults: the same with a session as ONNX Runtime makes it when nobody says anything

They take turns in small blocks of calls, of which the first is not counted, since it follows the
other sides'. A round's ratio is that of the blocks' medians; over the rounds the median ratio is
given with its quartiles and its 95% interval (2,000 resamples). The parts of a call are then timed
one by one, in the ebbtide process. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TEXT = "The tide goes out and leaves the boats."
BOUND = 1.10
SIDES = ("ebbtide", "async", "inline", "same", "defaults")


class ByHand:
    """onnxruntime, tokenizers and numpy, without a pipeline.

    Args:
        model: The model.
        dtype: Which of its files.
        defaults: Whether the session is made as ONNX Runtime makes it unasked.
        threads: Threads of a run.
    """

    def __init__(self, model: str, dtype: str, defaults: bool, threads: int | None) -> None:
        import onnxruntime
        import tokenizers

        from ebbtide.hub import resolve
        from ebbtide.runtime import cpu_count
        from ebbtide.runtime.dtypes import SUFFIXES

        files = resolve(model, task="feature-extraction", default=model)
        self.tokenizer = tokenizers.Tokenizer.from_file(str(files.need("tokenizer.json", "")))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(512)
        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        if not defaults:
            options.intra_op_num_threads = threads or cpu_count()
            options.inter_op_num_threads = 1
            options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        self.session = onnxruntime.InferenceSession(
            str(files.need(f"onnx/model{SUFFIXES[dtype]}.onnx", "")),
            options,
            providers=["CPUExecutionProvider"],
        )
        self.output = self.session.get_outputs()[0].name
        self.typed = any(one.name == "token_type_ids" for one in self.session.get_inputs())

    def feeds(self) -> dict[str, Any]:
        """Tokenise."""
        encoding = self.tokenizer.encode(TEXT)
        feeds = {
            "input_ids": np.array([encoding.ids], np.int64),
            "attention_mask": np.array([encoding.attention_mask], np.int64),
        }
        if self.typed:
            feeds["token_type_ids"] = np.array([encoding.type_ids], np.int64)
        return feeds

    def vector(self, hidden: Any, mask: Any) -> Any:
        """Mean pooling, and length 1."""
        weights = mask[:, :, None].astype(hidden.dtype)
        mean = (hidden * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), 1e-9)
        return mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)

    def call(self) -> Any:
        """The whole of it."""
        feeds = self.feeds()
        hidden = self.session.run([self.output], feeds)[0]
        return self.vector(hidden, feeds["attention_mask"])


def block_of(call: Callable[[], Any], count: int) -> list[float]:
    """Microseconds of each call."""
    times = []
    for _ in range(count):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e6)
    return times


class Side:
    """One side, in this process."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.name, model, dtype = options.side, options.model, options.dtype
        name = self.name
        if name in ("same", "defaults"):
            self.call = ByHand(model, dtype, name == "defaults", options.threads).call
            return
        import ebbtide
        from ebbtide.cancellation import own_thread

        pipe: Any = ebbtide.pipeline(
            "feature-extraction", model, dtype=dtype, session_options={"threads": options.threads}
        )
        self.pipe = pipe
        self.call = lambda: pipe(TEXT, pooling="mean", normalize=True)
        own_thread.is_own = name == "inline"
        self.runner = asyncio.Runner() if name == "async" else None

    def block(self, count: int) -> list[float]:
        """Some calls, one after another."""
        if self.name == "async":
            assert self.runner is not None
            return self.runner.run(self._block(count))
        return block_of(self.call, count)

    async def _block(self, count: int) -> list[float]:
        times = []
        for _ in range(count):
            started = time.perf_counter()
            await self.pipe.acall(TEXT, pooling="mean", normalize=True)
            times.append((time.perf_counter() - started) * 1e6)
        return times

    def vector(self, _: int) -> list[float]:
        """What the side computes, to be compared."""
        if self.name == "async":
            assert self.runner is not None
            found = self.runner.run(self.pipe.acall(TEXT, pooling="mean", normalize=True))
        else:
            found = self.call()
        row: list[float] = found[0].tolist()
        return row

    def parts(self, rounds: int) -> dict[str, float]:
        """Medians of the parts of a call, in microseconds, all in turns."""
        from ebbtide.cancellation import CancelToken, own_thread
        from ebbtide.memory.ledger import activity
        from ebbtide.pipelines import pooling
        from ebbtide.runtime import native_threads

        hand = ByHand(self.options.model, self.options.dtype, False, self.options.threads)
        pipe = self.pipe
        encoder = pipe._model
        session = encoder._session.value.native
        native = session._native
        lifecycle = pipe._lifecycle
        feeds = hand.feeds()
        mask = feeds["attention_mask"]
        batch = pipe.tokenizer.batch([TEXT])
        (hidden,) = encoder.forward(batch, CancelToken("part"))

        def nothing() -> None:
            return None

        def handed(work: Callable[[], Any]) -> Any:
            return native_threads.submit(work, CancelToken("part"), nothing).wait()

        def here() -> Any:
            own_thread.is_own = True
            try:
                return self.call()
            finally:
                own_thread.is_own = False

        def let_in() -> None:
            token = CancelToken("part")
            lifecycle.enter(token)
            lifecycle.leave(token)

        def raw_run() -> Any:
            return native.run([hand.output], feeds)

        steps: dict[str, Callable[[], Any]] = {
            "the whole call": self.call,
            "the whole call, not handed over": here,
            "session.run alone, calling thread": raw_run,
            "session.run alone, native thread": lambda: handed(raw_run),
            "handover of nothing": lambda: handed(nothing),
            "charging: window and two reads": lambda: activity.begin().measure().close(),
            "options checked": lambda: pipe._options("mean", True, False, "binary", 32),
            "let in and out": let_in,
            "tokens to arrays": lambda: pipe.tokenizer.batch([TEXT]),
            "tokens to arrays, by hand": hand.feeds,
            "run, what is around session.run": lambda: encoder.forward(batch, CancelToken("part")),
            "pooled and normalised": lambda: pooling.normalize(pooling.mean(hidden, mask)),
            "pooled and normalised, by hand": lambda: hand.vector(hidden, mask),
        }
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                times[name] += block_of(step, 3)[1:]
        found = {name: statistics.median(values) for name, values in times.items()}
        # Around session.run there is little; it is the difference of two long times, call by call.
        pairs = zip(
            times["run, what is around session.run"],
            times["session.run alone, calling thread"],
            strict=True,
        )
        found["run, what is around session.run"] = statistics.median(a - b for a, b in pairs)
        return found


def serve(options: argparse.Namespace) -> None:
    """A child: one line in says what to do, one line of JSON out says what came of it."""
    side = Side(options)
    for line in sys.stdin:
        what, _, count = line.strip().partition(" ")
        steps: dict[str, Callable[[int], object]] = {
            "block": side.block, "parts": side.parts, "vector": side.vector,
        }  # fmt: skip
        print(json.dumps(steps[what](int(count))), flush=True)


class Child:
    """One side, in a process of its own."""

    def __init__(self, side: str, options: argparse.Namespace) -> None:
        command = [
            sys.executable, __file__, options.model, "--dtype", options.dtype, "--side", side,
        ]  # fmt: skip
        if options.threads is not None:
            command += ["--threads", str(options.threads)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, what: str, count: int) -> Any:
        """Have it done, and wait for what came of it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{what} {count}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        """Let it end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles, and the median's 95% interval by resampling."""
    dice = random.Random(7)
    low, _, high = statistics.quantiles(values, n=4)
    again = sorted(statistics.median(dice.choices(values, k=len(values))) for _ in range(2_000))
    return {
        "median": statistics.median(values), "q1": low, "q3": high,
        "from": again[50], "to": again[-50],
    }  # fmt: skip


def compare(options: argparse.Namespace) -> dict[str, Any]:
    sides = {name: Child(name, options) for name in SIDES}
    vectors = {name: np.array(side.ask("vector", 1)) for name, side in sides.items()}
    for name, vector in vectors.items():
        assert np.abs(vector - vectors["same"]).max() < 1e-3, f"{name} gives another vector"
    for side in sides.values():
        side.ask("block", 20)
    blocks: dict[str, list[float]] = {name: [] for name in SIDES}
    order = list(SIDES)
    dice = random.Random(11)
    for _ in range(options.rounds):
        dice.shuffle(order)
        for name in order:
            blocks[name].append(statistics.median(sides[name].ask("block", options.block + 1)[1:]))
    print(f"{'':10}{'us a call':>12}{'beside same':>34}{'beside defaults':>34}")
    result: dict[str, Any] = {}
    for name, times in blocks.items():
        line: dict[str, Any] = {"us": statistics.median(times)}
        cells = ""
        for base in ("same", "defaults"):
            ratio = spread([a / b for a, b in zip(times, blocks[base], strict=True)])
            line[f"beside_{base}"] = ratio
            cell = f"{ratio['median']:.3f} [{ratio['from']:.3f}, {ratio['to']:.3f}]"
            quartiles = f"({ratio['q1']:.2f}-{ratio['q3']:.2f})"
            cells += f"{cell} {quartiles}".rjust(34)
        result[name] = line
        print(f"{name:10}{line['us']:12.0f}{cells}")
    print("median ratio [its 95% interval] (quartiles of the rounds)")
    ratio = result["ebbtide"]["beside_same"]["median"]
    print(f"bound {BOUND:.2f}: {'met' if ratio <= BOUND else 'NOT met'} ({ratio:.3f})")
    print("\nparts of a call, microseconds")
    result["parts"] = sides["ebbtide"].ask("parts", max(50, options.rounds // 2))
    for name, value in result["parts"].items():
        print(f"{name:40}{value:10.1f}")
    for side in sides.values():
        side.end()
    return result


def main() -> None:
    # What is measured is the original: a prepared copy that is there by chance is not used.
    os.environ.update(EBBTIDE_PREPARE="off", EBBTIDE_CACHE_DIR="no-store")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--block", type=int, default=4)
    parser.add_argument("--threads", type=int, help="threads of a run; by default all CPUs")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve(options)
        return
    threads = "all CPUs" if options.threads is None else f"threads: {options.threads}"
    print(
        f"{Path(options.model).name} in {options.dtype}, {threads}, {len(TEXT.split())} words,"
        f" {options.rounds} rounds of {options.block} calls"
    )
    print(json.dumps(compare(options)))


if __name__ == "__main__":
    main()
