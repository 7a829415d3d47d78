"""The types of text generators that `make_generators.py` makes: tokenizers, sizes and graphs."""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from make_models import Array
from make_tasks import share, shorten
from optimum.exporters.onnx import export as optimum_export
from optimum.exporters.onnx import onnx_export_from_model
from optimum.exporters.onnx.model_configs import LlamaOnnxConfig
from optimum.onnx import merge_decoders
from task_tokenizers import TokenizerKind, learn_merges, roberta, unigram, words_of
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import GenerationConfig, PreTrainedModel


@dataclass(frozen=True)
class GeneratorType:
    """One model.

    Attributes:
        name: Its folder in tests/models is this after ``gen-``, its golden is named so.
        model_type: The type that `transformers` knows.
        config: Its sizes.
        tokenizer: A key of `TOKENIZERS`.
        tokenizer_class: What tokenizer_config.json calls it.
        generation: What generation_config.json says.
        seq2seq: Whether it has an encoder.
        graph: A key of `EXPORTERS`: how its graph is made and what it takes.
        weights_of: The type whose weights it has too.
        rich: Whether beams and the processors of logits are asked of it.
        padded: Whether its graph can read rows of different lengths at once.
        target: A token of the language to write, asked with ``forced_bos_token_id``.
        gains: How strong matrices are whose names end so, and how wide embeddings.
        settings: More of tokenizer_config.json.
    """

    name: str
    model_type: str
    config: Mapping[str, Any]
    tokenizer: str = "byte-level"
    tokenizer_class: str = "PreTrainedTokenizerFast"
    generation: Mapping[str, Any] = field(default_factory=dict)
    seq2seq: bool = False
    graph: str = "cached"
    weights_of: str | None = None
    rich: bool = False
    padded: bool = True
    target: str | None = None
    gains: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


# --------------------------------------------------------------------------------------------------
# Tokenizers
# --------------------------------------------------------------------------------------------------

MERGES = 100


