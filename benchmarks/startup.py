"""What does importing Ebbtide cost a process, and what does the first pipeline?

    python benchmarks/startup.py MODEL [--dtype fp32] [--rounds 30] [--pipelines 10]

MODEL is a folder or an installed model. Every figure comes from a fresh process, and the stages
take turns, round by round:

- bare: nothing, as `python -c pass`
- package: `import ebbtide`
- name: `from ebbtide import pipeline`, which loads what a pipeline needs
- by hand: onnxruntime and tokenizers imported, a session and a tokenizer made
- first: the first pipeline made

Time is from the process's start, as its parent sees it, until the stage is done (*ready*) and until
the process has ended; *CPU* is what the process used of all processors, which other work on the
machine disturbs least. Memory is what the kernel says then, in MB of 1,000,000 bytes. Each stage is
set against the bare process of its own round; medians with quartiles. Compiled bytecode is kept in
a folder of the benchmark's own, filled before anything is timed, as an installed package has it:
where Python writes none, compiling is most of an import. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BOUND_MS = 30.0
BOUND_MB = 3.0

TELL = """
import sys, time
ready = time.perf_counter()
with open("/proc/self/status") as file:
    status = file.read()
print(ready)
print(*sys.modules)
print(status)
"""
"""What every stage ends in: the system-wide clock, what is loaded, and the memory."""

COLUMNS = {
    "ready_ms": "ready ms",
    "ended_ms": "ended ms",
    "cpu_ms": "CPU ms",
    "anonymous_mb": "anonymous MB",
    "resident_mb": "resident MB",
}


def stages(options: argparse.Namespace) -> dict[str, str]:
    """The code of each stage."""
    from ebbtide.hub import resolve
    from ebbtide.runtime.dtypes import SUFFIXES

    files = resolve(options.model, task="feature-extraction", default=options.model)
    graph = str(files.need(f"onnx/model{SUFFIXES[options.dtype]}.onnx", ""))
    vocabulary = str(files.need("tokenizer.json", ""))
    return {
        "bare": "pass",
        "package": "import ebbtide",
        "name": "from ebbtide import pipeline",
        "by hand": "import onnxruntime, tokenizers\n"
        f"session = onnxruntime.InferenceSession({graph!r})\n"
        f"tokenizer = tokenizers.Tokenizer.from_file({vocabulary!r})",
        "first": "from ebbtide import pipeline\n"
        f"pipe = pipeline('feature-extraction', {options.model!r}, dtype={options.dtype!r})",
    }


def cpu_of_children() -> float:
    """Seconds that the processes which have ended used."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def once(code: str, environment: dict[str, str]) -> tuple[dict[str, float], list[str]]:
    """One fresh process: its figures, and the modules it had loaded."""
    used = cpu_of_children()
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code + TELL],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=environment,
    )
    ended = time.perf_counter()
    ready, modules, status = done.stdout.split("\n", 2)
    sizes = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)

    def megabytes(name: str) -> float:
        return int(sizes[name].split()[0]) * 1024 / 1e6

    found = {
        "ready_ms": (float(ready) - started) * 1e3,
        "ended_ms": (ended - started) * 1e3,
        "cpu_ms": (cpu_of_children() - used) * 1e3,
        "anonymous_mb": megabytes("RssAnon"),
        "resident_mb": megabytes("VmRSS"),
    }
    return found, modules.split()


def middle(values: list[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(values, n=4)
    return {"median": statistics.median(values), "q1": low, "q3": high}


def show(name: str, line: dict[str, dict[str, float]]) -> None:
    cells = ""
    for column in COLUMNS:
        one = line[column]
        cells += f"{one['median']:.1f} ({one['q1']:.1f}-{one['q3']:.1f})".rjust(25)
    print(f"{name:10}{cells}")


def compare(options: argparse.Namespace, environment: dict[str, str]) -> None:
    codes = stages(options)
    loaded: dict[str, list[str]] = {}
    for name, code in codes.items():
        loaded[name] = once(code, environment)[1]  # and what is read from disk is cached now
    bare: dict[str, list[float]] = {column: [] for column in COLUMNS}
    added: dict[str, dict[str, list[float]]] = {
        name: {column: [] for column in COLUMNS} for name in codes if name != "bare"
    }
    for number in range(options.rounds):
        ground = once(codes["bare"], environment)[0]
        for column in COLUMNS:
            bare[column].append(ground[column])
        for name, found in added.items():
            if name in ("by hand", "first") and number >= options.pipelines:
                continue
            figures = once(codes[name], environment)[0]
            for column in COLUMNS:
                found[column].append(figures[column] - ground[column])
    lines = {
        name: {column: middle(values) for column, values in found.items()}
        for name, found in {"bare": bare, **added}.items()
    }
    print(f"{Path(options.model).name} in {options.dtype}, {options.rounds} rounds")
    print(" " * 10 + "".join(title.rjust(25) for title in COLUMNS.values()))
    show("bare", lines["bare"])
    print("added to it:")
    for name in added:
        show(name, lines[name])
    result: dict[str, Any] = {"lines": lines, "modules": {}}
    for name in ("package", "name"):
        new = sorted(set(loaded[name]) - set(loaded["bare"]))
        heavy = [one for one in ("numpy", "onnxruntime", "tokenizers") if one in new]
        own = [one for one in new if one.partition(".")[0] == "ebbtide"]
        result["modules"][name] = {"count": len(new), "own": own, "heavy": heavy}
        print(f"{name}: {len(new)} modules more, {len(own)} of them Ebbtide's;"
              f" heavy ones: {', '.join(heavy) or 'none'}")  # fmt: skip
    cost = lines["package"]
    met = (
        cost["ready_ms"]["median"] <= BOUND_MS
        and cost["anonymous_mb"]["median"] <= BOUND_MB
        and cost["resident_mb"]["median"] <= BOUND_MB
        and not result["modules"]["package"]["heavy"]
    )
    print(
        f"import ebbtide within {BOUND_MS:.0f} ms and {BOUND_MB:.0f} MB: {'yes' if met else 'NO'}"
    )
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--pipelines", type=int, default=10, help="rounds that load a model too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as bytecode:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        compare(options, environment)


if __name__ == "__main__":
    main()
