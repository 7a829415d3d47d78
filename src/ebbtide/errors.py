"""Every error Ebbtide raises on purpose, as one tree.

Each message says what happened and what to do next; the values in it are attributes too, so that a
program need not read the text. Errors of the libraries underneath are translated where they enter
(``raise ... from``), so catching `EbbtideError` catches everything that is Ebbtide's to explain.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class EbbtideError(Exception):
    """The root of every error that Ebbtide raises on purpose; it can be pickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(
    kind: type[EbbtideError], args: tuple[object, ...], attributes: dict[str, object]
) -> EbbtideError:
    base: Any = kind  # of Python's own, the one it is built on: `MemoryError` need not be that
    while base.__module__ != "builtins":
        base = base.__base__
    error: EbbtideError = base.__new__(kind, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


class InputError(EbbtideError, ValueError):
    """The call was wrong: a value that cannot be used, and the message says which can.

    Attributes:
        value: What was given, or None where it would be too large to keep.
        nearest: The known name that looks most like it, or None.
    """

    def __init__(self, message: str, *, value: object = None, nearest: str | None = None) -> None:
        super().__init__(message)
        self.value = value
        self.nearest = nearest


class OptionError(EbbtideError, TypeError):
    """An option that does not exist, or one of the wrong type.

    Attributes:
        option: The option's name as given.
        nearest: The known option that looks most like it, or None.
    """

    def __init__(self, message: str, *, option: str, nearest: str | None = None) -> None:
        super().__init__(message)
        self.option = option
        self.nearest = nearest


class ModelNotFoundError(EbbtideError, LookupError):
    """No such model, or the model lacks a file that the task needs.

    Attributes:
        model: The model's name or folder.
        missing: The files that were looked for and not found.
    """

    def __init__(self, message: str, *, model: str, missing: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.model = model
        self.missing = missing


class DownloadError(EbbtideError):
    """A file of a model could not be had from the hub; what is cached works without it.

    Attributes:
        model: The model's id.
        file: The file, or None where it was the model as a whole.
        status: The HTTP status, or None where there was no answer.
        unreachable: Whether there was no answer at all.
    """

    def __init__(
        self,
        message: str,
        *,
        model: str,
        file: str | None = None,
        status: int | None = None,
        unreachable: bool = False,
    ) -> None:
        super().__init__(message)
        self.model = model
        self.file = file
        self.status = status
        self.unreachable = unreachable


class AccessDeniedError(DownloadError):
    """The model is gated or private: the message says how to be let in."""


class UnsupportedModelError(EbbtideError):
    """The model is there and sound, but asks for something Ebbtide does not do.

    Attributes:
        model: The model's name or folder.
    """

    def __init__(self, message: str, *, model: str) -> None:
        super().__init__(message)
        self.model = model


class LoadError(EbbtideError):
    """A file of the model could not be read: damaged, truncated, or not what its name says.

    Attributes:
        path: The file.
    """

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(message)
        self.path = path


class LoadMemoryError(LoadError, MemoryError):
    """Memory ran out while a model was loaded: what it had taken was given back.

    Attributes:
        path: The file.
    """


class DeviceNotAvailableError(LoadError):
    """The device exists, but not here: the message names the package or the driver that is missing.

    Attributes:
        device: The device as asked for.
        available: The devices this installation can use.
    """

    def __init__(self, message: str, *, device: str, available: tuple[str, ...]) -> None:
        super().__init__(message, path=device)
        self.device = device
        self.available = available


class PrepareError(EbbtideError):
    """No prepared copy of a model can be made, or the folder of them cannot be changed.

    The model itself works without one.

    Attributes:
        path: The model's file, or the folder.
    """

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(message)
        self.path = path


class RunError(EbbtideError):
    """The native run failed, for another reason than a cancellation."""


class PipelineDisposedError(EbbtideError):
    """The pipeline has been disposed, or is being disposed: make a new one.

    Attributes:
        pipeline: What the pipeline was, as its repr says it.
    """

    def __init__(self, message: str, *, pipeline: str) -> None:
        super().__init__(message)
        self.pipeline = pipeline


class PipelineInheritedError(PipelineDisposedError):
    """The pipeline was made before a fork, and this is the child: make it after the fork."""


class PipelineCancelledError(EbbtideError):
    """The call was cancelled while it ran, by a dispose or by the program's exit.

    Attributes:
        pipeline: What the pipeline was, as its repr says it.
    """

    def __init__(self, message: str, *, pipeline: str) -> None:
        super().__init__(message)
        self.pipeline = pipeline


class WorkerCrashedError(EbbtideError):
    """A pipeline's own process ended without being asked to; this process is unhurt.

    The pipeline starts a new one at its next call, unless it was made with ``restart="never"``.

    Attributes:
        pipeline: What the pipeline was, as its repr says it.
        running: What ran there, one text a call; empty where nothing did.
        status: Its exit status; the signal's number, negative, where one ended it; None where
            nobody knows.
    """

    def __init__(
        self,
        message: str,
        *,
        pipeline: str,
        running: tuple[str, ...] = (),
        status: int | None = None,
    ) -> None:
        super().__init__(message)
        self.pipeline = pipeline
        self.running = running
        self.status = status


class WorkerMemoryError(WorkerCrashedError, MemoryError):
    """A pipeline's own process needed more memory than it may take: see its ``memory_limit``."""


class NotTransferableError(EbbtideError, TypeError):
    """A pipeline cannot be copied or pickled: it is a place in this process's memory."""


class DisposalError(EbbtideError):
    """Some releases failed; all of them were attempted, and the rest did succeed.

    Attributes:
        errors: One error a failed release.
        receipt: What came back all the same.
    """

    def __init__(self, message: str, *, errors: tuple[BaseException, ...], receipt: object) -> None:
        super().__init__(message)
        self.errors = errors
        self.receipt = receipt


class AcquireTimeoutError(EbbtideError, TimeoutError):
    """A pipeline was not to be had from its manager in time: the message says for want of what.

    Attributes:
        pipeline: Which one.
        seconds: How long it was waited for.
    """

    def __init__(self, message: str, *, pipeline: str, seconds: float) -> None:
        super().__init__(message)
        self.pipeline = pipeline
        self.seconds = seconds


class ManagerBusyError(EbbtideError):
    """Too many wait for pipelines of a manager already."""


class ManagerClosedError(EbbtideError):
    """The manager was closed: make a new one."""


class PipelineInUseError(EbbtideError):
    """A pipeline that was to go was leased for all the time that could be waited.

    Attributes:
        pipeline: Which one.
        sites: Where its leases were asked for, as ``file:line``.
    """

    def __init__(self, message: str, *, pipeline: str, sites: tuple[str, ...]) -> None:
        super().__init__(message)
        self.pipeline = pipeline
        self.sites = sites


class OutOfBudgetError(EbbtideError, MemoryError):
    """What is asked for can never fit into the memory budget: the message has the sum.

    Attributes:
        needed: Bytes that it takes.
        available: Bytes that could be had for it.
        budget: Bytes that the whole process may hold.
    """

    def __init__(self, message: str, *, needed: int, available: int, budget: int) -> None:
        super().__init__(message)
        self.needed = needed
        self.available = available
        self.budget = budget


class MissingExtraError(EbbtideError, ImportError):
    """A feature needs packages that are not installed: the message has the command.

    Attributes:
        extra: The extra that brings them.
    """

    def __init__(self, message: str, *, extra: str) -> None:
        super().__init__(message)
        self.extra = extra


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that looks most like ``name``, or None where none does.

    Example:
        >>> nearest("poolin", ["pooling", "normalize"])
        'pooling'
    """
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return found[0] if found else None


def unknown_option(option: str, known: Iterable[str], *, where: str) -> OptionError:
    """The error for an option nobody knows, naming the nearest one."""
    names = sorted(known)
    close = nearest(option, names)
    hint = f" Did you mean {close!r}?" if close else ""
    return OptionError(
        f"{where} has no option {option!r}.{hint} Known options: {', '.join(names)}.",
        option=option,
        nearest=close,
    )


def unknown_value(kind: str, value: object, known: Iterable[str]) -> InputError:
    """The error for a value outside a closed list, naming the nearest one."""
    names = list(known)
    close = nearest(str(value), names)
    hint = f" Did you mean {close!r}?" if close else ""
    return InputError(
        f"Unknown {kind} {value!r}.{hint} Known: {', '.join(names)}.", value=value, nearest=close
    )
