"""What models there are on this machine, and what a model's load takes: files, sizes, dtypes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from ebbtide.errors import DownloadError, InputError, ModelNotFoundError
from ebbtide.hub import ModelFiles, Repository, default_root, is_id
from ebbtide.models.config import ModelConfig
from ebbtide.models.loading import LoadOptions
from ebbtide.models.onnx_files import available
from ebbtide.models.tokenizer import TOKENIZER_FILES


@dataclasses.dataclass(frozen=True, slots=True)
class CachedModel:
    """A model of the hub that the cache has files of.

    Attributes:
        name: Its id, as in ``org/name``.
        folder: Where it lies.
        size: Bytes on the disk.
        dtypes: Which of its ONNX files are there; empty where there is none that Ebbtide can load.
        revisions: The branches and tags that were looked up, with their commits.
        used: When a file of it was last read, in seconds since 1970, as far as the disk keeps that.
    """

    name: str
    folder: Path
    size: int
    dtypes: tuple[str, ...]
    revisions: tuple[tuple[str, str], ...]
    used: float


@dataclasses.dataclass(frozen=True, slots=True)
class ModelFile:
    """One file that a load needs.

    Attributes:
        name: Its name in the model.
        size: Bytes.
        cached: Whether it is on this machine.
    """

    name: str
    size: int
    cached: bool


@dataclasses.dataclass(frozen=True, slots=True)
class ModelSummary:
    """What loading a model takes.

    Attributes:
        name: The model.
        dtype: The dtype that would be loaded.
        dtypes: All that the model has.
        files: The files that would be read.
    """

    name: str
    dtype: str
    dtypes: tuple[str, ...]
    files: tuple[ModelFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all these files."""
        return sum(one.size for one in self.files)

    @property
    def to_download(self) -> int:
        """Bytes that are not on this machine yet."""
        return sum(one.size for one in self.files if not one.cached)


@dataclasses.dataclass(frozen=True, slots=True)
class PreparedModel:
    """A model's prepared copy.

    Attributes:
        model: The model.
        file: Which of its files.
        dtype: What that file is in.
        key: The copy's name in the store.
        size: Bytes on the disk.
        anonymous: Bytes of anonymous memory that its session takes, loaded and after a run, as they
            were measured when it was made; a tokenizer's come on top.
        seconds: How long making it took.
        made: Whether it was made by this call; else it was there.
    """

    model: str
    file: str
    dtype: str
    key: str
    size: int
    anonymous: int
    seconds: float
    made: bool


def cached_models(cache_dir: str | os.PathLike[str] | None = None) -> list[CachedModel]:
    """The models in the cache that all Hugging Face libraries share, by name.

    Args:
        cache_dir: Another cache than the usual one.

    Example:
        >>> cached_models("tests/models")
        []
    """
    root = Path(cache_dir).expanduser() if cache_dir is not None else default_root()
    found = []
    for folder in sorted(root.glob("models--*")):
        snapshots = [one for one in (folder / "snapshots").glob("*") if one.is_dir()]
        if not snapshots:
            continue
        name = folder.name.removeprefix("models--").replace("--", "/")
        dtypes = [one for snapshot in snapshots for one in _dtypes_in(name, snapshot)]
        own = list(_own_files(folder))
        place = Repository(root, name)
        refs = sorted(str(one.relative_to(folder / "refs")) for one in folder.glob("refs/**/*"))
        found.append(
            CachedModel(
                name=name,
                folder=folder,
                size=sum(one.st_size for one in own),
                dtypes=tuple(dict.fromkeys(dtypes)),
                revisions=tuple((one, commit) for one in refs if (commit := place.commit_of(one))),
                used=max((one.st_atime for one in own), default=0.0),
            )
        )
    return found


def remove_cached(model: str, cache_dir: str | os.PathLike[str] | None = None) -> int:
    """Delete a model from the cache; pipelines that have it loaded go on.

    Args:
        model: Its id, as in ``org/name``.
        cache_dir: Another cache than the usual one.

    Returns:
        The bytes that were freed on the disk.

    Raises:
        InputError: ``model`` is no id.
        ModelNotFoundError: The cache has no such model.
        DownloadError: The cache cannot be written.
    """
    if not isinstance(model, str) or not is_id(model):
        raise InputError(f"A model's id is needed, as in 'org/name', not {model!r}.", value=model)
    there = {one.name: one for one in cached_models(cache_dir)}
    if model not in there:
        raise ModelNotFoundError(
            f"The cache has no model {model!r}; it has {', '.join(there) or 'none'}.", model=model
        )
    try:
        shutil.rmtree(there[model].folder)
    except OSError as error:
        raise DownloadError(
            f"Model {model!r} cannot be removed from the cache: {error}.", model=model
        ) from error
    shutil.rmtree(Repository(cache_dir, model).locks, ignore_errors=True)
    return there[model].size


def summarise(
    files: ModelFiles, options: LoadOptions, extra: Sequence[str], stems: Sequence[str]
) -> ModelSummary:
    """What loading a model takes.

    Args:
        files: The model.
        options: What the user chose.
        extra: Further files that the task reads, where the model has them.
        stems: Which files it is of, as in ``encoder_model``.
    """
    config = ModelConfig.read(files)
    chosen = [options.choose(files, config, stem) for stem in stems]
    graphs = [name for file in chosen for name in (file.name, *file.parts)]
    names = ["config.json", *graphs, *TOKENIZER_FILES, *extra]
    first, *others = (available(files, options.stem_of(one), options.subfolder) for one in stems)
    return ModelSummary(
        name=files.name,
        dtype=", ".join(dict.fromkeys(one.dtype for one in chosen)),
        dtypes=tuple(dtype for dtype in first if all(dtype in some for some in others)),
        files=tuple(ModelFile(one, *files.look(one)) for one in names if files.has(one)),
    )


def _own_files(folder: Path) -> Iterator[os.stat_result]:
    """What the disk says of each file below a folder, but not of links to files."""
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # a part of a download goes when it is whole
                found = os.lstat(os.path.join(path, name))
                if stat.S_ISREG(found.st_mode):
                    yield found


def _dtypes_in(name: str, snapshot: Path) -> tuple[str, ...]:
    return available(ModelFiles(name, snapshot), "model", "onnx")
