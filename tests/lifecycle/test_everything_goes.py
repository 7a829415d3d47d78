"""4.3, 4.4 and 4.10: everything goes, whatever fails; loads; no copies."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import pickle
import threading
from pathlib import Path

import pytest

import ebbtide
from ebbtide import DisposalError, PipelineCancelledError, PipelineDisposedError, State
from ebbtide.cancellation import CancelToken
from ebbtide.memory import ledger as ledger_module
from ebbtide.models import text_encoder
from ebbtide.models.tokenizer import Tokenizer


def test_what_a_user_still_holds_is_empty_after_a_dispose(tiny_bert: Path) -> None:
    pipe = ebbtide.pipeline("feature-extraction", tiny_bert)
    tokenizer = pipe.tokenizer
    output = pipe("the sea")
    pipe.dispose()
    with pytest.raises(PipelineDisposedError, match="Make a new"):
        pipe("again")
    with pytest.raises(PipelineDisposedError, match="tokenizer"):
        tokenizer.ids("again")
    with pytest.raises(PipelineDisposedError):
        pipe.__enter__()
    assert pipe.memory.anonymous == 0
    assert "disposed" in repr(pipe)
    assert output.ndim == 3


def test_a_release_that_fails_skips_no_other_and_one_error_tells_all(waiting) -> None:
    pipe, session = waiting()
    tokenizer = pipe.tokenizer
    session.failing = RuntimeError("the driver is gone")
    with pytest.raises(DisposalError, match=r"1 of its releases failed.*driver is gone") as caught:
        pipe.dispose()
    assert [str(one) for one in caught.value.errors] == ["the driver is gone"]
    assert not caught.value.receipt.verified
    assert pipe.state is State.DISPOSED
    assert tokenizer.lease.value is None
    assert pipe.dispose() is caught.value.receipt


def test_descriptors_and_threads_are_as_before_a_pipeline(fresh_process) -> None:
    out = fresh_process(
        """
        import os, ebbtide
        def count():
            # A thread that has ended is listed a moment longer, so the least of many reads counts.
            threads = min(len(os.listdir("/proc/self/task")) for _ in range(500))
            return len(os.listdir("/proc/self/fd")), threads
        def cycle():
            with ebbtide.pipeline("feature-extraction", MODEL, session_options={"threads": 3}) as p:
                p(["the sea", "a longer one"])
        cycle()
        before = count()
        for _ in range(20):
            cycle()
        print(before == count())
        """
    )
    assert out.strip() == "True"


def test_a_load_that_fails_half_way_releases_what_it_had_loaded(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def fail(inputs, model):
        seen.append(len(ledger_module.ledger._entries))
        raise ebbtide.UnsupportedModelError("not this one", model=model)

    monkeypatch.setattr(text_encoder, "_check_inputs", fail)
    with pytest.raises(ebbtide.UnsupportedModelError, match="not this one"):
        ebbtide.pipeline("feature-extraction", tiny_bert)
    assert seen == [2], "a tokenizer and a session were loaded when it failed"
    assert ledger_module.ledger._entries == {}
    assert ebbtide.live() == []


def test_a_failed_load_ends_in_the_state_failed(tiny_bert: Path, monkeypatch) -> None:
    from ebbtide import factory

    made = []
    original = factory.Lifecycle

    def remember(*arguments):
        made.append(original(*arguments))
        return made[-1]

    monkeypatch.setattr(factory, "Lifecycle", remember)
    with pytest.raises(ebbtide.ModelNotFoundError):
        ebbtide.pipeline("feature-extraction", tiny_bert, dtype="q2")
    assert made[0].state is State.FAILED


def test_a_load_that_is_cancelled_stops_between_its_steps_and_releases(
    tiny_bert: Path, monkeypatch
) -> None:
    loading = threading.Event()
    go = threading.Event()
    original = Tokenizer.load

    def slow(*arguments):
        tokenizer = original(*arguments)
        loading.set()
        assert go.wait(30)
        return tokenizer

    monkeypatch.setattr(Tokenizer, "load", slow)
    outcome: list[BaseException] = []

    def load() -> None:
        try:
            ebbtide.pipeline("feature-extraction", tiny_bert)
        except ebbtide.EbbtideError as error:
            outcome.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    assert loading.wait(30)
    from ebbtide.lifecycle import _live

    for lifecycle in tuple(_live.values()):
        lifecycle.request(cancel=True)
        for token in tuple(lifecycle.running):
            token.cancel()
    go.set()
    thread.join(30)
    assert isinstance(outcome[0], PipelineCancelledError)
    assert ledger_module.ledger._entries == {}


def test_a_session_that_is_being_loaded_is_cancelled_natively(tiny_bert: Path) -> None:
    from ebbtide.runtime import SessionOptions, open_session

    token = CancelToken("load")
    token.cancel()
    with pytest.raises(PipelineCancelledError):
        open_session(tiny_bert / "onnx/model.onnx", "cpu", SessionOptions(), token)


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_pipeline_refuses_to_be_copied_or_pickled_and_names_what_to_do(
    tiny_bert: Path, way
) -> None:
    with (
        ebbtide.pipeline("feature-extraction", tiny_bert) as pipe,
        pytest.raises(ebbtide.NotTransferableError, match=r"isolate=.*PipelineManager"),
    ):
        way(pipe)


def test_a_whole_life_makes_no_reference_cycle(tiny_bert: Path) -> None:
    """With the collector off, nothing of Ebbtide's is left for it: release is by reference."""

    def life() -> None:
        pipe = ebbtide.pipeline("feature-extraction", tiny_bert)
        pipe(["the sea", "a longer text"], pooling="mean")
        list(pipe(iter(["one", "two"]), pooling="mean"))
        with contextlib.suppress(ebbtide.InputError):
            pipe(None)  # type: ignore[call-overload]
        with contextlib.suppress(ebbtide.InputError):
            pipe("a \ud800 lone surrogate")
        pipe.dispose()
        with contextlib.suppress(PipelineDisposedError):
            pipe("refused")

    life()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        life()
        gc.collect()
        ours = [
            one
            for one in gc.garbage
            if type(one).__module__.startswith(("ebbtide", "onnxruntime", "tokenizers"))
        ]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert ours == []


