"""A long text is cut before it is tokenised, and the window's ids are those of the whole text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import ebbtide
from ebbtide.models import native_tokenizer as room
from ebbtide.models.tokenizer import Tokenizer

from .loaded import MODELS, tokenizer_of

WINDOW = 16
FIRST_BOUND = 48
"""Characters: small, so that cuts fall everywhere and the window's end lies near them."""

PIECES = [
    "tide",
    " harbour",
    " gulls above the wall",
    "don't",
    "it's ",
    " ",
    " " * 7,
    " " * 40,
    "\n",
    " \n\n\t ",
    "\r\n",
    "e\u0301",
    "a\u0323\u0307",
    "\u0301" * 9,
    "ÅNGSTRÖM",
    "ﬁ",
    "🌊",
    "👩\u200d🚀",
    "🇮🇸🇮🇸",
    "👍🏽",
    "潮汐",
    "바다",
    "\u1107\u1161\u1103\u1161",
    "שלום ",
    "السلام",
    "x" * 200,
    "waterwater" * 20,
    "1894",
    "12.50",
    ",",
    "...!?",
    "--",
    "\u00a0",
    "\u200b",
    "\u0000",
    "\ufffd",
]


def plain(folder: Path, limit: int, side: str = "right") -> tokenizers.Tokenizer:
    """The library alone, on the whole text, with its own truncation."""
    native = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    native.no_padding()
    native.no_truncation()
    native.enable_truncation(max_length=limit, direction=side)
    return native


def copied(model: str, folder: Path, **rules: Any) -> Path:
    """A model's folder without its graphs, whose tokenizer_config.json says ``rules`` too."""
    shutil.copytree(MODELS / model, folder, ignore=shutil.ignore_patterns("*.onnx*"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **rules}))
    return folder


@pytest.fixture(scope="module", params=["tiny-bert", "tiny-roberta"])
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=["right", "left"])
def side(request: pytest.FixtureRequest) -> str:
    return request.param


@contextmanager
def small_bound() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "_CHARACTERS_A_TOKEN", (FIRST_BOUND - 1024) // WINDOW)
        yield


@pytest.fixture(scope="module")
def pair(
    model: str, side: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Tokenizer, tokenizers.Tokenizer]]:
    folder = copied(
        model,
        tmp_path_factory.mktemp("cut") / model,
        model_max_length=WINDOW,
        truncation_side=side,
    )
    with tokenizer_of(folder) as made:
        assert made.limit == WINDOW
        yield made, plain(folder, WINDOW, side)


def agree(pair: tuple[Tokenizer, tokenizers.Tokenizer], text: str) -> None:
    made, whole = pair
    expected = whole.encode(text)
    with small_bound():
        assert made.ids(text) == expected.ids
        batch = made.batch([text])
    assert batch.input_ids.tolist() == [expected.ids]
    assert batch.token_type_ids.tolist() == [expected.type_ids]


texts = st.builds(
    lambda pieces, times, tail: "".join(pieces) * times + "".join(tail),
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=10),
    st.integers(1, 40),
    st.lists(st.sampled_from(PIECES), max_size=4),
)

