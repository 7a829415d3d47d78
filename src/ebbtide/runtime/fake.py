"""A `Session` without ONNX Runtime: for tests of what stands on one, ours and a user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ebbtide.cancellation import CancelToken
from ebbtide.lifecycle import Remains
from ebbtide.memory.ledger import Native
from ebbtide.runtime.devices import Device
from ebbtide.runtime.session import TensorInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray


class FakeSession(Native):
    """Runs a Python function in place of a graph, and counts.

    Args:
        inputs: What it takes.
        outputs: What it gives.
        function: Gets the feeds by name, returns the outputs by name.

    Attributes:
        runs: How many runs were asked for.
        closed: Whether it was closed.

    Example:
        >>> import numpy as np
        >>> token = CancelToken("demo")
        >>> doubled = FakeSession(
        ...     (TensorInfo("x", "int64", ("n",)),),
        ...     (TensorInfo("y", "int64", ("n",)),),
        ...     lambda feeds: {"y": feeds["x"] * 2},
        ... )
        >>> doubled.run({"x": np.array([1, 2])}, ["y"], token)[0].tolist()
        [2, 4]
    """

    def __init__(
        self,
        inputs: tuple[TensorInfo, ...],
        outputs: tuple[TensorInfo, ...],
        function: Callable[[Mapping[str, NDArray[Any]]], Mapping[str, NDArray[Any]]],
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.device = Device("cpu")
        self.runs = 0
        self.closed = False
        self._function = function

    def run(
        self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str], token: CancelToken
    ) -> list[NDArray[Any]]:
        """Run the function once."""
        self.runs += 1
        token.check()
        found = self._function(feeds)
        token.check()
        return [found[name] for name in outputs]

    def close(self) -> Sequence[Remains]:
        """Note the close."""
        self.closed = True
        return ()

    def leak(self) -> None:
        """Nothing native is here."""
