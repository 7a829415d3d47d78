"""The settings of this process: one typed object, its starting values read from ``EBBTIDE_*``.

The module has an underscore because the object has the name: importing a module `ebbtide.settings`
would put the module where users find the object.

Reading the environment happens once, when `settings` is first touched; `import ebbtide` alone reads
nothing. A value set from Python wins, and holds for what is loaded after it was set.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Literal, get_args

from ebbtide.errors import InputError, nearest

MallocPolicy = Literal["tuned", "system"]

_PREFIX = "EBBTIDE_"
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


@dataclasses.dataclass(slots=True)
class Settings:
    """What can be set for the whole process.

    Attributes:
        threads: Threads one native run may use (``intra_op``), or None for as many CPUs as the
            cgroup's quota and the affinity mask allow. Environment: ``EBBTIDE_THREADS``.
        native_threads: How many native runs may go on at once, or None for the number of those
            CPUs, at least 2 and at most 8. Read when the first pipeline loads.
            ``EBBTIDE_NATIVE_THREADS``.
        trim: Whether memory that was freed is given back to the operating system after a load and
            after a disposal. ``EBBTIDE_TRIM``.
        malloc: ``"tuned"`` also gives back the tops of the arenas that Ebbtide's own threads use,
            which on glibc means two `mallopt` calls (ARCHITECTURE.md, "Threads and arenas");
            ``"system"`` calls no `mallopt`. ``EBBTIDE_MALLOC``.
        drain_timeout: Seconds a dispose waits for running calls before it cancels them, where the
            call does not say. ``EBBTIDE_DRAIN_TIMEOUT``.
        offline: Never use the network: models come from folders, packages and the cache.
            ``HF_HUB_OFFLINE`` does the same. ``EBBTIDE_OFFLINE``.
        exit_timeout: Seconds the interpreter's exit waits for the last disposals.
            ``EBBTIDE_EXIT_TIMEOUT``.

    Example:
        >>> Settings.from_environment({"EBBTIDE_THREADS": "2"}).threads
        2
    """

    threads: int | None = None
    native_threads: int | None = None
    trim: bool = True
    malloc: MallocPolicy = "tuned"
    drain_timeout: float = 30.0
    exit_timeout: float = 10.0
    offline: bool = False

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse what cannot be used, at the assignment and not at the first use."""
        problem = _problem(name, value)
        if problem:
            raise InputError(f"settings.{name} {problem}, not {value!r}.", value=value)
        object.__setattr__(self, name, value)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read the settings from ``environ`` (by default `os.environ`).

        Raises:
            InputError: A variable's text is not a value of its setting, or names no setting.
        """
        environ = os.environ if environ is None else environ
        fields = {field.name for field in dataclasses.fields(cls)}
        settings = cls()
        for variable, text in environ.items():
            if not variable.startswith(_PREFIX):
                continue
            name = variable.removeprefix(_PREFIX).lower()
            if name not in fields:
                close = nearest(name, fields)
                hint = f" Did you mean {_PREFIX}{close.upper()}?" if close else ""
                raise InputError(
                    f"The environment sets {variable}, which is no setting.{hint}", value=text
                )
            try:
                setattr(settings, name, _parse(name, text))
            except InputError as error:
                raise InputError(f"{variable}={text!r}: {error}", value=text) from None
        return settings


def _parse(name: str, text: str) -> object:
    word = text.strip().lower()
    if name in {"trim", "offline"}:
        return True if word in _TRUE else False if word in _FALSE else text
    if name == "malloc":
        return word
    if word in {"", "none", "auto"}:
        return None
    try:
        return float(word) if name.endswith("timeout") else int(word)
    except ValueError:
        return text


def _problem(name: str, value: object) -> str | None:
    if name in {"threads", "native_threads"}:
        good = value is None or (type(value) is int and 1 <= value <= 1024)
        return None if good else "takes a whole number from 1 to 1024, or None"
    if name in {"trim", "offline"}:
        return None if isinstance(value, bool) else "takes true or false"
    if name == "malloc":
        policies = get_args(MallocPolicy)
        return None if value in policies else f"takes one of {', '.join(policies)}"
    if name in {"drain_timeout", "exit_timeout"}:
        good = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
        return None if good else "takes a number of seconds, 0 or more"
    return "is no setting"


settings = Settings.from_environment()
