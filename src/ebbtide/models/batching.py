"""Length-aware batching: which texts run together, and the way of all through the model.

Inputs are tokenised and sorted by length inside a window, so that texts of about one length run
together with little padding; what each gives comes back in the order in which they were passed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Final

from numpy.typing import NDArray

from ebbtide.cancellation import CancelToken
from ebbtide.models.text_encoder import TextEncoder
from ebbtide.models.tokenizer import Batch, Encoding, Tokens
from ebbtide.runtime import native_threads

BATCH_TOKENS: Final = 2048
"""Tokens of a batch, padding included: as measured by ``benchmarks/batching.py``."""

LANE_TOKENS: Final = 512
"""The same where batches run beside one another, each on one thread."""

RUN_TOKENS: Final = 32
"""About so many tokens take as long as what a run costs however little it reads."""

WINDOW: Final = 1024
"""Inputs of a list that are tokenised and sorted together."""

WINDOW_TOKENS: Final = 1 << 17
"""Tokens at which a window ends before it has so many inputs: 2 to 20 MB, by the task."""


def batches(
    lengths: Sequence[int], *, size: int | None = None, tokens: int = BATCH_TOKENS
) -> list[list[int]]:
    """Which of these rows run together, by their places: the shortest first, then as many as fit.

    Without a size, a row also begins a batch of its own where padding what is there to its length
    would cost more than another run does.

    Args:
        lengths: Each row's tokens.
        size: How many rows a batch has, in place of a number of tokens.
        tokens: How many tokens a batch has at most, padding included; a longer row runs alone.

    Returns:
        The batches, in the order of the first place in each, so that what came first is soon known.

    Example:
        >>> batches([3, 90, 4, 3], tokens=120)
        [[0, 3, 2], [1]]
        >>> batches([3, 90, 4, 3], size=2)
        [[0, 3], [2, 1]]
    """
    found: list[list[int]] = []
    batch: list[int] = []
    longest = 0
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        length, rows = lengths[place], len(batch)
        if size is not None:
            full = rows == size
        else:
            full = (rows + 1) * length > tokens or rows * (length - longest) > RUN_TOKENS
        if full and batch:
            found.append(batch)
            batch = []
        batch.append(place)
        longest = length
    if batch:
        found.append(batch)
    return sorted(found, key=min)


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """What a task does for its inputs, on a native thread; all else is the same for every task.

    Attributes:
        encode: The rows that one input is run as: one, or one for each of its windows or labels.
        keep: What is kept of each row of a batch: gets the rows, the batch, and what the graph
            gave for it, which is let go after this.
        answer: One input's result: gets the input, its rows, and what was kept of each.
        one_width: Whether all rows are padded to the longest of all inputs, in whatever batch.
    """

    encode: Callable[[Any], Sequence[Encoding | Tokens]]
    keep: Callable[[Sequence[Any], Batch, list[NDArray[Any]]], Iterable[Any]]
    answer: Callable[[Any, Sequence[Any], Sequence[Any]], Any]
    one_width: bool = False


class _Input:
    """One input on its way: its rows, what was kept of each, and then its result alone."""

    __slots__ = ("item", "kept", "left", "result", "rows")

    def __init__(self, item: Any, rows: Sequence[Encoding | Tokens]) -> None:
        self.item = item
        self.rows = rows
        self.kept: list[Any] = [None] * len(rows)
        self.left = len(rows)
        self.result: Any = None

    def keep(self, number: int, kept: Any, work: Work) -> None:
        """Note what was kept of one row; of the last, make the result."""
        self.kept[number] = kept
        self.left -= 1
        if not self.left:
            self.result = work.answer(self.item, self.rows, self.kept)
            self.item, self.rows, self.kept = None, (), []


def answers(
    model: TextEncoder,
    work: Work,
    items: Iterable[Any],
    token: CancelToken,
    *,
    size: int | None = None,
    window: int = WINDOW,
) -> Iterator[tuple[int, list[Any]]]:
    """Run inputs batch by batch, and give their results in order.

    Args:
        model: The model.
        work: What the task does.
        items: The inputs.
        token: The way to stop it, between two batches and inside each.
        size: Rows of a batch, in place of a number of tokens.
        window: Inputs that are tokenised and sorted together.

    Yields:
        After each batch, how many inputs have been run, and the results that are now known, up to
        the first that is not.
    """
    rest = iter(items)
    done = 0
    while some := _window(rest, work, window, token):
        rows = [(one, number) for one in some for number in range(one.left)]
        lengths = [len(one.rows[number]) for one, number in rows]
        width = max(lengths) if work.one_width else 0
        widths = [max(one, width) for one in lengths]
        lanes = model.lanes if sum(widths) > BATCH_TOKENS else 1
        most = LANE_TOKENS if lanes > 1 else BATCH_TOKENS
        fitting = model.tokens_that_fit(max(widths), most)
        plan = batches(widths, size=size, tokens=fitting)
        lanes = min(lanes, len(plan))
        run = partial(_run, model, work, token, width, lanes > 1)
        together = [[rows[place] for place in places] for places in plan]
        first = 0
        if len(together) == 1:
            runs: Iterable[tuple[list[tuple[_Input, int]], list[Any]]] = (run(together[0]),)
        else:
            runs = native_threads.each(together, run, token, helpers=lanes - 1)
        for batch, kept in runs:
            for (one, number), of_it in zip(batch, kept, strict=True):
                one.keep(number, of_it, work)
                done += not one.left
            known = first
            while known < len(some) and not some[known].left:
                known += 1
            yield done, [one.result for one in some[first:known]]
            first = known


def _run(
    model: TextEncoder,
    work: Work,
    token: CancelToken,
    width: int,
    in_lane: bool,
    batch: list[tuple[_Input, int]],
) -> tuple[list[tuple[_Input, int]], list[Any]]:
    """Run one batch; returns it, and what is kept of each of its rows."""
    token.check()
    encoded = [one.rows[number] for one, number in batch]
    padded = model.tokenizer.pad(encoded, width)
    given = model.forward(padded, token, in_lane=in_lane)
    return batch, list(work.keep(encoded, padded, given))


def unpadded(batch: Batch, values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Each row's own values, without those of its padding.

    Args:
        batch: The batch.
        values: What a graph gave for it: [rows, tokens, ...].
    """
    for mask, row in zip(batch.attention_mask, values, strict=True):
        yield row[mask.astype(bool)]


def _window(rest: Iterator[Any], work: Work, most: int, token: CancelToken) -> list[_Input]:
    """The next inputs, tokenised; all that there are where they are padded to one width."""
    some: list[_Input] = []
    tokens = 0
    for item in rest:
        token.check()
        one = _Input(item, work.encode(item))
        some.append(one)
        tokens += sum(map(len, one.rows))
        if not work.one_width and (len(some) >= most or tokens >= WINDOW_TOKENS):
            break
    return some
