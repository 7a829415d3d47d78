"""What is done when a process ends normally, however it was started."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable
from typing import Final

_FIRST: Final = 100
"""Before `multiprocessing` joins the threads of its queues, and ends the process's own children."""


def at_end(callback: Callable[[], object]) -> None:
    """Have ``callback`` called when this process ends, the one that was asked for last first.

    A forked child of `multiprocessing` ends without `atexit` before Python 3.13, so it is asked for
    by its own means as well, and ``callback`` may be called twice.

    Args:
        callback: What is to be called; in a forked child it is to be asked for again.
    """
    atexit.unregister(callback)  # one that was inherited has lost its turn
    atexit.register(callback)
    process = sys.modules.get("multiprocessing.process")
    if process is not None and process.parent_process() is not None:
        from multiprocessing import util

        util.Finalize(None, callback, exitpriority=_FIRST)
