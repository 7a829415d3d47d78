"""A live view: what it sees of managers and pipelines, and how it puts that in lines."""

from __future__ import annotations

import gc
import io
import math
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ebbtide
from ebbtide.errors import InputError
from ebbtide.manager.live_facts import Facts, Given, Happening, Looker, Waiting, in_words
from ebbtide.manager.live_lines import (
    cells_of,
    change_line,
    coloured,
    lines,
    plain,
    shortened,
    span,
    spark,
    summary,
)
from ebbtide.manager.live_view import LiveView, _Lines
from ebbtide.manager.status import ManagerStatus, PipelineStatus
from ebbtide.memory.probe import Limit, MemorySnapshot, Pressure
from ebbtide.memory.timeline import Sample
from ebbtide.receipts import DisposalReceipt

MB = 10**6
MODELS = Path(__file__).parents[1] / "models"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def pipeline_of(key: str, **changed: object) -> PipelineStatus:
    one = PipelineStatus(
        key=key, phase="ready", anonymous=10 * MB, mapped=0, leases=0, pinned=False, uses=1,
        idle=2.0, keep=60.0, reload_seconds=0.1, measured=True,
    )  # fmt: skip
    return replace(one, **changed)  # type: ignore[arg-type]


def manager_of(*entries: PipelineStatus, budget: int = 100 * MB, floor: int = 20 * MB):
    held = sum(one.anonymous for one in entries)
    return ManagerStatus(
        budget=budget, floor=floor, pipelines=held, workspace=5 * MB,
        free=budget - floor - held - 5 * MB, measured=floor + held, mapped=0, devices={},
        waiting=0, counts={}, entries=entries,
    )  # fmt: skip


def facts_of(**changed: object) -> Facts:
    memory = MemorySnapshot(
        50 * MB, 9 * MB, 59 * MB, 0, Limit(1000 * MB, "cgroup v2"), 600 * MB,
        Pressure(0.0, 0.0, "machine"),
    )  # fmt: skip
    history = (Sample(0.0, 40 * MB, 0, 0, 1000 * MB, 600 * MB),)
    facts = Facts(
        seconds=12.0, anonymous=50 * MB, peak=70 * MB, memory=memory, history=history,
        managers=(), alone=(), waiting=(), happened=0, happenings=(), tally={}, given=Given(),
    )  # fmt: skip
    return replace(facts, **changed)  # type: ignore[arg-type]


def shown(facts: Facts, width: int = 100, height: int = 40) -> str:
    return "\n".join(plain(line) for line in lines(facts, width, height))


# What it sees


def test_it_sees_a_managers_pipelines_and_those_without_one() -> None:
    looker = Looker()
    with (
        ebbtide.PipelineManager("4 GB", remember=False) as manager,
        manager.acquire("fill-mask", str(MODELS / "tiny-mlm")),
        ebbtide.pipeline("feature-extraction", MODELS / "tiny-bert") as alone,
    ):
        facts = looker.look()
        (managed,) = facts.managers[0].entries
        assert (managed.phase, managed.leases) == ("ready", 1)
        (other,) = facts.alone
        assert (other.phase, other.leases) == ("ready", 0)
        assert other.anonymous == alone.memory.anonymous
        assert other.key == f"feature-extraction {MODELS / 'tiny-bert'}"
        alone.sleep()
        assert looker.look().alone[0].phase == "asleep"
    after = looker.look()
    assert (after.managers, after.alone) == ((), ())
    assert after.tally == {"load": 2, "sleep": 1, "disposal": 2}
    assert after.given.receipts == 2
    kinds = [one.kind for one in after.happenings]
    assert kinds.count("disposed") == 2
    assert {"loading", "ready", "made", "sleeping", "evicting"} <= set(kinds)


