"""A pipeline in a process of its own is the same to whoever calls it."""

from __future__ import annotations

import asyncio
import copy
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.workers.watched import until

import ebbtide
from ebbtide.pipelines import TASKS, Pipeline
from ebbtide.workers.isolated import Isolated, class_of
from ebbtide.workers.options import IsolateOptions

MODELS = Path(__file__).parent.parent / "models"

CALLS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "feature-extraction": ("tiny-bert", (["the sea", "tide"],), {"pooling": "mean"}),
    "text-classification": ("roberta/sequence", ("the sea",), {"top_k": None}),
    "token-classification": ("roberta/token", (["the sea", "tide"],), {}),
    "question-answering": ("roberta/span", ("what goes out?", "the tide goes out"), {}),
    "fill-mask": ("roberta/mask", ("the <mask> goes out",), {"top_k": 2}),
    "zero-shot-classification": ("roberta/nli", ("the sea", ["wet", "dry"]), {}),
    "text-generation": ("gen-llama", ("The tide",), {"max_new_tokens": 4}),
    "text2text-generation": ("gen-t5", ("The tide",), {"max_new_tokens": 4}),
    "summarization": ("gen-bart", ("The tide",), {"max_new_tokens": 4}),
    "translation": ("gen-marian", ("The tide",), {"max_new_tokens": 4}),
}


@pytest.fixture(scope="module")
def embed() -> Iterator[Any]:
    with ebbtide.pipeline("feature-extraction", MODELS / "tiny-bert", isolate=True) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def write() -> Iterator[Any]:
    with ebbtide.pipeline("text-generation", MODELS / "gen-llama", isolate=True) as pipe:
        yield pipe


@pytest.fixture(autouse=True)
def _no_pipeline_is_leaked(request: pytest.FixtureRequest) -> Iterator[None]:
    """As everywhere, but for the pipelines that the tests here share."""
    shared = {id(request.getfixturevalue(name)) for name in ("embed", "write")}
    yield
    left = [one for one in ebbtide.live() if id(one) not in shared]
    for one in left:
        one.dispose(cancel=True)
    assert not left, f"the test left pipelines: {left}"


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.allclose(one, other, atol=1e-6)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    return bool(one == pytest.approx(other) if isinstance(one, float) else one == other)


@pytest.mark.parametrize("task", TASKS)
def test_each_task_gives_there_what_it_gives_here(task: str) -> None:
    model, arguments, options = CALLS[task]
    with ebbtide.pipeline(task, MODELS / model) as here:
        expected = here(*arguments, **options)
        with ebbtide.pipeline(task, MODELS / model, isolate=True) as there:
            assert isinstance(there, type(here))
            assert equal(there(*arguments, **options), expected)
            assert (there.task, there.model, there.device, there.dtype) == (
                here.task, here.model, here.device, here.dtype,
            )  # fmt: skip
            assert getattr(there, "mask_token", None) == getattr(here, "mask_token", None)


@pytest.mark.parametrize("task", TASKS)
def test_everything_public_of_a_task_is_carried(task: str) -> None:
    of_the_class = {"load", "read", "task", "outputs", "stems", "extra_files", "key"}
    inside = {"guesses"}  # of an assistant, which does not cross
    isolated = class_of(TASKS[task].pipeline)
    for name in {"__call__", *dir(isolated)} - of_the_class - inside:
        if name == "__call__" or not name.startswith("_"):
            owner = next(one for one in isolated.__mro__ if name in vars(one))
            here = issubclass(owner, Pipeline) and not issubclass(owner, Isolated)
            assert not here, f"{name} of {task} would run on this side, which has no model"


def test_its_memory_is_another_processs(embed: Any) -> None:
    memory = embed.memory
    assert embed.pid not in (None, os.getpid())
    assert memory.anonymous == memory.exclusive == embed._lifecycle.charged > 5_000_000
    assert [one.kind for one in memory.holdings] == ["tokenizer", "session"]
    assert f"in process {embed.pid}" in repr(embed)
    assert embed in ebbtide.live()


