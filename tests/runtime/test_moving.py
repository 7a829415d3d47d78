"""A copy is made while the original is used, and who uses it goes over: no call sees it."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ebbtide
from ebbtide.cancellation import CancelToken
from ebbtide.runtime import graph as graphs
from ebbtide.runtime import prepare
from ebbtide.runtime.session import SessionOptions

from .stored import (
    MODELS,
    TEXT,
    TINY,
    answer,
    at,
    copied,
    copies,
    ended,
    is_gone,
    left_over,
    load,
    only,
    process,
    right,
    source,
)

OPTIONS = SessionOptions()


def prepared(folder: Path = TINY) -> str:
    """Have a copy made, and nobody move to it."""
    key = prepare.prepare(folder / "onnx/model.onnx", OPTIONS, CancelToken("test"))
    assert key is not None
    return key


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once somebody has been told of a copy."""
    told = threading.Event()
    original = graphs._move

    def move(reference: Any) -> None:
        original(reference)
        told.set()

    monkeypatch.setattr(graphs, "_move", move)
    return told


def test_a_pipeline_goes_over_to_its_copy_once_that_is_made(
    background: Path, moved: threading.Event
) -> None:
    expected = right()
    with load(prepare=None) as pipe:
        before = weakref.ref(pipe._model._session.value.native)
        assert np.array_equal(pipe(TEXT), expected)
        assert moved.wait(60)
        assert source(pipe) == "prepared"
        assert "(prepared)" in repr(pipe)
        assert np.array_equal(pipe(TEXT), expected)
        assert before() is None, "the original is freed"
        holding = pipe.memory.holdings[1]
        assert holding.mapped > 300_000
        assert pipe.dispose().verified
    assert left_over(background) == []


def test_what_may_not_move_stays_and_the_next_load_has_the_copy(
    background: Path, moved: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ebbtide.settings, "move_to_prepared", False)
    with load(prepare=None) as pipe:
        assert moved.wait(60)
        assert source(pipe) == "original"
    assert answer(prepare=None)[0] == "prepared"


