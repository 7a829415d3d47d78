"""text-classification: a text, or two read together, to labels; and documents ranked by a query."""

from __future__ import annotations

from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from types import MappingProxyType
from typing import Any, ClassVar, Final, Literal, Never, NotRequired, TypedDict, overload

import numpy as np

from ebbtide.errors import InputError, UnsupportedModelError, unknown_value
from ebbtide.hub import ModelFiles
from ebbtide.models.batching import Work
from ebbtide.models.text_encoder import LOGITS, Outputs, TextEncoder
from ebbtide.models.tokenizer import Batch, Tokens
from ebbtide.pipelines import inputs as given
from ebbtide.pipelines import scores as scoring
from ebbtide.pipelines.base import Call, Pipeline
from ebbtide.pipelines.progress import Progress

Function = Literal["softmax", "sigmoid", "none"]
OneText = str | Mapping[str, str] | tuple[str, str]
"""A text; or two, as ``{"text": ..., "text_pair": ...}`` or, inside a list, as a tuple."""


class LabelScore(TypedDict):
    """One label of a text, and how sure the model is of it."""

    label: str
    score: float


class RankedDocument(TypedDict):
    """One document: its place in the list that was passed, and how well it answers the query."""

    corpus_id: int
    score: float
    text: NotRequired[str]


Labels = list[LabelScore]

_FUNCTIONS: Final[Mapping[str, Callable[[scoring.Scores], scoring.Scores]]] = MappingProxyType(
    {"softmax": scoring.softmax, "sigmoid": scoring.sigmoid, "none": lambda logits: logits}
)
_OPTIONS: Final = ("top_k", "function_to_apply", "batch_size", "window", "progress")
_RANK_OPTIONS: Final = ("top_k", "return_documents", "batch_size", "progress")