def test_what_a_manager_did_between_two_looks_is_seen_once_though_it_is_closed() -> None:
    looker = Looker()
    with ebbtide.PipelineManager("4 GB", remember=False) as manager:
        looker.poll()
        for _ in range(2):
            manager.preload("fill-mask", str(MODELS / "tiny-mlm"))
            manager.evict("fill-mask", str(MODELS / "tiny-mlm"))
        first = looker.look()
        assert first.tally == {"load": 2, "disposal": 2}
        again = looker.look()
        assert (again.tally, again.happened) == (first.tally, first.happened)
        manager.preload("fill-mask", str(MODELS / "tiny-mlm"))
    assert looker.look().tally == {"load": 3, "disposal": 3}


def test_who_waits_is_seen_with_how_long() -> None:
    with ebbtide.PipelineManager("4 GB", remember=False, max_pipelines=1) as manager:
        with manager.acquire("fill-mask", str(MODELS / "tiny-mlm")):
            waiter = threading.Thread(
                target=manager.preload, args=("feature-extraction", str(MODELS / "tiny-bert"))
            )
            waiter.start()
            looker = Looker()
            while not (facts := looker.look()).waiting:
                pass
            assert facts.waiting[0].pipeline.startswith("feature-extraction")
            assert facts.waiting[0].seconds >= 0
        waiter.join()


def test_looking_keeps_no_pipeline_alive() -> None:
    looker = Looker()
    gc.disable()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pipe = ebbtide.pipeline("feature-extraction", MODELS / "tiny-bert")
            looker.look()
            gone = threading.Event()
            pipe._lifecycle.on_finished(gone.set)
            del pipe
            assert gone.wait(30)
            assert looker.look().tally == {"load": 1, "disposal": 1}
    finally:
        gc.enable()
    assert any(one.category is ResourceWarning for one in caught)


def test_the_memory_of_five_minutes_is_kept_and_no_more() -> None:
    clock = Clock()
    looker = Looker(clock=clock, managers=list)
    for _ in range(500):
        clock.now += 1
        facts = looker.look()
    assert facts.history[-1].seconds - facts.history[0].seconds == pytest.approx(300, abs=1)


def test_a_view_refuses_an_interval_that_would_cost_too_much() -> None:
    with pytest.raises(InputError, match="interval takes seconds"):
        LiveView(interval=0.01)


# What it says


def test_the_parts_of_the_budget_fill_the_bar_in_their_proportions() -> None:
    entries = [pipeline_of("fill-mask one", anonymous=50 * MB)]
    found = lines(facts_of(managers=(manager_of(*entries),)), 124, 40)
    bar = next(line for line in found if line[0][0].startswith("budget"))
    sizes = {style: len(text) for text, style in bar[1:5]}
    assert sizes == {"floor": 20, "pipelines": 50, "workspace": 5, "free": 25}


def test_a_budget_that_is_overdrawn_says_by_how_much() -> None:
    entries = [pipeline_of("fill-mask one", anonymous=90 * MB)]
    text = shown(facts_of(managers=(manager_of(*entries),)))
    assert "free -15.0 MB" in text


def test_a_terminal_of_80_columns_shows_every_figure() -> None:
    facts = facts_of(managers=(manager_of(pipeline_of("ner x"), budget=64_000 * MB),))
    memory = replace(facts.memory, limit=Limit(64_000 * MB, "cgroup v2"), available=60_000 * MB)
    found = shown(replace(facts, memory=memory), width=80).splitlines()
    assert found[1].endswith(" 64000.0 MB")
    assert found[2].endswith("free 63965.0 MB")
    assert found[4].endswith("60000.0 MB left; pressure some 0 %, full 0 %")


def test_a_row_says_all_that_is_known_of_a_pipeline() -> None:
    one = pipeline_of("ner /models/a/bert", mapped=20 * MB, leases=2, uses=17, keep=290.0)
    row = next(x for x in shown(facts_of(alone=(one,))).splitlines() if x.startswith("ner"))
    assert row.split() == ["ner", "bert", "ready", "10.0", "20.0", "2", "17", "4m50s"]


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"pinned": True, "keep": math.inf}, "pinned"),
        ({"keep": math.inf}, "stays"),
        ({"keep": 30.0}, "30s"),
        ({"measured": False, "anonymous": 7 * MB}, "7.0~"),
    ],
)
def test_a_row_says_until_when_a_pipeline_stays_and_whether_it_was_measured(
    changed: dict[str, object], word: str
) -> None:
    text = shown(facts_of(alone=(pipeline_of("ner x", **changed),)))
    assert word in text.split()


