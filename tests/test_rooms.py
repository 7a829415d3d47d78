"""The rooms of `src/ebbtide` stand above one another, and imports go downwards only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "ebbtide"

RANKS = {
    "errors": 0,
    "cancellation": 0,
    "settings": 0,
    "lifecycle": 0,
    "process_end": 0,
    "receipts": 0,
    "memory": 1,
    "runtime": 2,
    "hub": 2,
    "models": 3,
    "generation": 4,
    "pipelines": 5,
    "workers": 6,
    "factory": 7,
    "manager": 8,
    "integrations": 9,
    "server": 10,
    "cli": 11,
}
BESIDE = {
    ("cancellation", "errors"),
    ("lifecycle", "cancellation"),
    ("lifecycle", "errors"),
    ("lifecycle", "receipts"),
    ("lifecycle", "settings"),
    ("receipts", "cancellation"),
    ("settings", "errors"),
}
"""Imports that are allowed between rooms of one rank."""

FACADE = "the public names of ebbtide"
FACADE_RANK = RANKS["manager"]
"""The package itself offers names of rooms up to this one, so only rooms above may use it."""

LONGEST_FILE = 600
NAMELESS = {"utils", "util", "common", "helpers", "helper", "misc"}


def room_of(name: str) -> str:
    """The room of a module's or a file's name below ``ebbtide``: `_settings` is `settings`."""
    return name.lstrip("_") if not name.startswith("__") else name


def imported(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Every module that a file imports, wherever in it: the line, and the full dotted name.

    ``from a import b`` gives ``a.b``: whether ``b`` is a module or a name within one is settled by
    who asks. Calls of `import_module` and `__import__` with a literal count as well.
    """
    package = ["ebbtide", *path.relative_to(root).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{start}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
            called = called.id if isinstance(called, ast.Name) else called
            first = node.args[0]
            if called in {"import_module", "__import__"} and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value)


def allowed(source: str, target: str) -> bool:
    if source == target:
        return True
    if target == FACADE:
        return RANKS[source] > FACADE_RANK
    if RANKS[source] == RANKS[target]:
        return (source, target) in BESIDE
    return RANKS[source] > RANKS[target]


def problems(root: Path) -> list[str]:
    """What is wrong with the tree under ``root``, the folder of the package."""
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if parts == ("__init__.py",):
            continue
        where = "/".join(parts)
        room = room_of(parts[0].removesuffix(".py"))
        if room not in RANKS:
            found.append(f"{where}: {room} is a room that no list has")
            continue
        for line, name in imported(path, root):
            top, *rest = name.split(".")
            if top == "onnxruntime" and room != "runtime":
                found.append(f"{where}:{line}: only runtime imports onnxruntime")
            if top != "ebbtide":
                continue
            target = room_of(rest[0]) if rest else FACADE
            if target not in RANKS:
                target = FACADE
            if not allowed(room, target):
                found.append(f"{where}:{line}: {room} imports {target}")
    return found


def shape_problems(root: Path) -> list[str]:
    """Folders and files named for nothing, and files that are too long."""
    found = []
    for path in sorted(root.rglob("*")):
        if room_of(path.stem) in NAMELESS:
            found.append(f"{path.name} is named for nothing")
        if path.suffix == ".py":
            lines = len(path.read_text(encoding="utf-8").splitlines())
            if lines > LONGEST_FILE:
                found.append(f"{path.name} has {lines} lines, more than {LONGEST_FILE}")
    return found


def test_imports_go_downwards_only() -> None:
    assert problems(SOURCE) == []


def test_no_folder_is_named_for_nothing_and_no_file_is_too_long() -> None:
    assert shape_problems(SOURCE) == []


def test_the_walk_sees_the_whole_tree() -> None:
    rooms = {room_of(path.stem) for path in SOURCE.iterdir() if path.suffix in {"", ".py"}}
    assert {"errors", "settings", "lifecycle", "memory", "runtime", "hub", "models"} <= rooms
    assert sum(1 for path in SOURCE.rglob("*.py") for _ in imported(path, SOURCE)) > 100


