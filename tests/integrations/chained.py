"""What the tests of LangChain and LlamaIndex share: models, texts, and how an example is run."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.integrations.served import MODELS, ROOT

EMBED = str(MODELS / "tiny-bert-st")
CHAT = str(MODELS / "gen-llama")
RANK = str(MODELS / "bert" / "rank")
TEXTS = ["the tide goes out", "bread is baked", "boats lie on their sides"]


def run_example(name: str) -> None:
    """Run one of the examples as its users do; it disposes what it made."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name / "app.py")],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT / "src"),
            "EMBED": EMBED,
            "RANK": RANK,
            "CHAT": CHAT,
        },
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "budget" in done.stdout
    assert "ResourceWarning" not in done.stderr
