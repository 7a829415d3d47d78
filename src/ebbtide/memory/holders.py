"""Who holds an object: a walk from it up to modules, running frames and what else roots are.

The walk reads what the garbage collector knows. It is bounded in depth, breadth and time, holds
nothing afterwards, and runs no code of the objects that it meets.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
import threading
import time
import types
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from itertools import pairwise
from typing import Any, Final

DEPTH: Final = 24
BREADTH: Final = 64
SECONDS: Final = 2.0

_OWN: Final = __file__
_PACKAGE: Final = os.path.dirname(os.path.dirname(__file__)) + os.sep
_NOT_USERS: Final = (_PACKAGE, threading.__file__)
"""Where functions have what threads were started with in variables of their own."""
_CONTAINERS: Final = (list, tuple, dict, set, frozenset, deque)
_PARTS: Final = (*_CONTAINERS, types.CellType, types.MethodType)
_CALLABLES: Final = (types.FunctionType, types.MethodType)
_OPTIMIZED: Final = 1
"""The flag of a function's code, whose variables are its own and no module's."""


@dataclasses.dataclass(frozen=True, slots=True)
class Holder:
    """One thing that keeps an object alive.

    Attributes:
        kind: ``local``, ``thread``, ``module``, ``container``, ``closure``, ``handler``,
            ``traceback``, ``stream``, ``executor``, ``cache``, ``context``, ``lease``, ``task``,
            ``object``, or ``unseen`` for what the garbage collector does not see.
        where: What it is and where, in words.
        chain: Each step from the root down to the object, in words.
    """

    kind: str
    where: str
    chain: tuple[str, ...]

    def __str__(self) -> str:
        return self.where


@dataclasses.dataclass(frozen=True, slots=True)
class Held:
    """All that was found of who holds one object.

    Attributes:
        holders: Who does, the nearest first; empty if nobody does.
        unreachable: Whether it is garbage that no collection has met yet. Never guessed: every
            reference to it, and to what holds it, was seen and comes from among those.
        in_use: Whether a function that led to this walk has it in a local variable.
    """

    holders: tuple[Holder, ...]
    unreachable: bool
    in_use: bool


@dataclasses.dataclass(frozen=True, slots=True)
class _Variable:
    """A variable of a function that runs; it holds no frame."""

    name: str
    place: str
    thread: str
    is_callers: bool


class _Node:
    """An object of the walk. That these alone refer to it is how the walk knows its own."""

    __slots__ = ("below", "object")

    def __init__(self, thing: object, below: _Node | None) -> None:
        self.object = thing
        self.below = below

    def path(self) -> list[object]:
        """The objects from this one down to the start."""
        node: _Node | None = self
        found = []
        while node is not None:
            found.append(node.object)
            node = node.below
        return found


def held(thing: weakref.ref[Any]) -> Held | None:
    """Find who holds an object that the garbage collector tracks.

    Args:
        thing: A weak reference to it, so that nothing on the way here holds it.

    Returns:
        Who does; None if it is gone.
    """
    start = _Node(thing(), None)
    return None if start.object is None else _Walk(start).result()


class _Walk:
    def __init__(self, start: _Node) -> None:
        self.start = start
        self.nodes = {id(start.object): start}
        self.roots: list[tuple[_Node, _Variable | None]] = []
        self.variables = _variables()
        self.is_whole = self._climb()

    def _climb(self) -> bool:
        """Find nodes and roots, a level at a time; whether everything was seen."""
        deadline = time.monotonic() + SECONDS
        level = [self.start]
        for _ in range(DEPTH):
            inner = []
            for node in level:
                variables = self.variables.get(id(node.object), ())
                self.roots += [(node, one) for one in variables]
                if _is_root(node.object):
                    self.roots.append((node, None))
                else:
                    inner.append(node)
            level = self._above(inner[:BREADTH])
            if not level or len(inner) > BREADTH or time.monotonic() > deadline:
                return not level and len(inner) <= BREADTH
        return False

    def _above(self, level: list[_Node]) -> list[_Node]:
        targets = tuple(node.object for node in level)
        found = gc.get_referrers(*targets) if targets else []
        lower = {id(node.object): node for node in level}
        new: list[_Node] = []
        while found:
            one = found.pop()
            if one is targets or isinstance(one, _Node) or id(one) in self.nodes or _is_ours(one):
                continue
            below = next((lower[id(it)] for it in gc.get_referents(one) if id(it) in lower), None)
            if below is not None:
                node = self.nodes[id(one)] = _Node(one, below)
                new.append(node)
        return new

    def result(self) -> Held:
        callers = any(
            one is not None and one.is_callers and _is_plain(node.path())
            for node, one in self.roots
        )
        if not self.roots and self.is_whole:
            unseen = self._unseen()
            if unseen is None:
                return Held(self._cycle(), unreachable=True, in_use=False)
            path = unseen.path()
            handled = isinstance(path[0], BaseException | types.TracebackType)  # in an except block
            return Held((_holder(path, None),), unreachable=False, in_use=handled)
        holders = [_holder(node.path(), variable) for node, variable in self.roots]
        if not holders:
            holders = [_holder(list(self.nodes.values())[-1].path(), None)]
        return Held(tuple(dict.fromkeys(holders))[:5], unreachable=False, in_use=callers)

    def _unseen(self) -> _Node | None:
        """The node that is referenced from outside of what was seen, if there is one."""
        inside: dict[int, int] = dict.fromkeys(self.nodes, 0)
        for node in self.nodes.values():
            for one in gc.get_referents(node.object):
                if id(one) in inside:
                    inside[id(one)] += 1
        for node in self.nodes.values():
            if sys.getrefcount(node.object) - inside[id(node.object)] > _OUR_REFERENCES:
                return node
        return None

    def _cycle(self) -> tuple[Holder, ...]:
        path = next(reversed(self.nodes.values())).path()
        if len(path) == 1:
            return ()
        kept = [one for node in self.nodes.values() for one in [node.object] if _has_del(one)]
        words = f"a cycle with __del__ of {_name(type(kept[0]))}" if kept else "a cycle"
        return (Holder("cycle", words, tuple(_steps(path))),)


def _reference_count_of_a_node() -> int:
    node = _Node(object(), None)
    return sys.getrefcount(node.object)


_OUR_REFERENCES: Final = _reference_count_of_a_node()


def _variables() -> dict[int, list[_Variable]]:
    """The variables of every function that runs now, by the identity of what they hold."""
    found: dict[int, list[_Variable]] = {}
    me = threading.get_ident()
    names = {one.ident: one.name for one in threading.enumerate()}
    for ident, top in sys._current_frames().items():
        frame: types.FrameType | None = top
        while frame is not None:
            code = frame.f_code
            if code.co_flags & _OPTIMIZED and not code.co_filename.startswith(_NOT_USERS):
                place = f"{code.co_name}() at {code.co_filename}:{frame.f_lineno}"
                thread = names.get(ident, str(ident))
                for name, value in _locals(frame):
                    one = _Variable(name, place, thread, ident == me)
                    found.setdefault(value, []).append(one)
            frame = frame.f_back
        del top  # one of these frames is this function's own, and would hold itself
    return found


def _locals(frame: types.FrameType) -> list[tuple[str, int]]:
    """A frame's variables and the identities of what they hold."""
    variables = frame.f_locals
    found = [(name, id(value)) for name, value in variables.items()]
    # Up to Python 3.12 the frame keeps this copy, and so every value, until it is next read.
    if type(variables) is dict and sys.getrefcount(variables) <= _SOLE_COPY:
        variables.clear()
    return found


