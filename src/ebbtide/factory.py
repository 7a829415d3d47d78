"""`pipeline()`: finds the model, loads it on a native thread, and wraps it."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, TypedDict, Unpack, get_args, overload

from ebbtide import hub
from ebbtide._settings import Prepare
from ebbtide.cancellation import CancelToken, patiently
from ebbtide.errors import InputError, PipelineCancelledError, unknown_option
from ebbtide.hub import HubOptions, Progress, ProgressEvent
from ebbtide.lifecycle import Lifecycle, State, end_of_process
from ebbtide.memory.reaper import reaper
from ebbtide.models.catalog import (
    LoadEstimate,
    ModelSummary,
    PreparedModel,
    estimate,
    summarise,
)
from ebbtide.models.config import ModelConfig
from ebbtide.models.loading import LoadOptions
from ebbtide.models.onnx_files import ByFile, ExternalData
from ebbtide.models.tokenizer import TOKENIZER_FILES
from ebbtide.pipelines import Pipeline, Task, find
from ebbtide.process_end import at_end
from ebbtide.runtime import Job, SessionOptions, native_threads
from ebbtide.runtime.prepare import copy_of

if TYPE_CHECKING:
    from ebbtide.pipelines.feature_extraction import FeatureExtractionPipeline
    from ebbtide.pipelines.fill_mask import FillMaskPipeline
    from ebbtide.pipelines.question_answering import QuestionAnsweringPipeline
    from ebbtide.pipelines.text_classification import TextClassificationPipeline
    from ebbtide.pipelines.token_classification import TokenClassificationPipeline
    from ebbtide.pipelines.zero_shot_classification import ZeroShotClassificationPipeline
    from ebbtide.workers.options import IsolateOptions

Model = str | os.PathLike[str] | None


class PipelineOptions(TypedDict, total=False):
    """What may be chosen of a pipeline; see `pipeline`."""

    device: ByFile
    dtype: ByFile
    revision: str
    subfolder: str
    model_file_name: str | None
    use_external_data_format: ExternalData
    cache_dir: str | os.PathLike[str] | None
    local_files_only: bool
    token: str | bool | None
    progress: Progress
    session_options: SessionOptions | Mapping[str, object] | None
    prepare: Prepare | Literal[False] | None
    isolate: bool | IsolateOptions


_OF_THE_HUB: Final = frozenset(field.name for field in dataclasses.fields(HubOptions))
_Made = Callable[[Lifecycle], Pipeline]


@overload
def pipeline(
    task: Literal["feature-extraction", "embeddings"],
    model: Model = None,
    **options: Unpack[PipelineOptions],
) -> FeatureExtractionPipeline: ...


@overload
def pipeline(
    task: Literal["text-classification", "sentiment-analysis"],
    model: Model = None,
    **options: Unpack[PipelineOptions],
) -> TextClassificationPipeline: ...


@overload
def pipeline(
    task: Literal["token-classification", "ner"],
    model: Model = None,
    **options: Unpack[PipelineOptions],
) -> TokenClassificationPipeline: ...


@overload
def pipeline(
    task: Literal["question-answering"],
    model: Model = None,
    **options: Unpack[PipelineOptions],
) -> QuestionAnsweringPipeline: ...


@overload
def pipeline(
    task: Literal["fill-mask"],
    model: Model = None,
    **options: Unpack[PipelineOptions],
) -> FillMaskPipeline: ...


@overload
def pipeline(
    task: Literal["zero-shot-classification"],
    model: Model = None,
    **options: Unpack[PipelineOptions],
) -> ZeroShotClassificationPipeline: ...


@overload
def pipeline(task: str, model: Model = None, **options: Unpack[PipelineOptions]) -> Any: ...


def pipeline(task: str, model: Model = None, **options: Unpack[PipelineOptions]) -> Any:
    """Load a model, and make a pipeline of it.

    Args:
        task: What to do, as in ``feature-extraction``; ``ebbtide tasks`` lists them.
        model: A folder in Hugging Face layout, the name of an installed model, or an id on the hub,
            as in ``org/name``. None: the task's default; where the hub cannot be reached, what an
            installed package offers in its place.
        **options: By name only, each may be left out:

            device: ``cpu``, ``cuda``, ``cuda:N``, ``dml``, ``coreml``, or ``auto`` for the best
                that works here; or a map by file. The config's, else ``cpu``.
            dtype: Which of the model's files to load: ``fp32``, ``fp16``, ``q8``, ``int8``,
                ``uint8``, ``q4``, ``q4f16``, ``q2``, ``q2f16``, ``q1``, ``q1f16``, ``bnb4``; or a
                map by file. None and ``auto``: what the model's config names, else the first there
                is, fp32 first.
            revision: A branch, a tag or a commit on the hub; ``main`` by default.
            subfolder: Where ONNX files are looked for before the model's own folder; ``onnx`` by
                default.
            model_file_name: The ONNX file's name without suffix and ending, in place of ``model``.
            use_external_data_format: Whether the weights lie in files beside the graph, or in how
                many, or a map by file. None: what the model's config says, else what is there.
            cache_dir: Where downloads are kept; by default where all Hugging Face libraries keep
                theirs (``HF_HUB_CACHE``).
            local_files_only: Use only what the cache has, and no network.
            token: What opens private and gated models on the hub. None: the one that is saved or in
                ``HF_TOKEN``; False: none.
            progress: A function that is told of downloads (`ProgressEvent`), True for bars, False
                for nothing, None for bars where there is a terminal.
            session_options: How ONNX Runtime runs the graph; see `SessionOptions`.
            prepare: What to do about the model's prepared copy, which loads in a third of the time
                and takes a hundredth of the private memory: ``"background"`` has it made meanwhile
                by a process of its own and goes over to it, ``"now"`` waits for it, False makes
                none. None is ``settings.prepare``.
            isolate: True, or `IsolateOptions`, for a process of its own: the same object to the
                caller, but all of its memory goes with that process, and so does a crash. Its
                ``replicas`` are several such processes over one prepared copy.

    Returns:
        The pipeline, ready. Use it in a ``with`` block, or call its ``dispose``.

    Raises:
        InputError: There is no such task, dtype or device; names the nearest.
        OptionError: There is no such option; names the nearest.
        ModelNotFoundError: There is no such model, or a file of it is missing.
        DownloadError: The hub cannot be reached or answers with an error, a file is not what the
            hub says it is, or the cache cannot be written.
        AccessDeniedError: The model is gated or private.
        LoadError: A file of the model cannot be read.
        UnsupportedModelError: The model is not made for this task.
        DeviceNotAvailableError: The device cannot be used here.
        PipelineCancelledError: The process began to end during the load.
        WorkerCrashedError: Its own process ended during the load.

    Example:
        >>> with pipeline("feature-extraction", "tests/models/tiny-bert") as embed:
        ...     vectors = embed("the tide goes out", pooling="mean", normalize=True)
        >>> vectors.shape
        (1, 32)
    """
    lifecycle, load = _prepare("pipeline()", task, model, options)
    try:
        return _wrapped(lifecycle, load().wait())
    except BaseException:
        lifecycle.request(cancel=True)
        lifecycle.wait()
        raise


@overload
async def apipeline(
    task: Literal["feature-extraction", "embeddings"],
    model: Model = None,
    **options: Unpack[PipelineOptions],
) -> FeatureExtractionPipeline: ...


@overload
async def apipeline(
    task: Literal["text-classification", "sentiment-analysis"],
    model: Model = None,
    **options: Unpack[PipelineOptions],
) -> TextClassificationPipeline: ...


@overload
async def apipeline(
    task: Literal["token-classification", "ner"],
    model: Model = None,
    **options: Unpack[PipelineOptions],
) -> TokenClassificationPipeline: ...


@overload
async def apipeline(
    task: Literal["question-answering"],
    model: Model = None,
    **options: Unpack[PipelineOptions],
) -> QuestionAnsweringPipeline: ...


@overload
async def apipeline(
    task: Literal["fill-mask"],
    model: Model = None,
    **options: Unpack[PipelineOptions],
) -> FillMaskPipeline: ...


@overload
async def apipeline(
    task: Literal["zero-shot-classification"],
    model: Model = None,
    **options: Unpack[PipelineOptions],
) -> ZeroShotClassificationPipeline: ...


@overload
async def apipeline(task: str, model: Model = None, **options: Unpack[PipelineOptions]) -> Any: ...


async def apipeline(task: str, model: Model = None, **options: Unpack[PipelineOptions]) -> Any:
    """The same as `pipeline`, without blocking the event loop.

    Cancelling the task cancels the load, and what it had loaded is released before this raises.
    """
    lifecycle, load = _prepare("apipeline()", task, model, options)
    try:
        return _wrapped(lifecycle, await load().result())
    except BaseException:
        lifecycle.request(cancel=True)
        await patiently(lifecycle.on_finished, lambda: None)
        raise


class Load:
    """A load that nobody waits for, made by `begin`.

    Attributes:
        lifecycle: Of the pipeline that it is to be; `Lifecycle.request` with ``cancel`` stops it.
    """

    def __init__(self, lifecycle: Lifecycle, job: Job[_Made]) -> None:
        self.lifecycle = lifecycle
        self._job = job

    def on_done(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called on a native thread once it has ended; at once if it has."""
        self._job.on_done(callback)

    def outcome(self) -> Pipeline:
        """The pipeline, once it has ended.

        Raises:
            EbbtideError: It failed, as `pipeline` says. What it took is there until its lifecycle
                is disposed.
        """
        return _wrapped(self.lifecycle, self._job.wait())


