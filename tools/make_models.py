r"""Make the tiny models and the golden outputs that the tests compare Ebbtide with.

What it makes
    tests/models/<name>/         a model of random (seeded) weights in the Hugging Face layout:
                                 config.json, tokenizer.json, tokenizer_config.json,
                                 special_tokens_map.json and ONNX files, fp32 and for one model
                                 also in the usual smaller data types
    tests/goldens/<name>.json    the cases: texts, token ids, and the names of the arrays
    tests/goldens/<name>.npz     the arrays, computed by `transformers` in torch (fp32) on the same
                                 weights; and, for a model in sentence-transformers layout, by
                                 `SentenceTransformer.encode`

    Before a golden is written, the exported ONNX file has reproduced it in ONNX Runtime to within
    `TOLERANCE`, and `tokenizers` alone has reproduced the token ids from tokenizer.json.

How to run it
    It needs packages that Ebbtide itself does not need, best in a venv of their own with Python
    3.11 or later (a CPU build of torch is enough):

        pip install torch "transformers>=4.57,<5" "sentence-transformers>=5.1,<6" \
            tokenizers onnx onnxruntime sympy numpy
        python tools/make_models.py               # all models
        python tools/make_models.py tiny-bert     # only the named ones

    No network is used. Each named model's folder and goldens are replaced. Run twice with the same
    packages on one machine, it writes the same bytes.

How to add a model
    Add a `ModelSpec` to `SPECS`. A new kind of tokenizer is one more entry in `TOKENIZERS`.

The golden JSON
    {"model": name,
     "limit": the number of tokens at which `transformers` truncated,
     "onnx_file": the fp32 file, relative to the model's folder,
     "output": the ONNX output that the token level array holds,
     "sentence_limit": (sentence-transformers layout only) the limit of `sentence_embedding`,
     "versions": of the packages that computed the arrays,
     "cases": [{"name": ...,
                "texts": [a string, or {"words": [...], "repeat": N} for " ".join(words * N)],
                "input_ids": one list for each text, without padding,
                "sentence_input_ids": (sentence-transformers layout only) the same, at its limit,
                "arrays": {array's kind: its key in the npz}}]}

    The kinds of array, with B texts, S tokens after padding on the right, H the last dimension:
        last_hidden_state or logits   [B, S, H]  float32, padded rows included; not for `truncated`
        attention_mask                [B, S]     int64; not for `truncated`
        mean, mean_normalized, cls, eos, max, mean_sqrt_len, weighted_mean   [B, H]  float32
        sentence_embedding            [B, H]     float32, sentence-transformers layout only
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports below, which read it

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.transformers.float16 import convert_float_to_float16
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Normalize, Pooling, Transformer
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaModel,
)

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "tests" / "models"
GOLDENS = ROOT / "tests" / "goldens"

OPSET = 17
TOLERANCE = 1e-5  # of an fp32 ONNX file against torch, largest absolute difference
UNSET_LENGTH = int(1e30)  # what `transformers` writes as model_max_length when nobody set one

Array = np.ndarray[Any, np.dtype[Any]]

# --------------------------------------------------------------------------------------------------
# The models
# --------------------------------------------------------------------------------------------------

BERT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
PLAIN_INPUTS = ("input_ids", "attention_mask")
BERT_SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
DISTILBERT_SIZE = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}


@dataclass(frozen=True)
class ModelSpec:
    """One tiny model: its classes, its sizes, how it is stored, and where it truncates."""

    name: str
    seed: int
    config_class: type[PretrainedConfig]
    model_class: type[PreTrainedModel]
    config: Mapping[str, Any]
    tokenizer: str  # a key of TOKENIZERS
    tokenizer_class: str
    vocab_size: int
    limit: int  # tokens, [CLS] and [SEP] included: the oracle truncates here
    model_max_length: int | None  # in tokenizer_config.json; None leaves it out
    model_args: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[str, ...] = BERT_INPUTS
    output: str = "last_hidden_state"
    onnx_file: str = "onnx/model.onnx"
    variants: tuple[str, ...] = ()  # keys of VARIANTS, written beside the fp32 file
    external_data: bool = False  # weights in <onnx_file>_data
    short_tokenizer_json: bool = False  # tokenizer.json truncates and pads to 128, to be overridden
    extra_config: Mapping[str, Any] = field(default_factory=dict)  # into config.json
    sentence_limit: int | None = None  # set: sentence-transformers layout with this max_seq_length


SPECS: tuple[ModelSpec, ...] = (
    # The plain case, with every data type. As in the real all-MiniLM-L6-v2, tokenizer.json asks for
    # 128 tokens but the model takes 512.
    ModelSpec(
        name="tiny-bert",
        seed=1,
        config_class=BertConfig,
        model_class=BertModel,
        config={**BERT_SIZE, "max_position_embeddings": 512},
        model_args={"add_pooling_layer": False},
        tokenizer="wordpiece",
        tokenizer_class="BertTokenizer",
        vocab_size=1000,
        limit=512,
        model_max_length=512,
        variants=("fp16", "quantized", "int8", "uint8", "q4", "q4f16", "bnb4"),
        short_tokenizer_json=True,
    ),
    # sentence-transformers layout: mean pooling, normalised, at most 64 tokens.
    ModelSpec(
        name="tiny-bert-st",
        seed=2,
        config_class=BertConfig,
        model_class=BertModel,
        config={**BERT_SIZE, "max_position_embeddings": 512},
        model_args={"add_pooling_layer": False},
        tokenizer="wordpiece",
        tokenizer_class="BertTokenizer",
        vocab_size=1000,
        limit=512,
        model_max_length=512,
        short_tokenizer_json=True,
        sentence_limit=64,
    ),
    # No token_type_ids; the ONNX file is in the folder's root; the tokenizer's limit is smaller.
    ModelSpec(
        name="tiny-distilbert",
        seed=3,
        config_class=DistilBertConfig,
        model_class=DistilBertModel,
        config={**DISTILBERT_SIZE, "max_position_embeddings": 256},
        tokenizer="wordpiece",
        tokenizer_class="DistilBertTokenizer",
        vocab_size=600,
        limit=128,
        model_max_length=128,
        inputs=PLAIN_INPUTS,
        onnx_file="model.onnx",
    ),
    # Byte-level BPE. Positions start at padding_idx + 1 = 2, so 130 positions hold 128 tokens, and
    # the tokenizer names no limit.
    ModelSpec(
        name="tiny-roberta",
        seed=4,
        config_class=RobertaConfig,
        model_class=RobertaModel,
        config={
            **BERT_SIZE,
            "max_position_embeddings": 130,
            "type_vocab_size": 1,
            "bos_token_id": 0,
            "pad_token_id": 1,
            "eos_token_id": 2,
        },
        model_args={"add_pooling_layer": False},
        tokenizer="byte_level_bpe",
        tokenizer_class="RobertaTokenizer",
        vocab_size=600,
        limit=128,
        model_max_length=UNSET_LENGTH,
        inputs=PLAIN_INPUTS,
    ),
    # Weights in external data.
    ModelSpec(
        name="tiny-external",
        seed=5,
        config_class=BertConfig,
        model_class=BertModel,
        config={**BERT_SIZE, "max_position_embeddings": 128},
        model_args={"add_pooling_layer": False},
        tokenizer="wordpiece",
        tokenizer_class="BertTokenizer",
        vocab_size=600,
        limit=128,
        model_max_length=128,
        external_data=True,
        extra_config={"transformers.js_config": {"use_external_data_format": True}},
    ),
    # No hidden state among the outputs; tokenizer_config.json has no model_max_length at all.
    ModelSpec(
        name="tiny-mlm",
        seed=6,
        config_class=BertConfig,
        model_class=BertForMaskedLM,
        config={**BERT_SIZE, "max_position_embeddings": 128},
        tokenizer="wordpiece",
        tokenizer_class="BertTokenizer",
        vocab_size=300,  # small, for the logits are this wide
        limit=128,
        model_max_length=None,
        output="logits",
    ),
)

# --------------------------------------------------------------------------------------------------
# The cases
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LongText:
    """A text too long to store: `words`, `repeat` times over, with single spaces between."""

    words: tuple[str, ...]
    repeat: int

    def __str__(self) -> str:
        """The whole text."""
        return " ".join(self.words * self.repeat)


@dataclass(frozen=True)
class Case:
    """Texts that are embedded in one batch."""

    name: str
    texts: tuple[str | LongText, ...]
    token_level: bool = True  # False: keep the pooled arrays only


CASES: tuple[Case, ...] = (
    Case("short", ("The tide is low this morning.",)),
    Case(
        "batch",
        (
            "Boats wait.",
            "The harbour wall was finished in 1894, after eleven years of work.",
            "Why does the water come back twice a day?",
            "She wrote down the height of every wave, the wind, the hour and the colour of the "
            "sky; nobody had asked her to.",
            "ÉTÉ in Málaga, winter in Göteborg: £12.50 (or €14,75) a night!",
        ),
    ),
    Case("empty", ("",)),
    Case("batch_with_empty", ("The harbour is quiet.", "", "Two boats left before dawn.")),
    Case(
        "emoji_combining",
        (
            "Coffee ☕ by the sea 🌊🌊 and a 🐟!",
            "Cafe\u0301, nai\u0308ve, A\u030angstro\u0308m, x\u0323\u0307y",
            "👩\u200d🚀 👍🏽 🇮🇸 ❤\ufe0f 1\ufe0f\u20e3",
        ),
    ),
    Case(
        "right_to_left",
        (
            "שלום עולם, הים שקט היום.",
            "السلام عليكم، البحر هادئ اليوم",
            "The word ים means sea, and so does بحر.",
        ),
    ),
    Case(
        "truncated",
        (
            LongText(
                ("tide", "harbour", "gulls", "above", "unknowable", "42", "öre", "."),
                repeat=1250,
            ),
        ),
        token_level=False,
    ),
)

# --------------------------------------------------------------------------------------------------
# The tokenizers
# --------------------------------------------------------------------------------------------------

CORPUS = """\
The tide goes out twice a day and comes back twice a day, and nobody in the village thinks about it.
At low water the boats lie on the sand, and at high water they float beside the harbour wall.
Children look for shells, crabs and small green stones between the rocks.
An old man counts the gulls every morning: 17, 23, 40, 61, 98, and once 305.
The lighthouse was built in 1872 and has been painted white eleven times since then.
When the wind turns north, the fishermen stay at home and mend their nets.
Her letter said that the ferry leaves at 6:45, but the timetable says 7:30.
The moon pulls the water, the earth turns below it, and so the shore is wet and dry by turns.
A wave that starts far out at sea may travel a thousand miles before it breaks.
Who would have thought that a cup of coffee could cost £4.20 or €5,10 in winter?
They measured the depth of the channel with a rope, a weight and a great deal of patience.
Nothing is quieter than the harbour in fog; even the gulls are silent.
The engine would not start, so we rowed for two hours against the current.
Salt gets into everything: the windows, the bread, the books and the piano.
My grandmother could tell the weather for tomorrow from the colour of the evening sky.
Every spring the river carries mud, branches and sometimes a whole tree into the bay.
The map shows four islands, although at the highest tides there are only three.
"Come back before dark," she called, "and bring the lamp!"
The storm of 1953 broke the sea wall in nine places and drowned the lower fields.
Some birds fly from the arctic to the southern ocean and back again within a year.
We walked along the beach, talking about music, money and the price of herring.
The museum keeps a whale's jaw, twelve anchors, and a model of the first steam ship.
Please write your name, your address and today's date (for example 2024-03-15) on this form.
The tunnel under the strait is 50.5 kilometres long & takes 35 minutes by train.
Is it true that the sea level has risen by more than twenty centimetres?
He dried the seaweed on the roof, ground it to powder and sold it to the farmers.
Our neighbours have a black dog that swims better than most people.
The water was so clear that we could read the numbers painted on the sunken hull.
No two waves are alike, yet the sound of them is always the same.
Scientists learn about old climates from layers of sand, clay and broken shells.
The captain signed the paper, folded it carefully, and never spoke of it again.
In the evening the lights of the town were mirrored in the still water.
You can email the office at tides@example.org or visit https://example.org/tables?year=2025.
def height(t): return a * cos(w * t) + b  # metres above the datum
Fresh bread, smoked fish, cold butter, strong tea: that was breakfast on the island.
The bridge opens for tall ships, and then the cars have to wait for ten minutes.
She learned the names of the stars from a sailor who could not read.
There are 12 months, 52 weeks, 365 days and about 705 tides in a year.
The ice came early that year and stayed until the middle of April.
What remains after the flood is mud, driftwood and a smell of salt.
Le café près de la plage est fermé à midi, même en été, sauf le dimanche.
Où sont les bateaux? Là-bas, derrière la jetée, à côté de l'église.
El niño señaló el faro y preguntó cuándo volvería la marea.
São dez horas; o mar está calmo e não há ninguém na praia.
Das Mädchen hörte die Möwen über den Dächern, und die Straße glänzte vom Regen.
Größe und Höhe der Wellen ändern sich täglich, außer bei völliger Windstille.
På kvällen gick vi över ön för att se på båtarna och äta räksmörgås för 90 öre.
Mořské vlny, žluté lodě, číslo šest a město u zálivu.
Łódź płynie wzdłuż wybrzeża, gdzie wieją zimne wiatry.
הים שקט היום והסירות עומדות בנמל.
שלום לכל מי שבא אל החוף בבוקר, גם בקיץ וגם בחורף.
עולם גדול וקטן, צפון ודרום, אור וחושך, טוב ופחות טוב.
البحر هادئ اليوم والقوارب تقف في الميناء.
السلام عليكم، كيف حال الطقس عند الشاطئ هذا الصباح؟
ذهب الصياد مع ابنه قبل الفجر ورجع بعد غروب الشمس.
海は静かです。
The weather today: 🌊 🌊 ☀ and a light wind 🙂
Good morning ☕ and good luck 🐟 with the fishing 👍
A heart ❤ a star ⭐ and a boat ⛵ drawn in the sand 🙂
"""

WORDPIECE_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BPE_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def train_wordpiece(vocab_size: int) -> Tokenizer:
    """A tokenizer like BERT's (uncased), with its vocabulary learned from `CORPUS`."""
    normalizer = normalizers.BertNormalizer(lowercase=True)
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    learned = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learned.normalizer = normalizer
    learned.pre_tokenizer = pre_tokenizer
    # Left alone, the trainer numbers the ##-characters in an order that changes from run to run,
    # and breaks ties by number. So number all characters before it does.
    characters: set[str] = set()
    for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(CORPUS)):
        characters |= {word[0], *(f"##{character}" for character in word[1:])}
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*WORDPIECE_SPECIALS, *sorted(characters)],
        show_progress=False,
    )
    learned.train_from_iterator(CORPUS.splitlines(), trainer)
    pieces = sorted(set(learned.get_vocab()) - set(WORDPIECE_SPECIALS))
    vocab = {piece: index for index, piece in enumerate((*WORDPIECE_SPECIALS, *pieces))}

    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.add_special_tokens(list(WORDPIECE_SPECIALS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def train_byte_level_bpe(vocab_size: int) -> Tokenizer:
    """A tokenizer like RoBERTa's: byte-level BPE, learned from `CORPUS`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # <mask> comes last, below
        special_tokens=list(BPE_SPECIALS[:-1]),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    # As in RoBERTa, <mask> is the last id and takes the space before it.
    tokenizer.add_special_tokens([AddedToken(BPE_SPECIALS[-1], lstrip=True, special=True)])
    tokenizer.post_processor = processors.RobertaProcessing(
        sep=("</s>", BPE_SPECIALS.index("</s>")),
        cls=("<s>", BPE_SPECIALS.index("<s>")),
        trim_offsets=True,
        add_prefix_space=False,
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@dataclass(frozen=True)
class TokenizerKind:
    """How one kind of tokenizer is made, and what tokenizer_config.json says of it."""

    train: Callable[[int], Tokenizer]
    special_tokens: Mapping[str, str]
    settings: Mapping[str, Any]


TOKENIZERS: Mapping[str, TokenizerKind] = {
    "wordpiece": TokenizerKind(
        train_wordpiece,
        {
            "cls_token": "[CLS]",
            "mask_token": "[MASK]",
            "pad_token": "[PAD]",
            "sep_token": "[SEP]",
            "unk_token": "[UNK]",
        },
        {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True},
    ),
    "byte_level_bpe": TokenizerKind(
        train_byte_level_bpe,
        {
            "bos_token": "<s>",
            "cls_token": "<s>",
            "eos_token": "</s>",
            "mask_token": "<mask>",
            "pad_token": "<pad>",
            "sep_token": "</s>",
            "unk_token": "<unk>",
        },
        {"add_prefix_space": False, "errors": "replace", "trim_offsets": True},
    ),
}


def write_tokenizer(spec: ModelSpec, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    kind = TOKENIZERS[spec.tokenizer]
    tokenizer = kind.train(spec.vocab_size)
    if tokenizer.get_vocab_size() != spec.vocab_size:
        raise ValueError(f"{spec.name}: the vocabulary has {tokenizer.get_vocab_size()} pieces")
    if spec.short_tokenizer_json:
        pad = kind.special_tokens["pad_token"]
        tokenizer.enable_truncation(128)
        tokenizer.enable_padding(length=128, pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    tokenizer.save(str(folder / "tokenizer.json"))

    settings: dict[str, Any] = {**kind.settings, **kind.special_tokens}
    settings["clean_up_tokenization_spaces"] = True
    settings["tokenizer_class"] = spec.tokenizer_class
    if spec.model_max_length is not None:
        settings["model_max_length"] = spec.model_max_length
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", kind.special_tokens)


def check_tokenizer(folder: Path, limit: int, texts: Sequence[str], ids: list[list[int]]) -> None:
    """Check that `tokenizers` alone gives `ids` from the written tokenizer.json."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(limit)
    if [encoding.ids for encoding in tokenizer.encode_batch(list(texts))] != ids:
        raise AssertionError(f"{folder.name}: tokenizers and transformers disagree on {texts}")


# --------------------------------------------------------------------------------------------------
# The weights and the ONNX files
# --------------------------------------------------------------------------------------------------


def make_model(spec: ModelSpec) -> PreTrainedModel:
    """The model in torch, its weights drawn so that every input makes a difference.

    The usual initialisation (a deviation of 0.02, no biases) would leave attention almost uniform
    and hide mistakes in masks, positions and token types.
    """
    config = spec.config_class(
        vocab_size=spec.vocab_size, attn_implementation="eager", **spec.config
    )
    torch.manual_seed(spec.seed)
    model: PreTrainedModel = spec.model_class(config, **spec.model_args).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
            elif name.endswith("weight"):  # a LayerNorm's
                parameter.normal_(1.0, 0.1)
            else:
                parameter.normal_(0.0, 0.1)
    model.config.architectures = [spec.model_class.__name__]
    model.config.dtype = "float32"
    return model


class _TupleModel(torch.nn.Module):
    """The model with positional inputs and one output, as the exporter wants it."""

    def __init__(self, model: PreTrainedModel, inputs: Sequence[str], output: str) -> None:
        super().__init__()
        self.model = model
        self.inputs = tuple(inputs)
        self.output = output

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        named = dict(zip(self.inputs, values, strict=True))
        result: torch.Tensor = self.model(**named)[self.output]
        return result


def export(spec: ModelSpec, model: PreTrainedModel, file: Path) -> None:
    """Write the model as ONNX in fp32, with dynamic batch and sequence axes."""
    ids = torch.arange(14).reshape(2, 7) + 5
    values = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer's, and that this exporter is the older one
        torch.onnx.export(
            # eval(): the exporter puts the mode it found back, dropout included
            _TupleModel(model, spec.inputs, spec.output).eval(),
            tuple(values[name] for name in spec.inputs),
            str(file),
            input_names=list(spec.inputs),
            output_names=[spec.output],
            dynamic_axes={
                name: {0: "batch_size", 1: "sequence_length"}
                for name in (*spec.inputs, spec.output)
            },
            opset_version=OPSET,
            dynamo=False,
        )
    proto = onnx.load(file)
    proto.doc_string = ""
    for node in proto.graph.node:
        node.doc_string = ""
    if spec.external_data:
        onnx.save(
            proto,
            file,
            save_as_external_data=True,
            all_tensors_to_one_file=True,
            location=f"{file.name}_data",
            size_threshold=1024,
        )
    else:
        onnx.save(proto, file)
    onnx.checker.check_model(str(file))


def _fp16(source: Path, target: Path) -> None:
    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), target)