def test_pipelines_that_find_no_room_are_counted() -> None:
    many = tuple(pipeline_of(f"ner m{number}") for number in range(40))
    text = shown(facts_of(alone=many), height=15)
    rows = [line for line in text.splitlines() if line.startswith("ner")]
    assert f"and {40 - len(rows)} more" in text
    assert len(text.splitlines()) <= 15


def test_who_waits_and_pressure_are_said() -> None:
    facts = facts_of(waiting=(Waiting("ner /a/bert", 3.0), Waiting("ner /a/bert", 1.0)))
    hard = replace(facts.memory, pressure=Pressure(22.0, 11.0, "machine"))
    text = shown(replace(facts, memory=hard))
    assert "2, the first for 3s: ner bert" in text
    assert "some 22 %, full 11 %" in text


def test_a_receipt_is_told_in_words() -> None:
    receipt = DisposalReceipt(31_400_000, 31_200_000, 200_000, True, True, 0.014, "trim")
    words = in_words("disposed", {"receipt": receipt})
    assert words == "disposed: released 31.2 MB of 31.4 MB in 14 ms (verified)"
    event = Happening(0.0, 0.0, "disposed", "ner /a/bert", words)
    assert f"ner bert: {words}" in shown(facts_of(happenings=(event,)))


def test_the_line_of_memory_shows_peaks_and_is_full_from_left_to_right() -> None:
    points = [(float(second), 10 * MB) for second in range(301)]
    points[148] = (148.0, 80 * MB)
    ((text, _), (range_, _)) = spark(points, 60, 300.0, False)
    assert text.count("█") == 1
    assert text.count("▁") == 59
    assert range_ == " 10.0 to 80.0 MB"


def test_the_summary_says_what_was_never_given_back() -> None:
    given = Given(3, 2, 30 * MB, 40 * MB, (("ner /a/bert", "released 1.0 MB"),))
    facts = facts_of(
        alone=(pipeline_of("ner /a/bert"),), tally={"load": 4, "disposal": 3}, given=given
    )
    text = "\n".join(summary(facts))
    assert "70.0 MB of anonymous memory at most, 50.0 MB at the end; 4 loads, 3 disposals" in text
    assert "3 receipts, 2 verified: released 30.0 MB of 40.0 MB" in text
    assert "1 pipeline was still alive, with 10.0 MB" in text


def test_a_view_may_be_shown_again(capsys: pytest.CaptureFixture[str]) -> None:
    view = LiveView(interval=0.1)
    with ebbtide.PipelineManager("4 GB", remember=False) as manager, view:
        for _ in range(2):
            manager.preload("fill-mask", str(MODELS / "tiny-mlm"))
            manager.evict("fill-mask", str(MODELS / "tiny-mlm"))
            view.stop()
            view.start()
    said = capsys.readouterr().err
    assert said.count("; 1 load, 1 disposal\n") == 1
    assert said.count("; 2 loads, 2 disposals\n") == 2
    view.stop()
    assert capsys.readouterr().err == ""


def test_where_there_is_no_terminal_a_line_comes_at_each_change_once_a_second() -> None:
    out = io.StringIO()
    screen = _Lines(out)
    one, two = pipeline_of("ner a"), pipeline_of("ner b")
    screen.show(facts_of(seconds=0.0))
    assert out.getvalue() == ""  # nothing is there yet
    screen.show(facts_of(seconds=1.0, alone=(one,)))
    screen.show(facts_of(seconds=1.5, alone=(one, two)))  # too soon
    screen.show(facts_of(seconds=2.5, alone=(one, two)))
    screen.show(facts_of(seconds=9.0, alone=(one, two)))  # nothing new
    screen.show(facts_of(seconds=9.5, alone=(one,)))
    counts = [line.split("; ")[1] for line in out.getvalue().splitlines()]
    assert counts == ["1 ready", "2 ready", "1 ready"]


