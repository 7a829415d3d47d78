"""What `make_tasks.py` asks of its models: the heads they have, and the calls of each task.

A case is a call of an Ebbtide pipeline, ``pipe(*inputs, **options)``. `{mask}` in a text stands for
the model's own mask token. The cases are written to tests/goldens/tasks/cases.json, from where the
tests read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from make_models import CORPUS

# --------------------------------------------------------------------------------------------------
# Texts
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """The texts of the cases.

    Attributes:
        single: A short text.
        batch: Texts of mixed lengths.
        special: Texts by what is special about them.
        long: A text that is longer than a window.
        masked: A text with one mask.
        masks: A text with several.
        targets: What may stand for a mask; pieces of the vocabulary, and words that are none.
    """

    single: str
    batch: tuple[str, ...]
    special: Mapping[str, tuple[str, ...]]
    long: str
    masked: str
    masks: str
    targets: tuple[str, ...]


PROSE = Texts(
    single="The tide goes out at six.",
    batch=(
        "Boats wait.",
        "Her letter said that the ferry leaves at 6:45, but the timetable says 7:30.",
        "gulls",
        "Anna and her brother left Reykjavik for Bergen.",
    ),
    special={
        "right_to_left": (
            "הים שקט היום.",
            "البحر هادئ اليوم",
            "The word ים means sea, and so does بحر.",
        ),
        "combining": (
            "Cafe\u0301 by the sea, nai\u0308ve.",
            "A\u030angstro\u0308m, x\u0323\u0307y and \ufb01sh \u00bd",
        ),
        "emoji": (
            "Coffee ☕ by the sea 🌊🌊 and a 🐟!",
            "👩\u200d🚀 👍🏽 🇮🇸 ❤\ufe0f 1\ufe0f\u20e3",
        ),
        "glued": (
            "(Anna)-Bergen/Oslo:6:45am...end!?",
            "don't,won't;it's'quoted'\"x\"\u2014dash",
        ),
        "blanks": (" ", "  two  spaces,\ta tab\nand a line "),
        # No spaces between words, invisible characters, special tokens, and a word without end.
        "odd": (
            "海は静か。x\u200by\u00a0z\u00adw\u0000v",
            "The [CLS] sea, [SEP]x <s> and </s>y [UNK] <unk>.",
            "Anna " + "gulls" * 24 + " sea",
        ),
    },
    long=(
        "At low water the boats lie on the sand, and at high water they float beside the wall. "
        "Nothing is quieter than the harbour in fog; even the gulls are silent. Some birds fly "
        "from the south to the north and back again within a year, and Anna counts them. In the "
        "evening the lights of Bergen were mirrored in the still water."
    ),
    masked="The tide goes {mask} at six.",
    masks="{mask} boats wait in the {mask}, and so do{mask}.",
    targets=("out", "in", "and", "unknowable"),
)

PROTEIN = Texts(
    single="MKTAYIAKQRQISFVK",
    batch=("MK", "MSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQ", "G", "MADEEKLPPGWEKRMS"),
    special={
        "unknown": ("MKjT*AYI", "mkta", "M K T\tA Y"),
        "rare": ("XBUZO.-M", "MK<null_1>T<cls>A<eos> ", " "),
    },
    long="MSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPDAQFEVVHSLAKWKRQTLGQHDFSAGEGLYTHMKALRPDE",
    masked="MKTA{mask}IAKQRQ",
    masks="M{mask}TAYI{mask}KQ{mask}",
    targets=("L", "A", "G", "W"),
)

TEXTS: Mapping[str, Texts] = {"prose": PROSE, "protein": PROTEIN}

CONTEXT = "Anna and her brother left Reykjavik for Bergen at six in the morning, on a boat."
QUESTION = "Who left for Bergen?"
WIDE_CONTEXT = " ".join([*CORPUS.splitlines()[:16], CONTEXT])
DOCUMENTS = (
    "The ferry leaves at 6:45.",
    "Gulls are silent in fog.",
    "Anna counts the boats in the harbour, and so did her brother before he left for Bergen.",
    "הים שקט היום",
)
CANDIDATES = ("the sea", "city", "weather", "birds")

# --------------------------------------------------------------------------------------------------
# Heads
# --------------------------------------------------------------------------------------------------

PLAIN_LABELS = ("calm", "rough", "stormy", "frozen")
ENTITY_LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
NLI_LABELS = ("contradiction", "neutral", "entailment")


@dataclass(frozen=True)
class Head:
    """What a model ends in.

    Attributes:
        task: The task it is for.
        auto_class: The class of `transformers` that finds a type's class for it.
        outputs: What its graph gives.
        labels: Its labels; None where it has none, or keeps those that `transformers` gives.
        config: More of its config.
        cases: The names of the task's cases that it is asked; None for all.
        settings: More of tokenizer_config.json.
        window: How many tokens it reads, where it differs from its type.
        javascript: Whether Transformers.js is asked too.
    """

    task: str
    auto_class: str
    outputs: tuple[str, ...] = ("logits",)
    labels: tuple[str, ...] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    cases: tuple[str, ...] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    window: int | None = None
    javascript: bool = True


SEQUENCE = "AutoModelForSequenceClassification"
TOKEN = "AutoModelForTokenClassification"
SPAN = "AutoModelForQuestionAnswering"
PLACES = ("start_logits", "end_logits")
FEW = ("single", "all_labels", "batch", "pairs", "special_emoji", "softmax")

HEADS: Mapping[str, Head] = {
    "sequence": Head("text-classification", SEQUENCE, labels=PLAIN_LABELS),
    "several": Head(
        "text-classification",
        SEQUENCE,
        labels=("sea", "sand", "salt"),
        config={"problem_type": "multi_label_classification"},
        cases=FEW,
    ),
    "value": Head(
        "text-classification",
        SEQUENCE,
        labels=("height",),
        config={"problem_type": "regression"},
        cases=FEW,
    ),
    "rank": Head("rank", SEQUENCE, labels=("LABEL_0",)),
    "nli": Head("zero-shot-classification", SEQUENCE, labels=NLI_LABELS),
    "token": Head("token-classification", TOKEN, labels=ENTITY_LABELS),
    "span": Head("question-answering", SPAN, PLACES),
    "mask": Head("fill-mask", "AutoModelForMaskedLM"),
    # A window that is wider than what the task reads at once by default.
    "wide": Head(
        "question-answering",
        SPAN,
        PLACES,
        cases=("single", "wide"),
        window=512,
        javascript=False,
    ),
    # Tokenizers that pad, or cut, at the beginning.
    "tail": Head(
        "text-classification",
        SEQUENCE,
        labels=PLAIN_LABELS,
        cases=(*FEW, "padded", "truncated"),
        settings={"padding_side": "left", "truncation_side": "left"},
        javascript=False,
    ),
    "tail_token": Head(
        "token-classification",
        TOKEN,
        labels=ENTITY_LABELS,
        cases=("single", "truncated", "simple_all", "stride_4_first", "stride_16_average"),
        settings={"truncation_side": "left"},
        javascript=False,
    ),
}
"""`rank` is for text-classification too: for its method of that name, and some other calls."""

# --------------------------------------------------------------------------------------------------
# Cases
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call: ``pipe(*inputs, **options)``, or of a method of the pipeline's."""

    name: str
    inputs: tuple[Any, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    method: str = ""


def cases_of(task: str, texts: Texts) -> tuple[Case, ...]:
    """The cases of a task."""
    return {
        "text-classification": _text_classification,
        "rank": _rank,
        "token-classification": _token_classification,
        "question-answering": _question_answering,
        "fill-mask": _fill_mask,
        "zero-shot-classification": _zero_shot_classification,
    }[task](texts)


def _special(texts: Texts, **options: Any) -> tuple[Case, ...]:
    return tuple(
        Case(f"special_{name}", (list(some),), options) for name, some in texts.special.items()
    )


def _pairs(texts: Texts) -> list[dict[str, str]]:
    return [
        {"text": texts.single, "text_pair": texts.batch[1]},
        {"text": texts.long, "text_pair": texts.single},
        {"text": texts.single, "text_pair": texts.long},
        {"text": texts.long, "text_pair": texts.long},
        {"text": "", "text_pair": texts.single},
    ]


def _text_classification(texts: Texts) -> tuple[Case, ...]:
    everything = {"top_k": None}
    return (
        Case("single", (texts.single,)),
        Case("all_labels", (texts.batch[3],), everything),
        Case("three_labels", (list(texts.batch),), {"top_k": 3}),
        Case("batch", (list(texts.batch),)),
        Case("padded", ([texts.batch[2], texts.long, "", texts.single],), everything),
        Case("truncated", (texts.long,), everything),
        Case("empty", ("",), everything),
        Case("pair", ({"text": texts.batch[0], "text_pair": texts.batch[3]},), everything),
        Case("pairs", (_pairs(texts),), everything),
        *_special(texts, **everything),
        *(
            Case(function, (list(texts.batch),), {"function_to_apply": function, **everything})
            for function in ("softmax", "sigmoid", "none")
        ),
    )


def _rank(texts: Texts) -> tuple[Case, ...]:
    some = [case for case in _text_classification(texts) if case.name in (*FEW, "pair")]
    asked = (QUESTION, list(DOCUMENTS))
    return (
        *some,
        Case("rank", asked, {}, "rank"),
        Case("rank_best", asked, {"top_k": 2, "return_documents": True}, "rank"),
        Case("rank_truncated", (texts.single, [texts.long, *DOCUMENTS[:2]]), {}, "rank"),
    )


def _token_classification(texts: Texts) -> tuple[Case, ...]:
    batch = [*texts.batch, *(some[-1] for some in texts.special.values())]
    return (
        Case("single", (texts.batch[3],)),
        Case("every_token", (list(texts.batch),), {"ignore_labels": []}),
        Case("ignored", (texts.batch[1],), {"ignore_labels": ["O", "B-PER", "helix"]}),
        Case("truncated", (texts.long,)),
        Case("empty", ("",)),
        *_special(texts, ignore_labels=[]),
        *(
            Case(strategy, (batch,), {"aggregation_strategy": strategy})
            for strategy in ("simple", "first", "average", "max")
        ),
        Case(
            "simple_all",
            (list(texts.batch),),
            {"aggregation_strategy": "simple", "ignore_labels": []},
        ),
        Case(
            "simple_ignored",
            (list(texts.batch),),
            {"aggregation_strategy": "simple", "ignore_labels": ["PER", "helix"]},
        ),
        *(
            Case(
                f"stride_{stride}_{strategy}",
                ([texts.long, texts.batch[2]] if stride else texts.long,),
                {"aggregation_strategy": strategy, "stride": stride},
            )
            for stride, strategy in ((0, "simple"), (4, "first"), (16, "average"), (32, "max"))
        ),
        Case("stride_short", (texts.single,), {"aggregation_strategy": "simple", "stride": 8}),
    )


def _question_answering(texts: Texts) -> tuple[Case, ...]:
    short = {"question": QUESTION, "context": CONTEXT}
    wide = {"question": QUESTION, "context": WIDE_CONTEXT}
    long = {"question": "Where do the boats lie?", "context": texts.long}
    contexts = [one for some in texts.special.values() for one in some if one.strip()]
    questions = [QUESTION, "\U0001f30a מה?"]
    special = [
        {"question": questions[place % 2], "context": one} for place, one in enumerate(contexts)
    ]
    return (
        Case("single", (QUESTION, CONTEXT)),
        Case("as_map", (short,)),
        Case("best_three", (QUESTION, CONTEXT), {"top_k": 3}),
        Case("batch", ([short, {"question": "When?", "context": texts.single}, long],)),
        Case("one_context", ([QUESTION, "When?", "Where is the boat?"], CONTEXT)),
        Case("special", (special,), {"top_k": 2}),
        Case("special_tokens", (special,), {"align_to_words": False}),
        Case("impossible", ([short, long],), {"handle_impossible_answer": True, "top_k": 3}),
        Case("tokens", ([short, long],), {"align_to_words": False, "top_k": 3}),
        Case("short_answers", ([short, long],), {"max_answer_len": 2, "top_k": 3}),
        Case("one_token", ([short, long],), {"max_answer_len": 1, "align_to_words": False}),
        Case("windows", (long,), {"top_k": 3}),
        Case("windows_stride", (long,), {"doc_stride": 8, "max_seq_len": 40, "top_k": 3}),
        Case("windows_apart", (long,), {"doc_stride": 0, "max_seq_len": 48, "top_k": 3}),
        Case("tiny_context", ("When?", "Six"), {"top_k": 3}),
        Case("wide", ([wide, short],), {"top_k": 3}),
    )


def _fill_mask(texts: Texts) -> tuple[Case, ...]:
    glued = ("glued", "unknown")
    special = {
        # The mask of `odd` comes first, so that it is inside the window.
        name: ["{mask} " + one if name == "odd" else one + " {mask}" for one in some]
        if name not in glued
        else [one + "{mask}" for one in some]
        for name, some in texts.special.items()
    }
    return (
        Case("single", (texts.masked,)),
        Case("best", (texts.masked,), {"top_k": 1}),
        Case("ten", (texts.masked,), {"top_k": 10}),
        Case("several_masks", (texts.masks,), {"top_k": 2}),
        Case("targets", (texts.masked,), {"targets": list(texts.targets)}),
        Case("one_target", (texts.masked,), {"targets": texts.targets[0]}),
        Case("targets_of_masks", (texts.masks,), {"targets": list(texts.targets), "top_k": 2}),
        Case("batch", ([texts.masked, texts.masks, "{mask}"],), {"top_k": 2}),
        Case("truncated", ("{mask} " + texts.long,), {"top_k": 2}),
        *(Case(f"special_{name}", (some,), {"top_k": 2}) for name, some in special.items()),
    )


def _zero_shot_classification(texts: Texts) -> tuple[Case, ...]:
    labels = list(CANDIDATES)
    special = [one for some in texts.special.values() for one in some]
    return (
        Case("single", (texts.single, labels)),
        Case("one_label", (texts.single, ["the sea"])),
        Case("commas", (texts.single, "the sea, city,weather")),
        Case("several", (texts.batch[3], labels), {"multi_label": True}),
        Case("template", (texts.single, labels), {"hypothesis_template": "It is of {}, surely!"}),
        Case("batch", (list(texts.batch), labels)),
        Case("batch_several", (list(texts.batch), labels), {"multi_label": True}),
        Case("truncated", (texts.long, labels)),
        Case("special", (special, labels[:3])),
    )
