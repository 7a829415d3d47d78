"""A manager's figures for Prometheus, by its own library.

They are read from the manager when they are scraped. Only what no later look can tell, as how long
loads took, is noted as it happens, on the manager's thread for events.
"""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ebbtide.errors import MissingExtraError
from ebbtide.integrations.exported import BUCKETS, Exported, Exports
from ebbtide.receipts import DisposalReceipt

try:
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
    )
    from prometheus_client.registry import REGISTRY, CollectorRegistry
except ImportError as error:
    raise MissingExtraError(
        "Metrics for Prometheus need prometheus-client, which is not installed:"
        " pip install 'ebbtide[prometheus]'",
        extra="prometheus",
    ) from error

if TYPE_CHECKING:
    from ebbtide.manager import ManagerEvent, ManagerStatus, PipelineManager

_GAUGES = (
    ("budget", "ebbtide_budget_bytes", "Anonymous memory that the whole process may hold."),
    ("floor", "ebbtide_floor_bytes", "Anonymous memory beside pipelines and calls."),
    ("pipelines", "ebbtide_pipelines_bytes", "Anonymous memory charged to all pipelines."),
    ("workspace", "ebbtide_workspace_bytes", "Anonymous memory kept for calls."),
    ("free", "ebbtide_free_bytes", "Anonymous memory that a load may take; negative: overdrawn."),
    ("measured", "ebbtide_measured_bytes", "Anonymous memory that the process holds, measured."),
    ("mapped", "ebbtide_mapped_bytes", "Prepared files that are mapped, beside the budget."),
    ("waiting", "ebbtide_waiting", "Requests that wait for a pipeline."),
)
"""Fields of `ManagerStatus`, and their metrics."""

_COUNTERS = (
    ("loading", "ebbtide_loads", "Loads that were begun."),
    ("waking", "ebbtide_wakes", "Sleeping pipelines that were begun to be woken."),
    ("sleeping", "ebbtide_sleeps", "Pipelines that were put to sleep."),
    ("evicting", "ebbtide_evictions", "Disposals that the manager began."),
    ("disposed", "ebbtide_disposals", "Disposals that ended, whoever began them."),
    ("failed", "ebbtide_failures", "Lookups, loads and wakes that failed."),
    ("leaked", "ebbtide_leaked_leases", "Leases that were collected without being returned."),
    ("pressure", "ebbtide_pressure_signals", "Times that the kernel told of memory pressure."),
)
"""Kinds of events, and the metrics of how many there were."""


class _Record:
    """What is noted of one manager's events, by the thread that tells them."""

    def __init__(self) -> None:
        self.loads = {kind: ((0,) * (len(BUCKETS) + 1), 0.0) for kind in ("load", "wake")}
        self.released = {"disposal": 0, "sleep": 0}
        self.retained = 0
        self.unverified = 0
        self._begun: dict[str, str] = {}

    def hear(self, event: ManagerEvent) -> None:
        """Note an event."""
        key, facts = event.pipeline, event.facts
        if event.kind in ("loading", "waking"):
            self._begun[key] = "load" if event.kind == "loading" else "wake"
        elif event.kind == "ready":
            seconds = facts.get("seconds")
            if isinstance(seconds, float | int):
                self._took(self._begun.pop(key, "load"), seconds)
        elif event.kind in ("disposed", "sleeping"):
            receipt = facts.get("receipt")
            if isinstance(receipt, DisposalReceipt):
                self._gave_back("disposal" if event.kind == "disposed" else "sleep", receipt)

    def _took(self, kind: str, seconds: float) -> None:
        counts, total = self.loads[kind]
        more = list(counts)
        more[bisect.bisect_left(BUCKETS, seconds)] += 1
        self.loads[kind] = tuple(more), total + seconds  # at once: a scrape sees all or nothing

    def _gave_back(self, by: str, receipt: DisposalReceipt) -> None:
        self.released[by] += max(0, receipt.released)
        if by == "disposal":
            self.retained += receipt.retained
            self.unverified += not receipt.verified


class Collection(Exported):
    """A manager whose figures are exported, until `cancel`; made by `collect`.

    As a context manager it is cancelled at the end. A manager that is closed or collected is not
    exported any more.

    Attributes:
        name: The value of the label ``manager``.
        record: What was noted of its events.
    """

    function = "collect"
    kinds = ("loading", "waking", "ready", "sleeping", "disposed")

    def _forget(self) -> None:
        self.record = _Record()

    def _hear(self, event: ManagerEvent) -> None:
        self.record.hear(event)


Found = tuple[Collection, "ManagerStatus"]


class ManagerCollector(Exports[Collection]):
    """What a registry asks for the figures of all managers; there is one in each registry."""

    def describe(self) -> Iterable[Metric]:
        """All metrics without a sample."""
        return _families([])

    def collect(self) -> Iterable[Metric]:
        """All metrics of what there is now; none where there is no manager."""
        found = list(self.there())
        return _families(found) if found else ()


def _families(found: list[Found]) -> Iterator[Metric]:
    for field, name, about in _GAUGES:
        gauge = GaugeMetricFamily(name, about, labels=["manager"])
        for one, status in found:
            gauge.add_metric([one.name], getattr(status, field))
        yield gauge
    yield from _devices(found)
    yield from _pipelines(found)
    yield from _counters(found)
    yield _seconds(found)


