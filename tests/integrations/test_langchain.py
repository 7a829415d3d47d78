"""LangChain's interfaces over a pipeline or a manager, called as LangChain calls them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("langchain_core")

from hypothesis import given
from hypothesis import strategies as st
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.vectorstores import InMemoryVectorStore
from tests.integrations.chained import CHAT, EMBED, RANK, TEXTS, run_example
from tests.integrations.served import MODELS

import ebbtide
from ebbtide.errors import InputError, OptionError, PipelineDisposedError
from ebbtide.integrations.chains import Cut
from ebbtide.integrations.langchain import (
    EbbtideChat,
    EbbtideCrossEncoder,
    EbbtideEmbeddings,
    EbbtideReranker,
)


def test_embeddings_are_the_pipelines_vectors() -> None:
    with ebbtide.pipeline("feature-extraction", EMBED) as embed:
        found = EbbtideEmbeddings(embed)
        expected = embed(TEXTS).tolist()
        assert found.embed_documents(TEXTS) == expected
        assert asyncio.run(found.aembed_documents(TEXTS)) == expected
        alone = embed(["query: tide"]).tolist()[0]
        asking = EbbtideEmbeddings(embed, query_prompt="query: ")
        assert asking.embed_query("tide") == asyncio.run(asking.aembed_query("tide")) == alone
        assert found.embed_documents([]) == []


def test_a_model_that_gives_one_vector_a_token_says_what_to_add() -> None:
    with ebbtide.pipeline("feature-extraction", MODELS / "tiny-bert") as embed:
        with pytest.raises(InputError, match="call_options"):
            EbbtideEmbeddings(embed).embed_query("tide")
        found = EbbtideEmbeddings(embed, call_options={"pooling": "mean"})
        assert len(found.embed_query("tide")) == 32


def test_a_vector_store_searches_with_them(manager: ebbtide.PipelineManager) -> None:
    store = InMemoryVectorStore(EbbtideEmbeddings(manager, EMBED))
    store.add_texts(TEXTS)
    assert store.similarity_search(TEXTS[1], k=1)[0].page_content == TEXTS[1]
    found = asyncio.run(store.asimilarity_search(TEXTS[2], k=1))
    assert found[0].page_content == TEXTS[2]


def test_a_manager_has_its_pipeline_back_after_each_call(
    manager: ebbtide.PipelineManager,
) -> None:
    found = EbbtideEmbeddings(manager, EMBED, options={"keep_alive": "1m"})
    found.embed_query("tide")
    assert manager.evict("feature-extraction", EMBED) is not None
    found.embed_query("tide")
    manager.dispose_all()
    assert ebbtide.live() == []


def test_a_pipeline_that_is_disposed_says_so() -> None:
    with ebbtide.pipeline("feature-extraction", EMBED) as embed:
        found = EbbtideEmbeddings(embed)
    with pytest.raises(PipelineDisposedError):
        found.embed_query("tide")


def test_a_source_that_is_none_says_what_to_make(
    manager: ebbtide.PipelineManager, write: Any
) -> None:
    with pytest.raises(InputError, match=r"ebbtide.pipeline\('feature-extraction'\)"):
        EbbtideEmbeddings(EMBED)
    with pytest.raises(InputError, match="feature-extraction"):
        EbbtideEmbeddings(write)
    with pytest.raises(InputError, match="for a manager"):
        EbbtideChat(source=write, model=CHAT)
    with pytest.raises(OptionError, match="dtype"):
        EbbtideEmbeddings(manager, EMBED, options={"dtyp": "fp32"})


def test_a_chat_answers_what_the_pipeline_writes(write: Any) -> None:
    chat = EbbtideChat(source=write, call_options={"max_new_tokens": 8})
    asked = [{"role": "user", "content": "When does the tide turn?"}]
    expected = write(asked, max_new_tokens=8)[0]["generated_text"][-1]["content"]
    answer = chat.invoke("When does the tide turn?")
    assert isinstance(answer, AIMessage)
    assert answer.content == expected
    assert answer.response_metadata["finish_reason"] == "length"
    assert asyncio.run(chat.ainvoke("When does the tide turn?")).content == expected
    turns = [
        HumanMessage("Tide?"),
        AIMessage("Low."),
        HumanMessage([{"type": "text", "text": "?"}]),
    ]
    assert isinstance(chat.invoke(turns).content, str)


def test_a_chat_streams_the_same_text(write: Any) -> None:
    chat = EbbtideChat(source=write, call_options={"max_new_tokens": 8})
    whole = chat.invoke("tide?").content
    pieces = list(chat.stream("tide?"))
    assert len(pieces) > 1
    assert "".join(piece.text for piece in pieces) == whole

    async def read() -> str:
        return "".join([piece.text async for piece in chat.astream("tide?")])

    assert asyncio.run(read()) == whole
    assert (chat | StrOutputParser()).invoke("tide?") == whole


def test_options_of_a_call_go_before_those_of_the_model(write: Any) -> None:
    chat = EbbtideChat(source=write, call_options={"max_new_tokens": 8})
    whole = str(chat.invoke("tide?").content)
    assert len(list(chat.bind(max_new_tokens=2).stream("tide?"))) < 8
    assert len(whole) > 6


def test_a_text_ends_before_what_stops_it(write: Any) -> None:
    chat = EbbtideChat(source=write, call_options={"max_new_tokens": 8})
    whole = str(chat.invoke("tide?").content)
    stop = whole[4:7]
    stopped = chat.invoke("tide?", stop=[stop, "never"])
    assert stopped.content == whole[: whole.index(stop)]
    assert stopped.response_metadata["finish_reason"] == "stop"
    assert "".join(one.text for one in chat.stream("tide?", stop=[stop])) == stopped.content


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_a_text_in_pieces_is_cut_where_the_whole_is(text: str, stop: list[str]) -> None:
    cut = Cut(stop)
    places = [text.find(one) for one in stop if one in text]
    given_out = "".join(cut.next(letter) for letter in text) + cut.rest()
    # of two texts that both end it, the one that is complete first counts
    first = min((text.find(one) + len(one) for one in stop if one in text), default=len(text))
    assert text.startswith(given_out)
    assert len(given_out) <= first
    if not places:
        assert given_out == text
    else:
        assert not any(one in given_out for one in stop)


def test_who_stops_reading_a_stream_returns_its_lease(manager: ebbtide.PipelineManager) -> None:
    chat = EbbtideChat(source=manager, model=CHAT, call_options={"max_new_tokens": 200})
    stream = chat.stream("tide?")
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert manager.evict("text-generation", CHAT) is not None


def test_calls_of_tools_are_given_as_langchain_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def tide(harbour: str) -> str:
        """When the tide turns.

        Args:
            harbour: Where.
        """
        return harbour

    with ebbtide.pipeline("text-generation", CHAT) as write:
        asked: dict[str, Any] = {}

        def answer(self: Any, chat: list[Any], **options: Any) -> list[Any]:
            asked.update(options)
            call = {"function": {"name": "tide", "arguments": {"harbour": "Hull"}}}
            said = {"role": "assistant", "content": "", "tool_calls": [call]}
            return [{"generated_text": [*chat, said], "finish_reason": "stop"}]

        monkeypatch.setattr(type(write), "__call__", answer)
        found = EbbtideChat(source=write).bind_tools([tide]).invoke("tide?")
    assert asked["tools"][0]["function"]["name"] == "tide"
    (call,) = found.tool_calls
    assert (call["name"], call["args"]) == ("tide", {"harbour": "Hull"})
    assert call["id"]


def test_a_reranker_keeps_the_best_with_their_scores(manager: ebbtide.PipelineManager) -> None:
    documents = [Document(page_content=text, metadata={"n": n}) for n, text in enumerate(TEXTS)]
    with manager.acquire("text-classification", RANK) as pipe:
        expected = pipe.rank("tide", TEXTS)
    rerank = EbbtideReranker(source=manager, model=RANK, top_n=2)
    found = rerank.compress_documents(documents, "tide")
    assert [one.metadata["n"] for one in found] == [one["corpus_id"] for one in expected[:2]]
    assert found[0].metadata["relevance_score"] == pytest.approx(expected[0]["score"])
    assert asyncio.run(rerank.acompress_documents(documents, "tide")) == found
    assert "relevance_score" not in documents[0].metadata
    assert rerank.compress_documents([], "tide") == []


def test_a_cross_encoder_scores_as_the_reranker_does() -> None:
    with ebbtide.pipeline("text-classification", RANK) as pipe:
        ranked = {one["corpus_id"]: one["score"] for one in pipe.rank("tide", TEXTS)}
        found = EbbtideCrossEncoder(pipe).score([("tide", text) for text in TEXTS])
        assert found == pytest.approx([ranked[n] for n in range(len(TEXTS))], abs=1e-6)
        assert EbbtideCrossEncoder(pipe).score([]) == []


def test_the_example_runs() -> None:
    run_example("langchain_app")
