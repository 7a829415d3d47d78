"""A causal language model in memory: tokenizer, one session, and its steps over a cache.

One driver for every architecture: what is fed, and what is carried from step to step, is led by the
names and shapes that the session has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import closing
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ebbtide.cancellation import CancelToken
from ebbtide.errors import UnsupportedModelError
from ebbtide.models.config import ModelConfig
from ebbtide.models.loading import MODEL, Driver, Loaded
from ebbtide.runtime import (
    POSITIONS,
    Carried,
    Carry,
    GraphSession,
    InPlace,
    Passed,
    TensorInfo,
    size_in,
)

_FED: Final = frozenset(
    {
        "input_ids",
        "attention_mask",
        "decoder_attention_mask",
        "position_ids",
        "token_type_ids",
        "num_logits_to_keep",
        "use_cache_branch",
    }
)
_PAST: Final = re.compile(r"past(?P<kind>_key_values|_conv|_ssm|_recurrent)?\.(?P<rest>.+)")
_PLACES: Final = ("past", "seq", "len", "total")

LOGITS_AT_ONCE: Final = 1 << 24
"""Logits that one run may give: a longer prompt is shown in parts. 64 MB in float32."""

LEAST_PART: Final = 64
"""Tokens of such a part at least."""

_AHEAD: Final = 256
"""Tokens for which a mask is made ahead."""

NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})

Held = Callable[[int], object]
"""Told how many bytes a generation's cache takes now."""


class Decoder(Driver):
    """One causal model, or the decoder beside an encoder, as one pipeline owns it.

    Args:
        loaded: The model.
        stem: Which of its files this is.
        fixed: Inputs that stay the same through a generation: what an encoder gave.
    """

    def __init__(
        self, loaded: Loaded, stem: str = MODEL, fixed: frozenset[str] = frozenset()
    ) -> None:
        super().__init__(loaded, stem)
        self._fixed = fixed
        self._exact: tuple[object, bool] | None = None
        self.inputs = {one.name: one for one in self.graph.inputs}
        self.fed = [(name, info) for name, info in self.inputs.items() if name in _FED]
        self.carried = carried_by(self.graph, self.config, self.name)
        self.has_state = any(one.axis is None for one in self.carried)
        self.has_buffers = bool(self.carried) and all(
            one.axis == 2 and len(one.shape) == 4 for one in self.carried
        )
        self._check()

    def _check(self) -> None:
        taken = {one.input for one in self.carried}
        known = _FED | taken | self._fixed
        unknown = [name for name in self.inputs if name not in known]
        if unknown or "input_ids" not in self.inputs:
            takes = ", ".join(self.inputs)
            raise UnsupportedModelError(
                f"The graph of model {self.name!r} is no causal language model that can be run: it"
                f" takes {takes}. Export it for text-generation, with its past.",
                model=self.name,
            )

    @property
    def mixes_lengths(self) -> bool:
        """Whether prompts of several lengths may run together.

        A state, as of a convolution, may take in padding too: that depends on the export.
        """
        return not self.has_state

    def is_exact(self, source: object, token: CancelToken) -> bool:
        """Whether two tokens give in one run what they give in two; tried once, with a few runs.

        A quantised graph may have other kernels for one token than for several.

        Args:
            source: What a generation runs on.
            token: Stops it.
        """
        if self._exact is None or self._exact[0] is not source:
            found = []
            for parts in (((0, 1),), ((0,), (1,))):
                with closing(self.begin(np.ones((1, 2), np.int64))) as steps:
                    for part in parts:
                        logits = steps.forward(np.array([part]), token)
                found.append(logits)
            whole, apart = found
            self._exact = source, bool(np.allclose(whole, apart, rtol=1e-3, atol=1e-3))
        return self._exact[1]

    def begin(
        self,
        mask: NDArray[np.int64],
        *,
        cache: bool = True,
        held: Held = int,
        fixed: Mapping[str, NDArray[Any]] = NOTHING,
    ) -> Steps:
        """Begin a generation.

        Args:
            mask: Which of the prompts' tokens are tokens, and which padding at the left: [rows,
                tokens].
            cache: Whether what was seen is kept between steps.
            held: Told how many bytes the cache takes, as that changes; 0 at the end.
            fixed: What the graph is fed at each step: [rows, ...] each.
        """
        there = {name: array for name, array in fixed.items() if name in self.inputs}
        return Steps(self, mask, cache=cache, held=held, fixed=there)


