"""Pipelines in Streamlit: loaded once, kept over reruns, disposed when the cache lets them go.

Streamlit runs a script anew at each change; `cached_pipeline` gives each run the same pipeline. It
is ``st.cache_resource`` with a disposal: where an entry is cleared, expires or makes room for
another, and at a session's end where the session has a pipeline of its own. What is left when the
server is stopped is disposed as at every exit of Python.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any, Final, Literal, Unpack

from ebbtide import factory
from ebbtide.errors import MissingExtraError
from ebbtide.factory import Model, PipelineOptions
from ebbtide.lifecycle import Disposable

try:
    import streamlit as st
except ImportError as error:
    raise MissingExtraError(
        "cached_pipeline needs Streamlit, which is not installed: pip install streamlit",
        extra="streamlit",
    ) from error

Scope = Literal["global", "session"]

_Key = tuple[float | str | None, int | None, bool | str, Scope]

_caches: Final[dict[_Key, Any]] = {}


def cached_pipeline(
    task: str,
    model: Model = None,
    *,
    ttl: float | str | None = None,
    max_entries: int | None = None,
    show_spinner: bool | str = True,
    scope: Scope = "global",
    **options: Unpack[PipelineOptions],
) -> Any:
    """A pipeline that all runs of the script share; loaded by the first that asks.

    Ask for it in each run and do not keep it elsewhere, as in ``st.session_state``: what the cache
    lets go is disposed once its running calls have ended.

    Args:
        task: As for `ebbtide.pipeline`.
        model: As for `ebbtide.pipeline`.
        ttl: After how long it is let go, in seconds or as text, as in ``"1h"``. Streamlit looks
            at its cache when it is used, so it may go later.
        max_entries: How many pipelines asked for with the same ``ttl``, ``max_entries``,
            ``show_spinner`` and ``scope`` are kept; the one used longest ago goes first.
        show_spinner: Whether the page shows that it loads, or what it shows.
        scope: ``"global"`` for one that all sessions share; ``"session"`` for one that is disposed
            when the browser's session ends.
        **options: As for `ebbtide.pipeline`.

    Returns:
        The pipeline, ready.

    Raises:
        EbbtideError: As `ebbtide.pipeline`.
        MissingExtraError: This Streamlit does not tell when its cache lets something go.

    Example:
        >>> embed = cached_pipeline("feature-extraction", max_entries=3)  # doctest: +SKIP
        >>> st.write(embed("the tide goes out"))  # doctest: +SKIP
    """
    found = _cache(ttl, max_entries, show_spinner, scope)
    named = None if model is None else os.fspath(model)
    return found(task, named, **options)


def clear() -> None:
    """Dispose every pipeline that `cached_pipeline` keeps; the next run loads what it asks for.

    Pipelines of sessions, which are theirs alone, are cleared for the session that asks.
    """
    for cache in tuple(_caches.values()):
        cache.clear()


def _cache(
    ttl: float | str | None, max_entries: int | None, show_spinner: bool | str, scope: Scope
) -> Any:
    key = (ttl, max_entries, show_spinner, scope)
    if key not in _caches:
        if "on_release" not in inspect.signature(st.cache_resource.__call__).parameters:
            raise MissingExtraError(
                "cached_pipeline needs a Streamlit whose st.cache_resource takes on_release, and"
                f" this one is {st.__version__}: pip install --upgrade streamlit",
                extra="streamlit",
            )
        cached = st.cache_resource(
            ttl=ttl,
            max_entries=max_entries,
            show_spinner=show_spinner,
            scope=scope,
            on_release=_dispose,
            validate=_takes_calls,
        )
        _caches[key] = cached(_loader(key))
    return _caches[key]


def _loader(key: _Key) -> Callable[..., Any]:
    """A function of its own for each cache: Streamlit tells caches apart by name and source."""

    def load(task: str, model: str | None, **options: Any) -> Any:
        return factory.pipeline(task, model, **options)

    load.__qualname__ = f"cached_pipeline.{key!r}"
    return load


def _takes_calls(pipe: Disposable) -> bool:
    """Whether it may be given out; one that somebody disposed by hand is loaded again."""
    return pipe._lifecycle.takes_calls


def _dispose(pipe: Disposable) -> None:
    """What the cache lets go; it does not wait, for the script's run that it is told in goes on."""
    pipe._lifecycle.request()
