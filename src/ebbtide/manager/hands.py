"""What a desk decides, done: files found, pipelines loaded, woken, put to sleep and disposed.

Nothing here waits. A load runs on a native thread as every load does, a disposal on the reaper's;
each ends in a call of ours there, which posts the outcome to the desk's thread. What may download
runs on threads that end when there is nothing to look for, so that a download holds up no call.
"""

from __future__ import annotations

import collections
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ebbtide import factory
from ebbtide.cancellation import CancelToken, EbbtideThread
from ebbtide.errors import EbbtideError
from ebbtide.lifecycle import Lifecycle
from ebbtide.manager.estimates import Estimates, Known
from ebbtide.manager.slots import Hold, Size, Slot
from ebbtide.models.catalog import LoadEstimate
from ebbtide.pipelines import Pipeline
from ebbtide.runtime import Job, native_threads, version

if TYPE_CHECKING:
    from ebbtide.manager.desk import Desk

MOST_LOOKUPS = 4
"""Models whose files are looked up or downloaded at once."""

PATIENCE = 5.0
"""Seconds that a sleep waits for calls of somebody who has no lease any more."""

OF_A_PROCESS = 36_000_000
"""Anonymous bytes of a process that has no model yet."""

SECONDS_A_BYTE = 2e-9
"""What a load takes where nothing is known: two seconds a gigabyte."""

Post = Callable[[Callable[[], object]], None]


