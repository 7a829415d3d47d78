"""One end of the way between two processes: whole messages, which any thread may send.

It is a pair of sockets that keep messages apart (``SOCK_SEQPACKET``). One message is one system
call, which the kernel does wholly or not at all: so threads that send at the same time need no lock
between them. What is too large for that lies in a memory file (``memfd_create``) whose descriptor
goes with the message. Such a file has no name: once nobody has it open or mapped, it is gone,
whatever became of the processes.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
import socket
import struct
import weakref
from collections.abc import Callable
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

_LARGEST: Final = 65_536
"""Bytes of a message that goes through the socket itself; what is larger lies in a memory file."""

_BUFFER: Final = 1 << 20
_HEAD: Final = struct.Struct("<BQ")
"""What a packet begins with: what lies in a memory file, and how many bytes are text."""

_BESIDE: Final = 1
_ALL_BESIDE: Final = 2
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE
"""A memory file stays as it was sent: cut short, it would end whoever has it mapped."""

_ONE: Final = array.array("i", [0]).itemsize
_FILES: Final = socket.CMSG_SPACE(4 * _ONE)


class ClosedError(Exception):
    """The other end is gone."""


class Message(Protocol):
    """What can be sent; see `ebbtide.workers.codec.Encoded`."""

    @property
    def text(self) -> bytes:
        """Its bytes."""

    @property
    def beside(self) -> list[tuple[int, NDArray[Any]]]:
        """Arrays, with their offsets in the memory file."""

    @property
    def size(self) -> int:
        """Bytes of the memory file."""


class Packet:
    """A message ready to be sent; what lies beside it is in a memory file already.

    Raises:
        MemoryError: There is no room for that file.
    """

    __slots__ = ("_file", "raw")

    def __init__(self, message: Message) -> None:
        text = message.text
        self._file = -1
        if len(text) <= _LARGEST and not message.beside:
            self.raw = _HEAD.pack(0, len(text)) + text
            return
        self._file = os.memfd_create("ebbtide", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            self._write(message, text)
        except OSError as error:
            if error.errno not in (errno.ENOMEM, errno.ENOSPC):
                raise
            raise MemoryError(f"No room for {message.size} bytes of shared memory.") from None
        fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, _SEALS)

    def _write(self, message: Message, text: bytes) -> None:
        for offset, one in message.beside:
            _put(self._file, memoryview(np.atleast_1d(one).data).cast("B"), offset)
        if len(text) <= _LARGEST:
            os.ftruncate(self._file, message.size)
            self.raw = _HEAD.pack(_BESIDE, len(text)) + text
        else:
            _put(self._file, memoryview(text), message.size)
            self.raw = _HEAD.pack(_ALL_BESIDE, len(text))

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if getattr(self, "_file", -1) >= 0:
            close(self._file)

    @property
    def ancillary(self) -> list[tuple[int, int, bytes]]:
        """What goes with it: the memory file's descriptor."""
        if self._file < 0:
            return []
        files = array.array("i", [self._file]).tobytes()
        return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)]


def _put(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


class _End(socket.socket):
    """A socket that is closed with its last reference, and is not warned of then."""

    def __del__(self) -> None:
        self.close()


class Channel:
    """One end. It is closed when nobody refers to it, so that no thread sends to a closed one.

    Args:
        end: The socket; it belongs to the channel from now on.
    """

    __slots__ = ("_end",)

    def __init__(self, end: socket.socket) -> None:
        self._end = _End(fileno=end.detach())
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            self._end.setsockopt(socket.SOL_SOCKET, option, _BUFFER)

    @classmethod
    def pair(cls) -> tuple[Channel, socket.socket]:
        """A channel, and the other end for another process."""
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(here), there

    def fileno(self) -> int:
        """The descriptor, for polling."""
        return self._end.fileno()

    def patience(self, seconds: float) -> None:
        """Have `receive` give up after some seconds."""
        whole = int(seconds)
        span = struct.pack("@ll", whole, int((seconds - whole) * 1e6))
        self._end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, span)

    def send(self, packet: Packet, *, wait: bool) -> bool:
        """Send one message, wholly or not at all; any thread may, at any time.

        Args:
            packet: The message.
            wait: Whether to wait for room.

        Returns:
            Whether it was sent: False where there is no room and nobody waits.

        Raises:
            ClosedError: The other end is gone.
        """
        flags = socket.MSG_NOSIGNAL | (0 if wait else socket.MSG_DONTWAIT)
        try:
            self._end.sendmsg([packet.raw], packet.ancillary, flags)
        except BlockingIOError:
            return False
        except OSError as error:
            raise ClosedError(str(error)) from None
        return True

    def receive(self, *, wait: bool) -> tuple[bytes, memoryview | None] | None:
        """The next message, and what lies beside it; one thread alone may call this.

        Returns:
            None where there is none and nobody waits, or not so long.

        Raises:
            ClosedError: The other end is gone, or sends what is no message.
        """
        flags = socket.MSG_CMSG_CLOEXEC | (0 if wait else socket.MSG_DONTWAIT)
        try:
            raw, ancillary, _, _ = self._end.recvmsg(_LARGEST + _HEAD.size, _FILES, flags)
        except BlockingIOError:
            return None
        except OSError as error:
            raise ClosedError(str(error)) from None
        files = _files_of(ancillary) if ancillary else []
        try:
            return _opened(raw, files)
        finally:
            for file in files:
                os.close(file)

    def end(self) -> None:
        """Say that nothing more comes, and hear nothing more."""
        with contextlib.suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)


def _files_of(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    files = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            files.frombytes(data[: len(data) - len(data) % _ONE])
    return files.tolist()


def _opened(raw: bytes, files: list[int]) -> tuple[bytes, memoryview | None]:
    if len(raw) < _HEAD.size:
        raise ClosedError("it was closed" if not raw else "a message ends too early")
    kind, size = _HEAD.unpack_from(raw)
    text = raw[_HEAD.size :]
    if not kind:
        return text, None
    if not files:
        raise ClosedError("a message lacks its memory file")
    if fcntl.fcntl(files[0], fcntl.F_GET_SEALS) & _SEALS != _SEALS:
        raise ClosedError("a message's memory file may change")
    beside = _mapped(files[0])
    if kind == _BESIDE:
        return text, beside
    start = len(beside) - size
    if start < 0:
        raise ClosedError("a message is longer than its memory file")
    return bytes(beside[start:]), beside[:start]


@functools.cache
def _library() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
    ]  # fmt: skip
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return library


def _mapped(file: int) -> memoryview:
    """A memory file's bytes, mapped for us alone; unmapped when nobody refers to them.

    Not by `mmap.mmap`, which keeps a descriptor for as long as the mapping.
    """
    size = os.fstat(file).st_size
    if not size:
        return memoryview(bytearray())
    rights = mmap.PROT_READ | mmap.PROT_WRITE
    place = _library().mmap(None, size, rights, mmap.MAP_PRIVATE, file, 0)
    if place in (None, ctypes.c_void_p(-1).value):
        raise MemoryError(f"{size} bytes of shared memory cannot be mapped")
    buffer = (ctypes.c_char * size).from_address(place)
    weakref.finalize(buffer, _library().munmap, place, size).atexit = False
    return memoryview(buffer).cast("B")
