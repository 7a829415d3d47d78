"""A manager's figures and spans for OpenTelemetry, by its API alone.

Figures are read from the manager when an exporter asks for them. Durations, bytes that came back
and spans are told of as they happen, on the manager's thread for events.
"""

from __future__ import annotations

import collections
import dataclasses
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from types import TracebackType
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import ebbtide
from ebbtide.errors import MissingExtraError
from ebbtide.integrations.exported import BUCKETS, Exported, Exports
from ebbtide.receipts import DisposalReceipt

try:
    from opentelemetry import metrics, trace
    from opentelemetry.context import Context
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
    from opentelemetry.trace import Span, SpanContext, Status, StatusCode, TracerProvider
except ImportError as error:
    raise MissingExtraError(
        "Metrics and spans for OpenTelemetry need opentelemetry-api, which is not installed:"
        " pip install 'ebbtide[opentelemetry]'",
        extra="opentelemetry",
    ) from error

if TYPE_CHECKING:
    from ebbtide.manager import (
        Lease,
        ManagerEvent,
        ManagerStatus,
        PipelineManager,
    )

PipelineT = TypeVar("PipelineT")

FRESH = 0.1
"""Seconds for which one look at a manager serves all of its metrics."""

MOST_WAITS = 1000
"""Traced leases of one pipeline that are remembered, to be the parents of its load."""

MANAGER: Final = "ebbtide.manager"
PIPELINE: Final = "ebbtide.pipeline"

_GAUGES = (
    ("budget", "ebbtide.memory.budget", "By", "Anonymous memory the whole process may hold."),
    ("floor", "ebbtide.memory.floor", "By", "Anonymous memory beside pipelines and calls."),
    ("pipelines", "ebbtide.memory.pipelines", "By", "Anonymous memory charged to pipelines."),
    ("workspace", "ebbtide.memory.workspace", "By", "Anonymous memory kept for calls."),
    ("free", "ebbtide.memory.free", "By", "Anonymous memory a load may take."),
    ("measured", "ebbtide.memory.measured", "By", "Anonymous memory the process holds."),
    ("mapped", "ebbtide.memory.mapped", "By", "Prepared files mapped, beside the budget."),
    ("waiting", "ebbtide.waiting", "{request}", "Requests that wait for a pipeline."),
)
"""Fields of `ManagerStatus`, and their metrics."""

_COUNTERS = (
    ("loading", "ebbtide.loads", "{load}", "Loads that were begun."),
    ("waking", "ebbtide.wakes", "{wake}", "Sleeping pipelines that were begun to be woken."),
    ("sleeping", "ebbtide.sleeps", "{sleep}", "Pipelines that were put to sleep."),
    ("evicting", "ebbtide.evictions", "{eviction}", "Disposals that the manager began."),
    ("disposed", "ebbtide.disposals", "{disposal}", "Disposals that ended, whoever began them."),
    ("failed", "ebbtide.failures", "{failure}", "Lookups, loads and wakes that failed."),
    ("leaked", "ebbtide.leaked_leases", "{lease}", "Leases collected without being returned."),
    ("pressure", "ebbtide.pressure_signals", "{signal}", "Times the kernel told of pressure."),
)
"""Kinds of events, and the metrics of how many there were."""

_EACH = (
    ("anonymous", "ebbtide.pipeline.memory", "By", "Anonymous memory charged to it."),
    ("mapped", "ebbtide.pipeline.mapped", "By", "Prepared files it maps."),
    ("leases", "ebbtide.pipeline.leases", "{lease}", "Leases of it that are held."),
)
"""Fields of `PipelineStatus`, and their metrics."""


@dataclasses.dataclass(eq=False, slots=True)
class _Wait:
    """A traced lease that is waited for: who could be the parent of a load meanwhile."""

    context: SpanContext
    since: int
    until: int | None = None


@dataclasses.dataclass(slots=True)
class _Begun:
    """A load, wake or disposal that goes on."""

    span: Span
    kind: str
    at: int
    parent: _Wait | None = None


