"""Every error is one line on stderr, with no traceback, and an exit code that says whose it is."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TASK = "feature-extraction"
MODEL = Path(__file__).parents[1] / "models" / "tiny-bert"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("run", "feature-extrction", "x", "--model", MODEL), "Did you mean 'feature-extraction'?"),
        (("run", TASK, "x", "--model", MODEL, "--poolin", "mean"), "Did you mean 'pooling'?"),
        (("run", TASK, "x", "--modle", MODEL), "Did you mean 'model'?"),
        (("run", TASK, "x", "--model", MODEL, "--pooling", "maen"), "Did you mean 'mean'?"),
        (("run", TASK, "x", "--model", MODEL, "--no-normalise"), "Did you mean 'normalize'?"),
        (("run", TASK, "x", "--model", MODEL, "--dtype", "fp23"), "Did you mean 'fp32'?"),
        (("run", TASK, "x", "--model", MODEL, "--device", "cpuu"), "Did you mean 'cpu'?"),
        (("run", TASK, "x", "--model", "no-such-model"), "no installed model of that name"),
        (("run", TASK, "x", "--model", "./no/such/folder"), "There is no folder"),
        (("run", TASK, "x", "--model", MODEL, "--pooling"), "--pooling needs a value"),
        (("run", TASK, "x", "--model", MODEL, "--batch-size", "0"), "whole number from 1"),
        (("run", TASK, "x", "--model", MODEL, "--quantize=maybe"), "True or False, not 'maybe'"),
    ],
)
def test_a_wrong_call_names_what_was_meant_and_exits_with_2(
    ebbtide_run: Any, words: tuple[str | Path, ...], named: str
) -> None:
    ended = ebbtide_run(*words)
    assert ended.code == 2
    assert named in ended.err
    assert ended.err.startswith("ebbtide: ")
    assert ended.err.count("\n") == 1
    assert ended.out == ""


def test_a_wrong_option_is_named_before_a_model_is_looked_for(ebbtide_run: Any) -> None:
    ended = ebbtide_run("run", "question-answering", "When?", "--model", "./no/such/folder")
    assert ended.code == 2
    assert "needs --context" in ended.err
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize(
    ("task", "words", "named"),
    [
        ("text-classification", ("x", "--top-k", "0"), "top_k takes a whole number from 1"),
        ("token-classification", ("x", "--stride", "2"), "stride needs an aggregation_strategy"),
        ("question-answering", ("x", "--context="), "The context is empty"),
        ("fill-mask", ("the tide",), "put [MASK] where a word is to be filled in"),
        ("zero-shot-classification", ("x", "--candidate-labels="), "name at least one"),
        ("zero-shot-classification", ("x", "--candidate-labels=a,a"), "'a' more than once"),
    ],
)
def test_what_a_pipeline_refuses_is_said_in_one_line(
    ebbtide_run: Any, model_of: Any, task: str, words: tuple[str, ...], named: str
) -> None:
    ended = ebbtide_run("run", task, *words, "--model", model_of[task])
    assert (ended.code, ended.out) == (2, "")
    assert named in ended.err
    assert ended.err.count("\n") == 1


def test_without_a_text_an_example_of_the_task_is_given(ebbtide_on_terminal: Any) -> None:
    ended = ebbtide_on_terminal("run", "fill-mask")
    assert (ended.code, ended.out) == (2, "")
    assert "There is no text" in ended.err
    assert 'ebbtide run fill-mask "The tide goes [MASK]."' in ended.err


def test_an_unknown_command_exits_with_2_and_no_traceback(ebbtide_run: Any) -> None:
    ended = ebbtide_run("rnu")
    assert ended.code == 2
    assert "No such command" in ended.err
    assert "Traceback" not in ended.err


def test_a_damaged_model_exits_with_1(ebbtide_run: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(MODEL, broken)
    (broken / "onnx" / "model.onnx").write_bytes(b"no graph")
    ended = ebbtide_run("run", TASK, "x", "--model", broken)
    assert ended.code == 1
    assert ended.err.count("\n") == 1
    assert ended.err.startswith("ebbtide: ")


def test_a_line_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ebbtide.cli", "run", TASK, "--model", str(MODEL), "--json"],
        input=b"good\n\xff\xfe\n",
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout.count(b"\n") == 1
    assert b"Line 2 of standard input is not UTF-8" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_variable_that_is_no_setting_is_named(ebbtide_run: Any) -> None:
    ended = ebbtide_run("run", TASK, "x", "--model", MODEL, EBBTIDE_THRAEDS="2")
    assert ended.code == 2
    assert "Did you mean EBBTIDE_THREADS?" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_packages_the_command_names_the_extra(missing: str) -> None:
    script = (
        f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['ebbtide', 'info'];"
        " from ebbtide.cli import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert missing in done.stderr
    assert "pip install 'ebbtide[cli]'" in done.stderr


def test_importing_the_command_imports_nothing_heavy() -> None:
    script = (
        "import sys, ebbtide.cli, ebbtide.cli.demo.minilm\n"
        "print([name for name in ('typer', 'rich', 'numpy', 'onnxruntime') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stdout.strip() == b"[]"
