"""A manager's figures and spans as OpenTelemetry's own SDK gets them."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tests.integrations.exported import Heard, hearing

from ebbtide.errors import EbbtideError, InputError, ManagerClosedError, ModelNotFoundError
from ebbtide.integrations import opentelemetry
from ebbtide.integrations.exported import BUCKETS
from ebbtide.integrations.opentelemetry import Observed, observe
from ebbtide.manager import ManagerEvent, PipelineManager

TASK = "feature-extraction"


class Telemetry:
    """The SDK, with what it would export kept in memory."""

    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider([self.reader])
        self.exporter = InMemorySpanExporter()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))

    def observe(self, manager: PipelineManager, **options: Any) -> Observed:
        return observe(manager, meter_provider=self.meters, tracer_provider=self.tracers, **options)

    def metrics(self) -> dict[str, Any]:
        data = self.reader.get_metrics_data()
        scopes = data.resource_metrics[0].scope_metrics if data and data.resource_metrics else []
        return {metric.name: metric for scope in scopes for metric in scope.metrics}

    def points(self, name: str) -> list[Any]:
        return list(self.metrics()[name].data.data_points)

    def value(self, name: str, **attributes: str) -> Any:
        """The only point of a metric that has these attributes, as ``by`` or ``phase``."""
        (found,) = [
            point
            for point in self.points(name)
            if attributes.items()
            <= {key.rpartition(".")[2]: value for key, value in point.attributes.items()}.items()
        ]
        return found.value

    def spans(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name == name]

    def span(self, name: str) -> ReadableSpan:
        (found,) = self.spans(name)
        return found


@pytest.fixture
def telemetry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Telemetry]:
    monkeypatch.setattr(opentelemetry, "FRESH", 0.0)
    made = Telemetry()
    yield made
    made.meters.shutdown()
    made.tracers.shutdown()


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Heard:
    return hearing(Observed, monkeypatch)


# Figures


def test_the_parts_that_are_observed_are_the_managers_and_add_up(
    telemetry: Telemetry, manager: PipelineManager, tiny_bert: Path
) -> None:
    telemetry.observe(manager)
    manager.preload(TASK, tiny_bert)
    status = manager.status()
    names = ("budget", "floor", "pipelines", "workspace", "free", "mapped")
    parts = {name: telemetry.value(f"ebbtide.memory.{name}") for name in names}
    assert parts == {name: getattr(status, name) for name in names}
    assert parts["budget"] == sum(parts[n] for n in ("floor", "pipelines", "workspace", "free"))
    assert telemetry.value("ebbtide.memory.measured") > 0
    assert telemetry.value("ebbtide.waiting") == 0


def test_one_look_at_the_manager_serves_all_metrics_of_a_collection(
    telemetry: Telemetry, manager: PipelineManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opentelemetry, "FRESH", 3600.0)
    looks = []
    status = PipelineManager.status
    monkeypatch.setattr(PipelineManager, "status", lambda self: looks.append(1) or status(self))
    telemetry.observe(manager)
    telemetry.metrics()
    assert len(looks) == 1


def test_a_pipeline_has_its_bytes_leases_and_phase(
    telemetry: Telemetry, manager: PipelineManager, tiny_bert: Path
) -> None:
    telemetry.observe(manager)
    with manager.acquire(TASK, tiny_bert):
        (entry,) = manager.status().entries
        found = telemetry.value("ebbtide.pipeline.memory", pipeline=entry.key)
        assert found == entry.anonymous > 0
        assert telemetry.value("ebbtide.pipeline.leases", pipeline=entry.key) == 1
        assert telemetry.value("ebbtide.pipeline.count", pipeline=entry.key, phase="ready") == 1
    manager.evict(TASK, tiny_bert)
    pipelines = [
        p.attributes["ebbtide.pipeline"] for p in telemetry.points("ebbtide.pipeline.memory")
    ]
    assert pipelines == ["other"]


def test_more_pipelines_than_asked_are_summed_as_other(
    telemetry: Telemetry, manager: PipelineManager, tiny_bert: Path
) -> None:
    telemetry.observe(manager, most=1)
    with manager.acquire(TASK, tiny_bert), manager.acquire(TASK, tiny_bert, dtype="bnb4"):
        large, small = manager.status().entries
        telemetry.value("ebbtide.pipeline.memory", pipeline=large.key)
        other = telemetry.value("ebbtide.pipeline.memory", pipeline="other")
        assert other == small.anonymous > 0
        assert len(telemetry.points("ebbtide.pipeline.memory")) == 2


def test_what_happened_is_counted(
    telemetry: Telemetry, manager: PipelineManager, tiny_bert: Path
) -> None:
    telemetry.observe(manager)
    manager.preload(TASK, tiny_bert)
    manager.sleep(TASK, tiny_bert)
    manager.preload(TASK, tiny_bert)
    manager.evict(TASK, tiny_bert)
    with pytest.raises(ModelNotFoundError), manager.acquire(TASK, tiny_bert / "nowhere"):
        pass
    for name, count in {
        "loads": 1, "wakes": 1, "sleeps": 1, "evictions": 1, "disposals": 1, "failures": 1,
        "leases": 2, "leaked_leases": 0, "pressure_signals": 0,
    }.items():  # fmt: skip
        assert telemetry.value(f"ebbtide.{name}") == count, name


def test_durations_and_bytes_that_came_back_are_recorded(
    telemetry: Telemetry, manager: PipelineManager, tiny_bert: Path, heard: Heard
) -> None:
    telemetry.observe(manager)
    manager.preload(TASK, tiny_bert)
    asleep = manager.sleep(TASK, tiny_bert)
    manager.preload(TASK, tiny_bert)
    gone = manager.evict(TASK, tiny_bert)
    heard("disposed")
    assert asleep is not None
    assert gone is not None
    points = telemetry.points("ebbtide.load.duration")
    assert {point.attributes["ebbtide.load.kind"]: point.count for point in points} == {
        "load": 1,
        "wake": 1,
    }
    assert points[0].explicit_bounds == BUCKETS
    assert telemetry.value("ebbtide.memory.released", by="sleep") == max(0, asleep.released)
    assert telemetry.value("ebbtide.memory.released", by="disposal") == max(0, gone.released)
    assert telemetry.value("ebbtide.memory.retained") == gone.retained
    assert telemetry.value("ebbtide.unverified_disposals") == (not gone.verified)


def test_names_and_units_keep_the_conventions(
    telemetry: Telemetry, manager: PipelineManager, tiny_bert: Path, heard: Heard
) -> None:
    telemetry.observe(manager)
    manager.preload(TASK, tiny_bert)
    manager.evict(TASK, tiny_bert)
    heard("disposed")
    found = telemetry.metrics()
    assert len(found) > 20
    for name, metric in found.items():
        assert re.fullmatch(r"ebbtide(\.[a-z]+(_[a-z]+)*)+", name)
        assert not name.endswith(("total", "bytes", "seconds"))
        assert metric.unit in ("By", "s") or re.fullmatch(r"\{[a-z]+\}", metric.unit)
        assert metric.description.endswith(".")
        for point in metric.data.data_points:
            assert all(key.startswith("ebbtide.") for key in point.attributes)
    assert found["ebbtide.memory.budget"].unit == "By"


# Spans


def test_a_load_is_a_child_of_the_traced_lease_that_waits_for_it(
    telemetry: Telemetry, manager: PipelineManager, tiny_bert: Path, heard: Heard
) -> None:
    observed = telemetry.observe(manager)
    tracer = telemetry.tracers.get_tracer("test")
    with (
        tracer.start_as_current_span("request") as request,
        observed.traced(manager.acquire(TASK, tiny_bert)) as embed,
    ):
        embed("the tide goes out")
    heard("ready")
    acquire, load = telemetry.span("ebbtide.acquire"), telemetry.span("ebbtide.load")
    assert acquire.parent == request.get_span_context()
    assert load.parent is not None
    assert acquire.context is not None
    assert load.parent.span_id == acquire.context.span_id
    assert load.parent.trace_id == request.get_span_context().trace_id
    assert load.attributes is not None
    (entry,) = manager.status().entries
    assert load.attributes["ebbtide.pipeline"] == entry.key
    assert load.attributes["ebbtide.memory.charged"] == entry.anonymous
    assert None not in (load.start_time, load.end_time)
    assert load.start_time < load.end_time  # type: ignore[operator]


def test_a_lease_that_is_had_at_once_is_the_parent_of_no_later_load(
    telemetry: Telemetry, manager: PipelineManager, tiny_bert: Path, heard: Heard
) -> None:
    observed = telemetry.observe(manager)
    manager.preload(TASK, tiny_bert)
    with observed.traced(manager.acquire(TASK, tiny_bert)):
        pass
    manager.evict(TASK, tiny_bert)
    manager.preload(TASK, tiny_bert)
    heard("disposed")
    heard("ready")
    assert [span.parent for span in telemetry.spans("ebbtide.load")] == [None, None]
    telemetry.span("ebbtide.acquire")


def test_others_who_wait_for_the_same_load_are_linked(
    telemetry: Telemetry, tiny_bert: Path, heard: Heard
) -> None:
    async def main() -> None:
        async with PipelineManager(budget="4 GiB", max_pipelines=1, remember=False) as manager:
            observed = telemetry.observe(manager)

            async def use() -> None:
                async with observed.traced(manager.acquire(TASK, tiny_bert)):
                    pass

            async with manager.acquire(TASK, tiny_bert, dtype="bnb4"):
                tasks = [asyncio.create_task(use()) for _ in range(3)]
                await asyncio.sleep(0)  # each runs until it waits
            await asyncio.gather(*tasks)

    asyncio.run(main())
    for _ in range(2):
        heard("disposed")
    waited = {span.context.span_id for span in telemetry.spans("ebbtide.acquire") if span.context}
    (load,) = [span for span in telemetry.spans("ebbtide.load") if span.parent is not None]
    assert load.parent is not None
    linked = {link.context.span_id for link in load.links}
    assert len(linked) == 2
    assert {load.parent.span_id} | linked == waited


def test_a_lease_that_was_given_is_forgotten_with_the_next_load(
    telemetry: Telemetry, manager: PipelineManager
) -> None:
    observed = telemetry.observe(manager)
    with observed._acquiring("a"):
        assert len(observed._waits["a"]) == 1
    observed._hear(ManagerEvent("loading", "a", 1.0, {}))
    observed._hear(ManagerEvent("ready", "a", 2.0, {"seconds": 1.0}))
    assert not observed._waits["a"]


def test_a_load_that_fails_says_by_what_and_not_in_which_words(
    telemetry: Telemetry, manager: PipelineManager, tiny_bert: Path, tmp_path: Path, heard: Heard
) -> None:
    broken = shutil.copytree(tiny_bert, tmp_path / "broken")
    (broken / "onnx" / "model.onnx").write_bytes(b"\x08\x07nothing")
    observed = telemetry.observe(manager)
    with pytest.raises(EbbtideError) as caught, observed.traced(manager.acquire(TASK, broken)):
        pass
    heard("failed")
    for name in ("ebbtide.load", "ebbtide.acquire"):
        span = telemetry.span(name)
        assert span.attributes is not None
        assert span.attributes["error.type"] == type(caught.value).__name__
        assert not span.status.is_ok
        assert span.status.description == type(caught.value).__name__
        assert not span.events
    manager.preload(TASK, tiny_bert)
    heard("ready")
    assert len(telemetry.spans("ebbtide.load")) == 2


def test_a_sleep_and_a_disposal_are_spans_with_their_receipt(
    telemetry: Telemetry, manager: PipelineManager, tiny_bert: Path, heard: Heard
) -> None:
    telemetry.observe(manager)
    manager.preload(TASK, tiny_bert)
    receipts = [manager.sleep(TASK, tiny_bert), manager.evict(TASK, tiny_bert)]
    heard("disposed")
    for name, receipt in zip(("ebbtide.sleep", "ebbtide.dispose"), receipts, strict=True):
        about = telemetry.span(name).attributes
        assert about is not None
        assert receipt is not None
        assert about["ebbtide.memory.charged"] == receipt.charged
        assert about["ebbtide.memory.released"] == receipt.released
        assert about["ebbtide.memory.retained"] == receipt.retained
        assert about["ebbtide.receipt.verified"] == receipt.verified


def test_a_disposal_that_a_user_began_is_a_span_too(
    telemetry: Telemetry, manager: PipelineManager, tiny_bert: Path, heard: Heard
) -> None:
    telemetry.observe(manager)
    with manager.acquire(TASK, tiny_bert) as embed:
        embed.dispose()
    heard("disposed")
    telemetry.span("ebbtide.dispose")


def test_no_attribute_has_a_token(
    telemetry: Telemetry, manager: PipelineManager, tiny_bert: Path, heard: Heard
) -> None:
    observed = telemetry.observe(manager)
    with observed.traced(manager.acquire(TASK, tiny_bert, token="hf_secret")):
        pass
    heard("ready")
    said = [span.to_json() for span in telemetry.exporter.get_finished_spans()]
    said.append(telemetry.reader.get_metrics_data().to_json())  # type: ignore[union-attr]
    assert all(str(tiny_bert) in one for one in said)
    assert not [one for one in said if "hf_secret" in one]


# Several managers, and the end of one


def test_managers_share_the_metrics_each_under_its_own_name(
    telemetry: Telemetry, manager: PipelineManager
) -> None:
    with PipelineManager(budget="1 GiB", remember=False) as other:
        telemetry.observe(manager, name="search")
        telemetry.observe(other, name="chat")
        assert telemetry.value("ebbtide.memory.budget", manager="search") == 4 << 30
        assert telemetry.value("ebbtide.memory.budget", manager="chat") == 1 << 30


def test_a_name_that_is_taken_is_refused_until_its_manager_is_gone(
    telemetry: Telemetry, manager: PipelineManager
) -> None:
    with PipelineManager(budget="1 GiB", remember=False) as first:
        telemetry.observe(first)
        with pytest.raises(InputError, match=r"observe\(manager, name="):
            telemetry.observe(manager)
    telemetry.observe(manager)
    assert telemetry.value("ebbtide.memory.budget") == 4 << 30


def test_what_is_cancelled_or_closed_is_observed_no_more(
    telemetry: Telemetry, manager: PipelineManager
) -> None:
    with telemetry.observe(manager, name="one"):
        assert "ebbtide.memory.budget" in telemetry.metrics()
    assert "ebbtide.memory.budget" not in telemetry.metrics()
    assert not manager._core.feed.hears("disposed")
    telemetry.observe(manager, name="one")
    manager.close()
    assert "ebbtide.memory.budget" not in telemetry.metrics()
    with pytest.raises(ManagerClosedError):
        telemetry.observe(manager)


def test_a_manager_that_is_observed_again_is_observed_once(
    telemetry: Telemetry, manager: PipelineManager
) -> None:
    first = telemetry.observe(manager)
    telemetry.observe(manager, most=0)
    assert len(manager._core.feed._subscriptions) == 1
    first.cancel()
    assert len(manager._core.feed._subscriptions) == 1
    assert telemetry.value("ebbtide.memory.budget") == 4 << 30


def test_a_forked_child_traces_its_own_loads(fresh_process: Any) -> None:
    said = fresh_process(
        """
        import os, sys, warnings
        warnings.simplefilter("ignore")  # that a process with threads forks
        import ebbtide
        from ebbtide.integrations.opentelemetry import observe
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        exporter, tracers = InMemorySpanExporter(), TracerProvider()
        tracers.add_span_processor(SimpleSpanProcessor(exporter))
        manager = ebbtide.PipelineManager(budget="1 GiB", remember=False)
        observed = observe(manager, tracer_provider=tracers)
        if os.fork() == 0:
            with observed.traced(manager.acquire("feature-extraction", MODEL)):
                pass
            thread = manager._core.feed._thread
            manager.close()
            thread.join(30)
            print(sorted(span.name for span in exporter.get_finished_spans()))
            sys.stdout.flush()
            os._exit(0)
        print(os.wait()[1])
        manager.close()
        """
    )
    assert said.split("\n")[:2] == ["['ebbtide.acquire', 'ebbtide.dispose', 'ebbtide.load']", "0"]


def test_what_goes_on_when_it_is_cancelled_ends_its_span(
    telemetry: Telemetry, manager: PipelineManager
) -> None:
    observed = telemetry.observe(manager)
    observed._hear(ManagerEvent("loading", "a", 1.0, {"bytes": 5}))
    observed.cancel()
    assert telemetry.span("ebbtide.load").end_time is not None


def test_a_manager_that_nobody_holds_is_not_kept_by_the_provider(telemetry: Telemetry) -> None:
    manager = PipelineManager(budget="1 GiB", remember=False)
    telemetry.observe(manager)
    telemetry.metrics()
    with pytest.warns(ResourceWarning, match="without close"):
        del manager
    assert "ebbtide.memory.budget" not in telemetry.metrics()


def test_the_processs_own_providers_may_be_set_later(fresh_process: Any) -> None:
    said = fresh_process(
        """
        import ebbtide
        from ebbtide.integrations.opentelemetry import observe
        from opentelemetry import metrics
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader

        reader = InMemoryMetricReader()
        with ebbtide.PipelineManager(budget="1 GiB", remember=False) as manager:
            with observe(manager, name="before"):
                metrics.set_meter_provider(MeterProvider([reader]))
                with ebbtide.PipelineManager(budget="2 GiB", remember=False) as other:
                    observe(other, name="after")
                    data = reader.get_metrics_data()
        (scope,) = data.resource_metrics[0].scope_metrics
        (budget,) = [one for one in scope.metrics if one.name == "ebbtide.memory.budget"]
        print(sorted(point.value for point in budget.data.data_points))
        """
    )
    assert said.strip() == str([1 << 30, 2 << 30])


def test_without_an_sdk_everything_works_and_nothing_is_told(fresh_process: Any) -> None:
    said = fresh_process(
        """
        import ebbtide
        from ebbtide.integrations.opentelemetry import observe

        with ebbtide.PipelineManager(budget="1 GiB", remember=False) as manager:
            observed = observe(manager)
            with observed.traced(manager.acquire("feature-extraction", MODEL)) as embed:
                print(embed("out", pooling="mean").shape)
            print(observed._waits)
        """
    )
    assert said.split("\n")[:2] == ["(1, 32)", "{}"]


def test_without_the_package_the_error_has_the_command(fresh_process: Any) -> None:
    said = fresh_process(
        """
        import sys
        sys.modules["opentelemetry"] = None
        import ebbtide
        try:
            import ebbtide.integrations.opentelemetry
        except ebbtide.MissingExtraError as error:
            print(error, error.extra)
        """
    )
    assert "pip install 'ebbtide[opentelemetry]'" in said
    assert said.split()[-1] == "opentelemetry"
