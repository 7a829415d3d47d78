"""Make the GGUF file in Q4_1 that `benchmarks/generation.py` gives to llama.cpp.

    python tools/make_gguf.py FOLDER OUT.gguf [--type q4_1] [--mixed]

FOLDER holds a model of the llama architecture as Hugging Face has it: ``model.safetensors`` and
``config.json``. The file has no tokenizer, for the benchmark gives llama.cpp token ids.

It needs packages that Ebbtide itself does not need, best in the venv that the benchmark is shown
with ``--llama-python``:

    pip install gguf safetensors numpy
    CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python

Every matrix is quantised to the type, the embedding that is the last layer too, as in the graph
that it is compared with. ``--mixed`` leaves the choice to llama.cpp, which takes more bits for the
last layer: better text, and slower.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from safetensors.numpy import load_file

TYPES = {
    "f32": llama_cpp.LLAMA_FTYPE_ALL_F32,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q4_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1,
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def renamed(name: str) -> str:
    """A tensor's name in a GGUF file."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.weight"
    number, _, rest = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{NAMES[rest]}.weight"


def interleaved(weights: Any, heads: int) -> Any:
    """Rows in the order that llama.cpp turns them in: pairs side by side, not in two halves."""
    rows = weights.shape[0]
    return weights.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weights.shape)


def converted(folder: Path, out: Path) -> None:
    """Write the model in float32."""
    config = json.loads((folder / "config.json").read_text())
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    size = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(size)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, weights in load_file(folder / "model.safetensors").items():
        array = weights.astype(np.float32)
        if name.endswith("q_proj.weight"):
            array = interleaved(array, heads)
        elif name.endswith("k_proj.weight"):
            array = interleaved(array, kv_heads)
        writer.add_tensor(renamed(name), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantised(original: Path, out: Path, kind: str, mixed: bool) -> None:
    """Write the model in fewer bits."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = TYPES[kind]
    options.pure = not mixed
    given = (str(original).encode(), str(out).encode(), ctypes.byref(options))
    if llama_cpp.llama_model_quantize(*given):
        raise SystemExit("llama.cpp could not quantise the file: what it said is above.")


def main() -> None:
    """Make the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", default="q4_1", choices=TYPES)
    parser.add_argument("--mixed", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.out.parent) as place:
        original = Path(place, "f32.gguf")
        converted(options.folder, original)
        if options.type == "f32":
            original.replace(options.out)
        else:
            quantised(original, options.out, options.type, options.mixed)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
