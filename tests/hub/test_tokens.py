"""A token opens what it opens, and is shown to nobody else: no host, no log, no error, no repr."""

from __future__ import annotations

import logging
import pickle
import traceback
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import ebbtide
from ebbtide.hub import HubFiles, HubOptions, resolve

from .loopback import Hub
from .served import MODELS, NAME, TASK, answers, assert_same_as_folder

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz"
OTHER = "hf_ZyXwVuTsRqPoNmLkJiHgFeDcBa"


@pytest.fixture
def private(hub: Hub, tiny: str) -> None:
    """The model is shown to one token only."""
    hub.private(NAME, TOKEN)


def save(token: str) -> None:
    """Save a token as `hf auth login` does."""
    path = Path(constants.HF_TOKEN_PATH)
    path.parent.mkdir(parents=True)
    path.write_text(token)


def authorised(hub: Hub) -> set[bool]:
    """Whether requests to the hub itself had a token."""
    return {one.authorised for one in hub.requests if not one.path.startswith("/cdn/")}


def test_a_token_that_is_given_is_used_and_never_shown_to_another_host(
    hub: Hub, private: None, cache: Path
) -> None:
    assert_same_as_folder(token=TOKEN)
    assert authorised(hub) == {True}
    at_the_cdn = [one.authorised for one in hub.requests if one.path.startswith("/cdn/")]
    assert at_the_cdn == [False]


@pytest.mark.parametrize("where", ["HF_TOKEN", "saved"])
@pytest.mark.parametrize("token", [None, True])
def test_without_one_that_of_the_environment_or_the_one_that_is_saved_is_used(
    hub: Hub, private: None, cache: Path, monkeypatch: pytest.MonkeyPatch, where: str,
    token: bool | None,
) -> None:  # fmt: skip
    if where == "HF_TOKEN":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    else:
        save(TOKEN)
    assert_same_as_folder(token=token)
    assert authorised(hub) == {True}


