"""The small tokenizers of `make_tasks.py`: for each type of model the kind that it really has.

Their vocabularies are learned here, and not by the trainers of `tokenizers`, whose results change
from run to run.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from make_models import CORPUS
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

VOCABULARY = 300
"""About how many tokens a tokenizer has: the alphabets of `TEXT`, and what occurs often in it."""

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXT = "\n".join(
    [
        *(line for line in CORPUS.splitlines() if set(line.lower()) <= {*LETTERS, *" ,.'"}),
        "Anna and her brother left Reykjavik for the harbour in Bergen at 6:45 (or 7:30)!",
        'Who asked? It\'s 1872; 39-50/41, "yes". At six.',
        "Café naïve öre.",
        *(line for line in CORPUS.splitlines() if line.startswith(("הים", "البحر"))),
    ]
)
"""What the vocabularies are learned from: less than `CORPUS`, so that its words get pieces."""


@dataclass(frozen=True)
class TokenizerKind:
    """How one kind of tokenizer is made, and what tokenizer_config.json says of it.

    Attributes:
        make: Makes it.
        special_tokens: Which token has which role.
        settings: The rest of tokenizer_config.json.
    """

    make: Callable[[], Tokenizer]
    special_tokens: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)


# --------------------------------------------------------------------------------------------------
# Learning
# --------------------------------------------------------------------------------------------------

Pair = tuple[str, str]


def learn_merges(
    words: Iterable[Sequence[str]], count: int, join: Callable[[str, str], str]
) -> list[Pair]:
    """The pairs that byte-pair encoding joins, in order: the most frequent, then the first by name.

    Args:
        words: Each word as its smallest pieces.
        count: How many pairs.
        join: The piece that two make.
    """
    counts = Counter(tuple(word) for word in words)
    merges: list[Pair] = []
    while len(merges) < count:
        pairs: Counter[Pair] = Counter()
        for word, times in counts.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += times
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        joined: Counter[tuple[str, ...]] = Counter()
        for word, times in counts.items():
            joined[_joined(word, best, join)] += times
        counts = joined
    return merges


def _joined(word: tuple[str, ...], pair: Pair, join: Callable[[str, str], str]) -> tuple[str, ...]:
    pieces: list[str] = []
    for piece in word:
        if pieces and (pieces[-1], piece) == pair:
            pieces[-1] = join(*pair)
        else:
            pieces.append(piece)
    return tuple(pieces)


def words_of(tokenizer: Tokenizer) -> list[str]:
    """The words of `TEXT`, as a tokenizer's normalizer and pre-tokenizer make them."""
    normalizer, pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    lines = (normalizer.normalize_str(line) if normalizer else line for line in TEXT.splitlines())
    return [word for line in lines for word, _ in pre_tokenizer.pre_tokenize_str(line)]


# --------------------------------------------------------------------------------------------------
# Word pieces: BERT's descendants, and MPNet
# --------------------------------------------------------------------------------------------------


def wordpiece(
    first: Sequence[str], last: Sequence[str] = (), *, double_sep: bool = False
) -> Tokenizer:
    """A tokenizer like BERT's, uncased.

    Args:
        first: The special tokens with the first ids: padding, unknown, beginning, end, mask.
        last: Those with the last ids.
        double_sep: Put two tokens between two texts, as MPNet does.
    """
    tokenizer = Tokenizer(models.WordPiece({}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words = [[word[0], *(f"##{rest}" for rest in word[1:])] for word in words_of(tokenizer)]
    alphabet = {piece for word in words for piece in word}

    def join(left: str, right: str) -> str:
        return left + right.removeprefix("##")

    merges = learn_merges(words, VOCABULARY - len(alphabet), join)
    pieces = sorted(alphabet | {join(*pair) for pair in merges})
    vocab = {piece: number for number, piece in enumerate([*first, *pieces, *last])}
    tokenizer.model = models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100)
    _add_special(tokenizer, [*first, *last])
    cls, sep = ("<s>", "</s>") if double_sep else ("[CLS]", "[SEP]")
    between = f"{sep}:0 {sep}:0" if double_sep else f"{sep}:0"
    _frame(tokenizer, f"{cls}:0 $A:0 {sep}:0", f"{cls}:0 $A:0 {between} $B:1 {sep}:1")
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def _add_special(tokenizer: Tokenizer, tokens: Sequence[str]) -> None:
    """Make tokens special; a mask that is spelled as RoBERTa's takes the space before it."""
    lstrips = {"<mask>"}
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False, lstrip=token in lstrips)
            for token in tokens
        ]
    )


