"""Embeddings over HTTP.

pip install 'ebbtide[frameworks]'
uvicorn main:app --workers 2
"""

import logging
import os
from typing import Annotated

from fastapi import Depends, FastAPI

from ebbtide import FeatureExtractionPipeline
from ebbtide.integrations.starlette import leased, lifespan

logging.basicConfig(level=logging.INFO)  # tells what came back when a worker ends

MODEL = os.environ.get("MODEL", "sentence-transformers/all-MiniLM-L6-v2")

embedder = leased("feature-extraction", MODEL, timeout=5)
app = FastAPI(lifespan=lifespan(budget=0.4, keep_alive="forever", preload=[embedder]))


@app.post("/embed")
async def embed(
    texts: list[str], pipe: Annotated[FeatureExtractionPipeline, Depends(embedder)]
) -> list[list[float]]:
    """One vector for each text."""
    vectors = await pipe.acall(texts, pooling="mean", normalize=True)
    return vectors.tolist()
