"""The states of a pipeline, and every way from one to another."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import ebbtide
from ebbtide import PipelineCancelledError, PipelineDisposedError, State, runtime
from ebbtide.lifecycle import Lifecycle, _live
from ebbtide.memory import reaper as reaper_module
from ebbtide.memory.ledger import ledger
from ebbtide.models.tokenizer import Tokenizer


class Loading(threading.Thread):
    """A load that has its tokenizer, and waits before it goes on to its session."""

    def __init__(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(daemon=True)
        self.model = model
        self.go = threading.Event()
        self.reached = threading.Event()
        self.outcome: Any = None
        original = Tokenizer.load

        def slow(*arguments: Any) -> Any:
            tokenizer = original(*arguments)
            self.reached.set()
            assert self.go.wait(30), "the test never let the load go on"
            return tokenizer

        monkeypatch.setattr(Tokenizer, "load", slow)
        self.start()
        assert self.reached.wait(30)
        (self.lifecycle,) = _live.values()

    def run(self) -> None:
        try:
            self.outcome = ebbtide.pipeline("feature-extraction", self.model)
        except BaseException as error:
            self.outcome = error

    def end(self) -> Any:
        self.go.set()
        self.join(30)
        assert not self.is_alive()
        return self.outcome


def _refuses(pipe: Any, match: str) -> None:
    """Every way in is shut, with one and the same reason."""

    async def enter() -> None:
        async with pipe:
            raise AssertionError("it let a user in")

    with pytest.raises(PipelineDisposedError, match=match):
        pipe("refused")
    with pytest.raises(PipelineDisposedError, match=match), pipe:
        raise AssertionError("it let a user in")
    with pytest.raises(PipelineDisposedError, match=match):
        asyncio.run(enter())
    with pytest.raises(PipelineDisposedError, match=match):
        asyncio.run(pipe.acall("refused"))
    with pytest.raises(PipelineDisposedError, match=match):
        next(pipe(iter(["refused"])))


def test_a_load_that_succeeds_goes_from_loading_to_ready(tiny_bert: Path, monkeypatch) -> None:
    loading = Loading(tiny_bert, monkeypatch)
    lifecycle = loading.lifecycle
    assert lifecycle.state is State.LOADING
    assert ebbtide.live() == [], "nobody has it yet"
    assert ebbtide.dispose_all() == []
    pipe = loading.end()
    assert pipe.state is lifecycle.state is State.READY
    assert ebbtide.live() == [pipe]
    pipe.dispose()


def test_a_load_that_fails_goes_from_loading_to_failed(tiny_bert: Path, monkeypatch) -> None:
    loading = Loading(tiny_bert, monkeypatch)

    def fail(*_: Any, **__: Any) -> None:
        raise ebbtide.LoadError("the file is damaged", path="model.onnx")

    monkeypatch.setattr(runtime, "acquire", fail)
    assert isinstance(loading.end(), ebbtide.LoadError)
    assert loading.lifecycle.state is State.FAILED
    assert loading.lifecycle.receipt is not None
    assert ebbtide.live() == []
    assert _live == {}
    assert ledger._entries == {}


def test_a_load_that_is_cancelled_goes_through_disposing_to_failed(
    tiny_bert: Path, monkeypatch
) -> None:
    loading = Loading(tiny_bert, monkeypatch)
    lifecycle = loading.lifecycle
    lifecycle.request(cancel=True)
    assert lifecycle.state is State.DISPOSING
    assert ebbtide.live() == []
    assert isinstance(loading.end(), PipelineCancelledError)
    assert lifecycle.state is State.FAILED
    assert ledger._entries == {}


def test_a_load_that_outlasts_its_disposal_still_releases_what_it_loads(
    tiny_bert: Path, monkeypatch
) -> None:
    """The receipt came after the grace; what the load then brings in has no other owner."""
    monkeypatch.setattr(reaper_module, "GRACE", 0.0)
    loading = Loading(tiny_bert, monkeypatch)
    lifecycle = loading.lifecycle
    lifecycle.request(cancel=True)
    assert "had not ended" in str(lifecycle.wait())
    assert isinstance(loading.end(), PipelineCancelledError)
    reaper_module.reaper.call(lambda: None)
    left = [entry.kind for entry in ledger._entries.values()]
    for resource in tuple(lifecycle.resources):
        resource.release()  # so that no other test finds them
    assert left == []


def test_a_dispose_goes_from_ready_through_disposing_to_disposed(waiting, call) -> None:
    pipe, session = waiting()
    assert pipe.state is State.READY
    assert ebbtide.live() == [pipe]
    with pipe:
        assert "waiting' ready on cpu in fp32" in repr(pipe)
        running = call(pipe)
        session.entered.acquire()
        disposing = threading.Thread(target=pipe.dispose)
        disposing.start()
        while pipe.state is State.READY:
            time.sleep(0)
        assert pipe.state is State.DISPOSING
        assert repr(pipe) == "<FeatureExtractionPipeline 'waiting' disposing>"
        assert ebbtide.live() == [pipe], "it still holds memory"
        _refuses(pipe, "is disposing")
        session.go.set()
        disposing.join(30)
    running.end()
    assert pipe.state is State.DISPOSED
    assert repr(pipe) == "<FeatureExtractionPipeline 'waiting' disposed>"
    assert ebbtide.live() == []
    _refuses(pipe, "is disposed")


@pytest.mark.parametrize("cancel", [False, True])
def test_disposed_is_the_end(tiny_bert: Path, cancel: bool) -> None:
    pipe = ebbtide.pipeline("feature-extraction", tiny_bert)
    receipt = pipe.dispose()
    for _ in range(3):
        assert pipe.dispose(cancel=cancel, timeout=0, collect=False) is receipt
        assert asyncio.run(pipe.adispose(cancel=cancel)) is receipt
        pipe._lifecycle.request(forgotten=True)
        assert pipe.state is State.DISPOSED
    assert ebbtide.dispose_all() == []


def test_a_ready_pipeline_says_what_it_is_and_takes(tiny_bert: Path) -> None:
    with ebbtide.pipeline("feature-extraction", tiny_bert, dtype="q8") as pipe:
        assert repr(pipe) == (
            f"<FeatureExtractionPipeline {str(tiny_bert)!r} ready on cpu in q8,"
            f" {pipe.memory.anonymous / 1e6:.1f} MB (original)>"
        )


def test_live_has_the_oldest_first_and_only_what_is_not_disposed(tiny_bert: Path) -> None:
    pipes = [ebbtide.pipeline("feature-extraction", tiny_bert) for _ in range(4)]
    assert ebbtide.live() == pipes
    pipes[1].dispose()
    assert ebbtide.live() == [pipes[0], pipes[2], pipes[3]]
    pipes.append(ebbtide.pipeline("feature-extraction", tiny_bert))
    assert ebbtide.live()[-1] is pipes[-1]
    for pipe in pipes:
        pipe.dispose()
    assert ebbtide.live() == []


@pytest.mark.parametrize("state", list(State))
def test_only_a_pipeline_that_is_ready_or_asleep_lets_a_call_in(state: State) -> None:
    from ebbtide.cancellation import CancelToken

    class Nobody:
        def request(self, request: Any) -> None:
            raise AssertionError("nothing was to be disposed")

        def drained(self, lifecycle: Any) -> None:
            woken.append(lifecycle)

    woken: list[Any] = []
    lifecycle = Lifecycle("The pipeline", Nobody(), ("here", 1))
    _live.pop(id(lifecycle))
    lifecycle.state = state
    token = CancelToken("call")
    if state in (State.READY, State.SLEEPING):
        lifecycle.enter(token)
        assert lifecycle.running == {token: None}
        lifecycle.leave(token)
    else:
        with pytest.raises(PipelineDisposedError, match=r"after the fork|Make a new one"):
            lifecycle.enter(token)
    assert lifecycle.running == {}
    assert woken == ([lifecycle] if state is State.DISPOSING else [])


def test_a_fork_makes_every_pipeline_of_the_child_inherited_whatever_its_state(
    fresh_process,
) -> None:
    out = fresh_process(
        """
        import os, threading, warnings, ebbtide
        from ebbtide.lifecycle import _live
        from ebbtide.models.tokenizer import Tokenizer
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        ready = ebbtide.pipeline("feature-extraction", MODEL)
        gone = ebbtide.pipeline("feature-extraction", MODEL)
        gone.dispose()
        draining = ebbtide.pipeline("feature-extraction", MODEL)
        session, run = draining._model._session.value, draining._model._session.value.run
        inside, go = threading.Event(), threading.Event()
        def held(*arguments):
            inside.set()
            go.wait(30)
            return run(*arguments)
        session.run = held
        calling = threading.Thread(target=draining, args=("the sea",))
        calling.start()
        inside.wait(30)
        disposing = threading.Thread(target=draining.dispose)
        disposing.start()
        while draining.state is ebbtide.State.READY:
            pass
        reached, load = threading.Event(), Tokenizer.load
        def slow(*arguments):
            tokenizer = load(*arguments)
            reached.set()
            go.wait(30)
            return tokenizer
        Tokenizer.load = slow
        def make():
            ebbtide.pipeline("feature-extraction", MODEL).dispose()
        loading = threading.Thread(target=make)
        loading.start()
        reached.wait(30)
        lives = [life for life in _live.values()]
        child = os.fork()
        if child == 0:
            print([life.state.value for life in lives], gone.state.value, ebbtide.live())
            print(repr(ready).endswith("inherited>"), repr(draining).endswith("inherited>"))
            for pipe in (ready, draining):
                for way in (pipe, pipe.__enter__):
                    try:
                        way(*["refused"] * (way is pipe))
                    except ebbtide.PipelineInheritedError as error:
                        print("after the fork" in str(error))
                receipt = pipe.dispose()
                print(receipt.released, receipt.verified, receipt.reasons)
            raise SystemExit(3)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        go.set()
        for thread in (calling, disposing, loading):
            thread.join()
        print(code, ready.state.value, draining.state.value)
        ready.dispose()
        """
    )
    lines = out.splitlines()
    assert lines[0] == "['inherited', 'inherited', 'inherited'] disposed []"
    assert lines[1] == "True True"
    assert lines[2:4] == lines[5:7] == ["True", "True"]
    assert lines[4].startswith("0 False ('The feature-extraction pipeline over")
    assert "inherited through a fork" in lines[4]
    assert lines[-1] == "3 ready disposed"
