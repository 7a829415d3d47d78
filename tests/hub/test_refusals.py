"""What the hub refuses, or answers wrongly, is one typed error that says what to do."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http, close_session
from hypothesis import given
from hypothesis import strategies as st

import ebbtide
from ebbtide.hub import Repository, resolve
from ebbtide.hub.cache import FileInfo, usable

from .loopback import Hub
from .served import (
    NAME,
    ONNX,
    TASK,
    TINY,
    assert_same_as_folder,
    everything_below,
    files_asked,
)

JSON = {"Content-Type": "application/json"}
LOOK_UP = "/api/models/*"
COMMIT = "c" * 40


def failed(name: str = NAME, **options: Any) -> ebbtide.DownloadError:
    """The error of a load."""
    with pytest.raises(ebbtide.DownloadError) as caught:
        ebbtide.pipeline(TASK, name, **options)
    return caught.value


def point_at(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Have the client use another address for the hub."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )


@pytest.mark.parametrize("token", [False, "hf_known"], ids=["401", "404"])
def test_a_model_that_there_is_not_is_not_found(hub: Hub, cache: Path, token: str | bool) -> None:
    hub.account("hf_known")
    with pytest.raises(ebbtide.ModelNotFoundError) as caught:
        ebbtide.pipeline(TASK, "org/none", token=token)
    assert caught.value.model == "org/none"
    for words in ("no installed model", hub.endpoint, "or it is private"):
        assert words in str(caught.value)
    assert not cache.exists()


@pytest.mark.parametrize("name", ["a/-b", "-a/b", "a/b.git", "a" * 97])
def test_a_name_that_no_model_can_have_is_not_found_and_not_asked_for(
    hub: Hub, cache: Path, name: str
) -> None:
    with pytest.raises(ebbtide.ModelNotFoundError):
        ebbtide.pipeline(TASK, name)
    assert hub.requests == []


@pytest.mark.parametrize("revision", ["v2.0", "0" * 40, "refs/pr/7"])
def test_a_revision_that_there_is_not_is_not_found(
    hub: Hub, tiny: str, cache: Path, revision: str
) -> None:
    with pytest.raises(ebbtide.ModelNotFoundError, match=f"no revision {revision!r}") as caught:
        ebbtide.pipeline(TASK, NAME, revision=revision)
    assert caught.value.model == NAME
    assert files_asked(hub) == []


def test_a_file_that_the_hub_names_and_has_not_is_not_found(
    hub: Hub, tiny: str, cache: Path
) -> None:
    hub.fault("*/tokenizer.json", status=404, headers={"X-Error-Code": "EntryNotFound"})
    with pytest.raises(ebbtide.ModelNotFoundError, match=r"tokenizer\.json") as caught:
        ebbtide.pipeline(TASK, NAME)
    assert caught.value.missing == ("tokenizer.json",)
    assert_same_as_folder()


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (429, "Wait a while and try again, or pass a token"),
        (500, "Try again later"),
        (503, "Try again later"),
    ],
)
@pytest.mark.parametrize("pattern", [LOOK_UP, "*/config.json", f"/cdn/*/{ONNX}"])
def test_an_error_of_the_hubs_is_told_with_its_status_and_the_next_load_succeeds(
    hub: Hub, tiny: str, cache: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, status: int,
    words: str,
) -> None:  # fmt: skip
    slept: list[float] = []
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=slept.append, time=time.time))
    fault = hub.fault(pattern, status=status, times=None)
    error = failed()
    assert (error.model, error.status, error.unreachable) == (NAME, status, False)
    assert error.file == {LOOK_UP: None, "*/config.json": "config.json"}.get(pattern, ONNX)
    assert f"({status})" in str(error)
    assert words in str(error)
    fault.end()
    assert_same_as_folder()


def test_a_file_that_was_asked_for_too_often_is_asked_for_again_when_the_hub_says(
    hub: Hub, tiny: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=slept.append, time=time.time))
    hub.fault("*/config.json", status=429, headers={"Retry-After": "7"})
    assert_same_as_folder()
    assert slept == [8.0]


@pytest.mark.parametrize(
    "fault",
    [{"refuse": True}, {"cut_after": 9}, {"cut_after": 9, "reset": True}],
    ids=["closed", "cut", "reset"],
)
def test_a_connection_that_breaks_while_looking_up_is_unreachable(
    hub: Hub, tiny: str, cache: Path, fault: dict[str, Any]
) -> None:
    hub.fault(LOOK_UP, **fault)
    error = failed()
    assert (error.file, error.status, error.unreachable) == (None, None, True)
    assert_same_as_folder()


def test_a_hub_that_does_not_answer_is_given_up_after_the_clients_timeout(
    hub: Hub, tiny: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    hub.fault(LOOK_UP, hold=True)
    error = failed()
    assert (error.file, error.status, error.unreachable) == (None, None, True)
    assert_same_as_folder()


@pytest.mark.parametrize("pattern", [LOOK_UP, f"/cdn/*/{ONNX}"], ids=["look-up", "file"])
def test_how_long_a_hub_is_waited_for_is_read_from_the_environment(
    hub: Hub, tiny: str, cache: Path, child: Any, pattern: str
) -> None:
    hub.fault(pattern, hold=True, times=None)
    script = f"""
        import ebbtide
        from ebbtide.hub import download
        download._RETRIES = 1
        try:
            ebbtide.pipeline("{TASK}", "{NAME}")
        except ebbtide.DownloadError as error:
            print(error.unreachable, "Timeout" in str(error))
    """
    assert child(script, timeout=1).result(timeout=20) == (0, "True True\n", "")


@pytest.mark.parametrize(
    "endpoint", ["nonsense", "http://", "ftp://127.0.0.1", "http://127.0.0.1:port", "http://[::1"]
)
def test_an_address_of_the_hub_that_cannot_be_used_is_a_download_error_that_names_it(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    point_at(monkeypatch, endpoint)
    error = failed()
    assert endpoint in str(error)
    assert "HF_ENDPOINT" in str(error)


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:1", "nonsense://127.0.0.1:1"])
def test_a_proxy_that_does_not_work_is_a_download_error(
    hub: Hub, tiny: str, cache: Path, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HTTP_PROXY", proxy)
    close_session()
    error = failed()
    assert (error.model, error.status) == (NAME, None)
    close_session()
    assert hub.requests == []


def sibling(name: object = "config.json", **more: object) -> dict[str, object]:
    return {"rfilename": name, "size": 3, "blobId": "b" * 40, **more}


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"<html>Log in to the hotel's network</html>", b"null", b"[]", b"{}", b'"text"',
        {"id": NAME},
        {"id": NAME, "sha": COMMIT},
        {"id": NAME, "sha": COMMIT, "siblings": None},
        {"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": "config.json"}]},
        {"id": NAME, "sha": COMMIT, "siblings": [{"size": 3}]},
        {"id": NAME, "sha": COMMIT, "siblings": [sibling(7)]},
        {"id": NAME, "sha": COMMIT, "siblings": [sibling(blobId=7)]},
        {"id": NAME, "sha": COMMIT, "siblings": [sibling(size="much")]},
        {"id": NAME, "sha": COMMIT, "siblings": [sibling(lfs="yes")]},
        {"id": NAME, "siblings": [sibling()]},
        {"id": NAME, "sha": "../../../main", "siblings": [sibling()]},
        {"id": NAME, "sha": "main", "siblings": [sibling()]},
    ],
)  # fmt: skip
def test_an_answer_that_is_none_of_a_hubs_is_a_download_error_and_leaves_nothing(
    hub: Hub, tiny: str, cache: Path, answer: Any
) -> None:
    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    hub.fault(LOOK_UP, status=200, body=body, headers=JSON)
    error = failed()
    assert (error.model, error.file, error.status) == (NAME, None, None)
    assert not error.unreachable
    assert not cache.exists()
    assert_same_as_folder()


@pytest.mark.parametrize(
    "name", ["../../../../outside", "/outside", "a/../../../../../outside", "a\\b", "./a", "a//b"]
)
def test_a_file_whose_name_leads_outside_is_not_there_at_all(
    hub: Hub, tiny: str, cache: Path, name: str
) -> None:
    listed = [
        {"rfilename": name, "size": 3, "blobId": "b" * 40},
        {"rfilename": "onnx/a", "size": 3, "blobId": "../../../../../outside"},
        {"rfilename": "onnx/b", "size": 3, "blobId": "b" * 40,
         "lfs": {"sha256": "../../outside", "size": 3, "pointerSize": 130}},
        {"rfilename": "config.json", "size": 3, "blobId": "b" * 40},
    ]  # fmt: skip
    body = json.dumps({"id": NAME, "sha": COMMIT, "siblings": listed}).encode()
    hub.fault(LOOK_UP, status=200, body=body, headers=JSON)
    files = resolve(NAME, task=TASK, default=NAME)
    assert [one for one in (name, "onnx/a", "onnx/b", "config.json") if files.has(one)] == [
        "config.json"
    ]
    files.fetch([name, "onnx/a", "onnx/b"])
    assert files_asked(hub) == []
    assert not [one for one in everything_below(cache.parent) if "outside" in one]


PART = st.one_of(st.text(max_size=3), st.sampled_from(["..", ".", "", "a", "~", "\\", "C:", "\0"]))
NAMES = st.one_of(st.text(), st.lists(PART, max_size=6).map("/".join))
HASH = st.text("0123456789abcdef", min_size=40, max_size=40)
HASHES = st.one_of(st.text(), HASH, st.lists(PART, max_size=4).map("/".join))


@given(name=NAMES, hashed=HASHES)
def test_a_usable_name_and_hash_have_a_place_below_their_folder_and_nowhere_else(
    name: str, hashed: str
) -> None:
    if not usable(name, hashed):
        return
    place = Repository("/cache", "org/name")
    file = FileInfo(name, 1, hashed)
    for folder, path in (
        (place.snapshot(COMMIT), place.snapshot(COMMIT) / name),
        (place.folder / "blobs", place.blob(file)),
        (place.locks, place.lock(file)),
    ):
        below = path.relative_to(folder)  # which compares the parts, and resolves none
        assert below.parts
        assert not {"..", "."} & set(below.parts)
        assert "\0" not in str(path)


@given(name=st.lists(st.text("abc.-_ é", min_size=1), min_size=1, max_size=4).map("/".join),
       hashed=HASH)  # fmt: skip
def test_what_repositories_call_their_files_is_usable(name: str, hashed: str) -> None:
    assert usable(name, hashed) == (not {".", ".."} & set(name.split("/")))


def test_every_file_of_the_tests_own_models_is_usable() -> None:
    for path in TINY.rglob("*.*"):
        assert usable(path.relative_to(TINY).as_posix(), "a" * 64)
