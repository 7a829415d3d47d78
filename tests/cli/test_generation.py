"""``ebbtide run`` for the tasks that write: lines of JSON, rows, and text as it is written."""

from __future__ import annotations

import re
from typing import Any

import pytest

import ebbtide

TEXTS = ["The tide goes out", "Boats lie on their sides"]
KEYS = {
    "text-generation": "generated_text",
    "text2text-generation": "generated_text",
    "summarization": "summary_text",
    "translation": "translation_text",
}

every_task = pytest.mark.parametrize("task", KEYS)


def results(task: str, model: Any, **options: Any) -> list[Any]:
    make: Any = ebbtide.pipeline
    with make(task, model) as pipe:
        return [pipe(text, max_new_tokens=6, **options) for text in TEXTS]


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@every_task
def test_json_is_one_line_a_text_with_what_the_pipeline_gives(
    ebbtide_run: Any, model_of: Any, task: str
) -> None:
    ended = ebbtide_run(
        "run", task, *TEXTS, "--max-new-tokens", "6", "--model", model_of[task], "--json"
    )
    assert (ended.code, ended.err) == (0, "")
    expected = zip(TEXTS, results(task, model_of[task]), strict=True)
    assert ended.lines == [{"text": text, "result": result} for text, result in expected]


@every_task
def test_without_a_terminal_each_text_is_a_row(ebbtide_run: Any, model_of: Any, task: str) -> None:
    ended = ebbtide_run("run", task, *TEXTS, "--max-new-tokens=6", "--model", model_of[task])
    written = [found[0][KEYS[task]] for found in results(task, model_of[task])]
    assert [row[0] for row in ended.rows] == TEXTS
    assert [row[1].split() for row in ended.rows] == [one.split() for one in written]
    assert ended.err.startswith("released ")


@every_task
def test_on_a_terminal_the_text_is_shown_with_what_is_written_of_it(
    ebbtide_on_terminal: Any, model_of: Any, task: str
) -> None:
    ended = ebbtide_on_terminal(
        "run", task, *TEXTS, "--max-new-tokens", "6", "--model", model_of[task]
    )
    shown = plain(ended.out).replace("\r", "")
    for text, found in zip(TEXTS, results(task, model_of[task]), strict=True):
        new = found[0][KEYS[task]].removeprefix(text)
        between = "" if task == "text-generation" else "\n"
        assert f"{text}{between}{new}" in shown


def test_beams_are_shown_once_they_are_known(ebbtide_on_terminal: Any, model_of: Any) -> None:
    task, model = "text-generation", model_of["text-generation"]
    options = {"num_beams": 3, "num_return_sequences": 2, "return_full_text": False}
    words = ("--num-beams", "3", "--num-return-sequences", "2", "--max-new-tokens", "6")
    ended = ebbtide_on_terminal("run", task, *TEXTS, *words, "--model", model)
    lines = [line for line in plain(ended.out).replace("\r", "").split("\n") if line]
    rows = [one["generated_text"] for found in results(task, model, **options) for one in found]
    assert [line for line in lines if line not in TEXTS] == rows


def test_an_option_of_a_generation_that_contradicts_another_is_said(
    ebbtide_run: Any, model_of: Any
) -> None:
    model = model_of["text-generation"]
    ended = ebbtide_run("run", "text-generation", "x", "--num-beam-groups=2", "--model", model)
    assert ended.code == 2
    assert "num_beam" in ended.err


def test_scores_are_numbers_of_json(ebbtide_run: Any, model_of: Any) -> None:
    words = ("--details", "--output-scores", "--logprobs", "--max-new-tokens=2", "--json")
    ended = ebbtide_run(
        "run", "text-generation", "x", *words, "--model", model_of["text-generation"]
    )
    [line] = ended.lines
    [found] = line["result"]
    assert len(found["scores"]) == len(found["logprobs"]) == len(found["token_ids"]) == 2
    assert all(type(one) is float for one in found["scores"][0])
