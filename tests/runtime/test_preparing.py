"""Making prepared copies: whatever happens to one, the answers are right and nothing is left."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ebbtide
from ebbtide.errors import RunError
from ebbtide.runtime import identity, prepare, rewriting, session
from ebbtide.runtime.store import DATA, GRAPH, MANIFEST

from . import stored
from .stored import (
    MODELS,
    STEPS,
    TINY,
    answer,
    assert_as_new,
    at,
    copied,
    copies,
    damage,
    ended,
    left_over,
    load,
    only,
    process,
    replace,
    reseal,
    right,
    source,
)

LINUX = sys.platform == "linux"


def events(**options: Any) -> list[str]:
    """What is told of a load."""
    told: list[Any] = []
    with load(progress=told.append, **options):
        return [one["status"] for one in told]


def test_prepare_now_waits_for_the_copy_and_tells_of_it(root: Path) -> None:
    assert events() == ["preparing", "prepared", "ready"]
    assert events() == ["ready"], "it is there"
    assert_as_new(root)


def test_a_prepared_pipeline_maps_its_weights_and_says_so(filled: Path) -> None:
    with load() as pipe:
        holding = next(one for one in pipe.memory.holdings if one.kind == "session")
        assert holding.source == "prepared"
        assert holding.mapped == (only(filled) / DATA).stat().st_size
        assert holding.quiet
        assert "(prepared)" in repr(pipe)


@pytest.mark.parametrize("off", [False, "off"])
def test_prepare_false_makes_no_copy_and_uses_one_that_is_there(root: Path, off: Any) -> None:
    assert events(prepare=off) == ["ready"]
    assert not root.exists()
    assert answer()[0] == "prepared"
    assert answer(prepare=off)[0] == "prepared"


@pytest.mark.parametrize("bad", [True, "soon", 1, "", ["now"]])
def test_a_wrong_prepare_is_refused(root: Path, bad: Any) -> None:
    with pytest.raises(ebbtide.InputError, match="prepare takes 'background', 'now', False"):
        load(prepare=bad)


def test_the_setting_says_what_a_load_does(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ebbtide.settings, "prepare", "now")
    assert answer(prepare=None)[0] == "prepared"
    assert answer(prepare="off", dtype="q8")[0] == "original"


def test_a_small_model_is_not_prepared_in_the_background(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wished: list[Any] = []
    monkeypatch.setattr(prepare.background, "wish", lambda *wish: wished.append(wish))
    monkeypatch.setattr(ebbtide.settings, "prepare", "background")
    assert answer(prepare=None)[0] == "original"
    assert wished == []
    monkeypatch.setattr(prepare, "SMALLEST", 300_000)
    answer(prepare=None)
    assert len(wished) == 1


@pytest.mark.parametrize("options", [{"optimization": "basic"}, {"optimization": "none"}])
def test_options_that_shape_the_graph_have_a_copy_of_their_own(
    root: Path, options: dict[str, Any]
) -> None:
    answer()
    found, result = answer(session_options=options)
    assert found == "prepared"
    assert np.array_equal(result, right(session_options=options))
    assert len(copies(root)) == 2


def test_threads_and_arena_do_not(filled: Path) -> None:
    for options in ({"threads": 2}, {"arena": True}):
        assert answer(prepare=False, session_options=options)[0] == "prepared"


def test_external_data_are_prepared_too(root: Path) -> None:
    assert_as_new(root, MODELS / "tiny-external")


def test_a_graph_that_names_data_outside_of_its_folder_is_never_prepared(
    root: Path, tmp_path: Path
) -> None:
    folder = copied(TINY, tmp_path / "model")
    graph = folder / "onnx/model.onnx"
    named = b"\x0a\x08location\x12\x09../a.data"
    graph.write_bytes(graph.read_bytes() + bytes([0x32, len(named)]) + named)  # its doc_string
    found, result = answer(folder)
    assert found == "original"
    assert np.array_equal(result, right())
    assert copies(root) == []


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a copy of the model."""
    place = tmp_path_factory.mktemp("made") / "store"
    before, ebbtide.settings.cache_dir = ebbtide.settings.cache_dir, str(place)
    try:
        assert answer()[0] == "prepared"
    finally:
        ebbtide.settings.cache_dir = before
    return place


