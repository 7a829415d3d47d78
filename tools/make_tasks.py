r"""Make the tiny models of the understanding tasks, and write down what two oracles answer.

What it makes
    tests/models/<type>/<head>/   a model of random (seeded) weights in the Hugging Face layout,
                                  fp32, for each type of text encoder and each head it has
    tests/goldens/tasks/<type>.json
                                  what `transformers` answers in torch (fp32) on the same weights,
                                  and Transformers.js on the same ONNX files
    tests/goldens/tasks/cases.json
                                  what both were asked, and Ebbtide is asked by the tests

    `make_models.py` makes the models of feature extraction; this script and its parts need it:
    task_types.py (the types), task_tokenizers.py, task_cases.py (the heads, the texts and the
    calls), task_oracles.py and transformers_js.mjs.

    Seeds are tried in order until a model is fit: its answers differ from text to text, none of
    them turns on a difference that rounding could make, and ONNX Runtime gives torch's outputs to
    within `TOLERANCE` for every batch that the cases come to.

How to run it
    It needs the Python packages that `make_models.py` needs, and Node 20 or later with the package
    of Transformers.js in some folder outside the repository. Its install scripts are not needed: on
    Linux on x64 the npm package of ONNX Runtime holds the library itself.

        pip install "torch==2.13.0" "transformers==4.57.6" "sentence-transformers>=5.1,<6" \
            tokenizers onnx onnxruntime sympy numpy
        mkdir ../npm && (cd ../npm && npm i --ignore-scripts @huggingface/transformers@4.3.1)
        python tools/make_tasks.py --npm ../npm                # all types: three minutes
        python tools/make_tasks.py --npm ../npm bert roberta   # only the named ones

    No network is used. Each named type's folder and goldens are replaced. Run twice with the same
    packages on one machine, it writes the same bytes.

How to add a type
    Add a `ModelType` to `TYPES` in task_types.py. A new kind of tokenizer is one more entry in
    `TOKENIZERS`, a new head one in `HEADS`, a new call one in the function of its task.

The golden JSON
    {"versions": of the packages that answered,
     "models": {head: {"task": of Ebbtide, or "rank" for the method of that name,
                       "texts": a key of cases.json,
                       "window": the number of tokens the model reads at most,
                       "seed": of the weights,
                       "transformers": {case: answer},
                       "transformers_js": {case: answer} of the cases that it has something like;
                                          or {"*": {"error": why}}, where it refuses the type}}}

    An answer is a call's result as Ebbtide returns it. Several records with the same keys are
    written as {"columns": [...], "rows": [[...], ...]}.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import shutil
import sys
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
import transformers
from make_models import GOLDENS, MODELS, OPSET, TOLERANCE, UNSET_LENGTH, write_json
from task_cases import HEADS, TEXTS, Case, Head, cases_of
from task_oracles import Transformers, filled, javascript_call, run_javascript, steady
from task_tokenizers import TOKENIZERS
from task_types import TYPES, ModelType
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

TASKS = GOLDENS / "tasks"
PACKAGES = ("transformers", "sentence-transformers", "torch", "tokenizers")
ATTEMPTS = 50
"""How many seeds are tried for a model whose answers are varied and steady."""


class UnfitError(Exception):
    """Random weights do not make a model to test with."""


# --------------------------------------------------------------------------------------------------
# The folder
# --------------------------------------------------------------------------------------------------


def write_tokenizer(kind: ModelType, head: Head, folder: Path) -> PreTrainedTokenizerBase:
    """Write the files of the tokenizer; return it as `transformers` reads them."""
    window = head.window or kind.window
    made = TOKENIZERS[kind.tokenizer]
    text = made.make().to_str(pretty=False)
    (folder / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    settings: dict[str, Any] = {**made.settings, **made.special_tokens, **head.settings}
    settings["tokenizer_class"] = kind.tokenizer_class
    settings["model_max_length"] = window if kind.names_window else UNSET_LENGTH
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", dict(made.special_tokens))
    if kind.own_tokenizer_class:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            folder, model_input_names=list(kind.inputs)
        )
    tokenizer.model_max_length = window
    return tokenizer


def check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    """Check that `tokenizers` alone gives the ids of `transformers` from tokenizer.json."""
    bare = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in texts:
        for given in ((text,), (text, texts[0])):
            if bare.encode(*given).ids != tokenizer(*given)["input_ids"]:
                raise AssertionError(f"{folder}: two readings of its tokenizer differ on {text!r}")


def texts_in(value: Any) -> list[str]:
    """Every text in the inputs of cases."""
    if isinstance(value, str):
        return [value]
    some = value.values() if isinstance(value, Mapping) else value
    return [text for one in some for text in texts_in(one)]


# --------------------------------------------------------------------------------------------------
# The weights and the graph
# --------------------------------------------------------------------------------------------------


def make_model(
    kind: ModelType, name: str, head: Head, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """A model in torch, its weights drawn so that every input makes a difference."""
    more = {**head.config, **kind.of_head.get(name, {})}
    if head.labels and "id2label" not in more:
        more["id2label"] = dict(enumerate(head.labels))
    if head.window:
        more["max_position_embeddings"] = head.window
    if "id2label" in more:
        more["label2id"] = {label: number for number, label in more["id2label"].items()}
    special = {"pad_token_id": tokenizer.pad_token_id}
    if kind.name in ("modernbert", "esm"):  # their configs name others than their tokenizers do
        special |= {
            "bos_token_id": tokenizer.cls_token_id,
            "cls_token_id": tokenizer.cls_token_id,
            "eos_token_id": tokenizer.sep_token_id,
            "sep_token_id": tokenizer.sep_token_id,
            "mask_token_id": tokenizer.mask_token_id,
        }
    config = AutoConfig.for_model(
        kind.name, **{**special, **kind.config, **more}, vocab_size=len(tokenizer)
    )
    torch.manual_seed(seed)
    auto_class = getattr(transformers, head.auto_class)
    model: PreTrainedModel = auto_class.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.startswith("qa_outputs"):
                parameter.normal_(0.0, 3 * kind.scale)  # a few places stand out of many
            elif parameter.dim() > 1:
                parameter.normal_(0.0, kind.scale)
            elif parameter_name.endswith("weight"):  # a LayerNorm's
                parameter.normal_(1.0, 0.1)
            else:
                parameter.normal_(0.0, 0.1)
        # Of words of one length none is every mask's best filling; long ones make it sure of one.
        words = model.get_input_embeddings().weight
        length = kind.scale * words.shape[1] ** 0.5 * (2 if head.task == "fill-mask" else 1)
        words *= length / words.norm(dim=1, keepdim=True)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = "float32"
    return model


class _TupleModel(torch.nn.Module):
    """The model with positional inputs and a tuple of outputs, as the exporter wants it."""

    def __init__(
        self, model: PreTrainedModel, inputs: Sequence[str], outputs: Sequence[str]
    ) -> None:
        super().__init__()
        self.model = model
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.model(**dict(zip(self.inputs, values, strict=True)))
        return tuple(result[name] for name in self.outputs)


def export(kind: ModelType, head: Head, model: PreTrainedModel, file: Path) -> None:
    """Write the model as ONNX in fp32, with dynamic batch and sequence axes."""
    ids = torch.arange(14).reshape(2, 7) + 5
    values = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }
    axes = {0: "batch_size", 1: "sequence_length"}
    sequences = head.auto_class.endswith("SequenceClassification")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer's, and that this exporter is the older one
        torch.onnx.export(
            # eval(): the exporter puts the mode it found back, dropout included
            _TupleModel(model, kind.inputs, head.outputs).eval(),
            tuple(values[name] for name in kind.inputs),
            str(file),
            input_names=list(kind.inputs),
            output_names=list(head.outputs),
            dynamic_axes=dict.fromkeys(kind.inputs, axes)
            | {name: {0: "batch_size"} if sequences else axes for name in head.outputs},
            opset_version=OPSET,
            dynamo=False,
        )
    proto = onnx.load(file)
    share(proto.graph)
    shorten(proto)
    onnx.save(proto, file)
    onnx.checker.check_model(str(file))


def share(graph: onnx.GraphProto) -> None:
    """Keep a large matrix once where the exporter writes it twice, once transposed: tied words."""
    found: dict[bytes, str] = {}
    for tensor in tuple(graph.initializer):
        if len(tensor.dims) != 2 or len(tensor.raw_data) < 4096:
            continue
        array = onnx.numpy_helper.to_array(tensor)
        source = found.get(array.T.tobytes())
        if source is None:
            found[array.tobytes()] = tensor.name
            continue
        graph.initializer.remove(tensor)
        graph.node.insert(0, onnx.helper.make_node("Transpose", [source], [tensor.name]))


def shorten(proto: onnx.ModelProto) -> None:
    """Make a graph's file small: number its values, and drop what is there to be read."""
    kept = {one.name for one in (*proto.graph.input, *proto.graph.output)}
    numbers: dict[str, str] = {"": ""}

    def short(name: str) -> str:
        return name if name in kept else numbers.setdefault(name, f"{len(numbers):x}")

    def rename(graph: onnx.GraphProto) -> None:
        graph.doc_string = ""
        del graph.value_info[:]
        for value in (*graph.initializer, *graph.input, *graph.output):
            value.name = short(value.name)
            value.doc_string = ""
        for node in graph.node:
            node.name = node.doc_string = ""
            del node.metadata_props[:]
            node.input[:] = [short(name) for name in node.input]
            node.output[:] = [short(name) for name in node.output]
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    rename(attribute.g)

    proto.doc_string = ""
    rename(proto.graph)


