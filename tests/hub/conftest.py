"""A hub on loopback for the tests that need one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .loopback import Hub


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as made:
        yield made
