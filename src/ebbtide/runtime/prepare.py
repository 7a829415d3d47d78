"""Making prepared copies: in a process of its own, for the one that asked.

It runs `main`, which reads one request from its standard input, makes the copy, and writes one line
with the outcome. It ends when its input does, so that it never outlives who asked.
There the original is loaded with the weights packed and written out; the result is read back, run
beside the original, measured alone and hashed before it becomes an entry of the store.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import dataclasses
import functools
import json
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn

from ebbtide._settings import settings
from ebbtide.cancellation import CancelToken
from ebbtide.errors import EbbtideError, LoadError, PipelineCancelledError, PrepareError
from ebbtide.lifecycle import on_fork
from ebbtide.memory.probe import snapshot
from ebbtide.runtime import devices
from ebbtide.runtime import store as stores
from ebbtide.runtime.store import Manifest, Store

if TYPE_CHECKING:
    from ebbtide.runtime.identity import Content
    from ebbtide.runtime.session import SessionOptions

log = logging.getLogger("ebbtide.runtime")

SMALLEST: Final = 4_000_000
"""Bytes of a graph below which nothing is prepared in the background: it would save nothing."""

_TIMES_THE_SIZE: Final = 4
"""Disk and memory that have to be free, as a multiple of the original: q4 takes 2.7 times."""

_CHILD: Final = "from ebbtide.runtime import prepare; prepare.main()"
_NO_PYTHON: Final = "this program is not run by a Python of its own"
_ENDED: Final = "the process that makes it ended early"
_IN_MEMORY: Final = frozenset({"tmpfs", "ramfs"})


def store() -> Store:
    """The store of this process's settings."""
    if settings.cache_dir is not None:
        return Store(Path(settings.cache_dir).expanduser())
    return Store(_user_cache())


_FUSED: Final = "fused.onnx"
_FUSING: Final = 1
"""Counts what fusing has become: a copy that was fused otherwise is another copy."""


@functools.cache
def _user_cache() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("ebbtide", appauthor=False)


def shape_of(options: SessionOptions) -> str:
    """The options that change the graph, as one text."""
    return json.dumps([options.optimization, sorted(options.entries), options.fuse and _FUSING])


def key_of(
    here: Store, graph: Path, options: SessionOptions, *, compute: bool
) -> tuple[str, tuple[Content, ...]] | None:
    """The name of a graph's copy for this process, and the content it stands for: `Store.key`."""
    from ebbtide.runtime import library

    version = library.version()
    return here.key(graph, onnxruntime=version, options=shape_of(options), compute=compute)


def cannot(size: int, *, asked: bool = False) -> str | None:
    """Why no copy of a graph is to be made here, in words; None where nothing speaks against it.

    Args:
        size: Bytes of the graph and its data.
        asked: Somebody asks for this copy, so it may lie in memory too.
    """
    if not _has_python():
        return _NO_PYTHON
    root = store().root
    there = next((one for one in (root, *root.parents) if one.exists()), root)
    if not there.is_dir():
        return f"{there} is no folder"
    if not os.access(there, os.W_OK):
        return f"{there} cannot be written"
    if not asked and _file_system(there) in _IN_MEMORY:
        return f"{there} is memory, not a disk"
    return _short(there, size)


def _has_python() -> bool:
    """Whether there is a Python to run: a frozen program would start itself again."""
    return bool(sys.executable) and not getattr(sys, "frozen", False)


def _short(there: Path, size: int) -> str | None:
    """What there is too little of for a copy, in words; None where there is enough."""
    needed = size * _TIMES_THE_SIZE
    if shutil.disk_usage(there).free < needed:
        return f"{there} has less than {needed / 1e9:.1f} GB free"
    available = snapshot().available
    if available is not None and available < needed:
        return f"less than {needed / 1e9:.1f} GB of memory are available"
    return None


def _file_system(path: Path) -> str:
    """The kind of file system that a path lies on; empty where that is not known."""
    best, kind = "", ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, place, this, *_ = line.split(" ")
            place = place.replace("\\040", " ")
            if path.resolve().is_relative_to(place) and len(place) >= len(best):
                best, kind = place, this
    return kind


