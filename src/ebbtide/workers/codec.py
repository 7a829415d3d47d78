"""Plain data as bytes and back: what crosses between processes, and nothing that could run.

It is MessagePack, which has numbers, texts, bytes, lists and maps, and what we add to it: tuples,
sets, whole numbers of any size, numpy arrays of plain types, and records of a closed list
(`ebbtide.workers.records`). Large arrays lie beside the message, in shared memory. Whatever bytes
come in, reading them gives such a value or raises `BrokenMessageError`.
"""

from __future__ import annotations

import functools
import math
import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Final, Protocol

import msgpack
import numpy as np
from numpy.typing import NDArray

from ebbtide.errors import InputError

BESIDE: Final = 32_768
"""Bytes from which an array lies beside the message."""

_ALIGNED: Final = 64
_AT_FIRST: Final = 4_096
"""Bytes that are taken to write a message; more where it is longer."""

_TYPE: Final = re.compile(
    r"[<>|][biufcSUmM][0-9]{1,9}(\[[0-9]{0,9}[a-z]{1,2}\])?", re.ASCII | re.IGNORECASE
)
"""An array's type, as numpy writes it: plain numbers, texts, bytes and times."""

_OFFSET: Final = struct.Struct("<Q")

_TUPLE: Final = 1
_SET: Final = 2
_WHOLE: Final = 3
_ARRAY: Final = 4
_BESIDE: Final = 5
_SCALAR: Final = 6
_RECORD: Final = 7


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
        text: The bytes.
        beside: Arrays with their offsets.
        size: Bytes of what lies beside.
    """

    __slots__ = ("_records", "beside", "size", "text")

    def __init__(self, value: object, records: Records) -> None:
        self.beside: list[tuple[int, NDArray[Any]]] = []
        self.size = 0
        self._records = records
        try:
            self.text = self._packed(value)
        except (ValueError, RecursionError) as error:
            raise InputError(
                "A value too many levels deep, or too large, cannot cross to a worker process"
                f" ({error})."
            ) from None

    def _packed(self, value: object) -> bytes:
        packed: bytes = msgpack.packb(
            value,
            default=self._other,
            strict_types=True,
            unicode_errors="surrogatepass",
            buf_size=_AT_FIRST,
        )
        return packed

    def _other(self, value: Any) -> Any:
        """What says a value that MessagePack has no word for."""
        if isinstance(value, np.ndarray):
            return self._array(value)
        if isinstance(value, tuple):
            return msgpack.ExtType(_TUPLE, self._packed(list(value)))
        if isinstance(value, np.generic):
            return msgpack.ExtType(_SCALAR, self._array(np.asarray(value)).data)
        found = self._records.fields(value)
        if found is not None:
            return msgpack.ExtType(_RECORD, self._packed(list(found)))
        if isinstance(value, int):
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return msgpack.ExtType(_WHOLE, raw) if type(value) is int else int(value)
        for kind, plain in _LIKE:
            if isinstance(value, kind):
                return plain(value)
        if isinstance(value, AbstractSet):
            return msgpack.ExtType(_SET, self._packed(list(value)))
        what = "A function" if callable(value) else f"An object of {type(value).__qualname__}"
        raise InputError(
            f"{what} cannot cross to a worker process ({value!r:.80}): leave it out, or make the"
            " pipeline without isolate=.",
            value=value,
        )

    def _array(self, value: NDArray[Any]) -> msgpack.ExtType:
        head = _name_of(value.dtype) + struct.pack(f"<B{value.ndim}Q", value.ndim, *value.shape)
        if value.nbytes < BESIDE:
            return msgpack.ExtType(_ARRAY, head + value.tobytes())
        offset = self.size
        self.beside.append((offset, np.ascontiguousarray(value)))
        self.size = -(-(offset + value.nbytes) // _ALIGNED) * _ALIGNED
        return msgpack.ExtType(_BESIDE, head + _OFFSET.pack(offset))


@functools.lru_cache
def _name_of(dtype: np.dtype[Any]) -> bytes:
    """What an array's type is called in a message, after the length of that."""
    if not _TYPE.fullmatch(dtype.str) or not dtype.itemsize:
        raise InputError(
            f"An array of {dtype} cannot cross to a worker process: pass plain numbers, or a list."
        )
    name = dtype.str.encode()
    return bytes((len(name),)) + name


