"""Plain data as bytes and back: what crosses between processes, and nothing that could run.

A value is a tag of one byte and what it takes: numbers, texts, bytes, lists, tuples, sets, maps,
numpy arrays of plain types, and records of a closed list (`ebbtide.workers.records`). Large arrays
lie beside the message, in shared memory. Whatever bytes come in, reading them gives such a value or
raises `BrokenMessageError`.
"""

from __future__ import annotations

import math
import os
import re
import struct
from array import array
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from ebbtide.errors import InputError

BESIDE: Final = 32_768
"""Bytes from which an array lies beside the message."""

_ALIGNED: Final = 64
_DEEPEST: Final = 200
_TYPE: Final = re.compile(
    r"[<>|][biufcSUmM][0-9]{1,9}(\[[0-9]{0,9}[a-z]{1,2}\])?", re.ASCII | re.IGNORECASE
)
"""An array's type, as numpy writes it: plain numbers, texts, bytes and times."""

_SIZE: Final = struct.Struct("<I")
_LONG: Final = struct.Struct("<q")
_FLOAT: Final = struct.Struct("<d")


class BrokenMessageError(Exception):
    """Bytes that are no message of ours."""


class Records(Protocol):
    """The closed list of what crosses beside plain data."""

    def fields(self, value: object) -> tuple[str, dict[str, Any]] | None:
        """The name and the fields of a value that is on the list; None for any other."""

    def build(self, name: str, fields: dict[str, Any]) -> Any:
        """The value again; raises `BrokenMessageError` where there is none such."""


