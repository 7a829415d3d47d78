"""Another processor, emulated: it has copies of its own, and takes no others'."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from .stored import SOURCE, TINY, copies, left_over, reseal

QEMU = shutil.which("qemu-x86_64-static")

pytestmark = [
    pytest.mark.soak,  # a minute each: five emulated processes
    pytest.mark.timeout(600),
    pytest.mark.skipif(QEMU is None, reason="needs qemu-x86_64-static (Debian: qemu-user-static)"),
    pytest.mark.skipif(
        sys.platform != "linux" or os.uname().machine != "x86_64", reason="emulates an x86_64"
    ),
]

SCRIPT = f"""
import json, sys
import ebbtide
from ebbtide.runtime.store import cpu_features
sys.executable = sys.argv[1]  # so that the process that prepares is emulated as well
found = {{}}
with ebbtide.pipeline("feature-extraction", {str(TINY)!r}, prepare=sys.argv[2]) as pipe:
    found["source"] = pipe.memory.holdings[1].source
    found["answer"] = pipe("the sea").ravel().tolist()
found["cpu"] = cpu_features()
print(json.dumps(found))
"""


class On:
    """Runs a fresh Python on a processor."""

    def __init__(self, cpu: str | None, folder: Path) -> None:
        self.command = [sys.executable]
        self.python = sys.executable
        if cpu is not None:
            assert QEMU is not None
            self.command = [QEMU, "-cpu", cpu, sys.executable]
            wrapper = folder / f"python-{cpu}"
            wrapper.write_text(f'#!/bin/sh\nexec {QEMU} -cpu {cpu} {sys.executable} "$@"\n')
            wrapper.chmod(0o755)
            self.python = str(wrapper)

    def __call__(self, root: Path, prepare: str = "now") -> dict[str, Any]:
        done = subprocess.run(
            [*self.command, "-c", textwrap.dedent(SCRIPT), self.python, prepare],
            capture_output=True,
            text=True,
            timeout=110,
            env={**os.environ, "PYTHONPATH": SOURCE, "EBBTIDE_CACHE_DIR": str(root)},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert isinstance(found, dict)
        return found


def near(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one["answer"] == pytest.approx(other["answer"], abs=1e-4)


@pytest.mark.parametrize("cpu", ["Haswell", "Nehalem"])
def test_another_processor_has_a_copy_of_its_own_and_right_answers(
    root: Path, tmp_path: Path, cpu: str
) -> None:
    here = On(None, tmp_path)(root)
    there = On(cpu, tmp_path)
    found = there(root)
    assert here["source"] == found["source"] == "prepared"
    assert here["cpu"] != found["cpu"]
    assert near(here, found)
    keys = {one.name for one in copies(root)}
    assert len(keys) == 2
    assert left_over(root) == []

    original = there(tmp_path / "nowhere", "off")
    assert original["source"] == "original"
    assert original["answer"] == found["answer"], "to the bit, on the same processor"

    own = next(one for one in copies(root) if json_of(one)["cpu"] == found["cpu"])
    ours = next(one for one in copies(root) if one != own)
    shutil.rmtree(own)
    shutil.copytree(ours, own)  # the copy made here, by the name of the one made there
    renamed = there(root, "off")
    assert renamed["source"] == "original"
    assert renamed["answer"] == original["answer"]
    assert not own.exists()
    shutil.copytree(ours, own)
    reseal(own, key=own.name)  # and with a manifest that says so, but for the processor
    forged = there(root, "off")
    assert forged["source"] == "original"
    assert forged["answer"] == original["answer"]
    assert {one.name for one in copies(root)} == {ours.name}


def json_of(entry: Path) -> dict[str, Any]:
    content = json.loads((entry / "manifest.json").read_bytes().split(b"\n")[0])
    assert isinstance(content, dict)
    return content
