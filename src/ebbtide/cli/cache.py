"""``ebbtide cache``: the prepared copies of models, and what may be done about them."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table
from rich.text import Text

import ebbtide
from ebbtide import hub
from ebbtide._settings import bytes_of
from ebbtide.cli.models import readable
from ebbtide.errors import InputError, PrepareError
from ebbtide.factory import PipelineOptions
from ebbtide.hub import ProgressEvent
from ebbtide.models.catalog import PreparedModel
from ebbtide.runtime import version
from ebbtide.runtime.prepare import store
from ebbtide.runtime.store import Entry, Manifest, Store, cpu_features

_KEY_SHOWN: Final = 8
_NAME_SHOWN: Final = 28
_ANSWERS: Final = frozenset({"y", "yes"})


def entries(*, as_json: bool) -> None:
    """List what the store has, the most recently used first."""
    here = opened()
    found = here.entries()
    if as_json:
        for one in found:
            print(json.dumps(_facts(one)))
        return
    console = _console()
    if not found:
        _say(console, f"There is no prepared model in {here.root}.")
        _say(console, "The first load of a model makes one, and `ebbtide cache prepare MODEL`.")
        return
    view = _table(
        ("key", ""),
        ("model", "file"),
        ("on disk", "in memory"),
        ("last used", "made"),
        ("state", "onnxruntime"),
    )
    for one in found:
        style = "bold red" if _is_damaged(one) else ""
        view.add_row(*(Text("\n".join(cell)) for cell in _cells(one)), style=style)
    console.print(view)
    total = readable(sum(one.size for one in found))
    limit = readable(ebbtide.settings.cache_size)
    _say(console, f"{total} in {_models(len(found))}, of at most {limit}", style="dim")


def prepare(task: str, model: str, options: PipelineOptions, *, as_json: bool) -> None:
    """Make a model's prepared copy, and wait for it."""
    with contextlib.closing(_Progress()) as progress:
        options = {**options, "progress": progress}
        made = ebbtide.prepare(task, model, **options)
    if as_json:
        print(json.dumps(dataclasses.asdict(made)))
        return
    console = _console()
    for line in _told(made):
        _say(console, line)


def verify(keys: Sequence[str], *, remove: bool, as_json: bool) -> None:
    """Check every byte of entries; ends with exit code 1 where a damaged one stays.

    Args:
        keys: Which; their keys, or the beginnings of them. None: all.
        remove: Remove those that are damaged.
        as_json: One JSON line an entry, and nothing else.
    """
    here = opened()
    chosen = _chosen(here, keys)
    console = _console()
    damaged = left = 0
    for one in chosen:
        with Console(stderr=True).status(f"checking {escape(_title(one))}"):
            problem = here.verify(one)
        if problem is not None and not one.folder.exists():
            continue  # it was removed meanwhile
        gone = False
        if problem is not None and remove:
            with _changing(here):
                gone = here.remove(one, in_use=True)
        damaged += problem is not None
        left += problem is not None and not gone
        if as_json:
            facts = {"key": one.key, "good": problem is None, "problem": problem, "removed": gone}
            print(json.dumps(facts), flush=True)
        else:
            _say_verified(console, one, problem, gone=gone)
    if not as_json:
        _sum_up(console, len(chosen), damaged, left)
    if left:
        raise typer.Exit(1)


def prune(size: str | None, *, as_json: bool) -> None:
    """Remove the least recently used entries until the rest fits.

    Args:
        size: Bytes that may stay, also as in ``5 GB``; None for ``settings.cache_size``.
        as_json: One JSON line, and nothing else.

    Raises:
        InputError: ``size`` is no size.
    """
    limit = ebbtide.settings.cache_size if size is None else bytes_of(size)
    if limit is None:
        raise InputError(f"--size takes bytes, as in '5 GB' or 5000000, not {size!r}.", value=size)
    here = opened()
    with _changing(here):
        removed = here.prune(limit)
    rest = here.entries()
    over = sum(one.size for one in rest) > limit
    kept = [one for one in rest if one.in_use] if removed or over else []
    _say_removed(removed, kept, rest, as_json=as_json, limit=limit)


def clear(*, sure: bool, as_json: bool) -> None:
    """Remove all that is not in use.

    Args:
        sure: Do not ask.
        as_json: One JSON line, and nothing else.
    """
    here = opened()
    found = here.entries()
    if found and not sure and _asks() and not _agreed(here, found):
        return
    with _changing(here):
        here.sweep()
        removed = [one for one in found if here.remove(one)]
        here.forget()
    rest = here.entries()
    _say_removed(removed, rest, rest, as_json=as_json)


