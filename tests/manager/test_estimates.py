"""What pipelines were measured to take, from one run of a program to the next."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebbtide.manager import estimates
from ebbtide.manager.estimates import Estimates, Known

KNOWN = Known(100, 10, 150, 40, 1.5, 0.25)
RUNS = {"graph": {"entries": [[128, 64, 30_000_000]]}}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "estimates.json"


def written(file: Path, **changes: Any) -> None:
    """A sound file, but for what is changed of its only pipeline."""
    known = {
        "awake": 100,
        "asleep": 10,
        "peak": 150,
        "mapped": 40,
        "reload_seconds": 1.5,
        **changes,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"format": 1, "known": {"a": known}, "runs": RUNS}))


def test_what_was_learned_is_known_to_the_next_program(file: Path) -> None:
    first = Estimates(file)
    assert first.of("a") is None
    first.learn("a", KNOWN)
    first.save(RUNS)
    found = Estimates(file).of("a")
    assert found is not None
    assert (found.awake, found.asleep, found.peak, found.mapped) == (100, 10, 150, 40)
    assert (found.reload_seconds, found.wake_seconds) == (1.5, 0.25)
    assert found.seen > 0
    assert Estimates(file).runs == RUNS


def test_nothing_is_written_where_nothing_is_new(file: Path) -> None:
    Estimates(file).save({})
    assert not file.exists()
    first = Estimates(file)
    first.learn("a", KNOWN)
    first.save({})
    file.unlink()
    first.save({})
    assert not file.exists()


def test_without_a_file_nothing_is_kept_and_all_is_known() -> None:
    kept = Estimates(None)
    kept.learn("a", KNOWN)
    kept.save(RUNS)
    assert kept.of("a") is not None
    assert kept.runs == {}


def test_what_two_programs_learned_is_kept_of_both(file: Path) -> None:
    one, two = Estimates(file), Estimates(file)
    assert one.of("a") is two.of("b") is None
    one.learn("a", KNOWN)
    two.learn("b", KNOWN)
    one.save({"graph": RUNS["graph"]})
    two.save({"other": RUNS["graph"]})
    last = Estimates(file)
    assert last.of("a") is not None
    assert last.of("b") is not None
    assert set(last.runs) == {"graph", "other"}


def test_what_was_seen_later_is_kept_whoever_writes_last(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(estimates.time, "time", lambda: now)
    first = Estimates(file)
    first.learn("a", KNOWN)
    first.save({})
    stale = Estimates(file)
    stale.of("a")
    now = 2000.0
    newer = Estimates(file)
    newer.learn("a", Known(77, 10, 150, 40, 1.5))
    newer.save({})
    stale.learn("b", KNOWN)
    stale.save({})
    found = Estimates(file).of("a")
    assert found is not None
    assert found.awake == 77


def test_two_managers_of_one_program_write_each_a_file_of_its_own(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One writes while the other has written and not renamed yet."""
    first, second = Estimates(file), Estimates(file)
    first.learn("a", KNOWN)
    second.learn("b", KNOWN)
    rename, names = Path.rename, []

    def renamed(path: Path, target: Path) -> Path:
        names.append(path.name)
        if len(names) == 1:
            second.save({})
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renamed)
    first.save({})
    assert len(set(names)) == 2
    assert Estimates(file).of("a") is not None
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_only_so_many_are_kept_the_newest(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "MOST", 10)
    clock = iter(range(1, 100))
    monkeypatch.setattr(estimates.time, "time", lambda: float(next(clock)))
    kept = Estimates(file)
    for number in range(25):
        kept.learn(f"m{number}", KNOWN)
    kept.save({f"g{number}": RUNS["graph"] for number in range(25)})
    found = json.loads(file.read_text())
    assert sorted(found["known"]) == sorted(f"m{number}" for number in range(15, 25))
    assert set(found["runs"]) == {f"g{number}" for number in range(15, 25)}


def test_what_cannot_be_written_is_said_and_leaves_nothing_behind(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, target: Path) -> Path:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    kept = Estimates(file)
    kept.learn("a", KNOWN)
    with caplog.at_level(logging.INFO, "ebbtide.manager"):
        kept.save({})
    assert "No space left" in caplog.text
    assert list(file.parent.iterdir()) == []


def test_a_sound_file_is_read(file: Path) -> None:
    written(file)
    assert Estimates(file).of("a") is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"awake": -1},
        {"awake": 1.5},
        {"awake": True},
        {"awake": 10**40},
        {"asleep": 101},
        {"mapped": None},
        {"reload_seconds": -1.0},
        {"reload_seconds": float("inf")},
        {"reload_seconds": float("nan")},
        {"wake_seconds": 10**400},
        {"seen": "today"},
        {"unknown": 1},
    ],
)
def test_a_file_with_a_figure_that_cannot_be_is_ignored(
    file: Path, changes: dict[str, Any]
) -> None:
    written(file, **changes)
    assert Estimates(file).of("a") is None
    assert Estimates(file).runs == {}


@pytest.mark.parametrize(
    "runs",
    [{"g": {}}, {"g": {"entries": [[1, 2]]}}, {"g": {"entries": [["a", 1, 2]]}}, [], {"g": 5}],
)
def test_a_file_with_runs_that_cannot_be_is_ignored(file: Path, runs: object) -> None:
    written(file)
    file.write_text(json.dumps({**json.loads(file.read_text()), "runs": runs}))
    assert Estimates(file).runs == {}
    assert Estimates(file).of("a") is None


def test_a_file_of_another_format_or_too_long_is_ignored(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(file)
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
    assert Estimates(file).of("a") is None
    written(file)
    monkeypatch.setattr(estimates, "LONGEST", 10)
    assert Estimates(file).of("a") is None


def test_a_damaged_file_is_written_anew(file: Path) -> None:
    file.parent.mkdir()
    file.write_bytes(b"\xff not json")
    kept = Estimates(file)
    kept.learn("a", KNOWN)
    kept.save({})
    assert Estimates(file).of("a") is not None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)
nearly = st.fixed_dictionaries(
    {},
    optional={
        "format": st.just(1) | json_values,
        "known": json_values | st.dictionaries(st.text(max_size=3), json_values),
        "runs": json_values | st.dictionaries(st.text(max_size=3), json_values),
    },
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=200)
    | (json_values | nearly).map(lambda one: json.dumps(one).encode())
    | st.just(b"[" * 200_000)
)
def test_whatever_bytes_are_in_the_file_nothing_is_raised(tmp_path: Path, text: bytes) -> None:
    file = tmp_path / "estimates.json"
    file.write_bytes(text)
    kept = Estimates(file)
    assert kept.of("a") is None or isinstance(kept.of("a"), Known)
    kept.learn("mine", KNOWN)
    kept.save({})
    assert Estimates(file).of("mine") is not None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 400), st.binary(min_size=1, max_size=4))
def test_a_file_that_was_cut_or_overwritten_gives_nothing_or_what_was_there(
    tmp_path: Path, place: int, text: bytes
) -> None:
    file = tmp_path / "estimates.json"
    written(file)
    whole = file.read_bytes()
    for damaged in (whole[:place], whole[:place] + text + whole[place + len(text) :]):
        file.write_bytes(damaged)
        found = Estimates(file).of("a")
        if found is not None:
            assert 0 <= found.asleep <= found.awake
            assert 0 <= found.reload_seconds < float("inf")
