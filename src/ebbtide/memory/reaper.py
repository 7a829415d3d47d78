"""The one thread that disposes: it drains, cancels, releases, gives back, measures and tells.

Users, finalizers and signal handlers only put wishes on its queue. So disposals go one after
another, the largest first, and the allocator is trimmed once for all that were ready together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import queue
import sys
import threading
import time
import traceback
import types
import warnings
from collections.abc import Callable, Collection

from ebbtide._settings import settings
from ebbtide.cancellation import EbbtideThread, OneShot, check_threads, own_thread
from ebbtide.errors import DisposalError
from ebbtide.lifecycle import (
    Lifecycle,
    Remains,
    Request,
    SleepRequest,
    State,
    on_fork,
)
from ebbtide.memory.allocator import allocator
from ebbtide.memory.ledger import Window, activity
from ebbtide.memory.pins import pinned
from ebbtide.memory.probe import anonymous_bytes
from ebbtide.receipts import DisposalReceipt

GRACE = 10.0
"""Seconds that cancelled calls get to end, before their pipeline's receipt says they have not."""

_WORTH_A_TRIM = 4_000_000
"""Bytes by which the process has to have grown before an idle one is trimmed."""

TOLERANCE_BYTES = 1_000_000
TOLERANCE_SHARE = 0.01
"""What may stay of a pipeline and still be called given back: the larger of the two."""

_FAILED = "the disposal itself failed; the error was reported on the reaper's thread"


@dataclasses.dataclass(slots=True)
class _Draining:
    """A pipeline whose calls are being waited for."""

    deadline: float
    collect: bool
    cancelled: bool = False


@dataclasses.dataclass(slots=True)
class _Released:
    """What came of releasing one pipeline's resources."""

    charged: int
    remains: list[Remains]
    errors: list[BaseException]
    reasons: list[str]


_Message = Request | SleepRequest | Lifecycle | Callable[[], None]


