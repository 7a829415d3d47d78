"""How a command ends: what is said of an error and of its pipeline's memory, and the exit code."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import typer

from ebbtide.errors import (
    DeviceNotAvailableError,
    EbbtideError,
    InputError,
    MissingExtraError,
    ModelNotFoundError,
    OptionError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from ebbtide.factory import PipelineOptions
    from ebbtide.pipelines import Pipeline

_BAD_CALLS: Final = (
    DeviceNotAvailableError,
    InputError,
    MissingExtraError,
    ModelNotFoundError,
    OptionError,
    UnsupportedModelError,
)
"""Errors of the call: another call would have worked."""


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Turn what a command raises into one line and an exit code.

    2: the call was wrong. 1: it was right, and failed. 130: Ctrl-C. 0: whoever read the output has
    read enough, as ``head`` does.
    """
    try:
        yield
        sys.stdout.flush()
    except EbbtideError as error:
        sys.stdout.flush()
        line = " ".join(str(error).split())
        print(f"ebbtide: {line}", file=sys.stderr)
        raise typer.Exit(2 if isinstance(error, _BAD_CALLS) else 1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:
        _silence(sys.stdout.fileno())
        raise typer.Exit(0) from None


@contextlib.contextmanager
def loaded(
    task: str, model: str | None, options: PipelineOptions, *, as_json: bool
) -> Iterator[Pipeline]:
    """A command's pipeline; Ctrl-C stops what it does, and its receipt goes to standard error."""
    import ebbtide

    with ebbtide.pipeline(task, model, **options) as pipe:
        try:
            yield pipe
        except KeyboardInterrupt:
            pipe.dispose(cancel=True)
            raise
        receipt = pipe.dispose()
    if not as_json:
        print(receipt, file=sys.stderr)


def _silence(descriptor: int) -> None:
    """Lead what is still to be written nowhere: at its exit, Python flushes once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