def test_an_error_comes_with_its_class_its_values_and_the_childs_traceback(embed: Any) -> None:
    with pytest.raises(ebbtide.InputError, match="Did you mean 'mean'") as caught:
        embed("the sea", pooling="meen")
    assert (caught.value.value, caught.value.nearest) == ("meen", "mean")
    assert "feature_extraction.py" in caught.value.__notes__[-1]
    with pytest.raises(ebbtide.OptionError):
        embed("the sea", poolin="mean")
    with pytest.raises(TypeError):
        embed()


def test_a_load_that_fails_raises_what_it_would_raise_here(tmp_path: Path) -> None:
    with pytest.raises(ebbtide.ModelNotFoundError) as caught:
        ebbtide.pipeline("feature-extraction", tmp_path / "none", isolate=True)
    assert "In the worker process" in caught.value.__notes__[-1]
    with pytest.raises(ebbtide.OptionError):
        ebbtide.pipeline("feature-extraction", MODELS / "tiny-bert", isolate=True, devise="cpu")


@pytest.mark.parametrize("isolate", ["yes", 3, {"start": "spawn"}])
def test_isolate_takes_true_false_or_options(isolate: Any) -> None:
    with pytest.raises(ebbtide.InputError, match="isolate takes"):
        ebbtide.pipeline("feature-extraction", MODELS / "tiny-bert", isolate=isolate)


@pytest.mark.parametrize(
    "options",
    [
        {"memory_limit": "much"}, {"memory_limit": 0}, {"memory_limit": -5},
        {"memory_limit": True}, {"start": "fork"}, {"restart": "always"}, {"idle": -1},
        {"idle": "5"}, {"idle": True},
    ],
)  # fmt: skip
def test_an_option_that_cannot_be_used_is_refused(options: Any) -> None:
    with pytest.raises(ebbtide.InputError):
        IsolateOptions(**options)


def test_where_nothing_is_isolated_nothing_of_it_is_imported(fresh_process: Any) -> None:
    fresh_process(
        """
        import sys, ebbtide
        with ebbtide.pipeline("feature-extraction", MODEL, isolate=False) as embed:
            embed("the sea")
        assert not [one for one in sys.modules if one.startswith("ebbtide.workers")]
        """
    )


def test_an_iterator_is_answered_as_it_is_read(embed: Any) -> None:
    taken = []

    def texts() -> Iterator[str]:
        for text in ("the", "sea", "tide"):
            taken.append(text)
            yield text

    results = embed(texts(), pooling="mean")
    first = next(results)
    assert taken == ["the"]
    assert first.shape == (1, 32)
    assert len(list(results)) == 2


def test_progress_is_told_on_the_callers_thread(embed: Any) -> None:
    told = []
    embed(
        ["the sea"] * 5,
        batch_size=2,
        progress=lambda *event: told.append((threading.get_ident(), *event)),
    )
    assert told == [(threading.get_ident(), done, 5) for done in (2, 4, 5)]


def test_what_a_progress_function_raises_ends_the_call(embed: Any) -> None:
    def stop(done: int, total: int | None) -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        embed(["the sea"] * 3, progress=stop)
    assert embed("the sea").shape == (1, 4, 32)


def test_large_arrays_go_both_ways_and_may_be_written_to(embed: Any) -> None:
    value = np.random.default_rng(7).random((1000, 1000))
    found = embed.echo([value, value[0]])
    assert (found[0] == value).all()
    found[0][:] = 0
    assert embed.echo("x" * 1_000_000) == "x" * 1_000_000


def test_calls_from_many_threads_get_their_own_answers(embed: Any) -> None:
    wrong = []

    def work(number: int) -> None:
        given = [[number, step] for step in range(20)]
        wrong.extend(one for one in given if embed.echo(one) != one)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong


def test_a_stream_gives_the_pieces_that_it_gives_here(write: Any) -> None:
    with ebbtide.pipeline("text-generation", MODELS / "gen-llama") as here:
        expected = list(here.stream("The tide", max_new_tokens=6))
    with write.stream("The tide", max_new_tokens=6) as stream:
        assert list(stream) == expected
    text = "".join(map(str, expected))
    assert stream.result == {"generated_text": "The tide" + text}


def test_a_stream_that_cannot_be_is_refused_at_once(write: Any) -> None:
    with pytest.raises(ebbtide.InputError, match="one input"):
        write.stream(["a", "b"])


