"""What every task that writes text shares: its calls, streams and results."""

from __future__ import annotations

import dataclasses
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Generator,
    Iterator,
    Sequence,
)
from contextlib import aclosing, closing
from typing import Any, Final, Generic, Self, TypeVar

from ebbtide.cancellation import CancelToken
from ebbtide.errors import InputError
from ebbtide.generation.loop import Written
from ebbtide.models.text_stream import TextStream
from ebbtide.pipelines.base import Pipeline, Telling
from ebbtide.pipelines.writing import Asked, Generated

BATCH_ROWS: Final = 8
"""Prompts of a list that are written on together."""

PromptT = TypeVar("PromptT")


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


class _Stream:
    """What streams of either kind have."""

    def __init__(self, token: CancelToken, results: Sequence[Sequence[Any]]) -> None:
        self._token = token
        self._results = results
        self._is_read = False

    @property
    def result(self) -> dict[str, Any] | None:
        """What a call would have given; None until the stream has been read to its end."""
        return self._results[0][0] if self._is_read else None

    def cancel(self) -> None:
        """Stop the writing, from any thread: who reads it gets a `PipelineCancelledError`."""
        self._token.cancel()


class Stream(_Stream, Iterator[Piece]):
    """A text as it is written: its pieces, once. Whoever stops reading stops the writing.

    Example:
        >>> import ebbtide
        >>> with ebbtide.pipeline("text-generation", "tests/models/gen-llama") as write:
        ...     with write.stream("The tide", max_new_tokens=3) as pieces:
        ...         text = "".join(map(str, pieces))
        ...     text == pieces.result["generated_text"].removeprefix("The tide")
        True
    """

    def __init__(
        self,
        pieces: Generator[Piece, None, None],
        token: CancelToken,
        results: Sequence[Sequence[Any]],
    ) -> None:
        super().__init__(token, results)
        self._pieces = pieces

    def __next__(self) -> Piece:
        try:
            return next(self._pieces)
        except StopIteration:
            self._is_read = bool(self._results)  # and was not closed before
            raise

    def close(self) -> None:
        """Stop reading."""
        self._pieces.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class AsyncStream(_Stream, AsyncIterator[Piece]):
    """The same as `Stream` on an event loop."""

    def __init__(
        self,
        pieces: AsyncGenerator[Piece, None],
        token: CancelToken,
        results: Sequence[Sequence[Any]],
    ) -> None:
        super().__init__(token, results)
        self._pieces = pieces

    async def __anext__(self) -> Piece:
        try:
            return await anext(self._pieces)
        except StopAsyncIteration:
            self._is_read = bool(self._results)
            raise

    async def aclose(self) -> None:
        """Stop reading, once the writing has stopped."""
        await self._pieces.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()


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
        """Raise where this is not one sequence."""
        if len(self.prompts) != 1:
            raise InputError("A stream is of one input: pass several one after another.")
        if self.asked.config.num_return_sequences > 1:
            raise InputError(
                "A stream is of one sequence: leave num_return_sequences out, or call the pipeline."
            )


class GeneratingPipeline(Pipeline, Generic[PromptT]):
    """A task that writes text: what such tasks share."""

    def _ids(self, prompt: PromptT) -> list[int]:
        """A prompt's tokens."""
        raise NotImplementedError

    def _before(self, ids: Sequence[int]) -> Sequence[int]:
        """What of a prompt's tokens comes before the new ones in the same text."""
        return ()

    def _generate(
        self,
        ids: Sequence[Sequence[int]],
        asked: Asked,
        token: CancelToken,
        tell: Callable[[Written], object],
    ) -> list[list[Generated]]:
        """Write on some prompts together."""
        raise NotImplementedError

    def _result(
        self, prompt: PromptT, before: Sequence[int], one: Generated, shown: Shown
    ) -> dict[str, Any]:
        """What is given for a row, after the prompt's tokens."""
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

    async def _acall(self, call: Understood[PromptT], streamer: Streamer | None) -> list[Any]:
        """The same on an event loop."""
        results: list[Any] = []
        if streamer is None:
            results = await self._submit(lambda token: self._write(call, token)).result()
        else:
            call.check_streamed()
            async with aclosing(self._asteps(self._pieces(call, results))) as pieces:
                async for piece in pieces:
                    streamer(piece)
        return results[0] if call.alone else results

    def _stream_of(self, call: Understood[PromptT]) -> Stream:
        call.check_streamed()
        results: list[list[Any]] = []
        token = CancelToken(self._lifecycle.label)
        return Stream(self._steps(self._pieces(call, results), token), token, results)

    def _astream_of(self, call: Understood[PromptT]) -> AsyncStream:
        call.check_streamed()
        results: list[list[Any]] = []
        token = CancelToken(self._lifecycle.label)
        return AsyncStream(self._asteps(self._pieces(call, results), token), token, results)

    def _write(self, call: Understood[PromptT], token: CancelToken) -> list[list[Any]]:
        """The results of all prompts; on a native thread."""
        ids = [self._ids(one) for one in call.prompts]
        results: list[list[Any]] = [[]] * len(ids)
        for some in self._together(ids, call.size):
            rows = self._generate(
                [ids[number] for number in some], call.asked, token, lambda written: None
            )
            for number, found in zip(some, rows, strict=True):
                prompt, before = call.prompts[number], ids[number]
                results[number] = [self._result(prompt, before, one, call.shown) for one in found]
        return results

    def _together(self, ids: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
        """The numbers of the prompts that are written on together: of about one length."""
        model: Any = self._model
        mixes, some = model.mixes_lengths, list[int]()
        for number in sorted(range(len(ids)), key=lambda number: len(ids[number])):
            apart = some and not mixes and len(ids[some[0]]) != len(ids[number])
            if len(some) == size or apart:
                yield some
                some = []
            some.append(number)
        yield some

    def _pieces(self, call: Understood[PromptT], results: list[Any]) -> Telling[Piece]:
        """Work that tells each piece, and leaves the results at its end."""
        (prompt,) = call.prompts

        def work(token: CancelToken, tell: Callable[[Piece], object]) -> None:
            special, ids = call.shown.special, self._ids(prompt)
            text = TextStream(
                lambda some: self.tokenizer.decode(some, skip_special_tokens=not special),
                self._before(ids),
                cleans=self.tokenizer.cleans,
            )

            def add(number: int, reason: str, chance: float | None) -> None:
                piece = text.put(number)
                tell(Piece(piece + text.end() if reason else piece, number, chance, reason or None))

            def told(written: Written) -> None:
                chance = None if written.logprobs is None else float(written.logprobs[0])
                add(int(written.ids[0]), written.reasons[0], chance)

            (found,) = self._generate([ids], call.asked, token, told)
            if call.asked.config.num_beams > 1:  # nothing was known before
                (row,) = found
                for place, number in enumerate(row.ids, 1):
                    add(number, row.reason if place == len(row.ids) else "", None)
            results.append([self._result(prompt, ids, one, call.shown) for one in found])

        return work
