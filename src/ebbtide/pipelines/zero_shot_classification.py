"""zero-shot-classification: a text to labels that the model never saw, by a model of inference."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterator, Sequence
from typing import Any, ClassVar, Final, Never, TypedDict, overload

import numpy as np

from ebbtide.errors import InputError, UnsupportedModelError
from ebbtide.hub import ModelFiles
from ebbtide.models.batching import Work
from ebbtide.models.text_encoder import LOGITS, Outputs, TextEncoder
from ebbtide.models.tokenizer import Batch, Tokens
from ebbtide.pipelines import inputs as given
from ebbtide.pipelines import scores as scoring
from ebbtide.pipelines.base import Call, Pipeline
from ebbtide.pipelines.progress import Progress

_OPTIONS: Final = (
    "candidate_labels", "hypothesis_template", "multi_label", "entailment_label", "batch_size",
    "window", "progress",
)  # fmt: skip


class ZeroShotResult(TypedDict):
    """One text, and its labels, the best first."""

    sequence: str
    labels: list[str]
    scores: list[float]


class ZeroShotClassificationPipeline(Pipeline):
    """Texts to labels of the caller's own.

    Each label is put into a sentence, the hypothesis, and the model says whether it follows from
    the text.

    Example:
        >>> import ebbtide
        >>> with ebbtide.pipeline("zero-shot-classification", "tests/models/bert/nli") as classify:
        ...     found = classify("the tide goes out", ["sea", "city"])
        >>> sorted(found["labels"])
        ['city', 'sea']
    """

    task: ClassVar[str] = "zero-shot-classification"
    outputs: ClassVar[Outputs] = LOGITS

    @classmethod
    def read(cls, files: ModelFiles, model: TextEncoder) -> None:
        """See that the labels fit the graph."""
        model.labels()

    @overload
    def __call__(
        self,
        inputs: str,
        candidate_labels: str | Sequence[str],
        *,
        hypothesis_template: str = ...,
        multi_label: bool = ...,
        entailment_label: str | None = ...,
        batch_size: int | None = ...,
        window: int | None = ...,
        progress: Progress = ...,
    ) -> ZeroShotResult: ...

    @overload
    def __call__(
        self,
        inputs: given.Texts,
        candidate_labels: str | Sequence[str],
        *,
        hypothesis_template: str = ...,
        multi_label: bool = ...,
        entailment_label: str | None = ...,
        batch_size: int | None = ...,
        window: int | None = ...,
        progress: Progress = ...,
    ) -> list[ZeroShotResult]: ...

    @overload
    def __call__(
        self,
        inputs: Iterator[str],
        candidate_labels: str | Sequence[str],
        *,
        hypothesis_template: str = ...,
        multi_label: bool = ...,
        entailment_label: str | None = ...,
        batch_size: int | None = ...,
        window: int | None = ...,
        progress: Progress = ...,
    ) -> Iterator[ZeroShotResult]: ...

    def __call__(
        self,
        inputs: str | given.Texts | Iterator[str],
        candidate_labels: str | Sequence[str] = (),
        *,
        hypothesis_template: str = "This example is {}.",
        multi_label: bool = False,
        entailment_label: str | None = None,
        batch_size: int | None = None,
        window: int | None = None,
        progress: Progress = False,
        **unknown: Never,
    ) -> ZeroShotResult | list[ZeroShotResult] | Iterator[ZeroShotResult]:
        """Classify texts by labels given here.

        Args:
            inputs: One text, a list or an iterator of texts.
            candidate_labels: The labels: a list, or one text with commas between them.
            hypothesis_template: The sentence a label is put into, at ``{}``.
            multi_label: Score each label by itself, so that several can be true; otherwise the
                scores sum to 1.
            entailment_label: Which of the model's own labels means that the hypothesis follows.
                None: the one that begins with "entail", in any case of letters.
            batch_size: How many pairs of a text and a label run at once. None: as many as have
                about 2,048 tokens with padding; of a dynamically quantised model one.
            window: How many inputs are sorted by length together. None: of a list up to 1,024; of
                an iterator as many as ``batch_size``, or one, so that each is answered before the
                next is taken.
            progress: Tell how many inputs are done: True for a bar, or a function of that number
                and of how many there are, None where nobody knows.

        Returns:
            For one text ``{"sequence": text, "labels": [...], "scores": [...]}``, the best label
            first. For a list a list, for an iterator an iterator of these.

        Raises:
            InputError: The input, the labels or an option's value cannot be used.
            OptionError: There is no such option.
            UnsupportedModelError: None of the model's labels means entailment.
            PipelineDisposedError: The pipeline is disposed.
            PipelineCancelledError: A dispose cancelled this call.
        """
        self._unknown(unknown, _OPTIONS)
        work = self._classify(
            candidate_labels, hypothesis_template, multi_label, entailment_label,
            given.many(batch_size, window, progress),
        )  # fmt: skip
        found: Any = self._answer(inputs, work)
        return found  # type: ignore[no-any-return]

    async def acall(
        self,
        inputs: str | given.Texts | Iterator[str] | AsyncIterable[str],
        candidate_labels: str | Sequence[str] = (),
        *,
        hypothesis_template: str = "This example is {}.",
        multi_label: bool = False,
        entailment_label: str | None = None,
        batch_size: int | None = None,
        window: int | None = None,
        progress: Progress = False,
        **unknown: Never,
    ) -> ZeroShotResult | list[ZeroShotResult] | AsyncIterator[ZeroShotResult]:
        """The same as calling, without blocking the event loop."""
        self._unknown(unknown, _OPTIONS)
        work = self._classify(
            candidate_labels, hypothesis_template, multi_label, entailment_label,
            given.many(batch_size, window, progress),
        )  # fmt: skip
        found: Any = await self._aanswer(inputs, work)
        return found  # type: ignore[no-any-return]

    def _classify(
        self,
        candidate_labels: object,
        template: object,
        multi_label: bool,
        entailment_label: str | None,
        many: given.Many,
    ) -> Call:
        labels = _labels(candidate_labels)
        hypotheses = _hypotheses(template, labels)
        given.yes_or_no("multi_label", multi_label)
        entailment = self._entailment(entailment_label)
        contradiction = len(self._model.labels()) - 1 if entailment == 0 else 0
        tokenizer = self._model.tokenizer

        def encode(text: str) -> list[Tokens]:
            pairs = ((text, hypothesis) for hypothesis in hypotheses)
            return [tokenizer.encode(*pair, cut="first").tokens() for pair in pairs]

        def keep(
            rows: Sequence[Tokens], batch: Batch, outputs: list[scoring.Scores]
        ) -> scoring.Scores:
            (logits,) = outputs
            self._model.labels(logits.shape[-1])
            return logits

        def answer(
            text: str, rows: Sequence[Tokens], kept: Sequence[scoring.Scores]
        ) -> ZeroShotResult:
            logits = np.stack(kept)
            if multi_label or len(labels) == 1:
                scores = scoring.softmax(logits[:, [contradiction, entailment]])[:, 1]
            else:
                scores = scoring.softmax(logits[:, entailment])
            return _result(text, scores, labels)

        return Call(given.texts, Work(encode=encode, keep=keep, answer=answer), many)

    def _entailment(self, named: str | None) -> int:
        labels = self._model.labels()
        for place, label in enumerate(labels):
            if label == named if named is not None else label.lower().startswith("entail"):
                return place
        if named is not None:
            raise InputError(
                f"The model has no label {named!r}: it has {', '.join(labels)}.", value=named
            )
        raise UnsupportedModelError(
            f"None of the labels of model {self.model!r} ({', '.join(labels)}) begins with"
            " 'entail': take a model of natural language inference, or pass entailment_label=.",
            model=self.model,
        )


def _labels(labels: object) -> list[str]:
    if isinstance(labels, str):
        named = [label.strip() for label in labels.split(",")]
        labels = [label for label in named if label]
    if not isinstance(labels, Sequence) or not all(isinstance(one, str) for one in labels):
        raise InputError("candidate_labels takes a list of texts, or one with commas between them.")
    found = list(labels)
    if not found or not all(label.strip() for label in found):
        raise InputError("candidate_labels has no label, or an empty one: name at least one.")
    if repeated := sorted({label for label in found if found.count(label) > 1}):
        raise InputError(
            f"candidate_labels has {', '.join(map(repr, repeated))} more than once.",
            value=repeated[0],
        )
    return found


def _hypotheses(template: object, labels: Sequence[str]) -> list[str]:
    try:
        found = [str.format(template, label) for label in labels]  # type: ignore[arg-type]
    except (IndexError, KeyError, ValueError, AttributeError, TypeError):
        found = []
    if not found or found[0] == str.format(template, ""):  # type: ignore[arg-type]
        raise InputError(
            "hypothesis_template needs one {} where the label goes, as in 'This example is {}.',"
            f" and is {template!r}.",
            value=template,
        )
    return found


def _result(text: str, scores: scoring.Scores, labels: Sequence[str]) -> ZeroShotResult:
    order = scoring.best(scores, None)
    return ZeroShotResult(
        sequence=text,
        labels=[labels[place] for place in order],
        scores=[float(scores[place]) for place in order],
    )
