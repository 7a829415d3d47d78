"""Pipelines that live and end with an application of Starlette or FastAPI.

    embedder = leased("feature-extraction", MODEL)
    app = FastAPI(lifespan=lifespan(budget="1 GiB", preload=[embedder]))

    @app.post("/embed")
    async def embed(text: str, pipe=Depends(embedder)): ...

The manager is made when the application starts, so in the worker's own process, and closed when it
ends. Annotations are objects in this file, since FastAPI reads those of a dependency.
"""

import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, Unpack

from ebbtide.errors import (
    AcquireTimeoutError,
    InputError,
    ManagerBusyError,
    ManagerClosedError,
    MissingExtraError,
)
from ebbtide.factory import Model
from ebbtide.integrations.per_process import ManagerOptions, OnClose, checked, tell
from ebbtide.integrations.worker_end import CLOSE_TIMEOUT
from ebbtide.manager.lease import AcquireOptions
from ebbtide.manager.manager import PipelineManager

try:
    from starlette.exceptions import HTTPException
    from starlette.requests import HTTPConnection
except ImportError as error:
    raise MissingExtraError(
        "Pipelines for FastAPI and Starlette need starlette, which is not installed:"
        " pip install 'ebbtide[frameworks]'",
        extra="frameworks",
    ) from error

NAME: Final = "pipelines"
"""The manager's name in the state of the application, and of each request."""

Lifespan = Callable[[Any], AbstractAsyncContextManager[Mapping[str, Any] | None]]


class Leased:
    """A dependency that lends a pipeline for one request; made by `leased`.

    Attributes:
        task: The pipeline's task.
        model: The pipeline's model.
        options: Of the pipeline and of the lease.
    """

    def __init__(self, task: str, model: Model, options: Mapping[str, Any]) -> None:
        self.task = task
        self.model = model
        self.options = options

    async def __call__(self, connection: HTTPConnection) -> AsyncIterator[Any]:
        """Lend it, as FastAPI asks, until the response was sent or the client has gone."""
        lease = manager_of(connection).acquire(self.task, self.model, **self.options)
        try:
            pipe = await lease.__aenter__()
        except (AcquireTimeoutError, ManagerBusyError, ManagerClosedError) as error:
            raise HTTPException(503, str(error)) from error
        try:
            yield pipe
        finally:
            lease.release()

    def __repr__(self) -> str:
        return f"<leased {self.task} {self.model or 'default'}>"


def leased(task: str, model: Model = None, **options: Unpack[AcquireOptions]) -> Leased:
    """A dependency of FastAPI that lends a pipeline for one request or WebSocket.

    The pipeline is returned in any case: after the response, streamed ones included, after an
    error, and where the client disconnects. A client that comes when there is no room, until
    ``timeout``, is answered 503.

    Args:
        task: As for `PipelineManager.acquire`.
        model: As for `PipelineManager.acquire`.
        **options: As for `PipelineManager.acquire`.

    Example:
        >>> leased("feature-extraction", "tests/models/tiny-bert", timeout=5)
        <leased feature-extraction tests/models/tiny-bert>
    """
    return Leased(task, model, options)


def manager_of(connection: HTTPConnection) -> PipelineManager:
    """The manager of the application that serves a request; for Starlette's own endpoints.

    Args:
        connection: A request or a WebSocket.

    Raises:
        InputError: The application has none, or its lifespan was not run.

    Example:
        >>> async def embed(request):
        ...     async with manager_of(request).acquire("feature-extraction") as pipe:
        ...         vectors = await pipe.acall(request.query_params["text"])
    """
    manager = connection.scope.get("state", {}).get(NAME)
    if not isinstance(manager, PipelineManager):
        raise InputError(
            "This application has no pipelines. Make it with"
            " FastAPI(lifespan=ebbtide.integrations.starlette.lifespan()), and serve it by a server"
            " (in tests: `with TestClient(app)`) that runs lifespans."
        )
    return manager


def lifespan(
    own: Lifespan | None = None,
    *,
    preload: Iterable[Leased] = (),
    on_close: OnClose = None,
    close_timeout: float = CLOSE_TIMEOUT,
    **options: Unpack[ManagerOptions],
) -> Lifespan:
    """A lifespan whose manager is made when the application starts and closed when it ends.

    Args:
        own: The application's own lifespan. It runs within, and finds the manager as
            ``app.state.pipelines``.
        preload: What is loaded before the first request.
        on_close: Called with the receipts, by the pipelines' keys, at the application's end.
        close_timeout: Seconds for which leases are waited for then.
        **options: Of the manager; see `PipelineManager`.

    Returns:
        What ``FastAPI(lifespan=...)`` and ``Starlette(lifespan=...)`` take.

    Raises:
        OptionError: There is no such option; names the nearest.

    Example:
        >>> from starlette.applications import Starlette
        >>> app = Starlette(lifespan=lifespan(budget="1 GiB"))
    """
    made_with = checked("lifespan()", options)
    first = tuple(preload)

    @contextlib.asynccontextmanager
    async def run(app: Any) -> AsyncIterator[Mapping[str, Any]]:
        manager = PipelineManager(**made_with)
        try:
            app.state.pipelines = manager
            for one in first:
                await manager.apreload(one.task, one.model, **one.options)
            async with own(app) if own is not None else contextlib.nullcontext() as state:
                yield {**(state or {}), NAME: manager}
        finally:
            tell(await manager.aclose(timeout=close_timeout), on_close)

    return run
