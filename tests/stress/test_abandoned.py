"""However a generation ends, what it held comes back: the benchmark, with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def test_generations_that_are_cut_short_leave_nothing(fresh_process: Any) -> None:
    model = ROOT / "tests" / "models" / "gen-llama"
    script = f"""
        import runpy, sys
        sys.argv = ["abandoned", {str(model)!r}, "--count", "300", "--words", "20"]
        runpy.run_path({str(ROOT / "benchmarks" / "abandoned.py")!r}, run_name="__main__")
    """
    found = json.loads(fresh_process(script).splitlines()[-1])
    assert found["drift"] < 2e6
    assert found["cache"] == 0
    assert found["late"] <= 1
