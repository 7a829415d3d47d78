"""Several inputs: sorted, cut into batches and run, and answered in the order they came."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ebbtide
from ebbtide.cancellation import CancelToken
from ebbtide.models import batching
from ebbtide.models.tokenizer import Batch

MODELS = Path(__file__).parent.parent / "models"

TEXTS = [" ".join(["the"] * count) for count in (3, 90, 5, 1, 60, 3, 91, 4, 2, 61, 88, 3)]
"""Three lengths, about: the batches of a list of them are three."""

Inside = Callable[[int, CancelToken], object]


class Runs:
    """Stands where a pipeline's model is run, and notes each batch.

    Args:
        pipe: The pipeline.
        inside: Called in each run with its number, on the native thread.
    """

    def __init__(self, pipe: Any, inside: Inside = lambda number, token: None) -> None:
        self.batches: list[Batch] = []
        self.in_lanes: list[bool] = []
        self._forward = pipe._model.forward
        self._inside = inside
        pipe._model.forward = self

    def __call__(self, batch: Batch, token: CancelToken, *, in_lane: bool = False) -> Any:
        self.batches.append(batch)
        self.in_lanes.append(in_lane)
        self._inside(len(self.batches), token)
        token.check()
        return self._forward(batch, token, in_lane=in_lane)

    @property
    def rows(self) -> list[int]:
        return [len(one.input_ids) for one in self.batches]

    @property
    def padding(self) -> int:
        return sum(int((one.attention_mask == 0).sum()) for one in self.batches)


@pytest.fixture
def pipe() -> Iterator[Any]:
    with ebbtide.pipeline("feature-extraction", MODELS / "tiny-bert") as made:
        yield made


def embed(pipe: Any, texts: Any = None, **options: Any) -> Any:
    return pipe(TEXTS if texts is None else texts, pooling="mean", **options)


def alone(pipe: Any) -> np.ndarray:
    return np.concatenate([pipe(text, pooling="mean") for text in TEXTS])


def drawn_from(texts: list[str], drawn: list[str]) -> Iterator[str]:
    for text in texts:
        drawn.append(text)
        yield text


# Lists


def test_a_list_runs_in_batches_of_about_one_length_and_comes_back_in_order(pipe: Any) -> None:
    expected = alone(pipe)
    runs = Runs(pipe)
    np.testing.assert_allclose(embed(pipe), expected, rtol=0, atol=1e-5)
    assert sorted(runs.rows) == [2, 3, 7]
    assert runs.padding < 20, "of 412 tokens"


def test_batch_size_decides_how_many_rows_run_together(pipe: Any) -> None:
    expected = alone(pipe)
    runs = Runs(pipe)
    np.testing.assert_allclose(embed(pipe, batch_size=5), expected, rtol=0, atol=1e-5)
    assert sorted(runs.rows) == [2, 5, 5]


def test_no_batch_of_a_long_list_has_more_tokens_than_the_budget(pipe: Any) -> None:
    runs = Runs(pipe)
    embed(pipe, TEXTS * 20)
    assert max(one.input_ids.size for one in runs.batches) <= batching.BATCH_TOKENS


@pytest.mark.parametrize("bound", ["inputs", "tokens"])
def test_a_list_is_tokenised_no_further_ahead_than_its_window(
    pipe: Any, bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = [0]
    encode = pipe.tokenizer.encode

    def counted(*given: Any, **options: Any) -> Any:
        ahead[0] += 1
        return encode(*given, **options)

    expected = alone(pipe)
    pipe.tokenizer.encode = counted
    most = 0

    def inside(number: int, token: CancelToken) -> None:
        nonlocal most
        most = max(most, ahead[0])
        ahead[0] -= runs.rows[-1]

    runs = Runs(pipe, inside)
    if bound == "tokens":
        monkeypatch.setattr(batching, "WINDOW_TOKENS", 100)
    found = embed(pipe, window=4) if bound == "inputs" else embed(pipe)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert most == 4 if bound == "inputs" else most < 8
    assert sum(runs.rows) == len(TEXTS)


def test_what_a_graph_gives_is_let_go_before_the_next_batch_runs(pipe: Any) -> None:
    given: list[weakref.ref[np.ndarray]] = []

    def inside(number: int, token: CancelToken) -> None:
        assert [one() for one in given] == [None] * (number - 1)

    runs = Runs(pipe, inside)
    forward = runs._forward

    def noted(batch: Batch, token: CancelToken, *, in_lane: bool) -> Any:
        found = forward(batch, token, in_lane=in_lane)
        given.extend(map(weakref.ref, found))
        return found

    runs._forward = noted
    embed(pipe)
    assert len(given) == 3


def test_without_pooling_a_list_is_one_array_as_wide_as_its_longest_text(pipe: Any) -> None:
    found = pipe(TEXTS, pooling="none")
    one_batch = pipe(TEXTS, pooling="none", batch_size=len(TEXTS))
    np.testing.assert_allclose(found, one_batch, rtol=0, atol=1e-5)
    assert found.shape[:2] == (len(TEXTS), 93)


def test_a_cancelled_call_runs_no_further_batch(pipe: Any) -> None:
    def inside(number: int, token: CancelToken) -> None:
        if number == 2:
            pipe.dispose(cancel=True)  # from inside its own call

    runs = Runs(pipe, inside)
    with pytest.raises(ebbtide.PipelineCancelledError):
        embed(pipe, batch_size=1)
    assert len(runs.rows) == 2


@pytest.mark.parametrize("option", ["batch_size", "window"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8"])
def test_a_number_of_inputs_is_a_whole_number_from_1(pipe: Any, option: str, value: Any) -> None:
    with pytest.raises(ebbtide.InputError, match=f"{option} takes a whole number from 1"):
        embed(pipe, **{option: value})


# Every task


@pytest.mark.parametrize(
    ("task", "head", "more"),
    [
        ("text-classification", "sequence", {"top_k": None}),
        ("token-classification", "token", {"ignore_labels": []}),
        ("token-classification", "token", {"aggregation_strategy": "max", "stride": 8}),
        ("zero-shot-classification", "nli", {"candidate_labels": ["sea", "a far harbour"]}),
        ("fill-mask", "mask", {}),
        ("question-answering", "span", {"max_seq_len": 24, "doc_stride": 4, "top_k": 3}),
    ],
)
def test_every_task_answers_a_list_and_a_stream_as_it_answers_each_alone(
    task: str, head: str, more: dict[str, Any]
) -> None:
    with ebbtide.pipeline(task, MODELS / "bert" / head) as pipe:
        words = ["the", "tide", "goes", "out", "and", "the", "boats", "lie", "on", "their", "sides"]
        inputs: list[Any] = [" ".join((words * 9)[:count]) for count in (4, 60, 7, 100, 5, 61)]
        if task == "fill-mask":
            inputs = [f"{pipe.mask_token} {one}" for one in inputs]
        elif task == "question-answering":
            inputs = [{"question": "what goes out", "context": one} for one in inputs]
        each = [pipe(one, **more) for one in inputs]
        runs = Runs(pipe)
        together = pipe(inputs, **more)
        assert len(runs.rows) < sum(runs.rows), "nothing ran together"
        near(together, each)
        near(list(pipe(iter(inputs), window=4, **more)), each)
        near(pipe(inputs, batch_size=1, **more), each)


def near(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, one in expected.items():
            near(found[key], one)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            near(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-5)
    else:
        assert found == expected


# Dynamically quantised models


@pytest.mark.parametrize("dtype", ["q8", "int8", "uint8"])
def test_a_quantised_model_gives_a_text_in_a_list_exactly_what_it_gives_it_alone(
    dtype: str,
) -> None:
    with ebbtide.pipeline("feature-extraction", MODELS / "tiny-bert", dtype=dtype) as pipe:
        assert np.array_equal(embed(pipe), alone(pipe))
        assert np.array_equal(
            np.concatenate(list(embed(pipe, iter(TEXTS), window=12))), alone(pipe)
        )
        by_token = pipe(TEXTS, pooling="none")
        for row, text in zip(by_token, TEXTS, strict=True):
            (expected,) = pipe(text, pooling="none")
            assert np.array_equal(row[: len(expected)], expected)
            assert not row[len(expected) :].any()
        runs = Runs(pipe)
        embed(pipe, batch_size=len(TEXTS))
        assert runs.rows == [len(TEXTS)]


# Streams


@pytest.mark.parametrize(
    ("options", "ahead"),
    [({}, 1), ({"batch_size": 3}, 3), ({"window": 5}, 5), ({"window": 5, "batch_size": 2}, 5)],
)
def test_a_stream_takes_as_many_inputs_ahead_as_it_was_told_and_keeps_their_order(
    pipe: Any, options: dict[str, Any], ahead: int
) -> None:
    drawn: list[str] = []
    found = []
    for number, vector in enumerate(embed(pipe, drawn_from(TEXTS, drawn), **options)):
        assert len(drawn) == min(len(TEXTS), (number // ahead + 1) * ahead)
        found.append(vector)
    np.testing.assert_allclose(np.concatenate(found), alone(pipe), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["generator", "async generator"])
def test_a_stream_on_an_event_loop_is_the_same(pipe: Any, kind: str) -> None:
    drawn: list[str] = []

    async def asynchronous() -> AsyncIterator[str]:
        for text in drawn_from(TEXTS, drawn):
            yield text

    async def main() -> list[np.ndarray]:
        source = drawn_from(TEXTS, drawn) if kind == "generator" else asynchronous()
        found = []
        async for vector in await pipe.acall(source, pooling="mean", window=5):
            assert len(drawn) == min(len(TEXTS), (len(found) // 5 + 1) * 5)
            found.append(vector)
        return found

    found = asyncio.run(main())
    np.testing.assert_allclose(np.concatenate(found), alone(pipe), rtol=0, atol=1e-5)


def test_a_window_of_a_stream_is_sorted(pipe: Any) -> None:
    runs = Runs(pipe)
    list(embed(pipe, iter(TEXTS), window=len(TEXTS)))
    assert sorted(runs.rows) == [2, 3, 7]


def test_a_result_comes_as_soon_as_it_is_known(pipe: Any) -> None:
    known = threading.Event()

    def inside(number: int, token: CancelToken) -> None:
        assert number == 1 or known.wait(30), "the first result waited for all batches"

    Runs(pipe, inside)
    answers = embed(pipe, iter(TEXTS), window=len(TEXTS))
    next(answers)
    known.set()
    assert len(list(answers)) == len(TEXTS) - 1


def test_a_stream_that_is_closed_stops_the_run_that_goes_on(pipe: Any) -> None:
    stopped = threading.Event()

    def inside(number: int, token: CancelToken) -> None:
        if number > 1:
            token.attach(stopped.set)
            assert stopped.wait(30), "the run was never stopped"

    runs = Runs(pipe, inside)
    answers = embed(pipe, iter(TEXTS), window=len(TEXTS), batch_size=1)
    next(answers)
    answers.close()
    assert pipe.dispose().verified
    assert len(runs.rows) <= 2


def test_a_cancelled_task_stops_its_stream(pipe: Any) -> None:
    entered, stopped = threading.Event(), threading.Event()

    def inside(number: int, token: CancelToken) -> None:
        if number == 2:
            token.attach(stopped.set)
            entered.set()
            assert stopped.wait(30), "the run was never stopped"

    runs = Runs(pipe, inside)

    async def main() -> None:
        async def read() -> None:
            options = {"window": len(TEXTS), "batch_size": 1}
            async for _ in await pipe.acall(iter(TEXTS), pooling="mean", **options):
                pass

        task = asyncio.ensure_future(read())
        await asyncio.to_thread(entered.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert len(runs.rows) == 2
    assert not pipe._lifecycle.running


def test_a_stream_on_a_disposed_pipeline_ends_with_its_reason(pipe: Any) -> None:
    answers = embed(pipe, iter(TEXTS), window=2)
    next(answers)
    pipe.dispose()
    assert next(answers).shape == (1, 32), "what was known is still given"
    with pytest.raises(ebbtide.PipelineDisposedError):
        next(answers)


def test_a_list_inside_a_stream_is_answered_as_a_list(pipe: Any) -> None:
    inputs = ["sea", TEXTS[:3], ["tide"], TEXTS[4]]
    for options in ({}, {"window": 3}, {"window": 9, "batch_size": 2}):
        found = list(embed(pipe, iter(inputs), **options))
        assert [len(one) for one in found] == [1, 3, 1, 1]
        for one, expected in zip(found, (embed(pipe, one) for one in inputs), strict=True):
            np.testing.assert_allclose(one, expected, rtol=0, atol=1e-5)


def test_texts_of_a_stream_without_pooling_have_their_own_widths(pipe: Any) -> None:
    found = list(pipe(iter(TEXTS), pooling="none", window=5))
    assert [one.shape[1] for one in found] == [len(pipe.tokenizer.ids(text)) for text in TEXTS]


# How far it is


def test_progress_is_told_on_the_callers_thread_up_to_all(pipe: Any) -> None:
    told: list[tuple[int, int | None]] = []
    threads = set()

    def progress(done: int, total: int | None) -> None:
        told.append((done, total))
        threads.add(threading.get_ident())

    found = embed(pipe, batch_size=5, progress=progress)
    assert len(found) == len(TEXTS)
    assert told == [(5, 12), (7, 12), (12, 12)]  # the last two of 12 are the longest
    asyncio.run(pipe.acall(TEXTS, batch_size=6, progress=progress))
    assert told[3:] == [(6, 12), (12, 12)]
    assert threads == {threading.get_ident()}


def test_progress_of_a_stream_counts_the_results_and_knows_no_total(pipe: Any) -> None:
    told: list[tuple[int, int | None]] = []
    for number, _ in enumerate(
        embed(pipe, iter(TEXTS), window=4, progress=lambda *one: told.append(one)), 1
    ):
        assert told[-1] == (number, None)
    assert len(told) == len(TEXTS)


def test_progress_may_dispose_and_the_call_still_ends(pipe: Any) -> None:
    found = embed(pipe, batch_size=5, progress=lambda done, total: pipe.dispose())
    assert len(found) == len(TEXTS)
    assert pipe.state is ebbtide.State.DISPOSED


def test_an_error_of_progress_stops_the_call_and_comes_through(pipe: Any) -> None:
    stopped = threading.Event()

    def inside(number: int, token: CancelToken) -> None:
        if number == 2:
            token.attach(stopped.set)
            assert stopped.wait(30), "the call was never stopped"

    def progress(done: int, total: int | None) -> None:
        raise KeyError("progress")

    runs = Runs(pipe, inside)
    with pytest.raises(KeyError, match="progress"):
        embed(pipe, batch_size=1, progress=progress)
    pipe.dispose()
    assert len(runs.rows) <= 2


def test_progress_true_draws_a_bar_and_leaves_no_thread(
    pipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    embed(pipe)
    assert capsys.readouterr().err == ""
    before = threading.enumerate()
    embed(pipe, batch_size=5, progress=True)
    drawn = capsys.readouterr().err
    assert "12/12" in drawn
    assert "feature-extraction" in drawn
    list(embed(pipe, iter(TEXTS), progress=True))
    assert "12it" in capsys.readouterr().err
    assert threading.enumerate() == before


@pytest.mark.parametrize("progress", [None, 1, "yes"])
def test_a_progress_that_cannot_be_told_is_refused(pipe: Any, progress: Any) -> None:
    with pytest.raises(ebbtide.InputError, match="progress takes"):
        embed(pipe, progress=progress)


def test_ranking_tells_its_progress_too() -> None:
    told: list[tuple[int, int | None]] = []
    with ebbtide.pipeline("text-classification", MODELS / "bert" / "rank") as model:
        ranked = model.rank("tide", TEXTS, batch_size=6, progress=lambda *one: told.append(one))
    assert sorted(one["corpus_id"] for one in ranked) == list(range(12))
    assert told == [(6, 12), (12, 12)]
