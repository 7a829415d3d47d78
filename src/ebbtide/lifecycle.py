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
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NoReturn, Protocol, Self

from ebbtide._settings import settings
from ebbtide.cancellation import CancelToken, OneShot, call_all, own_thread, told
from ebbtide.errors import (
    DisposalError,
    InputError,
    NotTransferableError,
    PipelineDisposedError,
    PipelineInheritedError,
)
from ebbtide.receipts import Answer, DisposalReceipt, unfinished


class State(enum.Enum):
    """Where a pipeline is in its life. READY and SLEEPING take calls."""

    LOADING = "loading"
    """Its files are being found and its sessions made."""
    READY = "ready"
    """It takes calls."""
    SLEEPING = "sleeping"
    """Its sessions are freed. The next call, or `wake`, loads them again."""
    DISPOSING = "disposing"
    """No new call is let in; the running ones are drained, then everything is released."""
    DISPOSED = "disposed"
    """Everything was released, and the receipt says what came back."""
    FAILED = "failed"
    """Its load failed or was cancelled, and what had been loaded was released."""
    INHERITED = "inherited"
    """It was made before a fork and this is the child: its native memory is left alone."""


class Releasable(Protocol):
    """Something a lifecycle owns and releases at its end."""

    @property
    def charge(self) -> int:
        """Bytes that only this owner holds: what releasing it should give back."""

    def release(self) -> Sequence[Remains]:
        """Give it up. What is left alive all the same comes back, to be looked at again."""

    def shared_with(self) -> int:
        """How many other owners there are."""

    @property
    def kind(self) -> str:
        """What it is, for people."""

    def sleep(self) -> Sequence[Remains]:
        """Free it for now, unless other owners use it."""

    def wake(self, token: CancelToken) -> None:
        """Load it again, if it is asleep."""

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
        forgotten: Whether it was collected without a dispose: then a warning is due.
    """

    lifecycle: Lifecycle
    deadline: float
    collect: bool
    forgotten: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class SleepRequest:
    """One wish to have something sleep; at its deadline it stays awake.

    Attributes:
        wish: For whom, until when, and whether a collection may run.
        deep: Whether its tokenizer is freed as well.
        answer: Gets the receipt.
    """

    wish: Request
    deep: bool
    answer: Answer


class Disposer(Protocol):
    """Does the disposing. Its methods may be called from finalizers and signal handlers."""

    def request(self, request: Request | SleepRequest) -> None:
        """Take a wish; return at once."""

    def drained(self, lifecycle: Lifecycle) -> None:
        """Hear that the last running call of something that is waited for has ended."""


_live: dict[int, Lifecycle] = {}


class Lifecycle:
    """The state, the resources and the running calls of one thing that is disposed.

    Args:
        label: What it is, for messages.
        disposer: Who disposes it.
        site: Where the user's code made it, as ``(file, line)``.

    Attributes:
        caches: Bytes of what the model has seen, by generation: under way, or kept for a call.
        working: Bytes that its calls added to the process and that are not given back yet.
        drowsy: Whether the disposer waits for its calls to end, to have it sleep.
        turn: Held while it goes to sleep or wakes; taken on threads of Ebbtide's own alone.
        used: When, by `time.monotonic`, its last call ended, or it was made.
        lent: Where a manager owns it, gives its leases, each with where it was asked for.
    """

    __slots__ = (
        "__weakref__",
        "_end",
        "_ending",
        "_finished",
        "_phase",
        "caches",
        "disposer",
        "drowsy",
        "error",
        "label",
        "lent",
        "owner",
        "receipt",
        "resources",
        "running",
        "site",
        "turn",
        "used",
        "working",
    )

    def __init__(self, label: str, disposer: Disposer, site: tuple[str, int]) -> None:
        self.label = label
        self.disposer = disposer
        self.site = site
        self._phase = State.LOADING
        self._ending = False
        self._end: State | None = None
        self.drowsy = False
        self.turn = threading.Lock()
        self.resources: list[Releasable] = []
        self.running: dict[CancelToken, None] = {}
        self.working = 0
        self.used = time.monotonic()
        self.caches: dict[object, int] = {}
        self.receipt: DisposalReceipt | None = None
        self.error: DisposalError | None = None
        self.owner: weakref.ref[Disposable] | None = None
        self.lent: Callable[[], list[tuple[weakref.ref[Any], str]]] | None = None
        self._finished: list[Callable[[], None]] = []
        _live[id(self)] = self

    @property
    def charged(self) -> int:
        """Bytes that releasing this should give back: what nobody else holds, and caches."""
        return self.working + self.cached + sum(one.charge for one in tuple(self.resources))

    @property
    def cached(self) -> int:
        """Bytes of the caches of generations under way, and of those that are kept."""
        return sum(tuple(self.caches.values()))

    @property
    def state(self) -> State:
        """Where it is in its life; made of what one thread each writes, so that none is lost."""
        return self._end or (State.DISPOSING if self._ending else self._phase)

    @state.setter
    def state(self, state: State) -> None:
        if state is State.DISPOSING:
            self._ending = True
        elif state in (State.LOADING, State.READY, State.SLEEPING):
            self._phase = state
        else:
            self._end = state

    @property
    def takes_calls(self) -> bool:
        """Whether a call is let in."""
        return self.state in (State.READY, State.SLEEPING)

    def enter(self, token: CancelToken) -> None:
        """Let a call in, or raise the reason why not."""
        self.running[token] = None
        if not self.takes_calls:
            self.leave(token)
            raise self.refusal()

    def leave(self, token: CancelToken) -> None:
        """Note that a call has ended."""
        self.running.pop(token, None)
        self.used = time.monotonic()
        if not self.running and (self._ending or self.drowsy):
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
        if self.state in (State.LOADING, State.READY, State.SLEEPING):
            self.state = State.DISPOSING
        elif forgotten:
            return  # it is being disposed, and so was not forgotten
        elif self.state is not State.DISPOSING:
            return
        patience = 0.0 if cancel else settings.drain_timeout if timeout is None else timeout
        for token in own_thread.tokens:
            if token in self.running:
                token.cancel()
        for token in tuple(self.running) if cancel else ():
            token.cancelled = True  # seen at its next check; the reaper ends native runs
        deadline = time.monotonic() + patience
        self.disposer.request(Request(self, deadline, collect, forgotten))

    def wake(self, token: CancelToken) -> None:
        """Have every resource loaded; called on a native thread, inside a call.

        Raises:
            EbbtideError: One could not be loaded again. It stays asleep.
        """
        if self._phase is not State.SLEEPING and not self.drowsy:
            return  # no lock is needed: who has it sleep makes it drowsy, then looks at `running`
        with self.turn:
            if self._phase is State.SLEEPING:
                resources = tuple(self.resources)
                try:
                    for resource in reversed(resources):  # tokenizers last: they may be awake
                        resource.wake(token)
                except BaseException:
                    for resource in resources:
                        if resource.kind == "session":
                            resource.sleep()
                    raise
                self.state = State.READY

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

    def request_sleep(self, *, timeout: float | None, deep: bool, collect: bool) -> Answer:
        """Ask for it to sleep and return at once.

        Raises:
            PipelineDisposedError: It takes no calls.
        """
        _check_timeout(timeout)
        if not self.takes_calls:
            raise self.refusal()
        patience = settings.drain_timeout if timeout is None else timeout
        wish = Request(self, time.monotonic() + patience, collect)
        answer = Answer()
        self.disposer.request(SleepRequest(wish, deep, answer))
        return answer

    def on_finished(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called once the disposal has ended; at once if it has."""
        self._finished.append(callback)
        if self.receipt is not None:
            call_all(self._finished)

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
            call_all(self._finished)

    def wait(self) -> DisposalReceipt:
        """Wait for the disposal's end; where that would be for oneself, do not, and say so."""
        if self.receipt is None and self.state is State.INHERITED:
            return unfinished(f"{self.label} was inherited through a fork and is left alone")
        if self.receipt is None and not own_thread.may_wait_for(self.running):
            return unfinished("asked for from inside a running call: completes as the call unwinds")
        if self.receipt is None:
            gate = OneShot()
            self.on_finished(gate.open)
            gate.wait()
        assert self.receipt is not None
        return self.receipt

    def inherit(self) -> None:
        """In a forked child: become inherited, and leave every native object alone for ever."""
        self.state = State.INHERITED
        self.running, self._finished = {}, []
        for resource in self.resources:
            resource.leak()


