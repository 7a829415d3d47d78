"""A real manager over real tiny models: leases, loads, waiting, and its end."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tools.large_models import models

import ebbtide
from ebbtide import PipelineManager
from ebbtide.errors import (
    AcquireTimeoutError,
    InputError,
    LoadMemoryError,
    ManagerClosedError,
    ModelNotFoundError,
    OptionError,
    OutOfBudgetError,
    PipelineCancelledError,
    PipelineDisposedError,
    PipelineInUseError,
)
from ebbtide.manager import ManagerEvent
from ebbtide.manager import core as core_module
from ebbtide.manager.slots import Phase, Slot
from ebbtide.memory import PressureEvent, snapshot

TASK = "feature-extraction"
MODELS = Path(__file__).parent.parent / "models"
BERT = MODELS / "tiny-bert"
ROBERTA = MODELS / "tiny-roberta"
DISTILBERT = MODELS / "tiny-distilbert"


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models of 20 MB each, beside which what else happens in a process is little."""
    return list(models(tmp_path_factory.mktemp("large"), 3, [20]))


@pytest.fixture
def manager() -> Iterator[PipelineManager]:
    made = PipelineManager("2 GiB", remember=False)
    yield made
    made.close(cancel=True)


def loads(manager: PipelineManager) -> int:
    return manager.status().counts.get("loading", 0)


def slot_of(manager: PipelineManager, model: Path = BERT, **options: Any) -> Slot:
    return manager._slot(TASK, model, options)


def full(manager: PipelineManager) -> None:
    """Lower the budget to what is there, and what a load takes for a while."""
    books = manager._core.books
    books.share_for_calls = 0.0
    books.measure()
    books.budget = books.floor + books.workspace + books.charged + 24_000_000


