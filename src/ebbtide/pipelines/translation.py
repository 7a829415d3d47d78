"""translation: a text in another language."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ebbtide.errors import InputError
from ebbtide.pipelines.summarization import of_task
from ebbtide.pipelines.text2text_generation import Own, Text2TextGenerationPipeline


class TranslationPipeline(Text2TextGenerationPipeline):
    """A text in another language.

    Models for two languages (Marian) need no names; those for many (NLLB, mBART, M2M100) take
    ``tgt_lang`` and ``src_lang`` by the codes that they were taught. A T5 has texts that name the
    two before each text: ``src_lang="en", tgt_lang="fr"`` chooses one.

    Example:
        >>> import ebbtide
        >>> with ebbtide.pipeline("translation", "tests/models/gen-marian") as translate:
        ...     found = translate("The tide goes out.", max_new_tokens=4)
        >>> list(found[0])
        ['translation_text']
    """

    task: ClassVar[str] = "translation"
    key: ClassVar[str] = "translation_text"

    def _own(self, options: dict[str, Any]) -> Own:
        source, target = options.pop("src_lang", None), options.pop("tgt_lang", None)
        tasks = self._model.config.raw.get("task_specific_params")
        known = [
            name for name in (tasks if isinstance(tasks, Mapping) else {})
            if name.startswith("translation_")
        ]  # fmt: skip
        task, language = "", None
        if known:
            task = _among(known, source, target)
        else:
            if target is not None:
                options["forced_bos_token_id"] = self._seq2seq.language(target)
            if source is not None:
                language = self._seq2seq.language(source)
        return Own(*of_task(self._model.config.raw, task, self._defaults), language)


def _among(known: list[str], source: object, target: object) -> str:
    """Which of a model's translations is asked for; the first where nothing is said."""
    if source is None and target is None:
        return known[0]
    wanted = f"translation_{source}_to_{target}"
    if wanted in known:
        return wanted
    pairs = ", ".join(one.removeprefix("translation_").replace("_to_", " to ") for one in known)
    raise InputError(
        f"The model does not translate from {source!r} to {target!r}: it translates {pairs}. Pass"
        " these as src_lang and tgt_lang.",
        value=(source, target),
    )
