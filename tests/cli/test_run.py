"""``ebbtide run``: what goes in, what comes out, and where."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ebbtide

TASK = "feature-extraction"
TEXTS = ["the tide goes out", "a much longer sentence about the sea"]

an_array_or_labels = pytest.mark.parametrize("task", [TASK, "text-classification"])


def test_json_is_one_line_a_text_with_the_numbers_the_pipeline_gives(
    ebbtide_run: Any, tiny_bert: Path
) -> None:
    ended = ebbtide_run(
        "run", TASK, *TEXTS, "--model", tiny_bert, "--json", "--pooling", "mean", "--normalize"
    )
    with ebbtide.pipeline(TASK, tiny_bert) as embed:
        expected = [embed(text, pooling="mean", normalize=True)[0] for text in TEXTS]
    assert ended.code == 0, ended.err
    assert ended.err == ""
    assert [line["text"] for line in ended.lines] == TEXTS
    for line, vector in zip(ended.lines, expected, strict=True):
        assert set(line) == {"text", "shape", "dtype", "data"}
        assert line["shape"] == [32]
        assert np.array_equal(np.array(line["data"], line["dtype"]), vector)


def test_without_pooling_there_is_a_vector_a_token(ebbtide_run: Any, tiny_bert: Path) -> None:
    [line] = ebbtide_run("run", TASK, TEXTS[0], "--model", tiny_bert, "--json").lines
    assert np.array(line["data"]).shape == tuple(line["shape"])
    assert len(line["shape"]) == 2


def test_the_alias_of_a_task_is_a_task(ebbtide_run: Any, tiny_bert: Path) -> None:
    assert ebbtide_run("run", "embeddings", "sea", "--model", tiny_bert, "--json").code == 0


def test_without_a_terminal_rows_are_plain_and_the_receipt_is_on_stderr(
    ebbtide_run: Any, tiny_bert: Path
) -> None:
    ended = ebbtide_run(
        "run", TASK, *TEXTS, "--model", tiny_bert, "--pooling", "mean", "--normalize"
    )
    rows = [row.split("\t") for row in ended.out.splitlines()]
    assert [row[0] for row in rows] == TEXTS
    assert [row[1:3] for row in rows] == [["32", "1.0000"]] * 2
    assert "\x1b" not in ended.out
    assert ended.err.startswith("released ")
    assert ended.err.count("\n") == 1


def test_on_a_terminal_there_is_a_table(ebbtide_on_terminal: Any, tiny_bert: Path) -> None:
    ended = ebbtide_on_terminal(
        "run", TASK, *TEXTS, "--model", tiny_bert, "--normalize", "--pooling", "mean"
    )
    assert ended.code == 0, ended.err
    for word in ("first numbers", "shape", "length", TEXTS[0], TEXTS[1][:28], "\x1b[", "1.0000"):
        assert word in ended.out
    assert ended.err.startswith("released ")


@an_array_or_labels
def test_lines_of_a_pipe_are_answered_one_by_one(
    ebbtide_start: Any, model_of: Any, task: str
) -> None:
    process = ebbtide_start("run", task, "--model", model_of[task], "--json")
    for text in ("first", "second", "", "fourth"):
        process.stdin.write(text + "\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["text"] == text
    process.stdin.close()
    assert process.wait() == 0
    assert process.stderr.read() == ""


@an_array_or_labels
def test_a_batch_size_reads_so_many_lines_at_once_and_loses_none(
    ebbtide_run: Any, model_of: Any, task: str
) -> None:
    texts = [f"line {number}" for number in range(5)]
    ended = ebbtide_run(
        "run", task, "--model", model_of[task], "--json", "--batch-size", "2",
        stdin="\n".join(texts),
    )  # fmt: skip
    assert [line["text"] for line in ended.lines] == texts


@an_array_or_labels
def test_nothing_on_stdin_is_nothing_on_stdout(ebbtide_run: Any, model_of: Any, task: str) -> None:
    ended = ebbtide_run("run", task, "--model", model_of[task], "--json", stdin="")
    assert (ended.code, ended.out) == (0, "")


def test_a_text_after_two_dashes_is_a_text(ebbtide_run: Any, tiny_bert: Path) -> None:
    ended = ebbtide_run("run", TASK, "--model", tiny_bert, "--json", "one", "--", "--pooling", "-x")
    assert [line["text"] for line in ended.lines] == ["one", "--pooling", "-x"]


@an_array_or_labels
def test_a_reader_that_has_enough_ends_it_quietly(
    ebbtide_start: Any, model_of: Any, task: str
) -> None:
    process = ebbtide_start("run", task, "--model", model_of[task], "--json")
    process.stdin.write("one\n")
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["text"] == "one"
    process.stdout.close()
    process.stdin.write("two\nthree\n")
    process.stdin.close()
    assert process.wait() == 0
    assert process.stderr.read() == ""


@an_array_or_labels
def test_control_c_ends_it_quietly_with_130(ebbtide_start: Any, model_of: Any, task: str) -> None:
    process = ebbtide_start("run", task, "--model", model_of[task], "--json")
    process.stdin.write("one\n")
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["text"] == "one"
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert process.stdout.read() == ""
    assert process.stderr.read() == ""


# Prepared copies, and threads


def test_a_prepared_copy_that_is_asked_for_is_made_and_used(
    ebbtide_run: Any, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("run", TASK, "sea", "--model", tiny_bert, "--json", "--pooling", "mean")
    here = {"EBBTIDE_CACHE_DIR": str(tmp_path)}
    plain = ebbtide_run(*words, **here)
    assert not list(tmp_path.glob("prepared/*"))
    for _ in range(2):
        ended = ebbtide_run(*words, "--prepare", "now", **here)
        assert (ended.code, ended.err) == (0, "")
        assert ended.lines == plain.lines
        assert len(list(tmp_path.glob("prepared/*"))) == 1
    ended = ebbtide_run(*words, "--prepare", "later", **here)
    assert ended.code == 2
    assert "prepare takes 'background', 'now'" in ended.err


_STARTED = """
import io, os, sys
from ebbtide.cli.app import start
from ebbtide.runtime import prepare

