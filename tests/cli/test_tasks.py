"""``ebbtide run`` for the tasks that give something else than vectors: results, and their look."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ebbtide
from ebbtide.cli.results import VIEWS, json_line, plain_rows
from ebbtide.cli.words import example
from ebbtide.pipelines import TASKS

CONTEXT = "The tide goes out at six, and the boats lie on their sides until noon."
TEXTS = {
    "text-classification": ["the tide goes out", "a much longer sentence about the sea and boats"],
    "token-classification": ["the tide goes out", "boats lie on their sides"],
    "question-answering": ["When?", "What lies on its side when the tide goes out of the harbour?"],
    "fill-mask": ["the tide goes [MASK]", "the boats lie on [MASK] sides when the tide is out"],
    "zero-shot-classification": ["the tide goes out", "trams run all night in the middle of it"],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "text-classification": {"top_k": 2},
    "token-classification": {"ignore_labels": ()},
    "question-answering": {"context": CONTEXT, "top_k": 2},
    "fill-mask": {"top_k": 3},
    "zero-shot-classification": {"candidate_labels": "sea, city", "multi_label": True},
}
SHOWN = {
    "text-classification": "text label score",
    "token-classification": "text entity word score place",
    "question-answering": "question answer score place",
    "fill-mask": "token score sequence",
    "zero-shot-classification": "text label score",
}

every_task = pytest.mark.parametrize("task", TEXTS)


def given(task: str) -> list[str]:
    """The texts and the options, as they are typed."""
    words = list(TEXTS[task])
    for name, value in OPTIONS[task].items():
        typed = ",".join(value) if isinstance(value, tuple) else str(value)
        words.append(f"--{name.replace('_', '-')}={typed}")
    return words


def results(task: str, model: Path) -> list[Any]:
    """What the pipeline gives for each text alone."""
    with ebbtide.pipeline(task, model) as pipe:
        return [pipe(text, **OPTIONS[task]) for text in TEXTS[task]]


def rows(task: str, model: Path) -> list[list[str]]:
    """The cells that people should see."""
    found = []
    for text, result in zip(TEXTS[task], results(task, model), strict=True):
        if task == "zero-shot-classification":
            pairs = zip(result["labels"], result["scores"], strict=True)
            result = [{"label": label, "score": score} for label, score in pairs]
        for one in result:
            cells = {
                **one,
                "text": text,
                "question": text,
                "score": f"{one['score']:{'.0e' if one['score'] < 1e-4 else '.4f'}}",
                "place": f"{one.get('start')}:{one.get('end')}",
                "token": one.get("token_str"),
            }
            found.append([cells[name] for name in SHOWN[task].split()])
    return found


def test_every_task_can_be_shown() -> None:
    assert list(VIEWS) == list(TASKS)


@every_task
def test_json_is_one_line_a_text_with_what_the_pipeline_gives_for_it_alone(
    ebbtide_run: Any, model_of: Any, task: str
) -> None:
    ended = ebbtide_run("run", task, *given(task), "--model", model_of[task], "--json")
    key = "question" if task == "question-answering" else "text"
    expected = zip(TEXTS[task], results(task, model_of[task]), strict=True)
    assert (ended.code, ended.err) == (0, "")
    assert ended.lines == [{key: text, "result": result} for text, result in expected]


@every_task
def test_without_a_terminal_each_finding_is_a_row_with_tabs(
    ebbtide_run: Any, model_of: Any, task: str
) -> None:
    ended = ebbtide_run("run", task, *given(task), "--model", model_of[task])
    assert ended.rows == rows(task, model_of[task])
    assert ended.err.startswith("released ")
    assert ended.err.count("\n") == 1


@every_task
def test_a_table_fits_80_columns_and_says_each_text_once(
    ebbtide_on_terminal: Any, model_of: Any, task: str
) -> None:
    ended = ebbtide_on_terminal("run", task, *given(task), "--model", model_of[task])
    assert ended.code == 0, ended.err
    head, *lines = re.sub(r"\x1b\[[0-9;]*m", "", ended.out).splitlines()
    expected = rows(task, model_of[task])
    assert head.split() == SHOWN[task].split()
    assert len(lines) == len(expected)
    assert max(map(len, [head, *lines])) <= 80
    for line, (first, *cells) in zip(lines, expected, strict=True):
        for cell in cells:
            assert cell[:12] in line
        assert line.startswith((first[:12], " "))
    if task != "fill-mask":
        beginnings = [text[:12] for text in TEXTS[task]]
        assert [line[:12].strip() for line in lines if line[0] != " "] == [
            one.strip() for one in beginnings
        ]


def test_labels_of_a_batch_are_as_those_of_each_text_alone(ebbtide_run: Any, model_of: Any) -> None:
    task = "text-classification"
    texts = ["the tide goes out", "boats", "a much longer sentence about the sea"]
    words = ("run", task, *texts, "--model", model_of[task], "--json")
    alone, batch = ebbtide_run(*words).lines, ebbtide_run(*words, "--batch-size", "2").lines
    assert [line["text"] for line in batch] == texts
    for line, other in zip(alone, batch, strict=True):
        [[one], [two]] = line["result"], other["result"]
        assert one["label"] == two["label"]
        assert one["score"] == pytest.approx(two["score"], abs=1e-4)


def test_a_second_text_is_read_together_with_each(ebbtide_run: Any, model_of: Any) -> None:
    task, texts = "text-classification", ["the tide goes out", "boats"]
    ended = ebbtide_run(
        "run", task, *texts, "--text-pair", "it is ebb", "--model", model_of[task], "--json"
    )
    with ebbtide.pipeline(task, model_of[task]) as pipe:
        expected = [pipe({"text": text, "text_pair": "it is ebb"}) for text in texts]
        single = [pipe(text) for text in texts]
    assert [line["result"] for line in ended.lines] == expected != single


def test_a_text_without_entities_has_a_row_of_dashes(ebbtide_run: Any, model_of: Any) -> None:
    task, text = "token-classification", "the tide goes out"
    with ebbtide.pipeline(task, model_of[task]) as pipe:
        labels = {one["entity"] for one in pipe(text, ignore_labels=[])}
    words = (text, "--model", model_of[task], "--ignore-labels", ", ".join(labels))
    assert ebbtide_run("run", task, *words).rows == [[text, "-", "-", "-", "-"]]
    assert ebbtide_run("run", task, *words, "--json").lines == [{"text": text, "result": []}]


def test_an_aggregation_gives_groups(ebbtide_run: Any, model_of: Any) -> None:
    task, text = "token-classification", "the tide goes out"
    words = ("--aggregation-strategy", "simple", "--ignore-labels", "")
    ended = ebbtide_run("run", task, text, "--model", model_of[task], *words)
    with ebbtide.pipeline(task, model_of[task]) as pipe:
        expected = pipe(text, aggregation_strategy="simple", ignore_labels=[])
    assert expected
    assert [row[1:3] for row in ended.rows] == [
        [one["entity_group"], one["word"]] for one in expected
    ]


def test_questions_come_from_standard_input_line_by_line(ebbtide_start: Any, model_of: Any) -> None:
    task = "question-answering"
    process = ebbtide_start("run", task, "--model", model_of[task], "--context", CONTEXT, "--json")
    for question in ("When?", "What goes out?"):
        process.stdin.write(question + "\n")
        process.stdin.flush()
        line = json.loads(process.stdout.readline())
        assert line["question"] == question
        found = line["result"]
        assert CONTEXT[found["start"] : found["end"]] == found["answer"]
    process.stdin.close()
    assert process.wait() == 0


def test_no_answer_is_a_dash_at_no_place() -> None:
    nothing = {"answer": "", "score": 0.25, "start": 0, "end": 0}
    assert plain_rows(VIEWS["question-answering"], "When?", nothing) == "When?\t-\t0.2500\t-"


def test_each_of_several_masks_has_its_rows(ebbtide_run: Any, model_of: Any) -> None:
    task, text = "fill-mask", "the [MASK] goes [MASK]"
    ended = ebbtide_run("run", task, text, "--model", model_of[task], "--top-k", "2")
    with ebbtide.pipeline(task, model_of[task]) as pipe:
        first, second = pipe(text, top_k=2)
    assert [row[2] for row in ended.rows] == [one["sequence"] for one in [*first, *second]]


def test_targets_are_parted_by_commas_and_a_warning_is_said_once(
    ebbtide_run: Any, model_of: Any
) -> None:
    task, texts = "fill-mask", ["the [MASK]", "goes [MASK]"]
    words = ("--model", model_of[task], "--json", "--targets", "a, the, xyzzy")
    ended = ebbtide_run("run", task, *texts, *words)
    with ebbtide.pipeline(task, model_of[task]) as pipe:
        expected = [pipe(text, targets=["a", "the", "xyzzy"]) for text in texts]
    assert [line["result"] for line in ended.lines] == expected
    assert ended.err.count("'xyzzy' is no token") == 1


def test_a_cell_is_one_line_without_tabs_and_never_empty() -> None:
    found = [{"label": "a\tb\nc", "score": 1.0}, {"label": "", "score": 0.0}]
    shown = plain_rows(VIEWS["text-classification"], "one\ttwo\nthree", found)
    assert shown == "one two three\ta b c\t1.0000\none two three\t-\t0.0000"


def test_a_small_score_is_not_shown_as_none_at_all() -> None:
    found = [{"label": "a", "score": score} for score in (3.21e-6, 0.0, -12.5)]
    shown = plain_rows(VIEWS["text-classification"], "x", found)
    assert [line.split("\t")[2] for line in shown.splitlines()] == ["3e-06", "0.0000", "-12.5000"]


def test_a_score_that_json_does_not_have_is_null() -> None:
    found = {"sequence": "x", "labels": ["a", "b"], "scores": [float("nan"), 0.5]}
    line = json.loads(json_line(VIEWS["zero-shot-classification"], "x", found))
    assert line["result"]["scores"] == [None, 0.5]
    array = np.array([np.inf, 0.5], np.float32)
    assert json.loads(json_line(VIEWS["feature-extraction"], "x", array))["data"] == [None, 0.5]


@pytest.mark.parametrize("task", TASKS)
def test_the_example_of_a_task_runs(ebbtide_run: Any, model_of: Any, task: str) -> None:
    command, *words = shlex.split(example(task))
    assert command == "ebbtide"
    ended = ebbtide_run(*words, "--model", model_of[task], "--json")
    assert (ended.code, len(ended.lines)) == (0, 1), ended.err
