r"""Write down what the beam search of `transformers` finds with a toy model.

What it makes
    tests/goldens/generation/beams.json

    The toy model's logits are a hash of all tokens of a row, its padding left out: whoever mixes up
    rows or beams finds something else. It has no weights, and is written twice, here and in
    tests/generation/test_beams.py; the goldens show when the two differ.

How to run it
    It needs packages that Ebbtide itself does not need, best in a venv of their own with Python
    3.11 or later (a CPU build of torch is enough). `transformers` 4.57 has no diverse beam search
    of its own any more, so the script is run twice, and each run replaces its own cases:

        pip install "torch==2.13.0" "transformers==4.57.6" && python tools/make_beams.py
        pip install "transformers==4.56.2" && python tools/make_beams.py

    No network is used. Run twice with the same packages, it writes the same bytes.

The golden JSON
    {"versions": {"beams" or "groups": of the packages that answered},
     "beams" or "groups": [
        {"prompts": the token ids, one list for each row, without padding,
         "options": of `generate`; `max_new_tokens` after the longest prompt, and `stop_id`, a token
                    that a stopping criterion ends a sequence at,
         "sequences": the new tokens of each returned sequence, up to its end,
         "scores": one for each sequence}]}
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    StoppingCriteria,
)
from transformers.modeling_outputs import CausalLMOutput

GOLDENS = Path(__file__).parent.parent / "tests" / "goldens" / "generation" / "beams.json"

VOCABULARY = 17
PAD = 0
EOS: dict[str, list[int] | None] = {"none": None, "one": [3], "two": [5, 9]}
PROMPTS = {"one": [[4, 7, 1]], "three": [[8, 2, 11, 6], [13], [4, 7, 1]]}


def toy_logits(tokens: list[int]) -> np.ndarray:
    """The logits of the token after these, whose every one matters: [vocabulary]."""
    drawn = hashlib.shake_128(bytes(tokens)).digest(4 * VOCABULARY)
    return (np.frombuffer(drawn, "<u4") / 2**32 * 5).astype(np.float32)


class Toy(PreTrainedModel, GenerationMixin):
    """The toy model, without a cache."""

    config_class = PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__(PretrainedConfig(vocab_size=VOCABULARY))
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any
    ) -> CausalLMOutput:
        """The logits of the token after the last."""
        rows = [
            toy_logits(row[mask.bool()].tolist())
            for row, mask in zip(input_ids, attention_mask, strict=True)
        ]
        return CausalLMOutput(logits=torch.from_numpy(np.stack(rows))[:, None])


class StopAt(StoppingCriteria):
    """Ends a sequence at a token."""

    def __init__(self, stop_id: int) -> None:
        self.stop_id = stop_id

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Which sequences end."""
        return input_ids[:, -1] == self.stop_id


def beam_cases() -> Iterator[tuple[list[list[int]], dict[str, Any]]]:
    """The prompts and the options of each case of beam search."""
    extras = itertools.cycle(
        [
            {},
            {"no_repeat_ngram_size": 2},
            {"min_new_tokens": 4},
            {"stop_id": 7},
            {"repetition_penalty": 1.3},
        ]
    )
    prompts = itertools.cycle(PROMPTS.values())
    lengths = itertools.cycle([12, 1, 7, 2, 12, 9, 7])
    grid = itertools.product((2, 3, 5), (0.0, 0.5, 1.0, 2.0, -1.0), (False, True, "never"), EOS)
    for number, (beams, penalty, stopping, eos) in enumerate(grid):
        yield (
            next(prompts),
            {
                "num_beams": beams,
                "num_return_sequences": 1 + number // 4 % beams,
                "length_penalty": penalty,
                "early_stopping": stopping,
                "eos_token_id": EOS[eos],
                "max_new_tokens": next(lengths),
            }
            | next(extras),
        )


def group_cases() -> Iterator[tuple[list[list[int]], dict[str, Any]]]:
    """The prompts and the options of each case of diverse beam search."""
    extras = itertools.cycle([{}, {"no_repeat_ngram_size": 2}, {"repetition_penalty": 1.3}, {}])
    prompts = itertools.cycle(PROMPTS.values())
    lengths = itertools.cycle([12, 7, 1, 9, 12])
    shapes = ((2, 2), (4, 2), (6, 2), (6, 3))
    grid = itertools.product(shapes, (0.3, 2.5), (1.0, 0.0, -1.0), (False, True, "never"), EOS)
    for number, ((beams, groups), diversity, penalty, stopping, eos) in enumerate(grid):
        if number % 2:
            continue
        yield (
            next(prompts),
            {
                "num_beams": beams,
                "num_beam_groups": groups,
                "diversity_penalty": diversity,
                "num_return_sequences": 1 + number // 4 % beams,
                "length_penalty": penalty,
                "early_stopping": stopping,
                "eos_token_id": EOS[eos],
                "max_new_tokens": next(lengths),
            }
            | next(extras),
        )


def answered(model: Toy, prompts: list[list[int]], options: dict[str, Any]) -> dict[str, Any]:
    """A case, with what `transformers` answers."""
    asked = dict(options)
    stop_id = asked.pop("stop_id", None)
    width = max(map(len, prompts))
    given = model.generate(
        torch.tensor([[PAD] * (width - len(one)) + one for one in prompts]),
        attention_mask=torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts]),
        generation_config=GenerationConfig(
            **asked,
            do_sample=False,
            pad_token_id=PAD,
            use_cache=False,
            return_dict_in_generate=True,
            output_scores=True,
        ),
        stopping_criteria=[] if stop_id is None else [StopAt(stop_id)],
    )
    ends = {*(options["eos_token_id"] or []), stop_id}
    sequences = []
    for row in given.sequences[:, width:].tolist():
        end = next((place for place, one in enumerate(row) if one in ends), len(row))
        sequences.append(row[: end + 1])
    return {
        "prompts": prompts,
        "options": options,
        "sequences": sequences,
        "scores": [round(one, 6) for one in given.sequences_scores.tolist()],
    }


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    has_groups = hasattr(GenerationMixin, "_group_beam_search")
    part, cases = ("groups", group_cases()) if has_groups else ("beams", beam_cases())
    model = Toy().eval()
    written = json.loads(GOLDENS.read_text()) if GOLDENS.exists() else {"versions": {}}
    written["versions"][part] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    written[part] = [answered(model, *case) for case in cases]
    lines = ['{"versions": ' + json.dumps(written.pop("versions"), sort_keys=True)]
    for name in sorted(written):
        listed = ",\n".join(json.dumps(case) for case in written[name])
        lines.append(f'"{name}": [\n{listed}\n]')
    GOLDENS.parent.mkdir(parents=True, exist_ok=True)
    GOLDENS.write_text(",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main()
