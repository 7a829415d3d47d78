"""A manager's figures as Prometheus scrapes them, by its own library and parsers."""

from __future__ import annotations

import math
import os
import re
import threading
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("prometheus_client")

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse
from tests.integrations.exported import Heard, hearing

import ebbtide
from ebbtide.errors import InputError, ManagerClosedError, ModelNotFoundError
from ebbtide.integrations import prometheus
from ebbtide.integrations.exported import BUCKETS, OTHER
from ebbtide.integrations.prometheus import ManagerCollector, collect
from ebbtide.manager import ManagerEvent, ManagerStatus, PipelineManager, PipelineStatus
from ebbtide.receipts import DisposalReceipt

TASK = "feature-extraction"


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Heard:
    return hearing(prometheus.Collection, monkeypatch)


def scraped(registry: CollectorRegistry) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of a scrape, as the library's own parser reads it."""
    found = {}
    for family in parse(generate_latest(registry).decode()):
        for sample in family.samples:
            labels = frozenset((k, v) for k, v in sample.labels.items() if k != "manager")
            assert (sample.name, labels) not in found or "manager" in sample.labels
            found[sample.name, labels] = sample.value
    return found


def value(registry: CollectorRegistry, name: str, **labels: str) -> float:
    return scraped(registry)[f"ebbtide_{name}", frozenset(labels.items())]


# What is read at the scrape


def test_the_parts_that_are_scraped_are_the_managers_and_add_up(
    manager: PipelineManager, registry: CollectorRegistry, tiny_bert: Path
) -> None:
    collect(manager, registry=registry)
    with manager.acquire(TASK, tiny_bert) as embed:
        embed("the tide goes out")
    found, status = scraped(registry), manager.status()
    parts = {
        name: found[f"ebbtide_{name}_bytes", frozenset()]
        for name in ("budget", "floor", "pipelines", "workspace", "free", "mapped")
    }
    assert parts == {name: getattr(status, name) for name in parts}
    assert parts["budget"] == sum(parts[n] for n in ("floor", "pipelines", "workspace", "free"))
    assert parts["pipelines"] > 0
    assert value(registry, "measured_bytes") > 0
    assert value(registry, "waiting") == 0


def test_a_pipeline_has_its_bytes_leases_and_phase(
    manager: PipelineManager, registry: CollectorRegistry, tiny_bert: Path
) -> None:
    collect(manager, registry=registry)
    with manager.acquire(TASK, tiny_bert), manager.acquire(TASK, tiny_bert) as _:
        (entry,) = manager.status().entries
        assert value(registry, "pipeline_bytes", pipeline=entry.key) == entry.anonymous > 0
        assert value(registry, "pipeline_leases", pipeline=entry.key) == 2
        assert value(registry, "pipeline_phase", pipeline=entry.key, phase="ready") == 1
    manager.sleep(TASK, tiny_bert)
    assert value(registry, "pipeline_phase", pipeline=entry.key, phase="asleep") == 1
    assert value(registry, "pipeline_leases", pipeline=entry.key) == 0
    manager.evict(TASK, tiny_bert)
    assert not [labels for _, labels in scraped(registry) if ("pipeline", entry.key) in labels]


def test_what_happened_is_counted(
    manager: PipelineManager, registry: CollectorRegistry, tiny_bert: Path
) -> None:
    collect(manager, registry=registry)
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
        assert value(registry, f"{name}_total") == count, name


def test_a_scrape_starts_no_thread(manager: PipelineManager, registry: CollectorRegistry) -> None:
    collect(manager, registry=registry)
    before = threading.enumerate()
    scraped(registry)
    assert threading.enumerate() == before


def test_the_librarys_own_server_serves_it(
    manager: PipelineManager, registry: CollectorRegistry
) -> None:
    collect(manager, registry=registry)
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    try:
        address = f"http://127.0.0.1:{server.server_port}/metrics"
        with urllib.request.urlopen(address, timeout=30) as answer:
            text = answer.read().decode()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert 'ebbtide_budget_bytes{manager="default"} 4.294967296e+09' in text


# What is noted as it happens


def test_loads_and_wakes_are_timed_apart(
    manager: PipelineManager,
    registry: CollectorRegistry,
    tiny_bert: Path,
    heard: Heard,
) -> None:
    collect(manager, registry=registry)
    manager.preload(TASK, tiny_bert)
    heard("ready")
    assert value(registry, "load_seconds_count", kind="load") == 1
    assert value(registry, "load_seconds_count", kind="wake") == 0
    manager.sleep(TASK, tiny_bert)
    manager.preload(TASK, tiny_bert)
    heard("ready")
    assert value(registry, "load_seconds_count", kind="load") == 1
    assert value(registry, "load_seconds_count", kind="wake") == 1
    assert value(registry, "load_seconds_bucket", kind="wake", le="+Inf") == 1
    assert value(registry, "load_seconds_sum", kind="load") > 0


