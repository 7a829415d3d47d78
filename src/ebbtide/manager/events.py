"""What happens to a manager's pipelines, told to who subscribed, on a thread of its own.

Who tells never waits for who listens: a slow listener misses the oldest events of more than
10,000 that it has not heard yet, and is told how many. Nothing here takes a lock.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import queue
import time
from collections.abc import AsyncIterator, Callable, Mapping
from types import MappingProxyType
from typing import Literal, get_args

from ebbtide.cancellation import EbbtideThread
from ebbtide.errors import unknown_value

log = logging.getLogger("ebbtide.manager")

Kind = Literal[
    "created", "loading", "ready", "leased", "returned", "sleeping", "waking", "evicting",
    "disposed", "failed", "leaked", "pressure", "missed",
]  # fmt: skip

KINDS: tuple[str, ...] = get_args(Kind)

MOST = 10_000
"""Events that a listener may have before it."""


@dataclasses.dataclass(frozen=True, slots=True)
class ManagerEvent:
    """Something that happened.

    Attributes:
        kind: What: ``created``, ``loading``, ``ready``, ``leased``, ``returned``, ``sleeping``,
            ``waking``, ``evicting``, ``disposed`` (its facts have the receipt), ``failed``,
            ``leaked``, ``pressure``, or ``missed``: how many events a slow listener did not hear.
        pipeline: To which pipeline, as `PipelineStatus` names it; empty where to none.
        time: When, in seconds since 1970.
        facts: What else is known, as ``bytes``, ``seconds``, ``receipt``, ``error``.
    """

    kind: str
    pipeline: str
    time: float
    facts: Mapping[str, object]

    def __str__(self) -> str:
        """A line for a person."""
        facts = ", ".join(f"{name} {_brief(value)}" for name, value in self.facts.items())
        return f"{self.kind} {self.pipeline}" + (f": {facts}" if facts else "")


def _brief(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


class Subscription:
    """One listener, until `cancel`; as a context manager it is cancelled at the end."""

    def __init__(self, feed: Feed, kinds: frozenset[str], hear: Callable[[], object]) -> None:
        self._feed = feed
        self._kinds = kinds
        self.hear = hear
        self._waiting: collections.deque[ManagerEvent] = collections.deque(maxlen=MOST)
        self._put = 0
        self._taken = 0
        self._is_cancelled = False
        self.is_due = False
        """Whether who hears was told that there is something to take."""

    def hears(self, kind: str) -> bool:
        """Whether events of a kind are listened to."""
        return not self._kinds or kind in self._kinds

    def offer(self, event: ManagerEvent) -> None:
        """Have it heard, if it is of a kind that is listened to."""
        if self.hears(event.kind):
            self._waiting.append(event)
            self._put += 1
            if not self.is_due:
                self.is_due = True
                self.hear()

    def take(self) -> ManagerEvent | None:
        """The next event; None where there is none."""
        if self._is_cancelled:
            return None
        lost = self._put - self._taken - len(self._waiting)
        if lost > 0:
            self._taken += lost
            facts = MappingProxyType({"count": lost})
            return ManagerEvent("missed", "", time.time(), facts)
        try:
            event = self._waiting.popleft()
        except IndexError:
            return None
        self._taken += 1
        return event

    def cancel(self) -> None:
        """Listen no more; what was not heard yet is not."""
        self._is_cancelled = True
        self._feed.remove(self)
        self._waiting.clear()

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *about: object) -> None:
        self.cancel()


class Feed:
    """All who listen to a manager."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """In a forked child: nobody listens."""
        self._is_stopped = False
        self._subscriptions: tuple[Subscription, ...] = ()
        self._queue: queue.SimpleQueue[tuple[Subscription, Callable[..., object]] | None]
        self._queue = queue.SimpleQueue()
        self._thread: EbbtideThread | None = None

    def hears(self, kind: str) -> bool:
        """Whether anybody listens to events of a kind."""
        return any([one.hears(kind) for one in self._subscriptions])  # noqa: C419 - a list is quick

    def tell(self, kind: str, pipeline: str, facts: Mapping[str, object]) -> None:
        """Something happened; on any thread, at any time."""
        if self.hears(kind):
            event = ManagerEvent(kind, pipeline, time.time(), MappingProxyType(dict(facts)))
            for one in self._subscriptions:
                one.offer(event)

    def subscribe(
        self, function: Callable[[ManagerEvent], object], kinds: tuple[str, ...]
    ) -> Subscription:
        """Have a function called at each event, on a thread of the feed's."""
        subscription = Subscription(self, _checked(kinds), lambda: None)
        subscription.hear = lambda: self._queue.put((subscription, function))
        if self._thread is None:
            self._thread = EbbtideThread(target=self._run, name="ebbtide-events", daemon=True)
            self._thread.start()
        self._subscriptions = (*self._subscriptions, subscription)
        return subscription

    async def listen(self, kinds: tuple[str, ...]) -> AsyncIterator[ManagerEvent]:
        """Every event from now on, on an event loop, until the feed is stopped."""
        import asyncio

        loop = asyncio.get_running_loop()
        ready = asyncio.Event()

        def hear() -> None:
            try:
                loop.call_soon_threadsafe(ready.set)
            except RuntimeError:
                return  # the loop was closed

        subscription = Subscription(self, _checked(kinds), hear)
        self._subscriptions = (*self._subscriptions, subscription)
        try:
            while True:
                ready.clear()
                subscription.is_due = False
                while (event := subscription.take()) is not None:
                    yield event
                if self._is_stopped:
                    return
                await ready.wait()
        finally:
            subscription.cancel()

    def remove(self, subscription: Subscription) -> None:
        """Somebody listens no more."""
        self._subscriptions = tuple(one for one in self._subscriptions if one is not subscription)

    def stop(self) -> None:
        """Let the thread end, once it has told what there is, and all who listen on a loop."""
        self._is_stopped = True
        for one in self._subscriptions:
            one.hear()
        self._queue.put(None)
        self._thread = None

    def _run(self) -> None:
        mine = self._queue
        while (told := mine.get()) is not None:
            subscription, function = told
            subscription.is_due = False  # before it is emptied: who puts more in, tells
            while (event := subscription.take()) is not None:
                try:
                    function(event)
                except BaseException:  # the thread is everyone's
                    log.exception("A listener to %s failed; it goes on hearing.", event.kind)


def _checked(kinds: tuple[str, ...]) -> frozenset[str]:
    for kind in kinds:
        if kind not in KINDS:
            raise unknown_value("event", kind, KINDS)
    return frozenset(kinds)
