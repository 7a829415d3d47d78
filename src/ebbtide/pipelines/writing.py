"""From prompts' tokens to rows of new ones: one batch of a task that writes text."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ebbtide.cancellation import CancelToken
from ebbtide.errors import InputError, PipelineCancelledError
from ebbtide.generation.beams import beam_search
from ebbtide.generation.config import GenerationConfig
from ebbtide.generation.loop import Draft, Reason, Written, write
from ebbtide.generation.processors import Processor, processors
from ebbtide.generation.speculation import PromptLookup
from ebbtide.generation.steps import Ids, Steps
from ebbtide.models.structured import Structure
from ebbtide.models.structured_form import Form
from ebbtide.models.tokenizer import Tokenizer

MAX_NEW_TOKENS: Final = 256
"""Tokens that are written where neither the caller nor the model says how many."""

_LOOKED_BACK: Final = 8
"""Tokens beside those of the text itself that are looked at for a text that ends a row."""

Begin = Callable[[Ids, NDArray[np.int64]], Steps]
"""Begins a generation, from the prompts' tokens and which of them are no padding."""

Ended = Callable[[Steps, "NDArray[np.int64] | None"], object]
"""Takes what a generation kept, at its end, with all tokens of its row; None where these are not
known, or are those of several rows."""


@dataclasses.dataclass(slots=True)
class Generated:
    """One row that was written.

    Attributes:
        ids: The new tokens, with the one that ended it.
        reason: Why it ended.
        logprobs: Each token's log-probability, where that was asked for.
        score: A beam's score.
        scores: The processed scores of each step, if asked for: [vocabulary] each.
        logits: The model's own, if asked for.
        parsed: What a text of a given form says; None where no form was asked for.
    """

    ids: list[int]
    reason: Reason = ""
    logprobs: list[float] | None = None
    score: float | None = None
    scores: list[NDArray[np.float32]] | None = None
    logits: list[NDArray[np.float32]] | None = None
    parsed: tuple[Any] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of the generation of some prompts.

    Attributes:
        config: The options.
        logprobs: Whether each token's log-probability is wanted.
        lookup: How many tokens are guessed from the prompt at most; 0 for none, None where it pays.
        cache_prompt: Whether what the model saw is kept for a call that begins the same.
        assistant: A pipeline that guesses ahead.
        form: The form of each text.
    """

    config: GenerationConfig
    logprobs: bool = False
    lookup: int | None = None
    cache_prompt: bool = False
    assistant: Any = None
    form: Form | None = None


def generate(
    begin: Begin,
    prompts: Sequence[Sequence[int]],
    asked: Asked,
    tokenizer: Tokenizer,
    token: CancelToken,
    *,
    context: int | None,
    read: Ids | None = None,
    draft: Draft | None = None,
    structure: Structure | None = None,
    ended: Ended = lambda steps, ids: steps.close(),
    tell: Callable[[Written], object] = lambda written: None,
) -> list[list[Generated]]:
    """Write on some prompts together; on a native thread.

    Args:
        begin: Begins with the model.
        prompts: Each prompt's tokens.
        asked: What is asked.
        tokenizer: Knows the texts that end a row.
        token: Stops it.
        context: Tokens that the model can take.
        read: What an encoder has read, where there is one: [prompts, tokens].
        draft: Guesses tokens; for one prompt. None: they are looked up, as asked.
        structure: The form that each text has.
        ended: Takes what the generation kept, however it ended.
        tell: Told of each token; not in a beam search, which knows them at its end.

    Returns:
        For each prompt, what was written: one row, or as many as ``num_return_sequences``.
    """
    config = asked.config
    width = max(map(len, prompts))
    if not min(map(len, prompts)):
        raise InputError("The prompt is empty: pass some text for the model to go on from.")
    if context is not None and width >= context:
        raise InputError(
            f"The prompt has {width} tokens, and the model can take {context} with what it writes:"
            " shorten the prompt.",
            value=width,
        )
    ids, mask = _padded(prompts, width, config)
    last_length = config.last_length(width)
    if context is not None:
        last_length = min(last_length, context)
    form: list[Processor] = []
    if structure is not None:
        form.append(structure.begin(prompt_length=width, eos=config.eos_token_id))
    changes = processors(
        config, prompt_length=width, encoder_ids=ids if read is None else read, of_form=form
    )
    ends_text = _ending(config.stop_strings, tokenizer, width)
    steps = begin(ids, mask)
    rows = _Rows(len(ids), config)
    sound = False
    try:
        if config.num_beams > 1:
            return _searched(steps, ids, config, changes, last_length, ends_text, token)
        if draft is None and asked.lookup != 0:
            draft = _looked_up(steps, asked.lookup, token)
        with _without_prompt(begin, ids, config) as without:
            for written in write(
                steps,
                ids,
                config,
                token=token,
                last_length=last_length,
                processors=changes,
                ends_text=ends_text,
                without_prompt=without,
                draft=draft if without is None else None,
                logprobs=asked.logprobs,
            ):
                rows.add(written)
                tell(written)
        sound = True
        return rows.result()
    except PipelineCancelledError:
        sound = config.num_beams == 1  # it ends between two tokens, or a run that did not count
        raise
    finally:
        ended(steps, rows.only(prompts[0]) if sound else None)


def _looked_up(steps: Steps, most: int | None, token: CancelToken) -> Draft | None:
    """What guesses from the prompt; if nothing is said, only where it pays and changes nothing."""
    if most is None:
        return PromptLookup() if steps.may_guess(token) else None
    if not steps.takes_back:
        raise InputError(
            "The model keeps a state that cannot be taken back, and so no tokens can be guessed:"
            " leave prompt_lookup_num_tokens out."
        )
    return PromptLookup(most)


@contextmanager
def _without_prompt(begin: Begin, ids: Ids, config: GenerationConfig) -> Iterator[Steps | None]:
    """The same model beside itself, for guidance; it is shown each prompt's last token."""
    if config.guidance_scale in (None, 1):
        yield None
        return
    alone = np.repeat(ids[:, -1:], config.num_return_sequences, axis=0)
    with closing(begin(alone, np.ones_like(alone))) as steps:
        yield steps