def _int8(source: Path, target: Path) -> None:
    quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8)


def _uint8(source: Path, target: Path) -> None:
    quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QUInt8)


def _four_bits(proto: onnx.ModelProto, target: Path) -> None:
    quantizer = MatMulNBitsQuantizer(proto, bits=4, block_size=32, is_symmetric=True)
    quantizer.process()
    onnx.save(quantizer.model.model, target)


def _q4(source: Path, target: Path) -> None:
    _four_bits(onnx.load(source), target)


def _q4f16(source: Path, target: Path) -> None:
    _four_bits(convert_float_to_float16(onnx.load(source), keep_io_types=True), target)


def _bnb4(source: Path, target: Path) -> None:
    quantizer = MatMulBnb4Quantizer(onnx.load(source), MatMulBnb4Quantizer.NF4, block_size=64)
    quantizer.process()
    onnx.save(quantizer.model.model, target)


# How the model_<key>.onnx beside a model.onnx is made from it. The names are those that models
# for Transformers.js have; `quantized` is the file of its dtype q8.
VARIANTS: Mapping[str, Callable[[Path, Path], None]] = {
    "fp16": _fp16,
    "quantized": _int8,
    "int8": _int8,
    "uint8": _uint8,
    "q4": _q4,
    "q4f16": _q4f16,
    "bnb4": _bnb4,
}


