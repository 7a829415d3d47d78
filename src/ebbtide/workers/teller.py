"""What children print, log and warn, said in this process: where somebody waits, or on a thread.

A record that belongs to a call is logged where that call is waited for, as if it ran there. All
else is said by one thread of Ebbtide's own, since a handler of a user's may wait for anything.
"""

from __future__ import annotations

import builtins
import contextlib
import logging
import queue
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final

from ebbtide.cancellation import EbbtideThread
from ebbtide.errors import WorkerCrashedError
from ebbtide.lifecycle import on_fork

logger = logging.getLogger("ebbtide.workers")

_LINES: Final = 100
"""Lines that are logged of what a child prints in a second; of a flood the rest is counted."""

_LONGEST: Final = 2_000
_MOST: Final = 1_000


class Teller:
    """Says what belongs to no call, on a thread that starts with the first of it."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """In a forked child: there is no thread here."""
        self._queue: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._second = 0
        self._lines = 0
        self._left_out = 0

    def later(self, function: Callable[[], object]) -> None:
        """Have something said; called on a worker's thread."""
        with self._lock:
            if self._thread is None:
                thread = EbbtideThread(target=self._run, name="ebbtide-teller", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the interpreter ends, or there is no room for a thread
                    return
                self._thread = thread
        if self._queue.qsize() < _MOST:
            self._queue.put(function)

    def printed(self, label: str, text: bytes) -> None:
        """Log what a child printed, of a flood a part."""
        with self._lock:
            second = int(time.monotonic())
            if second != self._second:
                self._second, self._lines = second, 0
            lines = text.splitlines()
            room = max(0, _LINES - self._lines)
            self._lines += min(room, len(lines))
            left_out, self._left_out = self._left_out, 0
            if len(lines) > room:
                self._left_out = left_out + len(lines) - room
                left_out = 0
        if left_out:
            self.later(lambda: logger.warning("%d further lines were left out.", left_out))
        for line in lines[:room]:
            said = line[:_LONGEST].decode(errors="replace")
            self.later(lambda said=said: logger.warning("%s printed: %s", label, said))  # type: ignore[misc]

    def _run(self) -> None:
        while True:
            with contextlib.suppress(Exception):  # a user's handler, or a warning that is an error
                self._queue.get()()


_teller = Teller()
on_fork(_teller.forget)
later = _teller.later
printed = _teller.printed


def crashed(error: WorkerCrashedError) -> None:
    """Log that a child ended unasked."""
    later(lambda: logger.warning("%s", error))


_registries: dict[str, dict[Any, Any]] = {}


def warning(category: str, text: str, file: str, line: int) -> Callable[[], object]:
    """What says a child's warning again, by the filters of this process."""
    kind = getattr(builtins, category, None)
    if not isinstance(kind, type) or not issubclass(kind, Warning):
        kind = UserWarning
    registry = _registries.setdefault(file, {})
    return lambda: warnings.warn_explicit(text, kind, file, line, registry=registry)


def log(fields: Mapping[str, Any]) -> Callable[[], object]:
    """What logs a child's record again, with the handlers of this process."""
    record = logging.makeLogRecord({str(name): value for name, value in fields.items()})

    def say() -> None:
        place = logging.getLogger(record.name)
        if place.isEnabledFor(record.levelno):
            place.handle(record)

    return say
