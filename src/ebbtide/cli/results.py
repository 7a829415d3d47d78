"""One text's result as a line of JSON, as a plain row, or as a row of a table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

Array = NDArray[Any]

_FIGURES_WIDTH: Final = 48
"""Columns of a terminal that everything but the text may take."""

_DIGITS: Final = {2: 5, 4: 9}
"""Digits that give a float of this many bytes back exactly."""


def json_line(text: str, result: Array) -> str:
    """One object: the text, and the array's shape, dtype and numbers (null: not finite)."""
    data = _numbers(result) if result.dtype.kind == "f" else result.tolist()
    line = {"text": text, "shape": result.shape, "dtype": str(result.dtype), "data": data}
    return json.dumps(line)


def plain_row(text: str, result: Array) -> str:
    """Text, shape, length and first numbers, with tabs between."""
    shown = " ".join(text.split())
    return "\t".join((shown, shape(result), length(result), first(result)))


def table(rows: Iterable[tuple[str, Array]], console: Console) -> None:
    """The same for people, as one table."""
    view = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    view.add_column("text", no_wrap=True, overflow="ellipsis")
    view.add_column("shape", style="cyan", no_wrap=True)
    view.add_column("length", style="green", no_wrap=True)
    view.add_column("first numbers", style="dim", no_wrap=True)
    room = max(10, console.width - _FIGURES_WIDTH)
    for text, result in rows:
        shown = Text(" ".join(text.split()))
        shown.truncate(room, overflow="ellipsis")
        view.add_row(shown, *map(Text, (shape(result), length(result), first(result, 3))))
    console.print(view)


def shape(result: Array) -> str:
    """The array's shape.

    Example:
        >>> shape(np.zeros((7, 32)))
        '7 x 32'
    """
    return " x ".join(str(one) for one in result.shape)


def length(result: Array) -> str:
    """A vector's Euclidean length; a dash for what is no vector of floats."""
    if result.ndim != 1 or result.dtype.kind != "f":
        return "-"
    return f"{np.linalg.norm(result.astype(np.float64)):.4f}"


def first(result: Array, count: int = 4) -> str:
    """The first few numbers."""
    form = "{:+.4f}" if result.dtype.kind == "f" else "{}"
    numbers = [form.format(one) for one in result.ravel()[:count].tolist()]
    return " ".join(numbers) + (" ..." if result.size > count else "")


def _numbers(result: Array) -> Any:
    """Nested lists, each float with as many digits as it takes to read it back exactly."""
    if result.ndim > 1:
        return [_numbers(row) for row in result]
    digits = _DIGITS.get(result.dtype.itemsize, 17)
    return [float(f"{one:.{digits}g}") if np.isfinite(one) else None for one in result.tolist()]
