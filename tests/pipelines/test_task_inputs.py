"""What a task cannot use is refused with a typed error, and what it can comes in every form."""

from __future__ import annotations

import asyncio
import inspect
import json
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import ebbtide
from ebbtide.pipelines import TASKS

BERT = Path(__file__).parent.parent / "models" / "bert"
HEADS = {
    "text-classification": "sequence",
    "token-classification": "token",
    "question-answering": "span",
    "fill-mask": "mask",
    "zero-shot-classification": "nli",
}
LABELS = ["sea", "harbour"]


@pytest.fixture(scope="module")
def pipes() -> Iterator[dict[str, Any]]:
    made = {task: ebbtide.pipeline(task, BERT / head) for task, head in HEADS.items()}
    yield made
    for pipe in made.values():
        pipe.dispose()


@pytest.fixture(autouse=True)
def _no_pipeline_is_leaked() -> None:
    """In place of the suite's own check: here pipelines live as long as the module."""


def call(pipe: Any, text: Any, **options: Any) -> Any:
    """One call, with what the task needs beside a text."""
    if pipe.task == "question-answering":
        return pipe(text, "the tide goes out at six and the boats lie on their sides", **options)
    if pipe.task == "zero-shot-classification":
        return pipe(text, LABELS, **options)
    if pipe.task == "fill-mask" and isinstance(text, str):
        return pipe(f"{text} {pipe.mask_token}", **options)
    return pipe(text, **options)


def refused(pipes: dict[str, Any], task: str, *arguments: Any, **options: Any) -> str:
    with pytest.raises(ebbtide.InputError) as caught:
        pipes[task](*arguments, **options)
    return str(caught.value)


# Every task


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("inputs", [None, b"bytes", 3, [], [None], ["fine", b"bytes"], [["x"]]])
def test_what_is_no_text_is_refused(pipes: dict[str, Any], task: str, inputs: Any) -> None:
    with pytest.raises(ebbtide.InputError):
        call(pipes[task], inputs)


@pytest.mark.parametrize("task", HEADS)
def test_an_unknown_option_names_the_nearest(pipes: dict[str, Any], task: str) -> None:
    with pytest.raises(ebbtide.OptionError, match="Did you mean 'batch_size'") as caught:
        call(pipes[task], "tide", batch_sise=3)
    assert caught.value.nearest == "batch_size"


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("size", [0, -1, 1.5, True, "8"])
def test_a_batch_size_that_is_no_number_from_1_is_refused(
    pipes: dict[str, Any], task: str, size: Any
) -> None:
    with pytest.raises(ebbtide.InputError, match="batch_size"):
        call(pipes[task], "tide", batch_size=size)


@pytest.mark.parametrize("task", HEADS)
def test_a_list_gives_what_each_text_alone_gives(pipes: dict[str, Any], task: str) -> None:
    texts = [f"{one} {pipes[task].mask_token}" for one in LABELS] if task == "fill-mask" else LABELS
    pipe = pipes[task]
    together = call(pipe, texts)
    alone = [call(pipe, [one])[0] for one in texts]
    assert round_off(together) == round_off(alone)
    assert round_off(call(pipe, tuple(texts), batch_size=1)) == round_off(together)


def round_off(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: round_off(one) for key, one in value.items()}
    return [round_off(one) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize("task", HEADS)
def test_an_iterator_gives_one_result_a_text_as_it_is_asked_for(
    pipes: dict[str, Any], task: str
) -> None:
    taken: list[str] = []
    pipe = pipes[task]

    def texts() -> Iterator[Any]:
        for one in LABELS:
            taken.append(one)
            if task == "question-answering":
                yield {"question": one, "context": "the boats lie in the harbour"}
            else:
                yield f"{one} {pipe.mask_token}" if task == "fill-mask" else one

    more = (LABELS,) if task == "zero-shot-classification" else ()
    found = pipe(texts(), *more)
    assert taken == []
    next(found)
    assert taken == LABELS[:1]
    assert len(list(found)) == 1


@pytest.mark.parametrize("task", HEADS)
def test_a_call_on_an_event_loop_gives_the_same(pipes: dict[str, Any], task: str) -> None:
    pipe = pipes[task]
    text = f"tide {pipe.mask_token}" if task == "fill-mask" else "tide"
    more: tuple[Any, ...] = ()
    if task == "question-answering":
        more = ("the tide goes out",)
    elif task == "zero-shot-classification":
        more = (LABELS,)

    async def one() -> AsyncIterator[Any]:
        yield {"question": text, "context": more[0]} if task == "question-answering" else text

    async def main() -> tuple[Any, list[Any]]:
        asked = await pipe.acall(text, *more)
        rest = more if task == "zero-shot-classification" else ()
        streamed = [found async for found in await pipe.acall(one(), *rest)]
        return asked, streamed

    asked, streamed = asyncio.run(main())
    expected = pipe(text, *more)
    assert round_off(asked) == round_off(expected)
    assert round_off(streamed) == round_off([expected])


@pytest.mark.parametrize("task", TASKS)
def test_calling_and_acall_take_the_same_options_and_refuse_the_same(task: str) -> None:
    kind = TASKS[task].pipeline
    one, other = (
        inspect.signature(getattr(kind, name)).parameters for name in ("__call__", "acall")
    )
    assert [(p.name, p.default, p.kind) for p in one.values()] == [
        (p.name, p.default, p.kind) for p in other.values()
    ]


def copied(head: str, folder: Path, **changes: Any) -> Path:
    """A model's folder whose config says something else; None takes a key out."""
    shutil.copytree(BERT / head, folder)
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: one for key, one in config.items() if one is not None}))
    return folder


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (None, "2 labels, and its graph gives"),
        ({"0": "one"}, "1 labels, and its graph gives"),
        ({str(n): f"label {n}" for n in range(40)}, "40 labels, and its graph gives"),
    ],
)
def test_a_config_whose_labels_are_not_the_graphs_is_refused_at_the_load(
    tmp_path: Path, task: str, labels: Any, words: str
) -> None:
    folder = copied(HEADS[task], tmp_path / "model", id2label=labels, label2id=None)
    with pytest.raises(ebbtide.UnsupportedModelError, match=words):
        ebbtide.pipeline(task, folder)


