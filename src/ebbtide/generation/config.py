"""What is asked of a generation: every option, by the name and with the sense of `transformers`.

A model's own defaults (``generation_config.json``) and a caller's options make one
`GenerationConfig`. What a caller says is done or refused; what only the model's defaults say gives
way where it would contradict that.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from numbers import Integral, Real
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from ebbtide.errors import InputError, OptionError, unknown_option
from ebbtide.generation.steps import Ids, Scores

log = logging.getLogger("ebbtide.generation")

ScoresProcessor = Callable[[Ids, Scores], Scores]
"""A caller's own processor: from the ids and the scores of the next token, other scores."""

StoppingCriterion = Callable[[Ids, Scores | None], NDArray[np.bool_] | bool]
"""Whether rows end now: from the ids and the last scores, a bool for each row or one for all."""

AllowedTokens = Callable[[int, NDArray[np.int64]], Sequence[int]]
"""Which tokens may come next: from the number of the input and the ids of one of its rows."""

SAMPLING: Final = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "seed",
)
"""The options that mean something only where tokens are sampled."""

DEFAULT_LENGTH: Final = 20
"""How many tokens are generated where nobody says how many."""

LEAST_TEMPERATURE: Final = 1e-6
"""The lowest above 0: scores divided by less could be no numbers any more."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """All options of a generation, checked by `of`: making one directly checks nothing.

    Attributes:
        max_length: Tokens of a row at most, with its prompt; only if ``max_new_tokens`` is None.
        max_new_tokens: Tokens to generate at most.
        min_length: Tokens of a row, with its prompt, before which it may not end; only if
            ``min_new_tokens`` is None.
        min_new_tokens: Tokens to generate before a row may end.
        do_sample: Whether tokens are drawn by chance; the best is taken otherwise.
        temperature: What scores are divided by: below 1 for less chance, above for more.
        top_k: How many of the best tokens may be drawn; 0 for all.
        top_p: Only the best tokens with so much probability together may be drawn.
        min_p: Only tokens with this share of the best one's probability may be drawn.
        typical_p: Only the most typical tokens with so much probability together may be drawn.
        epsilon_cutoff: Only tokens of this probability may be drawn; 0 for all.
        eta_cutoff: The same, but less where the distribution is flat; 0 for all.
        repetition_penalty: Above 1, tokens that a row has already become less likely.
        encoder_repetition_penalty: Above 1, tokens that the input has become more likely.
        no_repeat_ngram_size: No run of so many tokens comes twice in a row; 0 for no such rule.
        encoder_no_repeat_ngram_size: No run of so many tokens of the input comes; 0 for no rule.
        bad_words_ids: Runs of tokens that never come.
        sequence_bias: Runs of tokens, and what is added to the score of the last of each.
        forced_bos_token_id: The token that comes right after the decoder's first one.
        forced_eos_token_id: The tokens of which one comes at the greatest length; maybe none.
        suppress_tokens: Tokens that never come.
        begin_suppress_tokens: Tokens that do not come first.
        exponential_decay_length_penalty: After how many new tokens an end becomes more likely,
            and by what factor with each further one.
        renormalize_logits: Whether the final scores are made log-probabilities again.
        remove_invalid_values: Whether NaN and infinities in scores are replaced.
        num_beams: How many rows of each input are kept in a beam search; 1 for none.
        num_beam_groups: In how many groups these are searched.
        diversity_penalty: What a group's token loses for each earlier group that took it.
        length_penalty: The power of the length that a beam's score is divided by.
        early_stopping: When a beam search ends: with enough finished rows (True), when a better
            one is unlikely (False) or impossible ("never").
        num_return_sequences: How many rows are returned for each input.
        guidance_scale: How much the prompt outweighs what comes without it; None or 1 for as is.
        seed: What makes the chance repeatable.
        max_time: Seconds after which no further token is begun.
        stop_strings: Texts that end a row.
        eos_token_id: Tokens that end a row; maybe none.
        bos_token_id: The token that begins a text.
        pad_token_id: The token that fills rows up.
        decoder_start_token_id: The token that a decoder beside an encoder begins with.
        output_scores: Whether the processed scores of each step are returned.
        output_logits: Whether the model's own logits of each step are returned.
        use_cache: Whether what the model has seen is kept between steps.
        logits_processor: The caller's own processors of scores.
        stopping_criteria: The caller's own reasons to end a row.
        prefix_allowed_tokens_fn: Which tokens may come next, or None for all.
    """

    max_length: int = DEFAULT_LENGTH
    max_new_tokens: int | None = None
    min_length: int = 0
    min_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    encoder_repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    exponential_decay_length_penalty: tuple[int, float] | None = None
    renormalize_logits: bool = False
    remove_invalid_values: bool = False
    num_beams: int = 1
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1
    guidance_scale: float | None = None
    seed: int | None = None
    max_time: float | None = None
    stop_strings: tuple[str, ...] = ()
    eos_token_id: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None
    output_scores: bool = False
    output_logits: bool = False
    use_cache: bool = True
    logits_processor: tuple[ScoresProcessor, ...] = ()
    stopping_criteria: tuple[StoppingCriterion, ...] = ()
    prefix_allowed_tokens_fn: AllowedTokens | None = None

    @classmethod
    def of(cls, defaults: Mapping[str, object], given: Mapping[str, object]) -> GenerationConfig:
        """Make one configuration of a model's defaults and a caller's options.

        A caller's ``max_new_tokens`` is heard before any ``max_length``, and a caller's
        ``max_length`` before the model's ``max_new_tokens``; the minima likewise. Where nobody says
        a length but the default one, it counts new tokens. A temperature of 0 means that the best
        token is taken, which is what sampling comes to there. A caller who gives an option that
        only sampling has gets sampling, unless ``do_sample`` was said.

        Args:
            defaults: What the model's ``generation_config.json`` says: what is unknown there is
                passed over, and so is a value that cannot be used, with a line in the log.
            given: The caller's options; None means the default.

        Raises:
            OptionError: An option does not exist, or has a value of the wrong type.
            InputError: A value is out of its range, or options contradict one another.
        """
        values = _of_model(defaults)
        own = _of_caller(given)
        values.update(own)
        asked = own.keys()
        _settle_lengths(values, asked)
        _settle_sampling(values, asked)
        _settle_beams(values, asked)
        _settle_returned(values, asked)
        if "exponential_decay_length_penalty" in values and not values.get("eos_token_id"):
            _refuse_or_drop(
                values,
                asked,
                "exponential_decay_length_penalty",
                "exponential_decay_length_penalty makes an end more likely, and there is no token"
                " that ends a row: pass eos_token_id too.",
            )
        return cls(**values)

    def last_length(self, prompt_length: int) -> int:
        """Tokens of a row at most, with a prompt of so many."""
        if self.max_new_tokens is not None:
            return prompt_length + self.max_new_tokens
        return self.max_length


def _of_model(defaults: Mapping[str, object]) -> dict[str, Any]:
    """What of a model's defaults can be used, read."""
    values = {}
    for name, value in defaults.items():
        if value is None or name not in _READERS:
            continue
        try:
            values[name] = _READERS[name](name, value)
        except (InputError, OptionError) as error:
            log.warning("Passed over in the model's generation_config.json: %s", error)
    return values


