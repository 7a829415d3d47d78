"""The command as its users have it: in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

COMMAND = [sys.executable, "-W", "error", "-m", "ebbtide.cli"]

Run = Callable[..., "Ended"]
Start = Callable[..., "subprocess.Popen[str]"]

MODELS = Path(__file__).parents[1] / "models"
MODEL_OF = {
    "feature-extraction": MODELS / "tiny-bert",
    "text-classification": MODELS / "bert" / "sequence",
    "token-classification": MODELS / "bert" / "token",
    "question-answering": MODELS / "bert" / "span",
    "fill-mask": MODELS / "bert" / "mask",
    "zero-shot-classification": MODELS / "bert" / "nli",
    "text-generation": MODELS / "gen-llama",
    "text2text-generation": MODELS / "gen-t5",
    "summarization": MODELS / "gen-bart",
    "translation": MODELS / "gen-marian",
}


@dataclasses.dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def rows(self) -> list[list[str]]:
        return [line.split("\t") for line in self.out.splitlines()]


def _environment(extra: dict[str, str]) -> dict[str, str]:
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("EBBTIDE_")
        and name not in {"FORCE_COLOR", "COLUMNS", "PYTHONUNBUFFERED"}
    }
    return {**clean, "PYTHONIOENCODING": "utf-8", **extra}


@pytest.fixture
def ebbtide_run() -> Run:
    """Runs the command to its end."""

    def run(*words: str | Path, stdin: str | None = None, **environ: str) -> Ended:
        done = subprocess.run(
            [*COMMAND, *map(str, words)],
            input=stdin if stdin is not None else "",
            capture_output=True,
            encoding="utf-8",
            timeout=90,
            env=_environment(environ),
            check=False,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def ebbtide_on_terminal() -> Run:
    """Runs the command to its end on a terminal of 80 columns; standard error is none.

    What is ``typed`` lies there from the start.
    """

    def run(*words: str | Path, typed: str = "", **environ: str) -> Ended:
        leader, follower = pty.openpty()
        os.write(leader, typed.encode())
        process = subprocess.Popen(
            [*COMMAND, *map(str, words)],
            stdin=follower,
            stdout=follower,
            stderr=subprocess.PIPE,
            env=_environment({"COLUMNS": "80", "TERM": "xterm", **environ}),
        )
        os.close(follower)
        shown = b""
        try:
            while piece := os.read(leader, 4096):
                shown += piece
        except OSError:  # Linux: the other end is closed
            pass
        _, told = process.communicate()
        os.close(leader)
        return Ended(process.returncode, shown.decode(), told.decode())

    return run


@pytest.fixture
def model_of() -> dict[str, Path]:
    """Each task's model."""
    return MODEL_OF


@pytest.fixture
def ebbtide_start() -> Iterator[Start]:
    """Starts the command with pipes to it; what still runs at the test's end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str | Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*COMMAND, *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            bufsize=1,
            env=_environment({}),
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None and not pipe.closed:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue  # what it had not read is of no interest any more
