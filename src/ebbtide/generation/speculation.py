"""Guesses of the next tokens, which a model checks in one step: more than one token at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ebbtide.cancellation import CancelToken
from ebbtide.generation.processors import softmax
from ebbtide.generation.steps import Steps

Row = NDArray[np.int64]


class PromptLookup:
    """Guesses that what came after the same tokens before comes again.

    It costs next to nothing where nothing repeats: a step that checks guesses takes longer than one
    that does not, so it guesses less while its guesses are wrong.

    Args:
        most: Tokens of a guess at most.
        longest: Tokens that have to be the same at most, and then fewer, down to two.
    """

    def __init__(self, most: int = 10, longest: int = 3) -> None:
        self._most = most
        self._longest = longest
        self._size = float(most)
        self._guessed = 0
        self._length = 0
        self._wait = 0

    def __call__(self, ids: Row) -> Row:
        """A guess, from the ids so far."""
        self._learn(len(ids))
        self._length = len(ids)
        self._guessed = 0
        if self._wait > 0:
            self._wait -= 1
            return ids[:0]
        for size in range(min(self._longest, len(ids) - 1), 1, -1):
            tail = ids[-size:]
            where = np.flatnonzero(ids[size - 1 : -1] == tail[-1])
            for back in range(1, size):
                where = where[ids[where + size - 1 - back] == tail[-1 - back]]
            if len(where):
                most, starts = max(1, round(self._size)), where + size
                long = starts[starts + most <= len(ids)]
                start = int(long[-1] if len(long) else starts[0])
                guess = ids[start : start + most]
                self._guessed = len(guess)
                return guess.copy()
        return ids[:0]

    def _learn(self, length: int) -> None:
        """Guess more after what was right to its end, and less after errors."""
        if not self._guessed:
            return
        right = length - self._length - 1
        if right >= self._guessed:
            self._size = min(self._most, self._size * 2)
        else:
            self._size = max(1.0, (self._size + right) / 2)
            if right == 0 and self._size <= 1.5:
                self._wait = 4


class DraftModel:
    """Guesses what a smaller model would write; it knows the same tokens.

    It guesses more after what was right to its end, and fewer after errors.

    Args:
        steps: The smaller model, which has seen nothing yet; it is left open.
        token: Stops it from another thread.
        most: Tokens of a guess at most.
        sure: A token that the smaller model itself gives less of a chance is its last guess.
    """

    def __init__(
        self, steps: Steps, token: CancelToken, *, most: int = 16, sure: float = 0.4
    ) -> None:
        self._steps = steps
        self._token = token
        self._most = most
        self._sure = sure
        self._size = 5
        self._seen = np.empty(0, np.int64)
        self._guess = np.empty(0, np.int64)
        self._length = 0

    def __call__(self, ids: Row) -> Row:
        """A guess, from the ids so far."""
        if len(self._guess):
            right = len(ids) - self._length - 1
            whole = right >= len(self._guess)
            self._size = min(self._most, self._size + 2) if whole else max(1, self._size - 1)
        most = min(len(self._seen), len(ids) - 1)
        other = np.flatnonzero(self._seen[:most] != ids[:most])
        shared = int(other[0]) if len(other) else most
        self._steps.crop(shared)
        fresh = ids[shared:]
        guess: list[int] = []
        while len(guess) < self._size:
            logits = self._steps.forward(fresh[None], self._token)[:, -1]
            best = int(logits[0].argmax())
            guess.append(best)
            fresh = np.array([best], np.int64)
            if softmax(logits)[0, best] < self._sure:
                break
        self._guess = np.array(guess, np.int64)
        self._seen = np.concatenate([ids, self._guess[:-1]])
        self._length = len(ids)
        return self._guess
