"""The monitor: turn by turn without a thread, then with its thread, then with a real kernel."""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ebbtide.cancellation import own_thread
from ebbtide.errors import InputError
from ebbtide.memory import Limit, MemorySnapshot, Monitor, Pressure, PressureEvent
from ebbtide.memory import cgroup as cgroup_module
from ebbtide.memory import monitor as monitor_module
from ebbtide.memory.cgroup import MemoryLevel
from ebbtide.memory.monitor import QUIET, Reading
from ebbtide.memory.pressure import (
    CounterSignal,
    EventsSignal,
    PressureLevel,
    Signal,
    SignalGoneError,
    StallSignal,
    open_signals,
)

LIMIT = 1000


def reading(available: int = 500, some: float = 0.0, full: float = 0.0) -> Reading:
    return Reading(
        MemorySnapshot(
            anonymous=200,
            file_backed=100,
            resident=300,
            swapped=7,
            limit=Limit(LIMIT, "cgroup v2"),
            available=available,
            pressure=Pressure(some, full, "machine"),
        ),
        MemoryLevel(2, "/group", LIMIT, 480, 0),
    )


class PipeSignal(Signal):
    """A pipe in place of a file of the kernel's: each byte written is one signal."""

    def __init__(self, level: PressureLevel | None, source: str, believed_below: float = 1.0):
        fd, self.writer = os.pipe()
        super().__init__(fd, source, level, believed_below)

    @property
    def mask(self) -> int:
        return select.POLLIN

    def take(self, found: int) -> PressureLevel | None:
        if not os.read(self.fd, 1):
            raise SignalGoneError
        return self.level

    def fire(self) -> None:
        os.write(self.writer, b"x")

    def hang_up(self) -> None:
        os.close(self.writer)
        self.writer = -1


class Stage:
    """A monitor without a thread, with a clock, readings and signals of the test's own."""

    def __init__(self) -> None:
        self.now = 50.0
        self.reading: Reading | Exception = reading()
        self.heard: list[tuple[str, str]] = []
        self.signals: list[Signal] = []
        self.monitor = self.make()
        self.watch: Any = None

    def make(self, **more: Any) -> Monitor:
        settings: dict[str, Any] = {
            "interval": 1.0,
            "capacity": 10,
            "on_pressure": lambda event: self.heard.append((event.level, event.source)),
            "sampler": self.sample,
            "signals": lambda: self.signals,
            "clock": lambda: self.now,
        }
        return Monitor(**{**settings, **more})

    def sample(self) -> Reading:
        if isinstance(self.reading, Exception):
            raise self.reading
        return self.reading

    def signal(
        self, level: PressureLevel | None = "some", source: str = "psi", believed: float = 1.0
    ) -> PipeSignal:
        made = PipeSignal(level, source, believed)
        self.signals.append(made)
        return made

    def open(self) -> Stage:
        self.watch = self.monitor._open()
        return self

    def turn(self, now: float | None = None) -> bool:
        if now is not None:
            self.now = now
        return self.monitor._turn(self.watch)

    def close(self) -> None:
        self.monitor._forget()
        for signal in self.signals:
            if isinstance(signal, PipeSignal) and signal.writer >= 0:
                os.close(signal.writer)


@pytest.fixture
def stage() -> Iterator[Stage]:
    found = Stage()
    yield found
    found.close()


@pytest.fixture(autouse=True)
def _no_descriptor_is_leaked() -> Iterator[None]:
    before = descriptors()
    yield
    assert descriptors() == before


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# Sampling


def test_a_sample_is_taken_when_it_is_due(stage: Stage) -> None:
    stage.open()
    stage.turn(now=51.0)
    (sample,) = stage.monitor.timeline.samples
    assert (sample.seconds, sample.anonymous, sample.file_backed, sample.swapped) == (
        1,
        200,
        100,
        7,
    )
    assert (sample.limit, sample.available) == (LIMIT, 500)
    assert (sample.group_limit, sample.group_usage) == (LIMIT, 480)
    assert (sample.some, sample.full) == (0, 0)


def test_samples_that_were_missed_are_not_caught_up_with(stage: Stage) -> None:
    stage.open()
    stage.turn(now=60.0)
    assert len(stage.monitor.timeline) == 1
    assert stage.watch.due == 61.0


def test_a_process_in_no_cgroup_has_no_figures_of_one(stage: Stage) -> None:
    stage.reading = Reading(reading().snapshot, None)
    stage.open().turn(now=51.0)
    assert stage.monitor.timeline.samples[0].group_limit is None


