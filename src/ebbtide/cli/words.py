"""The words after the task: which are texts, and which are options of the task's call."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from ebbtide.errors import InputError, unknown_option
from ebbtide.pipelines import Pipeline, find

Value = bool | int | float | str

_BOOLEANS = {"true": True, "false": False}
_OWN = ("model", "dtype", "device", "json")


@dataclasses.dataclass(frozen=True, slots=True)
class CallOption:
    """One option of a task's call, as its signature has it.

    Attributes:
        name: Its name in Python.
        default: What it is where it is not given.
        values: The values it takes, where they are a closed list of words.
        flag: Whether it may stand alone, for true.
    """

    name: str
    default: object
    values: tuple[str, ...]
    flag: bool

    def parse(self, text: str) -> Value:
        """The value that a word stands for: bool, int or float where it reads as one, else text."""
        if self.values:
            return text
        if text.lower() in _BOOLEANS:
            return _BOOLEANS[text.lower()]
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        return text


def call_options(task: str) -> Mapping[str, CallOption]:
    """The options of a task's call, by name.

    Example:
        >>> call_options("feature-extraction")["normalize"].flag
        True
    """
    classes = {one.task: one for one in Pipeline.__subclasses__()}
    call = classes[find(task).name].__call__
    types = typing.get_type_hints(call)
    options = {}
    for parameter in inspect.signature(call).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            name, hint = parameter.name, types[parameter.name]
            values = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
            flag = hint is bool or bool in typing.get_args(hint)
            options[name] = CallOption(name, parameter.default, values, flag)
    return options


def split(task: str, words: Sequence[str]) -> tuple[list[str], dict[str, Value]]:
    """The texts among the words, and the options of the call with their values.

    Raises:
        InputError: There is no such task, or an option lacks its value.
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
            elif option.flag:
                options[name] = True
                pushed += [follows] if follows is not None else []
            else:
                raise InputError(f"--{word[2:]} needs a value.{_choice(option)}", value=word)
        elif negated is not None and negated.flag and not given:
            options[negated.name] = False
        else:
            raise unknown_option(name, (*known, *_OWN), where=f"The {task} pipeline")
    return texts, options


def as_list(option: CallOption) -> str:
    """One option as help shows it.

    Example:
        >>> as_list(call_options("feature-extraction")["precision"])
        '--precision binary | ubinary'
    """
    name = f"--{option.name.replace('_', '-')}"
    if option.flag:
        return f"--[no-]{name[2:]}"
    return f"{name} {' | '.join(option.values) or type(option.default).__name__.upper()}"


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


def _is_value(option: CallOption, word: str) -> bool:
    if option.flag:
        return word.lower() in _BOOLEANS
    return not word.startswith("--")


def _choice(option: CallOption) -> str:
    return f" Known: {', '.join(option.values)}." if option.values else ""