def byte_level(first: Sequence[str], last: Sequence[str], frame: str | None = None) -> Tokenizer:
    """Byte-level byte-pair encoding; special tokens have the first and last ids.

    Args:
        first: The special tokens with the first ids.
        last: Those with the last ids.
        frame: What is put around a text, as ``TemplateProcessing`` reads it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    merges = learn_merges(words_of(tokenizer), MERGES, lambda left, right: left + right)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(left + right for left, right in merges)]
    vocab = {piece: number for number, piece in enumerate([*first, *pieces, *last])}
    tokenizer.model = models.BPE(vocab, merges)
    tokenizer.decoder = decoders.ByteLevel()
    special = [*first, *last]
    tokenizer.add_special_tokens(
        [AddedToken(one, special=True, normalized=False) for one in special]
    )
    _frame(tokenizer, frame)
    return tokenizer


def sentence_pieces(
    first: Sequence[str], last: Sequence[str], *, unknown: str = "<unk>", frame: str
) -> Tokenizer:
    """Unigrams with marked spaces; special tokens have the first and last ids."""
    tokenizer = unigram(
        first,
        last,
        unknown=unknown,
        normalizer=normalizers.NFKC(),
        pre_tokenizer=pre_tokenizers.Metaspace(),
    )
    _frame(tokenizer, frame)
    return tokenizer


def _frame(tokenizer: Tokenizer, frame: str | None) -> None:
    if frame is None:
        return
    named = [one for one in frame.split() if not one.startswith("$")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=frame,
        pair=f"{frame} {frame.replace('$A', '$B')}",
        special_tokens=[(one, tokenizer.token_to_id(one)) for one in sorted(set(named))],
    )


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n'"
    " + message['content'] | trim + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TURNS = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('no such role: ' + message['role']) }}"
    "{% endif %}{% endfor %}"
)

LANGUAGES = ("en_XX", "de_DE", "fr_XX")
CODES = ("__de__", "__en__", "__fr__")

LLAMA_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
}
BART_TOKENS = {
    "bos_token": "<s>",
    "cls_token": "<s>",
    "eos_token": "</s>",
    "mask_token": "<mask>",
    "pad_token": "<pad>",
    "sep_token": "</s>",
    "unk_token": "<unk>",
}
T5_TOKENS = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
EXTRA = tuple(f"<extra_id_{number}>" for number in reversed(range(4)))
FAIRSEQ = ("<s>", "<pad>", "</s>", "<unk>")

TOKENIZERS: Mapping[str, TokenizerKind] = {
    # As GPT-2: one token for everything, and none to pad with.
    "byte-level": TokenizerKind(
        lambda: byte_level((), ("<|endoftext|>",)),
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
        {"add_prefix_space": False, "clean_up_tokenization_spaces": True},
    ),
    # As Llama 3: a beginning before every text.
    "llama": TokenizerKind(
        lambda: byte_level((), ("<s>", "</s>", "<pad>"), "<s> $A"),
        LLAMA_TOKENS,
        {"clean_up_tokenization_spaces": False, "chat_template": TURNS},
    ),
    # As Qwen: nothing around a text, another token to pad with, and turns of a conversation.
    "chat": TokenizerKind(
        lambda: byte_level((), ("<|endoftext|>", "<|im_start|>", "<|im_end|>")),
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        {"bos_token": None, "clean_up_tokenization_spaces": False, "chat_template": CHATML},
    ),
    # As OPT: the end of a text is its beginning, and padding has an early id.
    "opt": TokenizerKind(
        lambda: byte_level(FAIRSEQ, (), "</s> $A"),
        {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
    ),
    # As Gemma: pieces, padding first.
    "gemma": TokenizerKind(
        lambda: sentence_pieces(("<pad>", "<eos>", "<bos>", "<unk>"), (), frame="<bos> $A"),
        {
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
        },
    ),
    "t5": TokenizerKind(
        lambda: sentence_pieces(("<pad>", "</s>", "<unk>"), EXTRA, frame="$A </s>"),
        T5_TOKENS,
        {"additional_special_tokens": [*EXTRA], "extra_ids": len(EXTRA)},
    ),
    "pegasus": TokenizerKind(
        lambda: sentence_pieces(
            ("<pad>", "</s>", "<mask_1>", "<mask_2>", "<unk>"), (), frame="$A </s>"
        ),
        {**T5_TOKENS, "mask_token": "<mask_2>"},
    ),
    "bart": TokenizerKind(roberta, BART_TOKENS, {"add_prefix_space": False}),
    "blenderbot": TokenizerKind(
        lambda: byte_level(("<s>", "<pad>", "</s>", "<unk>"), (), "$A </s>"),
        {key: value for key, value in BART_TOKENS.items() if key != "mask_token"},
        {"add_prefix_space": False},
    ),
    "marian": TokenizerKind(
        lambda: sentence_pieces(("</s>", "<unk>"), ("<pad>",), frame="$A </s>"),
        T5_TOKENS,
        {"source_lang": "en", "target_lang": "de"},
    ),
    "mbart": TokenizerKind(
        lambda: sentence_pieces(FAIRSEQ, (*LANGUAGES, "<mask>"), frame="en_XX $A </s>"),
        BART_TOKENS,
        {"src_lang": "en_XX", "tgt_lang": None, "additional_special_tokens": [*LANGUAGES]},
    ),
    "m2m_100": TokenizerKind(
        lambda: sentence_pieces(FAIRSEQ, CODES, frame="__en__ $A </s>"),
        {
            key: value
            for key, value in BART_TOKENS.items()
            if key not in ("cls_token", "mask_token")
        },
        {
            "src_lang": "en",
            "tgt_lang": None,
            "language_codes": "m2m100",
            "additional_special_tokens": [*CODES],
        },
    ),
}

# --------------------------------------------------------------------------------------------------
# Types
# --------------------------------------------------------------------------------------------------

WINDOW = 128
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": WINDOW,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
LLAMA = {**GROUPED, "head_dim": 16, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": WINDOW}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": WINDOW,
}

TINY = {**SMALL, "hidden_size": 16, "intermediate_size": 32}
WIDE = {**TINY, "num_attention_heads": 2}
NEO = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 6,
    "max_position_embeddings": WINDOW,
}
FEW = {"d_model": 16, "tie_word_embeddings": False}
LITTLE_BART = {**BART, "d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}

# Without these nearly every token would be followed by itself.
T5_GAINS = {"shared": 3.0, "relative_attention_bias": 3.0}
BART_GAINS = {"shared": 1.0, "embed_positions": 1.0, "out_proj": 0.5, "q_proj": 3.0, "k_proj": 3.0}

TYPES: tuple[GeneratorType, ...] = (
    GeneratorType(name="gpt2", model_type="gpt2", config=GPT, rich=True),
    GeneratorType(name="llama", model_type="llama", config=LLAMA, tokenizer="llama", rich=True),
    GeneratorType(
        name="llama-fused",
        model_type="llama",
        config=LLAMA,
        tokenizer="llama",
        graph="fused",
        weights_of="llama",
        padded=False,
    ),
    GeneratorType(
        name="t5",
        model_type="t5",
        config=T5,
        tokenizer="t5",
        tokenizer_class="T5Tokenizer",
        generation={"decoder_start_token_id": "<pad>"},
        seq2seq=True,
        rich=True,
        gains=T5_GAINS,
    ),
    GeneratorType(
        name="bart",
        model_type="bart",
        config=BART,
        tokenizer="bart",
        tokenizer_class="BartTokenizer",
        generation={
            "decoder_start_token_id": "</s>",
            "forced_bos_token_id": "<s>",
            "forced_eos_token_id": "</s>",
        },
        seq2seq=True,
        rich=True,
        gains=BART_GAINS,
    ),
    GeneratorType(
        name="qwen2",
        model_type="qwen2",
        config={**TINY, "num_key_value_heads": 2, "tie_word_embeddings": True},
        tokenizer="chat",
        tokenizer_class="Qwen2Tokenizer",
    ),
    GeneratorType(
        name="qwen3",
        model_type="qwen3",
        config={**TINY, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
        tokenizer="chat",
        tokenizer_class="Qwen2Tokenizer",
    ),
    GeneratorType(
        name="gemma",
        model_type="gemma",
        config={**TINY, "num_key_value_heads": 1, "head_dim": 8},
        tokenizer="gemma",
        tokenizer_class="GemmaTokenizer",
    ),
    GeneratorType(
        name="gemma2",
        model_type="gemma2",
        config={
            **TINY,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 6,
        },
        tokenizer="gemma",
        tokenizer_class="GemmaTokenizer",
    ),
    GeneratorType(
        name="gemma3-text",
        model_type="gemma3_text",
        config={
            **TINY,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        tokenizer="gemma",
        tokenizer_class="GemmaTokenizer",
    ),
    GeneratorType(
        name="mistral",
        model_type="mistral",
        config={**TINY, "num_key_value_heads": 2, "sliding_window": 6},
        tokenizer="llama",
    ),
    GeneratorType(name="phi", model_type="phi", config={**WIDE, "partial_rotary_factor": 0.5}),
    GeneratorType(
        name="phi3",
        model_type="phi3",
        config={**TINY, "num_key_value_heads": 2},
        tokenizer="llama",
    ),
    GeneratorType(name="gpt-neo", model_type="gpt_neo", config=NEO),
    GeneratorType(name="gpt-neox", model_type="gpt_neox", config={**WIDE, "rotary_pct": 0.25}),
    GeneratorType(
        name="gptj",
        model_type="gptj",
        config={**GPT, "n_embd": 16, "n_inner": 32, "rotary_dim": 2, "tie_word_embeddings": False},
    ),
    GeneratorType(
        name="opt",
        model_type="opt",
        config={**TINY, "ffn_dim": 32, "word_embed_proj_dim": 16},
        tokenizer="opt",
        tokenizer_class="GPT2Tokenizer",
        gains={"embed_positions": 1.0},
    ),
    GeneratorType(
        name="bloom",
        model_type="bloom",
        config={"hidden_size": 16, "n_layer": 2, "n_head": 4},
        tokenizer="llama",
        tokenizer_class="BloomTokenizerFast",
        graph="bloom",
    ),
    GeneratorType(
        name="bloom-new",
        model_type="bloom",
        config={"hidden_size": 16, "n_layer": 2, "n_head": 4},
        tokenizer="llama",
        tokenizer_class="BloomTokenizerFast",
        weights_of="bloom",
    ),
    GeneratorType(
        name="falcon",
        model_type="falcon",
        config={**TINY, "multi_query": True, "ffn_hidden_size": 32, "alibi": False},
    ),
    GeneratorType(
        name="gpt-bigcode",
        model_type="gpt_bigcode",
        config={**GPT, "n_embd": 16, "n_inner": 32, "multi_query": True},
        graph="bigcode",
    ),
    GeneratorType(
        name="stablelm",
        model_type="stablelm",
        config={**WIDE, "num_key_value_heads": 2, "partial_rotary_factor": 0.25},
    ),
    GeneratorType(
        name="starcoder2",
        model_type="starcoder2",
        config={**TINY, "num_key_value_heads": 2, "sliding_window": 6},
        graph="as_llama",
    ),
    GeneratorType(name="olmo", model_type="olmo", config={**TINY, "clip_qkv": 4.0}),
    GeneratorType(name="olmo2", model_type="olmo2", config={**TINY, "num_key_value_heads": 2}),
    GeneratorType(
        name="granite",
        model_type="granite",
        config={
            **TINY,
            "num_key_value_heads": 2,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.4,
            "logits_scaling": 1.5,
        },
    ),
    GeneratorType(
        name="smollm3",
        model_type="smollm3",
        config={**TINY, "num_key_value_heads": 2, "no_rope_layers": [1, 0]},
        tokenizer="chat",
    ),
    GeneratorType(
        name="cohere",
        model_type="cohere",
        config={**TINY, "num_key_value_heads": 2, "logit_scale": 1.0},
        tokenizer="llama",
    ),
    # Layers that keep something else than keys and values.
    GeneratorType(
        name="lfm2",
        model_type="lfm2",
        config={
            **TINY,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "block_auto_adjust_ff_dim": False,
            "layer_types": ["conv", "full_attention", "conv"],
        },
        tokenizer="chat",
        graph="hybrid",
        padded=False,
    ),
    GeneratorType(
        name="granitemoehybrid",
        model_type="granitemoehybrid",
        config={
            **TINY,
            "num_key_value_heads": 2,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 0,
            "shared_intermediate_size": 32,
            "attention_multiplier": 0.5,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_d_conv": 4,
            "mamba_chunk_size": 8,
            "tie_word_embeddings": True,
        },
        tokenizer="chat",
        graph="hybrid",
    ),
    # Llamas whose graphs take and give other things.
    *(
        GeneratorType(
            name=f"llama-{graph}",
            model_type="llama",
            config={**TINY, "num_key_value_heads": 2, "tie_word_embeddings": True},
            tokenizer="llama",
            graph=graph,
        )
        for graph in ("kept", "positionless", "uncached", "merged")
    ),
    GeneratorType(
        name="mt5",
        model_type="mt5",
        config={**T5, **FEW, "d_kv": 4, "d_ff": 24, "feed_forward_proj": "gated-gelu"},
        tokenizer="t5",
        tokenizer_class="T5Tokenizer",
        generation={"decoder_start_token_id": "<pad>"},
        seq2seq=True,
        gains=T5_GAINS,
    ),
    GeneratorType(
        name="longt5",
        model_type="longt5",
        config={**T5, **FEW, "d_kv": 4, "d_ff": 24, "local_radius": 5},
        tokenizer="t5",
        tokenizer_class="T5Tokenizer",
        generation={"decoder_start_token_id": "<pad>"},
        seq2seq=True,
        gains=T5_GAINS,
    ),
    GeneratorType(
        name="mbart",
        model_type="mbart",
        config={**LITTLE_BART, "scale_embedding": True},
        tokenizer="mbart",
        tokenizer_class="MBart50Tokenizer",
        generation={"decoder_start_token_id": "</s>", "forced_eos_token_id": "</s>"},
        seq2seq=True,
        target="de_DE",
        gains=BART_GAINS,
    ),
    GeneratorType(
        name="marian",
        model_type="marian",
        config={**LITTLE_BART, "scale_embedding": True},
        tokenizer="marian",
        tokenizer_class="MarianTokenizer",
        generation={
            "bad_words_ids": [["<pad>"]],
            "decoder_start_token_id": "<pad>",
            "forced_eos_token_id": "</s>",
            "max_length": 64,
            "num_beams": 4,
        },
        seq2seq=True,
        gains=BART_GAINS,
    ),
    GeneratorType(
        name="m2m-100",
        model_type="m2m_100",
        config={**LITTLE_BART, "scale_embedding": True},
        tokenizer="m2m_100",
        tokenizer_class="M2M100Tokenizer",
        generation={"decoder_start_token_id": "</s>", "early_stopping": True, "num_beams": 5},
        seq2seq=True,
        target="__de__",
        gains=BART_GAINS,
    ),
    GeneratorType(
        name="blenderbot",
        model_type="blenderbot",
        config={**LITTLE_BART, "scale_embedding": True},
        tokenizer="blenderbot",
        tokenizer_class="BlenderbotTokenizer",
        generation={
            "decoder_start_token_id": "<s>",
            "forced_eos_token_id": "</s>",
            "max_length": 60,
            "min_length": 12,
            "encoder_no_repeat_ngram_size": 3,
            "no_repeat_ngram_size": 3,
            "length_penalty": 0.65,
            "num_beams": 10,
        },
        seq2seq=True,
        gains=BART_GAINS,
    ),
    GeneratorType(
        name="pegasus",
        model_type="pegasus",
        config={**LITTLE_BART, "scale_embedding": True},
        tokenizer="pegasus",
        tokenizer_class="PegasusTokenizer",
        generation={
            "decoder_start_token_id": "<pad>",
            "forced_eos_token_id": "</s>",
            "length_penalty": 0.8,
            "max_length": 64,
            "num_beams": 8,
        },
        seq2seq=True,
        gains=BART_GAINS,
    ),
)

# --------------------------------------------------------------------------------------------------
# Graphs
# --------------------------------------------------------------------------------------------------


def export_cached(model: PreTrainedModel, folder: Path) -> None:
    """The graph or graphs that optimum makes, which take and give the cache."""
    seq2seq = model.config.is_encoder_decoder
    task = "text2text-generation-with-past" if seq2seq else "text-generation-with-past"
    files = ("encoder_model", "decoder_model_merged") if seq2seq else ("model",)
    _export(model, folder, task, files)


def _export(
    model: PreTrainedModel, folder: Path, task: str, files: Sequence[str], **options: Any
) -> None:
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        onnx_export_from_model(
            copy.deepcopy(model), name, task=task, opset=18, do_validation=False, **options
        )
        for one in files:
            save(onnx.load(Path(name) / f"{one}.onnx"), folder / f"{one}.onnx")


def save(proto: onnx.ModelProto, file: Path) -> None:
    """Write a graph, made small."""
    share(proto.graph)
    shorten(proto)
    onnx.save(proto, file)
    onnx.checker.check_model(str(file))


def export_fused(model: PreTrainedModel, folder: Path) -> None:
    """A llama's graph of operators that ONNX Runtime has for it."""
    config = model.config
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    constants: dict[str, Array] = {}
    nodes: list[onnx.NodeProto] = []

    def constant(name: str, value: Array) -> str:
        constants[name] = np.ascontiguousarray(value)
        return name

    def node(op: str, inputs: Sequence[str], *outputs: str, domain: str = "", **more: Any) -> str:
        nodes.append(onnx.helper.make_node(op, inputs, outputs, domain=domain, **more))
        return outputs[0]

    def linear(name: str, given: str) -> str:
        return node("MatMul", [given, constant(name, weights[f"{name}.weight"].T)], f"{name}.out")

    ones = constant("axis", np.array([1], np.int64))
    node("ReduceSum", ["attention_mask", ones], "count", keepdims=1)
    node("Sub", ["count", ones], "last")
    node("Cast", ["last"], "seqlens_k", to=onnx.TensorProto.INT32)
    node("Shape", ["attention_mask"], "shape", start=1, end=2)
    node("Cast", ["shape"], "total_long", to=onnx.TensorProto.INT32)
    node("Squeeze", ["total_long"], "total")
    inverse = 1.0 / config.rope_theta ** (np.arange(0, size, 2, dtype=np.float32) / size)
    angles = np.outer(np.arange(config.max_position_embeddings, dtype=np.float32), inverse)
    cos = constant("cos", np.cos(angles).astype(np.float32))
    sin = constant("sin", np.sin(angles).astype(np.float32))
    words = constant("words", weights["model.embed_tokens.weight"])
    hidden = node("Gather", [words, "input_ids"], "embedded")
    norm = {"epsilon": config.rms_norm_eps}
    name = "model.layers.0.input_layernorm"
    node(
        "SimplifiedLayerNormalization",
        [hidden, constant(name, weights[f"{name}.weight"])],
        "normal.0",
        axis=-1,
        **norm,
    )
    normal, residual = "normal.0", hidden
    layers = config.num_hidden_layers
    for layer in range(layers):
        base = f"model.layers.{layer}"
        projected = [linear(f"{base}.self_attn.{one}_proj", normal) for one in "qkv"]
        past = [f"past_key_values.{layer}.{one}" for one in ("key", "value")]
        present = [f"present.{layer}.{one}" for one in ("key", "value")]
        attended = node(
            "GroupQueryAttention",
            [*projected, *past, "seqlens_k", "total", cos, sin],
            f"{base}.attended",
            *present,
            domain="com.microsoft",
            num_heads=heads,
            kv_num_heads=kv_heads,
            do_rotary=1,
            rotary_interleaved=0,
            scale=size**-0.5,
        )
        added = linear(f"{base}.self_attn.o_proj", attended)
        name = f"{base}.post_attention_layernorm"
        normal, residual = _skip(node, constant, weights, name, residual, added, norm)
        gate = linear(f"{base}.mlp.gate_proj", normal)
        curved = node("Sigmoid", [gate], f"{base}.sigmoid")
        gated = node("Mul", [gate, curved], f"{base}.silu")
        up = node("Mul", [gated, linear(f"{base}.mlp.up_proj", normal)], f"{base}.up")
        added = linear(f"{base}.mlp.down_proj", up)
        last = layer == layers - 1
        name = "model.norm" if last else f"model.layers.{layer + 1}.input_layernorm"
        normal, residual = _skip(node, constant, weights, name, residual, added, norm)
    node("Transpose", [words], "head", perm=[1, 0])
    node("MatMul", [normal, "head"], "logits")

    def value(name: str, kind: int, *shape: str | int) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, kind, shape)

    longs, floats = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    total = "total_sequence_length"
    inputs = [
        value("input_ids", longs, "batch_size", "sequence_length"),
        value("attention_mask", longs, "batch_size", total),
    ]
    outputs = [value("logits", floats, "batch_size", "sequence_length", config.vocab_size)]
    for layer in range(layers):
        for one in ("key", "value"):
            shapes = ("batch_size", kv_heads, "past_sequence_length", size)
            inputs.append(value(f"past_key_values.{layer}.{one}", floats, *shapes))
            shapes = ("batch_size", kv_heads, total, size)
            outputs.append(value(f"present.{layer}.{one}", floats, *shapes))
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = onnx.helper.make_graph(nodes, "llama", inputs, outputs, tensors)
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("com.microsoft", 1)]
    proto = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    shorten(proto)
    onnx.save(proto, folder / "model.onnx")


