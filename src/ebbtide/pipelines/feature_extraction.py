"""feature-extraction: text to vectors, one a token or one a text."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Sequence
from typing import Any, ClassVar, Final, Literal, Never, get_args, overload

import numpy as np
from numpy.typing import NDArray

from ebbtide.errors import InputError, unknown_value
from ebbtide.hub import ModelFiles
from ebbtide.lifecycle import Lifecycle
from ebbtide.models.batching import Work
from ebbtide.models.sentence import SENTENCE_FILES, SentenceRecipe, read_recipe
from ebbtide.models.text_encoder import FEATURES, Outputs, TextEncoder
from ebbtide.models.tokenizer import Batch, Tokenizer
from ebbtide.pipelines import inputs as given
from ebbtide.pipelines import pooling as pool
from ebbtide.pipelines.base import Call, Pipeline
from ebbtide.pipelines.progress import Progress

Pooling = Literal[
    "auto", "none", "mean", "cls", "first_token", "eos", "last_token", "max", "mean_sqrt_len",
    "weighted_mean",
]  # fmt: skip
Precision = Literal["binary", "ubinary"]
Vectors = NDArray[Any]

_POOLINGS: Final[tuple[str, ...]] = get_args(Pooling)
_PRECISIONS: Final[tuple[str, ...]] = get_args(Precision)
_OPTIONS: Final = (
    "pooling",
    "normalize",
    "quantize",
    "precision",
    "batch_size",
    "window",
    "progress",
)


@dataclasses.dataclass(frozen=True, slots=True)
class _Options:
    """One call's options, checked and settled."""

    poolings: tuple[str, ...]
    normalize: bool
    precision: Precision | None
    limit: int | None
    many: given.Many


