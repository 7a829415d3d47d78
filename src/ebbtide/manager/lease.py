"""A lease: the right to use a pipeline, which cannot be taken away, and is returned in any case."""

from __future__ import annotations

import warnings
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

from ebbtide.errors import InputError
from ebbtide.factory import PipelineOptions
from ebbtide.manager.slots import Ask, Hold, Slot
from ebbtide.manager.values import Seconds

if TYPE_CHECKING:
    from ebbtide.manager.core import Core

PipelineT = TypeVar("PipelineT")

OF_A_LEASE = ("priority", "timeout", "keep_alive")
"""Options that are of a lease, and of no pipeline."""


class AcquireOptions(PipelineOptions, total=False):
    """What may be chosen of a lease; see `PipelineManager.acquire`."""

    priority: float
    timeout: Seconds
    keep_alive: Seconds


class Lease(Generic[PipelineT]):
    """A pipeline that is lent, between the begin and the end of a ``with`` block.

    Made by `PipelineManager.acquire`. Nothing is asked for before the block begins; it may be used
    again afterwards. One that is collected without being returned is returned all the same, with a
    `ResourceWarning` that says where it was asked for.
    """

    __slots__ = (
        "__weakref__",
        "_core",
        "_hold",
        "_keep_alive",
        "_priority",
        "_site",
        "_slot",
        "_timeout",
    )  # fmt: skip

    def __init__(
        self,
        core: Core,
        slot: Slot,
        priority: float,
        timeout: float | None,
        keep_alive: float,
        site: tuple[str, int],
    ) -> None:
        self._core = core
        self._slot = slot
        self._priority = priority
        self._timeout = timeout
        self._keep_alive = keep_alive
        self._site = site
        self._hold: Hold | None = None

    @property
    def key(self) -> str:
        """The pipeline, as the manager's status names it."""
        return self._slot.key

    @property
    def is_held(self) -> bool:
        """Whether the pipeline is lent now."""
        return self._hold is not None

    def __call__(self, *args: object, **options: object) -> NoReturn:
        """A lease is no pipeline: says what to write."""
        raise InputError(
            "A lease is no pipeline yet. Write `with manager.acquire(...) as pipe:`, and call pipe."
        )

    def __enter__(self) -> PipelineT:
        hold = self._new_hold()
        pipe: Any = self._slot.enter(hold)
        if pipe is None:
            try:
                ask = self._ask(hold)
                pipe = self._core.wait(ask)
                self._slot = ask.slot
            except BaseException:
                self._hold = None
                raise
        return self._given(pipe)

    async def __aenter__(self) -> PipelineT:
        hold = self._new_hold()
        pipe: Any = self._slot.enter(hold)
        if pipe is None:
            try:
                ask = self._ask(hold)
                pipe = await self._core.await_(ask)
                self._slot = ask.slot
            except BaseException:
                self._hold = None
                raise
        return self._given(pipe)

    def _ask(self, hold: Hold) -> Ask:
        return self._core.ask(self._slot, hold, self._priority, self._timeout)

    def _new_hold(self) -> Hold:
        if self._hold is not None:
            raise InputError(
                f"This lease of {self._slot.key} is held already. Ask the manager for another one."
            )
        self._hold = hold = Hold(self._site, 0.0, self._keep_alive, weakref.ref(self))
        return hold

    def _given(self, pipe: Any) -> PipelineT:
        self._core.used(self._slot)
        return pipe  # type: ignore[no-any-return]

    def release(self) -> None:
        """Return it before the block's end; a second time does nothing."""
        hold, self._hold = self._hold, None
        if hold is not None:
            self._core.give_back(self._slot, hold)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def __del__(self) -> None:
        hold = self._hold
        if hold is not None and hold in self._slot.holds:
            file, line = self._site
            self.release()
            self._core.tell("leaked", self._slot, site=f"{file}:{line}")
            warnings.warn_explicit(
                f"A lease of {self._slot.key} was collected without being returned; it was asked"
                f" for at {file}:{line}. Use it in a `with` block.",
                ResourceWarning,
                file,
                line,
            )

    def __repr__(self) -> str:
        state = "held" if self.is_held else "not held"
        return f"<Lease of {self._slot.key}, {state}>"
