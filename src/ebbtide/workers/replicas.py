"""Several processes for one pipeline, which look like one worker to everybody else.

A call goes to the process that has the fewest under way; where several have as few, by turns. A
user's thread chooses, and takes no lock: it looks at counts that may be a moment old. What has no
process now (it crashed, or was idle) is passed by as long as any other is there, and is started
again: after a crash by the next call, else once a call finds all others busy.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from ebbtide._settings import settings
from ebbtide.cancellation import CancelToken
from ebbtide.lifecycle import Remains, State
from ebbtide.pipelines.base import PipelineMemory
from ebbtide.receipts import DisposalReceipt
from ebbtide.runtime import SessionOptions, cpu_count
from ebbtide.workers import teller
from ebbtide.workers.calls import Call
from ebbtide.workers.messages import call_packet
from ebbtide.workers.plan import Plan
from ebbtide.workers.worker import Outside, Worker

_OF_EACH: Final = frozenset({"wake", "sleep"})
"""Calls that each process gets, and that none passes on."""

_FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 60.0
"""Seconds before a process that could not be started is tried again, doubled each time."""


def share_of_cpus(given: SessionOptions | Mapping[str, object] | None, count: int) -> Any:
    """Session options whose runs use a share of the CPUs, unless they say how many threads.

    Args:
        given: What the user gave.
        count: Among how many processes the CPUs are shared.

    Example:
        >>> share_of_cpus({"threads": 3}, 2).threads, share_of_cpus(None, 10_000).threads
        (3, 1)
    """
    options = SessionOptions.of(given)
    if options.threads is not None:
        return options
    share = max(1, (settings.threads or cpu_count()) // count)
    return dataclasses.replace(options, threads=share)


class _Replica(Worker):
    """One of several.

    Attributes:
        failures: How often in a row it could not be started.
        rests_until: When, by `time.monotonic`, it may be tried again.
    """

    failures = 0
    rests_until = 0.0


class Replicas(Outside):
    """The processes of one pipeline, in place of a `Worker`.

    Args:
        plan: What each is to be.
        state: Told where the pipeline is in its life: ready where one process is, or asleep.
    """

    kind: Final = "worker processes"

    def __init__(self, plan: Plan, state: Callable[[State], object]) -> None:
        self.plan = plan
        self._state = state
        self._lock = threading.Lock()  # of the workers' threads, for what they say of their states
        self._states = [State.SLEEPING] * plan.isolate.replicas
        self._turns = itertools.count()
        self._facts: dict[str, Any] = {}
        self._receipts: list[Callable[[DisposalReceipt], DisposalReceipt]] = []
        self._waits_for_copy = _prepare_of(plan) == "background"
        later = plan
        if self._waits_for_copy:  # the first answers meanwhile
            later = dataclasses.replace(plan, options={**plan.options, "prepare": "now"})
        self.workers: tuple[_Replica, ...] = tuple(
            _Replica(
                later if number else plan,
                functools.partial(self._is_now, number),
                functools.partial(self._elsewhere, number),
            )
            for number in range(plan.isolate.replicas)
        )

    # What there is

    @property
    def facts(self) -> dict[str, Any]:
        """What its pipeline is: model, device, dtype."""
        return self._facts or next((one.facts for one in self.workers if one.facts), {})

    @property
    def anonymous(self) -> int:
        """Bytes of anonymous memory of all processes."""
        return sum(one.anonymous for one in self.workers)

    @property
    def memory(self) -> PipelineMemory | None:
        """What the pipelines in all processes take; None where there is none."""
        told = [one.memory for one in self.workers]
        found = [one for one in told if one is not None]
        if not found:
            return None
        return PipelineMemory(
            anonymous=sum(one.anonymous for one in found),
            exclusive=sum(one.exclusive for one in found),
            working=sum(one.working for one in found),
            cache=sum(one.cache for one in found),
            quiet=all(one.quiet for one in found),
            holdings=tuple(holding for one in found for holding in one.holdings),
        )

    @property
    def pid(self) -> int | None:
        """The number of the first process that there is; None where there is none."""
        return next(iter(self.pids), None)

    @property
    def pids(self) -> tuple[int, ...]:
        """The numbers of all processes there are."""
        return tuple(pid for one in self.workers for pid in one.pids)

    # What users' threads do

    def open(self, opening: Call) -> None:
        """Have the first process started; the call ends when its pipeline is loaded."""
        self.workers[0].open(opening)
        opening.on_done(self._open_rest)

    def _open_rest(self) -> None:
        """Start the others, once the first has shown that the pipeline can be loaded."""
        first, *rest = self.workers or (None,)
        if first is None or not first.facts or self.plan.isolate.lazy:
            return
        if self._waits_for_copy:  # one waits for it, or makes it; then the rest find it
            second, *rest = rest
            self._start(second, lambda: self._start_all(rest))
        else:
            self._start_all(rest)

    def submit(self, call: Call) -> None:
        """Have a call run in the process that has the fewest under way."""
        if call.what in _OF_EACH:
            self._to_each(call, {}, lambda results: None)
            return
        worker = self._least_busy()
        if worker is None:
            call.finish(error=CancelToken(self.plan.label).error())
            return
        self._start_missing(worker)
        worker.start(call)

    def put_to_sleep(self, call: Call, options: Mapping[str, Any]) -> None:
        """Have the pipeline sleep in each process."""
        self._to_each(call, options, _all_asleep)

    def _least_busy(self) -> _Replica | None:
        """Who is to run a call: of those that are there, else of those that can be."""
        workers = self.workers
        if not workers:
            return None
        turn = next(self._turns) % len(workers)
        order = workers[turn:] + workers[:turn]
        for some in (
            [one for one in order if one.is_there],
            [one for one in order if one.under_way and not one.is_over],  # it is being started
            [one for one in order if not one.is_over],
        ):
            if some:
                return min(some, key=lambda one: one.under_way)
        return order[0]

    def _start_missing(self, chosen: Worker) -> None:
        """Start one that is not there, where it crashed or where all others are busy."""
        if not chosen.is_there:
            return  # it is started itself
        is_busy, now = chosen.under_way > 0, time.monotonic()
        for one in self.workers:
            if one.is_there or one.under_way or one.is_over or now < one.rests_until:
                continue
            if is_busy or one.has_crashed:
                self._start(one)
                return

    def _start(self, worker: _Replica, after: Callable[[], object] = lambda: None) -> None:
        """Have one started, and nobody wait for it."""
        call = self._made("wake", {})

        def ended() -> None:
            _, error = call.taken()
            if worker not in self.workers or worker.is_closing:
                return  # it is being disposed
            if error is None:
                worker.failures = 0
            else:
                why = str(error)
                pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**worker.failures)
                worker.failures += 1
                worker.rests_until = time.monotonic() + pause
                teller.later(
                    lambda: teller.logger.warning("A replica could not be started: %s", why)
                )
            after()

        call.on_done(ended)
        worker.start(call)

    def _start_all(self, workers: Sequence[_Replica]) -> None:
        for one in workers:
            self._start(one)

    def _made(self, name: str, options: Mapping[str, Any]) -> Call:
        call = Call(name, CancelToken(self.plan.label))
        call.packet = call_packet(call.number, name, (), options)
        return call

    def _to_each(
        self, call: Call, options: Mapping[str, Any], result: Callable[[list[Any]], Any]
    ) -> None:
        """Have a call made in each process; it ends when all have."""
        workers = self.workers
        if not workers:
            call.finish(error=CancelToken(self.plan.label).error())
        calls = [self._made(call.what, options) for _ in workers]
        others = list(calls[1:])

        def ended() -> None:
            try:
                others.pop()  # who finds none is the last
            except IndexError:
                _finish(call, calls, result)

        for one, part in zip(workers, calls, strict=True):
            part.on_done(ended)
            call.token.attach(part.token.cancel)
            if call.what == "sleep":
                one.put_to_sleep(part, options)
            else:
                one.start(part)

    # What the workers' threads do

    def _is_now(self, number: int, state: State) -> None:
        with self._lock:
            self._states[number] = state
            self._state(State.READY if State.READY in self._states else State.SLEEPING)

    def _elsewhere(self, number: int, call: Call) -> bool:
        """Give a call, which waits for a process to start, to another that is there."""
        if call.what in _OF_EACH or call.packet is None or call.token.cancelled:
            return False
        others = [one for place, one in enumerate(self.workers) if place != number]
        there = [one for one in others if one.is_there]
        if not there:
            return False
        min(there, key=lambda one: one.under_way).submit(call)
        return True

    # What the reaper's thread does

    def release(self) -> Sequence[Remains]:
        """End all processes, and wait for them."""
        workers = self.workers
        self._facts = self.facts
        for one in workers:
            one.close()
        for one in workers:
            one.join()
        self._receipts = [one.receipt for one in workers if one.ended is not None]
        self.workers = ()
        return ()

    def receipt(self, here: DisposalReceipt) -> DisposalReceipt:
        """What a disposal gave back, summed over all processes, each of which it names."""
        receipts, self._receipts = self._receipts, []
        once = dataclasses.replace(here, reasons=())
        found = [one(once if place else here) for place, one in enumerate(receipts)]
        return _sum(found, [reason for one in found for reason in one.reasons]) if found else here

    def leak(self) -> None:
        """After a fork, in the child: let go of what would hide the parent's end from them."""
        for one in self.workers:
            one.leak()