class Reaper:
    """Disposes lifecycles, one batch after another, on a thread of its own.

    Args:
        clock: Seconds, for deadlines; a test gives its own.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.forget()

    def forget(self) -> None:
        """In a forked child: no thread, no wishes."""
        self._queue: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._drowsy: list[SleepRequest] = []
        self._tidy: tuple[float, Window | None] | None = None
        self._is_told = False
        self._when_idle: list[Callable[[], None]] = []
        self._low = 0
        self._draining: dict[Lifecycle, _Draining] = {}
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Have the thread running; called before anything exists that could be disposed.

        Raises:
            LoadError: Greenlets stand for some of this process's threads.
        """
        if self._thread is None:
            check_threads()
            thread = EbbtideThread(target=self._run, name="ebbtide-reaper", daemon=True)
            self._thread = thread
            thread.start()

    def request(self, request: Request | SleepRequest) -> None:
        """Take a wish; return at once. Safe in finalizers and signal handlers."""
        self._queue.put(request)

    def drained(self, lifecycle: Lifecycle) -> None:
        """Hear that the last running call of something being disposed has ended."""
        self._queue.put(lifecycle)

    def ran(self) -> None:
        """Hear that a call has ended; called on a native thread, at each call's end."""
        if not self._is_told and settings.idle_trim is not None:
            self._is_told = True
            self._queue.put(self._tidy_later)

    def when_idle(self, function: Callable[[], None]) -> None:
        """Have ``function`` run once calls have ended and nothing goes on; on a thread of ours."""
        if settings.idle_trim is not None:
            self._when_idle.append(function)

    def _tidy_later(self) -> None:
        if settings.idle_trim is not None:
            self._tidy = (self._clock() + settings.idle_trim, activity.latest)

    def _tidy_up(self, now: float) -> None:
        """Give back what calls left, once nothing has gone on for a while and if it is enough."""
        if self._tidy is None or now < self._tidy[0]:
            return
        _, latest = self._tidy
        self._tidy = None
        if activity.latest is not latest or activity.is_busy:
            self._tidy_later()
            return
        self._is_told = False
        kept, self._when_idle = self._when_idle, []
        for function in kept:
            _guarded(function)
        if kept or anonymous_bytes() - self._low > _WORTH_A_TRIM:
            allocator.trim()
            self._low = anonymous_bytes()

    def later(self, function: Callable[[], None]) -> None:
        """Have ``function`` run between two disposals; return at once."""
        self._queue.put(function)

    def call(self, function: Callable[[], None]) -> None:
        """Run ``function`` between two disposals, and wait for its end.

        On a thread of Ebbtide's own, which must not wait for this one, it runs at once.
        """
        if own_thread.is_own:
            function()
            return
        self.start()
        gate = OneShot()

        def run() -> None:
            try:
                function()
            finally:
                gate.open()

        self.later(run)
        gate.wait()

    def _run(self) -> None:
        _guarded(allocator.trim)  # what its first takes is taken before a load is measured
        while True:
            _guarded(lambda: self._step(self._patience()))

    def _patience(self) -> float | None:
        """Seconds until the next deadline, or None where there is none."""
        deadlines = [one.deadline for one in self._draining.values()]
        deadlines += [one.wish.deadline for one in self._drowsy]
        deadlines += [self._tidy[0]] if self._tidy is not None else []
        return max(0.0, min(deadlines) - self._clock()) if deadlines else None

    def _step(self, patience: float | None) -> None:
        try:
            self._hear(self._queue.get(timeout=patience))
            while True:
                self._hear(self._queue.get_nowait())
        except queue.Empty:
            pass
        now = self._clock()
        for lifecycle, one in self._draining.items():
            if now < one.deadline:
                continue
            if not one.cancelled:
                one.cancelled = True
                one.deadline = now + GRACE
                for token in tuple(lifecycle.running):
                    token.cancel()
        ready = [
            life
            for life, one in self._draining.items()
            if not life.running or (one.cancelled and now >= one.deadline)
        ]
        if ready:
            batch = {life: self._draining.pop(life) for life in ready}
            try:
                self._dispose(batch)
            finally:
                for life in ready:
                    if life.receipt is None:  # what else failed, nobody waits for ever
                        life.finish(_nothing(life, _FAILED), state=State.DISPOSED)
        drowsy, self._drowsy = self._drowsy, []
        for request in drowsy:
            self._have_sleep(request, now)
        self._tidy_up(now)

    def _have_sleep(self, request: SleepRequest, now: float) -> None:
        """Have a pipeline sleep if no call of it runs; else wait for that, or give up."""
        life, receipt = request.wish.lifecycle, None
        life.drowsy = True  # from here on a call that comes in waits for its turn
        try:
            if not life.takes_calls:
                request.answer.give(None)
            elif life.turn.acquire(blocking=False):
                try:
                    if not life.running:
                        receipt = self._send_to_sleep(request)
                finally:
                    life.turn.release()
            if receipt is not None:
                request.answer.give(receipt)
            elif life.takes_calls:
                if now < request.wish.deadline:
                    self._drowsy.append(request)
                else:
                    calls = f"{len(life.running)} calls were running all the time: it stays awake"
                    request.answer.give(_nothing(life, calls))
        except BaseException:
            request.answer.give(_nothing(life, _FAILED))  # whatever failed, nobody waits for ever
            raise
        finally:
            life.drowsy = any(one.wish.lifecycle is life for one in self._drowsy)

    def _send_to_sleep(self, request: SleepRequest) -> DisposalReceipt:
        started = time.perf_counter()
        life = request.wish.lifecycle
        window = activity.begin().measure()
        life.state = State.SLEEPING
        working = _left_by_calls([life], window)
        with allocator.shrinking():
            released = _release(life, working[life], deep=request.deep)
        change, quiet, method = _give_back([released], window, collect=request.wish.collect)
        return _receipt(
            released,
            -change,
            quiet=quiet,
            duration=time.perf_counter() - started,
            method=method,
        )

    def _hear(self, message: _Message) -> None:
        if isinstance(message, Request):
            life = message.lifecycle
            if message.forgotten:
                _warn_forgotten(life)
            if life.receipt is not None:
                return
            known = self._draining.get(life)
            if known is None:
                self._draining[life] = _Draining(message.deadline, message.collect)
            else:
                known.collect = known.collect and message.collect
                if not known.cancelled:
                    known.deadline = min(known.deadline, message.deadline)
        elif isinstance(message, SleepRequest):
            self._drowsy.append(message)
        elif isinstance(message, Lifecycle):
            pass  # it woke us, and is looked at with the others
        else:
            _guarded(message)

    def _dispose(self, batch: dict[Lifecycle, _Draining]) -> None:
        started = time.perf_counter()
        window = activity.begin().measure()
        order = sorted(batch, key=lambda life: life.charged, reverse=True)
        working = _left_by_calls(order, window)
        with allocator.shrinking():
            outcome = {life: _release(life, working[life]) for life in order}
        may_collect = all(one.collect for one in batch.values())
        change, quiet, method = _give_back(outcome.values(), window, collect=may_collect)
        for life, one in outcome.items():
            alone = quiet and len(batch) == 1
            receipt = _receipt(
                one, -change, quiet=alone, duration=time.perf_counter() - started, method=method
            )
            error = None
            if one.errors:
                error = DisposalError(
                    f"Disposing {life.label}: {len(one.errors)} of its releases failed, the others"
                    f" were done. First: {one.errors[0]!r}",
                    errors=tuple(one.errors),
                    receipt=receipt,
                )
            state = State.DISPOSED if life.owner is not None else State.FAILED
            life.finish(receipt, state=state, error=error)