def check_graph(file: Path, oracle: Transformers) -> float:
    """Check every batch that torch was fed in ONNX Runtime; return the largest difference."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    worst = 0.0
    for fed, wanted in oracle.fed:
        feeds = {one.name: fed[one.name].numpy() for one in session.get_inputs()}
        for name, found in zip(names, session.run(names, feeds), strict=True):
            difference = float(np.abs(found - wanted[name].numpy()).max())
            if not difference <= TOLERANCE:  # not "greater": NaN must fail too
                raise UnfitError(f"ONNX is off by {difference:.1e}")
            worst = max(worst, difference)
    return worst


# --------------------------------------------------------------------------------------------------
# The answers
# --------------------------------------------------------------------------------------------------


def check_varied(head: Head, answers: Mapping[str, Any]) -> None:
    """Check that answers differ from text to text, so that to compare them means something."""
    found = list(records(answers))
    if head.task == "zero-shot-classification":
        enough = len({one["labels"][0] for one in found}) >= 3
    elif head.task == "token-classification":
        labels = {one["entity_group"] for one in records(answers["simple_all"])}
        enough = len(labels) == 3 and len(answers["single"]) >= 2
    elif head.task == "question-answering":
        enough = len({(one["start"], one["end"]) for one in found}) >= min(12, 2 * len(answers))
    elif head.task == "fill-mask":
        enough = len({one["token"] for one in found}) >= 10
    else:
        labels = {one["label"] for one in records(answers["batch"])}
        enough = len(labels) >= min(2, len(head.labels or ()))
    scores = [score for one in found for score in one.get("scores", [one.get("score")])]
    if not enough or max(scores) - min(scores) < 0.15:
        raise UnfitError("answers are too much alike")


def records(value: Any) -> Iterator[dict[str, Any]]:
    """Every record in an answer, or in several."""
    if isinstance(value, dict) and not value.keys().isdisjoint({"score", "scores"}):
        yield value
    else:
        for one in value.values() if isinstance(value, dict) else value:
            yield from records(one)


def ask(oracle: Transformers, cases: Sequence[Case]) -> dict[str, Any]:
    """The oracle's answers, checked to hang on no hair's breadth."""
    answers = {case.name: oracle.answer(case) for case in cases}
    for seed, case in itertools.product((1, 2), cases):
        with oracle.noisy(seed):
            if not steady(answers[case.name], oracle.answer(case)):
                raise UnfitError(f"the answer to {case.name!r} hangs on rounding")
    return answers


def make(kind: ModelType, name: str) -> dict[str, Any]:
    """Make one model; return its golden, without what Transformers.js answers."""
    head = HEADS[name]
    folder = MODELS / kind.name / name
    file = folder / "onnx" / "model.onnx"
    file.parent.mkdir(parents=True)
    # AutoTokenizer wants to know the type.
    write_json(folder / "config.json", {"model_type": kind.name})
    tokenizer = write_tokenizer(kind, head, folder)
    asked = [
        filled(case, tokenizer.mask_token)
        for case in cases_of(head.task, TEXTS[kind.texts])
        if (case.name in head.cases if head.cases else case.name != "wide")
    ]
    check_tokenizer(folder, tokenizer, texts_in([case.inputs for case in asked]))

    first = zlib.crc32(f"{kind.name}/{name}".encode()) % 1000 * 100
    for seed in range(first, first + ATTEMPTS):
        try:
            model = make_model(kind, name, head, tokenizer, seed)
            oracle = Transformers(head.task, model, tokenizer)
            answers = ask(oracle, asked)
            check_varied(head, answers)
            export(kind, head, model, file)
            worst = check_graph(file, oracle)
        except UnfitError as error:
            print(f"{kind.name}/{name}: not with seed {seed}: {error}")
            continue
        break
    else:
        raise AssertionError(f"{kind.name}/{name}: no seed is fit: change its scale")
    write_json(folder / "config.json", model.config.to_diff_dict())
    print(f"{kind.name}/{name}: ONNX differs from torch by at most {worst:.1e}", flush=True)
    calls = {
        case.name: javascript_call(head.task, case) if head.javascript else None for case in asked
    }
    return {
        "task": head.task,
        "texts": kind.texts,
        "window": head.window or kind.window,
        "seed": seed,
        "calls": {case: call for case, call in calls.items() if call is not None},
        "transformers": answers,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the named types, or all."""
    logging.disable(logging.WARNING)  # the pipelines', of what this asks on purpose
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [kind.name for kind in TYPES]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument(
        "--npm", type=Path, required=True, metavar="FOLDER", help="where npm i was run"
    )
    wanted = parser.parse_args(arguments)
    if unknown := set(wanted.names) - set(names):
        parser.error(f"no such type: {', '.join(sorted(unknown))}")

    TASKS.mkdir(parents=True, exist_ok=True)
    kinds = [kind for kind in TYPES if not wanted.names or kind.name in wanted.names]
    for kind in kinds:
        shutil.rmtree(MODELS / kind.name, ignore_errors=True)
    made = {kind.name: {name: make(kind, name) for name in kind.heads} for kind in kinds}
    jobs = [
        {
            "model": f"{kind}/{name}",
            "task": "text-classification" if one["task"] == "rank" else one["task"],
            "calls": one["calls"],
        }
        for kind, heads in made.items()
        for name, one in heads.items()
        if HEADS[name].javascript
    ]
    javascript, answers = run_javascript(wanted.npm, MODELS, jobs)
    versions = {name: version(name) for name in PACKAGES}
    for job, found in zip(jobs, answers, strict=True):
        kind, name = job["model"].split("/")
        made[kind][name]["transformers_js"] = found
    for kind, heads in made.items():
        for one in heads.values():
            del one["calls"]
        golden = {"versions": versions | {"transformers.js": javascript}, "models": packed(heads)}
        write_compact(TASKS / f"{kind}.json", golden, 5)
    write_cases()
    return 0


