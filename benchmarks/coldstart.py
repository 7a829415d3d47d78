"""How long does a process take that starts, loads a model, embeds one sentence and ends?

    python benchmarks/coldstart.py MODEL [--dtype fp32] [--rounds 40]

MODEL is a folder. Four sides, each a new process a round, in turns:

- ebbtide: `import ebbtide`, a pipeline over the prepared model, one call, `dispose()`
- left: the same without the `dispose()`, which the interpreter's exit then does
- original: as ebbtide, over the original file
- raw: onnxruntime, tokenizers and numpy by hand, on the original file

A side's time is that of the whole process, seen from outside; the process itself tells its steps.
Ratios are of medians, with a 95% interval (2,000 resamples). The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TEXT = "The tide goes out and leaves the boats."
SUFFIXES = {"fp32": "", "int8": "_int8"}
STEPS = ("python", "imports", "tokenizer and session", "call", "dispose", "exit")

EBBTIDE = """
import json, os, time
begun = time.time()
import ebbtide
{prepare}
imported = time.time()
pipe = ebbtide.pipeline("feature-extraction", {model!r}, dtype={dtype!r},
    session_options={{"threads": 2}})
loaded = time.time()
vector = pipe({text!r}, pooling="mean", normalize=True)
called = time.time()
{dispose}
print(json.dumps([begun, imported, loaded, called, time.time()]), flush=True)
"""

RAW = """
import json, time
begun = time.time()
import numpy as np, onnxruntime, tokenizers
imported = time.time()
tokenizer = tokenizers.Tokenizer.from_file({model!r} + "/tokenizer.json")
tokenizer.no_padding()
tokenizer.enable_truncation(256)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 2
session = onnxruntime.InferenceSession({model!r} + "/onnx/model{suffix}.onnx", options,
    providers=["CPUExecutionProvider"])
loaded = time.time()
ids = np.array([tokenizer.encode({text!r}).ids])
feeds = {{"input_ids": ids, "attention_mask": np.ones_like(ids),
    "token_type_ids": np.zeros_like(ids)}}
names = [one.name for one in session.get_inputs()]
states = session.run(None, {{name: feeds[name] for name in names}})[0]
vector = states.mean(axis=1)
vector /= np.linalg.norm(vector)
called = time.time()
print(json.dumps([begun, imported, loaded, called, time.time()]), flush=True)
"""


def once(script: str, environment: dict[str, str]) -> list[float]:
    """Seconds of each step of one process, and of the whole last."""
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    ended = time.time()
    if done.returncode:
        raise SystemExit(done.stderr)
    marks = [started, *json.loads(done.stdout.splitlines()[-1]), ended]
    return [b - a for a, b in itertools.pairwise(marks)] + [ended - started]


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Of medians, with its 95 % interval."""
    chance = random.Random(0)
    found = sorted(
        statistics.median(chance.choices(ours, k=len(ours)))
        / statistics.median(chance.choices(theirs, k=len(theirs)))
        for _ in range(2000)
    )
    middle = statistics.median(ours) / statistics.median(theirs)
    return f"{middle:.3f} [{found[50]:.3f}, {found[1949]:.3f}]"


def main() -> None:
    """Run the sides in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="fp32", choices=SUFFIXES)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    given = {"model": str(options.model), "dtype": options.dtype, "text": TEXT}
    ebbtide = EBBTIDE.format(**given, prepare="", dispose="pipe.dispose()")
    scripts = {
        "ebbtide": ebbtide,
        "left": EBBTIDE.format(**given, prepare="", dispose=""),
        "original": ebbtide,
        "raw": RAW.format(**given, suffix=SUFFIXES[options.dtype]),
    }
    found: dict[str, list[list[float]]] = {name: [] for name in scripts}
    with tempfile.TemporaryDirectory() as store, tempfile.TemporaryDirectory() as empty:
        base = {**os.environ, "EBBTIDE_PREPARE": "off"}
        first = ebbtide.replace("import ebbtide", "import ebbtide; ebbtide.settings.prepare='now'")
        once(first, {**base, "EBBTIDE_CACHE_DIR": store})
        for _ in range(options.rounds):
            order = list(scripts)
            random.shuffle(order)
            for name in order:
                cache = empty if name == "original" else store
                found[name].append(once(scripts[name], {**base, "EBBTIDE_CACHE_DIR": cache}))
    print(f"{options.model.name} in {options.dtype}: medians in ms over {options.rounds} processes")
    print(f"{'':10}{'whole':>8}  " + "  ".join(STEPS))
    raw = [one[-1] for one in found["raw"]]
    for name, rounds in found.items():
        *steps, whole = (statistics.median(column) * 1e3 for column in zip(*rounds, strict=True))
        parts = "  ".join(
            f"{value:{len(step)}.0f}" for step, value in zip(STEPS, steps, strict=True)
        )
        print(f"{name:10}{whole:8.0f}  {parts}  to raw {ratio([one[-1] for one in rounds], raw)}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
