"""What is told of a download while it goes on, and the bars that show it on a terminal."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, Literal, NotRequired, TypedDict

from ebbtide.errors import InputError

Status = Literal[
    "initiate", "download", "progress", "progress_total", "done", "preparing", "prepared", "ready"
]


class FileProgress(TypedDict):
    """How much of one file is there, in bytes."""

    loaded: int
    total: int


class ProgressEvent(TypedDict):
    """One event of a load, as Transformers.js has them.

    ``initiate``: a file is about to be downloaded. ``download``: its first bytes are on the way.
    ``progress``: more of it came, 0 to 100, with the bytes. ``progress_total``: the same of all
    files that are downloaded together. ``done``: it is there, and its hash is right.
    ``preparing``, ``prepared``: the load waits for the model's prepared copy, and has it.
    ``ready``: the pipeline is.
    """

    status: Status
    name: NotRequired[str]
    file: NotRequired[str]
    progress: NotRequired[float]
    loaded: NotRequired[int]
    total: NotRequired[int]
    files: NotRequired[dict[str, FileProgress]]
    task: NotRequired[str]
    model: NotRequired[str]


Listener = Callable[[ProgressEvent], object]
Progress = Listener | bool | None
"""A callback; True for bars, False for nothing, None for bars where there is a terminal."""


def quiet(event: ProgressEvent) -> None:
    """Tell nobody."""


def listener(progress: Progress) -> Listener:
    """What to tell of a load.

    Raises:
        InputError: ``progress`` is none of the things it may be.
    """
    if progress is None:
        try:
            progress = bool(sys.stderr.isatty())
        except (AttributeError, ValueError):  # no stderr, one that was closed, or a stand-in
            progress = False
    if progress is True:
        return Bars()
    if progress is False:
        return quiet
    if callable(progress):
        return progress
    raise InputError(
        f"progress takes a function of one event, True, False or None, not {progress!r}.",
        value=progress,
    )


class Bars:
    """One bar a file, on standard error."""

    def __init__(self) -> None:
        self._bars: dict[str, Any] = {}

    def __call__(self, event: ProgressEvent) -> None:
        """Draw one event."""
        status, file = event["status"], event.get("file", "")
        if status == "progress":
            bar = self._bars.get(file)
            if bar is None:
                bar = self._bars[file] = _bar(file, event["total"])
            bar.update(event["loaded"] - bar.n)
        elif status == "done" and file in self._bars:
            self._bars.pop(file).close()

    def close(self) -> None:
        """Leave the terminal to others, whatever became of the downloads."""
        while self._bars:
            self._bars.popitem()[1].close()


@functools.cache
def bar_class() -> Any:
    """Tqdm's bar, without the thread of its own."""
    from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        monitor_interval = 0  # else a thread that watches over bars is started, and never ends

    return Bar


def _bar(file: str, total: int) -> Any:
    return bar_class()(desc=file, total=total, unit="B", unit_scale=True, file=sys.stderr)
