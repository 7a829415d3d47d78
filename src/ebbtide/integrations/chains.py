"""What LangChain's and LlamaIndex's interfaces share: where their pipeline comes from, and words.

A source is a pipeline, which its maker disposes, or a manager, which lends one for each call.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, Field, PrivateAttr

from ebbtide.errors import InputError
from ebbtide.factory import Model, checked
from ebbtide.lifecycle import Disposable
from ebbtide.manager.lease import OF_A_LEASE
from ebbtide.manager.manager import PipelineManager


class Source:
    """Where an interface has its pipeline from, call by call.

    Args:
        where: Whose source it is, for messages.
        task: What the pipeline has to do.
        source: A pipeline or a manager.
        model: Of a manager's pipeline.
        options: Of a manager's pipeline, and of its lease.

    Raises:
        InputError: It is neither, or a pipeline with what only a manager can use, or of another
            task.
    """

    def __init__(
        self, where: str, task: str, source: object, model: Model, options: Mapping[str, Any]
    ) -> None:
        self._source: Any = source
        self._asked: tuple[str, Model, Any] = (task, model, dict(options))
        if isinstance(source, PipelineManager):
            of_pipeline: Any = {k: one for k, one in options.items() if k not in OF_A_LEASE}
            checked(where, task, of_pipeline, OF_A_LEASE)
            return
        if not isinstance(source, Disposable):
            raise InputError(
                f"{where} takes a pipeline or a PipelineManager as source=, not"
                f" {type(source).__name__}. Make one with ebbtide.pipeline({task!r}).",
                value=source,
            )
        if model is not None or options:
            raise InputError(
                f"{where} has a pipeline already: model= and options= are for a manager.",
                value=model or options,
            )
        if getattr(source, "task", task) != task:
            raise InputError(f"{where} takes a pipeline for {task}, not {source!r}.", value=source)

    @property
    def model(self) -> str:
        """The model's name."""
        if isinstance(self._source, PipelineManager):
            return str(self._asked[1] or "default")
        return str(getattr(self._source, "model", "unknown"))

    def embed(self, texts: Sequence[str], call: Mapping[str, Any]) -> list[list[float]]:
        """One vector a text.

        Raises:
            InputError: The model gives one a token.
        """
        if not texts:
            return []
        with self.lend() as pipe:
            return _rows(pipe(list(texts), **call))

    async def aembed(self, texts: Sequence[str], call: Mapping[str, Any]) -> list[list[float]]:
        """The same as `embed`, without blocking the event loop."""
        if not texts:
            return []
        async with self.lend() as pipe:
            return _rows(await pipe.acall(list(texts), **call))

    def rank(self, query: str, texts: Sequence[str], top: int | None) -> list[tuple[int, float]]:
        """Which texts answer a query best, and their scores; the best first."""
        if not texts:
            return []
        with self.lend() as pipe:
            return _places(pipe.rank(query, texts, top_k=top))

    async def arank(
        self, query: str, texts: Sequence[str], top: int | None
    ) -> list[tuple[int, float]]:
        """The same as `rank`, without blocking the event loop."""
        if not texts:
            return []
        async with self.lend() as pipe:
            return _places(await pipe.arank(query, texts, top_k=top))

    def lend(self) -> Any:
        """The pipeline for one call: a context manager, sync and async."""
        if isinstance(self._source, PipelineManager):
            task, model, options = self._asked
            return self._source.acquire(task, model, **options)
        return contextlib.nullcontext(self._source)


class Fields(BaseModel):
    """Fields of an interface that the library makes of pydantic's models; see `Source`."""

    task: ClassVar[str]
    """What its pipeline has to do."""

    source: Any = Field(exclude=True, repr=False)
    model: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    _from: Source = PrivateAttr()

    def __init__(self, **fields: Any) -> None:
        """Take the attributes, by name, and those of the library's own."""
        super().__init__(**fields)
        where = type(self).__name__
        self._from = Source(where, self.task, self.source, self.model, self.options)


def _rows(vectors: Any) -> list[list[float]]:
    if vectors.ndim != 2:
        raise InputError(
            "This model does not say how its token vectors become one for a text. Add"
            " call_options={'pooling': 'mean'} (or 'cls', as its card says).",
            value=vectors.shape,
        )
    found: list[list[float]] = vectors.astype("float64").tolist()
    return found


def _places(ranked: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    return [(one["corpus_id"], float(one["score"])) for one in ranked]


def tool_calls(message: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """The calls of tools that a message asks for: identifier, name and arguments of each.

    Example:
        >>> tool_calls({"tool_calls": [{"id": "a", "function": {"name": "tide", "arguments": {}}}]})
        [('a', 'tide', {})]
    """
    found = []
    for one in message.get("tool_calls", ()):
        arguments = one["function"].get("arguments") or {}
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        found.append((one.get("id") or uuid.uuid4().hex, one["function"]["name"], arguments))
    return found


def generation(
    defaults: Mapping[str, Any], stop: Sequence[str] | None, asked: Mapping[str, Any]
) -> dict[str, Any]:
    r"""Options of one generation, the later ones first; ``stop`` is text that ends it.

    Example:
        >>> generation({"max_new_tokens": 5}, ["\n"], {"max_new_tokens": 3})
        {'max_new_tokens': 3, 'stop_strings': ['\n']}
    """
    return {**defaults, **asked, **({"stop_strings": list(stop)} if stop else {})}


class Cut:
    """Cuts a text that comes in pieces before the first of some texts that end it.

    Args:
        stop: Those texts.

    Example:
        >>> cut = Cut(["END"])
        >>> [cut.next("low water E"), cut.next("bb EN"), cut.next("D and"), cut.rest()]
        ['low water ', 'Ebb ', '', '']
    """

    def __init__(self, stop: Sequence[str] | None) -> None:
        self._stop = [one for one in stop or () if one]
        self._held = ""
        self._is_over = False

    def next(self, text: str) -> str:
        """What of the text so far is known to come before the end, and was not given yet."""
        if self._is_over:
            return ""
        self._held += text
        found = [place for one in self._stop if (place := self._held.find(one)) >= 0]
        if found:
            self._is_over = True
            keep = min(found)
        else:
            keep = len(self._held) - max(map(self._begun, self._stop), default=0)
        given, self._held = self._held[:keep], self._held[keep:]
        return given

    def rest(self) -> str:
        """What was held back, once nothing more comes."""
        return "" if self._is_over else self._held

    def _begun(self, stop: str) -> int:
        """How many letters at the end may be the begin of a text that ends it."""
        sizes = range(min(len(stop) - 1, len(self._held)), 0, -1)
        return next((size for size in sizes if self._held.endswith(stop[:size])), 0)
