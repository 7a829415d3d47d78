"""What every task that writes text shares: from token ids to rows of new ones, and their text."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import Any, Final, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from ebbtide.cancellation import CancelToken
from ebbtide.errors import InputError
from ebbtide.generation.beams import beam_search
from ebbtide.generation.config import GenerationConfig
from ebbtide.generation.loop import PromptLookup, Reason, Written, write
from ebbtide.generation.processors import Processor, processors
from ebbtide.generation.steps import Ids, Steps
from ebbtide.models.text_stream import TextStream
from ebbtide.models.tokenizer import Tokenizer
from ebbtide.pipelines.base import Pipeline, Telling

MAX_NEW_TOKENS: Final = 256
"""Tokens that are written where neither the caller nor the model says how many."""

BATCH_ROWS: Final = 8
"""Prompts of a list that are written on together."""

_LOOKED_BACK: Final = 8
"""Tokens beside those of the text itself that are looked at for a text that ends a row."""

PromptT = TypeVar("PromptT")

Begin = Callable[[NDArray[np.int64]], Steps]
"""Begins a generation, from which of the prompts' tokens are no padding."""


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """What one step of a stream adds.

    Attributes:
        text: The text that it adds; empty where a token ends inside a character.
        token: The token's id.
        logprob: Its log-probability, where that was asked for.
        finish_reason: ``stop`` (an end token or text), ``length``, ``time`` or ``criterion`` with
            the last piece; else None.
    """

    text: str
    token: int
    logprob: float | None = None
    finish_reason: str | None = None

    def __str__(self) -> str:
        return self.text


Streamer = Callable[[Piece], object]


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
    """

    ids: list[int]
    reason: Reason = ""
    logprobs: list[float] | None = None
    score: float | None = None
    scores: list[NDArray[np.float32]] | None = None
    logits: list[NDArray[np.float32]] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of the generation of some prompts.

    Attributes:
        config: The options.
        logprobs: Whether each token's log-probability is wanted.
        lookup: How many tokens are guessed from the prompt at most; 0 for none, None where it pays.
    """

    config: GenerationConfig
    logprobs: bool = False
    lookup: int | None = None


