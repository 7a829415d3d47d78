"""What a chat model wrote, taken apart: its answer, its reasoning and its calls of tools.

Models mark these in many ways. Which ways a model knows is read from its chat template, so that an
answer that only looks like a call stays an answer. What cannot be read stays in the text.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import math
import re
import tokenize
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NoReturn

from ebbtide.errors import unknown_value

Call = dict[str, Any]
"""``{"type": "function", "function": {"name": ..., "arguments": {...}}}``, maybe with an ``id``."""


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """What a model wrote, taken apart.

    Attributes:
        content: The answer itself; all of the text where nothing else was found in it.
        reasoning: What the model thought before; empty where it did not say.
        tool_calls: The calls of tools that it asks for, as messages have them.
    """

    content: str
    reasoning: str = ""
    tool_calls: tuple[Call, ...] = ()


_THOUGHTS: Final = {"think": ("<think>", "</think>"), "think brackets": ("[THINK]", "[/THINK]")}
_HARMONY: Final = "harmony"
_LLAMA: Final = "llama"
_CALL_KEYS: Final = {"name", "arguments", "parameters", "id", "type"}

_Found = tuple[list[Call], int]
_Reader = Callable[["re.Match[str]", Sequence[Mapping[str, Any]]], _Found]
"""Reads calls after an opening mark, and gives them and where they end; or raises ValueError."""


def formats_of(template: str) -> tuple[str, ...]:
    """The ways in which a model marks its reasoning and its calls, by its chat template.

    Args:
        template: The template's text.

    Returns:
        The formats' names, for `parse_reply`.

    Example:
        >>> formats_of("{% if tools %}Answer with <tool_call>{...}</tool_call>{% endif %}")
        ('hermes',)
    """
    found = [name for name, marks in _THOUGHTS.items() if any(mark in template for mark in marks)]
    if "<|channel|>" in template:
        found.append(_HARMONY)
    if "<|python_tag|>" in template or ("ipython" in template and '"parameters' in template):
        found.append(_LLAMA)
    if "<|tool|>" in template:  # of Phi, which writes either
        found += ["functools", "granite"]
    marks = {
        "function tags": "<function=",
        "argument tags": "<arg_key>",
        "hermes": "<tool_call>",
        "mistral": "[TOOL_CALLS]",
        "pythonic": "<|tool_call_start|>",
        "deepseek": "<\uff5ctool▁call",
        "function call": "<function_call>",
        "functools": "functools",
        "granite": "<|tool_call|>",
    }
    found += [name for name, mark in marks.items() if mark in template]
    return tuple(dict.fromkeys(found))


def parse_reply(
    text: str,
    formats: Iterable[str] = (),
    *,
    prompt: str = "",
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Reply:
    """Take apart what a model wrote.

    Nothing is lost: what is no reasoning and no call that can be read stays in the content, marks
    and all; only the marks of what was read, and the space around it, are taken out.

    Args:
        text: What the model wrote, with its special tokens but the one that ends it.
        formats: The ways of marking that it knows, by `formats_of`.
        prompt: What it was given, as text: it may end within the reasoning.
        tools: The JSON schemas of the tools it was given: they say which arguments are texts where
            the format does not.

    Returns:
        Its parts.

    Raises:
        InputError: There is no such format.

    Example:
        >>> reply = parse_reply(
        ...     '<think>Ask.</think>So: <tool_call>{"name": "tide"}</tool_call>',
        ...     ["think", "hermes"],
        ... )
        >>> reply.reasoning, reply.content, reply.tool_calls[0]["function"]
        ('Ask.', 'So:', {'name': 'tide', 'arguments': {}})
    """
    known = list(dict.fromkeys(formats))
    for one in known:
        if one not in FORMATS:
            raise unknown_value("format of replies", one, FORMATS)
    rest = text
    thoughts: list[str] = []
    calls: list[Call] = []
    given = [_function(tool) for tool in tools or ()]
    if _HARMONY in known:
        rest, thoughts, calls = _harmony(rest)
    for name in known:
        if name in _THOUGHTS:
            rest, more = _thoughts(rest, *_THOUGHTS[name], prompt)
            thoughts += more
    if _LLAMA in known and not calls:
        rest, more_calls = _bare(rest, given)
        calls += more_calls
    readers = [_READERS[name] for name in known if name in _READERS]
    if readers:
        rest, more_calls = _called(rest, readers, given)
        calls += more_calls
    if rest != text:
        rest = rest.strip()
    reasoning = "\n\n".join(one for one in map(str.strip, thoughts) if one)
    return Reply(rest, reasoning, tuple(calls))


# Reasoning


def _thoughts(text: str, begin: str, end: str, prompt: str) -> tuple[str, list[str]]:
    """What stands within marks at the beginning of a text, and what is left of it."""
    asked = prompt.rstrip()
    opened = asked.endswith(begin)
    if not opened and 0 <= text.find(end) < (text + begin).find(begin):
        opened = True  # by a template that does so whatever it is asked
    thoughts = []
    while opened or text.lstrip().startswith(begin):
        inner = text if opened else text.lstrip()[len(begin) :]
        if opened:
            inner = inner.lstrip().removeprefix(begin)  # some models write it once more
        thought, _, text = inner.partition(end)
        thoughts.append(thought)
        opened = False
    return text, thoughts


_SEGMENT: Final = re.compile(
    r"(?:<\|start\|>\s*assistant(?P<first>\s+to=\S+?)?\s*)?"
    r"<\|channel\|>\s*(?P<channel>analysis|commentary|final)(?P<second>\s+to=\S+?)?\s*"
    r"(?:<\|constrain\|>\s*json\s*)?<\|message\|>(?P<body>.*?)"
    r"(?:<\|end\|>|<\|return\|>|<\|call\|>|(?=<\|start\|>|<\|channel\|>)|\Z)",
    re.DOTALL,
)


def _harmony(text: str) -> tuple[str, list[str], list[Call]]:
    """The channels of a text: analysis is reasoning, what is said to a function is a call."""
    content, thoughts, calls, at = [], [], [], 0
    for found in _SEGMENT.finditer(text):
        content.append(text[at : found.start()])
        at = found.end()
        addressed = (found["second"] or found["first"] or "").strip().removeprefix("to=")
        if addressed:
            try:
                name = addressed.removeprefix("functions.")
                calls.append(_call_of(name, _whole(found["body"])))
            except (ValueError, RecursionError):
                content.append(found[0])
        elif found["channel"] == "analysis":
            thoughts.append(found["body"])
        else:
            content.append(found["body"])
    return "".join([*content, text[at:]]), thoughts, calls


# Calls


def _called(
    text: str,
    readers: Sequence[tuple[re.Pattern[str], _Reader]],
    tools: Sequence[Mapping[str, Any]],
) -> tuple[str, list[Call]]:
    """The calls of a text, wherever they stand, and what is left of it."""
    calls: list[Call] = []
    left: list[str] = []
    at = after = 0
    marks = [(pattern, pattern.search(text), read) for pattern, read in readers]
    while True:
        # Each is looked for again only once it was passed: a text may be full of marks.
        marks = [
            (pattern, mark if mark.start() >= after else pattern.search(text, after), read)
            for pattern, mark, read in marks
            if mark is not None
        ]
        opened = [(mark, read) for _, mark, read in marks if mark is not None]
        if not opened:
            return "".join([*left, text[at:]]), calls
        first = min(mark.start() for mark, _ in opened)
        after = first + 1
        for mark, read in opened:
            try:
                more, end = read(mark, tools) if mark.start() == first else ([], first)
            except (ValueError, RecursionError, MemoryError):
                continue
            if more:
                calls += more
                left.append(text[at:first])
                at = after = end
                break


def _bare(text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, list[Call]]:
    """The calls of a text that is nothing but calls, as Llama 3 writes them."""
    names = {tool.get("name") for tool in tools}
    before, mark, body = text.partition("<|python_tag|>")
    before, body = (before, body) if mark else ("", text)
    body = re.sub(r"<\|e(?:om|ot)_id\|>\s*\Z", "", body)
    try:
        calls, end = _objects(body)
        if not body[end:].strip() and (not names or all(_name(one) in names for one in calls)):
            return before, calls
    except (ValueError, RecursionError):
        pass
    built_in = re.fullmatch(r"\s*([\w.]+)\.call(\(.*\))\s*", body, re.DOTALL)
    if built_in and mark:
        try:
            return before, _python_calls(f"{built_in[1]}{built_in[2]}")
        except (ValueError, RecursionError, MemoryError):
            pass
    return text, []


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a tool's schema says of its function."""
    inner = tool.get("function")
    return inner if isinstance(inner, Mapping) else tool


