"""What every pipeline is: a wrapper that dispose empties, and the way a call takes through it."""

from __future__ import annotations

import dataclasses
import queue
import sys
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from contextlib import aclosing, closing, suppress
from itertools import islice
from typing import Any, ClassVar, TypeVar

import numpy as np

from ebbtide.cancellation import CancelToken, LettingIn, patiently
from ebbtide.errors import unknown_option
from ebbtide.hub import ModelFiles
from ebbtide.lifecycle import Disposable, Lifecycle
from ebbtide.memory.ledger import Holding, Lease, activity
from ebbtide.models.batching import WINDOW, Work, answers
from ebbtide.models.loading import MODEL, LoadOptions
from ebbtide.models.text_encoder import Outputs, TextEncoder
from ebbtide.models.tokenizer import Tokenizer
from ebbtide.pipelines.inputs import Many
from ebbtide.pipelines.progress import watched
from ebbtide.runtime import Job, Waiting, native_threads

ResultT = TypeVar("ResultT")

Read = tuple[Sequence[Any], bool]
"""One input as a task reads it: the texts of a list, or one; and whether it was one alone."""

Step = tuple[int, list[Any]]
"""After a batch: how many texts have been run, and the results that are new."""


StepT = TypeVar("StepT")

Telling = Callable[[CancelToken, Callable[[StepT], object]], object]
"""Work on a native thread: gets the way to stop it, and whom to tell what is known already."""


