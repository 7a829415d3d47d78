"""ONNX Runtime's wheels report to their maker; a process in which Ebbtide imports them does not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ebbtide.runtime import library

NOWHERE = {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}


@pytest.fixture(autouse=True)
def _nobody_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)


def test_nothing_is_collected_and_the_environment_is_as_it_was(
    fresh_process: Any, tmp_path: Path
) -> None:
    script = """
        import os, sys, ebbtide
        try:
            ebbtide.pipeline("feature-extraction", MODEL, device="cuda:7")
        except ebbtide.EbbtideError:
            pass
        with ebbtide.pipeline("feature-extraction", MODEL) as pipe:
            pipe("the sea")
        print("ORT_DISABLE_TELEMETRY" in os.environ)
        os.execv(sys.executable, [sys.executable, "-c",
            "import os; print('ORT_DISABLE_TELEMETRY' in os.environ)"])
    """
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "CI": ""}
    assert fresh_process(script, **home, **NOWHERE).split() == ["False", "False"]
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("choice", ["0", "1", ""])
def test_who_sets_the_variable_has_chosen(monkeypatch: pytest.MonkeyPatch, choice: str) -> None:
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", choice)
    with library.telemetry_off():
        assert os.environ["ORT_DISABLE_TELEMETRY"] == choice
    assert os.environ["ORT_DISABLE_TELEMETRY"] == choice


def test_an_import_that_fails_leaves_nothing_in_the_environment() -> None:
    def fails() -> None:
        with library.telemetry_off():
            assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
            raise ImportError

    with pytest.raises(ImportError):
        fails()
    assert "ORT_DISABLE_TELEMETRY" not in os.environ


def test_a_forked_child_ends_where_the_user_imported_onnxruntime_first(
    fresh_process: Any, tmp_path: Path
) -> None:
    """Its telemetry's threads are not in the child, which alone would wait for them for ever."""
    script = """
        import onnxruntime
        import os, sys, ebbtide
        pipe = ebbtide.pipeline("feature-extraction", MODEL)
        child = os.fork()
        if child == 0:
            sys.exit(5)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), pipe.dispose().released > 0)
    """
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "CI": ""}
    assert fresh_process(script, **home, **NOWHERE).split() == ["5", "True"]
