"""The settings of this process: one typed object, its starting values read from ``EBBTIDE_*``.

The module has an underscore because the object has the name: importing a module `ebbtide.settings`
would put the module where users find the object.

Reading the environment happens once, when `settings` is first touched; `import ebbtide` alone reads
nothing. A value set from Python wins, and holds for what is loaded after it was set.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from ebbtide.errors import InputError, nearest

MallocPolicy = Literal["tuned", "system"]
Prepare = Literal["background", "now", "off"]
Verify = Literal["graph", "always"]

_PREFIX = "EBBTIDE_"
_FLAGS = frozenset({"trim", "offline", "move_to_prepared", "shared_threads"})
_SECONDS = frozenset({"drain_timeout", "exit_timeout", "idle_trim"})
_SIZES = frozenset({"cache_size", "prompt_cache_size"})
_WORDS: dict[str, Any] = {"malloc": MallocPolicy, "prepare": Prepare, "verify": Verify}
_UNITS = {"": 0, "b": 0, "kb": 1, "mb": 2, "gb": 3, "tb": 4, "kib": 1, "mib": 2, "gib": 3, "tib": 4}
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
        idle_trim: Seconds without a call after which memory that calls freed is given back as well,
            or None for never. ``EBBTIDE_IDLE_TRIM``.
        malloc: ``"tuned"`` also gives back the tops of the arenas that Ebbtide's own threads use,
            which on glibc means two `mallopt` calls (ARCHITECTURE.md, "Threads and arenas");
            ``"system"`` calls no `mallopt`. ``EBBTIDE_MALLOC``.
        drain_timeout: Seconds a dispose waits for running calls before it cancels them, where the
            call does not say. ``EBBTIDE_DRAIN_TIMEOUT``.
        offline: Never use the network: models come from folders, packages and the cache.
            ``HF_HUB_OFFLINE`` does the same. ``EBBTIDE_OFFLINE``.
        cache_dir: The folder of the prepared store; None for the user's cache folder
            (``~/.cache/ebbtide`` on Linux). ``EBBTIDE_CACHE_DIR``.
        cache_size: Bytes that the prepared store may take, least recently used entries going first
            and none that is in use; also text, as in ``"20 GB"``. ``EBBTIDE_CACHE_SIZE``.
        prompt_cache_size: Bytes that each pipeline may keep of what its model saw in calls with
            ``cache_prompt=True``; also text, as in ``"1 GB"``. ``EBBTIDE_PROMPT_CACHE_SIZE``.
        prepare: What the first load of a model does about its prepared copy: ``"background"`` has
            it made meanwhile, ``"now"`` waits for it, ``"off"`` makes none (one that is there is
            used). ``EBBTIDE_PREPARE``.
        move_to_prepared: Whether a pipeline that was loaded from the original goes over to the
            prepared copy once that is there. ``EBBTIDE_MOVE_TO_PREPARED``.
        verify: What of a prepared copy is checked at each load: ``"graph"``, all but its data, of
            which only the size; or ``"always"``, every byte (0.6 s a gigabyte).
            ``EBBTIDE_VERIFY``.
        shared_threads: Whether all sessions share one pool of threads. Set it before the first
            load, in a process that is yours alone: every other use of onnxruntime there then has
            to ask for it too, or fails. ``EBBTIDE_SHARED_THREADS``.
        exit_timeout: Seconds the interpreter's exit waits for the last disposals.
            ``EBBTIDE_EXIT_TIMEOUT``.

    Example:
        >>> Settings.from_environment({"EBBTIDE_THREADS": "2"}).threads
        2
    """

    threads: int | None = None
    native_threads: int | None = None
    trim: bool = True
    idle_trim: float | None = 1.0
    malloc: MallocPolicy = "tuned"
    drain_timeout: float = 30.0
    exit_timeout: float = 10.0
    offline: bool = False
    cache_dir: str | None = None
    cache_size: int = 20_000_000_000
    prompt_cache_size: int = 256_000_000
    prepare: Prepare = "background"
    move_to_prepared: bool = True
    verify: Verify = "graph"
    shared_threads: bool = False

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse what cannot be used, at the assignment and not at the first use."""
        if name in _SIZES and isinstance(value, str):
            found = bytes_of(value)
            value = value if found is None else found
        elif name == "cache_dir" and isinstance(value, os.PathLike):
            value = os.fspath(value)
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


def bytes_of(text: str) -> int | None:
    """A size in words as bytes; None where it is none.

    Example:
        >>> bytes_of("1.5 GB"), bytes_of("2 GiB"), bytes_of("much")
        (1500000000, 2147483648, None)
    """
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not found or found[2].lower() not in _UNITS:
        return None
    unit = found[2].lower()
    return int(float(found[1]) * (1024 if "i" in unit else 1000) ** _UNITS[unit])


def _parse(name: str, text: str) -> object:
    word = text.strip().lower()
    if name in _FLAGS:
        return True if word in _TRUE else False if word in _FALSE else text
    if name in _WORDS:
        return word
    if name in {"cache_dir", *_SIZES}:
        return text.strip() or None
    if word in {"", "none", "auto"}:
        return None
    try:
        return float(word) if name in _SECONDS else int(word)
    except ValueError:
        return text


def _problem(name: str, value: object) -> str | None:
    if name in {"threads", "native_threads"}:
        good = value is None or (type(value) is int and 1 <= value <= 1024)
        return None if good else "takes a whole number from 1 to 1024, or None"
    if name in _FLAGS:
        return None if isinstance(value, bool) else "takes true or false"
    if name in _WORDS:
        words = get_args(_WORDS[name])
        return None if value in words else f"takes one of {', '.join(words)}"
    if name == "cache_dir":
        good = value is None or (isinstance(value, str) and value != "")
        return None if good else "takes a folder, or None"
    if name in _SIZES:
        good = type(value) is int and value >= 0
        return None if good else "takes bytes, as a whole number or as in '20 GB'"
    if name in _SECONDS:
        if value is None and name == "idle_trim":
            return None
        good = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
        return None if good else "takes a number of seconds, 0 or more"
    return "is no setting"


settings = Settings.from_environment()
