"""Whatever becomes of the process, this one goes on, and says what happened."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.workers.watched import SOON, call, is_there, until

import ebbtide
from ebbtide.errors import WorkerCrashedError, WorkerMemoryError
from ebbtide.workers import keeper
from ebbtide.workers.limits import Room


@pytest.mark.parametrize("start", ["spawn", "fork-server"])
@pytest.mark.parametrize(
    ("how", "arguments", "status", "words"),
    [
        ("abort", (), -signal.SIGABRT, "was ended by SIGABRT while it ran abort for"),
        ("fault", (), -signal.SIGSEGV, "was ended by SIGSEGV while it ran fault for"),
        ("leave", (7,), 7, "ended with exit status 7 while it ran leave for"),
        ("leave", (0,), 0, "ended with exit status 0 while it ran leave for"),
    ],
)
def test_a_crash_is_told_with_what_ran_and_the_next_call_runs_again(
    strange: Any, how: str, arguments: tuple[Any, ...], status: int, words: str, start: str
) -> None:
    with strange(start=start) as pipe:
        expected = pipe("the sea")
        pid = pipe.pid
        with pytest.raises(WorkerCrashedError, match=words) as caught:
            call(pipe, how, *arguments)
        assert caught.value.status == status
        assert caught.value.running[0].startswith(how)
        assert "The next call starts a new one" in str(caught.value)
        assert not is_there(pid)
        assert pipe.state is ebbtide.State.SLEEPING
        assert pipe.memory.anonymous == 0
        assert (pipe("the sea") == expected).all()
        assert pipe.pid not in (None, pid)
        assert pipe.state is ebbtide.State.READY


def test_what_a_crashing_process_printed_last_is_a_note(strange: Any) -> None:
    with strange() as pipe, pytest.raises(WorkerCrashedError) as caught:
        call(pipe, "fault")
    assert "Segmentation fault" in caught.value.__notes__[-1]
    assert "strange.py" in caught.value.__notes__[-1]


def test_without_a_restart_each_further_call_fails(strange: Any) -> None:
    pipe = strange(restart="never")
    for how in ("abort", "log", "log"):
        with pytest.raises(WorkerCrashedError, match="Make a new pipeline"):
            call(pipe, how)
    receipt = pipe.dispose()
    assert "was ended by SIGABRT, before this disposal" in receipt.reasons[0]
    assert (receipt.charged, receipt.released, receipt.verified) == (0, 0, True)


def test_all_calls_that_ran_are_told_and_one_error_is_each_ones_own(strange: Any) -> None:
    with strange() as pipe:
        errors: list[BaseException] = []

        def work() -> None:
            try:
                call(pipe, "wait")
            except WorkerCrashedError as error:
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for one in threads:
            one.start()
        calls = pipe._worker._child.calls
        until(lambda: [one.packet for one in list(calls.values())] == [None, None])  # sent
        os.kill(pipe.pid, signal.SIGKILL)
        for one in threads:
            one.join(SOON)
        assert len(errors) == 2
        assert errors[0] is not errors[1]


def test_a_restart_that_crashes_too_is_told_and_not_tried_for_ever(
    strange: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    with strange("crashing_again") as pipe:
        os.kill(pipe.pid, signal.SIGKILL)
        until(lambda: pipe.pid is None)
        for _ in range(2):
            with pytest.raises(WorkerCrashedError, match="SIGABRT while it ran the load"):
                pipe("the sea")
        (tmp_path / "mark").unlink()
        assert pipe("the sea").shape == (1, 4, 32)


def test_calls_beyond_what_a_socket_holds_wait_for_room(strange: Any) -> None:
    with strange() as pipe:
        found = []
        os.kill(pipe.pid, signal.SIGSTOP)
        texts = [str(number) * 30_000 for number in range(10, 70)]
        threads = [
            threading.Thread(target=lambda text=text: found.append(call(pipe, "echo", text)))
            for text in texts
        ]
        for one in threads:
            one.start()
        until(lambda: len(pipe._lifecycle.running) == 60)
        until(lambda: pipe._worker._held)
        os.kill(pipe.pid, signal.SIGCONT)
        for one in threads:
            one.join(SOON)
        assert sorted(found) == texts


# kill -9 at each step of the protocol


def test_killed_as_it_starts(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = keeper._started

    def start(plan: Any) -> Any:
        child = started(plan)
        child.signal(signal.SIGKILL)
        return child

    monkeypatch.setattr(keeper, "_started", start)
    with pytest.raises(WorkerCrashedError, match="SIGKILL while it ran the load"):
        ebbtide.pipeline("feature-extraction", tiny_bert, isolate=True)


def test_killed_as_it_loads(strange: Any) -> None:
    def kill(event: Any) -> None:
        (life,) = [one for one in _lifecycles() if one.worker is not None]
        os.kill(life.worker._own.pid, signal.SIGKILL)

    with pytest.raises(WorkerCrashedError, match="while it ran the load"):
        strange("slow", progress=kill)
    with pytest.raises(WorkerCrashedError, match="SIGABRT while it ran the load") as caught:
        strange("crashing")
    assert "as I die" in caught.value.__notes__[-1]


def _lifecycles() -> list[Any]:
    from ebbtide.lifecycle import _live

    return list(_live.values())


def test_killed_while_idle(strange: Any) -> None:
    with strange() as pipe:
        pid = pipe.pid
        os.kill(pid, signal.SIGKILL)
        until(lambda: pipe.pid is None)
        assert pipe("the sea").shape == (1, 4, 32)
        assert pipe.pid != pid


def test_killed_while_a_call_comes(strange: Any) -> None:
    with strange() as pipe:
        for _ in range(3):
            os.kill(pipe.pid, signal.SIGKILL)
            with contextlib.suppress(WorkerCrashedError):  # sent, or not: nobody knows
                pipe("the sea")
            assert pipe("the sea").shape == (1, 4, 32)


def test_killed_while_it_streams(strange: Any) -> None:
    with strange() as pipe:
        stream = pipe._made("stream", (), {}, tells="stream")
        pieces = stream.events()
        assert str(next(pieces)) == "sea"
        os.kill(pipe.pid, signal.SIGKILL)
        assert list(pieces) == []
        with pytest.raises(WorkerCrashedError, match="while it ran stream"):
            stream.outcome()
        assert pipe("the sea").shape == (1, 4, 32)


def test_killed_while_it_disposes(strange: Any) -> None:
    pipe = strange("dying")
    pid = pipe.pid
    receipt = pipe.dispose()
    assert receipt.verified
    assert f"(pid {pid}) was ended by SIGKILL" in receipt.reasons[0]
    assert "no receipt" in receipt.reasons[1]
    assert not is_there(pid)


def test_a_disposal_that_does_not_end_is_ended_by_signals(
    strange: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "PATIENCE", 0.1)
    pipe = strange("ending")
    receipt = pipe.dispose()
    assert "was sent SIG" in receipt.reasons[1]
    stopped = strange()
    os.kill(stopped.pid, signal.SIGSTOP)
    receipt = stopped.dispose()
    assert "was ended by SIGKILL" in receipt.reasons[0]
    assert "was sent SIGKILL" in receipt.reasons[1]


def test_a_terminated_process_disposes_first(strange: Any) -> None:
    with strange(restart="never") as pipe:
        os.kill(pipe.pid, signal.SIGTERM)
        until(lambda: pipe._worker.ended)
        ended = pipe._worker.ended
        assert ended.status == 128 + signal.SIGTERM
        assert ended.receipt is not None


# What cannot be started


def test_a_process_that_cannot_be_started_is_a_load_error_and_may_be_tried_again(
    strange: Any, monkeypatch: pytest.MonkeyPatch, tiny_bert: Path
) -> None:
    def fail(plan: Any) -> Any:
        raise OSError(11, "Resource temporarily unavailable")

    with strange() as pipe:
        with monkeypatch.context() as patch:
            patch.setattr(keeper, "_started", fail)
            os.kill(pipe.pid, signal.SIGKILL)
            until(lambda: pipe.pid is None)
            for _ in range(2):
                with pytest.raises(ebbtide.LoadError, match="cannot be started: Resource"):
                    pipe("the sea")
            with pytest.raises(ebbtide.LoadError, match="cannot be started: Resource"):
                ebbtide.pipeline("feature-extraction", tiny_bert, isolate=True)
        assert pipe("the sea").shape == (1, 4, 32)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("frozen", True, "not run by a Python"), ("executable", "", "not run by a Python"),
     ("platform", "darwin", "takes Linux")],
)  # fmt: skip
def test_where_no_process_can_be_started_it_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, tiny_bert: Path, name: str, value: Any, words: str
) -> None:
    monkeypatch.setattr(f"ebbtide.workers.process.sys.{name}", value, raising=False)
    with pytest.raises(ebbtide.LoadError, match=words):
        ebbtide.pipeline("feature-extraction", tiny_bert, isolate=True)


# Children that misbehave and live


def test_a_child_that_blocks_in_native_code_does_not_block_this_process(
    strange: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from ebbtide.memory import reaper

    monkeypatch.setattr(reaper, "GRACE", 0.1)
    pipe = strange()
    errors = []

    def work() -> None:
        try:
            call(pipe, "block")
        except ebbtide.EbbtideError as error:
            errors.append(type(error))

    thread = threading.Thread(target=work)
    thread.start()
    until(lambda: "blocking now" in caplog.text)
    assert pipe.memory.anonymous > 0
    receipt = pipe.dispose(cancel=True)
    thread.join(SOON)
    assert errors == [ebbtide.PipelineCancelledError]
    assert "was ended by SIGKILL" in receipt.reasons[0]
    assert "was sent SIGKILL" in receipt.reasons[1]


def test_what_a_child_prints_is_logged_and_breaks_nothing(
    strange: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with strange() as pipe, caplog.at_level(logging.WARNING):
        call(pipe, "say", "first words", "second words")
        until(lambda: "printed: second words" in caplog.text)
        assert "printed: first words" in caplog.text
        assert pipe("the sea").shape == (1, 4, 32)
    assert capfd.readouterr().out == ""


def test_a_flood_on_standard_error_blocks_nobody_and_is_logged_in_part(
    strange: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with strange() as pipe, caplog.at_level(logging.WARNING):
        assert call(pipe, "flood", 20_000_000) == 20_000_000
        assert pipe("the sea").shape == (1, 4, 32)
        until(lambda: "printed: flood" in caplog.text)
    assert len(caplog.records) < 5_000


def test_a_child_that_forks_is_ended_all_the_same(strange: Any) -> None:
    pipe = strange()
    grandchild = call(pipe, "fork")
    pid = pipe.pid
    try:
        receipt = pipe.dispose()
        assert f"(pid {pid}) ended with exit status 0" in receipt.reasons[0]
    finally:
        os.kill(grandchild, signal.SIGKILL)


def test_a_child_that_forks_and_is_killed_is_seen_to_have_ended(strange: Any) -> None:
    with strange() as pipe:
        grandchild = call(pipe, "fork")
        try:
            with pytest.raises(WorkerCrashedError):
                call(pipe, "abort")
        finally:
            os.kill(grandchild, signal.SIGKILL)
        assert pipe("the sea").shape == (1, 4, 32)


def test_a_result_that_cannot_cross_fails_its_call_alone(strange: Any) -> None:
    with strange() as pipe:
        with pytest.raises(ebbtide.InputError, match="cannot cross"):
            call(pipe, "unpick")
        assert pipe("the sea").shape == (1, 4, 32)


def test_a_child_that_says_what_is_no_message_is_ended(strange: Any) -> None:
    with strange() as pipe:
        with pytest.raises(WorkerCrashedError, match="no message of ours"):
            call(pipe, "garbage")
        assert pipe("the sea").shape == (1, 4, 32)


def test_log_records_and_warnings_come_where_the_call_is_made(
    strange: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with strange() as pipe, caplog.at_level(logging.WARNING):
        call(pipe, "log", "a word")
        assert ("ebbtide.there", logging.WARNING, "a word") in caplog.record_tuples
        call(pipe, "log_later", "a later word")
        until(lambda: "a later word" in caplog.text)
        with pytest.warns(UserWarning, match="beware"):
            call(pipe, "warn", "beware")
        with pytest.raises(UserWarning, match="an error here"):
            call(pipe, "warn", "an error here")


# Memory


def can_make_cgroups() -> bool:
    room = Room(1 << 30)
    made = room.rlimit is None
    room.close()
    return made


needs_cgroups = pytest.mark.skipif(not can_make_cgroups(), reason="no cgroup can be made here")


@needs_cgroups
def test_a_child_that_fills_its_cgroup_is_a_memory_error(strange: Any) -> None:
    with strange(memory_limit="150 MB") as pipe:
        assert call(pipe, "fill", 20_000_000) == 20_000_000
        with pytest.raises(WorkerMemoryError, match="memory_limit of 150 MB") as caught:
            call(pipe, "fill", 300_000_000)
        assert caught.value.status == -signal.SIGKILL
        assert isinstance(caught.value, MemoryError)
        assert pipe("the sea").shape == (1, 4, 32)
        folder = pipe._worker._room._folder
        assert Path(folder).exists()
    assert not Path(folder).exists()


@needs_cgroups
def test_a_kill_is_no_memory_error(strange: Any) -> None:
    with strange(memory_limit="1 GB") as pipe:
        with pytest.raises(WorkerCrashedError) as caught:
            call(pipe, "kill")
        assert type(caught.value) is WorkerCrashedError


@pytest.fixture
def no_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Room, "_make", lambda self, limit: False)


@pytest.mark.usefixtures("no_cgroup")
def test_without_a_cgroup_the_system_refuses_what_is_too_much(strange: Any) -> None:
    with strange(memory_limit="150 MB") as pipe:
        pid = pipe.pid
        assert call(pipe, "fill", 20_000_000) == 20_000_000
        with pytest.raises(WorkerMemoryError, match="memory_limit of 150 MB"):
            call(pipe, "fill", 600_000_000)
        assert pipe.pid == pid
        with pytest.raises(WorkerMemoryError):
            pipe(["the sea " * 300] * 400, batch_size=400)
        assert pipe("the sea").shape == (1, 4, 32)


@pytest.mark.usefixtures("no_cgroup")
def test_a_library_that_aborts_for_want_of_memory_is_a_memory_error(strange: Any) -> None:
    with strange(memory_limit="150 MB") as pipe:
        with pytest.raises(WorkerMemoryError, match="SIGABRT") as caught:
            call(pipe, "fail_to_allocate")
        assert "memory allocation of" in caught.value.__notes__[-1]
        with pytest.raises(WorkerCrashedError) as other:
            call(pipe, "abort")
        assert type(other.value) is WorkerCrashedError


@pytest.mark.usefixtures("no_cgroup")
def test_a_load_that_takes_too_much_is_a_memory_error(strange: Any) -> None:
    with pytest.raises(WorkerMemoryError, match="memory_limit"):
        strange("filling", memory_limit="150 MB")


def test_a_call_that_finds_no_memory_is_a_memory_error(strange: Any) -> None:
    with strange() as pipe, pytest.raises(WorkerMemoryError):
        call(pipe, "fill", 1 << 60)


# Idle


def test_an_idle_process_ends_and_the_next_call_starts_another(strange: Any) -> None:
    with strange(idle=0.05) as pipe:
        until(lambda: pipe._worker.ended)
        assert not is_there(pipe._worker.ended.pid)
        until(lambda: pipe.state is ebbtide.State.SLEEPING)
        assert pipe.memory.anonymous == 0
        assert pipe._worker.ended.receipt is not None
        receipt = pipe.sleep()
        assert "no process" in receipt.reasons[0]
        assert pipe("the sea").shape == (1, 4, 32)
    assert pipe.dispose().verified


def test_calls_beside_the_idle_end_are_all_answered(strange: Any) -> None:
    with strange(idle=0.0) as pipe:
        for _ in range(5):
            assert call(pipe, "echo", 1) == 1


def test_a_call_that_comes_as_the_process_is_taken_out_of_use_goes_to_the_next(
    strange: Any,
) -> None:
    with strange() as pipe:
        worker, child, pid = pipe._worker, pipe._worker._child, pipe.pid

        class Calls(dict[int, Any]):
            def __setitem__(self, number: int, one: Any) -> None:
                worker._end(child)  # as its thread does where it saw no call
                super().__setitem__(number, one)

        child.calls = Calls()
        assert call(pipe, "echo", 7) == 7
        assert pipe.pid not in (None, pid)