def _frame(tokenizer: Tokenizer, single: str, pair: str) -> None:
    """Put special tokens around one text and two."""
    named = {part.partition(":")[0] for part in pair.split()} - {"$A", "$B"}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=pair,
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in sorted(named)],
    )


# --------------------------------------------------------------------------------------------------
# Byte-level pairs: RoBERTa, DeBERTa, ModernBERT
# --------------------------------------------------------------------------------------------------


def byte_level(first: Sequence[str], last: Sequence[str], *, normalizer: Any = None) -> Tokenizer:
    """Byte-level byte-pair encoding, with the special tokens that have the first and last ids."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    merges = learn_merges(words_of(tokenizer), 90, lambda left, right: left + right)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(left + right for left, right in merges)]
    vocab = {piece: number for number, piece in enumerate([*first, *pieces, *last])}
    tokenizer.model = models.BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix="")
    tokenizer.decoder = decoders.ByteLevel()
    # The mask takes the space before it in all three.
    _add_special(tokenizer, [token for token in (*first, *last) if "mask" not in token.lower()])
    (mask,) = (token for token in (*first, *last) if "mask" in token.lower())
    tokenizer.add_special_tokens([AddedToken(mask, special=True, normalized=False, lstrip=True)])
    return tokenizer


def roberta() -> Tokenizer:
    """A tokenizer like RoBERTa's."""
    tokenizer = byte_level(("<s>", "<pad>", "</s>", "<unk>"), ("<mask>",))
    tokenizer.post_processor = processors.RobertaProcessing(
        sep=("</s>", 2), cls=("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    return tokenizer


def deberta() -> Tokenizer:
    """A tokenizer like the first DeBERTa's, which tells two texts apart by their type."""
    tokenizer = byte_level(("[CLS]", "[PAD]", "[SEP]", "[UNK]"), ("[MASK]",))
    _frame(tokenizer, "[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1")
    return tokenizer


def modernbert() -> Tokenizer:
    """A tokenizer like ModernBERT's: special tokens last, and composed characters."""
    tokenizer = byte_level(
        (), ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"), normalizer=normalizers.NFC()
    )
    _frame(tokenizer, "[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:0 [SEP]:0")
    return tokenizer


# --------------------------------------------------------------------------------------------------
# Unigrams with spaces as characters: the descendants of SentencePiece
# --------------------------------------------------------------------------------------------------


def unigram(
    first: Sequence[str],
    last: Sequence[str],
    *,
    unknown: str,
    normalizer: Any,
    pre_tokenizer: Any,
    strip_before: Sequence[str] = (),
) -> Tokenizer:
    """A unigram tokenizer: the pieces that occur most often, scored by the logarithm of how often.

    Args:
        first: The special tokens with the first ids.
        last: Those with the last ids.
        unknown: Which of them stands for what is unknown.
        normalizer: The normalizer.
        pre_tokenizer: The pre-tokenizer, which marks the beginnings of words.
        strip_before: Special tokens that take the space before them.
    """
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    counts: Counter[str] = Counter()
    for word in words_of(tokenizer):
        for start in range(len(word)):
            counts.update(
                word[start:end] for end in range(start + 1, min(start + 9, len(word) + 1))
            )
    alphabet = sorted(piece for piece in counts if len(piece) == 1)
    longer = [piece for piece in counts if len(piece) > 1 and counts[piece] > 1]
    longer.sort(key=lambda piece: (-counts[piece] * (len(piece) - 1), piece))
    pieces = alphabet + longer[: VOCABULARY - len(alphabet)]
    total = sum(counts[piece] for piece in pieces)
    scored = [(piece, round(math.log(counts[piece] / total), 4)) for piece in pieces]
    special = [(token, 0.0) for token in first]
    vocab = [*special, *scored, *((token, 0.0) for token in last)]
    tokenizer.model = models.Unigram(vocab, unk_id=[*first].index(unknown))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False, lstrip=token in strip_before)
            for token in (*first, *last)
        ]
    )
    return tokenizer


