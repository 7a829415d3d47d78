"""A thread that watches this process's memory, and calls back before the kernel has to act.

It samples at an interval, and at once when the kernel signals that memory runs short. Nothing here
takes a lock: starting is for one thread at a time, `Monitor.stop` and `Monitor.note` are safe
anywhere. Whoever takes the one entry out of ``_watches`` is the one who ends the watch.
"""

from __future__ import annotations

import logging
import math
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from ebbtide.cancellation import EbbtideThread
from ebbtide.errors import InputError
from ebbtide.lifecycle import on_fork
from ebbtide.memory import cgroup
from ebbtide.memory.pressure import (
    LIMIT_SHARE,
    PressureLevel,
    Signal,
    SignalGoneError,
    StallSignal,
    open_signals,
)
from ebbtide.memory.probe import MemorySnapshot, snapshot
from ebbtide.memory.timeline import Sample, Timeline

__all__ = ["Monitor", "PressureEvent", "Reading", "read"]

log = logging.getLogger("ebbtide.memory")

QUIET = 0.1
"""Seconds after a signal in which no other is looked at, so that a storm of them costs little."""
STALLED = 10.0
"""Percent of ten seconds lost to waiting that counts as pressure, where there is no trigger."""

_SAMPLE = "sample"
_SEVERITY: dict[PressureLevel, int] = {"some": 1, "full": 2, "limit": 3}


@dataclass(frozen=True, slots=True)
class PressureEvent:
    """Memory runs short.

    ``level`` is "some" where tasks wait for memory, "full" where all of them do at times, and
    "limit" where no more than 5 % of the limit is left, or the kernel had to refuse or kill.
    ``source`` says who told: "sample", "psi (machine)", "psi (cgroup v2)", "cgroup v2 events" or
    "cgroup v1 pressure level". ``snapshot`` was read right afterwards.
    """

    level: PressureLevel
    source: str
    snapshot: MemorySnapshot


@dataclass(frozen=True, slots=True)
class Reading:
    """What one sample reads: a snapshot, and the tightest cgroup level where one limits."""

    snapshot: MemorySnapshot
    group: cgroup.MemoryLevel | None


def read() -> Reading:
    """Read this process and its cgroup, in about two milliseconds."""
    levels = cgroup.memory_levels()
    return Reading(snapshot(), min(levels, key=lambda level: level.limit, default=None))


@dataclass(frozen=True, slots=True)
class _Told:
    """What a signal, or a sample, says."""

    level: PressureLevel
    source: str
    believed_below: float = 1.0


class _Watch:
    """One running of a monitor: its descriptors, and when it is to sample next."""

    def __init__(self, signals: Sequence[Signal], due: float) -> None:
        self.due = due
        self.quiet_until = -math.inf
        self.signals = {signal.fd: signal for signal in signals}
        self.woken, self._waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._only_stop = select.poll()
        self._only_stop.register(self.woken, select.POLLIN)
        self._all = select.poll()
        self._all.register(self.woken, select.POLLIN)
        for signal in signals:
            self._all.register(signal.fd, signal.mask)
        self.thread: threading.Thread | None = None

    @property
    def has_triggers(self) -> bool:
        return any(isinstance(signal, StallSignal) for signal in self.signals.values())

    def wait(self, seconds: float, *, hear_signals: bool) -> list[tuple[int, int]]:
        poll = self._all if hear_signals else self._only_stop
        return poll.poll(math.ceil(max(0.0, seconds) * 1000))

    def drop(self, signal: Signal) -> None:
        self._all.unregister(signal.fd)
        del self.signals[signal.fd]
        signal.close()

    def end(self) -> None:
        """Tell the thread to end. Once only: afterwards the thread closes the descriptors."""
        os.write(self._waker, b"x")

    def close(self) -> None:
        for signal in self.signals.values():
            signal.close()
        self.signals.clear()
        for fd in (self.woken, self._waker):
            with suppress(OSError):
                os.close(fd)


