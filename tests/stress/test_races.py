"""Everything at once, many times over: each call answers rightly or is refused, and none hangs.

A few dozen rounds are part of every run of the suite; the full count is a soak, run by hand.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

PRELUDE = """
import asyncio, collections, faulthandler, gc, json, os, pathlib, random, signal, sys
import threading, time, warnings
import numpy as np
import ebbtide
from ebbtide import PipelineCancelledError, PipelineDisposedError
from ebbtide.lifecycle import _live
from ebbtide.memory.ledger import activity, ledger
from ebbtide.memory.reaper import reaper

faulthandler.dump_traceback_later(LIMIT, exit=True)
warnings.filterwarnings("ignore", category=DeprecationWarning)  # a fork beside threads
started = time.perf_counter()
counts = collections.Counter()
wrong = []
TEXTS = ["the sea", "a wind from the west", "word " * 40, "ebb"]
with ebbtide.pipeline("feature-extraction", MODEL) as pipe:
    EXPECTED = [pipe(text, pooling="mean") for text in TEXTS]


def note(kind):
    counts[kind] += 1


def judge(text, found):
    if not np.allclose(found, EXPECTED[text], atol=1e-5):
        wrong.append(text)
    note("answered")


def attempt(pipe, text):
    # One call; whether the pipeline still took it.
    try:
        judge(text, pipe(TEXTS[text], pooling="mean"))
        return True
    except PipelineCancelledError:
        note("cancelled")
    except PipelineDisposedError:
        note("refused")
    return False


def run(threads):
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def together(function, count):
    # The same on many threads; what one of them raises ends the process.
    errors = []

    def guarded(number):
        try:
            function(number)
        except BaseException as error:
            errors.append(error)

    run([threading.Thread(target=guarded, args=(n,)) for n in range(count)])
    if errors:
        raise errors[0]


def report():
    gc.collect()
    reaper.call(lambda: None)
    reaper.call(lambda: None)
    assert not wrong, wrong
    assert ledger._entries == {}, ledger._entries
    assert activity._active == {}, activity._active
    assert _live == {} and ebbtide.live() == [], _live
    faulthandler.cancel_dump_traceback_later()
    seconds = round(time.perf_counter() - started, 1)
    print(json.dumps({**counts, "seconds": seconds}))
"""


class Race:
    """Runs one script of this file in a process of its own, and gives what it counted."""

    def __init__(self, fresh_process: Any) -> None:
        self._fresh_process = fresh_process

    def __call__(self, script: str, rounds: int) -> dict[str, float]:
        limit = 50 if rounds <= 100 else 1500
        head = PRELUDE.replace("LIMIT", str(limit))
        out = self._fresh_process(
            f"{head}\nROUNDS = {rounds}\n{script}\nreport()\n", timeout=limit + 10
        )
        print(out)
        return json.loads(out.splitlines()[-1])


@pytest.fixture
def race(fresh_process: Any) -> Race:
    return Race(fresh_process)


def rounds(few: int, many: int = 1000) -> pytest.MarkDecorator:
    """A few rounds in the suite, and many in the soak."""
    soak = pytest.param(many, marks=[pytest.mark.soak, pytest.mark.timeout(1600)], id="soak")
    return pytest.mark.parametrize("rounds", [pytest.param(few, id="suite"), soak])


@rounds(24)
def test_thirty_two_threads_call_while_another_disposes(race: Race, rounds: int) -> None:
    counts = race(
        """
pipes = []
begin, end = threading.Barrier(33), threading.Barrier(33)


def user(number):
    dice = random.Random(number)
    for _ in range(ROUNDS):
        begin.wait()
        while attempt(pipes[-1], dice.randrange(len(TEXTS))):
            pass
        end.wait()


def disposer():
    dice = random.Random(0)
    for number in range(ROUNDS):
        pipe = ebbtide.pipeline("feature-extraction", MODEL)
        pipes.append(pipe)
        begin.wait()
        for _ in range(dice.randrange(12)):
            attempt(pipe, 0)
        receipt = pipe.dispose(cancel=number % 2 == 0)
        assert not any("not ended" in reason for reason in receipt.reasons), receipt
        note("rounds")
        end.wait()
        pipes.clear()


together(lambda number: user(number) if number else disposer(), 33)
""",
        rounds,
    )
    assert counts["rounds"] == rounds
    assert counts["answered"] > rounds
    assert counts["refused"] + counts.get("cancelled", 0) == 32 * rounds


@rounds(16, 500)
def test_thirty_two_tasks_call_while_another_disposes(race: Race, rounds: int) -> None:
    counts = race(
        """
async def user(pipe, dice):
    while True:
        text = dice.randrange(len(TEXTS))
        try:
            judge(text, await pipe.acall(TEXTS[text], pooling="mean"))
        except PipelineCancelledError:
            return note("cancelled")
        except PipelineDisposedError:
            return note("refused")
        except asyncio.CancelledError:
            note("given up")
            raise


async def main(number):
    dice = random.Random(number)
    pipe = await ebbtide.apipeline("feature-extraction", MODEL)
    tasks = [asyncio.create_task(user(pipe, dice)) for _ in range(32)]
    for _ in range(dice.randrange(200)):
        await asyncio.sleep(0)
    for task in dice.sample(tasks, 4):
        task.cancel()
    if number % 4 == 3:
        pipe.dispose(cancel=number % 8 == 3)
    else:
        await pipe.adispose(cancel=number % 2 == 0)
    for one in await asyncio.gather(*tasks, return_exceptions=True):
        assert one is None or isinstance(one, asyncio.CancelledError), one
    assert pipe._lifecycle.running == {}
    note("rounds")