_LIKE: Final[tuple[tuple[Any, Callable[[Any], Any]], ...]] = (
    (str, str.__str__),
    (float, float),
    (bytes, bytes),
    (Mapping, dict),
    (Sequence, list),
    (os.PathLike, os.fspath),
)
"""What comes as the plain value that it is like."""


def encode(value: object, records: Records) -> Encoded:
    """The message that says a value.

    Raises:
        InputError: Something in it cannot cross; says what.
    """
    return Encoded(value, records)


class _Reader:
    """A message that is being read."""

    __slots__ = ("_beside", "_records")

    def __init__(self, beside: memoryview | None, records: Records) -> None:
        self._beside = beside
        self._records = records

    def value(self, raw: bytes) -> Any:
        return msgpack.unpackb(
            raw,
            ext_hook=self._added,
            strict_map_key=False,
            unicode_errors="surrogatepass",
        )

    def _added(self, code: int, data: bytes) -> Any:
        """A value of a kind that we have added."""
        if code == _TUPLE:
            return tuple(self._items(data))
        if code == _ARRAY:
            return self._array(data)
        if code == _BESIDE:
            return self._array_beside(data)
        if code == _SCALAR:
            return self._array(data)[()]
        if code == _RECORD:
            name, fields = self._items(data)
            if type(name) is not str or type(fields) is not dict:
                raise BrokenMessageError("it has a record with no name, or with no fields")
            return self._records.build(name, fields)
        if code == _WHOLE:
            return int.from_bytes(data, "little", signed=True)
        if code == _SET:
            return set(self._items(data))
        raise BrokenMessageError(f"it has an unknown kind, {code}")

    def _items(self, data: bytes) -> list[Any]:
        found = self.value(data)
        if type(found) is not list:
            raise BrokenMessageError("it has no items where there should be some")
        return found

    def _array(self, data: bytes) -> NDArray[Any]:
        dtype, shape, start = _form(data)
        if not math.prod(shape):
            return np.empty(shape, dtype)
        return np.frombuffer(bytearray(data[start:]), dtype).reshape(shape)  # it may be written to

    def _array_beside(self, data: bytes) -> NDArray[Any]:
        dtype, shape, start = _form(data)
        (offset,) = _OFFSET.unpack(data[start:])
        end = offset + math.prod(shape) * dtype.itemsize
        if self._beside is None or end > len(self._beside):
            raise BrokenMessageError("it has an array outside the shared memory")
        return np.frombuffer(self._beside[offset:end], dtype).reshape(shape)


@functools.lru_cache
def _named(name: bytes) -> np.dtype[Any]:
    """The type that is called so."""
    if not _TYPE.fullmatch(text := name.decode("ascii")):
        raise BrokenMessageError("it has an array of no plain type")
    return np.dtype(text)


def _form(data: bytes) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """An array's type and shape, and where its values begin."""
    start = 1 + data[0]
    count = data[start]
    shape = struct.unpack_from(f"<{count}Q", data, start + 1)
    return _named(data[1:start]), shape, start + 1 + 8 * count


def decode(raw: bytes, beside: memoryview | None, records: Records) -> Any:
    """The value that a message says.

    Args:
        raw: The message.
        beside: What lies beside it; arrays are views of it.
        records: The closed list of records.

    Raises:
        BrokenMessageError: It is no message of ours.
    """
    try:
        return _Reader(beside, records).value(raw)
    except (
        ValueError, TypeError, LookupError, OverflowError, RecursionError, struct.error
    ) as error:  # fmt: skip
        raise BrokenMessageError(str(error)) from None
