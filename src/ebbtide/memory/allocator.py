"""The C allocator of this process, and its call that gives freed memory back to the system.

On glibc `malloc_trim(0)` gives back the free pages inside every arena and the top of the main
one. It does not give back the tops of the other arenas, which are what threads allocate from:
after native runs on sixteen threads 62 to 231 MB stayed there. A top shrinks only when a chunk of
64 kB or more is freed in its arena while the top is larger than `M_TRIM_THRESHOLD`. So every
thread that runs native code for Ebbtide keeps one chunk of its arena, its *ballast*, and `trim`
frees these chunks with the threshold lowered. The thread takes a new one before its next job; until
then the threshold is lowered while sessions are released too, so that their own last large chunk
does the same.

Setting the threshold ends glibc's own adjusting of it, and of `M_MMAP_THRESHOLD`. Both are
therefore left at the largest values that adjusting would have reached (64 and 32 MB), which is
where a process that has loaded a model stands anyway. Low values give memory back by themselves,
but cost: with thresholds of 128 kB the same batch took 800 ms in place of 385
(`benchmarks/arenas.py`).
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Final

from ebbtide._settings import settings
from ebbtide.cancellation import own_thread
from ebbtide.lifecycle import forget_working_memory, on_fork

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_MMAP_THRESHOLD_MAX: Final = 32 << 20
_TRIM_THRESHOLD_MAX: Final = 64 << 20
_PAGE: Final = 4096
_BALLAST: Final = 100 * 1024  # above glibc's 64 kB that make a free look at the top, below any mmap

_CACHED_SIZES: Final = range(24, 1040, 16)
_CACHED_EACH: Final = 7
_CACHED_EACH_FROM_2_42: Final = 16

_JEMALLOC_ALL_ARENAS: Final = 4096  # MALLCTL_ARENAS_ALL


class Allocator:
    """What is loaded as `malloc`, and how it gives memory back.

    Attributes:
        name: ``glibc``, ``jemalloc``, ``mimalloc``, ``tcmalloc``, ``macos``, ``windows`` or
            ``other``.
        method: The call that gives memory back, for receipts; it says so where there is none.
        tell_threads: Has the threads that run native code and are idle `empty_thread_cache`.
    """

    def __init__(self, library: ctypes.CDLL | None = None) -> None:
        self.tell_threads: Callable[[], None] = lambda: None
        self._library = _process_library() if library is None else library
        self.name, self.method, self._give_back = _recognise(self._library)
        self.forget()
        if self.name == "glibc":
            self._library.malloc.restype = ctypes.c_void_p
            self._library.malloc.argtypes = [ctypes.c_size_t]
            self._library.free.restype = None
            self._library.free.argtypes = [ctypes.c_void_p]
            # For calls that take nanoseconds: these do not let go of Python's lock.
            quick = ctypes.PyDLL(None)
            quick.gnu_get_libc_version.restype = ctypes.c_char_p
            version = tuple(int(one) for one in quick.gnu_get_libc_version().split(b".")[:2])
            self._cached_each = _CACHED_EACH if version < (2, 42) else _CACHED_EACH_FROM_2_42
            self._malloc, self._free = quick.malloc, quick.free
            self._malloc.restype = ctypes.c_void_p
            self._malloc.argtypes = [ctypes.c_size_t]
            self._free.restype = None
            self._free.argtypes = [ctypes.c_void_p]

    def trim(self) -> str:
        """Give freed memory back to the operating system now; returns the method used."""
        if not settings.trim:
            return "none (settings.trim is off)"
        if own_thread.is_own:
            self.empty_thread_cache()
            if not own_thread.is_native:
                self.tell_threads()
        if self._ballasts:
            # Joins freed chunks to the tops, which else do not shrink: after runs of mixed shapes 0
            # to 65 MB stayed there, and with this at most 0.15.
            self._give_back()
        with self.shrinking():
            for thread in tuple(self._ballasts):
                self.drop_ballast(thread)
        if own_thread.is_native:
            self.hold_ballast(threading.get_ident())
        self._give_back()
        forget_working_memory()
        return self.method

    @contextlib.contextmanager
    def shrinking(self) -> Iterator[None]:
        """While inside, a large chunk that is freed shrinks the top of its arena."""
        if self.name != "glibc" or settings.malloc != "tuned" or not settings.trim:
            yield
            return
        with self._lock:
            self._shrinking += 1
            self._library.mallopt(_M_TRIM_THRESHOLD, _PAGE)
        try:
            yield
        finally:
            with self._lock:
                self._shrinking -= 1
                if not self._shrinking:
                    self._library.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_MAX)
                    self._library.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_MAX)

    @contextlib.contextmanager
    def small_pages(self) -> Iterator[None]:
        """While inside, numpy asks the system for no huge pages.

        It does for each array of 4 MB or more. An arena whose memory was once asked for so gets two
        megabytes for each page that is touched at its top, of which malloc knows a few kilobytes,
        and gives back no more.
        """
        numpy = sys.modules.get("numpy._core.multiarray") or sys.modules.get(
            "numpy.core.multiarray"
        )
        switch = getattr(numpy, "_set_madvise_hugepage", None)
        if switch is None or settings.malloc != "tuned":
            yield
            return
        with self._lock:
            if not self._small_pages:
                self._huge_pages = switch(False)
            self._small_pages += 1
        try:
            yield
        finally:
            with self._lock:
                self._small_pages -= 1
                if not self._small_pages:
                    switch(self._huge_pages)

    def forget(self) -> None:
        """In a forked child: the threads that had ballasts are not here."""
        self._ballasts: dict[int, int] = {}
        self._lock = threading.RLock()  # a finalizer on its holder may reclaim
        self._shrinking = 0
        self._small_pages = 0
        self._huge_pages = True

    def hold_ballast(self, thread: int) -> None:
        """On a thread of Ebbtide's own, before a job: make its arena's top shrinkable.

        Args:
            thread: The thread's identity, the same at every call.
        """
        if thread in self._ballasts or self.name != "glibc" or settings.malloc != "tuned":
            return
        self.empty_thread_cache()
        chunk = self._library.malloc(_BALLAST)
        if chunk:
            self._ballasts[thread] = chunk

    def empty_thread_cache(self) -> None:
        """Give back the small freed chunks that this thread keeps for itself, in 1 ms.

        glibc keeps some of each size for the thread that freed them, where no trim finds them. They
        lie wherever a model lay, and each keeps a page there. So take them all out, put others in
        their place that lie together, and free the first: their place being taken, they go back to
        their arenas.
        """
        if self.name != "glibc" or settings.malloc != "tuned":
            return
        malloc, free = self._malloc, self._free
        for size in _CACHED_SIZES:
            kept = [malloc(size) for _ in range(self._cached_each)]
            others = [malloc(size) for _ in range(self._cached_each)]
            for chunk in (*others, *kept):
                free(chunk)

    def drop_ballast(self, thread: int) -> None:
        """Before the thread ends: free its chunk."""
        chunk = self._ballasts.pop(thread, None)
        if chunk is not None:
            self._library.free(chunk)


def _process_library() -> ctypes.CDLL:
    return ctypes.CDLL("msvcrt") if sys.platform == "win32" else ctypes.CDLL(None)


def _recognise(library: ctypes.CDLL) -> tuple[str, str, Callable[[], None]]:
    """Which allocator answers `malloc`: one loaded in front of libc's is seen first."""
    if hasattr(library, "mallctl"):
        mallctl = library.mallctl
        purge = f"arena.{_JEMALLOC_ALL_ARENAS}.purge".encode()

        def purge_jemalloc() -> None:
            mallctl(b"thread.tcache.flush", None, None, None, 0)
            mallctl(purge, None, None, None, 0)

        return "jemalloc", "jemalloc arena.purge", purge_jemalloc
    if hasattr(library, "mi_collect"):
        return "mimalloc", "mi_collect", lambda: library.mi_collect(True)
    if hasattr(library, "MallocExtension_ReleaseFreeMemory"):
        release = library.MallocExtension_ReleaseFreeMemory
        return "tcmalloc", "MallocExtension_ReleaseFreeMemory", lambda: release()
    if hasattr(library, "malloc_trim") and hasattr(library, "mallopt"):
        return "glibc", "malloc_trim", lambda: library.malloc_trim(0)
    if sys.platform == "darwin" and hasattr(library, "malloc_zone_pressure_relief"):
        relief = library.malloc_zone_pressure_relief
        return (
            "macos",
            "malloc_zone_pressure_relief",
            lambda: relief(ctypes.c_void_p(), ctypes.c_size_t(0)),
        )
    if sys.platform == "win32" and hasattr(library, "_heapmin"):
        return "windows", "_heapmin", lambda: library._heapmin()
    return "other", "none (this C library has no call to give memory back)", lambda: None


allocator = Allocator()
on_fork(allocator.forget)
