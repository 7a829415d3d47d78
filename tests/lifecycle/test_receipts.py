"""4.5 and 4.6: memory goes back, and the receipt says what happened."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest

import ebbtide
from ebbtide import DisposalReceipt
from ebbtide.memory import reaper as reaper_module
from ebbtide.memory.allocator import allocator


def test_a_quiet_disposal_is_measured_and_verified(fresh_process) -> None:
    out = fresh_process(
        """
        import ebbtide
        def life():
            pipe = ebbtide.pipeline("feature-extraction", MODEL)
            pipe(["word " * 200] * 32, pooling="mean")
            memory, before = pipe.memory, ebbtide.memory.anonymous_bytes()
            receipt = pipe.dispose()
            return memory, receipt, before - ebbtide.memory.anonymous_bytes()
        life()
        memory, receipt, change = life()
        assert receipt.quiet and receipt.verified, receipt
        assert memory.quiet
        assert receipt.charged == memory.exclusive == memory.anonymous, (receipt, memory)
        assert abs(receipt.released - change) < 500_000, (receipt, change)
        assert receipt.retained == max(0, receipt.charged - receipt.released)
        assert 0 < receipt.duration < 5
        print(receipt.method, receipt.reasons)
        """
    )
    assert out.strip() == f"{allocator.method} ()"


def test_bytes_that_do_not_come_back_are_not_called_verified(fresh_process) -> None:
    """Somebody takes 200 MB while it is disposed: the figures say so, and nothing is claimed."""
    out = fresh_process(
        """
        import ebbtide
        from ebbtide.memory import reaper as reaper_module
        hold = []
        trim = reaper_module.allocator.trim
        def taking():
            hold.append(bytearray(b"x" * 200_000_000))
            return trim()
        pipe = ebbtide.pipeline("feature-extraction", MODEL)
        pipe(["word " * 200] * 32, pooling="mean")
        reaper_module.allocator.trim = taking
        receipt = pipe.dispose(collect=False)
        print(receipt.quiet, receipt.verified, receipt.released, receipt.reasons)
        assert receipt.retained == receipt.charged
        """
    )
    assert out.startswith("True False 0 ('bytes stayed in the process")


def test_where_other_work_overlaps_the_proof_is_structural(waiting, call, tiny_bert: Path) -> None:
    busy, session = waiting()
    running = call(busy)
    session.entered.acquire()
    with ebbtide.pipeline("feature-extraction", tiny_bert) as pipe:
        assert not pipe.memory.quiet
    receipt = pipe.dispose()
    assert not receipt.quiet
    assert receipt.verified
    assert "other work overlapped: verified by structure" in str(receipt)
    session.go.set()
    running.end()
    busy.dispose()


def test_a_native_session_that_somebody_pins_is_named_and_not_verified(tiny_bert: Path) -> None:
    pipe = ebbtide.pipeline("feature-extraction", tiny_bert)
    core = pipe._model._session.value.native._native._sess
    keeper = [core, []]
    del core
    receipt = pipe.dispose()
    assert not receipt.verified
    assert "the native session of model.onnx is still referenced by a builtins.list" in str(receipt)
    keeper.clear()


def test_an_alias_of_the_python_session_pins_nothing(tiny_bert: Path) -> None:
    pipe = ebbtide.pipeline("feature-extraction", tiny_bert)
    alias = pipe._model._session.value.native._native
    assert pipe.dispose().verified or pipe.dispose().reasons[0].startswith("bytes stayed")
    with pytest.raises(AttributeError):
        alias.run(None, {})


def test_a_node_argument_that_escapes_is_found_out(tiny_bert: Path) -> None:
    pipe = ebbtide.pipeline("feature-extraction", tiny_bert)
    escaped = pipe._model._session.value.native._native.get_inputs()[0]
    receipt = pipe.dispose()
    assert "still referenced by something the garbage collector does not see" in str(receipt)
    assert not receipt.verified
    assert escaped.name == "input_ids"


def test_a_full_collection_runs_only_where_bytes_stayed(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collections: list[None] = []
    monkeypatch.setattr(reaper_module.gc, "collect", lambda: collections.append(None))
    for _ in range(3):  # what libraries set up at their first use is over by the third
        collections.clear()
        pipe = ebbtide.pipeline("feature-extraction", tiny_bert)
        pipe("the sea", pooling="mean")
        receipt = pipe.dispose()
    assert collections == []
    assert "gc.collect" not in receipt.method

    for allowed in (False, True):
        pipe = ebbtide.pipeline("feature-extraction", tiny_bert)
        core = pipe._model._session.value.native._native._sess
        receipt = pipe.dispose(collect=allowed)
        assert len(collections) == allowed
        assert ("gc.collect" in receipt.method) == allowed
        del core


def test_a_collection_frees_what_a_cycle_pinned(tiny_bert: Path) -> None:
    pipe = ebbtide.pipeline("feature-extraction", tiny_bert)
    gc.disable()
    try:
        cycle: dict[str, object] = {"session": pipe._model._session.value.native._native._sess}
        cycle["itself"] = cycle
        del cycle
        receipt = pipe.dispose()
    finally:
        gc.enable()
    assert "gc.collect" in receipt.method
    assert not [one for one in receipt.reasons if "referenced" in one]
    assert receipt.verified


def test_disposing_one_of_two_owners_releases_nothing_and_says_so(tiny_bert: Path) -> None:
    first = ebbtide.pipeline("feature-extraction", tiny_bert)
    second = ebbtide.pipeline("feature-extraction", tiny_bert)
    third = ebbtide.pipeline("feature-extraction", tiny_bert)
    receipt = first.dispose()
    assert receipt.charged == 0
    assert "shared with 2" in str(receipt)
    assert second("still works", pooling="mean").shape == (1, 32)
    second.dispose()
    assert third("still works", pooling="mean").shape == (1, 32)
    assert third.dispose().charged > 0


def test_trimming_is_done_once_for_a_batch_and_largest_first(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = ["tiny-bert", "tiny-roberta", "tiny-distilbert", "tiny-mlm"]
    pipes = [ebbtide.pipeline("feature-extraction", tiny_bert.parent / one) for one in folders]
    for charge, pipe in zip((3, 40, 1, 20), pipes, strict=True):
        pipe._lifecycle.working = charge * 10**9
    order: list[str] = []
    trims: list[int] = []
    release, trim = reaper_module._release, allocator.trim

    def noting(life, working):
        order.append(life.label.rpartition("/")[2])
        return release(life, working)

    monkeypatch.setattr(reaper_module, "_release", noting)
    monkeypatch.setattr(allocator, "trim", lambda: (trims.append(len(order)), trim())[1])

    held = threading.Event()
    reaper_module.reaper._queue.put(lambda: held.wait(30))  # so that all four wishes meet
    threads = [threading.Thread(target=pipe.dispose, kwargs={"collect": False}) for pipe in pipes]
    for thread in threads:
        thread.start()
    while reaper_module.reaper._queue.qsize() < 4:
        pass
    held.set()
    for thread in threads:
        thread.join(30)
    assert order == ["tiny-roberta", "tiny-mlm", "tiny-bert", "tiny-distilbert"]
    assert trims == [0, 4], "once for what calls left, and once for what was released"


def test_dispose_all_disposes_every_live_pipeline(tiny_bert: Path) -> None:
    pipes = [ebbtide.pipeline("feature-extraction", tiny_bert) for _ in range(3)]
    assert ebbtide.live() == pipes
    receipts = ebbtide.dispose_all()
    assert len(receipts) == 3
    assert ebbtide.live() == []
    assert receipts == [pipe.dispose() for pipe in pipes]


def test_dispose_all_tells_of_failures_after_all_were_tried(waiting) -> None:
    bad, failing = waiting()
    good, fine = waiting()
    failing.failing = RuntimeError("no")
    with pytest.raises(ebbtide.DisposalError, match="1 of 2"):
        ebbtide.dispose_all()
    assert fine.closed == 1
    assert bad.state is good.state is ebbtide.State.DISPOSED


def test_a_receipt_reads_as_one_line() -> None:
    receipt = DisposalReceipt(31_400_000, 31_200_000, 200_000, True, True, 0.014, "malloc_trim")
    assert str(receipt) == "released 31.2 MB of 31.4 MB in 14 ms (verified)"


def test_reclaim_gives_back_what_was_freed_and_leaves_live_pipelines(fresh_process) -> None:
    out = fresh_process(
        """
        import ebbtide
        with ebbtide.pipeline("feature-extraction", MODEL) as pipe:
            pipe(["word " * 200] * 64, pooling="mean", batch_size=64)
            worked = pipe.memory
            reclaimed = ebbtide.memory.reclaim(collect=True)
            assert reclaimed.released > 3e6, reclaimed
            assert reclaimed.released == reclaimed.before - reclaimed.after
            assert worked.working > 3e6 and pipe.memory.working == 0, (worked, pipe.memory)
            assert pipe("still there", pooling="mean").shape == (1, 32)
            print(reclaimed.method)
        """
    )
    assert out.strip() == f"gc.collect, {allocator.method}"


def test_no_trim_is_done_where_the_settings_forbid_it(fresh_process) -> None:
    out = fresh_process(
        """
        import ebbtide
        pipe = ebbtide.pipeline("feature-extraction", MODEL)
        print(pipe.dispose(collect=False).method)
        """,
        EBBTIDE_TRIM="0",
    )
    assert out.strip() == "none (settings.trim is off)"


def test_no_mallopt_is_called_where_the_settings_forbid_it(fresh_process) -> None:
    script = """
        import ebbtide
        from ebbtide.memory.allocator import allocator
        calls = []
        class Noting:
            def __init__(self, library):
                self.library = library
            def __getattr__(self, name):
                if name == "mallopt":
                    return lambda *a: calls.append(a)
                return getattr(self.library, name)
        allocator._library = Noting(allocator._library)
        ebbtide.pipeline("feature-extraction", MODEL).dispose()
        print(len(calls) > 0)
        """
    assert fresh_process(script).strip() == "True"
    assert fresh_process(script, EBBTIDE_MALLOC="system").strip() == "False"


def test_what_calls_left_and_the_allocator_gave_back_by_itself_is_not_charged(
    tiny_bert: Path,
) -> None:
    pipe = ebbtide.pipeline("feature-extraction", tiny_bert)
    pipe._lifecycle.working = 500_000_000
    receipt = pipe.dispose()
    assert receipt.charged < 100_000_000
    assert receipt.retained < 1_000_000
    assert receipt.verified
