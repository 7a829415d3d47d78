"""Which allocator is here, and how freed memory is got back from it."""

from __future__ import annotations

import contextlib
import ctypes.util
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ebbtide._settings import settings
from ebbtide.cancellation import own_thread
from ebbtide.lifecycle import Lifecycle, _live
from ebbtide.memory.allocator import Allocator, _recognise

TRIM, MMAP = -1, -3
LOWERED = ("mallopt", TRIM, 4096)
RESTORED = [("mallopt", TRIM, 64 << 20), ("mallopt", MMAP, 32 << 20)]
SIZE = 100 * 1024


class Function:
    """One function of a made-up library: it notes its calls."""

    def __init__(self, name: str, calls: list[tuple[Any, ...]], gives: Any = None) -> None:
        self.name = name
        self.calls = calls
        self.gives = gives

    def __call__(self, *arguments: Any) -> Any:
        self.calls.append((self.name, *arguments))
        return self.gives() if callable(self.gives) else self.gives


class Library:
    """A made-up C library that has the functions it is told to have."""

    def __init__(self, *names: str) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.chunks = iter(range(1000, 2000))
        for name in names:
            gives = (lambda: next(self.chunks)) if name == "malloc" else 1
            setattr(self, name, Function(name, self.calls, gives))


GLIBC = ("malloc", "free", "mallopt", "malloc_trim")


@pytest.fixture
def glibc() -> Library:
    return Library(*GLIBC)


@pytest.fixture(autouse=True)
def _settings_as_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "trim", True)
    monkeypatch.setattr(settings, "malloc", "tuned")


