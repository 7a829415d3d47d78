"""Runs of one call beside one another, on a further session over the same prepared copy."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ebbtide
from ebbtide.cancellation import CancelToken
from ebbtide.errors import LoadError
from ebbtide.memory.reaper import reaper
from ebbtide.runtime import graph as graphs

from .stored import TINY

TEXTS = [f"{'the sea and the land ' * (1 + number % 11)}again" for number in range(160)]
"""More than a batch of tokens, and in lanes several batches."""


def load(threads: int = 2, prepare: Any = "now") -> Any:
    return ebbtide.pipeline(
        "feature-extraction", TINY, prepare=prepare, session_options={"threads": threads}
    )


def graph_of(pipe: Any) -> graphs.GraphSession:
    value = pipe._model._session.value
    assert isinstance(value, graphs.GraphSession)
    return value


def lane_of(pipe: Any) -> Any:
    use = graph_of(pipe)._use
    return use.lane if use is not None else None


@pytest.fixture
def pipe(root: Path) -> Iterator[Any]:
    with load() as made:
        yield made


def embed(pipe: Any, texts: Any = TEXTS, **options: Any) -> Any:
    return pipe(texts, pooling="mean", **options)


def test_a_long_list_gives_in_lanes_what_it_gives_without(pipe: Any) -> None:
    found = embed(pipe)
    assert lane_of(pipe) is not None
    with load(threads=1) as other:
        expected = embed(other)
        assert lane_of(other) is None
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_text_alone_and_a_short_list_open_no_further_session(pipe: Any) -> None:
    embed(pipe, "the sea")
    embed(pipe, TEXTS[:4])
    embed(pipe, TEXTS, batch_size=len(TEXTS))
    assert lane_of(pipe) is None


def test_what_runs_from_the_original_has_no_lanes(root: Path) -> None:
    with load(prepare=False) as pipe:
        embed(pipe)
        assert graph_of(pipe).lanes == 1
        assert lane_of(pipe) is None


def test_an_idle_process_closes_the_further_session_and_a_later_call_opens_it(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(reaper, "when_idle", kept.append)
    expected = embed(pipe)
    native = weakref.ref(lane_of(pipe)._native)
    (close,) = kept
    close()
    assert lane_of(pipe) is None
    assert native() is None
    assert np.array_equal(embed(pipe), expected)
    assert len(kept) == 2


def test_a_session_that_runs_is_not_closed_for_idleness(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(reaper, "when_idle", kept.append)
    graph = graph_of(pipe)
    token = CancelToken("test")
    assert graph._use is not None
    with graph._use.in_lane(graph.options, token) as session:
        kept.pop()()
        assert lane_of(pipe) is session
    assert len(kept) == 1, "it is to be looked at again"


def test_sleep_and_dispose_free_the_further_session(pipe: Any) -> None:
    expected = embed(pipe)
    native = weakref.ref(lane_of(pipe)._native)
    assert pipe.sleep().verified
    assert native() is None
    assert np.array_equal(embed(pipe), expected)
    native = weakref.ref(lane_of(pipe)._native)
    assert pipe.dispose().verified
    assert native() is None


def test_where_the_further_session_cannot_be_opened_the_other_runs(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*arguments: Any) -> Any:
        raise LoadError("not now", path="x")

    monkeypatch.setattr(graphs, "open_prepared", refuses)
    found = embed(pipe)
    assert lane_of(pipe) is None
    assert graph_of(pipe).lanes == 1
    monkeypatch.undo()
    np.testing.assert_allclose(found, embed(pipe), atol=1e-6)
