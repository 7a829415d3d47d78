"""Rows of about one length run together, and none is lost or doubled."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from ebbtide.models.batching import RUN_TOKENS, batches

lengths_of = st.lists(st.integers(1, 600), max_size=60)


def padded(plan: list[list[int]], lengths: list[int]) -> int:
    return sum(len(batch) * max(lengths[place] for place in batch) for batch in plan)


@given(lengths_of, st.integers(1, 2000) | st.none(), st.integers(1, 70) | st.none())
def test_every_row_is_in_one_batch(
    lengths: list[int], tokens: int | None, size: int | None
) -> None:
    plan = batches(lengths, size=size, tokens=tokens or 2048)
    assert sorted(place for batch in plan for place in batch) == list(range(len(lengths)))
    assert all(plan)


@given(lengths_of, st.integers(1, 2000))
def test_a_batch_has_no_more_tokens_than_it_may_unless_it_is_one_row(
    lengths: list[int], tokens: int
) -> None:
    for batch in batches(lengths, tokens=tokens):
        assert len(batch) == 1 or padded([batch], lengths) <= tokens


@given(lengths_of, st.integers(1, 70))
def test_a_size_alone_decides_how_many_rows_a_batch_has(lengths: list[int], size: int) -> None:
    plan = batches(lengths, size=size, tokens=1)
    full, rest = divmod(len(lengths), size)
    assert sorted(map(len, plan)) == sorted([size] * full + [rest] * bool(rest))


@given(lengths_of, st.integers(1, 70) | st.none())
def test_batches_do_not_share_a_stretch_of_lengths_and_ties_keep_their_order(
    lengths: list[int], size: int | None
) -> None:
    plan = batches(lengths, size=size)
    in_order = sorted(range(len(lengths)), key=lambda place: (lengths[place], place))
    assert [
        place for batch in sorted(plan, key=in_order_of(lengths)) for place in batch
    ] == in_order


def in_order_of(lengths: list[int]):  # type: ignore[no-untyped-def]
    return lambda batch: (lengths[batch[0]], batch[0])


@settings(max_examples=200)
@given(st.data(), st.integers(1, 6), st.integers(1, 8))
def test_no_other_order_pads_full_batches_less(data: st.DataObject, size: int, count: int) -> None:
    total = size * count
    lengths = data.draw(st.lists(st.integers(1, 500), min_size=total, max_size=total))
    other = data.draw(st.permutations(range(total)))
    cut = [list(other[start : start + size]) for start in range(0, total, size)]
    assert padded(batches(lengths, size=size), lengths) <= padded(cut, lengths)


@given(lengths_of)
def test_no_row_pads_those_before_it_by_more_than_a_run_is_worth(lengths: list[int]) -> None:
    for batch in batches(lengths):
        sizes = [lengths[place] for place in batch]
        for rows, (one, longer) in enumerate(pairwise(sizes), 1):
            assert rows * (longer - one) <= RUN_TOKENS


def test_one_long_text_does_not_make_the_short_ones_long() -> None:
    assert batches([12, 13, 500, 12]) == [[0, 3, 1], [2]]


@given(lengths_of)
def test_the_batch_of_what_came_first_runs_first(lengths: list[int]) -> None:
    firsts = [min(batch) for batch in batches(lengths)]
    assert firsts == sorted(firsts)
