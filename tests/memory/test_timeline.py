"""The timeline: what it keeps, what it forgets, and how it is written and drawn."""

from __future__ import annotations

import csv
import io
import json
import sys
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbtide.errors import InputError, MissingExtraError
from ebbtide.memory import Timeline
from ebbtide.memory.timeline import Event, Sample, _thinned, _ticks, draw

MB = 10**6
SVG = "{http://www.w3.org/2000/svg}"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def sample(seconds: float, anonymous: int = 50 * MB, limit: int = 120 * MB, **more: Any) -> Sample:
    return Sample(seconds, anonymous, 10 * MB, 0, limit, limit - anonymous, **more)


def texts(drawing: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(drawing).iter(f"{SVG}text")]


def of_class(drawing: str, name: str) -> list[ElementTree.Element]:
    root = ElementTree.fromstring(drawing)
    return [element for element in root.iter() if element.get("class") == name]


# What it keeps


@given(
    capacity=st.integers(1, 9),
    seconds=st.lists(st.integers(0, 10**9), max_size=30),
)
def test_it_keeps_the_last_samples_in_order(capacity: int, seconds: list[int]) -> None:
    timeline = Timeline(capacity)
    for second in seconds:
        timeline.add(sample(float(second)))
    assert [kept.seconds for kept in timeline.samples] == seconds[-capacity:]
    assert len(timeline) == min(capacity, len(seconds))


@given(
    st.builds(
        Sample,
        seconds=st.integers(0, 10**12).map(lambda number: number / 1e6),
        anonymous=st.integers(0, 2**62),
        file_backed=st.integers(0, 2**62),
        swapped=st.integers(0, 2**62),
        limit=st.integers(0, sys.maxsize),
        available=st.integers(0, sys.maxsize),
        group_limit=st.none() | st.integers(0, 2**60),
        group_usage=st.none() | st.integers(0, 2**60),
        some=st.none() | st.integers(0, 10_000).map(lambda number: number / 100),
        full=st.none() | st.integers(0, 10_000).map(lambda number: number / 100),
    )
)
def test_a_sample_comes_back_as_it_went_in(given_sample: Sample) -> None:
    timeline = Timeline(3)
    timeline.add(given_sample)
    assert timeline.samples == [given_sample]


def test_its_bytes_are_what_it_says_and_do_not_grow() -> None:
    timeline = Timeline(3600)
    assert timeline.nbytes == 80 * 3601
    for second in range(4000):
        timeline.add(sample(second))
    assert timeline.nbytes == 80 * 3601


def test_a_note_has_the_time_and_its_facts() -> None:
    clock = Clock()
    timeline = Timeline(clock=clock)
    clock.now += 2.5
    timeline.note("ready", "MiniLM", charged=7)
    assert timeline.events == [Event(2.5, "ready", "MiniLM", {"charged": 7})]


def test_only_the_last_thousand_events_are_kept() -> None:
    timeline = Timeline()
    for number in range(1005):
        timeline.note("ready", str(number))
    assert len(timeline.events) == 1000
    assert timeline.events[0].label == "5"


@pytest.mark.parametrize("capacity", [0, -1, 2.5, "many"])
def test_a_capacity_that_is_none_is_refused(capacity: Any) -> None:
    with pytest.raises(InputError, match="capacity takes a number of samples"):
        Timeline(capacity)


def test_the_repr_says_what_is_in_it() -> None:
    timeline = Timeline()
    timeline.add(sample(0))
    assert repr(timeline) == "<Timeline: 1 samples, 0 events>"


# Written


def filled() -> Timeline:
    clock = Clock()
    timeline = Timeline(clock=clock)
    timeline.add(sample(0.0, some=1.5))
    clock.now += 0.5
    timeline.note("ready", 'a "model", two', charged=3, path=Path("x"))
    timeline.add(sample(1.0, group_limit=9, group_usage=4))
    return timeline


def test_the_table_has_samples_and_events_in_the_order_they_happened() -> None:
    file = io.StringIO()
    filled().to_csv(file)
    rows = list(csv.DictReader(io.StringIO(file.getvalue())))
    assert [row["kind"] for row in rows] == ["sample", "ready", "sample"]
    assert [float(row["seconds"]) for row in rows] == [0.0, 0.5, 1.0]
    assert rows[0]["anonymous"] == str(50 * MB)
    assert rows[0]["some"] == "1.5"
    assert rows[0]["group_limit"] == ""
    assert rows[2]["group_usage"] == "4"
    assert rows[1]["label"] == 'a "model", two'
    assert json.loads(rows[1]["facts"]) == {"charged": 3, "path": "x"}


