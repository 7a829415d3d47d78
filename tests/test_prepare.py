"""`ebbtide.prepare()` has a model's prepared copy made, and loads nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import ebbtide
from ebbtide.runtime import library, prepare, session
from ebbtide.runtime.store import Store

TASK = "feature-extraction"


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ebbtide.settings, "cache_dir", str(tmp_path / "store"))
    return tmp_path / "store"


def test_it_says_what_the_copy_is_and_whether_it_was_made_now(tiny_bert: Path, root: Path) -> None:
    first = ebbtide.prepare(TASK, tiny_bert)
    [entry] = Store(root).entries()
    manifest = entry.manifest
    assert manifest is not None
    assert first == ebbtide.PreparedModel(
        model=str(tiny_bert),
        file="onnx/model.onnx",
        dtype="fp32",
        key=entry.key,
        size=manifest.size,
        anonymous=manifest.anonymous,
        seconds=manifest.seconds,
        made=True,
    )
    assert ebbtide.prepare(TASK, tiny_bert).made is False
    with ebbtide.pipeline(TASK, tiny_bert) as pipe:
        assert "prepared" in repr(pipe)


def test_a_damaged_copy_is_made_anew(tiny_bert: Path, root: Path) -> None:
    key = ebbtide.prepare(TASK, tiny_bert).key
    (root / "prepared" / key / "model.onnx").write_bytes(b"damaged")
    again = ebbtide.prepare(TASK, tiny_bert)
    assert (again.key, again.made) == (key, True)


def test_progress_tells_of_a_copy_that_is_made_and_of_no_other(tiny_bert: Path) -> None:
    told: list[Any] = []
    ebbtide.prepare(TASK, tiny_bert, progress=told.append)
    ebbtide.prepare(TASK, tiny_bert, progress=told.append)
    name = str(tiny_bert)
    assert told == [{"status": one, "model": name} for one in ("preparing", "prepared")]


def test_nothing_is_loaded_in_the_process_that_asks(tiny_bert: Path, root: Path) -> None:
    opened: list[object] = []
    original = session.OnnxSession.__init__

    def note(self: Any, *arguments: Any) -> None:
        opened.append(arguments)
        original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.OnnxSession, "__init__", note)
        assert ebbtide.prepare(TASK, tiny_bert).made
    assert opened == []
    assert ebbtide.live() == []


def test_what_does_not_run_on_the_cpu_has_no_copy(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(ebbtide.PrepareError, match="it runs on cuda:1, and only what") as caught:
        ebbtide.prepare(TASK, tiny_bert, device="cuda:1")
    assert caught.value.path == str(tiny_bert / "onnx" / "model.onnx")
    assert "The model runs without one." in str(caught.value)


def test_a_folder_that_cannot_be_made_is_named(tiny_bert: Path, root: Path) -> None:
    root.write_text("no folder")
    with pytest.raises(ebbtide.PrepareError, match=f"{root} is no folder"):
        ebbtide.prepare(TASK, tiny_bert)


def test_who_asks_for_a_copy_may_have_it_in_memory_and_nobody_else(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "_file_system", lambda path: "tmpfs")
    assert "is memory, not a disk" in str(prepare.cannot(1))
    assert ebbtide.prepare(TASK, tiny_bert).made


def test_a_program_that_no_python_runs_makes_none(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.frozen", True, raising=False)
    with pytest.raises(ebbtide.PrepareError, match="not run by a Python of its own"):
        ebbtide.prepare(TASK, tiny_bert)


def test_options_are_those_of_a_pipeline(tiny_bert: Path, root: Path) -> None:
    with pytest.raises(ebbtide.OptionError, match=r"prepare\(\) has no option 'dtpye'.*'dtype'"):
        ebbtide.prepare(TASK, tiny_bert, dtpye="q8")  # type: ignore[call-arg]
    plain = ebbtide.prepare(TASK, tiny_bert)
    fewer = ebbtide.prepare(TASK, tiny_bert, session_options={"threads": 1})
    basic = ebbtide.prepare(TASK, tiny_bert, session_options={"optimization": "basic"})
    assert plain.key == fewer.key != basic.key
    assert len(os.listdir(root / "prepared")) == 2
