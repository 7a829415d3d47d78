"""How a pipeline lives in a process of its own."""

from __future__ import annotations

import dataclasses
from typing import Final, Literal, get_args

from ebbtide._settings import bytes_of
from ebbtide.errors import InputError, unknown_value

Start = Literal["spawn", "fork-server"]
Restart = Literal["on-crash", "never"]

MOST: Final = 256
"""Replicas that one pipeline may have."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class IsolateOptions:
    """How a pipeline lives in a process of its own.

    Attributes:
        memory_limit: Bytes that the process may take, also as text; None for no limit of its own.
            A cgroup holds it to that where one can be made, else the system's limit on data
            (``RLIMIT_DATA``), which counts what is asked for and not only what is used.
        start: ``"spawn"`` starts a new Python; ``"fork-server"`` forks a process that has imported
            everything already, and has loaded nothing.
        idle: Seconds without a call after which the process ends until the next one; None: never.
        restart: After a crash: ``"on-crash"`` has the next call start a new process; with
            ``"never"`` it fails.
        replicas: How many processes run the pipeline. A call goes to the one that has the fewest
            under way. Each has its share of the CPUs, and ``memory_limit`` is for each.
        lazy: Whether each further replica starts only when all that run are busy; else all start
            with the first.

    Raises:
        InputError: A value cannot be used.

    Example:
        >>> IsolateOptions(memory_limit="1 GiB").memory_limit
        1073741824
    """

    memory_limit: int | str | None = None
    start: Start = "spawn"
    idle: float | None = None
    restart: Restart = "on-crash"
    replicas: int = 1
    lazy: bool = False

    def __post_init__(self) -> None:
        limit = self.memory_limit
        if isinstance(limit, str):
            limit = bytes_of(limit)
            object.__setattr__(self, "memory_limit", limit if limit else self.memory_limit)
        if self.memory_limit is not None and not (type(limit) is int and limit > 0):
            raise InputError(
                "memory_limit takes bytes, as a whole number or as in '1 GiB', or None, not"
                f" {self.memory_limit!r}.",
                value=self.memory_limit,
            )
        if self.start not in get_args(Start):
            raise unknown_value("start", self.start, get_args(Start))
        if self.restart not in get_args(Restart):
            raise unknown_value("restart", self.restart, get_args(Restart))
        if self.idle is not None and (
            isinstance(self.idle, bool)
            or not isinstance(self.idle, int | float)
            or not self.idle >= 0
        ):
            raise InputError(
                f"idle takes seconds, 0 or more, or None, not {self.idle!r}.", value=self.idle
            )

        if type(self.replicas) is not int or not 1 <= self.replicas <= MOST:
            raise InputError(
                f"replicas takes a whole number from 1 to {MOST}, not {self.replicas!r}.",
                value=self.replicas,
            )
        if type(self.lazy) is not bool:
            raise InputError(f"lazy takes True or False, not {self.lazy!r}.", value=self.lazy)

    @property
    def limit(self) -> int | None:
        """The memory limit in bytes; None where there is none."""
        return self.memory_limit if isinstance(self.memory_limit, int) else None

    @classmethod
    def of(cls, given: object) -> IsolateOptions | None:
        """The options from what a user gave as ``isolate``; None for no process of its own.

        Raises:
            InputError: It is none of the things it may be.

        Example:
            >>> IsolateOptions.of(True) == IsolateOptions(), IsolateOptions.of(False)
            (True, None)
        """
        if given is False or given is None:
            return None
        if given is True:
            return cls()
        if isinstance(given, cls):
            return given
        raise InputError(
            f"isolate takes True, False or IsolateOptions(...), not {given!r}.", value=given
        )