def one_or_all(results: list[Any], alone: bool) -> Any:
    """The results of a list as a list, and of one text as it is."""
    return results[0] if alone else results


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One call of a task, its options understood.

    Attributes:
        read: Checks an input, on the caller's thread.
        work: What is done for each of its texts.
        many: How several run.
        collect: The result of one input, from those of its texts.
    """

    read: Callable[[object], Read]
    work: Work
    many: Many
    collect: Callable[[list[Any], bool], Any] = one_or_all

    @property
    def ahead(self) -> int:
        """How many inputs of an iterator are taken before the first of them is answered."""
        return self.many.window or self.many.batch_size or 1


@dataclasses.dataclass(frozen=True, slots=True)
class PipelineMemory:
    """One pipeline's share of this process's memory, in bytes of anonymous memory.

    Attributes:
        anonymous: Its share: what it took, where something is shared divided by its owners.
        exclusive: What disposing it now would give back: what nobody else owns.
        working: What its calls added and that is not given back yet; part of both.
        cache: What generations hold of what the model has seen, under way or kept for a call that
            begins the same; part of both.
        quiet: Whether every load was measured while nothing else went on in the process.
        holdings: Each native thing that it owns.
    """

    anonymous: int
    exclusive: int
    working: int
    cache: int
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
            f" working {self.working / 1e6:.1f} MB"
            + (f", cache {self.cache / 1e6:.1f} MB)" if self.cache else ")")
        )


class Pipeline(Disposable):
    """A task over one loaded model. Made by `ebbtide.pipeline`, and given back by `dispose`.

    It is a context manager, sync and async; callable from any number of threads at once; and has
    `acall` for an event loop.
    """

    task: ClassVar[str]
    outputs: ClassVar[Outputs]
    """What the task needs of the model's graph."""
    stems: ClassVar[tuple[str, ...]] = (MODEL,)
    """The ONNX files that the task runs, by their names without suffix and ending."""
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
        cache = lifecycle.cached
        return PipelineMemory(
            anonymous=shares + lifecycle.working + cache,
            exclusive=lifecycle.charged,
            working=lifecycle.working,
            cache=cache,
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
    def load(
        cls,
        files: ModelFiles,
        options: LoadOptions,
        lifecycle: Lifecycle,
        token: CancelToken,
        told: Callable[[Waiting], object],
    ) -> Any:
        """Load what the task runs; it belongs to ``lifecycle`` at once."""
        return TextEncoder.load(
            files, options, cls.outputs, cls.extra_files, lifecycle, token, told
        )

    @classmethod
    def read(cls, files: ModelFiles, model: TextEncoder) -> Any:
        """What the task needs of the model's files beside the graph; read once, at the load."""
        return None

    def _answer(self, inputs: object, call: Call) -> Any:
        """The result for inputs; for an iterator, an iterator of the results of each."""
        if isinstance(inputs, Iterator):
            return self._stream(inputs, call)
        some = [call.read(inputs)]
        if call.many.progress is False:
            return self._submit(lambda token: self._run(some, call, token)[0]).wait()
        found: list[Any] = []
        with (
            watched(call.many.progress, self.task, len(some[0][0])) as tell,
            closing(self._steps(self._told(some, call))) as steps,
        ):
            for done, results in steps:
                tell(done)
                found += results
        return found[0]

    async def _aanswer(self, inputs: object, call: Call) -> Any:
        """The same on an event loop, for iterators of either kind."""
        if isinstance(inputs, Iterator | AsyncIterable):
            return self._astream(inputs, call)
        some = [call.read(inputs)]
        if call.many.progress is False:
            return await self._submit(lambda token: self._run(some, call, token)[0]).result()
        found: list[Any] = []
        with watched(call.many.progress, self.task, len(some[0][0])) as tell:
            async with aclosing(self._asteps(self._told(some, call))) as steps:
                async for done, results in steps:
                    tell(done)
                    found += results
        return found[0]

    def _stream(self, inputs: Iterator[object], call: Call) -> Iterator[Any]:
        count = 0
        with watched(call.many.progress, self.task, None) as tell:
            for some in _windows(inputs, call):
                for _, results in self._steps(self._told(some, call)):
                    for one in results:
                        count += 1
                        tell(count)
                        yield one

    async def _astream(
        self, inputs: Iterator[object] | AsyncIterable[object], call: Call
    ) -> AsyncIterator[Any]:
        count = 0
        with watched(call.many.progress, self.task, None) as tell:
            async for some in _awindows(inputs, call):
                async with aclosing(self._asteps(self._told(some, call))) as steps:
                    async for _, results in steps:
                        for one in results:
                            count += 1
                            tell(count)
                            yield one

    def _told(self, some: Sequence[Read], call: Call) -> Telling[Step]:
        return lambda token, tell: self._run(some, call, token, tell)

    def _steps(
        self, work: Telling[StepT], token: CancelToken | None = None
    ) -> Generator[StepT, None, None]:
        """What work tells while it runs, on the caller's thread, which may take its time."""
        told: queue.SimpleQueue[StepT | None] = queue.SimpleQueue()
        job = self._submit(lambda token: work(token, told.put), token)
        job.on_done(lambda: told.put(None))
        try:
            while (step := told.get()) is not None:
                yield step
        except GeneratorExit:
            job.token.cancel()  # and no waiting: it may be a finalizer that closes this
            raise
        except BaseException:
            job.token.cancel()
            with suppress(Exception):
                job.wait()
            raise
        job.wait()

    async def _asteps(
        self, work: Telling[StepT], token: CancelToken | None = None
    ) -> AsyncGenerator[StepT, None]:
        """The same on an event loop."""
        import asyncio

        loop = asyncio.get_running_loop()
        told: asyncio.Queue[StepT | None] = asyncio.Queue()

        def tell(step: StepT | None) -> None:
            with suppress(RuntimeError):  # the loop was closed while we worked
                loop.call_soon_threadsafe(told.put_nowait, step)

        job = self._submit(lambda token: work(token, tell), token)
        job.on_done(lambda: tell(None))
        try:
            while (step := await told.get()) is not None:
                yield step
        except BaseException:
            job.token.cancel()
            await patiently(job.on_done, job.token.cancel)
            raise
        await job.result()

    def _run(
        self,
        some: Sequence[Read],
        call: Call,
        token: CancelToken,
        tell: Callable[[Step], object] = lambda step: None,
    ) -> list[Any]:
        """The results of some inputs, each a text or a list; on a native thread.

        Args:
            some: The inputs.
            call: What is done with them.
            token: The way to stop it.
            tell: Told after each batch how many texts have been run, and which results are new.
        """
        size = call.many.batch_size or (1 if self._model.shares_scales else None)
        window = call.many.window or WINDOW
        found: list[Any] = []
        for together in [[one] for one in some] if call.work.one_width else [some]:
            items = [item for items, _ in together for item in items]
            waiting = deque(together)
            known: list[Any] = []
            for done, answered in answers(
                self._model, call.work, items, token, size=size, window=window
            ):
                known += answered
                new = []
                while waiting and len(known) >= len(waiting[0][0]):
                    inputs, alone = waiting.popleft()
                    new.append(call.collect(known[: len(inputs)], alone))
                    del known[: len(inputs)]
                found += new
                tell((done, new))
        return found

    def _submit(
        self, work: Callable[[CancelToken], ResultT], given: CancelToken | None = None
    ) -> Job[ResultT]:
        """Let one call in, and hand its work to a native thread; ``given`` may stop it."""
        lifecycle = self._lifecycle
        token = given or CancelToken(lifecycle.label)

        def leave() -> None:
            lifecycle.leave(token)

        with LettingIn(token):
            try:
                lifecycle.enter(token)
                return native_threads.submit(lambda: _charged(work, token, lifecycle), token, leave)
            except BaseException:
                leave()
                raise

    def _unknown(self, options: dict[str, Any], known: tuple[str, ...]) -> None:
        for option in options:
            raise unknown_option(option, known, where=self._lifecycle.label)


def _windows(inputs: Iterator[object], call: Call) -> Iterator[list[Read]]:
    while some := [call.read(one) for one in islice(inputs, call.ahead)]:
        yield some


async def _awindows(
    inputs: Iterator[object] | AsyncIterable[object], call: Call
) -> AsyncIterator[list[Read]]:
    if isinstance(inputs, Iterator):
        for some in _windows(inputs, call):
            yield some
        return
    some = []
    async for one in inputs:
        some.append(call.read(one))
        if len(some) == call.ahead:
            yield some
            some = []
    if some:
        yield some


def _charged(
    work: Callable[[CancelToken], ResultT], token: CancelToken, lifecycle: Lifecycle
) -> ResultT:
    """Run a call, and charge its pipeline for what it adds to the process: two reads of 10 us."""
    lifecycle.wake(token)
    window = activity.begin().measure()
    size = -lifecycle.cached
    try:
        result = work(token)
        size += _size(result)  # the result is the caller's
        return result
    finally:
        change, quiet = window.close()
        if quiet:
            size += lifecycle.cached  # what is kept has an account of its own
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
