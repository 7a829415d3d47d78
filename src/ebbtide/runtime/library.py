"""ONNX Runtime itself: imported once, started, silent, and safe to fork beside.

Sessions are `session`'s; what all of them share is here.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import functools
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any, Final

from ebbtide._settings import settings
from ebbtide.lifecycle import on_fork
from ebbtide.memory.allocator import allocator
from ebbtide.runtime.threads import cpu_count

_SMALLEST_MODEL: Final = base64.b64decode(
    "CAgSADpTChEKAXgKAXcSAXkiBk1hdE11bBIBZyoPCAEIARABIgQAAIA/QgF3WhQKAXgSDwoNCAESCQoDEgFuCgIIAWIU"
    "CgF5Eg8KDQgBEgkKAxIBbgoCCAFCBAoAEBE="
)


_NUMPY_CACHES_BELOW: Final = 1024
_NUMPY_CACHES_EACH: Final = 7


_TELEMETRY: Final = "ORT_DISABLE_TELEMETRY"


@functools.cache
def onnxruntime() -> Any:
    """The library, started: its first session takes memory once that no disposal can return.

    A model of a few bytes is loaded and run here, so that this start-up (some 20 MB with the
    import) is over before the first pipeline's load is measured.
    """
    import numpy as np

    with telemetry_off():
        import onnxruntime as library

    _fill_numpy_cache()
    options = library.SessionOptions()
    if shared_threads():
        library.set_global_thread_pool_sizes(settings.threads or cpu_count(), 1)
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what goes wrong is raised, and not printed as well
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    session = library.InferenceSession(_SMALLEST_MODEL, options, providers=["CPUExecutionProvider"])
    session.run(None, {"x": np.ones((1, 1), np.float32)})
    session.__dict__.clear()
    del session
    allocator.trim()
    return library


@functools.cache
def shared_threads() -> bool:
    """Whether sessions share one pool of threads; decided once, at the first of them."""
    return settings.shared_threads


@contextlib.contextmanager
def telemetry_off() -> Iterator[None]:
    """Have ONNX Runtime, imported in this block, collect and send nothing.

    Since 1.29 its wheels report sessions, models and errors to Microsoft (privacy.md of its
    repository). For that they keep a database in the user's cache folder, two threads and memory
    that grows with each load that fails, and forked children that wait for the threads for ever.
    The variable is read at the import alone; whoever sets it has chosen, with 0 too.
    """
    if _TELEMETRY in os.environ:
        yield
        return
    os.environ[_TELEMETRY] = "1"
    try:
        yield
    finally:
        os.environ.pop(_TELEMETRY, None)


def _fill_numpy_cache() -> None:
    """Have numpy take, now and in one place, the small buffers that it never gives back.

    It keeps up to seven freed buffers of each size below a kilobyte. Left to fill while pipelines
    come and go, they lie scattered over memory that is free otherwise, and each keeps a page of it:
    in 1,000 loads 2.5 MB. Together they are 0.9 MB.
    """
    import numpy as np

    sizes = range(4, _NUMPY_CACHES_BELOW, 4)
    kept = [np.empty(size, np.uint8) for size in sizes for _ in range(_NUMPY_CACHES_EACH)]
    kept.clear()


def _end_child_early() -> None:
    """In a forked child: have its exit skip ONNX Runtime's static destructors.

    Where its telemetry is on, ONNX Runtime starts threads when it is imported. A forked child does
    not have them, and waits for them for ever when it exits (`import onnxruntime`, `os.fork()`,
    `sys.exit()` hangs; so it does where the user imported it before Ebbtide). Of
    what runs after Python's own end, last registered first, these two come first: C's streams are
    written out, and the process ends with the status that it was about to end with.
    """
    if "onnxruntime" not in sys.modules:
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "on_exit"):  # glibc; elsewhere there is nothing that knows the status
        library.on_exit(library._exit, None)
        library.on_exit(library.fcloseall, None)


on_fork(_end_child_early)

_opening = threading.RLock()
"""Held while a session is made. ONNX Runtime takes locks of its own there, and a fork in the middle
would leave them held for ever in the child: so a fork waits for it."""

_FORK_PATIENCE = 10.0
"""Seconds a fork waits for a load."""


@contextlib.contextmanager
def opening() -> Iterator[None]:
    """While a session is made: a fork waits for it."""
    with _opening:
        yield


def _before_fork() -> None:
    _forking.append(_opening.acquire(timeout=_FORK_PATIENCE))


def _after_fork_in_parent() -> None:
    if _forking.pop():
        _opening.release()


def _after_fork_in_child() -> None:
    global _opening
    _forking.clear()
    _opening = threading.RLock()


_forking: list[bool] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )


def providers() -> list[str]:
    """The execution providers that the installed ONNX Runtime was built with."""
    return list(onnxruntime().get_available_providers())


def version() -> str:
    """The installed ONNX Runtime's version."""
    return str(onnxruntime().__version__)
