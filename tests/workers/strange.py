"""A pipeline that misbehaves on demand; imported in worker processes alone."""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import ebbtide
from ebbtide.cancellation import own_thread
from ebbtide.pipelines.generating import Piece

kept: list[Any] = []


class Endless:
    """A stream that gives one piece, and never another."""

    result = None

    def __init__(self) -> None:
        self._gate = threading.Event()

    def cancel(self) -> None:
        self._gate.set()

    def __enter__(self) -> Endless:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __iter__(self) -> Iterator[Piece]:
        yield Piece("sea", 1)
        self._gate.wait()


class Strange:
    """A pipeline like any other, which does more than it should."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)

    def log(self, word: str) -> None:
        logging.getLogger("ebbtide.there").warning("%s", word)

    def where(self) -> str:
        return str(os.getpid())

    def log_later(self, word: str) -> None:
        threading.Timer(0.05, self.log, (word,)).start()

    def warn(self, word: str) -> None:
        warnings.warn(word, stacklevel=1)

    def abort(self) -> None:
        os.abort()

    def fault(self) -> None:
        ctypes.string_at(0)

    def leave(self, status: int) -> None:
        os._exit(status)

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()  # this thread may still run for a moment

    def block(self) -> None:
        """Native code that holds the interpreter's lock and hears nothing."""
        mutex = ctypes.create_string_buffer(64)
        library = ctypes.PyDLL(None)
        self.log("blocking now")
        library.pthread_mutex_lock(mutex)
        library.pthread_mutex_lock(mutex)

    def say(self, *words: str) -> None:
        for word in words:
            print(word, flush=True)

    def flood(self, size: int) -> int:
        line = b"flood " * 170 + b"\n"
        for _ in range(size // len(line)):
            os.write(2, line)
        return size

    def fork(self) -> int:
        """A process of its own, which keeps all descriptors open."""
        pid = os.fork()
        if not pid:
            signal.pause()
        return pid

    def fill(self, size: int) -> int:
        block = bytearray(size)
        for place in range(0, size, 4096):
            block[place] = 1
        kept.append(block)
        return size

    def variable(self, name: str) -> str | None:
        return os.environ.get(name)

    def fail_to_allocate(self) -> None:
        """What a library does that gets no memory."""
        os.write(2, b"memory allocation of 123456 bytes failed\n")
        os.abort()

    def wait(self) -> None:
        """A call that ends when it is cancelled."""
        token, gate = own_thread.tokens[-1], threading.Event()
        token.attach(gate.set)
        self.log("waiting now")
        gate.wait()
        token.check()

    def stream(self) -> Endless:
        return Endless()

    def unpick(self) -> Any:
        return object()

    def garbage(self) -> None:
        """Send what is no message."""
        import gc

        from ebbtide.workers.channel import Channel

        (channel,) = [one for one in gc.get_objects() if isinstance(one, Channel)]
        channel._end.send(bytes(9) + b"garbage")
        signal.pause()


def pipeline(task: str, model: str, **options: Any) -> Strange:
    return Strange(ebbtide.pipeline(task, model, **options))


def slow(task: str, model: str, **options: Any) -> Any:
    """A load that never ends."""
    options["progress"]({"status": "initiate"})
    signal.pause()


def slow_again(task: str, model: str, **options: Any) -> Any:
    """A pipeline, and a load that never ends the second time."""
    if os.path.exists(os.environ["MARK"]):
        signal.pause()
    with open(os.environ["MARK"], "w"):
        return pipeline(task, model, **options)


def ending(task: str, model: str, **options: Any) -> Any:
    """A pipeline whose disposal never ends."""
    pipe = Strange(ebbtide.pipeline(task, model, **options))
    pipe.dispose = lambda **how: signal.pause()  # type: ignore[attr-defined]
    return pipe


def dying(task: str, model: str, **options: Any) -> Any:
    """A pipeline whose process ends as it is disposed."""
    pipe = Strange(ebbtide.pipeline(task, model, **options))
    pipe.dispose = lambda **how: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[attr-defined]
    return pipe


def crashing_again(task: str, model: str, **options: Any) -> Any:
    """A pipeline that ends its process, and a load that does so the second time."""
    if os.path.exists(os.environ["MARK"]):
        os.abort()
    with open(os.environ["MARK"], "w"):
        return pipeline(task, model, **options)


def crashing(task: str, model: str, **options: Any) -> Any:
    """A load that ends the process."""
    print("as I die", file=sys.stderr, flush=True)
    os.abort()


def filling(task: str, model: str, **options: Any) -> Any:
    """A load that takes more than it may."""
    bytearray(2_000_000_000)
    return pipeline(task, model, **options)


def keeping(task: str, model: str, **options: Any) -> Any:
    """A pipeline whose sleep leaves memory behind: 30 MB that nobody finds."""
    pipe = Strange(ebbtide.pipeline(task, model, **options))
    sleep = pipe._pipe.sleep

    def and_keep(**how: Any) -> Any:
        receipt = sleep(**how)
        pipe.fill(30_000_000)
        reasons = ("bytes stayed in the process, but nothing native of this is alive",)
        return dataclasses.replace(
            receipt, charged=30_000_000, retained=30_000_000, verified=False, reasons=reasons
        )

    pipe.sleep = and_keep  # type: ignore[attr-defined]
    return pipe
