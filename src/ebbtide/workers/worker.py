"""One pipeline's process, over its ends and starts, and the thread that looks after it.

A user's thread sends its call to the child itself, and waits. All else is done by one thread of
Ebbtide's own a worker: it starts the child, hears it, ends it and reaps it. It lives as long as any
child of it, since a child ends with the thread that started it.

A call is sent like this: note it among the child's calls, then look whether the child is still the
one in use. The thread that takes a child out of use does it first and looks at the calls second. So
either the caller sees it, and has its call taken to the next child, or the thread sees the call.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ebbtide.cancellation import CancelToken
from ebbtide.lifecycle import Remains
from ebbtide.memory.reaper import reaper
from ebbtide.receipts import DisposalReceipt
from ebbtide.workers.calls import Call
from ebbtide.workers.channel import ClosedError
from ebbtide.workers.endings import receipt_of
from ebbtide.workers.keeper import IMPATIENCE, Keeper
from ebbtide.workers.messages import call_packet

_LONGEST_END: Final = 20.0
"""Seconds that an end takes at most, by signals and all."""


class Outside:
    """What a pipeline owns whose memory is other processes'."""

    charge: Final = 0
    """What its end gives back of this process's memory: nothing."""

    def shared_with(self) -> int:
        """Nobody else has it."""
        return 0

    def sleep(self) -> Sequence[Remains]:
        """A child sleeps by itself when it is asked."""
        return ()

    def wake(self, token: CancelToken) -> None:
        """A child wakes by itself at a call."""


class Worker(Outside, Keeper):
    """The process of one pipeline, as everybody else sees it; see the module."""

    kind: Final = "worker process"

    # What users' threads do

    def open(self, opening: Call) -> None:
        """Have the first child started; the call ends when its pipeline is loaded."""
        self._opening = opening
        opening.token.attach(self._ring)
        reaper.later(self._begin)

    @property
    def pid(self) -> int | None:
        """The process's number; None where there is none."""
        child = self._child
        return None if child is None else child.pid

    @property
    def pids(self) -> tuple[int, ...]:
        """The numbers of all processes there are."""
        return () if self.pid is None else (self.pid,)

    @property
    def is_there(self) -> bool:
        """Whether it has a process that takes calls."""
        return self._child is not None

    @property
    def is_closing(self) -> bool:
        """Whether it is to end for good."""
        return self._closing

    @property
    def is_over(self) -> bool:
        """Whether it crashed and starts no more."""
        return self._over is not None

    @property
    def under_way(self) -> int:
        """How many calls run in it, and wait for it."""
        child = self._child
        waiting = self._waiting.qsize() + len(self._held)
        return waiting if child is None else waiting + len(child.calls)

    def start(self, call: Call) -> None:
        """As `submit`, for a worker that may never have been opened."""
        self.submit(call)
        if self._thread is None:
            reaper.later(self._begin)

    def put_to_sleep(self, call: Call, options: Mapping[str, Any]) -> None:
        """Have the pipeline sleep; where it has no process, there is nothing to free."""
        if self._child is None and self._own is None:
            reason = "it has no process now, and starts one at the next call"
            call.finish(DisposalReceipt(0, 0, 0, True, True, 0.0, "none", (reason,)))
            return
        call.packet = call_packet(call.number, "sleep", (), options, tells="")
        self.submit(call)

    def submit(self, call: Call) -> None:
        """Have a call run; a child is started where there is none."""
        call.began = time.monotonic()
        child = self._child
        if child is not None and call.packet is not None:
            child.calls[call.number] = call
            if self._child is child:
                try:
                    if child.channel.send(call.packet, wait=False):
                        call.packet = None  # the kernel has it, and what lies beside it
                        call.token.attach(functools.partial(self.cancel, call.number))
                        return
                except ClosedError:
                    pass  # its end is not heard of yet
            if child.calls.pop(call.number, None) is None:
                return  # it was told of the child's end
        self._waiting.put(call)
        call.token.attach(functools.partial(self.cancel, call.number))
        self._ring()

    def cancel(self, number: int) -> None:
        """Stop a call; safe in a signal handler."""
        child = self._child
        if child is None or not child.say("cancel", number):
            self._ring()

    # What the reaper's thread does

    def release(self) -> Sequence[Remains]:
        """End the process, and wait for it."""
        self.close()
        self.join()
        return ()

    def close(self) -> None:
        """Have the process end."""
        self.was_there = self._own is not None
        self._closing = True
        if self._thread is None:
            self._fail_opening(CancelToken(self.plan.label).error())
        self._ring()

    def join(self) -> None:
        """Wait for its end."""
        thread = self._thread
        if thread is None:
            return
        self._gone.wait(_LONGEST_END)
        if thread is not threading.current_thread():
            thread.join(IMPATIENCE)

    def receipt(self, here: DisposalReceipt) -> DisposalReceipt:
        """What a disposal gave back, the process's memory too; ``here`` is what was measured."""
        ended = self.ended
        return here if ended is None else receipt_of(ended, here, now=self.was_there)

    def leak(self) -> None:
        """After a fork, in the child: let go of what would hide the parent's end from it."""
        if self._own is not None:
            self._own.leak()