def _name(call: Call) -> str:
    return str(call["function"]["name"])


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name stands twice, and one value would be lost")
    return made


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is too large")
    return value


# Models write line ends into texts as they are.
_JSON: Final = json.JSONDecoder(
    strict=False, object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite
)


def _skipped(text: str, at: int, pattern: str = r"\s*") -> int:
    found = re.compile(pattern).match(text, at)
    return at if found is None else found.end()


def _needed(text: str, at: int, pattern: str) -> re.Match[str]:
    found = re.compile(pattern, re.DOTALL).match(text, at)
    if found is None:
        raise ValueError(f"no {pattern} at {at}")
    return found


def _whole(text: str) -> Any:
    """The value of a text that is JSON and nothing else."""
    value, end = _JSON.raw_decode(text, _skipped(text, 0))
    if text[end:].strip():
        raise ValueError("more than JSON")
    return value


def _call_of(name: object, arguments: Any, given: object = None) -> Call:
    if isinstance(arguments, str):
        arguments = _whole(arguments)
    if not isinstance(name, str) or not name.strip() or not isinstance(arguments, dict):
        raise ValueError("no call")
    call: Call = {"type": "function", "function": {"name": name.strip(), "arguments": arguments}}
    if isinstance(given, str | int) and not isinstance(given, bool):
        call["id"] = str(given)
    elif given is not None:
        raise ValueError("no id")
    return call