def _one_space() -> Any:
    return normalizers.Replace(Regex(" {2,}"), " ")


def _split_then_mark() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])


def xlm_roberta() -> Tokenizer:
    """A tokenizer like XLM-RoBERTa's."""
    tokenizer = unigram(
        ("<s>", "<pad>", "</s>", "<unk>"),
        ("<mask>",),
        unknown="<unk>",
        normalizer=normalizers.Sequence([normalizers.NFKC(), _one_space()]),
        pre_tokenizer=_split_then_mark(),
        strip_before=("<mask>",),
    )
    _frame(tokenizer, "<s> $A </s>", "<s> $A </s> </s> $B </s>")
    return tokenizer


def camembert() -> Tokenizer:
    """A tokenizer like CamemBERT's, whose first ids are partly not used."""
    tokenizer = unigram(
        ("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>"),
        ("<mask>",),
        unknown="<unk>",
        normalizer=normalizers.Sequence([normalizers.NFKC(), _one_space()]),
        pre_tokenizer=_split_then_mark(),
        strip_before=("<mask>",),
    )
    _frame(tokenizer, "<s> $A </s>", "<s> $A </s> </s> $B </s>")
    return tokenizer


def albert(*, lower: bool = True) -> Tokenizer:
    """A tokenizer like ALBERT's, or with ``lower=False`` like RemBERT's."""
    quotes = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
    plain = [normalizers.NFKD(), normalizers.StripAccents()]
    if lower:
        parts = [*quotes, *plain, normalizers.Lowercase(), _one_space()]
    else:
        parts = [*quotes, _one_space(), *plain]
    tokenizer = unigram(
        ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"),
        (),
        unknown="<unk>",
        normalizer=normalizers.Sequence(parts),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        strip_before=("[MASK]",),
    )
    _frame(tokenizer, "[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1")
    return tokenizer


def deberta_v2() -> Tokenizer:
    """A tokenizer like DeBERTa v2's and v3's."""
    tokenizer = unigram(
        ("[PAD]", "[CLS]", "[SEP]", "[UNK]"),
        ("[MASK]",),
        unknown="[UNK]",
        normalizer=normalizers.Sequence([normalizers.Strip(), normalizers.NFKC(), _one_space()]),
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Metaspace()]),
    )
    _frame(tokenizer, "[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1")
    return tokenizer


# --------------------------------------------------------------------------------------------------
# XLM and ESM, for which `transformers` has no fast tokenizer
# --------------------------------------------------------------------------------------------------


def xlm() -> Tokenizer:
    """A tokenizer like XLM's: pairs, with the ends of words marked."""
    special = ("<s>", "</s>", "<pad>", "<unk>", *(f"<special{number}>" for number in range(10)))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words = [[*word[:-1], f"{word[-1]}</w>"] for word in words_of(tokenizer)]
    alphabet = {piece for word in words for piece in word}
    merges = learn_merges(words, VOCABULARY - len(alphabet), lambda left, right: left + right)
    pieces = sorted(alphabet | {left + right for left, right in merges})
    vocab = {piece: number for number, piece in enumerate([*special, *pieces])}
    tokenizer.model = models.BPE(vocab, merges, unk_token="<unk>", end_of_word_suffix="</w>")
    _add_special(tokenizer, special)
    _frame(tokenizer, "<s>:0 $A:0 </s>:0", "<s>:0 $A:0 </s>:0 $B:1 </s>:1")
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return tokenizer