def test_bytes_that_came_back_are_summed_from_receipts(
    manager: PipelineManager,
    registry: CollectorRegistry,
    tiny_bert: Path,
    heard: Heard,
) -> None:
    collect(manager, registry=registry)
    manager.preload(TASK, tiny_bert)
    asleep = manager.sleep(TASK, tiny_bert)
    heard("sleeping")
    gone = manager.evict(TASK, tiny_bert)
    heard("disposed")
    assert asleep is not None
    assert gone is not None
    assert value(registry, "released_bytes_total", by="sleep") == max(0, asleep.released)
    assert value(registry, "released_bytes_total", by="disposal") == max(0, gone.released)
    assert value(registry, "retained_bytes_total") == gone.retained
    assert value(registry, "unverified_disposals_total") == (not gone.verified)


def told(kind: str, **facts: object) -> ManagerEvent:
    return ManagerEvent(kind, "a", 0.0, facts)


def test_a_disposal_that_proves_nothing_is_counted_and_gives_back_no_less_than_nothing() -> None:
    record = prometheus._Record()
    grown = DisposalReceipt(10, -5, 10, True, False, 0.1, "trim")
    record.hear(told("disposed", receipt=grown))
    record.hear(told("disposed", receipt=None))
    assert record.released == {"disposal": 0, "sleep": 0}
    assert (record.retained, record.unverified) == (10, 1)


def test_a_load_that_follows_a_wake_that_failed_is_a_load() -> None:
    record = prometheus._Record()
    for event in [told("waking"), told("loading"), told("ready", seconds=70.0)]:
        record.hear(event)
    assert record.loads["load"] == ((*[0] * len(BUCKETS), 1), 70.0)
    assert record.loads["wake"][1] == 0


@given(st.lists(st.floats(0, 100), max_size=30))
def test_a_bucket_has_all_loads_of_at_most_its_seconds(seconds: list[float]) -> None:
    collector, one = collected(status_of([]))
    for took in seconds:
        one.record.hear(told("loading"))
        one.record.hear(told("ready", seconds=took))
    (family,) = [x for x in collector.collect() if x.name == "ebbtide_load_seconds"]
    for sample in family.samples:
        if sample.name.endswith("_bucket") and sample.labels["kind"] == "load":
            bound = float(sample.labels["le"])
            assert sample.value == sum(took <= bound for took in seconds)


# Names and bounds


def problems(text: str) -> list[str]:
    """What promtool's `check metrics` would say, and the conventions for names and units."""
    found = []
    families = list(parse(text))
    names = [family.name for family in families]
    found += [f"{name} is told of twice" for name in set(names) if names.count(name) > 1]
    for family in families:
        name = family.name + ("_total" if family.type == "counter" else "")
        if not family.documentation:
            found.append(f"{name} has no help text")
        if family.type not in ("gauge", "counter", "histogram"):
            found.append(f"{name} has the type {family.type}")
        if not re.fullmatch(r"ebbtide(_[a-z]+)+", name):
            found.append(f"{name} is not in lower case")
        if re.search(r"(kilo|mega|milli|micro|nano|_(kb|mb|gb|ms|us|ns|minutes|hours))(_|$)", name):
            found.append(f"{name} is not in a base unit")
        if re.search(r"_(gauge|counter|histogram|summary|metric)(_|$)", name):
            found.append(f"{name} names its type")
        if family.type != "counter" and re.search(r"_(total|count|sum|bucket|info)$", name):
            found.append(f"{name} ends as another type would")
        if re.search(r"_(bytes|seconds)_(?!total$)", name):
            found.append(f"{name} does not end with its unit")
        for sample in family.samples:
            if "le" in sample.labels and not sample.name.endswith("_bucket"):
                found.append(f"{sample.name} has a label that is reserved")
            if family.type == "counter" and not sample.name.endswith("_total"):
                found.append(f"{sample.name} is a counter without _total")
    return found


def test_the_exposition_keeps_the_rules_of_prometheus(
    manager: PipelineManager, registry: CollectorRegistry, tiny_bert: Path
) -> None:
    with PipelineManager(budget="1 GiB", remember=False) as second:
        collect(manager, registry=registry)
        collect(second, name="second", registry=registry)
        manager.preload(TASK, tiny_bert)
        text = generate_latest(registry).decode()
        assert problems(text) == []
        parsed = list(parse_openmetrics(generate_openmetrics(registry).decode()))
    assert len(parsed) == len(list(parse(text))) > 20