def begin(task: str, model: Model, options: PipelineOptions, site: tuple[str, int]) -> Load:
    """Begin to load a pipeline as `pipeline` does, and do not wait for it.

    Args:
        task: As for `pipeline`.
        model: As for `pipeline`.
        options: As for `pipeline`.
        site: Where the user's code asked for it, as ``(file, line)``.
    """
    lifecycle, load = _prepare("pipeline()", task, model, options, native_threads.queue, site)
    return Load(lifecycle, load())


def checked(
    where: str, task: str, options: PipelineOptions, beside: tuple[str, ...] = ()
) -> tuple[str, str]:
    """The task's own name and its default model, if there is such a task and each option is one.

    Args:
        where: Whose options they are, for messages.
        task: As for `pipeline`.
        options: As for `pipeline`.
        beside: Options that are taken there beside a pipeline's, for messages.

    Raises:
        EbbtideError: As `pipeline`, for what can be known without files.
    """
    _understood(where, options, beside)
    chosen = find(task)
    return chosen.name, chosen.default_model


def load_estimate(
    task: str, model: Model, options: PipelineOptions, *, fetch: bool = True
) -> LoadEstimate:
    """What a pipeline will take, by its files.

    Args:
        task: As for `pipeline`.
        model: As for `pipeline`.
        options: As for `pipeline`.
        fetch: Download them.

    Raises:
        EbbtideError: As `pipeline`, for what can be known without a load.
    """
    chosen = find(task)
    listener, hub_options, load_options = _understood("pipeline()", options)
    files = hub.resolve(
        model,
        task=chosen.name,
        default=chosen.default_model,
        options=hub_options,
        listener=listener,
    )
    kind = chosen.pipeline
    return estimate(files, load_options, kind.extra_files, kind.stems, fetch=fetch)


