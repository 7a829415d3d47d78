"""Answers from a few lines, with LangChain. Run it with: python examples/langchain_app/app.py."""

import os

from langchain_core.prompts import ChatPromptTemplate
from langchain_core.vectorstores import InMemoryVectorStore

from ebbtide import PipelineManager
from ebbtide.integrations.langchain import EbbtideChat, EbbtideEmbeddings, EbbtideReranker

EMBED = os.environ.get("EMBED", "sentence-transformers/all-MiniLM-L6-v2")
RANK = os.environ.get("RANK", "cross-encoder/ms-marco-MiniLM-L6-v2")
CHAT = os.environ.get("CHAT", "onnx-community/SmolLM2-135M-Instruct-ONNX")
LINES = ["The tide turns at six.", "The boats lie on their sides.", "Bread is baked at four."]

with PipelineManager(os.environ.get("BUDGET", "2 GiB")) as manager:
    store = InMemoryVectorStore(EbbtideEmbeddings(source=manager, model=EMBED))
    store.add_texts(LINES)
    reranker = EbbtideReranker(source=manager, model=RANK, top_n=1)
    chat = EbbtideChat(source=manager, model=CHAT, call_options={"max_new_tokens": 20})

    question = "When does the tide turn?"
    found = reranker.compress_documents(store.similarity_search(question, k=3), question)
    prompt = ChatPromptTemplate.from_messages([("user", "{text}\n\n{question}")])
    for piece in (prompt | chat).stream({"text": found[0].page_content, "question": question}):
        print(piece.text, end="", flush=True)
    print()
    print(manager.status())
