"""What is done to the scores of the next token before one is taken, and the taking by chance.

Each processor computes what the one of `transformers` does. All of them get the ids so far and the
scores of the next token, float32 of [rows, vocabulary], and give scores of the same shape; their
other arguments are bound where the list of them is made. None changes the array that it gets; one
that has nothing to do returns that array itself.

Where a processor knows inputs by number, each has the same number of rows, one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from ebbtide.errors import InputError
from ebbtide.generation.config import AllowedTokens, GenerationConfig, ScoresProcessor
from ebbtide.generation.steps import Ids, Scores

Processor = ScoresProcessor
"""From the ids and the scores of the next token, other scores."""

FIRST_SORTED: Final = 1024
"""How many of the best tokens are sorted first where `top_p` looks for its share."""

BLOCK: Final = 256
"""Tokens whose probability is added up at once where one is drawn: to go through all is slow."""

_NEVER: Final = np.float32(-np.inf)
_ZERO: Final = np.float32(0)
_ONE: Final = np.float32(1)
_GREATEST: Final = float(np.finfo(np.float32).max)


def processors(
    config: GenerationConfig,
    *,
    prompt_length: int,
    encoder_ids: Ids | None = None,
    of_form: Sequence[Processor] = (),
) -> list[Processor]:
    """The processors that a configuration asks for, in the order in which `transformers` has them.

    Two are not among them, as they need more than ids and scores: `guided`, which comes before all
    of these, and `hamming_diversity`, which comes before them in a search by groups.

    Args:
        config: The options.
        prompt_length: Tokens of each row before the first new one.
        encoder_ids: What the encoder read, or the prompt of a model without one: [inputs, length].
        of_form: Those that let nothing through but a text of a given form.

    Raises:
        InputError: An option is about the input's tokens, and there are none.
    """
    found = _of_tokens(config, encoder_ids)
    found += _of_ends(config, prompt_length)
    found += of_form
    found += [partial(of_caller, function=one) for one in config.logits_processor]
    if config.do_sample:
        found += _of_sampling(config)
    if config.renormalize_logits:
        found.append(normalised)
    return found


def _of_tokens(config: GenerationConfig, encoder_ids: Ids | None) -> list[Processor]:
    """Those that look at what a row or the input says already."""
    found: list[Processor] = []
    if config.sequence_bias:
        found.append(partial(sequence_bias, biases=config.sequence_bias))
    if config.encoder_repetition_penalty != 1:
        read = _needed(encoder_ids, "encoder_repetition_penalty")
        penalty = config.encoder_repetition_penalty
        found.append(partial(encoder_repetition_penalty, penalty=penalty, encoder_ids=read))
    if config.repetition_penalty != 1:
        found.append(partial(repetition_penalty, penalty=config.repetition_penalty))
    if config.no_repeat_ngram_size:
        found.append(partial(no_repeat_ngram, size=config.no_repeat_ngram_size))
    if config.encoder_no_repeat_ngram_size:
        read = _needed(encoder_ids, "encoder_no_repeat_ngram_size")
        size = config.encoder_no_repeat_ngram_size
        found.append(partial(encoder_no_repeat_ngram, size=size, encoder_ids=read))
    bad = [run for run in config.bad_words_ids if run[1:] or run[0] not in config.eos_token_id]
    if bad:
        found.append(partial(sequence_bias, biases=tuple((run, float(_NEVER)) for run in bad)))
    return found


def _of_ends(config: GenerationConfig, prompt_length: int) -> list[Processor]:
    """Those that look at how far a row is, or at no more than the scores."""
    found: list[Processor] = []
    ends, first = config.eos_token_id, config.forced_bos_token_id
    least = config.min_length
    if config.min_new_tokens is not None:
        least = prompt_length + config.min_new_tokens
    if ends and least > prompt_length:
        found.append(partial(min_length, length=least, ends=ends))
    if config.prefix_allowed_tokens_fn is not None:
        beams = config.num_beams // config.num_beam_groups
        function = config.prefix_allowed_tokens_fn
        found.append(partial(prefix_allowed, function=function, num_beams=beams))
    if first is not None:
        found.append(partial(forced, tokens=(first,), length=1))
    if config.forced_eos_token_id:
        last = config.last_length(prompt_length) - 1
        found.append(partial(forced, tokens=config.forced_eos_token_id, length=last))
    if config.remove_invalid_values:
        found.append(finite)
    if config.exponential_decay_length_penalty is not None:
        start, factor = config.exponential_decay_length_penalty
        start += prompt_length
        found.append(partial(exponential_decay, start=start, factor=factor, ends=ends))
    if config.suppress_tokens:
        found.append(partial(suppressed, tokens=config.suppress_tokens))
    if config.begin_suppress_tokens:
        begin = prompt_length + (prompt_length <= 1 and first is not None)
        found.append(partial(suppressed, tokens=config.begin_suppress_tokens, length=begin))
    return found


def _of_sampling(config: GenerationConfig) -> list[Processor]:
    """Those that leave fewer tokens to draw from, or make some likelier."""
    found: list[Processor] = []
    # a beam must have a token to go on with besides those that end it
    keep = 1 if config.num_beams == 1 else max(len(config.eos_token_id), 1) + 1
    if config.temperature != 1:
        found.append(partial(temperature, value=config.temperature))
    if config.top_k:
        found.append(partial(top_k, count=max(config.top_k, keep)))
    if config.top_p < 1:
        found.append(partial(top_p, share=config.top_p, keep=keep))
    if config.min_p:
        found.append(partial(min_p, share=config.min_p, keep=keep))
    if config.typical_p < 1:
        found.append(partial(typical_p, share=config.typical_p, keep=keep))
    if config.epsilon_cutoff:
        found.append(partial(epsilon_cutoff, least=config.epsilon_cutoff, keep=keep))
    if config.eta_cutoff:
        found.append(partial(eta_cutoff, least=config.eta_cutoff, keep=keep))
    return found


def _needed(encoder_ids: Ids | None, option: str) -> Ids:
    if encoder_ids is None:
        raise InputError(f"{option} is about the input's tokens, and there are none: leave it out.")
    return encoder_ids


# From scores to probabilities, and to a token


def log_softmax(scores: Scores) -> Scores:
    """The logarithm of each token's probability; a row that forbids all tokens stays as it is."""
    shifted = _from_best(scores)
    total = np.exp(shifted).sum(axis=-1, keepdims=True)
    shifted -= np.log(np.where(total == 0, _ONE, total))
    return shifted


