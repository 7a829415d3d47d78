"""What wakes a thread of Ebbtide's own from anywhere, without a lock."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable


class Bell:
    """What wakes a thread that polls descriptors; it may be rung anywhere.

    It is closed when nobody has it, so that nobody rings a descriptor that is another's by then.
    """

    __slots__ = ("_file",)

    def __init__(self) -> None:
        self._file = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self._file)  # known by now: at the interpreter's end `os` may be gone

    def fileno(self) -> int:
        """The descriptor, for polling."""
        return self._file

    def ring(self) -> None:
        """Wake the thread."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._file, 1)

    def hear(self) -> None:
        """Note that it was rung."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._file)
