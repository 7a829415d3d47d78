"""What processes say to each other: messages of a kind and what it takes, ready to be sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ebbtide.workers import codec
from ebbtide.workers.channel import Packet
from ebbtide.workers.records import records


def packet(kind: str, *rest: Any) -> Packet:
    """A message, ready to be sent.

    Raises:
        InputError: Something in it cannot cross; says what.
    """
    return Packet(codec.encode([kind, *rest], records))


def call_packet(
    number: int,
    name: str,
    arguments: Iterable[Any],
    options: Mapping[str, Any],
    *,
    tells: str | None = None,
) -> Packet:
    """A call of a method of the pipeline; ``tells`` is what it tells meanwhile."""
    return packet("call", number, name, list(arguments), dict(options), tells)


def read(text: bytes, beside: memoryview | None) -> Any:
    """The kind of a message, and what it takes.

    Raises:
        BrokenMessageError: It is no message of ours.
    """
    return codec.decode(text, beside, records)
