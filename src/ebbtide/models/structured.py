"""Output of a given form: only the tokens that can go on to it are let through, by llguidance.

What is asked for (a JSON schema, a regular expression, choices, a grammar) is read by `Form.of`,
which needs no library. A `Vocabulary` is a tokenizer as the library wants it; pipelines that share
a tokenizer share one. Both make a `Structure`, and that one `StructuredRows` for each generation: a
processor of scores, which keeps a matcher for each row by what was written of it.
"""

from __future__ import annotations

import json
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from ebbtide.cancellation import CancelToken
from ebbtide.errors import (
    InputError,
    MissingExtraError,
    PipelineDisposedError,
    UnsupportedModelError,
)
from ebbtide.memory.ledger import Lease, ledger
from ebbtide.models.native_tokenizer import NativeTokenizer, Remade
from ebbtide.models.structured_form import Form, refused
from ebbtide.models.tokenizer import Tokenizer

Ids = NDArray[np.int64]
Scores = NDArray[np.float32]

WHITESPACE: Final = r" ?|\n {0,16}"
"""Between the parts of JSON: one space, or a new line that is indented. Without a bound, a small
model can go on with spaces for ever."""

SLICES: Final[tuple[str, ...]] = (r'[^"\\\x00-\x1F\x7F]+',)
"""Tokens that may come anywhere inside a JSON string, looked at as one: with 150,000 tokens, the
slowest of a hundred steps took 19 ms without it and 9 ms with it, and 11 MB more."""

_SPACE: Final = "\N{LOWER ONE EIGHTH BLOCK}"
"""What sentencepiece writes for a space."""

_AFTER_A_SPACE: Final = """%llguidance {"no_forcing": true}
start: " "? @inner
"""
"""Nothing is forced, as such a vocabulary may have no tokens for it."""

_ITEM: Final = np.dtype(np.int64).itemsize
_NEVER: Final = np.float32(-np.inf)


class Vocabulary(Remade):
    """A tokenizer's tokens as llguidance wants them; shared by owners, and closed by the last.

    Args:
        native: The tokenizer.
        label: What it belongs to, for messages.
    """

    what: ClassVar[str] = "the vocabulary of structured output"

    def __init__(self, native: NativeTokenizer, label: str) -> None:
        self._native = native
        self._label = label
        self._kept = self._made()

    @classmethod
    def acquire(cls, tokenizer: Tokenizer, token: CancelToken) -> Lease[Vocabulary]:
        """A tokenizer's: the one that is alive, or a new one; on a native thread.

        Raises:
            MissingExtraError: llguidance is not installed.
            UnsupportedModelError: The tokenizer's tokens do not spell text.
            PipelineDisposedError: The pipeline is disposed.
            PipelineCancelledError: The token was cancelled.
        """
        native = tokenizer._native()
        library()  # before its load is measured, once a process

        def load() -> Vocabulary:
            return cls(native, token.label)

        return ledger.acquire(("structured", native), "structured", load, token)

    @property
    def begins_with_space(self) -> bool:
        """Whether the first word of a text has a space before it, which decoding takes off."""
        return _spelling(self._native) in ("metaspace", "bytes or metaspace")

    @property
    def size(self) -> int:
        """How many ids there are; the greatest is below it."""
        return int(self.made().vocab_size) - 1

    def made(self) -> Any:
        """The library's own object; made again after a sleep.

        Raises:
            PipelineDisposedError: It is closed.
        """
        if self._closed:
            raise PipelineDisposedError(
                f"The tokenizer of {self._label} was disposed with it. Make a new pipeline.",
                pipeline=self._label,
            )
        if self._kept is None:
            self._kept = self._made()
        return self._kept

    def _made(self) -> Any:
        tokens = _Tokens(self._native, self._label, weakref.ref(self))
        return library().LLTokenizer(tokens, slices=list(SLICES))

    def greedy(self, text: str) -> list[int]:
        """Tokens that spell a text, always the longest that fits; maybe of a part of it."""
        ids: list[int] = self.made().greedy_tokenize(text)
        return ids