def _skip(
    node: Any, constant: Any, weights: Any, name: str, residual: str, added: str, norm: Any
) -> tuple[str, str]:
    """Add to the residual stream and normalise it: the two of them."""
    weight = constant(name, weights[f"{name}.weight"])
    outputs = (f"{name}.out", "", "", f"{name}.sum")
    node(
        "SkipSimplifiedLayerNormalization",
        [residual, added, weight],
        *outputs,
        domain="com.microsoft",
        **norm,
    )
    return outputs[0], outputs[3]


class _Positionless(LlamaOnnxConfig):  # type: ignore[misc]
    """What optimum makes of a llama, without positions: the graph counts them itself."""

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        """What the graph takes."""
        return {name: axes for name, axes in super().inputs.items() if name != "position_ids"}


def _custom(config: type[LlamaOnnxConfig], *, past: bool = True) -> Callable[..., None]:
    """An exporter with a config that optimum does not have for the type."""

    def export(model: PreTrainedModel, folder: Path) -> None:
        task = "text-generation"
        given = config(model.config, task, use_past=past, use_past_in_inputs=past)
        task += "-with-past" * past
        _export(model, folder, task, ("model",), custom_onnx_configs={"model": given})

    return export


def export_merged(model: PreTrainedModel, folder: Path) -> None:
    """A decoder with two branches, of which only one reads a cache."""
    task = "text-generation"
    with tempfile.TemporaryDirectory() as name:
        parts = {
            "first": LlamaOnnxConfig(model.config, task, use_past=True, use_past_in_inputs=False),
            "later": LlamaOnnxConfig(model.config, task, use_past=True, use_past_in_inputs=True),
        }
        for part, config in parts.items():
            file = Path(name) / f"{part}.onnx"
            optimum_export(copy.deepcopy(model), config, file, opset=18)
        file = Path(name) / "merged.onnx"
        merge_decoders(Path(name) / "first.onnx", Path(name) / "later.onnx", save_path=file)
        save(onnx.load(file), folder / "decoder_model_merged.onnx")


