r"""Make the tiny models that write text, and write down what two oracles make them write.

What it makes
    tests/models/gen-<name>/      a model of random (seeded) weights in the Hugging Face layout, in
                                  fp32: onnx/model.onnx, or onnx/encoder_model.onnx and
                                  onnx/decoder_model_merged.onnx, or the latter alone
    tests/goldens/generation/<name>.json
                                  what `transformers` writes in torch (fp32) on the same weights,
                                  and Transformers.js on the same ONNX files

    generator_types.py holds the types, their tokenizers, and how their graphs are made and run.

    Seeds are tried in order until a model is fit: what it writes differs from prompt to prompt and
    has many different tokens, the two best logits are never closer than `GAP`, and no answer of
    beams or processors becomes another when logits are off by up to `NOISE`. ONNX Runtime, with
    the cache of each graph, has written the same greedy tokens before a golden is.

How to run it
    It needs what `make_tasks.py` needs, and for the graphs ``pip install "optimum-onnx==0.1.0"``.

        python tools/make_generators.py --npm ../npm               # all types
        python tools/make_generators.py --npm ../npm gpt2 llama    # only the named ones
        python tools/make_generators.py --npm ../npm --only-transformers-js

    Without --npm nothing is asked of Transformers.js. The last asks only that, of the models that
    there are, and changes nothing in the goldens but "transformers_js". No network is used.

The golden JSON
    {"versions": of the packages that answered,
     "model": the folder in tests/models,
     "kind": "causal" or "seq2seq",
     "seed": of the weights,
     "cases": [{"name": ...,
                "prompts": texts; or lists of messages, for `apply_chat_template`,
                "input_ids": of each prompt, without padding,
                "options": of `generate`, to be laid over generation_config.json,
                "ids": the new tokens: without the prompt, or without the decoder's start token;
                       a row ends with its first end token, and padding after it is left out.
                       With num_return_sequences = N the rows of a prompt follow one another,
                "scores": sequences_scores, one for each row; only with beams,
                "text": each row decoded, without special tokens: of a causal model what it adds
                        to the prompt's text}],
     "transformers_js": {"version": ..., "text": {name of a greedy case of one prompt: the new text,
                                                  or {"error": why}}} or {"error": why}}

    Several prompts are one batch, padded as the tokenizer's padding side says: on the left for
    causal models, on the right for an encoder. Without the cache `transformers` answers the same.
    A golden of a graph that cannot read padding has no such batch.

    Transformers.js is asked through its pipelines: the same text or messages, the same file and
    options, and the special tokens that the tokenizer puts around a text. Those its
    text-generation leaves out on its own where tokenizer_config.json has no `add_bos_token`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import shutil
import signal
import subprocess
import sys
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from generator_types import EXPORTERS, TOKENIZERS, TYPES, GeneratorType, check_graphs
from make_models import GOLDENS, MODELS, UNSET_LENGTH, write_json
from make_tasks import UnfitError
from task_oracles import run_javascript
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

GENERATION = GOLDENS / "generation"
PACKAGES = ("transformers", "torch", "tokenizers", "optimum-onnx", "onnxruntime")
ATTEMPTS = 200
NEW = 20
"""How many tokens are written."""
GAP = 1e-3
"""How far the two best logits are apart at least, wherever a case is greedy."""
NOISE = 2e-4
"""How far logits may be off without an answer becoming another."""
PATIENCE = 120
"""How many seconds Transformers.js may take for one model."""
PLAIN = ("single-", "ends-", "chat-")
"""How the names of cases begin that Transformers.js is asked."""

PROMPTS = (
    "The tide goes out twice a day",
    "When the wind turns north, the fishermen stay at home and mend",
    "Nobody knows the harbour",
)
CHAT = (
    [{"role": "user", "content": "Who built the lighthouse?"}],
    [
        {"role": "user", "content": "How high is the tide?"},
        {"role": "assistant", "content": "Four metres."},
        {"role": "user", "content": "And tomorrow?"},
    ],
)

Case = dict[str, Any]

# --------------------------------------------------------------------------------------------------
# The folder
# --------------------------------------------------------------------------------------------------


def write_tokenizer(kind: GeneratorType, folder: Path) -> PreTrainedTokenizerFast:
    """Write the files of the tokenizer; return it as `transformers` reads them."""
    made = TOKENIZERS[kind.tokenizer]
    text = made.make().to_str(pretty=False)
    (folder / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    settings: dict[str, Any] = {**made.settings, **made.special_tokens, **kind.settings}
    settings["tokenizer_class"] = kind.tokenizer_class
    settings["model_max_length"] = UNSET_LENGTH
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", dict(made.special_tokens))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.padding_side = "right" if kind.seq2seq else "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def generation_of(kind: GeneratorType, tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """What generation_config.json says; tokens named by their text have become ids."""
    settings: dict[str, Any] = {
        name: getattr(tokenizer, name)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if getattr(tokenizer, name) is not None
    }
    if "pad_token" not in TOKENIZERS[kind.tokenizer].special_tokens:
        del settings["pad_token_id"]
    for name, value in kind.generation.items():
        if name.endswith("_id"):
            value = tokenizer.convert_tokens_to_ids(value)
        elif name == "bad_words_ids":
            value = [tokenizer.convert_tokens_to_ids(words) for words in value]
        settings[name] = value
    return GenerationConfig(**settings)


# --------------------------------------------------------------------------------------------------
# The weights
# --------------------------------------------------------------------------------------------------


def make_model(
    kind: GeneratorType, tokenizer: PreTrainedTokenizerFast, seed: int
) -> PreTrainedModel:
    """A model in torch whose layers say more than its embeddings do."""
    generation = generation_of(kind, tokenizer)
    special = {
        name: getattr(tokenizer, name)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if getattr(tokenizer, name) is not None
    }
    for name in ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"):
        special[name] = getattr(generation, name, None)
    config = AutoConfig.for_model(
        kind.model_type,
        **{**special, "vocab_size": len(tokenizer), **kind.config},
    )
    torch.manual_seed(seed)
    auto_class = AutoModelForSeq2SeqLM if kind.seq2seq else AutoModelForCausalLM
    model: PreTrainedModel = auto_class.from_config(config, attn_implementation="eager").eval()
    draw(model, kind.gains)
    soften(model, tokenizer)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = "float32"
    model.generation_config = generation
    return model


@torch.no_grad()
def draw(model: PreTrainedModel, gains: Mapping[str, float]) -> None:
    """Draw the weights.

    The signs of the norms are random: with tied embeddings a token would be followed by itself.
    """
    for name, module in model.named_modules():
        kind = type(module).__name__
        words = isinstance(module, torch.nn.Embedding) or name.endswith("lm_head")
        gain = next((gains[end] for end in gains if name.endswith(end)), 0.5 if words else 2.0)
        for own, parameter in module.named_parameters(recurse=False):
            if "Norm" in kind and own == "weight":
                signs = torch.randint(0, 2, parameter.shape) * 2.0 - 1
                parameter.copy_(signs * (1 + 0.1 * torch.randn(parameter.shape)))
                if "Gemma" in kind:
                    parameter -= 1
            elif words and parameter.dim() > 1:
                parameter.normal_(0.0, gain)
            elif parameter.dim() > 1:
                inputs = parameter.shape[0] if kind == "Conv1D" else parameter[0].numel()
                parameter.normal_(0.0, gain / inputs**0.5)
            elif "bias" in own:
                parameter.normal_(0.0, 0.1)


@torch.no_grad()
def soften(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Make tokens that are no text on their own come up less often."""
    head = model.get_output_embeddings().weight
    special = set(tokenizer.all_special_ids)
    for number in range(len(tokenizer)):
        text = tokenizer.decode([number], clean_up_tokenization_spaces=False)
        if number in special or "\ufffd" in text or not text.isprintable():
            head[number] *= 0.6


