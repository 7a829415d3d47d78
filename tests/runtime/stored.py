"""What the tests of the prepared store share: its contents, and children that stop where told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import ebbtide
from ebbtide.runtime import prepare, store

MODELS = Path(__file__).parent.parent / "models"
TINY = MODELS / "tiny-bert"
GRAPH = TINY / "onnx/model.onnx"
SOURCE = str(Path(ebbtide.__file__).parent.parent)
TASK = "feature-extraction"
TEXT = "the sea"

_HOOK = f"""
import os, sys
if {prepare._CHILD!r} in sys.orig_argv and "AT_PREPARING" in os.environ:
    import signal, threading
    from ebbtide.runtime import identity, rewriting, session, store

    def before(place, name, act, when=lambda *arguments: True):
        original = getattr(place, name)

        def instead(*arguments, **named):
            if when(*arguments):
                act()
            return original(*arguments, **named)

        setattr(place, name, instead)

    def after(place, name, act, when=lambda *arguments: True):
        original = getattr(place, name)

        def instead(*arguments, **named):
            result = original(*arguments, **named)
            if when(*arguments):
                act()
            return result

        setattr(place, name, instead)

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def stop():
        with open(os.environ["TOLD"], "w") as fifo:
            fifo.write(str(os.getpid()))
        threading.Event().wait()

    exec(os.environ["AT_PREPARING"])
"""

STEPS: Mapping[str, str] = {
    "hashing": "before(identity, 'hash_of', {act})",
    "remembering the hash": "before(identity.os, 'replace', {act})",
    "loading": "before(rewriting, 'write_prepared', {act})",
    "writing": "before(rewriting, 'open_prepared', {act})",
    "written": "after(rewriting, 'write_prepared', {act})",
    "publishing": "before(store.Store, 'publish', {act})",
    "sealing": "before(store, 'write_sealed', {act})",
    "renaming": "after(store.Manifest, 'write', {act})",
    "renamed": "before(store, '_to_disk', {act}, lambda path: path.name == 'prepared')",
    "pruning": "before(store.Store, 'prune', {act})",
}
"""Where a child that prepares can be made to die or to stop."""


def at(step: str, act: str, folder: Path) -> dict[str, str]:
    """The variables that have a preparing child ``die()`` or ``stop()`` at a step."""
    (folder / "sitecustomize.py").write_text(_HOOK)
    told = folder / "told"
    if not told.exists():
        os.mkfifo(told)
    return {
        "PYTHONPATH": os.pathsep.join((str(folder), SOURCE)),
        "AT_PREPARING": STEPS.get(step, step).format(act=act),
        "TOLD": str(told),
    }


def load(model: Path = TINY, **options: Any) -> Any:
    return ebbtide.pipeline(TASK, model, **{"prepare": "now", **options})


def answer(model: Path = TINY, **options: Any) -> tuple[str, Any]:
    """What a model gives, loaded for this only, and what it was loaded from."""
    with load(model, **options) as pipe:
        return source(pipe), pipe(TEXT)


def source(pipe: Any) -> str:
    """What a pipeline's session runs from now."""
    return next((one.source for one in pipe.memory.holdings if one.kind == "session"), "")


def right(model: Path = TINY, **options: Any) -> Any:
    """What a model gives, from the original."""
    store_of_none = ebbtide.settings.cache_dir
    ebbtide.settings.cache_dir = "/dev/null/none"
    try:
        found, result = answer(model, **{**options, "prepare": False})
    finally:
        ebbtide.settings.cache_dir = store_of_none
    assert found == "original"
    return result


def copies(root: Path) -> list[Path]:
    """The prepared copies in a store."""
    return sorted((root / "prepared").glob("[!.]*"))


def only(root: Path) -> Path:
    """The one prepared copy in a store."""
    (found,) = copies(root)
    return found


def left_over(root: Path) -> list[str]:
    """Files and folders in a store that nobody will use: half-written, or half-removed."""
    return [str(one.relative_to(root)) for one in root.rglob(".*")]


def assert_as_new(root: Path, model: Path = TINY, **options: Any) -> None:
    """The next load has the one copy, with the right answers, and nothing lies about."""
    found, result = answer(model, **options)
    assert found == "prepared"
    assert np.array_equal(result, right(model, **options))
    assert len(copies(root)) == 1
    assert left_over(root) == []


def damage(path: Path, bit: int) -> None:
    """Flip one bit of a file, in a new file of the same name, as no user of it would."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    replace(path, bytes(content))


def replace(path: Path, content: bytes) -> None:
    """Put another file in its place; who has mapped it keeps it."""
    path.with_suffix(".other").write_bytes(content)
    path.with_suffix(".other").replace(path)


def reseal(folder: Path, **changed: Any) -> None:
    """Write an entry's manifest anew, with some of it changed and its seal right."""
    content = json.loads((folder / store.MANIFEST).read_bytes().split(b"\n")[0])
    store.write_sealed(folder / store.MANIFEST, {**content, **changed})


def copied(model: Path, place: Path) -> Path:
    """A copy of a model's folder, written long enough ago to be known by its times."""
    shutil.copytree(model, place)
    return place


def process(script: str, **environ: str) -> subprocess.Popen[str]:
    """Start a script in a Python of its own, which is told of by lines and ended by its input."""
    prelude = f"MODEL = {str(TINY)!r}\n"
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", prelude + textwrap.dedent(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": SOURCE, **environ},
    )


def ended(running: subprocess.Popen[str], said: str | None = None, *, code: int = 0) -> str:
    """What a process said, once it has been told to end and has."""
    out, _ = running.communicate(said, timeout=60)
    assert running.returncode == code, f"exit {running.returncode}\n{out}"
    return out


def is_gone(pid: int) -> bool:
    """Whether a process has ended, be it that nobody has asked for its status yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"
