"""Every task Ebbtide does, as one frozen table."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, cast

from ebbtide.errors import InputError, nearest

if TYPE_CHECKING:
    from ebbtide.pipelines.base import Pipeline


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """One task.

    Attributes:
        name: What to pass to `pipeline()`.
        aliases: Other names for it.
        default_model: The model used where none is named, as Transformers.js has it.
        class_name: The class that does it; its module is named for the task.
        takes: What goes in, in words.
        gives: What comes out, in words.
    """

    name: str
    aliases: tuple[str, ...]
    default_model: str
    class_name: str
    takes: str
    gives: str

    @property
    def pipeline(self) -> type[Pipeline]:
        """The class that does it; imported now, so that nobody waits for the other tasks'."""
        module = importlib.import_module(f"ebbtide.pipelines.{self.name.replace('-', '_')}")
        return cast("type[Pipeline]", getattr(module, self.class_name))


TASKS: Final[Mapping[str, Task]] = MappingProxyType(
    {
        task.name: task
        for task in (
            Task(
                name="feature-extraction",
                aliases=("embeddings",),
                default_model="onnx-community/all-MiniLM-L6-v2-ONNX",
                class_name="FeatureExtractionPipeline",
                takes="text",
                gives="vectors, one a token or one a text",
            ),
            Task(
                name="text-classification",
                aliases=("sentiment-analysis",),
                default_model="Xenova/distilbert-base-uncased-finetuned-sst-2-english",
                class_name="TextClassificationPipeline",
                takes="text, or two texts",
                gives="labels with scores",
            ),
            Task(
                name="token-classification",
                aliases=("ner",),
                default_model="Xenova/bert-base-multilingual-cased-ner-hrl",
                class_name="TokenClassificationPipeline",
                takes="text",
                gives="entities, with labels, scores and places",
            ),
            Task(
                name="question-answering",
                aliases=(),
                default_model="Xenova/distilbert-base-cased-distilled-squad",
                class_name="QuestionAnsweringPipeline",
                takes="a question and a context",
                gives="answers, with scores and places in the context",
            ),
            Task(
                name="fill-mask",
                aliases=(),
                default_model="onnx-community/ettin-encoder-32m-ONNX",
                class_name="FillMaskPipeline",
                takes="text with masks, as in [MASK] or <mask>",
                gives="tokens for each mask, with scores",
            ),
            Task(
                name="zero-shot-classification",
                aliases=(),
                default_model="Xenova/distilbert-base-uncased-mnli",
                class_name="ZeroShotClassificationPipeline",
                takes="text, and labels of your own",
                gives="the labels with scores",
            ),
            Task(
                name="text-generation",
                aliases=(),
                default_model="onnx-community/Qwen3-0.6B-ONNX",
                class_name="TextGenerationPipeline",
                takes="text, or a chat: messages with role and content",
                gives="text that goes on from it",
            ),
            Task(
                name="text2text-generation",
                aliases=(),
                default_model="Xenova/flan-t5-small",
                class_name="Text2TextGenerationPipeline",
                takes="text",
                gives="text that the model makes of it",
            ),
            Task(
                name="summarization",
                aliases=(),
                default_model="Xenova/distilbart-cnn-6-6",
                class_name="SummarizationPipeline",
                takes="text",
                gives="the text in short",
            ),
            Task(
                name="translation",
                aliases=(),
                default_model="Xenova/t5-small",
                class_name="TranslationPipeline",
                takes="text, and languages by name where the model has several",
                gives="the text in another language",
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
