"""`import ebbtide` is cheap: it loads none of the libraries, starts nothing, and reads nothing."""

from __future__ import annotations

import sys
from typing import Any

import pytest


def test_importing_loads_no_library_and_no_room(fresh_process: Any) -> None:
    seen = fresh_process(
        """
        import sys
        before = set(sys.modules)
        import ebbtide
        added = set(sys.modules) - before
        for name in ("onnxruntime", "numpy", "tokenizers", "psutil", "ctypes", "asyncio"):
            assert name not in added, name
        rooms = {one for one in added if one.startswith("ebbtide")}
        assert rooms == {"ebbtide"}, rooms
        print("nothing loaded")
        """
    )
    assert "nothing loaded" in seen


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads a live /proc")
def test_importing_takes_at_most_three_megabytes_and_starts_no_thread(fresh_process: Any) -> None:
    seen = fresh_process(
        """
        import os

        def anonymous():
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

        anonymous()
        before = anonymous(), len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
        import ebbtide
        after = anonymous(), len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
        assert after[0] - before[0] <= 3_000_000 // 1024, f"{after[0] - before[0]} kB more"
        assert after[1:] == before[1:]
        print("little taken")
        """
    )
    assert "little taken" in seen


@pytest.mark.parametrize(
    ("name", "forbidden"),
    [
        ("EbbtideError", ("onnxruntime", "numpy", "tokenizers")),
        ("errors", ("onnxruntime", "numpy", "tokenizers")),
        ("settings", ("onnxruntime", "numpy", "tokenizers")),
        ("live", ("onnxruntime", "numpy", "tokenizers")),
        ("memory", ("onnxruntime", "numpy", "tokenizers")),
        ("SessionOptions", ("onnxruntime", "tokenizers")),
        ("pipeline", ("onnxruntime", "tokenizers")),
    ],
)
def test_the_first_use_of_a_name_loads_no_more_than_it_needs(
    fresh_process: Any, name: str, forbidden: tuple[str, ...]
) -> None:
    seen = fresh_process(
        f"""
        import sys, threading
        import ebbtide
        ebbtide.{name}
        loaded = set({forbidden!r}) & set(sys.modules)
        assert not loaded, loaded
        assert threading.active_count() == 1
        print("no more")
        """
    )
    assert "no more" in seen


def test_a_call_that_is_refused_at_once_loads_no_library(fresh_process: Any) -> None:
    seen = fresh_process(
        """
        import sys
        import ebbtide
        for call in (
            lambda: ebbtide.pipeline("nonsense"),
            lambda: ebbtide.pipeline("embeddings", devise="cpu"),
            lambda: ebbtide.pipeline("embeddings", session_options={"thread": 1}),
        ):
            try:
                call()
            except ebbtide.EbbtideError:
                assert "onnxruntime" not in sys.modules
                assert "tokenizers" not in sys.modules
                print("refused")
        """
    )
    assert seen.split() == ["refused"] * 3
