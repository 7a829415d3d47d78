"""One call that runs in a worker process, as who made it waits for its end."""

from __future__ import annotations

import itertools
import queue
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import suppress
from typing import Any, Final

from ebbtide.cancellation import CancelToken, OneShot, call_all, patiently
from ebbtide.workers.channel import Packet

_numbers = itertools.count(1)

LOAD: Final = 0
"""The number of what belongs to no call: the load, and what goes on between calls."""


def nothing(event: Any) -> None:
    """Hear what a call tells, and do nothing about it."""


class Call:
    """One call: what is sent for it, what is told of it meanwhile, and its outcome.

    Its outcome is given once, by the worker's thread; who made it waits, on a thread or on an
    event loop, and is told there what comes meanwhile.

    Args:
        what: What it is, for people.
        token: The way to stop it.
        leave: Called once it has ended, before anybody hears of it.
    """

    __slots__ = (
        "_done", "_error", "_leave", "_nudge", "_result", "_told",  "_waiters",
        "began", "number", "packet", "token", "what",
    )  # fmt: skip

    def __init__(
        self, what: str, token: CancelToken, leave: Callable[[], object] = lambda: None
    ) -> None:
        self.number = next(_numbers)
        self.what = what
        self.token = token
        self.began = 0.0
        self.packet: Packet | None = None
        self._leave: Callable[[], object] | None = leave
        self._result: Any = None
        self._error: BaseException | None = None
        self._done = False
        self._waiters: list[Callable[[], None]] = []
        self._told: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._nudge: Callable[[], None] | None = None

    def tell(self, event: Any) -> None:
        """Have whoever waits hear of something meanwhile; a function is called where it waits."""
        self._told.put(event)
        nudge = self._nudge
        if nudge is not None:
            nudge()

    def finish(self, result: Any = None, error: BaseException | None = None) -> None:
        """Its outcome; a second one is not heard."""
        leave, self._leave = self._leave, None
        if leave is None:
            return
        self._result, self._error = result, error
        self.packet = None
        leave()
        self._done = True
        self.tell(None)  # first, since a waiter may ask for the outcome
        call_all(self._waiters)

    def on_done(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called when it has ended; at once if it has."""
        self._waiters.append(callback)
        if self._done:
            call_all(self._waiters)

    def events(self) -> Generator[Any, None, None]:
        """What is told meanwhile, to its end. Who stops reading stops the call."""
        told = self._told
        try:
            while (event := told.get()) is not None:
                yield event
        except GeneratorExit:
            self.token.cancel()  # and no waiting: it may be a finalizer that closes this
            raise
        except BaseException:
            self.token.cancel()
            gate = OneShot()
            self.on_done(gate.open)
            gate.wait()
            raise

    def wait(self, heard: Callable[[Any], object] = nothing) -> Any:
        """The result, or the call's error, once it has ended.

        An exception that reaches the waiting thread meanwhile (Ctrl-C, a warning that is an error)
        cancels the call, waits for its end, and then goes on.

        Args:
            heard: Gets what the call tells meanwhile, on this thread.
        """
        events = self.events()
        for event in events:
            try:
                event() if callable(event) else heard(event)
            except BaseException as error:
                events.throw(error)
        return self.outcome()

    async def aevents(self) -> AsyncGenerator[Any, None]:
        """What is told meanwhile, on the running event loop."""
        import asyncio

        loop, told = asyncio.get_running_loop(), self._told
        news = asyncio.Event()

        def nudge() -> None:
            with suppress(RuntimeError):  # the loop was closed while we worked
                loop.call_soon_threadsafe(news.set)

        self._nudge = nudge  # first this, then a look at what was told: see `tell`
        try:
            while True:
                try:
                    event = told.get_nowait()
                except queue.Empty:
                    await news.wait()
                    news.clear()
                    continue
                if event is None:
                    return
                yield event
        except BaseException:
            self.token.cancel()
            await patiently(self.on_done, self.token.cancel)
            raise

    async def result(self, heard: Callable[[Any], object] = nothing) -> Any:
        """The same as `wait` on an event loop; a task that is cancelled cancels the call."""
        events = self.aevents()
        async for event in events:
            try:
                event() if callable(event) else heard(event)
            except BaseException as error:
                await events.athrow(error)
        return self.outcome()

    def outcome(self) -> Any:
        """The result, or the error; once, after the end."""
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error, self  # else the error, its traceback and this frame are a cycle
        result, self._result = self._result, None
        return result

    def taken(self) -> tuple[Any, BaseException | None]:
        """The result and the error, once, after the end; nothing is raised.

        For callbacks of `on_done`: what they raise and catch would be a cycle with `finish`.
        """
        found = self._result, self._error
        self._result = self._error = None
        return found
