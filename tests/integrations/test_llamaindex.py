"""LlamaIndex's interfaces over a pipeline or a manager, called as LlamaIndex calls them."""

from __future__ import annotations

import asyncio
import warnings
from typing import Any

import pytest

pytest.importorskip("llama_index.core", exc_type=ImportError)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    from llama_index.core import Document, VectorStoreIndex
    from llama_index.core.llms import ChatMessage
    from llama_index.core.schema import NodeWithScore, TextNode

from tests.integrations.chained import CHAT, EMBED, RANK, TEXTS, run_example

import ebbtide
from ebbtide.errors import InputError
from ebbtide.integrations.llamaindex import EbbtideEmbedding, EbbtideLLM, EbbtideRerank


def test_embeddings_are_the_pipelines_vectors() -> None:
    with ebbtide.pipeline("feature-extraction", EMBED) as embed:
        found = EbbtideEmbedding(source=embed)
        expected = embed(TEXTS).tolist()
        assert found.get_text_embedding_batch(TEXTS) == expected
        assert asyncio.run(found.aget_text_embedding_batch(TEXTS)) == expected
        assert found.get_text_embedding(TEXTS[0]) == pytest.approx(expected[0], abs=1e-6)
        asking = EbbtideEmbedding(source=embed, query_prompt="query: ")
        alone = embed(["query: tide"]).tolist()[0]
        assert asking.get_query_embedding("tide") == alone
        assert asyncio.run(asking.aget_query_embedding("tide")) == alone
        assert found.model_name == EMBED


def test_a_source_that_is_none_says_what_to_make(write: Any) -> None:
    with pytest.raises(InputError, match=r"ebbtide.pipeline\('feature-extraction'\)"):
        EbbtideEmbedding(source=EMBED)
    with pytest.raises(InputError, match="feature-extraction"):
        EbbtideEmbedding(source=write)
    with pytest.raises(InputError, match="for a manager"):
        EbbtideLLM(source=write, model=CHAT)


def test_an_index_finds_with_them(manager: ebbtide.PipelineManager) -> None:
    index = VectorStoreIndex.from_documents(
        [Document(text=text) for text in TEXTS],
        embed_model=EbbtideEmbedding(source=manager, model=EMBED),
    )
    (found,) = index.as_retriever(similarity_top_k=1).retrieve(TEXTS[1])
    assert found.text == TEXTS[1]


def test_a_text_is_completed_as_the_pipeline_does(write: Any) -> None:
    llm = EbbtideLLM(source=write, max_new_tokens=8)
    expected = write("The tide", max_new_tokens=8, return_full_text=False)[0]["generated_text"]
    found = llm.complete("The tide")
    assert found.text == expected
    assert found.raw == {"finish_reason": "length"}
    assert asyncio.run(llm.acomplete("The tide")).text == expected
    assert "".join(one.delta or "" for one in llm.stream_complete("The tide")) == expected
    assert len(list(llm.stream_complete("The tide", max_new_tokens=2))) < 8

    async def read() -> str:
        stream = await llm.astream_complete("The tide")
        return [one async for one in stream][-1].text

    assert asyncio.run(read()) == expected


def test_a_chat_is_answered_as_the_pipeline_does(write: Any) -> None:
    llm = EbbtideLLM(source=write, max_new_tokens=8)
    asked = [{"role": "user", "content": "Tide?"}]
    expected = write(asked, max_new_tokens=8)[0]["generated_text"][-1]["content"]
    messages = [ChatMessage("Tide?")]
    assert llm.chat(messages).message.content == expected
    assert asyncio.run(llm.achat(messages)).message.content == expected
    assert [one.message.content for one in llm.stream_chat(messages)][-1] == expected

    async def read() -> str:
        return "".join([one.delta or "" async for one in await llm.astream_chat(messages)])

    assert asyncio.run(read()) == expected


def test_who_stops_reading_a_stream_returns_its_lease(manager: ebbtide.PipelineManager) -> None:
    llm = EbbtideLLM(source=manager, model=CHAT, max_new_tokens=200)
    stream = llm.stream_chat([ChatMessage("Tide?")])
    next(stream)
    stream.close()
    del stream
    assert manager.evict("text-generation", CHAT, timeout=5) is not None


def test_a_reranker_keeps_the_best_with_their_scores(manager: ebbtide.PipelineManager) -> None:
    nodes = [NodeWithScore(node=TextNode(text=text), score=0.5) for text in TEXTS]
    with manager.acquire("text-classification", RANK) as pipe:
        expected = pipe.rank("tide", TEXTS)
    rerank = EbbtideRerank(source=manager, model=RANK, top_n=2)
    found = rerank.postprocess_nodes(nodes, query_str="tide")
    assert [one.text for one in found] == [TEXTS[one["corpus_id"]] for one in expected[:2]]
    assert found[0].score == pytest.approx(expected[0]["score"])
    again = asyncio.run(rerank.apostprocess_nodes(nodes, query_str="tide"))
    assert [one.text for one in again] == [one.text for one in found]
    assert rerank.postprocess_nodes(nodes) == nodes


def test_the_example_runs() -> None:
    run_example("llamaindex_app")
