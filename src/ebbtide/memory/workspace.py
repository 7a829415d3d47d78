"""The working memory of native runs: learned for each graph by shape, and admitted run by run.

Weights do not fill a process, runs do. So where a manager has set a limit, a run first reserves
what it will take, and waits while that does not fit beside those under way. Without a limit this
costs one look at an attribute, and nothing is learned.

Everything here is called on native threads of Ebbtide's own, so a lock may be held. Waiting ends:
what a run waits for are native runs, which end by themselves. The oldest waiter goes first.

**What a thread keeps.** Memory that a run frees stays in its thread's arena, for the next run
there, until a trim. So what counts is for each thread the most that a run on it took since the
last trim: its *level*. The sum of the levels stays within the limit, and where it would not, the
levels of idle threads are trimmed away first. The process's measured anonymous bytes are looked at
as well: the limit is of the process, whatever the accounts say.

**How it is learned.** A shape larger than all that were seen runs with no other beside it, after a
trim, while a thread reads the process's anonymous bytes each millisecond. Until then it is
guessed: see `guess`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from ebbtide.cancellation import CancelToken, EbbtideThread, OneShot
from ebbtide.errors import OutOfBudgetError
from ebbtide.lifecycle import on_fork
from ebbtide.memory.allocator import allocator
from ebbtide.memory.ledger import Activity, activity
from ebbtide.memory.needs import Needs, bucket_of
from ebbtide.memory.probe import anonymous_bytes

SMALL: Final = 1_000_000
"""A run that was seen to take no more is not counted: at most so much for each native thread."""

_MARGIN: Final = 4
"""The part of an estimate that is added to it."""

_AT_ONCE: Final = 4
"""Batches that a call is cut into are to fit so often beside one another."""

_FEW_TOKENS: Final = 256

_SAMPLED_EACH: Final = 0.001
_TRIES: Final = 3
"""So often a shape is measured while something else goes on; then the least of it is believed.

Until then the first is made do with. A load or a disposal beside it would make it wrong for good.
"""

_ROOMS_MADE: Final = 8
"""So often one run may have room made for it."""

_PATIENCE: Final = 3.0
"""Seconds that a run waits, with none beside it, for leases to be returned and loads to end."""

_GRAPHS: Final = 1024
"""Graphs of which is kept what their runs take."""

_SECONDS: Final = 600


class Allowance(NamedTuple):
    """What a manager lets the process hold.

    Attributes:
        budget: Anonymous bytes that the whole process may hold.
        other: How many of them are for what is no run: the floor, weights, caches, loads under way.
        staying: How many of those stay, whatever is returned, goes or ends; None for all.
    """

    budget: int
    other: int
    staying: int | None = None

    @property
    def most(self) -> int:
        """What runs could have at best."""
        return self.budget - (self.other if self.staying is None else self.staying)


@dataclasses.dataclass(frozen=True, slots=True)
class Graph:
    """What the admission needs to know of one graph.

    Attributes:
        key: Its content, as text; equal ones take the same.
        guess: Bytes a token, as `guess` says.
    """

    key: str
    guess: int


@dataclasses.dataclass(eq=False, slots=True)
class _Run:
    """One run, from when it asks until it has ended."""

    thread: int
    need: int
    is_sure: bool
    alone: bool
    gate: OneShot = dataclasses.field(default_factory=OneShot)

    def wake(self) -> None:
        """Have it look again; takes no lock, so a user's thread may cancel it."""
        self.gate.open()


def guess(size: int, widths: int) -> int:
    """Bytes a token of a run of a graph of which nothing is known; meant to be too high.

    A layer's working memory grows with the model's width, and the weights with its square. Measured
    peaks are 35 to 163 kB a token on MiniLM fp32 (batches of 8 to 2,048 tokens), where this says
    309; and 365 to 961 on SmolLM2-135M q4 (prompts of 8 to 340), where it says 1,020.

    Args:
        size: Bytes of the graph's files.
        widths: Numbers that it gives for each token: the words of a vocabulary, for its logits.

    Example:
        >>> guess(90_000_000, 384) // 1000
        308
    """
    return 32 * math.isqrt(size) + 12 * widths