RESIDUES = "LAGVSERTIDPKQNFYMHWCXBUZO.-"


def esm() -> Tokenizer:
    """A tokenizer like ESM's: one token a residue of a protein."""
    tokens = ["<cls>", "<pad>", "<eos>", "<unk>", *RESIDUES, "<null_1>", "<mask>"]
    tokenizer = Tokenizer(
        models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(f"[{RESIDUES.replace('-', '')}-]"), "isolated"),
        ]
    )
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token in ("<cls>", "<pad>", "<eos>", "<unk>", "<mask>")
        ]
    )
    _frame(tokenizer, "<cls> $A <eos>", "<cls> $A <eos> $B <eos>")
    return tokenizer


# --------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------

BERT_TOKENS = {
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
    "pad_token": "[PAD]",
    "sep_token": "[SEP]",
    "unk_token": "[UNK]",
}
ROBERTA_TOKENS = {
    "bos_token": "<s>",
    "cls_token": "<s>",
    "eos_token": "</s>",
    "mask_token": "<mask>",
    "pad_token": "<pad>",
    "sep_token": "</s>",
    "unk_token": "<unk>",
}
ALBERT_TOKENS = {**BERT_TOKENS, "pad_token": "<pad>", "unk_token": "<unk>"}
UNCASED = {"do_lower_case": True, "clean_up_tokenization_spaces": True}

TOKENIZERS: Mapping[str, TokenizerKind] = {
    "wordpiece": TokenizerKind(
        lambda: wordpiece(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")), BERT_TOKENS, UNCASED
    ),
    "mpnet": TokenizerKind(
        lambda: wordpiece(("<s>", "<pad>", "</s>"), ("[UNK]", "<mask>"), double_sep=True),
        {**ROBERTA_TOKENS, "unk_token": "[UNK]"},
        UNCASED,
    ),
    "roberta": TokenizerKind(roberta, ROBERTA_TOKENS, {"add_prefix_space": False}),
    "deberta": TokenizerKind(
        deberta, BERT_TOKENS, {"add_prefix_space": False, "clean_up_tokenization_spaces": False}
    ),
    "modernbert": TokenizerKind(
        modernbert,
        BERT_TOKENS,
        {
            "clean_up_tokenization_spaces": True,
            "model_input_names": ["input_ids", "attention_mask"],
        },
    ),
    "xlm-roberta": TokenizerKind(
        xlm_roberta, ROBERTA_TOKENS, {"clean_up_tokenization_spaces": False}
    ),
    "camembert": TokenizerKind(camembert, ROBERTA_TOKENS),
    "albert": TokenizerKind(
        albert, ALBERT_TOKENS, {**UNCASED, "keep_accents": False, "remove_space": True}
    ),
    "rembert": TokenizerKind(
        lambda: albert(lower=False), ALBERT_TOKENS, {"do_lower_case": False, "keep_accents": False}
    ),
    "deberta-v2": TokenizerKind(deberta_v2, BERT_TOKENS, {"do_lower_case": False}),
    "xlm": TokenizerKind(
        xlm,
        {
            "bos_token": "<s>",
            "cls_token": "</s>",
            "mask_token": "<special1>",
            "pad_token": "<pad>",
            "sep_token": "</s>",
            "unk_token": "<unk>",
        },
        {"clean_up_tokenization_spaces": True},
    ),
    "esm": TokenizerKind(
        esm,
        {
            "cls_token": "<cls>",
            "eos_token": "<eos>",
            "mask_token": "<mask>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
        },
        {"clean_up_tokenization_spaces": True},
    ),
}