@pytest.mark.parametrize(
    ("platform", "names", "name", "method"),
    [
        ("linux", ("mallctl", *GLIBC), "jemalloc", "jemalloc arena.purge"),
        ("freebsd14", ("mallctl",), "jemalloc", "jemalloc arena.purge"),
        ("linux", ("mi_collect", *GLIBC), "mimalloc", "mi_collect"),
        (
            "linux",
            ("MallocExtension_ReleaseFreeMemory", *GLIBC),
            "tcmalloc",
            "MallocExtension_ReleaseFreeMemory",
        ),
        ("linux", GLIBC, "glibc", "malloc_trim"),
        ("darwin", ("malloc_zone_pressure_relief",), "macos", "malloc_zone_pressure_relief"),
        ("win32", ("_heapmin",), "windows", "_heapmin"),
        ("linux", ("malloc", "free"), "other", "none"),
        ("darwin", (), "other", "none"),
        ("win32", (), "other", "none"),
        ("linux", ("malloc_zone_pressure_relief", "_heapmin"), "other", "none"),
    ],
)
def test_the_allocator_is_told_by_the_functions_it_has(
    monkeypatch: pytest.MonkeyPatch, platform: str, names: tuple[str, ...], name: str, method: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    library: Any = Library(*names)
    found, how, give_back = _recognise(library)
    assert found == name
    assert how.startswith(method)
    assert library.calls == []
    give_back()
    assert bool(library.calls) == (name != "other")
    assert Allocator(library).trim() == how


def test_each_allocators_own_call_gives_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def calls(*names: str) -> list[tuple[Any, ...]]:
        library: Any = Library(*names)
        _recognise(library)[2]()
        return library.calls

    assert calls("mallctl") == [
        ("mallctl", b"thread.tcache.flush", None, None, None, 0),
        ("mallctl", b"arena.4096.purge", None, None, None, 0),
    ]
    assert calls("mi_collect") == [("mi_collect", True)]
    assert calls("MallocExtension_ReleaseFreeMemory") == [("MallocExtension_ReleaseFreeMemory",)]
    assert calls(*GLIBC) == [("malloc_trim", 0)]
    monkeypatch.setattr(sys, "platform", "darwin")
    ((_, zone, size),) = calls("malloc_zone_pressure_relief")
    assert (zone.value, size.value) == (None, 0)


def test_a_thread_holds_one_ballast_until_it_is_dropped(glibc: Any) -> None:
    allocator = Allocator(glibc)
    for _ in range(3):
        allocator.hold_ballast(1)
    allocator.hold_ballast(2)
    assert glibc.calls == [("malloc", SIZE)] * 2
    allocator.drop_ballast(1)
    allocator.drop_ballast(1)
    assert glibc.calls[2:] == [("free", 1000)]
    allocator.hold_ballast(1)
    assert glibc.calls[3:] == [("malloc", SIZE)]


def test_a_trim_frees_the_ballasts_with_the_threshold_lowered(glibc: Any) -> None:
    allocator = Allocator(glibc)
    allocator.hold_ballast(1)
    allocator.hold_ballast(2)
    glibc.calls.clear()
    assert allocator.trim() == "malloc_trim"
    freed = [("free", 1000), ("free", 1001)]
    assert glibc.calls == [("malloc_trim", 0), LOWERED, *freed, *RESTORED, ("malloc_trim", 0)]
    glibc.calls.clear()
    allocator.trim()
    assert glibc.calls == [LOWERED, *RESTORED, ("malloc_trim", 0)], "no thread has one now"
    allocator.hold_ballast(1)
    assert glibc.calls[-1] == ("malloc", SIZE)


def test_a_trim_on_a_native_thread_takes_its_own_ballast_again(
    glibc: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocator = Allocator(glibc)
    monkeypatch.setattr(own_thread, "is_native", True)
    allocator.trim()
    assert glibc.calls == [LOWERED, *RESTORED, ("malloc", SIZE), ("malloc_trim", 0)]
    assert list(allocator._ballasts) == [threading.get_ident()]


def test_a_ballast_that_there_is_no_memory_for_is_not_held(glibc: Any) -> None:
    glibc.malloc.gives = None
    allocator = Allocator(glibc)
    allocator.hold_ballast(1)
    allocator.drop_ballast(1)
    assert glibc.calls == [("malloc", SIZE)]


def test_the_thresholds_are_restored_where_the_body_raises(glibc: Any) -> None:
    allocator = Allocator(glibc)

    def fail() -> None:
        with allocator.shrinking():
            assert glibc.calls == [LOWERED]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert glibc.calls == [LOWERED, *RESTORED]


def test_nested_shrinking_restores_at_its_outer_end_alone(glibc: Any) -> None:
    allocator = Allocator(glibc)
    with allocator.shrinking():
        with contextlib.suppress(KeyError), allocator.shrinking():
            raise KeyError
        allocator.trim()
        assert [one for one in glibc.calls if one[0] == "mallopt"] == [LOWERED] * 3
    assert glibc.calls[-2:] == RESTORED


def test_shrinking_on_two_threads_restores_when_both_have_ended(glibc: Any) -> None:
    allocator = Allocator(glibc)
    inside, go = threading.Event(), threading.Event()

    def other() -> None:
        with allocator.shrinking():
            inside.set()
            assert go.wait(30)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(30)
    with allocator.shrinking():
        pass
    assert glibc.calls == [LOWERED] * 2
    go.set()
    thread.join()
    assert glibc.calls == [LOWERED] * 2 + RESTORED


def test_the_systems_policy_calls_no_mallopt_and_takes_no_ballast(
    glibc: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "malloc", "system")
    allocator = Allocator(glibc)
    allocator.hold_ballast(1)
    with allocator.shrinking():
        pass
    assert allocator.trim() == "malloc_trim"
    assert glibc.calls == [("malloc_trim", 0)]


def test_with_trim_off_nothing_is_given_back_and_the_receipt_says_so(
    glibc: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "trim", False)
    allocator = Allocator(glibc)
    with allocator.shrinking():
        assert allocator.trim() == "none (settings.trim is off)"
    assert glibc.calls == []


@pytest.mark.parametrize("name", ["mallctl", "mi_collect", "MallocExtension_ReleaseFreeMemory"])
def test_no_ballast_and_no_mallopt_where_another_allocator_answers(name: str) -> None:
    library: Any = Library(name, *GLIBC)
    allocator = Allocator(library)
    allocator.hold_ballast(1)
    allocator.trim()
    allocator.drop_ballast(1)
    assert {one[0] for one in library.calls} == {name}


def test_a_trim_ends_what_calls_are_charged_for(glibc: Any, monkeypatch) -> None:
    disposer: Any = SimpleNamespace()
    life = Lifecycle("The pipeline", disposer, ("here", 1))
    life.working = 5_000_000
    try:
        monkeypatch.setattr(settings, "trim", False)
        Allocator(glibc).trim()
        assert life.working == 5_000_000
        monkeypatch.setattr(settings, "trim", True)
        Allocator(glibc).trim()
        assert life.working == 0
    finally:
        _live.pop(id(life))


def test_a_forked_child_forgets_the_threads_it_does_not_have(glibc: Any) -> None:
    allocator = Allocator(glibc)
    allocator.hold_ballast(1)
    held = allocator._lock
    held.acquire()
    allocator.forget()
    allocator.trim()
    assert ("free", 1000) not in glibc.calls, "its arena may be in any state"
    allocator.hold_ballast(1)
    assert glibc.calls[-1] == ("malloc", SIZE)


def test_a_child_forked_in_the_middle_of_shrinking_restores_the_thresholds(glibc: Any) -> None:
    allocator = Allocator(glibc)
    inside = allocator.shrinking()
    inside.__enter__()
    glibc.calls.clear()
    allocator.forget()
    allocator.trim()
    assert glibc.calls[-3:-1] == RESTORED


def test_a_finalizer_may_reclaim_on_a_thread_that_holds_the_allocators_lock(
    fresh_process,
) -> None:
    """Garbage may be collected on any thread at any moment, and its finalizers are the user's."""
    out = fresh_process(
        """
        import faulthandler, gc, ebbtide
        from ebbtide.cancellation import CancelToken
        from ebbtide.memory.allocator import allocator
        from ebbtide.runtime import native_threads
        faulthandler.dump_traceback_later(10, exit=True)
        ebbtide.pipeline("feature-extraction", MODEL).dispose()
        class Owner:
            def __init__(self):
                self.itself = self
            def __del__(self):
                print(ebbtide.memory.reclaim().released >= 0)
        def hold_and_collect():
            with allocator._lock:
                gc.collect()
        gc.disable()
        Owner()
        native_threads.submit(hold_and_collect, CancelToken("test"), lambda: None).wait()
        """
    )
    assert out.strip() == "True"


LIBRARIES = Path("/usr/lib/x86_64-linux-gnu")


def installed(name: str) -> str:
    """What to preload to have this allocator; skips the test where it is not installed."""
    there = sorted(map(str, LIBRARIES.glob(f"lib{name}*.so.*")))
    found = there[0] if there else ctypes.util.find_library(name)
    if sys.platform != "linux" or found is None:
        pytest.skip(f"{name} is not installed here")
    return found


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("jemalloc", "jemalloc arena.purge"),
        ("tcmalloc", "MallocExtension_ReleaseFreeMemory"),
    ],
)
def test_memory_comes_back_from_another_allocator_too(fresh_process, name, method) -> None:
    out = fresh_process(
        """
        import ebbtide
        from ebbtide.memory import anonymous_bytes
        def life():
            pipe = ebbtide.pipeline("feature-extraction", MODEL, session_options={"threads": 1})
            pipe(["word " * 200] * 32, pooling="mean", batch_size=32)
            loaded = anonymous_bytes()
            receipt = pipe.dispose()
            return loaded - anonymous_bytes(), anonymous_bytes(), receipt
        for _ in range(3):
            _, before, receipt = life()
        print(receipt.method)
        for _ in range(3):
            released, left, receipt = life()
            assert left - before <= 2e6, (left - before, receipt)
            assert released > 5e6, (released, receipt)
            assert receipt.verified, receipt
        print("back")
        """,
        LD_PRELOAD=installed(name),
    )
    first, last = out.splitlines()
    assert first.startswith(method)
    assert last == "back"
