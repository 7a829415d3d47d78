"""What a worker's process is to be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ebbtide.workers.options import IsolateOptions


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a worker's child is to be.

    Attributes:
        label: What the pipeline is, for messages.
        loader: What makes it there, as ``module:function``.
        arguments: What that is called with, by position.
        options: And by name.
        isolate: How the process lives.
    """

    label: str
    loader: str
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    isolate: IsolateOptions
