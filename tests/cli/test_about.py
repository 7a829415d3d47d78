"""``ebbtide tasks``, ``ebbtide info`` and ``--version``."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest

import ebbtide
from ebbtide import memory
from ebbtide.cli.about import _telemetry
from ebbtide.cli.words import call_options
from ebbtide.pipelines import TASKS

MODEL = Path(__file__).parents[1] / "models" / "tiny-bert"


def test_info_says_versions_limit_and_where_each_setting_came_from(ebbtide_run: Any) -> None:
    ended = ebbtide_run("info", "--json", EBBTIDE_THREADS="3")
    facts = json.loads(ended.out)
    assert (ended.code, ended.err) == (0, "")
    assert facts["versions"]["ebbtide"] == ebbtide.__version__
    assert facts["versions"]["python"] == platform.python_version()
    assert all(facts["versions"][name] for name in ("onnxruntime", "tokenizers", "numpy"))
    limit = memory.snapshot().limit
    assert facts["memory"]["limit"] == {"bytes": limit.bytes, "source": limit.source}
    assert facts["memory"]["anonymous"] > 1_000_000
    assert "pressure" in facts["memory"]
    assert "cpu" in facts["devices"]
    assert facts["cpus"] >= 1
    assert set(facts["allocator"]) == {"name", "method"}
    assert facts["settings"]["threads"] == {"value": 3, "from": "EBBTIDE_THREADS"}
    assert facts["settings"]["trim"] == {"value": True, "from": "default"}


def test_info_says_where_prepared_models_are_and_how_large(
    ebbtide_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    here = {"EBBTIDE_CACHE_DIR": str(store), "EBBTIDE_CACHE_SIZE": "2 GB"}
    facts = json.loads(ebbtide_run("info", "--json", **here).out)
    assert facts["prepared"] == {
        "folder": str(store), "entries": 0, "size": 0, "limit": 2_000_000_000,
    }  # fmt: skip
    assert not store.exists()
    monkeypatch.setattr(ebbtide.settings, "cache_dir", str(store))
    made = ebbtide.prepare("feature-extraction", MODEL)
    facts = json.loads(ebbtide_run("info", "--json", **here).out)
    assert facts["prepared"]["entries"] == 1
    assert facts["prepared"]["size"] >= made.size
    shown = ebbtide_run("info", COLUMNS="200", **here).out
    for word in (str(store), "kB in 1", "2.0 GB"):
        assert word in shown


def test_info_says_whether_telemetry_is_off_and_whose_doing_that_is(
    ebbtide_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    ended = ebbtide_run("info")
    assert "telemetry    off, by ebbtide" in ended.out
    for value, off in (("1", True), ("Yes", True), ("0", False), ("no", False), ("", False)):
        monkeypatch.setenv("ORT_DISABLE_TELEMETRY", value)
        assert _telemetry() == {"off": off, "by": f"ORT_DISABLE_TELEMETRY={value}"}


def test_info_for_people_has_the_same_and_fits_80_columns(ebbtide_run: Any) -> None:
    ended = ebbtide_run("info", COLUMNS="80")
    assert ended.code == 0
    for word in (
        "onnxruntime",
        "devices",
        "limit",
        "pressure",
        "allocator",
        "telemetry",
        "limit",
        "drain_timeout",
    ):
        assert word in ended.out
    assert max(map(len, ended.out.splitlines())) <= 80
    assert "\x1b" not in ended.out


def test_info_warns_of_two_runtimes_in_one_folder(ebbtide_run: Any, tmp_path: Path) -> None:
    for name in ("onnxruntime", "onnxruntime-gpu"):
        folder = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    here = str(Path(ebbtide.__file__).parents[1])
    facts = json.loads(ebbtide_run("info", "--json", PYTHONPATH=f"{tmp_path}:{here}").out)
    [warning] = facts["warnings"]
    assert "onnxruntime and onnxruntime-gpu are both installed" in warning
    assert json.loads(ebbtide_run("info", "--json").out)["warnings"] == []


def test_tasks_lists_each_task_with_its_options(ebbtide_run: Any) -> None:
    listed = json.loads(ebbtide_run("tasks", "--json").out)
    tasks = {task["name"]: task for task in listed["tasks"]}
    assert list(tasks) == list(TASKS)
    assert tasks["feature-extraction"]["aliases"] == ["embeddings"]
    assert "mean" in tasks["feature-extraction"]["options"]["pooling"]["values"]
    assert all(task["example"].startswith(f"ebbtide run {name} ") for name, task in tasks.items())
    options = tasks["token-classification"]["options"]
    assert options["ignore_labels"] == {
        "kind": "texts", "default": ["O"], "values": [], "needed": False,
    }  # fmt: skip
    assert options["stride"]["kind"] == "number"
    needed = [
        name
        for task in tasks.values()
        for name, option in task["options"].items()
        if option["needed"]
    ]
    assert needed == ["context", "candidate_labels"]
    assert isinstance(listed["installed_models"], list)


def test_tasks_for_people_has_the_same_and_fits_80_columns(ebbtide_run: Any) -> None:
    shown = ebbtide_run("tasks", COLUMNS="80").out
    for task in TASKS.values():
        for word in (task.name, *task.aliases, task.default_model, task.takes, task.gives):
            assert word in shown
        for option in call_options(task.name).values():
            assert option.name.replace("_", "-") in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_version(ebbtide_run: Any) -> None:
    ended = ebbtide_run("--version")
    assert (ended.code, ended.out) == (0, f"ebbtide {ebbtide.__version__}\n")
