"""`PipelineManager`: many pipelines in one memory budget, and nothing in use ever taken away."""

from __future__ import annotations

import math
import os
import warnings
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, overload

from ebbtide import factory
from ebbtide.errors import InputError, unknown_value
from ebbtide.manager.accounts import Books
from ebbtide.manager.core import Core, clock
from ebbtide.manager.desk import closed
from ebbtide.manager.events import ManagerEvent, Subscription
from ebbtide.manager.hands import guessed
from ebbtide.manager.lease import OF_A_LEASE, AcquireOptions, Lease
from ebbtide.manager.policy import POLICIES, Policy
from ebbtide.manager.slots import Phase, Settled, Slot, Wish
from ebbtide.manager.status import Explanation, ManagerStatus, explanation_of, status_of
from ebbtide.manager.values import Bytes, Seconds, budget_of, count_of, seconds_of, size_of
from ebbtide.memory.monitor import PressureEvent
from ebbtide.memory.probe import anonymous_bytes, snapshot
from ebbtide.memory.timeline import Timeline
from ebbtide.memory.workspace import workspace
from ebbtide.receipts import DisposalReceipt
from ebbtide.runtime.prepare import store

if TYPE_CHECKING:
    from ebbtide.factory import Model, PipelineOptions
    from ebbtide.manager.live_view import LiveView
    from ebbtide.pipelines.feature_extraction import FeatureExtractionPipeline
    from ebbtide.pipelines.fill_mask import FillMaskPipeline
    from ebbtide.pipelines.question_answering import QuestionAnsweringPipeline
    from ebbtide.pipelines.text_classification import TextClassificationPipeline
    from ebbtide.pipelines.token_classification import TokenClassificationPipeline
    from ebbtide.pipelines.zero_shot_classification import ZeroShotClassificationPipeline

MOST_KNOWN = 4096
"""Ways of asking for a pipeline that are remembered."""
SHARE_FOR_CALLS = 0.04
"""What of the budget is kept for calls in any case."""
SHARE_MAPPED = 0.95
"""What of the limit anonymous and mapped bytes may take together."""

_UNNAMED = frozenset({"token", "progress"})
"""Options that make no other pipeline, and that no name may show."""


