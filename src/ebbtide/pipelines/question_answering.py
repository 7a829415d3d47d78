"""question-answering: the piece of a context that answers a question, however long the context."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final, Never, TypedDict, overload

import numpy as np
from numpy.typing import NDArray

from ebbtide.errors import InputError
from ebbtide.models.batching import Work, unpadded
from ebbtide.models.text_encoder import SPANS, Outputs
from ebbtide.models.tokenizer import Batch, Encoding
from ebbtide.pipelines import inputs as given
from ebbtide.pipelines import scores as scoring
from ebbtide.pipelines.base import Call, Pipeline
from ebbtide.pipelines.progress import Progress

_OPTIONS: Final = (
    "top_k", "doc_stride", "max_seq_len", "max_answer_len", "handle_impossible_answer",
    "align_to_words", "batch_size", "window", "progress",
)  # fmt: skip

_WINDOW: Final = 384
_STRIDE: Final = 128


class Answer(TypedDict):
    """A piece of the context, ``context[start:end]``, and how sure the model is of it."""

    score: float
    start: int
    end: int
    answer: str


Asked = Mapping[str, str]
"""A question with its context: ``{"question": ..., "context": ...}``."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Options:
    top_k: int
    stride: int
    window: int
    longest: int
    impossible: bool
    align: bool
    many: given.Many