@pytest.mark.parametrize("labels", [["a", "b"], {"zero": "a"}, {"1": "a", "2": "b"}, "a, b"])
def test_labels_that_are_no_map_from_numbers_are_a_damaged_config(
    tmp_path: Path, labels: Any
) -> None:
    folder = copied("sequence", tmp_path / "model", id2label=labels)
    with pytest.raises(ebbtide.LoadError, match="id2label"):
        ebbtide.pipeline("text-classification", folder)


@pytest.mark.parametrize("task", HEADS)
def test_a_model_of_another_task_is_refused_by_what_its_graph_gives(task: str) -> None:
    other = "sequence" if task == "question-answering" else "span"
    with pytest.raises(ebbtide.UnsupportedModelError, match="export the model for this task"):
        ebbtide.pipeline(task, BERT / other)


# text-classification


def test_two_texts_are_read_together_in_every_form(pipes: dict[str, Any]) -> None:
    classify = pipes["text-classification"]
    one = {"text": "how deep is it", "text_pair": "forty metres"}
    expected = classify(one)[0]
    for form in ([one], [("how deep is it", "forty metres")], [["how deep is it", "forty metres"]]):
        assert classify(form) == [expected]
    assert classify({"text": "how deep is it"}) == classify("how deep is it")
    assert classify("how deep is it forty metres") != [expected]


@pytest.mark.parametrize(
    "inputs",
    [
        {"text_pair": "alone"},
        {"text": "one", "second": "two"},
        {"text": 3},
        {"text": "one", "text_pair": 3},
        [("one", "two", "three")],
        [("one", 2)],
        {},
    ],
)
def test_what_is_no_pair_of_texts_is_refused(pipes: dict[str, Any], inputs: Any) -> None:
    assert "text" in refused(pipes, "text-classification", inputs)


def test_the_number_of_labels_decides_the_results_shape(pipes: dict[str, Any]) -> None:
    classify = pipes["text-classification"]
    one = classify("tide")
    assert [sorted(found) for found in one] == [["label", "score"]]
    assert classify(["tide", "sea"]) == [one[0], classify("sea")[0]]
    everything = classify("tide", top_k=None)
    assert everything[0] == one[0]
    assert sum(found["score"] for found in everything) == pytest.approx(1, abs=1e-5)
    assert classify(["tide"], top_k=2) == [everything[:2]]
    assert classify("tide", top_k=99) == everything


@pytest.mark.parametrize(
    "options", [{"top_k": 0}, {"top_k": "all"}, {"function_to_apply": "softmaxx"}]
)
def test_an_option_out_of_its_range_is_refused(pipes: dict[str, Any], options: Any) -> None:
    assert next(iter(options)) in refused(pipes, "text-classification", "tide", **options)


def test_several_labels_at_once_and_a_regression_are_scored_each_in_its_way() -> None:
    with ebbtide.pipeline("text-classification", BERT / "several") as several:
        found = several("tide", top_k=None)
        assert sum(one["score"] for one in found) != pytest.approx(1, abs=1e-3)
        assert all(0 < one["score"] < 1 for one in found)
        raw = several("tide", top_k=None, function_to_apply="none")
        assert [one["label"] for one in raw] == [one["label"] for one in found]
    with ebbtide.pipeline("text-classification", BERT / "value") as value:
        assert value("tide") == value("tide", function_to_apply="none")


