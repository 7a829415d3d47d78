"""What a caller asks structured output to be, read and checked without any library."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal

from ebbtide.errors import InputError, nearest

Kind = Literal["json_schema", "regex", "choices", "grammar"]

KINDS: Final[Mapping[Kind, str]] = {
    "json_schema": "JSON schema",
    "regex": "regular expression",
    "choices": "list of choices",
    "grammar": "grammar",
}
"""The keys of a mapping, and what each is called."""

_OF_SCHEMAS: Final = frozenset(
    {"$defs", "$ref", "$schema", "allOf", "anyOf", "const", "definitions", "enum", "items"}
    | {"oneOf", "prefixItems", "properties", "required", "type", "additionalProperties"}
)
"""Keywords by which a mapping is known to be a JSON schema itself."""

_FLAGS: Final = {re.IGNORECASE: "i", re.DOTALL: "s"}

_WAYS: Final = (
    "Pass a pydantic model, a list of choices, a compiled regular expression, a JSON schema, or a"
    " mapping with one of: " + ", ".join(KINDS) + "."
)


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """What a text is to be.

    Attributes:
        kind: Which of the ways to say it.
        value: The schema, the expression, the choices, or the grammar.
        read: Of JSON: from a text that is JSON, what is given for it.
    """

    kind: Kind
    value: Any
    read: Callable[[str], Any] = json.loads

    @classmethod
    def of(cls, spec: object) -> Form:
        """Read what a caller asks for.

        Args:
            spec: A pydantic model class (or a `TypeAdapter`); a list of choices; a compiled
                regular expression; a JSON schema; a mapping with one of ``json_schema`` (a schema,
                its text, or a model class), ``regex``, ``choices`` and ``grammar`` (in Lark's
                notation); or OpenAI's ``response_format``.

        Raises:
            InputError: It is none of these.

        Example:
            >>> Form.of(["yes", "no"]).kind
            'choices'
            >>> Form.of({"regex": "[0-9]{4}"}).value
            '[0-9]{4}'
        """
        if isinstance(spec, Form):
            return spec
        if (model := _of_model(spec)) is not None:
            return model
        if isinstance(spec, re.Pattern):
            return cls("regex", _expression(spec))
        if isinstance(spec, Mapping):
            return cls._of_mapping(spec)
        if isinstance(spec, Sequence) and not isinstance(spec, str | bytes):
            return cls("choices", _choices(spec))
        raise InputError(f"structured takes no {type(spec).__name__}. {_WAYS}")

    @classmethod
    def _of_mapping(cls, spec: Mapping[Any, Any]) -> Form:
        if spec.get("type") == "json_object":
            return cls("json_schema", {"type": "object"})
        if spec.get("type") == "json_schema":
            inner = spec.get("json_schema")
            if not isinstance(inner, Mapping) or "schema" not in inner:
                raise InputError(
                    "structured: a response_format of type 'json_schema' needs"
                    " {'json_schema': {'schema': ...}}."
                )
            return cls._of_kind("json_schema", inner["schema"])
        ways = [one for one in KINDS if one in spec]
        if len(ways) == 1 and len(spec) == 1:
            return cls._of_kind(ways[0], spec[ways[0]])
        if not ways and _OF_SCHEMAS & set(spec):
            return cls._of_kind("json_schema", spec)
        if ways:
            others = ", ".join(repr(one) for one in spec if one != ways[0])
            raise InputError(f"structured: {ways[0]!r} comes alone, and not with {others}.")
        for key in spec:
            close = nearest(str(key), KINDS)
            if close:
                raise InputError(
                    f"structured: unknown key {key!r}. Did you mean {close!r}? {_WAYS}",
                    value=key,
                    nearest=close,
                )
        keys = ", ".join(map(repr, spec)) or "none"
        raise InputError(f"structured: nothing is known by these keys: {keys}. {_WAYS}")

    @classmethod
    def _of_kind(cls, kind: Kind, value: Any) -> Form:
        if kind == "json_schema":
            return _of_model(value) or cls(kind, _schema(value))
        if kind == "choices":
            return cls(kind, _choices(value))
        if kind == "regex" and isinstance(value, re.Pattern):
            return cls(kind, _expression(value))
        if not isinstance(value, str) or not value.strip():
            raise InputError(
                f"structured: a {KINDS[kind]} is a text that is not empty,"
                f" not {type(value).__name__}.",
                value=value,
            )
        return cls(kind, _valid(value))

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return KINDS[self.kind]

    @property
    def is_text(self) -> bool:
        """Whether what is given for a text is that text, and only the grammar knows its form."""
        return self.kind in ("regex", "grammar")

    def grammar(self, library: Any, whitespace: str) -> str:
        """The same as llguidance wants it.

        Args:
            library: llguidance.
            whitespace: What may stand between the parts of JSON: a regular expression.
        """
        make = library.LLMatcher
        if self.kind == "json_schema":
            return str(
                make.grammar_from_json_schema(self.value, {"whitespace_pattern": whitespace})
            )
        if self.kind == "regex":
            return str(make.grammar_from_regex(self.value))
        if self.kind == "choices":
            choices = (json.dumps(one, ensure_ascii=False) for one in self.value)
            return "start: " + " | ".join(one.replace("\x7f", "\\u007f") for one in choices)
        return str(make.grammar_from_lark(self.value))

    def parse(self, text: str) -> Any:
        """What a text says; None where it is not finished, or refused by a model's validators."""
        if self.kind == "choices":
            return text if text in self.value else None
        try:
            json.loads(text)
            return self.read(text)
        except (ValueError, RecursionError):
            return None


