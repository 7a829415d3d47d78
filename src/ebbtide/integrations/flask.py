"""Pipelines of a Flask application, lent for each request.

    pipelines = Pipelines(app, budget="1 GiB")

    @app.post("/embed")
    def embed():
        pipe = pipelines.lease("feature-extraction", MODEL)
        ...

Nothing is loaded before the first request, so reloaders and forking servers need no care.
"""

from __future__ import annotations

from typing import Any, Unpack

from ebbtide.errors import (
    AcquireTimeoutError,
    ManagerBusyError,
    ManagerClosedError,
    MissingExtraError,
)
from ebbtide.factory import Model
from ebbtide.integrations.per_process import ManagerOptions, OnClose, ProcessPipelines
from ebbtide.integrations.worker_end import CLOSE_TIMEOUT
from ebbtide.manager.lease import AcquireOptions, Lease

try:
    from flask import Flask, g
    from werkzeug.exceptions import ServiceUnavailable
except ImportError as error:
    raise MissingExtraError(
        "Pipelines for Flask need flask, which is not installed: pip install 'ebbtide[frameworks]'",
        extra="frameworks",
    ) from error


class Pipelines(ProcessPipelines):
    """The pipelines of an application, in each process that serves it.

    Args:
        app: The application; or none, and `init_app` later.
        on_close: Called with the receipts, by the pipelines' keys, before a process that has used
            them ends.
        close_timeout: Seconds for which leases are waited for then.
        **options: Of the manager; see `PipelineManager`.

    Raises:
        OptionError: There is no such option; names the nearest.
        InputError: A value that cannot be used.

    Example:
        >>> from flask import Flask
        >>> app = Flask("tide")
        >>> pipelines = Pipelines(app, budget="1 GiB")
        >>> with app.app_context():
        ...     embed = pipelines.lease("feature-extraction", "tests/models/tiny-bert")
        ...     embed("the tide goes out", pooling="mean").shape
        (1, 32)
        >>> receipts = pipelines.close()
    """

    def __init__(
        self,
        app: Flask | None = None,
        *,
        on_close: OnClose = None,
        close_timeout: float = CLOSE_TIMEOUT,
        **options: Unpack[ManagerOptions],
    ) -> None:
        super().__init__(on_close=on_close, close_timeout=close_timeout, **options)
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Serve an application; any number of them.

        Args:
            app: Whose requests return their pipelines at their end.
        """
        app.extensions["ebbtide"] = self
        app.teardown_appcontext(_return_all)

    def lease(self, task: str, model: Model = None, **options: Unpack[AcquireOptions]) -> Any:
        """A pipeline, lent until the request ends, whether it succeeds or fails.

        A response that is streamed outlives its request: in its generator, use `acquire` in a
        ``with`` block. A client that comes when there is no room, until ``timeout``, is answered
        503.

        Args:
            task: As for `PipelineManager.acquire`.
            model: As for `PipelineManager.acquire`.
            **options: As for `PipelineManager.acquire`.

        Raises:
            EbbtideError: As `PipelineManager.acquire` says.
            RuntimeError: There is no request; use `acquire` in a ``with`` block.
        """
        leases = g.setdefault("ebbtide_leases", [])
        lease = self.acquire(task, model, **options)
        try:
            pipe = lease.__enter__()
        except (AcquireTimeoutError, ManagerBusyError, ManagerClosedError) as error:
            raise ServiceUnavailable(str(error)) from error
        leases.append(lease)
        return pipe


def _return_all(error: BaseException | None = None) -> None:
    leases: list[Lease[Any]] = g.pop("ebbtide_leases", [])
    while leases:
        leases.pop().release()
