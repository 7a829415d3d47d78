"""A WSGI application with no framework.

pip install 'ebbtide[frameworks]'
gunicorn app:app
"""

import functools
import json
import os
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qs

from ebbtide import FeatureExtractionPipeline, pipeline

MODEL = os.environ.get("MODEL", "sentence-transformers/all-MiniLM-L6-v2")


@functools.cache
def embedder() -> FeatureExtractionPipeline:
    """Made where it is first used: in a worker, after the fork."""
    return pipeline("feature-extraction", MODEL)


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """The vector of `?text=`."""
    text = parse_qs(environ["QUERY_STRING"])["text"][0]
    vectors = embedder()(text, pooling="mean", normalize=True)
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(vectors[0].tolist()).encode()]
