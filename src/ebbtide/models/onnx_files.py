"""Which ONNX file of a model to load, for a dtype and a device."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Final

from ebbtide.errors import InputError, LoadError, ModelNotFoundError
from ebbtide.hub import ModelFiles
from ebbtide.models.config import ModelConfig
from ebbtide.runtime import dtypes

_MOST_PARTS: Final = 1000

ByFile = str | Mapping[str, str] | None
ExternalData = bool | int | Mapping[str, bool | int] | None


@dataclasses.dataclass(frozen=True, slots=True)
class OnnxFile:
    """One ONNX file, chosen.

    Attributes:
        name: Its name among the model's files.
        parts: The names of the files beside it that hold its weights.
        dtype: What it is in.
    """

    name: str
    parts: tuple[str, ...]
    dtype: str


def choose(
    files: ModelFiles,
    config: ModelConfig,
    stem: str,
    *,
    dtype: ByFile,
    device: str,
    subfolder: str,
    external_data: ExternalData = None,
) -> OnnxFile:
    """The file to load.

    Args:
        files: The model.
        config: Its configuration, which may name a dtype.
        stem: The file's name without suffix and ending, as in ``model``.
        dtype: The user's choice: a dtype, a map by stem, ``auto`` or None. None and ``auto`` take
            what the config names, else the first that is there of an order by device, fp32 first.
        device: The device's name.
        subfolder: Where ONNX files are looked for before the model's own folder.
        external_data: Whether weights lie in files beside it; None for what the config says.

    Raises:
        InputError: There is no such dtype, or a map names no file of this model.
        ModelNotFoundError: The file for this dtype is not there; names the dtypes that are.
    """
    wanted = dtypes.check(dtypes.for_file(dtype, stem, kind="dtype") or dtypes.AUTO)
    if wanted == dtypes.AUTO:
        wanted = dtypes.check(config.dtype_of(stem) or dtypes.AUTO)
    order = dtypes.auto_order(device) if wanted == dtypes.AUTO else (wanted,)
    for one in order:
        for name in _names(stem, one, subfolder):
            if files.has(name):
                parts = _parts(files, name, stem, external_data, config)
                return OnnxFile(name, parts, one)
    raise _missing(files, stem, order, subfolder)


def available(files: ModelFiles, stem: str, subfolder: str) -> tuple[str, ...]:
    """The dtypes that the model has a file of."""
    return tuple(
        dtype
        for dtype in dtypes.SUFFIXES
        if any(files.has(name) for name in _names(stem, dtype, subfolder))
    )


def _names(stem: str, dtype: str, subfolder: str) -> list[str]:
    file = f"{stem}{dtypes.SUFFIXES[dtype]}.onnx"
    return [f"{subfolder}/{file}", file] if subfolder else [file]


def _parts(
    files: ModelFiles, name: str, stem: str, external_data: ExternalData, config: ModelConfig
) -> tuple[str, ...]:
    """The files that hold the weights; a missing one is named before ONNX Runtime fails on it."""
    file = name.rpartition("/")[2]
    declared = config.external_data if external_data is None else external_data
    if isinstance(declared, Mapping):
        declared = declared.get(file, declared.get(stem, False))
    if not isinstance(declared, int) or not 0 <= declared <= _MOST_PARTS:
        text = (
            "use_external_data_format takes True, False, a number of files up to"
            f" {_MOST_PARTS}, or a map from file to one of these, not {declared!r}"
        )
        if external_data is None:
            source = str(files.find("config.json"))
            raise LoadError(f"{source}: {text}.", path=source)
        raise InputError(f"{text}.", value=declared)
    parts = [f"{name}_data" + (f"_{n}" if n else "") for n in range(int(declared) or _MOST_PARTS)]
    if not declared:  # nobody says so, but they may be there
        return tuple(itertools.takewhile(files.has, parts)) if external_data is None else ()
    missing = tuple(part for part in parts if not files.has(part))
    if missing:
        raise ModelNotFoundError(
            f"Model {files.name!r}: the weights of {name} lie in files beside it, and"
            f" {', '.join(missing)} is missing. Copy or download it to the same folder.",
            model=files.name,
            missing=missing,
        )
    return tuple(parts)


def _missing(
    files: ModelFiles, stem: str, order: tuple[str, ...], subfolder: str
) -> ModelNotFoundError:
    there = available(files, stem, subfolder)
    names = tuple(_names(stem, order[0], subfolder))
    if there:
        advice = f"It has these dtypes: {', '.join(there)}; pass one as dtype=."
    elif files.onnx_names():
        advice = (
            f"Its ONNX files are {', '.join(files.onnx_names()[:6])}; pass model_file_name= or"
            " subfolder= to use one."
        )
    else:
        advice = (
            "It has no ONNX file at all. Export it (`optimum-cli export onnx`), or take a"
            " repository that has ONNX files."
        )
    looked = " nor ".join(names)
    return ModelNotFoundError(
        f"Model {files.name!r} has no {looked}. {advice}", model=files.name, missing=names
    )
