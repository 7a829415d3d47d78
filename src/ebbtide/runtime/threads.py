"""The bounded set of threads on which all native code of Ebbtide runs.

Memory that a native run frees stays in the malloc arena of the thread it ran on. Users' threads
come and go and cannot be trimmed (`ebbtide.memory.allocator`), so no native code runs on them: a
call is a job, handed to one of a few threads of ours, and its caller waits. That also bounds how
many runs hold their working memory at once, lets Ctrl-C reach a caller in the middle of a native
run, and gives sync and async callers the same path. The handover costs two wake-ups of a thread: 25
microseconds in a loop, some 100 to 170 where each side has gone to sleep.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import dataclasses
import queue
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Generator, Iterable
from typing import Any, Generic, TypeVar

from ebbtide._settings import settings
from ebbtide.cancellation import (
    CancelToken,
    EbbtideThread,
    OneShot,
    call_all,
    own_thread,
    patiently,
)
from ebbtide.lifecycle import on_fork
from ebbtide.memory import cgroup
from ebbtide.memory.allocator import allocator
from ebbtide.memory.reaper import reaper

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_MOST_THREADS = 8
"""Beyond this, more runs at once give no more throughput and hold more working memory."""


_TIDYING = 0.02
"""Seconds for which idle threads are waited for; one takes a millisecond."""

_MOST_IDLE = 1024
"""As many as there can be threads."""


def cpu_count() -> int:
    """CPUs this process may use, by the cgroup's quota and the affinity mask; at least 1."""
    return cgroup.cpu_count()


@dataclasses.dataclass(frozen=True, slots=True)
class _Failed:
    """What a helper's work raised."""

    error: BaseException


class _Ended:
    """A helper's word that it has done with an item."""


