"""Text to token ids and back, by the tokenizers library; one native tokenizer a content, shared."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ebbtide.errors import InputError, LoadError, PipelineDisposedError
from ebbtide.hub import ModelFiles
from ebbtide.lifecycle import Remains
from ebbtide.memory.ledger import Lease, ledger
from ebbtide.memory.pins import leak, let_go
from ebbtide.models.config import ModelConfig

Row = NDArray[np.int64]

_NO_LIMIT: Final = 10**9
"""Repositories write absurd numbers, such as 1e30, for "no limit"."""

LONGEST_TEXT: Final = 250_000
"""Characters that are ever tokenised of one text: prose costs 0.2 s and 20 MB, emoji ten times."""

_CHARACTERS_A_TOKEN: Final = 16
"""How many characters a token are tried first when a text is cut to the window."""


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """Tokenised texts, padded to one length.

    Attributes:
        input_ids: int64, [texts, tokens].
        attention_mask: int64, [texts, tokens]: 1 for a token, 0 for padding.
        token_type_ids: int64, [texts, tokens]: which of two texts a token is of.
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    token_type_ids: NDArray[np.int64]

    def rows(self, start: int, stop: int, *, keep_width: bool = False) -> Batch:
        """Some of the texts, and without ``keep_width`` only the columns that they fill."""
        if start == 0 and stop >= len(self.input_ids):
            return self
        mask = self.attention_mask[start:stop]
        filled = np.flatnonzero(mask.any(axis=0))
        span = slice(None) if keep_width or not len(filled) else slice(filled[0], filled[-1] + 1)
        return Batch(
            self.input_ids[start:stop, span], mask[:, span], self.token_type_ids[start:stop, span]
        )


@dataclasses.dataclass(frozen=True, slots=True)
class _Rules:
    """How a model wants its text tokenised, beside what tokenizer.json says."""

    limit: int | None
    pad_token: str | None
    pad_id: int
    pad_left: bool
    cut_left: bool

    @classmethod
    def read(cls, files: ModelFiles, config: ModelConfig) -> _Rules:
        raw = files.json("tokenizer_config.json") or {}
        limits = [raw.get("model_max_length"), config.positions]
        known = [int(one) for one in limits if isinstance(one, int | float) and 0 < one < _NO_LIMIT]
        token = raw.get("pad_token")
        if isinstance(token, Mapping):
            token = token.get("content")
        padding = config.raw.get("pad_token_id")
        return cls(
            limit=min(known, default=None),
            pad_token=token if isinstance(token, str) else None,
            pad_id=padding if isinstance(padding, int) and padding >= 0 else 0,
            pad_left=raw.get("padding_side") == "left",
            cut_left=raw.get("truncation_side") == "left",
        )


