"""feature-extraction: text to vectors, one a token or one a text."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Sequence
from typing import Any, ClassVar, Final, Literal, Never, get_args, overload

import numpy as np
from numpy.typing import NDArray

from ebbtide.cancellation import CancelToken
from ebbtide.errors import InputError, unknown_value
from ebbtide.hub import ModelFiles
from ebbtide.lifecycle import Lifecycle
from ebbtide.models.sentence import SENTENCE_FILES, SentenceRecipe, read_recipe
from ebbtide.models.text_encoder import FEATURES, Outputs, TextEncoder
from ebbtide.models.tokenizer import Batch
from ebbtide.pipelines import inputs as given
from ebbtide.pipelines import pooling as pool
from ebbtide.pipelines.base import Pipeline

Pooling = Literal[
    "auto", "none", "mean", "cls", "first_token", "eos", "last_token", "max", "mean_sqrt_len",
    "weighted_mean",
]  # fmt: skip
Precision = Literal["binary", "ubinary"]
Vectors = NDArray[Any]

_POOLINGS: Final[tuple[str, ...]] = get_args(Pooling)
_PRECISIONS: Final[tuple[str, ...]] = get_args(Precision)
_OPTIONS: Final = ("pooling", "normalize", "quantize", "precision", "batch_size")


@dataclasses.dataclass(frozen=True, slots=True)
class _Options:
    """One call's options, checked and settled."""

    poolings: tuple[str, ...]
    normalize: bool
    precision: Precision | None
    batch_size: int
    limit: int | None


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
        batch_size: int = ...,
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
        batch_size: int = ...,
    ) -> Iterator[Vectors]: ...

    def __call__(
        self,
        inputs: str | Sequence[str] | Iterator[str],
        *,
        pooling: Pooling = "auto",
        normalize: bool | None = None,
        quantize: bool = False,
        precision: Precision = "binary",
        batch_size: int = 32,
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
            batch_size: How many texts of a list run at once.

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
        options = self._options(pooling, normalize, quantize, precision, batch_size)
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
        batch_size: int = 32,
        **unknown: Never,
    ) -> Vectors | AsyncIterator[Vectors]:
        """The same as calling, without blocking the event loop.

        Cancelling the task stops the native run, waits for its end, and then raises. For an
        iterator, sync or async, an async iterator comes back.
        """
        self._unknown(unknown, _OPTIONS)
        options = self._options(pooling, normalize, quantize, precision, batch_size)
        found: Any = await self._aanswer(inputs, self._vectors(options))
        return found  # type: ignore[no-any-return]

    def _options(
        self,
        pooling: str,
        normalize: bool | None,
        quantize: bool,
        precision: str,
        batch_size: int,
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
            batch_size=given.batch_size(batch_size),
            limit=limit,
        )

    def _vectors(self, options: _Options) -> Callable[[object], Callable[[CancelToken], Vectors]]:
        def prepare(inputs: object) -> Callable[[CancelToken], Vectors]:
            texts, _ = given.texts(inputs)
            return lambda token: self._compute(texts, options, token)

        return prepare

    def _compute(self, texts: list[str], options: _Options, token: CancelToken) -> Vectors:
        whole = self._model.tokenizer.batch(texts, limit=options.limit)
        by_token = options.poolings == ("none",)
        parts = []
        for start in range(0, len(texts), options.batch_size):
            token.check()
            batch = whole.rows(start, start + options.batch_size, keep_width=by_token)
            parts.append(self._forward(batch, options, token))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _forward(self, batch: Batch, options: _Options, token: CancelToken) -> Vectors:
        (vectors,) = self._model.forward(batch, token)
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