def _devices(found: list[Found]) -> Iterator[Metric]:
    held = GaugeMetricFamily(
        "ebbtide_device_bytes", "Memory of a device that pipelines hold.", labels=_labels("device")
    )
    most = GaugeMetricFamily(
        "ebbtide_device_budget_bytes", "Memory of a device that they may.", labels=_labels("device")
    )
    for one, status in found:
        for device, (now, limit) in status.devices.items():
            held.add_metric([one.name, device], now)
            if limit is not None:
                most.add_metric([one.name, device], limit)
    yield held
    yield most


def _pipelines(found: list[Found]) -> Iterator[Metric]:
    size = GaugeMetricFamily(
        "ebbtide_pipeline_bytes", "Anonymous memory charged to it.", labels=_labels("pipeline")
    )
    mapped = GaugeMetricFamily(
        "ebbtide_pipeline_mapped_bytes", "Prepared files it maps.", labels=_labels("pipeline")
    )
    leases = GaugeMetricFamily(
        "ebbtide_pipeline_leases", "Leases of it that are held.", labels=_labels("pipeline")
    )
    phases = GaugeMetricFamily(
        "ebbtide_pipeline_phase",
        "1 for the phase that it is in; for the rest together, how many are in which.",
        labels=_labels("pipeline", "phase"),
    )
    for one, status in found:
        for label, entries in one.groups(status):
            size.add_metric([one.name, label], sum(entry.anonymous for entry in entries))
            mapped.add_metric([one.name, label], sum(entry.mapped for entry in entries))
            leases.add_metric([one.name, label], sum(entry.leases for entry in entries))
            found_phases = [entry.phase for entry in entries]
            for phase in sorted(set(found_phases)):
                phases.add_metric([one.name, label, phase], found_phases.count(phase))
    yield from (size, mapped, leases, phases)


def _counters(found: list[Found]) -> Iterator[Metric]:
    for kind, name, about in _COUNTERS:
        counter = CounterMetricFamily(name, about, labels=["manager"])
        for one, status in found:
            counter.add_metric([one.name], status.counts.get(kind, 0))
        yield counter
    leases = CounterMetricFamily(
        "ebbtide_leases", "Leases that were given, of whatever pipeline.", labels=["manager"]
    )
    released = CounterMetricFamily(
        "ebbtide_released_bytes",
        "Anonymous memory by which the process shrank as pipelines went or fell asleep.",
        labels=_labels("by"),
    )
    retained = CounterMetricFamily(
        "ebbtide_retained_bytes",
        "Anonymous memory that did not come back at disposals, by their receipts.",
        labels=["manager"],
    )
    unverified = CounterMetricFamily(
        "ebbtide_unverified_disposals",
        "Disposals whose receipt does not prove that the memory is back.",
        labels=["manager"],
    )
    for one, status in found:
        record = one.record
        leases.add_metric([one.name], sum(entry.uses for entry in status.entries))
        for by, count in record.released.items():
            released.add_metric([one.name, by], count)
        retained.add_metric([one.name], record.retained)
        unverified.add_metric([one.name], record.unverified)
    yield from (leases, released, retained, unverified)


def _seconds(found: list[Found]) -> Metric:
    seconds = HistogramMetricFamily(
        "ebbtide_load_seconds",
        "How long pipelines took to be ready: to be loaded, or woken.",
        labels=_labels("kind"),
    )
    for one, _ in found:
        for kind, (counts, total) in one.record.loads.items():
            until = [sum(counts[: at + 1]) for at in range(len(counts))]
            bounds = [*(str(bound) for bound in BUCKETS), "+Inf"]
            seconds.add_metric([one.name, kind], list(zip(bounds, until, strict=True)), total)
    return seconds


def _labels(*more: str) -> list[str]:
    return ["manager", *more]


_collectors: weakref.WeakKeyDictionary[CollectorRegistry, ManagerCollector]
_collectors = weakref.WeakKeyDictionary()


def collect(
    manager: PipelineManager,
    *,
    name: str = "default",
    registry: CollectorRegistry = REGISTRY,
    most: int = 50,
) -> Collection:
    """Have a manager's figures scraped by Prometheus.

    Args:
        manager: Whose.
        name: The value of the label ``manager``; another one for each manager of a process.
        registry: Where.
        most: How many pipelines get series of their own, the largest first; the others are summed
            as ``other``.

    Returns:
        What is to be cancelled to export it no more; not needed where the manager is closed.

    Raises:
        InputError: Another manager of that name is exported there already.
        ManagerClosedError: The manager is closed.
        MissingExtraError: From the import: prometheus-client is not installed.

    Example:
        >>> import ebbtide
        >>> from ebbtide.integrations.prometheus import collect
        >>> from prometheus_client import CollectorRegistry
        >>> registry = CollectorRegistry()
        >>> with ebbtide.PipelineManager(budget="1 GiB") as manager:
        ...     with collect(manager, name="search", registry=registry):
        ...         registry.get_sample_value("ebbtide_budget_bytes", {"manager": "search"})
        1073741824
    """
    collection = Collection(manager, name, most)
    mine = ManagerCollector()
    collector = _collectors.setdefault(registry, mine)
    if collector is mine:
        registry.register(collector)
    collector.add(collection, manager)
    return collection