# The walk itself


@pytest.mark.parametrize(
    ("file", "code", "wrong"),
    [
        ("memory/probe.py", "from ebbtide.runtime import session", "memory imports runtime"),
        ("memory/probe.py", "import ebbtide.models.config", "memory imports models"),
        ("memory/probe.py", "from ebbtide import hub", "memory imports hub"),
        ("memory/probe.py", "from .. import hub", "memory imports hub"),
        ("memory/probe.py", "from ..hub import files", "memory imports hub"),
        ("memory/deep/probe.py", "from ...hub import files", "memory imports hub"),
        ("runtime/session.py", "from ebbtide.hub import files", "runtime imports hub"),
        ("hub/files.py", "import ebbtide.runtime", "hub imports runtime"),
        ("lifecycle.py", "from ebbtide.memory import reaper", "lifecycle imports memory"),
        ("settings.py", "from ebbtide import lifecycle", "settings imports lifecycle"),
        ("_settings.py", "from ebbtide import lifecycle", "settings imports lifecycle"),
        ("errors.py", "from ebbtide._settings import settings", "errors imports settings"),
        ("models/a.py", "def f():\n    from ebbtide import pipelines", "models imports pipelines"),
        (
            "models/a.py",
            "if TYPE_CHECKING:\n    from ebbtide.pipelines import Pipeline",
            "models imports pipelines",
        ),
        (
            "models/a.py",
            "import importlib\nimportlib.import_module('ebbtide.cli')",
            "models imports cli",
        ),
        ("models/a.py", "__import__('ebbtide.server')", "models imports server"),
        ("models/a.py", "import onnxruntime", "only runtime imports onnxruntime"),
        ("hub/a.py", "from onnxruntime.capi import x", "only runtime imports onnxruntime"),
        ("cli/a.py", "import_module('onnxruntime')", "only runtime imports onnxruntime"),
        ("pipelines/a.py", "import ebbtide", f"pipelines imports {FACADE}"),
        ("factory.py", "from ebbtide import pipeline", f"factory imports {FACADE}"),
        ("cellar/a.py", "", "cellar is a room that no list has"),
        ("cellar.py", "", "cellar is a room that no list has"),
    ],
)
def test_the_walk_finds_an_import_that_goes_upwards(
    tmp_path: Path, file: str, code: str, wrong: str
) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(code)
    (tmp_path / "__init__.py").write_text("from ebbtide.cli import main")
    (found,) = problems(tmp_path)
    assert found.startswith(file)
    assert found.endswith(wrong)


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("lifecycle.py", "from ebbtide.errors import InputError"),
        ("lifecycle.py", "from ebbtide._settings import settings"),
        ("_settings.py", "from ebbtide.errors import nearest"),
        ("memory/a.py", "from ebbtide.lifecycle import State\nfrom ebbtide.memory import b"),
        ("runtime/a.py", "import onnxruntime\nfrom ebbtide.runtime import devices"),
        ("models/a.py", "from ebbtide import hub, runtime\nimport numpy, ebbtide.memory.pins"),
        ("cli/a.py", "import ebbtide\nfrom ebbtide import pipeline\nfrom . import b"),
    ],
)
def test_the_walk_leaves_imports_downwards_alone(tmp_path: Path, file: str, code: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(code)
    assert problems(tmp_path) == []


def test_the_walk_finds_names_for_nothing_and_long_files(tmp_path: Path) -> None:
    (tmp_path / "models" / "utils").mkdir(parents=True)
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "_helpers.py").touch()
    (tmp_path / "errors.py").write_text("x = 1\n" * 601)
    (tmp_path / "lifecycle.py").write_text("x = 1\n" * 600)
    assert shape_problems(tmp_path) == [
        "errors.py has 601 lines, more than 600",
        "_helpers.py is named for nothing",
        "utils is named for nothing",
    ]
