"""What a process held over time, with what happened meanwhile: bounded, and it can be drawn.

Notes may come from any thread, a finalizer or a signal handler: nothing here takes a lock. Samples
come from one thread only.
"""

from __future__ import annotations

import array
import csv
import html
import importlib
import io
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import IO

from ebbtide.errors import InputError, MissingExtraError

__all__ = ["Event", "Sample", "Timeline"]

_MB = 10**6
_UNKNOWN = -1
_COLUMNS = 10
_EVENTS = 1000


@dataclass(frozen=True, slots=True)
class Sample:
    """One reading. Bytes, but for ``seconds`` since the timeline began and the percentages.

    ``limit`` and ``available`` are those of a `MemorySnapshot`. ``group_limit`` and ``group_usage``
    belong to the tightest cgroup that limits this process: what all of its processes hold, cached
    files included. ``some`` and ``full`` are the percent of the last ten seconds lost waiting for
    memory. Each of these is None where the system does not tell.
    """

    seconds: float
    anonymous: int
    file_backed: int
    swapped: int
    limit: int
    available: int
    group_limit: int | None = None
    group_usage: int | None = None
    some: float | None = None
    full: float | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened: ``kind`` is a short word ("ready"), ``label`` says to what.

    ``seconds`` count from the timeline's begin; ``facts`` is whatever else is known.
    """

    seconds: float
    kind: str
    label: str
    facts: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))


class Timeline:
    """The last samples and the last events, the oldest forgotten first.

    A sample takes 80 bytes: the default capacity, an hour of one a second, takes 288 kB, all of it
    from the start. The last 1,000 events are kept.

    Args:
        capacity: How many samples to keep.
        clock: Seconds; a test gives its own.

    Raises:
        InputError: The capacity is not a whole number of at least 1.

    Example:
        >>> timeline = Timeline(capacity=60)
        >>> timeline.note("ready", "all-MiniLM-L6-v2", charged=1_400_000)
        >>> timeline.events[0].kind
        'ready'
        >>> timeline.nbytes
        4880
    """

    def __init__(
        self, capacity: int = 3600, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if not isinstance(capacity, int) or capacity < 1:
            raise InputError(
                f"capacity takes a number of samples, 1 or more, not {capacity!r}.", value=capacity
            )
        self.capacity = capacity
        self.began = time.time()
        """When it began, in seconds since 1970."""
        self._clock = clock
        self._start = clock()
        # One row more than is ever shown, so that the one being overwritten is not.
        self._rows = array.array("q", bytes(8 * _COLUMNS * (capacity + 1)))
        self._count = 0
        self._events: deque[Event] = deque(maxlen=_EVENTS)

    @property
    def nbytes(self) -> int:
        """The bytes that the samples take, full or empty."""
        return len(self._rows) * self._rows.itemsize

    @property
    def samples(self) -> list[Sample]:
        """The samples that are kept, the oldest first."""
        while True:  # until no sample came between
            count = self._count
            rows = self._rows[:]
            if count == self._count:
                break
        kept = min(count, self.capacity)
        starts = (number % (self.capacity + 1) * _COLUMNS for number in range(count - kept, count))
        return [_sample(rows[start : start + _COLUMNS]) for start in starts]

    @property
    def events(self) -> list[Event]:
        """The events that are kept, the oldest first."""
        return list(self._events)

    def __len__(self) -> int:
        return min(self._count, self.capacity)

    def __repr__(self) -> str:
        return f"<Timeline: {len(self)} samples, {len(self._events)} events>"

    def note(self, kind: str, label: str = "", **facts: object) -> None:
        """Put an event on the timeline; safe on any thread and in signal handlers."""
        self._events.append(Event(self.now(), kind, label, MappingProxyType(facts)))

    def now(self) -> float:
        """Seconds since the timeline began."""
        return self._clock() - self._start

    def add(self, sample: Sample) -> None:
        """Keep a sample, forgetting the oldest where it is full; for one thread only."""
        row = array.array(
            "q",
            [
                round(sample.seconds * 1e6),
                sample.anonymous,
                sample.file_backed,
                sample.swapped,
                sample.limit,
                sample.available,
                _UNKNOWN if sample.group_limit is None else sample.group_limit,
                _UNKNOWN if sample.group_usage is None else sample.group_usage,
                _UNKNOWN if sample.some is None else round(sample.some * 100),
                _UNKNOWN if sample.full is None else round(sample.full * 100),
            ],
        )
        start = self._count % (self.capacity + 1) * _COLUMNS
        self._rows[start : start + _COLUMNS] = row
        self._count += 1

    def to_csv(self, path: str | os.PathLike[str] | IO[str]) -> None:
        """Write everything as one table, in the order it happened.

        ``kind`` is "sample", or the event's; an event has a label, and its facts as JSON.

        Args:
            path: A file's name, or a text file that is open for writing.
        """
        if not isinstance(path, str | os.PathLike):
            self._write_csv(path)
            return
        with open(path, "w", newline="", encoding="utf-8") as file:
            self._write_csv(file)

    def _write_csv(self, file: IO[str]) -> None:
        figures = [name for name in Sample.__slots__ if name != "seconds"]
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["seconds", "kind", *figures, "label", "facts"])
        rows: list[tuple[float, list[object]]] = []
        for sample in self.samples:
            values: list[object] = [getattr(sample, name) for name in figures]
            rows.append((sample.seconds, ["sample", *values]))
        for event in self.events:
            facts = json.dumps(dict(event.facts), default=str) if event.facts else None
            blank = [None] * len(figures)
            rows.append((event.seconds, [event.kind, *blank, event.label, facts]))
        rows.sort(key=lambda row: row[0])
        for seconds, cells in rows:
            cells += [None] * (len(figures) + 3 - len(cells))
            writer.writerow([f"{seconds:.6f}", *cells])

    def plot(self, path: str | os.PathLike[str] | None = None) -> str:
        """Draw it: anonymous and file-backed memory, the limit, and the events as marks.

        Args:
            path: Where to write it, by its suffix as SVG or PNG; None only returns it.

        Returns:
            The drawing as the text of an SVG.

        Raises:
            InputError: The file's name ends in neither ".svg" nor ".png".
            MissingExtraError: A PNG needs the package cairosvg, and it cannot be imported.
        """
        drawn = draw(self.samples, self.events)
        if path is None:
            return drawn
        suffix = os.path.splitext(path)[1].lower()
        if suffix == ".svg":
            with open(path, "w", encoding="utf-8") as file:
                file.write(drawn)
        elif suffix == ".png":
            try:
                cairosvg = importlib.import_module("cairosvg")
            except (ImportError, OSError) as error:  # OSError: without the cairo library itself
                raise MissingExtraError(
                    "A PNG of the timeline needs cairosvg and the cairo library, and cannot be"
                    " drawn without: pip install cairosvg. An SVG needs nothing: plot('name.svg').",
                    extra="cairosvg",
                ) from error
            cairosvg.svg2png(bytestring=drawn.encode(), write_to=os.fspath(path), scale=2)
        else:
            raise InputError(
                f"A timeline is drawn as .svg or .png, not as {os.fspath(path)!r}.", value=path
            )
        return drawn

    def _repr_svg_(self) -> str:
        return self.plot()


def _sample(row: Sequence[int]) -> Sample:
    time_us, anonymous, file_backed, swapped, limit, available = row[:6]
    group_limit, group_usage, some, full = (None if n == _UNKNOWN else n for n in row[6:])
    return Sample(
        seconds=time_us / 1e6,
        anonymous=anonymous,
        file_backed=file_backed,
        swapped=swapped,
        limit=limit,
        available=available,
        group_limit=group_limit,
        group_usage=group_usage,
        some=None if some is None else some / 100,
        full=None if full is None else full / 100,
    )


# The drawing. The plain colours are the light ones; a dark display overrides them, and a
# converter that knows no media query draws light.

_WIDTH, _HEIGHT = 860, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 92, 40
_PLOT_WIDTH, _PLOT_HEIGHT = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
_LABEL_ROWS, _LABEL_HEIGHT, _LETTER = 4, 14, 6.2
_MOST_LABEL = 28
_ALARMS = frozenset({"pressure", "failed", "leaked"})

_STYLE = """
.ebbtide-timeline text{font:11px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:#57606a}
.ebbtide-timeline .paper{fill:#ffffff}
.ebbtide-timeline .grid{stroke:#e4e8ec;stroke-width:1}
.ebbtide-timeline .axis{stroke:#8c959f;stroke-width:1}
.ebbtide-timeline .anonymous{fill:#2f81c7;fill-opacity:.80}
.ebbtide-timeline .files{fill:#2f81c7;fill-opacity:.25}
.ebbtide-timeline .limit{stroke:#c4432b;stroke-width:1.5;stroke-dasharray:6 4;fill:none}
.ebbtide-timeline .mark{stroke:#6e5fb5;stroke-width:1;stroke-opacity:.6}
.ebbtide-timeline .dot{fill:#6e5fb5}
.ebbtide-timeline .alarm .mark{stroke:#c4432b}
.ebbtide-timeline .alarm .dot,.ebbtide-timeline .alarm text{fill:#c4432b}
@media (prefers-color-scheme:dark){
.ebbtide-timeline text{fill:#a6b0bb}
.ebbtide-timeline .paper{fill:#14181d}
.ebbtide-timeline .grid{stroke:#262d35}
.ebbtide-timeline .axis{stroke:#5b6672}
.ebbtide-timeline .anonymous{fill:#4f9fe0}
.ebbtide-timeline .files{fill:#4f9fe0}
.ebbtide-timeline .limit{stroke:#ff7b61}
.ebbtide-timeline .mark{stroke:#a897f0}
.ebbtide-timeline .dot{fill:#a897f0}
.ebbtide-timeline .alarm .mark{stroke:#ff7b61}
.ebbtide-timeline .alarm .dot,.ebbtide-timeline .alarm text{fill:#ff7b61}
}"""


def draw(samples: Sequence[Sample], events: Sequence[Event]) -> str:
    """Draw samples and events as an SVG; of more samples than pixels, the highest are kept."""
    out = io.StringIO()
    out.write(
        f'<svg xmlns="http://www.w3.org/2000/svg" class="ebbtide-timeline" role="img"'
        f' viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}">'
        f"<title>Memory of this process over time</title><style>{_STYLE}</style>"
        f'<rect class="paper" width="{_WIDTH}" height="{_HEIGHT}" rx="6"/>'
    )
    if samples:
        _draw_plot(out, samples, events)
    else:
        _text(out, _WIDTH / 2, _HEIGHT / 2, "no samples yet", "middle")
    out.write("</svg>")
    return out.getvalue()


def _draw_plot(out: IO[str], samples: Sequence[Sample], events: Sequence[Event]) -> None:
    begin, end = samples[0].seconds, max(samples[-1].seconds, samples[0].seconds + 1)
    shown = [event for event in events if begin - 1 <= event.seconds <= end + 1]
    peak = max(sample.anonymous + sample.file_backed for sample in samples)
    limit = samples[-1].limit
    near = limit <= 3 * peak  # a far limit would press the rest flat, so it is only told
    top = max(peak, max(sample.limit for sample in samples) if near else 0, _MB) * 1.06

    def across(seconds: float) -> float:
        share = (seconds - begin) / (end - begin)
        return _LEFT + _PLOT_WIDTH * min(1.0, max(0.0, share))

    def up(count: float) -> float:
        return _TOP + _PLOT_HEIGHT * (1 - min(1.0, count / top))

    for tick in _ticks(0, top / _MB, 5):
        y = up(tick * _MB)
        _line(out, "grid", _LEFT, y, _WIDTH - _RIGHT, y)
        _text(out, _LEFT - 8, y + 4, f"{tick:,.10g}", "end")
    _text(out, _LEFT - 8, _TOP - 8, "MB", "end")
    for tick in _ticks(begin, end, 8):
        x = across(tick)
        _line(out, "axis", x, _TOP + _PLOT_HEIGHT, x, _TOP + _PLOT_HEIGHT + 4)
        _text(out, x, _TOP + _PLOT_HEIGHT + 17, f"{tick:,.10g}", "middle")
    _text(out, _LEFT + _PLOT_WIDTH / 2, _HEIGHT - 8, "seconds", "middle")

    kept = _thinned(samples, _PLOT_WIDTH)
    floor = [(across(sample.seconds), up(0)) for sample in kept]
    heap = [(across(sample.seconds), up(sample.anonymous)) for sample in kept]
    roof = [(across(s.seconds), up(s.anonymous + s.file_backed)) for s in kept]
    _area(out, "files", heap, roof)
    _area(out, "anonymous", floor, heap)
    _line(out, "axis", _LEFT, up(0), _WIDTH - _RIGHT, up(0))
    if near:
        points = " ".join(f"{across(s.seconds):.1f},{up(s.limit):.1f}" for s in kept)
        out.write(f'<polyline class="limit" points="{points}"/>')
    _draw_legend(out, samples[-1], limit, near)
    _draw_events(out, shown, across)


def _draw_legend(out: IO[str], last: Sample, limit: int, near: bool) -> None:
    x, y = float(_LEFT), 22
    entries = [
        ("anonymous", f"anonymous {last.anonymous / _MB:,.0f} MB"),
        ("files", f"file-backed {last.file_backed / _MB:,.0f} MB"),
    ]
    for style, words in entries:
        out.write(f'<rect class="{style}" x="{x:.1f}" y="{y - 9}" width="11" height="11" rx="2"/>')
        _text(out, x + 16, y, words, "start")
        x += 16 + _LETTER * len(words) + 22
    words = f"limit {limit / _MB:,.0f} MB"
    if near:
        _line(out, "limit", x, y - 4, x + 18, y - 4)
        x += 23
    _text(out, x, y, words if near else f"{words} (far above)", "start")


def _draw_events(out: IO[str], events: Sequence[Event], across: Callable[[float], float]) -> None:
    """Marks with labels in a few rows; where no row has room the label shows on hovering only."""
    ends = [0.0] * _LABEL_ROWS
    labels = io.StringIO()  # above all marks, with paper behind them
    for event in sorted(events, key=lambda event: event.seconds):
        x = across(event.seconds)
        words = f"{event.kind} {event.label}".strip()
        facts = ", ".join(f"{name} {value}" for name, value in event.facts.items())
        full = f"{event.seconds:.1f} s: {words}" + (f" ({facts})" if facts else "")
        if len(words) > _MOST_LABEL:
            words = words[: _MOST_LABEL - 1] + "…"
        width = _LETTER * len(words)
        at_end = x + width + 4 > _WIDTH - 4
        start = x - width - 4 if at_end else x
        row = next((row for row in range(_LABEL_ROWS) if ends[row] <= start), None)
        y = _TOP - 8 if row is None else _TOP - 14 - row * _LABEL_HEIGHT
        group = f'<g class="event{" alarm" if event.kind in _ALARMS else ""}">'
        out.write(f"{group}<title>{_escaped(full)}</title>")
        _line(out, "mark", x, y - 3, x, _TOP + _PLOT_HEIGHT)
        out.write(f'<circle class="dot" cx="{x:.1f}" cy="{y - 3:.1f}" r="2.5"/>')
        if row is not None:
            ends[row] = (x if at_end else x + width) + 10
            left = start + (-1 if at_end else 3)
            labels.write(
                f'{group}<rect class="paper" x="{left:.1f}" y="{y - 9:.1f}"'
                f' width="{width:.1f}" height="12"/>'
            )
            _text(labels, x - 5 if at_end else x + 5, y + 1, words, "end" if at_end else "start")
            labels.write("</g>")
        out.write("</g>")
    out.write(labels.getvalue())


def _thinned(samples: Sequence[Sample], most: int) -> list[Sample]:
    """At most ``most`` samples: of each run of neighbours the highest, so that no peak is lost."""
    run = math.ceil(len(samples) / most)
    return [
        max(samples[start : start + run], key=lambda sample: sample.anonymous + sample.file_backed)
        for start in range(0, len(samples), run)
    ]


def _ticks(bottom: float, top: float, about: int) -> list[float]:
    """Round numbers from ``bottom`` to ``top``, about so many.

    Example:
        >>> _ticks(3, 230, 5)
        [50.0, 100.0, 150.0, 200.0]
    """
    rough = (top - bottom) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough * 0.999)
    first, last = math.ceil(bottom / step - 1e-9), math.floor(top / step + 1e-9)
    return [round(number * step, 6) for number in range(first, last + 1)]


def _area(
    out: IO[str],
    style: str,
    lower: Sequence[tuple[float, float]],
    upper: Sequence[tuple[float, float]],
) -> None:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*upper, *reversed(lower)])
    out.write(f'<polygon class="{style}" points="{points}"/>')


def _line(out: IO[str], style: str, x1: float, y1: float, x2: float, y2: float) -> None:
    out.write(f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')


def _text(out: IO[str], x: float, y: float, words: str, anchor: str) -> None:
    out.write(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_escaped(words)}</text>')


def _escaped(words: str) -> str:
    # XML has no way to write most control characters, so they are left out.
    return html.escape("".join(letter for letter in words if letter.isprintable()))
