"""The demo's work: embed the passages, answer the questions, and measure all the while.

Every figure is a reading of `ebbtide.memory.anonymous_bytes` in this process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

import ebbtide
from ebbtide import runtime
from ebbtide.cli.demo.minilm import NAME
from ebbtide.memory import anonymous_bytes, reclaim
from ebbtide.pipelines.feature_extraction import FeatureExtractionPipeline
from ebbtide.receipts import DisposalReceipt

QUESTIONS: Final = (
    "What is it like to be homesick for the ocean?",
    "Is it wise to draw conclusions early?",
    "Will computers ever have ideas of their own?",
    "Should dissent be censored?",
)
"""None shares a word that matters with the passage it should find."""

BEST: Final = 2
ROUNDS: Final = 5
ROUND_PASSAGES: Final = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Passage:
    """A few lines of a book whose copyright has ended."""

    author: str
    work: str
    year: int
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """A passage, and how near its meaning is to the question's (cosine, at most 1)."""

    score: float
    passage: Passage


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What was found for a question, the nearest first."""

    question: str
    found: tuple[Found, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Life:
    """Anonymous bytes of the process over one pipeline's life.

    Attributes:
        loaded: With the model loaded.
        working: After the last call, before the disposal.
        disposed: After the disposal.
        receipt: What the disposal says of itself.
    """

    loaded: int
    working: int
    disposed: int
    receipt: DisposalReceipt


@dataclasses.dataclass(frozen=True, slots=True)
class Story:
    """All that the demo tells.

    Attributes:
        start: Anonymous bytes before the first model: Python, Ebbtide and ONNX Runtime, started.
        life: The life that answered the questions.
        rounds: The same model loaded, run and disposed again.
        prepared: Its life from its prepared copy; None where none could be made.
        embedding_seconds: What embedding all passages took.
    """

    start: int
    life: Life
    rounds: tuple[Life, ...]
    prepared: Life | None
    embedding_seconds: float

    @property
    def drift(self) -> int:
        """Bytes by which the process grew from the first disposal to the last one."""
        return self.rounds[-1].disposed - self.life.disposed


def passages() -> list[Passage]:
    """The passages that come with the demo."""
    text = (Path(__file__).parent / "passages.json").read_text(encoding="utf-8")
    return [Passage(**one) for one in json.loads(text)]


@contextlib.contextmanager
def _settings_of_its_own() -> Iterator[None]:
    """Have nothing happen beside the story: no copy is made, nor memory given back, by itself."""
    settings = ebbtide.settings
    before = settings.cache_dir, settings.prepare, settings.idle_trim
    with tempfile.TemporaryDirectory(prefix="ebbtide-demo-") as folder:
        settings.cache_dir, settings.prepare, settings.idle_trim = folder, "off", None
        try:
            yield
        finally:
            settings.cache_dir, settings.prepare, settings.idle_trim = before


@_settings_of_its_own()
def tell(library: list[Passage], questions: list[str], answered: Callable[[Answer], None]) -> Story:
    """Run the demo.

    Args:
        library: What is searched.
        questions: What is asked.
        answered: Called with each answer as it is found.

    Raises:
        ModelNotFoundError: The demo's model is not installed.
    """
    texts = [one.text for one in library]
    runtime.start()
    reclaim(collect=True)
    start = anonymous_bytes()
    with ebbtide.pipeline("feature-extraction", NAME) as embed:
        loaded = anonymous_bytes()
        began = time.perf_counter()
        vectors = embed(texts)
        seconds = time.perf_counter() - began
        for question in questions:
            answered(Answer(question, _nearest(library, vectors, embed(question)[0])))
        working = anonymous_bytes()
        receipt = embed.dispose()
    life = Life(loaded, working, anonymous_bytes(), receipt)
    rounds = tuple(_rounds(texts[:ROUND_PASSAGES]))
    return Story(start, life, rounds, _prepared(texts[:ROUND_PASSAGES]), seconds)


def _nearest(
    library: list[Passage], vectors: NDArray[Any], question: NDArray[Any]
) -> tuple[Found, ...]:
    """The best passages; the vectors are of length 1, so their dot product is the cosine."""
    scores = np.einsum("pw,w->p", vectors, question)
    best = np.argsort(-scores)[:BEST]
    return tuple(Found(float(scores[one]), library[one]) for one in best)


def _rounds(texts: list[str]) -> Iterator[Life]:
    for _ in range(ROUNDS):
        with ebbtide.pipeline("feature-extraction", NAME) as embed:
            yield _life(embed, texts)


def _prepared(texts: list[str]) -> Life | None:
    with ebbtide.pipeline("feature-extraction", NAME, prepare="now") as embed:
        there = any(one.source == "prepared" for one in embed.memory.holdings)
        life = _life(embed, texts)
    return life if there else None


def _life(embed: FeatureExtractionPipeline, texts: list[str]) -> Life:
    loaded = anonymous_bytes()
    embed(texts)
    working = anonymous_bytes()
    receipt = embed.dispose()
    return Life(loaded, working, anonymous_bytes(), receipt)
