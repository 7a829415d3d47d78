"""What one layer's attention computes, learnt by running it.

Its operations are not read: every exporter has its own. They are cut out and run on numbers that
tell: what a rotation does to unit vectors, what a score is for a known query and key, how far back
a query of zeros looks. The GroupQueryAttention that this suggests then has to give the same on
random numbers: with a past, with padding, and at the model's full length.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from ebbtide.runtime.library import onnxruntime
from ebbtide.runtime.model_proto import (
    FLOAT,
    FLOAT16,
    INT32,
    Info,
    Model,
    Node,
    Tensor,
    attribute,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

PAST: Final = re.compile(r"past_key_values\.(\d+)\.(key|value)")
DTYPES: Final[Mapping[int, str]] = {FLOAT: "float32", FLOAT16: "float16"}
FOLDER: Final = "session.model_external_initializers_file_folder_path"
_LARGEST_PROBE: Final = 1 << 30


class NotFusedError(Exception):
    """This graph is not one whose attention can be fused; says why."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """A tensor that a block takes.

    Attributes:
        name: Its name.
        layout: Its dimensions: [rows, tokens, heads * size], [rows, tokens, heads, size] or
            [rows, heads, tokens, size].
    """

    name: str
    layout: Literal["flat", "tokens", "heads"]


@dataclasses.dataclass
class Block:
    """One layer's attention: from the projections to what the output projection takes."""

    layer: int
    nodes: list[Node]
    taken: tuple[Cut, Cut, Cut]
    """The query, key and value before any rotation."""
    output: str
    shaped: list[str]
    """Tensors outside of which only the shape is asked: [rows, tokens, something]."""
    inputs: list[Info]
    """Inputs of the graph that it takes."""
    heads: int
    kv_heads: int
    size: int
    kind: int

    @property
    def past(self) -> tuple[str, str]:
        """The inputs of the graph that hold the layer's keys and values."""
        return f"past_key_values.{self.layer}.key", f"past_key_values.{self.layer}.value"

    @property
    def present(self) -> tuple[str, str]:
        """The outputs of the graph that hold them afterwards."""
        return f"present.{self.layer}.key", f"present.{self.layer}.value"


@dataclasses.dataclass
class Attention:
    """What one GroupQueryAttention is told."""

    scale: float
    interleaved: bool
    cos: Array | None
    sin: Array | None
    window: int = -1