class Encoded:
    """A message: its bytes, and the arrays that lie beside it.

    Attributes:
        parts: The bytes, in pieces.
        beside: Arrays with their offsets.
        size: Bytes of what lies beside.
    """

    __slots__ = ("beside", "depth", "parts", "records", "size")

    def __init__(self, records: Records) -> None:
        self.parts: list[bytes] = []
        self.beside: list[tuple[int, NDArray[Any]]] = []
        self.size = 0
        self.depth = 0
        self.records = records

    def lay_beside(self, one: NDArray[Any]) -> int:
        """The offset at which an array will lie."""
        offset = self.size
        self.beside.append((offset, one))
        self.size = -(-(offset + one.nbytes) // _ALIGNED) * _ALIGNED
        return offset


def encode(value: object, records: Records) -> Encoded:
    """The message that says a value.

    Raises:
        InputError: Something in it cannot cross; says what.
    """
    out = Encoded(records)
    _write(value, out)
    return out


def _write(value: Any, out: Encoded) -> None:
    writer = _WRITERS.get(type(value))
    if writer is not None:
        writer(value, out)
    else:
        _write_other(value, out)


def _write_text(value: str, out: Encoded) -> None:
    raw = value.encode("utf-8", "surrogatepass")
    out.parts.append(b"s" + _SIZE.pack(len(raw)) + raw)


def _write_bytes(value: Any, out: Encoded) -> None:
    raw = bytes(value)
    out.parts.append(b"b" + _SIZE.pack(len(raw)) + raw)


def _write_whole(value: int, out: Encoded) -> None:
    if -(2**63) <= value < 2**63:
        out.parts.append(b"i" + _LONG.pack(value))
        return
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    out.parts.append(b"I" + _SIZE.pack(len(raw)) + raw)


def _write_float(value: float, out: Encoded) -> None:
    out.parts.append(b"f" + _FLOAT.pack(value))


def _write_items(tag: bytes, items: Sequence[Any] | AbstractSet[Any], out: Encoded) -> None:
    _deeper(out)
    out.parts.append(tag + _SIZE.pack(len(items)))
    for one in items:
        _write(one, out)
    out.depth -= 1


def _write_list(value: Sequence[Any], out: Encoded) -> None:
    kinds = set(map(type, value)) if len(value) > 4 else None
    if kinds == {float}:
        out.parts.append(b"v" + _SIZE.pack(len(value)) + array("d", value).tobytes())
        return
    if kinds == {int}:
        try:
            raw = array("q", value).tobytes()
        except OverflowError:
            pass
        else:
            out.parts.append(b"w" + _SIZE.pack(len(value)) + raw)
            return
    _write_items(b"l", value, out)


def _write_map(value: Mapping[Any, Any], out: Encoded) -> None:
    _deeper(out)
    out.parts.append(b"d" + _SIZE.pack(len(value)))
    for key, one in value.items():
        _write(key, out)
        _write(one, out)
    out.depth -= 1


def _write_array(value: NDArray[Any], out: Encoded) -> None:
    if not _TYPE.fullmatch(value.dtype.str) or not value.dtype.itemsize:
        raise InputError(
            f"An array of {value.dtype} cannot cross to a worker process: pass plain numbers, or"
            " a list."
        )
    value = value if value.flags.c_contiguous else np.ascontiguousarray(value)
    if value.nbytes >= BESIDE:
        out.parts.append(b"A")
        _write_shape(value, out)
        out.parts.append(_LONG.pack(out.lay_beside(value)))
    else:
        out.parts.append(b"a")
        _write_shape(value, out)
        out.parts.append(value.tobytes())


def _write_shape(value: NDArray[Any], out: Encoded) -> None:
    kind = value.dtype.str.encode()
    out.parts.append(
        bytes((len(kind),))
        + kind
        + struct.pack(f"<B{value.ndim}Q", value.ndim, *value.shape)
    )  # fmt: skip


def _write_record(found: tuple[str, dict[str, Any]], out: Encoded) -> None:
    out.parts.append(b"r")
    _write_text(found[0], out)
    _write_map(found[1], out)


def _write_other(value: Any, out: Encoded) -> None:
    found = out.records.fields(value)
    if found is not None:
        _write_record(found, out)
    elif isinstance(value, np.generic):
        out.parts.append(b"g")
        _write_array(np.asarray(value), out)
    elif isinstance(value, np.ndarray):
        _write_array(np.asarray(value), out)
    elif isinstance(value, str):
        _write_text(str(value), out)
    elif isinstance(value, int):
        _write_whole(int(value), out)
    elif isinstance(value, float):
        _write_float(float(value), out)
    elif isinstance(value, bytearray | memoryview | bytes):
        _write_bytes(value, out)
    elif isinstance(value, Mapping):
        _write_map(value, out)
    elif isinstance(value, tuple):
        _write_items(b"t", value, out)
    elif isinstance(value, Sequence):
        _write_list(list(value), out)
    elif isinstance(value, AbstractSet):
        _write_items(b"S", value, out)
    elif isinstance(value, os.PathLike):
        _write(os.fspath(value), out)
    else:
        kind = "A function" if callable(value) else f"An object of {type(value).__qualname__}"
        raise InputError(
            f"{kind} cannot cross to a worker process ({value!r:.80}): leave it out, or make the"
            " pipeline without isolate=.",
            value=value,
        )


def _deeper(out: Encoded) -> None:
    out.depth += 1
    if out.depth > _DEEPEST:
        raise InputError(
            f"A value more than {_DEEPEST} levels deep cannot cross to a worker process."
        )


_WRITERS: Final[dict[type, Callable[[Any, Encoded], None]]] = {
    type(None): lambda value, out: out.parts.append(b"N"),
    bool: lambda value, out: out.parts.append(b"T" if value else b"F"),
    str: _write_text,
    int: _write_whole,
    float: _write_float,
    bytes: _write_bytes,
    list: _write_list,
    tuple: lambda value, out: _write_items(b"t", value, out),
    dict: _write_map,
    np.ndarray: _write_array,
}


class _Reader:
    """A message that is being read."""

    __slots__ = ("beside", "depth", "pos", "raw", "records")

    def __init__(self, raw: bytes, beside: memoryview | None, records: Records) -> None:
        self.raw = raw
        self.beside = beside
        self.records = records
        self.pos = 0
        self.depth = 0

    def take(self, count: int) -> bytes:
        start, self.pos = self.pos, self.pos + count
        if self.pos > len(self.raw):
            raise BrokenMessageError("it ends too early")
        return self.raw[start : self.pos]

    def size(self) -> int:
        found: int = _SIZE.unpack(self.take(4))[0]
        if found > len(self.raw) - self.pos:
            raise BrokenMessageError("it says more than it has")
        return found

    def value(self) -> Any:
        self.depth += 1
        if self.depth > 2 * _DEEPEST:
            raise BrokenMessageError("it is too deep")
        reader = _READERS.get(self.take(1))
        if reader is None:
            raise BrokenMessageError("it has an unknown tag")
        found = reader(self)
        self.depth -= 1
        return found

    def text(self) -> str:
        return self.take(self.size()).decode("utf-8", "surrogatepass")

    def packed(self, kind: str) -> list[Any]:
        numbers = array(kind)
        numbers.frombytes(self.take(self.size_of(8)))
        return numbers.tolist()

    def size_of(self, each: int) -> int:
        return self.size() * each

    def map(self) -> dict[Any, Any]:
        found = {}
        for _ in range(self.size()):
            key = self.value()
            found[key] = self.value()
        return found

    def shape(self) -> tuple[np.dtype[Any], tuple[int, ...], int]:
        kind = self.take(self.take(1)[0]).decode("ascii")
        if not _TYPE.fullmatch(kind):
            raise BrokenMessageError("it has an array of no plain type")
        dtype = np.dtype(kind)
        count = self.take(1)[0]
        shape = struct.unpack(f"<{count}Q", self.take(8 * count))
        return dtype, shape, math.prod(shape) * dtype.itemsize

    def array(self) -> NDArray[Any]:
        dtype, shape, size = self.shape()
        if not size:
            return np.empty(shape, dtype)
        raw = bytearray(self.take(size))  # the caller may write to it
        return np.frombuffer(raw, dtype, count=math.prod(shape)).reshape(shape)

    def array_beside(self) -> NDArray[Any]:
        dtype, shape, size = self.shape()
        offset: int = _LONG.unpack(self.take(8))[0]
        if self.beside is None or offset < 0 or offset + size > len(self.beside):
            raise BrokenMessageError("it has an array outside the shared memory")
        return np.frombuffer(self.beside[offset : offset + size], dtype).reshape(shape)

    def record(self) -> Any:
        if self.take(1) != b"s":
            raise BrokenMessageError("it has a record with no name")
        name = self.text()
        if self.take(1) != b"d":
            raise BrokenMessageError("it has a record with no fields")
        return self.records.build(name, self.map())


_READERS: Final[dict[bytes, Callable[[_Reader], Any]]] = {
    b"N": lambda one: None,
    b"T": lambda one: True,
    b"F": lambda one: False,
    b"i": lambda one: _LONG.unpack(one.take(8))[0],
    b"I": lambda one: int.from_bytes(one.take(one.size()), "little", signed=True),
    b"f": lambda one: _FLOAT.unpack(one.take(8))[0],
    b"s": _Reader.text,
    b"b": lambda one: one.take(one.size()),
    b"l": lambda one: [one.value() for _ in range(one.size())],
    b"t": lambda one: tuple([one.value() for _ in range(one.size())]),
    b"S": lambda one: {one.value() for _ in range(one.size())},
    b"v": lambda one: one.packed("d"),
    b"w": lambda one: one.packed("q"),
    b"d": _Reader.map,
    b"a": _Reader.array,
    b"A": _Reader.array_beside,
    b"g": lambda one: one.value()[()],
    b"r": _Reader.record,
}


def decode(raw: bytes, beside: memoryview | None, records: Records) -> Any:
    """The value that a message says.

    Args:
        raw: The message.
        beside: What lies beside it; arrays are views of it.
        records: The closed list of records.

    Raises:
        BrokenMessageError: It is no message of ours.
    """
    reader = _Reader(raw, beside, records)
    try:
        found = reader.value()
    except (ValueError, TypeError, LookupError, struct.error, OverflowError) as error:
        raise BrokenMessageError(str(error)) from None
    if reader.pos != len(raw):
        raise BrokenMessageError("more follows it")
    return found
