r"""Write down what `transformers` makes of scores, for the tests of Ebbtide's own processors.

What it makes
    tests/goldens/generation/processors.npz    ids, scores, and the scores that came of them
    tests/goldens/generation/processors.json   which arrays belong together, and with which options

How to run it
    It needs torch and transformers, and no network.

        pip install "torch==2.13.0" "transformers==4.57.6" numpy
        python tools/make_generation.py

    Both files are replaced. Run twice with the same packages, it writes the same arrays.

The golden JSON
    {"versions": of the packages that answered,
     "cases":  [{"processor": the name of a function of ebbtide.generation.processors,
                 "options": its arguments besides ids and scores; "@name" stands for an array,
                 "ids", "scores", "expected": arrays}],
     "chains": [{"options": of a generation,
                 "prompt_length": tokens,
                 "longest": tokens of a row at most,
                 "encoder_ids", "ids", "scores", "expected": arrays}]}
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel
from transformers.generation import logits_process as theirs
from transformers.utils import ModelOutput

HERE = Path(__file__).parent.parent / "tests" / "goldens" / "generation"
SEED = 20260311
ROWS, LENGTH, VOCABULARY, LARGE = 4, 9, 40, 1500
ENDS = [3, 5]

Arrays = dict[str, np.ndarray]


class Goldens:
    """What is written in the end."""

    def __init__(self) -> None:
        self.dice = np.random.default_rng(SEED)
        self.arrays: Arrays = {}
        self.cases: list[dict[str, Any]] = []
        self.chains: list[dict[str, Any]] = []

    def keep(self, array: np.ndarray) -> str:
        """Keep an array; returns its name, which equal ones share."""
        for name, known in self.arrays.items():
            if known.dtype == array.dtype and np.array_equal(known, array, equal_nan=True):
                return name
        name = f"a{len(self.arrays)}"
        self.arrays[name] = array
        return name

    def case(
        self,
        name: str,
        make: Callable[..., Any],
        ids: np.ndarray,
        scores: np.ndarray,
        extra: tuple[Any, ...] = (),
        **options: Any,
    ) -> None:
        """Ask a processor of theirs; the options are those of ours of this name."""
        ours = {
            key: f"@{self.keep(value)}" if isinstance(value, np.ndarray) else value
            for key, value in options.items()
        }
        given = torch.from_numpy(ids.copy()), torch.from_numpy(scores.copy())
        expected = make()(*given, *extra).numpy()
        self.cases.append(
            {
                "processor": name,
                "options": ours,
                "ids": self.keep(ids),
                "scores": self.keep(scores),
                "expected": self.keep(expected),
            }
        )


def many_scores(dice: np.random.Generator) -> Arrays:
    """Scores of several shapes: with ties, flat, steep, and with tokens that are forbidden."""
    plain = dice.normal(0, 2, (ROWS, VOCABULARY)).astype(np.float32)
    forbidden = plain.copy()
    forbidden[:, ::2] = -np.inf
    one_left = np.full_like(plain, -np.inf)
    one_left[:, 7] = plain[:, 7]
    large = dice.normal(0, 3, (2, LARGE)).astype(np.float32)
    return {
        "plain": plain,
        "steep": plain * 8,
        "ties": np.round(plain),
        "flat": np.ones_like(plain),
        "forbidden": forbidden,
        "one_left": one_left,
        "large": large,
        "large_ties": np.round(large),
        "large_flat": dice.normal(0, 0.01, (1, LARGE)).astype(np.float32),
    }


def scores_alone(out: Goldens, scores: Arrays) -> None:
    """The processors that look at no ids."""
    for given in scores.values():
        ids = np.zeros((len(given), 1), np.int64)
        for value in (0.3, 0.7, 2.5):
            out.case(
                "temperature",
                lambda value=value: theirs.TemperatureLogitsWarper(value),
                ids,
                given,
                value=value,
            )
        for count in (1, 2, 5, 50, 5000):
            out.case(
                "top_k",
                lambda count=count: theirs.TopKLogitsWarper(count),
                ids,
                given,
                count=count,
            )
        for keep in (1, 3):
            kinds = (
                ("top_p", "share", theirs.TopPLogitsWarper, (0.0, 0.1, 0.5, 0.9, 0.999)),
                ("min_p", "share", theirs.MinPLogitsWarper, (0.02, 0.3, 1.0)),
                ("typical_p", "share", theirs.TypicalLogitsWarper, (0.1, 0.5, 0.95)),
                ("epsilon_cutoff", "least", theirs.EpsilonLogitsWarper, (3e-4, 0.02, 0.9)),
                ("eta_cutoff", "least", theirs.EtaLogitsWarper, (3e-4, 0.02, 0.9)),
            )
            for name, option, kind, values in kinds:
                for value in values:
                    out.case(
                        name,
                        lambda kind=kind, value=value, keep=keep: kind(
                            value, min_tokens_to_keep=keep
                        ),
                        ids,
                        given,
                        **{option: value, "keep": keep},
                    )
        out.case("normalised", theirs.LogitNormalization, ids, given)
    odd = scores["plain"].copy()
    odd[0, :3] = np.nan, np.inf, -np.inf
    out.case("finite", theirs.InfNanRemoveLogitsProcessor, np.zeros((ROWS, 1), np.int64), odd)


def what_was_said(out: Goldens, scores: Arrays) -> None:
    """The processors that look at the ids of rows or of the input."""
    few = out.dice.integers(0, 4, (ROWS, LENGTH))
    for given in (scores["plain"], scores["ties"], scores["forbidden"]):
        for ids in (few, out.dice.integers(0, VOCABULARY, (ROWS, LENGTH)), few[:, :1], few[:, :2]):
            read = out.dice.integers(0, 6, (ROWS, LENGTH + 2))
            for penalty in (0.8, 1.3):
                out.case(
                    "repetition_penalty",
                    lambda p=penalty: theirs.RepetitionPenaltyLogitsProcessor(p),
                    ids,
                    given,
                    penalty=penalty,
                )
                out.case(
                    "encoder_repetition_penalty",
                    lambda p=penalty, read=read: theirs.EncoderRepetitionPenaltyLogitsProcessor(
                        p, torch.from_numpy(read)
                    ),
                    ids,
                    given,
                    penalty=penalty,
                    encoder_ids=read,
                )
            for size in (1, 2, 3, 5, 20):
                out.case(
                    "no_repeat_ngram",
                    lambda size=size: theirs.NoRepeatNGramLogitsProcessor(size),
                    ids,
                    given,
                    size=size,
                )
                for inputs in (read, read[::2], read[:1]):
                    out.case(
                        "encoder_no_repeat_ngram",
                        lambda size=size, i=inputs: theirs.EncoderNoRepeatNGramLogitsProcessor(
                            size, torch.from_numpy(i)
                        ),
                        ids,
                        given,
                        size=size,
                        encoder_ids=inputs,
                    )
            last = tuple(ids[0, -2:].tolist())
            biases = {
                (1,): 2.5,
                (39,): -3.0,
                (0, 1): 4.0,
                (*last, 1): -1.25,
                (*last[-1:], 2): float("-inf"),
                (5, 6, 7, 8): 9.0,
            }
            out.case(
                "sequence_bias",
                lambda b=biases: theirs.SequenceBiasLogitsProcessor(b),
                ids,
                given,
                biases=[[list(run), bias] for run, bias in biases.items()],
            )
            groups = out.dice.integers(0, 5, 2 * ROWS)
            for group in (0, 1):
                out.case(
                    "hamming_diversity",
                    lambda: theirs.HammingDiversityLogitsProcessor(0.7, 4, 2),
                    ids,
                    given,
                    (torch.from_numpy(groups), group),
                    chosen=groups,
                    group=group,
                    penalty=0.7,
                    num_beams=4,
                    num_beam_groups=2,
                )


def how_far(out: Goldens, scores: Arrays) -> None:
    """The processors that look at how long a row is, and those that always forbid the same."""
    ids = out.dice.integers(0, VOCABULARY, (ROWS, LENGTH))
    for given in (scores["plain"], scores["steep"], scores["one_left"]):
        for length in (LENGTH, LENGTH + 1):
            out.case(
                "min_length",
                lambda length=length: theirs.MinLengthLogitsProcessor(length, ENDS),
                ids,
                given,
                length=length,
                ends=ENDS,
            )
            out.case(
                "min_length",
                lambda length=length: theirs.MinNewTokensLengthLogitsProcessor(2, length - 2, ENDS),
                ids,
                given,
                length=length,
                ends=ENDS,
            )
            out.case(
                "forced",
                lambda length=length: theirs.ForcedEOSTokenLogitsProcessor(length, ENDS),
                ids,
                given,
                tokens=ENDS,
                length=length - 1,
            )
            out.case(
                "suppressed",
                lambda length=length: theirs.SuppressTokensAtBeginLogitsProcessor([1, 2], length),
                ids,
                given,
                tokens=[1, 2],
                length=length,
            )
        for short in (ids[:, :1], ids[:, :2]):
            out.case(
                "forced",
                lambda: theirs.ForcedBOSTokenLogitsProcessor(11),
                short,
                given,
                tokens=[11],
                length=1,
            )
        out.case(
            "suppressed",
            lambda: theirs.SuppressTokensLogitsProcessor([1, 7, 39, 400]),
            ids,
            given,
            tokens=[1, 7, 39, 400],
        )
        if np.isfinite(given).all():
            for start in (2, LENGTH - 3, LENGTH, LENGTH + 4):
                out.case(
                    "exponential_decay",
                    lambda start=start: theirs.ExponentialDecayLengthPenalty((start, 1.2), ENDS, 0),
                    ids,
                    given,
                    start=start,
                    factor=1.2,
                    ends=ENDS,
                )


def guidance(out: Goldens, scores: Arrays) -> None:
    """Logits with a prompt and without it."""
    free = scores["plain"][::-1].copy()
    answer = ModelOutput(logits=torch.from_numpy(free.copy())[:, None])
    for scale in (1.0, 1.5, 7.0):
        for given in (scores["plain"], scores["ties"]):
            out.case(
                "guided",
                lambda scale=scale: theirs.UnbatchedClassifierFreeGuidanceLogitsProcessor(
                    scale, lambda *_, **__: answer
                ),
                np.zeros((ROWS, 1), np.int64),
                given,
                unconditional=free,
                scale=scale,
            )


CHAINS: list[dict[str, Any]] = [
    {},
    {"do_sample": True},
    {"do_sample": True, "top_k": 0, "temperature": 0.5, "top_p": 0.8},
    {"do_sample": True, "num_beams": 4, "top_p": 0.2, "top_k": 2, "typical_p": 0.5},
    {"do_sample": True, "num_beams": 4, "top_p": 0.2, "eos_token_id": [3, 5]},
    {
        "do_sample": True,
        "temperature": 1.4,
        "top_k": 30,
        "top_p": 0.95,
        "min_p": 0.01,
        "typical_p": 0.9,
        "epsilon_cutoff": 0.01,
        "eta_cutoff": 0.02,
        "renormalize_logits": True,
        "eos_token_id": 3,
    },
    {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "renormalize_logits": True},
    {"encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 2},
    {
        "sequence_bias": [[[1], 5.0], [[2, 1], -5.0]],
        "repetition_penalty": 1.2,
        "encoder_repetition_penalty": 1.1,
    },
    {"bad_words_ids": [[1], [3], [2, 4]], "eos_token_id": [3]},
    {"min_length": 12, "eos_token_id": [3, 5]},
    {"min_new_tokens": 3, "min_length": 30, "eos_token_id": [3, 5]},
    {"min_new_tokens": 2, "min_length": 30, "eos_token_id": [3, 5]},
    {"forced_eos_token_id": 3, "max_new_tokens": 3},
    {"forced_eos_token_id": 3, "max_length": 10},
    {"forced_eos_token_id": [3, 5], "max_length": 11},
    {"forced_bos_token_id": 8, "begin_suppress_tokens": [1, 2, 8]},
    {"begin_suppress_tokens": [1, 2, 8]},
    {
        "exponential_decay_length_penalty": [1, 1.5],
        "suppress_tokens": [2, 4],
        "remove_invalid_values": True,
        "eos_token_id": [3, 5],
        "max_length": 30,
    },
    {
        "no_repeat_ngram_size": 1,
        "remove_invalid_values": True,
        "suppress_tokens": [9],
        "repetition_penalty": 0.5,
        "do_sample": True,
        "temperature": 0.9,
    },
]
"""Options of a generation whose processors are asked one after another."""


def chains(out: Goldens, scores: Arrays) -> None:
    """All the processors that options bring, in their order."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=8, n_layer=1, n_head=1))
    ids = out.dice.integers(0, 6, (ROWS, LENGTH + 1))
    read = out.dice.integers(0, 6, (ROWS, LENGTH))
    for options in CHAINS:
        for given, prompt in ((scores["plain"], LENGTH - 1), (scores["ties"], 1)):
            for length in sorted({1, prompt, prompt + 1, LENGTH, LENGTH + 1}):
                if length < prompt:
                    continue
                config = GenerationConfig(
                    **{"eos_token_id": None, "pad_token_id": 0, "bos_token_id": 1, **options}
                )
                model._prepare_special_tokens(config, device="cpu")
                config = model._prepare_generated_length(
                    config,
                    "max_length" not in options,
                    "min_length" not in options,
                    "input_ids",
                    prompt,
                    torch.zeros(1),
                )
                found = model._get_logits_processor(
                    config, input_ids_seq_length=prompt, encoder_input_ids=torch.from_numpy(read)
                )
                at = ids[:, :length].copy()
                expected = found(torch.from_numpy(at.copy()), torch.from_numpy(given.copy()))
                out.chains.append(
                    {
                        "options": options,
                        "prompt_length": prompt,
                        "longest": config.max_length,
                        "encoder_ids": out.keep(read),
                        "ids": out.keep(at),
                        "scores": out.keep(given),
                        "expected": out.keep(expected.numpy()),
                    }
                )


def main() -> None:
    logging.disable(logging.WARNING)
    out = Goldens()
    scores = many_scores(out.dice)
    scores_alone(out, scores)
    what_was_said(out, scores)
    how_far(out, scores)
    guidance(out, scores)
    chains(out, scores)
    HERE.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(HERE / "processors.npz", **out.arrays)
    head = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
    lines = [f'{{"versions": {json.dumps(head)},']
    for name, rows in (("cases", out.cases), ("chains", out.chains)):
        joined = ",\n".join(json.dumps(row) for row in rows)
        lines.append(f'"{name}": [\n{joined}\n]' + ("," if name == "cases" else "}"))
    (HERE / "processors.json").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(out.cases)} cases, {len(out.chains)} chains, {len(out.arrays)} arrays")


if __name__ == "__main__":
    main()
