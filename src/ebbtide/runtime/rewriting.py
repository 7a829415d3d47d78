"""The copy of a graph: fused and optimised, its weights packed, and checked beside the original.

Run by a process that does nothing else: see `prepare`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ebbtide.cancellation import CancelToken
from ebbtide.errors import LoadError, RunError
from ebbtide.memory.allocator import allocator
from ebbtide.memory.probe import anonymous_bytes
from ebbtide.runtime import devices
from ebbtide.runtime.attention import FOLDER, PAST, NotFusedError
from ebbtide.runtime.carry import POSITIONS, size_in
from ebbtide.runtime.fuse import fuse
from ebbtide.runtime.identity import mentions
from ebbtide.runtime.session import (
    OnnxSession,
    SessionOptions,
    made,
    native_options_of,
    open_prepared,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_CPU: Final = devices.Device("cpu")
_TRIED: Final = 24
"""Tokens that a fused graph and its original write, to be compared."""

_TOLERANCE: Final = 1e-3


def write_prepared(
    source: Path, target: Path, options: SessionOptions, fused: Path | None = None
) -> int:
    """Write a graph as it is once loaded: optimised, its weights packed and in a file beside it.

    What was written is read back and run beside the original. Made for a process that does nothing
    else, whose memory it measures.

    Args:
        source: The original.
        target: The graph to write; its data gets the same name and ``.data``.
        options: How it will be run.
        fused: The same graph with its attention fused, if there is one.

    Returns:
        Bytes of anonymous memory that the written one takes, loaded and after a run.

    Raises:
        LoadError: The original, or what was written, cannot be loaded.
        RunError: What was written gives other answers than the original.
    """
    token = CancelToken("preparing a model")
    native_options = native_options_of(options)
    content = None
    if fused is not None:
        content = fused.read_bytes()
        native_options.add_session_config_entry(FOLDER, str(source.parent))
    native_options.optimized_model_filepath = str(target)
    for key, value in (
        ("optimized_model_external_initializers_file_name", f"{target.name}.data"),
        ("optimized_model_external_initializers_min_size_in_bytes", "1024"),
        ("save_external_prepacked_constant_initializers", "1"),
    ):
        native_options.add_session_config_entry(f"session.{key}", value)
    original = made(source, _CPU, native_options, token, content)
    expected = _reference_run(original, token)
    original.close()
    taken, found, written = _measured(target, options, token)
    for info in original.outputs if expected and found else ():
        if not _agree(expected[info.name], found[info.name]):
            raise RunError(f"its prepared copy gave another {info.name} than the original.")
    if bool(expected) != bool(found):
        raise RunError("its prepared copy cannot be run as the original can.")
    written.close()
    return taken


def measured(graph: Path, options: SessionOptions) -> int:
    """Bytes of anonymous memory that a prepared graph takes, loaded and after a run.

    Raises:
        LoadError: It cannot be loaded.
    """
    taken, _, session = _measured(graph, options, CancelToken("measuring"))
    session.close()
    return taken


def _measured(
    graph: Path, options: SessionOptions, token: CancelToken
) -> tuple[int, dict[str, Array], OnnxSession]:
    allocator.trim()
    before = anonymous_bytes()
    session = open_prepared(graph, options, token)
    found = _reference_run(session, token)
    allocator.trim()
    return max(0, anonymous_bytes() - before), found, session


def _reference_run(session: OnnxSession, token: CancelToken) -> dict[str, Array]:
    """What a graph gives for some feeds that its inputs allow; nothing where they do not."""
    feeds = {}
    for info in session.inputs:
        shape = [_extent(one) for one in info.shape]
        try:
            dtype = np.dtype(info.dtype)
        except TypeError:
            return {}
        feeds[info.name] = (np.zeros if dtype.kind in "bf" else np.ones)(shape, dtype)
        if "position" in info.name and len(shape) == 2:
            feeds[info.name][:] = np.arange(shape[1])
    names = [one.name for one in session.outputs]
    try:
        return dict(zip(names, session.run(feeds, names, token), strict=True))
    except RunError:
        return {}


def _extent(dimension: int | str | None) -> int:
    """A size for a dimension: one sequence of eight, with nothing before it."""
    if isinstance(dimension, int):
        return dimension
    if dimension is not None and "+" in dimension:
        return sum(_extent(one.strip()) for one in dimension.split("+"))
    name = (dimension or "").lower()
    return 0 if "past" in name else 8 if "seq" in name or "len" in name else 1


def _agree(one: Array, other: Array) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.dtype.kind != "f":
        return bool(np.array_equal(one, other))
    return bool(np.allclose(one, other, rtol=1e-3, atol=1e-4, equal_nan=True))


def may_fuse(source: Path) -> bool:
    """Whether it is worth a try: a causal model, whose positions are known."""
    return _positions(source) is not None and mentions(source, b"past_key_values.0.key")


def fused(source: Path, options: SessionOptions, token: CancelToken) -> bytes:
    """A graph with its attention fused, which writes what the original writes.

    Its weights stay in the files of the original's folder.

    Raises:
        LoadError: It cannot be fused, or writes other tokens.
    """
    try:
        made_of = fuse(source, _positions(source) or 0)
        found = []
        for content in (made_of.exact_original, made_of.exact):
            native_options = native_options_of(options)
            made_of.configure(native_options)
            session = made(source, _CPU, native_options, token, content)
            found.append(_written(session, token))
            session.close()
    except NotFusedError as error:
        raise LoadError(str(error), path=str(source)) from None
    (tokens, logits), (others, other_logits) = found
    off = float(np.abs(logits - other_logits).max()) if tokens == others else np.inf
    if off > _TOLERANCE * max(1.0, float(np.abs(logits).max())):
        raise LoadError(f"logits were off by {off:.2g}", path=str(source))
    return made_of.data


def _positions(graph: Path) -> int | None:
    """Tokens that a model can take, by the config beside its graph or above its folder."""
    for folder in (graph.parent, graph.parent.parent):
        try:
            raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        found = size_in(raw, *POSITIONS) if isinstance(raw, dict) else None
        if found is not None:
            return found
    return None


def _written(session: OnnxSession, token: CancelToken) -> tuple[list[int], Array]:
    """What a causal model writes: tokens, and the logits of each.

    Raises:
        NotFusedError: It cannot be run without its config.
        RunError: It cannot be run.
    """
    past: dict[str, Array] = {}
    for info in session.inputs:
        if PAST.fullmatch(info.name):
            sizes = [one if isinstance(one, int) else 0 for one in info.shape]
            if len(sizes) != 4 or not (sizes[1] and sizes[3]):
                raise NotFusedError(f"{info.name} has no sizes")
            past[info.name] = np.zeros((1, sizes[1], 0, sizes[3]), info.dtype)
    presents = [one.name for one in session.outputs if one.name.startswith("present")]
    known = {one.name: one.dtype for one in session.inputs}
    fresh = (np.arange(12) * 37 + 11) % 90
    total = 0
    tokens: list[int] = []
    logits: list[Array] = []
    while len(tokens) < _TRIED:
        total += len(fresh)
        feeds: dict[str, Array] = {
            "input_ids": fresh[None],
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(total - len(fresh), total)[None],
            "num_logits_to_keep": np.array(1),
        }
        feeds = {name: one.astype(known[name]) for name, one in feeds.items() if name in known}
        first, *rest = session.run({**feeds, **past}, ["logits", *presents], token)
        past = {
            name.replace("present", "past_key_values"): one
            for name, one in zip(presents, rest, strict=True)
        }
        logits.append(np.array(first[0, -1], np.float32))
        tokens.append(int(logits[-1].argmax()))
        fresh = np.array(tokens[-1:])
    return tokens, np.array(logits)
