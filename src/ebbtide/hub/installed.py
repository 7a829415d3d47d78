"""Models that come as Python packages: the entry point group ``ebbtide.models``.

A closed network installs a model like any other package. Its ``pyproject.toml`` says::

    [project.entry-points."ebbtide.models"]
    "our-team/our-model" = "our_model_package:model"

The name is what users pass to `pipeline()`. The object is a folder in Hugging Face layout (`str` or
`Path`), a map with the keys below, or a function without arguments that returns one of these:

- ``folder``: the folder; required.
- ``files``: more files by name, for those that lie elsewhere (in another package, say).
- ``sha256``: what files must hash to, by name.
- ``fallback_for``: tasks this model stands in for when the hub cannot be reached.

So a package needs no import of Ebbtide.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ebbtide.errors import ModelNotFoundError
from ebbtide.hub.files import ModelFiles

if TYPE_CHECKING:
    import importlib.metadata

log = logging.getLogger("ebbtide.hub")

GROUP: Final = "ebbtide.models"
_KEYS: Final = frozenset({"folder", "files", "sha256", "fallback_for"})


@dataclasses.dataclass(frozen=True, slots=True)
class InstalledModel:
    """A model that a Python package offers.

    Attributes:
        name: What to pass to `pipeline()`.
        package: The package that offers it, with its version.
        files: Its files.
        fallback_for: The tasks it stands in for when the hub cannot be reached.
    """

    name: str
    package: str
    files: ModelFiles
    fallback_for: tuple[str, ...] = ()


def names() -> list[str]:
    """The names of all models that installed packages offer, sorted; imports none of them."""
    import importlib.metadata

    return sorted({entry.name for entry in importlib.metadata.entry_points(group=GROUP)})


def find(name: str) -> InstalledModel | None:
    """The installed model of this name, or None where no package offers one.

    Raises:
        ModelNotFoundError: A package offers it, but what it offers cannot be used.
    """
    import importlib.metadata

    for entry in importlib.metadata.entry_points(group=GROUP, name=name):
        return _load(entry)
    return None


def fallback(task: str) -> InstalledModel | None:
    """The model that offers to stand in for this task, or None; the first by name of several."""
    import importlib.metadata

    for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda one: one.name):
        try:
            model = _load(entry)
        except ModelNotFoundError as error:
            log.info("installed model %s is passed over: %s", entry.name, error)
            continue
        if task in model.fallback_for:
            return model
    return None


def _load(entry: importlib.metadata.EntryPoint) -> InstalledModel:
    package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
    try:
        offer = entry.load()
        if callable(offer):
            offer = offer()
        return _understand(entry.name, package, offer)
    except ModelNotFoundError:
        raise
    except Exception as error:
        raise ModelNotFoundError(
            f"The package {package} offers model {entry.name!r}, but it cannot be used:"
            f" {type(error).__name__}: {error}",
            model=entry.name,
        ) from error


def _understand(name: str, package: str, offer: object) -> InstalledModel:
    if isinstance(offer, str | os.PathLike):
        offer = {"folder": offer}
    if not isinstance(offer, Mapping) or "folder" not in offer or not set(offer) <= _KEYS:
        raise ModelNotFoundError(
            f"The package {package} offers model {name!r} as something else than a folder or a map"
            f" with the keys {', '.join(sorted(_KEYS))} (folder is required).",
            model=name,
        )
    folder = Path(offer["folder"])
    if not folder.is_dir():
        raise ModelNotFoundError(
            f"The package {package} offers model {name!r} in {folder}, which is no folder.",
            model=name,
        )
    files = ModelFiles(
        name=name,
        folder=folder,
        elsewhere={str(key): Path(path) for key, path in offer.get("files", {}).items()},
        sha256={str(key): str(value) for key, value in offer.get("sha256", {}).items()},
    )
    tasks = tuple(str(task) for task in offer.get("fallback_for", ()))
    return InstalledModel(name, package, files, tasks)