class Held:
    """A load that does not end before it may."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.may_end = threading.Event()

    def __call__(self, event: ebbtide.ProgressEvent) -> None:
        if event["status"] == "ready":
            self.begun.set()
            self.may_end.wait(30)


def in_thread(function: Callable[[], object]) -> tuple[threading.Thread, list[Any]]:
    """What a function on a thread of its own gives or raises, once it is joined."""
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, found


def use(manager: PipelineManager, model: Path = BERT, **options: Any) -> tuple[int, ...]:
    with manager.acquire(TASK, model, **options) as embed:
        return tuple(embed("the tide").shape)


# Leases


def test_a_lease_gives_the_pipeline_and_the_next_one_the_same(manager: PipelineManager) -> None:
    with manager.acquire(TASK, BERT) as first:
        assert isinstance(first, ebbtide.FeatureExtractionPipeline)
        assert first("the tide").shape[-1] == 32
    with manager.acquire(TASK, BERT) as second:
        assert second is first
    assert loads(manager) == 1


def test_an_alias_of_a_task_is_the_same_pipeline_and_other_options_are_another(
    manager: PipelineManager,
) -> None:
    with manager.acquire(TASK, BERT) as one, manager.acquire("embeddings", str(BERT)) as same:
        assert one is same
    with manager.acquire(TASK, BERT, dtype="q8") as other:
        assert other is not one


def test_a_token_makes_no_other_pipeline_and_is_in_no_name(manager: PipelineManager) -> None:
    with (
        manager.acquire(TASK, BERT, token="hf_secret") as one,
        manager.acquire(TASK, BERT, token="hf_other") as same,
    ):
        assert one is same
    assert "hf_" not in str(manager.status()) + repr(manager)


def test_threads_that_ask_at_the_same_time_have_one_load_for_all(manager: PipelineManager) -> None:
    barrier = threading.Barrier(16)

    def ask() -> int:
        barrier.wait()
        with manager.acquire(TASK, BERT) as embed:
            return id(embed)

    threads = [in_thread(ask) for _ in range(16)]
    for thread, _ in threads:
        thread.join()
    assert len({found[0] for _, found in threads}) == 1
    assert loads(manager) == 1


def test_tasks_of_an_event_loop_have_one_load_for_all(manager: PipelineManager) -> None:
    async def ask() -> int:
        async with manager.acquire(TASK, BERT) as embed:
            return (await embed.acall("the tide")).shape[-1]

    async def ask_all() -> list[int]:
        return list(await asyncio.gather(*[ask() for _ in range(50)]))

    assert asyncio.run(ask_all()) == [32] * 50
    assert loads(manager) == 1


def test_an_error_in_the_block_returns_the_lease(manager: PipelineManager) -> None:
    with pytest.raises(KeyError), manager.acquire(TASK, BERT):
        raise KeyError
    assert manager.status().entries[0].leases == 0


def test_a_lease_that_is_held_cannot_be_entered_again(manager: PipelineManager) -> None:
    lease = manager.acquire(TASK, BERT)
    with lease, pytest.raises(InputError, match="held already"), lease:
        pass
    with lease as embed:
        assert embed.state is ebbtide.State.READY


def test_a_released_lease_is_returned_once(manager: PipelineManager) -> None:
    with manager.acquire(TASK, BERT) as embed, manager.acquire(TASK, BERT) as same:
        assert embed is same
        lease = manager.acquire(TASK, BERT)
        lease.__enter__()
        assert manager.status().entries[0].leases == 3
        lease.release()
        lease.release()
        assert manager.status().entries[0].leases == 2


def test_a_forgotten_lease_is_returned_with_a_warning_that_says_where(
    manager: PipelineManager,
) -> None:
    told: list[ManagerEvent] = []
    heard = threading.Event()
    lease = manager.acquire(TASK, BERT)
    lease.__enter__()
    with manager.subscribe(lambda event: (told.append(event), heard.set()), "leaked"):
        with pytest.warns(ResourceWarning, match=r"test_manager\.py:\d+"):
            del lease
        assert heard.wait(30)
    assert "test_manager.py" in str(told[0].facts["site"])
    assert manager.status().entries[0].leases == 0


def test_a_pipeline_that_a_user_disposed_is_loaded_again(manager: PipelineManager) -> None:
    for _ in range(8):  # at once: the manager may not have heard of it yet
        with manager.acquire(TASK, BERT) as embed:
            embed.dispose()
    assert use(manager)[-1] == 32
    assert loads(manager) == 9


# The budget


def test_what_is_leased_stays_and_who_needs_its_memory_waits(
    manager: PipelineManager, large: list[Path]
) -> None:
    with manager.acquire(TASK, large[0]) as embed:
        full(manager)
        thread, found = in_thread(lambda: use(manager, large[1]))
        waiting = manager.explain(TASK, large[1])
        assert waiting.verdict == "waits"
        assert embed("still here").shape[-1] == 64
        assert not found
    thread.join()
    assert found[0][-1] == 64
    assert slot_of(manager, large[0]).phase in (Phase.ASLEEP, Phase.EMPTY)


def test_what_is_not_leased_sleeps_for_what_is_asked_for_and_wakes_again(
    manager: PipelineManager, large: list[Path]
) -> None:
    use(manager, large[0])
    use(manager, large[1])
    full(manager)
    assert use(manager, large[2])[-1] == 64
    counts = manager.status().counts
    assert counts.get("evicting", 0) + counts.get("sleeping", 0) >= 1
    assert use(manager, large[0])[-1] == 64
    assert use(manager, large[1])[-1] == 64


def test_what_can_never_fit_fails_at_once_and_says_the_sum(manager: PipelineManager) -> None:
    manager._core.books.measure()
    manager._core.books.budget = manager._core.books.floor + 1000
    with pytest.raises(OutOfBudgetError, match=r"can never fit: .* MB for it") as caught:
        use(manager)
    assert caught.value.needed > caught.value.available
    assert manager.explain(TASK, BERT).verdict == "never"


def test_a_cached_acquire_does_not_wait_for_a_load_of_somebody_else(
    manager: PipelineManager,
) -> None:
    use(manager, BERT)
    slow = Held()
    thread, found = in_thread(lambda: use(manager, ROBERTA, progress=slow))
    assert slow.begun.wait(30)
    with manager.acquire(TASK, BERT) as embed:
        assert embed.state is ebbtide.State.READY
        assert not found
    slow.may_end.set()
    thread.join()
    assert found[0][-1] == 32


def test_at_most_so_many_pipelines_are_loaded() -> None:
    with PipelineManager("2 GiB", max_pipelines=2, remember=False) as manager:
        for model in (BERT, ROBERTA, DISTILBERT, BERT):
            use(manager, model)
            there = [one for one in manager.status().entries if one.phase != "empty"]
            assert len(there) <= 2


def test_a_pinned_pipeline_stays_until_it_is_unpinned() -> None:
    with PipelineManager("2 GiB", max_pipelines=1, remember=False) as manager:
        manager.preload(TASK, BERT, pin=True)
        with pytest.raises(OutOfBudgetError, match="pinned"):
            use(manager, ROBERTA)
        manager.unpin(TASK, BERT)
        assert use(manager, ROBERTA)[-1] == 32


def test_a_load_that_ran_out_of_memory_evicts_and_is_tried_once_more(
    manager: PipelineManager, large: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(manager, large[0])
    real, times = ebbtide.factory.begin, []

    def short(*args: Any) -> Any:
        load = real(*args)
        times.append(1)
        if len(times) == 1:
            monkeypatch.setattr(load, "outcome", lambda: _raise(LoadMemoryError("no", path="x")))
        return load

    monkeypatch.setattr(ebbtide.factory, "begin", short)
    assert use(manager, large[1])[-1] == 64
    assert len(times) == 2
    assert slot_of(manager, large[0]).phase is not Phase.READY


def _raise(error: BaseException) -> Any:
    raise error


# What goes wrong


def test_a_deadline_says_what_it_waited_for(manager: PipelineManager, large: list[Path]) -> None:
    with manager.acquire(TASK, large[0]):
        full(manager)
        with pytest.raises(AcquireTimeoutError, match="in use by 1 pipeline") as caught:
            use(manager, large[1], timeout=0.05)
    assert str(large[1]) in caught.value.pipeline
    assert manager.status().waiting == 0


def test_a_load_that_fails_tells_everyone_and_each_has_an_error_of_their_own(
    manager: PipelineManager, tmp_path: Path
) -> None:
    threads = [in_thread(lambda: use(manager, tmp_path)) for _ in range(4)]
    for thread, _ in threads:
        thread.join()
    errors = [found[0] for _, found in threads]
    assert all(isinstance(error, ModelNotFoundError) for error in errors)
    assert len({id(error) for error in errors}) == 4
    assert manager.status().waiting == 0


def test_a_task_that_is_cancelled_while_it_waits_holds_nothing_and_others_get_it(
    manager: PipelineManager,
) -> None:
    slow = Held()

    async def ask() -> int:
        async with manager.acquire(TASK, BERT, progress=slow) as embed:
            return (await embed.acall("x")).shape[-1]

    async def go() -> tuple[object, int]:
        first, second = asyncio.create_task(ask()), asyncio.create_task(ask())
        await asyncio.to_thread(slow.begun.wait, 30)
        first.cancel()
        results = await asyncio.gather(first, return_exceptions=True)
        slow.may_end.set()
        return results[0], await second

    cancelled, shape = asyncio.run(go())
    assert isinstance(cancelled, asyncio.CancelledError)
    assert shape == 32
    assert manager.status().entries[0].leases == 0
    assert loads(manager) == 1


def test_a_user_who_interrupts_the_wait_holds_nothing(manager: PipelineManager) -> None:
    slow = Held()

    def interrupt() -> None:
        if slow.begun.wait(30):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread, _ = in_thread(interrupt)
    with pytest.raises(KeyboardInterrupt):
        use(manager, BERT, progress=slow)
    thread.join()
    slow.may_end.set()
    assert use(manager)[-1] == 32
    assert manager.status().entries[0].leases == 0


def test_bad_calls_say_what_to_do(manager: PipelineManager) -> None:
    with pytest.raises(InputError, match="feature-extraction"):
        manager.acquire("feature-extractoin", BERT)
    with pytest.raises(OptionError, match="dtype"):
        manager.acquire(TASK, BERT, dtyp="q8")  # type: ignore[call-overload]
    with pytest.raises(InputError, match="keep_alive takes seconds"):
        manager.acquire(TASK, BERT, keep_alive="5 parsecs")
    with pytest.raises(InputError, match="timeout takes seconds"):
        manager.acquire(TASK, BERT, timeout=-1)
    with pytest.raises(InputError, match="budget takes bytes"):
        PipelineManager("much")
    with pytest.raises(InputError, match="Did you mean 'cost'"):
        PipelineManager("1 GiB", policy="costs")
    with pytest.raises(InputError, match="max_pipelines takes a whole number"):
        PipelineManager("1 GiB", max_pipelines=0)


def test_who_asks_inside_a_call_for_what_is_not_loaded_is_told(manager: PipelineManager) -> None:
    writer = MODELS / "gen-llama"
    found: list[BaseException] = []

    def told(event: ebbtide.ProgressEvent) -> None:
        try:
            use(manager, ROBERTA)
        except BaseException as error:
            found.append(error)

    ebbtide.pipeline(TASK, BERT, progress=told).dispose()
    assert writer.is_dir()
    assert isinstance(found[-1], InputError)
    assert "Acquire it before the call" in str(found[-1])


# Sleep, evict, close


def test_an_evicted_pipeline_gives_its_receipt_and_is_loaded_again(
    manager: PipelineManager,
) -> None:
    use(manager)
    receipt = manager.evict(TASK, BERT)
    assert receipt is not None
    assert receipt.verified
    assert manager.evict(TASK, BERT) is None
    assert use(manager)[-1] == 32


def test_an_eviction_waits_for_the_lease_and_gives_up_at_its_deadline(
    manager: PipelineManager,
) -> None:
    with manager.acquire(TASK, BERT) as embed:
        with pytest.raises(PipelineInUseError, match=r"test_manager\.py:\d+"):
            manager.evict(TASK, BERT, timeout=0.05)
        assert embed("still here").shape[-1] == 32
        thread, found = in_thread(lambda: manager.evict(TASK, BERT))
        assert not found
    thread.join()
    assert found[0].charged > 0


def test_a_sleeping_pipeline_wakes_for_the_next_lease(manager: PipelineManager) -> None:
    use(manager)
    receipt = manager.sleep(TASK, BERT)
    assert receipt is not None
    assert manager.status().entries[0].phase == "asleep"
    assert manager.sleep(TASK, BERT) is None
    assert use(manager)[-1] == 32
    assert loads(manager) == 1


def test_keep_alive_of_zero_has_it_gone_when_it_is_returned(manager: PipelineManager) -> None:
    gone = threading.Event()
    with manager.subscribe(lambda event: gone.set(), "disposed"):
        use(manager, keep_alive=0)
        assert gone.wait(30)
    assert not ebbtide.live()


def test_dispose_all_goes_from_the_largest_to_the_smallest(manager: PipelineManager) -> None:
    for model in (BERT, ROBERTA, DISTILBERT):
        use(manager, model)
    sizes = {one.key: one.anonymous for one in manager.status().entries}
    receipts = manager.dispose_all()
    assert list(receipts) == sorted(sizes, key=lambda key: -sizes[key])
    assert not ebbtide.live()
    assert use(manager)[-1] == 32


def test_a_closed_manager_tells_all_who_wait_and_leaves_nothing() -> None:
    manager = PipelineManager("2 GiB", remember=False)
    slow = Held()
    loading, loaded = in_thread(lambda: use(manager, ROBERTA, progress=slow))
    assert slow.begun.wait(30)
    leased = threading.Event()
    may_return = threading.Event()

    def hold() -> object:
        with manager.acquire(TASK, BERT) as embed:
            leased.set()
            may_return.wait(30)
            return embed("x").shape

    holding, held = in_thread(hold)
    assert leased.wait(30)
    closing, receipts = in_thread(manager.close)
    slow.may_end.set()
    loading.join()
    assert isinstance(loaded[0], ManagerClosedError | PipelineCancelledError)
    may_return.set()
    holding.join()
    closing.join()
    assert held[0][-1] == 32
    assert all(receipt.charged >= 0 for receipt in receipts[0].values())
    assert not ebbtide.live()
    with pytest.raises(ManagerClosedError):
        use(manager)
    assert manager.close() == {}


def test_a_manager_closed_with_a_lease_out_disposes_it_after_its_time() -> None:
    manager = PipelineManager("2 GiB", remember=False)
    with manager.acquire(TASK, BERT) as embed:
        assert list(manager.close(timeout=0.05)) == [f"{TASK} {BERT}"]
        with pytest.raises(PipelineDisposedError):
            embed("too late")


def test_a_manager_is_closed_on_an_event_loop() -> None:
    async def go() -> list[str]:
        async with PipelineManager("2 GiB", remember=False) as manager:
            await manager.apreload(TASK, BERT)
            await manager.asleep(TASK, BERT)
            await manager.aevict(TASK, BERT)
            await manager.apreload(TASK, BERT)
            receipts = await manager.adispose_all()
        return list(receipts)

    assert asyncio.run(go()) == [f"{TASK} {BERT}"]


def test_a_forgotten_manager_disposes_what_it_has_and_says_where_it_was_made() -> None:
    manager = PipelineManager("2 GiB", remember=False)
    use(manager)
    (embed,) = ebbtide.live()
    gone = threading.Event()
    embed._lifecycle.on_finished(gone.set)
    del embed
    with pytest.warns(ResourceWarning, match=r"PipelineManager was collected.*test_manager\.py"):
        del manager
    assert gone.wait(30)


# What it tells


def test_events_tell_a_pipelines_life_in_order(manager: PipelineManager) -> None:
    told: list[ManagerEvent] = []
    end = threading.Event()

    def hear(event: ManagerEvent) -> None:
        told.append(event)
        if event.kind == "disposed":
            end.set()

    with manager.subscribe(hear):
        use(manager)
        manager.sleep(TASK, BERT)
        use(manager)
        manager.evict(TASK, BERT)
        assert end.wait(30)
    kinds = [event.kind for event in told]
    assert kinds == [
        "created", "loading", "ready", "leased", "returned", "sleeping", "waking", "ready",
        "leased", "returned", "evicting", "disposed",
    ]  # fmt: skip
    assert {event.pipeline for event in told} == {f"{TASK} {BERT}"}
    assert told[-1].facts["receipt"].released >= 0  # type: ignore[attr-defined]


def test_events_come_to_an_event_loop(manager: PipelineManager) -> None:
    async def go() -> list[str]:
        kinds = []
        events = manager.events("loading", "ready", "disposed")
        listening = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        await manager.apreload(TASK, BERT, keep_alive=0)
        kinds.append((await listening).kind)
        async for event in events:
            kinds.append(event.kind)
            if event.kind == "disposed":
                break
        await events.aclose()  # type: ignore[attr-defined]
        return kinds

    assert asyncio.run(go()) == ["loading", "ready", "disposed"]


def test_an_explanation_says_what_would_go_and_changes_nothing(
    manager: PipelineManager, large: list[Path]
) -> None:
    assert manager.explain(TASK, large[0]).verdict == "fits"
    use(manager, large[0])
    assert manager.explain(TASK, large[0]).verdict == "ready"
    full(manager)
    told = manager.explain(TASK, large[1])
    assert told.verdict == "makes room"
    assert [*told.sleep, *told.evict] == [f"{TASK} {large[0]}"]
    assert "frees" in str(told)
    assert manager.status().entries[0].phase == "ready"
    assert manager.explain(TASK, large[1]).sleep == told.sleep


def test_the_sum_of_a_status_is_the_budget(manager: PipelineManager) -> None:
    use(manager)
    status = manager.status()
    assert status.budget == status.floor + status.pipelines + status.workspace + status.free
    assert "tiny-bert: ready" in str(status)


def test_what_a_load_took_is_known_to_the_next_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ebbtide.settings, "cache_dir", str(tmp_path))
    with PipelineManager("2 GiB") as manager:
        use(manager, BERT)
        measured = slot_of(manager).size
        assert measured is not None
    with PipelineManager("2 GiB") as manager:
        slow = Held()
        thread, _ = in_thread(lambda: use(manager, BERT, progress=slow))
        assert slow.begun.wait(30)
        known = slot_of(manager).size
        slow.may_end.set()
        thread.join()
    assert known is not None
    assert known.is_measured
    assert (known.awake, known.asleep) == (measured.awake, measured.asleep)


# Processes


def test_a_forked_child_has_a_manager_with_nothing_loaded(fresh_process: Any) -> None:
    out = fresh_process(
        """
        import os, sys, warnings
        from ebbtide import PipelineManager, PipelineInheritedError
        manager = PipelineManager("2 GiB", remember=False)
        with manager.acquire("feature-extraction", MODEL) as embed:
            embed("x")
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
            if not child:
                try:
                    embed("x")
                except PipelineInheritedError:
                    print("inherited")
                with manager.acquire("feature-extraction", MODEL) as again:
                    print(again("x").shape, again is embed, manager.status().counts)
                manager.close()
                sys.exit(0)
            assert os.waitpid(child, 0)[1] == 0
            print(embed("x").shape)
        manager.close()
        """
    )
    assert "inherited" in out
    assert "(1, 3, 32) False" in out


def test_a_process_that_forgets_to_close_ends_normally(fresh_process: Any) -> None:
    fresh_process(
        """
        from ebbtide import PipelineManager
        manager = PipelineManager("2 GiB", remember=False)
        lease = manager.acquire("feature-extraction", MODEL)
        lease.__enter__()("x")
        """
    )


def test_managers_that_come_and_go_leave_nothing(fresh_process: Any) -> None:
    out = fresh_process(
        """
        import shutil, tempfile
        from pathlib import Path
        from ebbtide import PipelineManager
        from ebbtide.memory import reclaim
        folder = Path(tempfile.mkdtemp())
        def cycle():
            with PipelineManager("2 GiB", remember=False) as manager:
                for number in range(8):
                    place = folder / str(number)
                    if not place.exists():
                        shutil.copytree(MODEL, place)
                    with manager.acquire("feature-extraction", str(place)) as embed:
                        embed("the tide goes out")
        cycle(); cycle()
        before = reclaim(collect=True).after
        for _ in range(5): cycle()
        print("grown", reclaim(collect=True).after - before)
        """
    )
    assert int(out.split("grown")[1]) < 1_000_000


def test_a_pipeline_in_a_process_of_its_own_is_charged_with_all_that_the_process_takes(
    manager: PipelineManager,
) -> None:
    assert use(manager, isolate=True)[-1] == 32
    (one,) = manager.status().entries
    assert one.anonymous > 15_000_000
    receipt = manager.evict(TASK, BERT, isolate=True)
    assert receipt is not None
    assert receipt.charged > 15_000_000
    assert receipt.verified


# Pressure


def pressure(level: Any, share_left: float, less: int = 0) -> PressureEvent:
    found = snapshot()
    left = int(found.limit.bytes * share_left) - less
    return PressureEvent(level, "psi (machine)", dataclasses.replace(found, available=left))


def test_near_the_limit_what_is_not_leased_sleeps_and_then_goes() -> None:
    heard: list[PressureEvent] = []
    with PipelineManager("2 GiB", remember=False, on_pressure=heard.append) as manager:
        use(manager, BERT)
        with manager.acquire(TASK, ROBERTA) as leased:
            for phase in ("asleep", "empty"):
                moved = threading.Event()
                with manager.subscribe(
                    lambda event, moved=moved: moved.set(), "sleeping", "disposed"
                ):
                    manager._core._pressed(pressure("limit", 0.1, 50_000))
                    assert moved.wait(30)
                phases = {one.key: one.phase for one in manager.status().entries}
                assert phases[f"{TASK} {BERT}"] == phase
            assert leased("still here").shape[-1] == 32
    assert [event.level for event in heard] == ["limit", "limit"]


def test_stalls_while_memory_is_to_spare_change_nothing(manager: PipelineManager) -> None:
    use(manager, BERT)
    manager._core._pressed(pressure("full", 0.9))
    done = threading.Event()
    manager._core.post(done.set)
    assert done.wait(30)
    assert manager.status().entries[0].phase == "ready"
    assert manager.status().counts["pressure"] == 1


def test_where_mapped_pages_are_read_again_and_again_what_maps_files_sleeps(
    manager: PipelineManager, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ebbtide.settings, "cache_dir", str(tmp_path))
    use(manager, ROBERTA)
    use(manager, BERT, prepare="now")
    assert manager.status().mapped > 0
    moved = threading.Event()
    faults = iter([0, 10, 1_000_000])
    monkeypatch.setattr(core_module, "_major_faults", lambda: next(faults, 1_000_000))
    with manager.subscribe(lambda event: moved.set(), "sleeping"):
        manager._core.monitor.stop()
        for _ in range(3):
            manager._core._sample()
        assert moved.wait(30)
    phases = {one.key: one.phase for one in manager.status().entries}
    assert phases == {f"{TASK} {ROBERTA}": "ready", f"{TASK} {BERT} (prepare='now')": "asleep"}