def path() -> None:
    """Print the store's folder."""
    print(store().root.absolute())


def opened() -> Store:
    """The store of this process's settings.

    Raises:
        InputError: Its folder is none.
    """
    here = store()
    if here.root.exists() and not here.root.is_dir():
        raise InputError(
            f"{here.root} is no folder. Set EBBTIDE_CACHE_DIR to the folder of prepared models,"
            " which need not exist yet.",
            value=str(here.root),
        )
    return here


def label(manifest: Manifest) -> tuple[str, str]:
    """The model and the file that a copy was made from, as a person would name them.

    Example:
        >>> import types
        >>> path = "/home/ada/hub/models--org--name/snapshots/5f0e/onnx/model_int8.onnx"
        >>> label(types.SimpleNamespace(model=path))
        ('org/name', 'onnx/model_int8.onnx')
        >>> label(types.SimpleNamespace(model="/srv/minilm/onnx/model.onnx"))
        ('/srv/minilm', 'onnx/model.onnx')
    """
    graph = Path(manifest.model)
    for above in graph.parents:
        repository = above.parent.parent.name
        if above.parent.name == "snapshots" and repository.startswith("models--"):
            name = repository.removeprefix("models--").replace("--", "/")
            return name, graph.relative_to(above).as_posix()
    home = graph.parent.parent if graph.parent.name == "onnx" else graph.parent
    return str(home), graph.relative_to(home).as_posix()


def fits(manifest: Manifest) -> str | None:
    """Why a copy is of no use to this process, in words; None where it is."""
    if manifest.onnxruntime != version():
        return f"is for {manifest.onnxruntime}"
    return None if manifest.cpu == cpu_features() else "other processor"


def _is_damaged(entry: Entry) -> bool:
    """Whether a look at the manifest and the sizes shows damage."""
    manifest = entry.manifest
    if manifest is None:
        return True
    try:
        return any(
            (entry.folder / name).stat().st_size != size
            for name, (size, _) in manifest.files.items()
        )
    except OSError:
        return True


def _facts(entry: Entry) -> dict[str, object]:
    facts: dict[str, object] = {
        "key": entry.key,
        "folder": str(entry.folder),
        "size": entry.size,
        "used": entry.used,
        "in_use": entry.in_use,
        "damaged": _is_damaged(entry),
    }
    manifest = entry.manifest
    if manifest is not None:
        name, file = label(manifest)
        facts |= {
            "model": name,
            "file": file,
            "path": manifest.model,
            "anonymous": manifest.anonymous,
            "created": manifest.created,
            "seconds": manifest.seconds,
            "onnxruntime": manifest.onnxruntime,
            "cpu": manifest.cpu,
            "fits": fits(manifest) is None,
        }
    return facts


def _cells(entry: Entry) -> Iterator[tuple[str, str]]:
    """Two lines a column."""
    manifest = entry.manifest
    state = "damaged" if _is_damaged(entry) else "in use" if entry.in_use else "ready"
    yield entry.key[:_KEY_SHOWN], ""
    if manifest is None:
        yield "an unknown model", ""
        yield readable(entry.size), ""
        yield _moment(entry.used), ""
        yield state, ""
        return
    misfit = fits(manifest)
    name, file = label(manifest)
    yield _short(name), file
    yield readable(entry.size), readable(manifest.anonymous)
    yield _moment(entry.used), f"{_moment(manifest.created)[:10]}, {manifest.seconds:.1f} s"
    yield (
        (state if misfit is None or state == "damaged" else "does not fit"),
        (misfit or manifest.onnxruntime),
    )


def _short(name: str) -> str:
    """A model's name; of a long folder the end, which says the most."""
    folder = Path(name)
    if len(name) <= _NAME_SHOWN or not folder.is_absolute():
        return name
    return str(Path("...", *folder.parts[-2:]))


def _moment(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).isoformat(" ", "minutes")


def _title(entry: Entry) -> str:
    return ", ".join(label(entry.manifest)) if entry.manifest is not None else "an unknown model"


def _chosen(here: Store, keys: Sequence[str]) -> list[Entry]:
    """The entries whose keys begin so.

    Raises:
        InputError: There is none, or more than one, for one of the keys.
    """
    found = here.entries()
    if not keys:
        return found
    chosen: dict[str, Entry] = {}
    for key in keys:
        matching = [one for one in found if key and one.key.startswith(key)]
        if not matching:
            raise InputError(
                f"There is no prepared model of key {key!r}; `ebbtide cache list` has the keys.",
                value=key,
            )
        if len(matching) > 1:
            raise InputError(
                f"{len(matching)} keys begin with {key!r}: give more of the one you mean.",
                value=key,
            )
        chosen[matching[0].key] = matching[0]
    return list(chosen.values())