class Observed(Exported):
    """A manager that is observed, until `cancel`; made by `observe`.

    As a context manager it is cancelled at the end. A manager that is closed or collected is not
    observed any more.

    Attributes:
        name: The value of the attribute ``ebbtide.manager``.
    """

    function = "observe"
    kinds = ("loading", "waking", "ready", "failed", "sleeping", "evicting", "disposed")

    def __init__(
        self,
        manager: PipelineManager,
        name: str,
        most: int,
        instruments: _Instruments,
        tracers: TracerProvider | None,
    ) -> None:
        super().__init__(manager, name, most)
        self._instruments = instruments
        self._tracer = trace.get_tracer("ebbtide", ebbtide.__version__, tracers)

    def _forget(self) -> None:
        self._status: tuple[float, ManagerStatus] | None = None
        self._begun: dict[str, _Begun] = {}
        self._waits: dict[str, collections.deque[_Wait]] = {}

    def traced(self, lease: Lease[PipelineT]) -> TracedLease[PipelineT]:
        """A lease whose wait is a span, ``ebbtide.acquire``, of the trace it is asked for in.

        A load that it waits for becomes its child. The span ends where the block begins.

        Args:
            lease: What `PipelineManager.acquire` gave; not held yet.

        Example:
            >>> with ebbtide.PipelineManager(budget="1 GiB") as manager:
            ...     seen = observe(manager)
            ...     model = "tests/models/tiny-bert"
            ...     with seen.traced(manager.acquire("feature-extraction", model)) as embed:
            ...         embed("the tide goes out", pooling="mean").shape
            (1, 32)
        """
        return TracedLease(self, lease)

    def cancel(self) -> None:
        """Observe it no more; a second time does nothing."""
        super().cancel()
        for key in tuple(self._begun):
            begun = self._begun.pop(key, None)
            if begun is not None:
                begun.span.end()

    def status(self) -> ManagerStatus | None:
        """What there is, looked at just now; None where there is nothing to observe any more."""
        manager = self.there()
        if manager is None:
            return None
        seen, now = self._status, time.monotonic()
        if seen is None or now - seen[0] >= FRESH:
            self._status = seen = (now, manager.status())
        return seen[1]

    # Spans and sums, on the manager's thread for events

    def _hear(self, event: ManagerEvent) -> None:
        kind, key, facts = event.kind, event.pipeline, event.facts
        now, receipt = int(event.time * 1e9), facts.get("receipt")
        if kind in ("loading", "waking"):
            self._load_begins(key, "load" if kind == "loading" else "wake", now, facts)
        elif kind == "ready":
            self._load_ends(key, now, facts)
        elif kind == "evicting":
            self._begun[key] = _Begun(self._span("dispose", key, now), "dispose", now)
        elif kind == "failed":
            self._fails(key, str(facts.get("error", "")).partition(":")[0], now)
        elif isinstance(receipt, DisposalReceipt):
            self._gives_back(key, "sleep" if kind == "sleeping" else "dispose", receipt, now)
        else:
            self._fails(key, "DisposalError", now)

    def _span(self, kind: str, key: str, at: int, parent: SpanContext | None = None) -> Span:
        context = Context()
        if parent is not None:
            context = trace.set_span_in_context(trace.NonRecordingSpan(parent), context)
        about = {MANAGER: self.name, PIPELINE: key}
        return self._tracer.start_span(f"ebbtide.{kind}", context, start_time=at, attributes=about)

    def _load_begins(self, key: str, kind: str, now: int, facts: Mapping[str, object]) -> None:
        parent = next(self._waiting(key, now, now), None)
        span = self._span(kind, key, now, parent.context if parent else None)
        _set_bytes(span, "ebbtide.memory.reserved", facts.get("bytes"))
        self._begun[key] = _Begun(span, kind, now, parent)

    def _load_ends(self, key: str, now: int, facts: Mapping[str, object]) -> None:
        begun, seconds = self._begun.pop(key, None), facts.get("seconds")
        if isinstance(seconds, float | int):
            how = {MANAGER: self.name, "ebbtide.load.kind": begun.kind if begun else "load"}
            self._instruments.durations.record(seconds, how)
        if begun is not None:
            for wait in self._waiting(key, begun.at, now):
                if wait is not begun.parent:
                    begun.span.add_link(wait.context)
            _set_bytes(begun.span, "ebbtide.memory.charged", facts.get("bytes"))
            begun.span.end(now)
        waits = self._waits.get(key)
        while waits and waits[0].until is not None:
            waits.popleft()

    def _fails(self, key: str, error: str, now: int) -> None:
        begun = self._begun.pop(key, None)
        if begun is not None:
            _set_error(begun.span, error)
            begun.span.end(now)

    def _gives_back(self, key: str, kind: str, receipt: DisposalReceipt, now: int) -> None:
        begun = self._begun.pop(key, None)
        span = begun.span if begun and begun.kind == kind else None
        if span is None:  # what began is not told: a sleep, and a disposal that a user began
            span = self._span(kind, key, now - int(receipt.duration * 1e9))
        for fact in ("charged", "released", "retained"):
            _set_bytes(span, f"ebbtide.memory.{fact}", getattr(receipt, fact))
        span.set_attribute("ebbtide.receipt.verified", receipt.verified)
        span.end(now)
        about = {MANAGER: self.name}
        instruments = self._instruments
        by = "sleep" if kind == "sleep" else "disposal"
        instruments.released.add(max(0, receipt.released), {**about, "ebbtide.released.by": by})
        if kind == "dispose":
            instruments.retained.add(receipt.retained, about)
            instruments.unverified.add(int(not receipt.verified), about)

    # Who waits

    def _waiting(self, key: str, since: int, until: int) -> Iterator[_Wait]:
        """The traced leases that were waited for between two moments, the eldest first."""
        for wait in tuple(self._waits.get(key, ())):
            if wait.since <= until and (wait.until is None or wait.until >= since):
                yield wait

    @contextmanager
    def _acquiring(self, key: str) -> Iterator[None]:
        self.there()
        about = {MANAGER: self.name, PIPELINE: key}
        span = self._tracer.start_span("ebbtide.acquire", attributes=about)
        wait = _Wait(span.get_span_context(), time.time_ns())
        if wait.context.is_valid:
            self._waits.setdefault(key, collections.deque(maxlen=MOST_WAITS)).append(wait)
        try:
            yield
        except BaseException as error:
            _set_error(span, type(error).__name__)
            raise
        finally:
            wait.until = time.time_ns()
            span.end()


