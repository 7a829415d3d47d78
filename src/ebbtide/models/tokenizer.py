"""Text to token ids and back, by the tokenizers library; one native tokenizer a content, shared."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from ebbtide.cancellation import CancelToken
from ebbtide.errors import InputError, PipelineDisposedError
from ebbtide.hub import ModelFiles
from ebbtide.memory.ledger import Lease, ledger
from ebbtide.models.config import ModelConfig
from ebbtide.models.native_tokenizer import NativeTokenizer, Rules

Row = NDArray[np.int64]
Cut = Literal["longest", "first", "second"]

TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


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


@dataclasses.dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of one text, or of two.

    Attributes:
        ids: Token ids: int64, [tokens].
        type_ids: Which of two texts a token is of, as the model was taught: int64, [tokens].
    """

    ids: Row
    type_ids: Row

    def __len__(self) -> int:
        return len(self.ids)


class Encoding:
    """The tokens of one text, or of two, cut to a window.

    Args:
        native: The library's encoding, which is never cut.
        kept: Which of its tokens are in the window; None for all.
    """

    __slots__ = ("_kept", "_native")

    def __init__(self, native: Any, kept: Row | None) -> None:
        self._native = native
        self._kept = kept

    def __len__(self) -> int:
        return len(self._native) if self._kept is None else len(self._kept)

    @property
    def ids(self) -> Row:
        """Token ids: int64, [tokens]."""
        return self._of(self._native.ids)

    @property
    def type_ids(self) -> Row:
        """Which of two texts a token is of, as the model was taught: int64, [tokens]."""
        return self._of(self._native.type_ids)

    @property
    def sequences(self) -> Row:
        """Which text a token is of: 0, 1, or -1 for a token of neither: int64, [tokens]."""
        return self._of([-1 if one is None else one for one in self._native.sequence_ids])

    @property
    def words(self) -> Row:
        """Which word of its text a token is of, -1 for none: int64, [tokens]."""
        return self._of([-1 if one is None else one for one in self._native.word_ids])

    @property
    def offsets(self) -> Row:
        """Where in its text a token begins and ends, in characters: int64, [tokens, 2]."""
        return self._of(self._native.offsets)

    def tokens(self) -> Tokens:
        """What a graph is fed of it, which takes a tenth of what the whole takes."""
        return Tokens(self.ids, self.type_ids)

    def _of(self, values: Sequence[Any]) -> Row:
        # As arrays at once: a batch's ids as Python numbers would leave megabytes in their heap.
        array = np.array(values, np.int64)
        return array if self._kept is None else array[self._kept]


def _windows(
    native: Any, limit: int, cut: Cut, cut_left: bool, stride: int | None
) -> Iterator[Row]:
    """Which tokens of an encoding each window has; without a stride there is one window.

    Raises:
        InputError: The text that must not be cut leaves no room.
    """
    of = np.array([-1 if one is None else one for one in native.sequence_ids])
    first, second = np.flatnonzero(of == 0), np.flatnonzero(of == 1)
    room = max(0, limit - (len(of) - len(first) - len(second)))
    if not len(second):
        sizes = min(len(first), room), 0
    elif cut == "longest":
        sizes = _halves(len(first), len(second), room)
    else:
        whole, other = (first, second) if cut == "second" else (second, first)
        if len(whole) >= room:
            raise InputError(
                f"The {'first' if cut == 'second' else 'second'} of two texts has {len(whole)}"
                f" tokens, and must be read whole in a window of {limit}: shorten it.",
                value=len(whole),
            )
        left_over = min(len(other), room - len(whole))
        sizes = (len(first), left_over) if cut == "second" else (left_over, len(second))
    frame = np.flatnonzero(of == -1)
    moving, size = (second, sizes[1]) if cut == "second" and len(second) else (first, sizes[0])
    fixed = _ended(first if moving is second else second, sizes[moving is not second], cut_left)
    if stride is None or size == len(moving):
        yield np.sort(np.concatenate([frame, fixed, _ended(moving, size, cut_left)]))
        return
    if stride >= size:
        raise InputError(
            f"A stride of {stride} tokens leaves nothing to move on by: a window has room for"
            f" {size}. Pass a smaller stride or a larger window.",
            value=stride,
        )
    count = len(moving)
    for start in range(0, count, size - stride):
        first_of_it = max(0, count - start - size) if cut_left else start
        part = moving[first_of_it : count - start if cut_left else start + size]
        yield np.sort(np.concatenate([frame, fixed, part]))
        if start + size >= count:
            return


