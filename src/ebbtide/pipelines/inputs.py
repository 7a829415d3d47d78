"""What users pass to a pipeline, checked and brought to one form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from ebbtide.errors import InputError, OptionError
from ebbtide.pipelines.progress import Progress

Texts = list[str] | tuple[str, ...]
"""Several texts. Not `Sequence`: to a type checker, one text is a sequence of texts."""

TextPair = tuple[str, str]
"""Two texts that the model reads together."""


def texts(inputs: object, what: str = "Input") -> tuple[list[str], bool]:
    """The texts, and whether there was one alone.

    Args:
        inputs: What was passed.
        what: What one of them is called.

    Raises:
        InputError: Something else than a text, or no text at all.
    """
    if isinstance(inputs, str):
        return [inputs], True
    return [_text(one, f"{what} {index}") for index, one in enumerate(_items(inputs, what))], False


def texts_or_pairs(inputs: object) -> tuple[list[str | TextPair], bool]:
    """The same, where two texts may stand in place of one.

    Such a pair is a map with the keys ``text`` and ``text_pair``, or, inside a list, a tuple or
    a list of two.
    """
    if isinstance(inputs, str | Mapping):
        return [_text_or_pair(inputs, "The input")], True
    items = _items(inputs)
    return [_text_or_pair(one, f"Input {index}") for index, one in enumerate(items)], False


def questions(question: object, context: object) -> tuple[list[TextPair], bool]:
    """Questions with their contexts, and whether there was one alone.

    A question goes with a context; several with one context each, or all with the same. Both may
    come as one map with the keys ``question`` and ``context``, or several such maps in a list.

    Raises:
        InputError: A question has no context, or one of the two is empty.
    """
    if context is None:
        if isinstance(question, Mapping):
            return [_asked(question)], True
        if isinstance(question, str) or question is None:
            raise InputError(
                "A question needs a context to find its answer in: pass"
                " pipe(question, context), or {'question': ..., 'context': ...}."
            )
        return [_asked(one) for one in _items(question)], False
    if isinstance(question, str):
        return [_asked({"question": question, "context": context})], True
    asked = _items(question)
    contexts = [context] * len(asked) if isinstance(context, str) else _items(context)
    if len(contexts) != len(asked):
        raise InputError(
            f"There are {len(asked)} questions and {len(contexts)} contexts: pass one context a"
            " question, or one text for all."
        )
    pairs = zip(asked, contexts, strict=True)
    return [_asked({"question": one, "context": other}) for one, other in pairs], False


@dataclasses.dataclass(frozen=True, slots=True)
class Many:
    """How several inputs are to run; see a task's call."""

    batch_size: int | None
    window: int | None
    progress: Progress


def many(batch_size: object, window: object, progress: object) -> Many:
    """How several inputs are to run.

    Raises:
        InputError: A number is none from 1, or ``progress`` is nothing that can be told.
    """
    if not isinstance(progress, bool) and not callable(progress):
        raise InputError(
            f"progress takes True, False or a function of two numbers, not {progress!r}.",
            value=progress,
        )
    return Many(
        None if batch_size is None else count("batch_size", batch_size),
        None if window is None else count("window", window),
        progress,
    )


def count(name: str, value: object) -> int:
    """A whole number from 1.

    Raises:
        InputError: It is none.
    """
    if type(value) is not int or value < 1:
        raise InputError(f"{name} takes a whole number from 1, not {value!r}.", value=value)
    return value


def yes_or_no(name: str, value: object) -> bool:
    """True or False.

    Raises:
        OptionError: It is neither.
    """
    if not isinstance(value, bool):
        raise OptionError(f"{name} takes True or False, not {value!r}.", option=name)
    return value


def _items(inputs: object, what: str = "Input") -> list[object]:
    if isinstance(inputs, bytes | bytearray | memoryview):
        raise InputError("A text is needed, and this is bytes: decode them first.")
    if isinstance(inputs, Sequence) or (isinstance(inputs, np.ndarray) and inputs.ndim == 1):
        items = list(inputs)
        if not items:
            raise InputError(f"{what}: there is no text in an empty list. Pass at least one.")
        return items
    raise InputError(
        f"A text, a list of texts or an iterator of texts is needed, not {type(inputs).__name__}."
    )


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{what} is no text: {type(value).__name__}.", value=what)
    return str(value)


def _text_or_pair(value: object, what: str) -> str | TextPair:
    if isinstance(value, Mapping):
        if set(value) - {"text_pair"} != {"text"}:
            raise InputError(
                f"{what} is a map with the keys {', '.join(map(str, value)) or '(none)'}: two texts"
                " to be read together are {'text': ..., 'text_pair': ...}."
            )
        first = _text(value["text"], f"{what}'s text")
        if value.get("text_pair") is None:
            return first
        return first, _text(value["text_pair"], f"{what}'s text_pair")
    if isinstance(value, list | tuple) and len(value) == 2:
        return _text(value[0], f"{what}'s first text"), _text(value[1], f"{what}'s second text")
    return _text(value, what)


def _asked(value: object) -> TextPair:
    if not isinstance(value, Mapping) or set(value) != {"question", "context"}:
        raise InputError(
            "A question with its context is a map with just these two keys:"
            " {'question': ..., 'context': ...}."
        )
    for key in ("question", "context"):
        if not _text(value[key], f"The {key}").strip():
            raise InputError(
                f"The {key} is empty: a question needs words, and so does its context."
            )
    return str(value["question"]), str(value["context"])