class Job(Generic[ResultT]):
    """One piece of work for a native thread, and its outcome.

    Args:
        function: The work. It runs in a copy of the submitting thread's context.
        token: The way to stop it.
        leave: Called on the native thread as soon as the work has ended, whatever came of it.
    """

    __slots__ = (
        "_context", "_done", "_error", "_function", "_leave", "_result", "_waiters", "token",
    )  # fmt: skip

    def __init__(
        self, function: Callable[[], ResultT], token: CancelToken, leave: Callable[[], None]
    ) -> None:
        self.token = token
        self._context = contextvars.copy_context()
        self._function: Callable[[], ResultT] | None = function
        self._leave: Callable[[], None] | None = leave
        self._result: ResultT | None = None
        self._error: BaseException | None = None
        self._done = False
        self._waiters: list[Callable[[], None]] = []

    def run(self) -> None:
        """Do the work, on the current thread."""
        function, self._function = self._function, None
        leave, self._leave = self._leave, None
        assert function is not None
        assert leave is not None
        outer = own_thread.tokens
        own_thread.tokens = (*outer, self.token)
        try:
            self.token.check()
            self._result = self._context.run(function)
        except BaseException as error:  # handed to the waiting caller
            # A kept exception must not pin what the frames below held: sessions, arrays.
            _clear_frames(error)
            self._error = error
        finally:
            del function
            own_thread.tokens = outer
            leave()
            self._done = True
            call_all(self._waiters)

    def on_done(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called when the job has ended; at once if it has."""
        self._waiters.append(callback)
        if self._done:
            call_all(self._waiters)

    def wait(self) -> ResultT:
        """The result, or the job's error, once it has ended.

        An exception that reaches the waiting thread meanwhile (Ctrl-C) cancels the job, waits for
        the native run's end, and then goes on.
        """
        gate = OneShot()
        try:
            self.on_done(gate.open)
            gate.wait()
        except BaseException:
            self.token.cancel()
            gate.wait()
            raise
        return self._outcome()

    def result(self) -> Awaitable[ResultT]:
        """The same for an event loop; a task that is cancelled cancels the job."""
        return self._aresult()

    async def _aresult(self) -> ResultT:
        try:
            await patiently(self.on_done, self.token.cancel)
        except BaseException:
            self._error = None
            raise
        return self._outcome()

    def _outcome(self) -> ResultT:
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error, self  # else the error, its traceback and this frame are a cycle
        result, self._result = self._result, None
        return result  # type: ignore[return-value]


def _clear_frames(error: BaseException) -> None:
    seen: set[int] = set()
    rest: list[BaseException | None] = [error]
    while rest:
        one = rest.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        rest += [one.__cause__, one.__context__]


class _Crew(Generic[ItemT, ResultT]):
    """Items that several threads work on; used on native threads alone, so it may take a lock."""

    def __init__(self, items: Iterable[ItemT], work: Callable[[ItemT], ResultT]) -> None:
        self._lock = threading.Lock()
        self._items = collections.deque(items)
        self._work: Callable[[ItemT], ResultT] | None = work
        self._told: queue.SimpleQueue[ResultT | _Failed | _Ended] = queue.SimpleQueue()
        self._begun = 0  # by helpers
        self._ended = 0  # as heard of

    @property
    def others(self) -> int:
        """Items that helpers have begun and whose end was not heard of."""
        return self._begun - self._ended

    def take_one(self, *, helps: bool) -> bool:
        """Work on the next item; whether there was one. What fails on a helper fails at the end."""
        with self._lock:
            work = self._work
            if work is None or not self._items:
                return False
            item = self._items.popleft()
            self._begun += helps
        try:
            self._told.put(work(item))
        except BaseException as error:
            if not helps:
                raise
            _clear_frames(error)
            self._told.put(_Failed(error))
            return False
        finally:
            if helps:
                self._told.put(_Ended())
        return True

    def finished(self, *, wait: bool = False) -> Generator[ResultT, None, None]:
        """What has come of items since the last time; with ``wait`` at least one end is awaited."""
        with contextlib.suppress(queue.Empty):
            while True:
                result = self._told.get(block=wait)
                wait = False
                if isinstance(result, _Ended):
                    self._ended += 1
                elif isinstance(result, _Failed):
                    raise result.error
                else:
                    yield result

    def end(self) -> None:
        """Have nothing begun any more, wait for what has been, and let go of the work."""
        with self._lock:
            self._items.clear()
            self._work = None
        while self.others:
            self._ended += isinstance(self._told.get(), _Ended)
        self._told = queue.SimpleQueue()


class NativeThreads:
    """A bounded set of threads that run jobs in the order they come.

    A further thread is started only for a job that finds all others at work, so that who calls from
    one thread at a time has one arena. None ends before the process does.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """In a forked child: there are no threads here."""
        self._queue: queue.SimpleQueue[Job[Any]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._most = 0
        self._idle: collections.deque[None] = collections.deque(maxlen=_MOST_IDLE)

    def _start_one(self) -> None:
        """Start a thread; on the reaper's, since starting one takes locks of Python's."""
        if len(self._threads) < self._most:
            name = f"ebbtide-native-{len(self._threads)}"
            thread = EbbtideThread(target=self._work, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def submit(
        self, function: Callable[[], ResultT], token: CancelToken, leave: Callable[[], None]
    ) -> Job[ResultT]:
        """Hand over a job. On a thread of Ebbtide's own it runs at once, here."""
        if own_thread.is_own:
            job = Job(function, token, leave)
            outer = own_thread.tokens[-1] if own_thread.tokens else None
            if outer is not None:
                outer.attach(token.cancel)
            try:
                job.run()
            finally:
                if outer is not None:
                    outer.detach(token.cancel)
            return job

        return self.queue(function, token, leave)

    def queue(
        self, function: Callable[[], ResultT], token: CancelToken, leave: Callable[[], None]
    ) -> Job[ResultT]:
        """Hand over a job that another thread is to run, whoever asks; do not wait for it here."""

        def ended() -> None:
            leave()
            self._ended()  # before the caller hears, who may have the next job at once

        job = Job(function, token, ended)
        self._put(job)
        return job

    def _put(self, job: Job[Any]) -> None:
        try:
            self._idle.pop()
            idle = True
        except IndexError:
            idle = False
        self._queue.put(job)
        if not self._most:
            self._most = settings.native_threads or min(_MOST_THREADS, max(2, cpu_count()))
            reaper.start()
        if not idle and len(self._threads) < self._most:
            reaper.later(self._start_one)

    def each(
        self,
        items: Iterable[ItemT],
        work: Callable[[ItemT], ResultT],
        token: CancelToken,
        *,
        helpers: int,
    ) -> Generator[ResultT, None, None]:
        """Work on items here, and on other threads as they are free; called on one of these.

        Nobody waits for a thread that is busy elsewhere: this one works too, and at the end waits
        for what others have begun alone. They take one item at a time, after the jobs that wait.

        Args:
            items: What is worked on, each once, about in this order.
            work: What is done with one.
            token: The way to stop it all.
            helpers: How many other threads may work at once.

        Yields:
            What came of each, as it is known.

        Raises:
            Exception: What ``work`` raised first. What others have begun has ended then.
        """
        crew = _Crew(items, work)
        for _ in range(helpers if self._most > 1 else 0):
            self._offer(crew, token)
        try:
            while crew.take_one(helps=False):
                yield from crew.finished()
            while crew.others:
                yield from crew.finished(wait=True)
        finally:
            crew.end()

    def _offer(self, crew: _Crew[Any, Any], token: CancelToken) -> None:
        """Queue a job that works on one item, and then queues itself again."""

        def help_once() -> None:
            if crew.take_one(helps=True):
                self._offer(crew, token)

        self._put(Job(help_once, token, self._ended))

    def tidy(self) -> None:
        """Have the idle threads empty their caches of freed chunks; called on the reaper's.

        What lies there pins pages of what has just been released: 1.3 MB after a tokenizer.
        """
        told = []
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop()
                gate = threading.Event()
                job = Job(allocator.empty_thread_cache, CancelToken("tidying"), self._ended)
                job.on_done(gate.set)
                self._queue.put(job)
                told.append(gate)
        until = time.monotonic() + _TIDYING
        for gate in told:
            gate.wait(max(0.0, until - time.monotonic()))

    def _ended(self) -> None:
        self._idle.append(None)

    def _work(self) -> None:
        own_thread.is_native = True
        identity = threading.get_ident()
        while True:
            job = self._queue.get()
            allocator.hold_ballast(identity)
            with allocator.small_pages():
                job.run()
            del job


native_threads = NativeThreads()
allocator.tell_threads = native_threads.tidy
on_fork(native_threads.forget)