class Probe:
    """One layer's attention, run to learn what it computes."""

    def __init__(self, model: Model, block: Block, folder: Path, positions: int) -> None:
        self._model = model
        self._block = block
        self._folder = folder
        self._positions = positions
        self._dtype = np.dtype(DTYPES[block.kind])
        self._random = np.random.default_rng(0)
        self._fed = [one.name for one in block.inputs]
        self._whole = self._session([block.output, *block.present])
        self._key = self._session([block.present[0]])
        row = 2 * 4 * block.kv_heads * block.size
        if positions * row > _LARGEST_PROBE:
            raise NotFusedError("its full length takes too much memory to be tried")

    def _session(self, outputs: Sequence[str]) -> Any:
        block = self._block
        given = [Info.of(one, block.kind) for one in block.past]
        given += [Info.of(one.name, block.kind) for one in block.taken]
        given += [Info.of(one, block.kind) for one in block.shaped]
        given += [Info.of(one.name, one.type) for one in block.inputs]
        part = self._model.part(block.nodes, given, dict.fromkeys(outputs, block.kind))
        return _open(part, self._folder)

    def _run(
        self,
        session: Any,
        taken: Sequence[Array],
        past: Sequence[Array],
        mask: NDArray[np.int64] | None = None,
        places: NDArray[np.int64] | None = None,
    ) -> list[Array]:
        """Run the layer: on a query, key and value of [rows, tokens, heads, size] each."""
        block = self._block
        rows, tokens = taken[0].shape[:2]
        before = past[0].shape[2]
        if mask is None:
            mask = np.ones((rows, before + tokens), np.int64)
        if places is None:
            places = np.arange(before, before + tokens)[None].repeat(rows, 0)
        feeds: dict[str, Array] = {
            "attention_mask": mask,
            "position_ids": places,
            "input_ids": np.ones((rows, tokens), np.int64),
        }
        for name in block.shaped:
            feeds[name] = np.zeros((rows, tokens, 1), self._dtype)
        for cut, array in zip(block.taken, taken, strict=True):
            given = array.astype(self._dtype)
            if cut.layout == "flat":
                given = given.reshape(rows, tokens, -1)
            elif cut.layout == "heads":
                given = np.ascontiguousarray(given.transpose(0, 2, 1, 3))
            feeds[cut.name] = given
        for name, array in zip(block.past, past, strict=True):
            feeds[name] = array.astype(self._dtype)
        wanted = {one.name for one in session.get_inputs()}
        for name in wanted - set(feeds):
            if PAST.fullmatch(name):  # another layer's, of which only the shape is asked
                feeds[name] = np.zeros_like(feeds[block.past[0]])
        unknown = wanted - set(feeds)
        if unknown:
            raise NotFusedError(f"its attention takes {', '.join(sorted(unknown))}")
        return _run(session, {name: one for name, one in feeds.items() if name in wanted})

    def _past(self, rows: int, places: int) -> list[Array]:
        shape = (rows, self._block.kv_heads, places, self._block.size)
        return [self._random.standard_normal(shape) for _ in range(2)]

    def _taken(self, rows: int, tokens: int) -> list[Array]:
        heads = (self._block.heads, self._block.kv_heads, self._block.kv_heads)
        return [
            self._random.standard_normal((rows, tokens, one, self._block.size)) for one in heads
        ]

    def attention(self) -> Attention:
        """What it computes.

        Raises:
            NotFusedError: Nothing that GroupQueryAttention can.
        """
        partners = self._partners()
        count = len(partners)
        interleaved = bool(count) and partners[0] == 1
        step = 1 if interleaved else count // 2
        if count % 16:
            raise NotFusedError(
                f"{count} elements of each head are rotated, and GroupQueryAttention takes"
                " multiples of 16"
            )
        if any(
            partners.get(one) != one + step for one in range(0, count, 2 if interleaved else 1)
            if interleaved or one < step
        ):  # fmt: skip
            raise NotFusedError("its positions are not rotated as GroupQueryAttention does")
        cos, sin = self._rotation(count, interleaved) if count else (None, None)
        found = Attention(self._scale(), interleaved, cos, sin, self._window())
        self._compare(found)
        return found

    def _partners(self) -> dict[int, int]:
        """Which element of a head each is turned with; none of those that are left as they are."""
        size = self._block.size
        start = max(1, min(self._positions - size, 8))
        key = np.eye(size)[None, :, None].repeat(self._block.kv_heads, 2)
        taken = [self._taken(1, size)[0], key, key]
        turned = self._run(self._key, taken, self._past(1, start))[0][0, 0, start:]
        pairs = np.abs(turned * (1 - np.eye(size))) > 0
        if (pairs.sum(axis=1) > 1).any():
            raise NotFusedError("its keys are changed by more than a rotation")
        return {int(one): int(other) for one, other in zip(*np.nonzero(pairs), strict=True)}

    def _rotation(self, count: int, interleaved: bool) -> tuple[Array, Array]:
        """The cosines and sines of each position: [positions, elements / 2]."""
        block, size = self._block, self._block.size
        first = np.arange(0, count, 2) if interleaved else np.arange(count // 2)
        second = first + (1 if interleaved else count // 2)
        key = np.zeros((1, self._positions, block.kv_heads, size))
        key[..., first] = 1
        query = np.zeros((1, self._positions, block.heads, 1)).repeat(size, 3)
        turned = self._run(self._key, [query, key, key], self._past(1, 0))[0][0, 0]
        cos, sin = turned[:, first], turned[:, second]
        start = min(3, self._positions - 2)
        part = self._run(
            self._key, [one[:, : self._positions - start] for one in (query, key, key)],
            self._past(1, start)
        )[0][0, 0, start:]  # fmt: skip
        few = self._run(
            self._key, [one[:, :2] for one in (query, key, key)], self._past(1, start)
        )[0][0, 0, start:]  # fmt: skip
        same = np.array_equal(part, turned[start:]) and np.array_equal(
            few, turned[start : start + 2]
        )
        if not same:
            raise NotFusedError("its rotation depends on more than the position")
        return np.ascontiguousarray(cos), np.ascontiguousarray(sin)

    def _scale(self) -> float:
        """What a query's product with a key is multiplied by."""
        block, size = self._block, self._block.size
        usual = 1 / math.sqrt(size)
        scale, length = usual, 1 / usual
        for _ in range(3):
            ones = np.full((1, 1, 1, size), math.sqrt(length / size))
            key = ones.repeat(block.kv_heads, 2)
            past = np.zeros((1, block.kv_heads, 1, size))
            taken = [ones.repeat(block.heads, 2), key, np.ones_like(key)]
            share = float(self._run(self._whole, taken, [past, past])[0].mean())
            if not 0 < share < 1:
                raise NotFusedError("its scores are not products of a query and a key")
            scale = math.log(share / (1 - share)) / length
            if abs(scale) < 1e-6:
                raise NotFusedError("its scores are not products of a query and a key")
            length = 1 / abs(scale)
        for nice in (usual, 1.0, round(scale, 4)):
            if abs(scale / nice - 1) < (1e-5 if self._dtype.itemsize == 4 else 2e-3):
                return nice
        return scale

    def _window(self) -> int:
        """How many tokens the last one looks at, itself too; -1 for all.

        A query of zeros looks at all alike. So where each value is its place, the output is the
        mean of the places that are looked at.
        """
        block, last = self._block, self._positions - 1
        past = np.zeros((1, block.kv_heads, last, block.size))
        places = np.arange(last)[None, None, :, None] / last
        ones = np.ones((1, 1, block.kv_heads, block.size))
        query = np.zeros((1, 1, block.heads, block.size))
        mean = self._run(self._whole, [query, ones, ones], [past, past + places])[0].mean()
        first = round((2 * float(mean) - 1) * last)
        return -1 if first <= 0 else self._positions - first

    def _compare(self, found: Attention) -> None:
        """See that the operation gives what the layer gives."""
        block = self._block
        session = _open(_alone(block, found, self._model.opsets), self._folder)
        padded = np.ones((2, 7), np.int64)
        if "position_ids" in self._fed or found.cos is None:
            padded[1, :2] = 0  # several rows with a past take one token each
        long = self._positions - 1
        edge = min(found.window + 1, long - 2) if found.window > 0 else 9
        for rows, tokens, before, mask in (
            (2, 5, 0, None), (1, 3, edge, None), (1, 3, 9, None), (2, 1, 6, padded),
            (1, 1, long, None),
        ):  # fmt: skip
            taken, past = self._taken(rows, tokens), self._past(rows, before)
            taken[0] *= 1 if before == long else 5  # scores large enough for what bounds them
            if before == long:
                past[1][:, :, 0] = 100  # so that one that is not looked at is missed
            total = before + tokens
            if mask is None:
                mask = np.ones((rows, total), np.int64)
            counts = mask.sum(axis=1)
            places = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, before:]
            expected, *_ = self._run(self._whole, taken, past, mask, places)
            moved = [np.zeros_like(one) for one in past]
            for row, gone in enumerate(total - counts):
                for one, other in zip(moved, past, strict=True):
                    one[row, :, : before - gone] = other[row, :, gone:]
            flat = [one.reshape(rows, tokens, -1) for one in taken]
            feeds = dict(zip("qkvKV", [*flat, *moved], strict=True))
            feeds = {name: one.astype(self._dtype) for name, one in feeds.items()}
            feeds |= {"seen": (counts - 1).astype(np.int32), "total": np.array(total, np.int32)}
            given = _run(session, feeds)[0]
            limit = 1e-4 if self._dtype.itemsize == 4 else 1e-2
            if expected.shape != given.shape or not np.allclose(
                expected, given, rtol=limit, atol=limit
            ):
                raise NotFusedError(
                    f"GroupQueryAttention gives another result for {tokens} tokens after {before}"
                )


def operation(block: Block, found: Attention, inputs: list[str], outputs: list[str]) -> Node:
    """The GroupQueryAttention that does what a block does."""
    given: dict[str, float] = {
        "num_heads": block.heads,
        "kv_num_heads": block.kv_heads,
        "scale": float(found.scale),
        "do_rotary": int(found.cos is not None),
        "rotary_interleaved": int(found.interleaved),
        "local_window_size": found.window,
    }
    attributes: dict[str, bytes | memoryview] = {
        name: attribute(name, value) for name, value in given.items()
    }
    return Node("GroupQueryAttention", inputs, outputs, "com.microsoft", attributes)


def _alone(block: Block, found: Attention, opsets: Mapping[str, int]) -> Model:
    """A model of one operation."""
    names = ["q", "k", "v", "K", "V", "seen", "total"]
    kinds = [block.kind] * 5 + [INT32] * 2
    tensors = {}
    if found.cos is not None and found.sin is not None:
        tensors = {"cos": Tensor.of("cos", found.cos), "sin": Tensor.of("sin", found.sin)}
    node = operation(block, found, [*names, *tensors], ["o", "ok", "ov"])
    inputs = [Info.of(name, kind) for name, kind in zip(names, kinds, strict=True)]
    outputs = [Info.of(name, block.kind) for name in node.outputs]
    return Model([node], tensors, inputs, outputs, dict(opsets))


def _open(model: Model, folder: Path) -> Any:
    library = onnxruntime()
    options = library.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry(FOLDER, str(folder))
    try:
        return library.InferenceSession(
            model.write(), options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
    except Exception as error:
        raise NotFusedError(f"its attention cannot be run alone: {_line(error)}") from None


def _run(session: Any, feeds: Mapping[str, Array]) -> list[Array]:
    try:
        return list(session.run(None, dict(feeds)))
    except Exception as error:
        raise NotFusedError(f"its attention cannot be run alone: {_line(error)}") from None


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
