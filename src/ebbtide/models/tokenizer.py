"""Text to token ids and back, by the tokenizers library; one native tokenizer a content, shared."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from ebbtide.cancellation import CancelToken
from ebbtide.errors import InputError, LoadError, PipelineDisposedError
from ebbtide.hub import ModelFiles
from ebbtide.lifecycle import Remains
from ebbtide.memory.ledger import Lease, ledger
from ebbtide.memory.pins import leak, let_go
from ebbtide.models.config import ModelConfig

Row = NDArray[np.int64]
Cut = Literal["longest", "first", "second"]

_NO_LIMIT: Final = 10**9
"""Repositories write absurd numbers, such as 1e30, for "no limit"."""

_MASKS: Final = ("[MASK]", "<mask>")
_UNKNOWNS: Final = ("[UNK]", "<unk>")
_BEGINNINGS: Final = ("[CLS]", "<s>")
"""What special tokens are called where no file of the model says so, as in the oldest models."""

TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

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
    clean_up: bool
    mask_token: str | None
    unknown_token: str | None
    cls_token: str | None

    @classmethod
    def read(cls, files: ModelFiles, config: ModelConfig) -> _Rules:
        raw = files.json("tokenizer_config.json") or {}
        limits = [raw.get("model_max_length"), config.positions]
        known = [int(one) for one in limits if isinstance(one, int | float) and 0 < one < _NO_LIMIT]
        more = files.json("special_tokens_map.json") or {}

        def named(key: str) -> str | None:
            token = raw[key] if key in raw else more.get(key)
            if isinstance(token, Mapping):
                token = token.get("content")
            return token if isinstance(token, str) else None

        padding = config.raw.get("pad_token_id")
        return cls(
            limit=min(known, default=None),
            pad_token=named("pad_token"),
            pad_id=padding if isinstance(padding, int) and padding >= 0 else 0,
            pad_left=raw.get("padding_side") == "left",
            cut_left=raw.get("truncation_side") == "left",
            clean_up=raw.get("clean_up_tokenization_spaces") is True,
            mask_token=named("mask_token"),
            unknown_token=named("unk_token"),
            cls_token=named("cls_token"),
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
        self._margin = _margin(native)
        token_id = native.token_to_id(rules.pad_token) if rules.pad_token else None
        self.rules = rules
        self._native: Any = native
        self.mask_token = self._special(rules.mask_token, _MASKS)
        self.unknown_token = self._special(rules.unknown_token, _UNKNOWNS)
        self.cls_token = self._special(rules.cls_token, _BEGINNINGS)
        self.pad_id = rules.pad_id if token_id is None else int(token_id)

    def _special(self, named: str | None, usual: Sequence[str]) -> str | None:
        there = (one for one in usual if self.token_id(one) is not None)
        return named if named is not None else next(there, None)

    def encode(self, text: str, pair: str | None, limit: int | None) -> Any:
        """The encoding of a text, or of two: all of it, or of what is longer a sure beginning.

        The library's `encode` runs on this thread alone; its batch call starts a pool of threads
        of its own, which never end and whose memory cannot be trimmed.

        Args:
            text: The text.
            pair: A second text.
            limit: How many tokens will be taken of each; None for all of them.
        """
        texts = [text] if pair is None else [text, pair]
        if limit is None:
            for one in texts:
                if len(one) > LONGEST_TEXT:
                    raise _too_long(one, "it is needed whole: there is no window to cut it to")
            return self._encode(texts)
        bound = min(LONGEST_TEXT, limit * _CHARACTERS_A_TOKEN + 1024)
        while True:
            cut = [one for one, whole in enumerate(texts) if len(whole) > bound]
            if not cut:
                return self._encode(texts)
            left = self.rules.cut_left
            encoding = self._encode([one[-bound:] if left else one[:bound] for one in texts])
            short = [one for one in cut if not self._fills(encoding, one, limit)]
            if not short:
                return encoding
            if bound == LONGEST_TEXT:
                raise _too_long(
                    texts[short[0]], f"the first {bound:,} hold fewer tokens than the window"
                )
            bound = min(LONGEST_TEXT, bound * 4)

    def _encode(self, texts: Sequence[str]) -> Any:
        try:
            return self._native.encode(*texts)
        except Exception as error:
            why = str(error)
            try:
                "".join(texts).encode()
            except UnicodeEncodeError as bad:
                why = f"it is no valid Unicode at character {bad.start} (half of a surrogate pair)"
            raise InputError(f"A text cannot be tokenised: {why}.") from None

    def _fills(self, encoding: Any, sequence: int, limit: int) -> bool:
        """Whether what lies beyond a cut cannot change the first (or last) ``limit`` tokens.

        It cannot where at least one whole word lies between the window and what was cut, since
        words are tokenised one by one. What was cut is the last word; or an added token, which in
        pieces is several words, and which may swallow the space beside it.
        """
        words = [
            word
            for word, of in zip(encoding.word_ids, encoding.sequence_ids, strict=True)
            if of == sequence and word is not None
        ]
        if len(words) <= limit:
            return False
        if self.rules.cut_left:
            return bool(words[-limit] >= self._margin)
        return bool(words[-1] >= words[limit - 1] + self._margin)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of these ids."""
        text: str = self._native.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return _cleaned(text) if self.rules.clean_up else text

    def join(self, tokens: Sequence[str]) -> str:
        """The text that these tokens spell."""
        decoder = self._native.decoder
        return str(decoder.decode(list(tokens))) if decoder else " ".join(tokens)

    def token_id(self, token: str) -> int | None:
        """The id of a token, or None where the vocabulary has none such."""
        found: int | None = self._native.token_to_id(token)
        return found

    def token(self, token_id: int) -> str:
        """The token of an id, as the vocabulary spells it; empty where there is none."""
        return str(self._native.id_to_token(int(token_id)) or "")

    @property
    def marks_subwords(self) -> bool:
        """Whether a token that continues a word is spelled differently, as in ``##ing``."""
        return bool(getattr(self._native.model, "continuing_subword_prefix", None))

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


def _cleaned(text: str) -> str:
    """Take out the spaces that word-piece tokenizers leave before English punctuation."""
    for mark in (".", "?", "!", ",", "' ", "n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {mark}", mark.rstrip())
    return text


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
        rules = _Rules.read(files, config)
        key = (hashlib.sha256(content).digest(), rules)

        def load() -> NativeTokenizer:
            return NativeTokenizer(content, rules, str(path))

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

    def pad(self, encodings: Sequence[Encoding]) -> Batch:
        """Make one batch, padded to the longest."""
        return self._padded([(one.ids, one.type_ids) for one in encodings])

    def _padded(self, rows: Sequence[tuple[Row, Row]]) -> Batch:
        native = self._native()
        if len(rows) == 1:
            ids, type_ids = rows[0]
            return Batch(ids[None], np.ones((1, len(ids)), np.int64), type_ids[None])
        width = max(len(ids) for ids, _ in rows)
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