prepare.SMALLEST = 0
wishes = []
prepare.background.wish = lambda graph, *rest: wishes.append(graph.name)
sys.stdin = io.TextIOWrapper(io.BytesIO(b"the sea\\n"))
sys.stdout = open(os.devnull, "w")
start(["run", "feature-extraction", *{words}, "--model", MODEL, "--json"])
sys.stdout = sys.__stdout__
"""


@pytest.mark.parametrize(
    ("words", "environ", "wishes"),
    [
        (["the sea"], {}, []),
        (["the sea"], {"EBBTIDE_PREPARE": "background"}, ["model.onnx"]),
        (["the sea", "--prepare", "background"], {}, ["model.onnx"]),
        ([], {}, ["model.onnx"]),
        ([], {"EBBTIDE_PREPARE": "off"}, []),
    ],
)
def test_only_who_pipes_lines_waits_long_enough_for_a_copy_in_the_background(
    fresh_process: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: list[str],
    environ: dict[str, str],
    wishes: list[str],
) -> None:
    monkeypatch.delenv("EBBTIDE_PREPARE")
    script = _STARTED.format(words=words) + "print(wishes)"
    said = fresh_process(script, EBBTIDE_CACHE_DIR=str(tmp_path), **environ)
    assert f"{wishes}" in said.splitlines()


@pytest.mark.parametrize(
    ("environ", "shared"), [({}, True), ({"EBBTIDE_SHARED_THREADS": "off"}, False)]
)
def test_the_sessions_of_the_command_share_their_threads_unless_the_environment_says_no(
    fresh_process: Any, environ: dict[str, str], shared: bool
) -> None:
    """Where they do, ONNX Runtime refuses a session that asks for threads of its own."""
    script = (
        _STARTED.format(words=["the sea"])
        + """
import onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
options.intra_op_num_threads = 1
try:
    onnxruntime.InferenceSession(f"{MODEL}/onnx/model.onnx", options, enable_fallback=0)
except Exception as error:
    print("refused" if "use_per_session_threads" in str(error) else error)
else:
    print("allowed")
"""
    )
    said = fresh_process(script, **environ).splitlines()
    assert ("refused" if shared else "allowed") in said