def test_a_streamer_is_told_on_the_callers_thread(write: Any) -> None:
    told: list[Any] = []
    write(
        "The tide", max_new_tokens=3,
        streamer=lambda piece: told.append((threading.get_ident(), type(piece).__name__)),
    )  # fmt: skip
    assert told == [(threading.get_ident(), "Piece")] * 3


def test_who_stops_reading_a_stream_stops_the_writing(write: Any) -> None:
    stream = write.stream("The tide", max_new_tokens=400)
    next(stream)
    stream.close()
    until(lambda: stream._token not in write._lifecycle.running)
    assert stream.result is None
    stream = write.stream("The tide", max_new_tokens=400)
    stream.cancel()
    with pytest.raises(ebbtide.PipelineCancelledError):
        list(stream)


@pytest.mark.parametrize(
    "option", ["logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"]
)
def test_a_function_that_cannot_cross_is_refused_and_named(write: Any, option: str) -> None:
    with pytest.raises(ebbtide.InputError, match=f"{option} takes functions"):
        write("The tide", **{option: [lambda *given: given[-1]]})


def test_an_assistant_that_cannot_cross_is_refused(write: Any) -> None:
    with pytest.raises(ebbtide.InputError, match="assistant_model is a pipeline of this process"):
        write("The tide", assistant_model=write)


def test_a_form_that_is_a_class_is_read_on_this_side(write: Any) -> None:
    pytest.importorskip("llguidance")
    pydantic = pytest.importorskip("pydantic")
    model = pydantic.create_model("Level", a=(int, ...))
    (found,) = write("The tide", structured=model, max_new_tokens=30)
    assert isinstance(found["parsed"], model)
    (found,) = write("The tide", structured=["ebb", "flow"], max_new_tokens=20)
    assert found["parsed"] in ("ebb", "flow")


def test_tools_that_are_functions_cross_as_their_schemas(write: Any) -> None:
    def tide(place: str) -> str:
        """Say when the tide is high.

        Args:
            place: Where.
        """
        return place

    chat = [{"role": "user", "content": "Is it high tide?"}]
    assert write(chat, tools=[tide], max_new_tokens=2)[0]["generated_text"][0] == chat[0]
    assert "[INST]" in write.chat_template.render(chat)


def test_its_tokenizer_is_said_to_be_elsewhere(embed: Any) -> None:
    with pytest.raises(ebbtide.NotTransferableError, match="without isolate="):
        _ = embed.tokenizer
    with pytest.raises(ebbtide.NotTransferableError):
        copy.copy(embed)


def test_an_event_loop_is_answered_too(embed: Any, write: Any) -> None:
    async def work() -> None:
        found = await asyncio.gather(*(embed.acall("the sea", pooling="mean") for _ in range(20)))
        assert {one.shape for one in found} == {(1, 32)}
        told: list[int] = []
        await embed.acall(["a", "b"], progress=lambda done, total: told.append(done))
        assert told[-1] == 2
        results = await embed.acall(iter(["a", "b", "c"]), pooling="mean", batch_size=2)
        assert [one.shape async for one in results] == [(1, 32)] * 3
        pieces = [piece async for piece in write.astream("The tide", max_new_tokens=3)]
        assert len(pieces) == 3
        with pytest.raises(ebbtide.InputError):
            await embed.acall("a", pooling="meen")
        with pytest.raises(ebbtide.InputError):
            await anext(write.astream(["a", "b"]))

    asyncio.run(work())


