"""Functions as tools: what a model is told of a Python function that it may call."""

from __future__ import annotations

import collections.abc as abc
import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Final

from ebbtide.errors import InputError


def schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a function, from its name, its hints and its docstring.

    Args:
        function: A function with type hints and a Google-style docstring. A description that ends
            in ``(choices: ["a", "b"])`` says what an argument may be; so does a `Literal` hint.

    Returns:
        ``{"type": "function", "function": {"name", "description", "parameters", "return"}}``.

    Raises:
        InputError: It is no function, or lacks a docstring, a hint or a description.

    Example:
        >>> def tide(harbour: str) -> float:
        ...     '''How high the water is.
        ...
        ...     Args:
        ...         harbour: The harbour's name.
        ...     '''
        >>> schema(tide)["function"]["parameters"]["properties"]
        {'harbour': {'type': 'string', 'description': "The harbour's name."}}
    """
    if not (inspect.isfunction(function) or inspect.ismethod(function)):
        raise InputError(f"A tool is a JSON schema or a function, not {type(function).__name__}.")
    name = function.__name__
    if not (function.__doc__ or "").strip():
        raise InputError(f"The tool {name} has no docstring: write what it does, and its Args:.")
    purpose, described, returned = _described(inspect.getdoc(function) or "")
    try:
        hints = typing.get_type_hints(function)
    except Exception as error:
        raise InputError(f"A type hint of the tool {name} cannot be read: {error}.") from None
    properties: dict[str, Any] = {}
    required = []
    for key, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}:
            raise InputError(f"The tool {name} takes *{key}: give each argument a name.")
        if key not in hints:
            raise InputError(f"The argument {key} of the tool {name} has no type hint: add one.")
        if key not in described:
            raise InputError(
                f"The argument {key} of the tool {name} is not in its docstring: add"
                f" `{key}: what it is` below `Args:`."
            )
        properties[key] = _typed(hints[key], name) | _choices(described[key], key, name)
        if parameter.default is parameter.empty:
            required.append(key)
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    made = {"name": name, "description": purpose, "parameters": parameters}
    if "return" in hints:
        told = {"description": returned} if returned else {}
        made["return"] = _typed(hints["return"], name) | told
    return {"type": "function", "function": made}


def schemas(tools: object) -> list[Any] | None:
    """The JSON schemas of tools, which are functions, or schemas already.

    Raises:
        InputError: They are no list of these.
    """
    if not tools:
        return None
    if not isinstance(tools, list | tuple):
        raise InputError(f"tools takes a list, not {type(tools).__name__}.")
    return [one if isinstance(one, Mapping) else schema(one) for one in tools]


def _choices(text: str, key: str, name: str) -> dict[str, Any]:
    found = re.search(r"\(choices:\s*(.*?)\)\s*$", text, re.IGNORECASE)
    if found is None:
        return {"description": text}
    try:
        listed = json.loads(found[1])
        several = [one.strip() if isinstance(one, str) else one for one in listed]
    except (ValueError, TypeError):
        raise InputError(
            f"The choices of {key} of the tool {name} are no JSON list: {found[1]}."
        ) from None
    return {"enum": several, "description": text[: found.start()].strip()}


def _described(text: str) -> tuple[str, dict[str, str], str]:
    """What a docstring says: its beginning, its arguments, and what is returned."""
    parts = re.split(r"^(Args|Returns|Raises|Yields|Examples?):[ ]*$", text, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    described: dict[str, str] = {}
    margin = key = None
    for line in filter(str.strip, sections.get("Args", "").split("\n")):
        indent = len(line) - len(line.lstrip())
        margin = indent if margin is None else margin
        found = re.match(r"\s*(\w+)\s*(?:\([^)]*\))?:\s*(.*)", line)
        if found and indent <= margin:
            key = found[1]
            described[key] = found[2].strip()
        elif key is not None:
            described[key] = f"{described[key]} {line.strip()}".strip()
    returned = sections.get("Returns", "").strip()
    return parts[0].strip(), described, returned


_BASIC: Final[Mapping[object, str]] = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    type(None): "null",
    list: "array",
    tuple: "array",
}


def _typed(hint: Any, name: str) -> dict[str, Any]:
    """The schema of a type hint; what has none of its own is an object."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if origin is typing.Annotated:
        return _typed(inner[0], name)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _listed([one.value for one in hint])
    if origin is None:
        return {"type": _BASIC.get(hint, "object")}
    if origin is typing.Literal:
        return _listed(list(inner))
    if origin in {typing.Union, types.UnionType}:
        several = [_typed(one, name) for one in inner if one is not type(None)]
        kinds = [one.get("type") for one in several]
        if len(several) == 1:
            made = several[0]
        elif all(isinstance(kind, str) for kind in kinds):
            made = {"type": sorted(map(str, kinds))}
        else:
            made = {"anyOf": several}
        return made | ({"nullable": True} if type(None) in inner else {})
    if origin is tuple and ... not in inner:
        return {"type": "array", "prefixItems": [_typed(one, name) for one in inner]}
    if issubclass(origin, abc.Mapping):
        more = {"additionalProperties": _typed(inner[1], name)} if len(inner) == 2 else {}
        return {"type": "object", **more}
    if issubclass(origin, abc.Iterable):
        return {"type": "array", "items": _typed(inner[0], name)}
    raise InputError(f"The hint {hint} of the tool {name} is none that JSON has: use plain types.")


def _listed(values: list[Any]) -> dict[str, Any]:
    kinds = list(dict.fromkeys(_BASIC.get(type(one), "object") for one in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}
