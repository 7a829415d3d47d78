"""The options of a session: what they take, and what they change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ebbtide
from ebbtide import SessionOptions


def test_nothing_given_is_the_default() -> None:
    assert SessionOptions.of(None) == SessionOptions() == SessionOptions.of({})


def test_an_object_is_taken_as_it_is() -> None:
    options = SessionOptions(threads=2)
    assert SessionOptions.of(options) is options


def test_a_map_of_attributes_makes_the_same_object() -> None:
    options = SessionOptions.of(
        {"threads": 2, "optimization": "basic", "arena": True, "entries": {"b": 1, "a": "x"}}
    )
    assert options == SessionOptions(2, "basic", True, (("a", "x"), ("b", "1")))
    assert hash(options) == hash(SessionOptions(2, "basic", True, (("a", "x"), ("b", "1"))))


@pytest.mark.parametrize(
    ("name", "near"),
    [("thread", "threads"), ("optimisation", "optimization"), ("arenas", "arena"), ("zzz", None)],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, near: str | None) -> None:
    with pytest.raises(TypeError) as caught:
        SessionOptions.of({name: 1})
    assert isinstance(caught.value, ebbtide.OptionError)
    assert (caught.value.option, caught.value.nearest) == (name, near)
    assert "arena, entries, fuse, optimization, threads" in str(caught.value)


@pytest.mark.parametrize("given", [3, "threads=2", [("threads", 2)], True])
def test_something_that_is_no_map_is_refused(given: Any) -> None:
    with pytest.raises(ebbtide.OptionError, match="takes a SessionOptions or a dict"):
        SessionOptions.of(given)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_threads_take_a_whole_number_from_one(threads: Any) -> None:
    with pytest.raises(ebbtide.InputError, match="threads takes a whole number from 1"):
        SessionOptions.of({"threads": threads})


@pytest.mark.parametrize("optimization", ["most", None, 3, ["all"]])
def test_optimization_takes_one_of_four_words(optimization: Any) -> None:
    with pytest.raises(ebbtide.InputError, match="none, basic, extended, all"):
        SessionOptions.of({"optimization": optimization})


@pytest.mark.parametrize("arena", ["yes", 3, None])
def test_arena_takes_true_or_false(arena: Any) -> None:
    with pytest.raises(ebbtide.EbbtideError, match="arena"):
        SessionOptions.of({"arena": arena})


@pytest.mark.parametrize("entries", [3, "a=b", [1], [("a",)], [("a", 1)], {"a": None}])
def test_entries_that_are_no_map_of_texts_never_fail_untyped(entries: Any, tiny_bert: Path) -> None:
    try:
        with ebbtide.pipeline("embeddings", tiny_bert, session_options={"entries": entries}):
            pass
    except ebbtide.EbbtideError:
        pass


def test_an_object_with_values_that_cannot_be_used_is_refused_as_well(tiny_bert: Path) -> None:
    options = SessionOptions(optimization="most")  # type: ignore[arg-type]
    with pytest.raises(ebbtide.InputError, match="optimization"):
        ebbtide.pipeline("embeddings", tiny_bert, session_options=options)


@pytest.mark.parametrize(
    "options",
    [
        {"threads": 1},
        {"threads": 2},
        {"optimization": "none"},
        {"optimization": "basic"},
        {"optimization": "extended"},
        {"arena": True},
        {"entries": {"session.intra_op.allow_spinning": "0"}},
    ],
)
def test_options_change_how_a_graph_runs_and_not_what_it_gives(
    tiny_bert: Path, options: dict[str, Any]
) -> None:
    with (
        ebbtide.pipeline("embeddings", tiny_bert) as plain,
        ebbtide.pipeline("embeddings", tiny_bert, session_options=options) as other,
    ):
        np.testing.assert_allclose(other("low tide"), plain("low tide"), atol=1e-5)


def sessions(pipe: Any) -> int:
    return next(one.owners for one in pipe.memory.holdings if one.kind == "session")


def test_equal_options_share_a_session_and_others_do_not(tiny_bert: Path) -> None:
    with (
        ebbtide.pipeline("embeddings", tiny_bert, session_options={"threads": 1}) as one,
        ebbtide.pipeline("embeddings", tiny_bert, session_options=SessionOptions(1)) as two,
        ebbtide.pipeline("embeddings", tiny_bert, session_options={"threads": 2}) as three,
    ):
        assert [sessions(pipe) for pipe in (one, two, three)] == [2, 2, 1]
