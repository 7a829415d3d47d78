"""text-generation: a text or a chat, written on."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from ebbtide.cancellation import CancelToken
from ebbtide.errors import InputError
from ebbtide.generation.loop import Written
from ebbtide.generation.steps import Steps
from ebbtide.hub import ModelFiles
from ebbtide.lifecycle import Lifecycle
from ebbtide.models.chat import CHAT_FILES, ChatTemplate
from ebbtide.models.decoder import Decoder, context_of
from ebbtide.models.loading import Loaded, LoadOptions
from ebbtide.pipelines.generating import (
    Asked,
    Generated,
    GeneratingPipeline,
    Piece,
    Shown,
    Streamer,
    Understood,
    config_of,
    generate,
    whole,
)
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
    """One input, ready: what it was, its text, and how that is tokenised."""

    given: str | list[dict[str, Any]]
    text: str
    special: bool
    continues: bool = False


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
                ``continue_final_message``, ``add_generation_prompt``, ``template_options``. Of the
                generation: all of `ebbtide.generation.GenerationConfig`. ``max_new_tokens`` is 256
                where the model says nothing.

        Returns:
            For one input a list of ``{"generated_text": ...}``, as many as
            ``num_return_sequences``; for a list of inputs a list of such lists. Of a chat the text
            is its messages with one by the assistant, or without ``return_full_text`` that
            message's text.

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

    async def acall(self, inputs: Any, **options: Any) -> list[Any]:
        """The same on an event loop; see `__call__`."""
        known: dict[str, Any] = {
            "return_full_text": True,
            "add_special_tokens": True,
            "skip_special_tokens": True,
        }
        known |= {"details": False, "logprobs": False, "batch_size": None}
        named = {name: options.pop(name, value) for name, value in known.items()}
        lookup = options.pop("prompt_lookup_num_tokens", None)
        understood = self._understood(inputs, lookup=lookup, options=options, **named)
        return await self._acall(understood)

    def stream(
        self,
        inputs: str | Chat,
        *,
        logprobs: bool = False,
        add_special_tokens: bool = True,
        skip_special_tokens: bool = True,
        prompt_lookup_num_tokens: int | None = None,
        **options: Any,
    ) -> Iterator[Piece]:
        """Write on, and give each piece as it is written; who stops reading stops it.

        Args:
            inputs: A text or a chat.
            logprobs: Whether each token's log-probability is wanted.
            add_special_tokens: Begin a text as the model was taught.
            skip_special_tokens: Leave special tokens out of the text.
            prompt_lookup_num_tokens: As for `__call__`.
            **options: As for `__call__`, without beams and several sequences.

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
                return_full_text=False,
                add_special_tokens=add_special_tokens,
                skip_special_tokens=skip_special_tokens,
                details=False,
                logprobs=logprobs,
                lookup=prompt_lookup_num_tokens,
                batch_size=None,
                options=options,
            )
        )

    async def astream(
        self,
        inputs: str | Chat,
        *,
        logprobs: bool = False,
        add_special_tokens: bool = True,
        skip_special_tokens: bool = True,
        prompt_lookup_num_tokens: int | None = None,
        **options: Any,
    ) -> AsyncIterator[Piece]:
        """The same as `stream` on an event loop."""
        understood = self._understood(
            inputs,
            return_full_text=False,
            add_special_tokens=add_special_tokens,
            skip_special_tokens=skip_special_tokens,
            details=False,
            logprobs=logprobs,
            lookup=prompt_lookup_num_tokens,
            batch_size=None,
            options=options,
        )
        async with aclosing(self._astream_of(understood)) as pieces:
            async for piece in pieces:
                yield piece

    def _understood(
        self,
        inputs: object,
        *,
        return_full_text: bool,
        add_special_tokens: bool,
        skip_special_tokens: bool,
        details: bool,
        logprobs: bool,
        lookup: int | None,
        batch_size: int | None,
        options: dict[str, Any],
    ) -> Understood[_Prompt]:
        of_chats: dict[str, Any] = {
            name: options.pop(name) for name in _OF_CHATS if name in options
        }
        given, alone = _inputs(inputs)
        prompts = [self._prompt(one, add_special_tokens, of_chats) for one in given]
        if of_chats and any(isinstance(one.given, str) for one in prompts):
            raise InputError(
                f"{', '.join(of_chats)} are for chats, and a text was passed: pass a list of"
                " messages with role and content, or leave them out."
            )
        config = config_of(self._about.defaults, self.tokenizer.pad_id, options)
        return Understood(
            prompts,
            alone,
            Asked(config, logprobs, whole("prompt_lookup_num_tokens", lookup, 0)),
            Shown(full_text=return_full_text, special=not skip_special_tokens, details=details),
            whole("batch_size", batch_size, 1) or self._rows_together,
        )

    def _prompt(self, one: str | Chat, special: bool, of_chats: Mapping[str, Any]) -> _Prompt:
        if isinstance(one, str):
            return _Prompt(one, one, special)
        messages = [dict(message) for message in one]
        options = dict(of_chats)
        more = options.pop("template_options", None) or {}
        continues = bool(options.get("continue_final_message"))
        text = self._about.chat.render(
            messages, template=options.pop("chat_template", None), **options, **more
        )
        return _Prompt(messages, text, False, continues)

    def _ids(self, prompt: _Prompt) -> list[int]:
        return self.tokenizer.prompt(prompt.text, add_special_tokens=prompt.special)

    def _generate(
        self,
        ids: Sequence[Sequence[int]],
        asked: Asked,
        token: CancelToken,
        tell: Callable[[Written], object],
    ) -> list[list[Generated]]:
        model: Decoder = self._model  # type: ignore[assignment]

        def begin(mask: NDArray[np.int64]) -> Steps:
            return model.begin(mask, cache=asked.config.use_cache, held=self._held())

        context = context_of(model.config)
        return generate(begin, ids, asked, self.tokenizer, token, context=context, tell=tell)

    def _result(self, prompt: _Prompt, one: Generated, shown: Shown) -> dict[str, Any]:
        text: Any = self.tokenizer.decode(one.ids, skip_special_tokens=not shown.special)
        if shown.full_text:
            if isinstance(prompt.given, str):
                text = prompt.given + text
            elif prompt.continues:
                *before, last = prompt.given
                text = [*before, {**last, "content": last["content"] + text}]
            else:
                text = [*prompt.given, {"role": "assistant", "content": text}]
        return {"generated_text": text} | shown.more(one)


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
