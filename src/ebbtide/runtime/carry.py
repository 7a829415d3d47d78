"""What a graph carries from one run to the next: outputs of one run that are inputs of the next.

A decoder's cache is the whole of its past, so it never goes through numpy on its way. `Passed`
holds what one run gave and hands it to the next. `InPlace` is for graphs whose attention writes to
the very buffer that it reads (GroupQueryAttention): one buffer for each input, bound as the output
too, which grows in steps. At 4,000 tokens that is 5.6 times as fast as passing on a copy.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ebbtide.cancellation import CancelToken
from ebbtide.errors import UnsupportedModelError
from ebbtide.runtime.session import value_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ebbtide.runtime.graph import Runs
    from ebbtide.runtime.session import Bound

POSITIONS: Final = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length",
)  # fmt: skip
"""What configs call the tokens that a model can take."""

_GROWTH: Final = 256
"""Places by which a buffer grows; and by an eighth of what it has, where that is more."""


@dataclasses.dataclass(frozen=True, slots=True)
class Carried:
    """One thing that is carried.

    Attributes:
        input: What takes it.
        output: What gives it.
        dtype: The numpy name of its element type.
        shape: Its dimensions; those of the rows and of the places count for one row and one place.
        axis: Which of them grows with the tokens; None for a state that has one size for ever.
        once: Whether the first run alone gives it, and all others take that.
    """

    input: str
    output: str
    dtype: str
    shape: tuple[int, ...]
    axis: int | None
    once: bool = False

    def zeros(self, rows: int, places: int = 0) -> NDArray[Any]:
        """What it is before the first run: no past, or a state of zeros."""
        shape = [self.shape[0] * rows, *self.shape[1:]]
        if self.axis is not None:
            shape[self.axis] = places
        return np.zeros(shape, self.dtype)

    def first(self, places: int) -> tuple[slice, ...]:
        """The part of it that has so many places."""
        assert self.axis is not None
        return (slice(None),) * self.axis + (slice(places),)


class Carry(abc.ABC):
    """A graph in the middle of a sequence of runs. Used on one native thread at a time.

    Args:
        graph: The graph, in a sequence of runs.
        carried: What it carries.
        rows: How many rows it begins with.
    """

    def __init__(self, graph: Runs, carried: Sequence[Carried], rows: int) -> None:
        self._graph = graph
        self._carried = tuple(carried)
        self._rows = rows

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Bytes that are held."""

    @abc.abstractmethod
    def run(
        self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str], token: CancelToken
    ) -> list[NDArray[Any]]:
        """Run the graph once; see `Session.run`. What is carried is neither in nor out.

        Arrays that come out are read-only, and lie in the runtime's memory.
        """

    @abc.abstractmethod
    def select(self, rows: NDArray[np.int64]) -> None:
        """Go on with these rows, in this order."""

    @abc.abstractmethod
    def crop(self, places: int) -> None:
        """Forget what was carried after so many places.

        Raises:
            UnsupportedModelError: There is a state that has no places.
        """

    def pause(self) -> None:  # noqa: B027 - most hold nothing of the graph
        """Let the graph go, and keep what is carried."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give it back."""


class Passed(Carry):
    """Values that one run gives and the next takes, as the runtime made them."""

    def __init__(self, graph: Runs, carried: Sequence[Carried], rows: int) -> None:
        super().__init__(graph, carried, rows)
        self._begun = False
        self._arrays: dict[str, NDArray[Any]] = {}  # what lies below values made of arrays
        self._values: dict[str, Any] = {}
        for one in carried:
            self._put(one.input, one.zeros(rows))

    @property
    def size(self) -> int:
        """Bytes that are held."""
        return sum(one.tensor_size_in_bytes() for one in self._values.values())

    def run(
        self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str], token: CancelToken
    ) -> list[NDArray[Any]]:
        """Run the graph once, and take what it carries from it."""
        moving = [one for one in self._carried if not (one.once and self._begun)]
        names = [*outputs, *(one.output for one in moving)]
        found = self._graph.run_values(feeds, self._values, names, token)
        self._values.update(
            (one.input, value) for one, value in zip(moving, found[len(outputs) :], strict=True)
        )
        for one in moving:
            self._arrays.pop(one.input, None)
        self._begun = True
        return [np.from_dlpack(one) for one in found[: len(outputs)]]

    def select(self, rows: NDArray[np.int64]) -> None:
        """Go on with these rows, in this order."""
        for name, value in tuple(self._values.items()):
            array = np.from_dlpack(value)
            each = array.shape[0] // self._rows  # some have a row a head
            self._put(name, array[(rows[:, None] * each + np.arange(each)).reshape(-1)])
        self._rows = len(rows)

    def crop(self, places: int) -> None:
        """Forget what was carried after so many places."""
        moving = [one for one in self._carried if not one.once]
        for one in moving:
            if one.axis is None:
                raise _no_places(one.input, str(self._graph.path))
        for one in moving:
            array = np.from_dlpack(self._values[one.input])
            if array.shape[one.axis] > places:  # type: ignore[index]
                self._put(one.input, np.ascontiguousarray(array[one.first(places)]))

    def close(self) -> None:
        """Give it back."""
        self._values.clear()
        self._arrays.clear()

    def _put(self, name: str, array: NDArray[Any]) -> None:
        self._values[name] = value_of(array)
        self._arrays[name] = array


