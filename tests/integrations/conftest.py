"""Fixtures of the tests of several frameworks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.integrations.chained import CHAT

import ebbtide


@pytest.fixture
def manager() -> Iterator[ebbtide.PipelineManager]:
    with ebbtide.PipelineManager("4 GiB", remember=False) as manager:
        yield manager


@pytest.fixture
def write() -> Iterator[Any]:
    with ebbtide.pipeline("text-generation", CHAT) as write:
        yield write