def run_onnx(file: Path, inputs: Mapping[str, torch.Tensor], output: str) -> Array:
    """Run one ONNX file in ONNX Runtime on the CPU."""
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    result: Array = session.run(
        [output], {item.name: inputs[item.name].numpy() for item in session.get_inputs()}
    )[0]
    return result


# --------------------------------------------------------------------------------------------------
# The goldens
# --------------------------------------------------------------------------------------------------


def pool(tokens: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """All pooled arrays, by the formulas of sentence-transformers."""
    mask = attention_mask.unsqueeze(-1).to(tokens.dtype)
    positions = torch.arange(1, tokens.shape[1] + 1, dtype=tokens.dtype).reshape(1, -1, 1)
    rows = torch.arange(tokens.shape[0])
    last = tokens.shape[1] - 1 - attention_mask.flip(1).argmax(1)
    total = (tokens * mask).sum(1)
    count = mask.sum(1).clamp(min=1e-9)
    mean = total / count
    return {
        "mean": mean,
        "mean_normalized": torch.nn.functional.normalize(mean, p=2, dim=1),
        "cls": tokens[:, 0],
        "eos": tokens[rows, last],
        "max": tokens.masked_fill(mask == 0, -1e9).max(1).values,
        "mean_sqrt_len": total / count.sqrt(),
        "weighted_mean": (tokens * mask * positions).sum(1)
        / (mask * positions).sum(1).clamp(min=1e-9),
    }


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], limit: int
) -> dict[str, torch.Tensor]:
    """The oracle's tokenisation: padded to the longest, truncated at the limit."""
    return dict(
        tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
    )


