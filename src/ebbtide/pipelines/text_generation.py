"""text-generation: a text or a chat, written on."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from typing import Any, ClassVar, Final

from ebbtide.cancellation import CancelToken
from ebbtide.errors import InputError
from ebbtide.generation.loop import Written
from ebbtide.hub import ModelFiles
from ebbtide.lifecycle import Lifecycle
from ebbtide.models.chat import CHAT_FILES, ChatTemplate
from ebbtide.models.decoder import Decoder, context_of
from ebbtide.models.loading import Loaded, LoadOptions
from ebbtide.pipelines.base import Pipeline
from ebbtide.pipelines.generating import (
    BATCH_ROWS,
    Asked,
    Generated,
    Piece,
    config_of,
    generate,
    stream_of,
)
from ebbtide.runtime import Waiting

Message = Mapping[str, Any]
Chat = Sequence[Message]
Streamer = Callable[[Piece], object]

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


@dataclasses.dataclass(frozen=True, slots=True)
class _Shown:
    """How results are given."""

    full_text: bool
    special: bool
    details: bool


class TextGenerationPipeline(Pipeline):
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
        prompts, alone, asked, shown, size = self._understood(
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
        if streamer is None:
            found = self._submit(lambda token: self._write(prompts, asked, shown, size, token))
            results = found.wait()
        else:
            _check_streamed(len(prompts), asked)
            results = []
            with closing(self._steps(self._told_of(prompts[0], asked, shown, results))) as pieces:
                for piece in pieces:
                    streamer(piece)
        return results[0] if alone else results

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
        prompts, alone, asked, shown, size = self._understood(
            inputs, lookup=lookup, options=options, **named
        )
        job = self._submit(lambda token: self._write(prompts, asked, shown, size, token))
        results = await job.result()
        return results[0] if alone else results

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
        work = self._streamed(
            inputs, logprobs, add_special_tokens, skip_special_tokens, prompt_lookup_num_tokens,
            options,
        )  # fmt: skip
        return self._steps(work)

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
        work = self._streamed(
            inputs, logprobs, add_special_tokens, skip_special_tokens, prompt_lookup_num_tokens,
            options,
        )  # fmt: skip
        async with aclosing(self._asteps(work)) as pieces:
            async for piece in pieces:
                yield piece

    def _streamed(
        self,
        inputs: object,
        logprobs: bool,
        add_special_tokens: bool,
        skip_special_tokens: bool,
        lookup: int | None,
        options: dict[str, Any],
    ) -> Callable[[CancelToken, Callable[[Piece], object]], object]:
        prompts, alone, asked, shown, _ = self._understood(
            inputs,
            return_full_text=False,
            add_special_tokens=add_special_tokens,
            skip_special_tokens=skip_special_tokens,
            details=False,
            logprobs=logprobs,
            lookup=lookup,
            batch_size=None,
            options=options,
        )
        _check_streamed(len(prompts) if alone else 0, asked)
        return self._told_of(prompts[0], asked, shown, [])

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
    ) -> tuple[list[_Prompt], bool, Asked, _Shown, int]:
        """The prompts, whether one alone; what is asked, how it is given, and rows a batch."""
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
        for name, number, least in (
            ("batch_size", batch_size, 1),
            ("prompt_lookup_num_tokens", lookup, 0),
        ):
            if number is not None and (type(number) is not int or number < least):
                raise InputError(
                    f"{name} takes a whole number from {least}, not {number!r}.", value=number
                )
        config = config_of(self._about.defaults, self.tokenizer.pad_id, options)
        size = batch_size or (1 if self._model.shares_scales else BATCH_ROWS)
        shown = _Shown(return_full_text, not skip_special_tokens, details)
        return prompts, alone, Asked(config, logprobs, lookup), shown, size

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

    def _write(
        self,
        prompts: Sequence[_Prompt],
        asked: Asked,
        shown: _Shown,
        size: int,
        token: CancelToken,
    ) -> list[list[Any]]:
        """The results of all prompts; on a native thread."""
        ids = [self.tokenizer.prompt(one.text, add_special_tokens=one.special) for one in prompts]
        order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
        results: list[list[Any]] = [[]] * len(ids)
        for first in range(0, len(order), size):
            some = order[first : first + size]
            rows = self._generate([ids[number] for number in some], asked, token)
            for number, found in zip(some, rows, strict=True):
                results[number] = [self._result(prompts[number], one, shown) for one in found]
        return results

    def _generate(
        self,
        ids: Sequence[Sequence[int]],
        asked: Asked,
        token: CancelToken,
        tell: Callable[[Written], object] = lambda written: None,
    ) -> list[list[Generated]]:
        caches = self._lifecycle.caches
        model: Any = self._model

        def begin(mask: Any) -> Any:
            key = object()

            def held(size: int) -> None:
                if size:
                    caches[key] = size
                else:
                    caches.pop(key, None)

            return model.begin(mask, cache=asked.config.use_cache, held=held)

        return generate(
            begin,
            ids,
            asked,
            self.tokenizer,
            token,
            context=context_of(model.config),
            tell=tell,
        )

    def _told_of(
        self, prompt: _Prompt, asked: Asked, shown: _Shown, results: list[Any]
    ) -> Callable[[CancelToken, Callable[[Piece], object]], object]:
        def work(token: CancelToken, tell: Callable[[Piece], object]) -> None:
            text = stream_of(self.tokenizer, special=shown.special)
            ids = self.tokenizer.prompt(prompt.text, add_special_tokens=prompt.special)

            def told(written: Written) -> None:
                number = int(written.ids[0])
                piece = text.put(number)
                reason = written.reasons[0] or None
                if reason:
                    piece += text.end()
                chance = None if written.logprobs is None else float(written.logprobs[0])
                tell(Piece(piece, number, chance, reason))

            (found,) = self._generate([ids], asked, token, told)
            results.append([self._result(prompt, one, shown) for one in found])

        return work

    def _result(self, prompt: _Prompt, one: Generated, shown: _Shown) -> dict[str, Any]:
        text: Any = self.tokenizer.decode(one.ids, skip_special_tokens=not shown.special)
        if shown.full_text:
            if isinstance(prompt.given, str):
                text = prompt.given + text
            elif prompt.continues:
                *before, last = prompt.given
                text = [*before, {**last, "content": last["content"] + text}]
            else:
                text = [*prompt.given, {"role": "assistant", "content": text}]
        result = {"generated_text": text}
        if shown.details:
            result |= {"token_ids": one.ids, "finish_reason": one.reason}
            more = {name: getattr(one, name) for name in ("logprobs", "score", "scores", "logits")}
            result |= {name: value for name, value in more.items() if value is not None}
        return result


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


def _check_streamed(inputs: int, asked: Asked) -> None:
    if inputs != 1:
        raise InputError("A stream is of one text or one chat: pass several one after another.")
    if asked.config.num_beams > 1 or asked.config.num_return_sequences > 1:
        raise InputError(
            "A stream is of one sequence that is known as it is written: pass no num_beams and no"
            " num_return_sequences, or call the pipeline."
        )
