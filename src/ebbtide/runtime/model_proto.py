"""ONNX files read and written as the protobuf that they are, with no parser beside this.

A message is a list of its fields, each a view of the file's bytes until it is asked for: weights
are never copied. What is not known of a tensor, an attribute or an operation is written as it was.
The fields' numbers are those of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

View = bytes | memoryview
Field = tuple[int, int, Any]
"""A field's number, its wire type, and what it holds: a number (0) or bytes (1, 2, 5)."""

FLOAT: Final = 1
INT32: Final = 6
INT64: Final = 7
FLOAT16: Final = 10
_NUMPY: Final = {FLOAT: "<f4", INT32: "<i4", INT64: "<i8", FLOAT16: "<f2"}
_TYPES: Final = {"float32": FLOAT, "int32": INT32, "int64": INT64, "float16": FLOAT16}
_FIXED: Final = {1: 8, 5: 4}


class MalformedError(ValueError):
    """These bytes are no model that can be read here; says why."""


def fields(data: View) -> Iterator[Field]:
    """The fields of a message.

    Raises:
        MalformedError: These bytes are no message.
    """
    view = memoryview(data)
    at, end = 0, len(view)
    try:
        while at < end:
            key, at = _varint(view, at)
            wire = key & 7
            if wire == 0:
                value, at = _varint(view, at)
                yield key >> 3, 0, value
                continue
            if wire == 2:
                size, at = _varint(view, at)
            else:
                size = _FIXED[wire]
            if at + size > end:
                raise IndexError
            yield key >> 3, wire, view[at : at + size]
            at += size
    except (IndexError, KeyError):
        raise MalformedError("it is no ONNX file, or it is damaged") from None


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = view[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7
        if shift > 63:
            raise IndexError


def _pack(number: int) -> bytes:
    number &= (1 << 64) - 1
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


def message(given: Iterable[Field]) -> bytes:
    """The bytes of a message of these fields."""
    parts: list[View] = []
    for number, wire, value in given:
        parts.append(_pack(number << 3 | wire))
        if wire == 0:
            parts.append(_pack(value))
            continue
        if wire == 2:
            parts.append(_pack(len(value)))
        parts.append(value)
    return b"".join(parts)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def _numbers(wire: int, value: Any) -> list[int]:
    """A repeated number, packed or not."""
    if wire == 0:
        return [_signed(value)]
    found, at = [], 0
    while at < len(value):
        number, at = _varint(value, at)
        found.append(_signed(number))
    return found


@dataclasses.dataclass(slots=True)
class Tensor:
    """A constant.

    Attributes:
        name: Its name; empty inside an attribute.
        dims: Its dimensions.
        type: Its element type's number.
        fields: All that it is, as it was read.
        raw: Its bytes in the file, where they lie there as one piece.
    """

    name: str
    dims: tuple[int, ...]
    type: int
    fields: list[Field]
    raw: View | None

    @classmethod
    def read(cls, data: View) -> Tensor:
        """A tensor from its message."""
        name, dims, kind, raw, own = "", [], 0, None, list(fields(data))
        for number, wire, value in own:
            if number == 1:
                dims += _numbers(wire, value)
            elif number == 2:
                kind = value
            elif number == 8:
                name = bytes(value).decode()
            elif number == 9:
                raw = value
        return cls(name, tuple(dims), kind, own, raw)

    @classmethod
    def of(cls, name: str, array: NDArray[Any]) -> Tensor:
        """A tensor from an array."""
        raw = np.ascontiguousarray(array).tobytes()
        own: list[Field] = [(1, 0, one) for one in array.shape]
        own += [(2, 0, _TYPES[array.dtype.name]), (8, 2, name.encode()), (9, 2, raw)]
        return cls(name, array.shape, _TYPES[array.dtype.name], own, raw)

    def outside(self, location: str, offset: int) -> Tensor:
        """The same, whose bytes lie in a file."""
        assert self.raw is not None
        places = (("location", location), ("offset", str(offset)), ("length", str(len(self.raw))))
        own = [one for one in self.fields if one[0] != 9]
        for key, value in places:
            own.append((13, 2, message([(1, 2, key.encode()), (2, 2, value.encode())])))
        own.append((14, 0, 1))
        return Tensor(self.name, self.dims, self.type, own, None)

    def array(self) -> NDArray[Any] | None:
        """Its values; None where they are in another file, or of a type not known here."""
        if self.type not in _NUMPY or any(
            number == 14 and value for number, _, value in self.fields
        ):
            return None
        dtype = np.dtype(_NUMPY[self.type])
        if self.raw is not None:
            return np.frombuffer(self.raw, dtype).reshape(self.dims)
        found: list[Any] = []
        for number, wire, value in self.fields:
            if number == 4:
                found += struct.unpack(f"<{len(value) // 4}f", value)
            elif number in (5, 7):
                found += _numbers(wire, value)
        if self.type == FLOAT16:
            return np.array(found, np.uint16).view(np.float16).reshape(self.dims)
        return np.array(found, dtype).reshape(self.dims)


@dataclasses.dataclass(slots=True, eq=False)
class Node:
    """One operation.

    Attributes:
        op: Which one.
        inputs: The names of what it takes; an empty one is an input that is left out.
        outputs: The names of what it gives.
        domain: Where the operation is defined; empty for ONNX itself.
        attributes: The messages of its attributes, by their names.
    """

    op: str
    inputs: list[str]
    outputs: list[str]
    domain: str = ""
    attributes: dict[str, View] = dataclasses.field(default_factory=dict)
    rest: list[Field] = dataclasses.field(default_factory=list)

    @classmethod
    def read(cls, data: View) -> Node:
        """A node from its message."""
        node = cls("", [], [])
        for number, wire, value in fields(data):
            if number == 5:
                name = next(bytes(one) for at, _, one in fields(value) if at == 1)
                node.attributes[name.decode()] = value
            elif number in (1, 2, 4, 7):
                text = bytes(value).decode()
                if number == 1:
                    node.inputs.append(text)
                elif number == 2:
                    node.outputs.append(text)
                elif number == 4:
                    node.op = text
                else:
                    node.domain = text
            else:
                node.rest.append((number, wire, value))
        return node

    def write(self) -> bytes:
        """Its message."""
        own: list[Field] = [(1, 2, one.encode()) for one in self.inputs]
        own += [(2, 2, one.encode()) for one in self.outputs]
        own += [(4, 2, self.op.encode()), (7, 2, self.domain.encode())]
        own += [(5, 2, one) for one in self.attributes.values()]
        return message(own + self.rest)

    def attribute(self, name: str) -> Any:
        """An attribute's value: a number, numbers, a tensor or bytes; None where it has none."""
        found: list[int] = []
        many = False
        for number, wire, value in fields(self.attributes.get(name, b"")):
            if number == 2:
                return float(struct.unpack("<f", value)[0])
            if number == 3:
                return _signed(value)
            if number == 4:
                return bytes(value)
            if number == 5:
                return Tensor.read(value)
            if number == 8:
                found, many = found + _numbers(wire, value), True
        return found if many else None

    @property
    def has_graphs(self) -> bool:
        """Whether it holds graphs of its own, as a condition does."""
        return any(
            number in (6, 11) for one in self.attributes.values() for number, _, _ in fields(one)
        )


def attribute(name: str, value: float | Sequence[int]) -> bytes:
    """The message of an attribute: a whole number, several, or a float."""
    own: list[Field] = [(1, 2, name.encode())]
    if isinstance(value, int):
        return message([*own, (3, 0, value), (20, 0, 2)])
    if isinstance(value, float):
        return message([*own, (2, 5, struct.pack("<f", value)), (20, 0, 1)])
    return message([*own, *((8, 0, one) for one in value), (20, 0, 7)])


@dataclasses.dataclass(slots=True)
class Info:
    """An input or output of a graph.

    Attributes:
        name: Its name.
        type: Its element type's number.
        shape: Its dimensions; None for each that has no number.
        data: Its message.
    """

    name: str
    type: int
    shape: tuple[int | None, ...]
    data: View

    @classmethod
    def read(cls, data: View) -> Info:
        """One from its message."""
        name, kind, shape = "", 0, []
        for number, _, value in fields(data):
            if number == 1:
                name = bytes(value).decode()
            for _, _, tensor in fields(value) if number == 2 else ():
                for at, _, inner in fields(tensor):
                    if at == 1:
                        kind = inner
                    for _, _, dim in fields(inner) if at == 2 else ():
                        sizes = [one for place, _, one in fields(dim) if place == 1]
                        shape.append(sizes[0] if sizes else None)
        return cls(name, kind, tuple(shape), data)

    @classmethod
    def of(cls, name: str, kind: int) -> Info:
        """One of any shape."""
        own = message([(2, 2, message([(1, 2, message([(1, 0, kind)]))]))])
        return cls(name, kind, (), message([(1, 2, name.encode())]) + own)


@dataclasses.dataclass(slots=True)
class Model:
    """A graph and what it needs.

    Attributes:
        nodes: Its operations.
        tensors: Its constants, by their names.
        inputs: What it takes.
        outputs: What it gives.
        opsets: The version of each domain's operations.
        ir: The version of the format.
    """

    nodes: list[Node]
    tensors: dict[str, Tensor]
    inputs: list[Info]
    outputs: list[Info]
    opsets: dict[str, int]
    ir: int = 8

    @classmethod
    def read(cls, data: View) -> Model:
        """A model from its file.

        Raises:
            MalformedError: These bytes are no model, or hold what is not known here.
        """
        model = cls([], {}, [], [], {}, 0)
        for number, _, value in fields(data):
            if number == 1:
                model.ir = value
            elif number == 7:
                model._read_graph(value)
            elif number == 8:
                inner = {at: one for at, _, one in fields(value)}
                model.opsets[bytes(inner.get(1, b"")).decode()] = inner.get(2, 1)
            elif number == 25:
                raise MalformedError("it has functions of its own")
        return model

    def _read_graph(self, data: View) -> None:
        for number, _, value in fields(data):
            if number == 1:
                self.nodes.append(Node.read(value))
            elif number == 5:
                tensor = Tensor.read(value)
                self.tensors[tensor.name] = tensor
            elif number == 11:
                self.inputs.append(Info.read(value))
            elif number == 12:
                self.outputs.append(Info.read(value))
            elif number == 15:
                raise MalformedError("it has sparse constants")

    def write(self) -> bytes:
        """Its file."""
        graph: list[Field] = [(1, 2, one.write()) for one in self.nodes]
        graph.append((2, 2, b"main"))
        graph += [(5, 2, message(one.fields)) for one in self.tensors.values()]
        graph += [(11, 2, one.data) for one in self.inputs]
        graph += [(12, 2, one.data) for one in self.outputs]
        own: list[Field] = [(1, 0, self.ir), (7, 2, message(graph))]
        for domain, version in self.opsets.items():
            own.append((8, 2, message([(1, 2, domain.encode()), (2, 0, version)])))
        return message(own)

    def part(
        self, nodes: Sequence[Node], inputs: Sequence[Info], outputs: Mapping[str, int]
    ) -> Model:
        """A model of those of some nodes that are needed.

        Args:
            nodes: What may be in it.
            inputs: What it takes.
            outputs: What it gives: names and the numbers of their types.
        """
        given = {one.name for one in inputs}
        made = {name: node for node in nodes for name in node.outputs if name not in given}
        needed: set[str] = set()
        left = list(outputs)
        while left:
            name = left.pop()
            if name not in needed:
                needed.add(name)
                left += made[name].inputs if name in made else ()
        own = [
            one for one in nodes if any(made.get(name) is one for name in needed & {*one.outputs})
        ]
        tensors = {name: one for name, one in self.tensors.items() if name in needed - given}
        infos = [Info.of(name, kind) for name, kind in outputs.items()]
        return Model(own, tensors, list(inputs), infos, self.opsets, self.ir)
