"""Embeddings by tasks: pip install 'ebbtide[frameworks]', then celery -A tasks worker.

The queue is a folder here, so that the example needs no broker; use your own. Ask for a vector with
`python -c "import tasks; print(tasks.embed.delay('the tide goes out').get())"`.
"""

import os
import tempfile
from pathlib import Path

from celery import Celery

from ebbtide.integrations.celery import Pipelines

MODEL = os.environ.get("MODEL", "sentence-transformers/all-MiniLM-L6-v2")
FOLDER = Path(os.environ.get("QUEUE", Path(tempfile.gettempdir()) / "ebbtide-celery"))

for name in ("messages", "control", "results"):
    (FOLDER / name).mkdir(parents=True, exist_ok=True)

app = Celery("tasks", broker="filesystem://", backend=(FOLDER / "results").as_uri())
app.conf.update(
    broker_transport_options={
        "data_folder_in": str(FOLDER / "messages"),
        "data_folder_out": str(FOLDER / "messages"),
        "control_folder": str(FOLDER / "control"),
        "polling_interval": 0.1,
    },
    worker_max_tasks_per_child=1000,
)

pipelines = Pipelines(budget=0.4, keep_alive="30m")


@app.task
def embed(text: str) -> list[float]:
    """The vector of a text."""
    with pipelines.acquire("feature-extraction", MODEL) as pipe:
        return pipe(text, pooling="mean", normalize=True)[0].tolist()
