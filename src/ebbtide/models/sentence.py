"""What a sentence-transformers model says of itself: how token vectors become a sentence's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from ebbtide.errors import UnsupportedModelError
from ebbtide.hub import ModelFiles

_MODES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "pooling_mode_cls_token": "cls",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_max_tokens": "max",
        "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
        "pooling_mode_weightedmean_tokens": "weighted_mean",
        "pooling_mode_lasttoken": "eos",
    }
)
"""The keys of 1_Pooling/config.json, in the order in which their vectors are concatenated."""

_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "cls": "cls",
        "mean": "mean",
        "max": "max",
        "mean_sqrt_len_tokens": "mean_sqrt_len",
        "weightedmean": "weighted_mean",
        "lasttoken": "eos",
    }
)
"""The values of ``pooling_mode``, which newer files have in place of these keys."""

SENTENCE_FILES: Final = ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json")
"""Where a recipe usually is."""

_READ: Final = frozenset({"Transformer", "Pooling", "Normalize"})


@dataclasses.dataclass(frozen=True, slots=True)
class SentenceRecipe:
    """How this model makes one vector of a text.

    Attributes:
        poolings: Names of poolings; the vectors of several are concatenated.
        normalize: Whether the vector is scaled to length 1.
        limit: Tokens of a text that are read, or None for the model's whole window.
        unread: Modules of the model that Ebbtide does not apply: the recipe cannot be followed.
    """

    poolings: tuple[str, ...]
    normalize: bool
    limit: int | None
    unread: tuple[str, ...] = ()

    def check(self, model: str) -> SentenceRecipe:
        """The recipe itself, if it can be followed.

        Raises:
            UnsupportedModelError: It has a module that Ebbtide does not apply.
        """
        if self.unread:
            raise UnsupportedModelError(
                f"Model {model!r} makes its sentence vectors with {', '.join(self.unread)}, which"
                " Ebbtide does not apply. Pass pooling= to choose one yourself.",
                model=model,
            )
        return self


def read_recipe(files: ModelFiles) -> SentenceRecipe | None:
    """The recipe in modules.json and the pooling's config, or None where the model has none.

    Raises:
        LoadError: One of the files is there and is not what it should be.
    """
    modules = files.json_list("modules.json")
    if modules is None:
        return None
    poolings: tuple[str, ...] = ()
    normalize = False
    unread: list[str] = []
    for module in modules:
        kind, path = _kind(module), _path(module)
        if kind == "Pooling":
            config = files.json(f"{path}/config.json" if path else "config.json") or {}
            poolings = _poolings(config)
            if not poolings:
                named = config.get("pooling_mode", "no pooling at all")
                unread.append(f"{named!r} in {path}/config.json")
        elif kind == "Normalize":
            normalize = True
        elif kind not in _READ:
            unread.append(kind)
    limit = (files.json("sentence_bert_config.json") or {}).get("max_seq_length")
    return SentenceRecipe(
        poolings=poolings or ("none",),
        normalize=normalize,
        limit=limit if isinstance(limit, int) and limit > 0 else None,
        unread=tuple(unread),
    )


def _kind(module: Any) -> str:
    name = module.get("type", "") if isinstance(module, Mapping) else ""
    return str(name).rpartition(".")[2] or "an unnamed module"


def _path(module: Any) -> str:
    return str(module.get("path", "")) if isinstance(module, Mapping) else ""


def _poolings(config: Mapping[str, Any]) -> tuple[str, ...]:
    named = tuple(mode for key, mode in _MODES.items() if config.get(key) is True)
    one = config.get("pooling_mode")
    if not named and isinstance(one, str):
        named = (_NAMES[one],) if one in _NAMES else ()
    return named
