"""A prepared copy whose attention is fused: the same tokens, a cache that is written in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ebbtide
from ebbtide.cancellation import CancelToken
from ebbtide.errors import LoadError
from ebbtide.runtime import InPlace, Passed, SessionOptions, rewriting
from ebbtide.runtime.store import GRAPH

from . import stored

MODELS = stored.MODELS
LLAMA = MODELS / "gen-llama"
FILE = LLAMA / "onnx" / "model.onnx"
TEXTS = ["The tide goes out at six, and the boats lie on their sides.", "Boats", "The sea is deep"]
TOKEN = CancelToken("the test")


def load(**options: Any) -> Any:
    return ebbtide.pipeline("text-generation", LLAMA, **options)


def carry_of(pipe: Any) -> type:
    steps = pipe._model.begin(np.ones((1, 1), np.int64))
    try:
        return type(steps._carry)
    finally:
        steps.close()


def written(pipe: Any, **options: Any) -> Any:
    found = pipe(TEXTS, max_new_tokens=12, details=True, **options)
    return [[one["token_ids"] for one in rows] for rows in found]


def test_a_prepared_copy_writes_in_place_and_writes_the_same(root: Path) -> None:
    with load(prepare="off") as pipe:
        assert carry_of(pipe) is Passed
        expected = written(pipe)
        beams = written(pipe, num_beams=3, num_return_sequences=2)
    with load(prepare="now") as pipe:
        assert stored.source(pipe) == "prepared"
        assert carry_of(pipe) is InPlace
        assert written(pipe) == expected
        assert written(pipe, num_beams=3, num_return_sequences=2) == beams
        assert written(pipe, use_cache=False) == expected
        assert written(pipe, prompt_lookup_num_tokens=4) == expected
    assert not list(root.rglob("fused.onnx"))


def test_who_asks_for_no_fusing_gets_a_copy_of_its_own(root: Path) -> None:
    with load(prepare="now"), load(prepare="now", session_options={"fuse": False}) as pipe:
        assert stored.source(pipe) == "prepared"
        assert carry_of(pipe) is Passed


def test_a_graph_that_writes_otherwise_is_not_fused(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = SessionOptions(threads=1)
    assert b"GroupQueryAttention" in rewriting.fused(FILE, options, TOKEN)
    write = rewriting._written

    def others(session: Any, token: CancelToken) -> Any:
        tokens, logits = write(session, token)
        return ([*tokens[:-1], 0] if calls.pop() else tokens), logits

    calls = [True, False]
    monkeypatch.setattr(rewriting, "_written", others)
    with pytest.raises(LoadError, match="off by inf"):
        rewriting.fused(FILE, options, TOKEN)
    monkeypatch.setattr(rewriting, "_written", write)
    monkeypatch.setattr(rewriting, "_TOLERANCE", 0.0)
    with pytest.raises(LoadError, match="logits were off by"):
        rewriting.fused(FILE, options, TOKEN)


def test_a_graph_that_cannot_be_fused_is_prepared_as_it_is(root: Path) -> None:
    with ebbtide.pipeline("text-generation", MODELS / "gen-gpt2", prepare="off") as pipe:
        expected = written(pipe)
    with ebbtide.pipeline("text-generation", MODELS / "gen-gpt2", prepare="now") as pipe:
        assert stored.source(pipe) == "prepared"
        assert carry_of(pipe) is Passed
        assert written(pipe) == expected


def test_only_a_causal_model_whose_positions_are_known_is_tried(tmp_path: Path) -> None:
    assert rewriting.may_fuse(FILE)
    assert not rewriting.may_fuse(stored.GRAPH)
    alone = tmp_path / "model.onnx"
    alone.write_bytes(FILE.read_bytes())
    assert not rewriting.may_fuse(alone)
    (tmp_path / "config.json").write_text('{"text_config": {"n_positions": 64}}')
    assert rewriting.may_fuse(alone)


def test_a_copy_is_measured_by_a_process_that_did_nothing_else(
    root: Path, fresh_process: Any
) -> None:
    with load(prepare="now"):
        pass
    [graph] = root.rglob(GRAPH)
    out = fresh_process(
        """
        import os
        from pathlib import Path
        from ebbtide.runtime import SessionOptions, rewriting
        print(rewriting.measured(Path(os.environ["GRAPH"]), SessionOptions(threads=1)))
        """,
        GRAPH=str(graph),
    )
    assert 0 < int(out) < 20_000_000


def test_a_generation_ends_on_the_graph_that_it_began_on(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(prepare="off") as pipe:
        expected = written(pipe)[0]
        prompt = TEXTS[0]
        pieces = pipe.stream(prompt, max_new_tokens=12)
        seen = [next(pieces).token]
        with load(prepare="now"):
            assert stored.source(pipe) == "prepared", "it moved meanwhile"
            assert [*seen, *(piece.token for piece in pieces)] == expected[0]
            assert carry_of(pipe) is InPlace


def test_what_was_kept_of_the_original_is_not_gone_on_from_on_the_copy(root: Path) -> None:
    prompt = TEXTS[0] * 2
    with load(prepare="off") as pipe:
        [expected] = pipe(prompt, max_new_tokens=6, cache_prompt=True)
        assert pipe.memory.cache > 0
        with load(prepare="now"):
            assert stored.source(pipe) == "prepared"
            assert pipe(prompt, max_new_tokens=6, cache_prompt=True) == [expected]
            assert pipe(prompt, max_new_tokens=6, cache_prompt=True) == [expected]
