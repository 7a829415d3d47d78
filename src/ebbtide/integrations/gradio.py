"""Pipelines in Gradio: loaded at the launch, disposed at the close; or one for each session.

    embed = SharedPipeline("feature-extraction", MODEL)
    with gr.Blocks() as demo:
        ...  # functions that call embed("the tide goes out")
    demo.launch(app_kwargs={"lifespan": embed.lifespan})

The lifespan is that of the server under the demo: it ends with ``demo.close()``, with Ctrl-C, and
with the application that ``gr.mount_gradio_app`` put the demo into. Annotations are objects in this
file, since Gradio reads them.
"""

import contextlib
from collections.abc import AsyncIterator
from typing import Any, Generic, TypeVar, Unpack

from ebbtide.errors import InputError, MissingExtraError, PipelineDisposedError
from ebbtide.factory import Model, PipelineOptions, apipeline, checked, pipeline
from ebbtide.lifecycle import Disposable

try:
    import gradio as gr
except ImportError as error:
    raise MissingExtraError(
        "Pipelines for Gradio need it, and it is not installed: pip install gradio", extra="gradio"
    ) from error

PipelineT = TypeVar("PipelineT", bound=Disposable)


class SharedPipeline:
    """One pipeline that all sessions of a demo share, as long as its server runs.

    Args:
        task: As for `ebbtide.pipeline`.
        model: As for `ebbtide.pipeline`.
        **options: As for `ebbtide.pipeline`.

    Raises:
        InputError: There is no such task.
        OptionError: There is no such option.

    Example:
        >>> embed = SharedPipeline("feature-extraction", "tests/models/tiny-bert")
        >>> demo.launch(app_kwargs={"lifespan": embed.lifespan})  # doctest: +SKIP
    """

    def __init__(self, task: str, model: Model = None, **options: Unpack[PipelineOptions]) -> None:
        checked("SharedPipeline()", task, options)
        self._task, self._model, self._options = task, model, options
        self._pipe: Any = None

    @property
    def pipe(self) -> Any:
        """The pipeline.

        Raises:
            InputError: The server under the demo does not run.
        """
        pipe = self._pipe
        if pipe is None:
            raise InputError(
                f"The {self._task} pipeline is there while its demo's server runs. Launch it with"
                " demo.launch(app_kwargs={'lifespan': shared.lifespan})."
            )
        return pipe

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """Call the pipeline.

        Raises:
            InputError: The server under the demo does not run.
        """
        return self.pipe(*inputs, **options)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: object = None) -> AsyncIterator[None]:
        """Have it loaded inside, and disposed at the end; for a server's ``lifespan``."""
        pipe = await apipeline(self._task, self._model, **self._options)
        self._pipe = pipe
        try:
            yield
        finally:
            self._pipe = None
            await pipe.adispose()

    def __repr__(self) -> str:
        return f"<shared {self._task}: {self._pipe or 'its server does not run'}>"


class SessionPipelines(Generic[PipelineT]):
    """A pipeline for each session, loaded when it is first asked for, gone when the tab is closed.

    They share their weights, as all pipelines over the same files do; what each has alone are its
    caches and its end.

    Args:
        demo: The demo whose sessions they are for; made inside ``with gr.Blocks() as demo``.
        task: As for `ebbtide.pipeline`.
        model: As for `ebbtide.pipeline`.
        **options: As for `ebbtide.pipeline`.

    Example:
        >>> with gr.Blocks() as demo:  # doctest: +SKIP
        ...     writers = SessionPipelines(demo, "text-generation", MODEL)
        ...     def write(text, request: gr.Request):
        ...         return writers.get(request)(text)
        >>> demo.launch(app_kwargs={"lifespan": writers.lifespan})  # doctest: +SKIP
    """

    def __init__(
        self, demo: Any, task: str, model: Model = None, **options: Unpack[PipelineOptions]
    ) -> None:
        checked("SessionPipelines()", task, options)
        self._task, self._model, self._options = task, model, options
        self._pipes: dict[str, PipelineT] = {}
        self._is_closed = False
        demo.unload(self._end)

    def get(self, request: gr.Request) -> PipelineT:
        """The pipeline of a request's session.

        Args:
            request: What Gradio gives a function that has an argument ``request: gr.Request``.

        Raises:
            EbbtideError: As `ebbtide.pipeline`.
            InputError: The request belongs to no session.
            PipelineDisposedError: The server under the demo has ended.
        """
        session = request.session_hash
        if session is None:
            raise InputError("This request has no session; was it made by a client of Gradio's?")
        found = self._pipes.get(session)
        if found is not None:
            return found
        made: PipelineT = pipeline(self._task, self._model, **self._options)
        found = self._pipes.setdefault(session, made)  # two calls at once: the first is kept
        if found is not made:
            made.dispose()
        if self._is_closed:
            found.dispose()
            raise PipelineDisposedError(
                f"The server under the demo has ended, and its {self._task} pipelines with it."
                " Launch it again.",
                pipeline=repr(found),
            )
        return found

    def __len__(self) -> int:
        """How many sessions have one now."""
        return len(self._pipes)

    def _end(self, request: gr.Request) -> None:
        pipe = self._pipes.pop(request.session_hash or "", None)
        if pipe is not None:
            pipe.dispose()

    @contextlib.asynccontextmanager
    async def lifespan(self, app: object = None) -> AsyncIterator[None]:
        """Dispose at the end what sessions have left; for a server's ``lifespan``."""
        self._is_closed = False
        try:
            yield
        finally:
            self._is_closed = True
            while self._pipes:
                _, pipe = self._pipes.popitem()
                await pipe.adispose()
