"""What every test shares: the models' folders, fresh processes, and a check that none leaked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test uses the network, but those with a hub of their own
os.environ["EBBTIDE_PREPARE"] = "off"  # but in the tests of it
os.environ["EBBTIDE_CACHE_DIR"] = tempfile.mkdtemp(prefix="ebbtide-tests-")  # not the user's

import ebbtide

ROOT = Path(__file__).parent
MODELS = ROOT / "models"
GOLDENS = ROOT / "goldens"


@pytest.fixture(scope="session", autouse=True)
def _the_cache_goes() -> Iterator[None]:
    yield
    shutil.rmtree(os.environ["EBBTIDE_CACHE_DIR"], ignore_errors=True)


@pytest.fixture
def tiny_bert() -> Path:
    return MODELS / "tiny-bert"


@pytest.fixture(autouse=True)
def _no_pipeline_is_leaked() -> Iterator[None]:
    """Every test that makes a pipeline fails if it leaves one."""
    yield
    left = ebbtide.live()
    ebbtide.dispose_all(cancel=True)
    assert not left, f"the test left pipelines: {left}"


class FreshProcess:
    """Runs a script in a Python of its own, with the tests' models at hand."""

    def __call__(
        self, script: str, *, timeout: float = 60.0, code: int | None = 0, **environ: str
    ) -> str:
        prelude = f"MODEL = {str(MODELS / 'tiny-bert')!r}\n"
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", prelude + textwrap.dedent(script)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **environ},
            check=False,
        )
        if code is not None:
            assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr


@pytest.fixture
def fresh_process() -> FreshProcess:
    return FreshProcess()
