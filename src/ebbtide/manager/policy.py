"""What sleeps and what is evicted when bytes are needed: a pure function of what there is.

It knows no pipeline, clock or lock. `choose` gets all entries, the need and the time, and gives a
`Plan`; the same input in any order gives the same plan. What a policy must remember between two
choices is in each entry's `Use`, which `History` keeps, also of models that are not loaded now.

- Nothing that is leased, pinned or loading is ever taken.
- The *first step* of an entry is to sleep, which keeps its tokenizer; of one that cannot sleep, to
  be evicted. What sleeps is evicted only where all first steps together are not enough.
- No step is needless: without any one of them the plan would not be enough.
- Where nothing is enough, nothing is taken.

The policy "cost" takes first what is worth least a byte: how often it was used, times the seconds
to have it back, by the bytes that it frees. That is what GreedyDual-Size-Frequency (Cherkasova
1998) ranks by, but only uses since popularity last shifted count, the older ones less. When that
was is inferred from the uses of all models, by Bayesian changepoint detection (Adams and MacKay
2007): `History` counts from a few *beginnings*, and believes the one that foretells the uses after
it best. And what is large is spared a little: it pushes more out when it comes back. Time is
counted in *turns*, and a burst of one model is a single turn: it neither ages the others nor makes
its model look popular. A scan adds one use to each, and tells nothing of a shift.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple

from ebbtide.errors import InputError, nearest, unknown_value

EVERY = 32
"""The turns between two beginnings from which uses are counted."""
BEGINNINGS = 3
"""How many are kept; a new one takes the place of the least likely."""
HAZARD = 1 / 2000
"""How likely popularity shifts at any one turn."""
RECENT = 128
"""A use tells of a shift only where the one before is at most so many turns old: a scan is none."""
FADE = math.exp(-1 / 1000)
"""What a use counts a turn later; half after 693 turns."""
PRIOR = 1.0
"""The uses that a model is taken to have had before any was seen."""
SIZE = 0.8
"""The power of the bytes in what something is worth a byte; 1 would not spare what is large."""

_FADED = tuple([FADE**age for age in range(4096)])  # quicker looked up than worked out
_STARTS = (0,) + (-1,) * (BEGINNINGS - 1)
_NONE = (0.0,) * BEGINNINGS


@dataclasses.dataclass(frozen=True, slots=True)
class Use:
    """How one model was used until now.

    A turn ends when another model is used than before.

    Attributes:
        at: When it was used last, in seconds of the caller's clock.
        turn: The turn of that use.
        count: How many times it was used.
        often: The uses after each beginning, in which the newest count most.
        starts: The beginnings that were kept at that use: turns, or -1 where there is none.
        likeliest: Which of them popularity was likeliest to have shifted at last.
    """

    at: float
    turn: int = 0
    count: int = 1
    often: tuple[float, ...] = _NONE
    starts: tuple[int, ...] = _STARTS
    likeliest: int = 0

    def again(self, at: float, turn: int) -> Use:
        """This, after one more use in the same turn."""
        return Use(at, turn, self.count + 1, self.often, self.starts, self.likeliest)


class History:
    """The uses of every model that was ever asked for, loaded or not, and the turn it is.

    It reads no clock and takes no lock: of uses at once on several threads one may be lost.

    Attributes:
        turn: How many times another model was used than before.

    Example:
        >>> history = History()
        >>> history.used("a", 1.0).turn, history.used("a", 2.0).count
        (1, 2)
        >>> history.used("b", 3.0).turn
        2
    """

    __slots__ = ("_last", "_likely", "_seen", "_starts", "_uses", "turn")

    def __init__(self) -> None:
        self.turn = 0
        self._last: str | None = None
        self._uses: dict[str, Use] = {}
        self._starts = _STARTS
        self._seen = list(_NONE)  # The uses of all models after each beginning
        self._likely = [1.0, *_NONE[1:]]

    def used(self, key: str, now: float) -> Use:
        """Note a use, and say what is known of the model now."""
        before = self._uses.get(key)
        if before and key == self._last:
            use = before.again(now, before.turn)
        else:
            self._last = key
            self.turn += 1
            if self.turn % EVERY == 0:
                self._begin()
            use = self._next(before, now)
        self._uses[key] = use
        return use

    def _next(self, before: Use | None, now: float) -> Use:
        """The use in a new turn; and each beginning is as likely as it foretold that use.

        By its counts, that is: they are those of a multinomial with a Dirichlet prior.
        """
        telling = before is not None and self.turn - before.turn <= RECENT
        every = PRIOR * (len(self._uses) + (before is None))
        likely, seen, starts, often = self._likely, self._seen, self._starts, list(_NONE)
        faded = FADE ** (self.turn - before.turn) if before else 0.0
        for which, start in enumerate(starts):
            same = before is not None and before.starts[which] == start
            uses = before.often[which] * faded if before and same else 0.0
            if telling:
                likely[which] *= (uses + PRIOR) / (seen[which] + every)
            seen[which] = seen[which] * FADE + 1.0
            often[which] = uses + 1.0
        best = max(range(BEGINNINGS), key=likely.__getitem__)  # another thread may change it
        count = before.count + 1 if before else 1
        return Use(now, self.turn, count, tuple(often), starts, best)

    def _begin(self) -> None:
        """Count from this turn on as well: popularity may have shifted in the last ones."""
        total, shifted = sum(self._likely), HAZARD * EVERY
        self._likely = likely = [max(one / total, 1e-99) * (1 - shifted) for one in self._likely]
        least = min(range(BEGINNINGS), key=likely.__getitem__)
        likely[least], self._seen[least] = shifted, 0.0
        self._starts = (*self._starts[:least], self.turn, *self._starts[least + 1 :])

    def of(self, key: str) -> Use | None:
        """What is known of a model, or None where it was never used."""
        return self._uses.get(key)

    def forget(self, key: str) -> None:
        """Know nothing of a model any more."""
        self._uses.pop(key, None)


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """What a policy knows of one pipeline.

    Attributes:
        key: Its name, which no other entry has.
        bytes_awake: What it holds when it is awake.
        bytes_asleep: What it still holds when it sleeps, as its tokenizer.
        reload_seconds: How long it takes to load it again after it was evicted.
        wake_seconds: How long it takes to wake it.
        use: How it was used until now.
        leased: Whether somebody holds it.
        pinned: Whether it is to stay.
        loading: Whether it is being loaded or woken.
        asleep: Whether it sleeps.
        sleepable: Whether it can sleep.
        keep_until: Until when it was asked to be kept, by the clock of ``use``; or for ever.
        sleeps: Whether its first step is to sleep: it can, and something comes free by it.
        frees: The bytes that come free by its first step.

    Raises:
        InputError: Bytes or seconds are negative or not a number, or asleep it holds more.
    """

    key: str
    bytes_awake: int
    bytes_asleep: int = 0
    reload_seconds: float = 0.0
    wake_seconds: float = 0.0
    use: Use = Use(0.0)
    leased: bool = False
    pinned: bool = False
    loading: bool = False
    asleep: bool = False
    sleepable: bool = True
    keep_until: float = math.inf
    sleeps: bool = dataclasses.field(init=False, repr=False, compare=False)
    frees: int = dataclasses.field(init=False, repr=False, compare=False)
    _seconds: float = dataclasses.field(init=False, repr=False, compare=False)
    _weight: float = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.bytes_asleep <= self.bytes_awake < math.inf:
            raise InputError(
                f"{self.key!r} has {self.bytes_asleep} bytes asleep and {self.bytes_awake} awake."
                " Give counts of 0 or more, and no more asleep than awake.",
                value=(self.bytes_asleep, self.bytes_awake),
            )
        if not (0 <= self.reload_seconds < math.inf and 0 <= self.wake_seconds < math.inf):
            raise InputError(
                f"{self.key!r} takes {self.reload_seconds} s to load and {self.wake_seconds} s to"
                " wake. Give finite seconds of 0 or more.",
                value=(self.reload_seconds, self.wake_seconds),
            )
        if math.isnan(self.keep_until):
            raise InputError(
                f"keep_until of {self.key!r} is not a number. Give a time, or math.inf for ever."
            )
        asleep = self.bytes_asleep
        held = asleep if self.asleep else self.bytes_awake
        sleeps = self.sleepable and asleep < held
        frees = held - asleep if sleeps else held
        note = object.__setattr__  # worked out once: an entry serves many choices
        note(self, "sleeps", sleeps)
        note(self, "frees", frees)
        note(self, "_seconds", self.wake_seconds if sleeps else self.reload_seconds)
        note(self, "_weight", (frees or 1) ** SIZE)

    @property
    def held(self) -> int:
        """The bytes that it holds now."""
        return self.bytes_asleep if self.asleep else self.bytes_awake

    @property
    def busy(self) -> str:
        """Why it cannot be taken, in a word; empty where it can."""
        if self.leased:
            return "leased"
        return "pinned" if self.pinned else "loading" if self.loading else ""


@dataclasses.dataclass(frozen=True, slots=True)
class Need:
    """What is asked for.

    Attributes:
        bytes: How many bytes are to come free, 0 or more.

    Raises:
        InputError: The bytes are negative or not a number.
    """

    bytes: int

    def __post_init__(self) -> None:
        if not 0 <= self.bytes < math.inf:
            raise InputError(
                f"A need of {self.bytes} bytes is none. Give a count of 0 or more.",
                value=self.bytes,
            )


class Step(NamedTuple):
    """One thing to do.

    Attributes:
        entry: The entry as it was.
        action: "sleep" or "evict".
        bytes: What comes free by it.
        policy: The policy's name.
        at: The time of the choice.
    """

    entry: Entry
    action: Literal["sleep", "evict"]
    bytes: int
    policy: str
    at: float

    @property
    def key(self) -> str:
        """The entry's key."""
        return self.entry.key

    @property
    def seconds(self) -> float:
        """What it takes to have the entry back."""
        entry = self.entry
        return entry.wake_seconds if self.action == "sleep" else entry.reload_seconds

    @property
    def reason(self) -> str:
        """What it gives, what it costs, and why this one, in words."""
        entry = self.entry
        since = f"{max(0.0, self.at - entry.use.at):.0f} s ago"
        why = f"used {since}"
        if self.policy in {"cost", "lfu"}:
            times = "once" if entry.use.count == 1 else f"{entry.use.count} times"
            why = f"used {times}, last {since}"
        elif self.policy == "ttl":
            left = entry.keep_until - self.at
            why = "kept for ever" if left == math.inf else f"to be kept for {left:.0f} s"
            why = why if left > 0 else f"its time ended {-left:.0f} s ago"
        return f"frees {_mb(self.bytes)}, back in {self.seconds:.2f} s; {why} ({self.policy})"


