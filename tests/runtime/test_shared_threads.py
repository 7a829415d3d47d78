"""One pool of threads for all sessions, where that is set; and what it means for other users."""

from __future__ import annotations

from typing import Any

import pytest

COUNT = """
import os, ebbtide
from ebbtide.memory.reaper import reaper

def threads():
    # A thread that has ended is listed a moment longer, so the least of many reads counts.
    return min(len(os.listdir("/proc/self/task")) for _ in range(500))

def load(**options):
    pipe = ebbtide.pipeline("feature-extraction", MODEL, prepare=False, **options)
    pipe("the sea")
    return pipe

pipes = [load()]
one = threads()
pipes += [load(dtype=dtype) for dtype in ("q8", "fp16", "q4")]
print(threads() - one)
for pipe in pipes:
    pipe.dispose()
"""


def test_with_shared_threads_several_sessions_have_no_more_than_one(fresh_process: Any) -> None:
    out = fresh_process(COUNT, EBBTIDE_SHARED_THREADS="1", EBBTIDE_THREADS="3")
    assert out.strip() == "0"


def test_without_each_session_has_its_own(fresh_process: Any) -> None:
    out = fresh_process(COUNT, EBBTIDE_THREADS="3")
    assert int(out) == 3 * 2, "each has two beside the thread that runs it"


ANOTHER_USER = """
import numpy as np, onnxruntime
def another():
    session = onnxruntime.InferenceSession(MODEL + "/onnx/model.onnx")
    feeds = {one.name: np.ones((1, 4), np.int64) for one in session.get_inputs()}
    return session.run(None, feeds)[0].shape
"""


@pytest.mark.parametrize("prepare", ["False", "'now'"])
def test_other_users_of_onnxruntime_are_not_disturbed(
    fresh_process: Any, tmp_path: Any, prepare: str
) -> None:
    out = fresh_process(
        ANOTHER_USER
        + f"""
import ebbtide
with ebbtide.pipeline("feature-extraction", MODEL, prepare={prepare}) as pipe:
    expected = pipe("the sea").tobytes()
    print(another())
    assert pipe("the sea").tobytes() == expected
print(another())
""",
        EBBTIDE_CACHE_DIR=str(tmp_path),
    )
    assert out.splitlines() == ["(1, 4, 32)"] * 2


def test_with_shared_threads_they_have_to_ask_for_them_too(fresh_process: Any) -> None:
    out = fresh_process(
        ANOTHER_USER
        + """
import ebbtide
with ebbtide.pipeline("feature-extraction", MODEL, prepare=False) as pipe:
    pipe("the sea")
    try:
        another()
    except Exception:
        print("refused")
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    onnxruntime.InferenceSession(MODEL + "/onnx/model.onnx", options)
    pipe("the sea")
""",
        EBBTIDE_SHARED_THREADS="on",
    )
    assert out.split()[-1] == "refused", "onnxruntime prints its refusal as well"


def test_prepared_copies_work_with_shared_threads(fresh_process: Any, tmp_path: Any) -> None:
    out = fresh_process(
        """
import ebbtide
found = []
for prepare in (False, "now"):
    with ebbtide.pipeline("feature-extraction", MODEL, prepare=prepare) as pipe:
        found.append(pipe("the sea").tobytes())
        pipe.sleep()
        found.append(pipe("the sea").tobytes())
        print(pipe.memory.holdings[1].source)
print(len(set(found)))
""",
        EBBTIDE_SHARED_THREADS="on",
        EBBTIDE_CACHE_DIR=str(tmp_path),
    )
    assert out.split() == ["original", "prepared", "1"]
