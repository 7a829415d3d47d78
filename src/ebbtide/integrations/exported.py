"""What exporters of a manager's figures share: whose, under which name, for how long.

Prometheus and OpenTelemetry differ in how figures are told, not in this.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Final, Generic, Self, TypeVar

from ebbtide.errors import InputError, ManagerClosedError

if TYPE_CHECKING:
    from ebbtide.manager import (
        ManagerEvent,
        ManagerStatus,
        PipelineManager,
        PipelineStatus,
        Subscription,
    )

OTHER: Final = "other"
"""The name of all pipelines together that have no series of their own."""

BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)
"""Seconds of a load, from a small prepared model's to that of gigabytes on a slow disk."""


class Exported:
    """A manager whose figures are exported, until `cancel`.

    As a context manager it is cancelled at the end. A manager that is closed or collected is not
    exported any more. A subclass notes what it is told of events in `_hear`.

    Args:
        manager: Whose figures; it is not kept alive.
        name: The manager's name among all that are exported to the same place.
        most: How many pipelines get series of their own.

    Attributes:
        name: The same name.

    Raises:
        InputError: ``most`` is no count.
        ManagerClosedError: The manager is closed.
    """

    function: ClassVar[str]
    """What users call to have one, for messages."""
    kinds: ClassVar[tuple[str, ...]]
    """The events that it is told of."""

    def __init__(self, manager: PipelineManager, name: str, most: int) -> None:
        if type(most) is not int or most < 0:
            raise InputError(f"most takes a whole number, 0 or more, not {most!r}.", value=most)
        if manager.is_closed:
            raise ManagerClosedError("The manager is closed. Make a new PipelineManager.")
        self.name = name
        self._manager = weakref.ref(manager)
        self._most = most
        self._process = 0
        self._subscription: Subscription | None = None
        self._is_cancelled = False
        self._forget()

    def cancel(self) -> None:
        """Export it no more; a second time does nothing."""
        self._is_cancelled = True
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            subscription.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *about: object) -> None:
        self.cancel()

    def status(self) -> ManagerStatus | None:
        """What there is; None where there is nothing to export any more."""
        manager = self.there()
        return None if manager is None else manager.status()

    def there(self) -> PipelineManager | None:
        """The manager, while it is to be exported."""
        manager = None if self._is_cancelled else self._manager()
        if manager is None or manager.is_closed:
            return None
        if self._process != os.getpid():  # after a fork nobody is told of events any more
            self.begin(manager)
        return manager

    def begin(self, manager: PipelineManager) -> None:
        """Know nothing, and be told of events from now on."""
        self._process = os.getpid()
        self._forget()
        self._subscription = manager.subscribe(self._hear, *self.kinds)

    def groups(self, status: ManagerStatus) -> Iterator[tuple[str, list[PipelineStatus]]]:
        """Each pipeline that is there, and those together that have no series of their own."""
        there = [entry for entry in status.entries if entry.phase != "empty"]
        for entry in there[: self._most]:
            yield entry.key, [entry]
        yield OTHER, there[self._most :]

    def is_of_another(self, manager: PipelineManager) -> bool:
        """Whether it exports another manager than this one."""
        mine = None if self._is_cancelled else self._manager()
        return mine is not None and mine is not manager and not mine.is_closed

    def _forget(self) -> None:
        """Forget what was noted: this is a process that was told nothing yet."""
        raise NotImplementedError

    def _hear(self, event: ManagerEvent) -> None:
        """Note an event, on the manager's thread for them."""
        raise NotImplementedError


OneT = TypeVar("OneT", bound=Exported)


class Exports(Generic[OneT]):
    """All managers that are exported to one place, by name."""

    def __init__(self) -> None:
        self._exported: dict[str, OneT] = {}

    def add(self, one: OneT, manager: PipelineManager) -> None:
        """Export a manager, anew if it is already; an `InputError` says that its name is taken."""
        before = self._exported.get(one.name)
        if before is not None and before.is_of_another(manager):
            raise InputError(
                f"A manager is exported there as {one.name!r} already. Give this one another name:"
                f" {one.function}(manager, name=...).",
                value=one.name,
            )
        self._exported[one.name] = one
        if before is not None:
            before.cancel()
        one.begin(manager)

    def there(self) -> Iterator[tuple[OneT, ManagerStatus]]:
        """Each that is there now, and what it has."""
        for name, one in tuple(self._exported.items()):
            status = one.status()
            if status is not None:
                yield one, status
            elif self._exported.get(name) is one:
                del self._exported[name]