def _prepare(
    where: str,
    task: str,
    model: Model,
    options: PipelineOptions,
    hand_over: Callable[..., Job[Any]] = native_threads.submit,
    site: tuple[str, int] | None = None,
) -> tuple[Lifecycle, Callable[[], Any]]:
    """Check what can be checked at once; what comes back hands the load to a native thread."""
    chosen = find(task)
    listener, hub_options, load_options = _understood(where, options)
    named = "the default model" if model is None else str(model)
    label = f"The {chosen.name} pipeline over {named}"
    start()
    if options.get("isolate"):
        return _apart(chosen, model, options, label, site or creation_site(), listener)
    lifecycle = Lifecycle(label, reaper, site or creation_site())
    token = CancelToken(label)
    lifecycle.running[token] = None

    def load() -> _Made:
        files = hub.resolve(
            model,
            task=chosen.name,
            default=chosen.default_model,
            options=hub_options,
            listener=listener,
            cancel=token,
        )
        kind = chosen.pipeline
        loaded = kind.load(
            files,
            load_options,
            lifecycle,
            token,
            lambda status: listener(ProgressEvent(status=status, model=files.name)),
        )
        about = kind.read(files, loaded)
        listener(ProgressEvent(status="ready", task=chosen.name, model=files.name))
        return lambda life: kind(life, loaded, about)

    return lifecycle, lambda: hand_over(load, token, lambda: lifecycle.leave(token))


