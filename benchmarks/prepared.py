"""What does a prepared model take and cost, beside raw onnxruntime on the original file?

    python benchmarks/prepared.py MODEL [--dtype fp32] [--rounds 15] [--parts session,many,...]

MODEL is a folder: a text encoder, or for the part ``session`` any decoder whose inputs are tokens,
a mask, positions and a past. Both sides use two threads; each is a process of its own, and they
take turns. Attention is not fused here, so that both sides run one graph in one way: what fusing
gives is in `generation.py`. The parts:

- session: bytes of anonymous memory of a live session that has run and is idle, above the same
  process without it (the tokenizer is loaded before, on both sides); time to load it; time to run.
  raw's memory is given as it is, and after a `malloc_trim` that its user would have to know of.
- pipeline: the same of the whole pipeline, and `wake()` beside the first load of the original.
- many: twenty pipelines over twenty different models (copies with other weights), live and warm.
- processes: four processes that hold the same model: private bytes above the same without it.

Ratios are Ebbtide to raw, of medians, with a 95% interval (2,000 resamples). The last line is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

THREADS = 2
TEXTS = ["The tide goes out and leaves the boats.", "What did the sea return? " * 12]
PROMPT, STEPS = 32, 8
MANY, PROCESSES = 20, 4
IDLE = 1.6
SUFFIXES = {"fp32": "", "int8": "_int8", "q8": "_quantized", "q4": "_q4", "fp16": "_fp16"}


def anonymous() -> float:
    """Anonymous MB of this process."""
    return _rollup("Anonymous")


def private() -> float:
    """Private MB of this process: what ends with it."""
    return _rollup("Private_Clean") + _rollup("Private_Dirty")


def _rollup(name: str) -> float:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise LookupError(name)


def threads() -> int:
    """Threads of this process."""
    return len(os.listdir("/proc/self/task"))


class Feeds:
    """What a graph is run on: two batches of texts for an encoder, a prompt and steps else.

    Args:
        inputs: Its inputs: name, numpy dtype and shape.
        tokenizer: The model's tokenizers object.
    """

    def __init__(self, inputs: Iterable[tuple[str, str, Any]], tokenizer: Any) -> None:
        self.inputs = list(inputs)
        self.past = [one for one in self.inputs if one[0].startswith("past_key_values")]
        self.ids = [np.array([tokenizer.encode(text).ids], np.int64) for text in TEXTS]

    def work(self, run: Callable[[dict[str, Any]], list[Any]]) -> None:
        """One unit: every text once, or a prompt and some tokens after it."""
        if not self.past:
            for ids in self.ids:
                run(self._plain(ids, ids.shape[1], 0))
            return
        ids = np.resize(self.ids[1], (1, PROMPT))
        empty = {
            name: np.zeros((1, shape[1], 0, shape[3]), dtype) for name, dtype, shape in self.past
        }
        outputs = run({**self._plain(ids, PROMPT, 0), **empty})
        for step in range(STEPS):
            past = dict(zip([one[0] for one in self.past], outputs[1:], strict=True))
            outputs = run({**self._plain(ids[:, :1], PROMPT + step + 1, PROMPT + step), **past})

    def _plain(self, ids: Any, total: int, start: int) -> dict[str, Any]:
        given = {
            "input_ids": ids,
            "attention_mask": np.ones((1, total), np.int64),
            "token_type_ids": np.zeros_like(ids),
            "position_ids": np.arange(start, total, dtype=np.int64)[None],
        }
        return {name: given[name] for name, _, _ in self.inputs if name in given}


class Raw:
    """onnxruntime and tokenizers by hand, on the original file."""

    def __init__(self, model: Path, dtype: str) -> None:
        import onnxruntime
        import tokenizers

        self.path = str(model / "onnx" / f"model{SUFFIXES[dtype]}.onnx")
        self.tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.library = onnxruntime
        self.options = onnxruntime.SessionOptions()
        self.options.intra_op_num_threads = THREADS
        self.options.enable_cpu_mem_arena = self.options.enable_mem_pattern = False
        self.session: Any = None

    def load(self) -> None:
        """Make the session."""
        self.session = self.library.InferenceSession(
            self.path, self.options, providers=["CPUExecutionProvider"]
        )
        types = {"tensor(int64)": "int64", "tensor(float)": "float32"}
        self.feeds = Feeds(
            ((one.name, types[one.type], one.shape) for one in self.session.get_inputs()),
            self.tokenizer,
        )

    def run(self) -> None:
        """One unit of work."""
        self.feeds.work(lambda feeds: self.session.run(None, feeds))

    def drop(self) -> None:
        """Free it, as well as its user can."""
        self.session = None
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)


class Ebbtide:
    """The same graph as Ebbtide's pipelines own it, on the thread that they run it on."""

    def __init__(self, model: Path, dtype: str) -> None:
        import tokenizers

        from ebbtide import runtime
        from ebbtide.cancellation import CancelToken

        self.path = model / "onnx" / f"model{SUFFIXES[dtype]}.onnx"
        self.tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.runtime, self.token = runtime, CancelToken("the benchmark")
        self.options = runtime.SessionOptions(threads=THREADS, fuse=False)
        self._there(runtime.start)

    def _there(self, function: Callable[[], Any]) -> Any:
        return self.runtime.native_threads.submit(function, self.token, lambda: None).wait()

    def prepare(self) -> None:
        """Have the prepared copy made."""
        self.load(wanted="now")
        assert self.lease.value.source == "prepared", "no prepared copy could be made"
        self.drop()

    def load(self, wanted: str = "off") -> None:
        """Make the session."""
        self.lease = self._there(
            lambda: self.runtime.acquire(self.path, "cpu", self.options, self.token, wanted=wanted)
        )
        value = self.lease.value
        self.outputs = [one.name for one in value.outputs]
        self.feeds = Feeds(
            ((one.name, one.dtype, one.shape) for one in value.inputs), self.tokenizer
        )

    def run(self) -> None:
        """One unit of work, as one call."""
        run = self.lease.value.run
        self._there(lambda: self.feeds.work(lambda feeds: run(feeds, self.outputs, self.token)))

    def drop(self) -> None:
        """Free it."""
        self._there(self.lease.release)


