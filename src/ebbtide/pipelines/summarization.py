"""summarization: a text, and what it says in short."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ebbtide.pipelines.text2text_generation import Own, Text2TextGenerationPipeline


class SummarizationPipeline(Text2TextGenerationPipeline):
    """A text in short.

    Example:
        >>> import ebbtide
        >>> with ebbtide.pipeline("summarization", "tests/models/gen-bart") as shorten:
        ...     found = shorten("The tide goes out twice a day.", max_new_tokens=4)
        >>> list(found[0])
        ['summary_text']
    """

    task: ClassVar[str] = "summarization"
    key: ClassVar[str] = "summary_text"

    def _own(self, options: dict[str, Any]) -> Own:
        return Own(*of_task(self._model.config.raw, self.task, self._defaults))


def of_task(
    config: Mapping[str, Any], task: str, defaults: Mapping[str, Any]
) -> tuple[Mapping[str, Any], str]:
    """The defaults of one task, as a model's config has them (T5), and what comes before a text."""
    tasks = config.get("task_specific_params")
    own = tasks.get(task) if isinstance(tasks, Mapping) else None
    if not isinstance(own, Mapping):
        return defaults, ""
    return {**defaults, **own}, str(own.get("prefix") or "")
