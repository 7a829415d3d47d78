"""Hooks of gunicorn: its workers dispose what they have before they end.

In `gunicorn.conf.py`:

    from ebbtide.integrations.gunicorn import post_fork, worker_exit

Pipelines that were made before the fork, as by ``--preload``, are named in the log of each worker.

Nothing of Ebbtide's is imported before an application does: gevent's workers replace threads first.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any


def post_fork(server: Any, worker: Any) -> None:
    """Say which pipelines a worker has inherited and cannot use.

    Args:
        server: The arbiter, which has the log.
        worker: Whose process this is.
    """
    if "ebbtide.lifecycle" not in sys.modules:
        return
    from ebbtide.integrations.worker_end import inherited

    if words := inherited():
        server.log.warning("Worker %s: %s", worker.pid, words)


def worker_exit(server: Any, worker: Any) -> None:
    """Dispose every pipeline of a worker, and say in the log what came back.

    Args:
        server: The arbiter, which has the log.
        worker: Whose process this is.
    """
    if worker.pid != os.getpid() or "ebbtide.lifecycle" not in sys.modules:
        return  # the arbiter calls this too, for a worker that has gone already
    from ebbtide.cancellation import OneShot
    from ebbtide.integrations.worker_end import CLOSE_TIMEOUT, end_of_worker

    ended = OneShot()

    def end() -> None:
        try:
            for line in end_of_worker():
                server.log.info("Worker %s: %s", worker.pid, line)
        finally:
            ended.open()

    try:
        threading.Thread(target=end, name="ebbtide-exit").start()
        ended.wait()
    except SystemExit:  # a second signal; gevent's worker often hears of the first one late
        ended.wait(CLOSE_TIMEOUT)
        raise
