"""Every task Ebbtide does, as one frozen table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from ebbtide.errors import InputError, nearest
from ebbtide.pipelines.base import Pipeline
from ebbtide.pipelines.feature_extraction import FeatureExtractionPipeline
from ebbtide.pipelines.fill_mask import FillMaskPipeline
from ebbtide.pipelines.question_answering import QuestionAnsweringPipeline
from ebbtide.pipelines.text_classification import TextClassificationPipeline
from ebbtide.pipelines.token_classification import TokenClassificationPipeline
from ebbtide.pipelines.zero_shot_classification import ZeroShotClassificationPipeline


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """One task.

    Attributes:
        name: What to pass to `pipeline()`.
        aliases: Other names for it.
        default_model: The model used where none is named, as Transformers.js has it.
        pipeline: The class that does it.
        takes: What goes in, in words.
        gives: What comes out, in words.
    """

    name: str
    aliases: tuple[str, ...]
    default_model: str
    pipeline: type[Pipeline]
    takes: str
    gives: str


TASKS: Final[Mapping[str, Task]] = MappingProxyType(
    {
        task.name: task
        for task in (
            Task(
                name="feature-extraction",
                aliases=("embeddings",),
                default_model="onnx-community/all-MiniLM-L6-v2-ONNX",
                pipeline=FeatureExtractionPipeline,
                takes="text",
                gives="vectors, one a token or one a text",
            ),
            Task(
                name="text-classification",
                aliases=("sentiment-analysis",),
                default_model="Xenova/distilbert-base-uncased-finetuned-sst-2-english",
                pipeline=TextClassificationPipeline,
                takes="text, or two texts",
                gives="labels with scores",
            ),
            Task(
                name="token-classification",
                aliases=("ner",),
                default_model="Xenova/bert-base-multilingual-cased-ner-hrl",
                pipeline=TokenClassificationPipeline,
                takes="text",
                gives="entities, with labels, scores and places",
            ),
            Task(
                name="question-answering",
                aliases=(),
                default_model="Xenova/distilbert-base-cased-distilled-squad",
                pipeline=QuestionAnsweringPipeline,
                takes="a question and a context",
                gives="answers, with scores and places in the context",
            ),
            Task(
                name="fill-mask",
                aliases=(),
                default_model="onnx-community/ettin-encoder-32m-ONNX",
                pipeline=FillMaskPipeline,
                takes="text with masks, as in [MASK] or <mask>",
                gives="tokens for each mask, with scores",
            ),
            Task(
                name="zero-shot-classification",
                aliases=(),
                default_model="Xenova/distilbert-base-uncased-mnli",
                pipeline=ZeroShotClassificationPipeline,
                takes="text, and labels of your own",
                gives="the labels with scores",
            ),
        )
    }
)


def find(name: object) -> Task:
    """The task of this name or alias.

    Raises:
        InputError: There is none; names the nearest.
    """
    names = {one: task for task in TASKS.values() for one in (task.name, *task.aliases)}
    if isinstance(name, str) and name in names:
        return names[name]
    close = nearest(str(name), names)
    hint = f" Did you mean {close!r}?" if close else ""
    raise InputError(
        f"Unknown task {name!r}.{hint} Tasks: {', '.join(names)}.", value=name, nearest=close
    )
