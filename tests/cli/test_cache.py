"""`ebbtide cache` lists, makes, checks and removes the prepared copies of models."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import pty
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from tests.cli.conftest import COMMAND, MODELS, Ended
from tests.hub.loopback import Hub

import ebbtide
from ebbtide.cli import app
from ebbtide.runtime.store import Entry, Manifest, Store

TASK = "feature-extraction"
TINY = MODELS / "tiny-bert"
OTHER = MODELS / "tiny-roberta"

Cache = Callable[..., Ended]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with copies of two models, TINY's and OTHER's."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ebbtide.settings, "cache_dir", str(folder))
        for model in (TINY, OTHER):
            ebbtide.prepare(TASK, model)
    return folder


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this process's store; not there yet."""
    folder = tmp_path / "the store"
    monkeypatch.setattr(ebbtide.settings, "cache_dir", str(folder))
    return folder


@pytest.fixture
def two(root: Path, made: Path) -> tuple[str, str]:
    """The keys of two copies in that store, TINY's and OTHER's."""
    shutil.copytree(made, root)
    return ebbtide.prepare(TASK, TINY).key, ebbtide.prepare(TASK, OTHER).key


@pytest.fixture
def one(root: Path, two: tuple[str, str]) -> str:
    """The key of the only copy in that store, TINY's."""
    shutil.rmtree(root / "prepared" / two[1])
    return two[0]


@pytest.fixture
def cache(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cache:
    """Runs `ebbtide cache` on that store, in this process."""
    monkeypatch.setattr(app, "_log_plainly", lambda: None)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words: str | Path, limit: str = "20 GB") -> Ended:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(ebbtide.settings, "cache_size", limit)
            code = app.start(["cache", *map(str, words)])
        return Ended(code, *capsys.readouterr())

    return run


def entries(root: Path) -> list[Entry]:
    return Store(root).entries()


def flip(entry: Path) -> None:
    """Change one bit of an entry's data, and neither its size nor its times."""
    file = entry / "model.onnx.data"
    stat = file.stat()
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@contextlib.contextmanager
def in_use(model: Path) -> Iterator[None]:
    with ebbtide.pipeline(TASK, model) as pipe:
        assert [one.source for one in pipe.memory.holdings if one.source] == ["prepared"]
        yield


def age(root: Path, key: str) -> None:
    os.utime(root / "prepared" / key, (1, 1))


# list and prepare


def test_a_model_is_prepared_once_listed_and_then_used(cache: Cache, root: Path) -> None:
    made = json.loads(cache("prepare", TINY, "--json").out)
    again = json.loads(cache("prepare", TINY, "--json").out)
    assert (made["made"], again["made"]) == (True, False)
    assert {**made, "made": False} == again
    assert (made["model"], made["file"], made["dtype"]) == (str(TINY), "onnx/model.onnx", "fp32")
    assert made["size"] > 100_000
    [listed] = cache("list", "--json").lines
    assert listed["key"] == made["key"]
    assert (listed["model"], listed["file"]) == (str(TINY), "onnx/model.onnx")
    assert listed["anonymous"] == made["anonymous"]
    assert listed["seconds"] == made["seconds"]
    assert listed["size"] >= made["size"]
    assert (listed["in_use"], listed["damaged"], listed["fits"]) == (False, False, True)
    assert abs(listed["created"] - time.time()) < 3600
    with in_use(TINY):
        [listed] = cache("list", "--json").lines
        assert listed["in_use"]


def test_what_is_made_and_that_nothing_is_to_do_is_said(cache: Cache) -> None:
    first, again = cache("prepare", TINY).out, cache("prepare", TINY).out
    assert first.startswith(f"prepared {TINY}, onnx/model.onnx: ")
    assert "made in" in first
    assert again.startswith("nothing to do: ")
    for said in (first, again):
        assert "a live session takes" in said
        assert len(said.splitlines()) == 2


def test_the_copy_is_of_the_file_that_a_pipeline_loads(cache: Cache, root: Path) -> None:
    assert json.loads(cache("prepare", TINY, "--dtype", "q8", "--json").out)["dtype"] == "q8"
    for dtype, source in (("q8", "prepared"), ("fp32", "original")):
        with ebbtide.pipeline(TASK, TINY, dtype=dtype) as pipe:
            assert [one.source for one in pipe.memory.holdings if one.source] == [source]


