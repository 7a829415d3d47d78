"""A live view in a notebook: one output, which is replaced at each look."""

from __future__ import annotations

import importlib.util
import re
import sys
import threading
import types
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

import ebbtide
from ebbtide.errors import MissingExtraError
from ebbtide.integrations.notebook import NotebookView, live_view, page
from ebbtide.manager.live_facts import Looker

MODELS = Path(__file__).parents[1] / "models"


class Cell:
    """What a notebook shows below a cell; stands in for IPython's display."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.displays = 0
        self.changed = threading.Semaphore(0)

    def display(self, page: object, *, display_id: bool) -> Cell:
        assert display_id
        self.displays += 1
        self.update(page)
        return self

    def update(self, page: object) -> None:
        self.shown.append(page._repr_html_())  # type: ignore[attr-defined]
        self.changed.release()


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cell]:
    cell = Cell()
    module = types.ModuleType("IPython.display")
    module.display = cell.display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    yield cell
    assert "ebbtide-live-view" not in [thread.name for thread in threading.enumerate()]


def text_of(page: str) -> str:
    return re.sub(r"<[^>]+>", "", re.sub(r"<style>.*?</style>", "", page, flags=re.S))


def test_one_output_is_replaced_while_the_block_runs(cell: Cell) -> None:
    with (
        live_view(interval=0.1),
        ebbtide.PipelineManager("4 GB", remember=False) as manager,
        manager.acquire("fill-mask", str(MODELS / "tiny-mlm")),
    ):
        while "1 pipeline, 1 in use" not in text_of(cell.shown[-1]):
            assert cell.changed.acquire(timeout=30)
        assert "fill-mask tiny-mlm" in cell.shown[-1]
    assert cell.displays == 1


def test_it_ends_with_a_summary_in_its_place(cell: Cell) -> None:
    view = live_view(interval=0.1).start()
    with ebbtide.PipelineManager("4 GB", remember=False) as manager:
        manager.preload("fill-mask", str(MODELS / "tiny-mlm"))
        while "ready after" not in cell.shown[-1]:
            assert cell.changed.acquire(timeout=30)
    view.stop()
    assert "1 load, 1 disposal" in text_of(cell.shown[-1])
    assert "1 receipt, all verified" in text_of(cell.shown[-1])
    count = len(cell.shown)
    view.stop()
    assert len(cell.shown) == count


def test_started_twice_it_is_shown_once(cell: Cell) -> None:
    with NotebookView(interval=0.1) as view:
        view.start()
    assert cell.displays == 1


def test_a_page_has_the_drawing_and_obeys_no_mark_up_in_a_name() -> None:
    looker = Looker()
    looker._tell(0.0, "failed", "ner <script>", {"error": "<b>&"})
    found = page(looker.look())
    assert "<script>" not in found
    assert "&lt;b&gt;&amp;" in found
    drawing = found[found.index("<svg") : found.index("</svg>") + 6]
    assert ET.fromstring(drawing).tag.endswith("svg")


def test_a_page_of_an_hour_stays_small() -> None:
    class Clock:
        now = 0.0

        def __call__(self) -> float:
            self.now += 0.25
            return self.now

    looker = Looker(clock=Clock(), managers=list)
    for _ in range(1500):
        facts = looker.look()
    assert len(page(facts)) < 30_000


def test_without_ipython_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython", None)
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    with pytest.raises(MissingExtraError, match="pip install ipython"):
        live_view()


@pytest.mark.skipif(importlib.util.find_spec("IPython") is None, reason="IPython is not installed")
def test_with_the_real_ipython_every_look_updates_the_same_display() -> None:
    from IPython.core.displaypub import CapturingDisplayPublisher
    from IPython.core.interactiveshell import InteractiveShell

    told = threading.Event()

    class Publisher(CapturingDisplayPublisher):
        def publish(self, *given: object, **facts: object) -> None:
            super().publish(*given, **facts)
            if len(self.outputs) >= 3:
                told.set()

    shell = InteractiveShell.instance()
    shell.display_pub = Publisher()
    try:
        with live_view(interval=0.1):
            assert told.wait(30)
        outputs = shell.display_pub.outputs
    finally:
        InteractiveShell.clear_instance()
    assert {one["transient"]["display_id"] for one in outputs} == {
        outputs[0]["transient"]["display_id"]
    }
    assert [bool(one.get("update")) for one in outputs[:3]] == [False, True, True]
    assert "ebbtide-live" in outputs[-1]["data"]["text/html"]
    assert "anonymous memory at most" in outputs[-1]["data"]["text/plain"]
