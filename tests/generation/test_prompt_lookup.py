"""A prompt lookup guesses what came before, waits where it is wrong, and changes no text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ebbtide.cancellation import CancelToken
from ebbtide.generation.config import GenerationConfig
from ebbtide.generation.loop import write
from ebbtide.generation.speculation import PromptLookup

VOCABULARY = 8


def guess(lookup: PromptLookup, *ids: int) -> list[int]:
    return lookup(np.array(ids, np.int64)).tolist()


class Model:
    """Its logits depend on the last tokens of a row alone, so that what it says repeats soon."""

    takes_back = True

    def __init__(self, seed: int, memory: int) -> None:
        self.seed = seed
        self.memory = memory
        self.row: list[int] = []
        self.steps = 0

    @property
    def length(self) -> int:
        return len(self.row)

    def _logits(self) -> NDArray[np.float32]:
        known = bytes([self.seed, *self.row[-self.memory :]])
        drawn = hashlib.shake_128(known).digest(4 * VOCABULARY)
        return (np.frombuffer(drawn, "<u4") / 2**32).astype(np.float32)

    def forward(
        self, ids: NDArray[np.int64], token: CancelToken, *, last: bool = True
    ) -> NDArray[np.float32]:
        self.steps += 1
        found = []
        for one in ids[0].tolist():
            self.row.append(one)
            found.append(self._logits())
        return np.stack(found)[None, -1:] if last else np.stack(found)[None]

    def select(self, rows: NDArray[np.int64]) -> None:
        raise AssertionError("there is one row")

    def crop(self, length: int) -> None:
        assert 0 < length < len(self.row)
        del self.row[length:]

    def close(self) -> None:
        raise AssertionError("who began it closes it")


def text(model: Model, prompt: Sequence[int], new: int, lookup: PromptLookup | None) -> list[int]:
    config = GenerationConfig.of({}, {"max_new_tokens": new, "eos_token_id": [VOCABULARY - 1]})
    ids = np.array([prompt], np.int64)
    token = CancelToken("test")
    found = write(model, ids, config, token=token, last_length=len(prompt) + new, draft=lookup)
    return [int(one.ids[0]) for one in found]


def test_it_guesses_what_came_after_the_same_tokens() -> None:
    assert guess(PromptLookup(), 9, 1, 2, 3, 4, 5, 6, 1, 2, 3) == [4, 5, 6, 1, 2, 3]


def test_it_guesses_no_more_than_it_may() -> None:
    assert guess(PromptLookup(most=2), 9, 1, 2, 3, 4, 5, 6, 1, 2, 3) == [4, 5]


def test_the_newest_of_several_places_is_taken() -> None:
    assert guess(PromptLookup(most=1), 1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3) == [5]


def test_the_longest_run_is_taken_before_a_newer_one() -> None:
    assert guess(PromptLookup(most=1), 1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3) == [4]


def test_two_tokens_are_the_fewest_that_have_to_be_the_same() -> None:
    assert guess(PromptLookup(most=1), 7, 2, 3, 5, 1, 2, 3) == [5]
    assert guess(PromptLookup(), 7, 2, 3, 5, 1, 9, 3) == []


def test_a_run_may_overlap_itself() -> None:
    assert guess(PromptLookup(most=3), 4, 4, 4) == [4]
    assert guess(PromptLookup(most=3), 1, 2, 1, 2, 1, 2) == [1, 2]


@pytest.mark.parametrize("ids", [(1,), (1, 2), (1, 1), (1, 2, 3, 4)])
def test_where_nothing_repeats_it_guesses_nothing(ids: tuple[int, ...]) -> None:
    assert guess(PromptLookup(), *ids) == []


def test_it_guesses_fewer_after_errors_and_then_waits() -> None:
    lookup = PromptLookup(most=8)
    # Each call knows one token more, so all that was guessed before was wrong.
    sizes = [
        len(guess(lookup, 1, 2, *range(10, 30), *range(100, 100 + more), 1, 2))
        for more in range(16)
    ]
    assert sizes[:13] == [8, 4, 2, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]


def test_it_guesses_more_again_after_what_was_right() -> None:
    known = list(range(1, 60))
    lookup = PromptLookup(most=8)
    for more in range(2):
        guess(lookup, *known, *range(100, 100 + more), 1, 2)
    ids, sizes = [*known, 100, 101, 1, 2], []
    for _ in range(4):
        found = guess(lookup, *ids)
        sizes.append(len(found))
        ids += known[ids[-1] : ids[-1] + len(found) + 1]
    assert sizes == [2, 4, 8, 8]


def test_what_repeats_is_written_in_fewer_steps() -> None:
    model = Model(seed=1, memory=1)
    found = text(model, [1, 2], 60, PromptLookup())
    assert len(found) == 60
    assert model.steps < 40


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 255),
    memory=st.integers(1, 5),
    prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20),
    new=st.integers(1, 50),
    most=st.integers(1, 12),
    longest=st.integers(2, 5),
)
def test_what_is_written_is_the_same_with_it_and_without(
    seed: int, memory: int, prompt: list[int], new: int, most: int, longest: int
) -> None:
    plain, quick = Model(seed, memory), Model(seed, memory)
    expected = text(plain, prompt, new, None)
    assert text(quick, prompt, new, PromptLookup(most, longest)) == expected
    assert quick.steps <= plain.steps
    assert quick.length <= len(prompt) + new - 1


@settings(max_examples=200, deadline=None)
@given(
    ids=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    most=st.integers(1, 12),
)
def test_a_guess_is_always_what_stands_behind_the_same_tokens(ids: list[int], most: int) -> None:
    found = guess(PromptLookup(most), *ids)
    assert len(found) <= most
    size = 3 if any(ids[at : at + 3] == ids[-3:] for at in range(len(ids) - 3)) else 2
    tail = ids[-size:]
    ends = [at + size for at in range(len(ids) - size) if ids[at : at + size] == tail]
    long = [end for end in ends if end + most <= len(ids)]
    start = long[-1] if long else ends[0] if ends else len(ids)
    assert found == ids[start : start + most]
