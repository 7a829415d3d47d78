"""What a user may choose of a model's load, and the load of what every model has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from ebbtide import runtime
from ebbtide._settings import Prepare
from ebbtide.cancellation import CancelToken
from ebbtide.errors import PipelineDisposedError
from ebbtide.hub import ModelFiles
from ebbtide.lifecycle import Lifecycle
from ebbtide.memory.ledger import Lease
from ebbtide.models.config import ModelConfig
from ebbtide.models.onnx_files import ByFile, ExternalData, OnnxFile, choose
from ebbtide.models.tokenizer import TOKENIZER_FILES, Tokenizer
from ebbtide.runtime import GraphSession, SessionOptions, Waiting, devices, dtypes

MODEL: Final = "model"
"""What the file of a model of one graph is called."""

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

    def stem_of(self, stem: str) -> str:
        """The name of a file without suffix and ending, where the user may have named another."""
        return self.model_file_name or stem if stem == MODEL else stem

    def choose(self, files: ModelFiles, config: ModelConfig, stem: str = MODEL) -> OnnxFile:
        """The ONNX file to load.

        Args:
            files: The model.
            config: Its configuration.
            stem: Which of its files, as in ``encoder_model``.

        Raises:
            InputError: There is no such device or dtype.
            ModelNotFoundError: The model has no such file; names the dtypes that it has.
        """
        stem = self.stem_of(stem)
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
    """A model, loaded: what a driver is made of.

    Attributes:
        name: The model's name or folder, as it was asked for.
        config: Its configuration.
        tokenizer: Its tokenizer.
        sessions: The hold on each of its graphs, by the names of their files.
        dtype: What the loaded files are in.
        label: Whose it is, for messages.
    """

    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    sessions: Mapping[str, Lease[GraphSession]]
    dtype: str
    label: str

    @property
    def session(self) -> Lease[GraphSession]:
        """The hold on the graph of a model that has one."""
        return self.sessions[MODEL]

    @classmethod
    def of(
        cls,
        files: ModelFiles,
        options: LoadOptions,
        extra_files: Sequence[str],
        lifecycle: Lifecycle,
        token: CancelToken,
        told: Callable[[Waiting], object],
        stems: Sequence[str] = (MODEL,),
    ) -> Loaded:
        """Load a model; what is loaded belongs to ``lifecycle`` at once, so that it is never lost.

        Args:
            files: The model.
            options: What the user chose.
            extra_files: What else the task will read, so that all is downloaded together.
            lifecycle: The owner.
            token: The way to stop the load.
            told: Called with ``preparing`` and ``prepared`` where the load waits for that.
            stems: Which files it is of, as in ``encoder_model``.

        Raises:
            ModelNotFoundError: A file is missing.
            LoadError: A file cannot be read.
            PipelineCancelledError: The token was cancelled.
        """
        config = ModelConfig.read(files)
        devices_of = {one: options.device_of(options.stem_of(one), config) for one in stems}
        chosen = {one: options.choose(files, config, one) for one in stems}
        graphs = [name for file in chosen.values() for name in (file.name, *file.parts)]
        files.fetch([*graphs, *TOKENIZER_FILES, *extra_files])
        runtime.start()
        tokenizer = Tokenizer.load(files, config, token)
        lifecycle.own(tokenizer.lease)
        token.check()
        sessions = {}
        for stem, file in chosen.items():
            parts = [found for part in file.parts if (found := files.find(part)) is not None]
            sessions[stem] = runtime.acquire(
                files.need(file.name, "it was there a moment ago."),
                devices_of[stem],
                options.session_options,
                token,
                parts=parts,
                wanted=options.prepare,
                told=told,
            )
            lifecycle.own(sessions[stem])
        dtype = ", ".join(dict.fromkeys(one.dtype for one in chosen.values()))
        return cls(files.name, config, tokenizer, sessions, dtype, lifecycle.label)


class Driver:
    """A loaded model as one pipeline owns it: what the drivers of all kinds of models have.

    Args:
        loaded: The model.
        stem: Which of its files is its `graph`.
    """

    def __init__(self, loaded: Loaded, stem: str = MODEL) -> None:
        self.name = loaded.name
        self.config = loaded.config
        self.tokenizer = loaded.tokenizer
        self.dtype = loaded.dtype
        self.label = loaded.label
        self._session = loaded.sessions[stem]
        self.device = str(self.graph.device)

    @property
    def graph(self) -> GraphSession:
        """The graph.

        Raises:
            PipelineDisposedError: The pipeline was disposed.
        """
        session = self._session.value
        if session is None:
            raise PipelineDisposedError(f"{self.label} was disposed.", pipeline=self.label)
        return session

    @property
    def shares_scales(self) -> bool:
        """Whether what runs in one batch shares a scale, so that a result depends on its batch."""
        return any(one in DYNAMIC for one in self.dtype.split(", "))