class TextClassificationPipeline(Pipeline):
    """Texts to labels.

    Example:
        >>> import ebbtide
        >>> with ebbtide.pipeline("text-classification", "tests/models/bert/sequence") as classify:
        ...     [found] = classify("the tide goes out")
        >>> sorted(found)
        ['label', 'score']
    """

    task: ClassVar[str] = "text-classification"
    outputs: ClassVar[Outputs] = LOGITS

    @classmethod
    def read(cls, files: ModelFiles, model: TextEncoder) -> None:
        """See that the labels fit the graph."""
        model.labels()

    @overload
    def __call__(
        self,
        inputs: str | Mapping[str, str],
        *,
        top_k: int | None = ...,
        function_to_apply: Function | None = ...,
        batch_size: int | None = ...,
        window: int | None = ...,
        progress: Progress = ...,
    ) -> Labels: ...

    @overload
    def __call__(
        self,
        inputs: Sequence[OneText],
        *,
        top_k: int | None = ...,
        function_to_apply: Function | None = ...,
        batch_size: int | None = ...,
        window: int | None = ...,
        progress: Progress = ...,
    ) -> Labels | list[Labels]: ...

    @overload
    def __call__(
        self,
        inputs: Iterator[OneText],
        *,
        top_k: int | None = ...,
        function_to_apply: Function | None = ...,
        batch_size: int | None = ...,
        window: int | None = ...,
        progress: Progress = ...,
    ) -> Iterator[Labels]: ...

    def __call__(
        self,
        inputs: str | Mapping[str, str] | Sequence[OneText] | Iterator[OneText],
        *,
        top_k: int | None = 1,
        function_to_apply: Function | None = None,
        batch_size: int | None = None,
        window: int | None = None,
        progress: Progress = False,
        **unknown: Never,
    ) -> Labels | list[Labels] | Iterator[Labels]:
        """Classify texts.

        Args:
            inputs: One text, a list or an iterator of them. In place of a text two that the model
                reads together: ``{"text": ..., "text_pair": ...}`` or, inside a list, a tuple.
            top_k: How many labels a text gets, the best first; None for all.
            function_to_apply: What makes scores of the model's logits: ``softmax``, ``sigmoid`` or
                ``none``. None: ``none`` for a regression, ``sigmoid`` for several labels at once
                or a single one, else ``softmax``, by the config's ``problem_type``.
            batch_size: How many texts of a list run at once. None: as many as have about
                2,048 tokens with padding; of a dynamically quantised model one.
            window: How many inputs are sorted by length together. None: of a list up to 1,024; of
                an iterator as many as ``batch_size``, or one, so that each is answered before the
                next is taken.
            progress: Tell how many inputs are done: True for a bar, or a function of that number
                and of how many there are, None where nobody knows.

        Returns:
            For one text its labels, as ``[{"label": ..., "score": ...}]``. For a list one such
            list a text; with ``top_k=1`` the one label of each, not wrapped in a list. For an
            iterator: an iterator of what each text alone gives.

        Raises:
            InputError: The input or an option's value cannot be used.
            OptionError: There is no such option.
            PipelineDisposedError: The pipeline is disposed.
            PipelineCancelledError: A dispose cancelled this call.
        """
        self._unknown(unknown, _OPTIONS)
        found: Any = self._answer(
            inputs,
            self._classify(top_k, function_to_apply, given.many(batch_size, window, progress)),
        )
        return found  # type: ignore[no-any-return]

    async def acall(
        self,
        inputs: str | Mapping[str, str] | Sequence[OneText] | Iterator[OneText]
        | AsyncIterable[OneText],
        *,
        top_k: int | None = 1,
        function_to_apply: Function | None = None,
        batch_size: int | None = None,
        window: int | None = None,
        progress: Progress = False,
        **unknown: Never,
    ) -> Labels | list[Labels] | AsyncIterator[Labels]:  # fmt: skip
        """The same as calling, without blocking the event loop."""
        self._unknown(unknown, _OPTIONS)
        work = self._classify(top_k, function_to_apply, given.many(batch_size, window, progress))
        found: Any = await self._aanswer(inputs, work)
        return found  # type: ignore[no-any-return]

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_k: int | None = None,
        return_documents: bool = False,
        batch_size: int | None = None,
        progress: Progress = False,
        **unknown: Never,
    ) -> list[RankedDocument]:
        """Order documents by how well they answer a query; for cross-encoders with one score.

        Args:
            query: What is looked for.
            documents: The texts to order.
            top_k: How many to give back; None for all.
            return_documents: Put each document's text beside its place and score.
            batch_size: How many documents run at once. None: as many as have about
                2,048 tokens with padding; of a dynamically quantised model one.
            progress: Tell how many documents are done: True for a bar, or a function of that number
                and of how many there are, None where nobody knows.

        Returns:
            The best first: ``{"corpus_id": place in documents, "score": ...}``. The score is what
            sentence-transformers' ``CrossEncoder.rank`` gives: a sigmoid's, unless the model's
            config names another activation.

        Raises:
            InputError: The query is no text, or there is no document.
            UnsupportedModelError: The model gives several scores for a pair.
        """
        self._unknown(unknown, _RANK_OPTIONS)
        many = given.many(batch_size, None, progress)
        call = self._rank(query, documents, top_k, return_documents, many)
        found: list[RankedDocument] = self._answer(documents, call)
        return found

    async def arank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_k: int | None = None,
        return_documents: bool = False,
        batch_size: int | None = None,
        progress: Progress = False,
        **unknown: Never,
    ) -> list[RankedDocument]:
        """The same as `rank`, without blocking the event loop."""
        self._unknown(unknown, _RANK_OPTIONS)
        many = given.many(batch_size, None, progress)
        call = self._rank(query, documents, top_k, return_documents, many)
        found: list[RankedDocument] = await self._aanswer(documents, call)
        return found

    def _classify(self, top_k: int | None, function: str | None, many: given.Many) -> Call:
        if top_k is not None:
            given.count("top_k", top_k)
        if function is not None and function not in _FUNCTIONS:
            raise unknown_value("function_to_apply", function, _FUNCTIONS)

        def keep(
            rows: Sequence[Tokens], batch: Batch, outputs: list[scoring.Scores]
        ) -> list[Labels]:
            (logits,) = outputs
            labels = self._model.labels(logits.shape[-1])
            scores = _FUNCTIONS[function or self._default(len(labels))](logits)
            return [_best(row, labels, top_k) for row in scores]

        def collect(found: list[Labels], alone: bool) -> Labels | list[Labels]:
            if alone:
                return found[0]
            return [one for [one] in found] if top_k == 1 else found

        return Call(given.texts_or_pairs, self._work(keep), many, collect)

    def _rank(
        self,
        query: object,
        documents: object,
        top_k: int | None,
        return_documents: bool,
        many: given.Many,
    ) -> Call:
        if not isinstance(query, str):
            raise InputError(f"The query is no text: {type(query).__name__}.")
        if isinstance(documents, str):
            raise InputError("The documents are one text: pass a list of them.")
        texts, _ = given.texts(documents)
        if top_k is not None:
            given.count("top_k", top_k)
        given.yes_or_no("return_documents", return_documents)

        def keep(
            rows: Sequence[Tokens], batch: Batch, outputs: list[scoring.Scores]
        ) -> scoring.Scores:
            (logits,) = outputs
            if logits.shape[-1] != 1:
                raise UnsupportedModelError(
                    f"Model {self.model!r} gives {logits.shape[-1]} scores for a query and a"
                    " document, and ranking needs one: take a cross-encoder made for it.",
                    model=self.model,
                )
            return _FUNCTIONS[self._rank_function()](logits)[:, 0]

        def collect(found: list[float], alone: bool) -> list[RankedDocument]:
            scores = np.array(found)
            ranked: list[RankedDocument] = []
            for place in scoring.best(scores, top_k):
                one = RankedDocument(corpus_id=place, score=float(scores[place]))
                if return_documents:
                    one["text"] = texts[place]
                ranked.append(one)
            return ranked

        pairs = [(query, text) for text in texts]
        return Call(lambda _: (pairs, False), self._work(keep), many, collect)

    def _work(self, keep: Callable[[Sequence[Tokens], Batch, list[Any]], Iterable[Any]]) -> Work:
        tokenizer = self._model.tokenizer

        def encode(one: str | given.TextPair) -> list[Tokens]:
            texts = (one,) if isinstance(one, str) else one
            return [tokenizer.encode(*texts).tokens()]

        return Work(encode=encode, keep=keep, answer=lambda item, rows, kept: kept[0])

    def _default(self, count: int) -> str:
        problem = self._model.config.problem_type
        if problem == "regression":
            return "none"
        return "sigmoid" if problem == "multi_label_classification" or count == 1 else "softmax"

    def _rank_function(self) -> str:
        raw = self._model.config.raw
        declared = raw.get("sentence_transformers")
        named = declared.get("activation_fn") if isinstance(declared, Mapping) else None
        named = named or raw.get("sbert_ce_default_activation_function") or "Sigmoid"
        kind = str(named).rpartition(".")[2]
        if kind not in ("Identity", "Sigmoid"):
            raise UnsupportedModelError(
                f"Model {self.model!r} scores with {named}, which Ebbtide does not apply.",
                model=self.model,
            )
        return "none" if kind == "Identity" else "sigmoid"


def _best(scores: scoring.Scores, labels: Sequence[str], top_k: int | None) -> Labels:
    places = scoring.best(scores, top_k)
    return [LabelScore(label=labels[place], score=float(scores[place])) for place in places]