class Pipeline:
    """The whole pipeline, by the public interface."""

    def __init__(self, model: Path, dtype: str) -> None:
        import ebbtide

        self.library, self.model, self.dtype = ebbtide, model, dtype
        self.options: Any = {"dtype": dtype, "session_options": {"threads": THREADS}}

    def prepare(self) -> None:
        """Have the prepared copy made."""
        self.load(prepare="now")
        self.drop()

    def load(self, **options: Any) -> None:
        """Make it."""
        make: Any = self.library.pipeline
        self.pipe = make("feature-extraction", self.model, **self.options, **options)

    def run(self) -> None:
        """One unit of work."""
        for text in TEXTS:
            self.pipe(text, pooling="mean", normalize=True)

    def sleep(self) -> None:
        """Free its session."""
        self.pipe.sleep()

    def wake(self) -> None:
        """Load its session."""
        self.pipe.wake()

    def drop(self) -> None:
        """Free it."""
        self.pipe.dispose()


SIDES: dict[str, Callable[[Path, str], Any]] = {
    "raw": Raw, "ebbtide": Ebbtide, "pipeline": Pipeline,
}  # fmt: skip


def serve(side: str, model: Path, dtype: str) -> None:
    """A side's process: does what it is told, line by line, and answers in seconds or MB."""
    made = SIDES[side](model, dtype)
    trim = ctypes.CDLL(None).malloc_trim
    for line in sys.stdin:
        word, _, count = line.strip().partition(" ")
        started = time.perf_counter()
        answer: Any = None
        if word == "anonymous":
            answer = anonymous()
        elif word == "private":
            answer = private()
        elif word == "threads":
            answer = threads()
        elif word == "trim":
            trim(0)
        elif word == "idle":
            time.sleep(IDLE)  # longer than settings.idle_trim, so that it is what it is when idle
            answer = True
        else:
            for _ in range(int(count or 1)):
                getattr(made, word)()
            answer = time.perf_counter() - started
        print(json.dumps(answer), flush=True)


