"""``ebbtide run``: load once, run every text, give the memory back."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from numpy.typing import NDArray
from rich.console import Console

import ebbtide
from ebbtide.cli import results
from ebbtide.cli.words import Value, groups, split
from ebbtide.errors import InputError
from ebbtide.pipelines import FeatureExtractionPipeline


def run(
    task: str,
    words: Sequence[str],
    literal: Sequence[str],
    *,
    model: str | None,
    dtype: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Run a task on texts, and print what comes out as it comes.

    Args:
        task: The task.
        words: Texts, and options of the task's call, as they were typed.
        literal: Texts that were typed after ``--``.
        model: The model, or None for the task's default.
        dtype: Which of its files.
        device: Where to run.
        as_json: One JSON line a text, and nothing else on standard output.
    """
    texts, options = split(task, words)
    texts += literal
    piped = not texts
    if piped and (sys.stdin is None or sys.stdin.isatty()):
        raise InputError(
            f"There is no text. Pass some (ebbtide run {task} 'The tide goes out.'), or pipe lines"
            " to standard input."
        )
    with ebbtide.pipeline(task, model, dtype=dtype, device=device) as pipe:
        found = _results(pipe, _lines() if piped else iter(texts), options)
        try:
            _show(found, as_json=as_json, streamed=piped)
        except KeyboardInterrupt:
            pipe.dispose(cancel=True)
            raise
        receipt = pipe.dispose()
    if not as_json:
        print(receipt, file=sys.stderr)


def _show(found: Iterator[tuple[str, NDArray[Any]]], *, as_json: bool, streamed: bool) -> None:
    """Print results; each as it comes, but for a table."""
    if as_json or streamed or not sys.stdout.isatty():
        form = results.json_line if as_json else results.plain_row
        for text, result in found:
            print(form(text, result), flush=True)
    else:
        results.table(found, Console())


def _results(
    pipe: FeatureExtractionPipeline, texts: Iterator[str], options: dict[str, Value]
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Each text with its result; several at once only where ``--batch-size`` says how many."""
    call: Any = pipe
    for group in groups(texts, options.get("batch_size")):
        yield from zip(group, call(group, **options), strict=True)


def _lines() -> Iterator[str]:
    """The lines of standard input, as they come in.

    Raises:
        InputError: A line is not UTF-8.
    """
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(f"Line {number} of standard input is not UTF-8: {error}.") from None