def _told(made: PreparedModel) -> Iterator[str]:
    name = f"{made.model}, {made.file}"
    if made.made:
        yield f"prepared {name}: {readable(made.size)} on the disk, made in {made.seconds:.1f} s"
    else:
        yield f"nothing to do: {name} is prepared, {readable(made.size)} on the disk"
    yield f"a live session takes about {readable(made.anonymous)} of the process's own memory"


def _say_verified(console: Console, one: Entry, problem: str | None, *, gone: bool) -> None:
    key = one.key[:_KEY_SHOWN]
    if problem is None:
        _say(console, f"good     {key}  {_title(one)}")
        return
    _say(console, f"damaged  {key}  {_title(one)}: {problem}", style="bold red")
    if gone and one.in_use:
        _say(console, f"removed  {key}; a process uses it still: restart that one")
    elif gone:
        _say(console, f"removed  {key}")


def _sum_up(console: Console, count: int, damaged: int, left: int) -> None:
    if not damaged:
        _say(console, f"{_models(count)}, every byte as it was written", style="dim")
    elif left:
        _say(console, f"{damaged} of {_models(count)} damaged: their answers may be wrong.")
        _say(console, "`ebbtide cache verify --remove` removes what is; a load makes it anew.")
    else:
        _say(console, f"{damaged} of {_models(count)} damaged, and removed; a load makes it anew.")


def _say_removed(
    removed: Sequence[Entry],
    kept: Sequence[Entry],
    rest: Sequence[Entry],
    *,
    as_json: bool,
    limit: int | None = None,
) -> None:
    """What went, and what stays because somebody uses it."""
    freed, stay = sum(one.size for one in removed), sum(one.size for one in rest)
    if as_json:
        facts = {
            "removed": [one.key for one in removed],
            "freed": freed,
            "in_use": [one.key for one in kept],
            "stay": stay,
        }
        print(json.dumps(facts))
        return
    console = _console()
    for one in removed:
        size = readable(one.size)
        _say(console, f"removed  {one.key[:_KEY_SHOWN]}  {_title(one)}: {size}")
    for one in kept:
        size = readable(one.size)
        _say(console, f"in use   {one.key[:_KEY_SHOWN]}  {_title(one)}: {size}, stays")
    most = "" if limit is None else f", of at most {readable(limit)}"
    if removed:
        _say(console, f"{readable(freed)} freed; {readable(stay)} stay{most}", style="dim")
    elif rest:
        _say(console, f"nothing was removed: {readable(stay)} stay{most}", style="dim")
    else:
        _say(console, "there is no prepared model")


def _asks() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _agreed(here: Store, found: Sequence[Entry]) -> bool:
    size = readable(sum(one.size for one in found))
    try:
        answer = input(f"Remove {_models(len(found))}, {size}, from {here.root}? [y/N] ")
    except EOFError:
        print()
        answer = ""
    if answer.strip().lower() in _ANSWERS:
        return True
    print("nothing was removed")
    return False


@contextlib.contextmanager
def _changing(here: Store) -> Iterator[None]:
    """Say it in Ebbtide's words where the store cannot be changed."""
    try:
        yield
    except OSError as error:
        raise PrepareError(
            f"The folder of prepared models, {here.root}, cannot be changed: {error.strerror}.",
            path=str(here.root),
        ) from None


def _models(count: int) -> str:
    return f"{count} prepared model{'s' * (count != 1)}"


def _console() -> Console:
    return Console(highlight=False)


def _say(console: Console, text: str, style: str = "") -> None:
    """A line; soft_wrap: it is for the terminal to break it, and for a pipe to have it whole."""
    console.print(Text(text, style=style), soft_wrap=True)


def _table(*columns: tuple[str, str]) -> Table:
    view = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        view.add_column(
            "\n".join(column),
            justify="right" if number == 2 else "left",
            no_wrap=number != 1,
            overflow="fold",
        )
    return view


class _Progress:
    """What a terminal shows meanwhile: bars of downloads, then that it is prepared."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bars: Callable[[ProgressEvent], object] = hub.listener(None)
        self._status: Status | None = None

    def __call__(self, event: ProgressEvent) -> None:
        """Show one event."""
        if event["status"] == "preparing":
            self._status = self._console.status(f"preparing {escape(event['model'])}")
            self._status.start()
        elif event["status"] == "prepared":
            self.close()
        else:
            self._bars(event)

    def close(self) -> None:
        """Leave the terminal to others."""
        status, self._status = self._status, None
        if status is not None:
            status.stop()
