"""LlamaIndex's interfaces over Ebbtide: embeddings, a language model that chats, and a reranker.

Each takes a pipeline, which you dispose, or a manager, which lends one for each call:

    with PipelineManager("2 GiB") as manager:
        Settings.embed_model = EbbtideEmbedding(source=manager, model=MODEL)
        Settings.llm = EbbtideLLM(source=manager, model=OTHER, context_window=2048)
"""

# The base classes are Any where the library is not installed.
# mypy: disallow-subclassing-any=False, disallow-untyped-decorators=False
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ebbtide.errors import MissingExtraError

try:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.base.llms.types import (
        ChatMessage,
        ChatResponse,
        ChatResponseAsyncGen,
        ChatResponseGen,
        CompletionResponse,
        CompletionResponseAsyncGen,
        CompletionResponseGen,
        LLMMetadata,
        MessageRole,
    )
    from llama_index.core.bridge.pydantic import Field
    from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
    from llama_index.core.llms.custom import CustomLLM
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

    from ebbtide.integrations.chains import Fields, generation, tool_calls
except ImportError as error:
    raise MissingExtraError(
        "Ebbtide's interfaces for LlamaIndex need llama-index-core, which is not installed:"
        " pip install llama-index-core",
        extra="llamaindex",
    ) from error


class EbbtideEmbedding(Fields, BaseEmbedding):
    """Vectors of texts.

    Attributes:
        source: A feature-extraction pipeline, or a manager.
        model: Which model; for a manager.
        options: Of the pipeline and of its lease; for a manager.
        call_options: Of each call, as ``{"pooling": "mean", "normalize": True}``. A model of
            sentence-transformers' says these by itself.
        query_prompt: Put before each query, as ``"query: "`` for E5.
        text_prompt: Put before each text that is to be found.

    Raises:
        InputError: The source is none.

    Example:
        >>> import ebbtide
        >>> with ebbtide.pipeline("feature-extraction", "tests/models/tiny-bert-st") as embed:
        ...     vector = EbbtideEmbedding(source=embed).get_text_embedding("the tide goes out")
        >>> len(vector)
        32
    """

    task = "feature-extraction"

    call_options: dict[str, Any] = Field(default_factory=dict)
    query_prompt: str = ""
    text_prompt: str = ""

    def __init__(self, **fields: Any) -> None:
        """Take the attributes, by name, and those of every embedding of LlamaIndex's."""
        super().__init__(**fields)
        if "model_name" not in fields:
            self.model_name = self._from.model

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex knows it."""
        return "EbbtideEmbedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._from.embed([self.query_prompt + query], self.call_options)[0]

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._from.embed([self.text_prompt + text for text in texts], self.call_options)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return (await self._from.aembed([self.query_prompt + query], self.call_options))[0]

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return (await self._aget_text_embeddings([text]))[0]

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        prompted = [self.text_prompt + text for text in texts]
        return await self._from.aembed(prompted, self.call_options)


class EbbtideLLM(Fields, CustomLLM):
    """A language model that completes texts and chats, whole or in pieces.

    Attributes:
        source: A text-generation pipeline, or a manager.
        model: Which model; for a manager.
        options: Of the pipeline and of its lease; for a manager.
        call_options: Of each call, as ``{"temperature": 0.7}``.
        context_window: How many tokens the model can read.
        max_new_tokens: How many it may write.
        is_chat: Whether it was taught to chat, so that LlamaIndex gives it messages.

    Raises:
        InputError: The source is none.

    Example:
        >>> import ebbtide
        >>> with ebbtide.pipeline("text-generation", "tests/models/gen-llama") as write:
        ...     text = EbbtideLLM(source=write, max_new_tokens=3).complete("The tide").text
        >>> bool(text)
        True
    """

    task = "text-generation"

    call_options: dict[str, Any] = Field(default_factory=dict)
    context_window: int = 2048
    max_new_tokens: int = 256
    is_chat: bool = True

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex knows it."""
        return "EbbtideLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex has to know of the model."""
        return LLMMetadata(
            context_window=self.context_window,
            num_output=self.max_new_tokens,
            is_chat_model=self.is_chat,
            model_name=self._from.model,
        )

    def _asked(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        return generation({"max_new_tokens": self.max_new_tokens, **self.call_options}, None, asked)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """What comes after a text."""
        with self._from.lend() as pipe:
            (found,) = pipe(prompt, return_full_text=False, details=True, **self._asked(kwargs))
        return _completed(found)

    @llm_completion_callback()
    async def acomplete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponse:
        """The same as `complete`, without blocking the event loop."""
        asked = self._asked(kwargs)
        async with self._from.lend() as pipe:
            (found,) = await pipe.acall(prompt, return_full_text=False, details=True, **asked)
        return _completed(found)

    @llm_completion_callback()
    def stream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseGen:
        """What comes after a text, as it is written."""
        asked = self._asked(kwargs)

        def pieces() -> CompletionResponseGen:
            text = ""
            with self._from.lend() as pipe:
                for piece in pipe.stream(prompt, **asked):
                    text += piece.text
                    yield CompletionResponse(text=text, delta=piece.text, raw=_about(piece))

        return pieces()

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        """The same as `stream_complete`, on an event loop."""
        asked = self._asked(kwargs)

        async def pieces() -> CompletionResponseAsyncGen:
            text = ""
            async with self._from.lend() as pipe:
                async for piece in pipe.astream(prompt, **asked):
                    text += piece.text
                    yield CompletionResponse(text=text, delta=piece.text, raw=_about(piece))

        return pieces()

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """The assistant's next message, written as the model's own template says."""
        with self._from.lend() as pipe:
            (found,) = pipe(_chat(messages), details=True, **self._asked(kwargs))
        return _answered(found)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """The same as `chat`, without blocking the event loop."""
        async with self._from.lend() as pipe:
            (found,) = await pipe.acall(_chat(messages), details=True, **self._asked(kwargs))
        return _answered(found)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """The assistant's next message, as it is written."""
        asked = self._asked(kwargs)

        def pieces() -> ChatResponseGen:
            text = ""
            with self._from.lend() as pipe:
                for piece in pipe.stream(_chat(messages), **asked):
                    text += piece.text
                    yield _said(text, piece)

        return pieces()

    @llm_chat_callback()
    async def astream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Any
    ) -> ChatResponseAsyncGen:
        """The same as `stream_chat`, on an event loop."""
        asked = self._asked(kwargs)

        async def pieces() -> ChatResponseAsyncGen:
            text = ""
            async with self._from.lend() as pipe:
                async for piece in pipe.astream(_chat(messages), **asked):
                    text += piece.text
                    yield _said(text, piece)

        return pieces()


