"""A manager for each process of an application: never inherited, closed before the process ends.

What frameworks share that have no lifespan of their own: Flask, Django and Celery. Servers that
fork need nothing else, since a manager has nothing loaded after a fork.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypedDict, Unpack

from ebbtide import factory
from ebbtide.errors import unknown_option
from ebbtide.factory import Model
from ebbtide.integrations.worker_end import CLOSE_TIMEOUT, Receipts, log, used
from ebbtide.manager.lease import AcquireOptions, Lease
from ebbtide.manager.manager import PipelineManager
from ebbtide.manager.policy import Policy
from ebbtide.manager.values import Bytes, Seconds
from ebbtide.memory.monitor import PressureEvent
from ebbtide.process_end import at_end

OnClose = Callable[[Receipts], object] | None


class ManagerOptions(TypedDict, total=False):
    """What may be chosen of a manager; see `PipelineManager`."""

    budget: Bytes
    keep_alive: Seconds
    policy: Policy
    max_pipelines: int | None
    on_pressure: Callable[[PressureEvent], object] | None
    devices: Mapping[str, str | int] | None
    max_waiting: int | None
    remember: bool


def checked(where: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of a manager, or an `OptionError` that names the nearest."""
    known = ManagerOptions.__annotations__
    for name in options:
        if name not in known:
            raise unknown_option(name, known, where=where)
    return options


def tell(receipts: Receipts, on_close: OnClose) -> None:
    """What came back, to the log and to the application."""
    for key, receipt in receipts.items():
        log.info("%s: %s", key, receipt)
    if on_close is not None:
        on_close(receipts)


_OWN = "manager"
"""The one key of a dict, whose `setdefault` needs no lock."""


class ProcessPipelines:
    """A manager of the process that uses it, closed before the process ends.

    It may be made where a module is imported, before a server forks: what it has loaded is of one
    process alone, and each process loads for itself.

    Args:
        on_close: Called with the receipts, by the pipelines' keys, once it is closed in a process
            that has used it.
        close_timeout: Seconds for which leases are waited for then.
        **options: Of the manager; see `PipelineManager`.

    Raises:
        OptionError: There is no such option; names the nearest.
        InputError: A value that cannot be used.

    Example:
        >>> pipelines = ProcessPipelines(budget="1 GiB", on_close=lambda receipts: print(*receipts))
        >>> with pipelines.acquire("feature-extraction", "tests/models/tiny-bert") as embed:
        ...     embed("the tide goes out", pooling="mean").shape
        (1, 32)
        >>> receipts = pipelines.close()
        feature-extraction tests/models/tiny-bert
    """

    def __init__(
        self,
        *,
        on_close: OnClose = None,
        close_timeout: float = CLOSE_TIMEOUT,
        **options: Unpack[ManagerOptions],
    ) -> None:
        self._options = checked(f"{type(self).__name__}()", options)
        self._on_close = on_close
        self._close_timeout = close_timeout
        checks = PipelineManager(**self._options)
        checks._finalizer.detach()  # it has begun nothing, so there is nothing to close
        self._made: dict[str, PipelineManager] = {}
        self._process = 0

    @property
    def manager(self) -> PipelineManager:
        """This process's manager."""
        if self._process != os.getpid():
            self._use_first()
        return self._made[_OWN]

    def _use_first(self) -> None:
        """The first use in this process; several threads may be here at the same time."""
        if _OWN not in self._made:
            mine = PipelineManager(**self._options)
            if self._made.setdefault(_OWN, mine) is not mine:
                mine.close()  # another thread was first
        factory.start()  # it registers what disposes the rest, which is to run after `close`
        used[self] = None
        at_end(self.close)
        self._process = os.getpid()

    def acquire(
        self, task: str, model: Model = None, **options: Unpack[AcquireOptions]
    ) -> Lease[Any]:
        """A lease of a pipeline: ``with pipelines.acquire(...) as pipe``, or ``async with``.

        Args:
            task: As for `PipelineManager.acquire`.
            model: As for `PipelineManager.acquire`.
            **options: As for `PipelineManager.acquire`.

        Raises:
            EbbtideError: As `PipelineManager.acquire` says.
        """
        return self.manager.acquire(task, model, **options)

    def close(self) -> Receipts:
        """Close the manager of this process; done by itself before a process ends normally.

        Returns:
            The receipts, by the pipelines' keys; none where this process has not used it.
        """
        if self._process != os.getpid() or used.pop(self, self) is self:
            return {}
        receipts = self._made[_OWN].close(timeout=self._close_timeout)
        tell(receipts, self._on_close)
        return receipts

    async def aclose(self) -> Receipts:
        """The same as `close`, on an event loop."""
        if self._process != os.getpid() or used.pop(self, self) is self:
            return {}
        receipts = await self._made[_OWN].aclose(timeout=self._close_timeout)
        tell(receipts, self._on_close)
        return receipts

    def reopen(self) -> None:
        """Have a new manager where it was closed, as where a worker starts again."""
        made = self._made.get(_OWN)
        if made is not None and made.is_closed:
            self._process = 0
            self._made.pop(_OWN, None)
