"""Jinja templates of others, run so that they can do no harm.

A template is a program of a model's author. Here it sees plain values, calls their harmless
methods, and stops where its processor time, or the characters and items that it may handle, run
out. For that its tree is rewritten before it is compiled: every turn of a loop, every text written
and every list made is noted; operators, filters, tests and calls are noted where they are done.

Importing this imports Jinja, so it is imported by the first call that renders a chat.
"""

from __future__ import annotations

import collections.abc as abc
import contextlib
import contextvars
import functools
import itertools
import json
import re
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

LONGEST_TEMPLATE: Final = 200_000
"""Characters of a template; the longest that models bring have 30,000."""
_SECONDS: Final = 2.0
_WORK: Final = 32_000_000
"""Characters that a template may handle in all: a full window in 1,000 messages is 3 million."""
_ITEM: Final = 32
"""What an item of a list or a dict counts as, in characters."""
_DEEPEST: Final = 100
_BITS: Final = 4096
_MOST_DIGITS: Final = 100

_PADDING: Final = {"center", "ljust", "rjust", "zfill"}
_STRIPPING: Final = {"strip", "lstrip", "rstrip", "trim"}
_PRODUCTS: Final = _STRIPPING | {"join", "rfind", "rindex", "rsplit", "rpartition"}
"""What takes, or makes, as much as the lengths of two texts multiplied."""
_NO_FILTERS: Final = ("urlize", "wordwrap", "striptags", "xmlattr", "pprint")
_NO_METHODS: Final = {"encode", "translate", "striptags"}
"""What no chat needs, and nothing here bounds."""


class StoppedError(Exception):
    """A template asked for more than it may."""


class RefusedError(Exception):
    """A template said itself that it does not take the messages."""


class _Budget:
    """What one rendering may still use."""

    __slots__ = ("_known", "_left", "_until", "depth")

    def __init__(self) -> None:
        self._left = _WORK
        self._until = time.thread_time() + _SECONDS
        self._known: dict[int, tuple[object, int, int]] = {}
        self.depth = 0

    def spend(self, amount: int) -> None:
        """Note work; called at least once a loop's turn, so that none runs on for long."""
        self._left -= amount
        if self._left < 0:
            raise StoppedError(f"it handles more than {_WORK:,} characters")
        if time.thread_time() > self._until:
            raise StoppedError(f"it takes more than {_SECONDS:g} seconds")

    def weigh(self, value: object) -> int:
        """How many characters a value has when it is written out."""
        return self.measure(value)[0]

    def made(self, value: object) -> None:
        """Note a value that a template made."""
        if isinstance(value, str):
            self.spend(len(value))
        else:
            self.weigh(value)

    def measure(self, value: object) -> tuple[int, int]:
        """What a value weighs, and how many lists deep it is."""
        # What a list weighs is kept, or one that holds another twice, and so on, would take an age.
        if isinstance(value, str):
            return len(value), 0
        if not isinstance(value, list | tuple | dict | abc.Set | abc.ValuesView):
            return _ITEM, 0
        known = self._known.get(id(value))
        if known is not None and known[0] is value:
            return known[1:]
        self.spend(len(value) * _ITEM)
        weight = depth = 0
        inner = itertools.chain(value, value.values()) if isinstance(value, dict) else value
        for one in inner:
            more, below = self.measure(one)
            weight += more + _ITEM
            depth = max(depth, below)
        if weight > _WORK or depth >= _DEEPEST:
            raise StoppedError("it makes lists of lists that are too large")
        self._known[id(value)] = (value, weight, depth + 1)
        return weight, depth + 1