_SOLE_COPY: Final = 3
"""References to a frame's copy of its variables that nobody else has asked for."""


def _is_ours(thing: object) -> bool:
    return isinstance(thing, types.FrameType) and thing.f_code.co_filename == _OWN


def _is_root(thing: object) -> bool:
    return (
        isinstance(thing, types.ModuleType | type)
        or _is_namespace(thing)
        or type(thing).__name__.startswith("hamt")
    )


def _is_namespace(thing: object) -> bool:
    return type(thing) is dict and "__name__" in thing and "__loader__" in thing


def _is_plain(path: Sequence[object]) -> bool:
    """Whether a variable holds a path's end as a person would say that it does."""
    return all(
        isinstance(one, (*_PARTS, BaseException, types.TracebackType, types.FrameType))
        or _is_stream(one)
        or _is_stream_object(one)
        or _is_manager(one)
        for one in path[:-1]
    )


def _is_stream(thing: object) -> bool:
    if isinstance(thing, types.GeneratorType):
        return thing.gi_code.co_filename.startswith(_PACKAGE)
    if isinstance(thing, types.AsyncGeneratorType):
        return thing.ag_code.co_filename.startswith(_PACKAGE)
    return False


def _is_stream_object(thing: object) -> bool:
    return type(thing).__module__ == "ebbtide.pipelines.generating"


