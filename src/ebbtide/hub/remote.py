"""A model by its id on the hub: each file is downloaded when it is first asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from ebbtide._settings import settings
from ebbtide.cancellation import CancelToken
from ebbtide.errors import DownloadError, InputError, ModelNotFoundError
from ebbtide.hub.cache import COMMIT, FileInfo, Listing, Repository
from ebbtide.hub.events import Listener
from ebbtide.hub.files import ModelFiles

log = logging.getLogger("ebbtide.hub")

_ID: Final = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_REVISION: Final = re.compile(r"(?!.*\.\.)\w[\w./-]*", re.ASCII)
_TOKEN: Final = re.compile(
    r"[!-~]+"
)  # what else there is, such as a line break, no header can have


@dataclasses.dataclass(frozen=True, slots=True)
class HubOptions:
    """How a model is had from the hub; see `ebbtide.pipeline`."""

    revision: str = "main"
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    token: str | bool | None = dataclasses.field(default=None, repr=False)

    def check(self) -> HubOptions:
        """The options themselves, if they can be used.

        Raises:
            InputError: One of them cannot.
        """
        if not isinstance(self.revision, str) or not _REVISION.fullmatch(self.revision):
            raise InputError(
                f"revision takes a branch, a tag or a commit, not {self.revision!r}.",
                value=self.revision,
            )
        if not isinstance(self.local_files_only, bool):
            raise InputError(
                f"local_files_only takes True or False, not {self.local_files_only!r}.",
                value=self.local_files_only,
            )
        if self.token is not None and not isinstance(self.token, str | bool):
            raise InputError("token takes a text, True, False or None.")
        if isinstance(self.token, str) and not _TOKEN.fullmatch(self.token):
            raise InputError(
                "token is empty, or has a character that no token has, such as a line break at its"
                " end; None is for the token that is saved."
            )
        if self.cache_dir is not None and not isinstance(self.cache_dir, str | os.PathLike):
            raise InputError(
                f"cache_dir takes a folder, not {type(self.cache_dir).__name__}.",
                value=self.cache_dir,
            )
        return self

    @property
    def offline(self) -> bool:
        """Whether the network is left alone."""
        from huggingface_hub import constants

        return self.local_files_only or settings.offline or bool(constants.HF_HUB_OFFLINE)


def is_id(model: str) -> bool:
    """Whether a text can be a model's id on the hub, as in ``org/name``."""
    return _ID.fullmatch(model) is not None and ".." not in model and "--" not in model


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HubFiles(ModelFiles):
    """A model's files on the hub and in the cache.

    Attributes:
        repository: The model's place in the cache.
        commit: The commit that all files are of.
        listing: What the commit has; None where only the cache can be asked.
        options: How to have what is missing.
        listener: Told of downloads.
        cancel: Stops a download.
    """

    repository: Repository
    commit: str
    listing: Listing | None
    options: HubOptions
    listener: Listener
    cancel: CancelToken

    def has(self, name: str) -> bool:
        """Whether the model has such a file; it is not downloaded for that."""
        return (self.listing is not None and name in self.listing) or self._path(name).is_file()

    def look(self, name: str) -> tuple[int, bool]:
        """A file's bytes, and whether it is on this machine; the model has a file of this name."""
        if self.listing is None or name not in self.listing:
            return ModelFiles.look(self, name)
        return self.listing[name].size, self._path(name).is_file()

    def find(self, name: str) -> Path | None:
        """The file of this name, downloaded if need be; None where the model has none.

        Raises:
            DownloadError: It is on the hub, and cannot be had.
        """
        self._download([name])
        path = self._path(name)
        return path if path.is_file() else None

    def fetch(self, names: Iterable[str]) -> None:
        """Download those of these files that the model has and the cache has not.

        With these the model can be loaded, so that from now on the revision is this commit without
        a network too. What was known before stays until then.

        Raises:
            DownloadError: One of them cannot be had.
        """
        self._download(names)
        self._refer()

    def _refer(self) -> None:
        with contextlib.suppress(OSError):  # a cache that is read-only is as it is
            self.repository.refer(self.options.revision, self.commit)

    def _download(self, names: Iterable[str]) -> None:
        missing = self._missing(names)
        if not missing:
            return
        if self.options.offline:
            raise DownloadError(
                f"{missing[0].name} of model {self.name!r} is not in the cache"
                f" {self.repository.root}, and the network is not to be used (offline,"
                " local_files_only or HF_HUB_OFFLINE). Load it once with the network.",
                model=self.name,
                file=missing[0].name,
            )
        from ebbtide.hub.download import Hub

        hub = Hub(self.repository, self.options.revision, self.options.token)
        hub.fetch(self.commit, missing, self.listener, self.cancel)
        if self.repository.commit_of(self.options.revision) is None:
            self._refer()

    def onnx_names(self) -> list[str]:
        """The names of all ONNX files, sorted: what an error message can offer."""
        if self.listing is None:
            return ModelFiles.onnx_names(self)
        return sorted(name for name in self.listing if name.endswith(".onnx"))

    def _path(self, name: str) -> Path:
        return self.folder / name

    def _missing(self, names: Iterable[str]) -> list[FileInfo]:
        if self.listing is None:
            return []
        listed = [self.listing[name] for name in dict.fromkeys(names) if name in self.listing]
        return [one for one in listed if not self._path(one.name).is_file()]


def open_hub(model: str, options: HubOptions, listener: Listener, cancel: CancelToken) -> HubFiles:
    """A model on the hub, or what the cache has of it where the hub cannot be reached.

    Raises:
        ModelNotFoundError: There is no such model or revision.
        DownloadError: The hub cannot be reached or answers with an error, and the cache has nothing
            of the model.
        AccessDeniedError: The model is gated or private.
        PipelineCancelledError: The load was cancelled.
    """
    repository = Repository(options.cache_dir, model)
    commit = repository.commit_of(options.revision)
    listing = repository.listing(commit) if commit else None
    pinned = COMMIT.fullmatch(options.revision) is not None and listing is not None
    if not options.offline and not pinned:
        from ebbtide.hub.download import Hub

        try:
            commit, listing = Hub(repository, options.revision, options.token).look_up(cancel)
        except DownloadError as error:
            if commit is None or not repository.snapshot(commit).is_dir():
                raise
            log.warning("%s Using what the cache has of it.", error)
    if commit is None or (listing is None and not repository.snapshot(commit).is_dir()):
        raise ModelNotFoundError(
            f"Model {model!r} (revision {options.revision}) is not in the cache"
            f" {repository.root}, and the network is not to be used (offline, local_files_only or"
            " HF_HUB_OFFLINE). Load it once with the network.",
            model=model,
        )
    return HubFiles(
        name=model,
        folder=repository.snapshot(commit),
        repository=repository,
        commit=commit,
        listing=listing,
        options=options,
        listener=listener,
        cancel=cancel,
    )
