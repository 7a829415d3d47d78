"""The tokenizers library's own object, and what a model's files say beside it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from ebbtide.cancellation import CancelToken
from ebbtide.errors import InputError, LoadError
from ebbtide.hub import ModelFiles
from ebbtide.lifecycle import Remains
from ebbtide.memory.ledger import Native
from ebbtide.memory.pins import leak, let_go
from ebbtide.models.config import ModelConfig

_NO_LIMIT: Final = 10**9
"""Repositories write absurd numbers, such as 1e30, for "no limit"."""

_MASKS: Final = ("[MASK]", "<mask>")
_UNKNOWNS: Final = ("[UNK]", "<unk>")
_BEGINNINGS: Final = ("[CLS]", "<s>")
"""What special tokens are called where no file of the model says so, as in the oldest models."""
LONGEST_TEXT: Final = 250_000
"""Characters that are ever tokenised of one text: prose costs 0.2 s and 20 MB, emoji ten times."""

_CHARACTERS_A_TOKEN: Final = 16
"""How many characters a token are tried first when a text is cut to the window."""


@dataclasses.dataclass(frozen=True, slots=True)
class Rules:
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
    def read(cls, files: ModelFiles, config: ModelConfig) -> Rules:
        """What a model's files say."""
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


class Remade(Native):
    """One native object that is freed for a sleep, and made again when it is next needed."""

    what: ClassVar[str]
    """What it is, for the report of who still holds it."""

    _kept: Any = None
    _closed = False

    def sleep(self) -> Sequence[Remains]:
        """Free it for now."""
        native, self._kept = self._kept, None
        if native is None:
            return ()
        box = [native]
        del native
        return let_go(box, self.what)

    def close(self) -> Sequence[Remains]:
        """Free it."""
        self._closed = True
        return self.sleep()

    def leak(self) -> None:
        """In a forked child: never free it."""
        leak(self._kept)


class NativeTokenizer(Remade):
    """The tokenizers library's own object; shared by owners, and closed by the last."""

    what: ClassVar[str] = "the native tokenizer"

    def __init__(self, content: bytes, rules: Rules, path: Path) -> None:
        native = _native_tokenizer(content, path)
        self._path = path
        self._digest = hashlib.sha256(content).digest()
        self._margin = _margin(native)
        token_id = native.token_to_id(rules.pad_token) if rules.pad_token else None
        self.rules = rules
        self._kept = native
        self.mask_token = self._special(rules.mask_token, _MASKS)
        self.unknown_token = self._special(rules.unknown_token, _UNKNOWNS)
        self.cls_token = self._special(rules.cls_token, _BEGINNINGS)
        self.pad_id = rules.pad_id if token_id is None else int(token_id)

    def _special(self, named: str | None, usual: Sequence[str]) -> str | None:
        there = (one for one in usual if self.token_id(one) is not None)
        return named if named is not None else next(there, None)

    def prompt(self, text: str, *, special: bool) -> list[int]:
        """The ids of a whole text, with or without what marks its beginning and end."""
        if len(text) > LONGEST_TEXT:
            raise _too_long(text, "a prompt is needed whole")
        ids: list[int] = self._encode([text], special=special).ids
        return ids

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

    def _encode(self, texts: Sequence[str], *, special: bool = True) -> Any:
        try:
            return self._native.encode(*texts, add_special_tokens=special)
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
        return cleaned(text) if self.rules.clean_up else text

    def added(self) -> list[str]:
        """The tokens beside the vocabulary, as they are spelled."""
        return [one.content for one in self._native.get_added_tokens_decoder().values()]

    def special(self) -> list[str]:
        """Those of them that are no text."""
        added = self._native.get_added_tokens_decoder().values()
        return [one.content for one in added if one.special]

    def vocabulary(self) -> dict[str, int]:
        """All tokens, with their ids."""
        found: dict[str, int] = self._native.get_vocab(with_added_tokens=True)
        return found

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

    @property
    def _native(self) -> Any:
        native = self._kept
        if native is None and not self._closed:
            self._kept = native = self._read_again()
        return native

    def _read_again(self) -> Any:
        try:
            content = self._path.read_bytes()
        except OSError as error:
            raise LoadError(
                f"{self._path} cannot be read again: {error.strerror}.", path=str(self._path)
            ) from None
        if hashlib.sha256(content).digest() != self._digest:
            raise LoadError(
                f"{self._path} has changed since the pipeline was loaded: make a new pipeline.",
                path=str(self._path),
            )
        return _native_tokenizer(content, self._path)

    def wake(self, token: CancelToken) -> None:
        """Read it again, from the file it came from.

        Raises:
            LoadError: The file is gone, or another.
        """
        assert self._native is not None


def _native_tokenizer(content: bytes, path: Path) -> Any:
    import tokenizers

    try:
        native = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:
        raise LoadError(
            f"{path} is no tokenizer that can be read: {error}. Compare it with its source.",
            path=str(path),
        ) from None
    # The file carries the padding and truncation of whoever saved it (MiniLM's: always 128).
    native.no_padding()
    native.no_truncation()
    return native


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


def cleaned(text: str) -> str:
    """Take out the spaces that word-piece tokenizers leave before English punctuation."""
    for mark in (".", "?", "!", ",", "' ", "n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {mark}", mark.rstrip())
    return text