many = settings(
    deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@many
@given(text=texts)
def test_the_cut_text_gives_the_ids_of_the_whole(pair: Any, text: str) -> None:
    assume(len(text) > FIRST_BOUND)
    agree(pair, text)


@many
@given(
    text=st.text(
        st.sampled_from("ab '.-\n\t1é\u0301潮🌊\u200d\u00a0s") | st.characters(codec="utf-8"),
        min_size=FIRST_BOUND + 1,
        max_size=400,
    )
)
def test_any_characters_at_the_cut_give_the_ids_of_the_whole(pair: Any, text: str) -> None:
    agree(pair, text)


SPECIAL = ["[MASK]", "[SEP]", "<mask>", "</s>", " <mask>", "   <mask>", "[MASK", "<ma"]


@many
@given(
    text=st.builds(
        lambda pieces, times: "".join(pieces) * times,
        st.lists(st.sampled_from([*SPECIAL, " ", "tide", ".", "xy"]), min_size=1, max_size=9),
        st.integers(1, 40),
    )
)
def test_special_tokens_at_the_cut_give_the_ids_of_the_whole(pair: Any, text: str) -> None:
    assume(len(text) > FIRST_BOUND)
    agree(pair, text)


@pytest.mark.parametrize("special", [*SPECIAL, "[MASK]   ", "<mask>  "])
def test_a_special_token_anywhere_about_the_cut_gives_the_ids_of_the_whole(
    pair: Any, side: str, special: str
) -> None:
    """The window's end and the cut are moved through every place in and before the token."""
    for spaces in range(0, 24, 2):
        for words in range(8, 24):
            parts = [" a" * words, " " * spaces, special, " sea" * 40]
            agree(pair, "".join(parts if side == "right" else reversed(parts)))


def test_the_cut_path_is_really_taken(model: str, pair: Any) -> None:
    made, _ = pair
    native = made.lease.value
    lengths: list[int] = []
    encode = native._encode

    def watched(texts: Sequence[str]) -> Any:
        lengths.extend(map(len, texts))
        return encode(texts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_encode", watched)
        agree(pair, "a b c d e f g h " * 100)
        assert lengths == [FIRST_BOUND] * 2
        lengths.clear()
        agree(pair, " " * 2000 + "a b c d e f g h " * 100 + " " * 2000)
        assert lengths[:2] == [FIRST_BOUND, 4 * FIRST_BOUND]


# The bounds as they are


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("unit", ["tide ", "waterwater" * 30 + " ", " " * 900 + "sea", "潮汐"])
def test_a_long_text_is_cut_with_the_bounds_as_they_are(
    tmp_path: Path, unit: str, side: str
) -> None:
    folder = copied("tiny-bert", tmp_path / "model", truncation_side=side)
    text = unit * (60_000 // len(unit))
    with tokenizer_of(folder) as made:
        assert made.ids(text) == plain(folder, 512, side).encode(text).ids


def test_a_text_that_never_fills_the_window_is_refused_beyond_the_longest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "LONGEST_TEXT", 20_000)
    with tokenizer_of("tiny-bert") as made:
        assert made.ids(" " * 20_000) == made.ids("")
        with pytest.raises(ebbtide.InputError, match="20,001 characters is too long") as caught:
            made.ids(" " * 20_001)
        assert caught.value.value == 20_001


def test_a_model_without_a_window_refuses_a_text_beyond_the_longest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = copied("tiny-bert", tmp_path / "model", model_max_length=int(1e30))
    config = json.loads((folder / "config.json").read_text())
    del config["max_position_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(room, "LONGEST_TEXT", 2_000)
    with tokenizer_of(folder) as made:
        assert made.limit is None
        assert len(made.ids("a " * 1000)) == 1002
        with pytest.raises(ebbtide.InputError, match="no window"):
            made.ids("a " * 1001)


# Smaller windows than the model's


@many
@given(
    limit=st.integers(2, 20),
    text=st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
    side=st.sampled_from(["right", "left"]),
)
def test_a_smaller_window_gives_what_the_library_truncates_to(
    both_sides: Any, limit: int, text: str, side: str
) -> None:
    folder, made = both_sides[side]
    found = made.ids(text, limit=limit)
    assert found == plain(folder, limit, side).encode(text).ids


@pytest.fixture(scope="module")
def both_sides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folders = {
        side: copied("tiny-bert", tmp_path_factory.mktemp("side") / side, truncation_side=side)
        for side in ("right", "left")
    }
    with tokenizer_of(folders["right"]) as right, tokenizer_of(folders["left"]) as left:
        yield {"right": (folders["right"], right), "left": (folders["left"], left)}


# Padding


def test_padding_on_the_left_moves_the_padding_and_nothing_else(tmp_path: Path) -> None:
    folder = copied("tiny-bert", tmp_path / "model", padding_side="left")
    given_texts = ["tide", "a much longer sentence", ""]
    with tokenizer_of(folder) as left, tokenizer_of("tiny-bert") as right:
        one, other = left.batch(given_texts), right.batch(given_texts)
        for row, text in enumerate(given_texts):
            ids = right.ids(text)
            padding = [0] * (other.input_ids.shape[1] - len(ids))
            assert one.input_ids[row].tolist() == padding + ids
            assert other.input_ids[row].tolist() == ids + padding
            assert one.attention_mask[row].tolist() == padding + [1] * len(ids)


@pytest.mark.parametrize("model_name", ["tiny-bert", "tiny-roberta"])
def test_padding_is_done_with_the_models_own_token(model_name: str) -> None:
    with tokenizer_of(model_name) as made:
        batch = made.batch(["", "a longer one"])
    padding = {"tiny-bert": 0, "tiny-roberta": 1}[model_name]
    assert (batch.input_ids[batch.attention_mask == 0] == padding).all()
    assert (batch.attention_mask == 0).any()


@pytest.mark.parametrize(
    ("rules", "config", "padding"),
    [
        ({"pad_token": {"content": "[MASK]"}}, {}, 4),
        ({"pad_token": "[NOT A TOKEN]"}, {"pad_token_id": 7}, 7),
        ({"pad_token": None}, {"pad_token_id": 9}, 9),
        ({"pad_token": None}, {"pad_token_id": None}, 0),
        ({"pad_token": None}, {"pad_token_id": -1}, 0),
    ],
)
def test_the_padding_token_comes_from_the_rules_then_from_the_config(
    tmp_path: Path, rules: dict[str, Any], config: dict[str, Any], padding: int
) -> None:
    folder = copied("tiny-bert", tmp_path / "model", **rules)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    with tokenizer_of(folder) as made:
        assert made.batch(["", "tide"]).input_ids[0, -1] == padding


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "eos", "max", "mean_sqrt_len"])
def test_the_side_of_the_padding_changes_no_pooling(
    tmp_path: Path, padding_side: str, pooling: Any
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODELS / "tiny-distilbert", folder)
    path = folder / "tokenizer_config.json"
    rules = {**json.loads(path.read_text()), "padding_side": padding_side}
    path.write_text(json.dumps(rules))
    batch = ["tide", "a much longer sentence about the sea", ""]
    with ebbtide.pipeline("embeddings", folder) as pipe:
        together = pipe(batch, pooling=pooling)
        assert together.shape == (3, 32)
        mask = pipe.tokenizer.batch(batch).attention_mask
        assert mask[0, 0] == (0 if padding_side == "left" else 1)


# Its other rules, and its end


@pytest.mark.parametrize(
    ("length", "positions", "limit"),
    [
        (100, 512, 100),
        (512, 100, 100),
        (int(1e30), 512, 512),
        (float("inf"), 512, 512),
        (None, 512, 512),
        ("512", 300, 300),
        (-1, 300, 300),
        (None, None, None),
    ],
)
def test_the_window_is_the_smaller_of_what_rules_and_config_say(
    tmp_path: Path, length: Any, positions: Any, limit: int | None
) -> None:
    folder = copied("tiny-bert", tmp_path / "model", model_max_length=length)
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), "max_position_embeddings": positions}
    path.write_text(json.dumps(config))
    with tokenizer_of(folder) as made:
        assert made.limit == limit


