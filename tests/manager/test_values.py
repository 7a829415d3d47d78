"""What may be written for bytes, seconds and counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbtide.errors import InputError
from ebbtide.manager.values import budget_of, count_of, seconds_of, size_of

anything = (
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(max_size=12)
    | st.from_regex(r"\s?\d{0,4}(\.\d)?\s?([kmg]i?b|ms|[smhd])?\s?", fullmatch=True)
    | st.lists(st.integers(), max_size=2)
    | st.complex_numbers()
)


@pytest.mark.parametrize(
    ("given_", "bytes_"),
    [("2 GiB", 2 << 30), ("500 MB", 500_000_000), (12_345, 12_345), (1e9, 10**9), ("2", 2)],
)
def test_a_budget_is_bytes_or_text(given_: Any, bytes_: int) -> None:
    assert budget_of(given_, 1000, True) == bytes_


def test_a_budget_is_a_share_of_the_limit_where_it_is_at_most_one() -> None:
    assert budget_of(0.5, 1000, True) == 500
    assert budget_of(1.0, 1000, False) == 1000


def test_without_a_budget_it_is_most_of_a_group_and_less_of_a_machine() -> None:
    assert budget_of(None, 1000, is_machine=False) == 800
    assert budget_of(None, 1000, is_machine=True) == 600


@pytest.mark.parametrize(
    "given_", [0, 1, -5, 0.0, True, math.nan, math.inf, "much", "", [], "-1 GB"]
)
def test_what_is_no_budget_is_refused_by_name(given_: Any) -> None:
    with pytest.raises(InputError, match="budget takes bytes"):
        budget_of(given_, 1000, True)


@pytest.mark.parametrize(
    ("given_", "seconds"),
    [
        ("30s", 30), ("5m", 300), ("1h", 3600), ("2 d", 172_800), ("250 ms", 0.25), ("7", 7),
        (" 1.5 H ", 5400), ("forever", math.inf), ("Forever ", math.inf), (0, 0), (0.5, 0.5),
        (math.inf, math.inf), (10**400, math.inf),
    ],
)  # fmt: skip
def test_seconds_may_be_written_with_a_unit(given_: Any, seconds: float) -> None:
    assert seconds_of("keep_alive", given_) == seconds


@pytest.mark.parametrize(
    "given_", [-1, -0.1, True, math.nan, "5 years", "", "s", "-3s", "1e3", None]
)
def test_what_is_no_time_is_refused_by_name(given_: Any) -> None:
    with pytest.raises(InputError, match="keep_alive takes seconds") as caught:
        seconds_of("keep_alive", given_)
    assert caught.value.value == given_ or given_ != given_


def test_a_count_is_whole_and_at_least_one() -> None:
    assert count_of("max_pipelines", None) is None
    assert count_of("max_pipelines", 1) == 1
    for wrong in (0, -1, 1.0, True, "3"):
        with pytest.raises(InputError, match="max_pipelines takes a whole number"):
            count_of("max_pipelines", wrong)


def understood(function: Callable[..., Any], *about: Any) -> Any:
    """What a function makes of a value; None where it refuses it, as it should."""
    with suppress(InputError):
        return function(*about)
    return None


@given(anything)
def test_whatever_is_given_it_is_understood_or_refused(value: Any) -> None:
    seconds = understood(seconds_of, "x", value)
    assert seconds is None or (type(seconds) is float and seconds >= 0)
    for found in (understood(size_of, "x", value), understood(count_of, "x", value)):
        assert found is None or (type(found) is int and found >= 1)
    budget = understood(budget_of, value, 1 << 40, True)
    assert budget is None or (type(budget) is int and budget >= 0)


@given(st.integers(0, 10**11), st.sampled_from([("ms", 0.001), ("s", 1), ("m", 60), ("h", 3600)]))
def test_a_number_and_a_unit_are_multiplied(number: int, unit: tuple[str, float]) -> None:
    assert seconds_of("x", f"{number}{unit[0]}") == number * unit[1]
