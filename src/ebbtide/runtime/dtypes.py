"""The number formats a model's files come in, and the file name suffix of each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from ebbtide.errors import InputError, unknown_value

SUFFIXES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "fp32": "",
        "fp16": "_fp16",
        "q8": "_quantized",
        "int8": "_int8",
        "uint8": "_uint8",
        "q4": "_q4",
        "q4f16": "_q4f16",
        "q2": "_q2",
        "q2f16": "_q2f16",
        "q1": "_q1",
        "q1f16": "_q1f16",
        "bnb4": "_bnb4",
    }
)
"""What a dtype adds to a file's stem, as Transformers.js names them: ``model_q4.onnx``."""

AUTO: Final = "auto"

_CPU_ORDER: Final = (
    "fp32", "q8", "int8", "uint8", "fp16", "q4", "bnb4", "q4f16", "q2", "q2f16", "q1", "q1f16",
)  # fmt: skip
_GPU_ORDER: Final = (
    "fp32", "fp16", "q4f16", "q4", "bnb4", "q8", "int8", "uint8", "q2f16", "q2", "q1f16", "q1",
)  # fmt: skip


def auto_order(device: str) -> tuple[str, ...]:
    """In which order ``auto`` looks for a file on this device: exact first, then what runs well."""
    return _CPU_ORDER if device == "cpu" else _GPU_ORDER


def for_file(choice: str | Mapping[str, str] | None, file: str, *, kind: str) -> str | None:
    """What a ``dtype=`` or ``device=`` option says of one file: the same for all, or a map by file.

    Raises:
        InputError: The option is neither text, a map from text to text, nor None; or the map
            does not have the file.

    Example:
        >>> for_file({"model": "q8"}, "model", kind="dtype")
        'q8'
    """
    if choice is None or isinstance(choice, str):
        return choice
    if isinstance(choice, Mapping) and all(
        isinstance(key, str) and isinstance(value, str) for key, value in choice.items()
    ):
        if file not in choice:
            raise InputError(
                f"{kind} is a map by file, and has none for {file!r}: it has {', '.join(choice)}.",
                value=dict(choice),
            )
        return choice[file]
    raise InputError(
        f"{kind} takes a name, or a map from file to name such as {{'model': ...}},"
        f" not {choice!r}.",
        value=choice,
    )


def check(dtype: str) -> str:
    """The dtype itself, if there is one of that name.

    Raises:
        InputError: There is none; names the nearest.
    """
    if dtype != AUTO and dtype not in SUFFIXES:
        raise unknown_value("dtype", dtype, [AUTO, *SUFFIXES])
    return dtype
