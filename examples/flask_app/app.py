"""Sentence similarity over HTTP.

pip install 'ebbtide[frameworks]'
flask run --debug, or with gunicorn: gunicorn app:app --workers 2
"""

import logging
import os

from flask import Flask, request

from ebbtide.integrations.flask import Pipelines

logging.basicConfig(level=logging.INFO)  # tells what came back when a process ends

MODEL = os.environ.get("MODEL", "sentence-transformers/all-MiniLM-L6-v2")

app = Flask(__name__)
pipelines = Pipelines(app, budget=0.4)


@app.get("/similarity")
def similarity() -> dict[str, float]:
    """How alike two texts are: -1 to 1."""
    embed = pipelines.lease("feature-extraction", MODEL)
    one, other = embed([request.args["one"], request.args["other"]], pooling="mean", normalize=True)
    return {"similarity": float(one @ other)}
