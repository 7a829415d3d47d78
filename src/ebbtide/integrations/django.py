"""Pipelines of a Django project, for views of either kind.

    from ebbtide.integrations.django import acquire

    async def embed(request):
        async with acquire("feature-extraction", MODEL) as pipe:
            ...

There is nothing to install: each process makes its manager where it first asks for a pipeline, with
the options in ``settings.EBBTIDE``, and closes it before it ends.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Unpack

from ebbtide.errors import MissingExtraError
from ebbtide.factory import Model
from ebbtide.integrations.per_process import ProcessPipelines
from ebbtide.manager.lease import AcquireOptions, Lease
from ebbtide.manager.manager import PipelineManager

try:
    from django import conf  # not `settings`: whoever looks at that object makes it load
except ImportError as error:
    raise MissingExtraError(
        "Pipelines for Django need django, which is not installed:"
        " pip install 'ebbtide[frameworks]'",
        extra="frameworks",
    ) from error

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

_made: dict[str, ProcessPipelines] = {}


def _pipelines() -> ProcessPipelines:
    found = _made.get("of the project")
    if found is None:
        mine = ProcessPipelines(**getattr(conf.settings, "EBBTIDE", {}))
        found = _made.setdefault("of the project", mine)  # another thread may have been first
    return found


def manager() -> PipelineManager:
    """The manager of this process, made with the options in ``settings.EBBTIDE``.

    Those are of `PipelineManager`, and ``on_close``, which is called with the receipts by the
    pipelines' keys, and ``close_timeout``, the seconds for which leases are waited for.

    Raises:
        OptionError: There is no such option; names the nearest.
        InputError: A value that cannot be used.
    """
    return _pipelines().manager


def acquire(task: str, model: Model = None, **options: Unpack[AcquireOptions]) -> Lease[Any]:
    """A lease of a pipeline, for a ``with`` block, or ``async with`` in an async view.

    Args:
        task: As for `PipelineManager.acquire`.
        model: As for `PipelineManager.acquire`.
        **options: As for `PipelineManager.acquire`.

    Raises:
        EbbtideError: As `PipelineManager.acquire` says.
    """
    return _pipelines().acquire(task, model, **options)


def lifespan(application: Application) -> Application:
    """An ASGI application of Django's whose pipelines end with the server.

    In ``asgi.py``:

        application = lifespan(get_asgi_application())

    Servers as uvicorn end by the signal that they were sent, at which Python runs nothing more; but
    they tell an application first. Django's own does not listen.

    Args:
        application: What gets everything else.

    Returns:
        What the server is to run.
    """

    async def run(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await application(scope, receive, send)
            return
        while True:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                found = _made.get("of the project")
                if found is not None:
                    await found.aclose()
                    found.reopen()  # a server in this process may start again
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return

    return run
