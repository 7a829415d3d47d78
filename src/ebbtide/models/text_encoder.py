"""A text encoder in memory: tokenizer, one session, and the forward from texts to arrays.

One driver for every architecture: what is fed is led by what the session takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ebbtide.cancellation import CancelToken
from ebbtide.errors import UnsupportedModelError
from ebbtide.hub import ModelFiles
from ebbtide.lifecycle import Lifecycle
from ebbtide.models.loading import Driver, Loaded, LoadOptions
from ebbtide.models.tokenizer import Batch
from ebbtide.runtime import TensorInfo, Waiting

_FED: Final = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids"})

Outputs = tuple[tuple[str, ...], ...]
"""What a task needs of a graph: for each output, its possible names in the order of preference."""

FEATURES: Final[Outputs] = (("last_hidden_state", "logits", "token_embeddings"),)
LOGITS: Final[Outputs] = (("logits",),)
SPANS: Final[Outputs] = (("start_logits",), ("end_logits",))


class TextEncoder(Driver):
    """One encoder model, as one pipeline owns it."""

    def __init__(self, loaded: Loaded, outputs: Outputs) -> None:
        super().__init__(loaded)
        self._inputs = self.graph.inputs
        found = [_output(self.graph.outputs, names, self.name) for names in outputs]
        self._outputs = [one.name for one in found]
        width = found[0].shape[-1] if found[0].shape else None
        self._width = width if isinstance(width, int) else None

    @classmethod
    def load(
        cls,
        files: ModelFiles,
        options: LoadOptions,
        outputs: Outputs,
        extra_files: Sequence[str],
        lifecycle: Lifecycle,
        token: CancelToken,
        told: Callable[[Waiting], object] = lambda status: None,
    ) -> TextEncoder:
        """Load a model; what is loaded belongs to ``lifecycle`` at once, so that it is never lost.

        Args:
            files: The model.
            options: What the user chose.
            outputs: What the task needs of the graph.
            extra_files: What else the task will read, so that all is downloaded together.
            lifecycle: The owner.
            token: The way to stop the load.
            told: Called with ``preparing`` and ``prepared`` where the load waits for that.

        Raises:
            ModelNotFoundError: A file is missing.
            LoadError: A file cannot be read.
            UnsupportedModelError: The graph takes or gives something else than a text encoder does.
            PipelineCancelledError: The token was cancelled.
        """
        loaded = Loaded.of(files, options, extra_files, lifecycle, token, told)
        assert loaded.session.value is not None
        _check_inputs(loaded.session.value.inputs, files.name)
        return cls(loaded, outputs)

    def labels(self, width: int | None = None) -> tuple[str, ...]:
        """The names of the model's scores; those that transformers gives where the config has none.

        Args:
            width: How many scores the graph gave; None for what it says of itself.

        Raises:
            UnsupportedModelError: The config names more or fewer labels than there are scores.
        """
        labels, width = self.config.labels, self._width if width is None else width
        if labels is None:
            declared = self.config.raw.get("num_labels", 2)
            count = declared if isinstance(declared, int) else 2
            labels = tuple(f"LABEL_{number}" for number in range(count))
        if width is not None and len(labels) != width:
            raise UnsupportedModelError(
                f"The config of model {self.name!r} has {len(labels)} labels, and its graph gives"
                f" {width} scores: give its config.json an id2label with a name for each score.",
                model=self.name,
            )
        return labels

    @property
    def lanes(self) -> int:
        """How many batches at once, each with ``in_lane``, are faster than one after another."""
        session = self._session.value
        return 1 if session is None else session.lanes

    def tokens_that_fit(self, length: int, most: int) -> int:
        """How many tokens a batch may have; less than ``most`` where memory is limited."""
        session = self._session.value
        return most if session is None else session.tokens_that_fit(length, most)

    def forward(
        self, batch: Batch, token: CancelToken, *, in_lane: bool = False
    ) -> list[NDArray[Any]]:
        """What the graph gives for a batch: one array an output of the task.

        Raises:
            PipelineCancelledError: The token was cancelled.
            RunError: The graph could not be run.
        """
        session = self.graph
        feeds = {one.name: _feed(one, batch) for one in self._inputs}
        run = session.run_in_lane if in_lane else session.run
        return run(feeds, self._outputs, token)


def _check_inputs(inputs: Sequence[TensorInfo], model: str) -> None:
    unknown = [one.name for one in inputs if one.name not in _FED]
    if unknown or not any(one.name == "input_ids" for one in inputs):
        takes = ", ".join(one.name for one in inputs)
        raise UnsupportedModelError(
            f"The graph of model {model!r} is no text encoder: it takes {takes}, and a text"
            f" encoder takes input_ids and at most {', '.join(sorted(_FED - {'input_ids'}))}.",
            model=model,
        )


def _output(outputs: Sequence[TensorInfo], names: Sequence[str], model: str) -> TensorInfo:
    by_name = {one.name: one for one in outputs}
    for name in names:
        if name in by_name:
            return by_name[name]
    raise UnsupportedModelError(
        f"The graph of model {model!r} gives {', '.join(sorted(by_name))}, and this task needs"
        f" {' or '.join(names)}: export the model for this task.",
        model=model,
    )


def _feed(info: TensorInfo, batch: Batch) -> NDArray[Any]:
    array: NDArray[np.int64]
    if info.name == "input_ids":
        array = batch.input_ids
    elif info.name == "attention_mask":
        array = batch.attention_mask
    elif info.name == "token_type_ids":
        array = batch.token_type_ids
    else:
        array = np.maximum(np.cumsum(batch.attention_mask, axis=1) - 1, 0)
    return array.astype(info.dtype, copy=False)
