"""Pipelines in the processes of `multiprocessing` and `concurrent.futures`, disposed at their end.

A pipeline is made in the process that uses it. So a pool's initializer loads it, and the pool's
functions ask for it:

    with ProcessPoolExecutor(2, initializer=load, initargs=("feature-extraction", MODEL)) as pool:
        sizes = pool.map(size, TEXTS)  # def size(text): return loaded()(text).shape

A child that was forked, or comes from a fork server, ends without `atexit` before Python 3.13. What
is registered here is run in every version and with every start method. A process that is ended by a
signal, as by ``Pool.terminate`` and the end of ``with Pool()``, runs neither: call ``close`` and
``join``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from multiprocessing import util
from typing import Any, Final

from ebbtide._settings import settings
from ebbtide.errors import InputError
from ebbtide.factory import Model, pipeline
from ebbtide.lifecycle import Disposable, end_of_process

_PRIORITY: Final = 100
"""Before `multiprocessing` joins the threads of its queues, and ends the process's own children."""

_registered: Final[dict[int, util.Finalize[None]]] = {}
_loaded: Final[dict[int, Any]] = {}


def dispose_at_exit() -> None:
    """Have this process's pipelines disposed when it ends, however it was started.

    Call it in the process, as in the function of a `multiprocessing.Process`; a second call does
    nothing. Running calls are cancelled, and it takes at most ``settings.exit_timeout`` seconds.

    Example:
        >>> def work(texts):
        ...     dispose_at_exit()
        ...     embed = ebbtide.pipeline("feature-extraction")
        ...     return embed(texts).shape
    """
    process = os.getpid()  # a forked child inherits what its parent has registered, in vain
    if process not in _registered:
        _registered[process] = util.Finalize(
            None, end_of_process, args=(settings.exit_timeout,), exitpriority=_PRIORITY
        )


def load(task: str, model: Model = None, options: Mapping[str, Any] | None = None) -> None:
    """Load this process's pipeline, and have it disposed at the process's end; an initializer.

    Args:
        task: As for `ebbtide.pipeline`.
        model: As for `ebbtide.pipeline`.
        options: As for `ebbtide.pipeline`, as a map: initializers take no names.

    Raises:
        EbbtideError: As `ebbtide.pipeline`. In a pool's initializer it ends the pool.

    Example:
        >>> load("feature-extraction", "tests/models/tiny-bert", {"prepare": False})
        >>> len(loaded()("the tide goes out"))
        1
        >>> receipt = loaded().dispose()
    """
    dispose_at_exit()
    previous = _loaded.pop(os.getpid(), None)
    if isinstance(previous, Disposable):
        previous.dispose()
    _loaded[os.getpid()] = pipeline(task, model, **(options or {}))


def loaded() -> Any:
    """The pipeline that `load` has loaded in this process.

    Raises:
        InputError: It has not.
    """
    found = _loaded.get(os.getpid())
    if found is None:
        raise InputError(
            "This process has no pipeline. Give its pool"
            " initializer=ebbtide.integrations.multiprocessing.load and the task and the model as"
            " initargs."
        )
    return found
