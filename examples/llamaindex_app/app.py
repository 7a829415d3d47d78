"""Answers from a few lines, with LlamaIndex. Run it with: python examples/llamaindex_app/app.py."""

import os

from llama_index.core import Document, VectorStoreIndex
from llama_index.core.llms import ChatMessage

from ebbtide import PipelineManager
from ebbtide.integrations.llamaindex import EbbtideEmbedding, EbbtideLLM, EbbtideRerank

EMBED = os.environ.get("EMBED", "sentence-transformers/all-MiniLM-L6-v2")
RANK = os.environ.get("RANK", "cross-encoder/ms-marco-MiniLM-L6-v2")
CHAT = os.environ.get("CHAT", "onnx-community/SmolLM2-135M-Instruct-ONNX")
LINES = ["The tide turns at six.", "The boats lie on their sides.", "Bread is baked at four."]

with PipelineManager(os.environ.get("BUDGET", "2 GiB")) as manager:
    embed = EbbtideEmbedding(source=manager, model=EMBED)
    index = VectorStoreIndex.from_documents(
        [Document(text=line) for line in LINES], embed_model=embed
    )
    question = "When does the tide turn?"
    nodes = index.as_retriever(similarity_top_k=3).retrieve(question)
    best = EbbtideRerank(source=manager, model=RANK, top_n=1).postprocess_nodes(
        nodes, query_str=question
    )
    llm = EbbtideLLM(source=manager, model=CHAT, max_new_tokens=20)
    for piece in llm.stream_chat([ChatMessage(f"{best[0].text}\n\n{question}")]):
        print(piece.delta, end="", flush=True)
    print()
    print(manager.status())
