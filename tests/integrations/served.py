"""An application served as its users do: in processes of its own, over HTTP, ended by signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ebbtide

ROOT = Path(__file__).parent.parent.parent
MODELS = ROOT / "tests" / "models"
MODEL = str(MODELS / "tiny-bert")
WRITER = str(MODELS / "gen-llama")
PATIENCE = 30.0

WRITE_RECEIPTS = """
import json, os, pathlib, ebbtide

def write_receipts(receipts):
    line = {"pid": os.getpid(), "live": len(ebbtide.live()), "receipts": {
        key: receipt.verified for key, receipt in receipts.items()}}
    with open(os.environ["RECEIPTS"], "a") as out:
        out.write(json.dumps(line) + "\\n")
"""
"""For the tests' applications: a line for each process whose manager is closed."""


NOTED = """
import os
from ebbtide.lifecycle import Lifecycle

finish = Lifecycle.finish

def noted(life, receipt, **more):
    with open(os.environ["NOTED"], "a") as file:
        file.write(f"{receipt}\\n")
    finish(life, receipt, **more)

Lifecycle.finish = noted
"""
"""For programs of the tests' that have no manager: a line for each pipeline that is disposed."""


def until(holds: Callable[[], Any], what: str) -> Any:
    """Wait for a condition; the first true value."""
    deadline = time.monotonic() + PATIENCE
    pause = threading.Event()
    while not (found := holds()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        pause.wait(0.02)
    return found


def rewritten_until(file: Path, holds: Callable[[], Any], what: str) -> Any:
    """Change a file until a reloader has noticed: it may not be looking yet when its app answers.

    Returns:
        The first true value of ``holds``.
    """
    changed = 0.0

    def noticed() -> Any:
        nonlocal changed
        if not (found := holds()) and time.monotonic() - changed > 2:
            changed = time.monotonic()
            with file.open("a") as code:
                code.write("\n# changed\n")
        return found

    return until(noticed, what)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Served:
    """A server with all its processes, in a session of its own.

    Args:
        folder: Where it runs, and where its output and receipts go.
        command: What follows `python -m`; `{port}` in it is the port.
        variables: Of its environment.
    """

    def __init__(self, folder: Path, *command: str, listens: bool = True, **variables: str) -> None:
        self.port = free_port()
        self.receipts_file = folder / "receipts.jsonl"
        self.output_file = folder / "output.txt"
        source = str(Path(ebbtide.__file__).parent.parent)
        with open(self.output_file, "ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *(part.format(port=self.port) for part in command)],
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join([source, *sys.path[1:]]),
                    "PYTHONUNBUFFERED": "1",
                    "PYTHONWARNINGS": "default::ResourceWarning",
                    "HOME": str(folder),  # gunicorn puts a socket there
                    "RECEIPTS": str(self.receipts_file),
                    "MODEL": MODEL,
                    "WRITER": WRITER,
                    **variables,
                },
            )
        if listens:
            until(self._answers, "the server")

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.output
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
        except OSError:
            return False
        return True

    @property
    def output(self) -> str:
        return self.output_file.read_text(errors="replace")

    @property
    def receipts(self) -> list[dict[str, Any]]:
        if not self.receipts_file.exists():
            return []
        return [json.loads(line) for line in self.receipts_file.read_text().splitlines()]

    def get(self, path: str) -> Any:
        """What the application answers, as JSON; for an error its status."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            with error:
                self.last_error = error.read().decode()
                return error.code

    def replaced(self, path: str, former: int) -> bool:
        """Whether another process than the former answers."""
        try:
            answer = self.get(path)
        except OSError:  # between the two
            return False
        return isinstance(answer, dict) and answer["pid"] != former

    def pids(self) -> list[int]:
        """Every process of the server that is alive."""
        found = []
        for name in os.listdir("/proc"):
            try:
                if name.isdigit() and os.getsid(int(name)) == self.process.pid:
                    state = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[0]
                    found += [int(name)] if state != "Z" else []
            except OSError:
                continue
        return found

    def stop(self, with_signal: signal.Signals = signal.SIGTERM, *, group: bool = False) -> int:
        """Stop it as its users do; the exit code. Nothing of it is left."""
        if group:
            os.killpg(self.process.pid, with_signal)
        else:
            self.process.send_signal(with_signal)
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end:\n{self.output}") from None
        until(lambda: not self.pids(), "the last process to end")
        assert "was collected without" not in self.output, self.output
        return code

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *about: object) -> None:
        for pid in self.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
