"""Pipelines that run in a process of their own, and are the same to whoever calls them."""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncIterable, AsyncIterator, Callable, Generator, Iterator, Mapping
from contextlib import aclosing, closing, contextmanager, nullcontext
from itertools import islice
from typing import Any, Final

from ebbtide.cancellation import CancelToken, LettingIn
from ebbtide.errors import InputError, NotTransferableError
from ebbtide.hub import ProgressEvent
from ebbtide.lifecycle import Disposer
from ebbtide.models.chat import ChatTemplate
from ebbtide.models.chat_tools import schemas
from ebbtide.models.structured_form import Form
from ebbtide.models.tokenizer import Tokenizer
from ebbtide.pipelines import Pipeline, PipelineMemory
from ebbtide.pipelines.generating import AsyncStream, Stream
from ebbtide.pipelines.progress import Progress, watched
from ebbtide.workers import codec
from ebbtide.workers.calls import Call, nothing
from ebbtide.workers.life import WorkerLifecycle
from ebbtide.workers.messages import call_packet
from ebbtide.workers.options import IsolateOptions
from ebbtide.workers.plan import Plan
from ebbtide.workers.process import check_possible
from ebbtide.workers.records import records
from ebbtide.workers.replicas import Replicas, share_of_cpus
from ebbtide.workers.worker import Worker

_CALLABLE: Final = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn")

Heard = Callable[[Any], object]


