"""LangChain's interfaces over Ebbtide: embeddings, a chat model, a cross-encoder and a reranker.

Each takes a pipeline, which you dispose, or a manager, which lends one for each call:

    with PipelineManager("2 GiB") as manager:
        store = InMemoryVectorStore(EbbtideEmbeddings(source=manager, model=MODEL))
        chat = EbbtideChat(source=manager, model=OTHER, call_options={"max_new_tokens": 200})
"""

# The base classes are Any where the library is not installed.
# mypy: disallow-subclassing-any=False, disallow-untyped-decorators=False
from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

from ebbtide.errors import MissingExtraError

try:
    from langchain_core.cross_encoders import BaseCrossEncoder
    from langchain_core.documents import BaseDocumentCompressor, Document
    from langchain_core.embeddings import Embeddings
    from langchain_core.language_models import BaseChatModel
    from langchain_core.messages import AIMessage, AIMessageChunk, convert_to_openai_messages
    from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
    from langchain_core.utils.function_calling import convert_to_openai_tool
    from pydantic import Field

    from ebbtide.integrations.chains import Cut, Fields, Source, generation, tool_calls
except ImportError as error:
    raise MissingExtraError(
        "Ebbtide's interfaces for LangChain need langchain-core, which is not installed:"
        " pip install langchain-core",
        extra="langchain",
    ) from error


class EbbtideEmbeddings(Embeddings):
    """Vectors of texts.

    Args:
        source: A feature-extraction pipeline, or a manager.
        model: Which model; for a manager.
        options: Of the pipeline and of its lease; for a manager.
        call_options: Of each call, as ``{"pooling": "mean", "normalize": True}``. A model of
            sentence-transformers' says these by itself.
        query_prompt: Put before each query, as ``"query: "`` for E5.
        document_prompt: Put before each document.

    Raises:
        InputError: The source is none.

    Example:
        >>> import ebbtide
        >>> with ebbtide.pipeline("feature-extraction", "tests/models/tiny-bert-st") as embed:
        ...     vectors = EbbtideEmbeddings(source=embed).embed_documents(["the tide goes out"])
        >>> len(vectors[0])
        32
    """

    def __init__(
        self,
        source: Any,
        model: str | None = None,
        *,
        options: Mapping[str, Any] | None = None,
        call_options: Mapping[str, Any] | None = None,
        query_prompt: str = "",
        document_prompt: str = "",
    ) -> None:
        self._source = Source(
            "EbbtideEmbeddings", "feature-extraction", source, model, options or {}
        )
        self._call = dict(call_options or {})
        self._query_prompt = query_prompt
        self._document_prompt = document_prompt

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """One vector a document."""
        return self._source.embed([self._document_prompt + text for text in texts], self._call)

    def embed_query(self, text: str) -> list[float]:
        """The vector of a query."""
        return self._source.embed([self._query_prompt + text], self._call)[0]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """The same as `embed_documents`, without blocking the event loop."""
        prompted = [self._document_prompt + text for text in texts]
        return await self._source.aembed(prompted, self._call)

    async def aembed_query(self, text: str) -> list[float]:
        """The same as `embed_query`, without blocking the event loop."""
        return (await self._source.aembed([self._query_prompt + text], self._call))[0]


