"""From one vector a token to one a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Hidden = NDArray[np.floating[Any]]
Mask = NDArray[np.int64]


def mean(hidden: Hidden, mask: Mask) -> Hidden:
    """The mean over a text's tokens, padding left out."""
    return _weighted(hidden, mask.astype(hidden.dtype))


def weighted_mean(hidden: Hidden, mask: Mask) -> Hidden:
    """The mean weighted by position from 1, as sentence-transformers' weightedmean."""
    weights = mask * np.arange(1, mask.shape[1] + 1)
    return _weighted(hidden, weights.astype(hidden.dtype))


def mean_sqrt_len(hidden: Hidden, mask: Mask) -> Hidden:
    """The sum over a text's tokens, divided by the square root of their number."""
    weights = mask.astype(hidden.dtype)
    total: Hidden = np.einsum("bth,bt->bh", hidden, weights)
    length: Hidden = np.sqrt(np.maximum(weights.sum(axis=1, keepdims=True), 1e-9))
    return np.divide(total, length)


def largest(hidden: Hidden, mask: Mask) -> Hidden:
    """The largest value over a text's tokens, width by width."""
    masked: Hidden = np.where(mask[:, :, None].astype(bool), hidden, -np.inf)
    largest_values: Hidden = masked.max(axis=1)
    return largest_values


def first_token(hidden: Hidden, mask: Mask) -> Hidden:
    """The vector of a text's first token: of ``[CLS]``, where the model has one."""
    rows = np.arange(len(mask))
    found: Hidden = hidden[rows, mask.argmax(axis=1)]
    return found


def last_token(hidden: Hidden, mask: Mask) -> Hidden:
    """The vector of a text's last token that is not padding."""
    rows = np.arange(len(mask))
    found: Hidden = hidden[rows, mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)]
    return found


POOLINGS: Final[Mapping[str, Callable[[Hidden, Mask], Hidden]]] = MappingProxyType(
    {
        "mean": mean,
        "cls": first_token,
        "first_token": first_token,
        "eos": last_token,
        "last_token": last_token,
        "max": largest,
        "mean_sqrt_len": mean_sqrt_len,
        "weighted_mean": weighted_mean,
    }
)
"""Each takes hidden states [texts, tokens, width] and a mask [texts, tokens]: to [texts, width]."""


def normalize(vectors: Hidden) -> Hidden:
    """Scale each vector along the last axis to length 1; a zero vector stays."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    scaled: Hidden = vectors / np.maximum(length, 1e-12)
    return scaled.astype(vectors.dtype, copy=False)


def binary(vectors: Hidden) -> NDArray[np.int8]:
    """One bit a width: whether it is above 0, eight to a byte, as signed bytes."""
    return (ubinary(vectors).astype(np.int16) - 128).astype(np.int8)


def ubinary(vectors: Hidden) -> NDArray[np.uint8]:
    """One bit a width: whether it is above 0, eight to a byte, the first one highest."""
    return np.packbits(vectors > 0, axis=-1)


def _weighted(hidden: Hidden, weights: Hidden) -> Hidden:
    total: Hidden = np.einsum("bth,bt->bh", hidden, weights)
    number: Hidden = np.maximum(weights.sum(axis=1, keepdims=True), 1e-9)
    return np.divide(total, number)