def _give_back(
    outcomes: Collection[_Released], window: Window, *, collect: bool
) -> tuple[int, bool, str]:
    """Give what was freed back to the system: the process's change, whether quiet, and how."""
    method = allocator.trim()
    released = -(window.change() or 0)
    charged = sum(one.charged for one in outcomes)
    remains = [left for one in outcomes for left in one.remains]
    stayed = window.is_quiet and charged - released > _tolerance(charged)
    if collect and (stayed or pinned(remains)):
        gc.collect()
        pinned(remains)  # what the collection let go is freed here, before the trim
        allocator.trim()
        method += ", gc.collect"
    change, quiet = window.close()
    return change, quiet, method


def _left_by_calls(lives: Collection[Lifecycle], window: Window) -> dict[Lifecycle, int]:
    """What calls of pipelines left in the process: what they were charged with, if it is there.

    The allocator gives memory back by itself too, as when another call's top grew beyond its
    threshold, and nobody notices whose that was.
    """
    left = {life: life.working for life in lives}
    if sum(left.values()) > TOLERANCE_BYTES and settings.trim:
        before = window.change() or 0
        allocator.trim()
        given = before - (window.change() or 0)
        for life, working in left.items():
            if working - given > TOLERANCE_BYTES:
                left[life] = max(0, given)
            given -= left[life]
    return left


def _release(life: Lifecycle, working: int, *, deep: bool | None = None) -> _Released:
    """Release everything one pipeline owns, whatever fails on the way.

    Args:
        life: Whose.
        working: Bytes that its calls left.
        deep: For a sleep, whether its tokenizer sleeps too; None to release all for good.
    """
    resources = tuple(life.resources)
    if deep is not None:
        resources = tuple(one for one in resources if deep or one.kind != "tokenizer")
    charged = working + life.cached + sum(one.charge for one in resources)
    result = _Released(charged, [], [], [])
    if life.running and deep is None:  # one that comes to a sleeper waits for its turn
        result.reasons.append(
            f"{len(life.running)} cancelled calls had not ended after {GRACE:.0f} s;"
            " what they hold is freed as they do"
        )
    shared = 0
    for resource in reversed(resources):
        shared = max(shared, resource.shared_with())
        try:
            if deep is None:
                life.resources.remove(resource)
                result.remains += resource.release()
            else:
                result.remains += resource.sleep()
        except Exception as error:  # one failing release must not stop the others
            error.__traceback__ = None
            result.errors.append(error)
    if shared:
        result.reasons.append(f"shared with {shared}")
    if deep is False:
        result.reasons.append("asleep: its tokenizer stays")
    life.working = 0
    return result