_budget: contextvars.ContextVar[_Budget] = contextvars.ContextVar("ebbtide.chat")


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Within it one template may be compiled and rendered."""
    token = _budget.set(_Budget())
    try:
        yield
    finally:
        _budget.reset(token)


def _tick(amount: int) -> bool:
    _budget.get().spend(amount + 1)
    return True


def _size(value: object) -> int:
    return len(value) if isinstance(value, abc.Sized) else 0


def _heft(value: object) -> int:
    return len(value) if isinstance(value, str) else _size(value) * _ITEM


def _ahead(name: str, values: Sequence[Any], named: Mapping[str, Any]) -> int:
    """What an operation may make beyond what it was given, before it is done.

    Args:
        name: The name of a filter, or of a method of a text.
        values: What it works on, and its arguments.
        named: More arguments.
    """
    rest = [*values[1:], *named.values()]
    subject = values[0] if values else ""
    numbers = sum(abs(one) for one in rest if isinstance(one, int))
    texts = [one for one in rest if isinstance(one, str)]
    if name in _PADDING:
        return numbers
    if name in {"batch", "slice"}:
        return numbers * _ITEM
    if name in {"format", "format_map"}:
        return _filled(subject, rest)
    if name == "round" and numbers > _MOST_DIGITS:
        raise StoppedError("it rounds to too many digits")
    if name == "sum" and any(
        isinstance(one, abc.Sized) for one in [*values[2:], named.get("start")]
    ):
        raise StoppedError("it adds up what is no number")
    if name in _PRODUCTS:
        budget = _budget.get()
        total = sum(budget.weigh(one) for one in values) if name == "join" else 0
        return total + _size(subject) * sum(map(_size, rest))
    if name == "tojson":
        weight, depth = _budget.get().measure(subject)
        inner = [one for several in rest if isinstance(several, tuple) for one in several]
        marks = sum(len(one) for one in [*texts, *inner] if isinstance(one, str))
        return weight * (1 + (numbers + marks) * (1 + depth) // _ITEM)
    if not isinstance(subject, str):
        return 0
    if name == "indent":
        return (subject.count("\n") + 1) * (numbers + sum(map(len, texts)))
    if name == "expandtabs":
        return subject.count("\t") * max(8, numbers)
    if name == "replace":
        longest = max(map(len, texts), default=0)
        return longest * max((subject.count(one) for one in texts), default=0)
    return 0


def _filled(text: object, values: Sequence[Any]) -> int:
    """How long a text may become whose marks are filled, by ``%`` or by ``format``."""
    text = str(text)
    if "*" in text or re.search(r":[^{}]*\{|\d{6}", text):
        raise StoppedError("it pads a text by what it works out")
    marks = text.count("%") + text.count("{")
    weight = sum(map(_budget.get().weigh, values))
    return len(text) + marks * weight + sum(map(int, re.findall(r"\d+", text)))


def _raise_exception(message: object) -> None:
    raise RefusedError(str(message))


def _strftime_now(form: str) -> str:
    if len(form) > _MOST_DIGITS:
        raise StoppedError("it writes the date at too great a length")
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes what HTML does not take, which no model was taught.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or a test whose work is noted."""
    first = int(hasattr(function, "jinja_pass_arg"))

    @functools.wraps(function)
    def noting(*values: Any, **named: Any) -> Any:
        budget = _budget.get()
        budget.spend(1 + _ahead(name, values[first:], named))
        result = function(*values, **named)
        if isinstance(result, Iterator):
            result = list(_counted(result, budget))
        budget.made(result)
        return result

    return noting


def _counted(items: Iterator[Any], budget: _Budget) -> Iterator[Any]:
    for one in items:
        budget.spend(_ITEM)
        yield one


class _BriefNamespace(Namespace):
    def __repr__(self) -> str:
        return "<Namespace>"  # two that hold one another would never be written out


class _Generation(Extension):
    """What is between ``{% generation %}`` and its end is written as it is."""

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


_Generation.tags = {"generation"}


def _noted(amount: int) -> nodes.Expr:
    return _filtered(" tick", nodes.Const(amount))


def _filtered(name: str, value: nodes.Expr, *rest: nodes.Expr) -> nodes.Expr:
    """A call of a filter of ours: no template can name one that begins with a space."""
    return nodes.Filter(value, name, list(rest), [], None, None)