class PipelineHands:
    """The `Hands` of a real manager.

    Args:
        post: Has a function called on the desk's thread.
        estimates: What is known of earlier loads.
    """

    def __init__(self, post: Post, estimates: Estimates) -> None:
        self.desk: Desk
        self._post = post
        self._estimates = estimates
        self._lookups: collections.deque[Slot] = collections.deque()
        self._looking = 0
        self._keys: dict[str, str] = {}
        self._guesses: dict[str, Size] = {}

    def forget(self) -> None:
        """In a forked child: nothing is looked up."""
        self._lookups.clear()
        self._looking = 0

    def forget_slot(self, slot: Slot) -> None:
        """Nothing is known of a slot any more."""
        self._keys.pop(slot.key, None)
        self._guesses.pop(slot.key, None)

    def size_up(self, slot: Slot) -> None:
        """See `Hands`."""
        self._lookups.append(slot)
        if self._looking < MOST_LOOKUPS:
            self._looking += 1
            EbbtideThread(target=self._look_up, name="ebbtide-lookup", daemon=True).start()

    def _look_up(self) -> None:
        while True:
            try:
                slot = self._lookups.popleft()
            except IndexError:
                self._post(self._looked)
                return
            try:
                found = factory.load_estimate(slot.task, slot.model, slot.options)  # type: ignore[arg-type]
            except BaseException as error:
                self._post(partial(self.desk.failed, slot, error.with_traceback(None)))
            else:
                self._post(partial(self._sized, slot, found))

    def _looked(self) -> None:
        self._looking -= 1
        if self._lookups and self._looking < MOST_LOOKUPS:
            self.size_up(self._lookups.popleft())

    def _sized(self, slot: Slot, found: LoadEstimate) -> None:
        key = f"{slot.task} {found.model} {found.content} onnxruntime {version()}"
        options = slot.options.get("session_options")
        key += f" {options}" if options else ""
        self._keys[slot.key] = f"{key} isolated" if slot.is_outside else key
        size = guessed(found, isolated=slot.is_outside)
        self._guesses[slot.key] = size
        seconds = SECONDS_A_BYTE * (size.awake + size.mapped)
        known = self._estimates.of(self._keys[slot.key])
        if known is not None:
            slot.wake_seconds = known.wake_seconds
            seconds = known.reload_seconds
            size = Size(
                known.awake, known.asleep, known.peak, known.mapped, None, found.devices, True
            )
        self.desk.sized(slot, size, seconds)

    def load(self, slot: Slot) -> None:
        """See `Hands`."""
        try:
            load = factory.begin(slot.task, slot.model, slot.options, slot.site)  # type: ignore[arg-type]
        except BaseException as error:
            self._post(partial(self.desk.failed, slot, error.with_traceback(None)))
            return
        slot.loading = load
        load.on_done(lambda: self._post(lambda: self._loaded(slot, load)))

    def stop_load(self, slot: Slot) -> None:
        """See `Hands`."""
        if slot.loading is not None:
            for token in tuple(slot.loading.lifecycle.running):
                token.cancel()

    def _loaded(self, slot: Slot, load: factory.Load) -> None:
        slot.loading = None
        life = load.lifecycle
        try:
            pipe = load.outcome()
        except BaseException as failure:
            error = failure.with_traceback(None)
            life.request(cancel=True)
            life.on_finished(lambda: self._post(lambda: self.desk.failed(slot, error)))
            return
        life.lent = partial(_lent, slot.holds)  # and not the slot, which has the pipeline
        life.on_finished(lambda: self._post(lambda: self._disposed(slot, life)))
        size = self.measured(slot, pipe)
        self.desk.loaded(slot, pipe, size)
        if size.is_measured:
            self._learn(slot, pipe, size)

    def _learn(self, slot: Slot, pipe: Pipeline, size: Size) -> None:
        """Keep what it takes alone: another time it may share nothing."""
        holdings = pipe.memory.holdings
        asleep = sum(one.anonymous for one in holdings if one.kind == "tokenizer")
        awake = sum(one.anonymous for one in holdings)
        if slot.is_outside:
            awake, asleep = size.awake, size.asleep
        known = Known(
            awake,
            asleep,
            awake + size.loading - size.awake,
            size.mapped,
            round(slot.reload_seconds, 4),
            round(slot.wake_seconds, 4),
        )
        self._estimates.learn(self._keys[slot.key], known)

    def _disposed(self, slot: Slot, life: Lifecycle) -> None:
        if slot.pipe is not None and slot.pipe._lifecycle is life:
            self.desk.disposed(slot, life.receipt, life.error)

    def wake(self, slot: Slot) -> None:
        """See `Hands`."""
        pipe = slot.pipe
        life: Lifecycle = pipe._lifecycle
        token = CancelToken(life.label)
        try:
            life.enter(token)
        except EbbtideError as error:
            self._post(partial(self._not_woken, slot, pipe, error.with_traceback(None)))
            return
        job = native_threads.queue(lambda: life.wake(token), token, lambda: life.leave(token))
        job.on_done(lambda: self._post(lambda: self._woken(slot, pipe, job)))

    def _woken(self, slot: Slot, pipe: Pipeline, job: Job[None]) -> None:
        try:
            job.wait()
        except BaseException as failure:
            self._not_woken(slot, pipe, failure.with_traceback(None))
            return
        if slot.pipe is pipe:
            self.desk.woken(slot, self.measured(slot, pipe))

    def _not_woken(self, slot: Slot, pipe: Pipeline, error: BaseException) -> None:
        if slot.pipe is pipe:  # else it is gone, and that was told
            self.desk.failed(slot, error)

    def put_to_sleep(self, slot: Slot) -> None:
        """See `Hands`."""
        life: Lifecycle = slot.pipe._lifecycle
        try:
            answer = life.request_sleep(timeout=PATIENCE, deep=False, collect=True)
        except EbbtideError:
            return  # it is being disposed, and that is told
        answer.on_given(lambda: self._post(lambda: self._slept(slot, life, answer.receipt)))

    def _slept(self, slot: Slot, life: Lifecycle, receipt: Any) -> None:
        if slot.pipe is None or slot.pipe._lifecycle is not life or receipt is None:
            return
        assert slot.size is not None
        asleep = life.state.value == "sleeping"
        self.desk.slept(slot, receipt, slot.size, asleep=asleep)

    def dispose(self, slot: Slot, *, cancel: bool) -> None:
        """See `Hands`; `_disposed` hears of its end, as of any other."""
        slot.pipe._lifecycle.request(cancel=cancel)

    def measured(self, slot: Slot, pipe: Pipeline) -> Size:
        """What a pipeline takes that is awake, as it was measured.

        Where its load overlapped other work, and no load of it was ever alone, the guess counts.
        """
        memory = pipe.memory
        key = self._keys.get(slot.key, "")
        guess, known = self._guesses[slot.key], self._estimates.of(key)
        asleep_alone = known.asleep if known else guess.asleep
        session_alone = (known.awake if known else guess.awake) - asleep_alone
        sessions = tokenizers = mapped = shared = 0
        sure = True
        for one in memory.holdings:
            owners = max(1, one.owners)
            share = one.anonymous // owners
            if one.kind == "tokenizer":
                share = share if one.quiet else asleep_alone // owners
                tokenizers += share
            else:
                sure = sure and (one.quiet or one.source == "prepared")
                sessions += share
            shared += share if owners > 1 else 0
            mapped += one.mapped // owners
        awake, asleep = (sessions if sure else session_alone) + tokenizers, tokenizers
        frees = max(0, awake - shared)
        if slot.is_outside:
            awake = frees = pipe._lifecycle.charged  # all that its process takes
            asleep, sure = max(0, awake - sessions), True
        transient = 0 if mapped else guess.peak - guess.awake
        peak, asleep = awake + transient, min(asleep, awake)
        return Size(awake, asleep, peak, mapped, frees, guess.devices, sure)


def _lent(holds: dict[Hold, None]) -> list[tuple[weakref.ref[Any], str]]:
    """The leases of a pipeline, each with where it was asked for. On any thread."""
    return [(hold.lease, hold.place) for hold in tuple(holds) if hold.lease is not None]


def guessed(found: LoadEstimate, *, isolated: bool) -> Size:
    """What a pipeline takes by its files alone."""
    base = OF_A_PROCESS if isolated else 0
    awake, asleep = base + found.session + found.tokenizer, base + found.tokenizer
    return Size(awake, asleep, base + found.peak, found.mapped, None, found.devices)
