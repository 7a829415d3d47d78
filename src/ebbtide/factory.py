"""`pipeline()`: finds the model, loads it on a native thread, and wraps it."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, Never

from ebbtide._settings import settings
from ebbtide.cancellation import CancelToken, patiently
from ebbtide.errors import PipelineCancelledError, unknown_option
from ebbtide.hub import resolve
from ebbtide.lifecycle import Lifecycle, State, creation_site, end_of_process
from ebbtide.memory.reaper import reaper
from ebbtide.models.onnx_files import ByFile, ExternalData
from ebbtide.models.text_encoder import LoadOptions, TextEncoder
from ebbtide.pipelines import Pipeline, find
from ebbtide.runtime import Job, SessionOptions, native_threads

_OPTIONS: Final = (
    "device", "dtype", "subfolder", "model_file_name", "use_external_data_format",
    "session_options",
)  # fmt: skip

_Made = Callable[[Lifecycle], Pipeline]


def pipeline(
    task: Literal["feature-extraction", "embeddings"] | str,
    model: str | os.PathLike[str] | None = None,
    *,
    device: ByFile = "cpu",
    dtype: ByFile = None,
    subfolder: str = "onnx",
    model_file_name: str | None = None,
    use_external_data_format: ExternalData = None,
    session_options: SessionOptions | Mapping[str, object] | None = None,
    **unknown: Never,
) -> Any:
    """Load a model, and make a pipeline of it.

    Args:
        task: What to do, as in ``feature-extraction``; ``ebbtide tasks`` lists them.
        model: A folder in Hugging Face layout, or the name of an installed model. None: the task's
            default, or what an installed package offers in its place.
        device: ``cpu``, ``cuda``, ``cuda:N``, ``dml``, ``coreml``, or ``auto`` for the best that
            works here; or a map by file.
        dtype: Which of the model's files to load: ``fp32``, ``fp16``, ``q8``, ``int8``, ``uint8``,
            ``q4``, ``q4f16``, ``q2``, ``q2f16``, ``q1``, ``q1f16``, ``bnb4``; or a map by file.
            None and ``auto``: what the model's config names, else the first there is, fp32 first.
        subfolder: Where ONNX files are looked for before the model's own folder.
        model_file_name: The ONNX file's name without suffix and ending, in place of ``model``.
        use_external_data_format: Whether the weights lie in files beside the graph, or in how many,
            or a map by file. None: what the model's config says.
        session_options: How ONNX Runtime runs the graph; see `SessionOptions`.

    Returns:
        The pipeline, ready. Use it in a ``with`` block, or call its ``dispose``.

    Raises:
        InputError: There is no such task, dtype or device; names the nearest.
        OptionError: There is no such option; names the nearest.
        ModelNotFoundError: There is no such model, or a file of it is missing.
        LoadError: A file of the model cannot be read.
        UnsupportedModelError: The model is no text encoder.
        DeviceNotAvailableError: The device cannot be used here.
        PipelineCancelledError: The process began to end during the load.

    Example:
        >>> with pipeline("feature-extraction", "tests/models/tiny-bert") as embed:
        ...     vectors = embed("the tide goes out", pooling="mean", normalize=True)
        >>> vectors.shape
        (1, 32)
    """
    for option in unknown:
        raise unknown_option(option, ("model", *_OPTIONS), where="pipeline()")
    lifecycle, load = _prepare(
        task, model, device=device, dtype=dtype, subfolder=subfolder,
        model_file_name=model_file_name, use_external_data_format=use_external_data_format,
        session_options=session_options,
    )  # fmt: skip
    try:
        return _wrapped(lifecycle, load().wait())
    except BaseException:
        lifecycle.request(cancel=True)
        lifecycle.wait()
        raise


async def apipeline(
    task: Literal["feature-extraction", "embeddings"] | str,
    model: str | os.PathLike[str] | None = None,
    *,
    device: ByFile = "cpu",
    dtype: ByFile = None,
    subfolder: str = "onnx",
    model_file_name: str | None = None,
    use_external_data_format: ExternalData = None,
    session_options: SessionOptions | Mapping[str, object] | None = None,
    **unknown: Never,
) -> Any:
    """The same as `pipeline`, without blocking the event loop.

    Cancelling the task cancels the load, and what it had loaded is released before this raises.
    """
    for option in unknown:
        raise unknown_option(option, ("model", *_OPTIONS), where="apipeline()")
    lifecycle, load = _prepare(
        task, model, device=device, dtype=dtype, subfolder=subfolder,
        model_file_name=model_file_name, use_external_data_format=use_external_data_format,
        session_options=session_options,
    )  # fmt: skip
    try:
        return _wrapped(lifecycle, await load().result())
    except BaseException:
        lifecycle.request(cancel=True)
        await patiently(lifecycle.on_finished, lambda: None)
        raise


def _prepare(
    task: str,
    model: str | os.PathLike[str] | None,
    *,
    session_options: SessionOptions | Mapping[str, object] | None,
    **options: Any,
) -> tuple[Lifecycle, Callable[[], Job[_Made]]]:
    """Check what can be checked at once; what comes back hands the load to a native thread."""
    chosen = find(task)
    load_options = LoadOptions(session_options=SessionOptions.of(session_options), **options)
    named = "the default model" if model is None else str(model)
    label = f"The {chosen.name} pipeline over {named}"
    _start()
    lifecycle = Lifecycle(label, reaper, creation_site())
    token = CancelToken(label)
    lifecycle.running[token] = None

    def load() -> _Made:
        files = resolve(model, task=chosen.name, default=chosen.default_model)
        encoder = TextEncoder.load(files, load_options, chosen.pipeline.outputs, lifecycle, token)
        about = chosen.pipeline.read(files, encoder)
        return lambda life: chosen.pipeline(life, encoder, about)

    return lifecycle, lambda: native_threads.submit(load, token, lambda: lifecycle.leave(token))


def _wrapped(lifecycle: Lifecycle, made: _Made) -> Pipeline:
    if lifecycle.state is not State.LOADING:
        raise PipelineCancelledError(
            f"{lifecycle.label} was cancelled while it loaded.", pipeline=lifecycle.label
        )
    pipe = made(lifecycle)
    lifecycle.state = State.READY
    return pipe


_started = False


def _start() -> None:
    """Have the threads running before anything exists that a finalizer could want disposed."""
    global _started
    if not _started:
        _started = True
        atexit.register(lambda: end_of_process(settings.exit_timeout))
    reaper.start()