def test_the_table_goes_to_a_path_as_well(tmp_path: Path) -> None:
    file = io.StringIO()
    timeline = filled()
    timeline.to_csv(file)
    timeline.to_csv(tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == file.getvalue()


# Drawn


def test_a_drawing_without_a_path_is_returned_and_is_what_a_notebook_shows() -> None:
    timeline = filled()
    assert timeline.plot().startswith("<svg ")
    assert timeline._repr_svg_() == timeline.plot()


def test_the_area_is_as_high_as_the_memory_was() -> None:
    drawing = draw([sample(0, 0), sample(10, 60 * MB), sample(20, 30 * MB)], [])
    (area,) = of_class(drawing, "anonymous")[:1]
    points = [tuple(map(float, one.split(","))) for one in area.get("points", "").split()]
    ground, high, low = points[0], points[1], points[2]
    assert ground[1] - high[1] == pytest.approx(2 * (ground[1] - low[1]), abs=0.2)
    assert low[0] - high[0] == pytest.approx(high[0] - ground[0], abs=0.2)


def test_a_near_limit_is_a_line_and_a_far_one_is_told() -> None:
    near = draw([sample(0), sample(1)], [])
    assert {element.tag for element in of_class(near, "limit")} == {f"{SVG}line", f"{SVG}polyline"}
    assert "limit 120 MB" in texts(near)
    far = draw([sample(0, limit=10**12), sample(1, limit=10**12)], [])
    assert of_class(far, "limit") == []
    assert "limit 1,000,000 MB (far above)" in texts(far)


def test_the_axes_have_their_units_and_round_numbers() -> None:
    drawn = texts(draw([sample(0.03), sample(9.9)], []))
    assert {"MB", "seconds", "0", "50", "100", "2", "4"} <= set(drawn)


def test_an_event_is_a_mark_with_its_label_where_it_happened() -> None:
    drawing = draw([sample(0), sample(10)], [Event(5, "ready", "MiniLM", {"charged": 3})])
    (mark,) = of_class(drawing, "mark")
    (axis_from, axis_to) = 64, 860 - 24
    assert float(mark.get("x1", 0)) == (axis_from + axis_to) / 2
    assert "ready MiniLM" in texts(drawing)
    assert "5.0 s: ready MiniLM (charged 3)" in drawing


def test_an_event_from_before_the_first_sample_that_is_kept_is_not_drawn() -> None:
    drawing = draw([sample(100), sample(110)], [Event(5, "ready", "old")])
    assert of_class(drawing, "mark") == []


def test_labels_that_find_no_room_are_left_to_hovering() -> None:
    events = [Event(5, "ready", f"model-{number}") for number in range(10)]
    drawing = draw([sample(0), sample(10)], events)
    assert len(of_class(drawing, "mark")) == 10
    assert sum("ready" in text for text in texts(drawing)) == 4


def test_pressure_is_drawn_as_an_alarm() -> None:
    drawing = draw([sample(0), sample(10)], [Event(5, "pressure", "limit"), Event(7, "ready", "")])
    assert len(of_class(drawing, "event alarm")) == 2  # the mark and its label
    assert len(of_class(drawing, "event")) == 2


def test_a_dark_display_gets_colours_of_its_own() -> None:
    assert "@media (prefers-color-scheme:dark)" in draw([], [])


def test_a_timeline_without_samples_can_be_drawn() -> None:
    assert texts(Timeline().plot()) == ["no samples yet"]


def test_a_long_timeline_is_thinned_without_losing_its_peak() -> None:
    samples = [sample(second, 10 * MB) for second in range(3600)]
    samples[1234] = sample(1234, 99 * MB)
    thinned = _thinned(samples, 772)
    assert len(thinned) <= 772
    assert max(one.anonymous for one in thinned) == 99 * MB
    assert len(draw(samples, [])) < 60_000


@given(
    label=st.text(),
    kind=st.text(),
    seconds=st.lists(st.floats(0, 1e7), min_size=1, max_size=20).map(sorted),
    anonymous=st.integers(0, 2**50),
    limit=st.integers(0, sys.maxsize),
)
def test_whatever_happened_the_drawing_is_sound_xml(
    label: str, kind: str, seconds: list[float], anonymous: int, limit: int
) -> None:
    samples = [Sample(second, anonymous, 5, 0, limit, 0) for second in seconds]
    events = [Event(second, kind, label, {"why": label}) for second in seconds]
    root = ElementTree.fromstring(draw(samples, events))
    assert root.tag == f"{SVG}svg"


@given(bottom=st.floats(0, 1e6), span=st.floats(0.01, 1e7))
def test_ticks_are_few_rising_and_inside(bottom: float, span: float) -> None:
    ticks = _ticks(bottom, bottom + span, 8)
    assert len(ticks) <= 10
    assert ticks == sorted(set(ticks))
    assert all(bottom - span * 0.01 <= tick <= bottom + span * 1.01 for tick in ticks)


def test_an_svg_is_written_to_its_path(tmp_path: Path) -> None:
    timeline = filled()
    drawn = timeline.plot(tmp_path / "t.SVG")
    assert (tmp_path / "t.SVG").read_text() == drawn


def test_a_png_is_made_by_cairosvg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def svg2png(*, bytestring: bytes, write_to: str, scale: int) -> None:
        assert bytestring.startswith(b"<svg ")
        Path(write_to).write_bytes(b"PNG")

    cairosvg = types.ModuleType("cairosvg")
    cairosvg.svg2png = svg2png  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cairosvg", cairosvg)
    filled().plot(tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes() == b"PNG"


def test_a_png_without_cairosvg_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cairosvg", None)
    with pytest.raises(MissingExtraError, match="pip install cairosvg"):
        filled().plot(tmp_path / "t.png")
    assert not list(tmp_path.iterdir())


def test_another_kind_of_picture_is_refused() -> None:
    with pytest.raises(InputError, match=r"\.svg or \.png"):
        filled().plot("t.jpeg")