def _calls_of(value: Any, *, bare: bool = False) -> list[Call]:
    """The calls of a JSON value: an object, or a list of them."""
    if isinstance(value, list) and value:
        return [call for one in value for call in _calls_of(one, bare=bare)]
    if not isinstance(value, dict):
        raise ValueError("no call")
    if value.get("type") == "function" and isinstance(value.get("function"), dict):
        inner = {key: one for key, one in value.items() if key not in {"type", "function"}}
        value = _unique([*inner.items(), *value["function"].items()])
    keys = {"arguments", "parameters"} & value.keys()
    extra = value.keys() - _CALL_KEYS or value.get("type", "function") != "function"
    if len(keys) > 1 or extra or (bare and not keys):
        raise ValueError("more than a call, or less")
    arguments = value[keys.pop()] if keys else {}
    return [_call_of(value.get("name"), {} if arguments is None else arguments, value.get("id"))]


def _objects(text: str) -> _Found:
    """The calls of JSON values that follow one another, with or without a semicolon between."""
    calls: list[Call] = []
    end, at = 0, _skipped(text, 0)
    while text.startswith(("{", "["), at):
        value, end = _JSON.raw_decode(text, at)
        calls += _calls_of(value, bare=True)
        at = _skipped(text, end, r"\s*;?\s*")
    if not calls:
        raise ValueError("no call")
    return calls, end


def _json_until(close: str) -> _Reader:
    """Reads JSON up to a closing mark, which may be a pattern that matches nothing."""

    def read(match: re.Match[str], tools: Sequence[Mapping[str, Any]]) -> _Found:
        text, end = match.string, match.end()
        calls: list[Call] = []
        while text.startswith(("{", "["), at := _skipped(text, end)):
            try:
                value, after = _JSON.raw_decode(text, at)
                calls += _calls_of(value)
            except ValueError:
                break
            end = after
        if not calls:
            raise ValueError("no call")
        return calls, _needed(text, end, close).end()

    return read


def _mistral(match: re.Match[str], tools: Sequence[Mapping[str, Any]]) -> _Found:
    text, at = match.string, _skipped(match.string, match.end())
    if text.startswith(("[", "{"), at):
        return _json_until("")(match, tools)
    head = _needed(text, at, r"([\w.-]+)(?:\[CALL_ID\]([\w-]+))?\s*\[ARGS\]\s*")
    value, end = _JSON.raw_decode(text, head.end())
    return [_call_of(head[1], value, head[2])], end


def _deepseek(match: re.Match[str], tools: Sequence[Mapping[str, Any]]) -> _Found:
    text = match.string
    sep, end = "<\uff5ctool▁sep\uff5c>", "<\uff5ctool▁call▁end\uff5c>"
    head = _needed(text, match.end(), rf"(?:function{sep}([^\n<]+)\s*```json|([^\n<]+?){sep})\s*")
    value, at = _JSON.raw_decode(text, head.end())
    done = _needed(text, at, rf"\s*(?:```)?\s*{end}(?:\s*<\uff5ctool▁calls▁end\uff5c>)?")
    return [_call_of(head[1] or head[2], value)], done.end()


def _function_tags(match: re.Match[str], tools: Sequence[Mapping[str, Any]]) -> _Found:
    text, name, at = match.string, match[1], _skipped(match.string, match.end())
    pairs = []
    if text.startswith("{", at):
        value, at = _JSON.raw_decode(text, at)
        pairs = list(value.items())
    while text.startswith("<parameter=", at):
        found = _needed(text, at, r"<parameter=([^>]+)>\n?(.*?)\n?</parameter>\s*")
        pairs.append((found[1].strip(), _argument(found[2], name, found[1].strip(), tools)))
        at = found.end()
    done = _needed(text, at, r"\s*</function>(?:\s*</tool_call>)?")
    return [_call_of(name, _unique(pairs))], done.end()


