"""Small freed buffers that glibc and numpy keep do not each hold a page of what a model left."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from ebbtide.memory.allocator import allocator

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or allocator.name != "glibc", reason="these are glibc's ways"
)

SCATTER = """
    import ctypes
    from ebbtide.cancellation import EbbtideThread
    from ebbtide.memory import anonymous_bytes
    from ebbtide.memory.allocator import allocator

    libc = ctypes.PyDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]

    def scatter(make):
        '''Make small things 12 kB apart, then give back what lay between them.'''
        between, made = [], []
        for size in range(24, 1033, 16):
            for _ in range(7):
                between.append(libc.malloc(12_000))
                ctypes.memset(between[-1], 1, 12_000)
                made.append(make(size))
        end = libc.malloc(12_000)  # so that no top shrinks
        for block in between:
            libc.free(block)
        return made

    def kept(make, drop):
        allocator.trim()
        before = anonymous_bytes()
        made = scatter(make)
        while made:
            drop(made.pop())
        allocator.trim()
        print(anonymous_bytes() - before)

    def on_a_thread_of_ours(make, drop):
        thread = EbbtideThread(target=kept, args=(make, drop))
        thread.start()
        thread.join()
"""


@pytest.mark.parametrize(("policy", "least", "most"), [("tuned", 0, 0.5e6), ("system", 1e6, 3e6)])
def test_a_trim_takes_back_what_a_thread_of_ours_keeps_of_freed_chunks(
    fresh_process: Any, policy: str, least: float, most: float
) -> None:
    script = SCATTER + "    on_a_thread_of_ours(libc.malloc, libc.free)\n"
    found = int(fresh_process(script, EBBTIDE_MALLOC=policy))
    assert least <= found <= most


def test_the_small_buffers_that_numpy_keeps_lie_together_once_a_runtime_has_started(
    fresh_process: Any,
) -> None:
    found = fresh_process("""
        import numpy as np
        from ebbtide import runtime
        runtime.start()
        arrays, between = [], []
        for size in range(4, 1024, 4):
            for _ in range(7):
                between.append(np.empty(12_000, np.uint8))
                arrays.append(np.empty(size, np.uint8))
        places = np.sort([one.__array_interface__["data"][0] for one in arrays])
        near = np.median(places)
        print(np.mean(np.abs(places - near) < 1_500_000))
    """)
    assert float(found) > 0.9


def test_numpy_asks_for_no_huge_pages_while_a_native_thread_works_and_does_again_after(
    fresh_process: Any,
) -> None:
    found = fresh_process("""
        import numpy as np
        from ebbtide.cancellation import CancelToken
        from ebbtide.runtime import native_threads

        switch = np._core.multiarray._set_madvise_hugepage

        def asked():
            before = switch(True)
            switch(before)
            return before

        job = native_threads.submit(asked, CancelToken("test"), lambda: None)
        print(job.wait())
        while not asked():  # the thread gives it back just after the job has told its outcome
            pass
    """)
    assert found.split() == ["False"]