def status_of(entries: list[PipelineStatus]) -> ManagerStatus:
    total = sum(entry.anonymous for entry in entries)
    return ManagerStatus(
        total, 0, total, 0, 0, total, 0, {"cuda:0": (1, None)}, 0, {}, tuple(entries)
    )


class StubManager:
    """Says what it is told to say."""

    def __init__(self, status: ManagerStatus) -> None:
        self.is_closed = False
        self._status = status

    def status(self) -> ManagerStatus:
        return self._status


_kept: list[StubManager] = []


def collected(
    status: ManagerStatus, most: int = 50
) -> tuple[ManagerCollector, prometheus.Collection]:
    _kept[:] = [StubManager(status)]
    one = prometheus.Collection(_kept[0], "m", most)  # type: ignore[arg-type]
    one._process = os.getpid()
    collector = ManagerCollector()
    collector._exported["m"] = one
    return collector, one


entries_of = st.lists(
    st.builds(
        PipelineStatus,
        key=st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1).filter(
            lambda key: key != OTHER
        ),
        phase=st.sampled_from(["empty", "loading", "ready", "falling asleep", "asleep"]),
        anonymous=st.integers(0, 2**40),
        mapped=st.integers(0, 2**40),
        leases=st.integers(0, 100),
        pinned=st.booleans(),
        uses=st.integers(0, 100),
        idle=st.none(),
        keep=st.none(),
        reload_seconds=st.just(0.0),
        measured=st.booleans(),
    ),
    max_size=12,
    unique_by=lambda entry: entry.key,
)


@given(entries_of, st.integers(0, 5))
def test_series_are_bounded_and_nothing_is_lost_in_the_rest(
    entries: list[PipelineStatus], most: int
) -> None:
    collector, _ = collected(status_of(entries), most)
    registry = CollectorRegistry()
    registry.register(collector)
    there = [entry for entry in entries if entry.phase != "empty"]
    totals: dict[str, float] = dict.fromkeys(
        ("bytes", "mapped_bytes", "leases", "phase"), 0.0
    )  # fmt: skip
    named = set()
    for (name, labels), count in scraped(registry).items():
        label = dict(labels).get("pipeline")
        if label is not None:
            named.add(label)
            totals[name.removeprefix("ebbtide_pipeline_")] += count
    assert len(named) <= most + 1
    assert named <= {entry.key for entry in there[:most]} | {OTHER}
    assert totals == {
        "bytes": sum(entry.anonymous for entry in there),
        "mapped_bytes": sum(entry.mapped for entry in there),
        "leases": sum(entry.leases for entry in there),
        "phase": len(there),
    }


def test_no_label_has_a_token(
    manager: PipelineManager, registry: CollectorRegistry, tiny_bert: Path
) -> None:
    collect(manager, registry=registry)
    manager.preload(TASK, tiny_bert, token="hf_secret")
    text = generate_latest(registry).decode()
    assert str(tiny_bert) in text
    assert "hf_secret" not in text


# Several managers, and the end of one


def test_managers_share_the_metrics_each_under_its_own_label(
    manager: PipelineManager, registry: CollectorRegistry
) -> None:
    with PipelineManager(budget="1 GiB", remember=False) as other:
        collect(manager, name="search", registry=registry)
        collect(other, name="chat", registry=registry)
        get = registry.get_sample_value
        assert get("ebbtide_budget_bytes", {"manager": "search"}) == 4 << 30
        assert get("ebbtide_budget_bytes", {"manager": "chat"}) == 1 << 30
        text = generate_latest(registry).decode()
        assert text.count("# TYPE ebbtide_budget_bytes gauge") == 1


def test_a_name_that_is_taken_is_refused_until_its_manager_is_gone(
    manager: PipelineManager, registry: CollectorRegistry
) -> None:
    with PipelineManager(budget="1 GiB", remember=False) as first:
        collect(first, registry=registry)
        with pytest.raises(InputError, match=r"collect\(manager, name="):
            collect(manager, registry=registry)
    collect(manager, registry=registry)
    assert value(registry, "budget_bytes") == 4 << 30


def test_what_is_cancelled_is_scraped_no_more_and_may_be_collected_again(
    manager: PipelineManager, registry: CollectorRegistry
) -> None:
    with collect(manager, registry=registry) as collection:
        assert scraped(registry)
    assert scraped(registry) == {}
    collection.cancel()
    assert not manager._core.feed.hears("disposed")
    collect(manager, registry=registry)
    assert scraped(registry)