class EbbtideChat(Fields, BaseChatModel):
    """A chat model; it streams, and asks for tools where its model's format for them is known.

    Attributes:
        source: A text-generation pipeline, or a manager.
        model: Which model; for a manager.
        options: Of the pipeline and of its lease; for a manager.
        call_options: Of each call, as ``{"max_new_tokens": 200, "temperature": 0.7}``. What
            ``bind`` and ``invoke`` add goes before.

    Raises:
        InputError: The source is none.

    Example:
        >>> import ebbtide
        >>> with ebbtide.pipeline("text-generation", "tests/models/gen-llama") as write:
        ...     chat = EbbtideChat(source=write, call_options={"max_new_tokens": 3})
        ...     answer = chat.invoke("When does the tide turn?")
        >>> answer.response_metadata["finish_reason"]
        'length'
    """

    task = "text-generation"

    call_options: dict[str, Any] = Field(default_factory=dict)

    @property
    def _llm_type(self) -> str:
        return "ebbtide"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model": self._from.model, **self.options, **self.call_options}

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | Any],
        *,
        tool_choice: Any = None,
        **kwargs: Any,
    ) -> Any:
        """This model with tools that it may ask for.

        Args:
            tools: Functions, pydantic models, tools of LangChain's, or their schemas.
            tool_choice: Taken and not heeded: a model may always answer in words.
            **kwargs: Further options of each call.
        """
        return self.bind(tools=[convert_to_openai_tool(tool) for tool in tools], **kwargs)

    def _generate(
        self,
        messages: list[Any],
        stop: list[str] | None = None,
        run_manager: Any = None,
        **kwargs: Any,
    ) -> ChatResult:
        with self._from.lend() as pipe:
            (found,) = pipe(
                _chat(messages), details=True, **generation(self.call_options, stop, kwargs)
            )
        return _result(found, stop)

    async def _agenerate(
        self,
        messages: list[Any],
        stop: list[str] | None = None,
        run_manager: Any = None,
        **kwargs: Any,
    ) -> ChatResult:
        async with self._from.lend() as pipe:
            (found,) = await pipe.acall(
                _chat(messages), details=True, **generation(self.call_options, stop, kwargs)
            )
        return _result(found, stop)

    def _stream(
        self,
        messages: list[Any],
        stop: list[str] | None = None,
        run_manager: Any = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        asked, cut = generation(self.call_options, stop, kwargs), Cut(stop)
        with self._from.lend() as pipe:
            for piece in pipe.stream(_chat(messages), **asked):
                chunk = _chunk(piece, cut)
                if run_manager is not None:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    async def _astream(
        self,
        messages: list[Any],
        stop: list[str] | None = None,
        run_manager: Any = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        asked, cut = generation(self.call_options, stop, kwargs), Cut(stop)
        async with self._from.lend() as pipe:
            async for piece in pipe.astream(_chat(messages), **asked):
                chunk = _chunk(piece, cut)
                if run_manager is not None:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _should_stream(self, *args: Any, **kwargs: Any) -> bool:
        """Tool calls are known when a text has ended: with tools it is not streamed."""
        return not kwargs.get("tools") and bool(super()._should_stream(*args, **kwargs))


class EbbtideCrossEncoder(BaseCrossEncoder):
    """Scores of pairs of texts, for ``CrossEncoderReranker``.

    Args:
        source: A text-classification pipeline over a cross-encoder, or a manager.
        model: Which model; for a manager.
        options: Of the pipeline and of its lease; for a manager.

    Example:
        >>> import ebbtide
        >>> with ebbtide.pipeline("text-classification", "tests/models/bert/rank") as pipe:
        ...     scores = EbbtideCrossEncoder(source=pipe).score([("tide", "The tide goes out.")])
        >>> len(scores)
        1
    """

    def __init__(
        self, source: Any, model: str | None = None, *, options: Mapping[str, Any] | None = None
    ) -> None:
        self._source = Source(
            "EbbtideCrossEncoder", "text-classification", source, model, options or {}
        )

    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """How well the second text of each pair answers the first."""
        if not text_pairs:
            return []
        with self._source.lend() as pipe:
            return [float(one["score"]) for one in pipe([tuple(pair) for pair in text_pairs])]


class EbbtideReranker(Fields, BaseDocumentCompressor):
    """Documents ordered by how well they answer a query, by a cross-encoder.

    Each that is kept has its ``relevance_score`` in its metadata.

    Attributes:
        source: A text-classification pipeline over a cross-encoder, or a manager.
        model: Which model; for a manager.
        options: Of the pipeline and of its lease; for a manager.
        top_n: How many are kept; None for all.

    Example:
        >>> import ebbtide
        >>> with ebbtide.pipeline("text-classification", "tests/models/bert/rank") as pipe:
        ...     rerank = EbbtideReranker(source=pipe, top_n=1)
        ...     best = rerank.compress_documents([Document(page_content="low water")], "tide")
        >>> len(best)
        1
    """

    task = "text-classification"

    top_n: int | None = 3

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Any = None
    ) -> Sequence[Document]:
        """The best documents, the best first."""
        texts = [one.page_content for one in documents]
        return _ordered(documents, self._from.rank(query, texts, self.top_n))

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Any = None
    ) -> Sequence[Document]:
        """The same as `compress_documents`, without blocking the event loop."""
        texts = [one.page_content for one in documents]
        return _ordered(documents, await self._from.arank(query, texts, self.top_n))


def _ordered(documents: Sequence[Document], ranked: list[tuple[int, float]]) -> list[Document]:
    return [
        documents[place].model_copy(
            update={"metadata": {**documents[place].metadata, "relevance_score": score}}
        )
        for place, score in ranked
    ]


def _chat(messages: list[Any]) -> list[dict[str, Any]]:
    """LangChain's messages as chat templates know them; blocks of text are joined."""
    found: Any = convert_to_openai_messages(messages, text_format="string")
    return list(found)


def _result(found: Mapping[str, Any], stop: Sequence[str] | None) -> ChatResult:
    said = found["generated_text"][-1]
    cut = Cut(stop)
    about = {"finish_reason": found["finish_reason"]}
    more = {key: said[key] for key in ("reasoning_content",) if said.get(key)}
    message = AIMessage(
        content=cut.next(said["content"]) + cut.rest(),
        additional_kwargs=more,
        response_metadata=about,
        tool_calls=[
            {"id": identifier, "name": name, "args": arguments, "type": "tool_call"}
            for identifier, name, arguments in tool_calls(said)
        ],
    )
    return ChatResult(generations=[ChatGeneration(message=message, generation_info=about)])


def _chunk(piece: Any, cut: Cut) -> ChatGenerationChunk:
    text, about = cut.next(piece.text), {}
    if piece.finish_reason:
        text, about = text + cut.rest(), {"finish_reason": piece.finish_reason}
    message = AIMessageChunk(content=text, response_metadata=about)
    return ChatGenerationChunk(message=message, generation_info=about)
