"""An async view and a sync one, which share one pipeline."""

import os

from django.http import HttpRequest, JsonResponse

from ebbtide.integrations.django import acquire

MODEL = os.environ.get("MODEL", "sentence-transformers/all-MiniLM-L6-v2")


async def embed(request: HttpRequest) -> JsonResponse:
    """The vector of a text."""
    async with acquire("feature-extraction", MODEL) as pipe:
        vectors = await pipe.acall(request.GET["text"], pooling="mean", normalize=True)
    return JsonResponse({"vector": vectors[0].tolist()})


def similarity(request: HttpRequest) -> JsonResponse:
    """How alike two texts are: -1 to 1."""
    texts = [request.GET["one"], request.GET["other"]]
    with acquire("feature-extraction", MODEL) as pipe:
        one, other = pipe(texts, pooling="mean", normalize=True)
    return JsonResponse({"similarity": float(one @ other)})
