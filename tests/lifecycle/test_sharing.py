"""4.11: two pipelines that need the same thing own one, and the last owner frees it."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ebbtide
from ebbtide import PipelineCancelledError, SessionOptions
from ebbtide.lifecycle import _live
from ebbtide.memory.ledger import ledger
from ebbtide.runtime import graph


def alive() -> Counter[str]:
    """How many native things of each kind there are."""
    return Counter(entry.kind for entry in ledger._entries.values())


def load(model: Path, **options: Any) -> ebbtide.FeatureExtractionPipeline:
    return ebbtide.pipeline("feature-extraction", model, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "fp32"},
        {"device": "cpu"},
        {"session_options": SessionOptions()},
        {"session_options": {"optimization": "all"}},
    ],
)
def test_the_same_model_is_loaded_once_however_it_is_asked_for(
    tiny_bert: Path, options: dict[str, Any]
) -> None:
    with load(tiny_bert) as first, load(tiny_bert, **options) as second:
        assert alive() == {"session": 1, "tokenizer": 1}
        assert first._model._session.value is second._model._session.value
        assert first.tokenizer.lease.value is second.tokenizer.lease.value
        assert np.array_equal(first("the sea"), second("the sea"))
    assert alive() == {}


def test_the_same_folder_by_another_path_is_the_same_model(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "link"
    link.symlink_to(tiny_bert)
    monkeypatch.chdir(tiny_bert.parent)
    with load(tiny_bert), load(link), ebbtide.pipeline("feature-extraction", "./tiny-bert"):
        assert alive() == {"session": 1, "tokenizer": 1}


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "q8"},
        {"dtype": "fp16"},
        {"session_options": {"threads": 1}},
        {"session_options": {"arena": True}},
        {"session_options": {"optimization": "basic"}},
        {"session_options": {"entries": {"session.intra_op.allow_spinning": "0"}}},
    ],
)
def test_what_is_asked_for_otherwise_is_another_session_over_the_same_tokenizer(
    tiny_bert: Path, options: dict[str, Any]
) -> None:
    with load(tiny_bert) as first, load(tiny_bert, **options) as second:
        assert alive() == {"session": 2, "tokenizer": 1}
        assert first._model._session.value is not second._model._session.value
    assert alive() == {}


def test_a_file_that_was_replaced_by_a_rename_is_another_session(
    tiny_bert: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_bert, folder)
    file = folder / "onnx/model.onnx"
    with load(folder) as before:
        expected = before("the sea")
        fresh = tmp_path / "fresh.onnx"
        shutil.copyfile(folder / "onnx/model_int8.onnx", fresh)
        os.replace(fresh, file)
        with load(folder) as after:
            assert alive() == {"session": 2, "tokenizer": 1}
            assert not np.array_equal(after("the sea"), expected)
            assert np.array_equal(before("the sea"), expected)


def test_two_models_with_the_same_tokenizer_share_it(tiny_bert: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_bert, other)
    with load(tiny_bert) as first, load(other) as second:
        assert alive() == {"session": 2, "tokenizer": 1}
        assert first.tokenizer.lease.value is second.tokenizer.lease.value
        assert [one.owners for one in first.memory.holdings] == [2, 1]


@pytest.mark.parametrize(
    ("rule", "value"),
    [("model_max_length", 7), ("padding_side", "left"), ("truncation_side", "left")],
)
def test_the_same_tokenizer_by_other_rules_is_another(
    tiny_bert: Path, tmp_path: Path, rule: str, value: object
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_bert, other)
    file = other / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), rule: value}))
    with load(tiny_bert) as first, load(other) as second:
        assert alive() == {"session": 2, "tokenizer": 2}
        assert first.tokenizer.ids("a b c d e f g h i j") != [] != second.tokenizer.ids("a")


def test_what_is_shared_is_divided_by_its_owners(tiny_bert: Path) -> None:
    first = load(tiny_bert)
    alone = first.memory
    assert alone.exclusive == alone.anonymous == sum(one.anonymous for one in alone.holdings)
    others = [load(tiny_bert) for _ in range(2)]
    for pipe in (first, *others):
        memory = pipe.memory
        assert [one.owners for one in memory.holdings] == [3, 3]
        assert memory.exclusive == 0
        assert memory.anonymous == sum(one.anonymous // 3 for one in alone.holdings)
        assert "shared by 3" in str(memory)
    for pipe in others:
        assert pipe.dispose().charged == 0
    assert first.memory == alone
    assert first.dispose().charged == alone.exclusive
    assert first.memory.holdings == ()


def test_what_its_calls_added_belongs_to_one_owner_alone(tiny_bert: Path) -> None:
    with load(tiny_bert) as first, load(tiny_bert) as second:
        first._lifecycle.working = 5_000_000
        assert first.memory.exclusive == first.memory.working == 5_000_000
        assert second.memory.exclusive == second.memory.working == 0
        assert first.memory.anonymous == second.memory.anonymous + 5_000_000
        first._lifecycle.working = 0


class Loads:
    """Many loads of one model at the same time, the first of which begins when all have come."""

    def __init__(self, count: int, monkeypatch: pytest.MonkeyPatch, failing: int = 0) -> None:
        self.opened = 0
        self.failing = failing
        self.go = threading.Event()
        self.count = count
        self.outcomes: list[Any] = []
        self._open = graph.open_session
        monkeypatch.setattr(graph, "open_session", self.open_session)

    def open_session(self, *arguments: Any) -> Any:
        self.opened += 1
        assert self.go.wait(30)
        if self.opened <= self.failing:
            raise ebbtide.LoadError("the file is damaged", path="model.onnx")
        return self._open(*arguments)

    def run(self, model: Path) -> None:
        def one() -> None:
            try:
                self.outcomes.append(load(model))
            except ebbtide.EbbtideError as error:
                self.outcomes.append(error)

        threads = [threading.Thread(target=one) for _ in range(self.count)]
        for thread in threads:
            thread.start()
        while len(_live) < self.count:
            time.sleep(0)
        self.go.set()
        for thread in threads:
            thread.join(30)
        assert len(self.outcomes) == self.count


def test_loads_at_the_same_time_load_once(tiny_bert: Path, monkeypatch) -> None:
    loads = Loads(8, monkeypatch)
    loads.run(tiny_bert)
    assert loads.opened == 1
    assert alive() == {"session": 1, "tokenizer": 1}
    assert {one.owners for pipe in loads.outcomes for one in pipe.memory.holdings} == {8}
    expected = loads.outcomes[0]("the sea")
    for pipe in loads.outcomes:
        assert np.array_equal(pipe("the sea"), expected)
        pipe.dispose()
    assert alive() == {}


@pytest.mark.parametrize("failing", [1, 3])
def test_where_the_first_of_several_loads_fails_the_others_try_for_themselves(
    tiny_bert: Path, monkeypatch, failing: int
) -> None:
    loads = Loads(8, monkeypatch, failing)
    loads.run(tiny_bert)
    errors = [one for one in loads.outcomes if isinstance(one, ebbtide.LoadError)]
    pipes = [one for one in loads.outcomes if isinstance(one, ebbtide.Pipeline)]
    assert (len(errors), len(pipes)) == (failing, 8 - failing)
    assert loads.opened == failing + 1
    assert alive() == {"session": 1, "tokenizer": 1}
    for pipe in pipes:
        pipe.dispose()
    assert alive() == {}


def test_where_every_load_fails_each_says_so_and_nothing_is_left(
    tiny_bert: Path, monkeypatch
) -> None:
    loads = Loads(8, monkeypatch, failing=8)
    loads.run(tiny_bert)
    assert all(isinstance(one, ebbtide.LoadError) for one in loads.outcomes)
    assert alive() == {}
    assert _live == {}


def test_cancelling_one_owners_run_leaves_the_others_alone(tiny_bert: Path, call) -> None:
    first, second = load(tiny_bert), load(tiny_bert)
    expected = second("the sea")
    session = first._model._session.value
    assert session is second._model._session.value
    entered = threading.Semaphore(0)
    held: dict[Any, threading.Event] = {}
    run = session.run

    def holding(feeds: Any, outputs: Any, token: Any) -> Any:
        wake = held[token] = threading.Event()
        token.attach(wake.set)
        entered.release()
        assert wake.wait(30)
        token.detach(wake.set)
        return run(feeds, outputs, token)

    session.run = holding
    cancelled, unharmed = call(first), call(second)
    assert entered.acquire(timeout=30)
    assert entered.acquire(timeout=30)
    receipt = first.dispose(cancel=True)
    assert isinstance(cancelled.end(), PipelineCancelledError)
    assert "shared with 1" in str(receipt)
    assert second.state is ebbtide.State.READY
    for token in second._lifecycle.running:
        assert not token.cancelled
        held[token].set()
    assert np.array_equal(unharmed.end(), expected)
    del session.run
    assert np.array_equal(second("the sea"), expected)
    second.dispose()


def test_the_last_owner_frees_what_was_shared(tiny_bert: Path) -> None:
    pipes = [load(tiny_bert) for _ in range(3)]
    session = pipes[0]._model._session.value
    for left in (2, 1):
        pipes[left].dispose()
        assert session.native is not None
        assert [one.owners for one in pipes[0].memory.holdings] == [left, left]
    receipt = pipes[0].dispose()
    assert session.native is None
    assert "shared" not in str(receipt)
    assert alive() == {}


def test_two_owners_that_are_disposed_together_both_end_and_free_it(tiny_bert: Path) -> None:
    pipes = [load(tiny_bert) for _ in range(4)]
    receipts = ebbtide.dispose_all()
    assert len(receipts) == 4
    assert alive() == {}
    assert all(pipe.state is ebbtide.State.DISPOSED for pipe in pipes)