class Workspace:
    """Who may run now, and what each graph's runs take; one for the process.

    Args:
        activity: What else goes on, which makes a measurement doubtful.
        anonymous: Reads the process's anonymous bytes.
        trim: Gives freed memory back.

    Attributes:
        limit: Says what the process may hold; None where nothing is limited, and then nothing is
            learned. Called before each run that counts: it must be quick, and wait for nothing.
        make_room: Asked for so many bytes when nothing runs and a run still does not fit; says
            whether it made some. It may take a while, but must end, and may wait for no call.
    """

    def __init__(
        self,
        activity: Activity = activity,
        anonymous: Callable[[], int] = anonymous_bytes,
        trim: Callable[[], object] = allocator.trim,
    ) -> None:
        self._activity = activity
        self._anonymous = anonymous
        self._trim = trim
        self._needs: dict[str, Needs] = {}
        self.forget()

    def forget(self) -> None:
        """In a forked child: nothing runs, nobody limits it, and no lock is held."""
        self.limit: Callable[[], Allowance | None] | None = None
        self.make_room: Callable[[int], bool] = lambda wanted: False
        self._lock = threading.Lock()
        self._running: dict[_Run, None] = {}
        self._waiting: collections.deque[_Run] = collections.deque()
        self._levels: dict[int, int] = {}
        self._doubted: dict[str, Needs] = {}
        self._tries: dict[tuple[str, int, int], list[int]] = {}
        self._peaks: collections.deque[tuple[int, int]] = collections.deque(maxlen=_SECONDS)

    @property
    def reserved(self) -> int:
        """Bytes of the runs under way."""
        return sum(run.need for run in tuple(self._running))

    @property
    def waiting(self) -> int:
        """Runs that wait for room."""
        return len(self._waiting)

    def peak(self, window: float) -> int:
        """The most bytes that were reserved at once in the last so many seconds, at most 600."""
        since = time.monotonic() - window
        return max((most for second, most in tuple(self._peaks) if second + 1 > since), default=0)

    def look_again(self) -> None:
        """Have the oldest waiter look whether it fits now: the limit has changed."""
        with contextlib.suppress(IndexError):
            self._waiting[0].wake()

    def needs_of(self, key: str) -> Needs:
        """What is known of a graph, by its content; kept when the graph itself is gone."""
        found = self._needs.get(key)
        if found is None:
            found = self._needs.setdefault(key, Needs())
            while len(self._needs) > _GRAPHS:
                self._needs.pop(next(iter(self._needs)), None)
        return found

    def as_dict(self) -> dict[str, Any]:
        """What is known of all graphs, as plain data."""
        return {key: needs.as_dict() for key, needs in tuple(self._needs.items())}

    def remember(self, kept: Mapping[str, Any]) -> None:
        """Take what `as_dict` gave in an earlier run of the program."""
        for key, entries in kept.items():
            for tokens, length, peak in entries["entries"]:
                self.needs_of(key).observe_tokens(tokens, length, peak)

    def expected(self, graph: Graph, tokens: int, length: int) -> tuple[int, bool]:
        """Bytes that a run will take, and whether about this shape was seen.

        A quarter more than what is known: a shape's own peak differs so much from run to run.
        """
        best: int | None = None
        for needs in (self._needs.get(graph.key), self._doubted.get(graph.key)):
            found = needs.estimate_tokens(tokens, length) if needs is not None else None
            if needs is not None and found is not None:
                found += found // _MARGIN
                if needs.covers(tokens, length):
                    return found, True
                best = found if best is None else min(best, found)
        if best is None:
            best = graph.guess * tokens * max(512, length) // 512
        return best, False

    def is_small(self, graph: Graph, tokens: int, length: int) -> bool:
        """Whether a run is not counted."""
        need, is_sure = self.expected(graph, tokens, length)
        return is_sure and need <= SMALL

    def tokens_that_fit(self, graph: Graph, length: int, most: int) -> int:
        """How many tokens a batch may have, so that it can run, and others beside it.

        Args:
            graph: The graph.
            length: Tokens of its longest row.
            most: Tokens that a batch has where memory does not matter. It is halved until the batch
                takes a quarter of the room, but not below 256 tokens, where runs get slower; and
                further until it fits at all.
        """
        allowance = self._allowance()
        if allowance is None:
            return most
        room = allowance.budget - allowance.other
        while most > length:
            need = self.expected(graph, most, length)[0]
            if need <= room // _AT_ONCE or (most <= _FEW_TOKENS and need <= room):
                break
            most //= 2
        return most

    @contextlib.contextmanager
    def admitted(
        self, graph: Graph, tokens: int, length: int, token: CancelToken
    ) -> Iterator[None]:
        """Reserve what a run will take, and wait until that fits.

        Args:
            graph: What is run.
            tokens: Tokens of the run, padding included.
            length: Tokens that each is compared with, a cache included.
            token: Ends the wait.

        Raises:
            PipelineCancelledError: The token was cancelled.
            OutOfBudgetError: It can never fit.
        """
        needs = self.needs_of(graph.key)
        need, is_sure = self.expected(graph, tokens, length)
        if is_sure and need <= SMALL:
            yield
            return
        run = _Run(threading.get_ident(), need, is_sure, not is_sure)
        self._enter(run, tokens, length, token)
        try:
            if not needs.knows(tokens, length) and self._may_measure(run):
                with self._measured(graph, run, tokens, length):
                    yield
            else:
                yield
        finally:
            self._leave(run)

    def _may_measure(self, run: _Run) -> bool:
        """Whether it runs alone because it has to, or because nobody else is there anyway."""
        with self._lock:
            if not run.alone and not self._waiting and not self._others():
                run.alone = len(self._running) == 1  # and nobody comes beside it from now on
            return run.alone

    def _enter(self, run: _Run, tokens: int, length: int, token: CancelToken) -> None:
        with self._lock:
            self._waiting.append(run)
        token.attach(run.wake)
        rooms_made = 0
        until = math.inf
        try:
            while True:
                token.check()
                allowance = self._allowance()
                anonymous = self._held() if allowance is not None else 0
                with self._lock:
                    run.gate = OneShot()
                    missing, freed = self._missing(run, allowance, anonymous)
                    if missing is not None and missing <= 0:
                        self._start(run)
                        return
                    idle = not self._running
                if missing is None:  # it is not its turn, or it may not run beside another
                    _wait(run, token)
                elif freed and (idle or freed >= missing):
                    self._give_back()
                elif not idle:
                    _wait(run, token)
                elif rooms_made < _ROOMS_MADE and self.make_room(missing):
                    rooms_made += 1
                else:
                    assert allowance is not None
                    least = run.need if run.is_sure else run.need // 2  # a guess is too high
                    if least > allowance.most:
                        raise _out_of_budget(run.need, tokens, length, allowance)
                    now = time.monotonic()
                    until = min(until, now + _PATIENCE)
                    if least > allowance.budget - allowance.other and now < until:
                        _wait(run, token, until - now)  # for a load's end, or a lease's
                        rooms_made = 0
                        continue
                    # By the accounts it fits, and what else holds memory is no run. Or nobody
                    # returns what it needs, perhaps since their calls wait behind it. So it may
                    # try, with none beside it.
                    with self._lock:
                        run.alone = True
                        self._start(run)
                    return
        except BaseException:
            with self._lock:
                self._waiting.remove(run)
                self._wake_first()
            raise
        finally:
            token.detach(run.wake)

    def _allowance(self) -> Allowance | None:
        limit = self.limit  # which a manager that is closed takes away
        return None if limit is None else limit()

    def _held(self) -> int:
        try:
            return self._anonymous()
        except OSError:  # no descriptor is free: then the accounts alone decide
            return 0

    def _missing(
        self, run: _Run, allowance: Allowance | None, anonymous: int
    ) -> tuple[int | None, int]:
        """Bytes that a run lacks, or None where it has to wait anyway; and those to be trimmed."""
        if self._waiting[0] is not run:
            return None, 0
        if self._running and (run.alone or any(one.alone for one in self._running)):
            return None, 0
        if allowance is None:
            return 0, 0
        busy = {one.thread for one in self._running}
        levels = self._levels
        freed = sum(level for thread, level in levels.items() if thread not in busy)
        level = levels.get(run.thread, 0)
        # What idle threads keep is at most what the process holds beside all that is no run.
        kept = min(freed - level, max(0, anonymous - allowance.other))
        total = sum(one.need for one in self._running) + kept + max(run.need, level)
        by_account = total - (allowance.budget - allowance.other)
        by_measure = anonymous + max(0, run.need - level) - allowance.budget
        return max(by_account, by_measure), freed

    def _give_back(self) -> None:
        with self._lock:
            busy = {one.thread for one in self._running}
            idle = [thread for thread in self._levels if thread not in busy]
        self._trim()
        with self._lock:
            for thread in idle:  # only the first in the queue trims, so none has begun since
                self._levels.pop(thread, None)

    def _start(self, run: _Run) -> None:
        self._waiting.remove(run)
        self._running[run] = None
        self._levels[run.thread] = max(run.need, self._levels.get(run.thread, 0))
        second, reserved = int(time.monotonic()), self.reserved
        if self._peaks and self._peaks[-1][0] == second:
            reserved = max(reserved, self._peaks.pop()[1])
        self._peaks.append((second, reserved))
        self._wake_first()

    def _leave(self, run: _Run) -> None:
        with self._lock:
            self._running.pop(run, None)
            self._wake_first()

    def _wake_first(self) -> None:
        if self._waiting:
            self._waiting[0].wake()

    @contextlib.contextmanager
    def _measured(self, graph: Graph, run: _Run, tokens: int, length: int) -> Iterator[None]:
        """Learn what a run takes; nothing else that counts runs beside it."""
        self._give_back()
        latest, quiet = self._activity.latest, self._others() == 0
        with Sampler(self._anonymous) as sampler:
            yield
        quiet = quiet and self._others() == 0 and self._activity.latest is latest
        peak = sampler.peak
        if sampler.is_blind:
            return
        with self._lock:
            self._levels[run.thread] = peak
            key = (graph.key, *bucket_of(tokens, length))
            seen = self._tries.setdefault(key, [])
            seen.append(peak)
            is_believed = quiet or len(seen) == _TRIES
            if is_believed:
                self._tries.pop(key)
                peak = peak if quiet else min(seen)
            doubted = self._doubted.setdefault(graph.key, Needs())
        needs = self.needs_of(graph.key) if is_believed else doubted
        needs.observe_tokens(tokens, length, peak)

    def _others(self) -> int:
        """What goes on beside one call, but for those that wait here."""
        return max(0, self._activity.going_on - len(self._waiting) - 1)