def write_cases() -> None:
    """Write the cases, for the tests."""
    tasks = {head.task for head in HEADS.values()}
    asked = {
        kind: {
            task: [
                {
                    "name": case.name,
                    "inputs": case.inputs,
                    "options": case.options,
                    **({"method": case.method} if case.method else {}),
                }
                for case in cases_of(task, texts)
            ]
            for task in sorted(tasks)
        }
        for kind, texts in TEXTS.items()
    }
    write_compact(TASKS / "cases.json", asked)


def write_compact(file: Path, value: Any, depth: int = 3) -> None:
    """Write JSON with one line for whatever lies deeper than `depth`."""
    file.write_text(_compact(value, depth, "") + "\n", encoding="utf-8")


def packed(value: Any) -> Any:
    """The same with records of one kind as a table: {"columns": [...], "rows": [[...], ...]}."""
    if isinstance(value, dict):
        return {key: packed(one) for key, one in value.items()}
    if not isinstance(value, list | tuple):
        return value
    if len(value) > 1 and all(isinstance(one, dict) and [*one] == [*value[0]] for one in value):
        rows = [[packed(one) for one in record.values()] for record in value]
        return {"columns": [*value[0]], "rows": rows}
    return [packed(one) for one in value]


def _compact(value: Any, depth: int, indent: str) -> str:
    if depth == 0 or not isinstance(value, dict | list) or not value:
        return json.dumps(value, separators=(",", ":"))
    inner = indent + " "
    if isinstance(value, dict):
        lines = [
            f"{json.dumps(key)}: {_compact(one, depth - 1, inner)}" for key, one in value.items()
        ]
        opening, closing = "{}"
    else:
        lines = [_compact(one, depth - 1, inner) for one in value]
        opening, closing = "[]"
    return f"{opening}\n{inner}" + f",\n{inner}".join(lines) + f"\n{indent}{closing}"


if __name__ == "__main__":
    sys.exit(main())
