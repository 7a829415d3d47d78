"""What a user may choose of a model's load, and the load of what every model has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Final

from ebbtide import runtime
from ebbtide._settings import Prepare
from ebbtide.cancellation import CancelToken
from ebbtide.hub import ModelFiles
from ebbtide.lifecycle import Lifecycle
from ebbtide.memory.ledger import Lease
from ebbtide.models.config import ModelConfig
from ebbtide.models.onnx_files import ByFile, ExternalData, OnnxFile, choose
from ebbtide.models.tokenizer import TOKENIZER_FILES, Tokenizer
from ebbtide.runtime import GraphSession, SessionOptions, Waiting, devices, dtypes

DYNAMIC: Final = frozenset({"q8", "int8", "uint8"})
"""Dtypes whose files are quantised dynamically: each run finds a scale for its activations."""


@dataclasses.dataclass(frozen=True, slots=True)
class LoadOptions:
    """What a user may choose of a model's load; see `ebbtide.pipeline`."""

    device: ByFile = "cpu"
    dtype: ByFile = None
    subfolder: str = "onnx"
    model_file_name: str | None = None
    use_external_data_format: ExternalData = None
    session_options: SessionOptions = dataclasses.field(default_factory=SessionOptions)
    prepare: Prepare | None = None

    def device_of(self, stem: str, config: ModelConfig) -> str:
        """Where one file of the model is to run.

        Raises:
            InputError: There is no such device.
        """
        device = dtypes.for_file(self.device, stem, kind="device") or config.device_of(stem)
        devices.parse(device or "cpu")
        return device or "cpu"

    def choose(self, files: ModelFiles, config: ModelConfig) -> OnnxFile:
        """The ONNX file to load.

        Raises:
            InputError: There is no such device or dtype.
            ModelNotFoundError: The model has no such file; names the dtypes that it has.
        """
        stem = self.model_file_name or "model"
        return choose(
            files,
            config,
            stem,
            dtype=self.dtype,
            device=self.device_of(stem, config),
            subfolder=self.subfolder,
            external_data=self.use_external_data_format,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Loaded:
    """A model of one graph, loaded: what a driver is made of.

    Attributes:
        name: The model's name or folder, as it was asked for.
        config: Its configuration.
        tokenizer: Its tokenizer.
        session: The hold on its graph.
        dtype: What the loaded file is in.
        label: Whose it is, for messages.
    """

    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    session: Lease[GraphSession]
    dtype: str
    label: str

    @classmethod
    def of(
        cls,
        files: ModelFiles,
        options: LoadOptions,
        extra_files: Sequence[str],
        lifecycle: Lifecycle,
        token: CancelToken,
        told: Callable[[Waiting], object],
    ) -> Loaded:
        """Load a model; what is loaded belongs to ``lifecycle`` at once, so that it is never lost.

        Args:
            files: The model.
            options: What the user chose.
            extra_files: What else the task will read, so that all is downloaded together.
            lifecycle: The owner.
            token: The way to stop the load.
            told: Called with ``preparing`` and ``prepared`` where the load waits for that.

        Raises:
            ModelNotFoundError: A file is missing.
            LoadError: A file cannot be read.
            PipelineCancelledError: The token was cancelled.
        """
        config = ModelConfig.read(files)
        device = options.device_of(options.model_file_name or "model", config)
        file = options.choose(files, config)
        files.fetch([file.name, *file.parts, *TOKENIZER_FILES, *extra_files])
        runtime.start()
        tokenizer = Tokenizer.load(files, config, token)
        lifecycle.own(tokenizer.lease)
        token.check()
        parts = [found for part in file.parts if (found := files.find(part)) is not None]
        path = files.need(file.name, "it was there a moment ago.")
        session = runtime.acquire(
            path,
            device,
            options.session_options,
            token,
            parts=parts,
            wanted=options.prepare,
            told=told,
        )
        lifecycle.own(session)
        return cls(files.name, config, tokenizer, session, file.dtype, lifecycle.label)