def test_the_truncation_and_padding_saved_in_the_file_are_not_applied(tmp_path: Path) -> None:
    folder = copied("tiny-bert", tmp_path / "model")
    native = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    native.enable_truncation(max_length=4)
    native.enable_padding(length=8)
    native.save(str(folder / "tokenizer.json"))
    with tokenizer_of(folder) as made, tokenizer_of("tiny-bert") as source:
        assert made.ids("one two three four") == source.ids("one two three four")


def test_equal_content_is_held_once_and_different_rules_are_held_apart(tmp_path: Path) -> None:
    same = copied("tiny-bert", tmp_path / "same")
    other = copied("tiny-bert", tmp_path / "other", model_max_length=20)
    with tokenizer_of("tiny-bert") as one, tokenizer_of(same) as two, tokenizer_of(other) as three:
        assert one.lease.value is two.lease.value
        assert one.lease.value is not three.lease.value


def test_decode_turns_ids_back_into_text(tiny_bert: Path) -> None:
    with tokenizer_of(tiny_bert) as made:
        ids = made.ids("the tide")
        assert made.decode(ids) == "the tide"
        assert made.decode(ids, skip_special_tokens=False) == "[CLS] the tide [SEP]"


def test_a_tokenizer_ends_with_its_pipeline(tiny_bert: Path) -> None:
    with ebbtide.pipeline("embeddings", tiny_bert) as pipe:
        tokenizer = pipe.tokenizer
    for use in (
        lambda: tokenizer.ids("tide"),
        lambda: tokenizer.batch(["tide"]),
        lambda: tokenizer.decode([1]),
        lambda: tokenizer.limit,
    ):
        with pytest.raises(ebbtide.PipelineDisposedError, match="disposed with it"):
            use()
