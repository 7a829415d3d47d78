"""The commands and their options; what each does lies in a module of its own."""

from __future__ import annotations

import logging
import os
from typing import Annotated, Any

import typer
import typer.core

from ebbtide.cli.ending import told


class _Commands(typer.core.TyperGroup):
    """Every command ends the same way; see `ebbtide.cli.ending`."""

    def invoke(self, ctx: Any) -> Any:
        with told():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Transformers pipelines whose memory comes back.",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]
Named = Annotated[str | None, typer.Option(help="A folder, an installed model's name, or an id.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model's id, as in org/name.")]
Task = Annotated[str, typer.Option(help="What it is for: a task reads more than its graph.")]
Dtype = Annotated[str | None, typer.Option(help="Which of its files: fp32, fp16, q8, int8, q4 ...")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N, dml, coreml or auto.")]
Revision = Annotated[str, typer.Option(help="A branch, a tag or a commit.")]
Prepare = Annotated[
    str | None,
    typer.Option(help="Its prepared copy: background, now (wait for it) or off (make none)."),
]
EntryJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON line an entry, and nothing else.")
]


def start(arguments: list[str]) -> int:
    """Run the command with these arguments; returns its exit code."""
    literal: list[str] = []
    if arguments[:1] == ["run"] and "--" in arguments:
        end = arguments.index("--")
        arguments, literal = arguments[:end], arguments[end + 1 :]
    if arguments[:1] != ["top"]:  # there the script says how it logs
        _log_plainly()
    try:
        app(arguments, prog_name="ebbtide", obj=literal)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    return 0


def _own_the_process() -> None:
    """Have all sessions share one pool of threads: nobody else loads any in this process."""
    from ebbtide import settings

    if "EBBTIDE_SHARED_THREADS" not in os.environ:
        settings.shared_threads = True


def _log_plainly() -> None:
    """Have Ebbtide's warnings on standard error, each once, in the form its errors have there."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        known = message in said
        said.add(message)
        return not known

    handler = logging.StreamHandler()
    handler.addFilter(is_new)
    handler.setFormatter(logging.Formatter("ebbtide: %(message)s"))
    logging.getLogger("ebbtide").addHandler(handler)


def _print_version(wanted: bool) -> None:
    if wanted:
        from ebbtide import __version__

        typer.echo(f"ebbtide {__version__}")
        raise typer.Exit


@app.callback()
def _ebbtide(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Transformers pipelines whose memory comes back."""


_RUN_HELP = """Load a model once, run every text, and give the memory back.

Without a text, each line of standard input is one, and its result is printed before the next line \
is read.

Options of the task's call go along as --KEY VALUE, and `ebbtide tasks` lists them, with an \
example of each task. A text that begins with two dashes goes behind a lone `--`.

question-answering needs --context, and each text is a question. zero-shot-classification needs \
--candidate-labels. A text of fill-mask has the mask that the model knows: [MASK], or <mask>.

Example: ebbtide run feature-extraction "The tide goes out." --pooling mean --normalize
"""


@app.command(
    "run",
    context_settings={"ignore_unknown_options": True},
    help=_RUN_HELP,
    short_help="Run a task on texts.",
    options_metavar="[OPTIONS] [--KEY VALUE]",
)
def _run(
    ctx: typer.Context,
    task: Annotated[
        str, typer.Argument(metavar="TASK", help="The task; `ebbtide tasks` lists them.")
    ],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT", help="The texts; none: standard input.")
    ] = None,
    model: Named = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    revision: Revision = "main",
    prepare: Prepare = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON line a text, and nothing else.")
    ] = False,
) -> None:
    """Run a task on texts."""
    from ebbtide.cli.run import run

    _own_the_process()
    options: Any = {"dtype": dtype, "device": device, "revision": revision, "prepare": prepare}
    run(task, words or [], ctx.obj or [], model=model, options=options, as_json=as_json)


_CHAT_HELP = """Talk with a model: its answers come as they are written.

On a terminal, /help lists the commands, Ctrl-C stops an answer, and Ctrl-D ends the chat. From a \
pipe, each line is a message; the answers go to standard output.

Options of a generation go along as --KEY VALUE, and `ebbtide tasks` lists them. An answer has at \
most 1024 tokens, unless --max-new-tokens says something else.

Example: ebbtide chat --system "Answer in one sentence." --temperature 0.7
"""


@app.command(
    "chat",
    context_settings={"ignore_unknown_options": True},
    help=_CHAT_HELP,
    short_help="Talk with a model.",
    options_metavar="[OPTIONS] [--KEY VALUE]",
)
def _chat(
    words: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    model: Named = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the model is told before all else.")
    ] = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    revision: Revision = "main",
    prepare: Prepare = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON line an answer, and nothing else.")
    ] = False,
) -> None:
    """Talk with a model."""
    from ebbtide.cli.chat import chat

    _own_the_process()
    options: Any = {"dtype": dtype, "device": device, "revision": revision, "prepare": prepare}
    chat(words or [], model=model, system=system, options=options, as_json=as_json)


