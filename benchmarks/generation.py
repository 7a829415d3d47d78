"""How fast is text written, beside Transformers.js, llama.cpp and a loop over onnxruntime by hand?

    python benchmarks/generation.py --plain FOLDER [--fused FOLDER] [--npm FOLDER]
        [--gguf FILE --llama-python PYTHON] [--rounds 7] [--new 128] [--parts speed,lookup,...]

It was made for SmolLM2-135M-Instruct, and takes any small causal model with its past:

- ``--plain``: its export in Hugging Face layout, with tokenizer, config and ``onnx/model_q4.onnx``;
- ``--fused``: the same model as `onnxruntime_genai.models.builder` gives it (``model.onnx`` with
  GroupQueryAttention, int4 in blocks of 32), or in Hugging Face layout;
- ``--npm``: where ``npm i --ignore-scripts @huggingface/transformers`` was run;
- ``--gguf``: the same model in Q4_1, which ``tools/make_gguf.py`` makes, and ``--llama-python``: a
  Python with ``llama-cpp-python``, built for this machine (``CMAKE_ARGS=-DGGML_NATIVE=ON``).

Who is not there is left out, and that is said. Each contestant is a process of its own with two
threads, which measures itself. They take turns, each turn begins with a few tokens that do not
count, and a ratio is of one round, so that a machine's mood is in both; over the rounds the median
is given, with the quartiles. The parts:

- speed: 128 tokens by greedy search after a prompt of 40, tokens per second of the whole call. Text
  comes from the pipelines and from Transformers.js; llama.cpp and the loop are given ids and give
  ids. No one guesses tokens, but for the line that says so.
- lookup: a text is copied, corrected and summarised, with guesses from the prompt and with none:
  in fp32 (``onnx/model.onnx``), where guesses are on by default, and in int4, where they have to
  be asked for, since a token may become another.
- batch: four prompts together, beside one alone.
- context: a token after 4,000, beside one after 100.
- memory: anonymous and all resident bytes of each process, once everything has run.

Output is compared too: which contestants wrote the same tokens, and how far. An int4 kernel gives
other logits for one token than for several at once, so that guesses and batches may turn a near tie
(the same prompt in parts of 2, 4 and 40 tokens gave the same bits, in parts of 1 it did not).
``--quick`` takes few tokens and two rounds, to see that all of it runs. The last line is JSON.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import importlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

THREADS = 2
PROMPT = 40
ROWS = 4
SHORT, LONG = 100, 4000
ROOM = 512
WARM = 4

TEXT = (
    "The old harbour lies where the river meets the sea. Every morning the fishermen walk down to"
    " the quay, look at the sky and talk about the wind. Some of them have done so for fifty years,"
    " and their fathers did it before them. The tide goes out and leaves the boats lying on their"
    " sides, and nobody is in a hurry. At six in the evening the water comes back through the"
    " channel, first slowly and then all at once, and lifts one boat after another. The harbour"
    " master writes the height of the water into a book. Children throw stones from the wall, and"
    " gulls wait on the posts for what the nets have left. In winter a storm closed the channel"
    " with sand, and for three weeks no ship could leave. The town learned to live without fish,"
    " and the baker sold twice as much bread. When the dredger came, everybody stood on the pier."
    " They sang. "
)
OPENINGS = (0, 7, 16, 28)
TASKS = {
    "copy": f"Repeat this text word for word:\n\n{TEXT.strip()}",
    "correct": "Correct the spelling mistakes in this text:\n\n"
    + TEXT.strip().replace("morning", "mornning").replace("nobody", "nobdy"),
    "summarise": f"Summarize this text:\n\n{TEXT.strip()}",
}

Request = Mapping[str, Any]


class Pipeline:
    """Ebbtide, by its public interface; with a store of its own, or it would find a copy there."""

    def __init__(self, folder: str, dtype: str, prepare: str) -> None:
        store = tempfile.TemporaryDirectory(prefix="ebbtide-")
        atexit.register(store.cleanup)
        os.environ |= {"EBBTIDE_CACHE_DIR": store.name, "EBBTIDE_PREPARE": "off"}
        import ebbtide

        make: Any = ebbtide.pipeline
        options: Any = {"threads": THREADS}
        self.pipe = make(
            "text-generation", folder, dtype=dtype, prepare=prepare, session_options=options
        )
        sources = {one.source for one in self.pipe.memory.holdings} - {""}
        self.about = f"Ebbtide {ebbtide.__version__}, {', '.join(sources)} file"

    def write(self, asked: Request) -> dict[str, Any]:
        """Write on, and the time."""
        started = time.perf_counter()
        found = self.pipe(
            asked["prompts"],
            batch_size=len(asked["prompts"]),
            max_new_tokens=asked["new"],
            do_sample=False,
            return_full_text=False,
            details=True,
            prompt_lookup_num_tokens=asked.get("lookup"),
        )
        seconds = time.perf_counter() - started
        return {
            "seconds": seconds,
            "ids": [row[0]["token_ids"] for row in found],
            "texts": [row[0]["generated_text"] for row in found],
        }

    def context(self, asked: Request) -> dict[str, Any]:
        """The time of each token after the first."""
        started = time.perf_counter()
        pieces = self.pipe.stream(
            asked["prompts"][0],
            max_new_tokens=asked["new"],
            do_sample=False,
            prompt_lookup_num_tokens=0,
        )
        return _each([started, *(time.perf_counter() for _ in pieces)])


class ByHand:
    """onnxruntime alone: one binding for all steps, a cache written in place, no allocation."""

    def __init__(self, folder: str) -> None:
        import numpy as np
        import onnxruntime

        self.numpy, self.library = np, onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            str(Path(folder, "onnx", "model.onnx")), options, providers=["CPUExecutionProvider"]
        )
        self.about = f"onnxruntime {onnxruntime.__version__}"
        value = onnxruntime.OrtValue.ortvalue_from_numpy
        self.past: list[tuple[str, str, Any]] = []
        for one in self.session.get_inputs():
            if one.name.startswith("past_key_values"):
                heads, size = one.shape[1], one.shape[3]
                size = size if isinstance(size, int) else _head_size(folder)
                array = np.zeros((1, heads, ROOM, size), np.float32)
                present = one.name.replace("past_key_values", "present")
                self.past.append((one.name, present, value(array)))
        self.one = np.zeros((1, 1), np.int64)
        self.fed = value(self.one)
        width = next(one.shape[2] for one in self.session.get_outputs() if one.name == "logits")
        self.logits = np.zeros((1, 1, width), np.float32)
        self.given = value(self.logits)
        self.masks = [value(np.ones((1, total), np.int64)) for total in range(1, ROOM + 1)]
        self.step = self._binding()
        self.step.bind_ortvalue_input("input_ids", self.fed)
        self.step.bind_ortvalue_output("logits", self.given)

    def _binding(self) -> Any:
        binding = self.session.io_binding()
        for name, present, buffer in self.past:
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(present, buffer)
        return binding

    def write(self, asked: Request) -> dict[str, Any]:
        """Write on, and the time."""
        (ids,) = asked["ids"]
        started = time.perf_counter()
        prompt = self._binding()
        array = self.numpy.array([ids], self.numpy.int64)
        prompt.bind_ortvalue_input("input_ids", self.library.OrtValue.ortvalue_from_numpy(array))
        prompt.bind_ortvalue_input("attention_mask", self.masks[len(ids) - 1])
        prompt.bind_output("logits")
        self.session.run_with_iobinding(prompt)
        found = [int(prompt.get_outputs()[-1].numpy()[0, -1].argmax())]
        run, bind, logits = self.session.run_with_iobinding, self.step, self.logits[0, 0]
        for total in range(len(ids) + 1, len(ids) + asked["new"]):
            self.one[0, 0] = found[-1]
            bind.bind_ortvalue_input("attention_mask", self.masks[total - 1])
            run(bind)
            found.append(int(logits.argmax()))
        return {"seconds": time.perf_counter() - started, "ids": [found]}


class Llama:
    """llama.cpp, by its C interface: the loop that its own examples have."""

    def __init__(self, file: str) -> None:
        import ctypes

        llama_cpp: Any = importlib.import_module("llama_cpp")
        self.library = llama_cpp
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            file.encode(), llama_cpp.llama_model_default_params()
        )
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = LONG + 608
        options.n_threads = options.n_threads_batch = THREADS
        self.context_ = llama_cpp.llama_init_from_model(self.model, options)
        self.sampler = llama_cpp.llama_sampler_init_greedy()
        self.cache = llama_cpp.llama_get_memory(self.context_)
        self.part = int(options.n_batch)
        self.about = f"llama-cpp-python {llama_cpp.__version__}"

    def _next(self, ids: Sequence[int]) -> int:
        for first in range(0, len(ids), self.part):
            some = ids[first : first + self.part]
            array = (self.library.llama_token * len(some))(*some)
            batch = self.library.llama_batch_get_one(array, len(some))
            if self.library.llama_decode(self.context_, batch):
                raise SystemExit("llama_decode failed")
        return int(self.library.llama_sampler_sample(self.sampler, self.context_, -1))

    def _times(self, asked: Request) -> tuple[list[float], list[int]]:
        self.library.llama_memory_clear(self.cache, True)
        (ids,) = asked["ids"]
        times = [time.perf_counter()]
        found = [self._next(ids)]
        times.append(time.perf_counter())
        while len(found) < asked["new"]:
            found.append(self._next(found[-1:]))
            times.append(time.perf_counter())
        return times, found

    def write(self, asked: Request) -> dict[str, Any]:
        """Write on, and the time."""
        times, found = self._times(asked)
        return {"seconds": times[-1] - times[0], "ids": [found]}

    def context(self, asked: Request) -> dict[str, Any]:
        """The time of each token after the first."""
        return _each(self._times(asked)[0])


def _each(times: Sequence[float]) -> dict[str, Any]:
    steps = [after - before for before, after in itertools.pairwise(times)]
    return {"prompt": steps[0], "seconds": statistics.median(steps[1:])}


def _head_size(folder: str) -> int:
    config = json.loads(Path(folder, "config.json").read_text())
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


SIDES = {"pipeline": Pipeline, "by hand": ByHand, "llama": Llama}


def serve(side: str, *given: str) -> None:
    """A contestant's process: reads a request a line, and answers a line."""
    made: Any = SIDES[side](*given)
    print(json.dumps({"about": made.about}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(getattr(made, asked.get("word", "write"))(asked)), flush=True)


class Contestant:
    """The other end of a contestant's process."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.name = name
        self.about = self._answer()["about"]
        print(f"  {name:<18} {self.about}", flush=True)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"The process of {self.name} ended: what it said is above.")
        found: dict[str, Any] = json.loads(line)
        return found

    def __call__(self, asked: Request) -> dict[str, Any]:
        """Have it do something, and its answer; after a few tokens that do not count."""
        self._ask({**asked, "word": "write", **_start(asked), "new": WARM})
        return self._ask(asked)

    def _ask(self, asked: Request) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        return self._answer()

    def memory(self) -> dict[str, float]:
        """Anonymous and resident MB of its process."""
        lines = Path(f"/proc/{self._process.pid}/smaps_rollup").read_text().splitlines()[1:]
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 / 1e6 for line in lines}
        return {"anonymous": sizes["Anonymous"], "resident": sizes["Rss"]}

    def end(self) -> None:
        """End it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


def _start(asked: Request) -> dict[str, Any]:
    """A short prompt, from the beginning of what is asked."""
    start = asked.get("warm") or asked
    return {"prompts": start["prompts"][:1], "ids": start["ids"][:1]}


class Prompts:
    """Prompts of so many tokens.

    Args:
        folder: Where the tokenizer is.
    """

    def __init__(self, folder: Path) -> None:
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def asked(self, *texts: str, **more: Any) -> dict[str, Any]:
        """A request with these prompts, as texts and as ids."""
        ids = [self._tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        return {"prompts": list(texts), "ids": ids, **more}

    def cut(self, count: int, start: int = 0) -> str:
        """A text of exactly so many tokens, from some word on."""
        words = (TEXT * (1 + count // 100)).split(" ")
        for first in range(start, len(words)):
            text = " ".join(words[first:])
            encoded = self._tokenizer.encode(text, add_special_tokens=False)
            text = text[: encoded.offsets[count - 1][1]]
            if len(self._tokenizer.encode(text, add_special_tokens=False).ids) == count:
                return text
        raise SystemExit(f"No text of {count} tokens was found.")


@contextlib.contextmanager
def arranged(fused: Path, plain: Path) -> Iterator[Path]:
    """The fused graph in Hugging Face layout, with config and tokenizer of the plain export."""
    if (fused / "onnx" / "model.onnx").exists():
        yield fused
        return
    # Hard links: onnxruntime refuses weights that a symbolic link leads out of the folder to.
    with tempfile.TemporaryDirectory(dir=fused.parent, prefix="fused-") as place:
        (Path(place) / "onnx").mkdir()
        for one in fused.glob("model.onnx*"):
            os.link(one, Path(place, "onnx", one.name))
        for one in plain.iterdir():
            if one.is_file():
                shutil.copy(one, Path(place, one.name))
        yield Path(place)


def in_turns(
    turns: Mapping[str, tuple[Contestant, Request]], rounds: int, before: int = 1
) -> dict[str, list[dict[str, Any]]]:
    """Every one's answers, one a round; who begins changes. Rounds before are for nothing."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in turns}
    names = list(turns)
    for number in range(-before, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            contestant, asked = turns[name]
            answer = contestant(asked)
            if number >= 0:
                found[name].append(answer)
    return found


def speeds(answers: Sequence[Mapping[str, Any]]) -> list[float]:
    """Tokens per second of each answer."""
    return [sum(map(len, one["ids"])) / one["seconds"] for one in answers]


def ratio(over: Sequence[float], under: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of the rounds' ratios."""
    found = [a / b for a, b in zip(over, under, strict=True)]
    if len(found) < 2:
        return found[0], found[0], found[0]
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
    return low, middle, high


def shown(
    name: str,
    found: tuple[float, float, float],
    least: float | None = None,
    most: float | None = None,
) -> float:
    """Print a ratio beside what is wanted; its median."""
    low, middle, high = found
    wanted = ""
    if least is not None:
        wanted = f"wanted at least {least:.2f}: {'met' if middle >= least else 'NOT met'}"
    if most is not None:
        wanted = f"wanted at most {most:.2f}: {'met' if middle <= most else 'NOT met'}"
    print(f"  {name:<44}{middle:6.2f} [{low:.2f}, {high:.2f}]  {wanted}".rstrip(), flush=True)
    return middle


def alike(ours: Sequence[int], theirs: Sequence[int]) -> str:
    """How far two rows are the same."""
    if list(ours) == list(theirs):
        return f"the same {len(ours)} tokens"
    pairs = zip(ours, theirs, strict=False)
    same = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    return f"the same for {same} tokens of {len(ours)} and {len(theirs)}"


RATIOS = (
    ("plain", "Transformers.js", 1.15),
    ("plain, original", "Transformers.js", 1.15),
    ("plain", "llama.cpp", 1.0),
    ("fused", "llama.cpp", 1.0),
    ("fused", "Transformers.js", 2.0),
    ("fused", "by hand", 0.97),
    ("plain", "plain, original", None),
    ("fused, guessing", "fused", None),
)
SAME = (
    ("plain", "plain, original"),
    ("plain", "Transformers.js"),
    ("fused", "by hand"),
    ("fused", "fused, guessing"),
    ("fused", "plain"),
)


def speed(there: Mapping[str, Contestant], prompts: Prompts, options: Any) -> dict[str, Any]:
    """Tokens per second after a short prompt."""
    asked = prompts.asked(prompts.cut(PROMPT), new=options.new, lookup=0)
    turns = {name: (one, asked) for name, one in there.items()}
    if "fused" in there:
        turns["fused, guessing"] = (there["fused"], {**asked, "lookup": None})
    answers = in_turns(turns, options.rounds)
    found = {name: speeds(of) for name, of in answers.items()}
    print(f"\nspeed: {options.new} tokens after {PROMPT}, tokens per second, {THREADS} threads")
    for name, of in found.items():
        print(f"  {name:<18} {statistics.median(of):6.1f}  ({min(of):.1f} to {max(of):.1f})")
    medians: dict[str, Any] = {name: statistics.median(of) for name, of in found.items()}
    for ours, theirs, least in RATIOS:
        if ours in found and theirs in found:
            name = f"{ours} / {theirs}"
            medians[name] = shown(name, ratio(found[ours], found[theirs]), least)
    for ours, theirs in SAME:
        if ours in answers and theirs in answers:
            text = alike(answers[ours][0]["ids"][0], answers[theirs][0]["ids"][0])
            print(f"  {ours} and {theirs}: {text}")
    for name, each in answers.items():
        if any(one["ids"] != each[0]["ids"] for one in each):
            print(f"  {name} wrote something else in another round")
    return medians


def lookup(there: Mapping[str, Contestant], prompts: Prompts, options: Any) -> dict[str, Any]:
    """Guesses from the prompt, where the answer repeats much of it."""
    medians = {}
    print("\nlookup: guesses from the prompt, and none")
    kinds = [("exact", None), ("plain", 10), *([("fused", 10)] if "fused" in there else [])]
    for (name, most), (task, text) in itertools.product(kinds, TASKS.items()):
        chat = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        asked = prompts.asked(chat, new=options.new, lookup=most)
        asked["warm"] = prompts.asked(prompts.cut(PROMPT))
        turns = {
            "guesses": (there[name], asked),
            "none": (there[name], {**asked, "lookup": 0}),
        }
        answers = in_turns(turns, options.rounds)
        found = {kind: speeds(of) for kind, of in answers.items()}
        line = f"{name}, {task}: guesses / none"
        same = alike(answers["guesses"][0]["ids"][0], answers["none"][0]["ids"][0])
        medians[line] = shown(line, ratio(found["guesses"], found["none"]), 1.6)
        print(f"    {same}, by default: {'guessing' if most is None else 'not guessing'}")
    return medians


def batch(there: Mapping[str, Contestant], prompts: Prompts, options: Any) -> dict[str, Any]:
    """Four prompts together, beside one alone."""
    medians = {}
    texts = [prompts.cut(PROMPT, start) for start in OPENINGS]
    print(f"\nbatch: {ROWS} prompts of {PROMPT} tokens together, beside one alone")
    for name in ("fused", "plain"):
        if name not in there:
            continue
        together: list[dict[str, Any]] = []
        alone: list[dict[str, Any]] = []
        for number in range(options.rounds):
            text = texts[number % ROWS]
            one = prompts.asked(text, new=options.new, lookup=0)
            alone.append(there[name](one))
            together.append(there[name](prompts.asked(*texts, new=options.new, lookup=0)))
        fours, ones = speeds(together), speeds(alone)
        print(
            f"  {name}: {statistics.median(fours):.1f} tokens per second together,"
            f" {statistics.median(ones):.1f} alone"
        )
        medians[name] = shown(f"{name}: together / alone", ratio(fours, ones), 1.6)
        for number in range(min(ROWS, options.rounds)):
            text = alike(together[0]["ids"][number], alone[number]["ids"][0])
            print(f"    prompt {number + 1}, together and alone: {text}")
    return medians


def context(there: Mapping[str, Contestant], prompts: Prompts, options: Any) -> dict[str, Any]:
    """A token after many, beside one after few."""
    medians = {}
    print(f"\ncontext: a token after {options.long}, beside one after {SHORT}")
    names = [name for name in ("fused", "llama.cpp") if name in there]
    few = {
        length: prompts.asked(
            prompts.cut(length),
            word="context",
            new=options.tokens,
            warm=prompts.asked(prompts.cut(PROMPT)),
        )
        for length in (SHORT, options.long)
    }
    turns = {
        f"{name} {length}": (there[name], asked) for name in names for length, asked in few.items()
    }
    answers = in_turns(turns, options.context_rounds, before=0)
    for name in names:
        low, high = ([one["seconds"] for one in answers[f"{name} {n}"]] for n in few)
        prompt = statistics.median(one["prompt"] for one in answers[f"{name} {options.long}"])
        print(
            f"  {name}: {statistics.median(high) * 1e3:.1f} ms and"
            f" {statistics.median(low) * 1e3:.1f} ms a token; the long prompt {prompt:.1f} s"
        )
        most = 3.5 if name == "fused" else None
        medians[name] = shown(f"{name}: long / short", ratio(high, low), most=most)
    return medians


def memory(there: Mapping[str, Contestant], prompts: Prompts, options: Any) -> dict[str, Any]:
    """What each process takes now."""
    print("\nmemory: MB of each process, after all that ran before")
    found = {name: one.memory() for name, one in there.items()}
    for name, of in found.items():
        print(f"  {name:<18} {of['anonymous']:7.1f} anonymous  {of['resident']:7.1f} resident")
    return found


PARTS = {"speed": speed, "lookup": lookup, "batch": batch, "context": context, "memory": memory}
NEEDS_FUSED = {"context"}


def commands(options: Any, fused: Path | None) -> dict[str, list[str]]:
    """How each contestant's process is started, of those that are there."""
    here = [sys.executable, __file__, "--serve"]
    plain = str(options.plain)
    found = {
        "plain": [*here, "pipeline", plain, options.dtype, "now"],
        "plain, original": [*here, "pipeline", plain, options.dtype, "off"],
    }
    if "lookup" in options.parts.split(","):
        found["exact"] = [*here, "pipeline", plain, "fp32", "now"]
    if fused:
        found["fused"] = [*here, "pipeline", str(fused), "fp32", "now"]
        found["by hand"] = [*here, "by hand", str(fused)]
    else:
        print("Left out: the fused graph and the loop by hand (no --fused).")
    if options.npm:
        script = str(Path(__file__).with_suffix(".mjs"))
        given = [str(options.npm), plain, options.dtype, str(THREADS)]
        found["Transformers.js"] = ["node", script, *given]
    else:
        print("Left out: Transformers.js (no --npm).")
    if options.gguf and options.llama_python:
        python = str(options.llama_python)
        found["llama.cpp"] = [python, __file__, "--serve", "llama", str(options.gguf)]
    else:
        print("Left out: llama.cpp (no --gguf and --llama-python).")
    return found


def main() -> None:
    """Run the parts that are asked for."""
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plain", type=Path, required=True)
    parser.add_argument("--dtype", default="q4")
    parser.add_argument("--fused", type=Path)
    parser.add_argument("--npm", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--llama-python", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--context-rounds", type=int, default=3)
    parser.add_argument("--long", type=int, default=LONG)
    parser.add_argument("--tokens", type=int, default=48, help="of each context")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.new, options.context_rounds = 2, 16, 1
        options.long, options.tokens = 400, 8
    if PROMPT + options.new > ROOM:
        parser.error(f"--new takes at most {ROOM - PROMPT}: the loop by hand has no more room.")
    prompts = Prompts(options.plain)
    result: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        fused = None
        if options.fused:
            fused = stack.enter_context(arranged(options.fused, options.plain))
        there: dict[str, Contestant] = {}
        for name, command in commands(options, fused).items():
            there[name] = Contestant(name, command)
            stack.callback(there[name].end)
        for part in options.parts.split(","):
            if part in NEEDS_FUSED and not fused:
                print(f"\nLeft out: {part} (no --fused).")
                continue
            result[part] = PARTS[part](there, prompts, options)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