def test_a_model_of_the_hub_is_downloaded_and_listed_by_its_id(
    cache: Cache, root: Path, ebbtide_run: Any, tmp_path: Path
) -> None:
    with Hub() as hub:
        hub.add_folder("org/tiny", TINY)
        online = {**hub.environment(tmp_path / "hub"), "EBBTIDE_CACHE_DIR": str(root)}
        ended = ebbtide_run("cache", "prepare", "org/tiny", "--dtype", "int8", "--json", **online)
    assert json.loads(ended.out)["made"], ended.err
    [listed] = cache("list", "--json").lines
    assert (listed["model"], listed["file"]) == ("org/tiny", "onnx/model_int8.onnx")
    assert "org/tiny" in cache("list").out
    assert list((tmp_path / "hub").rglob("tokenizer.json"))


def test_the_list_for_people_fits_80_columns_and_ends_with_total_and_limit(
    cache: Cache, one: str
) -> None:
    for words in ((), ("list",)):
        shown = cache(*words, limit="3 GB").out
        assert max(map(len, shown.splitlines())) <= 80
        for word in ("tiny-bert", "onnx/model.onnx", "ready", one[:8], " kB "):
            assert word in shown
        assert shown.splitlines()[-1].endswith("in 1 prepared model, of at most 3.0 GB")


def test_without_a_store_all_say_so_and_none_makes_one(cache: Cache, root: Path) -> None:
    assert f"There is no prepared model in {root}" in cache("list").out
    assert cache("list", "--json").out == ""
    for words in (("verify",), ("prune",), ("clear", "--yes")):
        ended = cache(*words)
        assert (ended.code, ended.err) == (0, "")
    assert not root.exists()


def test_damaged_entries_are_listed_as_such(cache: Cache, root: Path, two: tuple[str, str]) -> None:
    first, second = two
    (root / "prepared" / first / "manifest.json").write_text("{}")
    (root / "prepared" / second / "model.onnx.data").write_bytes(b"short")
    assert [one["damaged"] for one in cache("list", "--json").lines] == [True, True]
    shown = cache("list").out
    assert shown.count("damaged") == 2
    assert "an unknown model" in shown


@pytest.mark.parametrize(
    ("change", "said"),
    [({"onnxruntime": "1.0.0"}, "is for 1.0.0"), ({"cpu": "other"}, "other processor")],
)
def test_an_entry_that_does_not_fit_this_process_says_why(
    cache: Cache, root: Path, one: str, change: dict[str, str], said: str
) -> None:
    folder = root / "prepared" / one
    manifest = Manifest.read(folder)
    assert manifest is not None
    dataclasses.replace(manifest, **change).write(folder)  # type: ignore[arg-type]
    [listed] = cache("list", "--json").lines
    assert (listed["fits"], listed["damaged"]) == (False, False)
    shown = cache("list").out
    assert "does not fit" in shown
    assert said in shown


def test_the_path_stands_alone(cache: Cache, root: Path) -> None:
    assert cache("path").out == f"{root}\n"


# What cannot be prepared


