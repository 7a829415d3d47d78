"""What models there are on this machine, and what a model's load takes: files, sizes, dtypes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from ebbtide.errors import DownloadError, InputError, ModelNotFoundError
from ebbtide.hub import ModelFiles, Repository, default_root, is_id
from ebbtide.models.config import ModelConfig
from ebbtide.models.loading import LoadOptions
from ebbtide.models.onnx_files import available
from ebbtide.models.tokenizer import TOKENIZER_FILES
from ebbtide.runtime import devices, providers
from ebbtide.runtime.prepare import known_copy


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


@dataclasses.dataclass(frozen=True, slots=True)
class LoadEstimate:
    """What a pipeline will take, by its files alone. All in bytes.

    Attributes:
        model: The model's name.
        dtype: What its files are in.
        content: Files and sizes as text: another for another model.
        session: Anonymous memory of its sessions.
        tokenizer: Anonymous memory of its tokenizer.
        peak: Anonymous memory at most while they are loaded.
        mapped: What is mapped of prepared copies.
        devices: What its sessions take on devices that have memory of their own.
    """

    model: str
    dtype: str
    content: str
    session: int
    tokenizer: int
    peak: int
    mapped: int
    devices: Mapping[str, int]


TIMES_THE_FILE: Final = {"fp32": 1.05, "fp16": 2.1, "q8": 4.0, "int8": 4.0, "uint8": 4.0}
"""Anonymous bytes of a session by those of its file: what is quantised is unfolded at the load."""
TIMES_A_SMALL_FILE: Final = 2.0
"""The same of all other dtypes, of 4 bits and fewer."""
TIMES_WHILE_LOADING: Final = 1.0
"""How many times the file comes on top while it is loaded."""
_WITH_MEMORY: Final = frozenset({"cuda", "dml"})
"""Devices that have memory of their own."""
_ON_A_DEVICE: Final = 1.2
"""Bytes on a device by those of the file."""
TIMES_THE_TOKENIZER: Final = 13
"""Anonymous bytes of a tokenizer by those of its file."""


def estimate(
    files: ModelFiles,
    options: LoadOptions,
    extra: Sequence[str],
    stems: Sequence[str],
    *,
    fetch: bool,
) -> LoadEstimate:
    """What a load will take.

    Args:
        files: The model.
        options: What the user chose.
        extra: Further files that the task reads, where the model has them.
        stems: Which files it is of, as in ``encoder_model``.
        fetch: Download its files.
    """
    config = ModelConfig.read(files)
    chosen = {stem: options.choose(files, config, stem) for stem in stems}
    graphs = [name for file in chosen.values() for name in (file.name, *file.parts)]
    if fetch:
        files.fetch([*graphs, *TOKENIZER_FILES, *extra])
    tokenizer = TIMES_THE_TOKENIZER * sum(
        files.look(one)[0] for one in TOKENIZER_FILES[:1] if files.has(one)
    )
    session = mapped = transient = 0
    on_devices: dict[str, int] = {}
    sizes = []
    for stem, file in chosen.items():
        size = sum(files.look(one)[0] for one in (file.name, *file.parts))
        sizes.append(f"{file.name}:{size}")
        named = options.device_of(options.stem_of(stem), config)
        device = devices.candidates(named, providers())[0]
        if device.name in _WITH_MEMORY:
            place = f"{device.name}:{device.index}"
            on_devices[place] = on_devices.get(place, 0) + int(size * _ON_A_DEVICE)
        path = files.find(file.name) if files.look(file.name)[1] else None
        copy = None
        if path is not None and device.name == "cpu":
            copy = known_copy(path, options.session_options)
        if copy is not None:
            session += copy.anonymous
            mapped += copy.mapped
            sizes.append("prepared")
        else:
            session += int(size * TIMES_THE_FILE.get(file.dtype, TIMES_A_SMALL_FILE))
            transient = max(transient, int(size * TIMES_WHILE_LOADING))
    return LoadEstimate(
        model=files.name,
        dtype=", ".join(dict.fromkeys(file.dtype for file in chosen.values())),
        content=" ".join(sizes),
        session=session,
        tokenizer=tokenizer,
        peak=session + tokenizer + transient,
        mapped=mapped,
        devices=on_devices,
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
