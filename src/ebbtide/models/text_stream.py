"""Text from tokens as they come, in pieces that never split a character."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final

Decode = Callable[[Sequence[int]], str]

_UNFINISHED: Final = re.compile(r"\N{REPLACEMENT CHARACTER}\Z")
_MAY_BE_CLEANED: Final = re.compile(r"(?:\N{REPLACEMENT CHARACTER}| n?| n'|'[nvr]?)\Z")
"""What begins a mark that loses the space before it, as in ``do n't`` and ``we 've``."""

_LONGEST_CHARACTER: Final = 16
"""Tokens that are waited for at most while they spell no whole character: then they never will."""

_LEFT_OPEN: Final = 3
"""Bytes that a character which is not whole has at most, and so tokens."""


class TextStream:
    """The text of a row of tokens, a piece a token.

    What a token spells depends on those before it (a space, half a character), so each piece is
    what the newest tokens add to the text of a few before them.

    Args:
        decode: The text of some tokens.
        before: Tokens that came before, which are not in the text.
        cleans: Whether ``decode`` takes out spaces before punctuation, as `cleaned` does: then what
            may yet lose its space is held back too.

    Example:
        >>> stream = TextStream(lambda ids: "".join(map(chr, ids)))
        >>> [stream.put(ord(one)) for one in "tide"], stream.text, stream.end()
        (['t', 'i', 'd', 'e'], 'tide', '')
    """

    def __init__(self, decode: Decode, before: Sequence[int] = (), *, cleans: bool = False) -> None:
        self._decode = decode
        self._open = _MAY_BE_CLEANED if cleans else _UNFINISHED
        self._ids = list(before)
        start = max(0, len(self._ids) - _LONGEST_CHARACTER)
        starts = range(start, max(0, start - _LEFT_OPEN) - 1, -1)
        # A whole character is written shorter than its parts: so what is known begins with one.
        self._start = min(starts, key=lambda one: len(decode(self._ids[one:])))
        self._told = len(self._ids)
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """All pieces so far."""
        return "".join(self._pieces)

    def put(self, token: int) -> str:
        """The text that can be told with this token; empty while it ends inside a character."""
        self._ids.append(token)
        end = len(self._ids)
        if not self._open.search(self._text(end)):
            return self._tell(end)
        if end - self._told < _LONGEST_CHARACTER:
            return ""
        # For the same reason, what is told ends after one.
        ends = range(end, end - _LEFT_OPEN - 1, -1)
        return self._tell(min(ends, key=lambda one: len(self._text(one))))

    def end(self) -> str:
        """What was held back."""
        return self._tell(len(self._ids))

    def _text(self, end: int) -> str:
        return self._decode(self._ids[self._start : end])

    def _tell(self, end: int) -> str:
        known, text = self._text(self._told), self._text(end)
        if len(text) <= len(known):
            return ""
        self._start, self._told = self._told, end
        piece = text[len(known) :]
        self._pieces.append(piece)
        return piece
