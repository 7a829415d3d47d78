"""What does length-aware batching gain, and what does a batch do to a quantised model's result?

    python benchmarks/batching.py MODEL [--threads 2] [--rounds 9] [--dtype fp32] [--quantised int8]

MODEL is a folder or an installed model, with a file in both dtypes. Everything runs in one process,
in turns, and what is compared is the ratio of one round, so that a machine's mood is in both; over
the rounds the median is given, with the quartiles.

- mixed: 64 texts of 1 to 25 sentences to pooled vectors, by a pipeline over the prepared model and
  by hand (tokenizers, onnxruntime with its defaults, one padded batch).
- short: one short text, by a pipeline and by hand.
- budgets: the runs alone, of 256 such texts, in batches of so many tokens, beside one by one.
- quantised: the same 64 texts on the quantised file, in four kinds of batches: how far a vector of
  length 1 is from the one its text gives alone, and the time.

A speed above 1 is faster than what it is compared with. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import ebbtide
from ebbtide.hub import resolve
from ebbtide.models.batching import batches
from ebbtide.runtime.dtypes import SUFFIXES

SENTENCES = (
    "The tide goes out and leaves the boats of the harbour lying on their sides.",
    "Nobody is in a hurry.",
    "At six in the evening the water comes back through the channel, first slowly and then all at"
    " once, and lifts one boat after another.",
    "Gulls wait on the posts.",
    "Why does the sea return twice a day, and why is it a little later every day?",
    "The harbour master writes the height of the water into a book.",
)
SHORT = "The tide goes out and leaves the boats."
BUDGETS = (512, 1024, 2048, 4096, 8192, 16384)
MANY = 1 << 30

Feeds = dict[str, Any]


def texts(count: int) -> list[str]:
    """Texts of 1 to 25 sentences, every number as often."""
    dice = random.Random(7)
    sizes = [1 + number % 25 for number in range(count)]
    dice.shuffle(sizes)
    return [" ".join(dice.choices(SENTENCES, k=size)) for size in sizes]


class ByHand:
    """onnxruntime, tokenizers and numpy, without a pipeline."""

    def __init__(self, model: str, dtype: str, threads: int) -> None:
        import onnxruntime
        import tokenizers

        files = resolve(model, task="feature-extraction", default=model)
        self.tokenizer = tokenizers.Tokenizer.from_file(str(files.need("tokenizer.json", "")))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(512)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            str(files.need(f"onnx/model{SUFFIXES[dtype]}.onnx", "")),
            options,
            providers=["CPUExecutionProvider"],
        )
        self.output = self.session.get_outputs()[0].name
        self.takes = {one.name for one in self.session.get_inputs()}

    def feeds(self, encodings: Sequence[Any]) -> Feeds:
        """A padded batch."""
        width = max(len(one.ids) for one in encodings)
        arrays = {
            "input_ids": np.zeros((len(encodings), width), np.int64),
            "attention_mask": np.zeros((len(encodings), width), np.int64),
            "token_type_ids": np.zeros((len(encodings), width), np.int64),
        }
        for row, one in enumerate(encodings):
            arrays["input_ids"][row, : len(one.ids)] = one.ids
            arrays["attention_mask"][row, : len(one.ids)] = 1
        return {name: array for name, array in arrays.items() if name in self.takes}

    def vectors(self, feeds: Feeds) -> Any:
        """Mean pooled vectors."""
        hidden = self.session.run([self.output], feeds)[0]
        weights = feeds["attention_mask"][:, :, None].astype(hidden.dtype)
        return (hidden * weights).sum(axis=1) / weights.sum(axis=1)

    def call(self, given: Sequence[str]) -> Any:
        """All of it, in one batch."""
        return self.vectors(self.feeds([self.tokenizer.encode(one) for one in given]))


def in_turns(
    sides: Mapping[str, Callable[[], object]], rounds: int, calls: int = 1
) -> dict[str, list[float]]:
    """Seconds of each side's calls, a round's median each; the first call of a turn is for nothing.

    It follows another side's, whose threads still spin and whose data is in the caches.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        order = list(sides.items())
        for name, side in order if number % 2 else reversed(order):
            side()
            block = []
            for _ in range(calls):
                started = time.perf_counter()
                side()
                block.append(time.perf_counter() - started)
            times[name].append(statistics.median(block))
    return times


