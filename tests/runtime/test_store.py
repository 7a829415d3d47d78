"""The prepared store by itself: entries are whole or not used, and never taken from their users."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ebbtide
from ebbtide.runtime import store as stores
from ebbtide.runtime.identity import Content
from ebbtide.runtime.store import DATA, GRAPH, MANIFEST, Held, Manifest, Store, cpu_features

from .stored import copies, damage, ended, left_over, process, replace, reseal

VERSION = "1.99"
KEY = "0123456789abcdef0123456789abcdef01234567"


def publish(store: Store, key: str = KEY, size: int = 40_000, **changed: Any) -> Path:
    """Write an entry, of bytes that nobody will run."""
    with store.writing(key) as folder:
        assert folder is not None
        (folder / GRAPH).write_bytes(random.Random(key).randbytes(3_000))
        (folder / DATA).write_bytes(random.Random(size).randbytes(size))
        about: dict[str, Any] = {
            "key": key,
            "model": "/models/model.onnx",
            "source": (Content("", 3, "abc"), Content("model.onnx_data", 4, "def")),
            "onnxruntime": VERSION,
            "cpu": cpu_features(),
            "options": "[]",
            "files": stores.describe(folder, (GRAPH, DATA)),
            "anonymous": 1_000,
            "seconds": 0.5,
            "created": 1.0,
        }
        store.publish(folder, Manifest(**{**about, **changed}))
    return store.root / "prepared" / key


@contextlib.contextmanager
def held(store: Store, key: str = KEY) -> Iterator[Held | None]:
    found = store.hold(key, VERSION)
    try:
        yield found
    finally:
        if found is not None:
            found.close()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # hundreds of times, on a slow disk
    return Store(tmp_path / "store")


@pytest.fixture
def entry(store: Store) -> Path:
    return publish(store)


HOLDER = """
import sys
from pathlib import Path
from ebbtide.runtime.store import Store
found = Store(Path({root!r})).hold({key!r}, {version!r})
print(found is not None, flush=True)
sys.stdin.read()
"""


def holder(store: Store, key: str = KEY) -> subprocess.Popen[str]:
    """A process that has an entry in use until it is told to end."""
    running = process(HOLDER.format(root=str(store.root), key=key, version=VERSION))
    assert running.stdout is not None
    assert running.stdout.readline() == "True\n"
    return running


def test_what_was_published_is_found_as_it_was_written(store: Store, entry: Path) -> None:
    with held(store) as found:
        assert found is not None
        assert found.graph == entry / GRAPH
        assert found.manifest == Manifest.read(entry)
        assert found.manifest.source[1] == Content("model.onnx_data", 4, "def")
        assert found.manifest.size == 43_000
    assert store.has(KEY)
    assert left_over(store.root) == []


def test_an_entry_that_is_not_there_is_none(store: Store) -> None:
    assert store.hold(KEY, VERSION) is None
    assert not store.has(KEY)
    assert store.entries() == []
    assert store.prune(0) == []


@pytest.mark.parametrize("name", [GRAPH, DATA, MANIFEST])
@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_a_file_that_is_cut_is_never_used_and_the_entry_goes(
    store: Store, entry: Path, name: str, keep: float
) -> None:
    content = (entry / name).read_bytes()
    replace(entry / name, content[: int((len(content) - 1) * keep)])
    assert store.hold(KEY, VERSION) is None
    assert copies(store.root) == []
    assert left_over(store.root) == []


@pytest.mark.parametrize("name", [GRAPH, DATA, MANIFEST])
def test_a_file_that_is_missing_is_an_entry_that_is(store: Store, entry: Path, name: str) -> None:
    (entry / name).unlink()
    assert store.hold(KEY, VERSION) is None
    publish(store)
    with held(store) as found:
        assert found is not None
    assert len(copies(store.root)) == 1


@pytest.mark.parametrize("name", [GRAPH, MANIFEST])
def test_any_flipped_bit_of_graph_or_manifest_is_seen_at_the_load(
    store: Store, entry: Path, name: str
) -> None:
    dice = random.Random(8)
    whole = (entry / name).read_bytes()
    for _ in range(100):
        damage(entry / name, dice.randrange(len(whole) * 8))
        assert store.hold(KEY, VERSION) is None
        assert not entry.exists()
        publish(store)


def test_200_flips_of_200_in_the_data_are_seen_by_verify(store: Store, entry: Path) -> None:
    dice = random.Random(200)
    whole = (entry / DATA).read_bytes()
    (one,) = store.entries()
    assert store.verify(one) is None
    seen = 0
    for _ in range(200):
        damage(entry / DATA, dice.randrange(len(whole) * 8))
        seen += store.verify(one) == f"{DATA} is not what was written"
        replace(entry / DATA, whole)
    assert seen == 200
    assert store.verify(one) is None


def test_200_flips_of_200_in_the_data_are_seen_at_the_load_where_all_is_verified(
    store: Store, entry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ebbtide.settings, "verify", "always")
    dice = random.Random(201)
    seen = 0
    for _ in range(200):
        with held(store) as whole:
            assert whole is not None
        damage(entry / DATA, dice.randrange(40_000 * 8))
        seen += store.hold(KEY, VERSION) is None
        publish(store)
    assert seen == 200


def test_the_data_are_not_read_at_a_load_unless_all_is_verified(
    store: Store, entry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = stores.hash_of
    monkeypatch.setattr(stores, "hash_of", lambda path: read.append(path.name) or original(path))
    with held(store) as found:
        assert found is not None
    assert read == [GRAPH]


@pytest.mark.parametrize(
    "changed",
    [{"format": stores.FORMAT + 1}, {"onnxruntime": "0.1"}, {"cpu": "another"}, {"key": "f" * 40}],
    ids=lambda changed: next(iter(changed)),
)
def test_an_entry_of_another_format_version_processor_or_name_is_not_used(
    store: Store, entry: Path, changed: dict[str, Any]
) -> None:
    reseal(entry, **changed)
    assert store.hold(KEY, VERSION) is None
    assert not entry.exists()


def test_an_entry_that_was_renamed_to_another_key_is_not_used(store: Store, entry: Path) -> None:
    other = "f" * 40
    entry.rename(entry.with_name(other))
    assert store.hold(other, VERSION) is None
    assert copies(store.root) == []


def test_an_entry_in_use_is_never_pruned_by_this_process_or_another(
    store: Store, entry: Path
) -> None:
    with held(store) as found:
        assert found is not None
        assert store.entries()[0].in_use
        assert store.prune(0) == []
        ended(
            process(
                f"""
                from pathlib import Path
                from ebbtide.runtime.store import Store
                assert Store(Path({str(store.root)!r})).prune(0) == []
                """
            )
        )
        assert entry.is_dir()
    assert not store.entries()[0].in_use
    assert [one.key for one in store.prune(0)] == [KEY]


def test_pruning_takes_the_least_recently_used_first_and_passes_by_what_others_use(
    store: Store,
) -> None:
    keys = [letter * 40 for letter in "abcd"]
    for age, key in enumerate(keys):
        os.utime(publish(store, key), (age, age))
    other = holder(store, keys[0])
    os.utime(store.root / "prepared" / keys[0], (0, 0))
    assert [one.key for one in store.entries()] == keys[::-1]
    assert [one.key for one in store.prune(100_000)] == [keys[1], keys[2]]
    ended(other)
    assert [one.key for one in store.prune(50_000)] == [keys[0]]
    assert store.prune(44_000) == []
    assert [one.key for one in store.entries()] == [keys[3]]
    assert left_over(store.root) == []


def test_a_load_makes_an_entry_the_most_recently_used(store: Store) -> None:
    for key in ("a" * 40, "b" * 40):
        os.utime(publish(store, key), (1, 1))
    with held(store, "a" * 40):
        pass
    assert [one.key for one in store.entries()] == ["a" * 40, "b" * 40]


def test_a_user_that_is_killed_uses_nothing_any_more(store: Store, entry: Path) -> None:
    other = holder(store)
    assert store.prune(0) == []
    other.kill()
    other.communicate()
    assert len(store.prune(0)) == 1


def test_who_uses_an_entry_keeps_it_when_it_is_removed_or_replaced(
    store: Store, entry: Path
) -> None:
    expected = (entry / DATA).read_bytes()
    with held(store), (entry / DATA).open("rb") as file:
        store.discard(KEY, "a test says so")
        assert not entry.exists()
        publish(store, size=50_000)
        assert file.read() == expected
        with held(store) as new:
            assert new is not None
            assert new.manifest.files[DATA][0] == 50_000
            assert store.prune(0) == []


def test_removing_does_not_take_what_came_in_its_place(
    store: Store, entry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (one,) = store.entries()
    original = stores._lock

    def slow(descriptor: int, *, shared: bool) -> bool:
        monkeypatch.setattr(stores, "_lock", original)
        store.discard(KEY, "it goes")
        publish(store, size=50_000)
        return original(descriptor, shared=shared)

    monkeypatch.setattr(stores, "_lock", slow)
    store.remove(one)
    with held(store) as found:
        assert found is not None
        assert found.manifest.files[DATA][0] == 50_000


@pytest.mark.parametrize("again", [True, False])
def test_an_entry_that_is_removed_while_it_is_taken_is_none(
    store: Store, entry: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    original = stores._lock

    def slow(descriptor: int, *, shared: bool) -> bool:
        monkeypatch.setattr(stores, "_lock", original)
        store.prune(0)
        if again:
            publish(store)
        return original(descriptor, shared=shared)

    monkeypatch.setattr(stores, "_lock", slow)
    assert store.hold(KEY, VERSION) is None, "the lock is on what was removed"
    assert len(copies(store.root)) == again


def test_one_process_writes_an_entry_at_a_time(store: Store) -> None:
    with store.writing(KEY) as folder:
        assert folder is not None
        waited = threading.Thread(target=publish_if_missing, args=(store,))
        waited.start()
        with other_writer(store) as found:
            assert found is None
        (folder / GRAPH).write_bytes(b"graph")
        manifest = Manifest.read(publish(store, "e" * 40))
        assert manifest is not None
        files = stores.describe(folder, (GRAPH,))
        store.publish(folder, stores.dataclasses.replace(manifest, key=KEY, files=files))
    waited.join(30)
    assert not waited.is_alive()
    with held(store) as found:
        assert found is not None
        assert found.manifest.files == files, "who waited found it there and wrote none"


def publish_if_missing(store: Store) -> None:
    with Store(store.root).writing(KEY) as folder:
        assert folder is None


@contextlib.contextmanager
def other_writer(store: Store) -> Iterator[Path | None]:
    with Store(store.root).writing(KEY, wait=False) as folder:
        yield folder


def test_what_a_writer_that_failed_had_written_goes(store: Store) -> None:
    def write() -> None:
        with store.writing(KEY) as folder:
            assert folder is not None
            (folder / GRAPH).write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write()
    assert copies(store.root) == []
    assert left_over(store.root) == []


def test_what_killed_writers_and_removers_left_is_swept(store: Store, entry: Path) -> None:
    place = store.root / "prepared"
    for name in (f".{KEY}.77.new", f".{'c' * 40}.78.new", f".{'d' * 40}.12345.gone"):
        (place / name).mkdir()
        (place / name / DATA).write_bytes(b"half")
    store.identities.mkdir()
    (store.root / "refused").mkdir()
    old = store.identities / ".abc.json.x8d"
    new = store.root / "refused/.abc.json.x8e"
    for file in (old, new):
        file.write_bytes(b"half")
    an_hour_ago = time.time() - 3600
    os.utime(old, (an_hour_ago, an_hour_ago))
    store.sweep()
    assert left_over(store.root) == ["refused/.abc.json.x8e"], "it may be in the writing"
    assert copies(store.root) == [entry]


def test_a_sweep_leaves_alone_what_another_process_is_writing(store: Store) -> None:
    other = process(
        f"""
        import sys
        from pathlib import Path
        from ebbtide.runtime.store import Store
        with Store(Path({str(store.root)!r})).writing({KEY!r}) as folder:
            (folder / "half").touch()
            print(folder, flush=True)
            sys.stdin.read()
        """
    )
    assert other.stdout is not None
    half = Path(other.stdout.readline().strip()) / "half"
    store.sweep()
    store.prune(0)
    assert half.exists()
    other.kill()
    other.communicate()
    store.sweep()
    assert left_over(store.root) == []


def test_a_refusal_is_remembered_until_it_is_damaged_or_forgotten(store: Store) -> None:
    assert store.refusal(KEY) is None
    store.refuse(KEY, "it has an operator of its own")
    assert store.refusal(KEY) == "it has an operator of its own"
    store.forget()
    assert store.refusal(KEY) is None
    store.refuse(KEY, "again")
    damage(store.root / f"refused/{KEY}.json", 30)
    assert store.refusal(KEY) is None


def test_hashes_that_nobody_asked_for_in_months_are_forgotten(store: Store) -> None:
    horizon = time.time() - stores._LONGEST_UNUSED
    store.identities.mkdir(parents=True)
    for name, age in (("old.json", horizon - 1), ("new.json", horizon + 3600)):
        (store.identities / name).touch()
        os.utime(store.identities / name, (age, age))
    store.prune(0)
    assert [one.name for one in store.identities.iterdir()] == ["new.json"]


def test_a_list_shows_what_is_damaged_too_and_passes_by_what_is_no_entry(
    store: Store, entry: Path
) -> None:
    publish(store, "b" * 40)
    replace(entry / MANIFEST, b"")
    (store.root / "prepared/a-file").write_text("of somebody's")
    found = {one.key: one for one in store.entries()}
    assert set(found) == {KEY, "b" * 40}
    assert found[KEY].manifest is None
    assert found[KEY].size == 43_000
    assert store.verify(found[KEY]) == "its manifest is damaged"
    assert store.remove(found[KEY])
    assert [one.name for one in copies(store.root)] == ["a-file", "b" * 40]


def test_what_the_processor_can_do_is_the_same_each_time_and_says_its_kind() -> None:
    found = cpu_features()
    stores.cpu_features.cache_clear()
    assert cpu_features() == found
    assert os.uname().machine in found


def test_a_store_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    store = Store(tmp_path / "file")
    with pytest.raises(OSError, match="file"), store.writing(KEY):
        pass
    assert store.hold(KEY, VERSION) is None
    assert store.entries() == []
    store.sweep()


def test_processes_that_publish_hold_and_prune_at_once_never_meet_half_an_entry(
    store: Store,
) -> None:
    script = f"""
    import logging, random, sys
    from pathlib import Path
    sys.path.insert(0, {str(Path(__file__).parent.parent.parent)!r})
    from tests.runtime.test_store import KEY, Store, publish, held
    logging.disable()
    store, seen = Store(Path({str(store.root)!r})), 0
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(25):
        act = random.randrange(4)
        if act == 0:
            store.prune(0)
        elif act == 1:
            with held(store) as found:
                if found is not None:
                    seen += 1
                    assert len((found.graph).read_bytes()) == 3_000
        else:
            with store.writing(KEY) as folder:
                free = folder is not None
            if free:
                try:
                    publish(store)
                except AssertionError:
                    pass  # another was faster
    print("seen", seen)
    """
    running = [process(script, EBBTIDE_PREPARE="off") for _ in range(4)]
    for one in running:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    for one in running:
        assert "seen" in ended(one, "\n")
    store.sweep()
    assert left_over(store.root) == []
