"""Hooks of gunicorn: its workers dispose what they have before they end.

In `gunicorn.conf.py`:

    from ebbtide.integrations.gunicorn import post_fork, worker_exit

Pipelines that were made before the fork, as by ``--preload``, are named in the log of each worker.
"""

from __future__ import annotations

import os
from typing import Any

from ebbtide.integrations.per_process import end_of_worker, inherited


def post_fork(server: Any, worker: Any) -> None:
    """Say which pipelines a worker has inherited and cannot use.

    Args:
        server: The arbiter, which has the log.
        worker: Whose process this is.
    """
    if words := inherited():
        server.log.warning("Worker %s: %s", worker.pid, words)


def worker_exit(server: Any, worker: Any) -> None:
    """Dispose every pipeline of a worker, and say in the log what came back.

    Args:
        server: The arbiter, which has the log.
        worker: Whose process this is.
    """
    if worker.pid != os.getpid():
        return  # the arbiter calls this too, for a worker that has gone already
    for line in end_of_worker():
        server.log.info("Worker %s: %s", worker.pid, line)