def test_a_closed_manager_is_scraped_no_more_and_cannot_be_collected(
    registry: CollectorRegistry,
) -> None:
    with PipelineManager(budget="1 GiB", remember=False) as manager:
        collect(manager, registry=registry)
        assert scraped(registry)
    assert scraped(registry) == {}
    with pytest.raises(ManagerClosedError):
        collect(manager, registry=registry)


def test_a_manager_that_nobody_holds_is_not_kept_by_the_registry(
    registry: CollectorRegistry,
) -> None:
    manager = PipelineManager(budget="1 GiB", remember=False)
    collect(manager, registry=registry)
    with pytest.warns(ResourceWarning, match="without close"):
        del manager
    assert scraped(registry) == {}


def test_a_manager_that_is_collected_again_is_exported_once(
    manager: PipelineManager, registry: CollectorRegistry
) -> None:
    first = collect(manager, registry=registry)
    collect(manager, registry=registry, most=0)
    assert len(manager._core.feed._subscriptions) == 1
    first.cancel()
    assert len(manager._core.feed._subscriptions) == 1
    assert value(registry, "budget_bytes") == 4 << 30


def test_a_forked_child_is_told_of_its_own_loads_alone(fresh_process: Any) -> None:
    said = fresh_process(
        """
        import os, sys, warnings
        warnings.simplefilter("ignore")  # that a process with threads forks
        import ebbtide
        from ebbtide.integrations.prometheus import collect
        from prometheus_client import REGISTRY, generate_latest

        manager = ebbtide.PipelineManager(budget="1 GiB", remember=False)
        collection = collect(manager)
        manager.preload("feature-extraction", MODEL)
        if os.fork() == 0:
            generate_latest(REGISTRY)
            manager.preload("feature-extraction", MODEL)
            thread = manager._core.feed._thread
            manager.close()
            thread.join(30)
            print(sum(collection.record.loads["load"][0]))
            sys.stdout.flush()
            os._exit(0)
        print(os.wait()[1])
        manager.close()
        """
    )
    assert said.split() == ["1", "0"]


def test_in_multiprocess_mode_a_process_tells_its_own_and_writes_no_file(
    fresh_process: Any, tmp_path: Path
) -> None:
    said = fresh_process(
        """
        import ebbtide
        from ebbtide.integrations.prometheus import collect
        from prometheus_client import REGISTRY, generate_latest

        with ebbtide.PipelineManager(budget="1 GiB", remember=False) as manager:
            collect(manager)
            manager.preload("feature-extraction", MODEL)
            print(generate_latest(REGISTRY).decode())
        """,
        PROMETHEUS_MULTIPROC_DIR=str(tmp_path),
    )
    assert 'ebbtide_loads_total{manager="default"} 1.0' in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("most", [-1, 1.5, True, math.nan, "5"])
def test_a_bound_that_is_no_count_is_refused(
    manager: PipelineManager, registry: CollectorRegistry, most: Any
) -> None:
    with pytest.raises(InputError, match="most takes"):
        collect(manager, registry=registry, most=most)


def test_metrics_are_known_to_the_registry_before_there_are_samples(
    manager: PipelineManager, registry: CollectorRegistry
) -> None:
    collect(manager, registry=registry)
    found = registry.restricted_registry(["ebbtide_loads_total"]).collect()
    assert [family.name for family in found] == ["ebbtide_loads"]


def test_without_the_package_the_error_has_the_command(fresh_process: Any) -> None:
    said = fresh_process(
        """
        import sys
        sys.modules["prometheus_client"] = None
        import ebbtide
        try:
            import ebbtide.integrations.prometheus
        except ebbtide.MissingExtraError as error:
            print(error, error.extra)
        """
    )
    assert "pip install 'ebbtide[prometheus]'" in said
    assert said.split()[-1] == "prometheus"


def test_figures_of_a_device_are_told_and_its_budget_where_it_has_one() -> None:
    status = status_of([])
    both = SimpleNamespace(devices={"cuda:0": (5, 10), "cuda:1": (7, None)})
    _, one = collected(status)
    held, most = prometheus._devices([(one, both)])  # type: ignore[list-item]
    assert [(x.labels["device"], x.value) for x in held.samples] == [("cuda:0", 5), ("cuda:1", 7)]
    assert [(x.labels["device"], x.value) for x in most.samples] == [("cuda:0", 10)]


def test_ebbtide_itself_imports_nothing_of_it(fresh_process: Any) -> None:
    assert ebbtide.PipelineManager
    said = fresh_process(
        """
        import sys, ebbtide
        ebbtide.PipelineManager(budget="1 GiB").close()
        print([name for name in sys.modules if name.startswith(("prometheus", "opentelemetry"))])
        """
    )
    assert said.strip() == "[]"
