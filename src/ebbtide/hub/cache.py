"""The cache that all Hugging Face libraries share, as it lies on the disk.

Its layout is documented: ``models--org--name/refs/main`` has a commit, ``snapshots/<commit>/`` has
the files under their names, as links to ``blobs/<hash>``. Beside them Ebbtide keeps a list of what
a commit has, in ``.ebbtide/<commit>.json``: so that a model that is cached needs no network to know
which files it does not have, and no client for the network has to be loaded (14 MB).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Final

COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_HASH: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_ODD: Final = re.compile(r"[\\\x00]")  # another system's separator, and what no name can have


@dataclasses.dataclass(frozen=True, slots=True)
class FileInfo:
    """One file of a repository.

    Attributes:
        name: Its name, with folders.
        size: Bytes.
        hash: The sha256 of its content, or, for a small file, git's sha1 of it.
    """

    name: str
    size: int
    hash: str


Listing = Mapping[str, FileInfo]
"""Every file of one commit, by name."""


class Repository:
    """One model's place in the cache.

    Args:
        root: The cache's folder; None for the one that all Hugging Face libraries share.
        model: The model's id, as in ``org/name``.
    """

    def __init__(self, root: str | os.PathLike[str] | None, model: str) -> None:
        self.root = Path(root).expanduser() if root is not None else default_root()
        self.model = model
        self.folder = self.root / f"models--{model.replace('/', '--')}"

    def snapshot(self, commit: str) -> Path:
        """Where a commit's files are."""
        return self.folder / "snapshots" / commit

    def blob(self, file: FileInfo) -> Path:
        """Where a file's content is."""
        return self.folder / "blobs" / file.hash

    def lock(self, file: FileInfo) -> Path:
        """What to lock while a file is downloaded; other libraries lock the same."""
        return self.locks / f"{file.hash}.lock"

    def commit_of(self, revision: str) -> str | None:
        """The commit that a revision was when it was last looked up; None where it never was."""
        if COMMIT.fullmatch(revision):
            return revision if self.snapshot(revision).is_dir() else None
        try:
            commit = (self.folder / "refs" / revision).read_text().strip()
        except (OSError, ValueError):
            return None
        return commit if COMMIT.fullmatch(commit) else None

    def listing(self, commit: str) -> Listing | None:
        """What a commit has, if that was ever looked up."""
        try:
            files = json.loads(self._listing_path(commit).read_bytes())
            known = {name: FileInfo(name, int(size), hashed) for name, size, hashed in files}
            sound = all(usable(one.name, one.hash) for one in known.values())
        except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            return None
        return known if known and sound else None

    def remember(self, commit: str, listing: Listing) -> None:
        """Note what a commit has.

        Raises:
            OSError: The cache cannot be written.
        """
        if self.listing(commit) is None:
            files = [[one.name, one.size, one.hash] for one in listing.values()]
            self._write(self._listing_path(commit), json.dumps(files))

    def refer(self, revision: str, commit: str) -> None:
        """Note which commit a revision is.

        Raises:
            OSError: The cache cannot be written.
        """
        if revision != commit and self.commit_of(revision) != commit:
            self._write(self.folder / "refs" / revision, commit)

    def place(self, file: FileInfo, commit: str) -> None:
        """Put a file that is among the blobs under its name, by a link where there are links.

        Raises:
            OSError: The cache cannot be written.
        """
        blob, name = self.blob(file), self.snapshot(commit) / file.name
        name.parent.mkdir(parents=True, exist_ok=True)
        temporary = name.with_name(f"{name.name}.{os.getpid()}.link")
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        try:
            temporary.symlink_to(os.path.relpath(blob, name.parent))
        except (OSError, NotImplementedError):
            os.replace(blob, name)  # where no link can be made, the file itself lies there
            return
        os.replace(temporary, name)

    @property
    def locks(self) -> Path:
        """Where its locks are."""
        return self.root / ".locks" / self.folder.name

    def _listing_path(self, commit: str) -> Path:
        return self.folder / ".ebbtide" / f"{commit}.json"

    def _write(self, path: Path, text: str) -> None:
        """Write a file as a whole, for all whom the umask lets read it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._listing_path(f"{os.getpid()}-{threading.get_ident()}")
        temporary.parent.mkdir(exist_ok=True)
        try:
            temporary.write_text(text)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def usable(name: str, hashed: str) -> bool:
    """Whether a file as the hub describes it can have a place in the cache, and nowhere else."""
    parts = name.split("/")
    good = all(part not in ("", ".", "..") and not _ODD.search(part) for part in parts)
    return good and _HASH.fullmatch(hashed) is not None


def default_root() -> Path:
    """The cache that all Hugging Face libraries share: ``HF_HUB_CACHE``, or below ``HF_HOME``."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
