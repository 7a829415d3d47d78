"""The files of one model, wherever they lie."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ebbtide.errors import LoadError, ModelNotFoundError

_verified: set[tuple[int, int, int, int, int, str]] = set()


@dataclasses.dataclass(frozen=True, slots=True)
class ModelFiles:
    """One model's files, by their names as in a Hugging Face repository.

    Attributes:
        name: What the user calls the model.
        folder: Where its files are.
        elsewhere: Files that lie outside the folder, by name.
        sha256: What a file's content must hash to, by name; checked before its first use.
    """

    name: str
    folder: Path
    elsewhere: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    sha256: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Whether the model has a file of this name."""
        return self._path(name).is_file()

    def look(self, name: str) -> tuple[int, bool]:
        """A file's bytes, and whether it is on this machine; the model has a file of this name."""
        return self._path(name).stat().st_size, True

    def fetch(self, names: Iterable[str]) -> None:
        """Have those of these files that the model has on this machine, all at once."""

    def find(self, name: str) -> Path | None:
        """The file of this name, or None.

        Raises:
            LoadError: Its content is not what the model's package says it is.
        """
        path = self._path(name)
        if not path.is_file():
            return None
        expected = self.sha256.get(name)
        if expected is not None:
            _verify(path, expected)
        return path

    def need(self, name: str, why: str) -> Path:
        """The file of this name.

        Args:
            name: The file.
            why: What it is needed for, and what to do if it is not there.

        Raises:
            ModelNotFoundError: The model has no such file.
        """
        path = self.find(name)
        if path is None:
            raise ModelNotFoundError(
                f"Model {self.name!r} has no {name} in {self.folder}: {why}",
                model=self.name,
                missing=(name,),
            )
        return path

    def json(self, name: str) -> Mapping[str, Any] | None:
        """The object in a JSON file, or None where there is no such file.

        Raises:
            LoadError: The file is not JSON, or not an object.
        """
        content = self._parsed(name)
        if content is not None and not isinstance(content, dict):
            raise LoadError(
                f"{self.find(name)} is JSON, but not an object: {type(content).__name__}.",
                path=str(self.find(name)),
            )
        return content

    def json_list(self, name: str) -> list[Any] | None:
        """The list in a JSON file, or None where there is no such file.

        Raises:
            LoadError: The file is not JSON, or not a list.
        """
        content = self._parsed(name)
        if content is not None and not isinstance(content, list):
            raise LoadError(
                f"{self.find(name)} is JSON, but not a list: {type(content).__name__}.",
                path=str(self.find(name)),
            )
        return content

    def content(self, name: str) -> bytes:
        """The bytes of a file that is there.

        Raises:
            LoadError: It cannot be read.
        """
        path = self._path(name)
        try:
            return path.read_bytes()
        except OSError as error:
            raise LoadError(f"{path} cannot be read: {error}.", path=str(path)) from error

    def _path(self, name: str) -> Path:
        return self.elsewhere.get(name, self.folder / name)

    def _parsed(self, name: str) -> Any:
        path = self.find(name)
        if path is None:
            return None
        try:
            return json.loads(self.content(name))
        except (ValueError, RecursionError) as error:
            raise LoadError(
                f"{path} is not JSON: {error}. Compare it with its source.", path=str(path)
            ) from None

    def onnx_names(self) -> list[str]:
        """The names of all ONNX files, sorted: what an error message can offer."""
        names = {str(path.relative_to(self.folder)) for path in self.folder.rglob("*.onnx")}
        return sorted(names | {name for name in self.elsewhere if name.endswith(".onnx")})


def _verify(path: Path, expected: str) -> None:
    stat = path.stat()
    identity = (
        stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, expected,
    )  # fmt: skip
    if identity in _verified:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise LoadError(
            f"{path} is not the file its package promises: sha256 {found}, expected {expected}."
            " Install the package again.",
            path=str(path),
        )
    _verified.add(identity)
