"""4.7 and 4.9: forgotten pipelines, the interpreter's exit, and forks."""

from __future__ import annotations

import gc
import threading
import warnings
from pathlib import Path

import pytest

import ebbtide
from ebbtide.memory.ledger import ledger


def settle() -> None:
    """Wait until the reaper has done what it was asked for."""
    from ebbtide.memory.reaper import reaper

    reaper.call(lambda: None)
    reaper.call(lambda: None)


def test_a_forgotten_pipeline_is_released_with_a_warning_that_says_where_it_was_made(
    tiny_bert: Path,
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe = ebbtide.pipeline("feature-extraction", tiny_bert)
        line = pipe._lifecycle.site[1]
        del pipe
        settle()
    assert len(caught) == 1
    assert caught[0].category is ResourceWarning
    assert f"{__file__}:{line}" in str(caught[0].message)
    assert "dispose()" in str(caught[0].message)
    assert (caught[0].filename, caught[0].lineno) == (__file__, line)
    assert ebbtide.live() == []
    assert ledger._entries == {}


def test_a_disposed_pipeline_is_collected_without_a_warning(tiny_bert: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ebbtide.pipeline("feature-extraction", tiny_bert).dispose()
        gc.collect()
        settle()
    assert caught == []


def test_a_forgotten_pipeline_in_a_cycle_is_released_by_the_collector(tiny_bert: Path) -> None:
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        cycle: list[object] = [ebbtide.pipeline("feature-extraction", tiny_bert)]
        cycle.append(cycle)
        del cycle
        gc.collect()
        settle()
    assert ledger._entries == {}


def test_a_warning_that_is_an_error_does_not_stop_the_reaper(fresh_process) -> None:
    out = fresh_process(
        """
        import sys, ebbtide
        seen = []
        sys.unraisablehook = lambda report: seen.append(report.exc_type.__name__)
        ebbtide.pipeline("feature-extraction", MODEL)
        with ebbtide.pipeline("feature-extraction", MODEL) as pipe:
            pipe("the reaper lives")
        print(seen)
        """
    )
    assert out.strip() == "['ResourceWarning']"


def test_what_is_left_at_exit_is_disposed_and_the_exit_is_normal(fresh_process) -> None:
    out = fresh_process(
        """
        import atexit, sys, ebbtide
        from ebbtide.memory import reaper
        finished = []
        @atexit.register
        def report():
            # registered before the first pipeline's own hook, so it runs after it
            print([pipe.state.value for pipe in kept], ebbtide.live())
        kept = [ebbtide.pipeline("feature-extraction", MODEL) for _ in range(3)]
        kept[0]("the sea")
        sys.exit(7)
        """,
        code=7,
    )
    assert out.strip() == "['disposed', 'disposed', 'disposed'] []"


def test_an_exit_in_the_middle_of_daemon_threads_calls_ends_normally(fresh_process) -> None:
    out = fresh_process(
        """
        import threading, ebbtide
        pipe = ebbtide.pipeline("feature-extraction", MODEL)
        running = threading.Barrier(9)
        def work():
            running.wait()
            while True:
                try:
                    pipe(["word " * 300] * 64, batch_size=64)
                except ebbtide.EbbtideError:
                    return
        for _ in range(8):
            threading.Thread(target=work, daemon=True).start()
        running.wait()
        pipe("one call of my own")
        print("end")
        """,
        timeout=60,
    )
    assert out.strip() == "end"


def test_a_child_made_by_multiprocessing_ends_and_its_inherited_pipeline_raises(
    fresh_process,
) -> None:
    out = fresh_process(
        """
        import multiprocessing, ebbtide
        pipe = ebbtide.pipeline("feature-extraction", MODEL, session_options={"threads": 2})
        expected = pipe("the sea", pooling="mean")
        def child(queue):
            try:
                pipe("refused")
            except ebbtide.PipelineInheritedError as error:
                queue.put("after the fork" in str(error))
            queue.put((pipe.state.value, pipe.dispose().released, ebbtide.live()))
            with ebbtide.pipeline("feature-extraction", MODEL) as own:
                queue.put(bool(abs(own("the sea", pooling="mean") - expected).max() < 1e-6))
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        process = context.Process(target=child, args=(queue,))
        process.start()
        print([queue.get(timeout=30) for _ in range(3)])
        process.join(30)
        print(process.exitcode, pipe("the sea", pooling="mean").shape)
        receipt = pipe.dispose()
        print(receipt.verified or receipt)
        """
    )
    assert out.splitlines() == ["[True, ('inherited', 0, []), True]", "0 (1, 32)", "True"]


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_child_of_a_bare_fork_ends_normally_with_its_own_status(
    fresh_process, threads: int
) -> None:
    """ONNX Runtime alone hangs here: a fork, then a normal exit."""
    out = fresh_process(
        """
        import os, sys, ebbtide
        pipe = ebbtide.pipeline("feature-extraction", MODEL, session_options={"threads": THREADS})
        pipe(["the sea", "the wind"])
        for attempt in range(6):
            child = os.fork()
            if child == 0:
                if attempt % 2:
                    with ebbtide.pipeline("feature-extraction", MODEL) as own:
                        own("in the child")
                print("printed by the child")
                if attempt == 5:
                    pipe("refused")
                sys.exit(attempt)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        print(pipe("the sea", pooling="mean").shape, pipe.dispose().verified)
        """.replace("THREADS", str(threads))
    )
    lines = out.splitlines()
    assert lines.count("printed by the child") == 6
    assert [one for one in lines if one.isdigit()] == ["0", "1", "2", "3", "4", "1"]
    assert "PipelineInheritedError" in out
    assert "(1, 32)" in out


def test_a_fork_while_other_threads_call_and_load_leaves_a_child_that_works(
    fresh_process,
) -> None:
    out = fresh_process(
        """
        import os, threading, ebbtide
        stop = threading.Event()
        pipe = ebbtide.pipeline("feature-extraction", MODEL)
        def call():
            while not stop.is_set():
                pipe("the sea", pooling="mean")
        def load():
            while not stop.is_set():
                own = {"threads": 1}
                ebbtide.pipeline("feature-extraction", MODEL, session_options=own).dispose()
        threads = [threading.Thread(target=one) for one in (call, call, load)]
        for thread in threads:
            thread.start()
        codes = []
        for _ in range(10):
            child = os.fork()
            if child == 0:
                try:
                    pipe("refused")
                except ebbtide.PipelineInheritedError:
                    raise SystemExit(4)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        stop.set()
        for thread in threads:
            thread.join()
        pipe.dispose()
        print(codes == [4] * 10)
        """
    )
    assert out.strip() == "True"


def test_live_and_dispose_all_leave_an_inherited_pipeline_alone(fresh_process) -> None:
    out = fresh_process(
        """
        import os, ebbtide
        pipe = ebbtide.pipeline("feature-extraction", MODEL)
        child = os.fork()
        if child == 0:
            assert ebbtide.live() == [] and ebbtide.dispose_all() == []
            del pipe
            os._exit(5)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        pipe.dispose()
        """
    )
    assert out.strip() == "5"


def test_a_thousand_pipelines_forgotten_by_many_threads_are_all_released(tiny_bert: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def forget() -> None:
            for _ in range(10):
                ebbtide.pipeline("feature-extraction", tiny_bert)("x")

        threads = [threading.Thread(target=forget) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        settle()
    assert len(caught) == 40
    assert ledger._entries == {}