def _argument_tags(match: re.Match[str], tools: Sequence[Mapping[str, Any]]) -> _Found:
    text = match.string
    head = _needed(text, match.end(), r"\s*([^\s<{\[]+)\s*")
    at, name, pairs = head.end(), head[1], []
    while text.startswith("<arg_key>", at):
        form = r"<arg_key>([^<]+)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*"
        found = _needed(text, at, form)
        pairs.append((found[1].strip(), _argument(found[2], name, found[1].strip(), tools)))
        at = found.end()
    return [_call_of(name, _unique(pairs))], _needed(text, at, "</tool_call>").end()


def _argument(text: str, name: str, key: str, tools: Sequence[Mapping[str, Any]]) -> Any:
    """An argument that is written without quotes: a text where it is one, or is no JSON."""
    for function in tools:
        if function.get("name") == name:
            known = (function.get("parameters") or {}).get("properties") or {}
            if (known.get(key) or {}).get("type") == "string":
                return text
    try:
        value = _whole(text)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, str) else value


def _pythonic(match: re.Match[str], tools: Sequence[Mapping[str, Any]]) -> _Found:
    found = _needed(match.string, match.end(), r"\s*(.*?)\s*<\|tool_call_end\|>")
    try:
        return _python_calls(found[1]), found.end()
    except ValueError:
        return _calls_of(_whole(found[1])), found.end()


def _python_calls(text: str) -> list[Call]:
    """The calls of Python's own writing: read, and never run."""
    # Escapes that Python does not know are warned of; they are meant as they stand.
    text = re.sub(
        r"\\(.)",
        lambda found: found[0] if found[1] in "\\'\"abfnrtvxuUN\n" else "\\" + found[0],
        text,
        flags=re.DOTALL,
    )
    try:
        words = list(tokenize.generate_tokens(io.StringIO(text).readline))
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, tokenize.TokenError) as error:
        raise ValueError("no Python") from error
    if any(word.type == tokenize.COMMENT for word in words):
        raise ValueError("a comment, which would be lost")
    several = tree.elts if isinstance(tree, ast.List | ast.Tuple) else [tree]
    calls = []
    for one in several:
        if not isinstance(one, ast.Call) or one.args:
            raise ValueError("no call, or one with arguments that have no name")
        pairs = [(str(each.arg), _literal(each.value)) for each in one.keywords if each.arg]
        if len(pairs) != len(one.keywords):
            raise ValueError("arguments that have no name")
        name = ast.unparse(one.func)
        if not re.fullmatch(r"[\w.]+", name):
            raise ValueError("no name")
        calls.append(_call_of(name, _unique(pairs)))
    if not calls:
        raise ValueError("no call")
    return calls


_NAMES: Final = {"true": True, "false": False, "null": None}


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(one) for one in node.elts]
    if isinstance(node, ast.Dict):
        pairs = []
        for key, value in zip(node.keys, node.values, strict=True):
            if not isinstance(key, ast.Constant) or not isinstance(key.value, str):
                raise ValueError("no JSON")
            pairs.append((key.value, _literal(value)))
        return _unique(pairs)
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    value = ast.literal_eval(node)
    if not isinstance(value, str | int | float | None) or value in {math.inf, -math.inf}:
        raise ValueError("no JSON")
    return value


_READERS: Final[dict[str, tuple[re.Pattern[str], _Reader]]] = {
    "hermes": (re.compile("<tool_call>"), _json_until(r"\s*(?:</tool_call>|\Z)")),
    "function tags": (
        re.compile(r"(?:<tool_call>\s*)?<function=([^>\s]+)>"),
        _function_tags,
    ),
    "argument tags": (re.compile("<tool_call>"), _argument_tags),
    "mistral": (re.compile(r"\[TOOL_CALLS\]"), _mistral),
    "pythonic": (re.compile(r"<\|tool_call_start\|>"), _pythonic),
    "deepseek": (
        re.compile("(?:<\uff5ctool▁calls▁begin\uff5c>\\s*)?<\uff5ctool▁call▁begin\uff5c>"),
        _deepseek,
    ),
    "function call": (re.compile("<function_?call>"), _json_until(r"\s*(?:</?function_?call>)?")),
    "functools": (re.compile(r"functools(?=\s*\[)"), _json_until("")),
    "granite": (re.compile(r"<\|tool_call\|>"), _json_until(r"\s*(?:<\|/tool_call\|>)?")),
}
FORMATS: Final = (*_THOUGHTS, _HARMONY, _LLAMA, *_READERS)
"""The names of all ways of marking that are known."""
