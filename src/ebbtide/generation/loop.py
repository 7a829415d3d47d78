"""One token after another: what comes next in each row, and when a row ends."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from ebbtide.cancellation import CancelToken
from ebbtide.errors import InputError
from ebbtide.generation.config import GenerationConfig
from ebbtide.generation.processors import Processor, guided, log_softmax, sample
from ebbtide.generation.steps import Ids, Scores, Steps

Reason = Literal["", "stop", "length", "time", "criterion"]
"""Why a row ended: by a token or a text that ends it, at its length, out of time, by a caller's own
criterion; empty while it goes on."""

Draft = Callable[[NDArray[np.int64]], NDArray[np.int64]]
"""From the ids of a row, a guess of what comes next: no, one or several tokens."""

EndsText = Callable[[Ids], NDArray[np.bool_]]
"""Which rows end with a text that ends them."""

_PAD: Final = 0
_NONE: Final = np.empty(0, np.int64)


@dataclasses.dataclass(frozen=True, slots=True)
class Written:
    """One more token of every row.

    Attributes:
        ids: The tokens: [rows]; of a row that had ended, padding.
        reasons: Why each row has ended, with this token or before it; empty while it goes on.
        logprobs: Each token's log-probability by the processed scores, if asked for.
        scores: The processed scores, if asked for: [rows, vocabulary].
        logits: The model's own, if asked for: [rows, vocabulary].
    """

    ids: NDArray[np.int64]
    reasons: tuple[Reason, ...]
    logprobs: NDArray[np.float32] | None = None
    scores: Scores | None = None
    logits: Scores | None = None


def write(
    steps: Steps,
    prompt: Ids,
    config: GenerationConfig,
    *,
    token: CancelToken,
    last_length: int,
    processors: Sequence[Processor] = (),
    ends_text: EndsText | None = None,
    without_prompt: Steps | None = None,
    draft: Draft | None = None,
    logprobs: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Written]:
    """Write on each row of a prompt, the best token after the other or one drawn by chance.

    Rows end one by one, and are filled up with padding until all have. Who stops asking stops it.

    Args:
        steps: The model, which has seen nothing of the prompt yet, or how it begins; it is left
            open.
        prompt: The prompts, left-padded to one length: [rows, tokens].
        config: The options; beams are not looked at.
        token: Stops it from another thread.
        last_length: Tokens of a row at most, with its prompt.
        processors: What is done to the scores, in this order.
        ends_text: Which rows end, beside those with an end token.
        without_prompt: The same model for guidance, with all rows that are returned: it is shown
            the prompt's last token alone.
        draft: Guesses tokens, which the model checks in one step; for a single row. See
            `speculation`.
        logprobs: Whether each token's log-probability is wanted.
        clock: Seconds, for ``max_time``.

    Yields:
        A token of every row.

    Raises:
        PipelineCancelledError: The token was cancelled.
        InputError: The prompt leaves no room, or no token is allowed.
        RunError: The graph could not be run.
    """
    rows = _Rows(prompt, config, processors, last_length, ends_text, logprobs, clock)
    copies = config.num_return_sequences
    fresh, guess = prompt[:, steps.length :], _NONE
    behind = first = prompt[:, -1:]
    while True:
        token.check()
        logits = steps.forward(fresh, token, last=not len(guess))[:, -1 - len(guess) :]
        if copies > 1 and behind is first:
            again = np.repeat(np.arange(len(prompt)), copies)
            steps.select(again)
            logits, behind = logits[again], behind[again]
        if without_prompt is not None:
            assert config.guidance_scale is not None
            other = without_prompt.forward(behind, token)
            logits = guided(logits[:, -1], other[:, -1], config.guidance_scale)[:, None]
        for place in range(logits.shape[1]):
            written = rows.take(logits[:, place])
            yield written
            if all(written.reasons):
                return
            if place < len(guess) and written.ids[0] != guess[place]:
                steps.crop(steps.length - len(guess) + place)
                break
        behind = written.ids[:, None]
        guess = _NONE
        if draft is not None and len(written.ids) == 1:
            room = last_length - rows.ids.shape[1] - 1
            guess = draft(rows.ids[0])[: max(0, room)]
        fresh = np.concatenate([behind, guess[None]], axis=1) if len(guess) else behind


class _Rows:
    """Rows in the making, and which of them have ended."""

    def __init__(
        self,
        prompt: Ids,
        config: GenerationConfig,
        processors: Sequence[Processor],
        last_length: int,
        ends_text: EndsText | None,
        logprobs: bool,
        clock: Callable[[], float],
    ) -> None:
        copies = config.num_return_sequences
        rows, length = prompt.shape
        if length >= last_length:
            raise InputError(
                f"The prompt has {length} tokens, which leaves none of {last_length}: shorten it,"
                " or pass a larger max_length, or max_new_tokens.",
                value=length,
            )
        # Written into a buffer: to join arrays at each token would copy what there is each time.
        self._buffer = np.empty((rows * copies, min(last_length, length + 1024)), np.int64)
        self._buffer[:, :length] = np.repeat(prompt, copies, axis=0)
        self._length = length
        self._config = config
        self._processors = processors
        self._last_length = last_length
        self._ends_text = ends_text
        self._logprobs = logprobs
        self._clock = clock
        self._until = None if config.max_time is None else clock() + config.max_time
        self._ends = frozenset(config.eos_token_id)
        self._pad = _PAD if config.pad_token_id is None else config.pad_token_id
        self._dice = np.random.default_rng(config.seed) if config.do_sample else None
        self._reasons: list[Reason] = [""] * (rows * copies)
        self._going = np.ones(rows * copies, bool)
        self._all_go = True

    @property
    def ids(self) -> Ids:
        """All tokens so far: [rows, length]."""
        return self._buffer[:, : self._length]

    def take(self, logits: Scores) -> Written:
        """Take a token for each row from what the model says comes next."""
        ids, config = self.ids, self._config
        scores = logits
        for one in self._processors:
            scores = one(ids, scores)
        found = scores.argmax(axis=-1) if self._dice is None else sample(scores, self._dice)
        if not self._all_go:
            found = np.where(self._going, found, self._pad)
        taken = None
        if self._logprobs:
            taken = np.take_along_axis(log_softmax(scores), found[:, None], axis=1)[:, 0]
        self._append(found)
        self._end(scores, found)
        return Written(
            found,
            tuple(self._reasons),
            taken,
            scores if config.output_scores else None,
            logits if config.output_logits else None,
        )

    def _append(self, tokens: NDArray[np.int64]) -> None:
        if self._length == self._buffer.shape[1]:
            wider = np.empty((len(self._buffer), self._length * 2), np.int64)
            wider[:, : self._length] = self._buffer
            self._buffer = wider
        self._buffer[:, self._length] = tokens
        self._length += 1

    def _end(self, scores: Scores, newest: NDArray[np.int64]) -> None:
        """Note which rows have ended with their newest token."""
        for row, one in enumerate(newest.tolist()):
            if one in self._ends:
                self._note(row, "stop")
        if self._ends_text is not None:
            for row in np.flatnonzero(self._ends_text(self.ids)).tolist():
                self._note(row, "stop")
        for criterion in self._config.stopping_criteria:
            which = np.broadcast_to(criterion(self.ids, scores), newest.shape)
            for row in np.flatnonzero(which).tolist():
                self._note(row, "criterion")
        late = self._until is not None and self._clock() >= self._until
        if self._length >= self._last_length or late:
            for row in range(len(newest)):
                self._note(row, "time" if self._length < self._last_length else "length")

    def _note(self, row: int, reason: Reason) -> None:
        if not self._reasons[row]:
            self._reasons[row] = reason
            self._going[row] = self._all_go = False
