"""Search by meaning in Streamlit. Run it with: streamlit run examples/streamlit_app/app.py."""

import os

import streamlit as st

from ebbtide.integrations.streamlit import cached_pipeline, clear

MODEL = os.environ.get("MODEL", "sentence-transformers/all-MiniLM-L6-v2")
LINES = ["The tide goes out.", "The boats lie on their sides.", "Bread is baked at four."]

embed = cached_pipeline("feature-extraction", MODEL, ttl="1h", max_entries=2)

st.title("Search by meaning")
query = st.text_input("What are you looking for?", "low water")
vectors = embed([query, *LINES], pooling="mean", normalize=True)
for score, line in sorted(zip(vectors[1:] @ vectors[0], LINES, strict=True), reverse=True):
    st.write(f"{score:.2f} {line}")
st.caption(f"{embed.memory.anonymous / 1e6:.1f} MB")
st.button("Give the memory back", on_click=clear)
