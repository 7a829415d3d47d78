"""The oracles of `make_tasks.py`: `transformers` and Transformers.js, asked the same cases.

What `transformers` answers is brought to the form that Ebbtide answers in: a call with one input
gives one result and a call with a list one each, also where `transformers` takes a list of one for
an input, or unpacks a result that came alone.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from task_cases import Case
from transformers import Pipeline, PreTrainedModel, PreTrainedTokenizerBase, pipeline

BATCH = 32
"""How many inputs `transformers` runs at once: as many as Ebbtide does."""

NOISE = 3e-4
"""How far a logit may be off without an answer becoming another; see `steady`."""

Feeds = dict[str, torch.Tensor]


def filled(case: Case, mask: str | None) -> Case:
    """A case with the model's own mask token in its texts."""

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("{mask}", mask or "")
        if isinstance(value, list):
            return [fill(one) for one in value]
        return value

    return Case(case.name, tuple(map(fill, case.inputs)), case.options, case.method)


# --------------------------------------------------------------------------------------------------
# transformers
# --------------------------------------------------------------------------------------------------


class Transformers:
    """One model of `transformers`, in torch and fp32.

    Attributes:
        fed: Every batch that the model was fed, and the outputs it gave.
    """

    def __init__(
        self, task: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.task = task
        self.model = model
        self.tokenizer = tokenizer
        self.fed: list[tuple[Feeds, Feeds]] = []
        name = "text-classification" if task == "rank" else task
        self._pipe = pipeline(name, model=model, tokenizer=tokenizer, device="cpu")
        self._noise: torch.Generator | None = None
        model.register_forward_hook(self._see, with_kwargs=True)

    def answer(self, case: Case) -> Any:
        """The answer to a case, in the form that Ebbtide gives."""
        ask = {
            "text-classification": _text_classification,
            "rank": _text_classification,
            "token-classification": _token_classification,
            "question-answering": _question_answering,
            "fill-mask": _fill_mask,
            "zero-shot-classification": _zero_shot_classification,
        }[self.task]
        if case.method == "rank":
            return self._rank(*case.inputs, **case.options)
        return plain(ask(self._pipe, case.inputs, dict(case.options)))

    @contextlib.contextmanager
    def noisy(self, seed: int) -> Iterator[None]:
        """Within this, every output is off by up to `NOISE`."""
        self._noise = torch.Generator().manual_seed(seed)
        try:
            yield
        finally:
            self._noise = None

    def _see(self, _model: Any, _args: Any, fed: Mapping[str, Any], outputs: Any) -> Any:
        tensors = {name: value for name, value in fed.items() if torch.is_tensor(value)}
        if self._noise is None:
            given = {name: value.clone() for name, value in outputs.items()}
            self.fed.append((tensors, given))
            return outputs
        for name, value in outputs.items():
            noise = torch.rand(value.shape, generator=self._noise) * 2 - 1
            outputs[name] = value + NOISE * noise
        return outputs

    def _rank(self, query: str, documents: Sequence[str], **options: Any) -> Any:
        """What sentence-transformers' cross-encoder ranks.

        It is loaded from files, so that it reads the config by itself.
        """
        with tempfile.TemporaryDirectory() as name:
            self.model.save_pretrained(name)
            self.tokenizer.save_pretrained(name)
            encoder = CrossEncoder(name, device="cpu", max_length=self.tokenizer.model_max_length)
            encoder.model.register_forward_hook(self._see, with_kwargs=True)
            return plain(encoder.rank(query, list(documents), show_progress_bar=False, **options))


def _text_classification(pipe: Pipeline, inputs: Any, options: dict[str, Any]) -> Any:
    (given,) = inputs
    top_k = options.pop("top_k", 1)
    found = pipe(given, top_k=top_k, truncation=True, batch_size=BATCH, **options)
    if isinstance(given, list) and top_k == 1:
        return [one for [one] in found]
    return found


def _token_classification(pipe: Pipeline, inputs: Any, options: dict[str, Any]) -> Any:
    found = pipe(*inputs, batch_size=BATCH, **options)
    if "stride" in options:
        for one in found if isinstance(inputs[0], list) else [found]:
            # Joining windows, it compares the first entity with itself, and gives it twice where it
            # stands on no character.
            if len(one) > 1 and one[0] == one[1]:
                del one[0]
    return found


def _question_answering(pipe: Pipeline, inputs: Any, options: dict[str, Any]) -> Any:
    question, context = inputs if len(inputs) == 2 else (inputs[0], None)
    several = isinstance(question, list)
    if context is None:
        asked = question if several else [question]
    else:
        questions = question if several else [question]
        asked = [{"question": one, "context": context} for one in questions]
    found = pipe(
        question=[one["question"] for one in asked],
        context=[one["context"] for one in asked],
        batch_size=BATCH,
        **options,
    )
    answers = found if len(asked) > 1 else [found]
    if options.get("top_k", 1) > 1:
        answers = [one if isinstance(one, list) else [one] for one in answers]
        # Where a context has fewer answers, spans that cannot be any are added, of score 0.
        answers = [[one for one in some if one["score"] > 0] for some in answers]
    return answers if several else answers[0]


def _fill_mask(pipe: Pipeline, inputs: Any, options: dict[str, Any]) -> Any:
    (given,) = inputs
    found = pipe(given, batch_size=BATCH, tokenizer_kwargs={"truncation": True}, **options)
    return [found] if isinstance(given, list) and len(given) == 1 else found


def _zero_shot_classification(pipe: Pipeline, inputs: Any, options: dict[str, Any]) -> Any:
    texts, labels = inputs
    return pipe(texts, candidate_labels=labels, batch_size=BATCH, **options)


def plain(value: Any) -> Any:
    """A result as JSON has it, floats to seven digits."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float | np.floating):
        return float(f"{float(value):.7g}")
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    return value


def steady(one: Any, other: Any) -> bool:
    """Whether two answers are the same up to small differences of scores."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(steady(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(steady, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 5e-3 * abs(one) + 4e-4
    return bool(one == other)


# --------------------------------------------------------------------------------------------------
# Transformers.js
# --------------------------------------------------------------------------------------------------


def javascript_call(task: str, case: Case) -> list[Any] | None:
    """A case as arguments of Transformers.js; None where it has nothing like it."""
    options = dict(case.options)
    if task in ("text-classification", "rank"):
        if case.method or options.keys() - {"top_k"}:
            return None
        (given,) = case.inputs
        some = given if isinstance(given, list) else [given]
        if not all(isinstance(one, str) for one in some):  # it has no pairs
            return None
        return [given, options]
    if task == "token-classification":
        allowed = {"ignore_labels", "aggregation_strategy"}
        if options.keys() - allowed or options.get("aggregation_strategy") not in (None, "simple"):
            return None
        if case.name == "simple":  # a large one, and `simple_all` is the same
            return None
        return [*case.inputs, options]
    if task == "question-answering":
        if options.keys() - {"top_k"}:
            return None
        (first, *rest) = case.inputs
        if rest:
            (context,) = rest
            return [first, [context] * len(first) if isinstance(first, list) else context, options]
        if isinstance(first, list):
            return [
                [one["question"] for one in first], [one["context"] for one in first], options
            ]  # fmt: skip
        return [first["question"], first["context"], options]
    if task == "fill-mask":
        return None if options.keys() - {"top_k"} else [*case.inputs, options]
    return [*case.inputs, options]


def run_javascript(packages: Path, models: Path, jobs: Sequence[Mapping[str, Any]]) -> Any:
    """Run jobs with Transformers.js: its version, and the answers to each job.

    Args:
        packages: The folder that ``npm i`` was run in.
        models: The folder that the models are in.
        jobs: Each with ``model``, ``task`` and ``calls``; see transformers_js.mjs.
    """
    script = Path(__file__).with_name("transformers_js.mjs")
    with tempfile.TemporaryDirectory() as name:
        asked, answered = Path(name) / "jobs.json", Path(name) / "results.json"
        asked.write_text(json.dumps({"models": str(models), "jobs": list(jobs)}))
        subprocess.run(["node", script, packages, asked, answered], check=True)
        found = json.loads(answered.read_text())
    return found["version"], [plain(one) for one in found["answers"]]