class Monitor:
    """Watches this process's memory on a daemon thread, from `start` to `stop`.

    In a forked child it has stopped, and may be started again.

    Args:
        interval: Seconds between two samples.
        capacity: How many samples the `timeline` keeps: 80 bytes each.
        on_pressure: Called on the monitor's thread when memory runs short: at each signal of the
            kernel (at most ten a second), and at each sample for as long as the limit is near. Its
            exception is logged. A `dispose` in it returns at once, and is done on another thread.
        sampler: Reads the memory; a test gives its own.
        signals: Opens the kernel's signals, which the monitor closes; a test gives its own.
        clock: Seconds; a test gives its own.

    Raises:
        InputError: The interval is not a number above 0, or the capacity below 1.

    Example:
        >>> with Monitor(interval=1.0) as monitor:
        ...     monitor.note("begun", "the day's work")
        >>> len(monitor.timeline) >= 1
        True
    """

    def __init__(
        self,
        interval: float = 1.0,
        capacity: int = 3600,
        on_pressure: Callable[[PressureEvent], object] | None = None,
        *,
        sampler: Callable[[], Reading] = read,
        signals: Callable[[], Sequence[Signal]] = open_signals,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not isinstance(interval, int | float) or not 0 < interval <= 86_400:
            raise InputError(
                f"interval takes seconds, above 0 and at most a day, not {interval!r}.",
                value=interval,
            )
        self.interval = interval
        self.timeline = Timeline(capacity, clock=clock)
        self._on_pressure = on_pressure
        self._sampler = sampler
        self._open_signals = signals
        self._clock = clock
        self._watches: list[_Watch] = []
        self._last_level: PressureLevel | None = None
        self._has_failed = False

    @property
    def running(self) -> bool:
        """Whether it watches."""
        return bool(self._watches)

    @property
    def sources(self) -> tuple[str, ...]:
        """The signals of the kernel that it hears while it runs; none means sampling only."""
        found = {s.source: None for watch in self._watches for s in tuple(watch.signals.values())}
        return tuple(found)

    def __repr__(self) -> str:
        state = "running" if self.running else "stopped"
        return f"<Monitor {state}: every {self.interval:g} s, {len(self.timeline)} samples>"

    def note(self, kind: str, label: str = "", **facts: object) -> None:
        """Put an event on the timeline; safe on any thread and in signal handlers.

        Args:
            kind: A short word, such as "ready". "pressure", "failed" and "leaked" are drawn red.
            label: To what it happened.
            facts: Whatever else is known of it.
        """
        self.timeline.note(kind, label, **facts)

    def start(self) -> Self:
        """Watch from now on, with a first sample at once; does nothing where it runs already."""
        if not self._watches:
            watch = self._open()
            watch.thread = EbbtideThread(
                target=self._run, args=(watch,), name="ebbtide-monitor", daemon=True
            )
            try:
                watch.thread.start()
            except BaseException:
                self._forget()
                raise
        return self

    def stop(self) -> None:
        """Stop watching, at once; does nothing where it does not run. The timeline stays.

        Waits for a sample or callback that is under way, unless called from that callback.
        """
        try:
            watch = self._watches.pop()
        except IndexError:
            return
        _running.pop(id(self), None)
        watch.end()
        if watch.thread is not None and watch.thread is not threading.current_thread():
            watch.thread.join()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _open(self) -> _Watch:
        signals = self._open_signals()
        try:
            watch = _Watch(signals, self._clock() + self.interval)
        except BaseException:
            for signal in signals:
                signal.close()
            raise
        self._watches.append(watch)
        _running[id(self)] = self
        return watch

    def _run(self, watch: _Watch) -> None:
        try:
            self._look(watch, ())
            while self._turn(watch):
                pass
        finally:
            watch.close()

    def _turn(self, watch: _Watch) -> bool:
        """Wait for a signal or the next sample, and look; False once it is to end."""
        now = self._clock()
        is_quiet = now < watch.quiet_until
        until = min(watch.due, watch.quiet_until) if is_quiet else watch.due
        found = dict(watch.wait(until - now, hear_signals=not is_quiet))
        if watch.woken in found:
            return False
        told: list[_Told] = []
        for fd, mask in found.items():
            signal = watch.signals[fd]
            try:
                level = signal.take(mask)
            except SignalGoneError:
                log.debug("The signal %s is no more.", signal.source)
                watch.drop(signal)
                continue
            if level is not None:
                told.append(_Told(level, signal.source, signal.believed_below))
        now = self._clock()
        if found:
            watch.quiet_until = now + QUIET
        if now >= watch.due:
            # Never two samples to catch up with: a slow callback or a suspended machine skips.
            watch.due = now + self.interval
        elif not found:
            return True
        self._look(watch, told)
        return True

    def _look(self, watch: _Watch, told: Sequence[_Told]) -> None:
        """Take a sample; call back where it, or what the kernel told, means pressure."""
        try:
            reading = self._sampler()
            self.timeline.add(_sample(self.timeline.now(), reading))
        except Exception:
            if not self._has_failed:
                self._has_failed = True
                log.warning("The monitor could not read the memory.", exc_info=True)
            return
        found = reading.snapshot
        left = found.available / max(1, found.limit.bytes)
        by_sample = _pressed(found, left, listen=not watch.has_triggers)
        heard = [one for one in told if left <= one.believed_below]
        if by_sample is not None:
            heard.append(_Told(by_sample, _SAMPLE))
        worst = max(heard, key=lambda one: _SEVERITY[one.level], default=None)
        if worst is not None:
            # A lasting state is called back about at each sample, and noted when it changes.
            if worst.source != _SAMPLE or worst.level != self._last_level:
                self.note("pressure", worst.level, source=worst.source, available=found.available)
            self._call(PressureEvent(worst.level, worst.source, found))
        self._last_level = by_sample

    def _call(self, event: PressureEvent) -> None:
        if self._on_pressure is None:
            return
        try:
            self._on_pressure(event)
        except Exception:
            log.exception("on_pressure failed; the monitor goes on.")

    def _forget(self) -> None:
        """Where no thread runs, as in a forked child: close the descriptors that it would have."""
        _running.pop(id(self), None)
        while self._watches:
            self._watches.pop().close()


def _pressed(found: MemorySnapshot, left: float, *, listen: bool) -> PressureLevel | None:
    """How hard memory is pressed by a sample alone; stalls count only where nobody else tells."""
    if left <= LIMIT_SHARE:
        return "limit"
    if listen and found.pressure is not None:
        if found.pressure.full_avg10 >= STALLED:
            return "full"
        if found.pressure.some_avg10 >= STALLED:
            return "some"
    return None


def _sample(seconds: float, reading: Reading) -> Sample:
    found, group = reading.snapshot, reading.group
    return Sample(
        seconds=seconds,
        anonymous=found.anonymous,
        file_backed=found.file_backed,
        swapped=found.swapped,
        limit=found.limit.bytes,
        available=found.available,
        group_limit=group.limit if group else None,
        group_usage=group.usage if group else None,
        some=found.pressure.some_avg10 if found.pressure else None,
        full=found.pressure.full_avg10 if found.pressure else None,
    )


_running: dict[int, Monitor] = {}


def _forget_all() -> None:
    for monitor in tuple(_running.values()):
        monitor._forget()


on_fork(_forget_all)
