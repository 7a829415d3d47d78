"""Pipelines in other processes, by every start method, and on an event loop's task groups."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path

import pytest
from tests.conftest import FreshProcess

import ebbtide
from ebbtide.integrations.multiprocessing import load, loaded

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "tests" / "models"
EXAMPLES = ROOT / "examples"
STARTS = ("fork", "forkserver", "spawn")
LIMIT = 60.0

CHILD = """
import multiprocessing, os, sys
from pathlib import Path
import ebbtide
from ebbtide.integrations.multiprocessing import load, loaded
from ebbtide.receipts import DisposalReceipt
import ebbtide.lifecycle

MODEL = os.environ["MODEL"]
finish = ebbtide.lifecycle.Lifecycle.finish

def noted(life, receipt, **more):
    with open(os.environ["NOTED"], "a") as file:
        file.write(f"{os.getpid()} {receipt}\\n")
    return finish(life, receipt, **more)

ebbtide.lifecycle.Lifecycle.finish = noted

def alone(code):
    pipe = ebbtide.pipeline("feature-extraction", MODEL)
    assert len(pipe("the tide")) == 1
    sys.exit(code)

def managed():
    from ebbtide.integrations.per_process import ProcessPipelines
    pipelines = ProcessPipelines(remember=False, on_close=lambda told: print(*told, flush=True))
    with pipelines.acquire("feature-extraction", MODEL) as pipe:
        assert len(pipe("the tide")) == 1

def failing():
    load("feature-extraction", MODEL)
    raise SystemExit("it failed")

def process(text):
    loaded()(text)
    return os.getpid()
"""


class Programs:
    """Programs that start processes: each is a file, as spawned children read it again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "child.py").write_text(CHILD)
        self._noted = folder / "receipts"
        self._noted.touch()

    def run(self, code: str, start: str) -> str:
        """What the program prints; it has to end normally, and leave no child behind."""
        script = self._folder / "program.py"
        lines = "\n".join(f"    {line}" for line in code.strip().splitlines())
        script.write_text(
            "from child import *\nfrom concurrent.futures import ProcessPoolExecutor\n"
            "if __name__ == '__main__':\n"
            f"    context = multiprocessing.get_context({start!r})\n{lines}\n"
            "    assert not multiprocessing.active_children()\n"
        )
        done = subprocess.run(
            [sys.executable, str(script)],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(self._folder)]),
                "MODEL": str(MODELS / "tiny-bert"),
                "NOTED": str(self._noted),
            },
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def receipts(self) -> list[str]:
        """Those of this and of all child processes, each after its process's number."""
        return self._noted.read_text().splitlines()


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    return Programs(tmp_path)


@pytest.mark.parametrize("start", STARTS)
def test_a_child_disposes_its_pipeline_before_it_ends(programs: Programs, start: str) -> None:
    said = programs.run(
        """
child = context.Process(target=alone, args=(3,))
child.start()
child.join()
print(child.pid, child.exitcode)
""",
        start,
    )
    number, code = said.split()
    assert code == "3"
    (receipt,) = programs.receipts()
    assert receipt.startswith(f"{number} released")


@pytest.mark.parametrize("start", STARTS)
def test_a_child_that_fails_disposes_it_too(programs: Programs, start: str) -> None:
    said = programs.run(
        """
child = context.Process(target=failing)
child.start()
child.join()
print(child.exitcode)
""",
        start,
    )
    assert said == "1\n"
    assert len(programs.receipts()) == 1


@pytest.mark.parametrize("start", STARTS)
def test_a_childs_manager_is_closed_before_its_pipelines_go(programs: Programs, start: str) -> None:
    said = programs.run(
        """
child = context.Process(target=managed)
child.start()
child.join()
print(child.exitcode)
""",
        start,
    )
    assert said.splitlines()[0].startswith("feature-extraction")
    assert said.splitlines()[1:] == ["0"]
    assert len(programs.receipts()) == 1


def test_a_forked_child_whose_parent_has_used_pipelines_disposes_its_own(
    programs: Programs,
) -> None:
    said = programs.run(
        """
with ebbtide.pipeline("feature-extraction", MODEL):
    pass
child = context.Process(target=alone, args=(0,))
child.start()
child.join()
print(os.getpid(), child.pid)
""",
        "fork",
    )
    assert [one.split()[0] for one in programs.receipts()] == said.split()


@pytest.mark.parametrize("start", STARTS)
def test_the_processes_of_an_executor_dispose_theirs(programs: Programs, start: str) -> None:
    said = programs.run(
        """
arguments = ("feature-extraction", MODEL, {"prepare": False})
with ProcessPoolExecutor(2, context, initializer=load, initargs=arguments) as pool:
    used = set(pool.map(process, ["the tide"] * 8))
    started = set(pool._processes)
print(*started)
""",
        start,
    )
    receipts = programs.receipts()
    assert {one.split()[0] for one in receipts} == set(said.split())
    assert len(receipts) == len(said.split())