# --------------------------------------------------------------------------------------------------
# The oracle
# --------------------------------------------------------------------------------------------------


class Oracle:
    """`transformers` on one model."""

    def __init__(
        self, kind: GeneratorType, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        self.kind = kind
        self.model = model
        self.tokenizer = tokenizer
        self._noise: torch.Generator | None = None
        model.register_forward_hook(self._disturb)

    def encode(self, prompts: Sequence[Any]) -> list[list[int]]:
        """The tokens of each prompt."""
        if isinstance(prompts[0], str):
            return [self.tokenizer(one)["input_ids"] for one in prompts]
        return [
            self.tokenizer.apply_chat_template(list(one), add_generation_prompt=True)
            for one in prompts
        ]

    def ask(self, name: str, prompts: Sequence[Any], **options: Any) -> Case:
        """One case: asked, and asked again of logits that are a little off."""
        input_ids = self.encode(prompts)
        options = {"max_new_tokens": NEW, **options}
        ids, scores, gap = self.generate(input_ids, **options)
        if gap < GAP:
            raise UnfitError(f"{name}: logits are {gap:.1e} apart")
        for seed in (1, 2):
            self._noise = torch.Generator().manual_seed(seed)
            try:
                other, _, _ = self.generate(input_ids, **options)
            finally:
                self._noise = None
            if other != ids:
                raise UnfitError(f"{name} hangs on rounding")
        case: Case = {
            "name": name,
            "prompts": list(prompts),
            "input_ids": input_ids,
            "options": options,
            "ids": ids,
        }
        if scores is not None:
            case["scores"] = [round(score, 6) for score in scores]
        copies = len(ids) // len(input_ids)
        before = [row for row in input_ids for _ in range(copies)]
        case["text"] = [
            self._text(row)
            if self.kind.seq2seq
            else self._text([*prompt, *row])[len(self._text(prompt)) :]
            for prompt, row in zip(before, ids, strict=True)
        ]
        return case

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def generate(
        self, input_ids: Sequence[Sequence[int]], **options: Any
    ) -> tuple[list[list[int]], list[float] | None, float]:
        """The new tokens, the scores of beams, and how close two best logits came."""
        padded = self.tokenizer.pad({"input_ids": [*input_ids]}, return_tensors="pt")
        if self.model.generation_config.pad_token_id is None:
            options = {"pad_token_id": self.tokenizer.pad_token_id, **options}
        found = self.model.generate(
            input_ids=padded["input_ids"],
            attention_mask=padded["attention_mask"],
            return_dict_in_generate=True,
            output_scores=True,
            **{"do_sample": False, **options},
        )
        start = 1 if self.kind.seq2seq else padded["input_ids"].shape[1]
        ends = options.get("eos_token_id", self.model.generation_config.eos_token_id)
        ends = {*ends} if isinstance(ends, list) else {ends}
        rows = [cut(row, ends) for row in found.sequences[:, start:].tolist()]
        if found.get("sequences_scores") is not None:
            # A hypothesis that was cut ends with padding, also where no end token was written.
            pad = self.tokenizer.pad_token_id
            rows = [row if ends & {*row} else strip(row, pad) for row in rows]
            return rows, found.sequences_scores.tolist(), GAP
        gap = float("inf")
        for step, logits in enumerate(found.scores):
            best = logits.topk(2).values
            apart = (best[:, 0] - best[:, 1]).tolist()
            gap = min(
                [gap, *(one for one, row in zip(apart, rows, strict=True) if step < len(row))]
            )
        return rows, None, gap

    def _disturb(self, _model: Any, _args: Any, outputs: Any) -> Any:
        if self._noise is not None and "logits" in outputs:
            noise = torch.rand(outputs.logits.shape, generator=self._noise) * 2 - 1
            outputs["logits"] = outputs.logits + NOISE * noise
        return outputs


def cut(row: list[int], ends: set[int]) -> list[int]:
    """A row up to its first end token."""
    for place, token in enumerate(row):
        if token in ends:
            return row[: place + 1]
    return row


def strip(row: list[int], pad: int) -> list[int]:
    """A row without the padding at its end."""
    while row and row[-1] == pad:
        row = row[:-1]
    return row


# --------------------------------------------------------------------------------------------------
# The cases
# --------------------------------------------------------------------------------------------------


def plain_cases(oracle: Oracle) -> list[Case]:
    """Greedy: each prompt alone, all as one batch, and with an end that comes sooner."""
    kind = oracle.kind
    options: dict[str, Any] = {}
    if kind.target:
        options["forced_bos_token_id"] = oracle.tokenizer.convert_tokens_to_ids(kind.target)
    if oracle.model.generation_config.num_beams > 1:
        options["num_beams"] = 1
    first = oracle.generate(oracle.encode(PROMPTS[:1]), max_new_tokens=NEW, **options)[0]
    check_varied(first)
    singles = [
        oracle.ask(f"single-{number}", [prompt], **options)
        for number, prompt in enumerate(PROMPTS, 1)
    ]
    check_varied([one["ids"][0] for one in singles])
    cases = [*singles]
    end = ending(singles)
    cases += [
        oracle.ask(f"ends-{number}", [prompt], eos_token_id=end, **options)
        for number, prompt in enumerate(PROMPTS, 1)
        if end in singles[number - 1]["ids"][0]
    ]
    if kind.padded:
        cases.append(oracle.ask("batch", PROMPTS, **options))
        cases.append(oracle.ask("ends-batch", PROMPTS, eos_token_id=end, **options))
    if oracle.tokenizer.chat_template:
        cases += [oracle.ask(f"chat-{number}", [one]) for number, one in enumerate(CHAT, 1)]
    batches = [case for case in cases if case["name"] == "batch"]
    if any(case["ids"] != [one["ids"][0] for one in singles] for case in batches):
        raise UnfitError("the batch makes a difference")
    for case in cases:
        if oracle.generate(case["input_ids"], **case["options"], use_cache=False)[0] != case["ids"]:
            raise UnfitError(f"{case['name']}: the cache makes a difference")
    return cases


def check_varied(rows: Sequence[Sequence[int]]) -> None:
    """Check that what is written differs from prompt to prompt, and within itself."""
    fewest = min(len(set(row)) for row in rows)
    if fewest < NEW // 2 - 1 or len({tuple(row[:8]) for row in rows}) < len(rows):
        raise UnfitError("what is written is too much alike")
    if any(len(row) < NEW for row in rows):
        raise UnfitError("an end by itself")


def ending(singles: Sequence[Case]) -> int:
    """A token that some rows have, but none at once."""
    rows = [one["ids"][0] for one in singles]
    counts: dict[int, int] = {}
    for row in rows:
        for token in {*row[3:-3]} - {*row[:3]}:
            counts[token] = counts.get(token, 0) + 1
    early = {token for row in rows for token in row[:3]}
    usable = {token: count for token, count in counts.items() if token not in early}
    if not usable:
        raise UnfitError("no token to end with")
    return min(usable, key=lambda token: (-usable[token], token))


def rich_cases(oracle: Oracle, plain: Sequence[Case]) -> list[Case]:
    """Beams, and the processors of logits."""
    first, second, _ = (one["ids"][0] for one in plain[:3])
    greedy = oracle.ask
    begin = 1 if oracle.kind.seq2seq else 0  # bart forces its first token
    end = ending([*plain[:3]])
    cases = []

    def ask(name: str, prompts: Sequence[Any] = PROMPTS, **options: Any) -> None:
        cases.append(greedy(name, prompts, **options))

    ask("repetition_penalty", repetition_penalty=1.5)
    ask("no_repeat_ngram_size", no_repeat_ngram_size=1)
    ask("no_repeat_ngram_size-2", PROMPTS[:1], no_repeat_ngram_size=2, max_new_tokens=40)
    ask("min_new_tokens", min_new_tokens=12, eos_token_id=end)
    ask("bad_words_ids", bad_words_ids=[[first[begin]], second[2:4], [end]])
    ask(
        "sequence_bias",
        sequence_bias=[[[first[begin + 1]], -6.0], [second[3:5], -8.0], [[first[7]], 2.5]],
    )
    ask("suppress_tokens", suppress_tokens=sorted({first[4], first[6], second[5]}))
    ask("begin_suppress_tokens", begin_suppress_tokens=sorted({first[begin], second[begin]}))
    ask("forced_eos_token_id", forced_eos_token_id=end, max_new_tokens=7)
    ask(
        "exponential_decay_length_penalty",
        eos_token_id=end,
        exponential_decay_length_penalty=[4, 1.4],
    )
    ask(
        "together",
        repetition_penalty=1.2,
        no_repeat_ngram_size=2,
        min_new_tokens=6,
        eos_token_id=end,
        bad_words_ids=[[first[begin]]],
        suppress_tokens=[second[3]],
    )
    if oracle.kind.seq2seq:
        ask("forced_bos_token_id", forced_bos_token_id=second[8])
        ask("encoder_no_repeat_ngram_size", encoder_no_repeat_ngram_size=1)
        ask("encoder_repetition_penalty", encoder_repetition_penalty=1.8)
    else:
        for number, prompt in enumerate(PROMPTS[:2], 1):
            ask(f"guidance_scale-{number}", [prompt], guidance_scale=1.5)
    beams = {"num_beams": 4, "num_return_sequences": 3}
    ask("beams-single", PROMPTS[1:2], num_beams=3)
    usual = greedy("", PROMPTS, **beams)["ids"]
    end = common(usual, begin)
    apart = False
    for penalty in (0.5, 1.0, 2.0):
        for early in (True, False, "never"):
            ask(
                f"beams-{penalty}-{early}".lower(),
                **beams,
                length_penalty=penalty,
                early_stopping=early,
                eos_token_id=end,
            )
        at_once, usually, never = (case["ids"] for case in cases[-3:])
        apart = apart or (at_once != usually and usually != never)
    if not apart:
        raise UnfitError("beams stop alike")
    ask("beams-ends", **beams, eos_token_id=[end, common(usual, begin, {end})])
    ask("beams-processed", **beams, no_repeat_ngram_size=2, repetition_penalty=1.3)
    lengths = {len(row) for case in cases for row in case["ids"] if "scores" in case}
    if len(lengths) < 4:
        raise UnfitError("beams end alike")
    return cases


def common(
    rows: Sequence[Sequence[int]], begin: int, without: Iterator[int] | set[int] = ()
) -> int:
    """The token that stands in most rows, though not at their beginning."""
    found: dict[int, int] = {}
    for row in rows:
        for token in {*row[begin + 2 : -1]} - {*row[: begin + 1]} - {*without}:
            found[token] = found.get(token, 0) + 1
    if not found:
        raise UnfitError("no token for beams to end with")
    return min(found, key=lambda token: (-found[token], token))


# --------------------------------------------------------------------------------------------------
# All of it
# --------------------------------------------------------------------------------------------------


def make(kind: GeneratorType) -> dict[str, Any]:
    """Make one model; return its golden, without what Transformers.js answers."""
    folder = MODELS / f"gen-{kind.name}"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "onnx").mkdir(parents=True)
    tokenizer = write_tokenizer(kind, folder)
    first = zlib.crc32((kind.weights_of or kind.name).encode()) % 1000 * 1000
    refusals: list[str] = []
    for seed in range(first, first + ATTEMPTS):
        try:
            model = make_model(kind, tokenizer, seed)
            oracle = Oracle(kind, model, tokenizer)
            if kind.weights_of:
                wanted = json.loads((GENERATION / f"{kind.weights_of}.json").read_text())["seed"]
                if seed != wanted:
                    continue
            cases = plain_cases(oracle)
            plain = [case for case in cases if "eos_token_id" not in case["options"]]
            if model.generation_config.num_beams > 1:
                more = {}
                if kind.target:
                    more["forced_bos_token_id"] = tokenizer.convert_tokens_to_ids(kind.target)
                cases.append(oracle.ask("defaults", PROMPTS, **more))
            if kind.rich:
                cases += rich_cases(oracle, cases)
        except UnfitError as error:
            refusals.append(str(error))
            continue
        break
    else:
        raise AssertionError(f"no seed is fit: {refusals[-10:]}")
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    EXPORTERS[kind.graph](model, folder / "onnx")
    worst = check_graphs(folder, model, tokenizer, plain)
    size = sum(one.stat().st_size for one in folder.rglob("*") if one.is_file())
    print(
        f"{kind.name}: {size // 1000} kB, seed {seed - first}, logits off by {worst:.1e}",
        flush=True,
    )
    return {
        "versions": {name: version(name) for name in PACKAGES},
        "model": folder.name,
        "kind": "seq2seq" if kind.seq2seq else "causal",
        "seed": seed,
        "cases": cases,
    }