def softmax(scores: Scores) -> Scores:
    """Each token's probability; 0 for all where a row forbids all."""
    found: Scores = np.exp(_from_best(scores))
    total = found.sum(axis=-1, keepdims=True)
    found /= np.where(total == 0, _ONE, total)
    return found


def _from_best(scores: Scores) -> Scores:
    """The scores less the best of each row, which is a new array."""
    best = scores.max(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):  # of infinite scores, which become NaN
        return scores - np.where(best == _NEVER, _ZERO, best)


def sample(scores: Scores, dice: np.random.Generator) -> NDArray[np.int64]:
    """Draw a token for each row, by the probabilities that the scores stand for.

    Args:
        scores: [rows, vocabulary].
        dice: Where the chance comes from: one number for each row.

    Returns:
        The tokens: [rows]. None with the score of minus infinity is ever drawn.

    Raises:
        InputError: A row has no token that could be drawn, or a score that is no number.
    """
    if not np.isfinite(scores.max(axis=-1)).all():
        raise InputError(
            "A row has no token left to draw from, or a score that is NaN or infinite: forbid less,"
            " or pass remove_invalid_values=True."
        )
    masses = np.exp(_from_best(scores))
    blocks = np.add.reduceat(masses, np.arange(0, scores.shape[1], BLOCK), 1, dtype=np.float64)
    found = np.empty(len(scores), np.int64)
    for row, point in enumerate(dice.random(len(scores)) * blocks.sum(axis=1)):
        block = _struck(blocks[row], point)
        start = block * BLOCK
        rest = point - blocks[row, :block].sum()
        found[row] = start + _struck(masses[row, start : start + BLOCK], rest)
    return found


def _struck(masses: NDArray[np.float32] | NDArray[np.float64], point: float) -> int:
    """Which of these masses, laid end to end, a point is in; never one that is 0."""
    reached = np.cumsum(masses, dtype=np.float64)
    within = np.searchsorted(reached, max(point, 0.0), side="right")
    return int(min(within, np.searchsorted(reached, reached[-1])))  # rounding may lead beyond


def guided(conditional: Scores, unconditional: Scores, scale: float) -> Scores:
    """Log-probabilities after a prompt, moved further away from those without it.

    Args:
        conditional: The logits that follow the prompt: [rows, vocabulary].
        unconditional: The logits that follow nothing, or what is to be kept away from.
        scale: How far; 1 leaves those after the prompt.
    """
    given, free = log_softmax(conditional), log_softmax(unconditional)
    if scale == 1:
        return given
    sound = (given != _NEVER) & (free != _NEVER)
    distance = np.subtract(given, free, out=np.zeros_like(given), where=sound)
    return np.where(sound, np.float32(scale) * distance + free, given)