def _is_manager(thing: object) -> bool:
    kind = type(thing)
    return not isinstance(thing, type) and hasattr(kind, "__enter__") and hasattr(kind, "__exit__")


def _has_del(thing: object) -> bool:
    return hasattr(type(thing), "__del__") and not isinstance(thing, types.GeneratorType)


def _name(kind: type) -> str:
    plain = kind.__module__ in ("builtins", "__main__")
    return kind.__qualname__ if plain else f"{kind.__module__}.{kind.__qualname__}"


def _entries(thing: object) -> Iterator[tuple[str, object]]:
    """An object's attributes and what they hold, by no code of its own."""
    attributes = _own_dict(thing)
    if type(attributes) is dict:
        yield from tuple(attributes.items())
    for kind in type(thing).__mro__:
        for name, member in vars(kind).items():
            if isinstance(member, types.MemberDescriptorType):
                try:
                    yield name, member.__get__(thing)
                except AttributeError:
                    continue


def _attribute(thing: object, value: object) -> str | None:
    """Which attribute of a thing holds a value, or is the dict that does."""
    for name, one in _entries(thing):
        if one is value:
            return name
    return None


def _key(thing: dict[Any, Any], value: object) -> str:
    for key, one in tuple(thing.items()):
        if one is value:
            return str(key) if isinstance(key, str | int) else f"a {_name(type(key))}"
    return "a key"


def _function(function: Any) -> str:
    function = getattr(function, "__wrapped__", function)
    code = getattr(function, "__code__", None)
    name = getattr(function, "__qualname__", None) or _name(type(function))
    return f"{name} at {code.co_filename}:{code.co_firstlineno}" if code else name


def _generator(thing: Any, prefix: str) -> str:
    code = getattr(thing, f"{prefix}_code")
    frame = getattr(thing, f"{prefix}_frame")
    return f"{code.co_name}() at {code.co_filename}:{frame.f_lineno if frame else 0}"


def _steps(path: Sequence[object]) -> list[str]:
    """A path in words, from its root down; an instance and its dict are one step."""
    found = []
    skip = False
    for place, (one, below) in enumerate(pairwise(path)):
        if skip:
            skip = False
            continue
        further = path[place + 2] if place + 2 < len(path) else None
        is_attributes = type(below) is dict and not isinstance(one, _CONTAINERS)
        if is_attributes and further is not None and _own_dict(one) is below:
            found.append(f"attribute {_key(below, further)} of a {_name(type(one))}")
            skip = True
        else:
            found.append(_step(one, below))
    return found


def _own_dict(thing: object) -> Any:
    try:
        return object.__getattribute__(thing, "__dict__")
    except AttributeError:
        return None


def _step(one: Any, below: object) -> str:
    if type(one).__name__.startswith("hamt"):
        return f"context variable {_context_variable(one, below)}"
    match one:
        case dict() if _is_namespace(one):
            where = one.get("__file__") or "no file"
            return f"global {_key(one, below)} of module {one['__name__']} ({where})"
        case dict():
            return f"a dict at {_key(one, below)}"
        case types.FrameType():
            return f"the frame of {one.f_code.co_name}() at {_at(one)}"
        case types.TracebackType():
            return f"a traceback at {one.tb_frame.f_code.co_filename}:{one.tb_lineno}"
        case types.FunctionType():
            return f"function {_function(one)}"
        case types.MethodType():
            return f"bound method {_function(one.__func__)}"
        case types.CellType():
            return "a variable of a closure"
        case types.GeneratorType():
            return f"generator {_generator(one, 'gi')}"
        case types.CoroutineType():
            return f"coroutine {_generator(one, 'cr')}"
        case types.AsyncGeneratorType():
            return f"async generator {_generator(one, 'ag')}"
        case type():
            return f"attribute {_key(dict(vars(one)), below)} of class {_name(one)}"
        case types.ModuleType():
            return f"module {one.__name__}"
    if type(one) in _CONTAINERS:
        return f"a {type(one).__name__}"
    name = _attribute(one, below)
    return f"attribute {name} of a {_name(type(one))}" if name else f"a {_name(type(one))}"