def ratios(over: Sequence[float], under: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of the rounds' ratios."""
    found = sorted(a / b for a, b in zip(over, under, strict=True))
    low, middle, high = statistics.quantiles(found, n=4) if len(found) > 1 else found * 3
    return low, middle, high


def shown(name: str, found: tuple[float, float, float], seconds: float) -> str:
    low, middle, high = found
    return f"  {name:<34}{middle:6.2f}   ({low:.2f} to {high:.2f}){seconds * 1e3:>12.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--quantised", default="int8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=("mixed", "short", "budgets", "quantised"))
    options = parser.parse_args()
    parts = {"mixed": mixed, "short": short, "budgets": budgets, "quantised": quantised}
    result = {name: part(options) for name, part in parts.items() if options.only in (None, name)}
    print(json.dumps(result))


def pipeline(options: argparse.Namespace, dtype: str) -> Any:
    return ebbtide.pipeline(
        "feature-extraction",
        options.model,
        dtype=dtype,
        session_options={"threads": options.threads},
        prepare="now",
    )


def mixed(options: argparse.Namespace) -> object:
    given = texts(64)
    hand = ByHand(options.model, options.dtype, options.threads)
    with pipeline(options, options.dtype) as pipe:
        sides: dict[str, Callable[[], object]] = {
            "hand": lambda: hand.call(given),
            "list": lambda: pipe(given, pooling="mean"),
            "stream": lambda: list(pipe(iter(given), pooling="mean", window=64)),
            "one by one": lambda: list(pipe(iter(given), pooling="mean")),
        }
        apart = float(np.abs(hand.call(given) - pipe(given, pooling="mean")).max())
        times = in_turns(sides, options.rounds)
    print(f"64 mixed texts, {options.dtype}: speed beside one padded batch by hand")
    found: dict[str, object] = {"apart": apart}
    for name in ("list", "stream", "one by one"):
        speed = ratios(times["hand"], times[name])
        print(shown(name, speed, statistics.median(times[name])))
        found[name] = speed
    print(f"  by hand {statistics.median(times['hand']) * 1e3:.1f} ms; outputs {apart:.1e} apart")
    return found


def short(options: argparse.Namespace) -> object:
    hand = ByHand(options.model, options.dtype, options.threads)
    with pipeline(options, options.dtype) as pipe:
        sides: dict[str, Callable[[], object]] = {
            "hand": lambda: hand.call([SHORT]),
            "pipeline": lambda: pipe(SHORT, pooling="mean"),
        }
        times = in_turns(sides, options.rounds * 20, calls=9)
    speed = ratios(times["hand"], times["pipeline"])
    print(f"one short text, {options.dtype}: speed beside tokenizer and session by hand")
    print(shown("pipeline", speed, statistics.median(times["pipeline"])))
    return speed


def budgets(options: argparse.Namespace) -> object:
    hand = ByHand(options.model, options.dtype, options.threads)
    encodings = [hand.tokenizer.encode(one) for one in texts(256)]
    lengths = [len(one.ids) for one in encodings]
    plans = {str(budget): batches(lengths, tokens=budget) for budget in BUDGETS}
    plans["one by one"] = batches(lengths, size=1)
    fed = {
        name: [hand.feeds([encodings[place] for place in places]) for places in plan]
        for name, plan in plans.items()
    }

    def side(name: str) -> Callable[[], object]:
        return lambda: [hand.session.run([hand.output], feeds) for feeds in fed[name]]

    times = in_turns({name: side(name) for name in plans}, options.rounds)
    print(f"256 mixed texts, {options.dtype}: speed of the runs by tokens of a batch, beside 2048")
    found = {}
    for name, plan in plans.items():
        padded = sum(feeds["input_ids"].size for feeds in fed[name])
        found[name] = ratios(times["2048"], times[name])
        row = shown(name, found[name], statistics.median(times[name]))
        print(f"{row}{len(plan):>6} runs, {padded / sum(lengths) - 1:.1%} padding")
    return found


def quantised(options: argparse.Namespace) -> object:
    hand = ByHand(options.model, options.quantised, options.threads)
    encodings = [hand.tokenizer.encode(one) for one in texts(64)]
    lengths = [len(one.ids) for one in encodings]
    equal: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        equal.setdefault(length, []).append(place)
    plans = {
        "one padded batch": batches(lengths, size=len(lengths)),
        "sorted, 2048 tokens": batches(lengths),
        "of equal length": list(equal.values()),
        "one by one": batches(lengths, size=1),
    }
    fed = {
        name: [hand.feeds([encodings[place] for place in places]) for places in plan]
        for name, plan in plans.items()
    }

    def run(name: str) -> Any:
        found = np.concatenate([hand.vectors(feeds) for feeds in fed[name]])
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        order = np.argsort([place for places in plans[name] for place in places])
        return found[order]

    def side(name: str) -> Callable[[], object]:
        return lambda: run(name)

    alone = run("one by one")
    times = in_turns({name: side(name) for name in plans}, options.rounds)
    print(f"64 mixed texts, {options.quantised}: speed beside one by one, and distance to alone")
    found = {}
    for name in plans:
        apart = np.linalg.norm(run(name) - alone, axis=1)
        speed = ratios(times["one by one"], times[name])
        row = shown(name, speed, statistics.median(times[name]))
        print(f"{row}   mean {apart.mean():.1e}, at most {apart.max():.1e}")
        found[name] = {"speed": speed, "mean": float(apart.mean()), "most": float(apart.max())}
    return found


if __name__ == "__main__":
    main()