# What a row or the input says already


def repetition_penalty(ids: Ids, scores: Scores, *, penalty: float) -> Scores:
    """Make the tokens that a row has less likely, above 1."""
    picked = np.take_along_axis(scores, ids, axis=1)
    factor = np.float32(penalty)
    found = scores.copy()
    np.put_along_axis(found, ids, np.where(picked < 0, picked * factor, picked / factor), axis=1)
    return found


def encoder_repetition_penalty(
    ids: Ids, scores: Scores, *, penalty: float, encoder_ids: Ids
) -> Scores:
    """Make the tokens that the input has more likely, above 1."""
    return repetition_penalty(_for_rows(encoder_ids, scores), scores, penalty=1 / penalty)


def no_repeat_ngram(ids: Ids, scores: Scores, *, size: int) -> Scores:
    """Forbid the token that would make a run of so many come twice in a row."""
    return _without_runs(ids, ids, scores, size)


def encoder_no_repeat_ngram(ids: Ids, scores: Scores, *, size: int, encoder_ids: Ids) -> Scores:
    """Forbid the token that would make a run of so many that the input has."""
    return _without_runs(_for_rows(encoder_ids, scores), ids, scores, size)


def _for_rows(encoder_ids: Ids, scores: Scores) -> Ids:
    """The input of each row."""
    return np.repeat(encoder_ids, len(scores) // len(encoder_ids), axis=0)


def _without_runs(known: Ids, ids: Ids, scores: Scores, size: int) -> Scores:
    """Forbid what would end a known run of this size, whose beginning a row ends with."""
    length = ids.shape[1]
    if known.shape[1] < size or length < size - 1:
        return scores
    runs = sliding_window_view(known, size, axis=1)
    begun = ids[:, None, length - size + 1 :]
    rows, places = np.nonzero((runs[:, :, :-1] == begun).all(axis=2))
    found = scores.copy()
    found[rows, runs[rows, places, -1]] = _NEVER
    return found


def sequence_bias(
    ids: Ids, scores: Scores, *, biases: Sequence[tuple[tuple[int, ...], float]]
) -> Scores:
    """Add to the score of a token that would end one of these runs; minus infinity forbids it.

    A run of several tokens counts once a row has as many as the whole run.

    Args:
        ids: The ids so far.
        scores: Those of the next token.
        biases: The runs, each once, and what is added.
    """
    for run, _ in biases:
        _check_known("sequence_bias or bad_words_ids", np.array(run), scores)
    length = ids.shape[1]
    tokens, columns = np.unique([run[-1] for run, _ in biases], return_inverse=True)
    added = np.zeros((len(scores), len(tokens)), np.float32)
    for (run, bias), column in zip(biases, columns, strict=True):
        if len(run) == 1:
            added[:, column] += np.float32(bias)
        elif len(run) <= length:
            fits = (ids[:, length - len(run) + 1 :] == run[:-1]).all(axis=1)
            added[fits, column] += np.float32(bias)
    found = scores.copy()
    found[:, tokens] += added
    return found


def hamming_diversity(
    ids: Ids,
    scores: Scores,
    *,
    chosen: NDArray[np.int64],
    group: int,
    penalty: float,
    num_beams: int,
    num_beam_groups: int,
) -> Scores:
    """Take off a token's score for each beam of an earlier group that has just taken it.

    Args:
        ids: The ids of the group's beams so far.
        scores: Their scores: [inputs * beams of a group, vocabulary].
        chosen: The token that each beam took in this step: [inputs * beams]; what stands there for
            this group and the later ones does not matter.
        group: The group's number, from 0.
        penalty: What is taken off for each such beam.
        num_beams: Beams of an input.
        num_beam_groups: Groups of these.
    """
    if group == 0:
        return scores
    size = num_beams // num_beam_groups
    found = scores.copy()
    for number, tokens in enumerate(chosen.reshape(-1, num_beams)):
        taken, times = np.unique(tokens[: group * size], return_counts=True)
        rows = slice(number * size, (number + 1) * size)
        found[rows, taken] -= (penalty * times).astype(np.float32)
    return found


# How far a row is, and what is always or never to come


def min_length(ids: Ids, scores: Scores, *, length: int, ends: Sequence[int]) -> Scores:
    """Forbid the tokens that end a row until it has so many, its prompt included."""
    return suppressed(ids, scores, tokens=ends) if ids.shape[1] < length else scores


def prefix_allowed(
    ids: Ids, scores: Scores, *, function: AllowedTokens, num_beams: int = 1
) -> Scores:
    """Forbid what a caller's function does not allow after a row's tokens.

    Raises:
        InputError: It allows no token, or something that is no token of the model.
    """
    found = np.full_like(scores, _NEVER)
    for row, tokens in enumerate(ids):
        number = row // num_beams
        allowed = np.array(list(function(number, tokens.copy())))
        if allowed.dtype.kind not in "iu":  # neither is that of an empty list
            raise InputError(
                f"prefix_allowed_tokens_fn returned {allowed.tolist()} for input {number} after"
                f" {tokens.tolist()}: it must return at least one token id, such as the end's."
            )
        _check_known("prefix_allowed_tokens_fn", allowed, scores)
        found[row, allowed] = scores[row, allowed]
    return found


def forced(ids: Ids, scores: Scores, *, tokens: Sequence[int], length: int) -> Scores:
    """Let nothing but these tokens come where a row has so many, and score each of them 0."""
    if ids.shape[1] != length:
        return scores
    _check_known("forced_bos_token_id or forced_eos_token_id", np.array(tokens), scores)
    found = np.full_like(scores, _NEVER)
    found[:, list(tokens)] = 0
    return found


def suppressed(
    ids: Ids, scores: Scores, *, tokens: Sequence[int], length: int | None = None
) -> Scores:
    """Forbid these tokens, always or only where a row has so many."""
    if length is not None and ids.shape[1] != length:
        return scores
    found = scores.copy()
    found[:, [token for token in tokens if token < scores.shape[1]]] = _NEVER
    return found


def exponential_decay(
    ids: Ids, scores: Scores, *, start: int, factor: float, ends: Sequence[int]
) -> Scores:
    """Make an end likelier with each token after so many, the prompt's included."""
    beyond = ids.shape[1] - start
    if beyond <= 0:
        return scores
    tokens = [token for token in ends if token < scores.shape[1]]
    before = scores[:, tokens]
    with np.errstate(over="ignore", invalid="ignore"):
        after = before + np.abs(before) * (np.float64(factor) ** beyond - 1)
    found = scores.copy()
    # what is forbidden stays so, and the rest are numbers, however great the power
    still = (before == _NEVER) | (before == 0)
    found[:, tokens] = np.where(still, before, np.clip(after, -_GREATEST, _GREATEST))
    return found


def _check_known(option: str, tokens: NDArray[np.int64], scores: Scores) -> None:
    """Refuse tokens that the model does not have."""
    size = scores.shape[1]
    wrong = tokens[(tokens < 0) | (tokens >= size)]
    if wrong.size:
        raise InputError(
            f"{option} names the token {wrong[0]}, and this model's are from 0 to {size - 1}: pass"
            " ids of its own tokens.",
            value=int(wrong[0]),
        )


# The scores alone


def finite(ids: Ids, scores: Scores) -> Scores:
    """Replace NaN by 0, and infinities by the greatest and the least number."""
    found = np.nan_to_num(scores, nan=0.0, posinf=_GREATEST, neginf=-_GREATEST)
    return found.astype(np.float32, copy=False)


def normalised(ids: Ids, scores: Scores) -> Scores:
    """Make the scores the logarithms of probabilities."""
    return log_softmax(scores)


def of_caller(ids: Ids, scores: Scores, *, function: Processor) -> Scores:
    """Do what a caller's own processor does, which may change what it gets: it gets copies.

    Raises:
        InputError: It returned something that is no scores.
    """
    found = np.asarray(function(ids.copy(), scores.copy()))
    if found.shape != scores.shape or found.dtype.kind not in "fiu":
        raise InputError(
            f"A logits_processor returned {found.dtype} of {found.shape}: it must return the"
            f" scores, float32 of {scores.shape}.",
            value=found.shape,
        )
    return found.astype(np.float32, copy=False)


def temperature(ids: Ids, scores: Scores, *, value: float) -> Scores:
    """Divide the scores: below 1 the better tokens gain, above 1 the worse ones do."""
    with np.errstate(over="ignore"):  # of the least number, which stands for what is forbidden
        return scores / np.float32(value)


def top_k(ids: Ids, scores: Scores, *, count: int) -> Scores:
    """Forbid all but the best so many, and those as good as the last of them."""
    return np.where(scores < _of_rank(scores, count), _NEVER, scores)


def top_p(ids: Ids, scores: Scores, *, share: float, keep: int = 1) -> Scores:
    """Forbid all but the best tokens that have so much probability together, at least so many.

    Of equal tokens, those with the lower ids are the better ones.
    """
    found = np.empty_like(scores)
    for row, (of_row, chances) in enumerate(zip(scores, softmax(scores), strict=True)):
        least, count = _cut(of_row, chances, share, keep)
        kept = of_row > least
        equals = np.flatnonzero(of_row == least)
        kept[equals[: count - int(np.count_nonzero(kept))]] = True
        found[row] = np.where(kept, of_row, _NEVER)
    return found


def _cut(
    scores: NDArray[np.float32], chances: NDArray[np.float32], share: float, keep: int
) -> tuple[np.float32, int]:
    """Where `top_p` cuts through one row; it sorts no more of the tokens than it must.

    Returns:
        The least score that is kept, and how many tokens are.
    """
    total = chances.sum(dtype=np.float64)
    size = max(FIRST_SORTED, keep)
    # the tokens below this have together less than what may be left out
    likely = chances > (1 - share) / len(scores) / 2
    if keep <= np.count_nonzero(likely) <= size:
        scores, chances = scores[likely], chances[likely]
    while True:
        place = max(len(scores) - size, 0)
        best, likeliest = (
            np.sort(np.partition(one, place)[place:] if place else one)[::-1]
            for one in (scores, chances)
        )
        # what the tokens after each have together: the rounding is that of transformers
        left = (total - np.cumsum(likeliest, dtype=np.float64)).astype(np.float32)
        count = max(int(np.count_nonzero(left > np.float32(1 - share))) + 1, keep)
        if count <= len(best) or not place:
            count = min(count, len(best))
            return best[count - 1], count
        size *= 8


def min_p(ids: Ids, scores: Scores, *, share: float, keep: int = 1) -> Scores:
    """Forbid tokens with less than this share of the best one's probability."""
    chances = softmax(scores)
    forbidden = chances < np.float32(share) * chances.max(axis=1, keepdims=True)
    return _without(forbidden, scores, -scores, keep)


def typical_p(ids: Ids, scores: Scores, *, share: float, keep: int = 1) -> Scores:
    """Forbid all but the tokens nearest to the expected surprise, with so much probability."""
    logs = log_softmax(scores)
    chances = np.exp(logs)
    distance = np.abs(-logs - _entropy(logs, chances))
    order = np.argsort(distance, axis=1, kind="stable")
    reached = np.cumsum(np.take_along_axis(chances, order, axis=1), axis=1, dtype=np.float64)
    last = (reached < share).sum(axis=1, keepdims=True).clip(max=scores.shape[1] - 1)
    farthest = np.take_along_axis(distance, np.take_along_axis(order, last, axis=1), axis=1)
    return _without(distance > farthest, scores, distance, keep)


def epsilon_cutoff(ids: Ids, scores: Scores, *, least: float, keep: int = 1) -> Scores:
    """Forbid tokens below this probability."""
    forbidden = softmax(scores) < np.float32(least)
    return np.where(forbidden & (scores < _of_rank(scores, keep)), _NEVER, scores)


def eta_cutoff(ids: Ids, scores: Scores, *, least: float, keep: int = 1) -> Scores:
    """Forbid tokens below this probability, or a lesser one where the distribution is flat."""
    logs = log_softmax(scores)
    chances: Scores = np.exp(logs)
    flat = np.sqrt(np.float32(least)) * np.exp(-_entropy(logs, chances))
    forbidden = chances < np.minimum(np.float32(least), flat)
    return np.where(forbidden & (scores < _of_rank(scores, keep)), _NEVER, scores)


def _entropy(logs: Scores, chances: Scores) -> Scores:
    """The expected surprise of each row: [rows, 1]."""
    surprise = np.multiply(logs, chances, out=np.zeros_like(logs), where=logs != _NEVER)
    found: Scores = -surprise.sum(axis=1, keepdims=True)
    return found


def _of_rank(scores: Scores, rank: int) -> Scores:
    """Each row's score of this rank, the best being the first: [rows, 1]."""
    place = max(scores.shape[1] - rank, 0)
    found: Scores = scores.max(axis=1, keepdims=True)
    if rank > 1:
        found = np.partition(scores, place, axis=1)[:, place : place + 1]
    return found


def _without(
    forbidden: NDArray[np.bool_], scores: Scores, order: NDArray[np.float32], keep: int
) -> Scores:
    """Forbid tokens, but not the first so many of a row by the order's values."""
    for row in np.flatnonzero((~forbidden).sum(axis=1) < keep):
        forbidden[row, np.argsort(order[row], kind="stable")[:keep]] = False
    return np.where(forbidden, _NEVER, scores)