@pytest.fixture
def filled(root: Path, made_once: Path) -> Path:
    """The test's store, with a copy of the model."""
    shutil.copytree(made_once, root)
    return root


DAMAGES: dict[str, Callable[[Path], object]] = {
    "data that are cut": lambda entry: replace(entry / DATA, (entry / DATA).read_bytes()[:-7]),
    "data that are missing": lambda entry: (entry / DATA).unlink(),
    "a flipped bit of the graph": lambda entry: damage(entry / GRAPH, 999),
    "a flipped bit of the manifest": lambda entry: damage(entry / MANIFEST, 999),
    "another version": lambda entry: reseal(entry, onnxruntime="1.0"),
    "another processor": lambda entry: reseal(entry, cpu="another"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_copy_is_never_wrong_and_is_made_anew(filled: Path, what: str) -> None:
    DAMAGES[what](only(filled))
    found, result = answer(prepare=False)
    assert found == "original"
    assert np.array_equal(result, right())
    assert_as_new(filled)


def test_a_flipped_bit_of_the_data_is_found_by_a_load_that_verifies_all(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ebbtide.settings, "verify", "always")
    damage(only(filled) / DATA, 999)
    found, result = answer(prepare=False)
    assert found == "original"
    assert np.array_equal(result, right())
    assert copies(filled) == []


def test_a_damaged_copy_is_made_anew_by_the_load_that_finds_it(
    filled: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(only(filled) / GRAPH, 999)
    assert answer()[0] == "prepared"
    assert sum("is not used" in one.message for one in caplog.records) == 1
    assert_as_new(filled)


def test_a_copy_that_onnxruntime_does_not_take_is_removed_and_the_original_used(
    filled: Path,
) -> None:
    entry = only(filled)
    replace(entry / GRAPH, b"no graph at all")
    reseal(entry, files=prepare.stores.describe(entry, (GRAPH, DATA)))
    found, result = answer(prepare=False)
    assert found == "original"
    assert np.array_equal(result, right())
    assert copies(filled) == []


@pytest.mark.parametrize("step", STEPS)
def test_a_child_that_is_killed_at_any_step_leaves_nothing_behind(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    with monkeypatch.context() as patch:
        for name, value in at(step, "die", tmp_path).items():
            patch.setenv(name, value)
        patch.setattr(identity, "_SETTLED", float("inf"))  # so that it is the child that hashes
        found, result = answer()
    assert found == ("prepared" if step in ("renamed", "pruning") else "original")
    assert np.array_equal(result, right())
    assert not list(root.glob("prepared/.*")), "who asked for it has swept"
    for left in root.rglob(".*.json.*"):  # a note's, which goes once it is old
        os.utime(left, (1, 1))
    prepare.store().sweep()
    assert left_over(root) == []
    assert_as_new(root)


FULL = "after(store, '_to_disk', full, lambda path: path.name == {name!r})"


@pytest.mark.parametrize("name", [DATA, GRAPH])
def test_a_disk_that_fills_up_while_a_copy_is_written_is_tried_again_later(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    act = "def full():\n    raise OSError(28, 'No space left on device')\n"
    with monkeypatch.context() as patch:
        for key, value in at(act + FULL.format(name=name), "die", tmp_path).items():
            patch.setenv(key, value)
        found, result = answer()
    assert found == "original"
    assert np.array_equal(result, right())
    assert left_over(root) == []
    assert_as_new(root)


BROKEN = """
import shutil, types
def broken(*arguments):
    raise session.LoadError("it could not be written", path="model.onnx")
rewriting.write_prepared = broken
"""


@pytest.mark.parametrize("room", [True, False])
def test_what_fails_is_remembered_only_where_there_was_room(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    script = BROKEN
    if not room:
        script += "shutil.disk_usage = lambda path: types.SimpleNamespace(free=1_000)"
    with monkeypatch.context() as patch:
        for name, value in at(script, "", tmp_path).items():
            patch.setenv(name, value)
        assert answer()[0] == "original"
    assert len(list(root.glob("refused/*.json"))) == room
    assert left_over(root) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Any]:
    """Mounts a file system of so many kB, or one that is read-only."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = []

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        can = LINUX and shutil.which("mount") and os.getuid() == 0
        if not can or subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode:
            pytest.skip("no file system can be mounted here")
        mounted.append(place)
        return place

    yield mount
    for one in mounted:
        subprocess.run(["umount", "-l", str(one)], check=True)


@pytest.mark.parametrize("kilobytes", [200, 348])
def test_a_full_disk_gives_the_original_and_the_same_with_room_gives_a_copy(
    small_disk: Any, monkeypatch: pytest.MonkeyPatch, kilobytes: int
) -> None:
    place = small_disk(f"size={kilobytes}k")
    monkeypatch.setattr(ebbtide.settings, "cache_dir", str(place))
    found, result = answer()
    assert np.array_equal(result, right())
    assert found == "original"
    assert left_over(place) == []
    assert not list(place.glob("refused/*")), "it was the disk's fault, not the model's"
    subprocess.run(["mount", "-o", "remount,size=20m", str(place)], check=True)
    assert_as_new(place)


def test_a_read_only_home_gives_the_original(
    small_disk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ebbtide.settings, "cache_dir", str(small_disk("ro") / "cache"))
    found, result = answer()
    assert found == "original"
    assert np.array_equal(result, right())
    assert prepare.cannot(1) is not None


def test_a_store_that_became_read_only_is_used(
    small_disk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = small_disk("size=20m")
    monkeypatch.setattr(ebbtide.settings, "cache_dir", str(place))
    answer()
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    found, result = answer()
    assert found == "prepared"
    assert np.array_equal(result, right())


def test_a_folder_that_is_a_file_gives_the_original(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root.write_text("no folder")
    found, result = answer()
    assert found == "original"
    assert np.array_equal(result, right())
    assert "The original is used" in caplog.text


def test_eight_processes_that_want_a_copy_at_once_make_one(root: Path) -> None:
    script = """
    import logging, sys, ebbtide
    logging.basicConfig(level=logging.WARNING)
    print("ready", flush=True)
    sys.stdin.readline()
    with ebbtide.pipeline("feature-extraction", MODEL) as pipe:
        print(pipe.memory.holdings[1].source, repr(float(pipe("the sea").sum())))
    """
    running = [
        process(script, EBBTIDE_PREPARE="now", EBBTIDE_CACHE_DIR=str(root)) for _ in range(8)
    ]
    for one in running:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    for one in running:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    assert {ended(one) for one in running} == {f"prepared {float(right().sum())!r}\n"}
    assert_as_new(root)


def test_threads_that_want_a_copy_at_once_make_one(root: Path) -> None:
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(answer())) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    assert [one for one, _ in found] == ["prepared"] * 4
    assert all(np.array_equal(result, right()) for _, result in found)
    assert_as_new(root)


def test_a_pipeline_that_was_alive_before_its_copy_goes_over_to_it_with_prepare_now(
    root: Path,
) -> None:
    expected = right()
    with load(prepare=False) as first:
        assert source(first) == "original"
        with load() as second:
            assert source(first) == source(second) == "prepared"
            assert np.array_equal(first(stored.TEXT), expected)


def wrong(*arguments: Any) -> bool:
    return False


def test_a_copy_with_other_answers_is_refused_once_and_for_all(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        for name, value in at("rewriting._agree = lambda *_: False", "die", tmp_path).items():
            patch.setenv(name, value)
        assert events() == ["preparing", "ready"]
    assert copies(root) == []
    assert left_over(root) == []
    assert events() == ["ready"], "it is not tried again"
    found, result = answer()
    assert found == "original"
    assert np.array_equal(result, right())
    shutil.rmtree(root / "refused")
    assert_as_new(root)


def test_write_prepared_tells_of_other_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewriting, "_agree", wrong)
    with pytest.raises(RunError, match="another last_hidden_state than the original"):
        rewriting.write_prepared(stored.GRAPH, tmp_path / GRAPH, session.SessionOptions())


def test_a_model_that_cannot_be_loaded_raises_as_it_does_without_a_store(
    root: Path, tmp_path: Path
) -> None:
    folder = copied(TINY, tmp_path / "model")
    file = folder / "onnx/model.onnx"
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(ebbtide.LoadError, match="could not load"):
        load(folder)
    assert copies(root) == []
    assert left_over(root) == []


def test_a_copy_that_does_not_fit_in_the_store_is_not_used_and_does_not_stay(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for limit in (100_000, 320_000):  # less than the model; less than its copy
        monkeypatch.setattr(ebbtide.settings, "cache_size", limit)
        found, result = answer()
        assert found == "original"
        assert np.array_equal(result, right())
        assert copies(root) == []
    assert caplog.text.count("settings.cache_size") == 2


def test_another_copy_makes_room_for_itself(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = only(filled)
    monkeypatch.setattr(ebbtide.settings, "cache_size", 400_000)
    answer(dtype="q8")
    assert only(filled) != first


def test_it_is_cancelled_with_the_load(root: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import asyncio

    for name, value in at("writing", "stop", tmp_path).items():
        monkeypatch.setenv(name, value)

    async def main() -> int:
        task = asyncio.create_task(ebbtide.apipeline(stored.TASK, TINY, prepare="now"))
        pid = int(await asyncio.to_thread((tmp_path / "told").read_text))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return pid

    assert stored.is_gone(asyncio.run(main()))
    assert copies(root) == []
    assert left_over(root) == []


def test_it_is_made_where_warnings_are_errors_and_the_folder_has_modules_of_its_own(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("json", "numpy", "ebbtide", "random"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not this one')")
    monkeypatch.setenv("PYTHONPATH", stored.SOURCE)
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    model = TINY.absolute()
    monkeypatch.chdir(tmp_path)
    assert answer(model)[0] == "prepared"


@pytest.mark.parametrize("frozen", [True, False])
def test_a_program_without_a_python_of_its_own_uses_the_original(
    background: Path, monkeypatch: pytest.MonkeyPatch, frozen: bool, caplog: Any
) -> None:
    if frozen:
        monkeypatch.setattr(sys, "frozen", True, raising=False)
    else:
        monkeypatch.setattr(sys, "executable", "")
    caplog.set_level(logging.INFO, "ebbtide.runtime")
    assert "Python of its own" in str(prepare.cannot(1))
    assert answer()[0] == "original"
    assert copies(background) == []


def graphs() -> list[Path]:
    return sorted(MODELS.rglob("*.onnx"))


def test_every_kind_of_model_answers_the_same_from_its_copy(tmp_path: Path) -> None:
    token = session.CancelToken("the test")
    options = session.SessionOptions(threads=1)
    bad = []
    for number, graph in enumerate(graphs()):
        target = tmp_path / f"{number}.onnx"
        rewriting.write_prepared(graph, target, options)
        original = session.open_session(graph, "cpu", options, token)
        copy = session.open_prepared(target, options, token)
        expected = rewriting._reference_run(original, token)
        found = rewriting._reference_run(copy, token)
        assert expected, f"{graph} was not run"
        same = [
            np.allclose(found[name], value, rtol=0, atol=1e-6) for name, value in expected.items()
        ]
        if not all(same):
            bad.append(str(graph))
        original.close()
        copy.close()
    assert not bad
    assert len(graphs()) > 100
