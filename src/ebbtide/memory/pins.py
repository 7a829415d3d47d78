"""Letting a native object go, and telling who still holds it where somebody does."""

from __future__ import annotations

import ctypes
import gc
import sys
import types
from collections.abc import Iterable, Sequence

from ebbtide.lifecycle import Remains

UNSEEN = "something the garbage collector does not see (a native object, a plain dict)"


def let_go(box: list[object], what: str) -> Sequence[Remains]:
    """Drop the only reference that we have to a native object, which frees it.

    Args:
        box: Holds the object, and nothing else of ours does.
        what: What it is, for the report.

    Returns:
        Nothing if it was freed, else what is left of it.
    """
    if sys.getrefcount(box[0]) <= _SOLE:
        box.clear()
        return ()
    return (_Pinned(box, what),)


def leak(native: object) -> None:
    """Make sure that ``native`` is never freed, not even at the interpreter's end."""
    if native is not None:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(native))


def pinned(remains: Iterable[Remains]) -> tuple[str, ...]:
    """Everything that still pins memory, in words."""
    return tuple(reason for left in remains for reason in left.pins())


class _Pinned:
    """A native object that somebody else still references."""

    def __init__(self, box: list[object], what: str) -> None:
        self._box = box
        self._what = what

    def pins(self) -> tuple[str, ...]:
        """Who holds it. Empty once nobody does, and then it is freed."""
        if not self._box:
            return ()
        if sys.getrefcount(self._box[0]) <= _SOLE:
            self._box.clear()
            return ()
        holders = [one for one in gc.get_referrers(self._box[0]) if one is not self._box]
        named = ", ".join(_name_of(one) for one in holders[:3]) or UNSEEN
        return (f"{self._what} is still referenced by {named}",)


def _name_of(holder: object) -> str:
    if isinstance(holder, types.FrameType):
        return f"a frame at {holder.f_code.co_filename}:{holder.f_lineno}"
    if isinstance(holder, dict) and "__name__" in holder and "__builtins__" in holder:
        return f"a global of module {holder['__name__']}"
    return f"a {type(holder).__module__}.{type(holder).__qualname__}"


def _sole() -> int:
    box = [object()]
    return sys.getrefcount(box[0])


_SOLE = _sole()
