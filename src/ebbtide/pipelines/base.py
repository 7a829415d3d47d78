"""What every pipeline is: a wrapper that dispose empties, and the way a call takes through it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np

from ebbtide.cancellation import CancelToken
from ebbtide.errors import unknown_option
from ebbtide.hub import ModelFiles
from ebbtide.lifecycle import Disposable, Lifecycle
from ebbtide.memory.ledger import Holding, Lease, activity
from ebbtide.models.text_encoder import Outputs, TextEncoder
from ebbtide.models.tokenizer import Tokenizer
from ebbtide.runtime import Job, native_threads

ResultT = TypeVar("ResultT")
ItemT = TypeVar("ItemT")
Prepare = Callable[[object], Callable[[CancelToken], Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class PipelineMemory:
    """One pipeline's share of this process's memory, in bytes of anonymous memory.

    Attributes:
        anonymous: Its share: what it took, where something is shared divided by its owners.
        exclusive: What disposing it now would give back: what nobody else owns.
        working: What its calls added and that is not given back yet; part of both.
        quiet: Whether every load was measured while nothing else went on in the process.
        holdings: Each native thing that it owns.
    """

    anonymous: int
    exclusive: int
    working: int
    quiet: bool
    holdings: tuple[Holding, ...]

    def __str__(self) -> str:
        """One line for a person, in MB of 1,000,000 bytes."""
        parts = ", ".join(
            f"{one.kind} {one.anonymous / 1e6:.1f} MB"
            + (" asleep" if one.asleep else "")
            + (f" and {one.mapped / 1e6:.1f} MB mapped" if one.mapped else "")
            + (f" shared by {one.owners}" if one.owners > 1 else "")
            for one in self.holdings
        )
        return (
            f"{self.anonymous / 1e6:.1f} MB ({parts or 'nothing'},"
            f" working {self.working / 1e6:.1f} MB)"
        )


class Pipeline(Disposable):
    """A task over one loaded model. Made by `ebbtide.pipeline`, and given back by `dispose`.

    It is a context manager, sync and async; callable from any number of threads at once; and has
    `acall` for an event loop.
    """

    task: ClassVar[str]
    outputs: ClassVar[Outputs]
    """What the task needs of the model's graph."""
    extra_files: ClassVar[tuple[str, ...]] = ()
    """Files that the task reads beside the graph's and the tokenizer's, where there are any."""

    def __init__(self, lifecycle: Lifecycle, model: TextEncoder, about: Any = None) -> None:
        super().__init__(lifecycle)
        self._model = model

    @property
    def model(self) -> str:
        """The model's name or folder, as it was asked for."""
        return self._model.name

    @property
    def device(self) -> str:
        """Where its session runs, as in ``cpu`` or ``cuda:1``."""
        return self._model.device

    @property
    def dtype(self) -> str:
        """What the loaded file is in, as in ``fp32`` or ``q8``."""
        return self._model.dtype

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; it ends with the pipeline."""
        return self._model.tokenizer

    @property
    def memory(self) -> PipelineMemory:
        """What this pipeline takes of the process's memory now; nothing once disposed."""
        lifecycle = self._lifecycle
        holdings = [
            holding
            for resource in tuple(lifecycle.resources)
            if isinstance(resource, Lease) and (holding := resource.holding) is not None
        ]
        shares = sum(one.anonymous // one.owners for one in holdings)
        return PipelineMemory(
            anonymous=shares + lifecycle.working,
            exclusive=lifecycle.charged,
            working=lifecycle.working,
            quiet=all(one.quiet for one in holdings),
            holdings=tuple(holdings),
        )

    def wake(self) -> None:
        """Load again what `sleep` freed, so that the next call need not.

        Raises:
            PipelineDisposedError: It is disposed, or about to be.
            LoadError: The model is not there any more, or another one. The pipeline sleeps on.
        """
        self._submit(lambda token: None).wait()

    async def awake(self) -> None:
        """The same as `wake`, on an event loop."""
        await self._submit(lambda token: None).result()

    def __repr__(self) -> str:
        about = f"{type(self).__name__} {self.model!r} {self.state.value}"
        if self._lifecycle.takes_calls:
            memory = self.memory
            source = next((one.source for one in memory.holdings if one.source), "")
            size = f"{memory.anonymous / 1e6:.1f} MB"
            about += f" on {self.device} in {self.dtype}, {size}"
            about += f" ({source})" if source else ""
        return f"<{about}>"

    @classmethod
    def read(cls, files: ModelFiles, model: TextEncoder) -> Any:
        """What the task needs of the model's files beside the graph; read once, at the load."""
        return None

    def _answer(self, inputs: object, prepare: Prepare) -> Any:
        """The result for inputs; for an iterator, an iterator of the results of each.

        Args:
            inputs: What the user passed.
            prepare: Checks an input, on the caller's thread, and gives the work of a native one.
        """
        if isinstance(inputs, Iterator):
            return self._stream(inputs, prepare)
        return self._submit(prepare(inputs)).wait()

    async def _aanswer(self, inputs: object, prepare: Prepare) -> Any:
        """The same on an event loop, for iterators of either kind."""
        if isinstance(inputs, Iterator | AsyncIterable):
            return self._astream(inputs, prepare)
        return await self._submit(prepare(inputs)).result()

    def _stream(self, inputs: Iterator[object], prepare: Prepare) -> Iterator[Any]:
        for one in inputs:
            yield self._submit(prepare(one)).wait()

    async def _astream(
        self, inputs: Iterator[object] | AsyncIterable[object], prepare: Prepare
    ) -> AsyncIterator[Any]:
        if isinstance(inputs, AsyncIterable):
            async for one in inputs:
                yield await self._submit(prepare(one)).result()
        else:
            for one in inputs:
                yield await self._submit(prepare(one)).result()

    def _submit(self, work: Callable[[CancelToken], ResultT]) -> Job[ResultT]:
        """Let one call in, and hand its work to a native thread."""
        lifecycle = self._lifecycle
        token = CancelToken(lifecycle.label)

        def leave() -> None:
            lifecycle.leave(token)

        try:
            lifecycle.enter(token)
            return native_threads.submit(lambda: _charged(work, token, lifecycle), token, leave)
        except BaseException:
            leave()
            raise

    def _batches(
        self, items: Sequence[ItemT], size: int, token: CancelToken
    ) -> Iterator[Sequence[ItemT]]:
        """So many of the items at a time, until the call is cancelled."""
        for start in range(0, len(items), size):
            token.check()
            yield items[start : start + size]

    def _unknown(self, options: dict[str, Any], known: tuple[str, ...]) -> None:
        for option in options:
            raise unknown_option(option, known, where=self._lifecycle.label)


def _charged(
    work: Callable[[CancelToken], ResultT], token: CancelToken, lifecycle: Lifecycle
) -> ResultT:
    """Run a call, and charge its pipeline for what it adds to the process: two reads of 10 us."""
    lifecycle.wake(token)
    window = activity.begin().measure()
    size = 0
    try:
        result = work(token)
        size = _size(result)  # the result is the caller's
        return result
    finally:
        change, quiet = window.close()
        if quiet:
            lifecycle.working = max(0, lifecycle.working + change - size)


def _size(result: object) -> int:
    """Bytes that a result takes: arrays, and lists and maps of plain values."""
    if isinstance(result, np.ndarray):
        return result.nbytes
    parts: Iterable[object] = ()
    if isinstance(result, dict):
        parts = result.values()
    elif isinstance(result, list):
        parts = result
    return sys.getsizeof(result) + sum(map(_size, parts))
