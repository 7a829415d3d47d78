"""The thread that looks after one pipeline's process: it starts, hears, ends and reaps it.

It lives as long as any child of it, since a child ends with the thread that started it. It takes a
child out of use first and looks at its calls second; see `ebbtide.workers.worker`.
"""

from __future__ import annotations

import contextlib
import queue
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final

from ebbtide.cancellation import CancelToken, EbbtideThread
from ebbtide.errors import LoadError, WorkerCrashedError
from ebbtide.lifecycle import State
from ebbtide.pipelines.base import PipelineMemory
from ebbtide.receipts import DisposalReceipt
from ebbtide.workers import teller
from ebbtide.workers.bell import Bell
from ebbtide.workers.calls import Call
from ebbtide.workers.channel import ClosedError
from ebbtide.workers.codec import BrokenMessageError
from ebbtide.workers.endings import (
    Ended,
    again,
    busy_again,
    crashed,
    out_of_memory,
    recycled,
    stayed,
)
from ebbtide.workers.forking import fork_server
from ebbtide.workers.limits import Room
from ebbtide.workers.messages import read
from ebbtide.workers.plan import Plan
from ebbtide.workers.process import AT_ONCE, Child, load_request, spawn

PATIENCE: Final = 5.0
"""Seconds that a child gets to dispose its pipeline and to end, before it is asked by a signal."""

IMPATIENCE: Final = 0.5
"""The same for one whose calls did not end when they were cancelled, and after the signal."""

_READS: Final = 16
"""How often what a child prints is read before its messages are heard again."""