def unpadded(inputs: Mapping[str, torch.Tensor]) -> list[list[int]]:
    """The token ids of each text without padding."""
    return [
        row[mask.bool()].tolist()
        for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]


def write_sentence_transformer(spec: ModelSpec, model: PreTrainedModel, folder: Path) -> Any:
    """Add the sentence-transformers files to `folder`; return the `SentenceTransformer`."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        shutil.copytree(folder, work / "in", ignore=shutil.ignore_patterns("onnx"))
        model.save_pretrained(work / "in")
        transformer = Transformer(
            str(work / "in"),
            max_seq_length=spec.sentence_limit,
            model_args={"add_pooling_layer": False},
        )
        pooling = Pooling(transformer.get_word_embedding_dimension(), pooling_mode="mean")
        encoder = SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu")
        encoder.save(str(work / "out"), create_model_card=False)
        for path in (
            "modules.json",
            "config_sentence_transformers.json",
            "sentence_bert_config.json",
            "1_Pooling/config.json",
        ):
            (folder / path).parent.mkdir(exist_ok=True)
            write_json(folder / path, json.loads((work / "out" / path).read_text()))
    return encoder


def check_near(spec: ModelSpec, case: Case, found: Array, wanted: Array) -> float:
    """Check ONNX Runtime's result against torch's; return the largest difference."""
    difference = float(np.abs(found - wanted).max())
    if not difference <= TOLERANCE:  # not "greater": NaN must fail too
        raise AssertionError(f"{spec.name}, {case.name}: ONNX is off by {difference:.2e}")
    return difference


def make_goldens(
    spec: ModelSpec, model: PreTrainedModel, folder: Path, encoder: Any
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Compute every case in torch, check the ONNX files with it, and return JSON and arrays."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    onnx_file = folder / spec.onnx_file
    arrays: dict[str, Array] = {}
    cases: list[dict[str, Any]] = []
    worst = 0.0
    for case in CASES:
        texts = [str(text) for text in case.texts]
        inputs = tokenize(tokenizer, texts, spec.limit)
        with torch.no_grad():
            tokens = model(**inputs)[spec.output]
        found = run_onnx(onnx_file, inputs, spec.output)
        worst = max(worst, check_near(spec, case, found, tokens.numpy()))
        ids = unpadded(inputs)
        check_tokenizer(folder, spec.limit, texts, ids)

        results: dict[str, Array] = {}
        if case.token_level:
            results[spec.output] = tokens.numpy()
            results["attention_mask"] = inputs["attention_mask"].numpy()
        pooled = pool(tokens, inputs["attention_mask"])
        results |= {name: value.numpy() for name, value in pooled.items()}
        entry: dict[str, Any] = {
            "name": case.name,
            "texts": [
                {"words": list(text.words), "repeat": text.repeat}
                if isinstance(text, LongText)
                else text
                for text in case.texts
            ],
            "input_ids": ids,
        }
        if spec.sentence_limit is not None:
            inputs = tokenize(tokenizer, texts, spec.sentence_limit)
            entry["sentence_input_ids"] = unpadded(inputs)
            check_tokenizer(folder, spec.sentence_limit, texts, entry["sentence_input_ids"])
            sentences = encoder.encode(texts, show_progress_bar=False)
            results["sentence_embedding"] = sentences
            tokens = torch.from_numpy(run_onnx(onnx_file, inputs, spec.output))
            pooled = pool(tokens, inputs["attention_mask"])
            check_near(spec, case, pooled["mean_normalized"].numpy(), sentences)
        entry["arrays"] = {name: f"{case.name}.{name}" for name in results}
        cases.append(entry)
        arrays |= {f"{case.name}.{name}": value for name, value in results.items()}
    print(f"{spec.name}: fp32 ONNX differs from torch by at most {worst:.1e}")

    packages = ["torch", "transformers", "tokenizers", "numpy"]
    if spec.sentence_limit is not None:
        packages.append("sentence-transformers")
    golden: dict[str, Any] = {
        "model": spec.name,
        "limit": spec.limit,
        "onnx_file": spec.onnx_file,
        "output": spec.output,
    }
    if spec.sentence_limit is not None:
        golden["sentence_limit"] = spec.sentence_limit
    golden["versions"] = {package: version(package) for package in packages}
    golden["cases"] = cases
    return golden, arrays


def check_variants(spec: ModelSpec, folder: Path) -> None:
    """Check that the smaller data types load and come near fp32; print how near."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenize(tokenizer, [str(text) for text in CASES[1].texts], spec.limit)
    fp32_file = folder / spec.onnx_file
    mask = inputs["attention_mask"].numpy().astype(bool)
    fp32 = run_onnx(fp32_file, inputs, spec.output)[mask]
    for key in spec.variants:
        variant = run_onnx(variant_file(fp32_file, key), inputs, spec.output)[mask]
        cosine = (fp32 * variant).sum(-1) / (
            np.linalg.norm(fp32, axis=-1) * np.linalg.norm(variant, axis=-1)
        )
        print(f"{spec.name}: {key} has a cosine of at least {cosine.min():.4f} with fp32")
        if not cosine.min() > 0.8:
            raise AssertionError(f"{spec.name}: {key} is too far from fp32")