def generate(
    begin: Begin,
    prompts: Sequence[Sequence[int]],
    asked: Asked,
    tokenizer: Tokenizer,
    token: CancelToken,
    *,
    context: int | None,
    read: Ids | None = None,
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
    changes = processors(config, prompt_length=width, encoder_ids=ids if read is None else read)
    ends_text = _ending(config.stop_strings, tokenizer, width)
    steps = begin(mask)
    try:
        if config.num_beams > 1:
            return _searched(steps, ids, config, changes, last_length, ends_text, token)
        without = None
        try:
            if config.guidance_scale is not None and config.guidance_scale != 1:
                rows = len(ids) * config.num_return_sequences
                without = begin(np.ones((rows, 1), np.int64))
            rows_ = _Rows(len(ids), config)
            draft = None
            if asked.lookup is None and getattr(steps, "can_crop", False):
                draft = PromptLookup()
            elif asked.lookup:
                draft = PromptLookup(asked.lookup)
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
                rows_.add(written)
                tell(written)
            return rows_.result()
        finally:
            if without is not None:
                without.close()
    finally:
        steps.close()


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


def whole(name: str, number: int | None, least: int) -> int | None:
    """An option that is a whole number or None.

    Raises:
        InputError: It is something else, or too small.
    """
    if number is not None and (type(number) is not int or number < least):
        raise InputError(f"{name} takes a whole number from {least}, not {number!r}.", value=number)
    return number


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """How results are given.

    Attributes:
        special: Whether special tokens stay in the text.
        details: Whether more than the text is given.
        full_text: Whether the prompt is given with it.
    """

    special: bool
    details: bool
    full_text: bool = False

    def more(self, one: Generated) -> dict[str, Any]:
        """What is given beside the text."""
        if not self.details:
            return {}
        more = {name: getattr(one, name) for name in ("logprobs", "score", "scores", "logits")}
        there = {name: value for name, value in more.items() if value is not None}
        return {"token_ids": one.ids, "finish_reason": one.reason} | there


@dataclasses.dataclass(frozen=True, slots=True)
class Understood(Generic[PromptT]):
    """One call, its inputs and options checked.

    Attributes:
        prompts: The inputs.
        alone: Whether there was one, and not a list.
        asked: What is asked of the generation.
        shown: How results are given.
        size: How many prompts are written on together.
    """

    prompts: list[PromptT]
    alone: bool
    asked: Asked
    shown: Shown
    size: int

    def check_streamed(self) -> None:
        """Raise where this is no one sequence that is known as it is written."""
        if len(self.prompts) != 1:
            raise InputError("A stream is of one input: pass several one after another.")
        if self.asked.config.num_beams > 1 or self.asked.config.num_return_sequences > 1:
            raise InputError(
                "A stream is of one sequence that is known as it is written: pass no num_beams and"
                " no num_return_sequences, or call the pipeline."
            )


class GeneratingPipeline(Pipeline, Generic[PromptT]):
    """A task that writes text: what such tasks share."""

    def _ids(self, prompt: PromptT) -> list[int]:
        """A prompt's tokens."""
        raise NotImplementedError

    def _generate(
        self,
        ids: Sequence[Sequence[int]],
        asked: Asked,
        token: CancelToken,
        tell: Callable[[Written], object],
    ) -> list[list[Generated]]:
        """Write on some prompts together."""
        raise NotImplementedError

    def _result(self, prompt: PromptT, one: Generated, shown: Shown) -> dict[str, Any]:
        """What is given for a row."""
        raise NotImplementedError

    @property
    def _rows_together(self) -> int:
        return 1 if self._model.shares_scales else BATCH_ROWS

    def _held(self) -> Callable[[int], None]:
        """Note what one generation's cache takes, in what the pipeline says of its memory."""
        caches, key = self._lifecycle.caches, object()

        def held(size: int) -> None:
            caches[key] = size
            if not size:
                caches.pop(key, None)

        return held

    def _call(self, call: Understood[PromptT], streamer: Streamer | None) -> list[Any]:
        """The results of a call, and its pieces as they are written to a streamer."""
        results: list[Any] = []
        if streamer is None:
            results = self._submit(lambda token: self._write(call, token)).wait()
        else:
            call.check_streamed()
            with closing(self._steps(self._pieces(call, results))) as pieces:
                for piece in pieces:
                    streamer(piece)
        return results[0] if call.alone else results

    async def _acall(self, call: Understood[PromptT]) -> list[Any]:
        """The same on an event loop."""
        results = await self._submit(lambda token: self._write(call, token)).result()
        return results[0] if call.alone else results

    def _stream_of(self, call: Understood[PromptT]) -> Generator[Piece, None, None]:
        call.check_streamed()
        return self._steps(self._pieces(call, []))

    def _astream_of(self, call: Understood[PromptT]) -> AsyncGenerator[Piece, None]:
        call.check_streamed()
        return self._asteps(self._pieces(call, []))

    def _write(self, call: Understood[PromptT], token: CancelToken) -> list[list[Any]]:
        """The results of all prompts; on a native thread."""
        ids = [self._ids(one) for one in call.prompts]
        order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
        results: list[list[Any]] = [[]] * len(ids)
        for first in range(0, len(order), call.size):
            some = order[first : first + call.size]
            rows = self._generate(
                [ids[number] for number in some], call.asked, token, lambda written: None
            )
            for number, found in zip(some, rows, strict=True):
                prompt = call.prompts[number]
                results[number] = [self._result(prompt, one, call.shown) for one in found]
        return results

    def _pieces(self, call: Understood[PromptT], results: list[Any]) -> Telling[Piece]:
        """Work that tells each piece, and leaves the results at its end."""
        (prompt,) = call.prompts

        def work(token: CancelToken, tell: Callable[[Piece], object]) -> None:
            special = call.shown.special
            text = TextStream(
                lambda ids: self.tokenizer.decode(ids, skip_special_tokens=not special)
            )

            def told(written: Written) -> None:
                number = int(written.ids[0])
                piece = text.put(number)
                reason = written.reasons[0] or None
                if reason:
                    piece += text.end()
                chance = None if written.logprobs is None else float(written.logprobs[0])
                tell(Piece(piece, number, chance, reason))

            (found,) = self._generate([self._ids(prompt)], call.asked, token, told)
            results.append([self._result(prompt, one, call.shown) for one in found])

        return work