class TracedLease(Generic[PipelineT]):
    """A lease whose wait is a span, for ``with`` and ``async with``; made by `Observed.traced`."""

    __slots__ = ("_lease", "_observed")

    def __init__(self, observed: Observed, lease: Lease[PipelineT]) -> None:
        self._observed = observed
        self._lease = lease

    def __enter__(self) -> PipelineT:
        with self._observed._acquiring(self._lease.key):
            return self._lease.__enter__()

    async def __aenter__(self) -> PipelineT:
        with self._observed._acquiring(self._lease.key):
            return await self._lease.__aenter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lease.__exit__(kind, error, traceback)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._lease.__aexit__(kind, error, traceback)


def _set_bytes(span: Span, name: str, count: object) -> None:
    if isinstance(count, int):
        span.set_attribute(name, count)


def _set_error(span: Span, kind: str) -> None:
    """Say that something failed, and by what; not its words, which may name files."""
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR, kind))


Figure = Callable[["ManagerStatus"], int]


class _Instruments(Exports[Observed]):
    """The instruments of one meter provider, for all managers that are observed by it."""

    def __init__(self, meters: MeterProvider | None) -> None:
        super().__init__()
        meter = metrics.get_meter("ebbtide", ebbtide.__version__, meters)
        for field, name, unit, about in _GAUGES:
            meter.create_observable_gauge(
                name, [partial(self._one, attrgetter(field))], unit, about
            )
        for kind, name, unit, about in _COUNTERS:
            meter.create_observable_counter(
                name, [partial(self._one, _count_of(kind))], unit, about
            )
        meter.create_observable_counter(
            "ebbtide.leases", [partial(self._one, _uses)], "{lease}", "Leases that were given."
        )
        for field, name, unit, about in _EACH:
            meter.create_observable_up_down_counter(name, [partial(self._each, field)], unit, about)
        meter.create_observable_up_down_counter(
            "ebbtide.pipeline.count", [self._phases], "{pipeline}", "Pipelines, by phase."
        )
        meter.create_observable_up_down_counter(
            "ebbtide.device.memory", [partial(self._devices, 0)], "By", "What pipelines hold there."
        )
        meter.create_observable_gauge(
            "ebbtide.device.budget", [partial(self._devices, 1)], "By", "What they may hold there."
        )
        self.durations = meter.create_histogram(
            "ebbtide.load.duration",
            "s",
            "How long pipelines took to be loaded or woken.",
            explicit_bucket_boundaries_advisory=BUCKETS,
        )
        self.released = meter.create_counter(
            "ebbtide.memory.released",
            "By",
            "By how much the process shrank at disposals and sleeps.",
        )
        self.retained = meter.create_counter(
            "ebbtide.memory.retained", "By", "What did not come back at disposals."
        )
        self.unverified = meter.create_counter(
            "ebbtide.unverified_disposals",
            "{disposal}",
            "Disposals whose receipt does not prove that the memory is back.",
        )

    def _one(self, figure: Figure, options: CallbackOptions) -> Iterable[Observation]:
        for one, status in self.there():
            yield Observation(figure(status), {MANAGER: one.name})

    def _each(self, field: str, options: CallbackOptions) -> Iterable[Observation]:
        for one, status in self.there():
            for label, entries in one.groups(status):
                total = sum(getattr(entry, field) for entry in entries)
                yield Observation(total, {MANAGER: one.name, PIPELINE: label})

    def _phases(self, options: CallbackOptions) -> Iterable[Observation]:
        for one, status in self.there():
            for label, entries in one.groups(status):
                phases = collections.Counter(entry.phase for entry in entries)
                for phase, count in sorted(phases.items()):
                    about = {MANAGER: one.name, PIPELINE: label, "ebbtide.pipeline.phase": phase}
                    yield Observation(count, about)

    def _devices(self, which: int, options: CallbackOptions) -> Iterable[Observation]:
        for one, status in self.there():
            for device, figures in status.devices.items():
                count = figures[which]
                if count is not None:
                    yield Observation(count, {MANAGER: one.name, "ebbtide.device": device})