for number in range(ROUNDS):
    asyncio.run(main(number))
""",
        rounds,
    )
    assert counts["rounds"] == rounds
    ends = counts["refused"] + counts.get("cancelled", 0)
    assert 28 * rounds <= ends <= 32 * rounds


@rounds(20, 300)
def test_finalizers_dispose_wherever_the_collector_runs(race: Race, rounds: int) -> None:
    counts = race(
        """
warnings.filterwarnings("ignore", category=ResourceWarning)  # some are forgotten on purpose
kept = collections.deque()


class Owner:
    def __init__(self, pipe, cancel):
        self.itself = self
        self.pipe = pipe
        self.cancel = cancel

    def __del__(self):
        self.pipe.dispose(cancel=self.cancel)
        note("finalized")


def user(number):
    dice = random.Random(number)
    for round_ in range(ROUNDS):
        pipe = ebbtide.pipeline("feature-extraction", MODEL)
        attempt(pipe, dice.randrange(len(TEXTS)))
        if round_ % 2:
            kept.append(pipe)  # else the collector finds it in the same garbage as its owner
        Owner(pipe, cancel=dice.random() < 0.5)
        del pipe
        if dice.random() < 0.4:
            gc.collect()
        try:
            attempt(kept[dice.randrange(len(kept))], dice.randrange(len(TEXTS)))
        except (IndexError, ValueError):
            pass
        note("rounds")


gc.set_threshold(100, 5, 5)  # often, and on any thread, those of Ebbtide too
together(user, 8)
gc.collect()
assert {pipe.state.value for pipe in kept} <= {"disposed", "disposing"}
kept.clear()
""",
        rounds,
    )
    assert counts["rounds"] == counts["finalized"] == 8 * rounds
    assert counts["answered"] >= 8 * rounds


MIXED = """
HERE = pathlib.Path(MODEL).parent
MODELS = [HERE / one for one in ("tiny-bert", "tiny-roberta", "tiny-distilbert", "tiny-mlm")]
WAYS = [{}, {"session_options": {"threads": 1}}, {"session_options": {"arena": True}}]
shared = collections.deque(maxlen=6)
stop = threading.Event()


def once(dice):
    model = dice.choice(MODELS)
    pipe = ebbtide.pipeline("feature-extraction", model, **dice.choice(WAYS))
    note("loaded")
    shared.append(pipe)
    for _ in range(dice.randrange(3)):
        text = dice.randrange(len(TEXTS))
        try:
            found = pipe(TEXTS[text], pooling="mean")
        except (PipelineCancelledError, PipelineDisposedError):
            note("refused")
        else:
            judge(text, found) if model == MODELS[0] else note("answered elsewhere")
    what = dice.random()
    if what < 0.3:
        assert ebbtide.memory.reclaim(collect=what < 0.05).released >= 0
        note("reclaimed")
    if what < 0.6:
        try:
            shared[dice.randrange(6)].dispose(cancel=what < 0.2)
        except IndexError:
            pass
    pipe.dispose(cancel=what > 0.8, collect=what < 0.9)
    note("disposed")
"""


@rounds(16, 500)
def test_loads_calls_disposals_and_reclaims_from_eight_threads(race: Race, rounds: int) -> None:
    counts = race(
        MIXED
        + """
def user(number):
    dice = random.Random(number)
    for _ in range(ROUNDS):
        once(dice)


together(user, 8)
shared.clear()
""",
        rounds,
    )
    assert counts["loaded"] == counts["disposed"] == 8 * rounds
    assert counts["reclaimed"] > rounds


@rounds(12, 200)
def test_forks_in_the_middle_of_loads_calls_and_disposals(race: Race, rounds: int) -> None:
    counts = race(
        MIXED
        + """
def user(number):
    dice = random.Random(number)
    while not stop.is_set():
        once(dice)


def child():
    faulthandler.register(signal.SIGALRM, chain=True)
    signal.alarm(15)  # a child that hangs is killed, and its status tells
    state = inherited.state.value
    try:
        inherited("refused")
    except ebbtide.PipelineInheritedError:
        state += " refused"
    assert state == "inherited refused", state
    assert ebbtide.live() == [] and inherited.dispose().released == 0
    with ebbtide.pipeline("feature-extraction", MODEL) as own:
        assert np.allclose(own(TEXTS[0], pooling="mean"), EXPECTED[0], atol=1e-5)
    assert ledger._entries == {}
    sys.exit(9)


def forking():
    try:
        for _ in range(ROUNDS):
            process = os.fork()
            if process == 0:
                child()
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            assert code == 9, code
            note("forked")
    finally:
        stop.set()


faulthandler.cancel_dump_traceback_later()  # a child would wait at its exit for this thread
inherited = ebbtide.pipeline("feature-extraction", MODEL)
threads = [threading.Thread(target=user, args=(n,)) for n in range(4)]
for thread in threads:
    thread.start()
forking()
for thread in threads:
    thread.join()
attempt(inherited, 1)
inherited.dispose()
shared.clear()
""",
        rounds,
    )
    assert counts["forked"] == rounds
    assert counts["loaded"] == counts["disposed"]