class Keeper:
    """The process of one pipeline, as its thread sees it.

    Args:
        plan: What the child is to be.
        state: Told where the pipeline is in its life: ready or asleep.
        elsewhere: Takes a call that no child has yet, if another worker can run it now.

    Attributes:
        anonymous: Bytes of anonymous memory of the process, as it said last; 0 where there is none.
        memory: What its pipeline takes, as it said last.
        facts: What its pipeline is: model, device, dtype.
        ended: How its last child came to its end.
        was_there: Whether there was a child when the worker was released.
        has_crashed: Whether its last child was in use, and ended unasked.
    """

    def __init__(
        self,
        plan: Plan,
        state: Callable[[State], object],
        elsewhere: Callable[[Call], bool] = lambda call: False,
    ) -> None:
        self.plan = plan
        self.has_crashed = False
        self.anonymous = 0
        self.memory: PipelineMemory | None = None
        self.facts: dict[str, Any] = {}
        self.ended: Ended | None = None
        self.was_there = False
        self._state = state
        self._elsewhere = elsewhere
        self._waiting: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self._held: deque[Call] = deque()
        self._bell: Bell | None = Bell()
        self._poll = select.poll()
        self._child: Child | None = None
        """The child that takes calls."""
        self._own: Child | None = None
        """The one that there is, whatever it does."""
        self._room: Room | None = None
        self._opening: Call | None = None
        self._closing = False
        self._deadline: float | None = None
        self._receipt: DisposalReceipt | None = None
        self._trouble = ""
        self._thread: threading.Thread | None = None
        self._gone = threading.Event()
        self._over: WorkerCrashedError | None = None

    def _ring(self) -> None:
        """Have the thread look at what is wished for."""
        bell = self._bell
        if bell is not None:
            bell.ring()

    def _begin(self) -> None:
        """Start the thread; on the reaper's, since starting one takes locks of Python's."""
        if self._thread is not None:
            return
        if self._closing:
            self._take_waiting()
            self._fail_held(CancelToken(self.plan.label).error())
            return
        thread = EbbtideThread(target=self._run, name="ebbtide-worker", daemon=True)
        try:
            self._thread = thread
            thread.start()
        except RuntimeError as error:  # the system has no room for a thread
            self._thread = None
            failure = LoadError(f"{self.plan.label}: {error}.", path="")
            self._fail_opening(failure)
            self._take_waiting()
            self._fail_held(failure)

    def _run(self) -> None:
        try:
            bell = self._bell
            assert bell is not None
            self._poll.register(bell.fileno(), select.POLLIN)
            self._boot()
            while not (self._closing and self._own is None):
                self._turn(bell)
        finally:
            if self._own is not None:  # only where something here is wrong
                self._own.signal(signal.SIGKILL)
                self._own.reap()
                self._own.close()
            error = CancelToken(self.plan.label).error
            self._fail_opening(error())
            self._take_waiting()
            while self._held:
                self._held.popleft().finish(error=error())
            self._bell = None  # who keeps a disposed pipeline keeps no descriptor
            self._gone.set()

    def _boot(self) -> None:
        """Start a child, and have it load."""
        room = Room(self.plan.isolate.limit)
        try:
            child = _started(self.plan)
        except (OSError, RuntimeError) as error:  # no room for a process, or for a thread
            room.close()
            why = getattr(error, "strerror", None) or str(error)
            failure = LoadError(
                f"The worker process of {self.plan.label} cannot be started: {why}.", path=""
            )
            self._fail_opening(failure)
            self._fail_held(failure)
            return
        room.let_in(child.pid)
        self._own, self._room = child, room
        self._receipt, self._trouble = None, ""
        for file in (child.channel.fileno(), child.printed, child.pidfd):
            self._poll.register(file, select.POLLIN)
        child.go()
        plan = self.plan
        child.say("load", load_request(plan.loader, plan.arguments, plan.options, room.rlimit))

    def _turn(self, bell: Bell) -> None:
        """Wait for something to happen, and look at all that has."""
        patience = self._patience()
        happened = self._poll.poll(None if patience is None else max(0.0, patience) * 1000)
        child = self._own
        if child is not None:
            self._hear_one(child)
            for file, _ in happened:
                if file == child.printed:
                    self._hear_printed(child)
                elif file == child.pidfd:
                    self._has_ended(child)
                    child = None
                    break
        if any(file == bell.fileno() for file, _ in happened):
            bell.hear()
            self._take_waiting()
            self._drop_cancelled()
        if child is None:
            self._start_again()
        elif self._closing and not child.ending:
            self._end(child)
        elif child is self._child and child.is_heard:
            if self._held:
                self._send_held(child)
            self._look_at_idle(child)
        self._look_at_deadline()

    def _start_again(self) -> None:
        """Start a child for calls that wait for one, and that no other worker can run now."""
        self._held = deque(call for call in self._held if not self._elsewhere(call))
        if self._over is not None:
            self._fail_held(self._over)
        if self._held and not self._closing:
            self._boot()

    def _patience(self) -> float | None:
        """Seconds until something is due by itself."""
        now = time.monotonic()
        child = self._own
        idle = None if child is None else self._idle_of(child)
        if self._deadline is not None:
            return self._deadline - now
        if child is not None and child.ready and idle is not None and not child.calls:
            return child.used + idle - now
        return None

    def _take_waiting(self) -> None:
        try:
            while True:
                self._held.append(self._waiting.get_nowait())
        except queue.Empty:
            return

    def _drop_cancelled(self) -> None:
        """End calls that were cancelled before any child had them, and a load."""
        if any(call.token.cancelled for call in self._held):
            held, self._held = self._held, deque()
            for call in held:
                if call.token.cancelled:
                    call.finish(error=call.token.error())
                else:
                    self._held.append(call)
        opening = self._opening
        if opening is not None and opening.token.cancelled:
            self._closing = True

    def _send_held(self, child: Child) -> None:
        """Send what waited for a child, or for room."""
        while self._held:
            call = self._held[0]
            if call.packet is None:
                self._held.popleft()
                continue
            child.calls[call.number] = call
            try:
                if not child.channel.send(call.packet, wait=False):
                    child.calls.pop(call.number, None)
                    self._poll.modify(child.channel.fileno(), select.POLLIN | select.POLLOUT)
                    return
            except ClosedError:
                child.calls.pop(call.number, None)
                return  # its end is about to be heard of
            self._held.popleft().packet = None
            if call.token.cancelled:
                child.say("cancel", call.number)
        self._poll.modify(child.channel.fileno(), select.POLLIN)

    def _idle_of(self, child: Child) -> float | None:
        """Seconds without a call after which a child ends."""
        return self.plan.isolate.idle if child.stayed is None else 0.0

    def _look_at_idle(self, child: Child) -> None:
        idle = self._idle_of(child)
        if child.stayed is not None and (child.calls or self._held):
            call, receipt = child.stayed
            call.finish(busy_again(receipt))
        if idle is None or child.calls or self._held or time.monotonic() < child.used + idle:
            return
        self._child = None  # from here on callers wait for the next one
        if child.calls:
            self._child = child
            return
        self._end(child)

    def _end(self, child: Child) -> None:
        """Have a child dispose its pipeline and end; in time, or by a signal."""
        self._child = None
        child.ending = True
        patience = IMPATIENCE if child.calls else PATIENCE
        if not child.ready:
            self._kill(child, "its pipeline was still being loaded")
        elif not child.say("dispose"):
            self._kill(child, "it did not read what it was sent")
        self._deadline = time.monotonic() + patience

    def _kill(self, child: Child, trouble: str) -> None:
        self._trouble = trouble
        child.signal(signal.SIGKILL)

    def _look_at_deadline(self) -> None:
        child = self._own
        if child is None or self._deadline is None or time.monotonic() < self._deadline:
            return
        child.signal(signal.SIGKILL if child.killed else signal.SIGTERM)
        self._deadline = time.monotonic() + IMPATIENCE

    def _hear_printed(self, child: Child) -> None:
        file = child.printed
        for _ in range(_READS if file >= 0 else 0):
            found = child.read_printed()
            if found:
                teller.printed(self.plan.label, found)
            if len(found) < AT_ONCE:
                break
        if file >= 0 > child.printed:
            self._poll.unregister(file)

    def _hear_one(self, child: Child) -> bool:
        """Take a message from a child; False where there is none."""
        if not child.is_heard:
            return False
        try:
            found = child.channel.receive(wait=False)
            if found is None:
                return False
            kind, *rest = read(*found)
            _HEARD[kind](self, child, *rest)
        except ClosedError:
            self._close_ears(child)
        except (BrokenMessageError, LookupError, TypeError, ValueError) as error:
            self._close_ears(child)
            self._kill(child, f"it said what is no message of ours ({error})")
        return child.is_heard

    def _close_ears(self, child: Child) -> None:
        child.is_heard = False
        self._poll.unregister(child.channel.fileno())
        if self._deadline is None:  # it is about to end, or is stuck
            self._deadline = time.monotonic() + IMPATIENCE

    def _loaded(
        self, child: Child, facts: dict[str, Any], memory: PipelineMemory, anonymous: int
    ) -> None:
        self.facts, self.memory, self.anonymous = facts, memory, anonymous
        child.ready, child.used = True, time.monotonic()
        if not self._closing:
            self._child = child  # first: whoever waits for the load may call at once
        opening, self._opening = self._opening, None
        if opening is not None:
            opening.finish(self)
        else:
            self._state(State.READY)

    def _not_loaded(self, child: Child, error: BaseException, memory: bool) -> None:
        error = out_of_memory(self.plan, error) if memory else error
        child.ending = True
        self._trouble = "its pipeline was not loaded"
        if self._opening is not None:
            self._closing = True
            self._fail_opening(error)
        self._fail_held(error)

    def _done(self, child: Child, number: int, result: Any, anonymous: int, state: str) -> None:
        call = self._answered(child, number, anonymous, state)
        if call is None:
            return
        slept = isinstance(result, DisposalReceipt) and state == State.SLEEPING.value
        if slept and not child.ending and stayed(result):
            child.stayed = call, result  # its end is what gives the memory back
        else:
            call.finish(result)

    def _failed(
        self,
        child: Child,
        number: int,
        error: BaseException,
        anonymous: int,
        state: str,
        memory: bool,
    ) -> None:
        call = self._answered(child, number, anonymous, state)
        if call is not None:
            call.finish(error=out_of_memory(self.plan, error) if memory else error)

    def _answered(self, child: Child, number: int, anonymous: int, state: str) -> Call | None:
        self.anonymous = anonymous
        child.used = time.monotonic()
        self._state(State(state))
        return child.calls.pop(number, None)

    def _told(self, child: Child, number: int, event: Any) -> None:
        call = child.calls.get(number) or self._opening
        if call is not None:
            call.tell(event)

    def _logged(self, child: Child, number: int, fields: dict[str, Any]) -> None:
        self._aloud(child, number, teller.log(fields))

    def _warned(
        self, child: Child, number: int, category: str, text: str, file: str, line: int
    ) -> None:
        self._aloud(child, number, teller.warning(category, text, file, line))

    def _aloud(self, child: Child, number: int, function: Callable[[], object]) -> None:
        """Have it said where the call is waited for, or else on a thread that may wait."""
        call = child.calls.get(number) or self._opening
        if call is not None:
            call.tell(function)
        else:
            teller.later(function)

    def _measured(self, child: Child, memory: PipelineMemory, anonymous: int, state: str) -> None:
        self.memory, self.anonymous = memory, anonymous
        self._state(State(state))

    def _disposed(self, child: Child, receipt: DisposalReceipt | None, trouble: str) -> None:
        self._receipt, self._trouble = receipt, trouble

    # The end of a child

    def _has_ended(self, child: Child) -> None:
        """A child is gone: hear its last words, reap it, and tell whoever waited for it."""
        self._child = None
        while self._hear_one(child):
            pass
        self._hear_printed(child)
        for file in (child.printed, child.pidfd):
            if file >= 0:
                self._poll.unregister(file)
        if child.is_heard:
            self._poll.unregister(child.channel.fileno())
        status = child.reap()
        room, self._room = self._room, None
        overrun = room is not None and room.was_overrun(status, child.tail)
        child.close()
        self.ended = Ended(
            child.pid, status, self._receipt, self._trouble, child.killed, self.anonymous
        )
        self._own, self._deadline, self.anonymous, self.memory = None, None, 0, None
        if child.stayed is not None:
            call, slept = child.stayed
            call.finish(recycled(slept, self.ended))
        self.has_crashed = child.ready and not child.ending
        calls = _taken(child)
        error = crashed(self.plan, self.ended, calls, child, overrun=overrun)
        if not child.ending:
            teller.crashed(error)
            if self.plan.isolate.restart == "never":
                self._over = error
        if self._opening is not None:
            self._closing = True
            token = self._opening.token
            self._fail_opening(token.error() if token.cancelled else error)
        else:
            self._state(State.SLEEPING)
            if not child.ready:
                self._fail_held(error)  # else it would be started and end for ever
        for call in calls:
            call.finish(error=call.token.error() if call.token.cancelled else again(error))
        if room is not None:
            room.close()

    def _fail_opening(self, error: BaseException) -> None:
        opening, self._opening = self._opening, None
        if opening is not None:
            opening.finish(error=error)

    def _fail_held(self, error: BaseException) -> None:
        while self._held:
            self._held.popleft().finish(error=again(error))


def _taken(child: Child) -> list[Call]:
    """The calls of a child that is out of use; a caller may be faster, and takes its own away."""
    calls = []
    with contextlib.suppress(KeyError):
        while True:
            calls.append(child.calls.popitem()[1])
    return calls


def _started(plan: Plan) -> Child:
    """A child that waits for its first message; its parent is this thread, or a fork server."""
    return spawn() if plan.isolate.start == "spawn" else fork_server.fork(plan.loader)


_HEARD: Final[Mapping[str, Callable[..., None]]] = {
    "loaded": Keeper._loaded,
    "not loaded": Keeper._not_loaded,
    "done": Keeper._done,
    "failed": Keeper._failed,
    "told": Keeper._told,
    "logged": Keeper._logged,
    "warned": Keeper._warned,
    "measured": Keeper._measured,
    "disposed": Keeper._disposed,
}
"""What a child may say."""
