"""Which content a graph is: hashes that are computed once, and files that seal themselves."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbtide.runtime import identity
from ebbtide.runtime.identity import Content, contents, read_sealed, write_sealed
from ebbtide.runtime.store import Store

from .stored import MODELS, TINY

EXTERNAL = MODELS / "tiny-external/onnx"


@pytest.fixture(autouse=True)
def _files_are_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was written a moment ago counts as one that was written long ago."""
    monkeypatch.setattr(identity, "_SETTLED", -1.0)


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    return tmp_path / "memory"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A graph with external data."""
    shutil.copytree(EXTERNAL, tmp_path / "model")
    return tmp_path / "model/model.onnx"


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def key(graph: Path, memory: Path, onnxruntime: str = "1", options: str = "[]") -> str | None:
    store = Store(memory)
    found = store.key(graph, onnxruntime=onnxruntime, options=options, compute=True)
    return None if found is None else found[0]


def a_location(name: str | bytes) -> bytes:
    """How a graph says that a tensor's data are in a file."""
    text = name.encode() if isinstance(name, str) else name
    size, length = len(text), b""
    while size > 127:
        length += bytes([size & 127 | 128])
        size >>= 7
    return b"\x0a\x08location\x12" + length + bytes([size]) + text


def test_a_graph_is_its_file_and_its_external_data(model: Path, memory: Path) -> None:
    data = model.with_name("model.onnx_data")
    assert contents(model, memory, compute=True) == (
        Content("", model.stat().st_size, sha(model.read_bytes())),
        Content("model.onnx_data", data.stat().st_size, sha(data.read_bytes())),
    )


def test_what_is_not_known_yet_is_computed_only_if_asked(model: Path, memory: Path) -> None:
    assert contents(model, memory, compute=False) is None
    found = contents(model, memory, compute=True)
    assert contents(model, memory, compute=False) == found


def test_a_hash_is_computed_once(
    model: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    original = identity.hash_of

    def counting(path: Path) -> str:
        hashed.append(path.name)
        return original(path)

    monkeypatch.setattr(identity, "hash_of", counting)
    for _ in range(3):
        assert contents(model, memory, compute=True)
    assert hashed == ["model.onnx", "model.onnx_data"]


def test_a_file_that_was_written_a_moment_ago_is_not_remembered(
    model: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "_SETTLED", 3600.0)
    assert contents(model, memory, compute=True)
    assert contents(model, memory, compute=False) is None


def test_a_memory_that_cannot_be_written_only_costs_time(model: Path, tmp_path: Path) -> None:
    memory = tmp_path / "file"
    memory.write_text("no folder")
    found = contents(model, memory, compute=True)
    assert found is not None
    assert contents(model, memory, compute=False) == found  # in this process


def test_other_users_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_sealed(tmp_path / "note.json", {"a": 1})
    finally:
        os.umask(before)
    assert (tmp_path / "note.json").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx_data"])
def test_another_content_is_another_key(model: Path, memory: Path, name: str) -> None:
    before = key(model, memory)
    file = model.with_name(name)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    stat = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # only the change's time tells
    assert contents(model, memory, compute=False) is None
    assert key(model, memory) != before


def test_another_time_is_the_same_key_once_it_is_hashed_again(model: Path, memory: Path) -> None:
    before = key(model, memory)
    os.utime(model)
    assert contents(model, memory, compute=False) is None
    assert key(model, memory) == before


def test_the_same_content_elsewhere_is_the_same_key(
    model: Path, memory: Path, tmp_path: Path
) -> None:
    other = tmp_path / "elsewhere"
    shutil.copytree(model.parent, other)
    assert key(other / "model.onnx", memory) == key(model, memory)


def test_the_same_bytes_by_another_name_of_its_data_are_another_key(
    model: Path, memory: Path
) -> None:
    before = key(model, memory)
    model.write_bytes(model.read_bytes().replace(b"model.onnx_data", b"model.onnx_dat2"))
    model.with_name("model.onnx_data").rename(model.with_name("model.onnx_dat2"))
    assert key(model, memory) != before


def test_data_that_are_missing_are_another_key(model: Path, memory: Path) -> None:
    before = key(model, memory)
    model.with_name("model.onnx_data").unlink()
    assert key(model, memory) not in (None, before)


def test_version_and_options_are_part_of_the_key(model: Path, memory: Path) -> None:
    found = {
        key(model, memory),
        key(model, memory, onnxruntime="2"),
        key(model, memory, options='["none"]'),
    }
    assert len(found) == 3


def test_the_processor_is_part_of_the_key(
    model: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = key(model, memory)
    monkeypatch.setattr("ebbtide.runtime.store.cpu_features", lambda: "another")
    assert key(model, memory) != before


def test_a_blob_of_the_hub_has_its_hash_as_its_name(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (TINY / "onnx/model.onnx").read_bytes()
    blob = tmp_path / "models--a--b/blobs" / sha(content)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(content)
    link = tmp_path / "models--a--b/snapshots/c0ffee/onnx/model.onnx"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    monkeypatch.setattr(identity, "hash_of", None)
    assert contents(link, memory, compute=True) == (Content("", len(content), sha(content)),)


@pytest.mark.parametrize("name", ["0" * 63, "g" * 64, "a" * 40, "A" * 64])
def test_a_name_that_is_no_hash_is_not_taken_for_one(
    tmp_path: Path, memory: Path, name: str
) -> None:
    blob = tmp_path / "blobs" / name
    blob.parent.mkdir()
    blob.write_bytes(b"not empty")
    assert contents(blob, memory, compute=True) == (Content("", 9, sha(b"not empty")),)


@pytest.mark.parametrize("name", ["/etc/hostname", "../model.onnx", "a/../../b", ".."])
def test_data_outside_of_the_folder_are_not_looked_at(
    tmp_path: Path, memory: Path, name: str
) -> None:
    graph = tmp_path / "folder/model.onnx"
    graph.parent.mkdir()
    graph.write_bytes(b"before" + a_location(name) + b"after")
    assert contents(graph, memory, compute=True) is None


def test_data_in_a_folder_below_are_found(tmp_path: Path, memory: Path) -> None:
    graph = tmp_path / "model.onnx"
    graph.write_bytes(a_location("weights/one.bin") + a_location("two.bin"))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/one.bin").write_bytes(b"1")
    (tmp_path / "two.bin").write_bytes(b"2")
    found = contents(graph, memory, compute=True)
    assert found is not None
    assert [one.name for one in found] == ["", "weights/one.bin", "two.bin"]


def test_an_empty_graph_and_one_that_is_missing_are_no_surprise(
    tmp_path: Path, memory: Path
) -> None:
    graph = tmp_path / "model.onnx"
    with pytest.raises(FileNotFoundError):
        contents(graph, memory, compute=True)
    graph.touch()
    assert contents(graph, memory, compute=True) == (Content("", 0, sha(b"")),)


NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=300
).filter(lambda name: len(name.encode()) <= 4096)


@settings(deadline=None, max_examples=100)
@given(parts=st.lists(NAMES, max_size=4), noise=st.binary(max_size=64))
def test_every_location_is_found_whatever_lies_between(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str], noise: bytes
) -> None:
    graph = tmp_path_factory.getbasetemp() / "scanned.onnx"
    graph.write_bytes(noise + b"".join(a_location(one) + noise for one in parts) + b" ")
    found = identity._external(graph)
    if b"\x0a\x08location" not in noise:
        assert list(found) == list(dict.fromkeys(parts))


@settings(deadline=None, max_examples=100)
@given(
    pieces=st.lists(
        st.binary(max_size=12)
        | st.just(b"\x0a\x08location\x12")
        | NAMES.map(a_location)
        | st.integers(300, 5000).map(lambda length: a_location("x" * length)),
        max_size=6,
    )
)
def test_bytes_that_only_look_like_a_location_do_no_harm(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]
) -> None:
    base = tmp_path_factory.getbasetemp()
    graph = base / "noise.onnx"
    graph.write_bytes(b"".join(pieces))
    found = contents(graph, base / "noise", compute=True)
    assert found is None or found[0] == Content("", graph.stat().st_size, sha(graph.read_bytes()))


