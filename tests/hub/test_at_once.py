"""Several that want the same model at once download each of its files once, and all get it."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import utils

from ebbtide.cancellation import CancelToken
from ebbtide.hub import Repository, download
from ebbtide.hub.events import quiet

from .loopback import Hub
from .served import (
    MODELS,
    NAME,
    ONNX,
    TASK,
    TINY,
    answers,
    files_asked,
    looked_up,
    of_folder,
    ranges,
    succeed,
)

CUT = 100_000
CDN = f"/cdn/*/{ONNX}"

LOAD = f"""
    import ebbtide
    from huggingface_hub import utils
    original = utils.WeakFileLock

    def lock(path, **options):
        if len(str(path).rpartition("/")[2]) > 64:
            print("locking", flush=True)
        return original(path, **options)

    def tell(event):
        if event.get("file") == "{ONNX}" and event.get("loaded") == {CUT}:
            print("there", flush=True)

    utils.WeakFileLock = lock
    with ebbtide.pipeline("{TASK}", "{NAME}", progress=tell) as pipe:
        print(pipe("the tide").shape)
"""


def test_two_processes_download_each_file_once_and_both_get_it(
    hub: Hub, tiny: str, cache: Path, child: Any
) -> None:
    held = hub.fault(CDN, hold=True)
    processes = [child(LOAD), child(LOAD)]
    for one in processes:
        one.until("locking")
    assert held.reached.wait(20)
    held.end()
    assert [out.splitlines()[-1] for out in succeed(processes)] == ["(1, 5, 32)"] * 2
    assert set(Counter(files_asked(hub)).values()) == {1}
    assert (len(looked_up(hub)), ranges(hub)) == (2, [None])


def test_one_of_two_processes_that_is_killed_leaves_its_part_to_the_other(
    hub: Hub, tiny: str, cache: Path, child: Any
) -> None:
    hub.fault(CDN, stall_after=CUT)
    first = child(LOAD)
    first.until("there")
    second = child(LOAD)
    second.until("locking")
    first.process.kill()
    first.process.wait()
    assert second.succeeds().splitlines()[-1] == "(1, 5, 32)"
    first_range, second_range = ranges(hub)
    assert first_range is None
    assert second_range is not None
    assert 0 < int(second_range.removeprefix("bytes=").removesuffix("-")) <= CUT


def test_two_threads_download_each_file_once_and_both_get_it(
    hub: Hub, tiny: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = hub.fault(CDN, hold=True)
    locking = threading.Semaphore(0)
    original = utils.WeakFileLock

    def lock(path: Path, **options: Any) -> Any:
        if len(path.stem) == 64:
            locking.release()
        return original(path, **options)

    monkeypatch.setattr(utils, "WeakFileLock", lock)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(answers())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert locking.acquire(timeout=20)
    assert held.reached.wait(20)
    held.end()
    for thread in threads:
        thread.join(20)
    assert len(found) == 2
    assert all(np.array_equal(one, of_folder()) for one in found)
    assert set(Counter(files_asked(hub)).values()) == {1}
    assert ranges(hub) == [None]


def test_two_models_are_loaded_at_once_by_one_process(hub: Hub, tiny: str, cache: Path) -> None:
    hub.add_folder("org/other", MODELS / "tiny-distilbert")
    held = hub.fault("/cdn/*", hold=True, times=None)
    found: dict[str, Any] = {}
    names = {NAME: TINY, "org/other": MODELS / "tiny-distilbert"}
    threads = [
        threading.Thread(target=lambda name=name: found.update({name: answers(name)}))
        for name in names
    ]
    for thread in threads:
        thread.start()
    hub.wait_for(lambda requests: sum("/cdn/" in one.path for one in requests) == 2)
    held.end()
    for thread in threads:
        thread.join(20)
    assert all(np.array_equal(found[name], answers(folder)) for name, folder in names.items())


@pytest.mark.parametrize("links", [True, False], ids=["by links", "without links"])
def test_what_another_brought_since_it_was_found_missing_is_not_downloaded_again(
    hub: Hub, tiny: str, cache: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def fail(self: Path, target: object) -> None:
        raise OSError("no links here")

    if not links:
        monkeypatch.setattr(Path, "symlink_to", fail)
    token = CancelToken("a load")
    model = download.Hub(Repository(None, NAME), "main", None)
    commit, listing = model.look_up(token)
    for _ in range(2):  # the second is the one that had to wait for the first
        model.fetch(commit, [listing[ONNX], listing["config.json"]], quiet, token)
    assert sorted(files_asked(hub)) == ["config.json", ONNX]
