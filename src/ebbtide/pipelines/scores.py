"""From a model's raw scores to probabilities, and to the best of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.floating[Any]]


def softmax(logits: Scores) -> Scores:
    """Probabilities that sum to 1 along the last axis."""
    raised = np.exp(_wide(logits) - logits.max(axis=-1, keepdims=True))
    result: Scores = raised / raised.sum(axis=-1, keepdims=True)
    return result


def sigmoid(logits: Scores) -> Scores:
    """Each score's own probability."""
    wide = _wide(logits)
    small = np.exp(-np.abs(wide))  # at most 1: never too large for a float
    result: Scores = np.where(wide >= 0, 1, small) / (1 + small)
    return result


def best(scores: Scores, count: int | None) -> list[int]:
    """The places of the best scores, best first, of equal ones the first first.

    Args:
        scores: [scores].
        count: How many; None for all.
    """
    places = np.arange(len(scores))
    if count is not None and count < len(scores):  # a vocabulary's are too many to sort
        least = np.partition(scores, -count)[-count]
        places = np.flatnonzero(scores >= least)
    order = np.argsort(-scores[places], kind="stable")[:count]
    found: list[int] = places[order].tolist()
    return found


def _wide(logits: Scores) -> Scores:
    """At least single precision: half would round probabilities to three digits."""
    return logits.astype(np.float32) if logits.dtype == np.float16 else logits
