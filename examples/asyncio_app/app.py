"""Two models and many tasks on one event loop. Run it with: python examples/asyncio_app/app.py."""

import asyncio
import os
import signal

from ebbtide import PipelineManager

EMBED = os.environ.get("EMBED", "sentence-transformers/all-MiniLM-L6-v2")
WRITE = os.environ.get("WRITE", "onnx-community/SmolLM2-135M-Instruct-ONNX")
LINES = ["The tide goes out.", "The boats lie on their sides.", "Bread is baked at four."]


async def embed(manager: PipelineManager, line: str) -> None:
    """Tell how many numbers there are for a line."""
    async with manager.acquire("feature-extraction", EMBED) as pipe:
        vectors = await pipe.acall(line, pooling="mean")
    print(f"{vectors.shape[1]} numbers for {line!r}", flush=True)


async def write(manager: PipelineManager) -> None:
    """Write on until the program is stopped."""
    async with manager.acquire("text-generation", WRITE) as pipe:
        while True:
            async for piece in pipe.astream("The tide", max_new_tokens=20, do_sample=True):
                print(piece, end="", flush=True)


async def main() -> None:
    """Do both until Ctrl-C or SIGTERM; then every task is cancelled, and the manager closes."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    async with PipelineManager(os.environ.get("BUDGET", "2 GiB")) as manager:
        async with asyncio.TaskGroup() as group:
            for line in LINES:
                group.create_task(embed(manager, line))
        async with asyncio.TaskGroup() as group:
            group.create_task(write(manager))


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("\nstopped")