class Steps:
    """One generation: see `ebbtide.generation.Steps`."""

    def __init__(
        self,
        model: Decoder,
        mask: NDArray[np.int64],
        *,
        cache: bool,
        held: Held,
        fixed: Mapping[str, NDArray[Any]],
    ) -> None:
        self._model = model
        self._fixed = dict(fixed)
        self._mask = mask.astype(np.int64)
        self._pads = len(mask[0]) - self._mask.sum(axis=1)
        self._told = -1
        self._held = held
        self._seen = 0
        self._ids = np.empty((len(mask), 0), np.int64)
        self._keeps = bool(model.carried) and cache
        self._runs = model.graph.begin(CancelToken(model.label))
        self._carry = self._new_carry(len(mask))

    def _new_carry(self, rows: int) -> Carry:
        in_place = self._model.has_buffers and self._runs.writes_in_place
        return (InPlace if in_place else Passed)(self._runs, self._model.carried, rows)

    @property
    def length(self) -> int:
        """Tokens of each row that the model has seen, padding included."""
        return self._seen

    @property
    def size(self) -> int:
        """Bytes of what is kept of the tokens that were seen."""
        return self._carry.size

    def may_guess(self, token: CancelToken) -> bool:
        """Whether a wrong guess costs little, and guesses change nothing that is written."""
        in_place = isinstance(self._carry, InPlace)
        return in_place and self._model.is_exact(self._runs.source, token)

    @property
    def takes_back(self) -> bool:
        """Whether tokens can be taken back at all."""
        return not self._model.has_state

    def forward(
        self, ids: NDArray[np.int64], token: CancelToken, *, last: bool = True
    ) -> NDArray[np.float32]:
        """Show the model the next tokens of every row; see `ebbtide.generation.Steps`."""
        rows, new = ids.shape
        self._grow_mask(self._seen + new)
        if not self._keeps:
            return self._whole(ids, token, last)
        if new == 1:
            return self._run(ids, token, last)
        part = new
        most = max(LEAST_PART, LOGITS_AT_ONCE // (rows * self._width()))
        if last and not self._is_ragged():
            part = most
        elif last and new > most:
            return self._one_by_one(ids, token)
        logits: NDArray[np.float32] = np.empty((rows, 0, 0), np.float32)
        for start in range(0, new, part):
            token.check()
            logits = self._run(ids[:, start : start + part], token, last)
        return logits

    def _one_by_one(self, ids: NDArray[np.int64], token: CancelToken) -> NDArray[np.float32]:
        """Show the model one prompt after another: several cannot be shown to it in parts."""
        assert isinstance(self._carry, InPlace)
        logits, parts = [], []
        for row, count in enumerate(ids.shape[1] - self._pads):
            own = slice(row, row + 1)
            fixed = {name: array[own] for name, array in self._fixed.items()}
            mask = np.ones((1, count), np.int64)
            steps = Steps(self._model, mask, cache=True, held=int, fixed=fixed)
            logits.append(steps.forward(ids[own, -count:], token))
            parts.append(steps._carry)
            steps.pause()
        self._carry.join(parts)
        self._seen = ids.shape[1]
        self._tell()
        return np.concatenate(logits)

    def _tell(self) -> None:
        size = self._carry.size
        if size != self._told:
            self._told = size
            self._held(size)

    def _width(self) -> int:
        if "num_logits_to_keep" in self._model.inputs:
            return 1
        vocabulary = self._model.config.raw.get("vocab_size")
        return vocabulary if isinstance(vocabulary, int) else 1 << 16

    def _is_ragged(self) -> bool:
        """Whether the first run is of prompts that have to be moved: see `_run`."""
        return isinstance(self._carry, InPlace) and len(self._mask) > 1

    def _grow_mask(self, length: int) -> None:
        if length > self._mask.shape[1]:
            ones = np.ones((len(self._mask), length - self._mask.shape[1] + _AHEAD), np.int64)
            self._mask = np.concatenate([self._mask, ones], axis=1)

    def _whole(self, ids: NDArray[np.int64], token: CancelToken, last: bool) -> NDArray[np.float32]:
        """Run all that was ever shown, without a cache."""
        new = ids.shape[1]
        self._ids = np.concatenate([self._ids, ids], axis=1)
        self._carry = self._new_carry(len(ids))
        self._seen = 0
        return self._run(self._ids, token, last)[:, -new:]

    def _run(self, ids: NDArray[np.int64], token: CancelToken, last: bool) -> NDArray[np.float32]:
        """One run.

        A graph that writes in place keeps each row's tokens together from the first place on, so
        there rows are padded at the right: what is padding is written over by what comes.
        """
        total = self._seen + ids.shape[1]
        mask = self._mask[:, :total]
        counts = np.maximum(total - self._pads, 0)
        moved = isinstance(self._carry, InPlace) and bool(self._pads.any())
        if moved:
            ids = _at_left(ids, mask[:, self._seen :]) if self._seen == 0 else ids
            mask = (np.arange(total) < counts[:, None]).astype(np.int64)
        feeds = self._feeds(ids, mask, counts, total, last)
        (logits,) = self._carry.run(feeds, ["logits"], token)
        first = self._seen == 0
        self._seen = total
        self._tell()
        found: NDArray[np.float32] = logits.astype(np.float32, copy=False)
        if moved and first and found.shape[1] > 1:
            if last:
                newest: NDArray[np.float32] = found[np.arange(len(ids)), counts - 1][:, None]
                return newest
            for row, count in zip(found, counts, strict=True):
                row[total - count :] = row[:count].copy()
        return found[:, -1:] if last else found

    def _feeds(
        self,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        counts: NDArray[np.int64],
        total: int,
        last: bool,
    ) -> dict[str, NDArray[Any]]:
        new = ids.shape[1]
        feeds: dict[str, NDArray[Any]] = dict(self._fixed)
        for name, info in self._model.fed:
            if name == "input_ids":
                array: NDArray[Any] = ids
            elif name in ("attention_mask", "decoder_attention_mask"):
                array = mask
            elif name == "position_ids":
                array = self._positions(mask, counts, new)
            elif name == "token_type_ids":
                array = np.zeros_like(ids)
            elif name == "num_logits_to_keep":
                array = np.array(1 if last and not self._is_ragged() else 0)
            else:
                array = np.array([total > new])  # use_cache_branch
            if name == "num_logits_to_keep" and info.shape:
                array = array.reshape(1)
            feeds[name] = np.asarray(array, info.dtype, order="C")
        return feeds

    def _positions(
        self, mask: NDArray[np.int64], counts: NDArray[np.int64], new: int
    ) -> NDArray[np.int64]:
        """Each new token's place among its row's tokens, from 0."""
        if isinstance(self._carry, InPlace) and self._seen:
            return counts[:, None] - new + np.arange(new)
        positions: NDArray[np.int64] = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, -new:]
        return positions

    def select(self, rows: NDArray[np.int64]) -> None:
        """Go on with these rows, in this order."""
        self._mask, self._pads = self._mask[rows], self._pads[rows]
        self._fixed = {name: array[rows] for name, array in self._fixed.items()}
        if self._keeps:
            self._carry.select(rows)
            self._tell()
        else:
            self._ids = self._ids[rows]

    def crop(self, length: int) -> None:
        """Forget what was seen after so many tokens."""
        if length >= self._seen:
            return
        if self._keeps:
            self._carry.crop(length)
        else:
            self._ids = self._ids[:, :length]
        self._seen = length

    def close(self) -> None:
        """Give the cache back."""
        self._carry.close()
        self._runs.pause()
        self._held(0)

    def pause(self) -> None:
        """Keep the cache, and let go of what it is the cache of."""
        self._carry.pause()
        self._runs.pause()

    def resume(self, token: CancelToken) -> bool:
        """Go on; False where the model was loaded anew since, and the cache means nothing."""
        return self._runs.resume(token)


