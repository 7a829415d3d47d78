"""Text that is told token by token is the text of all tokens, and splits no character."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from ebbtide.models.native_tokenizer import cleaned
from ebbtide.models.text_stream import TextStream

MODELS = Path(__file__).parent.parent / "models"
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
FOLDERS = sorted(MODELS.glob("gen-*/tokenizer.json"))
DIFFERENT = list(
    {
        hashlib.sha256(
            path.read_bytes() + (path.parent / "tokenizer_config.json").read_bytes()
        ).digest(): path.parent.name
        for path in reversed(FOLDERS)
    }.values()
)
"""One model for each tokenizer that there is."""

TEXTS = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "tide",
                " the harbour wall",
                " ",
                "   ",
                "\n",
                "\t",
                ".",
                " .",
                " , ",
                " ?",
                "don't",
                " n't",
                " 's",
                " '",
                "' ",
                " 've",
                " n",
                "n't",
                "'re",
                "ÅNGSTRÖM",
                "é",
                "e\u0301",
                "潮汐",
                "바다",
                "🌊",
                "👩\u200d🚀",
                "🇮🇸",
                "👍🏽",
                "שלום",
                "\u200b",
                UNFINISHED,
                UNFINISHED * 5,
                "<s>",
                "</s>",
            ]
        ),
        st.text(max_size=4),
    ),
    max_size=12,
).map("".join)

Decode = Callable[[Sequence[int]], str]


@functools.cache
def of_model(name: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(MODELS / name / "tokenizer.json"))


@functools.cache
def with_bytes() -> tokenizers.Tokenizer:
    """As of Llama 2 and Gemma: words with a mark for the space, and a token for each byte."""
    words = [
        "<unk>",
        *(f"<0x{number:02X}>" for number in range(256)),
        "▁",
        "t",
        "i",
        "d",
        "e",
        "▁t",
    ]
    native = tokenizers.Tokenizer(
        models.BPE(
            {word: number for number, word in enumerate(words)},
            [("▁", "t")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    native.pre_tokenizer = pre_tokenizers.Metaspace()
    native.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return native


def told(
    decode: Decode, ids: Sequence[int], before: Sequence[int] = (), *, cleans: bool = False
) -> list[str]:
    stream = TextStream(decode, before, cleans=cleans)
    pieces = [*(stream.put(one) for one in ids), stream.end()]
    assert stream.text == "".join(pieces)
    return pieces


def check(decode: Decode, ids: Sequence[int], *, cleans: bool = False) -> None:
    whole = decode(ids)
    pieces = told(decode, ids, cleans=cleans)
    assert "".join(pieces) == whole


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", DIFFERENT)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_the_pieces_are_the_text_of_all_tokens(name: str, special: bool, text: str) -> None:
    native = of_model(name)
    check(
        lambda ids: native.decode(list(ids), skip_special_tokens=special), native.encode(text).ids
    )


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
@example(text="é" * 12)
@example(text="🌊" * 6)
def test_so_they_are_where_characters_are_spelled_in_bytes(text: str) -> None:
    native = with_bytes()
    check(native.decode, native.encode(text).ids)


@settings(max_examples=200, deadline=None)
@given(text=TEXTS, name=st.sampled_from(DIFFERENT))
@example(text="x = 's'", name="gen-gpt2")
@example(text="do n't", name="gen-gpt2")
@example(text="we 've ' .", name="gen-gpt2")
@example(text="tide ' n't", name="gen-longt5")
def test_so_they_are_where_spaces_before_punctuation_are_taken_out(text: str, name: str) -> None:
    native = of_model(name)

    def decode(ids: Sequence[int]) -> str:
        return cleaned(native.decode(list(ids)))

    check(decode, native.encode(text).ids, cleans=True)


@settings(max_examples=150, deadline=None)
@given(before=TEXTS, text=TEXTS, name=st.sampled_from(DIFFERENT))
def test_what_came_before_is_not_told_again(before: str, text: str, name: str) -> None:
    native = of_model(name)
    first, ids = native.encode(before).ids, native.encode(text, add_special_tokens=False).ids
    known = native.decode(first)
    whole = native.decode([*first, *ids])
    assert "".join(told(native.decode, ids, first)) == whole[len(known) :]


@settings(max_examples=300, deadline=None)
@given(before=TEXTS, text=TEXTS)
@example(before="潮汐潮汐潮汐", text="潮汐")
def test_nor_is_it_where_characters_are_spelled_in_bytes(before: str, text: str) -> None:
    native = with_bytes()
    first, ids = native.encode(before).ids, native.encode(text).ids
    ids = ids[1:] if ids[:1] == [native.token_to_id("▁")] else ids  # goes on in the same word
    known = native.decode(first)
    whole = native.decode([*first, *ids])
    assert "".join(told(native.decode, ids, first)) == whole[len(known) :]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("ab", ["a", "b", ""]),
        ("é", ["", "é", ""]),
        ("🌊!", ["", "", "", "🌊", "!", ""]),
    ],
)
def test_a_character_comes_with_its_last_token(text: str, pieces: list[str]) -> None:
    def decode(ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    assert told(decode, list(text.encode())) == pieces


def test_what_is_half_a_character_at_the_end_is_told_at_the_end() -> None:
    def decode(ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    assert told(decode, [*b"tide", 0xE2, 0x82]) == ["t", "i", "d", "e", "", "", UNFINISHED]


def test_bytes_that_will_never_be_a_character_are_not_waited_for_for_ever() -> None:
    def decode(ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    stream = TextStream(decode)
    for _ in range(40):
        stream.put(0xFF)
    assert 20 <= len(stream.text) < 40
    stream.end()
    assert stream.text == UNFINISHED * 40
    assert stream.put(ord("!")) == "!"


def test_a_step_decodes_only_the_newest_tokens() -> None:
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return "".join(map(chr, ids))

    told(decode, [ord("x")] * 500, [ord("y")] * 500)
    assert longest <= 20
