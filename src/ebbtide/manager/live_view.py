"""A live view on a terminal: pipelines, budget, pressure and memory, below what a program prints.

The view is drawn on the terminal's last rows, and the rows above are made a scroll region of their
own, as package managers do for their progress. So whatever anybody prints, a child process or
native code included, goes above the view as it always does, and ``sys.stdout`` stays as it is.

It needs no package: a library that draws would add megabytes to the very process that is looked at.
Where there is no terminal, a line is printed at each change, at most once a second, to standard
error. A summary is printed in the end.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import math
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import IO, Self

from ebbtide.manager.live_facts import Facts, Watch
from ebbtide.manager.live_lines import Line, change_line, clean, coloured, lines, plain, summary

INTERVAL = 0.5
"""Seconds between two looks."""
_LEFT_FREE = 5
"""Rows that a view leaves to what is printed above it."""
_LEAST_ROWS, _LEAST_COLUMNS = 6, 30
_QUIET = 1.0
"""Seconds between two lines where there is no terminal."""


class LiveView:
    """Shows this process's pipelines while a ``with`` block runs, and a summary at its end.

    In a forked child it has stopped.

    Args:
        title: What is looked at.
        interval: Seconds between two looks; 0.1 at least.
        stream: The terminal; None for standard output. Where it is none, lines go to standard
            error.

    Raises:
        InputError: The interval is no such number.

    Example:
        >>> with LiveView("the evening's batch"):  # doctest: +SKIP
        ...     work()
    """

    def __init__(
        self, title: str = "", *, interval: float = INTERVAL, stream: IO[str] | None = None
    ) -> None:
        self._title = title
        self._stream = sys.stdout if stream is None else stream
        self._screen: _Screen | _Lines | None = None
        self._watch = Watch(self._show, interval)
        self._last: Facts | None = None
        self._pid = os.getpid()

    def start(self) -> Self:
        """Show it from now on; does nothing where it is shown."""
        if not self._watch.is_running:
            if is_terminal(self._stream):
                self._stream.flush()
                self._screen = _Screen(self._stream, self._title)
            else:
                self._screen = _Lines(sys.stderr)
            self._pid = os.getpid()
            atexit.register(self.stop)
            self._watch.start()
        return self

    def stop(self) -> None:
        """Take the view away, and print the summary; does nothing where it is not shown."""
        is_running = self._watch.stop()
        atexit.unregister(self.stop)
        screen, self._screen = self._screen, None
        if screen is not None and os.getpid() == self._pid:
            if is_running and isinstance(screen, _Screen):
                with contextlib.suppress(OSError, ValueError):  # it may be closed
                    self._stream.flush()
            screen.end(summary(self._last) if self._last is not None else [])

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _show(self, facts: Facts) -> None:
        self._last = facts
        screen = self._screen
        if screen is not None:
            screen.show(facts)


def is_terminal(stream: IO[str] | None) -> bool:
    """Whether a view can be drawn there."""
    try:
        there = stream is not None and stream.isatty() and stream.fileno() >= 0
    except (OSError, ValueError):
        return False
    return there and os.environ.get("TERM", "") not in ("", "dumb")


class _Screen:
    """The last rows of a terminal."""

    def __init__(self, stream: IO[str], title: str) -> None:
        self._terminal = os.dup(stream.fileno())
        self._title = title
        encoding = getattr(stream, "encoding", None) or "ascii"
        self._ascii = not _can_show(encoding)
        self._encoding = "ascii" if self._ascii else encoding
        self._look: Callable[[Line], str] = plain if os.environ.get("NO_COLOR") else coloured
        self._size: os.terminal_size | None = None
        self._rows = 0

    def show(self, facts: Facts) -> None:
        """Draw it, in one write: what is printed meanwhile comes before or after."""
        size = os.get_terminal_size(self._terminal)
        width, height = size.columns or 80, size.lines or 24
        out = ""
        if size != self._size:
            if self._rows:  # the old view lies below the cursor, wherever that came to be
                out = f"\x1b7{_WHOLE}\x1b8\x1b[J"
            self._size, self._rows = size, 0
        most = height - _LEFT_FREE
        if most >= _LEAST_ROWS and width >= _LEAST_COLUMNS:
            found = lines(facts, width, most, title=self._title, ascii_only=self._ascii)
            out += self._reserve(min(most, len(found) + 1), height)
            top = height - self._rows + 1
            blank: Line = []
            rows = itertools.zip_longest(range(top, height + 1), [blank, *found], fillvalue=blank)
            drawn = "".join(f"\x1b[{row};1H\x1b[0m\x1b[2K{self._look(line)}" for row, line in rows)
            out += f"\x1b7{drawn}\x1b8"
        self._write(out)

    def _reserve(self, wanted: int, height: int) -> str:
        """Make the view so many rows high, scrolling up what is there; it never gets less high.

        A terminal homes its cursor when its region changes, so the cursor is saved and restored.
        """
        more = wanted - self._rows
        if more <= 0:
            return ""
        self._rows = wanted
        return f"{_DOWN * more}\x1b[{more}A\x1b7\x1b[1;{height - wanted}r\x1b8"

    def end(self, words: list[str]) -> None:
        """Take it away, and print some lines."""
        out = ""
        if self._rows and self._size is not None:
            top = self._size.lines - self._rows + 1
            out = f"\x1b7\x1b[{top};1H\x1b[0m\x1b[J{_WHOLE}\x1b8"
        out += "".join(f"\r\n{one}" for one in words) + "\r\n"
        self._rows = 0
        try:
            self._write(out)
        except OSError:
            return  # the terminal is gone
        finally:
            os.close(self._terminal)

    def _write(self, text: str) -> None:
        left = text.encode(self._encoding, "replace")
        while left:
            try:
                left = left[os.write(self._terminal, left) :]
            except BlockingIOError:
                time.sleep(0.01)


_DOWN = "\x1bD"
"""One row down in the same column, scrolling where there is none."""
_WHOLE = "\x1b[r"
"""The whole screen scrolls again."""


def _can_show(encoding: str) -> bool:
    try:
        "█▓▒·▁…".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


class _Lines:
    """One line at each change, where there is no terminal."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._told: object = None
        self._happened = 0
        self._quiet_until = -math.inf

    def show(self, facts: Facts) -> None:
        """Print a line, if something changed and the last one is a second old."""
        phases = frozenset((one.key, one.phase) for one in facts.pipelines)
        change = facts.happened, phases, len(facts.waiting) > 0
        if facts.seconds < self._quiet_until or change == self._told:
            return
        if self._told is None and not phases:
            self._told = change  # nothing is there yet, and that needs no line
            return
        self._told, self._quiet_until = change, facts.seconds + _QUIET
        new = facts.happened - self._happened
        self._happened = facts.happened
        self._print([change_line(facts, new)])

    def end(self, words: list[str]) -> None:
        """Print the summary."""
        self._print(words)

    def _print(self, words: list[str]) -> None:
        text = "".join(f"ebbtide: {clean(one) if one[:1] != ' ' else one}\n" for one in words)
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            return  # nobody reads it any more
