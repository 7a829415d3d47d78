"""How far a call is, told as it runs: to a function, or by a bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ebbtide.hub.events import bar_class

Progress = Callable[[int, int | None], object] | bool
"""A function of how many inputs are done and of how many (None where nobody knows); or a bar."""


@contextmanager
def watched(progress: Progress, task: str, total: int | None) -> Iterator[Callable[[int], object]]:
    """What to tell how many inputs are done."""
    if callable(progress):
        function = progress
        yield lambda done: function(done, total)
    elif progress:
        bar = bar_class()(desc=task, total=total, file=sys.stderr)
        try:
            yield lambda done: bar.update(done - bar.n)
        finally:
            bar.close()
    else:
        yield lambda done: None