def test_a_reading_that_fails_is_logged_once_and_the_watch_goes_on(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    stage.open()
    stage.reading = OSError("no /proc")
    assert stage.turn(now=51.0)
    assert stage.turn(now=52.0)
    stage.reading = reading()
    assert stage.turn(now=53.0)
    assert len(stage.monitor.timeline) == 1
    assert [record.message for record in caplog.records] == [
        "The monitor could not read the memory."
    ]


def test_a_near_limit_is_told_at_each_sample_and_noted_once(stage: Stage) -> None:
    stage.open()
    for second, left in enumerate([51, 50, 20, 400, 10], start=51):
        stage.reading = reading(available=left)
        stage.turn(now=second)
    assert stage.heard == [("limit", "sample")] * 3
    notes = [(event.seconds, event.kind, event.label) for event in stage.monitor.timeline.events]
    assert notes == [(2, "pressure", "limit"), (5, "pressure", "limit")]


@pytest.mark.parametrize(
    ("some", "full", "heard"),
    [(9.9, 9.9, []), (10, 0, [("some", "sample")]), (50, 10, [("full", "sample")])],
)
def test_time_lost_to_waiting_is_pressure_where_no_trigger_tells(
    stage: Stage, some: float, full: float, heard: list[tuple[str, str]]
) -> None:
    stage.reading = reading(some=some, full=full)
    stage.open().turn(now=51.0)
    assert stage.heard == heard


def test_time_lost_to_waiting_is_left_to_the_trigger_where_there_is_one(stage: Stage) -> None:
    fd, writer = os.pipe()
    stage.signals.append(StallSignal(fd, "psi (machine)", "some"))
    stage.reading = reading(some=50, full=50)
    stage.open().turn(now=51.0)
    os.close(writer)
    assert stage.heard == []


# Signals


def test_a_signal_wakes_it_before_the_sample_is_due(stage: Stage) -> None:
    signal = stage.signal("some", "psi (machine)")
    stage.open()
    signal.fire()
    stage.turn(now=50.2)
    assert stage.heard == [("some", "psi (machine)")]
    assert [sample.seconds for sample in stage.monitor.timeline.samples] == [pytest.approx(0.2)]
    (event,) = stage.monitor.timeline.events
    assert (event.kind, event.label) == ("pressure", "some")
    assert event.facts == {"source": "psi (machine)", "available": 500}
    assert stage.watch.due == 51.0


def test_the_event_has_the_snapshot_and_cannot_be_changed(stage: Stage) -> None:
    events: list[PressureEvent] = []
    stage.monitor = stage.make(on_pressure=events.append)
    stage.signal().fire()
    stage.open().turn()
    assert isinstance(stage.reading, Reading)
    assert events[0].snapshot is stage.reading.snapshot
    with pytest.raises(AttributeError):
        events[0].level = "full"  # type: ignore[misc]


def test_the_worst_of_several_signals_is_told_and_once(stage: Stage) -> None:
    for level in ("some", "limit", "full"):
        stage.signal(level, f"from {level}").fire()  # type: ignore[arg-type]
    stage.open().turn()
    assert stage.heard == [("limit", "from limit")]


def test_a_sample_that_is_worse_than_the_signal_is_told_instead(stage: Stage) -> None:
    stage.signal("some").fire()
    stage.reading = reading(available=1)
    stage.open().turn()
    assert stage.heard == [("limit", "sample")]


def test_a_signal_that_means_nothing_by_itself_only_wakes(stage: Stage) -> None:
    signal = stage.signal(None)
    stage.open()
    signal.fire()
    stage.turn()
    assert stage.heard == []
    assert len(stage.monitor.timeline) == 1


@pytest.mark.parametrize(("available", "heard"), [(251, []), (250, [("full", "psi")])])
def test_a_doubtful_signal_is_believed_only_where_little_is_left(
    stage: Stage, available: int, heard: list[tuple[str, str]]
) -> None:
    stage.signal("full", believed=0.25).fire()
    stage.reading = reading(available=available)
    stage.open().turn()
    assert stage.heard == heard


def test_a_storm_of_signals_is_looked_at_ten_times_a_second(stage: Stage) -> None:
    signal = stage.signal()
    stage.open()
    signal.fire()
    signal.fire()
    stage.turn(now=50.0)
    stage.watch.due = 50.05  # so that the poll below has nothing to wait for
    stage.turn(now=50.06)
    assert len(stage.heard) == 1
    stage.turn(now=50.0 + QUIET)
    assert len(stage.heard) == 2


def test_a_signal_whose_source_is_gone_is_dropped(stage: Stage) -> None:
    gone, stays = stage.signal(source="gone"), stage.signal(source="stays")
    stage.open()
    assert stage.monitor.sources == ("gone", "stays")
    gone.hang_up()
    stage.turn()
    assert stage.monitor.sources == ("stays",)
    stays.fire()
    stage.turn(now=50.2)
    assert stage.heard == [("some", "stays")]


def test_a_callback_that_fails_is_logged_and_called_again(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []

    def fail(event: PressureEvent) -> None:
        calls.append(event.level)
        raise RuntimeError("no")

    stage.monitor = stage.make(on_pressure=fail)
    stage.reading = reading(available=0)
    stage.open()
    assert stage.turn(now=51.0)
    assert stage.turn(now=52.0)
    assert calls == ["limit", "limit"]
    assert {record.levelno for record in caplog.records} == {logging.ERROR}


# The kernel's files


def test_the_counters_of_a_version_two_group_tell_a_kill(tmp_path: Path) -> None:
    file = tmp_path / "memory.events"
    file.write_text("low 0\nhigh 3\nmax 5\noom 1\noom_kill 0\noom_group_kill 0\n")
    signal = EventsSignal(os.open(file, os.O_RDONLY), "cgroup v2 events", None)
    assert signal.take(select.POLLPRI) is None
    file.write_text("low 0\nhigh 9\nmax 50\noom 1\noom_kill 0\noom_group_kill 0\n")
    assert signal.take(select.POLLPRI) is None
    file.write_text("low 0\nhigh 9\nmax 50\noom 1\noom_kill 1\noom_group_kill 0\n")
    assert signal.take(select.POLLPRI) == "limit"
    assert signal.take(select.POLLPRI) is None
    signal.close()


def test_an_eventfd_is_emptied_when_it_is_answered() -> None:
    signal = CounterSignal(os.eventfd(3, os.EFD_NONBLOCK), "cgroup v1 pressure level", "full")
    assert signal.take(select.POLLIN) == "full"
    assert signal.take(select.POLLIN) is None
    signal.close()


def test_a_trigger_whose_group_was_removed_is_gone() -> None:
    signal = StallSignal(-1, "psi (cgroup v2)", "some")
    assert signal.take(select.POLLPRI) == "some"
    with pytest.raises(SignalGoneError):
        signal.take(select.POLLPRI | select.POLLERR)


def made_up_tree(root: Path, version: int) -> Path:
    """A file system with one memory cgroup; its files are plain ones."""
    group = root / "sys/fs/cgroup/own"
    group.mkdir(parents=True)
    (root / "proc/self").mkdir(parents=True)
    kind, named, more = (
        ("cgroup2", "0::", "rw") if version == 2 else ("cgroup", "4:memory:", "rw,memory")
    )
    (root / "proc/self/cgroup").write_text(f"{named}/own\n")
    (root / "proc/self/mountinfo").write_text(
        f"30 20 0:26 / /sys/fs/cgroup rw - {kind} {kind} {more}\n"
    )
    return group


def test_version_two_is_asked_for_triggers_and_events(tmp_path: Path) -> None:
    group = made_up_tree(tmp_path, 2)
    (group / "memory.max").write_text("100000")
    (group / "memory.events").write_text("oom 0\n")
    (group / "memory.pressure").write_text("")
    (tmp_path / "proc/pressure").mkdir()
    (tmp_path / "proc/pressure/memory").write_text("")
    signals = open_signals(tmp_path)
    for signal in signals:
        signal.close()
    assert [(signal.source, signal.level) for signal in signals] == [
        ("psi (cgroup v2)", "some"),
        ("psi (cgroup v2)", "full"),
        ("cgroup v2 events", None),
    ]
    assert (group / "memory.pressure").read_bytes() == b"full 100000 1000000\0"


def test_the_machine_is_asked_where_the_group_has_no_triggers(tmp_path: Path) -> None:
    made_up_tree(tmp_path, 2)
    (tmp_path / "proc/pressure").mkdir()
    (tmp_path / "proc/pressure/memory").write_text("")
    signals = open_signals(tmp_path)
    for signal in signals:
        signal.close()
    assert [signal.source for signal in signals] == ["psi (machine)"] * 2


def test_version_one_is_asked_for_a_threshold_and_its_pressure(tmp_path: Path) -> None:
    group = made_up_tree(tmp_path, 1)
    (group / "memory.limit_in_bytes").write_text("100000")
    for name in ("memory.usage_in_bytes", "memory.pressure_level", "cgroup.event_control"):
        (group / name).write_text("")
    signals = open_signals(tmp_path)
    for signal in signals:
        signal.close()
    assert [(signal.source, signal.level) for signal in signals] == [
        ("cgroup v1 threshold", None),
        ("cgroup v1 pressure level", "some"),
        ("cgroup v1 pressure level", "full"),
    ]


@pytest.mark.parametrize("version", [1, 2])
def test_files_that_are_not_there_give_no_signal_and_no_error(tmp_path: Path, version: int) -> None:
    group = made_up_tree(tmp_path, version)
    (group / "memory.max").write_text("100000")
    (group / "memory.limit_in_bytes").write_text("100000")
    assert open_signals(tmp_path) == []


def test_a_window_that_the_kernel_refuses_is_tried_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up_tree(tmp_path, 2)
    (tmp_path / "proc/pressure").mkdir()
    (tmp_path / "proc/pressure/memory").write_text("")
    written: list[bytes] = []
    write = os.write

    def refusing(fd: int, data: bytes) -> int:
        written.append(data)
        if b"1000000" in data:
            raise OSError(22, "Invalid argument")
        return write(fd, data)

    monkeypatch.setattr("ebbtide.memory.pressure.os.write", refusing)
    signals = open_signals(tmp_path)
    monkeypatch.undo()
    for signal in signals:
        signal.close()
    assert len(signals) == 2
    assert written[:2] == [b"some 150000 1000000\0", b"some 300000 2000000\0"]


# With its thread


def test_the_callback_runs_on_the_monitors_thread_as_soon_as_a_signal_comes(stage: Stage) -> None:
    called = threading.Event()
    seen: list[tuple[str, bool, bool]] = []

    def note(event: PressureEvent) -> None:
        thread = threading.current_thread()
        seen.append((thread.name, thread.daemon, own_thread.is_own))
        called.set()

    signal = stage.signal()
    with stage.make(on_pressure=note, interval=3600):
        signal.fire()
        assert called.wait(30)
    assert seen == [("ebbtide-monitor", True, True)]


def test_the_first_sample_is_taken_at_once_and_on_its_thread(stage: Stage) -> None:
    threads: list[str] = []

    def sample() -> Reading:
        threads.append(threading.current_thread().name)
        return reading()

    with stage.make(sampler=sample, interval=3600) as monitor:
        assert monitor.running
    assert threads == ["ebbtide-monitor"]
    assert len(monitor.timeline) == 1


def test_stopping_ends_the_thread_and_closes_every_descriptor(stage: Stage) -> None:
    stage.signal()
    before = descriptors()
    monitor = stage.make(interval=3600).start()
    assert descriptors() > before
    monitor.stop()
    assert not monitor.running
    assert descriptors() == before - 1  # the signal's own, too
    assert "ebbtide-monitor" not in {thread.name for thread in threading.enumerate()}


def test_starting_and_stopping_twice_is_as_once_and_it_can_start_again(stage: Stage) -> None:
    monitor = stage.make(interval=3600)
    monitor.stop()
    assert monitor.start().start() is monitor
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("ebbtide-monitor") == 1
    monitor.stop()
    monitor.stop()
    with monitor:
        assert monitor.running
    assert len(monitor.timeline) == 2


def test_the_callback_may_stop_the_monitor(stage: Stage) -> None:
    stopped = threading.Event()
    threads: list[threading.Thread] = []

    def stop(event: PressureEvent) -> None:
        threads.append(threading.current_thread())
        monitor.stop()
        stopped.set()

    stage.reading = reading(available=0)
    monitor = stage.make(on_pressure=stop, interval=3600)
    monitor.start()
    assert stopped.wait(30)
    threads[0].join(30)
    assert not monitor.running
    assert len(monitor.timeline) == 1


def test_a_thread_that_cannot_start_leaves_nothing_open(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(monitor_module.EbbtideThread, "start", refuse)
    monitor = stage.make()
    with pytest.raises(RuntimeError):
        monitor.start()
    assert not monitor.running
    assert monitor_module._running == {}


def test_notes_go_to_the_timeline(stage: Stage) -> None:
    stage.monitor.note("evicting", "MiniLM", need=5)
    (event,) = stage.monitor.timeline.events
    assert (event.kind, event.label, dict(event.facts)) == ("evicting", "MiniLM", {"need": 5})


def test_the_repr_shows_the_state(stage: Stage) -> None:
    assert repr(stage.monitor) == "<Monitor stopped: every 1 s, 0 samples>"
    stage.open()
    assert repr(stage.monitor).startswith("<Monitor running:")


@pytest.mark.parametrize("interval", [0, -1, float("nan"), float("inf"), "often"])
def test_an_interval_that_is_none_is_refused(interval: Any) -> None:
    with pytest.raises(InputError, match="interval takes seconds"):
        Monitor(interval)


# A process of its own


def test_a_forked_child_has_no_monitor_and_can_start_it_again(
    fresh_process: Callable[..., str],
) -> None:
    seen = fresh_process(
        """
        import os, threading, warnings
        from ebbtide import memory
        from ebbtide.memory.monitor import read
        warnings.simplefilter("ignore")
        found = read()  # so that the fork meets no file that a sample has open
        before = len(os.listdir("/proc/self/fd"))
        monitor = memory.Monitor(3600, sampler=lambda: found).start()
        child = os.fork()
        if child == 0:
            ok = (
                not monitor.running
                and len(os.listdir("/proc/self/fd")) == before
                and threading.active_count() == 1
            )
            monitor.stop()
            with monitor:
                ok = ok and monitor.running
            os._exit(0 if ok else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert monitor.running
        monitor.stop()
        print("done")
        """
    )
    assert "done" in seen


def test_a_program_that_forgets_it_exits(fresh_process: Callable[..., str]) -> None:
    seen = fresh_process(
        """
        from ebbtide import memory
        memory.Monitor(3600).start()
        memory.Monitor(0.001).start()
        print("done")
        """,
        timeout=30,
    )
    assert seen.strip() == "done"


def test_asking_memory_for_other_names_does_not_load_it(fresh_process: Callable[..., str]) -> None:
    seen = fresh_process(
        """
        import sys
        from ebbtide import memory
        assert "ebbtide.memory.monitor" not in sys.modules
        assert {"Monitor", "Timeline", "PressureEvent"} <= set(dir(memory))
        memory.Monitor
        assert "numpy" not in sys.modules
        try:
            memory.Moniter
        except AttributeError as error:
            print(error)
        """
    )
    assert "module 'ebbtide.memory' has no attribute 'Moniter'" in seen


def writable_group() -> Path | None:
    """A new version 1 memory cgroup, where there may be one."""
    own = next(cgroup_module.levels("memory", 1), None)
    if own is None:
        return None
    group = Path(own.path, f"ebbtide-monitor-{os.getpid()}")
    try:
        group.mkdir()
    except OSError:
        return None
    return group


def test_a_real_group_that_fills_wakes_it_before_the_limit(
    fresh_process: Callable[..., str],
) -> None:
    group = writable_group()
    if group is None:
        pytest.skip("no version 1 memory cgroup can be made here")
    try:
        seen = fresh_process(
            """
            import os, threading
            from ebbtide import memory
            group = os.environ["GROUP"]
            with open(group + "/memory.limit_in_bytes", "w") as file:
                file.write("200000000")
            with open(group + "/cgroup.procs", "w") as file:
                file.write(str(os.getpid()))
            called, events = threading.Event(), []
            def note(event):
                events.append(event)
                called.set()
            with memory.Monitor(3600, on_pressure=note) as monitor:
                assert "cgroup v1 threshold" in monitor.sources, monitor.sources
                held = []
                while memory.snapshot().available > 8_000_000:
                    held.append(bytearray(b"x") * 500_000)
                assert called.wait(20)
            assert events[0].level == "limit", events
            assert events[0].snapshot.limit.source == "cgroup v1"
            print("woken")
            """,
            GROUP=str(group),
        )
    finally:
        group.rmdir()
    assert "woken" in seen


def test_a_real_kernel_accepts_a_trigger() -> None:
    try:
        Path("/proc/pressure/memory").read_text()
    except OSError:
        pytest.skip("this kernel has no pressure stall information")
    signals = open_signals()
    found = {signal.level for signal in signals if isinstance(signal, StallSignal)}
    polled = select.poll()
    for signal in signals:
        polled.register(signal.fd, signal.mask)
    errors = [mask for _, mask in polled.poll(0) if mask & select.POLLNVAL]
    for signal in signals:
        signal.close()
    if not found:
        pytest.skip("no trigger may be set here")
    assert found == {"some", "full"}
    assert errors == []
