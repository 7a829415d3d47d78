"""text-generation: a text or a chat, written on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from itertools import chain
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from ebbtide.cancellation import CancelToken
from ebbtide.errors import InputError
from ebbtide.generation.loop import Written
from ebbtide.generation.speculation import DraftModel
from ebbtide.generation.steps import Ids, Steps
from ebbtide.hub import ModelFiles
from ebbtide.lifecycle import Lifecycle
from ebbtide.memory.ledger import Lease
from ebbtide.models.chat import CHAT_FILES, ChatTemplate
from ebbtide.models.chat_tools import schemas
from ebbtide.models.decoder import Decoder, context_of
from ebbtide.models.loading import Loaded, LoadOptions
from ebbtide.models.prompt_cache import PromptCache
from ebbtide.models.replies import formats_of, parse_reply
from ebbtide.models.structured import Structure, Vocabulary
from ebbtide.models.structured_form import Form
from ebbtide.pipelines.generating import (
    AsyncStream,
    GeneratingPipeline,
    Shown,
    Stream,
    Streamer,
    Understood,
    whole,
)
from ebbtide.pipelines.inputs import yes_or_no
from ebbtide.pipelines.writing import Asked, Generated, config_of, generate
from ebbtide.runtime import Waiting

Message = Mapping[str, Any]
Chat = Sequence[Message]

_FILES: Final = ("generation_config.json", *CHAT_FILES)
_OF_CHATS: Final = (
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "template_options",
)

BEFORE: Final = 16
"""Tokens of a prompt that new ones are read after, to become text."""


@dataclasses.dataclass(frozen=True, slots=True)
class About:
    """What a model says of how it writes.

    Attributes:
        defaults: Its generation_config.json.
        chat: Its chat templates.
    """

    defaults: Mapping[str, Any]
    chat: ChatTemplate


@dataclasses.dataclass(frozen=True, slots=True)
class _Prompt:
    """One input, ready: what it was, its text, how that is tokenised, and how replies look."""

    given: str | list[dict[str, Any]]
    text: str
    special: bool
    continues: bool = False
    formats: tuple[str, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()


class TextGenerationPipeline(GeneratingPipeline[_Prompt]):
    """A text or a chat, written on.

    Example:
        >>> import ebbtide
        >>> with ebbtide.pipeline("text-generation", "tests/models/gen-llama") as write:
        ...     found = write("The tide", max_new_tokens=3, return_full_text=False)
        >>> len(found), list(found[0])
        (1, ['generated_text'])
    """

    task: ClassVar[str] = "text-generation"
    extra_files: ClassVar[tuple[str, ...]] = _FILES

    def __init__(self, lifecycle: Lifecycle, model: Any, about: About) -> None:
        super().__init__(lifecycle, model)
        self._about = about
        self._words: Lease[Vocabulary] | None = None
        self._kept = PromptCache()
        lifecycle.resources.append(self._kept)

    @classmethod
    def load(
        cls,
        files: ModelFiles,
        options: LoadOptions,
        lifecycle: Lifecycle,
        token: CancelToken,
        told: Callable[[Waiting], object],
    ) -> Decoder:
        """Load the model."""
        return Decoder(Loaded.of(files, options, _FILES, lifecycle, token, told))

    @classmethod
    def read(cls, files: ModelFiles, model: Any) -> About:
        """What the model says of how it writes."""
        return About(files.json("generation_config.json") or {}, ChatTemplate.read(files))

    @property
    def chat_template(self) -> ChatTemplate:
        """The model's chat templates."""
        return self._about.chat

    def __call__(
        self,
        inputs: str | Chat | Sequence[str] | Sequence[Chat],
        *,
        return_full_text: bool = True,
        add_special_tokens: bool = True,
        skip_special_tokens: bool = True,
        details: bool = False,
        logprobs: bool = False,
        prompt_lookup_num_tokens: int | None = None,
        batch_size: int | None = None,
        streamer: Streamer | None = None,
        **options: Any,
    ) -> list[Any]:
        """Write on.

        Args:
            inputs: A text, a chat (a list of messages with ``role`` and ``content``), or a list of
                texts or of chats.
            return_full_text: Give the prompt with what was written; of a chat all messages.
            add_special_tokens: Begin a text as the model was taught. A chat's template does that.
            skip_special_tokens: Leave special tokens out of the text.
            details: Give ``token_ids`` and ``finish_reason`` too, and what else was asked for:
                ``logprobs``, ``score`` of a beam, ``scores``, ``logits``.
            logprobs: Whether each token's log-probability is wanted; with ``details``.
            prompt_lookup_num_tokens: How many tokens are guessed at most from where the same was
                said before, to be checked in one step; 0 for none, None for as many as pay.
            batch_size: How many prompts of a list are written on together. None: up to 8; of a
                dynamically quantised model one.
            streamer: Told of each `Piece` as it is written, on the caller's thread; for one input.
            **options: Of chats: ``tools``, ``documents``, ``chat_template`` (a name or a text),
                ``continue_final_message``, ``add_generation_prompt``, ``template_options``.

                ``cache_prompt``: keep what the model saw for the next call that begins the same and
                asks for it too, as the turns of a chat do, until the pipeline sleeps or ends; at
                most ``settings.prompt_cache_size`` bytes. ``assistant_model``: another
                text-generation pipeline, smaller and over the same tokens, that guesses ahead.
                ``structured``: the form that each text has, whatever the model would say: a
                pydantic model, a JSON schema, a list of choices, a compiled pattern, or a map such
                as ``{"grammar": ...}`` (see `ebbtide.models.structured_form`); the result then has
                what the text says as ``parsed``. It needs the extra ``structured``.

                Of the generation: all of `ebbtide.generation.GenerationConfig`. ``max_new_tokens``
                is 256 where the model says nothing.

        Returns:
            For one input a list of ``{"generated_text": ...}``, as many as
            ``num_return_sequences``; for a list of inputs a list of such lists. Of a chat the text
            is its messages with one by the assistant, whose reasoning and tool calls, where the
            model's format for them is a known one, are apart from its content, as
            ``reasoning_content`` and ``tool_calls``; or without ``return_full_text`` all of the
            text that the model wrote.

        Raises:
            InputError: An input cannot be used, options contradict one another, or the prompt is
                longer than the model can take.
            OptionError: There is no such option.
            PipelineDisposedError: The pipeline is disposed.
            PipelineCancelledError: It was cancelled while it ran.
        """
        understood = self._understood(
            inputs,
            return_full_text=return_full_text,
            add_special_tokens=add_special_tokens,
            skip_special_tokens=skip_special_tokens,
            details=details,
            logprobs=logprobs,
            lookup=prompt_lookup_num_tokens,
            batch_size=batch_size,
            options=options,
        )
        return self._call(understood, streamer)

    async def acall(
        self,
        inputs: str | Chat | Sequence[str] | Sequence[Chat],
        *,
        return_full_text: bool = True,
        add_special_tokens: bool = True,
        skip_special_tokens: bool = True,
        details: bool = False,
        logprobs: bool = False,
        prompt_lookup_num_tokens: int | None = None,
        batch_size: int | None = None,
        streamer: Streamer | None = None,
        **options: Any,
    ) -> list[Any]:
        """The same on an event loop, whose thread tells the streamer; see `__call__`."""
        understood = self._understood(
            inputs,
            return_full_text=return_full_text,
            add_special_tokens=add_special_tokens,
            skip_special_tokens=skip_special_tokens,
            details=details,
            logprobs=logprobs,
            lookup=prompt_lookup_num_tokens,
            batch_size=batch_size,
            options=options,
        )
        return await self._acall(understood, streamer)

    def stream(
        self,
        inputs: str | Chat,
        *,
        logprobs: bool = False,
        add_special_tokens: bool = True,
        skip_special_tokens: bool = True,
        prompt_lookup_num_tokens: int | None = None,
        **options: Any,
    ) -> Stream:
        """Write on, and give each piece as it is written; who stops reading stops it.

        Args:
            inputs: A text or a chat.
            logprobs: Whether each token's log-probability is wanted.
            add_special_tokens: Begin a text as the model was taught.
            skip_special_tokens: Leave special tokens out of the text.
            prompt_lookup_num_tokens: As for `__call__`.
            **options: As for `__call__`, without several sequences; of a beam search the pieces
                come at its end.

        Example:
            >>> import ebbtide
            >>> with ebbtide.pipeline("text-generation", "tests/models/gen-llama") as write:
            ...     pieces = list(write.stream("The tide", max_new_tokens=3))
            >>> len(pieces), pieces[-1].finish_reason
            (3, 'length')
        """
        return self._stream_of(
            self._understood(
                inputs,
                add_special_tokens=add_special_tokens,
                skip_special_tokens=skip_special_tokens,
                logprobs=logprobs,
                lookup=prompt_lookup_num_tokens,
                options=options,
            )
        )

    def astream(
        self,
        inputs: str | Chat,
        *,
        logprobs: bool = False,
        add_special_tokens: bool = True,
        skip_special_tokens: bool = True,
        prompt_lookup_num_tokens: int | None = None,
        **options: Any,
    ) -> AsyncStream:
        """The same as `stream` on an event loop."""
        understood = self._understood(
            inputs,
            add_special_tokens=add_special_tokens,
            skip_special_tokens=skip_special_tokens,
            logprobs=logprobs,
            lookup=prompt_lookup_num_tokens,
            options=options,
        )
        return self._astream_of(understood)

    def _understood(
        self,
        inputs: object,
        *,
        add_special_tokens: bool,
        skip_special_tokens: bool,
        logprobs: bool,
        lookup: int | None,
        options: dict[str, Any],
        return_full_text: bool = True,
        details: bool = False,
        batch_size: int | None = None,
    ) -> Understood[_Prompt]:
        of_chats: dict[str, Any] = {
            name: options.pop(name) for name in _OF_CHATS if name in options
        }
        cached = yes_or_no("cache_prompt", options.pop("cache_prompt", False))
        structured = options.pop("structured", None)
        form = None if structured is None else Form.of(structured)
        assistant = self._checked(options.pop("assistant_model", None))
        given, alone = _inputs(inputs)
        prompts = [self._prompt(one, add_special_tokens, of_chats) for one in given]
        if of_chats and any(isinstance(one.given, str) for one in prompts):
            raise InputError(
                f"{', '.join(of_chats)} are for chats, and a text was passed: pass a list of"
                " messages with role and content, or leave them out."
            )
        config = config_of(self._about.defaults, self.tokenizer.pad_id, options)
        lookup = whole("prompt_lookup_num_tokens", lookup, 0)
        guesses = "assistant_model" if assistant else "prompt_lookup_num_tokens" if lookup else ""
        single = guesses or ("cache_prompt" if cached else "")
        if single and (config.num_beams > 1 or config.num_return_sequences > 1):
            raise InputError(
                f"{single} is for one sequence of each prompt: leave it out, or num_beams and"
                " num_return_sequences."
            )
        if guesses and config.guidance_scale not in (None, 1):
            raise InputError(f"{guesses} does not go with guidance_scale: leave one of them out.")
        return Understood(
            prompts,
            alone,
            Asked(config, logprobs, lookup, cache_prompt=cached, assistant=assistant, form=form),
            Shown(full_text=return_full_text, special=not skip_special_tokens, details=details),
            1 if single else whole("batch_size", batch_size, 1) or self._rows_together,
        )

    def _checked(self, assistant: object) -> TextGenerationPipeline | None:
        """An assistant that can be used."""
        if assistant is None:
            return None
        if not isinstance(assistant, TextGenerationPipeline) or assistant is self:
            raise InputError(
                "assistant_model takes another text-generation pipeline, not"
                f" {'this one' if assistant is self else repr(assistant)}.",
                value=assistant,
            )
        if not self.tokenizer.has_tokens_of(assistant.tokenizer):
            raise InputError(
                f"{assistant.model!r} has other tokens than {self.model!r}, so its guesses mean"
                " nothing here: take a smaller model of the same family.",
                value=assistant,
            )
        return assistant

    def _prompt(self, one: str | Chat, special: bool, of_chats: Mapping[str, Any]) -> _Prompt:
        if isinstance(one, str):
            return _Prompt(one, one, special)
        messages = [dict(message) for message in one]
        options = dict(of_chats)
        more = options.pop("template_options", None) or {}
        continues = bool(options.get("continue_final_message"))
        template = options.pop("chat_template", None)
        tools = tuple(schemas(options.pop("tools", None)) or ())
        text = self._about.chat.render(
            messages, template=template, tools=tools or None, **options, **more
        )
        formats = formats_of(self._about.chat.text(template, tools=bool(tools)))
        return _Prompt(messages, text, False, continues, formats, tools)

    def _ids(self, prompt: _Prompt) -> list[int]:
        return self.tokenizer.prompt(prompt.text, add_special_tokens=prompt.special)

    def _generate(
        self,
        ids: Sequence[Sequence[int]],
        asked: Asked,
        token: CancelToken,
        tell: Callable[[Written], object],
    ) -> list[list[Generated]]:
        model, cached = self._decoder, asked.cache_prompt and asked.config.use_cache

        def begin(ids: Ids, mask: NDArray[np.int64]) -> Steps:
            kept = self._kept.take(ids[0], token) if cached and mask.all() else None
            return kept or model.begin(mask, cache=asked.config.use_cache, held=self._held())

        def ended(steps: Any, seen: NDArray[np.int64] | None) -> None:
            if cached and seen is not None:
                self._kept.keep(steps, seen)
            else:
                steps.close()

        with ExitStack() as stack:
            draft = None
            if asked.assistant is not None:
                draft = stack.enter_context(asked.assistant.guesses(token))
            structure = None
            if asked.form is not None:
                structure = Structure(asked.form, self._vocabulary(token))
            found = generate(
                begin,
                ids,
                asked,
                self.tokenizer,
                token,
                context=context_of(model.config),
                draft=draft,
                structure=structure,
                ended=ended,
                tell=tell,
            )
            if structure is not None:
                for one in chain.from_iterable(found):
                    one.parsed = (structure.parse(self.tokenizer.decode(one.ids)),)
            return found

    def _vocabulary(self, token: CancelToken) -> Vocabulary:
        """The tokens as forms need them, made with the first call that asks for one."""
        lease = self._words
        if lease is None:
            lease = Vocabulary.acquire(self.tokenizer, token)
            self._lifecycle.own(lease)
            self._words = lease
        value = lease.value
        if value is None:
            raise self._lifecycle.refusal()
        return value

    @property
    def _decoder(self) -> Decoder:
        return self._model  # type: ignore[return-value]

    @contextmanager
    def guesses(self, token: CancelToken) -> Iterator[DraftModel]:
        """This model as one that guesses for another, for one generation; on a native thread.

        Raises:
            PipelineDisposedError: It is disposed.
        """
        lifecycle = self._lifecycle
        try:
            lifecycle.enter(token)
            lifecycle.wake(token)
            steps = self._decoder.begin(np.ones((1, 0), np.int64), held=self._held())
            with closing(steps):
                yield DraftModel(steps, token)
        finally:
            lifecycle.leave(token)

    def _before(self, ids: Sequence[int]) -> Sequence[int]:
        return ids[-BEFORE:]

    def _result(
        self, prompt: _Prompt, before: Sequence[int], one: Generated, shown: Shown
    ) -> dict[str, Any]:
        skip, before = not shown.special, before[-BEFORE:]
        # A token that begins a text may lose its space, so it is read after those before it.
        text: Any = self.tokenizer.decode([*before, *one.ids], skip_special_tokens=skip)
        text = text[len(self.tokenizer.decode(before, skip_special_tokens=skip)) :]
        if shown.full_text:
            if isinstance(prompt.given, str):
                text = prompt.given + text
            elif prompt.continues:
                *first, last = prompt.given
                text = [*first, {**last, "content": last["content"] + text}]
            else:
                text = [*prompt.given, {"role": "assistant", **self._said(prompt, one, text)}]
        parsed = {"parsed": one.parsed[0]} if one.parsed else {}
        return {"generated_text": text} | parsed | shown.more(one)

    def _said(self, prompt: _Prompt, one: Generated, text: str) -> dict[str, Any]:
        """What the assistant said, its reasoning and calls apart from its content."""
        tokenizer, ids = self.tokenizer, one.ids
        if one.reason == "stop" and not tokenizer.decode(ids[-1:]):
            ids = ids[:-1]
        written = tokenizer.decode(ids, skip_special_tokens=False)
        reply = parse_reply(written, prompt.formats, prompt=prompt.text, tools=prompt.tools)
        if not reply.reasoning and not reply.tool_calls:
            return {"content": text}
        content = reply.content
        for special in tokenizer.special():
            content = content.replace(special, "")
        said: dict[str, Any] = {"content": content}
        if reply.reasoning:
            said["reasoning_content"] = reply.reasoning
        if reply.tool_calls:
            said["tool_calls"] = list(reply.tool_calls)
        return said


def _inputs(inputs: object) -> tuple[list[str | Chat], bool]:
    """The texts or chats, and whether there was one alone."""
    if isinstance(inputs, str):
        return [inputs], True
    if not isinstance(inputs, list | tuple) or not inputs:
        raise InputError(
            "Pass a text, a chat (a list of messages with role and content), or a list of texts or"
            f" of chats, not {inputs!r:.100}.",
            value=inputs,
        )
    if all(isinstance(one, Mapping) for one in inputs):
        return [inputs], True
    if all(isinstance(one, str) for one in inputs) or all(
        isinstance(one, list | tuple) for one in inputs
    ):
        return list(inputs), False
    raise InputError(
        "A list of inputs is of texts alone, or of chats alone: this has"
        f" {', '.join(sorted({type(one).__name__ for one in inputs}))}.",
        value=inputs,
    )