def export_kept(model: PreTrainedModel, folder: Path) -> None:
    """A graph that gives logits of as many last tokens as asked, or with 0 of all."""
    export_cached(model, folder)
    file = folder / "model.onnx"
    proto = onnx.load(file)
    graph = proto.graph
    (head,) = (node for node in graph.node if "logits" in node.output)
    place = [*graph.node].index(head)
    make = onnx.helper.make_node
    nodes = [
        make("Neg", ["num_logits_to_keep"], ["kept"]),
        make("Unsqueeze", ["kept", "kept_axis"], ["kept_start"]),
        make("Slice", [head.input[0], "kept_start", "kept_end", "kept_one"], ["kept_hidden"]),
    ]
    head.input[0] = "kept_hidden"
    for node in reversed(nodes):
        graph.node.insert(place, node)
    for name, number in (("kept_axis", 0), ("kept_end", 2**63 - 1), ("kept_one", 1)):
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([number]), name))
    longs = onnx.TensorProto.INT64
    graph.input.append(onnx.helper.make_tensor_value_info("num_logits_to_keep", longs, []))
    for one in graph.output:
        if one.name == "logits":
            one.type.tensor_type.shape.dim[1].dim_param = "num_logits_to_keep"
    shorten(proto)
    onnx.save(proto, file)
    onnx.checker.check_model(str(file))


