"""What a model's config.json and its neighbours say, as far as Ebbtide reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from ebbtide.errors import LoadError
from ebbtide.hub import ModelFiles

_POSITIONS_AFTER_PADDING: Final = frozenset(
    {
        "camembert",
        "data2vec-text",
        "ibert",
        "longformer",
        "luke",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)
"""Model types that number positions from ``pad_token_id + 1``, and so can use that many fewer."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model's configuration.

    Attributes:
        model_type: As in ``bert``; empty where the file does not say.
        positions: How many tokens the model can take, or None where nothing bounds it.
        dtypes: What the file itself says of dtypes: one for all files, a map by file, or None.
        devices: The same of devices.
        external_data: Whether weights lie in files beside the graph: a yes, the number of files,
            or a map by file name.
        labels: The labels in the order of the model's scores, or None where it names none.
        raw: The whole of config.json.
    """

    model_type: str
    positions: int | None
    dtypes: str | Mapping[str, str] | None
    devices: str | Mapping[str, str] | None
    external_data: bool | int | Mapping[str, bool | int]
    labels: tuple[str, ...] | None
    raw: Mapping[str, Any]

    @property
    def problem_type(self) -> str | None:
        """As in ``multi_label_classification``; None where the file does not say."""
        found = self.raw.get("problem_type")
        return found if isinstance(found, str) else None

    def dtype_of(self, file: str) -> str | None:
        """The dtype that the config names for one file."""
        return _of_file(self.dtypes, file)

    def device_of(self, file: str) -> str | None:
        """The device that the config names for one file."""
        return _of_file(self.devices, file)

    @classmethod
    def read(cls, files: ModelFiles) -> ModelConfig:
        """Read a model's config.json.

        Raises:
            ModelNotFoundError: The model has none.
            LoadError: It is not JSON, or not an object.
        """
        files.need("config.json", "it says what kind of model this is. Is this a model's folder?")
        raw = files.json("config.json") or {}
        hints = raw.get("transformers.js_config")
        hints = hints if isinstance(hints, Mapping) else {}
        return cls(
            model_type=str(raw.get("model_type", "")),
            positions=_positions(raw),
            dtypes=_by_file(hints.get("dtype"), "dtype", files),
            devices=_by_file(hints.get("device"), "device", files),
            external_data=hints.get("use_external_data_format") or False,
            labels=_labels(raw, files),
            raw=raw,
        )


def _labels(raw: Mapping[str, Any], files: ModelFiles) -> tuple[str, ...] | None:
    declared = raw.get("id2label")
    if declared is None:
        return None
    if isinstance(declared, Mapping):
        by_number = {str(number): label for number, label in declared.items()}
        labels = [by_number.get(str(number)) for number in range(len(by_number))]
        if None not in labels:
            return tuple(str(label) for label in labels)
    path = str(files.find("config.json"))
    raise LoadError(
        f"{path}: id2label is no map from the numbers 0, 1, 2... to labels: {declared!r:.200}.",
        path=path,
    )


def _by_file(value: Any, key: str, files: ModelFiles) -> str | Mapping[str, str] | None:
    if value is None or isinstance(value, str | Mapping):
        return value
    path = str(files.find("config.json"))
    raise LoadError(
        f"{path}: the config's {key} (in transformers.js_config) is neither a name nor a map from"
        f" file to name: {value!r}.",
        path=path,
    )


def _of_file(declared: str | Mapping[str, str] | None, file: str) -> str | None:
    found = declared.get(file) if isinstance(declared, Mapping) else declared
    return found if isinstance(found, str) else None


def _positions(raw: Mapping[str, Any]) -> int | None:
    count = raw.get("max_position_embeddings", raw.get("n_positions"))
    if not isinstance(count, int) or count <= 0:
        return None
    kind = raw.get("model_type")
    absolute = raw.get("position_embedding_type", "absolute") == "absolute"
    if kind in _POSITIONS_AFTER_PADDING or (kind == "esm" and absolute):
        padding = raw.get("pad_token_id")
        count -= (padding if isinstance(padding, int) else 1) + 1
    return count