class _Watch(NodeTransformer):
    """Has a template's tree note what it does."""

    def get_visitor(self, node: nodes.Node) -> Any:
        kinds: dict[type[nodes.Node], Callable[[Any], Any]] = {
            nodes.For: self._loop,
            nodes.Output: self._output,
            nodes.Concat: self._concat,
            nodes.Getitem: self._item,
            nodes.List: self._made,
            nodes.Dict: self._made,
            nodes.Tuple: self._made,
            nodes.Include: self._other,
            nodes.Extends: self._other,
            nodes.Import: self._other,
            nodes.FromImport: self._other,
        }
        return kinds.get(type(node))

    def _loop(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_noted(0)))
        if node.test is not None:
            node.test = nodes.And(_noted(0), node.test)
        return node

    def _output(self, node: nodes.Output) -> list[nodes.Node]:
        self.generic_visit(node)
        size = sum(len(one.data) for one in node.nodes if isinstance(one, nodes.TemplateData))
        return [nodes.ExprStmt(_noted(size)), node]

    def _concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(" concat", *node.nodes)

    def _item(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        ends = [node.arg.start, node.arg.stop, node.arg.step]
        given = [nodes.Const(None) if one is None else one for one in ends]
        return _filtered(" slice", node.node, *given)

    def _made(self, node: nodes.List | nodes.Dict | nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node, nodes.Tuple) and node.ctx != "load":
            return node
        return _filtered(" made", node)

    def _other(self, node: nodes.Node) -> nodes.Node:
        raise StoppedError("it includes another file")


class _Bounded(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Watch().visit(tree)
        tree.set_environment(self).set_lineno(1)
        return tree

    def getattr(self, obj: Any, attribute: str, /) -> Any:
        _tick(0)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any, /) -> Any:
        _tick(0)
        return super().getitem(obj, argument)

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        if attribute.startswith("_"):
            raise SecurityError(f"it reaches for {attribute}")
        return super().unsafe_undefined(obj, attribute)

    def wrap_str_format(self, value: Any) -> Any:
        inner = super().wrap_str_format(value)
        if inner is None:
            return None

        def filled(*values: Any, **named: Any) -> str:
            budget = _budget.get()
            budget.spend(_filled(value.__self__, [*values, *named.values()]))
            return inner(*values, **named)

        return filled

    def is_safe_callable(self, obj: Any) -> bool:
        if isinstance(obj, type):
            return obj in {dict, _BriefNamespace, Cycler, Joiner}
        if isinstance(obj, types.FunctionType | Macro | BlockReference | LoopContext | Joiner):
            return True
        if not isinstance(obj, types.MethodType | types.BuiltinMethodType):
            return isinstance(obj, jinja2.Undefined)
        owner = obj.__self__
        plain = isinstance(owner, str | list | tuple | dict)
        jinjas = isinstance(owner, LoopContext | Cycler)
        return (plain and obj.__name__ not in _NO_METHODS) or jinjas

    def call(self, context: Context, obj: Any, /, *values: Any, **named: Any) -> Any:
        budget = _budget.get()
        if not self.is_safe_callable(obj):
            raise SecurityError(f"it calls {getattr(obj, '__name__', type(obj).__name__)}")
        owner = getattr(obj, "__self__", None) if not isinstance(obj, jinja2.Undefined) else None
        if isinstance(owner, str):
            budget.spend(1 + _ahead(obj.__name__, (owner, *values), named))
        else:
            copied = sum(map(_size, values)) * _ITEM if isinstance(obj, type) else 0
            budget.spend(1 + copied)
        budget.depth += 1
        if budget.depth > _DEEPEST:
            raise StoppedError("its macros call one another without end")
        try:
            result = super().call(context, obj, *values, **named)
        finally:
            budget.depth -= 1
        budget.made(result)
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any, /) -> Any:
        budget = _budget.get()
        for one, other in ((left, right), (right, left)):
            if isinstance(one, int) and one.bit_length() > _BITS:
                raise StoppedError("it reckons with numbers that are too large")
            if operator == "*" and isinstance(one, int) and not isinstance(other, int | float):
                budget.spend(max(0, one) * _heft(other))
            if operator == "+":
                budget.spend(_heft(one))
        if operator == "**" and (abs(left) > _BITS or abs(right) > _MOST_DIGITS):
            raise StoppedError("it raises to a power that is too large")
        if operator == "%" and isinstance(left, str):
            budget.spend(_filled(left, [right]))
        result = super().call_binop(context, operator, left, right)
        if not isinstance(result, str):
            budget.weigh(result)
        return result


@jinja2.pass_context
def _finalize(context: Context, value: Any) -> Any:
    budget = _budget.get()
    budget.spend(budget.weigh(value))
    return value


def _concat(*parts: Any) -> str:
    budget = _budget.get()
    budget.spend(sum(map(budget.weigh, parts)))
    return "".join(map(str, parts))


def _cut(value: Any, start: Any, stop: Any, step: Any) -> Any:
    return value[start:stop:step]


@functools.cache
def environment() -> _Bounded:
    """Jinja as chat templates expect it, within bounds."""
    made = _Bounded(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
        optimized=False,
        finalize=_finalize,
    )
    made.filters["tojson"] = _tojson
    for name in _NO_FILTERS:
        made.filters.pop(name, None)
    tables: list[dict[str, Any]] = [made.filters, made.tests]
    for table in tables:
        for name, function in table.items():
            table[name] = _bounded(name, function)
    made.filters |= {
        " tick": _tick,
        " concat": _concat,
        " slice": _bounded("cut", _cut),
        " made": _bounded("made", lambda value: value),
    }
    made.globals.pop("lipsum", None)
    made.globals["namespace"] = _BriefNamespace
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = _strftime_now
    return made
