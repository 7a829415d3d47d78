"""What a worker process begins and ends with.

It imports no more than has pipelines at all: gunicorn's hook runs where a signal is lost that comes
before it has ended.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol

from ebbtide import lifecycle
from ebbtide.receipts import DisposalReceipt

log = logging.getLogger("ebbtide.integrations")

Receipts = Mapping[str, DisposalReceipt]

CLOSE_TIMEOUT = 10.0
"""Seconds for which leases are waited for at a process's end; servers kill what takes 30."""


class Closable(Protocol):
    """What has a manager."""

    def close(self) -> Receipts:
        """Close it; the receipts, by the pipelines' keys."""


used: dict[Closable, None] = {}
"""Those that this process, or one before its fork, has asked for a pipeline."""


def end_of_worker() -> list[str]:
    """Close the managers of this process, then dispose what else is left in it.

    Returns:
        What came back, a line for each pipeline.
    """
    lines = []
    for pipelines in tuple(used):
        try:
            lines += [f"{key}: {receipt}" for key, receipt in pipelines.close().items()]
        except Exception:
            log.exception("A manager could not be closed; the others are.")
    return lines + [str(receipt) for receipt in lifecycle.dispose_all(timeout=CLOSE_TIMEOUT)]


def inherited() -> str:
    """What a forked process has from before its fork and cannot use, in words; empty for none."""
    made = [
        f"{life.label} (made at {':'.join(map(str, life.site))})" for life in lifecycle.inherited
    ]
    if not made:
        return ""
    return (
        f"Inherited through a fork, and of no use in this process: {', '.join(made)}. Make"
        " pipelines after the fork: where they are first used, or through a manager."
    )