def test_ranking_orders_documents_and_says_where_each_was(pipes: dict[str, Any]) -> None:
    documents = ["the sea", "the boats lie on their sides", "a harbour at night", "the tide"]
    with ebbtide.pipeline("text-classification", BERT / "rank") as model:
        ranked = model.rank("where are the boats", documents, return_documents=True)
        assert sorted(one["corpus_id"] for one in ranked) == [0, 1, 2, 3]
        assert [one["score"] for one in ranked] == sorted(
            (one["score"] for one in ranked), reverse=True
        )
        assert all(one["text"] == documents[one["corpus_id"]] for one in ranked)
        short = model.rank("where are the boats", documents, top_k=2, batch_size=1)
        assert [one["corpus_id"] for one in short] == [one["corpus_id"] for one in ranked[:2]]
        assert all("text" not in one for one in short)
        pair = {"text": "where are the boats", "text_pair": documents[ranked[0]["corpus_id"]]}
        assert model(pair)[0]["score"] == pytest.approx(ranked[0]["score"], abs=1e-5)
        assert asyncio.run(model.arank("where are the boats", documents, top_k=2)) == short
        for query, given in ((3, documents), ("x", "one text"), ("x", []), ("x", [1])):
            with pytest.raises(ebbtide.InputError):
                model.rank(query, given)
        with pytest.raises(ebbtide.OptionError, match="return_documents"):
            model.rank("x", documents, return_documents="yes")


def test_a_model_with_several_scores_cannot_rank(pipes: dict[str, Any]) -> None:
    with pytest.raises(ebbtide.UnsupportedModelError, match="ranking needs one"):
        pipes["text-classification"].rank("tide", ["sea"])


# token-classification


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"aggregation_strategy": "simpel"}, "Did you mean 'simple'"),
        ({"ignore_labels": "O"}, "ignore_labels takes a list"),
        ({"stride": 4}, "stride needs an aggregation_strategy"),
        ({"stride": -1, "aggregation_strategy": "simple"}, "stride takes a whole number"),
        ({"stride": 10**6, "aggregation_strategy": "simple"}, "below the model's window"),
    ],
)
def test_options_of_token_classification_are_checked(
    pipes: dict[str, Any], options: Any, words: str
) -> None:
    assert words in refused(pipes, "token-classification", "tide", **options)


def test_entities_lie_where_they_say_in_the_text(pipes: dict[str, Any]) -> None:
    text = "  Ann, sails\tfrom Húll 🌊 — in the morning…"
    for found in pipes["token-classification"](text, ignore_labels=[]):
        there = text[found["start"] : found["end"]].lower()
        assert found["word"] == "[UNK]" or len(found["word"].removeprefix("##")) <= len(there)
        assert there.strip() == there


# question-answering


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("Who?",), "needs a context"),
        ((), "needs a context"),
        (("Who?", ""), "context is empty"),
        (("  ", "the tide"), "question is empty"),
        (({"question": "Who?"},), "just these two keys"),
        (({"question": "Who?", "context": "x", "id": 3},), "just these two keys"),
        ((["Who?", "When?"], ["one"]), "2 questions and 1 contexts"),
        ((["Who?"],), "just these two keys"),
        (("Who?", 3), "context is no text"),
    ],
)
def test_a_question_without_what_it_needs_is_refused(
    pipes: dict[str, Any], arguments: Any, words: str
) -> None:
    assert words in refused(pipes, "question-answering", *arguments)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"doc_stride": 384}, "doc_stride takes"),
        ({"doc_stride": 24, "max_seq_len": 24}, "below the window's 24 tokens"),
        ({"doc_stride": 20, "max_seq_len": 24}, "stride of 20 tokens leaves nothing"),
        ({"max_seq_len": 3}, "must be read whole in a window of 3"),
        ({"top_k": 0}, "top_k takes"),
        ({"max_answer_len": 0}, "max_answer_len takes"),
    ],
)
def test_windows_in_which_nothing_fits_are_refused(
    pipes: dict[str, Any], options: Any, words: str
) -> None:
    context = "the tide goes out and the boats lie on their sides " * 8
    assert words in refused(pipes, "question-answering", "what goes out", context, **options)


def test_answers_are_the_contexts_own_words_in_every_form(pipes: dict[str, Any]) -> None:
    answer = pipes["question-answering"]
    context = "At six the tide, which was high, goes out; the boats lie on their sides. " * 4
    one = answer("what goes out", context)
    assert context[one["start"] : one["end"]] == one["answer"]
    asked = {"question": "what goes out", "context": context}
    assert round_off(answer(asked)) == round_off(one)
    assert round_off(answer([asked, asked])) == round_off([one, one])
    assert round_off(answer(["what goes out"], context)) == round_off([one])
    assert round_off(answer(["what goes out"] * 2, [context] * 2)) == round_off([one, one])
    several = answer("what goes out", context, top_k=4)
    assert several[0]["answer"] == one["answer"]
    assert all(context[found["start"] : found["end"]] == found["answer"] for found in several)
    assert len({found["answer"].lower() for found in several}) == 4