def export_bloom(model: PreTrainedModel, folder: Path) -> None:
    """A cache as bloom once had it: heads beside the batch, and keys transposed."""
    heads = model.config.n_head
    size = model.config.hidden_size // heads

    def rewrite(given: str, found: str, kind: str, inward: bool) -> list[onnx.NodeProto]:
        make = onnx.helper.make_node
        nodes = []
        flat = given
        if inward and kind == "key":
            flat = f"{given}.turned"
            nodes.append(make("Transpose", [given], [flat], perm=[0, 2, 1]))
        shape = f"{given}.shape"
        if inward:  # [batch * heads, past, size] to [batch, heads, past, size]
            nodes += [
                make("Shape", [flat], [f"{shape}.rows"], start=0, end=1),
                make("Div", [f"{shape}.rows", "bloom.heads"], [f"{shape}.batch"]),
                make("Shape", [flat], [f"{shape}.past"], start=1, end=2),
                make(
                    "Concat",
                    [f"{shape}.batch", "bloom.heads", f"{shape}.past", "bloom.size"],
                    [shape],
                    axis=0,
                ),
                make("Reshape", [flat, shape], [found], allowzero=1),
            ]
            return nodes
        last = f"{given}.flat" if kind == "key" else found
        nodes += [
            make("Shape", [given], [f"{shape}.batch"], start=0, end=1),
            make("Mul", [f"{shape}.batch", "bloom.heads"], [f"{shape}.rows"]),
            make("Shape", [given], [f"{shape}.total"], start=2, end=3),
            make("Concat", [f"{shape}.rows", f"{shape}.total", "bloom.size"], [shape], axis=0),
            make("Reshape", [given, shape], [last], allowzero=1),
        ]
        if kind == "key":
            nodes.append(make("Transpose", [last], [found], perm=[0, 2, 1]))
        return nodes

    def shape_of(kind: str, length: str) -> list[str | int]:
        rows = f"batch_size x {heads}"
        return [rows, size, length] if kind == "key" else [rows, length, size]

    constants = {"bloom.heads": np.array([heads]), "bloom.size": np.array([size])}
    export_cached(model, folder)
    _recache(folder / "model.onnx", rewrite, shape_of, constants)


