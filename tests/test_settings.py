"""The settings: what each takes, from Python and from the environment."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ebbtide
from ebbtide.runtime import prepare

Settings: Any = type(ebbtide.settings)

WHOLE = ["threads", "native_threads"]
SECONDS = ["drain_timeout", "exit_timeout"]


def test_an_empty_environment_gives_the_defaults() -> None:
    found = Settings.from_environment({})
    assert found == Settings()
    assert (found.threads, found.native_threads, found.trim, found.malloc) == (
        None, None, True, "tuned",
    )  # fmt: skip
    assert (found.drain_timeout, found.exit_timeout) == (30.0, 10.0)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), (" 8 ", 8), ("1024", 1024), ("", None), ("none", None), ("Auto", None)],
)
def test_whole_numbers_are_read(name: str, text: str, value: int | None) -> None:
    found = Settings.from_environment({f"EBBTIDE_{name.upper()}": text})
    assert getattr(found, name) == value


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("text", ["0", "-1", "1025", "two", "1.5", "0x10"])
def test_a_text_that_is_no_whole_number_names_the_variable(name: str, text: str) -> None:
    variable = f"EBBTIDE_{name.upper()}"
    with pytest.raises(ebbtide.InputError, match="a whole number from 1 to 1024") as caught:
        Settings.from_environment({variable: text})
    assert str(caught.value).startswith(f"{variable}={text!r}")
    assert caught.value.value == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((word, True) for word in ("1", "true", "YES", "on", " True ")),
        *((word, False) for word in ("0", "false", "No", "OFF")),
    ],
)
def test_switches_are_read(text: str, value: bool) -> None:
    assert Settings.from_environment({"EBBTIDE_TRIM": text}).trim is value


@pytest.mark.parametrize("text", ["maybe", "2", ""])
def test_a_text_that_is_no_switch_is_refused(text: str) -> None:
    with pytest.raises(ebbtide.InputError, match=r"EBBTIDE_TRIM=.* takes true or false"):
        Settings.from_environment({"EBBTIDE_TRIM": text})


@pytest.mark.parametrize(("text", "value"), [("tuned", "tuned"), ("SYSTEM", "system")])
def test_words_are_read(text: str, value: str) -> None:
    assert Settings.from_environment({"EBBTIDE_MALLOC": text}).malloc == value


@pytest.mark.parametrize("text", ["", "jemalloc", "tune"])
def test_an_unknown_word_is_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(ebbtide.InputError, match="takes one of tuned, system"):
        Settings.from_environment({"EBBTIDE_MALLOC": text})


@pytest.mark.parametrize("name", SECONDS)
@pytest.mark.parametrize(("text", "value"), [("0", 0), ("2.5", 2.5), ("1e3", 1000), (" 7 ", 7)])
def test_seconds_are_read(name: str, text: str, value: float) -> None:
    assert getattr(Settings.from_environment({f"EBBTIDE_{name.upper()}": text}), name) == value


@pytest.mark.parametrize("name", SECONDS)
@pytest.mark.parametrize("text", ["-1", "nan", "soon", "", "none"])
def test_a_text_that_is_no_time_is_refused(name: str, text: str) -> None:
    with pytest.raises(ebbtide.InputError, match="takes a number of seconds, 0 or more"):
        Settings.from_environment({f"EBBTIDE_{name.upper()}": text})


@pytest.mark.parametrize(
    ("variable", "near"),
    [
        ("EBBTIDE_THREDS", "EBBTIDE_THREADS"),
        ("EBBTIDE_NATIVETHREADS", "EBBTIDE_NATIVE_THREADS"),
        ("EBBTIDE_DRAIN_TIME", "EBBTIDE_DRAIN_TIMEOUT"),
        ("EBBTIDE_QQQQ", None),
    ],
)
def test_an_unknown_variable_names_the_nearest(variable: str, near: str | None) -> None:
    with pytest.raises(ebbtide.InputError, match=variable) as caught:
        Settings.from_environment({variable: "1"})
    assert (f"Did you mean {near}?" in str(caught.value)) == (near is not None)


def test_variables_of_others_are_left_alone() -> None:
    assert Settings.from_environment({"THREADS": "x", "MY_EBBTIDE_X": "y"}) == Settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threads", 0),
        ("threads", True),
        ("threads", 2.0),
        ("threads", "2"),
        ("native_threads", 1025),
        ("trim", 1),
        ("trim", None),
        ("malloc", "jemalloc"),
        ("malloc", ["tuned"]),
        ("drain_timeout", -0.5),
        ("drain_timeout", None),
        ("drain_timeout", True),
        ("drain_timeout", float("nan")),
        ("exit_timeout", "5"),
        ("cache_dir", ""),
        ("cache_dir", 5),
        ("cache_dir", b"/bytes"),
        ("cache_size", -1),
        ("cache_size", 1.5),
        ("cache_size", True),
        ("cache_size", None),
        ("cache_size", "20 parsecs"),
        ("prepare", "soon"),
        ("prepare", False),
        ("prepare", None),
        ("verify", "never"),
        ("move_to_prepared", 1),
        ("shared_threads", None),
        ("idle_trim", -1),
        ("treads", 2),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_at_the_assignment(name: str, value: Any) -> None:
    made = Settings()
    with pytest.raises(ebbtide.InputError, match=rf"settings\.{name}"):
        setattr(made, name, value)
    assert made == Settings()


def test_what_can_be_used_is_taken() -> None:
    made = Settings()
    made.threads, made.native_threads, made.trim = 4, None, False
    made.malloc, made.drain_timeout, made.exit_timeout = "system", 0, float("inf")
    assert made == Settings(
        threads=4, trim=False, malloc="system", drain_timeout=0, exit_timeout=float("inf")
    )


def test_the_store_has_defaults_that_cost_nobody_anything() -> None:
    found = Settings.from_environment({})
    assert (found.cache_dir, found.cache_size, found.prepare, found.verify) == (
        None, 20_000_000_000, "background", "graph",
    )  # fmt: skip
    assert (found.move_to_prepared, found.shared_threads) == (True, False)


@pytest.mark.parametrize("name", ["move_to_prepared", "shared_threads", "offline"])
def test_switches_of_the_store_are_read(name: str) -> None:
    for text, value in (("1", True), ("off", False)):
        assert getattr(Settings.from_environment({f"EBBTIDE_{name.upper()}": text}), name) is value
    with pytest.raises(ebbtide.InputError, match="takes true or false"):
        Settings.from_environment({f"EBBTIDE_{name.upper()}": "maybe"})


@pytest.mark.parametrize(
    ("name", "word"),
    [
        *(("prepare", word) for word in ("background", "now", "off")),
        *(("verify", word) for word in ("graph", "always")),
    ],
)
def test_words_of_the_store_are_read_in_any_case(name: str, word: str) -> None:
    variable = f"EBBTIDE_{name.upper()}"
    assert getattr(Settings.from_environment({variable: f" {word.upper()} "}), name) == word
    with pytest.raises(ebbtide.InputError, match=f"{name} takes one of .*{word}"):
        Settings.from_environment({variable: f"{word}s"})


SIZES = [
    ("0", 0),
    ("0 GB", 0),
    ("123", 123),
    ("20 GB", 20_000_000_000),
    (" 1.5gb ", 1_500_000_000),
    ("2 GiB", 2 * 1024**3),
    ("512 MiB", 512 * 1024**2),
    ("7 kB", 7_000),
    ("1 TB", 10**12),
    ("12 B", 12),
]


@pytest.mark.parametrize(("text", "size"), SIZES)
def test_sizes_are_read_in_words(text: str, size: int) -> None:
    assert Settings.from_environment({"EBBTIDE_CACHE_SIZE": text}).cache_size == size
    made = Settings()
    made.cache_size = text  # type: ignore[assignment]
    assert made.cache_size == size


@pytest.mark.parametrize(
    "text", ["", "much", "-1", "-1 GB", "1 XB", "GB", "1,5 GB", "1e9", "nan", "inf", "9" * 400]
)
def test_a_text_that_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ebbtide.InputError, match="takes bytes, as a whole number or as in '20 GB'"):
        Settings.from_environment({"EBBTIDE_CACHE_SIZE": text})


def test_the_folder_of_the_store_is_taken_as_text_and_as_a_path() -> None:
    assert Settings.from_environment({"EBBTIDE_CACHE_DIR": " /a/b "}).cache_dir == "/a/b"
    assert Settings.from_environment({"EBBTIDE_CACHE_DIR": ""}).cache_dir is None
    made = Settings()
    made.cache_dir = Path("/a/b")  # type: ignore[assignment]
    assert made.cache_dir == "/a/b"
    made.cache_dir = None
    assert made.cache_dir is None


def test_the_store_is_in_the_folder_that_is_set_or_in_the_users_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ebbtide.settings, "cache_dir", str(tmp_path))
    assert prepare.store().root == tmp_path
    monkeypatch.setattr(ebbtide.settings, "cache_dir", "~/of-mine")
    assert prepare.store().root == Path.home() / "of-mine"
    monkeypatch.setattr(ebbtide.settings, "cache_dir", None)
    assert prepare.store().root.name == "ebbtide"


names = st.sampled_from(
    [field.name for field in dataclasses.fields(Settings) if field.name != "cache_dir"]
)


@settings(deadline=None, max_examples=300)
@given(name=names, text=st.text(max_size=8) | st.from_regex(r"-?[0-9.e]{1,6}", fullmatch=True))
def test_any_text_is_either_a_good_value_or_a_typed_error(name: str, text: str) -> None:
    variable = f"EBBTIDE_{name.upper()}"
    try:
        found = Settings.from_environment({variable: text})
    except ebbtide.InputError as error:
        message = str(error)
    else:
        setattr(Settings(), name, getattr(found, name))  # it is one that can be assigned
        message = variable
    assert variable in message


def test_the_process_reads_its_own_environment(fresh_process: Any) -> None:
    seen = fresh_process(
        """
        import ebbtide
        print(ebbtide.settings.threads, ebbtide.settings.trim, ebbtide.settings.drain_timeout)
        ebbtide.settings.threads = 3
        print(ebbtide.settings.threads)
        """,
        EBBTIDE_THREADS="2",
        EBBTIDE_TRIM="off",
        EBBTIDE_DRAIN_TIMEOUT="1.5",
    )
    assert seen.split() == ["2", "False", "1.5", "3"]


def test_a_wrong_environment_is_told_at_the_first_use_and_not_at_the_import(
    fresh_process: Any,
) -> None:
    seen = fresh_process(
        """
        import ebbtide
        from ebbtide import errors
        for use in (lambda: ebbtide.settings, lambda: ebbtide.pipeline("embeddings", MODEL)):
            try:
                use()
            except errors.InputError as error:
                print(error)
        """,
        EBBTIDE_THREDS="2",
    )
    assert seen.count("Did you mean EBBTIDE_THREADS?") == 2
