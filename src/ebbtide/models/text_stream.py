"""Text from tokens as they come, in pieces that never split a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

Decode = Callable[[Sequence[int]], str]

_UNFINISHED: Final = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER: Final = 16
"""Tokens that are waited for at most while they spell no whole character: then it never will."""


class TextStream:
    """The text of a row of tokens, a piece a token.

    What a token spells depends on those before it (a space, half a character), so each piece is
    what the newest tokens add to the text of a few before them.

    Args:
        decode: The text of some tokens.
        before: Tokens that came before, which are not in the text.

    Example:
        >>> stream = TextStream(lambda ids: "".join(map(chr, ids)))
        >>> [stream.put(ord(one)) for one in "tide"], stream.text, stream.end()
        (['t', 'i', 'd', 'e'], 'tide', '')
    """

    def __init__(self, decode: Decode, before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(before)
        self._start = max(0, len(self._ids) - _LONGEST_CHARACTER)
        self._told = len(self._ids)
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """All pieces so far."""
        return "".join(self._pieces)

    def put(self, token: int) -> str:
        """The text that can be told with this token; empty while it ends inside a character."""
        self._ids.append(token)
        return self._tell(waits=len(self._ids) - self._told < _LONGEST_CHARACTER)

    def end(self) -> str:
        """What was held back."""
        return self._tell(waits=False)

    def _tell(self, *, waits: bool) -> str:
        known = self._decode(self._ids[self._start : self._told])
        text = self._decode(self._ids[self._start :])
        if len(text) <= len(known) or (waits and text.endswith(_UNFINISHED)):
            return ""
        self._start, self._told = self._told, len(self._ids)
        piece = text[len(known) :]
        self._pieces.append(piece)
        return piece
