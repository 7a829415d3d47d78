"""Transformers pipelines for Python whose memory comes back.

    with ebbtide.pipeline("feature-extraction") as embed:
        vectors = embed("The tide goes out.")
    # the memory is back

Importing this package imports nothing else: each public name is loaded when it is first used.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as type checkers read it; importing `typing` would cost half the import

if TYPE_CHECKING:
    from ebbtide import errors, memory
    from ebbtide._settings import settings
    from ebbtide.errors import (
        AccessDeniedError,
        AcquireTimeoutError,
        DeviceNotAvailableError,
        DisposalError,
        DownloadError,
        EbbtideError,
        InputError,
        LoadError,
        LoadMemoryError,
        ManagerBusyError,
        ManagerClosedError,
        MissingExtraError,
        ModelNotFoundError,
        NotTransferableError,
        OptionError,
        OutOfBudgetError,
        PipelineCancelledError,
        PipelineDisposedError,
        PipelineInheritedError,
        PipelineInUseError,
        PrepareError,
        RunError,
        UnsupportedModelError,
        WorkerCrashedError,
        WorkerMemoryError,
    )
    from ebbtide.factory import (
        PipelineOptions,
        apipeline,
        download,
        model_files,
        pipeline,
        prepare,
    )
    from ebbtide.hub import ProgressEvent
    from ebbtide.lifecycle import State, dispose_all, live
    from ebbtide.manager.manager import PipelineManager
    from ebbtide.models.catalog import PreparedModel, cached_models, remove_cached
    from ebbtide.pipelines import Pipeline, PipelineMemory
    from ebbtide.pipelines.feature_extraction import FeatureExtractionPipeline
    from ebbtide.pipelines.fill_mask import FillMaskPipeline
    from ebbtide.pipelines.question_answering import QuestionAnsweringPipeline
    from ebbtide.pipelines.text_classification import TextClassificationPipeline
    from ebbtide.pipelines.token_classification import TokenClassificationPipeline
    from ebbtide.pipelines.zero_shot_classification import ZeroShotClassificationPipeline
    from ebbtide.receipts import DisposalReceipt
    from ebbtide.runtime import SessionOptions
    from ebbtide.workers.options import IsolateOptions

__version__ = "0.1.0"

_HOMES = {
    "errors": "",
    "memory": "",
    "AccessDeniedError": "errors",
    "AcquireTimeoutError": "errors",
    "DeviceNotAvailableError": "errors",
    "DisposalError": "errors",
    "DownloadError": "errors",
    "EbbtideError": "errors",
    "InputError": "errors",
    "LoadError": "errors",
    "LoadMemoryError": "errors",
    "ManagerBusyError": "errors",
    "ManagerClosedError": "errors",
    "MissingExtraError": "errors",
    "ModelNotFoundError": "errors",
    "NotTransferableError": "errors",
    "OptionError": "errors",
    "OutOfBudgetError": "errors",
    "PipelineCancelledError": "errors",
    "PipelineDisposedError": "errors",
    "PipelineInUseError": "errors",
    "PipelineInheritedError": "errors",
    "PrepareError": "errors",
    "RunError": "errors",
    "UnsupportedModelError": "errors",
    "WorkerCrashedError": "errors",
    "WorkerMemoryError": "errors",
    "IsolateOptions": "workers.options",
    "PipelineManager": "manager.manager",
    "PipelineOptions": "factory",
    "apipeline": "factory",
    "download": "factory",
    "model_files": "factory",
    "pipeline": "factory",
    "prepare": "factory",
    "PreparedModel": "models.catalog",
    "cached_models": "models.catalog",
    "remove_cached": "models.catalog",
    "ProgressEvent": "hub",
    "DisposalReceipt": "receipts",
    "State": "lifecycle",
    "dispose_all": "lifecycle",
    "live": "lifecycle",
    "FeatureExtractionPipeline": "pipelines.feature_extraction",
    "FillMaskPipeline": "pipelines.fill_mask",
    "Pipeline": "pipelines",
    "PipelineMemory": "pipelines",
    "QuestionAnsweringPipeline": "pipelines.question_answering",
    "TextClassificationPipeline": "pipelines.text_classification",
    "TokenClassificationPipeline": "pipelines.token_classification",
    "ZeroShotClassificationPipeline": "pipelines.zero_shot_classification",
    "SessionOptions": "runtime",
    "settings": "_settings",
}
"""Each public name, and the module it lives in; a name with none is a module itself."""

__all__ = [
    "AccessDeniedError",
    "AcquireTimeoutError",
    "DeviceNotAvailableError",
    "DisposalError",
    "DisposalReceipt",
    "DownloadError",
    "EbbtideError",
    "FeatureExtractionPipeline",
    "FillMaskPipeline",
    "InputError",
    "IsolateOptions",
    "LoadError",
    "LoadMemoryError",
    "ManagerBusyError",
    "ManagerClosedError",
    "MissingExtraError",
    "ModelNotFoundError",
    "NotTransferableError",
    "OptionError",
    "OutOfBudgetError",
    "Pipeline",
    "PipelineCancelledError",
    "PipelineDisposedError",
    "PipelineInUseError",
    "PipelineInheritedError",
    "PipelineManager",
    "PipelineMemory",
    "PipelineOptions",
    "PrepareError",
    "PreparedModel",
    "ProgressEvent",
    "QuestionAnsweringPipeline",
    "RunError",
    "SessionOptions",
    "State",
    "TextClassificationPipeline",
    "TokenClassificationPipeline",
    "UnsupportedModelError",
    "WorkerCrashedError",
    "WorkerMemoryError",
    "ZeroShotClassificationPipeline",
    "__version__",
    "apipeline",
    "cached_models",
    "dispose_all",
    "download",
    "errors",
    "live",
    "memory",
    "model_files",
    "pipeline",
    "prepare",
    "remove_cached",
    "settings",
]


def __getattr__(name: str) -> object:
    import importlib

    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ebbtide' has no attribute {name!r}")
    module = importlib.import_module(f"ebbtide.{home or name}")
    value = getattr(module, name) if home else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