def test_a_task_that_is_cancelled_cancels_the_call_there(
    strange: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = strange()

    async def work() -> None:
        task = asyncio.create_task(pipe._made("wait", (), {}).result())
        while "waiting now" not in caplog.text:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not pipe._lifecycle.running

    asyncio.run(work())
    assert pipe("the sea").shape == (1, 4, 32)


def test_sleeping_and_waking_happen_there() -> None:
    with ebbtide.pipeline("feature-extraction", MODELS / "tiny-bert", isolate=True) as embed:
        expected = embed("the sea")
        receipt = embed.sleep()
        assert receipt.charged > 0
        assert embed.state is ebbtide.State.SLEEPING
        embed.wake()
        assert embed.state is ebbtide.State.READY
        embed.sleep(deep=True)
        assert (embed("the sea") == expected).all()
        assert embed.state is ebbtide.State.READY

        async def nap() -> None:
            await embed.asleep()
            assert embed.state is ebbtide.State.SLEEPING
            await embed.awake()

        asyncio.run(nap())
        assert embed.state is ebbtide.State.READY


def test_a_dispose_tells_of_both_processes() -> None:
    embed = ebbtide.pipeline("feature-extraction", MODELS / "tiny-bert", isolate=True)
    embed("the sea")
    pid = embed.pid
    receipt = embed.dispose()
    assert receipt.verified
    assert receipt.released == receipt.charged > 5_000_000
    assert receipt.retained == 0
    assert f"pid {pid}) ended with exit status 0" in receipt.reasons[0]
    assert receipt.reasons[1].startswith("there: released")
    assert embed.dispose() is receipt
    assert not Path(f"/proc/{pid}").exists()
    assert embed.memory.anonymous == 0
    with pytest.raises(ebbtide.PipelineDisposedError):
        embed("the sea")
    assert "disposed" in repr(embed)


def test_a_dispose_cancels_what_runs(strange: Any, caplog: pytest.LogCaptureFixture) -> None:
    pipe, errors = strange(), []

    def work() -> None:
        try:
            pipe._made("wait", (), {}).wait()
        except ebbtide.EbbtideError as error:
            errors.append(type(error))

    thread = threading.Thread(target=work)
    thread.start()
    until(lambda: "waiting now" in caplog.text)
    receipt = pipe.dispose(cancel=True)
    thread.join()
    assert errors == [ebbtide.PipelineCancelledError]
    assert any(one.startswith("there: ") for one in receipt.reasons)


def test_a_dispose_that_interrupts_the_handing_over_of_a_call_does_not_wait_for_it(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = ebbtide.pipeline("feature-extraction", tiny_bert, isolate=True)
    receipts = []
    submit = pipe._worker.submit

    def interrupted(call: Any) -> None:
        receipts.append(pipe.dispose(timeout=1000))
        submit(call)

    monkeypatch.setattr(pipe._worker, "submit", interrupted)
    with pytest.raises(ebbtide.PipelineCancelledError):
        pipe("the sea")
    assert "unwinds" in str(receipts[0])
    assert pipe.dispose().verified


def test_it_is_disposed_with_all_others_and_where_it_is_forgotten() -> None:
    import gc

    ebbtide.pipeline("feature-extraction", MODELS / "tiny-bert", isolate=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        gc.collect()
        ebbtide.memory.reclaim()
    assert any("without dispose()" in str(one.message) for one in told)


def test_a_load_tells_its_progress(tiny_bert: Path) -> None:
    told: list[Any] = []
    with ebbtide.pipeline("feature-extraction", tiny_bert, isolate=True, progress=told.append):
        assert told[-1]["status"] == "ready"
    assert told[-1]["model"] == str(tiny_bert)

    async def load() -> None:
        options: Any = {"isolate": True, "progress": told.append}
        async with await ebbtide.apipeline("feature-extraction", tiny_bert, **options):
            assert len(told) == 2

    asyncio.run(load())


def test_a_load_that_nobody_waits_for_tells_its_end(tiny_bert: Path) -> None:
    from ebbtide import factory

    ended, pipes = threading.Event(), []
    load = factory.begin("feature-extraction", tiny_bert, {"isolate": True}, ("here", 1))

    def take() -> None:
        pipes.append(load.outcome())
        ended.set()

    load.on_done(take)
    assert ended.wait(10)
    with pipes[0] as embed:
        assert embed("the sea").shape == (1, 4, 32)


def test_a_load_that_is_cancelled_leaves_no_process(tiny_bert: Path) -> None:
    async def load() -> None:
        task = asyncio.create_task(ebbtide.apipeline("feature-extraction", tiny_bert, isolate=True))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(load())


def test_settings_and_the_folder_are_those_of_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    shutil.copytree(MODELS / "tiny-bert", tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ebbtide.settings, "offline", True)
    with ebbtide.pipeline("feature-extraction", "here", isolate=True) as embed:
        assert embed.model == "here"