class Side:
    """The other end of a side's process."""

    def __init__(self, side: str, model: Path, dtype: str, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(model), "--dtype", dtype, "--serve", side],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def __call__(self, word: str, count: int = 1) -> Any:
        """Have it do something, and its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(f"{word} {count}" if count > 1 else word, file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        """End it."""
        self._process.communicate()


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


def compared(
    ours: str, model: Path, dtype: str, rounds: int, environment: dict[str, str]
) -> dict[str, Any]:
    """Memory, load and speed of one side beside raw's."""
    found: dict[str, dict[str, list[float]]] = {}
    for side in (ours, "raw"):
        found[side] = {"anonymous": [], "trimmed": [], "load": [], "run": []}
    for round_ in range(rounds):
        order = (ours, "raw") if round_ % 2 else ("raw", ours)
        sides = {name: Side(name, model, dtype, environment) for name in order}
        floors = {}
        for name in order:
            one = sides[name]
            one("load")
            one("run")
            one("drop")  # the library has been started, as in a process that lives long
            one("trim")
            floors[name] = one("anonymous")
        for _ in range(3):
            for name in order:
                found[name]["load"].append(sides[name]("load"))
            for name in order:
                sides[name]("run", 3)
                sides[name]("idle")
                found[name]["anonymous"].append(sides[name]("anonymous") - floors[name])
                sides[name]("trim")
                found[name]["trimmed"].append(sides[name]("anonymous") - floors[name])
            for _ in range(6):
                for name in order:
                    sides[name]("run")
                    found[name]["run"].append(sides[name]("run", 3) / 3)
            for name in order:
                sides[name]("drop")
        for one in sides.values():
            one.end()
    print(f"\n{ours} beside raw onnxruntime on the original, {dtype}, {THREADS} threads")
    for what, unit, scale in (
        ("anonymous", "MB", 1), ("trimmed", "MB", 1), ("load", "ms", 1e3), ("run", "ms", 1e3),
    ):  # fmt: skip
        mine, raw = found[ours][what], found["raw"][what]
        print(
            f"{what:10} {statistics.median(mine) * scale:8.2f} {unit}"
            f"  raw {statistics.median(raw) * scale:8.2f} {unit}  ratio {ratio(mine, raw)}"
        )
    speed = ratio(found["raw"]["run"], found[ours]["run"])
    print(f"speed, ours to raw's: {speed}")
    return {
        side: {what: statistics.median(values) for what, values in of.items()}
        for side, of in found.items()
    }


def woken(model: Path, dtype: str, rounds: int, environment: dict[str, str]) -> dict[str, Any]:
    """`wake()` beside the first load from the original, and what a sleeping pipeline takes."""
    first, wake, asleep = [], [], []
    with tempfile.TemporaryDirectory() as empty:
        for _ in range(rounds):
            one = Side("pipeline", model, dtype, {**environment, "EBBTIDE_CACHE_DIR": empty})
            first.append(one("load"))
            one.end()
            one = Side("pipeline", model, dtype, environment)
            one("load")
            one("run")
            for _ in range(5):
                one("sleep")
                wake.append(one("wake"))
                one("run")
            one("sleep")
            held = one("anonymous")
            one("drop")
            asleep.append(held - one("anonymous"))
            one.end()
    print(f"\nwake p50 {statistics.median(wake) * 1e3:.1f} ms, first load of the original in its")
    print(f"process {statistics.median(first) * 1e3:.1f} ms: ratio {ratio(wake, first)}")
    print(f"a sleeping pipeline takes {statistics.median(asleep):.2f} MB more than a disposed one")
    return {"wake": statistics.median(wake), "first": statistics.median(first)}