def prepare(graph: Path, options: SessionOptions, token: CancelToken) -> str | None:
    """Have a copy made by a process of its own, and wait for it.

    Args:
        graph: The original ONNX file.
        options: How it is to be run.
        token: Ends the work.

    Returns:
        Its key; None where none could be made, and why is logged.

    Raises:
        PipelineCancelledError: The token was cancelled.
    """
    outcome = _outcome(graph, options, token)
    if "error" not in outcome:
        return str(outcome["key"])
    log.log(
        logging.INFO if outcome.get("known") else logging.WARNING,
        "No prepared copy of %s was made: %s. The original is used.", graph, outcome["error"],
    )  # fmt: skip
    return None


def copy_of(
    graph: Path,
    device: str,
    options: SessionOptions,
    token: CancelToken,
    *,
    size: int,
    told: Callable[[Literal["preparing", "prepared"]], object],
) -> tuple[Manifest, bool]:
    """The prepared copy of a graph, made if it is not there; nothing is loaded here.

    Args:
        graph: The original ONNX file.
        device: Where it is to be run, as the user names it.
        options: How it is to be run.
        token: Ends the work.
        size: Bytes of the graph and its data.
        told: Called with ``preparing`` and ``prepared`` where one is made.

    Returns:
        What it is, and whether it was made now.

    Raises:
        PrepareError: There can be none; says why.
        LoadError: The original cannot be read.
        DeviceNotAvailableError: The device cannot be used here.
        PipelineCancelledError: The token was cancelled.
    """
    from ebbtide.runtime import library

    chosen = devices.candidates(device, library.providers())[0]
    if chosen.name != "cpu":
        raise _no_copy(graph, f"it runs on {chosen}, and only what runs on cpu is prepared")
    here, version = store(), library.version()
    try:
        found = key_of(here, graph, options, compute=True)
    except OSError as error:
        raise LoadError(f"{graph} cannot be read: {error.strerror}.", path=str(graph)) from None
    if found is None:
        raise _no_copy(graph, "it names data outside its own folder")
    manifest = _whole(here, found[0], version)
    if manifest is not None:
        return manifest, False
    reason = cannot(size, asked=True)
    if reason:
        raise _no_copy(graph, reason)
    told("preparing")
    outcome = _outcome(graph, options, token)
    if "error" in outcome:
        raise _no_copy(graph, str(outcome["error"]))
    manifest = _whole(here, found[0], version)
    if manifest is None:  # the copy is larger than the original, whose size was looked at
        limit = f"{settings.cache_size / 1e6:,.0f} MB"
        raise _no_copy(graph, f"it does not fit in the {limit} of settings.cache_size")
    told("prepared")
    return manifest, True


def _whole(here: Store, key: str, version: str) -> Manifest | None:
    held = here.hold(key, version)
    if held is None:
        return None
    held.close()
    return held.manifest


def _no_copy(graph: Path, reason: str) -> PrepareError:
    text = f"No prepared copy of {graph} can be made: {reason.rstrip('.')}."
    return PrepareError(f"{text} The model runs without one.", path=str(graph))


def _outcome(graph: Path, options: SessionOptions, token: CancelToken) -> dict[str, object]:
    """What the process that makes a copy says of it: a key, or an error.

    Raises:
        PipelineCancelledError: The token was cancelled.
    """
    if not _has_python():
        return {"error": _NO_PYTHON, "known": True}
    request = {
        "graph": str(graph.absolute()),
        "root": str(store().root.absolute()),
        "options": dataclasses.asdict(options),
        "limit": settings.cache_size,
    }
    try:
        text = _ask(json.dumps(request) + "\n", token)
        outcome: dict[str, object] = json.loads(text or f'{{"error": "{_ENDED}"}}')
    except (OSError, ValueError) as error:
        outcome = {"error": str(error)}
    if token.cancelled or "error" in outcome:
        with contextlib.suppress(OSError):
            store().sweep()
    token.check()
    return outcome