@pytest.mark.parametrize("start", STARTS)
def test_the_processes_of_a_pool_dispose_theirs_when_they_are_recycled_and_when_it_is_closed(
    programs: Programs, start: str
) -> None:
    said = programs.run(
        """
with context.Pool(1, load, ("feature-extraction", MODEL), maxtasksperchild=1) as pool:
    used = [pool.apply(process, ("the tide",)) for _ in range(2)]
    pool.close()
    pool.join()
print(*used)
""",
        start,
    )
    used = said.split()
    assert len(set(used)) == 2
    assert set(used) <= {one.split()[0] for one in programs.receipts()}


@pytest.mark.parametrize("start", ["forkserver", "spawn"])  # a pool that forks recycles none
def test_the_processes_of_an_executor_dispose_theirs_when_they_are_recycled(
    programs: Programs, start: str
) -> None:
    said = programs.run(
        """
with ProcessPoolExecutor(
    1, context, load, ("feature-extraction", MODEL), max_tasks_per_child=1
) as pool:
    used = [pool.submit(process, "the tide").result() for _ in range(2)]
print(*used)
""",
        start,
    )
    used = said.split()
    assert len(set(used)) == 2
    assert set(used) <= {one.split()[0] for one in programs.receipts()}


def test_a_forked_child_leaves_its_parents_pipeline_alone(programs: Programs) -> None:
    said = programs.run(
        """
load("feature-extraction", MODEL)
child = context.Process(target=alone, args=(0,))
child.start()
child.join()
assert child.exitcode == 0
assert len(loaded()("the tide")) == 1
loaded().dispose()
print(child.pid, os.getpid())
""",
        "fork",
    )
    assert [one.split()[0] for one in programs.receipts()] == said.split()


def test_a_forked_child_is_told_to_load_its_own(programs: Programs) -> None:
    said = programs.run(
        """
load("feature-extraction", MODEL)
try:
    with ProcessPoolExecutor(1, context) as pool:
        pool.submit(process, "the tide").result()
except Exception as error:
    print(type(error).__name__, error)
loaded().dispose()
""",
        "fork",
    )
    assert said.startswith("InputError This process has no pipeline")


def test_a_second_load_takes_the_place_of_the_first() -> None:
    load("feature-extraction", MODELS / "tiny-bert")
    first = loaded()
    load("feature-extraction", MODELS / "tiny-bert-st")
    assert first.state is ebbtide.State.DISPOSED
    assert ebbtide.live() == [loaded()]
    loaded().dispose()


def test_a_process_without_one_says_what_a_pool_needs(fresh_process: FreshProcess) -> None:
    said = fresh_process("""
        from ebbtide.errors import InputError
        from ebbtide.integrations.multiprocessing import loaded
        try:
            loaded()
        except InputError as error:
            print(error)
    """)
    assert "initializer=" in said


def test_a_task_that_fails_in_a_group_ends_the_others_and_every_lease_is_returned() -> None:
    class Failed(Exception):
        pass

    async def use(manager: ebbtide.PipelineManager, begun: asyncio.Event) -> None:
        async with manager.acquire("text-generation", MODELS / "gen-llama") as write:
            async for _ in write.astream("The tide", max_new_tokens=100_000, max_length=None):
                begun.set()

    async def fail(begun: asyncio.Event) -> None:
        await begun.wait()
        raise Failed

    async def both(*parts: Coroutine[None, None, None]) -> None:
        async with asyncio.TaskGroup() as group:
            for part in parts:
                group.create_task(part)

    async def main() -> None:
        begun = asyncio.Event()
        async with ebbtide.PipelineManager("4 GiB", remember=False) as manager:
            with pytest.raises(ExceptionGroup):
                await both(use(manager, begun), fail(begun))
            receipts = await manager.adispose_all(timeout=10)
            assert len(receipts) == 1

    asyncio.run(main())


def test_the_same_holds_for_anyios_task_groups_and_their_deadlines() -> None:
    anyio = pytest.importorskip("anyio")

    async def main() -> None:
        async with await ebbtide.apipeline("text-generation", MODELS / "gen-llama") as write:
            async with anyio.create_task_group() as group:

                async def use() -> None:
                    async for _ in write.astream("The tide", max_new_tokens=100_000):
                        group.cancel_scope.cancel()

                group.start_soon(use)
                group.start_soon(use)
            assert write.state is ebbtide.State.READY
            assert len(await write.acall("The tide", max_new_tokens=2)) == 1

    anyio.run(main)


@pytest.mark.parametrize("start", STARTS)
def test_the_example_with_processes_runs(start: str) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "multiprocessing_app" / "app.py")],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT / "src"),
            "MODEL": str(MODELS / "tiny-bert"),
            "START": start,
        },
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("32 numbers for") == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_example_on_an_event_loop_ends_when_it_is_told_to(number: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-W", "error", str(EXAMPLES / "asyncio_app" / "app.py")],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT / "src"),
            "EMBED": str(MODELS / "tiny-bert"),
            "WRITE": str(MODELS / "gen-llama"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        for _ in range(3):
            assert "32 numbers for" in process.stdout.readline()
        assert process.stdout.read(1)  # it writes
        process.send_signal(number)
        out, err = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, err
        assert out.endswith("stopped\n")
        assert err == ""
    finally:
        process.kill()
        process.communicate()
