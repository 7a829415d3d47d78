"""The prepared store: graphs that are optimised already, with weights that are mapped, not copied.

An entry is a folder, named by its key: the graph, its data and a manifest. It is written beside its
place and renamed into it, and from then on only ever unlinked, never changed: who has mapped it
keeps what was mapped. Who uses one holds a shared lock on its manifest, so that pruning passes it
by. One process at a time writes an entry, under a lock that dies with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from ebbtide._settings import settings
from ebbtide.runtime.identity import Content, contents, hash_of, read_sealed, write_sealed

try:
    import fcntl
except ImportError:  # Windows, where a file that is mapped cannot be unlinked
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("ebbtide.runtime")

FORMAT: Final = 1
GRAPH: Final = "model.onnx"
DATA: Final = "model.onnx.data"
MANIFEST: Final = "manifest.json"
_LONGEST_UNUSED: Final = 90 * 24 * 3600
_LONGEST_WRITE: Final = 60.0
"""Seconds after which a small file that is still being written was left by who was killed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """What an entry is, and was measured to take.

    Attributes:
        key: Its name in the store.
        model: The path of the graph it was made from, for people.
        source: The content of the files it was made from.
        onnxruntime: The version that wrote it.
        cpu: What the processor can do, as `cpu_features` names it.
        options: The options that shaped the graph.
        files: For the graph and its data: size in bytes, and sha256.
        anonymous: Bytes of anonymous memory that the session takes, loaded and after a run, as the
            process that prepared it measured it alone.
        seconds: How long preparing took.
        created: When, in seconds since 1970.
    """

    key: str
    model: str
    source: tuple[Content, ...]
    onnxruntime: str
    cpu: str
    options: str
    files: dict[str, tuple[int, str]]
    anonymous: int
    seconds: float
    created: float

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return sum(size for size, _ in self.files.values())

    @property
    def mapped(self) -> int:
        """Bytes of the file that is mapped by a session."""
        return self.files.get(DATA, (0, ""))[0]

    def write(self, folder: Path) -> None:
        """Write it as the last file of a folder."""
        write_sealed(folder / MANIFEST, {"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """That of a folder; None where there is none, or it is damaged or of another format."""
        found = read_sealed(folder / MANIFEST)
        if found is None or found.pop("format", None) != FORMAT:
            return None
        found["source"] = tuple(Content(**one) for one in found["source"])
        found["files"] = {name: (size, sha) for name, (size, sha) in found["files"].items()}
        return cls(**found)


class Held:
    """An entry in use: while this is open no process prunes it."""

    def __init__(self, folder: Path, manifest: Manifest, descriptor: int) -> None:
        self.manifest = manifest
        self.graph = folder / GRAPH
        self._descriptor = descriptor

    def close(self) -> None:
        """Use it no more."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One entry, as a list shows it.

    Attributes:
        folder: Where it is.
        manifest: What it is; None where that cannot be read.
        size: Bytes on the disk.
        used: When it was last loaded, in seconds since 1970.
        in_use: Whether a process holds it now.
    """

    folder: Path
    manifest: Manifest | None
    size: int
    used: float
    in_use: bool

    @property
    def key(self) -> str:
        """Its name in the store."""
        return self.folder.name


class Store:
    """Prepared graphs in a folder.

    Args:
        root: The folder; made when something is written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._entries = root / "prepared"
        self._refusals = root / "refused"
        self.identities = root / "identities"

    def key(
        self, graph: Path, *, onnxruntime: str, options: str, compute: bool
    ) -> tuple[str, tuple[Content, ...]] | None:
        """The name of a graph's entry, and the content it stands for.

        Args:
            graph: The original ONNX file.
            onnxruntime: The version that will load it.
            options: The options that shape the graph.
            compute: Hash files whose content is not known yet; else say None.
        """
        found = contents(graph, self.identities, compute=compute)
        if found is None:
            return None
        parts = [FORMAT, [dataclasses.astuple(one) for one in found], onnxruntime, options]
        text = json.dumps([*parts, cpu_features()])
        return hashlib.sha256(text.encode()).hexdigest()[:40], found

    def hold(self, key: str, onnxruntime: str) -> Held | None:
        """Take an entry into use; None where there is none that is whole.

        The manifest and the graph are checked wholly, the data by its size, or wholly as well where
        ``settings.verify`` is ``"always"``. An entry that fails is removed.

        Args:
            key: Its name.
            onnxruntime: The version that will load it.
        """
        folder = self._entries / key
        try:
            descriptor = os.open(folder / MANIFEST, os.O_RDONLY)
        except OSError:
            return None
        try:
            _lock(descriptor, shared=True)
            if not _is(descriptor, folder / MANIFEST):
                os.close(descriptor)
                return None  # it was removed meanwhile
            manifest = _checked(folder, whole=settings.verify == "always")
            if (manifest.onnxruntime, manifest.cpu) != (onnxruntime, cpu_features()):
                raise _DamagedError("it was made by another onnxruntime or for another processor")
        except _DamagedError as error:
            os.close(descriptor)
            self.discard(key, str(error))
            return None
        except BaseException:
            os.close(descriptor)
            raise
        with contextlib.suppress(OSError):
            os.utime(folder)
        return Held(folder, manifest, descriptor)

    def has(self, key: str) -> bool:
        """Whether there is an entry of this name."""
        return (self._entries / key / MANIFEST).is_file()

    def discard(self, key: str, reason: str) -> None:
        """Remove an entry that turned out to be no good; its users keep what they have mapped."""
        folder = self._entries / key
        log.warning("The prepared copy %s is not used: %s. The original is.", folder, reason)
        with contextlib.suppress(OSError):
            self._take_away(folder)

    def _take_away(self, folder: Path) -> None:
        """Unlink an entry: renamed first, so that nobody finds half of it."""
        gone = folder.with_name(f".{folder.name}.{time.time_ns()}.gone")
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    @contextlib.contextmanager
    def writing(self, key: str, *, wait: bool = True) -> Iterator[Path | None]:
        """Be the one process that writes an entry.

        Yields:
            A new folder to write into; `publish` makes it the entry. None where the entry is there
            already, or somebody else writes it and ``wait`` is False.

        Raises:
            OSError: The store cannot be written.
        """
        from filelock import FileLock, Timeout

        self._entries.mkdir(parents=True, exist_ok=True)
        locks = self.root / "locks"
        locks.mkdir(exist_ok=True)
        try:
            lock = FileLock(locks / f"{key}.lock", timeout=-1 if wait else 0)
            lock.acquire()
        except Timeout:
            yield None
            return
        folder = self._entries / f".{key}.{os.getpid()}.new"
        try:
            for left in self._entries.glob(f".{key}*"):  # of who was killed
                shutil.rmtree(left, ignore_errors=True)
            if self.has(key):
                yield None
            else:
                folder.mkdir()
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.release()

    def publish(self, folder: Path, manifest: Manifest) -> None:
        """Make a written folder the entry of its manifest's key; inside `writing` only."""
        for name in manifest.files:
            _to_disk(folder / name)
        manifest.write(folder)
        _to_disk(folder)
        place = self._entries / manifest.key
        if place.exists():  # without a manifest, or it would not be written
            self._take_away(place)
        folder.rename(place)
        _to_disk(self._entries)

    def refuse(self, key: str, reason: str) -> None:
        """Remember that a graph cannot be prepared, so that it is not tried at each load."""
        self._refusals.mkdir(parents=True, exist_ok=True)
        write_sealed(self._refusals / f"{key}.json", {"reason": reason})

    def refusal(self, key: str) -> str | None:
        """Why a graph cannot be prepared; None where that is not known."""
        found = read_sealed(self._refusals / f"{key}.json")
        return None if found is None else str(found["reason"])

    def sweep(self) -> None:
        """Remove what killed writers and removers left."""
        for left in self._entries.glob(".*"):
            with self.writing(left.name.split(".")[1], wait=False):
                pass  # taking the lock sweeps
        horizon = time.time() - _LONGEST_WRITE
        for folder in (self.identities, self._refusals):
            _remove_older(folder.glob(".*"), horizon)

    def entries(self) -> list[Entry]:
        """Every entry, the most recently used first."""
        found = []
        for folder in self._entries.glob("[!.]*"):
            with contextlib.suppress(OSError):  # it may go meanwhile
                size = sum(file.stat().st_size for file in folder.iterdir())
                used = folder.stat().st_mtime
                manifest = Manifest.read(folder)
                found.append(Entry(folder, manifest, size, used, _in_use(folder)))
        return sorted(found, key=lambda one: one.used, reverse=True)

    def verify(self, entry: Entry) -> str | None:
        """Check every byte of an entry; what is wrong with it in words, or None."""
        try:
            _checked(entry.folder, whole=True)
        except _DamagedError as error:
            return str(error)
        return None

    def remove(self, entry: Entry, *, in_use: bool = False) -> bool:
        """Remove an entry, unless a process uses it; whether it is gone.

        Args:
            entry: The entry.
            in_use: Also where a process uses it; that keeps what it has mapped.
        """
        try:
            descriptor = os.open(entry.folder / MANIFEST, os.O_RDONLY)
        except FileNotFoundError:
            descriptor = None
        try:
            if descriptor is not None and not in_use and not _lock(descriptor, shared=False):
                return False
            if descriptor is not None and not _is(descriptor, entry.folder / MANIFEST):
                return True  # somebody else was faster, and what is there now is another's
            self._take_away(entry.folder)
            return True
        except FileNotFoundError:
            return True  # somebody else was faster
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def forget(self) -> None:
        """Drop what is remembered beside the entries: hashes, and which graphs were refused."""
        for folder in (self.identities, self._refusals):
            shutil.rmtree(folder, ignore_errors=True)

    def prune(self, limit: int) -> list[Entry]:
        """Remove the least recently used entries until the rest fits, but none that is in use.

        Args:
            limit: Bytes that may stay.

        Returns:
            What was removed.
        """
        self.sweep()
        entries = self.entries()
        size = sum(one.size for one in entries)
        removed = []
        for entry in reversed(entries):
            if size <= limit:
                break
            if self.remove(entry):
                size -= entry.size
                removed.append(entry)
        _remove_older(self.identities.glob("*.json"), time.time() - _LONGEST_UNUSED)
        return removed


class _DamagedError(Exception):
    """An entry is not as it was written; says how."""


def _checked(folder: Path, *, whole: bool) -> Manifest:
    """The manifest of an entry whose files are as it says: the graph wholly, the data if asked."""
    manifest = Manifest.read(folder)
    if manifest is None:
        raise _DamagedError("its manifest is damaged")
    if manifest.key != folder.name:
        raise _DamagedError("it is another entry's")
    for name, (size, sha256) in manifest.files.items():
        path = folder / name
        try:
            if path.stat().st_size != size:
                raise _DamagedError(f"{name} is not as long as it was")
            if (whole or name == GRAPH) and hash_of(path) != sha256:
                raise _DamagedError(f"{name} is not what was written")
        except OSError as error:
            raise _DamagedError(f"{name} cannot be read ({error.strerror})") from None
    return manifest


def _remove_older(files: Iterable[Path], horizon: float) -> None:
    for file in files:
        with contextlib.suppress(OSError):
            if file.stat().st_mtime < horizon:
                file.unlink()


def describe(folder: Path, names: Sequence[str]) -> dict[str, tuple[int, str]]:
    """Size and hash of files as they can be read back."""
    return {name: ((folder / name).stat().st_size, hash_of(folder / name)) for name in names}


@functools.cache
def cpu_features() -> str:
    """What the processor can do, in a short text: weights are packed for one kind of it.

    Asked of the processor by numpy and, where there is one, of the kernel's list: neither has all.
    """
    of_numpy = importlib.import_module("numpy._core._multiarray_umath")
    found = {name for name, there in getattr(of_numpy, "__cpu_features__", {}).items() if there}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                found.update(line.partition(":")[2].split())
                break
    digest = hashlib.sha256(" ".join(sorted(found)).encode()).hexdigest()[:16]
    return f"{sys.platform}-{platform.machine()}-{digest}"


def _lock(descriptor: int, *, shared: bool) -> bool:
    """Lock a file: shared, waiting for who removes it; or alone, if nobody has it."""
    if fcntl is None:
        return True  # type: ignore[unreachable]
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # in use, or a file system that knows no locks: then nothing is pruned
        return False
    return True


def _is(descriptor: int, path: Path) -> bool:
    """Whether a path still is the file that was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _in_use(folder: Path) -> bool:
    try:
        descriptor = os.open(folder / MANIFEST, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _lock(descriptor, shared=False)
    finally:
        os.close(descriptor)


def _to_disk(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
