"""What crosses between processes beside plain data: a closed list, rebuilt from plain fields.

An error is one of them: what is rebuilt is found by its name in `ebbtide.errors`, or is one of a
few of Python's own; its traceback comes as text, and is a note of the error.
"""

from __future__ import annotations

import builtins
import dataclasses
import re
import traceback
from typing import Any, Final

from ebbtide import errors
from ebbtide.errors import EbbtideError, InputError, RunError
from ebbtide.errors import _rebuild as rebuild
from ebbtide.memory.ledger import Holding
from ebbtide.pipelines.base import PipelineMemory
from ebbtide.pipelines.generating import Piece
from ebbtide.receipts import DisposalReceipt
from ebbtide.runtime import SessionOptions
from ebbtide.workers import codec
from ebbtide.workers.codec import BrokenMessageError

_CLASSES: Final[dict[str, type[Any]]] = {
    one.__name__: one for one in (DisposalReceipt, Holding, Piece, PipelineMemory, SessionOptions)
}
_PATTERN: Final = "Pattern"
_ERROR: Final = "Error"
_OF_PYTHON: Final = (
    "ArithmeticError",
    "AttributeError",
    "IndexError",
    "KeyError",
    "MemoryError",
    "NotImplementedError",
    "OSError",
    "RecursionError",
    "RuntimeError",
    "TypeError",
    "ValueError",
)
"""Errors of Python's own that keep their class; all others come as a `RunError`."""

_LONGEST: Final = 20_000
"""Characters of a traceback that are kept, of its end."""


class _Records:
    """The closed list, as `codec` asks for it."""

    def fields(self, value: object) -> tuple[str, dict[str, Any]] | None:
        """The name and the fields of a value that is on the list; None for any other."""
        kind = type(value)
        if _CLASSES.get(kind.__name__) is kind:
            names = [field.name for field in dataclasses.fields(value)]  # type: ignore[arg-type]
            return kind.__name__, {name: getattr(value, name) for name in names}
        if isinstance(value, re.Pattern):
            return _PATTERN, {"pattern": value.pattern, "flags": value.flags}
        if isinstance(value, BaseException):
            return _ERROR, _error_fields(value)
        return None

    def build(self, name: str, fields: dict[str, Any]) -> Any:
        """The value again; raises `BrokenMessageError` where there is none such."""
        if name == _PATTERN:
            return re.compile(str(fields.get("pattern")), int(fields.get("flags", 0)))
        if name == _ERROR:
            return _rebuilt(fields)
        kind = _CLASSES.get(name)
        if kind is None:
            raise BrokenMessageError(f"it has a record {name!r}, which is none of ours")
        return kind(**fields)


def _error_fields(error: BaseException) -> dict[str, Any]:
    kind = next(
        one.__name__
        for one in (*type(error).__mro__, RunError)
        if getattr(errors, one.__name__, None) is one or one.__name__ in _OF_PYTHON
    )
    text = "".join(traceback.format_exception(error))
    if kind == RunError.__name__ and not isinstance(error, RunError):
        args: tuple[Any, ...] = (f"{type(error).__name__}: {error}",)
    else:
        args = tuple(_plain(one) for one in error.args)
    attributes = error.__dict__.items() if isinstance(error, EbbtideError) else ()
    return {
        "kind": kind,
        "args": args,
        "attributes": {name: _plain(one) for name, one in attributes if name != "__notes__"},
        "notes": list(getattr(error, "__notes__", ())),
        "traceback": text[-_LONGEST:],
    }


def _plain(value: Any) -> Any:
    """A value as it is where it can cross, else in words."""
    try:
        codec.encode(value, records)
    except InputError:
        return repr(value)
    return value


def _rebuilt(fields: dict[str, Any]) -> BaseException:
    name = str(fields["kind"])
    kind: Any = getattr(builtins if name in _OF_PYTHON else errors, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        raise BrokenMessageError(f"it has an error {name!r}, which is none of ours")
    args = tuple(fields["args"])
    attributes = {str(key): one for key, one in dict(fields["attributes"]).items()}
    made: Any = kind(*args) if name in _OF_PYTHON else rebuild(kind, args, attributes)  # type: ignore[arg-type]
    error: Exception = made
    for note in fields["notes"]:
        error.add_note(str(note))
    error.add_note(f"In the worker process:\n{fields['traceback']}")
    return error


records: Final = _Records()
