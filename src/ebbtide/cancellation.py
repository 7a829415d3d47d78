"""How one call is stopped from another thread, and how one waits for its end without a lock."""

from __future__ import annotations

import sys
import threading
from _thread import LockType, allocate_lock
from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Final

from ebbtide.errors import LoadError, PipelineCancelledError

if TYPE_CHECKING:
    import asyncio


class CancelToken:
    """One running call's way to be stopped. Every method may be called from any thread.

    Example:
        >>> token = CancelToken("demo")
        >>> token.cancel()
        >>> token.cancelled
        True
    """

    __slots__ = ("__weakref__", "_hooks", "cancelled", "label")

    def __init__(self, label: str) -> None:
        self.label = label
        self.cancelled = False
        self._hooks: list[Callable[[], None]] = []

    def cancel(self) -> None:
        """Stop the call: at its next check, and inside a native run at once."""
        self.cancelled = True
        for hook in tuple(self._hooks):
            hook()

    def attach(self, hook: Callable[[], None]) -> None:
        """Have ``hook`` called on a cancellation; at once if that has happened already."""
        self._hooks.append(hook)
        if self.cancelled:
            hook()

    def detach(self, hook: Callable[[], None]) -> None:
        """Take ``hook`` back."""
        self._hooks.remove(hook)

    def check(self) -> None:
        """Raise `PipelineCancelledError` if the call was cancelled."""
        if self.cancelled:
            raise self.error()

    def error(self) -> PipelineCancelledError:
        """The error that a cancelled call raises."""
        return PipelineCancelledError(
            f"The call on {self.label} was cancelled while it ran.", pipeline=self.label
        )


class OwnThread(threading.local):
    """What a thread of Ebbtide's own knows of itself; a user's, which calls it is letting in."""

    is_own: bool = False
    is_native: bool = False
    """Whether it runs native code, and so has an arena to look after."""
    tokens: tuple[CancelToken, ...] = ()
    """The calls that run on this thread, or that it is just letting in, the outermost first."""

    def may_wait_for(self, calls: Container[CancelToken]) -> bool:
        """Whether this thread may wait for their end: it is a user's, and not inside one itself."""
        return not self.is_own and not any(token in calls for token in self.tokens)


own_thread = OwnThread()


class LettingIn:
    """While a call is noted and handed over.

    A signal handler or a finalizer that interrupts this is inside the call: it cannot begin, and so
    cannot end, before they return. If they raise, nobody waits for it: it is stopped.
    """

    __slots__ = ("_outer", "_token")

    def __init__(self, token: CancelToken) -> None:
        self._token = token
        self._outer = own_thread.tokens

    def __enter__(self) -> None:
        if not own_thread.is_own:  # there the call runs at once, and says so itself
            own_thread.tokens = (*self._outer, self._token)

    def __exit__(self, kind: type[BaseException] | None, *about: object) -> None:
        own_thread.tokens = self._outer
        if kind is not None:
            self._token.cancel()


_OF_THREADS: Final = ("threading", "queue", "select", "subprocess")
"""What gevent replaces, and what has to be of one kind."""

_is_green: Final = threading.get_ident.__module__ != "_thread"
"""Whether greenlets stood for threads already when this was imported."""


def check_threads() -> None:
    """Raise where greenlets stand for some of what this process's threads are made of.

    Raises:
        LoadError: A thread would wait for ever.
    """
    gevent, eventlet = sys.modules.get("gevent.monkey"), sys.modules.get("eventlet.patcher")
    if eventlet is not None and eventlet.is_monkey_patched("thread"):
        raise LoadError(
            "eventlet has replaced this process's threads, and no pipeline can run on its own. Use"
            " real ones: gunicorn's gthread workers, Celery's threads pool.",
            path="",
        )
    if gevent is not None and {gevent.is_module_patched(one) for one in _OF_THREADS} != {_is_green}:
        raise LoadError(
            "gevent has replaced some of what this process's threads are made of, or all of it but"
            " only once Ebbtide was imported. Call gevent.monkey.patch_all(), with no options,"
            " before anything else is imported: for gunicorn, at the top of gunicorn.conf.py.",
            path="",
        )


class EbbtideThread(threading.Thread):
    """A thread of Ebbtide's own, which knows that it is one before any other code runs on it.

    A garbage collection while it starts could run a finalizer of a user's there, whose dispose
    would otherwise wait for the reaper, while the reaper waits for the thread to have started.
    """

    def _bootstrap(self) -> None:
        own_thread.is_own = True
        super()._bootstrap()  # type: ignore[misc]


class OneShot:
    """A gate that opens once: the lock is only ever waited on, never held around any code."""

    __slots__ = ("_is_open", "_lock")

    def __init__(self) -> None:
        self._is_open = False
        self._lock: LockType = allocate_lock()
        self._lock.acquire()

    def open(self) -> None:
        """Let the waiter through."""
        self._is_open = True
        try:
            self._lock.release()
        except RuntimeError:
            return  # open already

    def wait(self, seconds: float = -1) -> None:
        """Wait until it is open, at most so long; a signal's exception comes through."""
        if not self._is_open and self._lock.acquire(timeout=seconds):
            self._lock.release()  # a signal may come before this: who waits again is let through


async def patiently(
    subscribe: Callable[[Callable[[], None]], None], cancel: Callable[[], None]
) -> None:
    """Wait for the callback ``subscribe`` gets, on an event loop, and through a cancellation.

    Args:
        subscribe: As for `told`.
        cancel: Called when the task is cancelled meanwhile, to make the end come soon.

    Raises:
        asyncio.CancelledError: The task was cancelled; what was waited for has ended all the same.
    """
    done = told(subscribe)  # a future and no task: who cancels all tasks cannot cut it short
    import asyncio

    cancelled: asyncio.CancelledError | None = None
    while not done.done():
        try:
            await asyncio.shield(done)
        except asyncio.CancelledError as error:
            cancelled = error
            cancel()
    if cancelled is not None:
        raise cancelled


def call_all(callbacks: list[Callable[[], None]]) -> None:
    """Take out each callback and call it; each is called once, whoever else does this too."""
    while True:
        try:
            callback = callbacks.pop(0)  # in the order they came: exit waits for the last
        except IndexError:
            return
        callback()


def told(subscribe: Callable[[Callable[[], None]], None]) -> asyncio.Future[None]:
    """A future of the running event loop, done once the callback ``subscribe`` gets is called."""
    import asyncio

    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not future.done():
            future.set_result(None)

    def call() -> None:
        try:
            loop.call_soon_threadsafe(wake)
        except RuntimeError:
            return  # the loop was closed while we worked: nobody waits any more

    subscribe(call)
    return future
