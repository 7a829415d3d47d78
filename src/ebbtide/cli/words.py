"""The words after the task: which are texts, and which are options of the task's call.

Without a text among them, the texts are `lines`.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal

from ebbtide.errors import InputError, OptionError, unknown_option, unknown_value
from ebbtide.generation import GenerationConfig
from ebbtide.pipelines import find

Value = bool | int | float | str | list[str] | list[int] | None
Kind = Literal["flag", "number", "decimal", "numbers", "word", "text", "texts"]

_BOOLEANS: Final = {"true": True, "false": False}
_OWN: Final = ("model", "dtype", "device", "revision", "prepare", "json")
_EXAMPLES: Final = {
    "feature-extraction": '"The tide goes out." --pooling mean --normalize',
    "text-classification": '"What a lovely day."',
    "token-classification": '"Ada lives in Reykjavik." --aggregation-strategy simple',
    "question-answering": '"When?" --context "The tide goes out at six."',
    "fill-mask": '"The tide goes [MASK]."',
    "zero-shot-classification": '"The tide goes out." --candidate-labels "sea, city"',
    "text-generation": '"The tide goes" --max-new-tokens 20',
    "text2text-generation": '"translate English to German: The tide goes out."',
    "summarization": '"The tide goes out at six, and the boats lie on their sides until noon."',
    "translation": '"The tide goes out."',
}


@dataclasses.dataclass(frozen=True, slots=True)
class CallOption:
    """One option of a task's call, as its signature has it.

    Attributes:
        name: Its name in Python.
        kind: A ``flag`` may stand alone, for true; a ``number`` is whole, a ``decimal`` maybe not;
            a ``word`` is one of `values`; ``texts`` and ``numbers`` are parted by commas.
        default: What it is where it is not given.
        values: The words it takes, where they are a closed list; of a flag those beside true and
            false.
        needed: Whether there is nothing to do without it.
        none: Whether a number may also be None.
    """

    name: str
    kind: Kind
    default: object = None
    values: tuple[str, ...] = ()
    needed: bool = False
    none: bool = False

    def parse(self, text: str) -> Value:
        """The value that a word stands for.

        Raises:
            InputError: It stands for none that the option takes; says which it does.
            OptionError: The same, for a flag.
        """
        if self.kind == "flag":
            if text in self.values:
                return text
            if text.lower() not in _BOOLEANS:
                raise OptionError(
                    f"{self.name} takes True or False, not {text!r}.", option=self.name
                )
            return _BOOLEANS[text.lower()]
        if self.kind in _READ:
            if self.none and text.lower() == "none":
                return None
            read, takes = _READ[self.kind]
            try:
                return read(text)
            except ValueError:
                also = " or none" if self.none else ""
                raise InputError(
                    f"{self.name} takes {takes}{also}, not {text!r}.", value=text
                ) from None
        if self.kind == "word" and text not in self.values:
            raise unknown_value(self.name, text, self.values)
        if self.kind == "texts":
            return _parted(text)
        return text


def _parted(text: str) -> list[str]:
    return [one for one in map(str.strip, text.split(",")) if one]


_READ: Final[Mapping[Kind, tuple[Callable[[str], Value], str]]] = {
    "number": (int, "a whole number"),
    "decimal": (float, "a number"),
    "numbers": (lambda text: [int(one) for one in _parted(text)], "whole numbers with commas"),
}


def example(task: str) -> str:
    """A command that runs a task."""
    name = find(task).name
    return f"ebbtide run {name} {_EXAMPLES[name]}"


def call_options(task: str) -> Mapping[str, CallOption]:
    """The options of a task's call, by name.

    What the call takes beside its texts without a name, as a question's context, is an option too:
    one that is needed.

    Example:
        >>> call_options("feature-extraction")["normalize"].kind
        'flag'
        >>> call_options("question-answering")["context"].needed
        True
    """
    found = find(task)
    call = found.pipeline.__call__
    hints = typing.get_type_hints(call)
    _, _, *parameters = inspect.signature(call).parameters.values()  # self, and the texts
    options = {
        one.name: _option(one.name, hints[one.name], one.default, one.kind is not one.KEYWORD_ONLY)
        for one in parameters
        if one.kind is not one.VAR_KEYWORD and not _is_of_python(hints[one.name])
    }
    if found.name == "text-classification":  # in Python, a part of the input
        options["text_pair"] = CallOption("text_pair", "text")
    if found.name == "translation":
        options |= {name: CallOption(name, "text") for name in ("src_lang", "tgt_lang")}
    if parameters[-1].name == "options":  # and not `unknown` ones, which are refused
        options |= generation_options()
    return options


def generation_options() -> Mapping[str, CallOption]:
    """The options of a generation that can be typed, by name.

    Example:
        >>> generation_options()["temperature"].kind
        'decimal'
    """
    hints = typing.get_type_hints(GenerationConfig)
    return {
        one.name: _option(one.name, hints[one.name], one.default, False)
        for one in dataclasses.fields(GenerationConfig)
        if not _is_of_python(hints[one.name])
    }


def _members(hint: object) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _is_of_python(hint: object) -> bool:
    """Whether it takes only functions, or lists within lists, which nobody types."""
    return not any(
        one in (bool, int, float, str)
        or typing.get_origin(one) is Literal
        or (
            any(typing.get_args(one))
            and all(each in (str, int, ...) for each in typing.get_args(one))
        )
        for one in _members(hint)
    )


def _option(name: str, hint: object, default: object, needed: bool) -> CallOption:
    members = _members(hint)
    literals = [one for one in members if typing.get_origin(one) is Literal]
    kind: Kind = "text"
    if bool in members:
        kind = "flag"
    elif literals:
        kind = "word"
    elif int in members:
        kind = "number"
    elif float in members:
        kind = "decimal"
    elif tuple[int, ...] in members:
        kind = "numbers"
    elif not needed and any(map(typing.get_args, members)):  # as in Sequence[str]
        kind = "texts"
    return CallOption(
        name,
        kind,
        default,
        values=tuple(value for one in literals for value in typing.get_args(one)),
        needed=needed,
        none=kind in ("number", "decimal") and type(None) in members,
    )


def split(task: str, words: Sequence[str]) -> tuple[list[str], dict[str, Value]]:
    """The texts among the words, and the options of the call with their values.

    Raises:
        InputError: There is no such task, an option lacks its value or has a wrong one, or one that
            is needed is not there.
        OptionError: The task's call has no such option; names the nearest.

    Example:
        >>> split("feature-extraction", ["one", "--pooling", "mean", "--normalize", "two"])
        (['one', 'two'], {'pooling': 'mean', 'normalize': True})
    """
    known = call_options(task)
    texts: list[str] = []
    options: dict[str, Value] = {}
    rest = iter(words)
    pushed: list[str] = []
    while (word := pushed.pop() if pushed else next(rest, None)) is not None:
        if not word.startswith("--") or word == "--":
            texts.append(word)
            continue
        name, given, value = word[2:].partition("=")
        name = name.replace("-", "_")
        option = known.get(name)
        negated = known.get(name.removeprefix("no_")) if name.startswith("no_") else None
        if option is not None:
            follows = value if given else next(rest, None)
            if follows is not None and (given or _is_value(option, follows)):
                options[name] = option.parse(follows)
            elif option.kind == "flag":
                options[name] = True
                pushed += [follows] if follows is not None else []
            else:
                choice = f" Known: {', '.join(option.values)}." if option.values else ""
                raise InputError(f"--{word[2:]} needs a value.{choice}", value=word)
        elif negated is not None and negated.kind == "flag" and not given:
            options[negated.name] = False
        else:
            raise unknown_option(name, (*known, *_OWN), where=f"The {task} pipeline")
    for option in known.values():
        if option.needed and option.name not in options:
            raise InputError(f"{task} needs {_dashed(option)}, as in: {example(task)}")
    return texts, options


def as_list(option: CallOption) -> str:
    """One option as help shows it.

    Example:
        >>> as_list(call_options("feature-extraction")["precision"])
        '--precision binary | ubinary'
        >>> as_list(call_options("question-answering")["context"])
        '--context TEXT (needed)'
    """
    if option.kind == "flag":
        return " | ".join((f"--[no-]{_dashed(option)[2:]}", *option.values))
    shown = {
        "number": "INT", "decimal": "FLOAT", "numbers": "INT,INT,...",
        "text": "TEXT", "texts": "TEXT,TEXT,...",
    }  # fmt: skip
    value = " | ".join(option.values) or shown[option.kind]
    none, needed = " | none" * option.none, " (needed)" * option.needed
    return f"{_dashed(option)} {value}{none}{needed}"


def lines() -> Iterator[str]:
    """The lines of standard input, as they come in.

    Raises:
        InputError: A line is not UTF-8.
    """
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(f"Line {number} of standard input is not UTF-8: {error}.") from None


def groups(texts: Iterator[str], size: object) -> Iterator[list[str]]:
    """So many texts at a time, as they come; one at a time for a size that is none."""
    many = size if type(size) is int and size > 1 else 1
    group: list[str] = []
    for text in texts:
        group.append(text)
        if len(group) == many:
            yield group
            group = []
    if group:
        yield group


def _dashed(option: CallOption) -> str:
    return f"--{option.name.replace('_', '-')}"


def _is_value(option: CallOption, word: str) -> bool:
    if option.kind == "flag":
        return word.lower() in _BOOLEANS or word in option.values
    return not word.startswith("--")