class FeatureExtractionPipeline(Pipeline):
    """Text to vectors.

    Example:
        >>> import ebbtide
        >>> with ebbtide.pipeline("feature-extraction", "tests/models/tiny-bert") as embed:
        ...     embed(["the sea", "a much longer sentence"], pooling="mean").shape
        (2, 32)
    """

    task: ClassVar[str] = "feature-extraction"
    outputs: ClassVar[Outputs] = FEATURES
    extra_files: ClassVar[tuple[str, ...]] = SENTENCE_FILES

    def __init__(
        self, lifecycle: Lifecycle, model: TextEncoder, recipe: SentenceRecipe | None = None
    ) -> None:
        super().__init__(lifecycle, model)
        self._recipe = recipe

    @classmethod
    def read(cls, files: ModelFiles, model: TextEncoder) -> SentenceRecipe | None:
        """What the model says of its sentence vectors."""
        return read_recipe(files)

    @overload
    def __call__(
        self,
        inputs: str | Sequence[str],
        *,
        pooling: Pooling = ...,
        normalize: bool | None = ...,
        quantize: bool = ...,
        precision: Precision = ...,
        batch_size: int | None = ...,
        window: int | None = ...,
        progress: Progress = ...,
    ) -> Vectors: ...

    @overload
    def __call__(
        self,
        inputs: Iterator[str],
        *,
        pooling: Pooling = ...,
        normalize: bool | None = ...,
        quantize: bool = ...,
        precision: Precision = ...,
        batch_size: int | None = ...,
        window: int | None = ...,
        progress: Progress = ...,
    ) -> Iterator[Vectors]: ...

    def __call__(
        self,
        inputs: str | Sequence[str] | Iterator[str],
        *,
        pooling: Pooling = "auto",
        normalize: bool | None = None,
        quantize: bool = False,
        precision: Precision = "binary",
        batch_size: int | None = None,
        window: int | None = None,
        progress: Progress = False,
        **unknown: Never,
    ) -> Vectors | Iterator[Vectors]:
        """Compute the vectors of texts.

        Args:
            inputs: One text, a list of texts, or an iterator of texts.
            pooling: How a text's token vectors become one. ``none`` leaves one a token. ``auto``
                does what the model says of itself (sentence-transformers' ``modules.json``: the
                pooling, the normalising, and how many tokens are read); ``none`` where it says
                nothing. ``cls`` and ``first_token`` are one, so are ``eos`` and ``last_token``.
            normalize: Scale each vector to length 1. None: what ``auto`` says, else no.
            quantize: Give one bit a width in place of a float.
            precision: Those bits as ``binary`` (int8) or ``ubinary`` (uint8) bytes.
            batch_size: How many texts of a list run at once. None: as many as have about
                2,048 tokens with padding; of a dynamically quantised model one.
            window: How many inputs are sorted by length together. None: of a list up to 1,024; of
                an iterator as many as ``batch_size``, or one, so that each is answered before the
                next is taken.
            progress: Tell how many inputs are done: True for a bar, or a function of that number
                and of how many there are, None where nobody knows.

        Returns:
            One array: [texts, width], or [texts, tokens, width] without pooling, in the graph's
            float type; one text counts as a list of one. Padding rows are what the graph gives
            there. With ``quantize`` the last axis is an eighth. For an iterator: an iterator of
            what each text alone gives.

        Raises:
            InputError: The input or an option's value cannot be used.
            OptionError: There is no such option.
            PipelineDisposedError: The pipeline is disposed.
            PipelineCancelledError: A dispose cancelled this call.
        """
        self._unknown(unknown, _OPTIONS)
        options = self._options(
            pooling, normalize, quantize, precision, given.many(batch_size, window, progress)
        )
        found: Any = self._answer(inputs, self._vectors(options))
        return found  # type: ignore[no-any-return]

    async def acall(
        self,
        inputs: str | Sequence[str] | Iterator[str] | AsyncIterable[str],
        *,
        pooling: Pooling = "auto",
        normalize: bool | None = None,
        quantize: bool = False,
        precision: Precision = "binary",
        batch_size: int | None = None,
        window: int | None = None,
        progress: Progress = False,
        **unknown: Never,
    ) -> Vectors | AsyncIterator[Vectors]:
        """The same as calling, without blocking the event loop.

        Cancelling the task stops the native run, waits for its end, and then raises. For an
        iterator, sync or async, an async iterator comes back.
        """
        self._unknown(unknown, _OPTIONS)
        options = self._options(
            pooling, normalize, quantize, precision, given.many(batch_size, window, progress)
        )
        found: Any = await self._aanswer(inputs, self._vectors(options))
        return found  # type: ignore[no-any-return]

    def _options(
        self,
        pooling: str,
        normalize: bool | None,
        quantize: bool,
        precision: str,
        many: given.Many,
    ) -> _Options:
        if pooling not in _POOLINGS:
            raise unknown_value("pooling", pooling, _POOLINGS)
        if precision not in _PRECISIONS:
            raise unknown_value("precision", precision, _PRECISIONS)
        given.yes_or_no("quantize", quantize)
        if normalize is not None:
            given.yes_or_no("normalize", normalize)
        poolings: tuple[str, ...] = (pooling,)
        also_normalize, limit = False, None
        if pooling == "auto":
            recipe = self._recipe.check(self.model) if self._recipe else None
            poolings = recipe.poolings if recipe else ("none",)
            also_normalize = recipe is not None and recipe.normalize
            limit = recipe.limit if recipe else None
        return _Options(
            poolings=poolings,
            normalize=also_normalize if normalize is None else normalize,
            precision=precision if quantize else None,  # type: ignore[arg-type]
            many=many,
            limit=limit,
        )

    def _vectors(self, options: _Options) -> Call:
        tokenizer = self._model.tokenizer
        by_token = options.poolings == ("none",)
        # A dynamically quantised graph gives each text what it gives it alone, so without padding.
        one_width = by_token and not (self._model.shares_scales and options.many.batch_size is None)
        work = Work(
            encode=lambda text: [tokenizer.encode(text, limit=options.limit).tokens()],
            keep=lambda rows, batch, outputs: self._kept(batch, outputs[0], options),
            answer=lambda text, rows, kept: kept[0],
            one_width=one_width,
        )
        return Call(given.texts, work, options.many, lambda rows, alone: _stacked(rows, tokenizer))

    def _kept(self, batch: Batch, vectors: Vectors, options: _Options) -> Vectors:
        if options.poolings != ("none",):
            pooled = [pool.POOLINGS[one](vectors, batch.attention_mask) for one in options.poolings]
            vectors = pooled[0] if len(pooled) == 1 else np.concatenate(pooled, axis=-1)
        if options.normalize:
            vectors = pool.normalize(vectors)
        if options.precision is None:
            return vectors
        if vectors.shape[-1] % 8:
            raise InputError(
                f"quantize packs 8 widths to a byte, and this model has {vectors.shape[-1]}.",
                value=vectors.shape[-1],
            )
        return pool.binary(vectors) if options.precision == "binary" else pool.ubinary(vectors)


def _stacked(rows: Sequence[Vectors], tokenizer: Tokenizer) -> Vectors:
    """One array of the texts' own; shorter ones are filled up with zeros."""
    if len(rows) == 1:
        return rows[0][None]
    width = max(map(len, rows))
    if all(len(one) == width for one in rows):
        return np.stack(rows)
    found = np.zeros((len(rows), width, *rows[0].shape[1:]), rows[0].dtype)
    for place, one in zip(found, rows, strict=True):
        place[width - len(one) if tokenizer.pads_left else 0 :][: len(one)] = one
    return found