def write_golden(file: Path, golden: Mapping[str, Any]) -> None:
    """Write a golden with one line for each value of a case."""
    lines = []
    for name, value in golden.items():
        if name != "cases":
            lines.append(f" {json.dumps(name)}: {json.dumps(value)}")
            continue
        cases = [
            "  {"
            + ",\n   ".join(f"{json.dumps(key)}: {json.dumps(one)}" for key, one in case.items())
            + "}"
            for case in value
        ]
        lines.append(' "cases": [\n' + ",\n".join(cases) + "\n ]")
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def javascript_job(golden: Mapping[str, Any]) -> dict[str, Any]:
    """The greedy cases of one prompt, as Transformers.js is asked them."""
    seq2seq = golden["kind"] == "seq2seq"
    more = {} if seq2seq else {"return_full_text": False, "add_special_tokens": True}
    merged = (MODELS / golden["model"] / "onnx" / "decoder_model_merged.onnx").exists()
    return {
        "model": golden["model"],
        "task": "text2text-generation" if seq2seq else "text-generation",
        "options": {"model_file_name": "decoder_model_merged"} if merged and not seq2seq else {},
        "calls": {
            case["name"]: [case["prompts"][0], {**case["options"], **more}]
            for case in golden["cases"]
            if len(case["prompts"]) == 1 and case["name"].startswith(PLAIN)
        },
    }


