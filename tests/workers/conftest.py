"""Pipelines in processes of their own that misbehave on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ebbtide
from ebbtide.workers import isolated
from ebbtide.workers.options import IsolateOptions

HERE = Path(__file__).parent


@pytest.fixture
def strange(monkeypatch: pytest.MonkeyPatch, tiny_bert: Path) -> Iterator[Callable[..., Any]]:
    """Makes such a pipeline: its loader of `strange.py`, and its `IsolateOptions`."""
    original = isolated.lifecycle_of
    loader = "pipeline"
    made: list[Any] = []
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setattr(
        isolated,
        "lifecycle_of",
        lambda label, _, *rest: original(label, f"strange:{loader}", *rest),
    )

    def make(name: str = "pipeline", *, progress: Any = None, **options: Any) -> Any:
        nonlocal loader
        loader = name
        options = {"start": "fork-server"} | options  # a fifth of the time
        pipe = ebbtide.pipeline(
            "feature-extraction", tiny_bert, isolate=IsolateOptions(**options), progress=progress
        )
        made.append(pipe)
        return pipe

    yield make
    for pipe in made:
        pipe.dispose(cancel=True)
