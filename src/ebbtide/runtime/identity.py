"""Which content a graph is, by hashes that are computed once.

A graph's content is that of its file and of every file of external data it names. Hashing two
gigabytes takes a second, so a hash is remembered by what changes whenever the file does: device,
inode, size and both times. A file in the hub's cache carries its sha256 as its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import re
import time
from pathlib import Path
from typing import Any, Final

_LOCATION: Final = b"\x0a\x08location\x12"
"""How protobuf writes the start of a tensor's ``location`` entry; its length and text follow."""

_HUB_HASH: Final = re.compile(r"[0-9a-f]{64}")
_SETTLED: Final = 0.1
"""Seconds after which a further change would show in a file's times."""


@dataclasses.dataclass(frozen=True, slots=True)
class Content:
    """One file of a model, by what is in it.

    Attributes:
        name: Its path from the graph's folder; how the graph names it, so part of the identity.
        size: Bytes.
        sha256: Of the whole file, in hex.
    """

    name: str
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True, slots=True)
class _Known:
    size: int
    sha256: str
    external: tuple[str, ...]


_hashed: dict[Path, _Known] = {}
"""What could not be remembered on the disk, as in an image whose store is read-only."""


def contents(graph: Path, memory: Path, *, compute: bool) -> tuple[Content, ...] | None:
    """The files that a graph is made of, itself first.

    Args:
        graph: The ONNX file.
        memory: The folder in which hashes are remembered.
        compute: Hash what is not remembered; else say None.

    Returns:
        None where something is not known, or the graph names files outside its folder.

    Raises:
        OSError: A file cannot be read.
    """
    known = _known(graph, memory, compute=compute, is_graph=True)
    if known is None:
        return None
    found = [Content("", known.size, known.sha256)]
    for name in known.external:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return None
        part = graph.parent / name
        if not os.path.isfile(part):
            continue  # bytes that only looked like the name of a file, or a load that will fail
        known = _known(part, memory, compute=compute, is_graph=False)
        if known is None:
            return None
        found.append(Content(name, known.size, known.sha256))
    return tuple(found)


def _known(path: Path, memory: Path, *, compute: bool, is_graph: bool) -> _Known | None:
    stat = path.stat()
    marks = f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
    note = memory / f"{hashlib.sha256(f'{marks}:{is_graph}'.encode()).hexdigest()[:32]}.json"
    told = read_sealed(note)
    if told is None and note in _hashed:
        return _hashed[note]
    if told is not None:
        with contextlib.suppress(OSError):
            os.utime(note)  # so that pruning sees that it is of use
        return _Known(stat.st_size, told["sha256"], tuple(told["external"]))
    if not compute:
        return None
    external = _external(path) if is_graph else ()
    found = _Known(stat.st_size, _hub_hash(path) or hash_of(path), external)
    after = path.stat()
    same = (stat.st_mtime_ns, stat.st_ctime_ns) == (after.st_mtime_ns, after.st_ctime_ns)
    if same and time.time() - stat.st_ctime > _SETTLED:
        try:
            memory.mkdir(parents=True, exist_ok=True)
            write_sealed(note, {"sha256": found.sha256, "external": list(external)})
        except OSError:
            _hashed[note] = found  # the next process hashes it again
    return found


def mark(path: Path) -> str:
    """What is another text once a file is another one: the hub's hash, else size and time."""
    stat = path.stat()
    return _hub_hash(path) or f"{stat.st_size}:{stat.st_mtime_ns}"


def _hub_hash(path: Path) -> str | None:
    blob = path.resolve()
    return blob.name if blob.parent.name == "blobs" and _HUB_HASH.fullmatch(blob.name) else None


def hash_of(path: Path) -> str:
    """The sha256 of a file, in hex; 1.8 GB/s."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _external(graph: Path) -> tuple[str, ...]:
    """The files of external data that a graph names: found by their bytes, without a parser."""
    if not graph.stat().st_size:
        return ()
    names: dict[str, None] = {}
    with (
        graph.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view,
    ):
        at = view.find(_LOCATION)
        while at >= 0:
            start = at + len(_LOCATION)
            length, start = _varint(view, start)
            name = view[start : start + min(length, 4096)]
            if name and len(name) == length and b"\0" not in name:
                names[os.fsdecode(name)] = None
            at = view.find(_LOCATION, start)
    return tuple(names)


def _varint(view: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(view) and shift < 63:
        byte = view[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            break
        shift += 7
    return value, at


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write a small JSON file, whole or not at all, so that a change of any bit is seen."""
    line = json.dumps(content, sort_keys=True)
    seal = hashlib.sha256(line.encode()).hexdigest()
    name = path.with_name(f".{path.name}.{os.getpid()}.{time.time_ns()}")
    # Not by tempfile: other users may read it, as far as the umask lets them.
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(f"{line}\n{seal}\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def read_sealed(path: Path) -> dict[str, Any] | None:
    """What `write_sealed` wrote; None where there is nothing, or it is not as it was written."""
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    line, _, seal = raw.partition(b"\n")
    if f"{hashlib.sha256(line).hexdigest()}\n".encode() != seal:
        return None
    content = json.loads(line)
    assert isinstance(content, dict)
    return content


def mentions(path: Path, name: bytes) -> bool:
    """Whether a graph has an operator or an input of this name, by the bytes of its file."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(name) >= 0
