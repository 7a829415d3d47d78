"""Texts to vectors in two processes. Run it with: python examples/multiprocessing_app/app.py."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from ebbtide.integrations.multiprocessing import load, loaded

MODEL = os.environ.get("MODEL", "sentence-transformers/all-MiniLM-L6-v2")
LINES = ["The tide goes out.", "The boats lie on their sides.", "Bread is baked at four."]


def size(line: str) -> str:
    """How many numbers there are for a line."""
    return f"{loaded()(line, pooling='mean').shape[1]} numbers for {line!r}"


if __name__ == "__main__":
    context = get_context(os.environ.get("START", "forkserver"))
    with ProcessPoolExecutor(
        2, mp_context=context, initializer=load, initargs=("feature-extraction", MODEL)
    ) as pool:
        print(*pool.map(size, LINES), sep="\n")
