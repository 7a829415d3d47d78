"""Every task Ebbtide does, as one frozen table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from ebbtide.errors import InputError, nearest


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """One task.

    Attributes:
        name: What to pass to `pipeline()`.
        aliases: Other names for it.
        default_model: The model used where none is named, as Transformers.js has it.
        takes: What goes in, in words.
        gives: What comes out, in words.
    """

    name: str
    aliases: tuple[str, ...]
    default_model: str
    takes: str
    gives: str


TASKS: Final[Mapping[str, Task]] = MappingProxyType(
    {
        task.name: task
        for task in (
            Task(
                name="feature-extraction",
                aliases=("embeddings",),
                default_model="onnx-community/all-MiniLM-L6-v2-ONNX",
                takes="text",
                gives="vectors, one a token or one a text",
            ),
        )
    }
)


def find(name: object) -> Task:
    """The task of this name or alias.

    Raises:
        InputError: There is none; names the nearest.
    """
    names = {one: task for task in TASKS.values() for one in (task.name, *task.aliases)}
    if isinstance(name, str) and name in names:
        return names[name]
    close = nearest(str(name), names)
    hint = f" Did you mean {close!r}?" if close else ""
    raise InputError(
        f"Unknown task {name!r}.{hint} Tasks: {', '.join(names)}.", value=name, nearest=close
    )