def _apart(
    chosen: Task,
    model: Model,
    options: PipelineOptions,
    label: str,
    site: tuple[str, int],
    listener: Callable[[ProgressEvent], object],
) -> tuple[Lifecycle, Callable[[], Any]]:
    """The same for a process of the pipeline's own, which loads it with `pipeline`."""
    from ebbtide.workers.isolated import Loading, lifecycle_of
    from ebbtide.workers.options import IsolateOptions

    given = {name: one for name, one in options.items() if name not in {"isolate", "progress"}}
    isolate = IsolateOptions.of(options["isolate"]) or IsolateOptions()
    arguments = (chosen.name, None if model is None else os.fspath(model))
    lifecycle = lifecycle_of(
        label, "ebbtide.factory:pipeline", arguments, given, isolate, reaper, site
    )
    token = CancelToken(label)
    lifecycle.running[token] = None
    return lifecycle, lambda: Loading(chosen.pipeline, lifecycle, token, listener)


def _understood(
    where: str, options: PipelineOptions, beside: tuple[str, ...] = ()
) -> tuple[Callable[[ProgressEvent], object], HubOptions, LoadOptions]:
    """Who is told of downloads, how the model is had, and how it is loaded."""
    given: dict[str, Any] = dict(options)
    known = PipelineOptions.__annotations__
    for option in given:
        if option not in known:
            raise unknown_option(option, ("model", *beside, *known), where=where)
    listener = hub.listener(given.pop("progress", None))
    session_options = SessionOptions.of(given.pop("session_options", None))
    given["prepare"] = _wanted(given.get("prepare"))
    given.pop("isolate", None)
    hub_options = HubOptions(**{key: given.pop(key) for key in _OF_THE_HUB & set(given)}).check()
    return listener, hub_options, LoadOptions(session_options=session_options, **given)


def _wanted(prepare: object) -> Prepare | None:
    if prepare is False:
        return "off"
    if prepare is None or prepare in get_args(Prepare):
        return prepare  # type: ignore[return-value]
    raise InputError(
        f"prepare takes 'background', 'now', False or None, not {prepare!r}.", value=prepare
    )


def model_files(task: str, model: Model = None, **options: Unpack[PipelineOptions]) -> ModelSummary:
    """What loading a model would take: which files, how large, and which are here already.

    Of a model on the hub only its config is downloaded for that.

    Args:
        task: As for `pipeline`.
        model: As for `pipeline`.
        **options: As for `pipeline`.

    Raises:
        EbbtideError: As `pipeline`, for what can be known without a load.

    Example:
        >>> needed = model_files("feature-extraction", "tests/models/tiny-bert", dtype="q8")
        >>> needed.dtype, needed.to_download
        ('q8', 0)
    """
    return _summary("model_files()", task, model, options)[1]


def download(task: str, model: Model = None, **options: Unpack[PipelineOptions]) -> ModelSummary:
    """Have on this machine what loading a model will take, and load nothing.

    Args:
        task: As for `pipeline`.
        model: As for `pipeline`.
        **options: As for `pipeline`.

    Returns:
        The files, all of them here.

    Raises:
        EbbtideError: As `pipeline`, for what can be known without a load.

    Example:
        >>> download("feature-extraction", "tests/models/tiny-bert").to_download
        0
    """
    files, summary = _summary("download()", task, model, options)
    files.fetch([one.name for one in summary.files])
    return _summary("download()", task, model, options, files)[1]


