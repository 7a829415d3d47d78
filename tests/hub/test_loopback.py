"""The tests' own hub: the real client works against it, and its faults are what they say."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .loopback import Hub

LARGE = bytes(range(256)) * 40
FILES = {"config.json": b"{}\n", "onnx/model.onnx": LARGE}
NAME = "org/name"
MODEL = f"/{NAME}/resolve/main/onnx/model.onnx"
CONFIG = f"/{NAME}/resolve/main/config.json"

PRELUDE = """\
import json, sys
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

def read(*args, **more):
    with open(hf_hub_download(*args, **more), "rb") as file:
        return file.read()

def tell(value):
    print(json.dumps(value))
"""

Client = Callable[..., Any]


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Client:
    """Runs a script with the real client in a process of its own; returns what it tells."""

    def run(script: str, token: str | None = None) -> Any:
        done = subprocess.run(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(script)],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, **hub.environment(tmp_path / "cache", token=token)},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def ask(
    hub: Hub, path: str, method: str = "GET", host: str = "127.0.0.1", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """A request without the client's retries and redirects: the status, headers and body."""
    port = int(hub.endpoint.rpartition(":")[2])
    connection = http.client.HTTPConnection(host, port, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        with connection.getresponse() as answer:
            return answer.status, dict(answer.headers), answer.read()
    finally:
        connection.close()


def test_the_client_gets_what_a_model_has_and_shows_its_token_to_the_hub_only(
    hub: Hub, client: Client
) -> None:
    old = hub.add(NAME, {"config.json": b"old"})
    new = hub.add(NAME, FILES, lfs=["*.onnx"])
    hub.tag(NAME, "v1", old)
    hub.account("hf_known")
    told = client(
        f"""
        info = HfApi().model_info("{NAME}", files_metadata=True)
        folder = snapshot_download("{NAME}")
        tell({{
            "sha": info.sha,
            "files": {{one.rfilename: [one.size, one.blob_id, one.lfs] for one in info.siblings}},
            "tree": [one.path for one in HfApi().list_repo_tree("{NAME}", revision="v1")],
            "old": read("{NAME}", "config.json", revision="{old}").decode(),
            "tagged": read("{NAME}", "config.json", revision="v1").decode(),
            "same": open(folder + "/onnx/model.onnx", "rb").read().hex(),
        }})
        """,
        token="hf_known",
    )
    assert told["sha"] == new != old
    assert told["files"]["config.json"] == [3, "0967ef424bce6791893e9a57bb952f80fd536e93", None]
    size, _, large = told["files"]["onnx/model.onnx"]
    assert (size, large["size"], large["pointer_size"]) == (len(LARGE), len(LARGE), 130)
    assert (told["tree"], told["old"], told["tagged"]) == (["config.json"], "old", "old")
    assert bytes.fromhex(told["same"]) == LARGE
    assert hub.requests[0] == ("GET", f"/api/models/{NAME}?blobs=true", None, True)
    assert {one.authorised for one in hub.requests if not one.path.startswith("/cdn/")} == {True}
    assert {one.authorised for one in hub.requests if one.path.startswith("/cdn/")} == {False}
    assert hub.leaked == []


def test_the_client_resumes_a_download_that_was_cut_where_it_stopped(
    hub: Hub, client: Client
) -> None:
    hub.add(NAME, FILES, lfs=["*.onnx"])
    cut = hub.fault("/cdn/*/model.onnx", cut_after=3000)
    told = client(
        f"""
        constants.DOWNLOAD_CHUNK_SIZE = 1000  # the client keeps whole chunks only
        tell(read("{NAME}", "onnx/model.onnx").hex())
        """
    )
    assert bytes.fromhex(told) == LARGE
    assert cut.hits == 1
    parts = [one.range for one in hub.requests if one.path.startswith("/cdn/")]
    assert parts == [None, "bytes=3000-"]


def test_each_refusal_is_an_error_of_its_own_to_the_client(hub: Hub, client: Client) -> None:
    for name in ("org/open", "org/gated", "org/private"):
        hub.add(name, FILES)
    hub.account("hf_known")
    hub.gated("org/gated", "hf_gated")
    hub.private("org/private", "hf_private")
    hub.add("org/old", FILES)
    hub.rename("org/old", "org/new")
    told = client(
        """
        def refused(name, token, file="config.json", **more):
            try:
                read(name, file, token=token, **more)
            except HfHubHTTPError as error:
                return [type(error).__name__, error.response.status_code]
            return "read"

        tell({
            "renamed": refused("org/old", False),
            "no model": refused("org/none", False),
            "no model, known": refused("org/none", "hf_known"),
            "no revision": refused("org/open", False, revision="none"),
            "no file": refused("org/open", False, file="none"),
            "no such token": refused("org/open", "hf_none"),
            "gated": refused("org/gated", False),
            "gated, known": refused("org/gated", "hf_known"),
            "gated, listed": HfApi().model_info("org/gated", token=False).gated,
            "gated, allowed": refused("org/gated", "hf_gated"),
            "private": refused("org/private", False),
            "private, known": refused("org/private", "hf_known"),
            "private, allowed": refused("org/private", "hf_private"),
        })
        """
    )
    assert told == {
        "renamed": "read",
        "no model": ["RepositoryNotFoundError", 401],
        "no model, known": ["RepositoryNotFoundError", 404],
        "no revision": ["RevisionNotFoundError", 404],
        "no file": ["RemoteEntryNotFoundError", 404],
        "no such token": ["HfHubHTTPError", 401],
        "gated": ["GatedRepoError", 401],
        "gated, known": ["GatedRepoError", 403],
        "gated, listed": "manual",
        "gated, allowed": "read",
        "private": ["RepositoryNotFoundError", 401],
        "private, known": ["RepositoryNotFoundError", 404],
        "private, allowed": "read",
    }


def test_a_file_is_answered_whole_or_in_the_part_that_was_asked_for(hub: Hub) -> None:
    commit = hub.add(NAME, FILES, lfs=["onnx/*"])
    status, headers, body = ask(hub, MODEL, "HEAD")
    assert (status, body, headers["X-Linked-Size"]) == (302, b"", str(len(LARGE)))
    assert headers["X-Repo-Commit"] == commit
    cdn = headers["Location"].removeprefix(hub.endpoint.replace("127.0.0.1", "localhost"))
    for wanted, content in (
        ("bytes=10-19", LARGE[10:20]),
        ("bytes=10000-", LARGE[10000:]),
        ("bytes=-10", LARGE[-10:]),
    ):
        status, headers, body = ask(hub, cdn, host="localhost", Range=wanted)
        assert (status, body) == (206, content)
        assert headers["Content-Range"].endswith(f"/{len(LARGE)}")
    status, headers, _ = ask(hub, cdn, host="localhost", Range=f"bytes={len(LARGE)}-")
    assert (status, headers["Content-Range"]) == (416, f"bytes */{len(LARGE)}")
    status, headers, body = ask(hub, CONFIG)
    assert (status, body) == (200, b"{}\n")
    assert headers["ETag"] == '"0967ef424bce6791893e9a57bb952f80fd536e93"'
    ask(hub, cdn, host="localhost", Authorization="Bearer hf_known")
    assert [one.authorised for one in hub.leaked] == [True]


def test_a_fault_hits_as_often_as_it_was_told_to_and_then_no_more(hub: Hub) -> None:
    hub.add(NAME, FILES)
    hub.fault(CONFIG, status=429, headers={"Retry-After": "7"}, times=2)
    broken = hub.fault(CONFIG, status=503, times=None, method="HEAD")
    status, headers, _ = ask(hub, CONFIG)
    assert (status, headers["Retry-After"]) == (429, "7")
    assert [ask(hub, CONFIG)[0] for _ in range(3)] == [429, 200, 200]
    assert [ask(hub, CONFIG, "HEAD")[0] for _ in range(3)] == [503, 503, 503]
    broken.end()
    assert ask(hub, CONFIG, "HEAD")[0] == 200
    assert broken.hits == 3


def test_content_can_be_cut_flipped_or_sent_whole_in_place_of_a_part(hub: Hub) -> None:
    hub.add(NAME, FILES)
    hub.fault("*.onnx", cut_after=5)
    hub.fault("*.onnx", cut_after=5, reset=True)
    hub.fault("*.onnx", refuse=True)
    hub.fault("*.onnx", flip=-1)
    hub.fault("*.onnx", ignore_range=True)
    with pytest.raises(http.client.IncompleteRead) as cut:
        ask(hub, MODEL)
    assert cut.value.partial == LARGE[:5]
    with pytest.raises(ConnectionResetError):
        ask(hub, MODEL)
    with pytest.raises(http.client.RemoteDisconnected):
        ask(hub, MODEL)
    status, headers, body = ask(hub, MODEL)
    assert (status, body) == (200, LARGE[:-1] + b"\xfe")
    assert headers["ETag"] == ask(hub, MODEL)[1]["ETag"]
    assert ask(hub, MODEL, Range="bytes=9-")[::2] == (200, LARGE)
    assert ask(hub, MODEL, Range="bytes=9-")[::2] == (206, LARGE[9:])


@pytest.mark.parametrize("fault", [{"hold": True}, {"stall_after": 5}])
def test_an_answer_waits_until_it_is_released(hub: Hub, fault: dict[str, Any]) -> None:
    hub.add(NAME, FILES)
    waiting = hub.fault("*.onnx", **fault)
    got: list[bytes] = []
    asking = threading.Thread(target=lambda: got.append(ask(hub, MODEL)[2]))
    asking.start()
    assert waiting.reached.wait(10)
    assert (got, len(hub.wait_for(len))) == ([], 1)
    waiting.release.set()
    asking.join(10)
    assert got == [LARGE]


def test_closing_ends_all_connections_also_those_that_wait() -> None:
    before = threading.active_count()
    with Hub() as hub:
        hub.add(NAME, FILES)
        port = int(hub.endpoint.rpartition(":")[2])
        stalled = hub.fault("*.onnx", stall_after=5)
        with (
            socket.create_connection(("127.0.0.1", port), 10) as idle,
            socket.create_connection(("127.0.0.1", port), 10) as waiting,
        ):
            waiting.sendall(f"GET {MODEL} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
            assert stalled.reached.wait(10)
            hub.close()
            assert idle.recv(1) == b""
            sent = b"".join(iter(lambda: waiting.recv(4096), b""))
            assert sent.partition(b"\r\n\r\n")[2] == LARGE[:5]
    assert threading.active_count() == before
    with pytest.raises(ConnectionRefusedError):
        ask(hub, CONFIG)


def test_a_commit_is_what_git_makes_of_its_files(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a.txt", "a/b/c", "a0", "m.onnx"):
        (tmp_path / name).write_text(name)
    first = hub.add_folder(NAME, tmp_path, lfs=())
    assert hub.add_folder(NAME, tmp_path, lfs=()) == first
    tree = json.loads(ask(hub, f"/api/models/{NAME}/tree/main?recursive=true")[2])
    assert [one["path"] for one in tree] == ["a", "a.txt", "a/b", "a/b/c", "a0", "m.onnx"]
    assert tree[0]["oid"] == "04c643544a9a09e4571f8e0ee88a4c9daae01760"
    assert first == "1d5389cdf4ef7f9dc0ec554911df3b27b76e9e3b"
    assert hub.add_folder(NAME, tmp_path) != first