def _recache(
    file: Path,
    rewrite: Callable[[str, str, str, bool], list[onnx.NodeProto]],
    shape_of: Callable[[str, str], list[str | int]],
    constants: Mapping[str, Array],
) -> None:
    """Give the cache of a graph another layout, one tensor for another."""
    proto = onnx.load(file)
    graph = proto.graph
    before: list[onnx.NodeProto] = []
    after: list[onnx.NodeProto] = []
    renamed: dict[str, str] = {}
    for values, inward in ((graph.input, True), (graph.output, False)):
        for value in values:
            base, _, kind = value.name.rpartition(".")
            if not base.startswith(("past_key_values", "present")):
                continue
            inner = renamed[value.name] = f"inner.{value.name}"
            length = value.type.tensor_type.shape.dim[2].dim_param
            ends = (value.name, inner) if inward else (inner, value.name)
            (before if inward else after).extend(rewrite(*ends, kind, inward))
            floats = onnx.TensorProto.FLOAT
            value.CopyFrom(
                onnx.helper.make_tensor_value_info(value.name, floats, shape_of(kind, length))
            )
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    for name, array in constants.items():
        graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    shorten(proto)
    onnx.save(proto, file)
    onnx.checker.check_model(str(file))


def export_bigcode(model: PreTrainedModel, folder: Path) -> None:
    """A cache as gpt_bigcode once had it: keys and values of its one head in one tensor."""
    export_cached(model, folder)
    file = folder / "model.onnx"
    proto = onnx.load(file)
    graph = proto.graph
    size = model.config.n_embd // model.config.n_head
    make, floats = onnx.helper.make_node, onnx.TensorProto.FLOAT
    before, after = [], []
    for values, inward in ((graph.input, True), (graph.output, False)):
        kept = [one for one in values if not one.name.startswith(("past_key_values", "present"))]
        keys = [one for one in values if one not in kept and one.name.endswith(".key")]
        fused = []
        for key in keys:
            base = key.name.removesuffix(".key")
            pair, name = [f"{base}.key", f"{base}.value"], f"{base}.key_value"
            flat = [f"{one}.flat" for one in pair]
            if inward:
                before.append(make("Split", [name], flat, axis=2, num_outputs=2))
                before += [
                    make("Unsqueeze", [one, "heads_axis"], [found])
                    for one, found in zip(flat, pair, strict=True)
                ]
            else:
                after += [
                    make("Squeeze", [found, "heads_axis"], [one])
                    for one, found in zip(flat, pair, strict=True)
                ]
                after.append(make("Concat", flat, [name], axis=2))
            length = key.type.tensor_type.shape.dim[2].dim_param
            shape = ["batch_size", length, 2 * size]
            fused.append(onnx.helper.make_tensor_value_info(name, floats, shape))
        del values[:]
        values.extend([*kept, *fused])
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "heads_axis"))
    shorten(proto)
    onnx.save(proto, file)
    onnx.checker.check_model(str(file))


