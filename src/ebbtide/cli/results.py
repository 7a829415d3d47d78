"""One text's result as a line of JSON, as plain rows, or as rows of a table; every task's."""

from __future__ import annotations

import dataclasses
import json
import math
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

Array = NDArray[Any]
Row = tuple[str, ...]

_STYLES: Final = {
    "shape": "cyan", "label": "cyan", "entity": "cyan", "answer": "cyan", "token": "cyan",
    "length": "green", "score": "green",
    "first numbers": "dim", "place": "dim",
}  # fmt: skip

_NARROW: Final = {"shape", "length", "first numbers", "score", "place"}
"""Columns of figures, which are never cut; the others share what they leave of the width."""

_DIGITS: Final = {2: 5, 4: 9}
"""Digits that give a float of this many bytes back exactly."""


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    """How people see a task's results.

    Attributes:
        columns: The columns' names.
        rows: The rows of one text and its result.
        given: What JSON calls the text. Where it is also the first column, a table has a text once.
        streamed: Whether the result is a text that comes piece by piece, which no table shows.
    """

    columns: Row
    rows: Callable[[str, Any], Iterable[Row]]
    given: str = "text"
    streamed: bool = False


def json_line(view: View, text: str, result: Any) -> str:
    """One object: the text and its result; of an array its shape, dtype and numbers.

    A number that is not finite is null.
    """
    if not isinstance(result, np.ndarray):
        return json.dumps({view.given: text, "result": _finite(result)})
    data = _numbers(result) if result.dtype.kind == "f" else result.tolist()
    line = {view.given: text, "shape": result.shape, "dtype": str(result.dtype), "data": data}
    return json.dumps(line)


def plain_rows(view: View, text: str, result: Any) -> str:
    """The rows as lines, with tabs between the cells."""
    return "\n".join("\t".join(row) for row in _rows(view, text, result))


def table(view: View, found: Iterable[tuple[str, Any]], console: Console) -> None:
    """The rows of all texts for people, as one table."""
    shown = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in view.columns:
        # Rich narrows the columns that may wrap; that no cell does is said of each cell.
        shown.add_column(name, style=_STYLES.get(name), no_wrap=name in _NARROW)
    for text, result in found:
        for number, row in enumerate(_rows(view, text, result)):
            cells = ("", *row[1:]) if number and view.columns[0] == view.given else row
            shown.add_row(*(Text(cell, no_wrap=True, overflow="ellipsis") for cell in cells))
    console.print(shown)


def printable(text: str) -> str:
    r"""A text without what would steer the terminal: control characters but lines and tabs.

    Example:
        >>> printable("one\x1b[2J two")
        'one[2J two'
    """
    return "".join(one for one in text if one in "\n\t" or unicodedata.category(one) != "Cc")


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


def first(result: Array, count: int = 3) -> str:
    """The first few numbers."""
    form = "{:+.4f}" if result.dtype.kind == "f" else "{}"
    numbers = [form.format(one) for one in result.ravel()[:count].tolist()]
    return " ".join(numbers) + (" ..." if result.size > count else "")


def _rows(view: View, text: str, result: Any) -> Iterator[Row]:
    """The rows, each cell on one line and without tabs; a dash for an empty one."""
    for row in view.rows(text, result):
        yield tuple(printable(" ".join(cell.split())) or "-" for cell in row)


def _vector(text: str, vector: Array) -> Iterator[Row]:
    yield text, shape(vector), length(vector), first(vector)


def _labels(text: str, labels: Any) -> Iterator[Row]:
    for one in labels:
        yield text, one["label"], _score(one["score"])


def _entities(text: str, entities: Any) -> Iterator[Row]:
    if not entities:
        yield text, "", "", "", ""
    for one in entities:
        entity = one["entity"] if "entity" in one else one["entity_group"]
        yield text, entity, one["word"], _score(one["score"]), _place(one)


def _answers(question: str, answers: Any) -> Iterator[Row]:
    for one in answers if isinstance(answers, list) else [answers]:
        yield question, one["answer"], _score(one["score"]), _place(one)


def _fillings(text: str, fillings: Any) -> Iterator[Row]:
    for one in fillings:
        if isinstance(one, list):  # one mask of several
            yield from _fillings(text, one)
        else:
            yield one["token_str"], _score(one["score"]), one["sequence"]


def _own_labels(text: str, found: Any) -> Iterator[Row]:
    for label, score in zip(found["labels"], found["scores"], strict=True):
        yield text, label, _score(score)


def _written(key: str) -> View:
    def rows(text: str, found: Any) -> Iterator[Row]:
        for one in found if isinstance(found, list) else [found]:
            yield text, one[key]

    return View(("text", key.replace("_", " ")), rows, streamed=True)


def _score(score: float) -> str:
    """Four digits; of a score that has none there, its size."""
    return f"{score:.0e}" if 0 < abs(score) < 0.0001 else f"{score:.4f}"


def _place(found: Any) -> str:
    """Where in the text or the context, as Python slices it; nowhere for an answer of nothing."""
    start, end = found["start"], found["end"]
    return f"{start}:{end}" if start < end else ""


VIEWS: Final[Mapping[str, View]] = MappingProxyType(
    {
        "feature-extraction": View(("text", "shape", "length", "first numbers"), _vector),
        "text-classification": View(("text", "label", "score"), _labels),
        "token-classification": View(("text", "entity", "word", "score", "place"), _entities),
        "question-answering": View(
            ("question", "answer", "score", "place"), _answers, given="question"
        ),
        "fill-mask": View(("token", "score", "sequence"), _fillings),
        "zero-shot-classification": View(("text", "label", "score"), _own_labels),
        "text-generation": _written("generated_text"),
        "text2text-generation": _written("generated_text"),
        "summarization": _written("summary_text"),
        "translation": _written("translation_text"),
    }
)


def _finite(value: Any) -> Any:
    """The same, with None for each number that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    if isinstance(value, np.ndarray):
        return _numbers(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(result: Array) -> Any:
    """Nested lists, each float with as many digits as it takes to read it back exactly."""
    if result.ndim > 1:
        return [_numbers(row) for row in result]
    digits = _DIGITS.get(result.dtype.itemsize, 17)
    return [float(f"{one:.{digits}g}") if np.isfinite(one) else None for one in result.tolist()]