def variant_file(fp32_file: Path, key: str) -> Path:
    """Where the data type `key` is stored."""
    return fp32_file.with_name(f"{fp32_file.stem}_{key}.onnx")


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


def write_json(file: Path, value: Any) -> None:
    """Write JSON in ASCII, with lists of numbers on one line."""
    text = json.dumps(value, indent=2)
    # Inside a JSON string there is no line break, so this finds lists only.
    text = re.sub(r"\[\n([\s\d,]+)\]", lambda numbers: f"[{' '.join(numbers[1].split())}]", text)
    file.write_text(text + "\n", encoding="utf-8")


def make(spec: ModelSpec) -> list[Path]:
    """Make one model and its goldens; return the files written."""
    folder = MODELS / spec.name
    shutil.rmtree(folder, ignore_errors=True)
    onnx_file = folder / spec.onnx_file
    onnx_file.parent.mkdir(parents=True)
    GOLDENS.mkdir(parents=True, exist_ok=True)

    model = make_model(spec)
    write_tokenizer(spec, folder)
    write_json(folder / "config.json", {**model.config.to_diff_dict(), **spec.extra_config})
    export(spec, model, onnx_file)
    for key in spec.variants:
        VARIANTS[key](onnx_file, variant_file(onnx_file, key))
    check_variants(spec, folder)
    encoder = None
    if spec.sentence_limit is not None:
        encoder = write_sentence_transformer(spec, model, folder)

    golden, arrays = make_goldens(spec, model, folder, encoder)
    golden_files = [GOLDENS / f"{spec.name}.json", GOLDENS / f"{spec.name}.npz"]
    write_json(golden_files[0], golden)
    np.savez_compressed(golden_files[1], **arrays)  # type: ignore[arg-type]
    return sorted(path for path in folder.rglob("*") if path.is_file()) + golden_files


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the named models, or all; print a table of the files."""
    logging.disable(logging.WARNING)  # the quantizers tell of every node
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [spec.name for spec in SPECS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    wanted = parser.parse_args(arguments).names
    if unknown := set(wanted) - set(names):
        parser.error(f"no such model: {', '.join(sorted(unknown))}")

    files = [file for spec in SPECS if not wanted or spec.name in wanted for file in make(spec)]
    sizes = [file.stat().st_size for file in files]
    print()
    for file, size in zip(files, sizes, strict=True):
        print(f"{size:>10,}  {file.relative_to(ROOT).as_posix()}")
    print(f"{sum(sizes):>10,}  in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
