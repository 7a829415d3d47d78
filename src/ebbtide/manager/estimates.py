"""What pipelines were measured to take, kept between runs of the program.

One small file in Ebbtide's cache folder, written whole and renamed, so that who reads it never
finds half of it; the last writer wins, which costs another a guess. Kept is, for each model by its
files' names and sizes, its options and ONNX Runtime's version, what its first quiet load took; and
what runs took, by graph (`ebbtide.memory.workspace`).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

log = logging.getLogger("ebbtide.manager")

FORMAT = 1
MOST = 1000
"""Models that are kept, those not seen for the longest time going first."""
LONGEST = 10_000_000
"""Bytes of the file beyond which it is not read."""
_LARGEST = 1 << 62
"""A count or a time above this is damage: a policy could not reckon with it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Known:
    """What one pipeline was measured to take.

    Attributes:
        awake: Anonymous bytes, loaded.
        asleep: What of that stays while it sleeps.
        peak: Anonymous bytes at most while it was loaded.
        mapped: Bytes of prepared files that it maps.
        reload_seconds: How long its load took.
        wake_seconds: How long waking it took; 0 where it never slept.
        seen: When that was, in seconds since 1970.
    """

    awake: int
    asleep: int
    peak: int
    mapped: int
    reload_seconds: float
    wake_seconds: float = 0.0
    seen: float = 0.0


class Estimates:
    """All that is known, by key.

    Args:
        path: The file; None to keep nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: dict[str, Known] | None = None
        self._runs: dict[str, Any] = {}
        self._is_changed = False

    def of(self, key: str) -> Known | None:
        """What is known of a pipeline."""
        return self._all().get(key)

    def learn(self, key: str, known: Known) -> None:
        """Keep what was measured."""
        self._all()[key] = dataclasses.replace(known, seen=time.time())
        self._is_changed = True

    @property
    def runs(self) -> Mapping[str, Any]:
        """What runs took, by graph."""
        self._all()
        return self._runs

    def save(self, runs: Mapping[str, Any]) -> None:
        """Write what is new; where that cannot be done, the next program has to guess.

        Args:
            runs: What runs took, by graph.
        """
        if self.path is None or not (self._is_changed or runs != self.runs):
            return
        self._is_changed = False
        merged, runs_before = _read(self.path)
        for key, one in self._all().items():
            if key not in merged or one.seen >= merged[key].seen:
                merged[key] = one
        newest = sorted(merged.items(), key=lambda item: item[1].seen, reverse=True)[:MOST]
        self._runs = {**runs_before, **runs}
        text = json.dumps(
            {
                "format": FORMAT,
                "known": {key: dataclasses.asdict(one) for key, one in newest},
                "runs": dict(tuple(self._runs.items())[-MOST:]),
            }
        )
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}.{id(self)}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(text, encoding="utf-8")
            beside.rename(self.path)
        except OSError as error:
            log.info("What pipelines take is not kept: %s.", error)
            with suppress(OSError):
                beside.unlink()

    def _all(self) -> dict[str, Known]:
        if self._known is None:
            self._known, self._runs = _read(self.path) if self.path is not None else ({}, {})
        return self._known


def _read(path: Path) -> tuple[dict[str, Known], dict[str, Any]]:
    """What a file has; nothing where it is missing, damaged, or of another format."""
    try:
        if path.stat().st_size > LONGEST:
            return {}, {}
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            return {}, {}
        known = {str(key): _known(one) for key, one in found["known"].items()}
        return known, {str(key): _run(one) for key, one in found["runs"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}, {}


def _run(found: Mapping[str, Any]) -> Mapping[str, Any]:
    for tokens, length, peak in found["entries"]:
        if not all(type(one) is int and 0 <= one < _LARGEST for one in (tokens, length, peak)):
            raise ValueError(found)
    return found


def _known(found: Mapping[str, Any]) -> Known:
    known = Known(**found)
    counts = (known.awake, known.asleep, known.peak, known.mapped)
    seconds = (known.reload_seconds, known.wake_seconds, known.seen)
    good = all(type(one) is int and 0 <= one < _LARGEST for one in counts) and all(
        isinstance(one, int | float) and 0 <= one < _LARGEST for one in seconds
    )
    if not good or known.asleep > known.awake:
        raise ValueError(found)
    return known