# fill-mask


@pytest.mark.parametrize(
    ("text", "words"),
    [("the tide", "no mask in it"), ("", "no mask in it"), ("tide " * 4000 + "[MASK]", "window")],
)
def test_a_text_without_a_mask_to_fill_is_refused(
    pipes: dict[str, Any], text: str, words: str
) -> None:
    message = refused(pipes, "fill-mask", text)
    assert words in message
    assert "[MASK]" in message


def test_targets_are_the_only_tokens_to_choose_from(
    pipes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    fill = pipes["fill-mask"]
    found = fill("the [MASK] goes out", targets=["sea", "the", "sea"])
    assert {one["token_str"] for one in found} == {"sea", "the"}
    assert fill("the [MASK] goes out", targets="sea")[0]["token_str"] == "sea"
    assert not caplog.records
    fill("the [MASK] goes out", targets=["seaseasea"])
    assert "'seaseasea' is no token" in caplog.text
    for targets in ([], 3, [""], [3]):
        assert refused(pipes, "fill-mask", "the [MASK]", targets=targets)


def test_each_of_several_masks_is_filled_in_alone(pipes: dict[str, Any]) -> None:
    first, second = pipes["fill-mask"]("the [MASK] goes [MASK]", top_k=2)
    assert [len(first), len(second)] == [2, 2]
    assert all(one["sequence"].count("[MASK]") == 1 for one in (*first, *second))
    assert [one["score"] for one in first] == sorted((one["score"] for one in first), reverse=True)


def test_a_model_without_a_mask_token_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BERT / "mask", folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        said = json.loads(path.read_text())
        said["mask_token"] = "[NOT A TOKEN]"
        path.write_text(json.dumps(said))
    with pytest.raises(ebbtide.UnsupportedModelError, match="no mask token"):
        ebbtide.pipeline("fill-mask", folder)


# zero-shot-classification


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([], "no label"),
        ("", "no label"),
        (" , ", "no label"),
        (["sea", ""], "empty one"),
        (["sea", "sea"], "'sea' more than once"),
        ("sea, land, sea", "'sea' more than once"),
        ([3], "takes a list of texts"),
        (None, "takes a list of texts"),
    ],
)
def test_labels_that_are_empty_or_repeated_are_refused(
    pipes: dict[str, Any], labels: Any, words: str
) -> None:
    assert words in refused(pipes, "zero-shot-classification", "tide", labels)


@pytest.mark.parametrize("template", ["no place", "{x}", "{1}", "{", 3, None, ""])
def test_a_template_without_a_place_for_the_label_is_refused(
    pipes: dict[str, Any], template: Any
) -> None:
    message = refused(
        pipes, "zero-shot-classification", "tide", LABELS, hypothesis_template=template
    )
    assert "hypothesis_template" in message


def test_labels_may_be_one_text_with_commas(pipes: dict[str, Any]) -> None:
    classify = pipes["zero-shot-classification"]
    assert classify("tide", "sea, harbour,") == classify("tide", ["sea", "harbour"])


def test_labels_share_a_sum_of_1_unless_each_is_scored_by_itself(pipes: dict[str, Any]) -> None:
    classify = pipes["zero-shot-classification"]
    together = classify("tide", [*LABELS, "sky"])
    assert sum(together["scores"]) == pytest.approx(1, abs=1e-5)
    assert together["scores"] == sorted(together["scores"], reverse=True)
    each = classify("tide", [*LABELS, "sky"], multi_label=True)
    alone = {label: classify("tide", [label])["scores"][0] for label in each["labels"]}
    found = dict(zip(each["labels"], each["scores"], strict=True))
    assert found == pytest.approx(alone, abs=1e-5)


def test_a_model_that_knows_no_entailment_needs_to_be_told(tmp_path: Path) -> None:
    folder = copied("nli", tmp_path / "m", id2label={"0": "no", "1": "maybe", "2": "yes"})
    with ebbtide.pipeline("zero-shot-classification", folder) as classify:
        with pytest.raises(ebbtide.UnsupportedModelError, match="entailment_label="):
            classify("tide", LABELS)
        with pytest.raises(ebbtide.InputError, match="it has no, maybe, yes"):
            classify("tide", LABELS, entailment_label="entailment")
        assert classify("tide", LABELS, entailment_label="yes")["labels"]