def _count_of(kind: str) -> Figure:
    return lambda status: status.counts.get(kind, 0)


def _uses(status: ManagerStatus) -> int:
    return sum(entry.uses for entry in status.entries)


_instruments: weakref.WeakKeyDictionary[MeterProvider, _Instruments]
_instruments = weakref.WeakKeyDictionary()
_globals: dict[None, _Instruments] = {}
"""The instruments of the provider that is set for the whole process, now or later."""


def observe(
    manager: PipelineManager,
    *,
    name: str = "default",
    meter_provider: MeterProvider | None = None,
    tracer_provider: TracerProvider | None = None,
    most: int = 50,
) -> Observed:
    """Have a manager's figures and spans exported by OpenTelemetry.

    Args:
        manager: Whose.
        name: The value of the attribute ``ebbtide.manager``; another one for each manager.
        meter_provider: Whose metrics they are; None for the process's own.
        tracer_provider: Whose spans they are; None for the process's own.
        most: How many pipelines get series of their own, the largest first; the others are summed
            as ``other``.

    Returns:
        What is to be cancelled to observe it no more, and what traces leases.

    Raises:
        InputError: Another manager of that name is observed there already.
        ManagerClosedError: The manager is closed.
        MissingExtraError: From the import: opentelemetry-api is not installed.

    Example:
        >>> import ebbtide
        >>> from ebbtide.integrations.opentelemetry import observe
        >>> with ebbtide.PipelineManager(budget="1 GiB") as manager:
        ...     with observe(manager, name="search") as observed:
        ...         observed.name
        'search'
    """
    instruments = _instruments_of(meter_provider)
    observed = Observed(manager, name, most, instruments, tracer_provider)
    instruments.add(observed, manager)
    return observed


def _instruments_of(meters: MeterProvider | None) -> _Instruments:
    """Those there are: a provider takes no second callback for an instrument that it has."""
    if meters is None:
        return _globals.get(None) or _globals.setdefault(None, _Instruments(None))
    return _instruments.get(meters) or _instruments.setdefault(meters, _Instruments(meters))
