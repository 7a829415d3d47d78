"""``ebbtide models``: what the cache has, what a load takes, and how to have and to remove it."""

from __future__ import annotations

import dataclasses
import datetime
import json
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import ebbtide
from ebbtide.factory import PipelineOptions
from ebbtide.models.catalog import ModelSummary


def cached(*, as_json: bool) -> None:
    """List the models in the cache."""
    found = ebbtide.cached_models()
    if as_json:
        print(json.dumps([_plain(dataclasses.asdict(one)) for one in found]))
        return
    console = Console(highlight=False)
    if not found:
        console.print("The cache has no model. The first load of one by its id puts it there.")
        return
    view = _table("model", "size", "dtypes", "revisions", "last used")
    for one in found:
        view.add_row(
            Text(one.name),
            readable(one.size),
            Text(", ".join(one.dtypes) or "none for Ebbtide"),
            Text(", ".join(name for name, _ in one.revisions) or "-"),
            datetime.datetime.fromtimestamp(one.used, datetime.UTC).date().isoformat(),
        )
    console.print(view)
    console.print(f"{readable(sum(one.size for one in found))} in all", style="dim")


def show(task: str, model: str | None, options: PipelineOptions, *, as_json: bool) -> None:
    """Say what loading a model would take."""
    _print(ebbtide.model_files(task, model, **options), as_json=as_json)


def download(task: str, model: str | None, options: PipelineOptions, *, as_json: bool) -> None:
    """Have a model in the cache before it is needed."""
    _print(ebbtide.download(task, model, **options), as_json=as_json)


def remove(model: str, *, as_json: bool) -> None:
    """Delete a model from the cache."""
    freed = ebbtide.remove_cached(model)
    if as_json:
        print(json.dumps({"model": model, "freed": freed}))
    else:
        Console(highlight=False).print(Text(f"removed {model}: {readable(freed)} freed"))


def _print(summary: ModelSummary, *, as_json: bool) -> None:
    if as_json:
        sizes = {"size": summary.size, "to_download": summary.to_download}
        print(json.dumps({**_plain(dataclasses.asdict(summary)), **sizes}))
        return
    console = Console(highlight=False)
    console.print(Text(f"{summary.name} in {summary.dtype}", style="bold"))
    view = _table("file", "size", "here")
    for one in summary.files:
        view.add_row(Text(one.name), readable(one.size), "yes" if one.cached else "no")
    console.print(view)
    console.print(
        f"{readable(summary.size)} in all, {readable(summary.to_download)} to download;"
        f" it has {', '.join(summary.dtypes)}",
        style="dim",
    )


def readable(size: int) -> str:
    """Bytes for people.

    Example:
        >>> readable(22_713_216), readable(642), readable(20_000_000_000)
        ('22.7 MB', '642 B', '20.0 GB')
    """
    if size < 1000:
        return f"{size} B"
    unit, count = ("kB", 1e3) if size < 1e6 else ("MB", 1e6) if size < 1e9 else ("GB", 1e9)
    return f"{size / count:,.1f} {unit}"


def _table(*columns: str) -> Table:
    view = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        view.add_column(column, justify="right" if column == "size" else "left", no_wrap=number > 0)
    return view


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
