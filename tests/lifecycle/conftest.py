"""A pipeline whose native run waits until the test lets it go on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ebbtide.cancellation import CancelToken
from ebbtide.factory import creation_site
from ebbtide.hub import ModelFiles
from ebbtide.lifecycle import Lifecycle, State
from ebbtide.memory.ledger import Native, ledger
from ebbtide.memory.reaper import reaper
from ebbtide.models.config import ModelConfig
from ebbtide.models.loading import Loaded
from ebbtide.models.text_encoder import FEATURES, TextEncoder
from ebbtide.models.tokenizer import Tokenizer
from ebbtide.pipelines.feature_extraction import FeatureExtractionPipeline
from ebbtide.runtime import TensorInfo, native_threads
from ebbtide.runtime.devices import Device


class WaitingSession(Native):
    """A session whose run waits for `go`, or for its call's cancellation, as a native one does."""

    inputs = (TensorInfo("input_ids", "int64", ("batch", "tokens")),)
    outputs = (TensorInfo("last_hidden_state", "float32", ("batch", "tokens", 4)),)
    device = Device("cpu")

    def __init__(self, inside: Callable[[], None] | None = None) -> None:
        self.go = threading.Event()
        self.entered = threading.Semaphore(0)
        self.inside = inside
        self.closed = 0
        self.failing: Exception | None = None

    def tokens_that_fit(self, length: int, most: int) -> int:
        return most

    def run(
        self, feeds: Mapping[str, Any], outputs: Sequence[str], token: CancelToken
    ) -> list[Any]:
        wake = threading.Event()
        token.attach(wake.set)
        token.attach(self.go.set)
        self.entered.release()
        if self.inside is not None:
            self.inside()
            token.check()
        else:
            assert self.go.wait(30), "the test never let the run go on"
        token.detach(self.go.set)
        token.detach(wake.set)
        token.check()
        return [np.zeros((*feeds["input_ids"].shape, 4), np.float32)]

    def close(self) -> Sequence[Any]:
        self.closed += 1
        if self.failing is not None:
            raise self.failing
        return ()

    def leak(self) -> None:
        pass


def make(session: WaitingSession, folder: Path) -> FeatureExtractionPipeline:
    """A pipeline over a session of the test's own and a real tokenizer."""
    reaper.start()
    files = ModelFiles("waiting", folder)
    config = ModelConfig.read(files)
    lifecycle = Lifecycle("The waiting pipeline", reaper, creation_site())
    token = CancelToken("load")

    def load() -> TextEncoder:
        tokenizer = Tokenizer.load(files, config, token)
        lease = ledger.acquire(id(session), "session", lambda: session, CancelToken("test"))
        lifecycle.resources += [tokenizer.lease, lease]
        return TextEncoder(
            Loaded("waiting", config, tokenizer, {"model": lease}, "fp32", lifecycle.label),
            FEATURES,
        )

    encoder = native_threads.submit(load, token, lambda: None).wait()
    pipe = FeatureExtractionPipeline(lifecycle, encoder)
    lifecycle.state = State.READY
    return pipe


@pytest.fixture
def waiting(tiny_bert: Path) -> Callable[..., tuple[FeatureExtractionPipeline, WaitingSession]]:
    def build(
        inside: Callable[[], None] | None = None,
    ) -> tuple[FeatureExtractionPipeline, WaitingSession]:
        session = WaitingSession(inside)
        return make(session, tiny_bert), session

    return build


class Call(threading.Thread):
    """One call on a thread of its own; `outcome` is what it gave or raised."""

    def __init__(self, pipe: FeatureExtractionPipeline, text: str = "the sea") -> None:
        super().__init__(daemon=True)
        self.pipe = pipe
        self.text = text
        self.outcome: Any = None
        self.start()

    def run(self) -> None:
        try:
            self.outcome = self.pipe(self.text)
        except BaseException as error:
            self.outcome = error

    def end(self) -> Any:
        self.join(30)
        assert not self.is_alive(), "the call never ended"
        return self.outcome


@pytest.fixture
def call() -> type[Call]:
    return Call