def test_a_graph_that_cannot_be_prepared_says_why_until_the_store_is_cleared(
    cache: Cache, root: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(TINY, broken)
    (broken / "onnx" / "model.onnx").write_bytes(b"no graph")
    for _ in range(2):
        ended = cache("prepare", broken)
        assert (ended.code, ended.out) == (1, "")
        assert f"No prepared copy of {broken}/onnx/model.onnx can be made: " in ended.err
        assert "ONNX Runtime could not load" in ended.err
        assert ended.err.count("\n") == 1
    assert list(root.glob("refused/*"))
    cache("clear", "--yes")
    assert not list(root.glob("refused/*"))


def test_a_copy_that_the_limit_forbids_exits_with_1(cache: Cache) -> None:
    for size in ("300 kB", "320 kB"):  # less than the original, and than its copy
        ended = cache("prepare", TINY, limit=size)
        assert (ended.code, ended.out) == (1, "")
        assert "settings.cache_size" in ended.err
        assert cache("list", "--json").out == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("prepare", TINY, "--dtype", "q2"), "It has these dtypes: fp32"),
        (("prepare", TINY, "--task", "fil-mask"), "Did you mean 'fill-mask'"),
        (("prepare", TINY, "--device", "gpu"), "Unknown device 'gpu'"),
        (("prepare", "no/such/folder/here"), "There is no folder"),
        (("verify", "beef"), "There is no prepared model of key 'beef'"),
        (("prune", "--size", "lots"), "--size takes bytes, as in '5 GB'"),
    ],
)
def test_a_wrong_call_says_what_is_wrong_and_exits_with_2(
    cache: Cache, words: tuple[str | Path, ...], said: str
) -> None:
    ended = cache(*words)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize("command", ["list", "verify", "prune", "clear"])
def test_a_store_that_is_no_folder_is_named(cache: Cache, root: Path, command: str) -> None:
    root.write_text("not a folder")
    ended = cache(command)
    assert (ended.code, ended.out) == (2, "")
    assert f"{root} is no folder" in ended.err
    assert cache("path").out == f"{root}\n"
    assert cache("prepare", TINY).code == 1


def test_a_store_that_cannot_be_changed_is_shown_and_said(
    cache: Cache, root: Path, one: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "rename", refuse)  # for root, no mode makes a folder read-only
    flip(root / "prepared" / one)
    for words in (("prune", "--size", "0"), ("clear",), ("verify", "--remove")):
        ended = cache(*words)
        assert ended.code == 1
        assert f"{root}, cannot be changed: Read-only file system." in ended.err
    assert [entry["key"] for entry in cache("list", "--json").lines] == [one]


def test_a_store_of_an_image_serves_who_waits_though_no_hash_can_be_kept(
    root: Path, one: str, fresh_process: Any
) -> None:
    shutil.rmtree(root / "identities")
    (root / "identities").write_text("cannot be written")
    script = """
        import ebbtide
        with ebbtide.pipeline("feature-extraction", MODEL, prepare="now") as pipe:
            print(*[one.source for one in pipe.memory.holdings if one.source])
    """
    assert fresh_process(script, EBBTIDE_CACHE_DIR=str(root)).split() == ["prepared"]
    assert [entry.key for entry in entries(root)] == [one]


# verify


def test_a_changed_bit_is_found_told_and_removed(
    cache: Cache, root: Path, two: tuple[str, str]
) -> None:
    bad, good = two
    assert cache("verify").code == 0
    flip(root / "prepared" / bad)
    ended = cache("verify")
    assert ended.code == 1
    rows = ended.out.splitlines()
    assert any(row.startswith(f"damaged  {bad[:8]}  {TINY}, onnx/model.onnx: ") for row in rows)
    assert any(row.startswith(f"good     {good[:8]}  {OTHER}") for row in rows)
    assert "ebbtide cache verify --remove" in rows[-1]
    told = {one["key"]: one for one in cache("verify", "--json").lines}
    assert (told[bad]["good"], told[good]["good"]) == (False, True)
    assert "is not what was written" in told[bad]["problem"]
    removed = cache("verify", "--remove")
    assert removed.code == 0
    assert "removed" in removed.out
    assert [entry.key for entry in entries(root)] == [good]


def test_only_the_keys_that_are_named_are_checked(
    cache: Cache, root: Path, two: tuple[str, str]
) -> None:
    bad, good = two
    flip(root / "prepared" / bad)
    [told] = cache("verify", good[:6], "--json").lines
    assert (told["key"], told["good"]) == (good, True)
    assert cache("verify", good).code == 0
    assert cache("verify", bad[:6], "--json").code == 1
    ended = cache("verify", "")
    assert (ended.code, ended.out) == (2, "")


def test_a_beginning_of_several_keys_is_refused(cache: Cache, root: Path, one: str) -> None:
    shutil.copytree(root / "prepared" / one, root / "prepared" / f"{one[:-1]}~")
    ended = cache("verify", one[:8])
    assert ended.code == 2
    assert f"2 keys begin with '{one[:8]}'" in ended.err
    [told] = cache("verify", f"{one[:-1]}~", "--json").lines
    assert told["problem"] == "it is another entry's"