def _at(frame: types.FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _holder(path: Sequence[object], variable: _Variable | None) -> Holder:
    """What holds the end of a path, said by the step that tells a person most."""
    steps = _steps(path)
    if variable is not None:
        steps.insert(0, f"local variable {variable.name} of {variable.place}")
    kind, where = _said(path, variable)
    root = steps[0] if steps else ""
    if root and root not in where and kind not in ("container", "module"):
        where = f"{where}, from {root}" if where else root
    return Holder(kind, where, tuple(steps))


def _said(path: Sequence[object], variable: _Variable | None) -> tuple[str, str]:
    rooted = variable is not None or _is_root(path[0])
    inner = path[:-1]
    for one in inner:
        if isinstance(one, BaseException):
            return "traceback", f"the traceback of {type(one).__name__} at {_raised_at(one)}"
    if any(isinstance(one, types.TracebackType) for one in inner):
        return "traceback", "a traceback"
    if any(_is_stream(one) for one in inner):
        return "stream", "a stream that was not read to its end"
    if any(type(one).__name__ == "_WorkItem" for one in inner):
        return "executor", "the queue of an executor"
    for one in inner:
        if type(one).__name__ == "_lru_cache_wrapper":
            return "cache", f"functools.lru_cache of {_function(one)}"
    if type(path[0]).__name__.startswith("hamt"):
        return "context", ""
    if variable is not None and not variable.is_callers:
        return "thread", f"local variable {variable.name} of {variable.place}, {_thread(variable)}"
    callables = [place for place, one in enumerate(inner) if isinstance(one, _CALLABLES)]
    if callables:
        place = callables[0]
        above = [one for one in inner[:place] if not _is_root(one)]
        function: Any = inner[place]
        called = getattr(function, "__func__", function)
        if any(isinstance(one, _CONTAINERS) and not _is_state(one, inner) for one in above):
            return "handler", f"the event handler {_function(called)}"
        return "closure", f"a closure of function {_function(called)}"
    for one in inner:
        if isinstance(one, types.CoroutineType):
            return "task", f"coroutine {_generator(one, 'cr')}"
    for one in inner:
        if isinstance(one, types.GeneratorType):
            return "lease" if _is_entered(inner) else "object", f"generator {_generator(one, 'gi')}"
    for one in inner:
        if _is_manager(one):
            return "lease", f"a {_name(type(one))} that was not exited"
    if variable is not None:
        return "local", f"local variable {variable.name} of {variable.place}"
    if not rooted:
        what = f"a {_name(type(path[0]))}, by " if inner else ""
        return "unseen", f"{what}something the garbage collector does not see"
    if _is_namespace(path[0]):
        return _of_module(path)
    return "object", ""


def _of_module(path: Sequence[object]) -> tuple[str, str]:
    namespace: Any = path[0]
    name, module = _key(namespace, path[1]), namespace["__name__"]
    where = namespace.get("__file__") or "no file"
    if len(path) == 2:
        return "module", f"attribute {name} of module {module} ({where})"
    if isinstance(path[1], _CONTAINERS):
        kind = type(path[1]).__name__
        return "container", f"the module-level {kind} {name} of {module} ({where})"
    return "object", ""


def _is_state(thing: object, path: Sequence[object]) -> bool:
    """Whether a dict is an object's own, of its attributes."""
    return any(_own_dict(one) is thing for one in path)


def _is_entered(path: Sequence[object]) -> bool:
    return any("contextlib" in type(one).__module__ for one in path)


def _thread(variable: _Variable) -> str:
    return f"in thread {variable.thread!r}"


def _raised_at(error: BaseException) -> str:
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return "an unknown place"
    return f"{traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}"


def _context_variable(node: object, value: object) -> str:
    """The name of the variable whose value is in a part of a context."""
    parts = gc.get_referents(node)
    for one, after in pairwise([None, *parts, None]):
        for variable, other in ((one, after), (after, one)):
            if other is value and isinstance(variable, ContextVar):
                return variable.name
    return "of some name"
