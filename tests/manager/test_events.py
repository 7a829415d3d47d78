"""What happened, told to who listens: on a thread of its own, or on an event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator

import pytest

from ebbtide.errors import InputError
from ebbtide.manager import events
from ebbtide.manager.events import KINDS, Feed, ManagerEvent

PATIENCE = 10.0


class Listener:
    """Keeps what it hears, and lets a test wait for it."""

    def __init__(self) -> None:
        self.heard: list[ManagerEvent] = []
        self.until: Callable[[], bool] = lambda: False
        self.is_enough = threading.Event()
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.is_in = threading.Event()

    def __call__(self, event: ManagerEvent) -> None:
        self.is_in.set()
        assert self.may_go_on.wait(PATIENCE)
        self.heard.append(event)
        if event.pipeline == "last":
            self.is_enough.set()

    def wait(self) -> list[tuple[str, str]]:
        """What was heard, once an event of the pipeline "last" was."""
        assert self.is_enough.wait(PATIENCE)
        return [(event.kind, event.pipeline) for event in self.heard]


@pytest.fixture
def feed() -> Iterator[Feed]:
    feed = Feed()
    yield feed
    thread = feed._thread
    feed.stop()
    if thread is not None:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_each_event_is_heard_once_and_in_order(feed: Feed) -> None:
    listener = Listener()
    feed.subscribe(listener, ())
    assert feed.hears("ready")
    for number in range(100):
        feed.tell("ready", str(number), {"bytes": number})
    feed.tell("disposed", "last", {})
    heard = listener.wait()
    assert heard == [*(("ready", str(number)) for number in range(100)), ("disposed", "last")]
    assert listener.heard[7].facts == {"bytes": 7}
    assert listener.heard[7].time > 0


def test_a_listener_is_called_on_a_thread_of_the_feeds(feed: Feed) -> None:
    threads = []
    done = threading.Event()

    def hear(event: ManagerEvent) -> None:
        threads.append(threading.current_thread().name)
        done.set()

    feed.subscribe(hear, ())
    feed.tell("ready", "a", {})
    assert done.wait(PATIENCE)
    assert threads == ["ebbtide-events"]


def test_who_listens_to_some_kinds_hears_no_others(feed: Feed) -> None:
    listener = Listener()
    feed.subscribe(listener, ("ready", "disposed"))
    for kind in KINDS:
        feed.tell(kind, "a", {})
    feed.tell("ready", "last", {})
    assert listener.wait() == [("ready", "a"), ("disposed", "a"), ("ready", "last")]


def test_an_unknown_kind_is_refused_and_the_nearest_named(feed: Feed) -> None:
    with pytest.raises(InputError, match="Did you mean 'loading'"):
        feed.subscribe(print, ("loadin",))
    assert not feed.hears("ready")


def test_what_happened_before_is_not_heard(feed: Feed) -> None:
    listener = Listener()
    feed.tell("ready", "before", {})
    feed.subscribe(listener, ())
    feed.tell("ready", "last", {})
    assert listener.wait() == [("ready", "last")]


def test_a_slow_listener_misses_the_oldest_and_is_told_how_many(
    feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "MOST", 10)
    listener = Listener()
    listener.may_go_on.clear()
    feed.subscribe(listener, ())
    feed.tell("ready", "first", {})
    assert listener.is_in.wait(PATIENCE)
    for number in range(24):
        feed.tell("ready", str(number), {})
    feed.tell("ready", "last", {})
    listener.may_go_on.set()
    heard = listener.wait()
    assert heard[0] == ("ready", "first")
    assert heard[1] == ("missed", "")
    assert listener.heard[1].facts == {"count": 15}
    assert heard[2:] == [*(("ready", str(number)) for number in range(15, 24)), ("ready", "last")]


def test_one_that_was_missed_is_told_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MOST", 2)
    subscription = events.Subscription(Feed(), frozenset(), lambda: None)
    for pipeline in ("a", "b", "c"):
        subscription.offer(ManagerEvent("ready", pipeline, 0.0, {}))
    heard = [subscription.take() for _ in range(4)]
    assert [event and (event.kind, event.pipeline) for event in heard] == [
        ("missed", ""),
        ("ready", "b"),
        ("ready", "c"),
        None,
    ]
    assert heard[0] is not None
    assert heard[0].facts == {"count": 1}


def test_a_listener_that_fails_goes_on_hearing_and_so_do_the_others(
    feed: Feed, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(event: ManagerEvent) -> None:
        if event.pipeline != "last":
            raise (SystemExit if event.pipeline == "worse" else ValueError)(event.pipeline)

    listener = Listener()
    feed.subscribe(fails, ())
    feed.subscribe(listener, ())
    for pipeline in ("bad", "worse", "last"):
        feed.tell("ready", pipeline, {})
    assert len(listener.wait()) == 3
    assert len([one for one in caplog.records if one.levelno == logging.ERROR]) == 2


def test_who_cancels_hears_nothing_more_and_of_nothing_missed(feed: Feed) -> None:
    slow, other = Listener(), Listener()
    slow.may_go_on.clear()
    subscription = feed.subscribe(slow, ())
    feed.subscribe(other, ())
    feed.tell("ready", "a", {})
    assert slow.is_in.wait(PATIENCE)
    feed.tell("ready", "b", {})
    subscription.cancel()
    feed.tell("ready", "last", {})
    slow.may_go_on.set()
    other.wait()
    assert [(event.kind, event.pipeline) for event in slow.heard] == [("ready", "a")]


def test_a_subscription_ends_with_its_block(feed: Feed) -> None:
    with feed.subscribe(print, ()):
        assert feed.hears("ready")
    assert not feed.hears("ready")


def test_a_listener_may_subscribe_and_cancel_while_it_hears(feed: Feed) -> None:
    listener = Listener()

    def hear(event: ManagerEvent) -> None:
        subscription.cancel()
        feed.subscribe(listener, ())
        feed.tell("ready", "last", {})

    subscription = feed.subscribe(hear, ())
    feed.tell("ready", "a", {})
    assert listener.wait() == [("ready", "last")]


def test_what_was_told_before_the_feed_stops_is_heard(feed: Feed) -> None:
    listener = Listener()
    listener.may_go_on.clear()
    feed.subscribe(listener, ())
    feed.tell("disposed", "a", {})
    feed.tell("disposed", "last", {})
    thread = feed._thread
    feed.stop()
    listener.may_go_on.set()
    assert listener.wait() == [("disposed", "a"), ("disposed", "last")]
    assert thread is not None
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_many_threads_may_tell_at_once(feed: Feed) -> None:
    listener = Listener()
    feed.subscribe(listener, ())
    tellers = [
        threading.Thread(target=lambda: [feed.tell("ready", "a", {}) for _ in range(200)])
        for _ in range(8)
    ]
    for teller in tellers:
        teller.start()
    for teller in tellers:
        teller.join(PATIENCE)
    feed.tell("ready", "last", {})
    assert len(listener.wait()) == 1601


def test_an_event_is_told_in_a_line() -> None:
    event = ManagerEvent("ready", "a", 0.0, {"bytes": 5, "seconds": 0.12345})
    assert str(event) == "ready a: bytes 5, seconds 0.123"
    assert str(ManagerEvent("created", "a", 0.0, {})) == "created a"


# On an event loop


async def heard(feed: Feed, count: int, *kinds: str) -> list[str]:
    found = []
    stream = feed.listen(kinds)
    async for event in stream:
        found.append(f"{event.kind} {event.pipeline}")
        if len(found) == count:
            break
    await stream.aclose()  # type: ignore[attr-defined]
    return found


async def until_it_listens(feed: Feed) -> None:
    async with asyncio.timeout(PATIENCE):
        while not feed.hears("ready"):
            await asyncio.sleep(0)


def test_events_of_other_threads_are_heard_on_a_loop(feed: Feed) -> None:
    async def main() -> list[str]:
        task = asyncio.create_task(heard(feed, 3, "ready"))
        await until_it_listens(feed)
        for number in range(3):
            for kind in ("ready", "failed"):
                teller = threading.Thread(target=feed.tell, args=(kind, str(number), {}))
                teller.start()
                teller.join(PATIENCE)
            await asyncio.sleep(0)
        return await asyncio.wait_for(task, PATIENCE)

    assert asyncio.run(main()) == ["ready 0", "ready 1", "ready 2"]
    assert not feed.hears("ready"), "who breaks off listens no more"


def test_a_task_that_is_cancelled_listens_no_more(feed: Feed) -> None:
    async def main() -> None:
        task = asyncio.create_task(heard(feed, 3))
        await until_it_listens(feed)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert not feed.hears("ready")


def test_a_slow_task_is_told_how_many_it_missed(
    feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "MOST", 5)

    async def main() -> list[str]:
        task = asyncio.create_task(heard(feed, 6))
        await until_it_listens(feed)
        for number in range(20):
            feed.tell("ready", str(number), {})
        return await asyncio.wait_for(task, PATIENCE)

    assert asyncio.run(main()) == ["missed ", *(f"ready {number}" for number in range(15, 20))]


def test_who_listens_on_a_loop_is_done_when_the_feed_stops(feed: Feed) -> None:
    async def main() -> list[str]:
        task = asyncio.create_task(heard(feed, 100))
        await until_it_listens(feed)
        feed.tell("disposed", "a", {})
        feed.stop()
        return await asyncio.wait_for(task, PATIENCE)

    assert asyncio.run(main()) == ["disposed a"]
    assert not feed.hears("ready")


def test_an_unknown_kind_is_refused_on_a_loop_too(feed: Feed) -> None:
    with pytest.raises(InputError):
        asyncio.run(heard(feed, 1, "loadin"))