class PipelineManager:
    """Loads pipelines when they are asked for, and keeps all of them inside one memory budget.

    What does not fit has others sleep or go, what is of least use first, but never what is leased;
    what cannot fit yet waits. Every method is safe on any thread; those that begin with ``a`` are
    for an event loop, and a lease is a context manager of either kind. Close it in the end, as by
    a ``with`` block.

    Args:
        budget: Anonymous memory that the whole process may hold: ``"2 GiB"``, bytes, or a share of
            the limit (the cgroup's, or the machine's), as 0.6. None: 80 % of the cgroup's limit,
            or 60 % of the machine's memory where there is none.
        keep_alive: For how long a pipeline that nobody uses is kept: seconds, ``"30s"``, ``"5m"``,
            ``"1h"``, or ``"forever"`` or None for as long as there is room.
        policy: What sleeps and goes first: ``"cost"`` (what is worth least a byte), ``"lru"``,
            ``"lfu"``, ``"ttl"``, or a function of the entries, the need and the time (see
            `ebbtide.manager.policy`).
        max_pipelines: How many there may be; None for any number.
        on_pressure: Called on a thread of Ebbtide's own when the kernel tells that memory runs
            short, before pipelines are put to sleep and evicted for it.
        devices: Bytes that may be used on each device with memory of its own, as in
            ``{"cuda:0": "8 GiB"}``. One that is not named is not bounded.
        max_waiting: How many may wait for a pipeline, one more gets a `ManagerBusyError`; None for
            any number.
        remember: Whether what pipelines were measured to take is kept for the next program.

    Raises:
        InputError: A value that cannot be used.

    Example:
        >>> with PipelineManager(budget="2 GiB") as manager:
        ...     with manager.acquire("feature-extraction", "tests/models/tiny-bert") as embed:
        ...         embed("the tide goes out", pooling="mean").shape
        (1, 32)
    """

    def __init__(
        self,
        budget: Bytes = None,
        *,
        keep_alive: Seconds = "5m",
        policy: Policy = "cost",
        max_pipelines: int | None = None,
        on_pressure: Callable[[PressureEvent], object] | None = None,
        devices: Mapping[str, str | int] | None = None,
        max_waiting: int | None = 1000,
        remember: bool = True,
    ) -> None:
        if not callable(policy) and policy not in POLICIES:
            raise unknown_value("policy", policy, POLICIES)
        limit = snapshot().limit
        size = budget_of(budget, limit.bytes, limit.source == "machine")
        books = Books(
            size,
            policy,
            clock,
            anonymous_bytes,
            lambda: workspace.reserved,
            devices={
                name: size_of(f"devices[{name!r}]", one) for name, one in (devices or {}).items()
            },
            mapped_limit=max(0, int(limit.bytes * SHARE_MAPPED) - size),
            most=count_of("max_pipelines", max_pipelines),
            share_for_calls=SHARE_FOR_CALLS,
        )
        kept = store().root / "estimates.json" if remember else None
        self._keep_alive = seconds_of("keep_alive", math.inf if keep_alive is None else keep_alive)
        waiting = count_of("max_waiting", max_waiting)
        self._core = Core(books, math.inf if waiting is None else waiting, kept, on_pressure)
        self._known: dict[Any, Slot] = {}
        self._site = factory.creation_site()
        finalizer = weakref.finalize(self, _forgotten, self._core, self._site)
        finalizer.atexit = False
        self._finalizer = finalizer

    @overload
    def acquire(
        self,
        task: Literal["feature-extraction", "embeddings"],
        model: Model = None,
        **options: Unpack[AcquireOptions],
    ) -> Lease[FeatureExtractionPipeline]: ...

    @overload
    def acquire(
        self,
        task: Literal["text-classification", "sentiment-analysis"],
        model: Model = None,
        **options: Unpack[AcquireOptions],
    ) -> Lease[TextClassificationPipeline]: ...

    @overload
    def acquire(
        self,
        task: Literal["token-classification", "ner"],
        model: Model = None,
        **options: Unpack[AcquireOptions],
    ) -> Lease[TokenClassificationPipeline]: ...

    @overload
    def acquire(
        self,
        task: Literal["question-answering"],
        model: Model = None,
        **options: Unpack[AcquireOptions],
    ) -> Lease[QuestionAnsweringPipeline]: ...

    @overload
    def acquire(
        self,
        task: Literal["fill-mask"],
        model: Model = None,
        **options: Unpack[AcquireOptions],
    ) -> Lease[FillMaskPipeline]: ...

    @overload
    def acquire(
        self,
        task: Literal["zero-shot-classification"],
        model: Model = None,
        **options: Unpack[AcquireOptions],
    ) -> Lease[ZeroShotClassificationPipeline]: ...

    @overload
    def acquire(
        self,
        task: str,
        model: Model = None,
        **options: Unpack[AcquireOptions],
    ) -> Lease[Any]: ...

    def acquire(
        self,
        task: str,
        model: Model = None,
        **options: Unpack[AcquireOptions],
    ) -> Lease[Any]:
        """A lease of a pipeline: ``with manager.acquire(...) as pipe``, or ``async with``.

        Where the block begins the pipeline is loaded, if need be; once for all who ask at the same
        time. Until the block ends it stays. The pipeline is shared: dispose it by `evict`.

        Args:
            task: As for `ebbtide.pipeline`.
            model: As for `ebbtide.pipeline`.
            **options: By name only, those of `ebbtide.pipeline` (others are another pipeline), and:

                priority: Of those who wait the highest goes first, and among equals the eldest; 0.
                    Each ten seconds of waiting count as 1.
                timeout: Seconds to wait at most; None for as long as it takes.
                keep_alive: For how long it is kept once nobody uses it, as for the manager; 0 for
                    not at all. None: the manager's.

        Raises:
            InputError: There is no such task; names the nearest.
            OptionError: There is no such option; names the nearest.
            AcquireTimeoutError: From the block's begin: it was not to be had in time.
            OutOfBudgetError: From the block's begin: it can never fit; says the sum.
            ManagerBusyError: From the block's begin: too many wait already.
            ManagerClosedError: From the block's begin: the manager is closed.
            EbbtideError: From the block's begin: its load failed, as `ebbtide.pipeline` says.
        """
        asked: dict[str, Any] = dict(options)
        priority = asked.pop("priority", 0)
        timeout, keep = asked.pop("timeout", None), asked.pop("keep_alive", None)
        slot = self._slot(task, model, asked, OF_A_LEASE)
        site = factory.creation_site()
        slot.keep_alive = keep = (
            self._keep_alive if keep is None else seconds_of("keep_alive", keep)
        )
        if timeout is not None:
            timeout = seconds_of("timeout", timeout)
        if not isinstance(priority, int | float) or math.isnan(priority):
            raise InputError(f"priority takes a number, not {priority!r}.", value=priority)
        return Lease(self._core, slot, priority, timeout, keep, site)

    # What else may be asked for

    def preload(
        self,
        task: str,
        model: Model = None,
        *,
        pin: bool = False,
        **options: Unpack[AcquireOptions],
    ) -> None:
        """Have a pipeline loaded, and hold no lease of it.

        Args:
            task: As for `acquire`.
            model: As for `acquire`.
            pin: Have it stay; see `pin`.
            **options: As for `acquire`.

        Raises:
            EbbtideError: As for a lease.
        """
        lease = self.acquire(task, model, **options)
        if pin:
            self._pin(lease._slot, True)
        with lease:
            pass

    async def apreload(
        self,
        task: str,
        model: Model = None,
        *,
        pin: bool = False,
        **options: Unpack[AcquireOptions],
    ) -> None:
        """The same as `preload`, on an event loop."""
        lease = self.acquire(task, model, **options)
        if pin:
            self._pin(lease._slot, True)
        async with lease:
            pass

    def pin(self, task: str, model: Model = None, **options: Unpack[PipelineOptions]) -> None:
        """Have a pipeline stay, from now on or from when it is loaded, until it is unpinned.

        Its memory counts; what does not fit beside all that is pinned fails at once.
        """
        self._pin(self._slot(task, model, options), True)

    def unpin(self, task: str, model: Model = None, **options: Unpack[PipelineOptions]) -> None:
        """Let a pipeline go again as any other."""
        self._pin(self._slot(task, model, options), False)

    def _pin(self, slot: Slot, pinned: bool) -> None:
        slot.is_pinned = pinned
        self._core.post(self._core.desk.pump)

    def sleep(
        self,
        task: str,
        model: Model = None,
        *,
        timeout: Seconds = 30.0,
        **options: Unpack[PipelineOptions],
    ) -> DisposalReceipt | None:
        """Have a pipeline sleep, once it is not leased any more; the next lease wakes it.

        Args:
            task: As for `acquire`.
            model: As for `acquire`.
            timeout: Seconds to wait for its leases; None for as long as it takes. Meanwhile no
                further lease is given.
            **options: As for `acquire`.

        Returns:
            What came back; None where it sleeps already or is not loaded.

        Raises:
            PipelineInUseError: It was leased all the time; says where. It goes on as before.
        """
        wish = self._wish("sleep", task, model, timeout, options)
        return self._core.wait(wish)  # type: ignore[no-any-return]

    async def asleep(
        self,
        task: str,
        model: Model = None,
        *,
        timeout: Seconds = 30.0,
        **options: Unpack[PipelineOptions],
    ) -> DisposalReceipt | None:
        """The same as `sleep`, on an event loop."""
        wish = self._wish("sleep", task, model, timeout, options)
        return await self._core.await_(wish)  # type: ignore[no-any-return]

    def evict(
        self,
        task: str,
        model: Model = None,
        *,
        timeout: Seconds = 30.0,
        **options: Unpack[PipelineOptions],
    ) -> DisposalReceipt | None:
        """Have a pipeline disposed, once it is not leased any more; the next lease loads it again.

        Args:
            task: As for `acquire`.
            model: As for `acquire`.
            timeout: Seconds to wait for its leases; None for as long as it takes. Meanwhile no
                further lease is given.
            **options: As for `acquire`.

        Returns:
            What came back; None where it is not loaded.

        Raises:
            PipelineInUseError: It was leased all the time; says where. It goes on as before.
            DisposalError: Some releases failed; the error has the receipt.
        """
        wish = self._wish("evict", task, model, timeout, options)
        return self._core.wait(wish)  # type: ignore[no-any-return]

    async def aevict(
        self,
        task: str,
        model: Model = None,
        *,
        timeout: Seconds = 30.0,
        **options: Unpack[PipelineOptions],
    ) -> DisposalReceipt | None:
        """The same as `evict`, on an event loop."""
        wish = self._wish("evict", task, model, timeout, options)
        return await self._core.await_(wish)  # type: ignore[no-any-return]

    def dispose_all(self, *, timeout: Seconds = 30.0) -> dict[str, DisposalReceipt]:
        """Dispose every pipeline, one after another, the largest first, so that memory only falls.

        Args:
            timeout: Seconds to wait for leases, for all of them together.

        Returns:
            The receipts, by the pipelines' keys.

        Raises:
            PipelineInUseError: One was leased all the time. Those that were not are disposed.
        """
        return dict(self._drive(self._core.disposing(_waits(timeout))))

    async def adispose_all(self, *, timeout: Seconds = 30.0) -> dict[str, DisposalReceipt]:
        """The same as `dispose_all`, on an event loop."""
        return dict(await self._adrive(self._core.disposing(_waits(timeout))))

    def close(self, *, timeout: Seconds = 30.0, cancel: bool = False) -> dict[str, DisposalReceipt]:
        """Give out nothing any more, wait for leases, and dispose everything.

        Who waits for a pipeline gets a `ManagerClosedError`. What is still leased when the time is
        over is disposed all the same, its calls cancelled. A second time does nothing.

        Args:
            timeout: Seconds to wait for leases.
            cancel: Wait for none.

        Returns:
            The receipts, by the pipelines' keys.
        """
        if self._finalizer.detach() is None:
            return {}
        return dict(self._drive(self._core.closing(_waits(timeout), cancel)))

    async def aclose(
        self, *, timeout: Seconds = 30.0, cancel: bool = False
    ) -> dict[str, DisposalReceipt]:
        """The same as `close`, on an event loop."""
        if self._finalizer.detach() is None:
            return {}
        return dict(await self._adrive(self._core.closing(_waits(timeout), cancel)))

    def _wish(
        self, action: str, task: str, model: Model, timeout: Seconds, options: Mapping[str, Any]
    ) -> Wish:
        seconds = None if timeout is None else seconds_of("timeout", timeout)
        return self._core.wish(self._slot(task, model, options), action, seconds)

    def _drive(
        self, steps: Generator[Settled, None, list[tuple[str, Any]]]
    ) -> list[tuple[str, Any]]:
        try:
            while True:
                self._core.hear(next(steps))
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]

    async def _adrive(
        self, steps: Generator[Settled, None, list[tuple[str, Any]]]
    ) -> list[tuple[str, Any]]:
        try:
            while True:
                await self._core.ahear(next(steps))
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]

    # What it says of itself

    @property
    def budget(self) -> int:
        """Bytes of anonymous memory that the whole process may hold."""
        return self._core.books.budget

    @property
    def timeline(self) -> Timeline:
        """What the process held of late, with everything that happened to pipelines."""
        return self._core.monitor.timeline

    @property
    def is_closed(self) -> bool:
        """Whether it was closed."""
        return not self._finalizer.alive

    def status(self) -> ManagerStatus:
        """What there is now."""
        self._core.books.measure()
        return status_of(self._core.books, len(self._core.desk.waiting), self._core.counts)

    def explain(
        self, task: str, model: Model = None, **options: Unpack[PipelineOptions]
    ) -> Explanation:
        """What asking for a pipeline would do now, before anything happens: its words and data.

        Nothing is downloaded but a config; what was never loaded is estimated by its files.

        Args:
            task: As for `acquire`.
            model: As for `acquire`.
            **options: As for `acquire`.

        Raises:
            EbbtideError: As `ebbtide.pipeline`, for what can be known without a load.
        """
        self._check_open()
        self._core.books.measure()
        slot = self._slot(task, model, options)
        if slot.size is None:
            slot = Slot(slot.key, slot.task, slot.model, slot.options, slot.site)
            found = factory.load_estimate(task, model, options, fetch=False)
            slot.resize(guessed(found, isolated=slot.is_outside))
        return explanation_of(self._core.books, len(self._core.desk.waiting), slot)

    def subscribe(self, function: Callable[[ManagerEvent], object], *kinds: str) -> Subscription:
        """Have a function called at each event, one after another, on a thread of Ebbtide's own.

        Args:
            function: Gets each `ManagerEvent`; its exceptions are logged.
            *kinds: Which kinds, as ``"disposed"``; none for all.

        Returns:
            What is to be cancelled in the end.

        Raises:
            InputError: There is no such kind, or no function.
            ManagerClosedError: The manager is closed.
        """
        self._check_open()
        if not callable(function):
            raise InputError(f"A function is needed, not {function!r}.", value=function)
        return self._core.feed.subscribe(function, kinds)

    def events(self, *kinds: str) -> AsyncIterator[ManagerEvent]:
        """Every event from the first step on, for ``async for``.

        Args:
            *kinds: As for `subscribe`.
        """
        return self._core.feed.listen(kinds)

    def live_view(self, *, interval: float = 0.5) -> LiveView:
        """A view of this process on the terminal while a ``with`` block runs; see `LiveView`."""
        from ebbtide.manager.live_view import LiveView

        return LiveView(interval=interval)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        books = self._core.books
        there = [slot for slot in books if slot.phase is not Phase.EMPTY]
        state = "closed" if self.is_closed else "open"
        return (
            f"<PipelineManager {state}: {len(there)} pipelines,"
            f" {books.charged / 1e6:.1f} MB of {books.budget / 1e6:.0f} MB>"
        )

    def _check_open(self) -> None:
        if self.is_closed:
            raise closed()

    def _slot(self, task: str, model: Model, options: Any, beside: tuple[str, ...] = ()) -> Slot:
        """The slot of a pipeline; made, and its options checked, when it is first asked for."""
        known: Any = (task, model, tuple(options.items())) if options else (task, model)
        slots = self._core.books.slots
        try:
            slot = self._known[known]
            if slots.get(slot.key) is not slot:  # it was forgotten
                slot = self._new_slot(task, model, options, beside)
        except (KeyError, TypeError) as error:
            slot = self._new_slot(task, model, options, beside)
            if isinstance(error, KeyError):  # else an option cannot be hashed
                if len(self._known) > MOST_KNOWN:
                    self._known.clear()
                self._known[known] = slot
        slot.options = options
        return slot

    def _new_slot(
        self, task: str, model: Model, options: Mapping[str, Any], beside: tuple[str, ...]
    ) -> Slot:
        name, default = factory.checked("acquire()", task, options, beside)  # type: ignore[arg-type]
        named = default if model is None else os.path.normpath(os.fspath(model))
        chosen = ", ".join(
            f"{option}={options[option]!r}" for option in sorted(options) if option not in _UNNAMED
        )
        key = f"{name} {named}" + (f" ({chosen})" if chosen else "")
        slots = self._core.books.slots
        if key not in slots:
            new = Slot(key, name, model, dict(options), factory.creation_site())
            if slots.setdefault(key, new) is new:
                self._core.tell("created", new)
        return slots[key]


def _waits(timeout: Seconds) -> float:
    return math.inf if timeout is None else seconds_of("timeout", timeout)


def _forgotten(core: Core, site: tuple[str, int]) -> None:
    file, line = site
    core.abandon()
    warnings.warn_explicit(
        f"A PipelineManager was collected without close(); it was made at {file}:{line}. Use it in"
        " a `with` block, or call close().",
        ResourceWarning,
        file,
        line,
    )