_TOP_HELP = """Run a Python script, and see live what its pipelines take.

The script runs as `python SCRIPT.py ARGS` would, and what it prints goes above the view. Where \
standard output is no terminal, a line goes to standard error at each change. A summary stays in \
the end: the peak, the loads, and what came back.

Example: ebbtide top serve.py --port 8000
"""


@app.command(
    "top",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    help=_TOP_HELP,
    short_help="Run a script with a live view of its pipelines.",
)
def _top(
    script: Annotated[str, typer.Argument(metavar="SCRIPT.py", help="A Python file.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="ARGS", help="What the script gets.")
    ] = None,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.")] = 0.5,
) -> None:
    """Run a script with a live view of its pipelines."""
    from ebbtide.cli.top import top

    raise SystemExit(top(script, arguments or [], interval=interval))


@app.command("tasks")
def _tasks(as_json: Json = False) -> None:
    """List the tasks, their options, and the installed models."""
    from ebbtide.cli.about import tasks

    tasks(as_json=as_json)


models = typer.Typer(
    cls=_Commands,
    invoke_without_command=True,
    help="List the models in the cache; show, download or remove one.",
)
app.add_typer(models, name="models")


@models.callback()
def _models(ctx: typer.Context, as_json: Json = False) -> None:
    if ctx.invoked_subcommand is None:
        from ebbtide.cli.models import cached

        cached(as_json=as_json)


@models.command("show")
def _models_show(
    model: Model,
    task: Task = "feature-extraction",
    dtype: Dtype = None,
    revision: Revision = "main",
    as_json: Json = False,
) -> None:
    """Say which files a load of a model takes, and which are here."""
    from ebbtide.cli.models import show

    show(task, model, {"dtype": dtype, "revision": revision}, as_json=as_json)


@models.command("download")
def _models_download(
    model: Model,
    task: Task = "feature-extraction",
    dtype: Dtype = None,
    revision: Revision = "main",
    as_json: Json = False,
) -> None:
    """Have a model in the cache before it is needed."""
    from ebbtide.cli.models import download

    download(task, model, {"dtype": dtype, "revision": revision}, as_json=as_json)


@models.command("remove")
def _models_remove(model: Model, as_json: Json = False) -> None:
    """Delete a model from the cache."""
    from ebbtide.cli.models import remove

    remove(model, as_json=as_json)


cache = typer.Typer(
    cls=_Commands,
    invoke_without_command=True,
    help="Prepared models: list, make, check or remove them.",
)
app.add_typer(cache, name="cache")


@cache.callback()
def _cache(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        from ebbtide.cli.cache import entries

        entries(as_json=False)


@cache.command("list")
def _cache_list(
    as_json: EntryJson = False,
) -> None:
    """List the prepared models."""
    from ebbtide.cli.cache import entries

    entries(as_json=as_json)


@cache.command("prepare")
def _cache_prepare(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, an installed model's name, or an id.")
    ],
    task: Task = "feature-extraction",
    dtype: Dtype = None,
    device: Annotated[str, typer.Option(help="Where it is to run; only cpu has copies.")] = "cpu",
    revision: Revision = "main",
    as_json: Json = False,
) -> None:
    """Prepare a model before it is needed, and wait until that is done."""
    from ebbtide.cli.cache import prepare

    prepare(task, model, {"dtype": dtype, "device": device, "revision": revision}, as_json=as_json)


@cache.command("verify")
def _cache_verify(
    keys: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY", help="Which, by key or its beginning; none: all."),
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove what is damaged.")] = False,
    as_json: EntryJson = False,
) -> None:
    """Check every byte of prepared models; exit code 1 where a damaged one stays."""
    from ebbtide.cli.cache import verify

    verify(keys or [], remove=remove, as_json=as_json)


@cache.command("prune")
def _cache_prune(
    size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="What may stay, as in '5 GB'; else EBBTIDE_CACHE_SIZE."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Remove prepared models, the least recently used first, until the rest fits."""
    from ebbtide.cli.cache import prune

    prune(size, as_json=as_json)


@cache.command("clear")
def _cache_clear(
    sure: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove all prepared models but those in use."""
    from ebbtide.cli.cache import clear

    clear(sure=sure, as_json=as_json)


@cache.command("path")
def _cache_path() -> None:
    """Print the folder of the prepared models."""
    from ebbtide.cli.cache import path

    path()


@app.command("info")
def _info(as_json: Json = False) -> None:
    """Say what is installed, what the machine allows, and how things are set."""
    from ebbtide.cli.about import info

    info(as_json=as_json)


@app.command("demo")
def _demo(
    question: Annotated[
        str | None, typer.Argument(help="A question to ask the old books as well.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Search old books by meaning, and see the memory of that very run come back."""
    from ebbtide.cli.demo.show import demo

    _own_the_process()
    demo(question, as_json=as_json)