class Isolated(Pipeline):
    """What a pipeline in a process of its own has in place of a model: the way there."""

    _lifecycle: WorkerLifecycle

    def __init__(self, lifecycle: WorkerLifecycle, worker: Worker | Replicas) -> None:
        super(Pipeline, self).__init__(lifecycle)
        self._worker = worker

    @property
    def model(self) -> str:
        """The model's name or folder, as it was asked for."""
        return str(self._worker.facts["model"])

    @property
    def device(self) -> str:
        """Where its session runs, as in ``cpu`` or ``cuda:1``."""
        return str(self._worker.facts["device"])

    @property
    def dtype(self) -> str:
        """What the loaded file is in, as in ``fp32`` or ``q8``."""
        return str(self._worker.facts["dtype"])

    @property
    def pid(self) -> int | None:
        """The number of its process, of several the first; None where there is none now."""
        return self._worker.pid

    @property
    def pids(self) -> tuple[int, ...]:
        """The numbers of all its processes that there are now."""
        return self._worker.pids

    @property
    def tokenizer(self) -> Tokenizer:
        """There is none on this side.

        Raises:
            NotTransferableError: Always.
        """
        raise NotTransferableError(
            f"The tokenizer of {self._lifecycle.label} is in its own process: make a pipeline"
            " without isolate= to use it by itself."
        )

    @property
    def memory(self) -> PipelineMemory:
        """What its process takes; nothing while there is none."""
        worker = self._worker
        anonymous, told = self._lifecycle.charged, worker.memory
        return PipelineMemory(
            anonymous=anonymous,
            exclusive=anonymous,
            working=told.working if told is not None else 0,
            cache=told.cache if told is not None else 0,
            quiet=told.quiet if told is not None else True,
            holdings=told.holdings if told is not None else (),
        )

    def __repr__(self) -> str:
        pids = self.pids
        about = super().__repr__()[:-1]
        if isinstance(self._worker, Replicas) and self._lifecycle.takes_calls:
            return f"{about} in {len(pids)} processes>"
        return f"{about} in process {pids[0]}>" if pids else f"{about}>"

    def wake(self) -> None:
        """Have its process loaded again, so that the next call need not."""
        self._made("wake", (), {}).wait()

    async def awake(self) -> None:
        """The same as `wake`, on an event loop."""
        await self._made("wake", (), {}).result()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """As the task's own; it runs in the pipeline's process."""
        inputs = arguments[0] if arguments else options.get("inputs")
        if isinstance(inputs, Iterator):
            options.pop("inputs", None)
            return self._each(inputs, arguments[1:], options)
        call, heard, parsed = self._understood("__call__", arguments, options)
        with heard as hear:
            return parsed(call().wait(hear))

    async def acall(self, *arguments: Any, **options: Any) -> Any:
        """The same as calling, without blocking the event loop."""
        inputs = arguments[0] if arguments else options.get("inputs")
        if isinstance(inputs, Iterator | AsyncIterable):
            options.pop("inputs", None)
            return self._aeach(inputs, arguments[1:], options)
        call, heard, parsed = self._understood("__call__", arguments, options)
        with heard as hear:
            return parsed(await call().result(hear))

    def echo(self, value: Any) -> Any:
        """What is passed, there and back: to see that the process answers, and how fast."""
        return self._made("echo", (value,), {}).wait()

    # How a call is made

    def _made(
        self,
        name: str,
        arguments: tuple[Any, ...],
        options: Mapping[str, Any],
        *,
        tells: str | None = None,
        token: CancelToken | None = None,
    ) -> Call:
        """Let one call in, and send it."""
        lifecycle = self._lifecycle
        token = token or CancelToken(lifecycle.label)
        call = Call(name, token, functools.partial(lifecycle.leave, token))
        call.packet = call_packet(call.number, name, arguments, options, tells=tells)
        with LettingIn(token):
            try:
                lifecycle.enter(token)
                self._worker.submit(call)
            except BaseException:
                lifecycle.leave(token)
                raise
        return call

    def _understood(
        self, name: str, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[Callable[..., Call], Any, Callable[[Any], Any]]:
        """How a call is made, who hears what it tells meanwhile, and what its result becomes."""
        progress, streamer = options.pop("progress", False), options.pop("streamer", None)
        options, parsed = self._crossing(options)
        tells = None
        heard: Any = nullcontext(nothing)
        if streamer is not None:
            tells, heard = "streamer", nullcontext(lambda event: streamer(*event))
        elif progress is True or callable(progress):
            tells, heard = "progress", _watching(progress, self.task)
        elif progress is not False:
            options["progress"] = progress  # the task says what is wrong with it
        return functools.partial(self._made, name, arguments, options, tells=tells), heard, parsed

    def _crossing(self, options: dict[str, Any]) -> tuple[dict[str, Any], Callable[[Any], Any]]:
        """Options as they can cross, and what is made of the result on this side."""
        for name in _CALLABLE:
            if options.get(name):
                raise InputError(
                    f"{name} takes functions, which cannot cross to a worker process: leave it"
                    " out, or make the pipeline without isolate=.",
                    value=options[name],
                )
        if isinstance(options.get("assistant_model"), Pipeline):
            raise InputError(
                "assistant_model is a pipeline of this process, and cannot cross to a worker"
                " process: leave it out, or make the pipeline without isolate=."
            )
        if tools := options.get("tools"):
            options["tools"] = schemas(tools)
        form = options.get("structured")
        if isinstance(form, type) or hasattr(form, "validate_json"):
            form = Form.of(form)
            options["structured"] = {"json_schema": form.value}
            return options, functools.partial(_parsed, form)
        return options, lambda result: result

    def _each(
        self, inputs: Iterator[Any], arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> Iterator[Any]:
        """The result of each of an iterator's inputs, a window at a time."""
        progress, ahead = options.pop("progress", False), _ahead(options)
        count = 0
        with watched(progress, self.task, None) as tell:
            while some := list(islice(inputs, ahead)):
                for one in self._made("each", (some, *arguments), options).wait():
                    count += 1
                    tell(count)
                    yield one

    async def _aeach(
        self,
        inputs: Iterator[Any] | AsyncIterable[Any],
        arguments: tuple[Any, ...],
        options: dict[str, Any],
    ) -> AsyncIterator[Any]:
        """The same on an event loop."""
        progress, ahead = options.pop("progress", False), _ahead(options)
        count = 0
        with watched(progress, self.task, None) as tell:
            async for some in _windows(inputs, ahead):
                made = self._made("each", (some, *arguments), options)
                for one in await made.result():
                    count += 1
                    tell(count)
                    yield one


class _Ranking(Isolated):
    """Of a task that ranks."""

    def rank(self, *arguments: Any, **options: Any) -> Any:
        """As the task's own; it runs in the pipeline's process."""
        call, heard, parsed = self._understood("rank", arguments, options)
        with heard as hear:
            return parsed(call().wait(hear))

    async def arank(self, *arguments: Any, **options: Any) -> Any:
        """The same as `rank`, without blocking the event loop."""
        call, heard, parsed = self._understood("rank", arguments, options)
        with heard as hear:
            return parsed(await call().result(hear))


class _Writing(Isolated):
    """Of a task that writes."""

    def stream(self, *arguments: Any, **options: Any) -> Stream:
        """As the task's own; it runs in the pipeline's process."""
        options, parsed = self._crossing(options)
        self._made("check", arguments, options, tells="").wait()
        results: list[Any] = []
        token = CancelToken(self._lifecycle.label)
        return Stream(self._pieces(arguments, options, results, token, parsed), token, results)

    def astream(self, *arguments: Any, **options: Any) -> AsyncStream:
        """The same as `stream`, on an event loop; what is wrong is told at the first piece."""
        options, parsed = self._crossing(options)
        results: list[Any] = []
        token = CancelToken(self._lifecycle.label)
        pieces = self._apieces(arguments, options, results, token, parsed)
        return AsyncStream(pieces, token, results)

    def _pieces(
        self,
        arguments: tuple[Any, ...],
        options: dict[str, Any],
        results: list[Any],
        token: CancelToken,
        parsed: Callable[[Any], Any],
    ) -> Generator[Any, None, None]:
        call = self._made("stream", arguments, options, tells="stream", token=token)
        with closing(call.events()) as events:
            for event in events:
                if callable(event):
                    event()
                else:
                    yield event
        results.append(parsed([call.outcome()]))

    async def _apieces(
        self,
        arguments: tuple[Any, ...],
        options: dict[str, Any],
        results: list[Any],
        token: CancelToken,
        parsed: Callable[[Any], Any],
    ) -> Any:
        call = self._made("stream", arguments, options, tells="stream", token=token)
        async with aclosing(call.aevents()) as events:
            async for event in events:
                if callable(event):
                    event()
                else:
                    yield event
        results.append(parsed([call.outcome()]))


class _Masking(Isolated):
    """Of a task that fills masks."""

    @property
    def mask_token(self) -> str:
        """What marks a place to fill in, as in ``[MASK]`` or ``<mask>``."""
        return str(self._worker.facts["mask_token"])


class _Chatting(Isolated):
    """Of a task that takes chats."""

    @property
    def chat_template(self) -> ChatTemplate:
        """The model's chat templates."""
        templates, tokens = self._worker.facts["chat"]
        return ChatTemplate(templates, tokens, model=self.model)


_PARTS: Final = {
    "rank": _Ranking,
    "stream": _Writing,
    "mask_token": _Masking,
    "chat_template": _Chatting,
}
"""What a task may have beside its call, and what carries it."""


@functools.cache
def class_of(kind: type[Pipeline]) -> type[Isolated]:
    """The class of a task's pipelines in processes of their own; one of the task's own too."""
    parts = [part for name, part in _PARTS.items() if hasattr(kind, name)] or [Isolated]
    about = {"__doc__": kind.__doc__, "__module__": kind.__module__, "__qualname__": kind.__name__}
    return type(kind.__name__, (*parts, kind), about)


def lifecycle_of(
    label: str,
    loader: str,
    arguments: tuple[Any, ...],
    options: Mapping[str, Any],
    isolate: IsolateOptions,
    disposer: Disposer,
    site: tuple[str, int],
) -> WorkerLifecycle:
    """The life of a pipeline that will be loaded in a process of its own.

    Args:
        label: What it is, for messages.
        loader: What makes it there, as ``module:function``.
        arguments: What that is called with, by position.
        options: And by name; nothing that cannot cross.
        isolate: How the process lives.
        disposer: Who disposes it.
        site: Where the user's code made it.

    Raises:
        LoadError: This system, or this interpreter, can start no such process.
        InputError: An argument cannot cross.
    """
    check_possible(label)
    given = dict(options)
    if isolate.replicas > 1:
        given["session_options"] = share_of_cpus(given.get("session_options"), isolate.replicas)
    plan = Plan(label=label, loader=loader, arguments=arguments, options=given, isolate=isolate)
    codec.encode((plan.arguments, plan.options), records)
    return WorkerLifecycle(plan, disposer, site)


class Loading:
    """The load of such a pipeline, which is waited for like a job."""

    def __init__(
        self,
        kind: type[Pipeline],
        lifecycle: WorkerLifecycle,
        token: CancelToken,
        listener: Callable[[ProgressEvent], object],
    ) -> None:
        self._kind = kind
        self._listener = listener
        self._call = Call("load", token, functools.partial(lifecycle.leave, token))
        assert lifecycle.worker is not None
        self._worker = lifecycle.worker
        self._worker.open(self._call)

    def on_done(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called once it has ended; at once if it has."""
        self._call.on_done(callback)

    def wait(self) -> Callable[[Any], Pipeline]:
        """What makes the pipeline of its lifecycle, once it is loaded."""
        self._call.wait(self._listener)
        return self._made()

    async def result(self) -> Callable[[Any], Pipeline]:
        """The same on an event loop."""
        await self._call.result(self._listener)
        return self._made()

    def _made(self) -> Callable[[Any], Pipeline]:
        worker = self._worker
        kind: Any = class_of(self._kind)  # type: ignore[arg-type]
        return lambda lifecycle: kind(lifecycle, worker)


@contextmanager
def _watching(progress: Progress, task: str) -> Iterator[Heard]:
    """Hears how far a call is, and tells a function or a bar, which begins with the first word."""
    stack: list[Any] = []

    def hear(event: Any) -> None:
        done, total = event
        if not stack:
            bar = watched(progress, task, total)
            stack.extend((bar, bar.__enter__()))
        stack[1](done)

    try:
        yield hear
    finally:
        if stack:
            stack[0].__exit__(None, None, None)


def _parsed(form: Form, result: Any) -> Any:
    """A result whose texts are of a model's form: instances of it in place of plain data."""
    if isinstance(result, list):
        return [_parsed(form, one) for one in result]
    if isinstance(result, dict) and result.get("parsed") is not None:
        return {**result, "parsed": form.parse(json.dumps(result["parsed"]))}
    return result


def _ahead(options: Mapping[str, Any]) -> int:
    for name in ("window", "batch_size"):
        if type(options.get(name)) is int and options[name] > 0:
            return int(options[name])
    return 1


async def _windows(inputs: Any, ahead: int) -> AsyncIterator[list[Any]]:
    if isinstance(inputs, Iterator):
        while some := list(islice(inputs, ahead)):
            yield some
        return
    some = []
    async for one in inputs:
        some.append(one)
        if len(some) == ahead:
            yield some
            some = []
    if some:
        yield some
