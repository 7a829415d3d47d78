"""Workers that are forked from a process which has imported everything already."""

from __future__ import annotations

import array
import os
import select
import socket
import subprocess
import sys
import threading
from typing import Final

from ebbtide.cancellation import EbbtideThread
from ebbtide.lifecycle import on_fork
from ebbtide.workers.bell import Bell
from ebbtide.workers.channel import Channel
from ebbtide.workers.process import Child, environment, pipe, socket_of
from ebbtide.workers.server import FORK

LINGER: Final = 30.0
"""Seconds that a fork server stays without a worker."""

_MAIN: Final = "ebbtide.workers.server"
_STARTS: Final = 60.0
"""Seconds that its imports, or a fork, may take."""

_STATUS: Final = 2.0
"""Seconds in which it tells of a worker's end."""


class _Forked(Child):
    """A child of the fork server's."""

    def __init__(self, channel: Channel, printed: int, told: socket.socket) -> None:
        files = array.array("i")
        word, ancillary, _, _ = told.recvmsg(32, socket.CMSG_SPACE(files.itemsize))
        for _, _, data in ancillary:
            files.frombytes(data)
        if not word or not files:
            raise OSError(0, "the fork server ended")
        super().__init__(channel, printed, int(word), files[0])
        self._told = told
        told.settimeout(_STATUS)

    def reap(self) -> int | None:
        try:
            word = self._told.recv(32)
        except OSError:
            word = b""
        return int(word) if word else None

    def close(self) -> None:
        super().close()
        self._told.close()
        fork_server.left()

    def leak(self) -> None:
        super().leak()
        self._told.close()


class ForkServer:
    """The process that workers are forked from, while there are any, and the thread it ends with.

    Everything here is called on threads of Ebbtide's own.
    """

    def __init__(self) -> None:
        self._end: Channel | None = None
        self.forget()

    def forget(self) -> None:
        """In a forked child: it is another's."""
        if self._end is not None:
            socket_of(self._end).close()
        self._end = None
        self._lock = threading.Lock()
        self._bell = Bell()
        self._users = 0
        self._pid: int | None = None

    def fork(self, loader: str) -> Child:
        """A worker that waits for `Child.go`.

        Args:
            loader: What makes pipelines, as ``module:function``; it is imported before the fork.

        Raises:
            OSError: No process can be started.
        """
        with self._lock:
            if self._end is None:
                self._start(loader)
            self._users += 1
            end = self._end
            assert end is not None
        channel, way = Channel.pair()
        told, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        told.settimeout(_STARTS)
        reads, writes = pipe()
        try:
            files = array.array("i", [way.fileno(), writes, there.fileno()]).tobytes()
            socket_of(end).sendmsg([FORK], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
            there.close()
            return _Forked(channel, reads, told)
        except BaseException:
            os.close(reads)
            told.close()
            self.left()
            raise
        finally:
            os.close(writes)
            way.close()
            there.close()

    def left(self) -> None:
        """A worker has ended."""
        with self._lock:
            self._users -= 1
        self._bell.ring()

    def stop(self) -> None:
        """End it, with whatever it forked."""
        with self._lock:
            self._close()
        self._bell.ring()

    @property
    def pid(self) -> int | None:
        """Its number; None where there is none."""
        return self._pid

    def _close(self) -> None:
        end, self._end = self._end, None
        if end is not None:
            end.end()

    def _start(self, loader: str) -> None:
        """Start it, and wait for its imports."""
        end, there = Channel.pair()
        here = socket_of(end)
        here.settimeout(_STARTS)
        started: list[OSError] = []
        begun = threading.Event()

        def look_after() -> None:
            try:
                process = subprocess.Popen(  # noqa: S603 - a Python that runs a module of ours
                    [
                        sys.executable, "-P", "-m", _MAIN, str(there.fileno()), str(os.getpid()),
                        loader,
                    ],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(there.fileno(),),
                    env=environment(),
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                started.append(error)
                return
            finally:
                there.close()
                begun.set()
            self._look_after(process, end)

        EbbtideThread(target=look_after, name="ebbtide-fork-server", daemon=True).start()
        begun.wait()
        if started:
            raise started[0]
        try:
            if not here.recv(len(FORK)):
                raise OSError(0, "the fork server ended while it imported")
        except BaseException:
            end.end()
            raise
        here.settimeout(None)
        self._end = end
        self._bell.ring()

    def _look_after(self, process: subprocess.Popen[bytes], end: Channel) -> None:
        """Live as long as it: it ends with the thread that started it."""
        self._pid = process.pid
        pidfd = os.pidfd_open(process.pid)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.register(self._bell.fileno(), select.POLLIN)
            while self._is_wanted(poll, pidfd, end):
                self._bell.hear()
        finally:
            with self._lock:
                if self._end is end:
                    self._close()
            end.end()
            process.wait()
            os.close(pidfd)
            self._pid = None

    def _is_wanted(self, poll: select.poll, pidfd: int, end: Channel) -> bool:
        """Wait for something to happen, and say whether the server is there and has a use."""
        happened = poll.poll(None if self._users else LINGER * 1000)
        with self._lock:
            if not happened and not self._users:
                self._close()
            return self._end is end and all(file != pidfd for file, _ in happened)


fork_server = ForkServer()
on_fork(fork_server.forget)
