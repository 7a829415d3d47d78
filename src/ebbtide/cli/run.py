"""``ebbtide run``: load once, run every text, give the memory back."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from ebbtide.cli import results
from ebbtide.cli.ending import loaded
from ebbtide.cli.words import Value, example, groups, lines, split
from ebbtide.errors import InputError
from ebbtide.factory import PipelineOptions
from ebbtide.pipelines import Pipeline, find

_IN_A_LIST: Final = frozenset(
    {"text-classification", "text2text-generation", "summarization", "translation"}
)
"""Tasks that give a list for one text alone."""


def run(
    task: str,
    words: Sequence[str],
    literal: Sequence[str],
    *,
    model: str | None,
    options: PipelineOptions,
    as_json: bool,
) -> None:
    """Run a task on texts, and print what comes out as it comes.

    Args:
        task: The task.
        words: Texts, and options of the task's call, as they were typed.
        literal: Texts that were typed after ``--``.
        model: The model, or None for the task's default.
        options: The pipeline's. Texts that were typed are over before a prepared copy could be made
            beside them: for them none is made unless it is asked for.
        as_json: One JSON line a text, and nothing else on standard output.
    """
    texts, call = split(task, words)
    texts += literal
    piped = not texts
    if piped and (sys.stdin is None or sys.stdin.isatty()):
        raise InputError(
            f"There is no text. Pass some ({example(task)}), or pipe lines to standard input."
        )
    if not piped and options.get("prepare") is None and "EBBTIDE_PREPARE" not in os.environ:
        options["prepare"] = False
    view = results.VIEWS[find(task).name]
    with loaded(task, model, options, as_json=as_json) as pipe:
        found = _results(pipe, lines() if piped else iter(texts), call)
        if as_json or piped or not sys.stdout.isatty():
            form = results.json_line if as_json else results.plain_rows
            for text, result in found:
                print(form(view, text, result), flush=True)
        elif view.streamed:
            _write(pipe, texts, call)
        else:
            results.table(view, found, Console())


def _results(
    pipe: Pipeline, texts: Iterator[str], options: dict[str, Value]
) -> Iterator[tuple[str, Any]]:
    """Each text with its result; several at once only where ``--batch-size`` says how many."""
    call: Any = pipe
    pair = options.pop("text_pair", None)
    for group in groups(texts, options.get("batch_size")):
        paired = [{"text": text, "text_pair": pair} for text in group]
        found = call(group if pair is None else paired, **options)
        for text, result in zip(group, found, strict=True):
            # In a list, a text's only result is not wrapped in a list of its own.
            bare = pipe.task in _IN_A_LIST and isinstance(result, dict)
            yield text, [result] if bare else result


def _write(pipe: Pipeline, texts: Sequence[str], options: dict[str, Value]) -> None:
    """Each text, and what is written of it, as it is written where that is known at once."""
    console = Console(highlight=False, soft_wrap=True)
    written: Any = pipe
    goes_on = pipe.task == "text-generation"
    if goes_on:
        options = {"return_full_text": False, **options}
    several = options.get("num_return_sequences") not in (None, 1)
    for text in texts:
        end = "" if goes_on and not several else "\n"
        if not options.get("return_full_text"):
            console.print(Text(results.printable(text), style="dim"), end=end)
        if several:
            for one in written(text, **options):
                for row in one if isinstance(one, list) else [one]:
                    console.print(Text(results.printable(next(iter(row.values())))))
            continue
        written(
            text,
            streamer=lambda piece: console.print(Text(results.printable(piece.text)), end=""),
            **options,
        )
        console.print()