class Sampler:
    """The most that the process's anonymous memory grows while this is entered.

    Args:
        anonymous: Reads it.
    """

    def __init__(self, anonymous: Callable[[], int] = anonymous_bytes) -> None:
        self._anonymous = anonymous
        self._most = 0
        self._before = 0
        self._ended = threading.Event()
        self._thread = EbbtideThread(target=self._run, name="ebbtide-sampler", daemon=True)

    @property
    def is_blind(self) -> bool:
        """Whether nothing could be read."""
        return not self._before

    @property
    def peak(self) -> int:
        """Bytes."""
        return max(0, self._most - self._before)

    def __enter__(self) -> Sampler:
        self._thread.start()
        self._look()
        self._before, self._most = self._most, 0
        return self

    def __exit__(self, *_: object) -> None:
        self._look()  # what stays of a run is there whatever was missed of its peak
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(_SAMPLED_EACH):
            self._look()

    def _look(self) -> None:
        with contextlib.suppress(OSError):  # no descriptor is free
            self._most = max(self._most, self._anonymous())


def _wait(run: _Run, token: CancelToken, seconds: float = -1) -> None:
    if not token.cancelled:
        run.gate.wait(seconds)


def _out_of_budget(need: int, tokens: int, length: int, allowance: Allowance) -> OutOfBudgetError:
    available = max(0, allowance.most)
    return OutOfBudgetError(
        f"A run of {tokens} tokens in rows of {length} takes {need / 1e6:.1f} MB, and"
        f" {available / 1e6:.1f} MB are left for it: the budget is {allowance.budget / 1e6:.1f} MB,"
        f" of which {(allowance.budget - available) / 1e6:.1f} MB are for what stays. Give shorter"
        " texts, fewer at once (batch_size), or a larger budget.",
        needed=need,
        available=available,
        budget=allowance.budget,
    )


workspace = Workspace()
on_fork(workspace.forget)