class _States:
    """A cache of layers of several kinds, as their code asks for one."""

    is_compileable = False
    has_previous_state = False

    def __init__(self, states: dict[str, torch.Tensor], mask: torch.Tensor) -> None:
        self.states = states
        self.mask = mask

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, _more: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of a layer, with the new ones."""
        for kind, new in (("key", keys), ("value", values)):
            name = f"past_key_values.{layer}.{kind}"
            self.states[name] = torch.cat([self.states[name], new], dim=2)
        found = (self.states[f"past_key_values.{layer}.{kind}"] for kind in ("key", "value"))
        return tuple(found)  # type: ignore[return-value]

    def convolve(self, layer: int, new: torch.Tensor, conv: torch.nn.Conv1d) -> torch.Tensor:
        """A causal convolution over what is kept and what is new: [batch, channels, length]."""
        name = f"past_conv.{layer}"
        both = torch.cat([self.states[name], new], dim=2)
        self.states[name] = both[:, :, -conv.kernel_size[0] :]
        found = torch.nn.functional.conv1d(both, conv.weight, conv.bias, groups=conv.groups)
        return found[:, :, 1:]

    def get_seq_length(self, _layer: int = 0) -> Any:
        """How many tokens have been read."""
        return next(one for name, one in self.states.items() if name.endswith("key")).shape[2]

    def get_mask_sizes(self, _position: torch.Tensor, _layer: int) -> tuple[Any, int]:
        """How long a mask is, and where it begins."""
        return self.mask.shape[1], 0


def _short_convolution(
    self: Any, hidden_states: torch.Tensor, past_key_values: _States, *_: Any, **__: Any
) -> torch.Tensor:
    """A convolution of lfm2."""
    before, after, given = self.in_proj(hidden_states).transpose(1, 2).chunk(3, dim=1)
    found = after * past_key_values.convolve(self.layer_idx, before * given, self.conv)
    return self.out_proj(found.transpose(1, 2))


def _state_space(
    self: Any, hidden_states: torch.Tensor, cache_params: _States, attention_mask: Any, **_: Any
) -> torch.Tensor:
    """A state space layer in one piece: every token sees every earlier one, as far as it decays."""
    batch, length, _width = hidden_states.shape
    read = attention_mask[:, -length:, None].to(hidden_states.dtype)
    sizes = [self.intermediate_size, self.conv_dim, self.num_heads]
    gate, inner, steps = self.in_proj(hidden_states * read).split(sizes, dim=-1)
    inner = cache_params.convolve(self.layer_idx, inner.transpose(1, 2), self.conv1d)
    inner = self.act(inner).transpose(1, 2) * read
    states = self.n_groups * self.ssm_state_size
    values, inward, outward = inner.split([self.intermediate_size, states, states], dim=-1)
    values = values.reshape(batch, length, self.num_heads, self.head_dim)
    each = self.num_heads // self.n_groups
    inward, outward = (
        one.reshape(batch, length, self.n_groups, 1, self.ssm_state_size)
        .expand(batch, length, self.n_groups, each, self.ssm_state_size)
        .reshape(batch, length, self.num_heads, self.ssm_state_size)
        for one in (inward, outward)
    )
    steps = torch.nn.functional.softplus(steps + self.dt_bias).clamp(*self.time_step_limit)
    decay = (steps * -torch.exp(self.A_log)).cumsum(1)  # [batch, length, heads], never rising
    places = torch.arange(length)
    earlier = (places[:, None] >= places[None, :])[None, :, :, None]
    apart = torch.where(earlier, decay[:, :, None] - decay[:, None, :], torch.tensor(-1e4))
    strength = torch.einsum("bthn,bshn->btsh", outward, inward) * torch.exp(apart)
    taken = values * steps[..., None]
    found = torch.einsum("btsh,bshd->bthd", strength, taken)
    name = f"past_ssm.{self.layer_idx}"
    old = cache_params.states[name]  # [batch, heads, head_dim, state]
    found = found + torch.einsum("bthn,bhdn->bthd", outward, old) * torch.exp(decay)[..., None]
    left = torch.exp(decay[:, -1:] - decay)
    new = torch.einsum("bshd,bshn->bhdn", taken * left[..., None], inward)
    cache_params.states[name] = old * torch.exp(decay[:, -1])[..., None, None] + new
    found = (found + values * self.D[:, None]).reshape(batch, length, -1)
    return self.out_proj(self.norm(found, gate))


class _Hybrid(torch.nn.Module):
    """A model whose cache comes and goes as tensors."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, *states: torch.Tensor) -> Any:
        """Logits, and the cache in the order it came in."""
        cache = _States(dict(zip(self.names, states, strict=True)), mask)
        length = ids.shape[1]
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -length:]
        found = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            cache_position=torch.arange(mask.shape[1])[-length:],
            use_cache=True,
        )
        return (found["logits"], *(cache.states[name] for name in self.names))


def _causal(
    mask: torch.Tensor, given: torch.Tensor, position: torch.Tensor, *_: Any
) -> torch.Tensor:
    """A mask of what is not to be seen."""
    seen = torch.arange(mask.shape[1])[None, :] <= position[:, None]
    seen = seen[None, None] & mask[:, None, None, :].bool()
    return torch.where(seen, 0.0, torch.finfo(given.dtype).min)


def export_hybrid(model: PreTrainedModel, folder: Path) -> None:
    """A graph whose layers keep keys and values, convolutions or states."""
    model = copy.deepcopy(model)
    config = model.config
    states: dict[str, tuple[int, ...]] = {}
    axes: dict[str, dict[int, str]] = {}
    for layer, module in enumerate(model.model.layers):
        attention = getattr(module, "self_attn", None)
        mixer = getattr(module, "conv", None) or getattr(module, "mamba", None)
        if attention is not None:
            heads, size = config.num_key_value_heads, attention.head_dim
            for kind in ("key", "value"):
                states[f"past_key_values.{layer}.{kind}"] = (2, heads, 3, size)
        elif hasattr(mixer, "ssm_state_size"):
            states[f"past_conv.{layer}"] = (2, mixer.conv_dim, mixer.conv_kernel_size)
            sizes = (mixer.num_heads, mixer.head_dim, mixer.ssm_state_size)
            states[f"past_ssm.{layer}"] = (2, *sizes)
            mixer.forward = types.MethodType(_state_space, mixer)
        else:
            states[f"past_conv.{layer}"] = (2, config.hidden_size, mixer.L_cache)
            mixer.forward = types.MethodType(_short_convolution, mixer)
    if hasattr(model.model, "_update_mamba_mask"):
        model.model._update_mamba_mask = lambda mask, _position: mask
        model.model._update_causal_mask = _causal
    presents = []
    for name in states:
        given = name.replace("past_key_values", "present").replace("past_", "present_")
        presents.append(given)
        for one, long in ((name, "past_sequence_length"), (given, "total_sequence_length")):
            axes[one] = {0: "batch_size"} | ({2: long} if "key_values" in name else {})
    tokens = {0: "batch_size", 1: "sequence_length"}
    axes |= {"input_ids": tokens, "logits": tokens}
    axes["attention_mask"] = {0: "batch_size", 1: "total_sequence_length"}
    ids = torch.arange(10).reshape(2, 5)
    values = [torch.randn(shape) for shape in states.values()]
    given = LlamaOnnxConfig(config, "text-generation", use_past=True, use_past_in_inputs=True)
    file = folder / "model.onnx"
    patcher = given.patch_model_for_export(model)
    with patcher, torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        model.forward = patcher.orig_forward
        torch.onnx.export(
            _Hybrid(model, [*states]).eval(),
            (ids, torch.ones(2, 8, dtype=torch.int64), *values),
            str(file),
            input_names=["input_ids", "attention_mask", *states],
            output_names=["logits", *presents],
            dynamic_axes=axes,
            opset_version=18,
            dynamo=False,
        )
    save(onnx.load(file), file)


