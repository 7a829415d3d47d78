"""Twelve ways to leak a pipeline are each named, with where it was made; none in a clean run."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import ebbtide
from ebbtide.errors import InputError
from ebbtide.memory.holders import held
from ebbtide.memory.leaked import leaks

MODELS = Path(__file__).parent.parent / "models"
BERT = str(MODELS / "tiny-bert")

SEEDS = """
import concurrent.futures, contextvars, functools, gc, json, sys, threading, types
import ebbtide
from ebbtide.memory.leaked import leaks

gc.disable()
MODEL, WRITER = sys.argv[1:]
options = {"prepare": False}
CACHE = []

def remember():
    CACHE.append(ebbtide.pipeline("feature-extraction", MODEL, **options))  # global list

def enclose():
    pipe = ebbtide.pipeline("feature-extraction", MODEL, **options)  # closure
    def embed(text):
        return pipe(text)
    return embed

def fail():
    pipe = ebbtide.pipeline("feature-extraction", MODEL, **options)  # traceback
    raise ValueError("nothing to embed")

def work():
    pipe = ebbtide.pipeline("feature-extraction", MODEL, **options)  # thread
    started.set()
    stop.wait()

class Ring:
    def __init__(self):
        self.me = self
        self.pipe = ebbtide.pipeline("feature-extraction", MODEL, **options)  # cycle
    def __del__(self):
        pass

def queue_up():
    executor.submit(stop.wait)
    pipe = ebbtide.pipeline("feature-extraction", MODEL, **options)  # executor
    executor.submit(repr, pipe)

@functools.lru_cache
def loaded(name):
    return ebbtide.pipeline("feature-extraction", MODEL, **options)  # lru_cache

class Bus:
    def __init__(self):
        self.handlers = {}
    def on(self, event, handler):
        self.handlers.setdefault(event, []).append(handler)

class Shop:
    def __init__(self):
        self.pipe = ebbtide.pipeline("feature-extraction", MODEL, **options)  # event handler
    def sold(self):
        pass

def stream():
    pipe = ebbtide.pipeline("text-generation", WRITER, **options)  # stream
    pieces = pipe.stream("The tide", max_new_tokens=3)
    next(pieces)
    while pipe._lifecycle.running:
        stop.wait(0.01)
    return pieces

remember()
embed = enclose()
try:
    fail()
except ValueError as error:
    kept = error
started, stop = threading.Event(), threading.Event()
thread = threading.Thread(target=work, name="embedder")
thread.start()
started.wait()
Ring()
executor = concurrent.futures.ThreadPoolExecutor(1)
queue_up()
loaded("bert")
bus = Bus()
bus.on("sold", Shop().sold)
current = contextvars.ContextVar("current_pipeline")
current.set(ebbtide.pipeline("feature-extraction", MODEL, **options))  # contextvar
app = sys.modules["app"] = types.ModuleType("app")
app.pipe = ebbtide.pipeline("feature-extraction", MODEL, **options)  # module attribute
manager = ebbtide.PipelineManager("2 GiB", remember=False)
with manager.acquire("feature-extraction", MODEL, **options) as returned:
    returned("The tide")
lease = manager.acquire("feature-extraction", MODEL, **options)  # lease
lease.__enter__()
del returned
unread = stream()

def told(some):
    return [
        [one.site, one.why, [holder.kind for holder in one.holders], str(one)] for one in some
    ]

