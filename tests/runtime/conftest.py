"""A prepared store of the test's own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import ebbtide
from ebbtide.runtime import prepare


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty store; every load of the test uses it."""
    place = tmp_path / "store"
    monkeypatch.setattr(ebbtide.settings, "cache_dir", str(place))
    yield place
    for thread in threading.enumerate():
        if thread.name == "ebbtide-prepare":
            thread.join(30)
            assert not thread.is_alive(), "a copy is being made still"


@pytest.fixture
def background(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, where copies of small models are made too, and while the original is used."""
    monkeypatch.setattr(prepare, "SMALLEST", 0)
    monkeypatch.setattr(prepare, "_IN_MEMORY", frozenset())
    monkeypatch.setattr(ebbtide.settings, "prepare", "background")
    return root