def _of_caller(given: Mapping[str, object]) -> dict[str, Any]:
    """A caller's options, read."""
    values = {}
    for name, value in given.items():
        if name not in _READERS:
            raise unknown_option(name, _READERS, where="A generation")
        if value is not None:
            values[name] = _READERS[name](name, value)
    return values


def _refuse_or_drop(values: dict[str, Any], asked: AbstractSet[str], name: str, why: str) -> None:
    """Refuse an option that contradicts others if the caller gave it; else leave it out."""
    if name in asked:
        raise InputError(why, value=values[name])
    if name in values:
        value = values.pop(name)
        log.debug("The model's %s=%r is not used here: %s", name, value, why)


def _settle_lengths(values: dict[str, Any], asked: AbstractSet[str]) -> None:
    for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if total in asked and new not in asked:
            values.pop(new, None)
    length = values.get("max_length", DEFAULT_LENGTH)
    if "max_length" not in asked and length == DEFAULT_LENGTH:
        values.setdefault("max_new_tokens", DEFAULT_LENGTH)
    most = values.get("max_new_tokens")
    name, top = ("max_length", length) if most is None else ("max_new_tokens", most)
    if values.get("min_new_tokens", 0) > top:
        why = f"min_new_tokens={values['min_new_tokens']} is more than {name}={top} allows"
        _refuse_or_drop(values, asked, "min_new_tokens", f"{why}: pass a larger {name}.")
    if most is None and "min_new_tokens" not in values and values.get("min_length", 0) > length:
        why = f"min_length={values['min_length']} is more than max_length={length}"
        _refuse_or_drop(values, asked, "min_length", f"{why}: pass a larger max_length.")


