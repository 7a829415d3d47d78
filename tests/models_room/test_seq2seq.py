"""A decoder beside an encoder goes on from what was read; languages are known by their codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import pytest

from ebbtide.errors import InputError, PipelineDisposedError, UnsupportedModelError
from ebbtide.memory.ledger import Lease, ledger
from ebbtide.models.config import ModelConfig
from ebbtide.models.decoder import Steps
from ebbtide.models.loading import Loaded
from ebbtide.models.seq2seq import STEMS, Seq2Seq
from ebbtide.models.tokenizer import Batch, Tokenizer
from ebbtide.runtime import TensorInfo
from ebbtide.runtime.fake import FakeSession

from .loaded import TOKEN, Owner, close, drawn, each_once, loaded, shown

NAMES = ["gen-t5", "gen-bart", "gen-marian"]


Models = Callable[[str], Seq2Seq]


def load(name: str, owner: Owner) -> Seq2Seq:
    return Seq2Seq(loaded(name, owner, stems=STEMS))


@pytest.fixture(scope="module")
def models() -> Iterator[Models]:
    with each_once(load) as made:
        yield made


def batch(texts: Sequence[Sequence[int]]) -> Batch:
    """Texts, padded at the right."""
    width = max(map(len, texts))
    ids = np.zeros((len(texts), width), np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
        mask[row, : len(text)] = 1
    return Batch(ids, mask, np.zeros_like(ids))


READ = [drawn(1, length, seed=length)[0].tolist() for length in (7, 3, 5)]


def begun(model: Seq2Seq, texts: Sequence[Sequence[int]] = READ, *, cache: bool = True) -> Steps:
    encoded = model.encode(batch(texts), TOKEN)
    return model.begin(np.ones((len(texts), 1), np.int64), encoded, cache=cache)


@pytest.mark.parametrize("name", NAMES)
def test_in_one_go_in_pieces_and_without_a_cache_the_logits_are_the_same(
    models: Models, name: str
) -> None:
    model, ids = models(name), drawn(3, 8)
    whole = shown(begun(model), ids)
    assert np.ptp(whole) > 0.01
    assert close(shown(begun(model), ids, [1] * 7), whole)
    assert close(shown(begun(model), ids, [3, 1]), whole)
    assert close(shown(begun(model, cache=False), ids, [3, 1]), whole)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_read_matters_and_its_padding_does_not(models: Models, name: str) -> None:
    model, ids = models(name), drawn(3, 6)
    together = shown(begun(model), ids, [1] * 5)
    for row, text in enumerate(READ):
        alone = shown(begun(model, [text]), ids[row : row + 1])
        assert close(alone, together[row : row + 1])
    assert not close(
        shown(begun(model, [READ[0]]), ids[:1]), shown(begun(model, [READ[1]]), ids[:1])
    )


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_rows_take_what_was_read_with_them(models: Models, name: str, cache: bool) -> None:
    model, ids, then = models(name), drawn(3, 4), drawn(4, 3, seed=1)
    order = np.array([2, 0, 0, 1])
    steps = begun(model, cache=cache)
    shown(steps, ids)
    steps.select(order)
    found = shown(steps, then, [1, 1])
    expected = shown(
        begun(model, [READ[row] for row in order]), np.concatenate([ids[order], then], axis=1)
    )
    # The longest text that was read sets the padding, which changes nothing.
    assert close(found, expected[:, 4:])


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_what_was_taken_back_was_never_seen(models: Models, name: str, cache: bool) -> None:
    model, ids = models(name), drawn(3, 8)
    steps = begun(model, cache=cache)
    shown(steps, ids[:, :4])
    shown(steps, drawn(3, 3, seed=1))
    steps.crop(4)
    assert close(shown(steps, ids[:, 4:], [1]), shown(begun(model), ids)[:, 4:])


def test_the_bytes_of_what_was_read_are_told_too(models: Models) -> None:
    model, told = models("gen-t5"), list[int]()
    encoded = model.encode(batch(READ), TOKEN)
    steps = model.begin(np.ones((3, 1), np.int64), encoded, held=told.append)
    for place in range(3):
        steps.forward(drawn(3, 3)[:, place : place + 1], TOKEN)
    one_place = 2 * 2 * 3 * 4 * 8 * 4  # layers, keys and values, rows, heads, size of one, bytes
    assert told == [one_place * (7 + new) for new in (1, 2, 3)]
    steps.close()
    assert told[-1] == 0


def test_the_encoder_is_fed_only_what_it_takes(models: Models) -> None:
    encoded = models("gen-t5").encode(batch(READ), TOKEN)
    assert set(encoded) == {"encoder_hidden_states", "encoder_attention_mask"}
    assert encoded["encoder_hidden_states"].shape == (3, 7, 32)
    assert encoded["encoder_attention_mask"].sum(axis=1).tolist() == [7, 3, 5]


def test_after_the_model_was_given_back_nothing_is_read() -> None:
    owner = Owner()
    model = load("gen-t5", owner)
    owner.release()
    with pytest.raises(PipelineDisposedError):
        model.encode(batch(READ), TOKEN)


@contextmanager
def faked(encoder_gives: str, dtype: str = "fp32") -> Iterator[Loaded]:
    def fake(inputs: Sequence[str], output: str) -> FakeSession:
        return FakeSession(
            tuple(TensorInfo(name, "int64", ("n", "t")) for name in inputs),
            (TensorInfo(output, "float32", ("n", "t", 4)),),
            lambda feeds: {},
        )

    sessions = {
        STEMS[0]: fake(["input_ids", "attention_mask"], encoder_gives),
        STEMS[1]: fake(["input_ids", "encoder_hidden_states"], "logits"),
    }
    leases: dict[str, Lease[Any]] = {}
    for stem, one in sessions.items():
        leases[stem] = ledger.acquire(object(), "session", lambda one=one: one, TOKEN)  # type: ignore[misc]
    config = ModelConfig("t5", None, None, None, False, None, {})
    try:
        yield Loaded("a/model", config, cast(Tokenizer, None), leases, dtype, "the test")
    finally:
        for lease in leases.values():
            lease.release()


def test_an_encoder_that_gives_no_hidden_states_is_refused() -> None:
    with (
        faked("pooler_output") as made,
        pytest.raises(UnsupportedModelError, match="gives pooler_output, and no last_hidden_state"),
    ):
        Seq2Seq(made)


@pytest.mark.parametrize(
    ("dtype", "shares"), [("fp32", False), ("q8", True), ("fp32, int8", True), ("q4", False)]
)
def test_rows_share_a_scale_where_either_graph_measures_one(dtype: str, shares: bool) -> None:
    with faked("last_hidden_state", dtype) as made:
        assert Seq2Seq(made).shares_scales is shares


# Languages


@pytest.mark.parametrize(
    ("name", "code", "token"),
    [
        ("gen-m2m-100", "de", "__de__"),
        ("gen-m2m-100", "__de__", "__de__"),
        ("gen-mbart", "de_DE", "de_DE"),
    ],
)
def test_a_language_is_known_by_its_code(models: Models, name: str, code: str, token: str) -> None:
    model = models(name)
    assert model.language(code) == model.tokenizer.token_id(token)


def test_the_languages_are_those_that_have_a_token(models: Models) -> None:
    assert set(models("gen-m2m-100").languages()) == {"de", "en", "fr"}
    assert {"de_DE", "en_XX"} <= set(models("gen-mbart").languages())
    assert models("gen-t5").languages() == []


def test_a_language_that_is_not_there_is_refused_with_the_nearest(models: Models) -> None:
    with pytest.raises(InputError, match="Did you mean 'de_DE'") as caught:
        models("gen-mbart").language("de_DD")
    assert caught.value.nearest == "de_DE"


def test_a_token_that_is_no_language_is_none(models: Models) -> None:
    with pytest.raises(InputError):
        models("gen-mbart").language("</s>")


def test_a_model_without_names_for_languages_says_so(models: Models) -> None:
    with pytest.raises(InputError, match="leave src_lang and tgt_lang out"):
        models("gen-marian").language("de")


def test_a_text_is_spoken_in_its_language(models: Models) -> None:
    model = models("gen-m2m-100")
    english, german = model.language("en"), model.language("de")
    assert model.speak([english, 10, 11, 2], german) == [german, 10, 11, 2]
    assert model.speak([10, 11, 2], german) == [10, 11, 2]
