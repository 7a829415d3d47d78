"""Chats to prompts, by the Jinja template that a model brings; run so that none can do harm.

A template is a program of the model's author. It sees the messages and nothing else, and what it
may do is bounded: by its processor time, and by the characters and items that it may handle.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from ebbtide.errors import (
    EbbtideError,
    InputError,
    LoadError,
    UnsupportedModelError,
    unknown_value,
)
from ebbtide.hub import ModelFiles
from ebbtide.models.chat_tools import schemas

_FOLDER: Final = "additional_chat_templates"
_KNOWN: Final = ("tool_use", "rag")
"""Templates that a model may have beside its default one, where a folder cannot be listed."""

CHAT_FILES: Final = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    *(f"{_FOLDER}/{name}.jinja" for name in _KNOWN),
)
_TOKENS: Final = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_MARK: Final = "EBBTIDE_CONTINUES_HERE "
"""Ends the last message while it is rendered, to find where it is to be continued."""


class ChatTemplate:
    """A model's chat templates: they write a list of messages as the text that it was taught.

    Args:
        templates: The templates by their names; ``default`` is used where none is named, and
            ``tool_use`` where tools are given.
        tokens: Variables that a template sees, such as ``bos_token``.
        model: What the user calls the model.

    Example:
        >>> chat = ChatTemplate({"default": "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        ...                      "{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"})
        >>> chat.render([{"role": "you", "content": "Is it high tide?"}])
        '<you>Is it high tide?<me>'
    """

    def __init__(
        self,
        templates: Mapping[str, str],
        tokens: Mapping[str, Any] | None = None,
        *,
        model: str = "the model",
    ) -> None:
        self._templates = dict(templates)
        self._tokens = dict(tokens or {})
        self._model = model
        self._compiled: dict[str, Any] = {}

    @classmethod
    def read(cls, files: ModelFiles) -> ChatTemplate:
        """A model's templates; there may be none.

        Args:
            files: The model's files.

        Raises:
            LoadError: A file of them cannot be read.
        """
        files.fetch(CHAT_FILES)
        raw = files.json("tokenizer_config.json") or {}
        more = files.json("special_tokens_map.json") or {}
        templates = _named(raw.get("chat_template"))
        there = {path.stem for path in (files.folder / _FOLDER).glob("*.jinja")}
        names = {name: f"{_FOLDER}/{name}.jinja" for name in sorted(there.union(_KNOWN))}
        names["default"] = "chat_template.jinja"
        found = {name: _text(files, file) for name, file in names.items()}
        written = {name: text for name, text in found.items() if text is not None}
        if not (written or templates):
            written = _named((files.json("chat_template.json") or {}).get("chat_template"))
        return cls(written or templates, _special(raw, more), model=files.name)

    @property
    def templates(self) -> Mapping[str, str]:
        """The templates' texts by their names; empty where the model has none."""
        return dict(self._templates)

    def text(self, template: str | None = None, *, tools: bool = False) -> str:
        """The text of the template that a call would use.

        Args:
            template: A template's name or text; None for the model's own choice.
            tools: Whether tools are given.

        Raises:
            InputError: No template has this name, or several are there and none is the default.
            UnsupportedModelError: The model has no template.
        """
        known = self._templates
        if template is not None and not isinstance(template, str):
            raise InputError(
                f"chat_template takes a name or a text, not {type(template).__name__}."
            )
        if template in known:
            return known[template]
        if template is not None:
            if re.fullmatch(r"[\w.-]*", template):
                raise unknown_value("chat template", template, sorted(known))
            return template
        if tools and "tool_use" in known:
            return known["tool_use"]
        if "default" in known:
            return known["default"]
        if known:
            raise InputError(
                f"{self._model} has several chat templates and no default one: pass one of"
                f" {', '.join(sorted(known))} as chat_template=."
            )
        raise UnsupportedModelError(
            f"{self._model} has no chat template, so it cannot be told who said what. Pass a text"
            " instead of messages, or the template that the model was taught as chat_template=.",
            model=self._model,
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The messages as one text, in the model's own form.

        Args:
            messages: What was said: dicts with ``role`` and ``content``, a text or a list of parts.
            tools: What the model may call: JSON schemas, or functions that `schema` can describe.
            documents: What the model may answer from: dicts, usually with ``title`` and ``text``.
            template: A template's name or text; None for the model's own choice.
            add_generation_prompt: End with what begins an answer.
            continue_final_message: End within the last message, for the model to continue; no
                answer is begun then.
            variables: More that the template sees, such as ``enable_thinking``.

        Returns:
            The text, with special tokens written out: it is tokenised without adding any.

        Raises:
            InputError: The messages, tools or documents are no such thing, or the template does not
                take them, or it was passed and cannot be used.
            UnsupportedModelError: The model has no template, or its own cannot be used.
        """
        chat = _messages(messages)
        if continue_final_message:
            last = _marked(chat)
        shown = {
            **self._tokens,
            **variables,
            "messages": chat,
            "tools": _plain(schemas(tools)),
            "documents": _documents(documents),
            "add_generation_prompt": bool(add_generation_prompt) and not continue_final_message,
        }
        text = self.text(template, tools=bool(tools))
        known = text in self._templates.values()
        written = self._run(text, shown, known)
        return _cut(written, last, self._model) if continue_final_message else written

    def _run(self, text: str, shown: dict[str, Any], known: bool) -> str:
        from jinja2.exceptions import SecurityError, TemplateSyntaxError

        from ebbtide.models.chat_sandbox import (
            LONGEST_TEMPLATE,
            RefusedError,
            StoppedError,
            bounded,
            environment,
        )

        try:
            with bounded():
                compiled = self._compiled.get(text)
                if compiled is None:
                    if len(text) > LONGEST_TEMPLATE:
                        raise StoppedError(f"it has {len(text):,} characters")
                    compiled = environment().from_string(text)
                    if known:
                        self._compiled[text] = compiled
                return str(compiled.render(shown))
        except RefusedError as error:
            raise InputError(
                f"The chat template of {self._model} does not take these messages: {_said(error)}"
            ) from None
        except (RecursionError, MemoryError):
            raise self._unusable("it is nested too deep", known) from None
        except (SecurityError, TemplateSyntaxError, StoppedError) as error:
            raise self._unusable(_said(error), known) from None
        except Exception as error:
            raise InputError(
                f"The chat template of {self._model} fails on these messages"
                f" ({type(error).__name__}: {_said(error)}). Compare them with an example of the"
                " model's, or pass another template as chat_template=."
            ) from None

    def _unusable(self, why: str, known: bool) -> EbbtideError:
        if not known:
            return InputError(f"The chat template that was passed cannot be used: {why}.")
        return UnsupportedModelError(
            f"The chat template of {self._model} cannot be used: {why}. Pass another one as"
            " chat_template=.",
            model=self._model,
        )


def _said(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text[:500].rstrip(".")


def _named(raw: object) -> dict[str, str]:
    """The templates of a JSON file: one text, or several with names."""
    if isinstance(raw, str):
        return {"default": raw}
    several = raw if isinstance(raw, list) else []
    pairs = [(one.get("name"), one.get("template")) for one in several if isinstance(one, dict)]
    return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}


def _text(files: ModelFiles, name: str) -> str | None:
    path = files.find(name)
    if path is None:
        return None
    try:
        # As text files are read: line ends of other systems would be told to the model.
        return files.content(name).decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise LoadError(f"{path} is no UTF-8: {error}.", path=str(path)) from None


def _special(raw: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens by the names that templates use."""
    tokens: dict[str, Any] = {}
    named = raw.get("extra_special_tokens")
    for source in (more, raw, named if isinstance(named, dict) else {}):
        for key, value in source.items():
            if source is not named and key.removesuffix("_token") not in _TOKENS:
                continue
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                tokens[key] = text
            else:
                tokens.pop(key, None)
    return tokens


# What is given


def _plain(value: Any) -> Any:
    """A copy in plain dicts and lists, so that a template meets no object's own methods."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value


def _messages(messages: object) -> list[dict[str, Any]]:
    if isinstance(messages, Mapping | str) or not isinstance(messages, Sequence) or not messages:
        raise InputError(
            "A chat is a list of messages, such as [{'role': 'user', 'content': 'Hello'}], not"
            f" {type(messages).__name__ if messages else 'an empty one'}."
        )
    for number, message in enumerate(messages):
        wrong = _wrong(message)
        if wrong:
            raise InputError(f"Message {number} of the chat {wrong}.", value=number)
    try:
        return [_plain(message) for message in messages]
    except RecursionError:
        raise InputError("The chat is nested too deep, or holds itself.") from None


def _wrong(message: object) -> str:
    """What is wrong with a message, or an empty text."""
    if not isinstance(message, Mapping):
        return f"is no dict with role and content, but {type(message).__name__}"
    role, calls = message.get("role"), message.get("tool_calls")
    if not isinstance(role, str) or not role:
        return "has no role: it is a text such as 'user', 'assistant' or 'system'"
    if calls is not None and not (
        isinstance(calls, list | tuple) and all(isinstance(one, Mapping) for one in calls)
    ):
        return "has tool_calls that are no list of dicts"
    content = message.get("content")
    if isinstance(content, str) or (content is None and calls):
        return ""
    if content is None:
        return "has no content: only one with tool_calls may be without"
    if not isinstance(content, list | tuple):
        return f"has content that is no text or list of parts, but {type(content).__name__}"
    if not all(isinstance(part, str | Mapping) for part in content):
        return "has a part that is no dict, such as {'type': 'text', 'text': 'Hello'}"
    return ""


def _documents(documents: object) -> list[dict[str, Any]] | None:
    if not documents:
        return None
    if not isinstance(documents, list | tuple) or not all(
        isinstance(one, Mapping) for one in documents
    ):
        raise InputError("documents takes a list of dicts, such as [{'title': ..., 'text': ...}].")
    return [_plain(one) for one in documents]


def _marked(chat: list[dict[str, Any]]) -> str:
    """Mark the last text of a chat, and give what it was."""
    message = chat[-1]
    places = [message] if isinstance(message.get("content"), str) else message.get("content") or []
    key = "content" if places == [message] else "text"
    for place in reversed(places):
        if isinstance(place, dict) and isinstance(place.get(key), str):
            last: str = place[key]
            place[key] = last + _MARK
            return last
    raise InputError("continue_final_message needs a last message with a text to continue.")


def _cut(written: str, last: str, model: str) -> str:
    """The text up to the mark; without the space before it where a template took that after it."""
    at = written.rfind(_MARK.strip())
    if at < 0 or last.strip() not in written:
        raise InputError(
            f"The chat template of {model} does not write the last message as it is, so that it"
            " cannot be continued: pass continue_final_message=False."
        )
    return written[:at] if written.startswith(_MARK, at) else written[:at].rstrip()