found = told(leaks()), told(leaks(idle=0)), told(leaks(idle=3600))
print(json.dumps(found))
stop.set()
thread.join()
executor.shutdown()
lease.release()
manager.close()
ebbtide.dispose_all()
"""

NAMED = {
    "global list": ("container", "the module-level list CACHE of __main__"),
    "closure": ("closure", "a closure of function enclose.<locals>.embed at {file}:{embed}"),
    "traceback": ("traceback", "the traceback of ValueError at {file}:{raised}"),
    "thread": ("thread", "local variable pipe of work() at {file}:{waits}, in thread 'embedder'"),
    "cycle": ("cycle", "unreachable, waits for a collection: in a cycle with __del__ of Ring"),
    "executor": ("executor", "the queue of an executor"),
    "lru_cache": ("cache", "functools.lru_cache of loaded at {file}:{loaded}"),
    "event handler": ("handler", "the event handler Shop.sold at {file}:{sold}"),
    "contextvar": ("context", "context variable current_pipeline"),
    "module attribute": ("module", "attribute pipe of module app"),
    "lease": ("module", "a lease that was not returned"),
    "stream": ("stream", "a stream that was not read to its end"),
}


def line_of(part: str) -> int:
    (number,) = [at for at, line in enumerate(SEEDS.splitlines(), 1) if part in line]
    return number


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What a process with all twelve says: with no idle time, with 0 s, and with an hour."""
    script = tmp_path_factory.mktemp("seeded") / "shop.py"
    script.write_text(SEEDS)
    done = subprocess.run(
        [sys.executable, str(script), BERT, str(MODELS / "gen-llama")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("[[")]
    return script, [{site: rest for site, *rest in some} for some in json.loads(line)]


@pytest.mark.parametrize("seed", NAMED)
def test_a_seeded_leak_is_named_with_where_it_was_made_and_what_holds_it(
    seeded: tuple[Path, list[dict[str, Any]]], seed: str
) -> None:
    script, (_, unused, _) = seeded
    site = f"{script}:{line_of('# ' + seed)}"
    why, kinds, text = unused[site]
    kind, words = NAMED[seed]
    assert kinds[0] == kind
    assert (
        words.format(
            file=script,
            embed=line_of("def embed"),
            raised=line_of("raise ValueError"),
            waits=line_of("    stop.wait()"),
            loaded=line_of("@functools"),
            sold=line_of("def sold"),
        )
        in why
    )
    assert f"made at {site}" in text


def test_all_twelve_are_named_once_each(seeded: tuple[Path, list[dict[str, Any]]]) -> None:
    script, (_, unused, _) = seeded
    assert set(unused) == {f"{script}:{line_of('# ' + seed)}" for seed in NAMED}


def test_with_no_idle_time_only_those_that_nobody_can_reach_are_named(
    seeded: tuple[Path, list[dict[str, Any]]],
) -> None:
    script, (unreachable, _, an_hour) = seeded
    assert set(unreachable) == {
        f"{script}:{line_of('# ' + seed)}" for seed in ("traceback", "cycle")
    }
    assert set(an_hour) == set(unreachable)


# In a clean run


def load() -> Any:
    return ebbtide.pipeline("feature-extraction", BERT, prepare=False)


@pytest.mark.parametrize("idle", [None, 0])
def test_pipelines_in_local_variables_are_no_leaks(idle: float | None) -> None:
    pipe, pipes = load(), {"one": [load()]}
    with load() as other, ExitStack() as stack:
        stack.enter_context(load())
        other("The tide goes out.")
        assert leaks(idle) == ()
    pipe.dispose()
    pipes["one"][0].dispose()
    assert leaks(idle) == ()


def test_a_pipeline_whose_error_is_being_handled_is_no_leak() -> None:
    def fail() -> None:
        pipe = load()
        raise ValueError(pipe.task)

    try:
        fail()
    except ValueError:  # the traceback holds the function's variables, and goes with this block
        assert leaks(0) == ()
        ebbtide.dispose_all()
    try:
        fail()
    except ValueError as error:
        found = leaks(0), error.args
        ebbtide.dispose_all()
    assert found[0] == ()


KEPT: list[Any] = []


@pytest.fixture
def kept() -> Iterator[Any]:
    """A pipeline that only a global list holds."""
    KEPT.append(load())
    try:
        yield weakref.ref(KEPT[0])
    finally:
        KEPT.pop().dispose()


def test_a_global_one_is_a_leak_once_it_was_not_used_for_the_time_given(
    kept: weakref.ref[Any],
) -> None:
    assert leaks() == ()
    lifecycle = kept()._lifecycle
    lifecycle.used = time.monotonic() - 100
    (leak,) = leaks(99)
    assert leak.idle >= 100
    assert leak.charged == lifecycle.charged
    assert leaks(10_000) == ()
    kept()("The tide goes out.")
    assert leaks(99) == ()


def test_one_that_runs_a_call_or_is_disposed_is_none(kept: weakref.ref[Any]) -> None:
    from ebbtide.cancellation import CancelToken

    lifecycle = kept()._lifecycle
    token = CancelToken("a call")
    lifecycle.enter(token)
    assert leaks(0) == ()
    lifecycle.leave(token)
    assert len(leaks(0)) == 1
    kept().dispose()
    assert leaks(0) == ()


@pytest.mark.parametrize("idle", [-1, float("nan")])
def test_an_idle_time_that_is_none_is_refused(idle: float) -> None:
    with pytest.raises(InputError, match="idle takes seconds"):
        leaks(idle)


# The walk


class Thing:
    pass


def test_the_walk_leaves_nothing_behind_that_holds_what_it_met() -> None:
    gc.disable()
    try:
        thing, ring = Thing(), Thing()
        ring.me, ring.thing = ring, thing  # type: ignore[attr-defined]
        held(weakref.ref(thing))
        gone = weakref.ref(thing)
        ring.__dict__.clear()
        del thing
        assert gone() is None
    finally:
        gc.enable()


def test_a_cycle_that_something_native_holds_is_not_called_unreachable() -> None:
    ring = Thing()
    ring.me = ring  # type: ignore[attr-defined]
    ring.thing = Thing()  # type: ignore[attr-defined]
    thing = weakref.ref(ring.thing)  # type: ignore[attr-defined]
    import ctypes

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(ring))
    address = id(ring)
    del ring
    found = held(thing)
    assert found is not None
    assert not found.unreachable
    assert [one.kind for one in found.holders] == ["unseen"]
    ctypes.pythonapi.Py_DecRef(ctypes.c_void_p(address))
    found = held(thing)
    assert found is not None
    assert found.unreachable
    gc.collect()
    assert held(thing) is None


def test_a_variable_of_another_threads_function_is_named_with_the_thread() -> None:
    started, stop = threading.Event(), threading.Event()
    things: list[weakref.ref[Thing]] = []

    def work() -> None:
        mine = Thing()
        things.append(weakref.ref(mine))
        started.set()
        stop.wait()

    thread = threading.Thread(target=work, name="the worker")
    thread.start()
    started.wait()
    found = held(things[0])
    stop.set()
    thread.join()
    assert found is not None
    (holder,) = found.holders
    assert holder.kind == "thread"
    assert not found.in_use
    assert str(holder).startswith("local variable mine of work() at ")
    assert str(holder).endswith(", in thread 'the worker'")


def test_a_users_own_copy_of_local_variables_stays_as_it_is() -> None:
    thing = Thing()
    mine = locals()
    found = held(weakref.ref(thing))
    assert found is not None
    assert found.in_use
    assert mine["thing"] is thing


def test_a_suspended_generator_is_named_by_where_it_waits() -> None:
    def wait() -> Iterator[weakref.ref[Thing]]:
        thing = Thing()
        yield weakref.ref(thing)

    waiting = wait()
    box = Thing()
    box.waiting = waiting  # type: ignore[attr-defined]
    found = held(next(waiting))
    assert found is not None
    assert any("generator wait() at " in step for one in found.holders for step in one.chain)