class InPlace(Carry):
    """Buffers that the graph reads as its past and writes its present to.

    Who runs it says how many places it will have filled, so that there is room.
    """

    def __init__(self, graph: Runs, carried: Sequence[Carried], rows: int) -> None:
        super().__init__(graph, carried, rows)
        self._arrays: dict[str, NDArray[Any]] = {}
        self._bound: Bound | None = None
        self._shown: tuple[int, ...] = ()
        self._given: list[tuple[tuple[int, ...], np.dtype[Any]]] = []
        self._filled = 0
        self._room = 0

    @property
    def size(self) -> int:
        """Bytes that are held."""
        return sum(one.nbytes for one in self._arrays.values())

    def reserve(self, places: int) -> None:
        """Have room for so many places."""
        if places <= self._room:
            return
        room = max(places, self._room + max(_GROWTH, self._room // 8))
        room += -room % _GROWTH
        self._rebuild(np.arange(self._rows), room)

    def pause(self) -> None:
        """Let the graph go, and keep what is carried."""
        if self._bound is not None:
            self._bound.close()
            self._bound = None

    def _rebuild(self, rows: NDArray[np.int64], room: int) -> None:
        self.pause()
        for one in self._carried:
            new = one.zeros(len(rows), room)
            old = self._arrays.get(one.input)
            if old is not None and self._filled:
                kept = one.first(self._filled)
                new[kept] = old[kept][rows]
            self._arrays[one.input] = new
        self._room, self._rows = room, len(rows)

    def join(self, rows: Sequence[Carry]) -> None:
        """Go on with what these carry, each a row, and give them up."""
        self.pause()
        parts = [one for one in rows if isinstance(one, InPlace)]
        self._room = max(one._room for one in parts)
        self._filled = max(one._filled for one in parts)
        for one in self._carried:
            whole = one.zeros(len(parts), self._room)
            for row, part in enumerate(parts):
                array = part._arrays.pop(one.input)
                whole[row : row + 1][one.first(part._filled)] = array[one.first(part._filled)]
            self._arrays[one.input] = whole
        self._rows = len(parts)

    def run(
        self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str], token: CancelToken
    ) -> list[NDArray[Any]]:
        """Run the graph once; what it carries is where it was."""
        places = feeds["attention_mask"].shape[1]
        self.reserve(places)
        if self._bound is None:
            shared = {one.input: (one.output, self._arrays[one.input]) for one in self._carried}
            self._bound = self._graph.bind(shared, outputs)
        shape, into = feeds["input_ids"].shape, None
        if self._shown == shape and shape[1] == 1:  # of several tokens all logits, or the last
            into = [np.empty(*one) for one in self._given]
        found = self._bound.run(feeds, into, token)
        if into is None:
            self._shown, self._given = shape, [(one.shape, one.dtype) for one in found]
        self._filled = places
        return found

    def select(self, rows: NDArray[np.int64]) -> None:
        """Go on with these rows, in this order."""
        self._rebuild(rows, self._room)

    def crop(self, places: int) -> None:
        """Forget what was carried after so many places: what lies there is written over."""
        self._filled = min(self._filled, places)

    def close(self) -> None:
        """Give it back."""
        self.pause()
        self._arrays.clear()


def size_in(config: Mapping[str, Any], *names: str) -> int | None:
    """The first positive whole number of these names in a model's config, or in its text_config."""
    text = config.get("text_config")
    for source in (config, text if isinstance(text, Mapping) else {}):
        for name in names:
            value = source.get(name)
            if type(value) is int and value > 0:
                return value
    return None


def _no_places(name: str, model: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The model keeps a state ({name}) that cannot be taken back by tokens: generate without"
        " speculation and without a shared beginning.",
        model=model,
    )