_step = partial(tuple.__new__, Step)
"""A `Step` of a tuple, with no call in Python: a plan may have hundreds."""


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What to do so that the bytes come free.

    Attributes:
        steps: What to do, what is worth least first; empty where nothing is enough.
        needed: The bytes asked for.
        possible: The bytes that could come free at most.
        kept: The keys of what may not be taken, each with the reason in a word.
    """

    steps: tuple[Step, ...]
    needed: int
    possible: int
    kept: Mapping[str, str]

    @property
    def sleep(self) -> tuple[str, ...]:
        """The keys of what is to sleep."""
        return tuple(step.key for step in self.steps if step.action == "sleep")

    @property
    def evict(self) -> tuple[str, ...]:
        """The keys of what is to be evicted."""
        return tuple(step.key for step in self.steps if step.action == "evict")

    @property
    def freed(self) -> int:
        """The bytes that come free."""
        return sum(step.bytes for step in self.steps)

    @property
    def enough(self) -> bool:
        """Whether that is what was needed."""
        return self.freed >= self.needed

    def __str__(self) -> str:
        """Lines for a person.

        Example:
            >>> print(choose("lru", [Entry("a", 90_000_000)], Need(10_000_000), now=60.0))
            90.0 MB come free, 10.0 MB are needed
            sleep a: frees 90.0 MB, back in 0.00 s; used 60 s ago (lru)
        """
        if self.enough:
            head = f"{_mb(self.freed)} come free, {_mb(self.needed)} are needed"
        else:
            head = f"{_mb(self.needed)} are needed, and at most {_mb(self.possible)} can come free"
            if self.kept:
                head += ": " + ", ".join(f"{key} is {why}" for key, why in self.kept.items())
        return "\n".join([head, *(f"{one.action} {one.key}: {one.reason}" for one in self.steps)])


Order = Sequence[str] | Mapping[str, float]
"""What a policy of the user's gives: keys, the first to go first, or a score for each key, of which
the lowest go first. What it leaves out is kept."""

Policy = str | Callable[[Sequence[Entry], Need, float], Order]
"""The name of a policy, or a function of the entries that may be taken, the need, and the time."""

POLICIES: Mapping[str, str] = {
    "cost": "what is worth least a byte: how often it is used, by the seconds to have it back",
    "lru": "what was not used for the longest time",
    "lfu": "what was used the fewest times",
    "ttl": "what was to be kept the shortest time from now",
}
"""The policies by name, each with what goes first."""


def choose(policy: Policy, entries: Iterable[Entry], need: Need, now: float) -> Plan:
    """What to put to sleep and what to evict.

    Args:
        policy: "cost", "lru", "lfu", "ttl", or a function (see `Policy`).
        entries: All there are. What its newest use knows is taken for the present.
        need: How many bytes are to come free.
        now: The time, by the clock of the entries.

    Returns:
        The plan; its steps are empty where nothing is needed, or where nothing is enough.

    Raises:
        InputError: There is no such policy, two entries have one key, or a function gave keys that
            do not exist or scores that are not numbers.

    Example:
        >>> old, new = Entry("old", 50, use=Use(at=1.0)), Entry("new", 50, use=Use(at=2.0))
        >>> choose("lru", [new, old], Need(40), now=3.0).sleep
        ('old',)
        >>> choose(lambda entries, need, now: ["new", "old"], [new, old], Need(40), now=3.0).sleep
        ('new',)
    """
    if not callable(policy) and policy not in POLICIES:
        raise unknown_value("policy", policy, POLICIES)
    everything = list(entries)
    if len({entry.key for entry in everything}) < len(everything):
        raise _twice([entry.key for entry in everything], "entries")
    kept = {one.key: one.busy for one in everything if one.leased or one.pinned or one.loading}
    free = [one for one in everything if one.key not in kept] if kept else everything
    order: dict[str, float] | None = None
    if callable(policy):
        free = sorted(free, key=lambda entry: entry.key)
        order = _scores(policy(tuple(free), need, now), free)
        free = [entry for entry in free if entry.key in order]
    asleep = [one for one in free if one.asleep]
    awake = [one for one in free if not one.asleep] if asleep else free
    possible = sum([one.bytes_awake for one in awake]) + sum([one.bytes_asleep for one in asleep])
    steps: list[Step] = []
    if 0 < need.bytes <= possible:
        newest = _newest(everything)
        name = policy if isinstance(policy, str) else "your policy"
        ranked = _ranked(name, order, awake, newest, False)
        firsts, missing = _take(ranked, need.bytes, False)
        seconds: list[Entry] = []
        if missing > 0:
            rest = [one for one in free if one.asleep or one.sleeps]
            ranked = _ranked(name, order, rest, newest, True)
            seconds, missing = _take(ranked, missing, True)
        steps = _least(firsts, seconds, -missing, name, now)
    return Plan(tuple(steps), need.bytes, possible, dict(sorted(kept.items())))


def expired(entries: Iterable[Entry], now: float) -> tuple[str, ...]:
    """The keys of what may go because its keep-alive is over, the one that ended first at first.

    Example:
        >>> expired([Entry("a", 1, keep_until=5.0), Entry("b", 1)], now=6.0)
        ('a',)
    """
    over = [entry for entry in entries if entry.keep_until <= now and not entry.busy]
    return tuple(one.key for one in sorted(over, key=lambda one: (one.keep_until, one.key)))


def popularity(use: Use, newest: Use) -> float:
    """How often it was used since popularity shifted, as ``newest`` knows, and `PRIOR`.

    Example:
        >>> history = History()
        >>> once, often = [history.used(key, 1.0) for key in "abcb"][::3]
        >>> round(popularity(once, often), 3), round(popularity(often, often), 3)
        (1.997, 2.998)
    """
    which, uses = newest.likeliest, 0.0
    if use.starts[which] == newest.starts[which]:
        uses = use.often[which] * FADE ** (newest.turn - use.turn)
    return uses + PRIOR


def _newest(entries: list[Entry]) -> Use:
    """The newest use; the order of the entries does not matter where users made two of a turn."""
    found = entries[0].use
    for entry in entries:
        use = entry.use
        if use.turn > found.turn or (use.turn == found.turn and _later(use, found)):
            found = use
    return found


def _later(use: Use, than: Use) -> bool:
    """Which of two of one turn is taken to be the newer."""
    return (use.starts, use.likeliest) > (than.starts, than.likeliest)


def _ranked(
    name: str, order: dict[str, float] | None, entries: list[Entry], newest: Use, evicting: bool
) -> list[Entry]:
    """The entries in the order in which they take a first step, or are evicted asleep."""
    ranked: list[tuple[float, float, str, Entry]]
    if order is not None:
        ranked = [(order[one.key], 0.0, one.key, one) for one in entries]
    elif name == "lru":
        ranked = [(one.use.at, 0.0, one.key, one) for one in entries]
    elif name == "lfu":
        ranked = [(one.use.count, one.use.at, one.key, one) for one in entries]
    elif name == "ttl":
        ranked = [(one.keep_until, one.use.at, one.key, one) for one in entries]
    else:
        return _by_worth(entries, newest, evicting)
    return [row[-1] for row in sorted(ranked)]


def _by_worth(entries: list[Entry], newest: Use, evicting: bool) -> list[Entry]:
    """By the seconds a byte that the first step loses, or evicting what sleeps.

    One loop with no calls, `popularity` written out: it is much of the time that a choice takes.
    """
    turn, which = newest.turn, newest.likeliest
    start, known = newest.starts[which], len(_FADED)
    worths = []
    for entry in entries:
        use, uses = entry.use, PRIOR
        if use.starts[which] == start:
            age = turn - use.turn
            uses += use.often[which] * (_FADED[age] if age < known else FADE**age)
        if evicting:
            worths.append(entry.reload_seconds * uses / (entry.bytes_asleep or 1) ** SIZE)
        else:
            worths.append(entry._seconds * uses / entry._weight)
    places: Sequence[int] = range(len(entries))
    if len(set(worths)) < len(worths):  # equals go by their last use, and then by name
        places = sorted(places, key=lambda place: (entries[place].use.at, entries[place].key))
    return [entries[place] for place in sorted(places, key=worths.__getitem__)]


def _take(ranked: list[Entry], needed: int, evicting: bool) -> tuple[list[Entry], int]:
    """What goes, in order, until that is enough, and what is still needed then.

    What frees nothing is left alone.
    """
    taken = []
    for entry in ranked:
        freed = entry.bytes_asleep if evicting else entry.frees
        if freed > 0:
            taken.append(entry)
            needed -= freed
            if needed <= 0:
                break
    return taken, needed


def _least(
    firsts: list[Entry], seconds: list[Entry], spare: int, name: str, now: float
) -> list[Step]:
    """The steps without those that are not needed; what is worth most is spared first.

    What both sleeps and is evicted is one step. Each that is spared makes it only harder to spare
    another, so one look at each is enough.
    """
    also: dict[str, int] = {}
    for entry in reversed(seconds):
        if entry.bytes_asleep <= spare:
            spare -= entry.bytes_asleep
        else:
            also[entry.key] = entry.bytes_asleep
    steps = []
    for entry in reversed(firsts):
        more = also.pop(entry.key, 0) if also else 0
        freed = entry.frees + more
        if freed <= spare:
            spare -= freed
        elif entry.sleeps and not more:
            steps.append(_step((entry, "sleep", freed, name, now)))
        else:
            steps.append(_step((entry, "evict", freed, name, now)))
    steps.reverse()
    left = [entry for entry in seconds if entry.key in also]
    return steps + [_step((entry, "evict", entry.bytes_asleep, name, now)) for entry in left]


def _scores(given: object, entries: list[Entry]) -> dict[str, float]:
    """What a function of the user's gave, as a score a key."""
    if isinstance(given, Mapping):
        scores = dict(given)
    elif isinstance(given, Sequence) and all(isinstance(key, str) for key in given):
        if isinstance(given, str):
            raise _no_order(given)
        if len(set(given)) < len(given):
            raise _twice(given, "keys that the policy gave")
        scores = {key: place for place, key in enumerate(given)}
    else:
        raise _no_order(given)
    known = [entry.key for entry in entries]
    for key in scores.keys() - set(known):
        raise InputError(
            f"The policy gave {key!r}, which is not a key of the entries that it got. Known:"
            f" {', '.join(sorted(known))}.",
            value=key,
            nearest=nearest(str(key), known),
        )
    for key, score in scores.items():
        if not isinstance(score, int | float) or math.isnan(score):
            raise InputError(
                f"The policy gave {key!r} the score {score!r}. Give numbers; the lowest go first.",
                value=score,
            )
    return scores


def _no_order(given: object) -> InputError:
    return InputError(
        f"The policy gave {type(given).__name__}. Return a sequence of keys, the first to go first,"
        " or a mapping from key to score.",
        value=given,
    )


def _twice(keys: Sequence[str], where: str) -> InputError:
    again = next(key for place, key in enumerate(keys) if key in keys[:place])
    return InputError(f"{again!r} is twice among the {where}. Give each one once.", value=again)


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
