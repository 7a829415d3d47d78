"""How something that holds native memory lives and ends; it knows no memory, model or text.

The contract, in the order a reader needs it:

- A `Lifecycle` is the state of one such thing, its resources and its running calls. It holds no
  reference to the object the user has, so that object can be collected while this lives on.
- **No thread of the user's ever takes a lock here.** A signal handler or a finalizer may interrupt
  any user code between two bytecodes, so everything a user's thread does is a single assignment, a
  single dict or deque operation, or a put on a `queue.SimpleQueue`; all the rest is done by threads
  of Ebbtide's own, on which no signal handler runs.
- A call is let in by ``enter``: note the call first, look at the state second. A dispose sets the
  state first and looks at the calls second. So either the call sees the dispose and is refused, or
  the dispose sees the call and waits for it.
- A `Disposer` (the reaper, in `ebbtide.memory`) does the disposing, on one thread.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, NoReturn, Protocol, Self

from ebbtide._settings import settings
from ebbtide.cancellation import CancelToken, OneShot, own_thread, told
from ebbtide.errors import (
    DisposalError,
    InputError,
    NotTransferableError,
    PipelineDisposedError,
    PipelineInheritedError,
)


class State(enum.Enum):
    """Where a pipeline is in its life. Only READY takes calls."""

    LOADING = "loading"
    """Its files are being found and its sessions made."""
    READY = "ready"
    """It takes calls."""
    DISPOSING = "disposing"
    """No new call is let in; the running ones are drained, then everything is released."""
    DISPOSED = "disposed"
    """Everything was released, and the receipt says what came back."""
    FAILED = "failed"
    """Its load failed or was cancelled, and what had been loaded was released."""
    INHERITED = "inherited"
    """It was made before a fork and this is the child: its native memory is left alone."""


@dataclasses.dataclass(frozen=True, slots=True)
class DisposalReceipt:
    """What a disposal gave back, measured.

    All sizes are bytes of anonymous memory, which only this process can give back.

    Attributes:
        charged: What the pipeline alone had taken: its load, and what its calls added.
        released: By how much the process shrank over the disposal.
        retained: What of ``charged`` did not come back, 0 or more.
        quiet: Whether nothing else was loaded, run or disposed meanwhile. Where something was,
            the process's change proves nothing about this pipeline.
        verified: The proof that the memory is back. Quiet: at most 1 % or 1 MB of ``charged``
            stayed, and nothing native is alive. Not quiet: nothing native is alive, and no owner
            is left.
        duration: Seconds from the last running call's end to the receipt.
        method: How freed memory was given back, as in ``malloc_trim``.
        reasons: In words: what was shared, what overlapped, what still pins memory and where.
    """

    charged: int
    released: int
    retained: int
    quiet: bool
    verified: bool
    duration: float
    method: str
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for a person.

        Example:
            >>> print(DisposalReceipt(31_400_000, 31_200_000, 200_000, True, True, 0.014, "trim"))
            released 31.2 MB of 31.4 MB in 14 ms (verified)
        """
        verdict = "verified" if self.verified else "not verified"
        text = (
            f"released {self.released / 1e6:.1f} MB of {self.charged / 1e6:.1f} MB"
            f" in {self.duration * 1e3:.0f} ms ({verdict})"
        )
        return f"{text}: {'; '.join(self.reasons)}" if self.reasons else text


class Releasable(Protocol):
    """Something a lifecycle owns and releases at its end."""

    @property
    def charge(self) -> int:
        """Bytes that only this owner holds: what releasing it should give back."""

    def release(self) -> Sequence[Remains]:
        """Give it up. What is left alive all the same comes back, to be looked at again."""

    def shared_with(self) -> int:
        """How many other owners there are."""

    def leak(self) -> None:
        """After a fork, in the child: make sure its native part is never freed."""


