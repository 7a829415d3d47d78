"""What the tests of loading from the hub share: the model they load, and what was asked for it."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

import ebbtide

from .loopback import Hub

MODELS = Path(__file__).parent.parent / "models"
TINY = MODELS / "tiny-bert"
NAME = "org/tiny"
TASK = "feature-extraction"
ONNX = "onnx/model.onnx"
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
NEEDED = {"config.json", ONNX, *TOKENIZER}
"""What a load of the model takes, where no dtype is named."""

_LOOKED_UP = re.compile(r"/api/models/([^?]+?)(?:/revision/([^?]+))?(?:\?.*)?")
_FILE = re.compile(r"/([^?]+)/resolve/([0-9a-f]{40})/([^?]+)")


def looked_up(hub: Hub) -> list[str]:
    """The revisions that were looked up, in order."""
    found = (_LOOKED_UP.fullmatch(one.path) for one in hub.requests)
    return [unquote(one[2] or "") for one in found if one]


def files_asked(hub: Hub) -> list[str]:
    """The files that were asked for, in order, once for each request."""
    found = (_FILE.fullmatch(one.path) for one in hub.requests)
    return [unquote(one[3]) for one in found if one]


def commits_asked(hub: Hub) -> set[str]:
    """The commits that files were asked of."""
    found = (_FILE.fullmatch(one.path) for one in hub.requests)
    return {one[2] for one in found if one}


def ranges(hub: Hub, name: str = ONNX) -> list[str | None]:
    """The parts of a large file that the CDN was asked for, in order; None for all of it."""
    return [
        one.range
        for one in hub.requests
        if one.path.startswith("/cdn/") and unquote(one.path).endswith(f"/{name}")
    ]


def answers(model: Any = NAME, task: str = TASK, text: str = "the tide", **options: Any) -> Any:
    """What a model gives, loaded for this only."""
    with ebbtide.pipeline(task, model, **options) as pipe:
        return pipe(text)


@functools.cache
def of_folder(folder: Path = TINY, dtype: str | None = None) -> Any:
    """What a model's folder gives."""
    return answers(folder, dtype=dtype)


def assert_same_as_folder(model: str = NAME, folder: Path = TINY, **options: Any) -> None:
    """The model that is had from the hub gives what its folder gives."""
    assert np.array_equal(answers(model, **options), of_folder(folder, options.get("dtype")))


def everything_below(folder: Path) -> set[str]:
    """The names of all files and links below a folder."""
    found = (one for one in folder.rglob("*") if one.is_symlink() or not one.is_dir())
    return {one.relative_to(folder).as_posix() for one in found}


def part_of(cache: Path, name: str = ONNX, folder: Path = TINY) -> Path:
    """Where the part of a file is that is not there as a whole."""
    content = (folder / name).read_bytes()
    if name.endswith(".json"):
        hashed = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    else:
        hashed = hashlib.sha256(content)
    return cache / f"models--{NAME.replace('/', '--')}/blobs/{hashed.hexdigest()}.ebbtide-part"


def snapshot(cache: Path, commit: str, model: str = NAME) -> Path:
    """Where a commit's files are."""
    return cache / f"models--{model.replace('/', '--')}" / "snapshots" / commit


def ended() -> None:
    """Wait for the threads of downloads to end."""
    for thread in threading.enumerate():
        if thread.name.startswith("ebbtide-download"):
            thread.join(30)
            assert not thread.is_alive(), f"{thread.name} goes on"


def environment(hub: Hub, cache: Path, *, timeout: int = 30) -> dict[str, str]:
    """The variables of a process that uses the hub, the cache and this Ebbtide."""
    source = str(Path(ebbtide.__file__).parent.parent)
    return {**os.environ, **hub.environment(cache, timeout=timeout), "PYTHONPATH": source}


class Child:
    """A process that the test talks with; see the fixture `child`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def line(self) -> str:
        """What it says next; empty where it ended."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def until(self, *wanted: str) -> None:
        """Wait for it to have said all these lines."""
        missing = set(wanted)
        while missing:
            line = self.line()
            assert line, f"it ended before it said {missing}: {self.result()}"
            missing.discard(line)

    def result(self, timeout: float = 30) -> tuple[int, str, str]:
        """Its exit status and what it said, once it has ended."""
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def succeeds(self) -> str:
        """What it said on standard output, once it has ended well."""
        code, out, err = self.result()
        assert code == 0, f"exit {code}\n{out}\n{err}"
        return out

    def end(self) -> None:
        """Kill it, if it goes on."""
        if self.process.poll() is None:
            self.process.kill()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        self.process.wait()


def succeed(children: Iterable[Child]) -> list[str]:
    """What several processes said, once all have ended well."""
    return [one.succeeds() for one in children]


LINUX = sys.platform == "linux"


def child_output(terminal: int) -> str:
    """All that is written to a pseudo terminal, until its other end is closed."""
    read: list[bytes] = []
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # Linux has an error for an end
            piece = b""
        if not piece:
            return b"".join(read).decode()
        read.append(piece)