class QuestionAnsweringPipeline(Pipeline):
    """Questions to answers out of a context.

    Example:
        >>> import ebbtide
        >>> with ebbtide.pipeline("question-answering", "tests/models/bert/span") as answer:
        ...     found = answer("What goes out?", "The tide goes out at six.")
        >>> sorted(found)
        ['answer', 'end', 'score', 'start']
    """

    task: ClassVar[str] = "question-answering"
    outputs: ClassVar[Outputs] = SPANS

    @overload
    def __call__(
        self,
        question: str | Asked,
        context: str | None = ...,
        *,
        top_k: int = ...,
        doc_stride: int | None = ...,
        max_seq_len: int | None = ...,
        max_answer_len: int = ...,
        handle_impossible_answer: bool = ...,
        align_to_words: bool = ...,
        batch_size: int | None = ...,
        window: int | None = ...,
        progress: Progress = ...,
    ) -> Answer | list[Answer]: ...

    @overload
    def __call__(
        self,
        question: given.Texts | Sequence[Asked],
        context: str | given.Texts | None = ...,
        *,
        top_k: int = ...,
        doc_stride: int | None = ...,
        max_seq_len: int | None = ...,
        max_answer_len: int = ...,
        handle_impossible_answer: bool = ...,
        align_to_words: bool = ...,
        batch_size: int | None = ...,
        window: int | None = ...,
        progress: Progress = ...,
    ) -> list[Answer] | list[list[Answer]]: ...

    @overload
    def __call__(
        self,
        question: Iterator[Asked],
        *,
        top_k: int = ...,
        doc_stride: int | None = ...,
        max_seq_len: int | None = ...,
        max_answer_len: int = ...,
        handle_impossible_answer: bool = ...,
        align_to_words: bool = ...,
        batch_size: int | None = ...,
        window: int | None = ...,
        progress: Progress = ...,
    ) -> Iterator[Answer | list[Answer]]: ...

    def __call__(
        self,
        question: str | Asked | given.Texts | Sequence[Asked] | Iterator[Asked] | None = None,
        context: str | given.Texts | None = None,
        *,
        top_k: int = 1,
        doc_stride: int | None = None,
        max_seq_len: int | None = None,
        max_answer_len: int = 15,
        handle_impossible_answer: bool = False,
        align_to_words: bool = True,
        batch_size: int | None = None,
        window: int | None = None,
        progress: Progress = False,
        **unknown: Never,
    ) -> Any:
        """Answer questions from contexts.

        A context that is longer than a window is read in windows that overlap.

        Args:
            question: A question, or several; or ``{"question": ..., "context": ...}``, a list or
                an iterator of these.
            context: Where the answer is; for several questions one text for all, or one each.
            top_k: How many answers to give.
            doc_stride: Tokens that a window shares with the one before; 128 by default, half of the
                window where that is less.
            max_seq_len: Tokens of a window, question included; 384 by default, or the model's own
                window where that is less.
            max_answer_len: Tokens of the longest answer.
            handle_impossible_answer: Let the model say that there is no answer, as ``""``.
            align_to_words: Begin and end an answer at the borders of words.
            batch_size: How many windows run at once. None: as many as have about
                2,048 tokens with padding; of a dynamically quantised model one.
            window: How many inputs are sorted by length together. None: of a list up to 1,024; of
                an iterator as many as ``batch_size``, or one, so that each is answered before the
                next is taken.
            progress: Tell how many inputs are done: True for a bar, or a function of that number
                and of how many there are, None where nobody knows.

        Returns:
            ``{"score": ..., "start": ..., "end": ..., "answer": ...}``, the answer being
            ``context[start:end]``; with ``top_k`` above 1 a list of these, the best first. For
            several questions a list, for an iterator an iterator of that.

        Raises:
            InputError: The input or an option's value cannot be used.
            OptionError: There is no such option.
            PipelineDisposedError: The pipeline is disposed.
            PipelineCancelledError: A dispose cancelled this call.
        """
        self._unknown(unknown, _OPTIONS)
        options = self._options(
            top_k, doc_stride, max_seq_len, max_answer_len, handle_impossible_answer,
            align_to_words, given.many(batch_size, window, progress),
        )  # fmt: skip
        return self._answer(question, self._reader(context, options))

    async def acall(
        self,
        question: str | Asked | given.Texts | Sequence[Asked] | Iterator[Asked]
        | AsyncIterable[Asked] | None = None,
        context: str | given.Texts | None = None,
        *,
        top_k: int = 1,
        doc_stride: int | None = None,
        max_seq_len: int | None = None,
        max_answer_len: int = 15,
        handle_impossible_answer: bool = False,
        align_to_words: bool = True,
        batch_size: int | None = None,
        window: int | None = None,
        progress: Progress = False,
        **unknown: Never,
    ) -> Answer | list[Answer] | list[list[Answer]] | AsyncIterator[Any]:  # fmt: skip
        """The same as calling, without blocking the event loop."""
        self._unknown(unknown, _OPTIONS)
        options = self._options(
            top_k, doc_stride, max_seq_len, max_answer_len, handle_impossible_answer,
            align_to_words, given.many(batch_size, window, progress),
        )  # fmt: skip
        found: Any = await self._aanswer(question, self._reader(context, options))
        return found  # type: ignore[no-any-return]

    def _options(
        self,
        top_k: int,
        doc_stride: int | None,
        max_seq_len: int | None,
        max_answer_len: int,
        handle_impossible_answer: bool,
        align_to_words: bool,
        many: given.Many,
    ) -> _Options:
        limit = self.tokenizer.limit or _WINDOW
        window = min(
            limit, _WINDOW if max_seq_len is None else given.count("max_seq_len", max_seq_len)
        )
        stride = min(window // 2, _STRIDE) if doc_stride is None else doc_stride
        if type(stride) is not int or not 0 <= stride < window:
            raise InputError(
                f"doc_stride takes a whole number from 0 and below the window's {window} tokens,"
                f" not {stride!r}.",
                value=stride,
            )
        return _Options(
            top_k=given.count("top_k", top_k),
            stride=stride,
            window=window,
            longest=given.count("max_answer_len", max_answer_len),
            impossible=given.yes_or_no("handle_impossible_answer", handle_impossible_answer),
            align=given.yes_or_no("align_to_words", align_to_words),
            many=many,
        )

    def _reader(self, context: object, options: _Options) -> Call:
        tokenizer = self._model.tokenizer
        left = tokenizer.pads_left

        def encode(asked: given.TextPair) -> list[Encoding]:
            return tokenizer.windows(
                *(asked[::-1] if left else asked), limit=options.window,
                cut="first" if left else "second", stride=options.stride,
            )  # fmt: skip

        def keep(
            rows: Sequence[Encoding], batch: Batch, outputs: list[scoring.Scores]
        ) -> Iterable[tuple[scoring.Scores, scoring.Scores]]:
            starts, ends = outputs
            return zip(unpadded(batch, starts), unpadded(batch, ends), strict=True)

        def answer(
            asked: given.TextPair,
            rows: Sequence[Encoding],
            kept: Sequence[tuple[scoring.Scores, scoring.Scores]],
        ) -> Answer | list[Answer]:
            found = _Found(asked[1])
            for encoding, (start, end) in zip(rows, kept, strict=True):
                found.add(encoding, start, end, options, tokenizer.cls_id, 0 if left else 1)
            best = found.best(options)
            return best[0] if options.top_k == 1 else best

        work = Work(encode=encode, keep=keep, answer=answer)
        return Call(lambda question: given.questions(question, context), work, options.many)


class _Found:
    """The answers to one question, gathered window by window."""

    def __init__(self, context: str) -> None:
        self._context = context
        self._answers: dict[str, Answer] = {}
        self._nothing = 1.0

    def add(
        self,
        encoding: Encoding,
        start: scoring.Scores,
        end: scoring.Scores,
        options: _Options,
        cls_id: int | None,
        sequence: int,
    ) -> None:
        """Add the best answers of one window.

        Args:
            encoding: The window.
            start: Each token's score as an answer's first: [tokens].
            end: Each token's score as an answer's last: [tokens].
            options: The call's options.
            cls_id: The token at which a model points where there is no answer.
            sequence: Which of the two texts the context is.
        """
        within = encoding.sequences == sequence
        allowed = within | (encoding.ids == cls_id)
        starts = scoring.softmax(np.where(allowed, start, -10000.0).astype(np.float32))
        ends = scoring.softmax(np.where(allowed, end, -10000.0).astype(np.float32))
        self._nothing = min(self._nothing, float(starts[0] * ends[0]))
        starts, ends = starts * within, ends * within
        spans = np.tril(np.triu(np.outer(starts, ends)), options.longest - 1)
        # Several spans of tokens can be the same words, so more are looked at than are asked for.
        most = 2 * options.top_k + 10 if options.align else options.top_k
        flat = spans.ravel()
        likely = np.argpartition(-flat, most)[:most] if most < flat.size else np.arange(flat.size)
        likely = likely[np.argsort(-flat[likely], kind="stable")]
        borders = _borders(encoding, sequence) if options.align else encoding.offsets
        for place in likely[flat[likely] > 0].tolist():
            first, last = divmod(place, len(starts))
            self._add(float(flat[place]), int(borders[first, 0]), int(borders[last, 1]))

    def _add(self, score: float, start: int, end: int) -> None:
        text = self._context[start:end]
        known = self._answers.get(text.lower())
        if known is None:
            self._answers[text.lower()] = Answer(score=score, start=start, end=end, answer=text)
        else:
            known["score"] += score

    def best(self, options: _Options) -> list[Answer]:
        """The best answers, best first; where the context has nothing to give, an empty one."""
        answers = list(self._answers.values())
        if options.impossible or not answers:
            score = self._nothing if options.impossible else 0.0
            answers.append(Answer(score=score, start=0, end=0, answer=""))
        answers.sort(key=lambda one: one["score"], reverse=True)
        return answers[: options.top_k]


def _borders(encoding: Encoding, sequence: int) -> NDArray[np.int64]:
    """Where the word that a token is of begins and ends: [tokens, 2]; for no word, the token."""
    borders = encoding.offsets
    words = np.where(encoding.sequences == sequence, encoding.words, -1)
    for word in set(words[words >= 0].tolist()):  # `np.unique` would import a megabyte
        (tokens,) = np.nonzero(words == word)
        borders[tokens] = borders[tokens[0], 0], borders[tokens[-1], 1]
    return borders
