"""text2text-generation: a text, read by an encoder, and what a decoder writes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ebbtide.cancellation import CancelToken
from ebbtide.errors import UnsupportedModelError
from ebbtide.generation.loop import Written
from ebbtide.generation.steps import Ids, Steps
from ebbtide.hub import ModelFiles
from ebbtide.lifecycle import Lifecycle
from ebbtide.models.decoder import context_of
from ebbtide.models.loading import Loaded, LoadOptions
from ebbtide.models.seq2seq import STEMS, Seq2Seq
from ebbtide.pipelines import inputs as given
from ebbtide.pipelines.generating import (
    AsyncStream,
    GeneratingPipeline,
    Shown,
    Stream,
    Streamer,
    Understood,
    whole,
)
from ebbtide.pipelines.writing import Asked, Generated, config_of, generate
from ebbtide.runtime import Waiting

_FILES: Final = ("generation_config.json",)


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """One input, ready to be read.

    Attributes:
        text: Its text, with what the model wants before it.
        language: The id of its language's token, where one was named.
    """

    text: str
    language: int | None = None


class Own(NamedTuple):
    """What one task has of its own.

    Attributes:
        defaults: Its options where the caller says nothing.
        prefix: What the model wants before each text.
        language: The id of the token of the texts' language, where one was named.
    """

    defaults: Mapping[str, Any]
    prefix: str = ""
    language: int | None = None


class Text2TextGenerationPipeline(GeneratingPipeline[Source]):
    """A text, and what an encoder-decoder model makes of it.

    Example:
        >>> import ebbtide
        >>> with ebbtide.pipeline("text2text-generation", "tests/models/gen-t5") as write:
        ...     found = write("The tide goes out", max_new_tokens=4)
        >>> len(found), list(found[0])
        (1, ['generated_text'])
    """

    task: ClassVar[str] = "text2text-generation"
    stems: ClassVar[tuple[str, ...]] = STEMS
    extra_files: ClassVar[tuple[str, ...]] = _FILES
    key: ClassVar[str] = "generated_text"
    """What a result's text is called."""

    def __init__(self, lifecycle: Lifecycle, model: Any, defaults: Mapping[str, Any]) -> None:
        super().__init__(lifecycle, model)
        self._defaults = defaults

    @classmethod
    def load(
        cls,
        files: ModelFiles,
        options: LoadOptions,
        lifecycle: Lifecycle,
        token: CancelToken,
        told: Callable[[Waiting], object],
    ) -> Seq2Seq:
        """Load the model."""
        return Seq2Seq(Loaded.of(files, options, _FILES, lifecycle, token, told, STEMS))

    @classmethod
    def read(cls, files: ModelFiles, model: Any) -> Mapping[str, Any]:
        """What the model says of how it writes: for any task, and of this one."""
        raw = model.config.raw
        names = ("decoder_start_token_id", "eos_token_id", "pad_token_id", "forced_eos_token_id")
        own = {name: raw[name] for name in names if name in raw}
        return {**own, **(files.json("generation_config.json") or {})}

    def __call__(
        self,
        inputs: str | Sequence[str],
        *,
        skip_special_tokens: bool = True,
        details: bool = False,
        logprobs: bool = False,
        batch_size: int | None = None,
        streamer: Streamer | None = None,
        **options: Any,
    ) -> list[Any]:
        """Write what the model makes of texts.

        Args:
            inputs: One text, or a list of texts. What is longer than the model reads is cut.
            skip_special_tokens: Leave special tokens out of the text.
            details: Give ``token_ids`` and ``finish_reason`` too, and what else was asked for:
                ``logprobs``, ``score`` of a beam, ``scores``, ``logits``.
            logprobs: Whether each token's log-probability is wanted; with ``details``.
            batch_size: How many texts of a list are written on together. None: up to 8; of a
                dynamically quantised model one.
            streamer: Told of each `Piece` as it is written, on the caller's thread; for one input.
            **options: All of `ebbtide.generation.GenerationConfig`; of translation ``src_lang`` and
                ``tgt_lang``, as in ``fra_Latn``, ``fr_XX`` or ``fr``.

        Returns:
            One map a text, as in ``{"generated_text": ...}`` (``summary_text``,
            ``translation_text``); lists of them where several sequences were asked for.

        Raises:
            InputError: An input cannot be used, or options contradict one another.
            OptionError: There is no such option.
            PipelineDisposedError: The pipeline is disposed.
            PipelineCancelledError: It was cancelled while it ran.
        """
        call = self._understood(inputs, skip_special_tokens, details, logprobs, batch_size, options)
        return self._flat(self._call(call, streamer), call)

    async def acall(
        self,
        inputs: str | Sequence[str],
        *,
        skip_special_tokens: bool = True,
        details: bool = False,
        logprobs: bool = False,
        batch_size: int | None = None,
        streamer: Streamer | None = None,
        **options: Any,
    ) -> list[Any]:
        """The same on an event loop, whose thread tells the streamer."""
        call = self._understood(inputs, skip_special_tokens, details, logprobs, batch_size, options)
        return self._flat(await self._acall(call, streamer), call)

    def stream(
        self,
        inputs: str,
        *,
        skip_special_tokens: bool = True,
        logprobs: bool = False,
        **options: Any,
    ) -> Stream:
        """Give each piece as it is written; who stops reading stops it.

        Args:
            inputs: One text.
            skip_special_tokens: Leave special tokens out of the text.
            logprobs: Whether each token's log-probability is wanted.
            **options: As for `__call__`, without several sequences; of a beam search the pieces
                come at its end.
        """
        return self._stream_of(
            self._understood(inputs, skip_special_tokens, False, logprobs, None, options)
        )

    def astream(
        self,
        inputs: str,
        *,
        skip_special_tokens: bool = True,
        logprobs: bool = False,
        **options: Any,
    ) -> AsyncStream:
        """The same on an event loop."""
        call = self._understood(inputs, skip_special_tokens, False, logprobs, None, options)
        return self._astream_of(call)

    def _understood(
        self,
        inputs: object,
        skip_special_tokens: bool,
        details: bool,
        logprobs: bool,
        batch_size: int | None,
        options: dict[str, Any],
    ) -> Understood[Source]:
        own = self._own(options)
        texts, alone = given.texts(inputs)
        config = config_of(own.defaults, self.tokenizer.pad_id, options)
        return Understood(
            [Source(own.prefix + text, own.language) for text in texts],
            alone,
            Asked(config, logprobs, 0),
            Shown(special=not skip_special_tokens, details=details),
            whole("batch_size", batch_size, 1) or self._rows_together,
        )

    def _own(self, options: dict[str, Any]) -> Own:
        """What the task has of its own; takes the options of this task alone out."""
        return Own(self._defaults)

    def _ids(self, prompt: Source) -> list[int]:
        ids: list[int] = self.tokenizer.ids(prompt.text)
        if prompt.language is not None:
            ids = self._seq2seq.speak(ids, prompt.language)
        return ids

    @property
    def _seq2seq(self) -> Seq2Seq:
        return self._model  # type: ignore[return-value]

    def _generate(
        self,
        ids: Sequence[Sequence[int]],
        asked: Asked,
        token: CancelToken,
        tell: Callable[[Written], object],
    ) -> list[list[Generated]]:
        model, config = self._seq2seq, asked.config
        start = config.decoder_start_token_id
        start = config.bos_token_id if start is None else start
        if start is None:
            raise UnsupportedModelError(
                f"Model {self.model!r} does not say which token its decoder begins with: pass"
                " decoder_start_token_id.",
                model=self.model,
            )
        batch = self.tokenizer.pad_ids(ids)
        encoded = model.encode(batch, token)

        def begin(ids: Ids, mask: NDArray[np.int64]) -> Steps:
            return model.begin(mask, encoded, cache=config.use_cache, held=self._held())

        return generate(
            begin,
            [[start]] * len(ids),
            asked,
            self.tokenizer,
            token,
            context=context_of(model.config),
            read=batch.input_ids,
            tell=tell,
        )

    def _result(
        self, prompt: Source, before: Sequence[int], one: Generated, shown: Shown
    ) -> dict[str, Any]:
        text = self.tokenizer.decode(one.ids, skip_special_tokens=not shown.special)
        return {self.key: text} | shown.more(one)

    def _flat(self, results: list[Any], call: Understood[Source]) -> list[Any]:
        """One map a text, where one sequence each was asked for."""
        if call.alone or call.asked.config.num_return_sequences > 1:
            return results
        return [one for (one,) in results]
