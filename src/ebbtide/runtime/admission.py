"""What of a run says how much memory it takes, and steps that are let in as memory allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from ebbtide.cancellation import CancelToken
from ebbtide.memory.workspace import Graph, workspace
from ebbtide.runtime.session import Bound, OnnxSession

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STEPS: Final = 64
"""Steps for which it is looked at once whether they take much memory."""


class AdmittedBound(Bound):
    """A `Bound` whose runs are let in as memory allows; a small step costs a look at its length.

    Args:
        session: The session.
        shared: For an input, the output and the array that are both.
        outputs: What else is computed.
        graph: What its runs are known by.
    """

    def __init__(
        self,
        session: OnnxSession,
        shared: Mapping[str, tuple[str, NDArray[Any]]],
        outputs: Sequence[str],
        graph: Graph,
    ) -> None:
        super().__init__(session, shared, outputs)
        self._graph = graph
        self._small_until = 0  # so long may the past of a single token be

    def run(
        self,
        feeds: Mapping[str, NDArray[Any]],
        into: Sequence[NDArray[Any]] | None,
        token: CancelToken,
    ) -> list[NDArray[Any]]:
        """See `Bound.run`."""
        if workspace.limit is None:
            return super().run(feeds, into, token)
        rows, new = feeds["input_ids"].shape
        length = feeds["attention_mask"].shape[1]
        if new == 1:
            if length <= self._small_until:
                return super().run(feeds, into, token)
            if workspace.is_small(self._graph, rows, length + _STEPS):
                self._small_until = length + _STEPS
        with workspace.admitted(self._graph, rows * new, length, token):
            return super().run(feeds, into, token)


def shape_of(feeds: Mapping[str, NDArray[Any]]) -> tuple[int, int, int]:
    """Rows and tokens of what is fed, and how many tokens each is compared with."""
    ids = feeds.get("input_ids")
    if ids is None:
        ids = max(feeds.values(), key=_numbers)
    rows, new = (*ids.shape, 1, 1)[:2]
    return rows, new, max((one.shape[1] for one in feeds.values() if one.ndim == 2), default=new)


def _numbers(array: NDArray[Any]) -> int:
    return array.size