class _Rows:
    """What is written of each row, collected."""

    def __init__(self, prompts: int, config: GenerationConfig) -> None:
        self._copies = config.num_return_sequences
        self._rows = [Generated([]) for _ in range(prompts * self._copies)]

    def add(self, written: Written) -> None:
        for number, (row, token) in enumerate(zip(self._rows, written.ids, strict=True)):
            if row.reason:
                continue
            row.ids.append(int(token))
            row.reason = written.reasons[number]
            if written.logprobs is not None:
                row.logprobs = [*(row.logprobs or []), float(written.logprobs[number])]
            if written.scores is not None:
                row.scores = [*(row.scores or []), written.scores[number]]
            if written.logits is not None:
                row.logits = [*(row.logits or []), written.logits[number].copy()]

    def only(self, prompt: Sequence[int]) -> NDArray[np.int64] | None:
        """All tokens of the row after its prompt; None where there are several rows."""
        if len(self._rows) != 1:
            return None
        return np.array([*prompt, *self._rows[0].ids], np.int64)

    def result(self) -> list[list[Generated]]:
        count = self._copies
        return [self._rows[first : first + count] for first in range(0, len(self._rows), count)]


def _searched(
    steps: Steps,
    ids: Ids,
    config: GenerationConfig,
    changes: Sequence[Processor],
    last_length: int,
    ends_text: Callable[[Ids], NDArray[np.bool_]] | None,
    token: CancelToken,
) -> list[list[Generated]]:
    until = None if config.max_time is None else time.monotonic() + config.max_time

    def should_stop(rows: Ids, scores: NDArray[np.float32]) -> NDArray[np.bool_]:
        found = np.zeros(len(rows), bool)
        if ends_text is not None:
            found |= ends_text(rows)
        for criterion in config.stopping_criteria:
            found |= criterion(rows, scores)
        if until is not None and time.monotonic() >= until:
            found[:] = True
        return found

    stops = bool(ends_text or config.stopping_criteria or until is not None)
    found = beam_search(
        steps,
        ids,
        token=token,
        num_beams=config.num_beams,
        max_length=last_length,
        eos_ids=config.eos_token_id,
        pad_id=config.pad_token_id or 0,
        num_return_sequences=config.num_return_sequences,
        length_penalty=config.length_penalty,
        early_stopping=config.early_stopping,
        num_beam_groups=config.num_beam_groups,
        diversity_penalty=config.diversity_penalty,
        processors=changes,
        do_sample=config.do_sample,
        generator=np.random.default_rng(config.seed) if config.do_sample else None,
        should_stop=should_stop if stops else None,
    )
    rows = []
    for row, length, score in zip(found.ids, found.lengths, found.scores, strict=True):
        new = row[: int(length)].tolist()
        ended = bool(new) and new[-1] in config.eos_token_id
        rows.append(Generated(new, "stop" if ended else "length", score=float(score)))
    count = config.num_return_sequences
    return [rows[first : first + count] for first in range(0, len(rows), count)]


def _padded(
    prompts: Sequence[Sequence[int]], width: int, config: GenerationConfig
) -> tuple[Ids, NDArray[np.int64]]:
    """Prompts as one array, padded at the left, and which of it are tokens."""
    ids = np.full((len(prompts), width), pad_of(config), np.int64)
    mask = np.zeros((len(prompts), width), np.int64)
    for row, one in enumerate(prompts):
        ids[row, width - len(one) :] = one
        mask[row, width - len(one) :] = 1
    return ids, mask


def pad_of(config: GenerationConfig) -> int:
    """The token that rows are filled up with: the model's own, else one that ends a row."""
    if config.pad_token_id is not None:
        return config.pad_token_id
    return config.eos_token_id[0] if config.eos_token_id else 0


def _ending(
    stops: tuple[str, ...], tokenizer: Tokenizer, prompt: int
) -> Callable[[Ids], NDArray[np.bool_]] | None:
    """Which rows end with a text that ends them, of what was written."""
    if not stops:
        return None
    back = max(len(one.encode()) for one in stops) + _LOOKED_BACK

    def ends(ids: Ids) -> NDArray[np.bool_]:
        first = max(prompt, ids.shape[1] - back)
        texts = (tokenizer.decode(row[first:].tolist(), skip_special_tokens=False) for row in ids)
        return np.array([any(one in text for one in stops) for text in texts])

    return ends


def config_of(
    defaults: Mapping[str, Any], tokenizer_pad: int | None, given: Mapping[str, Any]
) -> GenerationConfig:
    """One call's options over the model's own."""
    known = dict(defaults)
    if known.get("max_new_tokens") is None and known.get("max_length") in (None, 20):
        known["max_new_tokens"] = MAX_NEW_TOKENS
    if known.get("pad_token_id") is None and tokenizer_pad is not None:
        known["pad_token_id"] = tokenizer_pad
    return GenerationConfig.of(known, given)