class Disposable:
    """What a user holds: a wrapper that dispose empties.

    A subclass is a context manager, sync and async; refuses to be copied or pickled; collected
    without a dispose, it is disposed all the same, with a `ResourceWarning` that says its site.
    """

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle
        lifecycle.owner = weakref.ref(self)
        finalizer = weakref.finalize(self, lifecycle.request, forgotten=True)
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

    def sleep(
        self, *, timeout: float | None = None, deep: bool = False, collect: bool = True
    ) -> DisposalReceipt:
        """Give back what the sessions take, and load them again at the next call.

        Running calls end first. What stays is the tokenizer, unless ``deep``, and some kilobytes.

        Args:
            timeout: Seconds to wait for running calls (``settings.drain_timeout`` by default).
                Then it stays awake, and the receipt says so: a call is never cancelled for this.
            deep: Free the tokenizer as well; it is read again with the sessions.
            collect: As for `dispose`.

        Returns:
            What the sessions were charged with, and what came back, in bytes.

        Raises:
            PipelineDisposedError: It is disposed, or about to be.
        """
        answer = self._lifecycle.request_sleep(timeout=timeout, deep=deep, collect=collect)
        if not own_thread.may_wait_for(self._lifecycle.running):
            return unfinished("asked for from inside a call: it sleeps once that has ended")
        gate = OneShot()
        answer.on_given(gate.open)
        gate.wait()
        return self._slept(answer)

    async def asleep(
        self, *, timeout: float | None = None, deep: bool = False, collect: bool = True
    ) -> DisposalReceipt:
        """The same as `sleep`, without blocking the event loop."""
        answer = self._lifecycle.request_sleep(timeout=timeout, deep=deep, collect=collect)
        await told(answer.on_given)
        return self._slept(answer)

    def _slept(self, answer: Answer) -> DisposalReceipt:
        if answer.receipt is None or not self._lifecycle.takes_calls:
            raise self._lifecycle.refusal()
        return answer.receipt

    def __enter__(self) -> Self:
        if not self._lifecycle.takes_calls:
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
    if errors := [life.error for life in lifecycles if life.error is not None]:
        raise DisposalError(
            f"{len(errors)} of {len(lifecycles)} disposals had failing releases: {errors[0]}",
            errors=tuple(cause for error in errors for cause in error.errors),
            receipt=receipts,
        )
    return receipts


def end_of_process() -> None:
    """Dispose what is left when the interpreter exits, cancelling what still runs."""
    deadline = time.monotonic() + settings.exit_timeout
    gates = []
    for lifecycle in tuple(_live.values()):
        if lifecycle.state is State.INHERITED:
            continue
        lifecycle.request(cancel=True, collect=False)
        gates.append(threading.Event())
        lifecycle.on_finished(gates[-1].set)
    for gate in gates:
        gate.wait(max(0.0, deadline - time.monotonic()))


_fork_hooks: list[Callable[[], None]] = []
inherited: list[Lifecycle] = []  # what a forked process has from before its fork


def on_fork(hook: Callable[[], None]) -> None:
    """Have ``hook`` called in every forked child, after the pipelines have become inherited."""
    _fork_hooks.append(hook)


def _after_fork_in_child() -> None:
    inherited.extend(_live.values())
    _live.clear()
    for lifecycle in inherited:
        lifecycle.inherit()
    for hook in _fork_hooks:
        hook()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