def _settle_sampling(values: dict[str, Any], asked: AbstractSet[str]) -> None:
    if values.get("temperature") == 0:
        del values["temperature"]
        if "temperature" in asked:
            values["do_sample"] = False
            return
        if "do_sample" not in asked:
            values["do_sample"] = False
    only = [name for name in SAMPLING if name in asked]
    if only and not values.setdefault("do_sample", True):
        names = " and ".join(only)
        whose = "" if "do_sample" in asked else " by the model's own defaults"
        raise InputError(
            f"do_sample is False{whose}, so the best token is always taken, and {names} would"
            f" change nothing: pass do_sample=True, or leave {names} out.",
            value={name: values.get(name) for name in only},
        )


def _settle_beams(values: dict[str, Any], asked: AbstractSet[str]) -> None:
    beams, groups = values.get("num_beams", 1), values.get("num_beam_groups", 1)
    if groups > 1:
        why = ""
        if beams % groups:
            why = (
                f"{beams} beams cannot be searched in {groups} groups of one size: pass a num_beams"
                f" that num_beam_groups={groups} divides, such as {groups * 2}."
            )
        elif values.get("do_sample"):
            why = (
                "Groups of beams are searched without sampling: pass do_sample=False and no option"
                " of sampling, or leave num_beam_groups out."
            )
        elif not values.get("diversity_penalty"):
            why = (
                "Groups of beams would all find the same: pass a diversity_penalty above 0, or"
                " leave num_beam_groups out."
            )
        if why:
            _refuse_or_drop(values, asked, "num_beam_groups", why)
    if values.get("diversity_penalty") and values.get("num_beam_groups", 1) == 1:
        _refuse_or_drop(
            values,
            asked,
            "diversity_penalty",
            "diversity_penalty sets groups of beams apart: pass num_beams and num_beam_groups,"
            " such as 4 and 2, or leave diversity_penalty out.",
        )
    for name, neutral in (("early_stopping", False), ("length_penalty", 1.0)):
        if beams == 1 and values.get(name, neutral) != neutral:
            why = f"{name} is for beam search: pass num_beams from 2, or leave {name} out."
            _refuse_or_drop(values, asked, name, why)


def _settle_returned(values: dict[str, Any], asked: AbstractSet[str]) -> None:
    beams, rows = values.get("num_beams", 1), values.get("num_return_sequences", 1)
    if rows == 1:
        return
    if beams > 1 and rows > beams:
        why = f"{beams} beams cannot give num_return_sequences={rows}: pass num_beams={rows}."
        _refuse_or_drop(values, asked, "num_return_sequences", why)
    elif beams == 1 and not values.get("do_sample"):
        why = (
            f"The best token each time gives one text, and not num_return_sequences={rows}: pass"
            f" do_sample=True with a temperature above 0, or num_beams={rows}."
        )
        _refuse_or_drop(values, asked, "num_return_sequences", why)


# How each option is read: from its name and what was said, the value, or an error


def _wrong_type(name: str, takes: str, value: object) -> OptionError:
    option = name.rpartition(" ")[2]  # of "Each of suppress_tokens" too
    return OptionError(f"{name} takes {takes}, not {value!r}.", option=option)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _whole(least: int) -> Callable[[str, object], int]:
    def read(name: str, value: object) -> int:
        takes = f"a whole number from {least}"
        if not _is_whole(value):
            raise _wrong_type(name, takes, value)
        if value < least:  # type: ignore[operator]
            raise InputError(f"{name} takes {takes}, not {value!r}.", value=value)
        return int(value)  # type: ignore[call-overload, no-any-return]

    return read


def _number(takes: str, fits: Callable[[float], bool]) -> Callable[[str, object], float]:
    def read(name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise _wrong_type(name, takes, value)
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not fits(number):
            raise InputError(f"{name} takes {takes}, not {value!r}.", value=value)
        return number

    return read


def _yes_or_no(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _wrong_type(name, "True or False", value)
    return value


def _early_stopping(name: str, value: object) -> bool | str:
    if not isinstance(value, bool | str):
        raise _wrong_type(name, "True, False or 'never'", value)
    if isinstance(value, str) and value != "never":
        raise InputError(f"{name} takes True, False or 'never', not {value!r}.", value=value)
    return value


_token: Final = _whole(0)


def _tokens(name: str, value: object) -> tuple[int, ...]:
    """Token ids, from one or a list of them."""
    if _is_whole(value):
        return (_token(name, value),)
    if not isinstance(value, list | tuple | set | frozenset | range | np.ndarray):
        raise _wrong_type(name, "a token id, or a list of them", value)
    return tuple(_token(f"Each of {name}", one) for one in value)


def _run(name: str, value: object) -> tuple[int, ...]:
    """Token ids that follow one another, at least one."""
    if not isinstance(value, list | tuple):
        raise _wrong_type(f"Each of {name}", "a list of token ids", value)
    if not value:
        raise InputError(f"Each of {name} takes at least one token id: leave out the empty one.")
    return _tokens(name, value)


def _runs(name: str, value: object) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, list | tuple):
        raise _wrong_type(name, "a list of lists of token ids", value)
    return tuple(_run(name, one) for one in value)


def _biases(name: str, value: object) -> tuple[tuple[tuple[int, ...], float], ...]:
    takes = "a map from tuples of token ids to numbers, or a list of [token ids, number]"
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, list | tuple):
        raise _wrong_type(name, takes, value)
    found: dict[tuple[int, ...], float] = {}
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise _wrong_type(name, takes, value)
        found[_run(name, pair[0])] = _bias(name, pair[1])
    return tuple(found.items())


