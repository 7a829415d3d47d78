"""What a live view says, in lines: plain facts in, text with its looks out."""

from __future__ import annotations

import collections
import functools
import math
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from ebbtide.manager.accounts import mb
from ebbtide.manager.live_facts import SPAN, Facts, Happening
from ebbtide.manager.status import ManagerStatus, PipelineStatus

Style = Literal[
    "", "dim", "bold", "good", "warn", "bad", "floor", "pipelines", "workspace", "free", "memory"
]
Piece = tuple[str, Style]
"""Some text, and how it looks."""
Line = Sequence[Piece]

_CODES: dict[Style, str] = {
    "dim": "2", "bold": "1", "good": "32", "warn": "33", "bad": "1;31", "floor": "34",
    "pipelines": "36", "workspace": "33", "free": "2", "memory": "36",
}  # fmt: skip
_PHASES: dict[str, Style] = {
    "ready": "good", "empty": "dim", "asleep": "dim", "loading": "warn", "waking": "warn",
    "evicting": "warn", "falling asleep": "warn", "disposing": "warn",
}  # fmt: skip
_BAR: dict[Style, tuple[str, str]] = {
    "floor": ("█", "#"), "pipelines": ("▓", "="), "workspace": ("▒", "+"), "free": ("·", "."),
}  # fmt: skip
"""The marks of a budget's parts; and those for a terminal that has ASCII alone."""
_SPARKS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
_BEGUN = frozenset({"loading", "waking", "evicting"})
_LEAST_SPAN = 30.0
"""Seconds that the line of memory shows at least."""