def copies(model: Path, dtype: str, folder: Path) -> list[Path]:
    """Models like this one, each with some other weights."""
    name = f"model{SUFFIXES[dtype]}.onnx"
    content = bytearray((model / "onnx" / name).read_bytes())
    made = []
    for number in range(MANY):
        target = folder / str(number)
        shutil.copytree(model, target, ignore=shutil.ignore_patterns("onnx"))
        (target / "onnx").mkdir()
        chance = random.Random(number)
        other = bytearray(content)
        for _ in range(50):  # bits of the layers' weights
            at = chance.randrange(len(other) * 6 // 10, len(other) * 9 // 10)
            other[at] ^= 1
        (target / "onnx" / name).write_bytes(other)
        made.append(target)
    return made


MANY_SCRIPT = """
import json, sys, time
sys.path.insert(0, {here!r})
from prepared import THREADS, anonymous, threads
import ebbtide
folders = {folders!r}
def load(folder, **options):
    return ebbtide.pipeline("feature-extraction", folder, dtype={dtype!r},
        session_options={{"threads": THREADS}}, **options)
first = load(folders[0])
first("The tide", pooling="mean")
one = threads()
first.dispose()
floor = anonymous()
pipes = [load(folder) for folder in folders]
vectors = [pipe("The tide goes out.", pooling="mean") for pipe in pipes]
assert all(pipe.memory.holdings[1].source == "prepared" for pipe in pipes)
time.sleep({idle})  # idle: what the calls freed is given back
live = anonymous() - floor
different = len({{vector.tobytes() for vector in vectors}})
tokenizer = pipes[0].memory.holdings[0].anonymous / 1e6
count = threads()
ebbtide.dispose_all()
print(json.dumps([live, tokenizer, count, one, different, anonymous() - floor]))
"""


def many(model: Path, dtype: str, environment: dict[str, str]) -> dict[str, Any]:
    """Twenty pipelines over twenty models in one process."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=model.parent) as place:
        here = {**os.environ, **environment, "EBBTIDE_CACHE_DIR": str(Path(place, "store"))}
        folders = [str(one) for one in copies(model, dtype, Path(place))]
        for folder in folders:
            one = Side("pipeline", Path(folder), dtype, here)
            one("prepare")
            one.end()
        script = MANY_SCRIPT.format(
            here=str(Path(__file__).parent), folders=folders, dtype=dtype, idle=IDLE
        )
        for shared in ("0", "1"):
            done = subprocess.run(
                [sys.executable, "-c", script],
                env={**here, "EBBTIDE_SHARED_THREADS": shared},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise SystemExit(done.stderr)
            live, tokenizer, count, one, different, after = json.loads(done.stdout)
            kind = "one pool for all" if shared == "1" else "a pool each"
            print(
                f"\n{MANY} pipelines, {different} different answers, {kind}: {live:.1f} MB together"
                f" ({tokenizer:.1f} of it the tokenizer), {count} threads (one pipeline: {one});"
                f" {after:.2f} MB after their disposal"
            )
            found[kind] = {"live": live, "threads": count, "one": one, "after": after}
    return found


def processes(model: Path, dtype: str, environment: dict[str, str]) -> dict[str, Any]:
    """Four processes that hold the same model at the same time."""
    size = (model / "onnx" / f"model{SUFFIXES[dtype]}.onnx").stat().st_size / 1e6
    sides = [Side("pipeline", model, dtype, environment) for _ in range(PROCESSES)]
    for one in sides:
        one("load")
        one("run")
        one("drop")
    floors = [one("idle") and one("private") for one in sides]
    for one in sides:
        one("load")
        one("run")
    added = [
        one("idle") and one("private") - floor for one, floor in zip(sides, floors, strict=True)
    ]
    for one in sides:
        one.end()
    worst = max(added)
    each = ", ".join(f"{one:.1f}" for one in added)
    print(
        f"\n{PROCESSES} processes: the model adds {each} MB of private memory,"
        f" at most {worst / size:.1%} of its {size:.0f} MB"
    )
    return {"added": added, "share": worst / size}


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="fp32", choices=SUFFIXES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--parts", default="session,pipeline,many,processes")
    parser.add_argument("--serve", choices=SIDES)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.model, options.dtype)
        return
    parts = options.parts.split(",")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.model.parent) as place:
        environment = {"EBBTIDE_CACHE_DIR": place, "EBBTIDE_PREPARE": "off"}
        one = Side("ebbtide", options.model, options.dtype, environment)
        print(f"{options.model.name} in {options.dtype}: prepared in {one('prepare'):.1f} s")
        one.end()
        chosen = (options.model, options.dtype, options.rounds, environment)
        if "session" in parts:
            found["session"] = compared("ebbtide", *chosen)
        if "pipeline" in parts:
            found["pipeline"] = compared("pipeline", *chosen)
            found["wake"] = woken(*chosen)
        if "processes" in parts:
            found["processes"] = processes(options.model, options.dtype, environment)
    if "many" in parts:
        found["many"] = many(options.model, options.dtype, {"EBBTIDE_PREPARE": "off"})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
