"""What the tests of both exporters of a manager's figures share."""

from __future__ import annotations

import queue
from collections.abc import Callable

import pytest

from ebbtide.integrations.exported import Exported
from ebbtide.manager import ManagerEvent

Heard = Callable[[str], None]


def hearing(kind: type[Exported], monkeypatch: pytest.MonkeyPatch) -> Heard:
    """What waits until an exporter has noted an event of a kind."""
    noted: queue.SimpleQueue[str] = queue.SimpleQueue()
    hear = kind._hear

    def hear_and_tell(one: Exported, event: ManagerEvent) -> None:
        hear(one, event)
        noted.put(event.kind)

    def wait_for(kind: str) -> None:
        while noted.get(timeout=60) != kind:
            pass

    monkeypatch.setattr(kind, "_hear", hear_and_tell)
    return wait_for
