"""A live view in a notebook: the process's pipelines, budget and memory, below the cell.

It needs IPython alone, which every notebook has: one output, which is replaced at each look.
"""

from __future__ import annotations

import html
import importlib
from typing import Any, Self

from ebbtide.errors import MissingExtraError
from ebbtide.manager.live_facts import Facts, Watch
from ebbtide.manager.live_lines import Line, lines, shortened, summary
from ebbtide.memory.timeline import Event, Sample, draw

INTERVAL = 1.0
"""Seconds between two looks."""
WIDTH, HEIGHT = 110, 60
"""Letters and lines that the text may take."""
MOST_POINTS = 200
"""Points that the drawing has at most."""

_STYLE = """<style>
.ebbtide-live pre{font:12px/1.45 ui-monospace,Menlo,Consolas,monospace;margin:0;padding:8px 10px;\
background:transparent;color:inherit;overflow-x:auto}
.ebbtide-live .bold{font-weight:600}
.ebbtide-live .dim,.ebbtide-live .free{opacity:.55}
.ebbtide-live .good{color:#2a9d5c}
.ebbtide-live .warn,.ebbtide-live .workspace{color:#b98000}
.ebbtide-live .bad{color:#c4432b;font-weight:600}
.ebbtide-live .floor{color:#6e7f95}
.ebbtide-live .pipelines,.ebbtide-live .memory{color:#2f81c7}
.ebbtide-live svg{max-width:100%;height:auto}
</style>"""


class NotebookView:
    """Shows this process's pipelines in a notebook, until `stop`.

    Beside a ``with`` block, `start` has it stay below its cell while further cells run. It ends
    with a summary in its place.

    Args:
        interval: Seconds between two looks; 0.1 at least.

    Raises:
        InputError: The interval is no such number.
        MissingExtraError: IPython cannot be imported.

    Example:
        >>> with NotebookView():  # doctest: +SKIP
        ...     work()
    """

    def __init__(self, *, interval: float = INTERVAL) -> None:
        self._display = _display()
        self._watch = Watch(self._show, interval)
        self._handle: Any = None
        self._last: Facts | None = None

    def start(self) -> Self:
        """Show it below this cell from now on; does nothing where it is shown."""
        if not self._watch.is_running:
            self._last = self._watch.looker.look()
            self._handle = self._display(_Page(self._last), display_id=True)
            self._watch.start()
        return self

    def stop(self) -> None:
        """Show a summary in its place; does nothing where it is not shown."""
        if self._watch.stop() and self._handle is not None and self._last is not None:
            self._handle.update(_Page(self._last, is_over=True))

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *about: object) -> None:
        self.stop()

    def _show(self, facts: Facts) -> None:
        self._last = facts
        self._handle.update(_Page(facts))


def live_view(*, interval: float = INTERVAL) -> NotebookView:
    """A live view of this process's pipelines for a notebook; see `NotebookView`.

    Args:
        interval: Seconds between two looks; 0.1 at least.

    Raises:
        InputError: The interval is no such number.
        MissingExtraError: IPython cannot be imported.
    """
    return NotebookView(interval=interval)


class _Page:
    """Facts as IPython shows them: HTML in a notebook, text elsewhere."""

    def __init__(self, facts: Facts, *, is_over: bool = False) -> None:
        self._facts = facts
        self._is_over = is_over

    def _repr_html_(self) -> str:
        return page(self._facts, is_over=self._is_over)

    def __repr__(self) -> str:
        return "\n".join(summary(self._facts))


def page(facts: Facts, *, is_over: bool = False) -> str:
    """What a notebook shows of some facts, as HTML.

    Args:
        facts: What there is.
        is_over: Whether the summary is to be shown instead of the pipelines.

    Example:
        >>> from ebbtide.manager.live_facts import Looker
        >>> "ebbtide-live" in page(Looker().look())
        True
    """
    found: list[Line] = lines(facts, WIDTH, HEIGHT, title="ebbtide")
    if is_over:
        found = [[(one, "")] for one in summary(facts)]
    text = "\n".join(map(_as_html, found))
    begun = facts.history[0].seconds if facts.history else 0.0
    names = shortened(one.pipeline for one in facts.happenings)
    events = [
        Event(one.seconds, one.kind, names[one.pipeline])
        for one in facts.happenings
        if one.seconds >= begun
    ]
    return f'<div class="ebbtide-live">{_STYLE}<pre>{text}</pre>{_drawing(facts, events)}</div>'


def _as_html(line: Line) -> str:
    return "".join(
        f'<span class="{style}">{html.escape(text)}</span>' if style else html.escape(text)
        for text, style in line
    )


def _drawing(facts: Facts, events: list[Event]) -> str:
    """The drawing of a timeline, of fewer samples: of each run of neighbours the highest."""
    run = max(1, -(-len(facts.history) // MOST_POINTS))
    kept: list[Sample] = [
        max(facts.history[first : first + run], key=lambda one: one.anonymous)
        for first in range(0, len(facts.history), run)
    ]
    return draw(kept, events)


def _display() -> Any:
    try:
        return importlib.import_module("IPython.display").display
    except ImportError as error:
        raise MissingExtraError(
            "A live view in a notebook needs IPython, which is not installed: pip install ipython."
            " On a terminal, manager.live_view() needs nothing.",
            extra="ipython",
        ) from error
