"""Does the memory of generations come back, however they end? 500 of them, of changing length.

    python benchmarks/abandoned.py MODEL [--dtype D] [--count 500] [--words 300] [--new 24]

MODEL is a folder or an id on the hub. A third of the generations are cancelled by another thread, a
third are streams whose reader walks away, a third end with an error in the caller's own processor.
Prompts have 5 words and more. Anonymous memory is read from the kernel after the first tenth and
after each further one, in MB of 1,000,000 bytes. Then, ten times, a pipeline is disposed with
``cancel=True`` in the middle of a generation: how many tokens came after that, and how long it
took. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import threading
import time
from typing import Any

import ebbtide
from ebbtide.memory import anonymous_bytes, reclaim

WORDS = [
    "the",
    "tide",
    "goes",
    "out",
    "and",
    "leaves",
    "the",
    "boats",
    "of",
    "the",
    "harbour",
    "lying",
    "on",
    "their",
    "sides",
]


class _MineError(Exception):
    """The caller's own."""


def prompt(dice: random.Random, words: int) -> str:
    return " ".join(dice.choices(WORDS, k=dice.randint(5, words)))


def cancelled(pipe: Any, text: str, new: int, at: int) -> None:
    """Another thread cancels it after some tokens."""
    reached = threading.Event()
    count = 0

    def told(ids: Any, scores: Any) -> Any:
        nonlocal count
        count += 1
        if count == at:
            reached.set()
        return scores

    def stop() -> None:
        reached.wait()
        for token in tuple(pipe._lifecycle.running):
            token.cancel()

    canceller = threading.Thread(target=stop)
    canceller.start()
    try:
        with contextlib.suppress(ebbtide.PipelineCancelledError):
            pipe(text, max_new_tokens=new, logits_processor=[told])
    finally:
        reached.set()
        canceller.join()


def abandoned(pipe: Any, text: str, new: int, at: int) -> None:
    pieces = pipe.stream(text, max_new_tokens=new)
    for _ in range(at):
        if next(pieces, None) is None:
            break
    pieces.close()


def failing(pipe: Any, text: str, new: int, at: int) -> None:
    count = 0

    def fails(ids: Any, scores: Any) -> Any:
        nonlocal count
        count += 1
        if count == at:
            raise _MineError
        return scores

    with contextlib.suppress(_MineError):
        pipe(text, max_new_tokens=new, logits_processor=[fails])


def disposed(load: Any, new: int) -> tuple[int, float]:
    """Tokens that came once a dispose had been asked for, and its seconds."""
    pipe = load()
    count, late = 0, 0
    reached = threading.Event()

    def told(ids: Any, scores: Any) -> Any:
        nonlocal count, late
        count += 1
        late += any(token.cancelled for token in tuple(pipe._lifecycle.running))
        if count == 3:
            reached.set()
        return scores

    def write() -> None:
        with contextlib.suppress(ebbtide.EbbtideError):
            pipe("the tide", max_new_tokens=new, min_new_tokens=new, logits_processor=[told])
        reached.set()

    writer = threading.Thread(target=write)
    writer.start()
    reached.wait()
    begun = time.perf_counter()
    pipe.dispose(cancel=True)
    seconds = time.perf_counter() - begun
    writer.join()
    return late, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--dtype")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--words", type=int, default=300, help="of a prompt, at most")
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--prepare", default=False)
    given = parser.parse_args()

    def load() -> Any:
        return ebbtide.pipeline(
            "text-generation", given.model, dtype=given.dtype, prepare=given.prepare
        )

    dice = random.Random(0)
    ways = (cancelled, abandoned, failing)
    read = []
    with load() as pipe:
        for number in range(given.count):
            ways[number % 3](
                pipe, prompt(dice, given.words), given.new, dice.randint(1, given.new - 1)
            )
            if (number + 1) % max(1, given.count // 10) == 0:
                reclaim()
                read.append(anonymous_bytes())
                print(f"{number + 1:5}  {read[-1] / 1e6:8.2f} MB", flush=True)
        cache = pipe.memory.cache
    drift = read[-1] - read[0]
    ends = [disposed(load, 100) for _ in range(10)]
    late, longest = max(one for one, _ in ends), max(seconds for _, seconds in ends)
    print(f"drift {drift / 1e6:+.2f} MB; cache left {cache} bytes")
    print(f"dispose: at most {late} tokens after it, {longest * 1e3:.0f} ms")
    print(json.dumps({"drift": drift, "cache": cache, "late": late, "seconds": longest}))


if __name__ == "__main__":
    main()