EXPORTERS: Mapping[str, Callable[[PreTrainedModel, Path], None]] = {
    "cached": export_cached,
    "fused": export_fused,
    "positionless": _custom(_Positionless),
    "as_llama": _custom(LlamaOnnxConfig),
    "uncached": _custom(_Positionless, past=False),
    "merged": export_merged,
    "kept": export_kept,
    "bloom": export_bloom,
    "bigcode": export_bigcode,
    "hybrid": export_hybrid,
}

# --------------------------------------------------------------------------------------------------
# Running them
# --------------------------------------------------------------------------------------------------


TOLERANCE = 3e-4
"""How far logits may be off: less than the best two are apart."""


class Graphs:
    """The graphs of a folder, run greedily with their cache."""

    def __init__(self, folder: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3

        def session(name: str) -> ort.InferenceSession | None:
            file = folder / "onnx" / f"{name}.onnx"
            if not file.exists():
                return None
            return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])

        self.encoder = session("encoder_model")
        self.decoder = session("model") or session("decoder_model_merged")
        self.takes = {one.name: one for one in self.decoder.get_inputs()}
        self.gives = [one.name for one in self.decoder.get_outputs()]

    def write(
        self,
        ids: Array,
        mask: Array,
        count: int,
        config: GenerationConfig,
        followed: Array | None = None,
        **options: Any,
    ) -> tuple[Array, list[Array]]:
        """The tokens of a batch, and the logits that each was chosen by; or those to be written."""
        rows = len(ids)
        fixed: dict[str, Array] = {}
        if self.encoder:
            states = self.encoder.run(None, {"input_ids": ids, "attention_mask": mask})[0]
            fixed = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
            ids = np.full((rows, 1), config.decoder_start_token_id, np.int64)
            mask = np.ones_like(ids)
        past = {
            name: np.zeros(self._empty(one, rows), np.float32)
            for name, one in self.takes.items()
            if name.startswith("past")
        }
        forced = {0: options.get("forced_bos_token_id", config.forced_bos_token_id)}
        forced[count - 1] = options.get("forced_eos_token_id", config.forced_eos_token_id)
        written, seen = [], []
        fed = ids
        for step in range(count):
            positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -fed.shape[1] :]
            feeds = {
                "input_ids": fed,
                "attention_mask": mask,
                "position_ids": positions,
                "use_cache_branch": np.array([step > 0]),
                "num_logits_to_keep": np.array(1, np.int64),
                **fixed,
                **past,
            }
            found = dict(
                zip(
                    self.gives,
                    self.decoder.run(
                        None, {name: one for name, one in feeds.items() if name in self.takes}
                    ),
                    strict=True,
                )
            )
            logits = found["logits"][:, -1].copy()
            seen.append(logits.copy())
            for word in config.bad_words_ids or ():
                logits[:, word] = -np.inf
            chosen = logits.argmax(-1)
            if forced.get(step) is not None:
                chosen[:] = forced[step]
            if followed is not None:
                chosen = followed[:, step]
            written.append(chosen)
            mask = np.concatenate([mask, np.ones((rows, 1), np.int64)], 1)
            ids = np.concatenate([ids, chosen[:, None]], 1)
            fed = chosen[:, None] if past else ids
            for name in past:
                if ".encoder." in name and step > 0:
                    continue  # given by the first step only
                past[name] = found[
                    name.replace("past_key_values", "present").replace("past_", "present_")
                ]
        return np.stack(written, 1), seen

    def _empty(self, one: Any, rows: int) -> list[int]:
        """The shape of an empty cache."""
        shape = []
        for size in one.shape:
            if isinstance(size, int):
                shape.append(size)
            elif " x " in size:
                shape.append(rows * int(size.rpartition(" ")[2]))
            else:
                shape.append(rows if "batch" in size else 0)
        return shape


def check_graphs(
    folder: Path, model: PreTrainedModel, tokenizer: Any, cases: Sequence[Mapping[str, Any]]
) -> float:
    """Check that the graphs write what torch wrote; return how far logits are off at most."""
    graphs = Graphs(folder)
    worst = 0.0
    for case in cases:
        padded = tokenizer.pad({"input_ids": case["input_ids"]}, return_tensors="np")
        ids, mask = padded["input_ids"], padded["attention_mask"]
        options = dict(case["options"])
        count = options.pop("max_new_tokens")
        config = model.generation_config
        # With the processors of logits in it, no argmax says what comes next.
        followed = np.array(case["ids"]) if config.no_repeat_ngram_size else None
        written, seen = graphs.write(ids, mask, count, config, followed, **options)
        for row, wanted in zip(written.tolist(), case["ids"], strict=True):
            if row[: len(wanted)] != wanted:
                raise AssertionError(f"{case['name']}: the graph wrote {row} and not {wanted}")
        given = {"input_ids": ids, "attention_mask": mask}
        fed = {name: torch.from_numpy(value) for name, value in given.items()}
        more = {} if model.generation_config.pad_token_id is not None else {"pad_token_id": 0}
        found = model.generate(
            **fed,
            **{"do_sample": False, **case["options"], **more},
            output_logits=True,
            return_dict_in_generate=True,
        )
        for step, logits in enumerate(found.logits):
            alive = np.array([step < len(wanted) for wanted in case["ids"]])
            off = np.abs(logits.numpy() - seen[step])[alive].max()
            worst = max(worst, float(off))
            if not off < TOLERANCE:
                raise AssertionError(f"{case['name']}: logits of step {step} are off by {off:.1e}")
    return worst