class Remains(Protocol):
    """A native object that was released and is still referenced by somebody."""

    def pins(self) -> tuple[str, ...]:
        """Who still holds it, in words; empty once nobody does."""


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """One wish to have something disposed.

    Attributes:
        lifecycle: What to dispose.
        deadline: When, by `time.monotonic`, running calls are cancelled.
        collect: Whether a full garbage collection may run if bytes stay.
        forgotten: Whether it was collected without a dispose, so that a warning is due.
    """

    lifecycle: Lifecycle
    deadline: float
    collect: bool
    forgotten: bool = False


class Disposer(Protocol):
    """Does the disposing. Both methods may be called from finalizers and signal handlers."""

    def request(self, request: Request) -> None:
        """Take a wish; return at once."""

    def drained(self, lifecycle: Lifecycle) -> None:
        """Hear that the last running call of something being disposed has ended."""


_live: dict[int, Lifecycle] = {}


class Lifecycle:
    """The state, the resources and the running calls of one thing that is disposed.

    Args:
        label: What it is, for messages.
        disposer: Who disposes it.
        site: Where the user's code made it, as ``(file, line)``.

    Attributes:
        working: Bytes that its calls added to the process and that are not given back yet.
    """

    __slots__ = (
        "__weakref__",
        "_finished",
        "disposer",
        "error",
        "label",
        "owner",
        "receipt",
        "resources",
        "running",
        "site",
        "state",
        "working",
    )

    def __init__(self, label: str, disposer: Disposer, site: tuple[str, int]) -> None:
        self.label = label
        self.disposer = disposer
        self.site = site
        self.state = State.LOADING
        self.resources: list[Releasable] = []
        self.running: dict[CancelToken, None] = {}
        self.working = 0
        self.receipt: DisposalReceipt | None = None
        self.error: DisposalError | None = None
        self.owner: weakref.ref[Disposable] | None = None
        self._finished: list[Callable[[], None]] = []
        _live[id(self)] = self

    @property
    def charged(self) -> int:
        """Bytes that releasing this should give back: what nobody shares, and working memory."""
        return self.working + sum(resource.charge for resource in tuple(self.resources))

    def enter(self, token: CancelToken) -> None:
        """Let a call in, or raise the reason why not."""
        self.running[token] = None
        if self.state is not State.READY:
            self.leave(token)
            raise self.refusal()

    def leave(self, token: CancelToken) -> None:
        """Note that a call has ended."""
        self.running.pop(token, None)
        if not self.running and self.state is State.DISPOSING:
            self.disposer.drained(self)

    def refusal(self) -> PipelineDisposedError:
        """Why no call is let in."""
        if self.state is State.INHERITED:
            return PipelineInheritedError(
                f"{self.label} was made before this process was forked, and native sessions do not"
                " survive a fork. Make the pipeline after the fork, in the process that uses it"
                " (or start the process with the 'spawn' method).",
                pipeline=self.label,
            )
        return PipelineDisposedError(
            f"{self.label} is {self.state.value}. Make a new one with ebbtide.pipeline().",
            pipeline=self.label,
        )

    def request(
        self,
        *,
        timeout: float | None = None,
        cancel: bool = False,
        collect: bool = True,
        forgotten: bool = False,
    ) -> None:
        """Ask for the disposal and return at once; safe in a finalizer and in a signal handler."""
        if self.state in (State.LOADING, State.READY):
            self.state = State.DISPOSING
        elif forgotten:
            return  # it is being disposed, and so was not forgotten
        elif self.state is not State.DISPOSING:
            return
        patience = 0.0 if cancel else settings.drain_timeout if timeout is None else timeout
        for token in own_thread.tokens:
            if token in self.running:
                token.cancel()
        deadline = time.monotonic() + patience
        self.disposer.request(Request(self, deadline, collect, forgotten))

    def own(self, resource: Releasable) -> None:
        """Take a resource that a load brings in; called on a native thread.

        Raises:
            PipelineCancelledError: The disposal has ended already. The resource was released.
        """
        self.resources.append(resource)
        if self.state in (State.DISPOSED, State.FAILED):
            self.release_rest()
            raise CancelToken(self.label).error()

    def release_rest(self) -> None:
        """Release what came in after the disposer had looked; called on a thread of ours."""
        while self.resources:
            self.resources.pop().release()

    def on_finished(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called once the disposal has ended; at once if it has."""
        self._finished.append(callback)
        if self.receipt is not None:
            self._tell()

    def finish(
        self, receipt: DisposalReceipt, *, state: State, error: DisposalError | None = None
    ) -> None:
        """The disposer's last word: the end state, and the receipt for everyone who waits."""
        self.state = state
        try:
            self.release_rest()
        finally:
            self.error = error
            self.receipt = receipt
            _live.pop(id(self), None)
            self._tell()

    def _tell(self) -> None:
        while True:
            try:
                callback = self._finished.pop()
            except IndexError:
                return
            callback()

    def wait(self) -> DisposalReceipt:
        """Wait for the disposal's end; on a thread of Ebbtide's own, do not, and say so."""
        if self.receipt is None and self.state is State.INHERITED:
            return _unfinished(f"{self.label} was inherited through a fork and is left alone")
        if self.receipt is None and own_thread.is_own:
            return _unfinished(
                "asked for from inside a running call: completes as that call unwinds"
            )
        if self.receipt is None:
            gate = OneShot()
            self.on_finished(gate.open)
            gate.wait()
        assert self.receipt is not None
        return self.receipt

    def inherit(self) -> None:
        """In a forked child: become inherited, and leave every native object alone for ever."""
        self.state = State.INHERITED
        self.running.clear()
        self._finished.clear()
        for resource in self.resources:
            resource.leak()


def _unfinished(reason: str) -> DisposalReceipt:
    return DisposalReceipt(0, 0, 0, False, False, 0.0, "none", (reason,))


class Disposable:
    """What a user holds: a wrapper that dispose empties.

    A subclass is a context manager, sync and async; refuses to be copied or pickled; and, collected
    without a dispose, is disposed all the same, with a `ResourceWarning` that says where it was
    made.
    """

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle
        lifecycle.owner = weakref.ref(self)
        finalizer = weakref.finalize(self, _forgotten, lifecycle)
        finalizer.atexit = False

    @property
    def state(self) -> State:
        """Where this is in its life."""
        return self._lifecycle.state

    def dispose(
        self, *, timeout: float | None = None, cancel: bool = False, collect: bool = True
    ) -> DisposalReceipt:
        """Give everything back to the operating system, and say what came back.

        New calls are refused from this moment on; running ones may end first. Safe from any thread,
        at any time, any number of times: a later call returns the same receipt. From inside one of
        the pipeline's own calls it cancels that call, and completes as the call unwinds.

        Args:
            timeout: Seconds to let running calls end before they are cancelled
                (``settings.drain_timeout`` by default).
            cancel: Cancel running calls at once.
            collect: Allow a full garbage collection if bytes stayed; it stops every thread, for
                about a second with five million Python objects.

        Returns:
            What was charged, released and retained, in bytes, and whether that is verified.

        Raises:
            DisposalError: Some releases failed. All were attempted, and the error has the receipt.
        """
        lifecycle = self._lifecycle
        _check_timeout(timeout)
        asked = lifecycle.receipt is None
        lifecycle.request(timeout=timeout, cancel=cancel, collect=collect)
        receipt = lifecycle.wait()
        if asked and lifecycle.error is not None:
            raise lifecycle.error
        return receipt

    async def adispose(
        self, *, timeout: float | None = None, cancel: bool = False, collect: bool = True
    ) -> DisposalReceipt:
        """The same as `dispose`, without blocking the event loop.

        A task that is cancelled here stops waiting; the disposal itself goes on to its end.
        """
        lifecycle = self._lifecycle
        _check_timeout(timeout)
        asked = lifecycle.receipt is None
        lifecycle.request(timeout=timeout, cancel=cancel, collect=collect)
        if lifecycle.receipt is None and lifecycle.state is State.DISPOSING:
            await told(lifecycle.on_finished)
        receipt = lifecycle.wait()
        if asked and lifecycle.error is not None:
            raise lifecycle.error
        return receipt

    def __enter__(self) -> Self:
        if self.state is not State.READY:
            raise self._lifecycle.refusal()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.dispose()

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.adispose()

    def __copy__(self) -> NoReturn:
        raise self._not_transferable("copied")

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise self._not_transferable("copied")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise self._not_transferable("pickled")

    def _not_transferable(self, verb: str) -> NotTransferableError:
        return NotTransferableError(
            f"{self._lifecycle.label} cannot be {verb}: it is a place in this process's memory."
            " Make the pipeline in the process that uses it (isolate= runs it in a process of its"
            " own), or share one between many users with a PipelineManager."
        )


def _check_timeout(timeout: float | None) -> None:
    if timeout is not None and not timeout >= 0:
        raise InputError(f"timeout takes seconds, 0 or more, not {timeout!r}.", value=timeout)


def _forgotten(lifecycle: Lifecycle) -> None:
    lifecycle.request(forgotten=True)


def creation_site() -> tuple[str, int]:
    """The file and line of the first caller that is not Ebbtide's own code."""
    here = os.path.dirname(__file__) + os.sep
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(here):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def forget_working_memory() -> None:
    """Freed memory went back to the system: no pipeline's calls are charged for it any more."""
    for lifecycle in tuple(_live.values()):
        lifecycle.working = 0


def live() -> list[Disposable]:
    """Every pipeline of this process that has not been disposed, the oldest first."""
    owners = (life.owner() for life in tuple(_live.values()) if life.owner is not None)
    return [owner for owner in owners if owner is not None]


def dispose_all(
    *, timeout: float | None = None, cancel: bool = False, collect: bool = True
) -> list[DisposalReceipt]:
    """Dispose every live pipeline, one after another, the largest first.

    Args:
        timeout: As `Disposable.dispose`.
        cancel: As `Disposable.dispose`.
        collect: As `Disposable.dispose`.

    Returns:
        One receipt a pipeline, in the order of `live`.

    Raises:
        DisposalError: Some releases failed; all were attempted.
    """
    _check_timeout(timeout)
    lifecycles = [life for life in tuple(_live.values()) if life.owner is not None]
    for lifecycle in lifecycles:
        lifecycle.request(timeout=timeout, cancel=cancel, collect=collect)
    receipts = [lifecycle.wait() for lifecycle in lifecycles]
    errors = [life.error for life in lifecycles if life.error is not None]
    if errors:
        raise DisposalError(
            f"{len(errors)} of {len(lifecycles)} disposals had failing releases: {errors[0]}",
            errors=tuple(cause for error in errors for cause in error.errors),
            receipt=receipts,
        )
    return receipts


def end_of_process(timeout: float) -> None:
    """Dispose what is left when the interpreter exits, cancelling what still runs."""
    deadline = time.monotonic() + timeout
    lifecycles = tuple(_live.values())
    gates = []
    for lifecycle in lifecycles:
        if lifecycle.state is State.INHERITED:
            continue
        lifecycle.request(cancel=True, collect=False)
        gate = threading.Event()
        lifecycle.on_finished(gate.set)
        gates.append(gate)
    for gate in gates:
        gate.wait(max(0.0, deadline - time.monotonic()))


_fork_hooks: list[Callable[[], None]] = []
_inherited: list[Lifecycle] = []


def on_fork(hook: Callable[[], None]) -> None:
    """Have ``hook`` called in every forked child, after the pipelines have become inherited."""
    _fork_hooks.append(hook)


def _after_fork_in_child() -> None:
    _inherited.extend(_live.values())
    _live.clear()
    for lifecycle in _inherited:
        lifecycle.inherit()
    for hook in _fork_hooks:
        hook()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def pinned(remains: Iterable[Remains]) -> tuple[str, ...]:
    """Everything that still pins memory, in words."""
    return tuple(reason for left in remains for reason in left.pins())
