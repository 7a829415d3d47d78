"""text-generation: streams, chats, what is kept between calls, guesses of another model, errors."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ebbtide
from ebbtide.errors import (
    InputError,
    OptionError,
    PipelineCancelledError,
    PipelineDisposedError,
    UnsupportedModelError,
)

MODELS = Path(__file__).parents[1] / "models"
PROMPT = "The tide goes out at six, and the boats lie on their sides until noon."
MARKS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture(params=["gen-llama", "gen-llama-fused"])
def write(request: Any) -> Iterator[Any]:
    with ebbtide.pipeline("text-generation", MODELS / request.param) as pipe:
        yield pipe


@pytest.fixture
def llama() -> Iterator[Any]:
    with ebbtide.pipeline("text-generation", MODELS / "gen-llama") as pipe:
        yield pipe


def test_a_text_goes_on_and_without_the_full_text_what_is_new_is_given(write: Any) -> None:
    [whole] = write(PROMPT, max_new_tokens=8)
    [new] = write(PROMPT, max_new_tokens=8, return_full_text=False)
    assert whole["generated_text"] == PROMPT + new["generated_text"]
    assert new["generated_text"]


def test_each_text_of_a_list_has_what_it_has_alone(write: Any) -> None:
    texts = [PROMPT, "Boats", "The sea is deep here"]
    assert write(texts, max_new_tokens=8) == [write(text, max_new_tokens=8) for text in texts]


def test_the_pieces_of_a_stream_are_the_text(write: Any) -> None:
    pieces = list(write.stream(PROMPT, max_new_tokens=8, logprobs=True))
    [result] = write(PROMPT, max_new_tokens=8, return_full_text=False, details=True, logprobs=True)
    assert "".join(map(str, pieces)) == result["generated_text"]
    assert [piece.token for piece in pieces] == result["token_ids"]
    assert [piece.logprob for piece in pieces] == result["logprobs"]
    reasons = [piece.finish_reason for piece in pieces]
    assert reasons == [None] * (len(pieces) - 1) + [result["finish_reason"]]


def test_the_pieces_of_a_beam_search_come_at_its_end(write: Any) -> None:
    pieces = list(write.stream(PROMPT, max_new_tokens=8, num_beams=3))
    options = {"max_new_tokens": 8, "num_beams": 3, "return_full_text": False, "details": True}
    [found] = write(PROMPT, **options)
    assert "".join(map(str, pieces)) == found["generated_text"]
    assert [piece.token for piece in pieces] == found["token_ids"]
    assert pieces[-1].finish_reason == found["finish_reason"]


def test_a_streamer_is_told_the_pieces_on_the_callers_thread(write: Any) -> None:
    told: list[Any] = []
    threads = set()

    def tell(piece: Any) -> None:
        told.append(piece)
        threads.add(threading.get_ident())

    [result] = write(PROMPT, max_new_tokens=8, return_full_text=False, streamer=tell)
    assert "".join(map(str, told)) == result["generated_text"]
    assert threads == {threading.get_ident()}


def test_an_event_loop_gets_the_same(write: Any) -> None:
    async def both() -> tuple[Any, str, list[str]]:
        told: list[str] = []
        found = await write.acall(
            PROMPT, max_new_tokens=8, streamer=lambda piece: told.append(str(piece))
        )
        pieces = [str(piece) async for piece in write.astream(PROMPT, max_new_tokens=8)]
        return found, "".join(pieces), told

    found, streamed, told = asyncio.run(both())
    assert found == write(PROMPT, max_new_tokens=8)
    assert PROMPT + streamed == found[0]["generated_text"] == PROMPT + "".join(told)


def test_a_reader_who_walks_away_ends_the_writing_and_its_cache(write: Any) -> None:
    pieces = write.stream(PROMPT, max_new_tokens=100_000, max_length=None)
    next(pieces)
    assert write.memory.cache > 0
    pieces.close()
    write("x", max_new_tokens=1)
    receipt = write.dispose(timeout=60)
    assert write.memory.cache == 0
    assert not receipt.reasons or "cancelled" not in str(receipt.reasons)


def at_token(number: int, act: Callable[[], object]) -> Callable[[Any, Any], Any]:
    """A processor that does something at a token, while the model waits; and none may follow."""
    count = 0

    def process(ids: Any, scores: Any) -> Any:
        nonlocal count
        count += 1
        assert count <= number
        if count == number:
            act()
        return scores

    return process


def test_a_dispose_cancels_a_stream_within_a_token(write: Any) -> None:
    disposing = threading.Thread(target=write.dispose, kwargs={"cancel": True})

    def dispose() -> None:
        disposing.start()
        while write.state.value == "ready":
            os.sched_yield()

    stream = write.stream(PROMPT, max_new_tokens=90, logits_processor=[at_token(3, dispose)])
    with pytest.raises(PipelineCancelledError):
        list(stream)
    disposing.join()
    with pytest.raises(PipelineDisposedError):
        write("x")


def test_an_error_of_a_callers_own_processor_reaches_the_caller(write: Any) -> None:
    def fails(ids: Any, scores: Any) -> Any:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        write(PROMPT, max_new_tokens=4, logits_processor=[fails])
    assert write.memory.cache == 0
    assert write(PROMPT, max_new_tokens=4)


def test_a_seed_repeats_a_text_and_another_gives_another(write: Any) -> None:
    def drawn(seed: int) -> Any:
        return write(PROMPT, max_new_tokens=12, do_sample=True, temperature=5.0, seed=seed)

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_a_text_that_ends_a_row_is_the_last_of_it(write: Any) -> None:
    [whole] = write(PROMPT, max_new_tokens=12, return_full_text=False)
    stop = whole["generated_text"][4:7]
    [found] = write(
        PROMPT, max_new_tokens=12, return_full_text=False, stop_strings=stop, details=True
    )
    text = found["generated_text"]
    assert stop in text
    assert whole["generated_text"].startswith(text)
    assert len(text) < len(whole["generated_text"])
    assert found["finish_reason"] == "stop"


# What is kept for a call that begins the same


def test_a_kept_prompt_gives_the_same_text_and_is_charged_and_given_back(write: Any) -> None:
    first = PROMPT * 2
    [begun] = write(first, max_new_tokens=6, cache_prompt=True)
    kept = write.memory.cache
    assert kept > 0
    longer = begun["generated_text"] + " And then?"
    for prompt in (longer, first + "Other words", first, PROMPT):
        assert write(prompt, max_new_tokens=6, cache_prompt=True) == write(prompt, max_new_tokens=6)
    write.sleep()
    assert write.memory.cache == 0
    assert write(first, max_new_tokens=6, cache_prompt=True) == [begun]
    receipt = write.dispose()
    assert receipt.charged >= kept
    assert write.memory.cache == 0


def test_only_what_is_new_of_a_kept_prompt_is_shown_to_the_model(
    write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ebbtide.models.decoder import Steps

    shown: list[int] = []
    forward = Steps.forward

    def noted(self: Any, ids: Any, *rest: Any, **more: Any) -> Any:
        shown.append(ids.shape[1])
        return forward(self, ids, *rest, **more)

    monkeypatch.setattr(Steps, "forward", noted)
    [begun] = write(PROMPT, max_new_tokens=4, cache_prompt=True, prompt_lookup_num_tokens=0)
    first = shown[0]
    shown.clear()
    write(
        begun["generated_text"] + " x", max_new_tokens=4, cache_prompt=True,
        prompt_lookup_num_tokens=0,
    )  # fmt: skip
    assert shown[0] < first / 2


def test_what_is_kept_is_bounded(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(7):
        llama(f"{number} {PROMPT}", max_new_tokens=2, cache_prompt=True)
    several = llama.memory.cache
    one = ebbtide.pipeline("text-generation", MODELS / "gen-llama")
    one(PROMPT, max_new_tokens=2, cache_prompt=True)
    assert one.memory.cache * 3 < several < one.memory.cache * 6
    one.dispose()
    monkeypatch.setattr(ebbtide.settings, "prompt_cache_size", 0)
    llama(PROMPT, max_new_tokens=2, cache_prompt=True)
    assert llama.memory.cache == 0


def test_a_cancelled_call_leaves_a_kept_prompt_that_is_right(write: Any) -> None:
    pieces = write.stream(PROMPT, max_new_tokens=200, cache_prompt=True)
    for _ in range(3):
        next(pieces)
    pieces.close()
    expected = write(PROMPT, max_new_tokens=12)
    assert write(PROMPT, max_new_tokens=12, cache_prompt=True) == expected


def test_a_state_without_places_is_kept_for_what_goes_on_from_its_end() -> None:
    with ebbtide.pipeline("text-generation", MODELS / "gen-lfm2") as lfm:
        [begun] = lfm(PROMPT, max_new_tokens=4, cache_prompt=True)
        for prompt in (begun["generated_text"] + " x", "Other " + PROMPT, PROMPT):
            found = lfm(prompt, max_new_tokens=4, cache_prompt=True)
            assert found == lfm(prompt, max_new_tokens=4)


# Guesses


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 3, "temperature": 2.0}])
def test_guesses_change_nothing_but_the_number_of_steps(write: Any, options: Any) -> None:
    alone = write(PROMPT, max_new_tokens=20, prompt_lookup_num_tokens=0, **options)
    assert write(PROMPT, max_new_tokens=20, prompt_lookup_num_tokens=5, **options) == alone
    with ebbtide.pipeline("text-generation", MODELS / "gen-llama") as small:
        assert write(PROMPT, max_new_tokens=20, assistant_model=small, **options) == alone
        assert small.memory.cache == 0


def test_a_draft_model_that_is_right_saves_steps(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ebbtide.models.decoder import Steps

    counts: dict[Any, int] = {}
    forward = Steps.forward

    def noted(self: Any, *rest: Any, **more: Any) -> Any:
        counts[self._model] = counts.get(self._model, 0) + 1
        return forward(self, *rest, **more)

    monkeypatch.setattr(Steps, "forward", noted)
    with ebbtide.pipeline("text-generation", MODELS / "gen-llama") as twin:
        llama(PROMPT, max_new_tokens=20, min_new_tokens=20, assistant_model=twin)
        assert counts[llama._model] <= counts[twin._model]


def test_an_assistant_that_cannot_help_is_refused(llama: Any) -> None:
    with pytest.raises(InputError, match="not this one"):
        llama(PROMPT, assistant_model=llama)
    with pytest.raises(InputError, match="takes another text-generation pipeline"):
        llama(PROMPT, assistant_model="a/model")
    with (
        ebbtide.pipeline("text-generation", MODELS / "gen-gpt2") as other,
        pytest.raises(InputError, match="other tokens"),
    ):
        llama(PROMPT, assistant_model=other)
    with ebbtide.pipeline("text-generation", MODELS / "gen-llama") as twin:
        with pytest.raises(InputError, match="one sequence of each prompt"):
            llama(PROMPT, assistant_model=twin, num_beams=2)
        twin.dispose()
        with pytest.raises(PipelineDisposedError):
            llama(PROMPT, assistant_model=twin)


def test_a_state_that_cannot_be_taken_back_allows_no_guesses() -> None:
    with (
        ebbtide.pipeline("text-generation", MODELS / "gen-lfm2") as lfm,
        pytest.raises(InputError, match="leave prompt_lookup_num_tokens out"),
    ):
        lfm(PROMPT, prompt_lookup_num_tokens=4)


# Chats


@pytest.fixture
def chatty(tmp_path: Path) -> Path:
    folder = tmp_path / "chatty"
    shutil.copytree(MODELS / "gen-llama", folder)
    (folder / "chat_template.jinja").write_text(
        MARKS + "{% if tools %}<tool_call>{% endif %}{# <think> #}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return folder


def test_a_chat_ends_with_what_the_assistant_says(chatty: Path) -> None:
    chat = [{"role": "user", "content": "Is it high tide?"}]
    with ebbtide.pipeline("text-generation", chatty) as write:
        [found] = write(chat, max_new_tokens=6)
        [new] = write(chat, max_new_tokens=6, return_full_text=False)
        [text] = write(
            "<user>Is it high tide?<assistant>", add_special_tokens=False, max_new_tokens=6,
            return_full_text=False,
        )  # fmt: skip
        expected = [*chat, {"role": "assistant", "content": new["generated_text"]}]
        assert found["generated_text"] == expected
        assert new == text
        assert write([chat, chat], max_new_tokens=6) == [[found], [found]]


def test_the_last_message_is_continued(chatty: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The tide"}]
    with ebbtide.pipeline("text-generation", chatty) as write:
        [found] = write(chat, max_new_tokens=4, continue_final_message=True,
                        add_generation_prompt=False)  # fmt: skip
    messages = found["generated_text"]
    assert len(messages) == 2
    assert messages[1]["content"].startswith("The tide")
    assert len(messages[1]["content"]) > len("The tide")


def test_reasoning_and_calls_are_apart_from_what_is_said(
    chatty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = '<think>Look it up.</think>One moment.<tool_call>{"name": "tide", "arguments": {}}'
    said += "</tool_call>"

    def tide() -> float:
        """How high the water is."""
        return 0.0

    with ebbtide.pipeline("text-generation", chatty) as write:
        decode = write.tokenizer.decode
        monkeypatch.setattr(
            type(write.tokenizer), "decode",
            lambda self, ids, **more: said if len(ids) == 3 else decode(ids, **more),
        )  # fmt: skip
        [found] = write([{"role": "user", "content": "?"}], tools=[tide], max_new_tokens=3)
    answer = found["generated_text"][-1]
    assert answer["content"] == "One moment."
    assert answer["reasoning_content"] == "Look it up."
    assert answer["tool_calls"] == [
        {"type": "function", "function": {"name": "tide", "arguments": {}}}
    ]


# What cannot be used


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_new_tokens": 0}, InputError, "max_new_tokens takes a whole number from 1"),
        ({"max_new_tokens": -3}, InputError, "max_new_tokens takes a whole number from 1"),
        ({"max_new_tokens": "many"}, OptionError, "max_new_tokens takes a whole number"),
        ({"temperatur": 1.0}, OptionError, "Did you mean 'temperature'?"),
        ({"num_return_sequences": 2}, InputError, "pass do_sample=True"),
        ({"num_beams": 2, "num_return_sequences": 3}, InputError, "num_beams=3"),
        ({"min_new_tokens": 9, "max_new_tokens": 3}, InputError, "larger max_new_tokens"),
        ({"bad_words_ids": [[10**6]]}, InputError, "names the token 1000000"),
        ({"tools": []}, InputError, "are for chats"),
        ({"batch_size": 0}, InputError, "batch_size takes a whole number from 1"),
        ({"prompt_lookup_num_tokens": -1}, InputError, "whole number from 0"),
        ({"cache_prompt": 1}, OptionError, "takes True or False"),
        ({"cache_prompt": True, "num_beams": 2}, InputError, "one sequence of each prompt"),
        ({"prompt_lookup_num_tokens": 3, "num_beams": 2}, InputError, "one sequence of each"),
        ({"prompt_lookup_num_tokens": 3, "guidance_scale": 2.0}, InputError, "leave one of them"),
    ],
)
def test_options_that_cannot_be_used_say_what_to_change(
    llama: Any, options: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words.replace("?", r"\?")):
        llama(PROMPT, **options)


def test_inputs_that_cannot_be_used_say_what_to_pass(llama: Any) -> None:
    for wrong in (3, None, [], [PROMPT, 3], {"role": "user", "content": "x"}, [PROMPT, [{}]]):
        with pytest.raises(InputError):
            llama(wrong)
    with pytest.raises(InputError, match="prompt is empty"):
        llama("", add_special_tokens=False)
    with pytest.raises(InputError, match="shorten the prompt"):
        llama(PROMPT * 1000)
    with pytest.raises(InputError, match="A stream is of one input"):
        next(llama.stream([PROMPT, PROMPT]))
    with pytest.raises(InputError, match="A stream is of one sequence"):
        next(llama.stream(PROMPT, num_beams=3, num_return_sequences=2))


def test_a_chat_without_a_template_says_what_to_pass(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(MODELS / "gen-gpt2", folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with ebbtide.pipeline("text-generation", folder) as write:
        chat = [{"role": "user", "content": "Hi"}]
        if not write.chat_template.templates:
            with pytest.raises(UnsupportedModelError, match="has no chat template"):
                write(chat)
        assert write(chat, chat_template=MARKS, max_new_tokens=2)


def test_scores_and_logits_are_given_where_they_are_asked_for(write: Any) -> None:
    [found] = write(
        PROMPT, max_new_tokens=3, details=True, output_scores=True, output_logits=True,
        temperature=0.5, top_k=0, do_sample=True, seed=0,
    )  # fmt: skip
    assert len(found["scores"]) == len(found["logits"]) == len(found["token_ids"])
    np.testing.assert_allclose(found["scores"][0], found["logits"][0] / 0.5, rtol=1e-5)


# A given form


def test_a_text_has_the_form_that_was_asked_for_and_what_it_says_is_given(write: Any) -> None:
    for prompt in ([PROMPT], [PROMPT, "Boats", "The sea is deep"]):
        for [found] in write(prompt, structured=["ebb", "flood"], return_full_text=False):
            assert found["parsed"] in ("ebb", "flood")
            assert found["generated_text"].strip() == found["parsed"]
    schema = {
        "type": "object",
        "properties": {"high": {"type": "boolean"}},
        "required": ["high"],
        "additionalProperties": False,
    }
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "seed": 1, "temperature": 9.0}):
        [found] = write(PROMPT, structured=schema, max_new_tokens=200, **options)
        assert found["parsed"] in ({"high": True}, {"high": False})
    [cut] = write(PROMPT, structured=schema, max_new_tokens=2)
    assert cut["parsed"] is None
    assert "parsed" not in write(PROMPT, max_new_tokens=2)[0]


def test_a_form_streams_and_its_tokens_are_the_pipelines_memory(write: Any) -> None:
    pieces = write.stream(PROMPT, structured=re.compile("[0-9]{3}"))
    assert re.fullmatch("[0-9]{3}", "".join(map(str, pieces)).strip())
    assert "structured" in [one.kind for one in write.memory.holdings]
    write.sleep()
    assert write(PROMPT, structured=["ebb"])[0]["parsed"] == "ebb"
    assert write.dispose().reasons == ()


def test_a_form_that_cannot_be_used_says_what_to_change(write: Any) -> None:
    for wrong in (3, [], {"jsonschema": {}}, {"type": "objekt"}, {"grammar": "start: ("}):
        with pytest.raises(InputError):
            write(PROMPT, structured=wrong)


# A stream in hand


def test_another_thread_cancels_a_stream_within_a_token(write: Any) -> None:
    def cancel() -> None:
        canceller = threading.Thread(target=lambda: stream.cancel())
        canceller.start()
        canceller.join()

    stream = write.stream(PROMPT, max_new_tokens=90, logits_processor=[at_token(3, cancel)])
    with pytest.raises(PipelineCancelledError):
        list(stream)
    assert stream.result is None
    assert write.memory.cache == 0
    assert write(PROMPT, max_new_tokens=2)


def test_a_stream_that_was_read_has_the_result_of_a_call(write: Any) -> None:
    stream = write.stream(PROMPT, max_new_tokens=5)
    assert next(stream)
    assert stream.result is None
    assert len(list(stream)) == 4
    assert [stream.result] == write(PROMPT, max_new_tokens=5)


def test_a_stream_on_an_event_loop_is_cancelled_and_closed_too(write: Any) -> None:
    async def cancelled() -> None:
        stop = at_token(3, lambda: stream.cancel())
        stream = write.astream(PROMPT, max_new_tokens=90, logits_processor=[stop])
        async with stream:
            assert len([piece async for piece in stream]) < 3

    async def closed() -> Any:
        async with write.astream(PROMPT, max_new_tokens=90) as stream:
            await anext(stream)
        return stream.result

    with pytest.raises(PipelineCancelledError):
        asyncio.run(cancelled())
    assert asyncio.run(closed()) is None
    assert write.memory.cache == 0
