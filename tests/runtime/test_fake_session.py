"""The session without ONNX Runtime keeps the protocol of the real one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import ebbtide
from ebbtide import runtime
from ebbtide.cancellation import CancelToken
from ebbtide.runtime import SessionOptions, TensorInfo
from ebbtide.runtime.devices import Device
from ebbtide.runtime.fake import FakeSession

GRAPHS = Path(__file__).parent / "data"
IDS = np.array([[3, 1, 2]])


def real() -> runtime.OnnxSession:
    path = GRAPHS / "gives_scores.onnx"
    return runtime.open_session(path, "cpu", SessionOptions(), CancelToken("the test"))


def fake() -> FakeSession:
    return FakeSession(
        (TensorInfo("input_ids", "int64", ("n", "t")),),
        (TensorInfo("scores", "float32", ("n", "t")),),
        lambda feeds: {"scores": feeds["input_ids"].astype(np.float32)},
    )


@pytest.mark.parametrize("make", [real, fake])
def test_it_describes_itself_and_runs(make: type) -> None:
    session = make()
    assert session.inputs == (TensorInfo("input_ids", "int64", ("n", "t")),)
    assert session.outputs == (TensorInfo("scores", "float32", ("n", "t")),)
    assert session.device == Device("cpu")
    (found,) = session.run({"input_ids": IDS}, ["scores"], CancelToken("the test"))
    assert found.dtype == np.float32
    assert found.tolist() == IDS.tolist()
    assert not session.close()


@pytest.mark.parametrize("make", [real, fake])
def test_a_cancelled_token_stops_it_before_it_runs(make: type) -> None:
    session = make()
    token = CancelToken("the test")
    token.cancel()
    with pytest.raises(ebbtide.PipelineCancelledError) as caught:
        session.run({"input_ids": IDS}, ["scores"], token)
    assert caught.value.pipeline == "the test"
    session.close()


def test_the_real_one_can_be_closed_twice_and_then_says_that_it_was_disposed() -> None:
    session = real()
    assert not session.close()
    assert not session.close()
    with pytest.raises(ebbtide.PipelineDisposedError):
        session.run({"input_ids": IDS}, ["scores"], CancelToken("the test"))


def test_feeds_that_the_graph_cannot_take_are_a_run_error() -> None:
    session = real()
    token = CancelToken("the test")
    for feeds in ({"input_ids": IDS.astype(np.float32)}, {}, {"other": IDS}):
        with pytest.raises(ebbtide.RunError, match="the test: the run failed"):
            session.run(feeds, ["scores"], token)
    session.close()


def test_the_fake_counts_its_runs_and_notes_its_close() -> None:
    session = fake()
    for _ in range(3):
        session.run({"input_ids": IDS}, ["scores"], CancelToken("the test"))
    assert (session.runs, session.closed) == (3, False)
    session.close()
    assert session.closed