class Structure:
    """A form, compiled for a vocabulary. Dropping the last reference frees it.

    Args:
        form: What is asked for.
        vocabulary: The tokenizer's tokens.

    Raises:
        InputError: The form is no valid schema, expression or grammar, asks for something that
            cannot be checked token by token, or for text that the tokenizer cannot write.
    """

    def __init__(self, form: Form, vocabulary: Vocabulary) -> None:
        self.form = form
        self._vocabulary = vocabulary
        self._spaced = vocabulary.begins_with_space
        self._first = self._compiled(form.grammar(library(), WHITESPACE))
        if not self.allow(self.matcher(), np.zeros(self.words, np.uint32)):
            raise InputError(
                f"structured: no text of this model's tokens has the form that the {form.name}"
                " asks for. See whether it contradicts itself, or uses characters that the"
                " tokenizer does not have."
            )
        if form.kind == "choices" and self._spaced:
            self._check_writable(form.value)

    @classmethod
    def of(cls, spec: object, vocabulary: Vocabulary) -> Structure:
        """What a caller asks for, compiled; see `Form.of` for what that may be."""
        return cls(Form.of(spec), vocabulary)

    @property
    def words(self) -> int:
        """32-bit words of a mask: one bit for each token."""
        return -(-(self._vocabulary.size + 1) // 32)

    @property
    def size(self) -> int:
        """How many ids the tokenizer has."""
        return self._vocabulary.size

    def begin(self, *, prompt_length: int, eos: int | Sequence[int]) -> StructuredRows:
        """Begin one generation.

        Args:
            prompt_length: Tokens of each row before the first that is written.
            eos: The tokens that end a row.

        Raises:
            InputError: No token ends a row.
        """
        ends = [eos] if isinstance(eos, int) else [int(one) for one in eos]
        if not ends:
            raise InputError(
                "structured: no token ends a text of this model, so a finished one could not end."
                " Pass eos_token_id."
            )
        return StructuredRows(self, prompt_length, np.array(sorted(set(ends)), np.int64))

    def matcher(self) -> Any:
        """A matcher at the beginning of a text."""
        return self._first.deep_copy()

    def allow(self, matcher: Any, mask: NDArray[np.uint32]) -> bool:
        """Set the bit of each token that may come next.

        Returns:
            Whether the text can end here or go on.

        Raises:
            InputError: The structure is too large to be checked.
        """
        may_end = bool(matcher.is_accepting())
        if matcher.is_stopped():
            return may_end
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        mask[self.size // 32] &= ~(np.uint32(1) << np.uint32(self.size % 32))  # the end, of ours
        if matcher.is_error():
            mask[:] = 0
            why = str(matcher.get_error()).splitlines()[0]
            if not why.startswith("NoExtension"):
                raise InputError(
                    f"structured: the {self.form.name} takes too much to check ({why}): make it"
                    " simpler.",
                    value=why,
                )
        return may_end or bool(mask.any())

    def parse(self, text: str) -> Any:
        """What a text says: of JSON its value, of a pydantic model an instance, else the text.

        Args:
            text: What was written, decoded.

        Returns:
            None where the text is not finished or has another form, and where a model's own
            validators refuse it.
        """
        if self._spaced:
            text = text.removeprefix(" ")
        if not self.form.is_text:
            return self.form.parse(text)
        return text if self._accepts(text) else None

    def _accepts(self, text: str) -> bool:
        matcher = self.matcher()
        ids = self._vocabulary.greedy(text)
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())

    def _check_writable(self, choices: Sequence[str]) -> None:
        """Raise for a choice of which a small vocabulary lacks a letter."""
        for one in choices:
            if not (self._accepts(one) or self._accepts(" " + one)):
                raise InputError(
                    f"structured: the tokenizer has no tokens that write the choice {one!r}: use"
                    " letters that it has.",
                    value=one,
                )

    def _compiled(self, grammar: str) -> Any:
        if self._spaced:
            grammar = _after_a_space(grammar, self.form.kind in ("json_schema", "regex"))
        found = self._matcher(grammar)
        if found.is_error():
            raise refused(self.form, found.get_error(), self._error_of_schema)
        return found

    def _matcher(self, grammar: str) -> Any:
        its = library()
        limits = its.LLParserLimits(verbose_errors=False)
        return its.LLMatcher(self._vocabulary.made(), grammar, log_level=0, limits=limits)

    def _error_of_schema(self, schema: Mapping[str, Any]) -> str:
        """What is wrong with a schema alone; empty if nothing is."""
        return str(self._matcher(library().LLMatcher.grammar_from_json_schema(schema)).get_error())


class StructuredRows:
    """One generation: a processor of scores that lets through what the structure allows.

    A row's matcher is found by what was written of the row, so rows may be put into another
    order, copied, or dropped between two calls.

    Args:
        structure: The form.
        prompt_length: Tokens of each row before the first that is written.
        eos: The tokens that end a row.
    """

    def __init__(self, structure: Structure, prompt_length: int, eos: Ids) -> None:
        self._structure = structure
        self._prompt = prompt_length
        self._ends = eos
        self._before: dict[bytes, Any] = {}
        self._now: dict[bytes, Any] = {}
        self._length = -1

    def __call__(self, ids: Ids, scores: Scores) -> Scores:
        """The scores, with minus infinity for each token that is not allowed.

        Args:
            ids: The tokens so far, with the prompt: [rows, tokens].
            scores: Of the next token: [rows, vocabulary]; the vocabulary may have more ids than
                the tokenizer.

        Returns:
            Other scores. Rows that have ended keep theirs.

        Raises:
            InputError: The tokenizer has no token to go on with, or the structure is too large.
        """
        new = np.ascontiguousarray(ids[:, self._prompt :], np.int64)
        keys = [row.tobytes() for row in new]
        self._advance(keys, new)
        ends = self._ends[self._ends < scores.shape[1]]
        masks = np.zeros((len(keys), self._structure.words), np.uint32)
        places: dict[bytes, int] = {}
        may_end = np.zeros(len(keys), bool)
        goes_on = np.zeros(len(keys), bool)
        for row, key in enumerate(keys):
            matcher = self._now[key]
            if matcher is None:
                continue
            goes_on[row] = True
            first = places.setdefault(key, row)
            if first != row:
                masks[row], may_end[row] = masks[first], may_end[first]
                continue
            may_end[row] = matcher.is_accepting()
            if not self._structure.allow(matcher, masks[row]):
                raise InputError(
                    "structured: the tokenizer has no token with which the text could go on to"
                    f" what the {self._structure.form.name} asks for: use characters that it has."
                )
        count = min(scores.shape[1], self._structure.size)
        bits = np.unpackbits(masks.view(np.uint8), axis=1, count=count, bitorder="little")
        bits[:, ends[ends < count]] = 0
        found = np.full_like(scores, _NEVER)
        np.copyto(found[:, :count], scores[:, :count], where=bits.view(np.bool_))
        final = np.ix_(np.flatnonzero(may_end), ends)
        found[final] = scores[final]
        found[~goes_on] = scores[~goes_on]
        return found

    def _advance(self, keys: Sequence[bytes], new: Ids) -> None:
        """Have a matcher for each row, from the step before wherever there is one."""
        length = new.shape[1]
        if length != self._length:
            self._before = self._now if length == self._length + 1 else {}
            self._now = {}
            self._length = length
        fresh = {key: row for key, row in zip(keys, new, strict=True) if key not in self._now}
        takers = Counter(key[:-_ITEM] for key in fresh)
        for key, row in fresh.items():
            parent = key[:-_ITEM]
            takers[parent] -= 1
            if not key or parent not in self._before:
                self._now[key] = self._fed(self._structure.matcher(), row.tolist())
                continue
            matcher = self._before[parent]
            if not takers[parent]:
                del self._before[parent]
            elif matcher is not None:
                matcher = matcher.deep_copy()
            self._now[key] = self._fed(matcher, row[-1:].tolist())

    def _fed(self, matcher: Any, tokens: Sequence[int]) -> Any:
        """A matcher after more tokens; None where the row has ended, or gone another way."""
        if matcher is None or any(one in self._ends for one in tokens):
            return None
        if any(not 0 <= one < self._structure.size for one in tokens):
            return None
        return matcher if matcher.try_consume_tokens(tokens) == len(tokens) else None


class _Tokens(Sequence[bytes]):
    """The bytes of each token, made as the library asks for them, and how it has text tokenised.

    There is one more than the tokenizer has: the end of a text, which the library wants to know,
    and which is known only once a generation begins.
    """

    is_tokenizer_wrapper: Final = True
    bos_token_id: Final = None

    def __init__(
        self, native: NativeTokenizer, label: str, vocabulary: weakref.ref[Vocabulary]
    ) -> None:
        self._vocabulary = vocabulary  # which has this, by the library's object
        added = native._native.get_added_tokens_decoder()
        self._native = native
        self._added = {number: one.content for number, one in added.items()}
        self._spelling = _spelling(native)
        if not self._spelling:
            raise UnsupportedModelError(
                f"{label} has a tokenizer whose tokens do not spell text byte by byte, which"
                " structured output needs: use another model.",
                model=label,
            )
        known = native._native.get_vocab_size(with_added_tokens=True)
        self.eos_token_id: int = max(known, max(self._added, default=-1) + 1)
        self._specials = frozenset(number for number, one in added.items() if one.special)
        self.special_token_ids = [*self._specials, self.eos_token_id]
        self.tokens = self

    def __len__(self) -> int:
        return self.eos_token_id + 1

    def __getitem__(self, number: Any) -> Any:
        if number >= len(self):
            raise IndexError(number)
        if number == self.eos_token_id:
            return b"<end>"
        if number in self._added:
            return self._added[number].encode()
        token = self._native.token(number)
        if self._spelling == "byte level":
            try:
                return token.translate(_BYTES).encode("latin-1")
            except UnicodeEncodeError:
                return token.encode()
        if self._spelling == "bytes or metaspace" and len(token) == 6 and token[:3] == "<0x":
            return bytes([int(token[3:5], 16)])
        return token.replace(_SPACE, " ").encode()

    def __call__(self, text: str | bytes) -> list[int]:
        """Tokens that spell a text, as the tokenizer would write them where they do.

        Of the text that has to come, the library lets only these through. It must not raise: that
        would end the process.
        """
        raw = text.encode() if isinstance(text, str) else text
        try:
            ids = self._native.prompt(raw.decode(), special=False)
            spelled = b"".join(self[one] for one in ids) == raw
            if spelled and self._specials.isdisjoint(ids):
                return ids
        except (InputError, UnicodeDecodeError):
            pass
        vocabulary = self._vocabulary()
        return vocabulary.greedy(raw.decode(errors="replace")) if vocabulary is not None else []


def library() -> Any:
    """The llguidance library.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return import_module("llguidance")
    except ImportError as error:
        raise MissingExtraError(
            "Structured output needs llguidance, which is not installed:"
            " pip install 'ebbtide[structured]'",
            extra="structured",
        ) from error


def _after_a_space(grammar: str, is_json: bool) -> str:
    """The same grammar, with maybe a space before it."""
    one = json.loads(grammar)["grammars"][0] if is_json else {"lark_grammar": grammar}
    outer = {"name": "outer", "lark_grammar": _AFTER_A_SPACE}
    return json.dumps({"grammars": [outer, {**one, "name": "inner"}]})


def _spelling(native: NativeTokenizer) -> str:
    """How a vocabulary writes bytes that are no letters; empty where that is not known."""
    decoder = native._native.decoder
    kinds = set(_kinds(json.loads(decoder.__getstate__()))) if decoder is not None else set()
    if "ByteLevel" in kinds:
        return "byte level"
    if "ByteFallback" in kinds:
        return "bytes or metaspace"
    return "metaspace" if "Metaspace" in kinds else ""


def _kinds(decoder: Mapping[str, Any]) -> Iterator[str]:
    yield str(decoder.get("type"))
    for one in decoder.get("decoders", ()):
        yield from _kinds(one)


def _byte_letters() -> dict[int, int]:
    """From the letters that GPT-2's byte-level vocabularies write, to the bytes they stand for."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [one for one in range(256) if one not in plain]
    return {256 + place: one for place, one in enumerate(others)}


_BYTES: Final = _byte_letters()
