"""Search by meaning in Gradio. Run it with: python examples/gradio_app/app.py.

Or with: gradio examples/gradio_app/app.py, which reads it again at each change of the file.
"""

import os
import signal

import gradio as gr

from ebbtide.integrations.gradio import SharedPipeline

MODEL = os.environ.get("MODEL", "sentence-transformers/all-MiniLM-L6-v2")
LINES = ["The tide goes out.", "The boats lie on their sides.", "Bread is baked at four."]

if gr.NO_RELOAD:  # a changed file is read again, and the pipeline stays
    embed = SharedPipeline("feature-extraction", MODEL)


def search(query: str) -> str:
    """The lines, the nearest first."""
    vectors = embed([query, *LINES], pooling="mean", normalize=True)
    found = sorted(zip(vectors[1:] @ vectors[0], LINES, strict=True), reverse=True)
    return "\n".join(f"{score:.2f} {line}" for score, line in found)


with gr.Blocks(title="Search by meaning") as demo:
    query = gr.Textbox(label="What are you looking for?")
    answer = gr.Textbox(label="The nearest", lines=3)
    query.submit(search, query, answer, api_name="search")

if __name__ == "__main__" and gr.NO_RELOAD:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Gradio itself minds Ctrl-C alone
    demo.launch(app_kwargs={"lifespan": embed.lifespan})