def new_text(answer: Any) -> Any:
    """The text in an answer of Transformers.js: of a chat, that of its last message."""
    if "error" in answer:
        return refusal(answer)
    text = answer[0]["generated_text"]
    return text if isinstance(text, str) else text[-1]["content"]


def refusal(answer: Mapping[str, str]) -> dict[str, str]:
    """Why there is no answer, without the path of this machine."""
    return {"error": answer["error"].replace(str(MODELS), "tests/models")}


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """What takes longer than this ends with `TimeoutError`."""

    def stop(_number: int, _frame: Any) -> None:
        raise TimeoutError(f"no answer in {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def ask_javascript(npm: Path, golden: Mapping[str, Any]) -> dict[str, Any]:
    """What Transformers.js answers, in a process of its own for each model."""
    try:
        with within(PATIENCE):
            spoken, (found,) = run_javascript(npm, MODELS, [javascript_job(golden)])
    except TimeoutError as error:
        return {"error": str(error)}
    except subprocess.CalledProcessError as error:
        return {"error": f"the process ended with {error.returncode}"}
    if "*" in found:
        return {"version": spoken, **refusal(found["*"])}
    texts = {case: new_text(answer) for case, answer in found.items()}
    first, *others = texts.values()
    if isinstance(first, dict) and all(one == first for one in others):
        return {"version": spoken, **first}
    return {"version": spoken, "text": texts}


def compare_javascript(npm: Path, names: Sequence[str]) -> None:
    """Write into goldens what Transformers.js answers, and say where it differs."""
    for name in names:
        file = GENERATION / f"{name}.json"
        if not file.exists():
            print(f"{name}: has no golden", flush=True)
            continue
        golden = json.loads(file.read_text(encoding="utf-8"))
        found = golden["transformers_js"] = ask_javascript(npm, golden)
        write_golden(file, golden)
        expected = {case["name"]: case["text"][0] for case in golden["cases"]}
        texts = found.get("text", {})
        apart = {case: text for case, text in texts.items() if text != expected[case]}
        agreed = f"agrees on {len(texts) - len(apart)} of {len(texts)}"
        said = found.get("error", f"{agreed} {apart or ''}")
        print(f"{name}: Transformers.js: {said}"[:400], flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the named types, or all."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [kind.name for kind in TYPES]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--npm", type=Path, metavar="FOLDER", help="where npm i was run")
    parser.add_argument(
        "--only-transformers-js",
        action="store_true",
        help="make nothing; write into the goldens what Transformers.js answers",
    )
    wanted = parser.parse_args(arguments)
    if unknown := set(wanted.names) - set(names):
        parser.error(f"no such type: {', '.join(sorted(unknown))}")
    if wanted.npm and not (wanted.npm / "node_modules" / "@huggingface" / "transformers").is_dir():
        parser.error(f"no Transformers.js in {wanted.npm}: run npm i @huggingface/transformers")
    if wanted.only_transformers_js:
        if wanted.npm is None:
            parser.error("--only-transformers-js needs --npm")
        compare_javascript(wanted.npm, wanted.names or names)
        return 0
    GENERATION.mkdir(parents=True, exist_ok=True)
    made = []
    failed = []
    for kind in TYPES:
        if wanted.names and kind.name not in wanted.names:
            continue
        try:
            golden = make(kind)
        except Exception as error:  # the others are made all the same
            shutil.rmtree(MODELS / f"gen-{kind.name}", ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                (GENERATION / f"{kind.name}.json").unlink()
            failed.append(kind.name)
            print(f"{kind.name}: {type(error).__name__}: {error}"[:1500], flush=True)
            continue
        write_golden(GENERATION / f"{kind.name}.json", golden)
        made.append(kind.name)
    if wanted.npm:
        compare_javascript(wanted.npm, made)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
