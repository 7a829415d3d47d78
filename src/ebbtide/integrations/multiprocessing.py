"""Pipelines in the processes of `multiprocessing` and `concurrent.futures`, disposed at their end.

A pipeline is made in the process that uses it. So a pool's initializer loads it, and the pool's
functions ask for it:

    with ProcessPoolExecutor(2, initializer=load, initargs=("feature-extraction", MODEL)) as pool:
        sizes = pool.map(size, TEXTS)  # def size(text): return loaded()(text).shape

What is left is disposed before a child ends normally, with every start method, and nothing is to be
called for it. A process that is ended by a signal, as by ``Pool.terminate`` and the end of ``with
Pool()``, disposes nothing: call ``close`` and ``join``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

from ebbtide.errors import InputError
from ebbtide.factory import Model, pipeline
from ebbtide.lifecycle import Disposable

_loaded: Final[dict[int, Any]] = {}


def load(task: str, model: Model = None, options: Mapping[str, Any] | None = None) -> None:
    """Load this process's pipeline; an initializer.

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
