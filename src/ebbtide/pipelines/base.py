"""What every pipeline is: a wrapper that dispose empties, and the way a call takes through it."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, ClassVar, TypeVar

from numpy.typing import NDArray

from ebbtide.cancellation import CancelToken
from ebbtide.errors import unknown_option
from ebbtide.lifecycle import Disposable, Lifecycle, State
from ebbtide.memory.ledger import Holding, Lease, activity
from ebbtide.models.text_encoder import TextEncoder
from ebbtide.models.tokenizer import Tokenizer
from ebbtide.runtime import Job, native_threads

Array = NDArray[Any]
ResultT = TypeVar("ResultT")
ItemT = TypeVar("ItemT")


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

    def __init__(self, lifecycle: Lifecycle, model: TextEncoder) -> None:
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

    def __repr__(self) -> str:
        about = f"{type(self).__name__} {self.model!r} {self.state.value}"
        if self.state is State.READY:
            size = self.memory.anonymous / 1e6
            about += f" on {self.device} in {self.dtype}, {size:.1f} MB"
        return f"<{about}>"

    def _submit(self, work: Callable[[CancelToken], Array]) -> Job[Array]:
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

    def _unknown(self, options: dict[str, Any], known: tuple[str, ...]) -> None:
        for option in options:
            raise unknown_option(option, known, where=self._lifecycle.label)


def _charged(
    work: Callable[[CancelToken], Array], token: CancelToken, lifecycle: Lifecycle
) -> Array:
    """Run a call, and charge its pipeline for what it adds to the process: two reads of 10 us."""
    window = activity.begin().measure()
    size = 0
    try:
        result = work(token)
        size = result.nbytes  # the result is the caller's
        return result
    finally:
        change, quiet = window.close()
        if quiet:
            lifecycle.working = max(0, lifecycle.working + change - size)


def stream(inputs: Iterator[ItemT], call: Callable[[ItemT], ResultT]) -> Iterator[ResultT]:
    """One result an input, as they are asked for; nothing runs between two of them."""
    for one in inputs:
        yield call(one)


async def astream(
    inputs: Iterator[ItemT] | AsyncIterable[ItemT], call: Callable[[ItemT], Awaitable[ResultT]]
) -> AsyncIterator[ResultT]:
    """The same on an event loop, for inputs of either kind."""
    if isinstance(inputs, AsyncIterable):
        async for one in inputs:
            yield await call(one)
    else:
        for one in inputs:
            yield await call(one)
