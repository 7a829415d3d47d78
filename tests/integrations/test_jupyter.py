"""The notebook extension, in a real kernel that is started and stopped as notebooks do."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ipykernel")
manager = pytest.importorskip("jupyter_client.manager")
loops = pytest.importorskip("jupyter_core.utils")

MODEL = str(Path(__file__).parents[1] / "models" / "tiny-bert")
EXAMPLE = Path(__file__).parents[2] / "examples" / "notebook" / "search.ipynb"
SOURCE = str(Path(__file__).parents[2] / "src")
LIMIT = 60.0

SETUP = f"""
import ebbtide
%load_ext ebbtide.integrations.jupyter
def make():
    return ebbtide.pipeline("feature-extraction", {MODEL!r})
"""


class Kernel:
    """A kernel and its client; what a cell shows comes back as text."""

    def __init__(self) -> None:
        path = os.pathsep.join([SOURCE, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.manager = manager.KernelManager()
        self.manager.start_kernel(env={**os.environ, "PYTHONPATH": path})
        self.client: Any = None
        self.connect()

    def connect(self) -> None:
        if self.client is not None:
            self.client.stop_channels()
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=LIMIT)

    def run(self, code: str) -> str:
        """What the cell printed and displayed; fails if the cell did."""
        shown: list[str] = []

        def hear(message: dict[str, Any]) -> None:
            content = message["content"]
            if message["msg_type"] == "stream":
                shown.append(content["text"])
            elif message["msg_type"] in {"display_data", "execute_result"}:
                shown.append(content["data"]["text/plain"] + "\n")
            elif message["msg_type"] == "error":
                shown.append("\n".join(content["traceback"]))

        reply = self.client.execute_interactive(code, timeout=LIMIT, output_hook=hear)
        assert reply["content"]["status"] == "ok", "".join(shown)
        return "".join(shown)

    def end(self, *, now: bool = False) -> None:
        self.client.stop_channels()
        if self.manager.has_kernel:
            self.manager.shutdown_kernel(now=now)


@pytest.fixture(scope="module", autouse=True)
def _no_event_loop_is_left() -> Iterator[None]:
    yield
    loops.ensure_event_loop().close()  # the one on which the client's blocking calls run
    asyncio.set_event_loop(None)


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    kernel = Kernel()
    try:
        kernel.run(SETUP)
        yield kernel
    finally:
        kernel.end(now=True)


def live(kernel: Kernel) -> int:
    return int(kernel.run("%ebbtide off\nprint(len(ebbtide.live()))"))


def test_a_line_below_each_cell_says_what_it_added_and_what_pipelines_hold(
    kernel: Kernel,
) -> None:
    line = kernel.run("big = bytearray(b'x' * 50_000_000)")
    found = re.search(r"this cell \+(\d+\.\d) MB; no pipeline", line)
    assert found
    assert 45 < float(found[1]) < 60
    assert "1 pipeline holds" in kernel.run("embed = make()")
    assert "2 pipelines hold" in kernel.run("other = make()")
    assert "this cell -" in kernel.run("del big")


def test_lines_can_be_turned_off_and_asked_for(kernel: Kernel) -> None:
    assert kernel.run("%ebbtide off\n1 + 1") == "2\n"
    assert "no pipeline" in kernel.run("%ebbtide")
    assert "no pipeline" in kernel.run("%ebbtide on")
    kernel.run("%unload_ext ebbtide.integrations.jupyter")
    assert kernel.run("1 + 1") == "2\n"


@pytest.mark.parametrize("change", ["embed = None", "embed = make()", "del embed"])
def test_a_pipeline_is_disposed_when_its_name_is_bound_anew(kernel: Kernel, change: str) -> None:
    kernel.run("embed = make()\nlife = embed._lifecycle")
    shown = kernel.run(f"import warnings; warnings.simplefilter('error')\n{change}")
    assert "disposed embed: released" in shown
    assert "ResourceWarning" not in shown
    assert kernel.run("%ebbtide off\nprint(life.receipt is not None)") == "True\n"
    assert live(kernel) == (1 if "make" in change else 0)


def test_results_that_the_notebook_keeps_do_not_hold_it(kernel: Kernel) -> None:
    kernel.run("embed = make()")
    assert "FeatureExtractionPipeline" in kernel.run("embed")
    kernel.run("embed")
    kernel.run("_")
    assert "disposed embed" in kernel.run("embed = 1")
    assert live(kernel) == 0
    assert kernel.run("print(repr(_), [n for n in Out if 'Pipeline' in repr(Out[n])])") == "'' []\n"
    assert kernel.run("5") == "5\n"
    assert kernel.run("print(_)") == "5\n"


def test_what_another_name_or_a_list_holds_lives_on(kernel: Kernel) -> None:
    kernel.run("embed = make(); same = embed; kept = [make()]; loose = kept[0]")
    kernel.run("embed = 1; loose = 1")
    assert kernel.run("%ebbtide off\nprint(len(same('tide')), len(kept[0]('tide')))") == "1 1\n"
    kernel.run("%ebbtide on")
    assert "disposed same" in kernel.run("same = 1")
    kernel.run("%ebbtide off\nkept.pop().dispose();")
    assert live(kernel) == 0


def test_a_reset_of_the_notebook_disposes_everything(kernel: Kernel) -> None:
    kernel.run("embed = make(); other = make()")
    kernel.run("other")
    shown = kernel.run("%reset -f")
    assert "disposed embed" in shown
    assert "disposed other" in shown
    assert kernel.run("import ebbtide\n%ebbtide off\nprint(ebbtide.live())") == "[]\n"


TOLD = """
embed = make()
from pathlib import Path
embed("the tide")
from ebbtide.lifecycle import Lifecycle
finish = Lifecycle.finish
def noted(life, receipt, **more):
    Path({path!r}).write_text(str(receipt))
    finish(life, receipt, **more)