def test_a_damaged_entry_goes_though_a_process_uses_it(cache: Cache, root: Path, one: str) -> None:
    with in_use(TINY):
        flip(root / "prepared" / one)
        ended = cache("verify", "--remove")
        assert "a process uses it still: restart that one" in ended.out
        assert ended.code == 0
        assert entries(root) == []


# prune and clear


def test_pruning_removes_the_least_recently_used_and_nothing_more(
    cache: Cache, root: Path, two: tuple[str, str]
) -> None:
    old, new = two
    age(root, old)
    keeps = next(one.size for one in entries(root) if one.key == new)
    told = json.loads(cache("prune", "--size", str(keeps), "--json").out)
    assert told["removed"] == [old]
    assert told["freed"] > 100_000
    assert [entry.key for entry in entries(root)] == [new]
    assert json.loads(cache("prune", "--json").out)["removed"] == []
    assert "nothing was removed" in cache("prune").out
    ended = cache("prune", limit="1 kB")
    assert f"removed  {new[:8]}  {OTHER}, onnx/model.onnx: " in ended.out
    assert entries(root) == []


def test_what_is_in_use_stays_and_that_is_said(
    cache: Cache, root: Path, two: tuple[str, str]
) -> None:
    used, free = two
    with in_use(TINY):
        age(root, used)
        ended = cache("prune", "--size", "0")
        assert f"removed  {free[:8]}" in ended.out
        assert f"in use   {used[:8]}  {TINY}, onnx/model.onnx" in ended.out
        assert "stays" in ended.out
        told = json.loads(cache("prune", "--size", "0", "--json").out)
        assert (told["removed"], told["in_use"]) == ([], [used])
        told = json.loads(cache("clear", "--yes", "--json").out)
        assert (told["removed"], told["in_use"]) == ([], [used])
        assert [entry.key for entry in entries(root)] == [used]
    told = json.loads(cache("clear", "--yes", "--json").out)
    assert (told["removed"], told["stay"]) == ([used], 0)


@pytest.mark.parametrize(("answer", "stay"), [("n\n", 1), ("\n", 1), ("\x04", 1), ("y\n", 0)])
def test_on_a_terminal_clearing_asks(
    root: Path, one: str, ebbtide_on_terminal: Any, answer: str, stay: int
) -> None:
    ended = ebbtide_on_terminal("cache", "clear", typed=answer, EBBTIDE_CACHE_DIR=str(root))
    assert ended.code == 0
    assert ended.err.startswith("Remove 1 prepared model, ")
    assert ended.err.endswith(f", from {root}? [y/N] ")
    assert len(entries(root)) == stay
    assert ("nothing was removed" in ended.out) == bool(stay)


def test_with_yes_clearing_does_not_ask(root: Path, one: str, ebbtide_on_terminal: Any) -> None:
    ended = ebbtide_on_terminal("cache", "clear", "--yes", EBBTIDE_CACHE_DIR=str(root))
    assert ended.err == ""
    assert entries(root) == []


# Ctrl-C


def test_control_c_ends_the_wait_quietly_and_leaves_nothing(root: Path, one: str) -> None:
    shutil.rmtree(root / "prepared")
    leader, follower = pty.openpty()
    shown = b""
    with FileLock(root / "locks" / f"{one}.lock"):  # the child waits for who writes it
        process = subprocess.Popen(
            [*COMMAND, "cache", "prepare", str(TINY)],
            stdout=subprocess.PIPE,
            stderr=follower,
            env={**os.environ, "EBBTIDE_CACHE_DIR": str(root), "TERM": "xterm"},
        )
        os.close(follower)
        while b"preparing" not in shown:
            shown += os.read(leader, 4096)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    with contextlib.suppress(OSError):  # Linux: the other end is closed
        while piece := os.read(leader, 4096):
            shown += piece
    os.close(leader)
    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in shown
    assert b"ebbtide:" not in shown
    assert list((root / "prepared").glob("*")) == []
