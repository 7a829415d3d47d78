"""Whatever happens, no process, descriptor, thread, memory file or cgroup is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tests.workers import watched

LOOK = (
    watched.LOOK
    + """
def settled(expected):
    "What it has, once threads that are about to end have."
    deadline = time.monotonic() + 5
    while look() != expected and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    return look()
"""
)


def test_cycles_leave_nothing_and_the_parent_does_not_grow(fresh_process: Any) -> None:
    fresh_process(
        LOOK
        + """
def cycle():
    forked = IsolateOptions(start="fork-server")
    with ebbtide.pipeline("feature-extraction", MODEL, isolate=forked) as pipe:
        pipe("the sea")
        large = pipe.echo(bytes(100_000))
    receipt = pipe.dispose()
    assert receipt.verified and any(one.startswith("there: ") for one in receipt.reasons), receipt

for _ in range(3):
    cycle()
ebbtide.memory.reclaim()
before, memory = look(), ebbtide.memory.anonymous_bytes()
for _ in range(12):
    cycle()
ebbtide.memory.reclaim()
grown = ebbtide.memory.anonymous_bytes() - memory
assert settled(before) == before, (look(), before)
assert grown < 500_000, grown
assert not gc.garbage
"""
    )


def test_each_way_to_end_leaves_nothing(fresh_process: Any) -> None:
    fresh_process(
        LOOK
        + """
import asyncio, signal

def load(**options):
    return ebbtide.pipeline("feature-extraction", MODEL, isolate=IsolateOptions(**options))

load().dispose()
before = look()

def crashes():
    pipe = load()
    os.kill(pipe.pid, signal.SIGKILL)
    return pipe

def crashes_and_restarts():
    pipe = crashes()
    while pipe.pid is not None:
        threading.Event().wait(0.01)
    pipe("the sea")
    return pipe

def fails():
    try:
        ebbtide.pipeline("feature-extraction", MODEL, isolate=True, dtype="q1")
    except ebbtide.EbbtideError:
        return None

def is_cancelled():
    async def work():
        task = asyncio.create_task(ebbtide.apipeline("feature-extraction", MODEL, isolate=True))
        await asyncio.sleep(0.1)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            pass
    asyncio.run(work())

def limited():
    pipe = load(memory_limit="300 MB")
    pipe("the sea")
    return pipe

def idles():
    pipe = load(idle=0.0)
    pipe("the sea")
    return pipe

for way in (load, crashes, crashes_and_restarts, fails, is_cancelled, limited, idles):
    pipe = way()
    if pipe is not None:
        pipe.dispose(cancel=True)
    assert settled(before) == before, (way, look(), before)
"""
    )


def test_calls_that_nobody_waits_for_leave_no_cycle_of_ours(fresh_process: Any) -> None:
    fresh_process(
        LOOK
        + """
import weakref

def work():
    pipe = ebbtide.pipeline("feature-extraction", MODEL, isolate=True)
    pipe("the sea")
    try:
        pipe("the sea", pooling="no")
    except ebbtide.InputError:
        pass
    worker, life = weakref.ref(pipe._worker), weakref.ref(pipe._lifecycle)
    pipe.dispose()
    return weakref.ref(pipe), worker, life

work()
gc.collect()
gc.disable()
left = work()
deadline = time.monotonic() + 5
while any(one() for one in left) and time.monotonic() < deadline:
    threading.Event().wait(0.01)
assert [one() for one in left] == [None, None, None]
"""
    )


def test_the_interpreters_exit_disposes_what_is_left(fresh_process: Any) -> None:
    seen = fresh_process(
        LOOK
        + """
pipe = ebbtide.pipeline("feature-extraction", MODEL, isolate=True)
forked = ebbtide.pipeline(
    "feature-extraction", MODEL, isolate=IsolateOptions(start="fork-server")
)
pipe("the sea"), forked("the sea")
print(pipe.pid, forked.pid)
"""
    )
    pids = seen.split()
    assert len(pids) == 2, seen  # no warning, and no word of a crash
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_forked_child_says_that_it_is_not_its_own_and_ends_normally(fresh_process: Any) -> None:
    fresh_process(
        LOOK
        + """
pipe = ebbtide.pipeline("feature-extraction", MODEL, isolate=True)
pid = os.fork()
if not pid:
    try:
        pipe("the sea")
    except ebbtide.PipelineInheritedError:
        with ebbtide.pipeline("feature-extraction", MODEL, isolate=True) as own:
            own("the sea")
        sys.exit(3)
    sys.exit(4)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
assert pipe("the sea").shape == (1, 4, 32)
assert pipe.dispose().verified
"""
    )


@pytest.mark.parametrize("start", ["spawn", "fork-server"])
@pytest.mark.parametrize("step", ["loading", "idle", "running", "stuck"])
def test_a_parent_that_is_killed_leaves_no_process(step: str, start: str) -> None:
    script = f"""
        import logging, os, sys, threading
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import ebbtide
        from ebbtide.workers import isolated
        from ebbtide.workers.options import IsolateOptions
        original = isolated.lifecycle_of
        name = "slow" if {step!r} == "loading" else "pipeline"
        isolated.lifecycle_of = lambda label, _, *rest: original(label, f"strange:{{name}}", *rest)
        def say(*event):
            print("ready", flush=True)
        class Ears(logging.Handler):
            def emit(self, record):
                say()
        logging.getLogger("ebbtide.there").addHandler(Ears())
        pipe = ebbtide.pipeline(
            "feature-extraction", {str(Path(__file__).parent.parent / "models" / "tiny-bert")!r},
            isolate=IsolateOptions(start={start!r}), progress=say if name == "slow" else False,
        )
        if {step!r} == "idle":
            say()
            threading.Event().wait()
        what = "wait" if {step!r} == "running" else "block"
        pipe._made(what, (), {{}}).wait()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        below = descendants(parent.pid)
        assert below
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 2.0
    while any(map(is_running, below)) and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    assert not any(map(is_running, below))


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *descendants(child)]
    return found


def is_running(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in {"Z", "X"}