class EbbtideRerank(Fields, BaseNodePostprocessor):
    """Nodes ordered by how well they answer a query, by a cross-encoder.

    Attributes:
        source: A text-classification pipeline over a cross-encoder, or a manager.
        model: Which model; for a manager.
        options: Of the pipeline and of its lease; for a manager.
        top_n: How many are kept; None for all.

    Raises:
        InputError: The source is none.
    """

    task = "text-classification"

    top_n: int | None = 3

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex knows it."""
        return "EbbtideRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None or not nodes:
            return nodes
        ranked = self._from.rank(query_bundle.query_str, _texts(nodes), self.top_n)
        return _ordered(nodes, ranked)

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None or not nodes:
            return nodes
        ranked = await self._from.arank(query_bundle.query_str, _texts(nodes), self.top_n)
        return _ordered(nodes, ranked)


def _texts(nodes: Sequence[NodeWithScore]) -> list[str]:
    return [one.node.get_content(metadata_mode=MetadataMode.EMBED) for one in nodes]


def _ordered(
    nodes: Sequence[NodeWithScore], ranked: list[tuple[int, float]]
) -> list[NodeWithScore]:
    return [NodeWithScore(node=nodes[place].node, score=score) for place, score in ranked]


def _about(piece: Any) -> dict[str, Any]:
    return {"finish_reason": piece.finish_reason} if piece.finish_reason else {}


def _completed(found: Mapping[str, Any]) -> CompletionResponse:
    return CompletionResponse(
        text=found["generated_text"], raw={"finish_reason": found["finish_reason"]}
    )


def _chat(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    return [{"role": str(one.role.value), "content": one.content or ""} for one in messages]


def _answered(found: Mapping[str, Any]) -> ChatResponse:
    said = found["generated_text"][-1]
    more: dict[str, Any] = {}
    if said.get("reasoning_content"):
        more["reasoning_content"] = said["reasoning_content"]
    if calls := tool_calls(said):
        more["tool_calls"] = [
            {"id": identifier, "name": name, "arguments": arguments}
            for identifier, name, arguments in calls
        ]
    message = ChatMessage(
        role=MessageRole.ASSISTANT, content=said["content"], additional_kwargs=more
    )
    return ChatResponse(message=message, raw={"finish_reason": found["finish_reason"]})


def _said(text: str, piece: Any) -> ChatResponse:
    message = ChatMessage(role=MessageRole.ASSISTANT, content=text)
    return ChatResponse(message=message, delta=piece.text, raw=_about(piece))
