"""Pipelines in workers of Celery: made in the process that runs the tasks, disposed at its end.

    pipelines = Pipelines(budget="1 GiB")

    @app.task
    def embed(text):
        with pipelines.acquire("feature-extraction", MODEL) as pipe:
            return pipe(text, pooling="mean")[0].tolist()

In the prefork pool that is each child, whether the worker stops or the child is recycled
(``worker_max_tasks_per_child``); in the solo and threads pools it is the worker itself.
"""

from __future__ import annotations

import os
from typing import Any, Unpack

from ebbtide.errors import MissingExtraError
from ebbtide.integrations.per_process import ManagerOptions, OnClose, ProcessPipelines
from ebbtide.integrations.worker_end import CLOSE_TIMEOUT, end_of_worker, inherited, log

try:
    from celery import signals
except ImportError as error:
    raise MissingExtraError(
        "Pipelines for Celery need celery, which is not installed:"
        " pip install 'ebbtide[frameworks]'",
        extra="frameworks",
    ) from error


class Pipelines(ProcessPipelines):
    """The pipelines of an application's tasks, in each process that runs them.

    Make it where the tasks are. Nothing is loaded before a task asks for it.

    Args:
        on_close: Called with the receipts, by the pipelines' keys, before a process that has used
            them ends.
        close_timeout: Seconds for which leases are waited for then.
        **options: Of the manager; see `PipelineManager`.

    Raises:
        OptionError: There is no such option; names the nearest.
        InputError: A value that cannot be used.

    Example:
        >>> pipelines = Pipelines(budget="1 GiB")
        >>> with pipelines.acquire("feature-extraction", "tests/models/tiny-bert") as embed:
        ...     embed("the tide goes out", pooling="mean").shape
        (1, 32)
        >>> receipts = pipelines.close()
    """

    def __init__(
        self,
        *,
        on_close: OnClose = None,
        close_timeout: float = CLOSE_TIMEOUT,
        **options: Unpack[ManagerOptions],
    ) -> None:
        super().__init__(on_close=on_close, close_timeout=close_timeout, **options)
        signals.worker_init.connect(self._begin, weak=False)
        signals.worker_process_init.connect(_warn, weak=False, dispatch_uid="ebbtide warn")
        signals.worker_process_shutdown.connect(_end, weak=False, dispatch_uid="ebbtide child")
        signals.worker_shutdown.connect(_end, weak=False, dispatch_uid="ebbtide worker")

    def _begin(self, **about: Any) -> None:
        """A worker starts; where one ended in this process, as in tests, its manager is closed."""
        self.reopen()


def _warn(**about: Any) -> None:
    if words := inherited():
        log.warning("Worker process %s: %s", os.getpid(), words)


def _end(**about: Any) -> None:
    end_of_worker()
