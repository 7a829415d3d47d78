"""A graph as pipelines own it: from the original or from its prepared copy, awake or asleep."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from ebbtide._settings import Prepare, settings
from ebbtide.cancellation import CancelToken
from ebbtide.errors import (
    EbbtideError,
    LoadError,
    PipelineCancelledError,
    PipelineDisposedError,
)
from ebbtide.lifecycle import Remains
from ebbtide.memory.allocator import allocator
from ebbtide.memory.ledger import Lease, Native, activity, ledger
from ebbtide.memory.reaper import reaper
from ebbtide.memory.workspace import Graph, guess, workspace
from ebbtide.runtime import devices, prepare
from ebbtide.runtime.admission import AdmittedBound, shape_of
from ebbtide.runtime.identity import mark, mentions
from ebbtide.runtime.library import providers, version
from ebbtide.runtime.session import (
    Bound,
    OnnxSession,
    SessionOptions,
    TensorInfo,
    open_prepared,
    open_session,
    threads_of,
)
from ebbtide.runtime.store import Held, cpu_features
from ebbtide.runtime.threads import native_threads

_IN_PLACE: Final = b"GroupQueryAttention"
_LET_IN: Final = contextlib.nullcontext()

if TYPE_CHECKING:
    from numpy.typing import NDArray

Waiting = Literal["preparing", "prepared"]


@dataclasses.dataclass(eq=False, slots=True)
class _Use:
    """One native session, and the runs that are on it."""

    session: OnnxSession
    held: Held | None
    running: int = 0
    retired: bool = False
    lane: OnnxSession | None = None
    """One more over the same prepared copy, which runs on the thread that calls it alone."""
    lane_lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    lane_runs: int = 0
    has_lanes: bool = True
    in_place: bool | None = None
    known_as: Graph | None = None
    """What its runs are known by, in `ebbtide.memory.workspace`."""

    @contextlib.contextmanager
    def in_lane(self, options: SessionOptions, token: CancelToken) -> Iterator[OnnxSession]:
        """The session for a run beside others of its call, opened at the first."""
        with self.lane_lock:
            if self.lane is None and self.has_lanes:
                self._open_lane(options, token)
            session = self.lane or self.session
            self.lane_runs += 1
        try:
            yield session
        finally:
            with self.lane_lock:
                self.lane_runs -= 1

    def _open_lane(self, options: SessionOptions, token: CancelToken) -> None:
        assert self.held is not None
        try:
            self.lane = open_prepared(
                self.held.graph, dataclasses.replace(options, threads=1), token
            )
        except LoadError:
            self.has_lanes = False  # its other session does
        else:
            reaper.when_idle(self.close_lane)

    def close_lane(self) -> None:
        """Free the further session, if nothing runs on it: the next run in a lane opens it."""
        with self.lane_lock:
            lane = None if self.lane_runs else self.lane
            if lane is not None:
                self.lane = None
            elif self.lane is not None:
                reaper.when_idle(self.close_lane)
        if lane is not None:
            lane.close()

    def close(self) -> Sequence[Remains]:
        with self.lane_lock:
            lane, self.lane = self.lane, None
            self.has_lanes = False
        with allocator.shrinking():
            remains = [*(lane.close() if lane is not None else ()), *self.session.close()]
        if self.held is not None:
            self.held.close()
        return remains


class GraphSession(Native):
    """One graph that can be run; a `Session`, whose native one may change under it.

    Everything here is called on threads of Ebbtide's own, so it may take a lock.

    Args:
        path: The original ONNX file.
        device: Where to run it, as the user names it.
        options: How to run it.
        token: Stops the load from another thread.
        parts: The files of its external data.
    """

    def __init__(
        self,
        path: Path,
        device: str,
        options: SessionOptions,
        token: CancelToken,
        parts: Sequence[Path] = (),
    ) -> None:
        self.path = path
        self._files = {one: mark(one) for one in (path, *parts)}
        self._size = sum(one.stat().st_size for one in self._files)
        self.options = options
        self._device_name = device
        self._lock = threading.Lock()
        self._closed = False
        self._use: _Use | None = self._open(token)
        session = self._use.session
        self.device: devices.Device = session.device
        self.inputs: tuple[TensorInfo, ...] = session.inputs
        self.outputs: tuple[TensorInfo, ...] = session.outputs

    @property
    def native(self) -> OnnxSession | None:
        """The native session of this moment; None while asleep, and once closed."""
        use = self._use
        return use.session if use is not None else None

    @property
    def source(self) -> Literal["original", "prepared", ""]:
        """What it runs from; empty while asleep."""
        use = self._use
        return "" if use is None else "original" if use.held is None else "prepared"

    @property
    def mapped(self) -> int:
        """Bytes of the file that is mapped: clean pages, shared by all processes that map it."""
        use = self._use
        return use.held.manifest.mapped if use is not None and use.held is not None else 0

    @property
    def measured(self) -> int | None:
        """Its anonymous bytes as they were measured alone, by the process that prepared it."""
        use = self._use
        return use.held.manifest.anonymous if use is not None and use.held is not None else None

    @property
    def lanes(self) -> int:
        """How many runs at once, each with ``in_lane``, are faster than one after another.

        Two threads that work on two runs wait less than two that work on one. It takes a further
        session, which costs what a prepared copy costs, and so there are none of an original.
        """
        use = self._use
        if use is None or use.held is None or not use.has_lanes:
            return 1
        return threads_of(self.options)

    def _open(self, token: CancelToken) -> _Use:
        return self._open_prepared(token) or _Use(
            open_session(self.path, self._device_name, self.options, token), None
        )

    def _open_again(self, token: CancelToken) -> _Use:
        self._check_files()
        return self._open(token)

    def _check_files(self) -> None:
        """Raise where the model is gone, or is not the one that was loaded."""
        for file, before in self._files.items():
            try:
                same = mark(file) == before
            except OSError as error:
                raise LoadError(
                    f"{file} cannot be read again: {error.strerror}.", path=str(file)
                ) from None
            if not same:
                raise LoadError(
                    f"{file} has changed since the pipeline was loaded: make a new pipeline.",
                    path=str(file),
                )

    def _open_prepared(self, token: CancelToken) -> _Use | None:
        held = self._prepared()
        if held is None:
            return None
        try:
            return _Use(open_prepared(held.graph, self.options, token), held)
        except PipelineCancelledError:
            held.close()
            raise
        except EbbtideError as error:
            held.close()
            prepare.store().discard(held.manifest.key, str(error))
        return None

    def _prepared(self) -> Held | None:
        """The prepared copy, if there is one and this is a graph it may be used for."""
        if not _on_cpu(self._device_name):
            return None
        here = prepare.store()
        with contextlib.suppress(OSError):
            found = prepare.key_of(here, self.path, self.options, compute=False)
            if found is not None:
                return here.hold(found[0], version())
        return None

    def run(
        self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str], token: CancelToken
    ) -> list[NDArray[Any]]:
        """Run it once; see `Session.run`. One that is asleep wakes."""
        with self._used(token) as use, self._admitted(use, feeds, token):
            return use.session.run(feeds, outputs, token)

    def run_in_lane(
        self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str], token: CancelToken
    ) -> list[NDArray[Any]]:
        """The same as one of `lanes` runs at once."""
        with (
            self._used(token) as use,
            self._admitted(use, feeds, token),
            use.in_lane(self.options, token) as session,
        ):
            return session.run(feeds, outputs, token)

    def tokens_that_fit(self, length: int, most: int) -> int:
        """How many tokens a batch may have; less than ``most`` where memory is limited.

        Args:
            length: Tokens of its longest row.
            most: Tokens that it has where memory does not matter.
        """
        use = self._use
        if workspace.limit is None or use is None:
            return most
        return workspace.tokens_that_fit(self.known_as(use), length, most)

    def known_as(self, use: _Use) -> Graph:
        """What the runs of a native session are known by: the graph's content, not its place."""
        if use.known_as is None:
            marks = [f"{file.name}:{one}" for file, one in self._files.items()]
            source = "original" if use.held is None else "prepared"
            widths = [one.shape[-1] for one in self.outputs if len(one.shape) == 3]
            width = sum(one for one in widths if isinstance(one, int))
            use.known_as = Graph("|".join((*marks, source)), guess(self._size, width))
        return use.known_as

    def _admitted(
        self, use: _Use, feeds: Mapping[str, NDArray[Any]], token: CancelToken, copy: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        """Let a run in as memory allows; at once where nothing limits it."""
        if workspace.limit is None or self.device.name != "cpu":
            return _LET_IN
        rows, new, length = shape_of(feeds)
        longest = max(new, length)
        tokens = rows * (longest if copy else new)  # what was carried comes out as a copy
        return workspace.admitted(self.known_as(use), tokens, longest, token)

    def begin(self, token: CancelToken) -> Runs:
        """Begin a sequence of runs, each of which takes what the one before gave.

        Raises:
            PipelineDisposedError: It was closed.
            LoadError: It was asleep, and cannot be loaded again.
        """
        return Runs(self, self._enter(token))

    @contextlib.contextmanager
    def _used(self, token: CancelToken) -> Iterator[_Use]:
        """The native session of this moment, which stays until this run has ended."""
        use = self._enter(token)
        try:
            yield use
        finally:
            self._leave(use)

    def _enter(self, token: CancelToken) -> _Use:
        with self._lock:
            if self._closed:
                raise PipelineDisposedError(f"{token.label} was disposed.", pipeline=token.label)
            if self._use is None:
                self._use = self._open_again(token)
            self._use.running += 1
            return self._use

    def _leave(self, use: _Use) -> None:
        with self._lock:
            use.running -= 1
            last = use.retired and not use.running
        reaper.ran()
        if last:
            use.close()
            reaper.later(_trim)

    def move(self) -> bool:
        """Go over to the prepared copy; runs under way end on the original. Whether it did."""
        with self._lock:
            if self._closed or self._use is None or self._use.held is not None:
                return False
            try:
                self._check_files()
            except LoadError:
                return False
            new = self._open_prepared(CancelToken(str(self.path)))
            if new is None:
                return False
            old, self._use = self._use, new
            old.retired = True
            idle = not old.running
        if idle:
            old.close()
        return True

    def sleep(self) -> Sequence[Remains]:
        """Free the native session; called when no run is on it."""
        with self._lock:
            use, self._use = self._use, None
        return () if use is None else use.close()

    def wake(self, token: CancelToken) -> None:
        """Load it again, from the prepared copy if there is one."""
        with self._lock:
            if self._use is None and not self._closed:
                self._use = self._open_again(token)

    def close(self) -> Sequence[Remains]:
        """Free it, whatever runs on it."""
        with self._lock:
            self._closed = True
            use, self._use = self._use, None
        return () if use is None else use.close()

    def leak(self) -> None:
        """After a fork, in the child: make sure it is never freed."""
        use = self._use
        if use is not None:
            use.session.leak()
            if use.lane is not None:
                use.lane.leak()


class Runs:
    """A sequence of runs on one native session, which stays until their end.

    Else a graph could go over to its prepared copy in the middle, whose attention may be another.
    """

    def __init__(self, graph: GraphSession, use: _Use) -> None:
        self.path = graph.path
        self._graph = graph
        self._use = use
        self._open = True

    @property
    def writes_in_place(self) -> bool:
        """Whether its attention can write to the buffers that it reads: see `InPlace`."""
        use = self._use
        if use.in_place is None:
            path = self.path if use.held is None else use.held.graph
            use.in_place = self._graph.device.name == "cpu" and mentions(path, _IN_PLACE)
        return use.in_place

    @property
    def source(self) -> object:
        """What they run on; another object for another native session."""
        return self._use

    def run_values(
        self,
        feeds: Mapping[str, NDArray[Any]],
        values: Mapping[str, Any],
        outputs: Sequence[str],
        token: CancelToken,
    ) -> list[Any]:
        """See `OnnxSession.run_values`."""
        use = self._use
        with self._graph._admitted(use, feeds, token, copy=True):
            return use.session.run_values(feeds, values, outputs, token)

    def bind(self, shared: Mapping[str, tuple[str, NDArray[Any]]], outputs: Sequence[str]) -> Bound:
        """See `OnnxSession.bind`."""
        return AdmittedBound(self._use.session, shared, outputs, self._graph.known_as(self._use))

    def pause(self) -> None:
        """Let the native session go, which may now be freed."""
        if self._open:
            self._open = False
            self._graph._leave(self._use)

    def resume(self, token: CancelToken) -> bool:
        """Have it again; whether it is the same."""
        use = self._graph._enter(token)
        if use is not self._use:
            self._graph._leave(use)
            return False
        self._open = True
        return True


def start() -> None:
    """Have ONNX Runtime started, and imported what the first look in the store needs.

    That stays for good, so it is not to be charged to whoever loads first.
    """
    version()
    prepare.store()
    cpu_features()


def acquire(
    path: Path,
    device: str,
    options: SessionOptions,
    token: CancelToken,
    *,
    parts: Sequence[Path] = (),
    wanted: Prepare | None = None,
    told: Callable[[Waiting], object] = lambda status: None,
) -> Lease[GraphSession]:
    """Own the session of a graph: the one that is alive for equal arguments, or a new one.

    Args:
        path: The ONNX file; external data is found beside it.
        device: Where to run it.
        options: How to run it.
        token: Stops the load from another thread.
        parts: The files of its external data.
        wanted: What to do where there is no prepared copy; None for ``settings.prepare``.
        told: Called with ``preparing`` and ``prepared`` where the load waits for a copy.

    Raises:
        LoadError: The file is not a graph that ONNX Runtime can load.
        DeviceNotAvailableError: The device cannot be used here.
        PipelineCancelledError: The token was cancelled.
    """
    size = sum(one.stat().st_size for one in (path, *parts))
    stat = path.stat()
    identity = (
        str(path.resolve()), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns,
    )  # fmt: skip
    wanted = wanted or settings.prepare
    if wanted == "now" and _on_cpu(device):
        _prepare_first(path, options, token, told)

    def load() -> GraphSession:
        return GraphSession(path, device, options, token, parts)

    lease = ledger.acquire((identity, device, options), "session", load, token)
    session = lease.value
    assert session is not None
    if session.source == "original" and _on_cpu(device):
        if wanted == "now":
            session.move()  # it was alive before its copy was there
            ledger.moved(session)
        elif wanted == "background" and size >= prepare.SMALLEST:
            reference = weakref.ref(session)
            prepare.background.wish(path, options, size, lambda: _move(reference))
    return lease


def _prepare_first(
    path: Path,
    options: SessionOptions,
    token: CancelToken,
    told: Callable[[Waiting], object],
) -> None:
    """Have a prepared copy before the load, if that can be."""
    here = prepare.store()
    try:
        found = prepare.key_of(here, path, options, compute=True)
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror}.", path=str(path)) from None
    if found is None or here.refusal(found[0]) is not None:
        return
    held = here.hold(found[0], version())
    if held is not None:
        held.close()
        return
    told("preparing")
    if prepare.prepare(path, options, token) is not None:
        told("prepared")


def _move(reference: weakref.ref[GraphSession]) -> None:
    """Have a session go over to its prepared copy, on a native thread."""
    if not settings.move_to_prepared:
        return

    def work() -> None:
        session = reference()
        if session is None:
            return
        window = activity.begin()
        try:
            if session.move():
                allocator.trim()
                ledger.moved(session)
        finally:
            activity.end(window)

    native_threads.submit(work, CancelToken("moving to a prepared copy"), lambda: None).wait()


def _trim() -> None:
    allocator.trim()


def _on_cpu(device: str) -> bool:
    """Whether it is the CPU that runs a graph there, whose form of weights a copy holds."""
    return devices.candidates(device, providers())[0].name == "cpu"
