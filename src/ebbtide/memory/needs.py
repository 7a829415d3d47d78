"""What native runs of one graph were seen to take of memory, by their shape.

A shape is a number of tokens and a length. Memory grows with the tokens, and in attention also with
the length, so what is known of one shape says something of every other. Few entries are kept: one
for each half octave of tokens and of length, with the smallest shape and the highest peak of it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from ebbtide.lifecycle import on_fork

LARGEST: Final = 1 << 32
"""Tokens and lengths above this count as this: so entries stay few, whatever is observed."""

_TOLD: Final = 4096
"""Shapes whose estimates are kept, until something is learned: most are asked for again."""

_NEAR: Final = 4
"""Half octaves."""

Entry = tuple[int, int, int]
"""Tokens, length and peak in bytes."""

_Bucket = tuple[int, int]


def bucket_of(tokens: int, length: int) -> tuple[int, int]:
    """Which half octaves a shape is in."""
    return _half_octave(_whole(tokens)), _half_octave(_whole(length))


class Needs:
    """What one graph's runs were seen to take; read without a lock, written on native threads.

    Example:
        >>> needs = Needs()
        >>> needs.estimate(1, 8) is None
        True
        >>> needs.observe(4, 128, 30_000_000)
        >>> needs.estimate(8, 128)
        60000000
        >>> Needs.of(needs.as_dict()).estimate(4, 128)
        30000000
    """

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._known: dict[_Bucket, Entry] = {}
        self._told: dict[tuple[int, int], int | None] = {}
        for tokens, length, peak in entries:
            self.observe_tokens(tokens, length, peak)

    def observe(self, batch: int, length: int, peak_bytes: int) -> None:
        """Note what a run took.

        Args:
            batch: Its rows.
            length: Tokens of a row, padding included.
            peak_bytes: Anonymous bytes that the process held more at its peak than before.
        """
        self.observe_tokens(batch * length, length, peak_bytes)

    def estimate(self, batch: int, length: int) -> int | None:
        """Bytes that a run will take at its peak; None where nothing is known."""
        return self.estimate_tokens(batch * length, length)

    def observe_tokens(self, tokens: int, length: int, peak_bytes: int) -> None:
        """The same by tokens, for a step over what was seen: few tokens, and a long past."""
        tokens, length, peak = _whole(tokens), _whole(length), max(0, int(peak_bytes))
        bucket = bucket_of(tokens, length)
        with _guard.lock:
            known = self._known.get(bucket)
            if known is not None:
                tokens, length = min(tokens, known[0]), min(length, known[1])
                peak = max(peak, known[2])
            # A new map each time, so that who goes through the old one is not disturbed.
            self._known = {**self._known, bucket: (tokens, length, peak)}
            self._told = {}

    def estimate_tokens(self, tokens: int, length: int) -> int | None:
        """The same by tokens.

        The least of what the known shapes say: their peak, by the ratio of tokens, and where it is
        longer by the ratio of lengths. For fewer tokens it is the ratio's square root: on MiniLM a
        quarter of 2,048 tokens takes 0.27 to 0.46 of the peak, an eighth 0.06 to 0.1, and what is
        guessed too high costs less. Never less than what a smaller known shape took.
        """
        told = self._told  # another one where something is learned meanwhile
        shape = _whole(tokens), _whole(length)
        if shape not in told and len(told) < _TOLD:
            told[shape] = self._extrapolated(*shape)
        return told[shape] if shape in told else self._extrapolated(*shape)

    def _extrapolated(self, tokens: int, length: int) -> int | None:
        least, most_of_smaller = None, 0
        for known_tokens, known_length, peak in self._known.values():
            if tokens < known_tokens:
                found = math.isqrt(peak * peak * tokens // known_tokens)
            else:
                found = -(-peak * tokens // known_tokens)
            if length > known_length:
                found = -(-found * length // known_length)
            least = found if least is None else min(least, found)
            if known_tokens <= tokens and known_length <= length:
                most_of_smaller = max(most_of_smaller, peak)
        return None if least is None else max(least, most_of_smaller)

    def knows(self, tokens: int, length: int) -> bool:
        """Whether a run of about this shape was seen."""
        return bucket_of(tokens, length) in self._known

    def covers(self, tokens: int, length: int) -> bool:
        """Whether about this shape was seen, or one of at most four times its tokens and length."""
        wide, long = bucket_of(tokens, length)
        return any(0 <= a - wide <= _NEAR and 0 <= b - long <= _NEAR for a, b in self._known)

    def as_dict(self) -> dict[str, list[list[int]]]:
        """Plain data, to be kept between runs."""
        return {"entries": sorted(list(one) for one in self._known.values())}

    @classmethod
    def of(cls, kept: Mapping[str, Sequence[Sequence[int]]]) -> Needs:
        """What `as_dict` gave."""
        return cls((tokens, length, peak) for tokens, length, peak in kept["entries"])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Needs) and self._known == other._known

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<Needs of {len(self._known)} shapes>"


class _Guard:
    """One lock for all, since an observation is rare."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """In a forked child: it is not held."""
        self.lock = threading.Lock()


def _whole(number: int) -> int:
    return min(max(1, int(number)), LARGEST)


def _half_octave(number: int) -> int:
    """Twice the logarithm to base 2, rounded down."""
    octave = number.bit_length() - 1
    return 2 * octave + (number * number >= 1 << (2 * octave + 1))


_guard = _Guard()
on_fork(_guard.forget)