def test_a_line_of_change_names_the_last_event_and_counts_the_others() -> None:
    event = Happening(0.0, 0.0, "ready", "ner /a/bert", "ready after 1 s: 9.0 MB")
    line = change_line(facts_of(happenings=(event,), alone=(pipeline_of("ner x"),)), 3)
    assert line == (
        "12.0 s, 50.0 MB; 1 ready; ner bert: ready after 1 s: 9.0 MB (and 2 more events)"
    )


def test_pressure_is_told_with_its_level_and_counted() -> None:
    with ebbtide.PipelineManager("4 GB", remember=False) as manager:
        manager._core.monitor.note("pressure", "full", source="psi (machine)", available=1)
        looker = Looker()
        facts = looker.look()
    (event,) = [one for one in facts.happenings if one.kind == "pressure"]
    assert (event.pipeline, event.is_alarm) == ("", True)
    assert event.words == "memory pressure (full), told by psi (machine)"
    assert facts.tally["pressure signal"] == 1


# Names

KEYS = st.builds(
    "{} {}{}".format,
    st.sampled_from(["ner", "fill-mask"]),
    st.lists(st.sampled_from(["a", "bert", "モデル"]), min_size=1, max_size=4).map("/".join),
    st.sampled_from(["", " (dtype='q8')", " (dtype='q4')"]),
)


def test_a_name_has_no_more_of_a_path_and_its_options_than_it_needs() -> None:
    keys = ["ner /x/a/bert", "ner /x/b/bert", "fill-mask /x/a/gpt (dtype='q8')"]
    assert list(shortened(keys).values()) == ["ner a/bert", "ner b/bert", "fill-mask gpt"]
    keys = ["ner /x/bert (dtype='q8')", "ner /x/bert"]
    assert shortened(keys)["ner /x/bert (dtype='q8')"] == "ner bert (dtype='q8')"


@given(st.lists(KEYS, unique=True, max_size=8))
def test_short_names_tell_all_pipelines_apart(keys: list[str]) -> None:
    assert len(set(shortened(keys).values())) == len(keys)


@given(st.lists(st.text(), max_size=5), st.integers(8, 60), st.booleans())
def test_a_short_name_fits_its_column(keys: list[str], width: int, ascii_only: bool) -> None:
    for name in shortened(keys, width, ascii_only=ascii_only).values():
        assert cells_of(name) <= width
        assert name.isprintable()


@settings(max_examples=60)
@given(
    st.lists(st.text(max_size=60), unique=True, max_size=30),
    st.integers(30, 150),
    st.integers(6, 60),
    st.booleans(),
    st.integers(-(10**13), 10**13),
    st.sampled_from(["ready", "evicting", "falling asleep", "empty"]),
)
def test_a_view_never_leaves_its_rows_and_columns(
    keys: list[str], width: int, height: int, ascii_only: bool, size: int, phase: str
) -> None:
    entries = [pipeline_of(key, anonymous=abs(size), phase=phase) for key in keys]
    manager = replace(manager_of(*entries), free=size)
    events = tuple(Happening(0.0, 0.0, "failed", key, key) for key in keys[:10])
    waiting = tuple(Waiting(key, 1.0) for key in keys)
    facts = facts_of(managers=(manager,), happenings=events, waiting=waiting)
    found = lines(facts, width, height, title="\x1b[2J", ascii_only=ascii_only)
    assert len(found) <= height
    for line in found:
        assert cells_of(plain(line)) <= width
        assert plain(line).isprintable()
        assert plain(line).isascii() or not ascii_only
        assert "\x1b[2J" not in coloured(line)


@given(st.floats(0, 1e12))
def test_a_time_takes_few_letters(seconds: float) -> None:
    assert len(span(seconds)) <= 6
