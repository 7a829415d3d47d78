"""Models of any size for tests and benchmarks of memory, written without any library of ONNX.

Each embeds a token's number, and computes with it; its weights mean nothing.

    python tools/large_models.py FOLDER [--megabytes 50] [--count 1] [--width 1024]
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

TOKENIZER = Path(__file__).parent.parent / "tests" / "models" / "tiny-bert"
HIDDEN = 64
FLOAT, INT64 = 1, 7


def model(folder: Path, megabytes: float, *, width: int = 1024, seed: int = 0) -> Path:
    """Write a feature-extraction model.

    Args:
        folder: Where; made if need be.
        megabytes: About how large its weights are.
        width: Numbers that a run holds for each token, of 4 bytes: its working memory.
        seed: Another one gives other weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    config = {"model_type": "bert", "hidden_size": HIDDEN, "max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "onnx").mkdir(exist_ok=True)
    rows = max(2000, int(megabytes * 1e6 / 4 / HIDDEN) - 2 * width)
    random = np.random.default_rng(seed)
    tile = random.standard_normal((1000, HIDDEN), dtype=np.float32) / 8
    weights = {
        "table": np.resize(tile, (rows, HIDDEN)),
        "widen": np.resize(tile, (HIDDEN, width)),
        "narrow": np.resize(tile, (width, HIDDEN)),
    }
    nodes = [
        _node("Gather", ["table", "input_ids"], "embedded"),
        _node("MatMul", ["embedded", "widen"], "wide"),
        _node("Tanh", ["wide"], "bent"),
        _node("MatMul", ["bent", "narrow"], "last_hidden_state"),
    ]
    graph = b"".join(
        [
            *[_bytes(1, node) for node in nodes],
            _bytes(2, b"graph"),
            *[_bytes(5, _tensor(name, array)) for name, array in weights.items()],
            _bytes(11, _value("input_ids", INT64, ["batch", "length"])),
            _bytes(12, _value("last_hidden_state", FLOAT, ["batch", "length", HIDDEN])),
        ]
    )
    text = _number(1, 8) + _bytes(8, _number(2, 17)) + _bytes(7, graph)
    (folder / "onnx" / "model.onnx").write_bytes(text)
    return folder


def models(
    folder: Path, count: int, megabytes: Sequence[float], *, width: int = 1024
) -> Iterator[Path]:
    """Several, each of another size in turn, and none like another."""
    for number in range(count):
        size = megabytes[number % len(megabytes)]
        yield model(folder / f"m{number:03d}", size, width=width, seed=number)


def _varint(number: int) -> bytes:
    out = bytearray()
    while True:
        low, number = number & 0x7F, number >> 7
        out.append(low | (0x80 if number else 0))
        if not number:
            return bytes(out)


def _number(field: int, number: int) -> bytes:
    return _varint(field << 3) + _varint(number)


def _bytes(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _node(operation: str, inputs: Sequence[str], output: str) -> bytes:
    parts = [_bytes(1, name.encode()) for name in inputs]
    return b"".join([*parts, _bytes(2, output.encode()), _bytes(4, operation.encode())])


def _tensor(name: str, array: np.ndarray[tuple[int, ...], np.dtype[Any]]) -> bytes:
    dims = b"".join(_number(1, size) for size in array.shape)
    raw = np.ascontiguousarray(array).tobytes()
    return dims + _number(2, FLOAT) + _bytes(8, name.encode()) + _bytes(9, raw)


def _value(name: str, kind: int, shape: Sequence[str | int]) -> bytes:
    dims = b"".join(
        _bytes(1, _number(1, one) if isinstance(one, int) else _bytes(2, one.encode()))
        for one in shape
    )
    tensor = _number(1, kind) + _bytes(2, dims)
    return _bytes(1, name.encode()) + _bytes(2, _bytes(1, tensor))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=float, default=50)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--width", type=int, default=1024)
    given = parser.parse_args()
    for path in models(given.folder, given.count, [given.megabytes], width=given.width):
        print(path)


if __name__ == "__main__":
    main()
