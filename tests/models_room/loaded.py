"""Models of this repository, loaded without a pipeline, and what their steps say of tokens."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from ebbtide.cancellation import CancelToken
from ebbtide.hub import ModelFiles
from ebbtide.lifecycle import Lifecycle
from ebbtide.memory.ledger import Lease
from ebbtide.models.config import ModelConfig
from ebbtide.models.decoder import Steps
from ebbtide.models.loading import MODEL, Loaded, LoadOptions
from ebbtide.models.tokenizer import Tokenizer

MODELS = Path(__file__).parent.parent / "models"
TOKEN = CancelToken("test")

ModelT = TypeVar("ModelT")


class Owner:
    """Stands for a lifecycle: keeps what was loaded until it is released."""

    label = "the test"

    def __init__(self) -> None:
        self.leases: list[Lease[Any]] = []

    def own(self, lease: Lease[Any]) -> None:
        self.leases.append(lease)

    def release(self) -> None:
        for one in self.leases:
            one.release()


def loaded(
    name: str, owner: Owner, *, stems: Sequence[str] = (MODEL,), file: str | None = None
) -> Loaded:
    return Loaded.of(
        ModelFiles(name, MODELS / name),
        LoadOptions(model_file_name=file, prepare="off"),
        (),
        cast(Lifecycle, owner),
        TOKEN,
        lambda waiting: None,
        stems,
    )


@contextmanager
def each_once(make: Callable[[str, Owner], ModelT]) -> Iterator[Callable[[str], ModelT]]:
    """Each model, loaded when it is first asked for, and released at the end."""
    owner = Owner()
    yield functools.cache(lambda name: make(name, owner))
    owner.release()


@contextmanager
def tokenizer_of(name: str | Path) -> Iterator[Tokenizer]:
    folder = MODELS / name
    files = ModelFiles(name=str(folder), folder=folder)
    made = Tokenizer.load(files, ModelConfig.read(files), TOKEN)
    try:
        yield made
    finally:
        assert not made.lease.release()


def drawn(rows: int, length: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(5, 300, (rows, length))


def shown(
    steps: Steps, ids: NDArray[np.int64], parts: Sequence[int] = (), *, last: bool = False
) -> NDArray[np.float32]:
    """The logits of all tokens, which are shown in parts of these sizes and one for the rest."""
    ends = [0, *np.cumsum(parts).tolist(), ids.shape[1]]
    found = [
        steps.forward(ids[:, start:end], TOKEN, last=last).copy()
        for start, end in itertools.pairwise(ends)
    ]
    return np.concatenate(found, axis=1)


def close(one: NDArray[np.float32], other: NDArray[np.float32]) -> bool:
    return one.shape == other.shape and np.allclose(one, other, atol=1e-4)
