"""The process that workers are forked from: ``python -m ebbtide.workers.server``.

It has imported what a worker needs, and loaded nothing: native sessions do not survive a fork, and
imports do. It has one thread of its own and runs no native code. Each request comes with three
descriptors: the worker's socket, where it prints, and where its end is told. It ends when its
parent does, or when it is not needed any more; what it forked and is still there ends with it.
"""

from __future__ import annotations

import array
import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import sys
import warnings
from typing import Final, NoReturn

from ebbtide.workers.child import begin, end_with_parent

FORK: Final = b"fork"
_FILES: Final = 3
_LAST_MOMENT: Final = 1_000
"""Milliseconds that workers get to end by themselves once nobody needs them."""


def main() -> None:
    """Be a fork server: the arguments are the socket, the parent, and what to import."""
    file, parent, loader = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _import_all(loader)
    end = socket.socket(fileno=file)
    end.set_inheritable(False)
    _serve(end)


def _import_all(loader: str) -> None:
    from ebbtide.runtime import library

    with library.telemetry_off():
        for name in (loader.partition(":")[0], "onnxruntime", "tokenizers"):
            with contextlib.suppress(ImportError):  # it is told of where it is needed
                importlib.import_module(name)
    importlib.import_module("ebbtide.workers.service")
    gc.collect()
    gc.freeze()  # so that a collection in a worker does not touch, and copy, what they share


def _serve(end: socket.socket) -> NoReturn:
    poll = select.poll()
    poll.register(end, select.POLLIN)
    workers: dict[int, tuple[int, socket.socket]] = {}
    end.send(FORK)
    while True:
        for file, _ in poll.poll():
            if file in workers:
                pid, told = workers.pop(file)
                poll.unregister(file)
                os.close(file)
                _tell_end(pid, told)
                continue
            files = array.array("i")
            word, ancillary, _, _ = end.recvmsg(16, socket.CMSG_SPACE(_FILES * files.itemsize))
            if not word:
                _end_all(workers)
            for _, _, data in ancillary:
                files.frombytes(data)
            pidfd, pid, told = _fork(end, files.tolist(), workers)
            workers[pidfd] = pid, told
            poll.register(pidfd, select.POLLIN)


def _fork(
    end: socket.socket, files: list[int], workers: dict[int, tuple[int, socket.socket]]
) -> tuple[int, int, socket.socket]:
    way, printed, told_file = files
    told, parent = socket.socket(fileno=told_file), os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # threads of a library's that were made by its import
        pid = os.fork()
    if not pid:
        try:
            end.close()
            told.close()
            for pidfd, (_, other) in workers.items():
                os.close(pidfd)
                other.close()
            os.setsid()
            nothing = os.open(os.devnull, os.O_RDONLY)
            for source, place in ((nothing, 0), (printed, 1), (printed, 2)):
                os.dup2(source, place)
            os.close(nothing)
            os.close(printed)
            end_with_parent(parent)
            begin(way)
        finally:
            os._exit(1)
    os.close(way)
    os.close(printed)
    pidfd = os.pidfd_open(pid)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [pidfd]).tobytes())]
    with contextlib.suppress(OSError):
        told.sendmsg([str(pid).encode()], ancillary)
    return pidfd, pid, told


def _tell_end(pid: int, told: socket.socket) -> None:
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):
        told.send(str(os.waitstatus_to_exitcode(status)).encode())
    told.close()


def _end_all(workers: dict[int, tuple[int, socket.socket]]) -> NoReturn:
    poll = select.poll()
    for pidfd in workers:
        poll.register(pidfd, select.POLLIN)
    if workers:
        poll.poll(_LAST_MOMENT)
    for pid, _ in workers.values():
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    main()