def _receipt(
    one: _Released, released: int, *, quiet: bool, duration: float, method: str
) -> DisposalReceipt:
    held = pinned(one.remains)
    reasons = [*one.reasons, *held]
    retained = min(one.charged, max(0, one.charged - released))
    sound = not held and not one.errors
    if quiet:
        verified = sound and retained <= _tolerance(one.charged)
        if sound and not verified:
            reasons.append("bytes stayed in the process, but nothing native of this is alive")
    else:
        verified = sound
        reasons.append("other work overlapped: verified by structure, not by the process's change")
    return DisposalReceipt(
        charged=one.charged,
        released=max(0, released),
        retained=retained,
        quiet=quiet,
        verified=verified,
        duration=duration,
        method=method,
        reasons=tuple(reasons),
    )


def _nothing(life: Lifecycle, reason: str) -> DisposalReceipt:
    """The receipt where nothing came back."""
    return DisposalReceipt(
        charged=life.charged,
        released=0,
        retained=life.charged,
        quiet=False,
        verified=False,
        duration=0.0,
        method="none",
        reasons=(reason,),
    )


def _tolerance(charged: int) -> int:
    return max(TOLERANCE_BYTES, int(charged * TOLERANCE_SHARE))


def _warn_forgotten(life: Lifecycle) -> None:
    file, line = life.site
    text = (
        f"{life.label} was collected without dispose(); it was made at {file}:{line}."
        " Use it in a `with` block, or call dispose()."
    )
    _guarded(lambda: warnings.warn_explicit(text, ResourceWarning, file, line))


def _guarded(function: Callable[[], object]) -> None:
    """Run something that may raise (a user's warning made an error): it is told, and we go on."""
    try:
        function()
    except BaseException as error:
        with contextlib.suppress(BaseException):  # a user's hook may raise as well
            _report(error)


def _report(error: BaseException) -> None:
    if sys.unraisablehook is sys.__unraisablehook__:  # it takes objects of Python's own making only
        traceback.print_exception(error)
        return
    report = types.SimpleNamespace(
        exc_type=type(error),
        exc_value=error,
        exc_traceback=error.__traceback__,
        err_msg="Exception ignored on Ebbtide's reaper thread",
        object=None,
    )
    sys.unraisablehook(report)


reaper = Reaper()
on_fork(reaper.forget)


@dataclasses.dataclass(frozen=True, slots=True)
class Reclaimed:
    """What `reclaim` gave back.

    Attributes:
        before: Anonymous bytes of the process before.
        after: Anonymous bytes after.
        duration: Seconds.
        method: The calls that were used.
    """

    before: int
    after: int
    duration: float
    method: str

    @property
    def released(self) -> int:
        """Bytes given back, 0 or more."""
        return max(0, self.before - self.after)

    def __str__(self) -> str:
        return (
            f"gave back {self.released / 1e6:.1f} MB of {self.before / 1e6:.1f} MB"
            f" in {self.duration * 1e3:.0f} ms ({self.method})"
        )


def reclaim(*, collect: bool = False) -> Reclaimed:
    """Give back to the operating system, now, what no longer holds anything.

    Live pipelines stay as they are; what goes is freed memory that the allocator keeps.

    Args:
        collect: Run a full garbage collection first. It stops every thread for the time it takes.

    Returns:
        The process's anonymous bytes before and after, and how it was done.

    Example:
        >>> reclaim().released >= 0
        True
    """
    found: list[Reclaimed] = []

    def work() -> None:
        started = time.perf_counter()
        before = anonymous_bytes()
        if collect:
            gc.collect()
        method = ("gc.collect, " if collect else "") + allocator.trim()
        found.append(Reclaimed(before, anonymous_bytes(), time.perf_counter() - started, method))

    reaper.call(work)
    return found[0]
