"""The process that a pipeline has of its own: ``python -m ebbtide.workers.child``.

It waits for its parent's word, imports what it needs, loads the pipeline and runs calls as they
come, several at once. A call runs on a native thread like any other; one that tells something
meanwhile (a stream, progress) has a thread that plays the user's. The first thread only hears, so
that a cancellation always gets through. It ends when its parent does: the socket is closed then,
and the kernel's signal comes even to a process that hears nothing.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_SET_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of prctl(2)."""

_GO = 16
"""Bytes of the parent's word at most."""


def end_with_parent(parent: int) -> None:
    """Have the kernel end this process with the thread that started it."""
    ctypes.CDLL(None, use_errno=True).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)  # it ended before we asked


def begin(file: int) -> None:
    """Wait for the parent's word, then serve it; what is large is imported only then."""
    import socket

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end = socket.socket(fileno=file)
    end.set_inheritable(False)
    if not end.recv(_GO):
        os._exit(0)
    import faulthandler
    import traceback

    faulthandler.enable()  # what it prints is in the error that tells of this process's end
    from ebbtide.workers.service import Service

    try:
        Service(end).run()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # and no finalizing beside threads that run native code


def main() -> None:
    """Be a child: the arguments are the socket's descriptor and the parent's number."""
    file, parent = int(sys.argv[1]), int(sys.argv[2])
    end_with_parent(parent)
    begin(file)


if __name__ == "__main__":
    main()
