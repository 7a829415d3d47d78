"""A hub on loopback, a cache of the test's own, and processes that use both."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, file_download, hf_api  # noqa: F401 - before they are patched
from huggingface_hub.utils import close_session

import ebbtide
from ebbtide.hub import download

from .loopback import Hub
from .served import NAME, TINY, Child, ended, environment


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as made:
        yield made


@pytest.fixture
def cache(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache of this process, whose client uses the hub; no download outlives the test.

    The client waits for half a minute, which no test does: a wait that should be cut short and is
    not fails by the time of the whole test.
    """
    folder = tmp_path / "cache"
    for name, value in hub.environment(folder, timeout=30).items():
        monkeypatch.setenv(name, value)
    home = folder.with_name("cache.home")
    for constant, value in {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(folder),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_ETAG_TIMEOUT": 30,
        "HF_HUB_DOWNLOAD_TIMEOUT": 30,
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
    }.items():
        monkeypatch.setattr(constants, constant, value)
    monkeypatch.setattr(download, "_PAUSE", 0.0)
    yield folder
    ebbtide.dispose_all(cancel=True)
    hub.close()
    ended()
    close_session()
    assert hub.leaked == [], "the CDN was shown a token"


@pytest.fixture
def tiny(hub: Hub) -> str:
    """A small model in many dtypes on the hub, public; its commit."""
    return hub.add_folder(NAME, TINY)


@pytest.fixture
def child(hub: Hub, cache: Path) -> Iterator[Any]:
    """Starts a script in a process of its own, which uses the hub and the cache."""
    started: list[Child] = []

    def start(script: str, *prefix: str, timeout: int = 30, **more: Any) -> Child:
        environ = {**environment(hub, cache, timeout=timeout), **more.pop("environ", {})}
        text = textwrap.dedent(script)
        process = subprocess.Popen(
            [*prefix, sys.executable, "-W", "error", "-c", text],
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more},
            text=True,
            env=environ,
        )
        started.append(Child(process))
        return started[-1]

    yield start
    for one in started:
        one.end()