def test_memory_comes_back_while_the_caller_holds_everything(fresh_process) -> None:
    """The pipeline, its tokenizer, an output, a caught exception, a suspended stream; no gc."""
    out = fresh_process(
        """
        import gc, ebbtide
        from ebbtide.memory import anonymous_bytes
        gc.disable()
        def life(held):
            pipe = ebbtide.pipeline("feature-extraction", MODEL)
            stream = pipe(iter(["one", "two"]), pooling="mean")
            try:
                pipe(["fine", "a \\ud800 lone surrogate"])
            except ebbtide.InputError as error:
                held.append(error)
            for size in (1, 8, 64):
                output = pipe(["word " * 100] * size, pooling="mean", batch_size=64)
            held += [pipe, pipe.tokenizer, output, stream, next(stream)]
            loaded = anonymous_bytes()
            receipt = pipe.dispose(collect=False)
            return loaded - anonymous_bytes(), receipt
        held = []
        life(held)
        before = anonymous_bytes()
        released, receipt = life(held)
        kept = anonymous_bytes() - before
        assert released > 5e6, released
        assert kept <= 1e6, kept
        print(receipt.verified, receipt.quiet, len(held))
        """
    )
    assert out.split() == ["True", "True", "12"]


def test_memory_comes_back_after_sixteen_threads_alive_or_ended(fresh_process) -> None:
    out = fresh_process(
        """
        import random, threading, ebbtide
        from ebbtide.memory import anonymous_bytes
        def life(alive):
            pipe = ebbtide.pipeline("feature-extraction", MODEL)
            go = threading.Event()
            done = threading.Barrier(17)
            def work(seed):
                dice = random.Random(seed)
                for _ in range(6):
                    pipe(["word " * dice.randint(1, 200)] * dice.randint(1, 16), pooling="mean")
                done.wait()
                if alive:
                    go.wait()
            threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
            for thread in threads:
                thread.start()
            done.wait()
            if not alive:
                for thread in threads:
                    thread.join()
            loaded = anonymous_bytes()
            pipe.dispose()
            left = anonymous_bytes()
            go.set()
            for thread in threads:
                thread.join()
            return loaded - left, left
        life(True)
        _, before = life(True)
        for alive in (True, False, True):
            released, left = life(alive)
            assert released > 5e6, released
            assert left - before <= 1e6, left - before
        print("back")
        """
    )
    assert out.strip() == "back"


def test_files_that_were_mapped_are_closed(tiny_bert: Path) -> None:
    model = tiny_bert.parent / "tiny-external"
    with ebbtide.pipeline("feature-extraction", model) as pipe:
        pipe("the sea")
    assert "tiny-external" not in Path("/proc/self/maps").read_text()
    fds = (os.path.join("/proc/self/fd", one) for one in os.listdir("/proc/self/fd"))
    assert not [one for one in fds if os.path.exists(one) and "tiny-external" in os.readlink(one)]