def _ask(request: str, token: CancelToken) -> str:
    """The child's answer to a request; empty where it ended without one."""
    environment = dict(os.environ)
    home = str(Path(__file__).parent.parent.parent)
    if home not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        paths = (home, environment.get("PYTHONPATH"))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with subprocess.Popen(  # noqa: S603 - a Python that runs a literal of ours
        [sys.executable, "-P", "-c", _CHILD],  # -P: no module of the current folder's
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        start_new_session=True,  # a terminal's Ctrl-C is for us, who then end it
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        token.attach(child.kill)
        try:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(request)
                child.stdin.flush()  # and stays open: its end is the child's end
            return child.stdout.read()
        finally:
            token.detach(child.kill)
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()


def known_copy(graph: Path, options: SessionOptions) -> Manifest | None:
    """What a graph's prepared copy is, where one is there and the graph's content is known."""
    from ebbtide.runtime import library

    here, version = store(), library.version()
    with contextlib.suppress(OSError):
        found = key_of(here, graph, options, compute=False)
        return _whole(here, found[0], version) if found is not None else None
    return None


_Wish = tuple[Path, "SessionOptions", int, Callable[[], object]]


def _is_there(graph: Path, options: SessionOptions) -> bool:
    found = key_of(store(), graph, options, compute=True)
    return found is not None and store().has(found[0])


class Background:
    """Makes copies while the originals are in use, one at a time, and has their users move."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """In a forked child: nothing is wished for, and no thread is here."""
        self._wishes: collections.deque[_Wish] = collections.deque()
        self._lock = threading.Lock()
        self._running = False
        self._thread: threading.Thread | None = None
        self._token = CancelToken("preparing a model")

    def wish(
        self, graph: Path, options: SessionOptions, size: int, then: Callable[[], object]
    ) -> None:
        """Have a copy made; called on a thread of Ebbtide's own.

        Args:
            graph: The original ONNX file.
            options: How it is to be run.
            size: Bytes of the graph and its data.
            then: Called once there is one, on a thread that may wait.
        """
        with self._lock:
            self._wishes.append((graph, options, size, then))
            if self._running:
                return
            self._running = True
        _at_exit()
        # Not one of Ebbtide's own: what it has done natively is to be done on a native thread.
        thread = threading.Thread(target=self._work, name="ebbtide-prepare", daemon=True)
        thread.start()
        self._thread = thread

    def stop(self) -> None:
        """Make nothing more in this process, and leave nothing behind."""
        self._wishes.clear()
        self._token.cancel()
        if self._thread is not None:
            self._thread.join(settings.exit_timeout)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._wishes:
                    self._running = False
                    return
                graph, options, size, then = self._wishes.popleft()
            try:
                reason = cannot(size)
                if not reason:
                    made = prepare(graph, options, self._token) is not None
                else:  # as in an image whose store came with it, and cannot be written
                    made = _is_there(graph, options)
                    if not made:
                        log.info("No prepared copy of %s is made: %s.", graph, reason)
                if made:
                    then()
            except PipelineCancelledError:
                return
            except Exception:  # the original is in use, and stays so
                log.warning("Preparing %s failed.", graph, exc_info=True)
            finally:
                del then


background = Background()
on_fork(background.forget)


@functools.cache
def _at_exit() -> None:
    atexit.register(background.stop)


class _RefusedError(Exception):
    """This graph cannot be prepared, now or later."""


def main() -> None:
    """Be the process that makes a copy."""
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_input, daemon=True).start()
    with contextlib.suppress(OSError, AttributeError):
        os.nice(10)
    with contextlib.suppress(OSError):  # where memory runs out, this is what goes
        Path("/proc/self/oom_score_adj").write_text("1000")
    outcome: dict[str, object]
    try:
        if "fused" in request:
            outcome = _fuse(Path(request["graph"]), Path(request["fused"]), request["options"])
        elif "measured" in request:
            outcome = _measure(Path(request["measured"]), request["options"])
        else:
            outcome = _make(
                Path(request["graph"]),
                Store(Path(request["root"])),
                request["options"],
                request["limit"],
            )
    except (EbbtideError, OSError, MemoryError) as error:
        outcome = {"error": str(error) or type(error).__name__}
    print(json.dumps(outcome), flush=True)
    _end()


def _end_with_input() -> None:
    sys.stdin.read()
    _end()


_making: list[Path] = []
"""The folder that is being written, for an end in the middle."""


def _end() -> NoReturn:
    for folder in _making:
        gone = folder.with_suffix(".gone")
        with contextlib.suppress(OSError):
            folder.rename(gone)  # so that what goes on writing finds no place
        shutil.rmtree(gone, ignore_errors=True)
    os._exit(0)


def _options(given: dict[str, Any]) -> SessionOptions:
    from ebbtide.runtime import session as sessions

    entries = tuple((key, value) for key, value in given["entries"])
    return sessions.SessionOptions(**{**given, "entries": entries, "threads": 1})


def _fuse(graph: Path, fused: Path, given: dict[str, Any]) -> dict[str, object]:
    """Fuse a graph's attention and try it, in a process whose memory nobody measures."""
    from ebbtide.runtime import rewriting

    fused.write_bytes(rewriting.fused(graph, _options(given), CancelToken("fusing")))
    return {"fused": str(fused)}


def _measure(graph: Path, given: dict[str, Any]) -> dict[str, object]:
    """Measure what a copy takes, in a process that has loaded nothing before."""
    from ebbtide.runtime import library, rewriting

    library.onnxruntime()
    return {"anonymous": rewriting.measured(graph, _options(given))}


def _said(**request: object) -> dict[str, Any]:
    """What a further process answers, while this one waits; nothing where it ended early."""
    text = _ask(json.dumps(request) + "\n", CancelToken("preparing a model"))
    return json.loads(text) if text else {"error": _ENDED}


def _fused(graph: Path, folder: Path, given: dict[str, Any]) -> Path | None:
    """A graph with its attention fused, in a file; None where that cannot be."""
    from ebbtide.runtime import rewriting

    if not given["fuse"] or given["optimization"] != "all" or not rewriting.may_fuse(graph):
        return None
    said = _said(graph=str(graph), fused=str(folder / _FUSED), options=given)
    if "fused" not in said:
        log.info("The attention of %s is not fused: %s.", graph, said["error"])
        return None
    return folder / _FUSED


def _make(graph: Path, here: Store, given: dict[str, Any], limit: int) -> dict[str, object]:
    from ebbtide.runtime import library, rewriting

    options = _options(given)
    version = library.version()
    found = key_of(here, graph, options, compute=True)
    if found is None:
        return {"error": "it names data outside its own folder"}
    key, source = found
    refusal = here.refusal(key)
    if refusal is not None:
        return {"error": refusal, "known": True}
    size = sum(one.size for one in source)
    if size > limit:
        return {"error": f"its {size / 1e6:.0f} MB do not fit in settings.cache_size"}
    with here.writing(key) as folder:
        if folder is None:
            return {"key": key}
        _making.append(folder)
        started = time.monotonic()
        try:
            fused = _fused(graph, folder, given)
            anonymous = rewriting.write_prepared(graph, folder / stores.GRAPH, options, fused)
            if fused is not None:
                fused.unlink()
                said = _said(measured=str(folder / stores.GRAPH), options=given)
                anonymous = said.get("anonymous", anonymous)
        except EbbtideError as error:
            if _short(folder, size) is None:  # else it may well work another time
                here.refuse(key, str(error))
            raise
        names = [one for one in (stores.GRAPH, stores.DATA) if (folder / one).exists()]
        here.publish(
            folder,
            Manifest(
                key=key,
                model=str(graph),
                source=source,
                onnxruntime=version,
                cpu=stores.cpu_features(),
                options=shape_of(options),
                files=stores.describe(folder, names),
                anonymous=anonymous,
                seconds=round(time.monotonic() - started, 3),
                created=time.time(),
            ),
        )
        _making.clear()
    here.prune(limit)
    if not here.has(key):
        return {"error": "its prepared copy does not fit in settings.cache_size"}
    return {"key": key}