def _ended(tokens: Row, size: int, cut_left: bool) -> Row:
    return tokens[len(tokens) - size :] if cut_left else tokens[:size]


def _halves(first: int, second: int, room: int) -> tuple[int, int]:
    """How much of two texts fits: the longer is cut to what the shorter leaves, or both to half."""
    if first + second <= room:
        return first, second
    short, long = min(first, second), max(first, second)
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short = room // 2
        long = short + room % 2
    return (short, long) if first <= second else (long, short)


class Tokenizer:
    """A model's tokenizer as one pipeline owns it; empty once that pipeline is disposed."""

    def __init__(self, lease: Lease[NativeTokenizer], label: str) -> None:
        self._lease = lease
        self._label = label

    @classmethod
    def load(cls, files: ModelFiles, config: ModelConfig, token: CancelToken) -> Tokenizer:
        """A model's tokenizer: the one that is alive with the same content, or a new one.

        Raises:
            ModelNotFoundError: The model has no tokenizer.json.
            LoadError: It cannot be read.
            PipelineCancelledError: The token was cancelled.
        """
        path = files.need(
            "tokenizer.json",
            "it is needed to tokenise text. Where a model has only a vocabulary file,"
            " `AutoTokenizer.from_pretrained(...).save_pretrained(...)` of transformers writes it.",
        )
        import_module("tokenizers")  # before its load is measured, once a process
        content = files.content("tokenizer.json")
        rules = Rules.read(files, config)
        key = (hashlib.sha256(content).digest(), rules)

        def load() -> NativeTokenizer:
            return NativeTokenizer(content, rules, path)

        return cls(ledger.acquire(key, "tokenizer", load, token), token.label)

    @property
    def lease(self) -> Lease[NativeTokenizer]:
        """This pipeline's hold on the native tokenizer."""
        return self._lease

    @property
    def limit(self) -> int | None:
        """Tokens that the model's window takes, special ones included; None where it has none."""
        return self._native().rules.limit

    @property
    def pad_id(self) -> int:
        """The id of the padding token."""
        return self._native().pad_id

    @property
    def marks_subwords(self) -> bool:
        """Whether a token that continues a word is spelled differently, as in ``##ing``."""
        return self._native().marks_subwords

    @property
    def unknown_id(self) -> int | None:
        """The id of the token for what the vocabulary does not have; None where it has none."""
        return self._id_of(self._native().unknown_token)

    @property
    def mask_token(self) -> str | None:
        """The token that stands for what a model is to fill in; None where it has none."""
        return self._native().mask_token

    @property
    def mask_id(self) -> int | None:
        """The id of the mask token."""
        return self._id_of(self._native().mask_token)

    @property
    def cls_id(self) -> int | None:
        """The id of the token that stands for a whole text; None where it has none."""
        return self._id_of(self._native().cls_token)

    @property
    def pads_left(self) -> bool:
        """Whether shorter texts of a batch are padded at their beginning."""
        return self._native().rules.pad_left

    def ids(self, text: str, *, limit: int | None = None) -> list[int]:
        """One text's token ids, cut to the model's window.

        Args:
            text: The text.
            limit: A smaller window, in tokens.

        Raises:
            InputError: The text is too long for what can be cut, or is no valid Unicode.
            PipelineDisposedError: The pipeline is disposed.
        """
        ids: list[int] = self.encode(text, limit=limit).ids.tolist()
        return ids

    def prompt(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """A whole text's token ids, however many.

        Args:
            text: The text.
            add_special_tokens: Add what marks a text's beginning and end for this model.

        Raises:
            InputError: The text has more characters than are ever tokenised, or is no valid
                Unicode.
            PipelineDisposedError: The pipeline is disposed.
        """
        return self._native().prompt(text, special=add_special_tokens)

    def token_id(self, token: str) -> int | None:
        """The id of a token, spelled as the vocabulary has it; None where it has none such."""
        return self._native().token_id(token)

    def token(self, token_id: int) -> str:
        """The token of an id, as the vocabulary spells it."""
        return self._native().token(token_id)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of these token ids.

        Args:
            ids: Token ids.
            skip_special_tokens: Leave out what marks the text's beginning, end and padding.
        """
        return self._native().decode(ids, skip_special_tokens=skip_special_tokens)

    def added(self) -> list[str]:
        """The tokens that stand beside the vocabulary: special ones, and those of languages."""
        return self._native().added()

    @property
    def cleans(self) -> bool:
        """Whether spaces before punctuation are taken out of a text."""
        return self._native().rules.clean_up

    def special(self) -> list[str]:
        """The tokens that are no text, as they are spelled."""
        return self._native().special()

    def has_tokens_of(self, other: Tokenizer) -> bool:
        """Whether another tokenizer has the same tokens, by the same ids."""
        one, two = self._native(), other._native()
        return one is two or one.vocabulary() == two.vocabulary()

    def join(self, tokens: Sequence[str]) -> str:
        """The text that these tokens spell."""
        return self._native().join(tokens)

    def encode(
        self,
        text: str,
        pair: str | None = None,
        *,
        limit: int | None = None,
        cut: Cut = "longest",
    ) -> Encoding:
        """Tokenise one text, or two that the model reads together, cut to the model's window.

        Args:
            text: The text.
            pair: A second text.
            limit: A smaller window, in tokens.
            cut: Which of two texts is cut: the longest, or only the first or the second.

        Raises:
            InputError: A text is too long for what can be cut, or is no valid Unicode.
            PipelineDisposedError: The pipeline is disposed.
        """
        native = self._native()
        limit = _smaller(limit, native.rules.limit)
        encoding = native.encode(text, pair, limit)
        if limit is None or len(encoding) <= limit:
            return Encoding(encoding, None)
        (kept,) = _windows(encoding, limit, cut, native.rules.cut_left, None)
        return Encoding(encoding, kept)

    def windows(
        self,
        text: str,
        pair: str | None = None,
        *,
        limit: int | None = None,
        cut: Cut = "longest",
        stride: int = 0,
    ) -> list[Encoding]:
        """Tokenise a text of any length into windows that overlap.

        Args:
            text: The text.
            pair: A second text.
            limit: A smaller window than the model's, in tokens.
            cut: Which of two texts moves on from window to window; the other is in each, whole.
            stride: How many tokens a window shares with the one before.

        Raises:
            InputError: There is no room to move on, a text has more characters than are ever
                tokenised, or is no valid Unicode.
            PipelineDisposedError: The pipeline is disposed.
        """
        native = self._native()
        limit = _smaller(limit, native.rules.limit)
        encoding = native.encode(text, pair, None)
        if limit is None or len(encoding) <= limit:
            return [Encoding(encoding, None)]
        windows = _windows(encoding, limit, cut, native.rules.cut_left, stride)
        return [Encoding(encoding, kept) for kept in windows]

    def batch(self, texts: Sequence[str], *, limit: int | None = None) -> Batch:
        """Tokenise texts and pad them to the longest.

        Args:
            texts: The texts.
            limit: A smaller window than the model's, in tokens.
        """
        encoded = (self.encode(text, limit=limit) for text in texts)
        return self._padded([(one.ids, one.type_ids) for one in encoded])

    def pad(self, encodings: Sequence[Encoding | Tokens], width: int = 0) -> Batch:
        """Make one batch, padded to the longest, or to ``width`` tokens where that is more."""
        return self._padded([(one.ids, one.type_ids) for one in encodings], width)

    def pad_ids(self, rows: Sequence[Sequence[int]]) -> Batch:
        """Make one batch of token ids, padded to the longest as the model was taught."""
        ids = [np.array(one, np.int64) for one in rows]
        return self._padded([(one, np.zeros_like(one)) for one in ids])

    def _padded(self, rows: Sequence[tuple[Row, Row]], width: int = 0) -> Batch:
        native = self._native()
        width = max(width, *(len(ids) for ids, _ in rows))
        if len(rows) == 1 and width == len(rows[0][0]):
            ids, type_ids = rows[0]
            return Batch(ids[None], np.ones((1, width), np.int64), type_ids[None])
        shape = (len(rows), width)
        input_ids = np.full(shape, native.pad_id, np.int64)
        mask = np.zeros(shape, np.int64)
        types = np.zeros(shape, np.int64)
        for row, (ids, type_ids) in enumerate(rows):
            span = slice(width - len(ids), width) if native.rules.pad_left else slice(len(ids))
            input_ids[row, span] = ids
            mask[row, span] = 1
            types[row, span] = type_ids
        return Batch(input_ids, mask, types)

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self.token_id(token)

    def _native(self) -> NativeTokenizer:
        native = self._lease.value
        if native is None:
            raise PipelineDisposedError(
                f"The tokenizer of {self._label} was disposed with it. Make a new pipeline.",
                pipeline=self._label,
            )
        return native


def _smaller(limit: int | None, window: int | None) -> int | None:
    known = [one for one in (limit, window) if one is not None]
    return min(known, default=None)