def prepare(task: str, model: Model = None, **options: Unpack[PipelineOptions]) -> PreparedModel:
    """Have a model's prepared copy before its first load, and load nothing.

    A process of its own makes it, as `pipeline` has it made, and this waits for it; what a load
    needs beside it is downloaded too. Made to be run where there is time for it: when an image
    is built, or before a service starts.

    Args:
        task: As for `pipeline`.
        model: As for `pipeline`.
        **options: As for `pipeline`. Copies are of one file, for one device and its
            ``session_options``, but for ``threads`` and ``arena``.

    Returns:
        What a load with the same arguments will use.

    Raises:
        PrepareError: There can be no copy, and why: it would not run on the CPU, the store cannot
            be written or is too small, or this graph cannot be written out.
        EbbtideError: As `pipeline`, for what can be known without a load.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as settings.cache_dir:
        ...     first = prepare("feature-extraction", "tests/models/tiny-bert")
        ...     again = prepare("feature-extraction", "tests/models/tiny-bert")
        >>> settings.cache_dir = None
        >>> first.made, again.made, first.key == again.key
        (True, False, True)
    """
    chosen = find(task)
    listener, hub_options, load_options = _understood("prepare()", options)
    token = CancelToken(f"preparing {'the default model' if model is None else model}")

    def work() -> PreparedModel:
        files = hub.resolve(
            model,
            task=chosen.name,
            default=chosen.default_model,
            options=hub_options,
            listener=listener,
            cancel=token,
        )
        config = ModelConfig.read(files)
        stems = chosen.pipeline.stems
        graphs = {stem: load_options.choose(files, config, stem) for stem in stems}
        names = [name for file in graphs.values() for name in (file.name, *file.parts)]
        files.fetch([*names, *TOKENIZER_FILES, *chosen.pipeline.extra_files])
        copies = [
            copy_of(
                files.need(file.name, "it was there a moment ago."),
                load_options.device_of(load_options.stem_of(stem), config),
                load_options.session_options,
                token,
                size=sum(files.look(one)[0] for one in (file.name, *file.parts)),
                told=lambda status: listener(ProgressEvent(status=status, model=files.name)),
            )
            for stem, file in graphs.items()
        ]
        return PreparedModel(
            model=files.name,
            file=", ".join(file.name for file in graphs.values()),
            dtype=", ".join(dict.fromkeys(file.dtype for file in graphs.values())),
            key=", ".join(manifest.key for manifest, _ in copies),
            size=sum(manifest.size for manifest, _ in copies),
            anonymous=sum(manifest.anonymous for manifest, _ in copies),
            seconds=sum(manifest.seconds for manifest, _ in copies),
            made=any(made for _, made in copies),
        )

    return native_threads.submit(work, token, lambda: None).wait()


def _summary(
    where: str,
    task: str,
    model: Model,
    options: PipelineOptions,
    files: hub.ModelFiles | None = None,
) -> tuple[hub.ModelFiles, ModelSummary]:
    chosen = find(task)
    listener, hub_options, load_options = _understood(where, options)
    files = files or hub.resolve(
        model,
        task=chosen.name,
        default=chosen.default_model,
        options=hub_options,
        listener=listener,
    )
    return files, summarise(files, load_options, chosen.pipeline.extra_files, chosen.pipeline.stems)


def _wrapped(lifecycle: Lifecycle, made: _Made) -> Pipeline:
    if lifecycle.state is not State.LOADING:
        raise PipelineCancelledError(
            f"{lifecycle.label} was cancelled while it loaded.", pipeline=lifecycle.label
        )
    pipe = made(lifecycle)
    lifecycle.state = State.READY
    return pipe


def creation_site() -> tuple[str, int]:
    """The file and line of the first caller that is not Ebbtide's own code."""
    here = os.path.dirname(__file__) + os.sep
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(here):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


_started = 0
"""The process whose end is minded; a forked child minds its own."""


def start() -> None:
    """Have the threads running before anything exists that a finalizer could want disposed."""
    global _started
    if _started != os.getpid():
        _started = os.getpid()
        at_end(end_of_process)
    reaper.start()
