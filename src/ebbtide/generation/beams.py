"""Beam search: the likeliest whole sequences, as Transformers finds them.

Each row has a number of beams: sequences that are still going on. A step looks at every next token
of each of them, takes the best candidates, keeps those that end here, and goes on with the best
others. Diverse beam search does so for one group of the beams after another, and a group is kept
from the tokens that those before it have just taken.

A row's results are what Transformers gives for the row alone: here, no row waits for the others,
and nothing that happens to them changes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from ebbtide.cancellation import CancelToken
from ebbtide.errors import InputError
from ebbtide.generation.steps import Ids, Scores, Steps

EarlyStopping = bool | Literal["never"]
"""When a row with enough ended sequences is done; see `beam_search`."""

Processor = Callable[[Ids, Scores], Scores]
"""Gets the tokens so far and the scores of the next; returns the scores that count instead."""

StopRule = Callable[[Ids, Scores], NDArray[np.bool_]]
"""Gets sequences and scores; says of each sequence whether it ends here."""

_FAR: Final = np.float32(-1e9)
"""The score of what is to come after everything else, and yet before what was forbidden."""


@dataclasses.dataclass(frozen=True, slots=True)
class BeamResult:
    """The best sequences, row by row, and of each row the best first.

    Attributes:
        ids: The new tokens, padded on the right: [rows * returned, tokens].
        lengths: How many new tokens each has, its end included: [rows * returned].
        scores: The sum of each one's token scores, after the processors, divided by
            ``length ** length_penalty``: [rows * returned].
    """

    ids: Ids
    lengths: NDArray[np.int64]
    scores: NDArray[np.float32]


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    """What is the same from the first step to the last; see `beam_search`."""

    rows: int
    prompt: int
    """Tokens of the prompt."""
    num_beams: int
    num_return_sequences: int
    num_beam_groups: int
    diversity_penalty: float
    length_penalty: float
    early_stopping: EarlyStopping
    max_length: int
    eos_ids: tuple[int, ...]
    pad_id: int
    processors: Sequence[Processor]
    generator: np.random.Generator | None
    """Given where candidates are drawn."""
    should_stop: StopRule | None


def beam_search(
    steps: Steps,
    prompt_ids: Ids,
    *,
    token: CancelToken,
    num_beams: int,
    max_length: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    num_return_sequences: int = 1,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = False,
    num_beam_groups: int = 1,
    diversity_penalty: float = 0.0,
    processors: Sequence[Processor] = (),
    do_sample: bool = False,
    generator: np.random.Generator | None = None,
    should_stop: StopRule | None = None,
    on_step: Callable[[int], None] | None = None,
) -> BeamResult:
    """Search for the likeliest sequences that go on from each prompt.

    Args:
        steps: The model, which has seen nothing of the prompt yet; it is left open.
        prompt_ids: The prompts, left-padded to one length: [rows, tokens]. For an encoder-decoder
            model, what its decoder starts with.
        token: Stops it from another thread.
        num_beams: Sequences of each row that go on at a time.
        max_length: Tokens at which a sequence ends, those of the prompt included.
        eos_ids: Tokens that end a sequence.
        pad_id: Stands after the end of what is shorter than the longest.
        num_return_sequences: Sequences that are returned for each row.
        length_penalty: A sum of scores is divided by the length to this power; above 0 favours
            long sequences, below 0 short ones.
        early_stopping: When a row is done, once as many sequences have ended as it has beams: at
            once if True; if False, when none that goes on scores better at its present length; if
            "never", when none could at any length.
        num_beam_groups: Groups of beams, which differ from one another.
        diversity_penalty: Taken off a token's score for each beam of an earlier group that has
            taken the token in the same step.
        processors: Change the logarithms of the probabilities, in this order, for all beams of all
            rows, or for those of one group. The tokens that they get are not theirs to change.
        do_sample: Whether candidates are drawn by their probability, in place of the best.
        generator: Draws them; a new one if None.
        should_stop: Ends sequences before their length or a token does. It gets the candidates of
            all rows, or in groups all beams, and this step's scores: [rows * num_beams,
            vocabulary]. Groups end together, when it ends all beams of a row.
        on_step: Called after each step with the number of new tokens that a beam has; what it
            raises ends the search.

    Returns:
        The best sequences of each row.

    Raises:
        InputError: The numbers do not fit one another.
        PipelineCancelledError: The token was cancelled.
        RunError: The graph could not be run.
    """
    rows, prompt = prompt_ids.shape
    if num_beams < 1 or not 1 <= num_return_sequences <= num_beams:
        raise InputError(
            f"{num_return_sequences} sequences cannot be returned of {num_beams} beams; "
            "num_return_sequences is at least 1, and at most num_beams.",
            value=num_return_sequences,
        )
    if num_beam_groups < 1 or num_beams % num_beam_groups:
        raise InputError(
            f"{num_beams} beams cannot be divided into {num_beam_groups} groups of one size; "
            "num_beams must be a multiple of num_beam_groups.",
            value=num_beam_groups,
        )
    if num_beam_groups > 1 and do_sample:
        raise InputError(
            "Groups of beams cannot be sampled; pass do_sample=False, or num_beam_groups=1.",
            value=num_beam_groups,
        )
    if max_length <= prompt:
        raise InputError(
            f"The prompt has {prompt} tokens, which leaves none of a max_length of {max_length}; "
            "pass a larger max_length, or max_new_tokens.",
            value=max_length,
        )
    if do_sample and generator is None:
        generator = np.random.default_rng()
    plan = _Plan(
        rows=rows,
        prompt=prompt,
        num_beams=num_beams,
        num_return_sequences=num_return_sequences,
        num_beam_groups=num_beam_groups,
        diversity_penalty=diversity_penalty,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        max_length=max_length,
        eos_ids=eos_ids,
        pad_id=pad_id,
        processors=processors,
        generator=generator if do_sample else None,
        should_stop=should_stop,
    )
    search = _Search(plan, prompt_ids) if num_beam_groups == 1 else _GroupSearch(plan, prompt_ids)

    in_place = np.arange(rows * num_beams)
    prompts = np.repeat(np.arange(rows), num_beams)  # the prompt's own row of each beam
    search.step(steps.forward(prompt_ids, token)[:, -1][prompts])
    order = prompts  # the beams of a prompt are still alike, and the cache has one row for them
    while True:
        if on_step is not None:
            on_step(search.generated)
        if search.done.all():
            return search.result()
        token.check()
        if not np.array_equal(order, in_place):
            steps.select(order)
        order = search.step(steps.forward(search.newest(), token)[:, -1])


class _Beams:
    """Beams of each row, all or one group, and the best of their sequences that have ended.

    Attributes:
        scores: The sum of each beam's token scores: [rows, beams].
        ended: Of each row, the score and the new tokens of ended sequences, the best first.
        done: Which rows take no more ended sequences.
    """

    def __init__(self, plan: _Plan, size: int) -> None:
        self.plan = plan
        self.size = size
        self.scores = np.full((plan.rows, size), _FAR)
        self.scores[:, 0] = 0  # beams begin alike: the candidates come from the first alone
        self.ended: list[list[tuple[float, Ids]]] = [[] for _ in range(plan.rows)]
        self.done = np.zeros(plan.rows, bool)

    def candidates(
        self, scores: Scores
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
        """The candidates to go on with: so many that enough are left where each beam could end.

        Args:
            scores: Of every next token of every beam: [rows * beams, vocabulary].

        Returns:
            For each candidate, the best first, its score, its beam's number and its token; drawn
            candidates come in the order in which they were drawn.
        """
        vocabulary = scores.shape[-1]
        sums = scores.reshape(self.plan.rows, self.size, vocabulary) + self.scores[:, :, None]
        sums = sums.reshape(self.plan.rows, -1)
        count = max(2, 1 + len(self.plan.eos_ids)) * self.size
        if self.plan.generator is None:
            places = _best(sums, count)
        else:
            places = _best(_drawn(sums, self.plan.generator), count)
        beams, tokens = np.divmod(places, vocabulary)
        return np.take_along_axis(sums, places, axis=1), beams, tokens

    def end(self, row: int, score: float, ids: Ids) -> None:
        """Keep an ended sequence, if it is among the best; its score counts its length already."""
        ended = self.ended[row]
        ended.append((score, ids))
        ended.sort(key=_score, reverse=True)
        del ended[self.size :]

    def settle(self, best: NDArray[np.floating], generated: int) -> None:
        """Note which rows are done.

        Args:
            best: Of each row, the best sum of token scores that there is to go on from.
            generated: New tokens of a beam so far.
        """
        plan = self.plan
        if plan.early_stopping == "never" and plan.length_penalty > 0:
            generated = plan.max_length - plan.prompt
        attainable = best / float(generated) ** plan.length_penalty
        for row, ended in enumerate(self.ended):
            if len(ended) == self.size and (
                plan.early_stopping is True or ended[-1][0] >= attainable[row]
            ):
                self.done[row] = True


class _Search:
    """Beam search, step by step.

    Attributes:
        ids: The tokens of each beam, its prompt's included: [rows, beams, tokens].
        done: Which rows have their result.
    """

    def __init__(self, plan: _Plan, prompt_ids: Ids) -> None:
        self.plan = plan
        self.ids = np.repeat(prompt_ids[:, None], plan.num_beams, axis=1)
        size = plan.num_beams // plan.num_beam_groups
        self.groups = [_Beams(plan, size) for _ in range(plan.num_beam_groups)]
        self.done = np.zeros(plan.rows, bool)

    @property
    def generated(self) -> int:
        """New tokens of a beam."""
        return int(self.ids.shape[-1]) - self.plan.prompt

    def newest(self) -> Ids:
        """The newest token of each beam, which the model has not seen: [rows * beams, 1]."""
        return self.ids[:, :, -1].reshape(-1, 1)

    def step(self, logits: Scores) -> NDArray[np.int64]:
        """Take the next token of each beam.

        Args:
            logits: Of each beam: [rows * beams, vocabulary].

        Returns:
            For each beam, which one it goes on from, counted through all rows.
        """
        plan, beams = self.plan, self.groups[0]
        scores = self._processed(self.ids, _log_softmax(logits))
        sums, parents, tokens = beams.candidates(scores)
        length = self.ids.shape[-1] + 1
        ends = np.isin(tokens, plan.eos_ids) | (length >= plan.max_length)
        if plan.should_stop is not None:
            stops = plan.should_stop(_flat(_longer(self.ids, parents, tokens)), scores)
            ends = ends | stops.reshape(ends.shape)

        final = sums / float(length - plan.prompt) ** plan.length_penalty
        for row, rank in np.argwhere(ends[:, : plan.num_beams]).tolist():
            if not self.done[row] and final[row, rank] > _FAR:
                new = self.ids[row, parents[row, rank], plan.prompt :]
                beams.end(row, float(final[row, rank]), np.append(new, tokens[row, rank]))

        sums = np.where(ends, sums + _FAR, sums)
        best = _best(sums, plan.num_beams)
        parents, tokens = (np.take_along_axis(one, best, axis=1) for one in (parents, tokens))
        beams.scores = np.take_along_axis(sums, best, axis=1)
        self.ids = _longer(self.ids, parents, tokens)
        beams.settle(beams.scores[:, 0], self.generated)
        self.done |= beams.done | ends.all(axis=1)
        return self._counted(parents)

    def result(self) -> BeamResult:
        """The best sequences that have ended."""
        found: list[tuple[float, Ids]] = []
        count = self.plan.num_return_sequences
        for row in range(self.plan.rows):
            ended = [one for group in self.groups for one in group.ended[row]]
            ended.sort(key=_score, reverse=True)
            # where all else was forbidden there may be too few
            ended += [(float(_FAR), np.empty(0, np.int64))] * (count - len(ended))
            found += ended[:count]
        lengths = np.array([len(ids) for _, ids in found], np.int64)
        padded = np.full((len(found), lengths.max(initial=0)), self.plan.pad_id, np.int64)
        for row, (_, ids) in enumerate(found):
            padded[row, : len(ids)] = ids
        return BeamResult(padded, lengths, np.array([score for score, _ in found], np.float32))

    def _processed(self, ids: Ids, scores: Scores) -> Scores:
        """The scores as the processors want them; the tokens are [rows, beams, tokens]."""
        flat = _flat(ids)
        for processor in self.plan.processors:
            scores = processor(flat, scores)
        return scores

    def _counted(self, parents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Beams' numbers within their rows, counted through all rows instead."""
        firsts = np.arange(self.plan.rows)[:, None] * self.plan.num_beams
        return (parents + firsts).reshape(-1)