def _decay(name: str, value: object) -> tuple[int, float]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise _wrong_type(name, "two numbers, a count of tokens and a factor", value)
    return _whole(0)(f"The first of {name}", value[0]), _above_0(f"The second of {name}", value[1])


def _texts(name: str, value: object) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(one, str) for one in texts):
        raise _wrong_type(name, "a text, or a list of texts", value)
    if not all(texts):
        raise InputError(f"{name} has an empty text, which is everywhere: leave it out.")
    return tuple(texts)


def _function(name: str, value: object) -> object:
    if not callable(value):
        raise _wrong_type(name, "a function", value)
    return value


def _functions(name: str, value: object) -> tuple[object, ...]:
    several = value if isinstance(value, list | tuple) else [value]
    return tuple(_function(f"Each of {name}", one) for one in several)


_finite: Final = _number("a finite number", math.isfinite)
_bias: Final = _number("a number below infinity", lambda one: one < math.inf)
_above_0: Final = _number("a finite number above 0", lambda one: 0 < one < math.inf)
_from_0: Final = _number("a finite number from 0", lambda one: 0 <= one < math.inf)
_from_1: Final = _number("a finite number from 1", lambda one: 1 <= one < math.inf)
_warmth: Final = _number(
    f"0 for the best token, or a finite number from {LEAST_TEMPERATURE}",
    lambda one: one == 0 or LEAST_TEMPERATURE <= one < math.inf,
)
_share: Final = _number("a number from 0 to 1", lambda one: 0 <= one <= 1)
_share_above_0: Final = _number("a number above 0 and up to 1", lambda one: 0 < one <= 1)
_share_below_1: Final = _number("a number from 0 to below 1", lambda one: 0 <= one < 1)

_READERS: Final[Mapping[str, Callable[[str, object], object]]] = {
    "max_length": _whole(1),
    "max_new_tokens": _whole(1),
    "min_length": _whole(0),
    "min_new_tokens": _whole(0),
    "do_sample": _yes_or_no,
    "temperature": _warmth,
    "top_k": _whole(0),
    "top_p": _share,
    "min_p": _share,
    "typical_p": _share_above_0,
    "epsilon_cutoff": _share_below_1,
    "eta_cutoff": _share_below_1,
    "repetition_penalty": _above_0,
    "encoder_repetition_penalty": _above_0,
    "no_repeat_ngram_size": _whole(0),
    "encoder_no_repeat_ngram_size": _whole(0),
    "bad_words_ids": _runs,
    "sequence_bias": _biases,
    "forced_bos_token_id": _token,
    "forced_eos_token_id": _tokens,
    "suppress_tokens": _tokens,
    "begin_suppress_tokens": _tokens,
    "exponential_decay_length_penalty": _decay,
    "renormalize_logits": _yes_or_no,
    "remove_invalid_values": _yes_or_no,
    "num_beams": _whole(1),
    "num_beam_groups": _whole(1),
    "diversity_penalty": _from_0,
    "length_penalty": _finite,
    "early_stopping": _early_stopping,
    "num_return_sequences": _whole(1),
    "guidance_scale": _from_1,
    "seed": _whole(0),
    "max_time": _above_0,
    "stop_strings": _texts,
    "eos_token_id": _tokens,
    "bos_token_id": _token,
    "pad_token_id": _token,
    "decoder_start_token_id": _token,
    "output_scores": _yes_or_no,
    "output_logits": _yes_or_no,
    "use_cache": _yes_or_no,
    "logits_processor": _functions,
    "stopping_criteria": _functions,
    "prefix_allowed_tokens_fn": _function,
}
