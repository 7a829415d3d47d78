"""fill-mask: what stands behind the masks of a text."""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Sequence
from typing import Any, ClassVar, Final, Never, TypedDict, overload

import numpy as np

from ebbtide.errors import InputError, UnsupportedModelError
from ebbtide.hub import ModelFiles
from ebbtide.models.batching import Work, unpadded
from ebbtide.models.text_encoder import LOGITS, Outputs, TextEncoder
from ebbtide.models.tokenizer import Batch, Tokens
from ebbtide.pipelines import inputs as given
from ebbtide.pipelines import scores as scoring
from ebbtide.pipelines.base import Call, Pipeline
from ebbtide.pipelines.progress import Progress

log = logging.getLogger("ebbtide.pipelines")

_OPTIONS: Final = ("top_k", "targets", "batch_size", "window", "progress")


class Filling(TypedDict):
    """One token for a mask: how likely, which, and the text that comes of it."""

    score: float
    token: int
    token_str: str
    sequence: str


Fillings = list[Filling] | list[list[Filling]]


class FillMaskPipeline(Pipeline):
    """Texts with masks to what may stand there.

    Example:
        >>> import ebbtide
        >>> with ebbtide.pipeline("fill-mask", "tests/models/bert/mask") as fill:
        ...     len(fill(f"the tide goes {fill.mask_token}"))
        5
    """

    task: ClassVar[str] = "fill-mask"
    outputs: ClassVar[Outputs] = LOGITS

    @classmethod
    def read(cls, files: ModelFiles, model: TextEncoder) -> None:
        """See that there is a mask token."""
        if model.tokenizer.mask_id is None:
            raise UnsupportedModelError(
                f"The tokenizer of model {files.name!r} has no mask token: take a model that was"
                " trained to fill in masks.",
                model=files.name,
            )

    @property
    def mask_token(self) -> str:
        """What marks a place to fill in, as in ``[MASK]`` or ``<mask>``."""
        return str(self.tokenizer.mask_token)

    @overload
    def __call__(
        self,
        inputs: str,
        *,
        top_k: int = ...,
        targets: str | Sequence[str] | None = ...,
        batch_size: int | None = ...,
        window: int | None = ...,
        progress: Progress = ...,
    ) -> Fillings: ...

    @overload
    def __call__(
        self,
        inputs: given.Texts,
        *,
        top_k: int = ...,
        targets: str | Sequence[str] | None = ...,
        batch_size: int | None = ...,
        window: int | None = ...,
        progress: Progress = ...,
    ) -> list[Fillings]: ...

    @overload
    def __call__(
        self,
        inputs: Iterator[str],
        *,
        top_k: int = ...,
        targets: str | Sequence[str] | None = ...,
        batch_size: int | None = ...,
        window: int | None = ...,
        progress: Progress = ...,
    ) -> Iterator[Fillings]: ...

    def __call__(
        self,
        inputs: str | given.Texts | Iterator[str],
        *,
        top_k: int = 5,
        targets: str | Sequence[str] | None = None,
        batch_size: int | None = None,
        window: int | None = None,
        progress: Progress = False,
        **unknown: Never,
    ) -> Fillings | list[Fillings] | Iterator[Fillings]:
        """Fill in masks.

        Args:
            inputs: One text, a list or an iterator of texts, each with at least one `mask_token`.
            top_k: How many tokens a mask gets, the likeliest first.
            targets: The only tokens to choose from; of one that the vocabulary does not have as it
                is, the first piece is taken, and the log says so.
            batch_size: How many texts of a list run at once. None: as many as have about
                2,048 tokens with padding; of a dynamically quantised model one.
            window: How many inputs are sorted by length together. None: of a list up to 1,024; of
                an iterator as many as ``batch_size``, or one, so that each is answered before the
                next is taken.
            progress: Tell how many inputs are done: True for a bar, or a function of that number
                and of how many there are, None where nobody knows.

        Returns:
            For a text with one mask ``[{"score": ..., "token": id, "token_str": ..., "sequence":
            the text filled in}]``; with several masks one such list a mask, each filled in alone.
            For a list a list, for an iterator an iterator of these.

        Raises:
            InputError: A text has no mask, or none inside the model's window; or an option's value
                cannot be used.
            OptionError: There is no such option.
            PipelineDisposedError: The pipeline is disposed.
            PipelineCancelledError: A dispose cancelled this call.
        """
        self._unknown(unknown, _OPTIONS)
        found: Any = self._answer(
            inputs, self._fill(top_k, targets, given.many(batch_size, window, progress))
        )
        return found  # type: ignore[no-any-return]

    async def acall(
        self,
        inputs: str | given.Texts | Iterator[str] | AsyncIterable[str],
        *,
        top_k: int = 5,
        targets: str | Sequence[str] | None = None,
        batch_size: int | None = None,
        window: int | None = None,
        progress: Progress = False,
        **unknown: Never,
    ) -> Fillings | list[Fillings] | AsyncIterator[Fillings]:
        """The same as calling, without blocking the event loop."""
        self._unknown(unknown, _OPTIONS)
        found: Any = await self._aanswer(
            inputs, self._fill(top_k, targets, given.many(batch_size, window, progress))
        )
        return found  # type: ignore[no-any-return]

    def _fill(self, top_k: int, targets: object, many: given.Many) -> Call:
        given.count("top_k", top_k)
        wanted = None if targets is None else given.texts(targets, "Target")[0]
        ids = functools.cache(lambda: None if wanted is None else self._targets(wanted))

        def keep(
            rows: Sequence[Tokens], batch: Batch, outputs: list[scoring.Scores]
        ) -> Iterator[Fillings]:
            for row, logits in zip(rows, unpadded(batch, *outputs), strict=True):
                yield self._filled(row, logits, top_k, ids())

        work = Work(
            encode=lambda text: [self._masked(text)],
            keep=keep,
            answer=lambda text, rows, kept: kept[0],
        )
        return Call(given.texts, work, many)

    def _masked(self, text: str) -> Tokens:
        tokenizer = self._model.tokenizer
        found = tokenizer.encode(text).tokens()
        if tokenizer.mask_id in found.ids:
            return found
        mask = tokenizer.mask_token
        where = "inside the model's window" if str(mask) in text else "in it"
        raise InputError(
            f"A text has no mask {where}: put {mask} where a word is to be filled in.",
            value=text[:200],
        )

    def _filled(
        self, row: Tokens, logits: scoring.Scores, top_k: int, targets: list[int] | None
    ) -> Fillings:
        tokenizer = self._model.tokenizer
        ids = row.ids
        (places,) = np.nonzero(ids == tokenizer.mask_id)
        alone = len(places) == 1
        found = []
        for place in places:
            scores = scoring.softmax(logits[place])
            chosen = np.arange(len(scores)) if targets is None else np.array(targets)
            one = []
            for rank in scoring.best(scores[chosen], top_k):
                token = int(chosen[rank])
                filled = ids.copy()
                filled[place] = token
                one.append(
                    Filling(
                        score=float(scores[token]),
                        token=token,
                        token_str=tokenizer.decode([token], skip_special_tokens=False),
                        # With several masks the others must stay to be seen.
                        sequence=tokenizer.decode(filled.tolist(), skip_special_tokens=alone),
                    )
                )
            found.append(one)
        return found[0] if alone else found

    def _targets(self, targets: Sequence[str]) -> list[int]:
        tokenizer = self._model.tokenizer
        found: dict[int, None] = {}
        for target in targets:
            token = tokenizer.token_id(target)
            if token is None:
                encoding = tokenizer.encode(target)
                pieces = encoding.ids[encoding.sequences == 0].tolist()
                if not pieces:
                    raise InputError(f"The target {target!r} is no token at all.", value=target)
                token = pieces[0]
                log.warning(
                    "the target %r is no token of the model's: taking its first piece, %r",
                    target, tokenizer.token(token),
                )  # fmt: skip
            found[token] = None
        return list(found)