class _GroupSearch(_Search):
    """Diverse beam search: one group of the beams after another in each step."""

    def step(self, logits: Scores) -> NDArray[np.int64]:
        """Take the next token of each beam; see `_Search.step`."""
        plan = self.plan
        rows, size = plan.rows, self.groups[0].size
        every = _log_softmax(logits).reshape(rows, plan.num_beams, -1)
        chosen = np.empty((rows, plan.num_beams), np.int64)
        parents = np.empty_like(chosen)
        for start, group in zip(range(0, plan.num_beams, size), self.groups, strict=True):
            part = slice(start, start + size)
            self._penalise(every[:, part], chosen[:, :start])
            scores = self._processed(self.ids[:, part], every[:, part].reshape(rows * size, -1))
            every[:, part] = scores.reshape(rows, size, -1)
            taken, chosen[:, part] = self._advance(group, start, scores)
            parents[:, part] = taken + start

        self.ids = _longer(self.ids, parents, chosen)
        self.done |= np.all([group.done for group in self.groups], axis=0)
        ends = np.full(rows, self.ids.shape[-1] >= plan.max_length)
        if plan.should_stop is not None:
            flat = every.reshape(rows * plan.num_beams, -1)
            stops = plan.should_stop(_flat(self.ids), flat)
            ends |= stops.reshape(rows, plan.num_beams).all(axis=1)
        for row in np.flatnonzero(ends).tolist():
            self._end_open(row)
        return self._counted(parents)

    def _advance(
        self, group: _Beams, start: int, scores: Scores
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Let a group take its next tokens: returns the beam each goes on from, and the token."""
        plan = self.plan
        sums, parents, tokens = group.candidates(scores)
        ends = np.isin(tokens, plan.eos_ids)
        generated = self.generated + 1
        for row, rank in np.argwhere(ends[:, : group.size]).tolist():
            if not group.done[row]:
                new = self.ids[row, start + parents[row, rank], plan.prompt :]
                final = float(sums[row, rank]) / float(generated) ** plan.length_penalty
                group.end(row, final, np.append(new, plan.eos_ids[0]))  # whichever it was
        was_done = group.done.copy()
        group.settle(sums.max(axis=1).astype(np.float64), generated)
        going_on = np.argsort(ends, axis=1, kind="stable")[:, : group.size]
        group.scores = np.take_along_axis(sums, going_on, axis=1)
        tokens = np.take_along_axis(tokens, going_on, axis=1)
        tokens[was_done] = plan.pad_id  # which costs the groups after it as any token does
        return np.take_along_axis(parents, going_on, axis=1), tokens

    def _penalise(self, scores: Scores, chosen: NDArray[np.int64]) -> None:
        """Take off a group's scores, [rows, beams, vocabulary], what was chosen before it costs."""
        for row, tokens in zip(scores, chosen, strict=True):
            taken, times = np.unique(tokens, return_counts=True)
            row[:, taken] -= (self.plan.diversity_penalty * times).astype(np.float32)

    def _end_open(self, row: int) -> None:
        """End a row as it is: the open beams count like ended sequences."""
        size = self.groups[0].size
        for start, group in zip(range(0, self.plan.num_beams, size), self.groups, strict=True):
            if not group.done[row]:
                for beam, score in enumerate(group.scores[row].tolist()):
                    final = score / float(self.generated) ** self.plan.length_penalty
                    group.end(row, final, self.ids[row, start + beam, self.plan.prompt :])
            group.done[row] = True
        self.done[row] = True


def _score(ended: tuple[float, Ids]) -> float:
    """The score of an ended sequence."""
    return ended[0]


def _flat(ids: Ids) -> Ids:
    """Tokens of each row's beams, as [rows * beams, tokens]."""
    return ids.reshape(-1, ids.shape[-1])


def _longer(ids: Ids, beams: NDArray[np.int64], tokens: NDArray[np.int64]) -> Ids:
    """The tokens of these beams of each row, with one more token each."""
    return np.concatenate(
        [np.take_along_axis(ids, beams[:, :, None], axis=1), tokens[:, :, None]], axis=2
    )


def _log_softmax(logits: Scores) -> Scores:
    """The logarithms of the probabilities, as an array of its own."""
    scores = logits.astype(np.float32)
    scores -= scores.max(axis=-1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    return scores


def _best(scores: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """The places of the highest scores of each row, the highest first, without sorting the rest."""
    places = np.argpartition(scores, -count, axis=1)[:, -count:]
    places.sort(axis=1)  # of equal ones, the first comes first
    order = np.argsort(-np.take_along_axis(scores, places, axis=1), axis=1, kind="stable")
    return np.take_along_axis(places, order, axis=1)


def _drawn(scores: NDArray[np.float32], generator: np.random.Generator) -> NDArray[np.float32]:
    """Scores whose highest, in order, are a draw by probability that puts nothing back.

    With noise of a Gumbel distribution on it, a logarithm of a probability is the highest of all
    as often as that probability says; and so on among the rest.
    """
    waits = generator.standard_exponential(scores.shape).astype(np.float32)
    drawn: NDArray[np.float32] = scores - np.log(np.maximum(waits, np.finfo(np.float32).tiny))
    return drawn