JSON = st.dictionaries(
    st.text(max_size=8), st.integers() | st.text(max_size=20) | st.lists(st.booleans()), max_size=4
)


@settings(deadline=None, max_examples=60)
@given(content=JSON, data=st.data())
def test_a_sealed_file_is_read_as_it_was_written_or_not_at_all(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, object], data: st.DataObject
) -> None:
    file = tmp_path_factory.getbasetemp() / "sealed.json"
    write_sealed(file, content)
    assert read_sealed(file) == content
    raw = file.read_bytes()
    bit = data.draw(st.integers(0, len(raw) * 8 - 1))
    flipped = bytearray(raw)
    flipped[bit // 8] ^= 1 << bit % 8
    cut = raw[: data.draw(st.integers(0, len(raw) - 1))]
    longer = raw + data.draw(st.binary(min_size=1, max_size=3))
    for damaged in (bytes(flipped), cut, longer):
        file.write_bytes(damaged)
        assert read_sealed(file) is None


def test_every_bit_and_every_cut_of_a_sealed_file_counts(tmp_path: Path) -> None:
    file = tmp_path / "sealed.json"
    write_sealed(file, {"a": 1})
    raw = file.read_bytes()
    for bit in range(len(raw) * 8):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        assert read_sealed(file) is None, bit
    for size in range(len(raw)):
        file.write_bytes(raw[:size])
        assert read_sealed(file) is None, size


def test_a_sealed_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "sealed.json"
    write_sealed(file, {"a": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(identity.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_sealed(file, {"a": 2})
    assert read_sealed(file) == {"a": 1}
    assert os.listdir(tmp_path) == ["sealed.json"]


def test_a_note_that_is_damaged_is_as_if_it_were_not_there(model: Path, memory: Path) -> None:
    found = contents(model, memory, compute=True)
    for note in memory.iterdir():
        note.write_bytes(note.read_bytes()[:-5])
    assert contents(model, memory, compute=False) is None
    assert contents(model, memory, compute=True) == found