Lifecycle.finish = noted
"""


@pytest.mark.parametrize("how", ["shutdown", "restart"])
def test_what_is_left_is_disposed_when_the_kernel_ends(
    kernel: Kernel, tmp_path: Path, how: str
) -> None:
    path = tmp_path / "receipt"
    kernel.run(TOLD.format(path=str(path)))
    process = kernel.manager.provisioner.process
    if how == "shutdown":
        kernel.end()
    else:
        kernel.manager.restart_kernel()
        kernel.connect()
        assert kernel.run("print(1)") == "1\n"
    assert process.wait(LIMIT) == 0
    assert path.read_text().startswith("released")


def test_a_kernel_without_the_extension_disposes_what_it_has_too(
    kernel: Kernel, tmp_path: Path
) -> None:
    path = tmp_path / "receipt"
    kernel.run("%unload_ext ebbtide.integrations.jupyter")
    kernel.run(TOLD.format(path=str(path)))
    process = kernel.manager.provisioner.process
    kernel.end()
    assert process.wait(LIMIT) == 0
    assert path.read_text().startswith("released")


def test_a_kernel_that_is_interrupted_keeps_its_pipelines(kernel: Kernel) -> None:
    kernel.run("embed = make()")
    sent = kernel.client.execute("print('begun', flush=True)\nwhile True: embed('the tide')")
    while kernel.client.get_iopub_msg(timeout=LIMIT)["content"].get("text") != "begun\n":
        pass
    kernel.manager.interrupt_kernel()
    reply = kernel.client.get_shell_msg(timeout=LIMIT)
    while reply["parent_header"].get("msg_id") != sent:
        reply = kernel.client.get_shell_msg(timeout=LIMIT)
    assert reply["content"]["ename"] == "KeyboardInterrupt"
    assert kernel.run("%ebbtide off\nprint(len(embed('tide')))") == "1\n"


def test_the_example_runs(kernel: Kernel) -> None:
    cells = json.loads(EXAMPLE.read_text())["cells"]
    kernel.run(f"import os; os.environ['MODEL'] = {MODEL!r}")
    shown = [kernel.run("".join(one["source"])) for one in cells if one["cell_type"] == "code"]
    assert "1 pipeline holds" in shown[1]
    assert "The boats lie on their sides." in shown[2]
    assert "disposed embed" in shown[4]