def _at_left(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows with their padding moved from the left to the right."""
    found = np.zeros_like(ids)
    for row, count in enumerate(mask.sum(axis=1)):
        found[row, :count] = ids[row, ids.shape[1] - count :]
    return found


def carried_by(graph: GraphSession, config: ModelConfig, model: str) -> tuple[Carried, ...]:
    """What a decoder's graph carries from one run to the next.

    Raises:
        UnsupportedModelError: A past input has no output that gives it, or a size that nobody says.
    """
    outputs = {one.name for one in graph.outputs}
    found = []
    for info in graph.inputs:
        match = _PAST.fullmatch(info.name)
        if match is None:
            continue
        kind = match["kind"] or ""
        names = [
            f"present{'' if kind == '_key_values' else kind}.{match['rest']}",
            f"present{kind}.{match['rest']}",
        ]
        output = next((name for name in names if name in outputs), None)
        if output is None:
            raise UnsupportedModelError(
                f"The graph of model {model!r} takes {info.name} and gives no {names[0]}.",
                model=model,
            )
        shape, axis = _sizes(info, config.raw, model)
        once = ".encoder." in info.name  # of what the encoder gave, which stays as it is
        found.append(Carried(info.name, output, info.dtype, shape, axis, once))
    return tuple(found)


def _sizes(
    info: TensorInfo, config: Mapping[str, Any], model: str
) -> tuple[tuple[int, ...], int | None]:
    """A past input's sizes for one row, and which of them grows."""
    places = [
        number
        for number, one in enumerate(info.shape)
        if number and isinstance(one, str) and any(word in one.lower() for word in _PLACES)
    ]
    heads = size_in(config, "num_attention_heads", "n_head", "num_heads", "decoder_attention_heads")
    kv_heads = size_in(config, "num_key_value_heads", "num_kv_heads") or heads
    hidden = size_in(config, "hidden_size", "n_embd", "d_model", "dim")
    size = size_in(config, "head_dim", "d_kv") or (hidden // heads if heads and hidden else None)
    shape: list[int] = []
    for number, one in enumerate(info.shape):
        name = one.lower() if isinstance(one, str) else ""
        known: int | None
        if number in places[:1]:
            known = 1
        elif isinstance(one, int):
            known = one
        elif number == 0:
            known = heads if "head" in name and heads else 1
        elif "head" in name and "dim" not in name and "size" not in name:
            known = kv_heads
        else:
            known = size
        if known is None:
            raise UnsupportedModelError(
                f"The graph of model {model!r} does not say how large {info.name} is"
                f" ({', '.join(map(str, info.shape))}), nor does its config.",
                model=model,
            )
        shape.append(known)
    return tuple(shape), places[0] if places else None


def context_of(config: ModelConfig) -> int | None:
    """Tokens that a causal model can take; None where nothing bounds it."""
    return size_in(config.raw, *POSITIONS)