def lines(
    facts: Facts, width: int, height: int, *, title: str = "", ascii_only: bool = False
) -> list[Line]:
    """What a view shows, no line wider and no more lines than there is room for.

    Args:
        facts: What there is.
        width: Columns.
        height: Rows.
        title: What is looked at.
        ascii_only: Whether other letters than ASCII's cannot be shown.

    Example:
        >>> from ebbtide.manager.live_facts import Looker
        >>> shown = lines(Looker().look(), 80, 24, title="demo")
        >>> plain(shown[0]).startswith("demo")
        True
    """
    head = _head(facts, width, title, ascii_only)
    there = facts.pipelines
    news = list(facts.happenings)
    left = max(0, height - len(head))
    table = len(there) + 1 if there else 0
    for_news = min(len(news), max(3, left - table, left // 3), left)
    rows = _table(there, width, left - for_news, ascii_only)
    shown = [*head, *rows, *_news(news[len(news) - for_news :])]
    return [_cut(line, width, ascii_only) for line in shown[:height]]


def plain(line: Line) -> str:
    """A line without its looks."""
    return "".join(text for text, _ in line)


def coloured(line: Line) -> str:
    """A line with its looks, for a terminal."""
    return "".join(f"\x1b[{_CODES[style]}m{text}\x1b[0m" if style else text for text, style in line)


# The parts


def _head(facts: Facts, width: int, title: str, ascii_only: bool) -> list[Line]:
    memory, found = facts.memory, facts.pipelines
    there = [one for one in found if one.phase != "empty"]
    in_use = sum([one.leases > 0 for one in there])
    words = f"{counted(len(there), 'pipeline')}, {in_use} in use"
    shown: list[Line] = [[(title or "ebbtide", "bold"), (f"  {span(facts.seconds)}  {words}", "")]]
    for status in facts.managers:
        shown += _budget(status, width, ascii_only)
    mapped = sum([one.mapped for one in found])
    held: list[Piece] = [
        ("process   ", "dim"), (mb(facts.anonymous), "bold"),
        (f" anonymous, {mb(facts.peak)} at most; {mb(mapped)} mapped by pipelines", ""),
    ]  # fmt: skip
    room: list[Piece] = [
        ("limit     ", "dim"),
        (f"{mb(memory.limit.bytes)} ({memory.limit.source}), ", ""),
        (f"{mb(memory.available)} left", _share(memory.available / memory.limit.bytes)),
    ]
    if memory.pressure is not None:
        some, full = memory.pressure.some_avg10, memory.pressure.full_avg10
        style: Style = "bad" if full >= 10 else "warn" if some >= 10 else ""
        room += [("; pressure ", ""), (f"some {some:.0f} %, full {full:.0f} %", style)]
    points = [(one.seconds, one.anonymous) for one in facts.history]
    seconds = min(SPAN, max(_LEAST_SPAN, points[-1][0] - points[0][0] if points else 0.0))
    past = spark(points, width - 36, seconds, ascii_only)
    shown += [held, room, [(f"{'last ' + span(seconds):<10}", "dim"), *past]]
    if facts.waiting:
        first = facts.waiting[0]
        waits = f"{len(facts.waiting)}, the first for {span(first.seconds)}: "
        names = dict.fromkeys(one.pipeline for one in facts.waiting)
        shown.append(
            [("waiting   ", "dim"), (waits, "warn"), (", ".join(shortened(names).values()), "")]
        )
    return shown


def _budget(status: ManagerStatus, width: int, ascii_only: bool) -> list[Line]:
    parts: list[tuple[Style, int]] = [
        ("floor", status.floor), ("pipelines", status.pipelines),
        ("workspace", status.workspace), ("free", status.free),
    ]  # fmt: skip
    columns = max(10, width - 24)
    bar: list[Piece] = [("budget    ", "dim")]
    legend: list[Piece] = [("          ", "")]
    whole, done, drawn = max(status.budget, status.budget - status.free), 0, 0
    for style, count in parts:
        mark = _BAR[style][ascii_only]
        done += max(0, count)
        until = min(columns, round(columns * done / max(1, whole)))
        bar.append((mark * (until - drawn), style))
        drawn = until
        legend += [
            (f"{mark} ", style),
            (f"{style} {count / 1e6:.1f}  ", "bad" if count < 0 else ""),
        ]
    legend[-1] = (f"free {mb(status.free)}", legend[-1][1])
    bar.append((f" {mb(status.budget)}", "bold"))
    held = [
        f"{name} {mb(count)}" + (f" of {mb(most)}" if most is not None else "")
        for name, (count, most) in status.devices.items()
    ]
    devices: list[Line] = [[("devices   ", "dim"), (", ".join(held), "")]] if held else []
    return [bar, legend, *devices]


def _share(left: float) -> Style:
    return "bad" if left <= 0.05 else "warn" if left <= 0.15 else ""


def spark(
    points: Sequence[tuple[float, int]], columns: int, seconds: float, ascii_only: bool
) -> list[Piece]:
    """Memory of late: of each column's the highest, from the least of all to the most."""
    if not points or columns < 4:
        return []
    end = points[-1][0]
    most: dict[int, int] = {}
    for at, count in points:
        column = columns - 1 - int((end - at) / seconds * columns)
        most[column] = max(most.get(column, 0), count)
    low, high = min(count for _, count in points), max(count for _, count in points)
    marks = _SPARKS[ascii_only]
    last, text = None, ""
    for column in range(columns):  # a column with no sample shows what its neighbour does
        last = most.get(column, last)
        step = 0 if last is None or high == low else (last - low) * 7 // (high - low)
        text += " " if last is None else marks[step]
    return [(text, "memory"), (f" {low / 1e6:.1f} to {mb(high)}", "")]


def _table(there: list[PipelineStatus], width: int, room: int, ascii_only: bool) -> list[Line]:
    if not there or room < 2:
        return []
    shown = there if len(there) < room else there[: room - 2]
    if not shown:
        return [[(f"{len(there)} pipelines, and no room to list them", "dim")]]
    columns = [
        ("phase", [one.phase for one in shown]),
        ("MB", [f"{one.anonymous / 1e6:.1f}" + "~" * (not one.measured) for one in shown]),
        ("mapped", [f"{one.mapped / 1e6:.1f}" if one.mapped else "" for one in shown]),
        ("used by", [str(one.leases or "") for one in shown]),
        ("uses", [str(one.uses or "") for one in shown]),
        ("idle", ["" if one.idle is None or one.leases else span(one.idle) for one in shown]),
        ("keep", [_kept(one) for one in shown]),
    ]
    columns = [one for one in columns if any(one[1]) or one[0] == "MB"]
    widths = [max(len(name), *map(len, cells)) for name, cells in columns]
    room_for_keys = max(12, width - sum(widths) - 2 * len(widths))
    keys = shortened((one.key for one in shown), room_for_keys, ascii_only=ascii_only)
    first = min(room_for_keys, max([8, *map(cells_of, keys.values())]))
    head = "".join(
        f"  {name:{'<' if number == 0 else '>'}{size}}"
        for number, ((name, _), size) in enumerate(zip(columns, widths, strict=True))
    )
    rows: list[Line] = [[(_padded("pipeline", first) + head, "dim")]]
    for number, one in enumerate(shown):
        cells = [cells[number] for _, cells in columns]
        rest = "".join(
            f"  {text:>{size}}" for text, size in zip(cells[1:], widths[1:], strict=True)
        )
        style: Style = "dim" if one.phase == "empty" else ""
        rows.append(
            [
                (_padded(keys[one.key], first), style or ("bold" if one.leases else "")),
                (f"  {cells[0]:<{widths[0]}}", _PHASES.get(one.phase, "")),
                (rest, style),
            ]
        )
    if len(shown) < len(there):
        rows.append([(f"and {len(there) - len(shown)} more", "dim")])
    return rows


def _kept(one: PipelineStatus) -> str:
    if one.pinned:
        return "pinned"
    if one.keep is None or one.phase == "empty":
        return ""
    return "stays" if math.isinf(one.keep) else span(one.keep)


def _news(found: list[Happening]) -> list[Line]:
    names = shortened(one.pipeline for one in found)
    return [
        [
            (time.strftime("%H:%M:%S  ", time.localtime(one.time)), "dim"),
            (f"{names[one.pipeline]}: " if one.pipeline else "", ""),
            (one.words, "bad" if one.is_alarm else "dim" if one.kind in _BEGUN else ""),
        ]
        for one in found
    ]


# Words


def counted(count: int, word: str) -> str:
    """A number of things.

    Example:
        >>> counted(1, "load"), counted(2, "load")
        ('1 load', '2 loads')
    """
    return f"{count} {word}{'s' * (count != 1)}"


def span(seconds: float) -> str:
    """A time in at most six letters.

    Example:
        >>> span(4.2), span(290), span(7200)
        ('4s', '4m50s', '2h00m')
    """
    whole = int(max(0.0, min(seconds, 1e9)))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 100 * 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d"


def shortened(
    keys: Iterable[str], width: int = 1000, *, ascii_only: bool = False
) -> dict[str, str]:
    """Shorter names for keys: the task, the end of the model's path, and options where need be.

    As much of both is kept as tells one from the others. Where that is still too long, the middle
    is left out.

    Example:
        >>> shortened(["fill-mask /models/bert (dtype='q8')", "ner /models/bert"])
        {"fill-mask /models/bert (dtype='q8')": 'fill-mask bert', 'ner /models/bert': 'ner bert'}
    """
    return dict(_shortened(tuple(dict.fromkeys(keys)), width, ascii_only))


@functools.lru_cache(maxsize=16)  # from look to look the keys are mostly the same
def _shortened(known: tuple[str, ...], width: int, ascii_only: bool) -> dict[str, str]:
    forms = {key: list(dict.fromkeys(_forms(key))) for key in known}
    owners = collections.Counter(form for several in forms.values() for form in several)
    short = {
        key: next((form for form in several if owners[form] == 1), key)
        for key, several in forms.items()
    }
    return {key: _middle_out(clean(name), width, ascii_only) for key, name in short.items()}


def _forms(key: str) -> Iterator[str]:
    """A key with more and more parts of its model's path, each without its options and with."""
    task, space, model = key.partition(" ")
    model, bracket, options = model.partition(" (")
    parts = model.split("/")
    for kept in range(1, len(parts) + 1):
        name = f"{task}{space}{'/'.join(parts[-kept:])}"
        yield name
        yield name + bracket + options


def clean(text: str) -> str:
    """Text with nothing in it that a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def _middle_out(text: str, width: int, ascii_only: bool) -> str:
    if cells_of(text) <= width:
        return text
    dots = "..." if ascii_only else "…"
    rest = max(2, width - len(dots))
    head, tail = list(text), list(text)
    while cells_of("".join(head)) > rest // 2:
        head.pop()
    while cells_of("".join(tail)) > rest - rest // 2:
        tail.pop(0)
    return "".join(head) + dots + "".join(tail)


def cells_of(text: str) -> int:
    """The columns that a text takes on a terminal."""
    if text.isascii():
        return len(text)
    return sum(
        [
            0 if unicodedata.combining(one) else 1 + (unicodedata.east_asian_width(one) in "WF")
            for one in text
        ]
    )


def _padded(text: str, width: int) -> str:
    return text + " " * (width - cells_of(text))


def _cut(line: Line, width: int, ascii_only: bool) -> Line:
    """A line that is no wider, with nothing in it that a terminal would obey."""
    left, found = width, []
    for text, style in line:
        if not text.isprintable():
            text = "".join(one if one.isprintable() else "?" for one in text)
        if ascii_only and not text.isascii():
            text = text.encode("ascii", "replace").decode()
        size = cells_of(text)
        while size > left:
            text = text[: min(len(text) - 1, left)]
            size = cells_of(text)
        left -= size
        if text:
            found.append((text, style))
    return found


def summary(facts: Facts) -> list[str]:
    """What happened all the while, in a few lines."""
    counts = [counted(count, name) for name, count in facts.tally.items()]
    shown = [
        f"{span(facts.seconds)}: {mb(facts.peak)} of anonymous memory at most,"
        f" {mb(facts.anonymous)} at the end; {', '.join(counts) or 'no pipeline was loaded'}"
    ]
    given = facts.given
    if given.receipts:
        verified = "all" if given.verified == given.receipts else str(given.verified)
        shown.append(
            f"{counted(given.receipts, 'receipt')}, {verified} verified:"
            f" released {mb(given.released)} of {mb(given.charged)}"
        )
        names = shortened(name for name, _ in given.last)
        if given.receipts > len(given.last):
            shown.append(f"  the last {len(given.last)}:")
        shown += [f"  {names[name]}: {clean(words)}" for name, words in given.last]
    left = [one for one in facts.pipelines if one.phase != "empty"]
    if left:
        held = mb(sum([one.anonymous for one in left]))
        verb = "was" if len(left) == 1 else "were"
        shown.append(f"{counted(len(left), 'pipeline')} {verb} still alive, with {held}:")
        shown += [f"  {name}" for name in shortened(one.key for one in left).values()]
    return shown


def change_line(facts: Facts, new: int) -> str:
    """The state of things, and the last of what is new, on one line."""
    phases = [one.phase for one in facts.pipelines if one.phase != "empty"]
    counts = [f"{phases.count(phase)} {phase}" for phase in dict.fromkeys(phases)]
    of = f" of {mb(sum([one.budget for one in facts.managers]))}" if facts.managers else ""
    words = f"{facts.seconds:.1f} s, {mb(facts.anonymous)}{of}; {', '.join(counts) or 'none there'}"
    if facts.waiting:
        words += f", {len(facts.waiting)} waiting"
    if new and facts.happenings:
        last = facts.happenings[-1]
        name = shortened([last.pipeline])[last.pipeline]
        words += f"; {name}: {last.words}" if name else f"; {last.words}"
        if new > 1:
            words += f" (and {counted(new - 1, 'more event')})"
    return words
