"""What a decoder says does not depend on how its tokens were shown to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from ebbtide.cancellation import CancelToken
from ebbtide.errors import PipelineCancelledError, PipelineDisposedError, UnsupportedModelError
from ebbtide.memory.ledger import Lease, ledger
from ebbtide.models import decoder as room
from ebbtide.models.config import ModelConfig
from ebbtide.models.decoder import Decoder
from ebbtide.models.loading import Loaded
from ebbtide.models.tokenizer import Tokenizer
from ebbtide.runtime import TensorInfo
from ebbtide.runtime.carry import InPlace
from ebbtide.runtime.fake import FakeSession

from .loaded import TOKEN, Owner, close, drawn, each_once, loaded, shown

ATTENTION = [
    "gen-llama",
    "gen-llama-fused",
    "gen-llama-kept",
    "gen-llama-merged",
    "gen-llama-positionless",
    "gen-gpt-bigcode",
    "gen-falcon",
    "gen-bloom",
]
STATES = ["gen-granitemoehybrid", "gen-lfm2"]
CACHED = ATTENTION + STATES
ALL = [*CACHED, "gen-llama-uncached"]
FUSED = "gen-llama-fused"
"""Its attention takes one new token at a time where there are several rows and a past."""

CONVOLVED = "gen-lfm2"
"""Its graph lets convolutions reach into the padding, as those that are published do."""

MERGED = {"gen-llama-merged": "decoder_model_merged"}


Models = Callable[[str], Decoder]


@pytest.fixture(scope="module")
def models() -> Iterator[Models]:
    def make(name: str, owner: Owner) -> Decoder:
        return Decoder(loaded(name, owner, file=MERGED.get(name)))

    with each_once(make) as made:
        yield made


def ones(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.ones_like(ids)


@pytest.mark.parametrize("name", ALL)
def test_in_one_go_in_pieces_and_without_a_cache_the_logits_are_the_same(
    models: Models, name: str
) -> None:
    model, ids = models(name), drawn(1 if name == FUSED else 3, 11)
    whole = shown(model.begin(ones(ids)), ids)
    assert whole.shape[:2] == ids.shape
    assert np.ptp(whole) > 0.01
    assert close(shown(model.begin(ones(ids)), ids, [1] * 10), whole)
    assert close(shown(model.begin(ones(ids)), ids, [4, 1, 3]), whole)
    assert close(shown(model.begin(ones(ids), cache=False), ids, [5, 1]), whole)


def test_rows_of_a_graph_that_writes_in_place_go_on_by_one_token(models: Models) -> None:
    model, ids = models(FUSED), drawn(3, 11)
    whole = shown(model.begin(ones(ids)), ids)
    assert close(shown(model.begin(ones(ids)), ids, [4, *[1] * 6]), whole)
    assert close(shown(model.begin(ones(ids), cache=False), ids, [5, 1]), whole)


@pytest.mark.parametrize("name", ALL)
def test_the_last_logits_alone_are_those_of_the_last_token(models: Models, name: str) -> None:
    model, ids = models(name), drawn(1 if name == FUSED else 2, 9)
    whole = shown(model.begin(ones(ids)), ids)
    steps = model.begin(ones(ids))
    assert close(steps.forward(ids[:, :6], TOKEN), whole[:, 5:6])
    assert close(steps.forward(ids[:, 6:], TOKEN), whole[:, 8:])
    assert steps.length == 9


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_rows_are_repeated_dropped_and_put_in_another_order(
    models: Models, name: str, cache: bool
) -> None:
    model, ids = models(name), drawn(3, 8)
    order = np.array([2, 0, 0, 2])
    then = drawn(4, 2, seed=1)
    steps = model.begin(ones(ids), cache=cache)
    shown(steps, ids)
    steps.select(order)
    together = np.concatenate([ids[order], then], axis=1)
    expected = shown(model.begin(ones(together)), together)[:, 8:]
    assert close(shown(steps, then, [1]), expected)


@pytest.mark.parametrize("name", [one for one in ALL if one != CONVOLVED])
def test_padding_at_the_left_changes_nothing(models: Models, name: str) -> None:
    model = models(name)
    texts = [drawn(1, length, seed=length) for length in (9, 4, 6)]
    then = drawn(3, 3, seed=1)
    ids = np.zeros((3, 9), np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, 9 - text.shape[1] :] = text
        mask[row, 9 - text.shape[1] :] = 1
    for cache in (True,) if name == FUSED else (True, False):
        steps = model.begin(mask, cache=cache)
        first = steps.forward(ids, TOKEN).copy()
        found = np.concatenate([first, shown(steps, then, [1, 1])], axis=1)
        for row, text in enumerate(texts):
            alone = np.concatenate([text, then[row : row + 1]], axis=1)
            expected = shown(model.begin(ones(alone)), alone)[:, -4:]
            assert close(found[row : row + 1], expected)


@pytest.mark.parametrize("name", ["gen-llama", "gen-llama-fused", "gen-gpt-bigcode", "gen-bloom"])
def test_padded_rows_stay_right_when_they_are_chosen_from(models: Models, name: str) -> None:
    model, ids = models(name), drawn(3, 7)
    mask = ones(ids)
    mask[1, :4] = 0
    then = drawn(2, 2, seed=1)
    steps = model.begin(mask)
    steps.forward(ids, TOKEN)
    steps.select(np.array([1, 1]))
    found = shown(steps, then, [1])
    alone = np.concatenate([np.repeat(ids[1:2, 4:], 2, axis=0), then], axis=1)
    assert close(found, shown(model.begin(ones(alone)), alone)[:, -2:])


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", [*ATTENTION, "gen-llama-uncached"])
def test_what_was_taken_back_was_never_seen(models: Models, name: str, cache: bool) -> None:
    model, ids = models(name), drawn(1 if name == FUSED else 2, 10)
    steps = model.begin(ones(ids[:, :6]), cache=cache)
    shown(steps, ids[:, :6])
    shown(steps, drawn(len(ids), 4, seed=1))
    steps.crop(20)
    assert steps.length == 10
    steps.crop(6)
    assert steps.length == 6
    whole = shown(model.begin(ones(ids)), ids)
    assert close(shown(steps, ids[:, 6:], [1]), whole[:, 6:])


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_has_no_places_is_not_taken_back(models: Models, name: str) -> None:
    model, ids = models(name), drawn(1, 5)
    steps = model.begin(ones(ids))
    shown(steps, ids)
    with pytest.raises(UnsupportedModelError, match=r"past_conv\.0"):
        steps.crop(3)
    steps.crop(5)
    assert steps.length == 5


@pytest.mark.parametrize("name", CACHED)
def test_the_bytes_of_the_cache_are_told_as_they_grow_and_0_at_the_end(
    models: Models, name: str
) -> None:
    model, ids = models(name), drawn(2, 12)
    told: list[int] = []
    steps = model.begin(ones(ids), held=told.append)
    shown(steps, ids, [6, 1, 1, 1, 1, 1])
    assert told[0] > 0
    assert told == sorted(told)
    assert len(set(told)) == len(told)
    assert (len(told) == 1) is (name == FUSED)  # in place, there was room for all at once
    before = told[-1]
    steps.select(np.array([0]))
    assert told[-1] * 2 == before
    steps.close()
    assert told[-1] == 0


def test_without_a_cache_none_is_told(models: Models) -> None:
    told: list[int] = []
    steps = models("gen-llama-uncached").begin(ones(drawn(1, 4)), held=told.append)
    steps.forward(drawn(1, 4), TOKEN)
    steps.close()
    assert set(told) == {0}


def test_a_buffer_that_is_written_in_place_grows_past_its_first_size(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ebbtide.runtime.carry._GROWTH", 8)
    model, ids = models(FUSED), drawn(2, 40)
    mask = ones(ids[:, :5])
    mask[1, :2] = 0
    told: list[int] = []
    steps = model.begin(mask, held=told.append)
    assert isinstance(steps._carry, InPlace)
    assert steps.may_guess(TOKEN)
    steps.forward(ids[:, :5], TOKEN)
    found = shown(steps, ids[:, 5:], [1] * 34)
    assert len(set(told)) > 3
    first = shown(model.begin(ones(ids)), ids)
    assert close(found[:1], first[:1, 5:])
    short = ids[1:, 2:]
    assert close(found[1:], shown(model.begin(ones(short)), short)[:, 3:])


@pytest.mark.parametrize("name", CACHED)
def test_a_long_prompt_is_shown_in_parts_and_gives_the_same(
    models: Models, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = models(name), drawn(1 if name == FUSED else 2, 23)
    whole = shown(model.begin(ones(ids)), ids)
    runs: list[int] = []
    steps = model.begin(ones(ids))
    run = steps._run

    def counted(part: NDArray[np.int64], token: CancelToken, last: bool) -> NDArray[np.float32]:
        runs.append(part.shape[1])
        return run(part, token, last)

    monkeypatch.setattr(steps, "_run", counted)
    monkeypatch.setattr(room, "LOGITS_AT_ONCE", 1)
    monkeypatch.setattr(room, "LEAST_PART", 5)
    assert close(steps.forward(ids, TOKEN), whole[:, -1:])
    assert runs == [5, 5, 5, 5, 3]
    then = drawn(len(ids), 1, seed=1)
    after = np.concatenate([ids, then], axis=1)
    expected = shown(model.begin(ones(after)), after)[:, -1:]
    assert close(steps.forward(then, TOKEN), expected)


def test_rows_of_several_lengths_are_shown_in_parts_too(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = models("gen-llama"), drawn(2, 12)
    mask = ones(ids)
    mask[1, :5] = 0
    whole = model.begin(mask).forward(ids, TOKEN).copy()
    monkeypatch.setattr(room, "LOGITS_AT_ONCE", 1)
    monkeypatch.setattr(room, "LEAST_PART", 6)
    assert close(model.begin(mask).forward(ids, TOKEN), whole)


def test_a_cancelled_prompt_stops_between_its_parts(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "LOGITS_AT_ONCE", 1)
    monkeypatch.setattr(room, "LEAST_PART", 4)
    token, ids = CancelToken("test"), drawn(1, 12)
    steps = models("gen-llama").begin(ones(ids), held=lambda size: token.cancel())
    with pytest.raises(PipelineCancelledError):
        steps.forward(ids, token)
    assert steps.length == 4


@pytest.mark.parametrize("name", ["gen-llama", "gen-llama-fused"])
def test_two_generations_of_one_model_do_not_meet(models: Models, name: str) -> None:
    model, one, other = models(name), drawn(1, 8), drawn(2, 8, seed=1)
    first, second = model.begin(ones(one)), model.begin(ones(other))
    found: list[list[NDArray[np.float32]]] = [[], []]
    for place in range(8):
        found[0].append(first.forward(one[:, place : place + 1], TOKEN).copy())
        found[1].append(second.forward(other[:, place : place + 1], TOKEN).copy())
    assert close(np.concatenate(found[0], axis=1), shown(model.begin(ones(one)), one))
    assert close(np.concatenate(found[1], axis=1), shown(model.begin(ones(other)), other))


@contextmanager
def faked(
    inputs: Mapping[str, tuple[Any, ...]], outputs: Sequence[str], raw: Mapping[str, Any]
) -> Iterator[Loaded]:
    fake = FakeSession(
        tuple(TensorInfo(name, "int64", shape) for name, shape in inputs.items()),
        tuple(TensorInfo(name, "float32", ("n", "t", 4)) for name in outputs),
        lambda feeds: {},
    )
    lease: Lease[Any] = ledger.acquire(object(), "session", lambda: fake, TOKEN)
    config = ModelConfig("llama", None, None, None, False, None, dict(raw))
    try:
        yield Loaded("a/model", config, cast(Tokenizer, None), {"model": lease}, "fp32", "the test")
    finally:
        lease.release()


PAST = {"past_key_values.0.key": ("batch", "num_heads", "past_length", "head_dim")}
TEXT = {"input_ids": ("batch", "tokens")}


@pytest.mark.parametrize(
    ("inputs", "outputs", "raw", "says"),
    [
        (TEXT | {"pixel_values": ("n", 3)}, ["logits"], {}, "pixel_values"),
        (TEXT | {"encoder_hidden_states": ("n", 3)}, ["logits"], {}, "encoder_hidden_states"),
        ({"attention_mask": ("batch", "tokens")}, ["logits"], {}, "attention_mask"),
        (TEXT | PAST, ["logits"], {"num_attention_heads": 2, "hidden_size": 8}, "gives no present"),
        (TEXT | PAST, ["logits", "present.0.key"], {}, "does not say how large"),
    ],
)
def test_a_graph_that_is_no_causal_model_is_refused(
    inputs: Mapping[str, tuple[Any, ...]], outputs: list[str], raw: Mapping[str, Any], says: str
) -> None:
    with (
        faked(inputs, outputs, raw) as made,
        pytest.raises(UnsupportedModelError, match=says) as caught,
    ):
        Decoder(made)
    assert caught.value.model == "a/model"


def test_sizes_that_the_graph_does_not_say_are_the_configs() -> None:
    raw = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    with faked(TEXT | PAST, ["logits", "present.0.key"], raw) as made:
        (one,) = Decoder(made).carried
    assert (one.shape, one.axis) == ((1, 2, 1, 8), 2)


def test_after_the_model_was_given_back_nothing_begins() -> None:
    owner = Owner()
    model = Decoder(loaded("gen-llama", owner))
    owner.release()
    with pytest.raises(PipelineDisposedError):
        model.begin(np.ones((1, 3), np.int64))