def test_several_models_are_prepared_one_after_another(
    background: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Semaphore(0)
    original = graphs._move
    monkeypatch.setattr(graphs, "_move", lambda one: (original(one), both.release()))
    with load(prepare=None) as first, load(prepare=None, dtype="q8") as second:
        assert both.acquire(timeout=60)
        assert both.acquire(timeout=60)
        assert source(first) == source(second) == "prepared"
    assert len(copies(background)) == 2


def test_calls_that_run_during_the_move_are_right(root: Path) -> None:
    expected = [right(dtype=dtype) for dtype in ("fp32", "q8")]
    prepared()
    with load(MODELS / "tiny-bert-st", prepare=False):  # another, so that natives are at work
        with ebbtide_without_a_store(root):
            pipe = load(prepare=False, dtype="fp32")
        graph = pipe._model._session.value
        enough = threading.Event()
        wrong: list[Any] = []

        def hammer() -> None:
            while not enough.is_set():
                if not np.array_equal(pipe(TEXT), expected[0]):
                    wrong.append(source(pipe))

        threads = [threading.Thread(target=hammer) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            graphs._move(weakref.ref(graph))
            assert source(pipe) == "prepared"
            back_to_the_original(graph)
        graphs._move(weakref.ref(graph))
        enough.set()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        assert wrong == []
        assert source(pipe) == "prepared"
        assert pipe.dispose().verified


class ebbtide_without_a_store:
    def __init__(self, root: Path) -> None:
        self.root = root

    def __enter__(self) -> None:
        ebbtide.settings.cache_dir = "/dev/null/none"

    def __exit__(self, *error: object) -> None:
        ebbtide.settings.cache_dir = str(self.root)


def back_to_the_original(graph: Any) -> None:
    """Have a session run from the original again, as no user can."""
    use = graphs._Use(graphs.open_session(graph.path, "cpu", OPTIONS, CancelToken("back")), None)
    with graph._lock:
        old, graph._use = graph._use, use
        old.retired = True
        idle = not old.running
    if idle:
        old.close()


def unprepared(root: Path) -> Any:
    """A pipeline over the original, whose copy is there."""
    with ebbtide_without_a_store(root):
        pipe = load(prepare=False)
    prepared()
    assert source(pipe) == "original"
    return pipe


def test_a_run_that_goes_on_ends_on_the_original_which_then_is_freed(root: Path) -> None:
    pipe = unprepared(root)
    expected = pipe(TEXT)
    graph = pipe._model._session.value
    old = graph.native
    inside, go = threading.Event(), threading.Event()
    original = old.run

    def slow(*arguments: Any) -> Any:
        inside.set()
        assert go.wait(30)
        return original(*arguments)

    old.run = slow
    found: list[Any] = []
    caller = threading.Thread(target=lambda: found.append(pipe(TEXT)))
    caller.start()
    assert inside.wait(30)
    assert graph.move()
    assert np.array_equal(pipe(TEXT), expected), "a new call runs on the copy meanwhile"
    assert old._native is not None
    go.set()
    caller.join(30)
    assert np.array_equal(found[0], expected)
    assert old._native is None
    assert pipe.dispose().verified


def test_a_model_that_changed_meanwhile_is_not_moved_to(root: Path, tmp_path: Path) -> None:
    folder = copied(TINY, tmp_path / "model")
    with ebbtide_without_a_store(root):
        pipe = load(folder, prepare=False)
    expected = pipe(TEXT)
    os.replace(folder / "onnx/model_int8.onnx", folder / "onnx/model.onnx")
    prepared(folder)
    assert not pipe._model._session.value.move()
    assert source(pipe) == "original"
    assert np.array_equal(pipe(TEXT), expected)
    pipe.dispose()


@pytest.mark.parametrize("how", ["disposed", "asleep"])
def test_what_is_disposed_or_asleep_does_not_move(root: Path, how: str) -> None:
    pipe = unprepared(root)
    graph = pipe._model._session.value
    reference = weakref.ref(graph)
    if how == "disposed":
        pipe.dispose()
    else:
        pipe.sleep()
    graphs._move(reference)
    assert graph.native is None
    if how == "asleep":
        assert np.array_equal(pipe(TEXT), pipe(TEXT))
        assert source(pipe) == "prepared", "it wakes from the copy"
    del graph
    pipe.dispose()
    assert reference() is None
    graphs._move(reference)


def test_a_dispose_in_the_middle_of_the_move_frees_both(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = unprepared(root)
    graph = pipe._model._session.value
    opening, go = threading.Event(), threading.Event()
    original: Callable[..., Any] = graphs.open_prepared
    opened: list[Any] = []

    def slow(*arguments: Any) -> Any:
        opening.set()
        assert go.wait(30)
        opened.append(original(*arguments))
        return opened[0]

    monkeypatch.setattr(graphs, "open_prepared", slow)
    mover = threading.Thread(target=lambda: graphs._move(weakref.ref(graph)))
    mover.start()
    assert opening.wait(30)
    disposer = threading.Thread(target=pipe.dispose)
    disposer.start()
    go.set()
    for thread in (mover, disposer):
        thread.join(30)
        assert not thread.is_alive()
    assert pipe.state is ebbtide.State.DISPOSED
    assert opened[0]._native is None
    assert graph.native is None


@pytest.mark.parametrize("step", ["hashing", "writing", "renamed"])
def test_a_pipeline_that_ends_before_its_copy_is_there_is_gone(
    background: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    word = tmp_path / "word"
    os.mkfifo(word)
    for name, value in at(step, f"lambda: open({str(word)!r}).read()", tmp_path).items():
        monkeypatch.setenv(name, value)
    pipe = load(prepare=None)
    graph = weakref.ref(pipe._model._session.value)
    assert pipe.dispose().verified
    del pipe
    assert graph() is None
    word.write_text("go on")  # waits for the child
    prepare.background._thread.join(60)
    assert len(copies(background)) == 1
    assert left_over(background) == []
    assert answer(prepare=False)[0] == "prepared"


def test_a_child_that_dies_in_the_background_harms_nobody(
    background: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    for name, value in at("hashing", "die", tmp_path).items():
        monkeypatch.setenv(name, value)
    expected = right()
    with load(prepare=None) as pipe:
        prepare.background._thread.join(60)
        assert source(pipe) == "original"
        assert np.array_equal(pipe(TEXT), expected)
    assert "ended early" in caplog.text
    assert left_over(background) == []


def test_nothing_is_made_in_memory_or_where_there_is_no_room(
    background: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ebbtide.runtime")
    monkeypatch.setattr(prepare, "_IN_MEMORY", frozenset({prepare._file_system(background.parent)}))
    with load(prepare=None):
        prepare.background._thread.join(60)
    assert "is memory, not a disk" in caplog.text
    monkeypatch.setattr(prepare, "_IN_MEMORY", frozenset())
    monkeypatch.setattr(prepare, "_TIMES_THE_SIZE", 10**9)
    with load(prepare=None):
        prepare.background._thread.join(60)
    assert "GB free" in caplog.text
    assert copies(background) == []


IN_THE_BACKGROUND = """
import os, signal, sys, threading
from pathlib import Path
import ebbtide
from ebbtide.runtime import prepare
prepare.SMALLEST, prepare._IN_MEMORY = 0, frozenset()
pipe = ebbtide.pipeline("feature-extraction", MODEL)
child = Path(os.environ["TOLD"]).read_text()  # waits until it has stopped there
print(child, flush=True)
"""

ENDS = {
    "the end of the program": "",
    "sys.exit in a pipeline's block": "with pipe: sys.exit()",
    "Ctrl-C": "assert os.getpgid(int(child)) != os.getpgid(0)\n"
    "try:\n    os.kill(0, signal.SIGINT)\n    threading.Event().wait()\n"
    "except KeyboardInterrupt:\n    pass",
    "an error": "pipe.dispose()\nsys.stderr.close()\nraise SystemExit(0) from ValueError()",
}


@pytest.mark.parametrize("step", ["hashing", "writing"])
@pytest.mark.parametrize("end", ENDS)
def test_the_interpreter_ends_while_a_copy_is_made_and_nothing_is_left(
    root: Path, tmp_path: Path, end: str, step: str
) -> None:
    environ = {**at(step, "stop", tmp_path), "EBBTIDE_CACHE_DIR": str(root)}
    script = "import os\nos.setsid()\n" + IN_THE_BACKGROUND + ENDS[end]
    out = ended(process(script, EBBTIDE_PREPARE="background", **environ))
    assert is_gone(int(out.split()[0]))
    assert copies(root) == []
    assert left_over(root) == []


@pytest.mark.parametrize("step", ["hashing", "writing", "sealing"])
def test_a_process_that_is_killed_takes_the_child_with_it(
    root: Path, tmp_path: Path, step: str
) -> None:
    environ = {**at(step, "stop", tmp_path), "EBBTIDE_CACHE_DIR": str(root)}
    script = IN_THE_BACKGROUND + "os.kill(os.getpid(), signal.SIGKILL)"
    running = process(script, EBBTIDE_PREPARE="background", **environ)
    child = int(ended(running, code=-9).split()[0])
    gone = threading.Event()
    for _ in range(600):  # nobody tells of the end of another's child
        if is_gone(child):
            break
        gone.wait(0.05)
    assert is_gone(child)
    assert copies(root) == []
    assert left_over(root) == []


def test_ctrl_c_during_prepare_now_ends_the_child_too(root: Path, tmp_path: Path) -> None:
    environ = {**at("writing", "stop", tmp_path), "EBBTIDE_CACHE_DIR": str(root)}
    script = """
    import os, signal, threading, ebbtide
    from pathlib import Path
    def interrupt():
        child = Path(os.environ["TOLD"]).read_text()
        print(child, flush=True)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    threading.Thread(target=interrupt).start()
    try:
        ebbtide.pipeline("feature-extraction", MODEL, prepare="now")
    except KeyboardInterrupt:
        print("interrupted", ebbtide.live())
    """
    child, said, live = ended(process(script, **environ)).split()
    assert (said, live) == ("interrupted", "[]")
    assert is_gone(int(child))
    assert left_over(root) == []


def test_a_forked_child_neither_waits_for_the_copy_nor_ends_it(root: Path, tmp_path: Path) -> None:
    environ = {**at("writing", "stop", tmp_path), "EBBTIDE_CACHE_DIR": str(root)}
    script = (
        "import warnings\nwarnings.simplefilter('ignore', DeprecationWarning)\n"
        + IN_THE_BACKGROUND
        + """
forked = os.fork()
if not forked:
    with ebbtide.pipeline("feature-extraction", MODEL, prepare=False) as new:
        new("the sea")
    sys.exit(0)
print(os.waitpid(forked, 0)[1])
os.kill(int(child), 0)
"""
    )
    child, status = ended(process(script, EBBTIDE_PREPARE="background", **environ)).split()
    assert status == "0"
    assert is_gone(int(child))
    assert left_over(root) == []


USER = """
import sys, ebbtide
with ebbtide.pipeline("feature-extraction", MODEL, prepare=False) as pipe:
    expected = pipe("the sea").tobytes()
    print(pipe.memory.holdings[1].source, flush=True)
    for line in sys.stdin:
        for _ in range(5):
            assert pipe("the sea").tobytes() == expected
        if line.strip() == "nap":
            pipe.sleep()
            assert pipe("the sea").tobytes() == expected
        print(pipe.memory.holdings[1].source, flush=True)
"""


def test_what_happens_to_an_entry_does_not_reach_who_runs_on_it(root: Path) -> None:
    prepared()
    users = [process(USER, EBBTIDE_CACHE_DIR=str(root)) for _ in range(2)]

    def said(word: str = "run") -> set[str]:
        for one in users:
            assert one.stdin is not None
            one.stdin.write(f"{word}\n")
            one.stdin.flush()
        return {one.stdout.readline().strip() for one in users if one.stdout is not None}

    assert {one.stdout.readline().strip() for one in users if one.stdout} == {"prepared"}
    store = prepare.store()
    assert store.prune(0) == []
    assert said() == {"prepared"}, "it is in use, and so was passed by"
    assert store.verify(store.entries()[0]) is None
    assert said() == {"prepared"}
    entry = only(root)
    store.discard(entry.name, "a test says so")
    assert said() == {"prepared"}, "what is mapped stays"
    assert prepared() == entry.name
    assert said("nap") == {"prepared"}, "and now from the new one"
    assert store.prune(0) == []
    store.discard(entry.name, "a test says so")
    assert said("nap") == {"original"}
    for one in users:
        ended(one)
    assert left_over(root) == []


def test_a_store_that_came_ready_and_cannot_be_written_is_moved_to(
    background: Path, moved: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an image: no hash is remembered there, so the first look finds nothing."""
    expected = right()
    prepared()
    for note in (background / "identities").iterdir():
        note.unlink()
    monkeypatch.setattr(prepare, "cannot", lambda size: "it is read-only")
    with load(prepare=None) as pipe:
        assert moved.wait(60)
        assert source(pipe) == "prepared"
        assert np.array_equal(pipe(TEXT), expected)
