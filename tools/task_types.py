"""The types of text encoders that `make_tasks.py` makes: one entry each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PLAIN = ("input_ids", "attention_mask")
WITH_TYPES = ("input_ids", "attention_mask", "token_type_ids")

COMMON = ("sequence", "token", "span", "mask")
EVERY = ("sequence", "several", "value", "rank", "nli", "token", "span", "mask")

WINDOW = 64
"""How many tokens the models read at most: long texts stay short, and so do their goldens."""


@dataclass(frozen=True)
class ModelType:
    """One type of model.

    Attributes:
        name: Its `model_type`, and its folder in tests/models.
        config: Its sizes.
        tokenizer: A key of `TOKENIZERS`.
        tokenizer_class: What tokenizer_config.json calls it.
        inputs: What its graphs take.
        heads: Keys of `HEADS`.
        window: How many tokens it reads at most.
        names_window: Whether tokenizer_config.json says so; otherwise the positions alone do.
        own_tokenizer_class: Whether `transformers` has a fast tokenizer of this type.
        scale: The deviation of its weights.
        texts: A key of `TEXTS`.
        of_head: More config for some heads.
    """

    name: str
    config: Mapping[str, Any]
    tokenizer: str
    tokenizer_class: str
    inputs: tuple[str, ...] = WITH_TYPES
    heads: tuple[str, ...] = COMMON
    window: int = WINDOW
    names_window: bool = True
    own_tokenizer_class: bool = True
    scale: float = 0.4
    texts: str = "prose"
    of_head: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


SMALL = {
    "hidden_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": WINDOW,
}
AFTER_PADDING = {**SMALL, "max_position_embeddings": WINDOW + 2, "type_vocab_size": 1}
"""Positions begin at `pad_token_id` + 1 = 2."""

NLI_FIRST = {"id2label": {0: "ENTAILMENT", 1: "NEUTRAL", 2: "CONTRADICTION"}}
NLI_TWO = {"id2label": {0: "entailment", 1: "not_entailment"}}

TYPES: tuple[ModelType, ...] = (
    ModelType(
        name="bert",
        config={**SMALL, "num_hidden_layers": 2},
        tokenizer="wordpiece",
        tokenizer_class="BertTokenizer",
        heads=(*EVERY, "wide", "tail", "tail_token"),
        scale=0.3,
    ),
    ModelType(
        name="distilbert",
        config={
            "dim": 12,
            "n_layers": 1,
            "n_heads": 2,
            "hidden_dim": 24,
            "max_position_embeddings": WINDOW,
        },
        tokenizer="wordpiece",
        tokenizer_class="DistilBertTokenizer",
        inputs=PLAIN,
        heads=(*COMMON, "several"),
    ),
    ModelType(
        name="roberta",
        config=AFTER_PADDING,
        tokenizer="roberta",
        tokenizer_class="RobertaTokenizer",
        inputs=PLAIN,
        heads=EVERY,
        of_head={"nli": NLI_FIRST},
    ),
    ModelType(
        name="xlm-roberta",
        config=AFTER_PADDING,
        tokenizer="xlm-roberta",
        tokenizer_class="XLMRobertaTokenizer",
        inputs=PLAIN,
        heads=(*COMMON, "rank", "nli"),
        # An older model's own activation, which keeps the plain score.
        of_head={
            "rank": {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}
        },
    ),
    ModelType(
        name="camembert",
        config=AFTER_PADDING,
        tokenizer="camembert",
        tokenizer_class="CamembertTokenizer",
        inputs=PLAIN,
    ),
    # The head of sequences has no labels of its own: LABEL_0 and LABEL_1.
    ModelType(
        name="electra",
        config={**SMALL, "embedding_size": 8},
        tokenizer="wordpiece",
        tokenizer_class="ElectraTokenizer",
        of_head={"sequence": {"id2label": {0: "LABEL_0", 1: "LABEL_1"}}},
    ),
    ModelType(
        name="albert",
        config={**SMALL, "embedding_size": 10},
        tokenizer="albert",
        tokenizer_class="AlbertTokenizer",
        heads=(*COMMON, "value"),
    ),
    ModelType(
        name="mpnet",
        config={**AFTER_PADDING, "bos_token_id": 0, "eos_token_id": 2},
        tokenizer="mpnet",
        tokenizer_class="MPNetTokenizer",
        inputs=PLAIN,
    ),
    ModelType(
        name="deberta",
        config={
            **SMALL,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "max_relative_positions": 16,
            "type_vocab_size": 2,
        },
        tokenizer="deberta",
        tokenizer_class="DebertaTokenizer",
    ),
    # As version 3 has it: no positions and no types of its own.
    ModelType(
        name="deberta-v2",
        config={
            **SMALL,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
        tokenizer="deberta-v2",
        tokenizer_class="DebertaV2Tokenizer",
        inputs=PLAIN,
        heads=(*COMMON, "several", "nli"),
        of_head={"nli": NLI_TWO},
    ),
    ModelType(
        name="modernbert",
        config={
            **SMALL,
            "num_hidden_layers": 2,
            "global_attn_every_n_layers": 2,
            "local_attention": 16,
            "reference_compile": False,
        },
        tokenizer="modernbert",
        tokenizer_class="PreTrainedTokenizerFast",
        inputs=PLAIN,
        heads=(*COMMON, "rank"),
        scale=0.3,
        of_head={
            "rank": {
                "sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}
            }
        },
    ),
    ModelType(
        name="roformer",
        config={**SMALL, "embedding_size": 12},
        tokenizer="wordpiece",
        tokenizer_class="RoFormerTokenizer",
        own_tokenizer_class=False,
    ),
    ModelType(
        name="esm",
        config={**AFTER_PADDING, "position_embedding_type": "rotary", "token_dropout": True},
        tokenizer="esm",
        tokenizer_class="EsmTokenizer",
        inputs=PLAIN,
        heads=("sequence", "token", "mask"),
        own_tokenizer_class=False,
        texts="protein",
        # Labels that say nothing of beginnings.
        of_head={"token": {"id2label": {0: "helix", 1: "strand", 2: "coil"}}},
    ),
    ModelType(
        name="convbert",
        config={**SMALL, "embedding_size": 12, "conv_kernel_size": 3},
        tokenizer="wordpiece",
        tokenizer_class="ConvBertTokenizer",
    ),
    ModelType(
        name="xlm",
        config={
            "emb_dim": 12,
            "n_layers": 1,
            "n_heads": 2,
            "max_position_embeddings": WINDOW,
            "n_langs": 1,
        },
        tokenizer="xlm",
        tokenizer_class="XLMTokenizer",
        own_tokenizer_class=False,
    ),
    ModelType(
        name="mobilebert",
        config={
            **SMALL,
            "embedding_size": 8,
            "intra_bottleneck_size": 8,
            "num_feedforward_networks": 1,
        },
        tokenizer="wordpiece",
        tokenizer_class="MobileBertTokenizer",
        scale=0.25,  # nothing normalises
    ),
    ModelType(
        name="squeezebert",
        config={**SMALL, "embedding_size": 12, "intermediate_size": 32},
        tokenizer="wordpiece",
        tokenizer_class="SqueezeBertTokenizer",
    ),
    ModelType(
        name="ernie",
        config=SMALL,
        tokenizer="wordpiece",
        tokenizer_class="BertTokenizer",
    ),
    ModelType(
        name="megatron-bert",
        config=SMALL,
        tokenizer="wordpiece",
        tokenizer_class="BertTokenizer",
    ),
    ModelType(
        name="rembert",
        config={**SMALL, "input_embedding_size": 8, "output_embedding_size": 14},
        tokenizer="rembert",
        tokenizer_class="RemBertTokenizer",
    ),
    # Only the positions say how many tokens these two read.
    ModelType(
        name="data2vec-text",
        config=AFTER_PADDING,
        tokenizer="roberta",
        tokenizer_class="RobertaTokenizer",
        inputs=PLAIN,
        names_window=False,
    ),
    ModelType(
        name="roberta-prelayernorm",
        config=AFTER_PADDING,
        tokenizer="roberta",
        tokenizer_class="RobertaTokenizer",
        inputs=PLAIN,
        names_window=False,
    ),
)