def test_false_means_none_though_one_is_saved(
    hub: Hub, tiny: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.account(TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    save(TOKEN)
    assert_same_as_folder(token=False)
    assert authorised(hub) == {False}


def test_a_token_that_is_given_is_taken_before_the_one_of_the_environment(
    hub: Hub, private: None, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", OTHER)
    assert_same_as_folder(token=TOKEN)


def test_what_a_token_opened_is_used_from_the_cache_without_one(
    hub: Hub, private: None, cache: Path
) -> None:
    answers(token=TOKEN)
    assert_same_as_folder(local_files_only=True)


def test_where_true_asks_for_a_saved_token_and_there_is_none_the_error_says_so(
    hub: Hub, tiny: str, cache: Path
) -> None:
    with pytest.raises(ebbtide.AccessDeniedError, match="token=True") as caught:
        ebbtide.pipeline(TASK, NAME, token=True)
    assert "hf auth login" in str(caught.value)
    assert not caught.value.unreachable
    assert hub.requests == []


def everything_told(error: BaseException) -> str:
    """All that a user, a log or a crash report would have of an error."""
    return "".join([
        str(error), repr(error), repr(vars(error)), *traceback.format_exception(error),
        repr(pickle.dumps(error)),
    ])  # fmt: skip


@pytest.mark.parametrize(
    "fault",
    [
        {},
        {"status": 500}, {"status": 401}, {"status": 403}, {"status": 404}, {"status": 400},
        {"refuse": True},
        {"pattern": "/cdn/*", "status": 403}, {"pattern": "/cdn/*", "flip": 9},
        {"pattern": "/cdn/*", "refuse": True},
    ],
    ids=lambda fault: " ".join(str(one) for one in fault.values()) or "none",
)  # fmt: skip
def test_no_log_error_or_repr_has_a_token(
    hub: Hub, private: None, cache: Path, caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str], fault: dict[str, Any],
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    for name in ("huggingface_hub", "httpx2", "httpx", "httpcore", "httpcore2"):
        caplog.set_level(logging.DEBUG, name)
    if fault:
        hub.fault(**{"pattern": "*", "times": None, **fault})
        with pytest.raises((ebbtide.DownloadError, ebbtide.ModelNotFoundError)) as caught:
            ebbtide.pipeline(TASK, NAME, token=TOKEN)
        assert TOKEN not in everything_told(caught.value)
    else:
        with ebbtide.pipeline(TASK, NAME, token=TOKEN) as pipe:
            assert TOKEN not in repr(pipe) + repr(vars(ebbtide.settings.__class__))
    assert caplog.records
    told = caplog.text + "".join(repr(vars(one)) for one in caplog.records)
    assert TOKEN not in told + "".join(capfd.readouterr())
    assert hub.leaked == []


def test_the_options_and_the_files_of_a_model_do_not_show_a_token(
    hub: Hub, private: None, cache: Path
) -> None:
    options = HubOptions(token=TOKEN)
    files = resolve(NAME, task=TASK, default=NAME, options=options)
    assert isinstance(files, HubFiles)
    assert TOKEN not in repr(options) + repr(files) + str(files)


@pytest.mark.parametrize("bad", ["\n", " ", "\r\n", "\x00", "é", "​"], ids=ascii)
def test_a_token_that_no_header_can_have_is_refused_and_not_shown(
    hub: Hub, tiny: str, cache: Path, bad: str
) -> None:
    for token in (TOKEN + bad, bad + TOKEN, bad):
        with pytest.raises(ebbtide.InputError, match="token") as caught:
            ebbtide.pipeline(TASK, NAME, token=token)
        assert TOKEN not in everything_told(caught.value)
    with pytest.raises(ebbtide.InputError, match="token is empty"):
        ebbtide.pipeline(TASK, NAME, token="")
    with pytest.raises(ebbtide.InputError, match="token takes a text") as caught:
        ebbtide.pipeline(TASK, NAME, token=TOKEN.encode())  # type: ignore[arg-type]
    assert TOKEN not in everything_told(caught.value)
    assert hub.requests == []


@pytest.mark.parametrize("bad", ["\x0b", "é"], ids=ascii)
def test_a_token_of_the_environment_that_no_header_can_have_is_not_shown(
    hub: Hub, tiny: str, cache: Path, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}{bad}{TOKEN}")
    with pytest.raises(ebbtide.DownloadError) as caught:
        answers()
    assert TOKEN not in everything_told(caught.value)
    assert hub.requests == []


def test_a_wrong_token_is_refused_with_what_to_do(hub: Hub, tiny: str, cache: Path) -> None:
    with pytest.raises(ebbtide.AccessDeniedError) as caught:
        ebbtide.pipeline(TASK, NAME, token=OTHER)
    assert (caught.value.model, caught.value.status) == (NAME, 401)
    assert "the token is wrong or may not read it" in str(caught.value)
    assert "hf auth login" in str(caught.value)


@pytest.mark.parametrize("token", [False, OTHER], ids=["no token", "another's"])
def test_a_private_model_is_not_found_by_others_and_the_error_says_that_it_may_be_private(
    hub: Hub, private: None, cache: Path, token: str | bool
) -> None:
    hub.account(OTHER)
    with pytest.raises(ebbtide.ModelNotFoundError) as caught:
        ebbtide.pipeline(TASK, NAME, token=token)
    assert caught.value.model == NAME
    for words in ("or it is private", "token=", "HF_TOKEN", "hf auth login"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("token", "status"), [(False, 401), (OTHER, 403)], ids=["no token", "not on the list"]
)
def test_a_gated_model_says_where_its_conditions_are_and_how_to_pass_a_token(
    hub: Hub, tiny: str, cache: Path, token: str | bool, status: int
) -> None:
    hub.gated(NAME, TOKEN)
    hub.account(OTHER)
    with pytest.raises(ebbtide.AccessDeniedError) as caught:
        ebbtide.pipeline(TASK, NAME, token=token)
    error = caught.value
    assert (error.model, error.file, error.status) == (NAME, "config.json", status)
    assert isinstance(error, ebbtide.DownloadError)
    for words in (f"accept its conditions at {hub.endpoint}/{NAME}", "token=", "HF_TOKEN",
                  "hf auth login"):  # fmt: skip
        assert words in str(error)
    assert_same_as_folder(token=TOKEN)


def test_a_gated_model_that_is_cached_is_used_without_a_token(hub: Hub, cache: Path) -> None:
    hub.add_folder(NAME, MODELS / "tiny-distilbert")
    hub.gated(NAME, TOKEN)
    answers(token=TOKEN)
    assert_same_as_folder(NAME, MODELS / "tiny-distilbert", token=False)