def _prepare_of(plan: Plan) -> str:
    """What the load does about a prepared copy: ``background``, ``now`` or ``off``."""
    given = plan.options.get("prepare")
    return settings.prepare if given is None else str(given or "off")


def _finish(call: Call, parts: Sequence[Call], result: Callable[[list[Any]], Any]) -> None:
    """End a call that went to each process: with the first error, or all results."""
    found = [one.taken() for one in parts]
    results = [one for one, error in found if error is None]
    errors = [error for _, error in found if error is not None]
    if errors and (call.what == "wake" or not results):
        call.finish(error=errors[0])
    else:
        call.finish(result(results))


def _all_asleep(receipts: list[DisposalReceipt]) -> DisposalReceipt:
    slept = [one for one in receipts if one.charged or not one.verified] or receipts[:1]
    return _sum(slept, dict.fromkeys(reason for one in slept for reason in one.reasons))


def _sum(receipts: Sequence[DisposalReceipt], reasons: Iterable[str]) -> DisposalReceipt:
    """One receipt for several, whose sizes add up."""
    return DisposalReceipt(
        charged=sum(one.charged for one in receipts),
        released=sum(one.released for one in receipts),
        retained=sum(one.retained for one in receipts),
        quiet=all(one.quiet for one in receipts),
        verified=all(one.verified for one in receipts),
        duration=max(one.duration for one in receipts),
        method=", ".join(dict.fromkeys(one.method for one in receipts)),
        reasons=tuple(reasons),
    )
