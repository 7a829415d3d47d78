"""What a child does for its parent: load, call, tell, dispose."""

from __future__ import annotations

import contextvars
import functools
import importlib
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final, NoReturn

from ebbtide._settings import settings
from ebbtide.cancellation import CancelToken
from ebbtide.memory.probe import anonymous_bytes
from ebbtide.runtime import Job, cpu_count, native_threads
from ebbtide.workers.calls import LOAD
from ebbtide.workers.channel import Channel, ClosedError
from ebbtide.workers.messages import packet, read

_REMEMBERED: Final = 1_024
"""Cancellations that are kept of calls which are not here yet."""

_LAST_WORDS: Final = 2.0
"""Seconds that a signal leaves for the disposal."""

_MEASURED: Final = 0.5
"""Seconds after which what the pipeline takes is looked at again."""

_FRESH: Final = 0.05
"""Seconds for which a reading of this process's memory is good enough; one takes 10 to 40 us."""

_current: contextvars.ContextVar[int] = contextvars.ContextVar("call", default=LOAD)
"""The number of the call that this code runs for."""

_outer: contextvars.ContextVar[CancelToken | None] = contextvars.ContextVar("token", default=None)


class Service:
    """One parent's pipeline.

    Args:
        end: The socket to the parent.
    """

    def __init__(self, end: socket.socket) -> None:
        self._channel = Channel(end)
        self._pipe: Any = None
        self._tokens: dict[int, CancelToken] = {}
        self._cancelled: deque[int] = deque(maxlen=_REMEMBERED)
        self._limited = False
        self._shared = 0
        self._had = 0
        self._measured = 0.0
        self._looked = -1.0
        self._told: Any = None
        self._is_ending = False

    def run(self) -> NoReturn:
        """Hear the parent until it ends."""
        signal.signal(signal.SIGTERM, lambda number, frame: self._later(self._end_early))
        self._channel.patience(_MEASURED)
        while True:
            try:
                found = self._channel.receive(wait=True)
            except ClosedError:
                os._exit(0)
            if found is None:
                self._measure(wait=False)
                continue
            kind, *rest = read(*found)
            _DONE[kind](self, *rest)

    def _later(self, function: Callable[..., object], *arguments: Any) -> None:
        threading.Thread(target=function, args=arguments, daemon=True).start()

    def _say(self, kind: str, *rest: Any, wait: bool = True) -> bool:
        """Tell the parent; any thread may. The first does not wait, since it hears."""
        try:
            return self._channel.send(packet(kind, *rest), wait=wait)
        except ClosedError:
            os._exit(0)

    # Loading

    def _load(self, request: dict[str, Any]) -> None:
        self._later(self._load_now, request)

    def _load_now(self, request: dict[str, Any]) -> None:
        try:
            module, _, name = request["loader"].partition(":")
            _become(request)
            make = getattr(importlib.import_module(module), name)
            if request["room"] is not None:
                self._limited = True
                _hold_to(request["room"])
            self._listen(request["levels"])
            pipe = make(*request["arguments"], **request["options"], progress=self._tell_load)
        except BaseException as error:
            self._say("not loaded", error, self._is_memory(error))
            os._exit(0)
        self._shared = _shared_bytes()
        submit = pipe._submit

        def noted(work: Any, given: CancelToken | None = None) -> Job[Any]:
            job: Job[Any] = submit(work, given)
            outer = _outer.get()
            if outer is not None:
                outer.attach(job.token.cancel)
            return job

        pipe._submit = noted
        self._pipe = pipe
        facts = {"model": pipe.model, "device": pipe.device, "dtype": pipe.dtype}
        facts["mask_token"] = getattr(pipe, "mask_token", None)
        chat = getattr(pipe, "chat_template", None)
        facts["chat"] = None if chat is None else (chat._templates, chat._tokens)
        self._say("loaded", facts, pipe.memory, self._anonymous())
        self._looked = -1.0  # the first call takes more

    def _tell_load(self, event: Any) -> None:
        self._say("told", LOAD, event)

    def _listen(self, levels: Mapping[str, int]) -> None:
        """Have log records and warnings go to the parent."""
        logging.root.handlers[:] = [_Logs(self._say)]
        for name, level in levels.items():
            logging.getLogger(name or None).setLevel(level)
        warnings.simplefilter("always")  # the parent's filters decide
        warnings.showwarning = self._warned

    def _warned(
        self, message: Warning | str, category: type[Warning], filename: str, lineno: int,
        file: Any = None, line: str | None = None,
    ) -> None:  # fmt: skip
        kind = next((one for one in category.__mro__ if one.__module__ == "builtins"), UserWarning)
        self._say("warned", _current.get(), kind.__name__, str(message), filename, lineno)

    # Calls

    def _call(
        self, number: int, name: str, arguments: Any, options: Any, tells: str | None
    ) -> None:
        token = self._tokens[number] = CancelToken("the call")
        if number in self._cancelled:
            token.cancel()
        if tells is not None:
            work = functools.partial(self._tell_call, number, name, arguments, options, tells)
            self._later(self._guarded, number, work)
            return
        job = native_threads.submit(
            lambda: self._guarded(number, lambda: self._do(name, arguments, options)),
            token,
            lambda: None,
        )
        job.on_done(lambda: self._answer_unheard(number))

    def _guarded(self, number: int, function: Callable[[], Any]) -> None:
        """Run a call's work, and say what came of it."""
        _current.set(number)
        token = self._tokens[number]
        try:
            token.check()
            result = function()
            answer = packet("done", number, result, self._anonymous(), self._pipe.state.value)
        except BaseException as error:
            self._fail(number, error)
            return
        self._tokens.pop(number, None)
        try:
            self._channel.send(answer, wait=True)
        except ClosedError:
            os._exit(0)
        del result, answer
        if time.monotonic() - self._measured > _MEASURED:
            self._measure()

    def _fail(self, number: int, error: BaseException) -> None:
        self._tokens.pop(number, None)
        self._say(
            "failed", number, error, self._anonymous(), self._pipe.state.value,
            self._is_memory(error),
        )  # fmt: skip

    def _answer_unheard(self, number: int) -> None:
        """A call that was cancelled before its turn."""
        token = self._tokens.get(number)
        if token is not None:
            self._fail(number, token.error())

    def _do(self, name: str, arguments: Any, options: Any) -> Any:
        """What a call gives, on this thread."""
        if name == "echo":
            return arguments[0]
        if name == "check":
            return self._pipe.stream(*arguments, **options).close()
        if name == "each":
            return list(self._pipe(iter(arguments[0]), *arguments[1:], **options))
        return getattr(self._pipe, name)(*arguments, **options)

    def _tell_call(self, number: int, name: str, arguments: Any, options: Any, tells: str) -> Any:
        """The same, for one that tells something meanwhile; on a thread of its own."""
        token = self._tokens[number]
        if name == "stream":
            with self._pipe.stream(*arguments, **options) as stream:
                token.attach(stream.cancel)
                for piece in stream:
                    self._say("told", number, piece)
                return stream.result
        if tells:
            options = {**options, tells: lambda *event: self._say("told", number, event)}
        _outer.set(token)
        return self._do(name, arguments, options)

    def _cancel(self, number: int) -> None:
        token = self._tokens.get(number)
        if token is not None:
            token.cancel()
        else:
            self._cancelled.append(number)

    def _is_memory(self, error: BaseException) -> bool:
        """Whether an error means that this process may take no more."""
        one: BaseException | None = error
        while one is not None:
            text = str(one)
            if isinstance(one, MemoryError):
                return True
            if self._limited and ("bad_alloc" in text or "llocat" in text or "new thread" in text):
                return True
            one = one.__cause__ or one.__context__
        return False

    # Memory, and the end

    def _anonymous(self) -> int:
        """Bytes that the end of this process gives back: what a fork server has too is not."""
        now = time.monotonic()
        if now - self._looked > _FRESH:
            self._had, self._looked = max(0, anonymous_bytes() - self._shared), now
        return self._had

    def _measure(self, *, wait: bool = True) -> None:
        """Say what the pipeline takes, where that has changed."""
        pipe = self._pipe
        if pipe is None or self._is_ending:
            return
        self._measured = time.monotonic()
        if self._shared and not wait:
            self._shared = _shared_bytes()  # some was written to since
        memory, anonymous = pipe.memory, self._anonymous()
        found = (memory.holdings, pipe.state, anonymous // 1_000_000)
        if found != self._told and self._say(
            "measured", memory, anonymous, pipe.state.value, wait=wait
        ):
            self._told = found

    def _dispose(self) -> None:
        self._is_ending = True
        self._later(self._dispose_now)

    def _dispose_now(self) -> None:
        receipt, trouble = None, ""
        try:
            receipt = self._pipe.dispose(cancel=True, collect=False)
        except Exception as error:
            receipt, trouble = getattr(error, "receipt", None), str(error)
        self._say("disposed", receipt, trouble)
        os._exit(0)

    def _end_early(self) -> None:
        """At a signal: dispose as far as there is time for it."""
        self._is_ending = True
        threading.Timer(_LAST_WORDS, os._exit, (128 + signal.SIGTERM,)).start()
        with suppress(Exception):
            receipt = self._pipe.dispose(cancel=True, collect=False)
            self._say("disposed", receipt, "it was asked to end by SIGTERM")
        os._exit(128 + signal.SIGTERM)


_DONE: Final[Mapping[str, Callable[..., None]]] = {
    "load": Service._load,
    "call": Service._call,
    "cancel": Service._cancel,
    "dispose": Service._dispose,
}
"""What a parent may say."""


class _Logs(logging.Handler):
    """Sends records to the parent."""

    def __init__(self, say: Callable[..., object]) -> None:
        super().__init__()
        self._tell = say

    def emit(self, record: logging.LogRecord) -> None:
        """Send one."""
        fields = {
            "name": record.name, "levelno": record.levelno, "levelname": record.levelname,
            "msg": record.getMessage(), "created": record.created, "pathname": record.pathname,
            "filename": record.filename, "module": record.module, "lineno": record.lineno,
            "funcName": record.funcName, "process": record.process,
            "processName": "ebbtide worker", "threadName": record.threadName,
        }  # fmt: skip
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        fields["exc_text"] = record.exc_text
        self._tell("logged", _current.get(), fields)


def _become(request: Mapping[str, Any]) -> None:
    """Have what the parent has: its folder, its environment, its modules, its settings."""
    os.environ.update(request["environment"])
    for name in set(os.environ) - set(request["environment"]):
        del os.environ[name]
    if request["folder"] is not None:
        with suppress(OSError):
            os.chdir(request["folder"])
    sys.path[:] = [*request["path"], *(one for one in sys.path if one not in request["path"])]
    for name, value in request["settings"].items():
        setattr(settings, name, value)


def _hold_to(room: int) -> None:
    """Have the system refuse memory beyond some bytes.

    The limit counts virtual bytes, of which a process has many more than it uses. So what it has
    beyond what it uses is measured now, with everything imported and started, and allowed on top;
    and a stack for each thread that will yet start.
    """
    from ebbtide.runtime import library

    importlib.import_module("tokenizers")
    library.onnxruntime()
    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
    stack = 8 << 20 if stack in (resource.RLIM_INFINITY, 0) else stack
    with open("/proc/self/status", encoding="ascii") as file:
        virtual = next(int(line.split()[1]) for line in file if line.startswith("VmData:")) * 1024
    idle = max(0, virtual - anonymous_bytes())
    limit = room + idle + stack * (4 + 3 * cpu_count())
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _shared_bytes() -> int:
    """Anonymous bytes that other processes have too, as after a fork."""
    found = {"Anonymous": 0, "Private_Dirty": 0}
    with suppress(OSError), open("/proc/self/smaps_rollup", encoding="ascii") as file:
        for line in file:
            name, _, rest = line.partition(":")
            if name in found:
                found[name] = int(rest.split()[0]) * 1024
    return max(0, found["Anonymous"] - found["Private_Dirty"])