def refused(form: Form, message: str, error_of: Callable[[Mapping[str, Any]], str]) -> InputError:
    """The error for a form that llguidance refuses.

    Args:
        form: The form.
        message: What the library says.
        error_of: What it says of a part of a schema alone; empty where nothing is wrong.
    """
    where, why = _located(form, message, error_of)
    return InputError(f"structured: the {form.name} cannot be used: {where}{why}.", value=where)


def _located(
    form: Form, message: str, error_of: Callable[[Mapping[str, Any]], str]
) -> tuple[str, str]:
    first = message.strip().splitlines()[0].rstrip(".")
    if form.kind == "json_schema":
        path = _deepest(form.value, form.value, first, error_of)
        return (f"at {path}: " if path else ""), first
    at = re.match(r"(?:at )?(\d+)\((\d+)\): ", first)
    if form.kind == "regex":
        caret = re.search(r"^ {4}( *)\^", message, re.MULTILINE)
        why = re.search(r"^error: (.*)$", message, re.MULTILINE)
        where = f"at character {len(caret[1]) + 1}: " if caret else ""
        return where, why[1].rstrip(".") if why else first[at.end() :] if at else first
    if at is None:
        return "", first
    return f"at line {at[1]}, column {at[2]}: ", first[at.end() :]


def _deepest(
    part: Mapping[str, Any],
    whole: Mapping[str, Any],
    message: str,
    error_of: Callable[[Mapping[str, Any]], str],
    path: str = "#",
) -> str:
    """The path of the smallest part of a schema of which the library says the same."""
    shared = {key: whole[key] for key in ("$defs", "definitions") if key in whole}
    for step, inner in _parts(part):
        said = error_of({**shared, **inner} if path != "#" or "$defs" not in step else inner)
        if said.strip().startswith(message):
            return _deepest(inner, whole, message, error_of, f"{path}/{step}")
    return path


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The schemas inside a schema, and where each stands."""
    for key, value in schema.items():
        if key in ("properties", "patternProperties", "$defs", "definitions"):
            inner = list(value.items()) if isinstance(value, Mapping) else []
        elif key in ("anyOf", "allOf", "oneOf", "prefixItems"):
            inner = list(enumerate(value)) if isinstance(value, Sequence) else []
        elif key in ("items", "additionalProperties") and isinstance(value, Mapping):
            yield key, value
            continue
        else:
            continue
        for name, one in inner:
            if isinstance(one, Mapping):
                yield f"{key}/{name}", one


def _of_model(spec: object) -> Form | None:
    """The form of a pydantic model class, or of a `TypeAdapter`; None of anything else."""
    for schema, read in (
        ("model_json_schema", "model_validate_json"),
        ("json_schema", "validate_json"),
    ):
        make, validate = getattr(spec, schema, None), getattr(spec, read, None)
        if callable(make) and callable(validate):
            return Form("json_schema", _schema(make()), validate)
    return None


def _schema(value: object) -> dict[str, Any]:
    """A JSON schema as plain data.

    Raises:
        InputError: It is none.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise InputError(f"structured: the JSON schema is no JSON: {error}.") from None
    if not isinstance(value, Mapping):
        raise InputError(
            f"structured: a JSON schema is a mapping, its text or a pydantic model, not"
            f" {type(value).__name__}."
        )
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"structured: the JSON schema cannot be written as JSON: {error}."
        ) from None
    return plain


def _choices(value: object) -> tuple[str, ...]:
    listed = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    found: list[Any] = list(value) if listed else []  # type: ignore[call-overload]
    if not found or not all(isinstance(one, str) and one for one in found):
        raise InputError(
            "structured: choices are a list of one or more texts that are not empty, as in"
            " ['yes', 'no'].",
            value=value,
        )
    return tuple(_valid(one) for one in found)


def _expression(pattern: re.Pattern[Any]) -> str:
    """The text of a compiled regular expression, with its flags."""
    if not isinstance(pattern.pattern, str):
        raise InputError("structured: a regular expression is of text, not of bytes.")
    other = pattern.flags & (re.MULTILINE | re.VERBOSE | re.ASCII)
    if other:
        raise InputError(
            f"structured: a regular expression is taken with the flags re.I and re.S alone, not"
            f" {re.RegexFlag(other)!r}: write it without.",
            value=pattern,
        )
    flags = "".join(letter for flag, letter in _FLAGS.items() if pattern.flags & flag)
    text = _valid(pattern.pattern)
    return f"(?{flags}:{text})" if flags else text


def _valid(text: str) -> str:
    """The text itself.

    Raises:
        InputError: It is no valid Unicode.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"structured: {text!r} is no valid Unicode.", value=text) from None
    return text
