"""token-classification: names of people, places and the like, found in a text."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Sequence
from typing import Any, ClassVar, Final, Literal, Never, NotRequired, TypedDict, get_args, overload

import numpy as np

from ebbtide.errors import InputError, unknown_value
from ebbtide.hub import ModelFiles
from ebbtide.models.batching import Work, unpadded
from ebbtide.models.text_encoder import LOGITS, Outputs, TextEncoder
from ebbtide.models.tokenizer import Encoding
from ebbtide.pipelines import inputs as given
from ebbtide.pipelines import scores as scoring
from ebbtide.pipelines.base import Call, Pipeline
from ebbtide.pipelines.progress import Progress

Aggregation = Literal["none", "simple", "first", "average", "max"]

_AGGREGATIONS: Final[tuple[str, ...]] = get_args(Aggregation)
_OPTIONS: Final = (
    "aggregation_strategy",
    "ignore_labels",
    "stride",
    "batch_size",
    "window",
    "progress",
)


class Entity(TypedDict):
    """One token with its label, or tokens that belong together with theirs."""

    entity: NotRequired[str]
    entity_group: NotRequired[str]
    score: float
    index: NotRequired[int]
    word: str
    start: int
    end: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Options:
    aggregation: str
    ignored: frozenset[str]
    stride: int | None
    many: given.Many


@dataclasses.dataclass(slots=True)
class _Piece:
    """A token, a word or an entity on the way to a result.

    Attributes:
        word: As the vocabulary spells it, or as it reads.
        scores: Of every label: [labels].
        label: The label chosen, and ``score`` its score.
        continues: Whether it continues the word before.
    """

    word: str
    scores: scoring.Scores
    label: str
    score: float
    start: int
    end: int
    index: int
    continues: bool


class TokenClassificationPipeline(Pipeline):
    """Texts to the entities in them.

    Example:
        >>> import ebbtide
        >>> with ebbtide.pipeline("token-classification", "tests/models/bert/token") as find:
        ...     found = find("The tide turns in Reykjavik", ignore_labels=[])
        >>> sorted(found[0])
        ['end', 'entity', 'index', 'score', 'start', 'word']
    """

    task: ClassVar[str] = "token-classification"
    outputs: ClassVar[Outputs] = LOGITS

    @classmethod
    def read(cls, files: ModelFiles, model: TextEncoder) -> None:
        """See that the labels fit the graph."""
        model.labels()

    @overload
    def __call__(
        self,
        inputs: str,
        *,
        aggregation_strategy: Aggregation = ...,
        ignore_labels: Sequence[str] = ...,
        stride: int | None = ...,
        batch_size: int | None = ...,
        window: int | None = ...,
        progress: Progress = ...,
    ) -> list[Entity]: ...

    @overload
    def __call__(
        self,
        inputs: given.Texts,
        *,
        aggregation_strategy: Aggregation = ...,
        ignore_labels: Sequence[str] = ...,
        stride: int | None = ...,
        batch_size: int | None = ...,
        window: int | None = ...,
        progress: Progress = ...,
    ) -> list[list[Entity]]: ...

    @overload
    def __call__(
        self,
        inputs: Iterator[str],
        *,
        aggregation_strategy: Aggregation = ...,
        ignore_labels: Sequence[str] = ...,
        stride: int | None = ...,
        batch_size: int | None = ...,
        window: int | None = ...,
        progress: Progress = ...,
    ) -> Iterator[list[Entity]]: ...

    def __call__(
        self,
        inputs: str | given.Texts | Iterator[str],
        *,
        aggregation_strategy: Aggregation = "none",
        ignore_labels: Sequence[str] = ("O",),
        stride: int | None = None,
        batch_size: int | None = None,
        window: int | None = None,
        progress: Progress = False,
        **unknown: Never,
    ) -> list[Entity] | list[list[Entity]] | Iterator[list[Entity]]:
        """Find entities.

        Args:
            inputs: One text, a list or an iterator of texts.
            aggregation_strategy: ``none`` gives tokens. ``simple`` joins neighbours with the same
                label. ``first``, ``average`` and ``max`` first give every token of a word one
                label: its first token's, that of the mean scores, or that of its surest token.
            ignore_labels: Labels to leave out.
            stride: Read a text that is longer than the model's window in windows that share this
                many tokens. None: read its first window. Needs an aggregation.
            batch_size: How many windows run at once. None: as many as have about
                2,048 tokens with padding; of a dynamically quantised model one.
            window: How many inputs are sorted by length together. None: of a list up to 1,024; of
                an iterator as many as ``batch_size``, or one, so that each is answered before the
                next is taken.
            progress: Tell how many inputs are done: True for a bar, or a function of that number
                and of how many there are, None where nobody knows.

        Returns:
            For one text its entities in order: ``{"entity": label, "score": ..., "index": token,
            "word": ..., "start": ..., "end": ...}``, with an aggregation ``entity_group`` in place
            of ``entity`` and no ``index``. ``text[start:end]`` is what the entity stands on. For a
            list a list, for an iterator an iterator of these.

        Raises:
            InputError: The input or an option's value cannot be used.
            OptionError: There is no such option.
            PipelineDisposedError: The pipeline is disposed.
            PipelineCancelledError: A dispose cancelled this call.
        """
        self._unknown(unknown, _OPTIONS)
        many = given.many(batch_size, window, progress)
        options = self._options(aggregation_strategy, ignore_labels, stride, many)
        found: Any = self._answer(inputs, self._finder(options))
        return found  # type: ignore[no-any-return]

    async def acall(
        self,
        inputs: str | given.Texts | Iterator[str] | AsyncIterable[str],
        *,
        aggregation_strategy: Aggregation = "none",
        ignore_labels: Sequence[str] = ("O",),
        stride: int | None = None,
        batch_size: int | None = None,
        window: int | None = None,
        progress: Progress = False,
        **unknown: Never,
    ) -> list[Entity] | list[list[Entity]] | AsyncIterator[list[Entity]]:
        """The same as calling, without blocking the event loop."""
        self._unknown(unknown, _OPTIONS)
        many = given.many(batch_size, window, progress)
        options = self._options(aggregation_strategy, ignore_labels, stride, many)
        found: Any = await self._aanswer(inputs, self._finder(options))
        return found  # type: ignore[no-any-return]

    def _options(
        self,
        aggregation: str,
        ignore_labels: object,
        stride: int | None,
        many: given.Many,
    ) -> _Options:
        if aggregation not in _AGGREGATIONS:
            raise unknown_value("aggregation_strategy", aggregation, _AGGREGATIONS)
        if isinstance(ignore_labels, str) or not isinstance(ignore_labels, Sequence):
            raise InputError(
                f"ignore_labels takes a list of labels, not {ignore_labels!r}.", value=ignore_labels
            )
        if stride is not None:
            window = self.tokenizer.limit
            if aggregation == "none":
                raise InputError(
                    "stride needs an aggregation_strategy: without one, the tokens that two windows"
                    " share would come twice. Pass aggregation_strategy='simple', say."
                )
            if type(stride) is not int or stride < 0 or (window is not None and stride >= window):
                raise InputError(
                    "stride takes a whole number of tokens from 0 and below the model's window of"
                    f" {window}, not {stride!r}.",
                    value=stride,
                )
        ignored = frozenset(map(str, ignore_labels))
        return _Options(aggregation, ignored, stride, many)

    def _finder(self, options: _Options) -> Call:
        tokenizer = self._model.tokenizer

        def encode(text: str) -> list[Encoding]:
            if options.stride is None:
                return [tokenizer.encode(text)]
            return tokenizer.windows(text, stride=options.stride)

        def answer(
            text: str, rows: Sequence[Encoding], kept: Sequence[scoring.Scores]
        ) -> list[Entity]:
            found = []
            for encoding, logits in zip(rows, kept, strict=True):
                labels = self._model.labels(logits.shape[-1])
                pieces = self._pieces(text, encoding, scoring.softmax(logits), labels)
                found.append(self._entities(pieces, labels, options))
            return found[0] if len(found) == 1 else _merged(found)

        work = Work(
            encode=encode,
            keep=lambda rows, batch, outputs: unpadded(batch, *outputs),
            answer=answer,
        )
        return Call(given.texts, work, options.many)

    def _pieces(
        self, text: str, encoding: Encoding, scores: scoring.Scores, labels: Sequence[str]
    ) -> list[_Piece]:
        """One piece a token, without those that the tokenizer put around the text."""
        tokenizer = self._model.tokenizer
        marks_subwords, unknown = tokenizer.marks_subwords, tokenizer.unknown_id
        ids, offsets = encoding.ids.tolist(), encoding.offsets.tolist()
        pieces = []
        for index in np.flatnonzero(encoding.sequences == 0).tolist():
            start, end = offsets[index]
            word, there = tokenizer.token(ids[index]), text[start:end]
            if marks_subwords:
                continues = len(word) != len(there)
            else:  # no more is known of a word than that no space stands before it
                continues = start > 0 and " " not in text[start - 1 : start + 1]
            if ids[index] == unknown:
                word, continues = there, False
            label, score = _best(scores[index], labels)
            pieces.append(_Piece(word, scores[index], label, score, start, end, index, continues))
        return pieces

    def _entities(
        self, pieces: list[_Piece], labels: Sequence[str], options: _Options
    ) -> list[Entity]:
        if options.aggregation == "none":
            return [
                Entity(
                    entity=one.label, score=one.score, index=one.index, word=one.word,
                    start=one.start, end=one.end,
                )
                for one in pieces
                if one.label not in options.ignored
            ]  # fmt: skip
        if options.aggregation != "simple":
            words = _runs(pieces, lambda before, one: one.continues)
            pieces = [self._word(word, labels, options.aggregation) for word in words]
        entities = []
        for run in _runs(pieces, _same_entity):
            group = run[0].label.split("-", 1)[-1]
            if group not in options.ignored:
                entities.append(
                    Entity(
                        entity_group=group,
                        score=float(np.mean([one.score for one in run])),
                        word=self._model.tokenizer.join([one.word for one in run]),
                        start=run[0].start,
                        end=run[-1].end,
                    )
                )
        return entities

    def _word(self, pieces: list[_Piece], labels: Sequence[str], aggregation: str) -> _Piece:
        if aggregation == "first":
            scores = pieces[0].scores
        elif aggregation == "max":
            scores = max(pieces, key=lambda one: one.score).scores
        else:
            scores = np.mean([one.scores for one in pieces], axis=0)
        label, score = _best(scores, labels)
        word = self._model.tokenizer.join([one.word for one in pieces])
        return dataclasses.replace(
            pieces[0], word=word, scores=scores, label=label, score=score, end=pieces[-1].end
        )


def _best(scores: scoring.Scores, labels: Sequence[str]) -> tuple[str, float]:
    place = int(scores.argmax())
    return labels[place], float(scores[place])


def _runs(pieces: Sequence[_Piece], joined: Callable[[_Piece, _Piece], bool]) -> list[list[_Piece]]:
    runs: list[list[_Piece]] = []
    for one in pieces:
        if runs and joined(runs[-1][-1], one):
            runs[-1].append(one)
        else:
            runs.append([one])
    return runs


def _same_entity(before: _Piece, one: _Piece) -> bool:
    return _kind(before.label) == _kind(one.label) and not one.label.startswith("B-")


def _kind(label: str) -> str:
    """What a label is of, as ``PER`` of ``B-PER`` (its beginning) and ``I-PER`` (its inside)."""
    return label[2:] if label.startswith(("B-", "I-")) else label


def _merged(windows: Sequence[list[Entity]]) -> list[Entity]:
    """The entities of windows that overlap: of two on the same place the longer, then the surer."""
    merged: list[Entity] = []
    for one in sorted((one for window in windows for one in window), key=lambda it: it["start"]):
        last = merged[-1] if merged else None
        if last is None or not last["start"] <= one["start"] < last["end"]:
            merged.append(one)
        elif (one["end"] - one["start"], one["score"]) > (
            last["end"] - last["start"],
            last["score"],
        ):
            merged[-1] = one
    return merged