class NativeTokenizer:
    """The tokenizers library's own object; shared by owners, and closed by the last."""

    def __init__(self, content: bytes, rules: _Rules, path: str) -> None:
        import tokenizers

        try:
            native = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:
            raise LoadError(
                f"{path} is no tokenizer that can be read: {error}. Compare it with its source.",
                path=path,
            ) from None
        # The file carries the padding and truncation of whoever saved it (MiniLM's: always 128).
        native.no_padding()
        native.no_truncation()
        if rules.limit is not None:
            native.enable_truncation(
                max_length=rules.limit, direction="left" if rules.cut_left else "right"
            )
        self._margin = _margin(native)
        token_id = native.token_to_id(rules.pad_token) if rules.pad_token else None
        self.rules = rules
        self.pad_id = rules.pad_id if token_id is None else int(token_id)
        self._native: Any = native

    def encode(self, text: str) -> Any:
        """One text's encoding, cut to the model's window where it has one.

        The library's `encode` runs on this thread alone; its batch call starts a pool of threads
        of its own, which never end and whose memory cannot be trimmed.
        """
        limit = self.rules.limit
        if limit is None:
            if len(text) > LONGEST_TEXT:
                raise _too_long(text, "the model has no window to cut it to")
            return self._encode(text)
        bound = min(LONGEST_TEXT, limit * _CHARACTERS_A_TOKEN + 1024)
        while bound < len(text):
            encoding = self._encode(text[-bound:] if self.rules.cut_left else text[:bound])
            if self._window_is_full(encoding):
                return encoding
            if bound == LONGEST_TEXT:
                raise _too_long(text, f"the first {bound:,} hold fewer tokens than the window")
            bound = min(LONGEST_TEXT, bound * 4)
        return self._encode(text)

    def _encode(self, text: str) -> Any:
        try:
            return self._native.encode(text)
        except Exception as error:
            why = str(error)
            try:
                text.encode()
            except UnicodeEncodeError as bad:
                why = f"it is no valid Unicode at character {bad.start} (half of a surrogate pair)"
            raise InputError(f"A text cannot be tokenised: {why}.") from None

    def _window_is_full(self, encoding: Any) -> bool:
        """Whether what lies beyond the cut cannot change the window.

        It cannot where at least one whole word lies between the window and what was cut, since
        words are tokenised one by one. What was cut is the last word; or an added token, which in
        pieces is several words, and which may swallow the space beside it.
        """
        words = [one for one in encoding.word_ids if one is not None]
        if not encoding.overflowing or not words:
            return False
        if self.rules.cut_left:
            return bool(words[0] >= self._margin)
        last = max(
            one for part in encoding.overflowing for one in (*part.word_ids, -1) if one is not None
        )
        return bool(last >= words[-1] + self._margin)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of these ids."""
        text: str = self._native.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def close(self) -> Sequence[Remains]:
        """Free it."""
        native, self._native = self._native, None
        if native is None:
            return ()
        box = [native]
        del native
        return let_go(box, "the native tokenizer")

    def leak(self) -> None:
        """In a forked child: never free it."""
        leak(self._native)


def _margin(native: Any) -> int:
    """How many words may come of what was cut, and one that is whole."""
    split = native.pre_tokenizer.pre_tokenize_str if native.pre_tokenizer else None
    pieces = 1
    for token in native.get_added_tokens_decoder().values():
        parts = len(split(token.content)) if split else 1
        pieces = max(pieces, parts + int(token.lstrip or token.rstrip))
    return pieces + 1


def _too_long(text: str, why: str) -> InputError:
    return InputError(
        f"A text of {len(text):,} characters is too long: {why}. Split it, and pass the parts.",
        value=len(text),
    )


def _kept(special: Sequence[int], limit: int, cut_left: bool) -> list[int]:
    """Which positions a smaller window keeps: the special tokens at both ends, and what fits."""
    count = len(special)
    before = next((n for n, one in enumerate(special) if not one), count)
    after = next((n for n, one in enumerate(reversed(special)) if not one), 0)
    room = max(0, limit - before - after)
    first = count - after - room if cut_left else before
    ends = [*range(before)], [*range(count - after, count)]
    return [*ends[0], *range(first, first + room), *ends[1]]


class Tokenizer:
    """A model's tokenizer as one pipeline owns it; empty once that pipeline is disposed."""

    def __init__(self, lease: Lease[NativeTokenizer], label: str) -> None:
        self._lease = lease
        self._label = label

    @classmethod
    def load(cls, files: ModelFiles, config: ModelConfig, label: str) -> Tokenizer:
        """A model's tokenizer: the one that is alive with the same content, or a new one.

        Raises:
            ModelNotFoundError: The model has no tokenizer.json.
            LoadError: It cannot be read.
        """
        path = files.need(
            "tokenizer.json",
            "it is needed to tokenise text. Where a model has only a vocabulary file,"
            " `AutoTokenizer.from_pretrained(...).save_pretrained(...)` of transformers writes it.",
        )
        import_module("tokenizers")  # before its load is measured, once a process
        content = files.content("tokenizer.json")
        rules = _Rules.read(files, config)
        key = (hashlib.sha256(content).digest(), rules)
        lease = ledger.acquire(key, "tokenizer", lambda: NativeTokenizer(content, rules, str(path)))
        return cls(lease, label)

    @property
    def lease(self) -> Lease[NativeTokenizer]:
        """This pipeline's hold on the native tokenizer."""
        return self._lease

    @property
    def limit(self) -> int | None:
        """Tokens that the model's window takes, special ones included; None where it has none."""
        return self._native().rules.limit

    def ids(self, text: str, *, limit: int | None = None) -> list[int]:
        """One text's token ids, cut to the model's window.

        Args:
            text: The text.
            limit: A smaller window, in tokens.

        Raises:
            InputError: The text is too long for what can be cut, or is no valid Unicode.
            PipelineDisposedError: The pipeline is disposed.
        """
        ids: list[int] = self._encoded(text, limit)[0].tolist()
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of these token ids.

        Args:
            ids: Token ids.
            skip_special_tokens: Leave out what marks the text's beginning, end and padding.
        """
        return self._native().decode(ids, skip_special_tokens=skip_special_tokens)

    def batch(self, texts: Sequence[str], *, limit: int | None = None) -> Batch:
        """Tokenise texts and pad them to the longest.

        Args:
            texts: The texts.
            limit: A smaller window than the model's, in tokens.
        """
        native = self._native()
        encoded = [self._encoded(text, limit) for text in texts]
        width = max(len(ids) for ids, _ in encoded)
        shape = (len(texts), width)
        input_ids = np.full(shape, native.pad_id, np.int64)
        mask = np.zeros(shape, np.int64)
        types = np.zeros(shape, np.int64)
        for row, (ids, type_ids) in enumerate(encoded):
            span = slice(width - len(ids), width) if native.rules.pad_left else slice(len(ids))
            input_ids[row, span] = ids
            mask[row, span] = 1
            types[row, span] = type_ids
        return Batch(input_ids, mask, types)

    def _encoded(self, text: str, limit: int | None) -> tuple[Row, Row]:
        native = self._native()
        encoding = native.encode(text)
        # As arrays at once: a batch's ids as Python numbers would leave megabytes in their heap.
        ids = np.array(encoding.ids, np.int64)
        type_ids = np.array(encoding.type_ids, np.int64)
        if limit is None or len(ids) <= limit:
            return ids, type_ids
        kept = _kept(encoding.special_tokens_mask, limit, native.rules.cut_left)
        return ids[kept], type_ids[kept]

    def _native(self) -> NativeTokenizer:
        native = self._lease.value
        if native is None:
            raise PipelineDisposedError(
                f"The tokenizer of {self._label} was disposed with it. Make a new pipeline.",
                pipeline=self._label,
            )
        return native
