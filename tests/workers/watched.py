"""What tests of worker processes look at: what becomes so, who is there, and what is left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SOON = 20.0
"""Seconds: far more than what is about to be so takes, and far less than for ever."""

LOOK = """
import gc, os, signal, sys, threading, time
import ebbtide
from ebbtide.memory.reaper import reaper
from ebbtide.workers.options import IsolateOptions

def children():
    found = []
    for one in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{one}/children") as file:
            found += file.read().split()
    return found

def look():
    "What this process has: descriptors, children, threads, names in shared memory."
    found = []
    reaper.call(lambda: found.extend((  # there, for it opens a file to see what is taken
        len(os.listdir("/proc/self/fd")), children(),
        sorted({one.name for one in threading.enumerate()} - {"ebbtide-teller"}),
        os.listdir("/dev/shm"),
    )))
    return tuple(found)
"""
"""For a fresh process: `look` says what it has."""


def until(is_so: Callable[[], object], within: float = SOON) -> None:
    """Wait for something that is about to be so."""
    gate, deadline = threading.Event(), time.monotonic() + within
    while not is_so():
        assert time.monotonic() < deadline, "it never came to be"
        gate.wait(0.005)


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def call(pipe: Any, name: str, *arguments: Any) -> Any:
    """Call a function of `strange.py` in a pipeline's process."""
    return pipe._made(name, arguments, {}).wait()
