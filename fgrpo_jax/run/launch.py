"""Memory of a process that computes on the CPU."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of mallopt, from the C library's malloc.h
_HUGEPAGE, _HUGE = 14, 2**21  # for madvise, from the kernel's mman.h; bytes of a large page


def keep_memory() -> bool:
    """Let this process keep what memory it has taken until it ends; whether it will.

    XLA CPU takes a step's temporaries from malloc, which by default returns large blocks to the
    kernel as soon as they are freed: every step then pays for its page faults again
    (bench/README.md, Memory). Here malloc takes blocks of all sizes from the heap and gives none of it back, and the
    heap lies in 2 MB pages (transparent huge pages at `madvise` or `always`). Only
    the main thread's heap can hold blocks of any size, so XLA also runs its programs on the thread
    that calls them: no batch is prepared while a step is under way, unless by another thread (ahead.py). With several
    devices in a process XLA uses other threads all the same, and memory is kept in part.

    Nothing happens where JAX computes elsewhere, or malloc is not that of the GNU C library on
    Linux. To be called once, before anything large is made; it looks for JAX's devices.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)  # read when JAX looks for devices
    if sys.platform != "linux" or jax.default_backend() != "cpu":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    # 0: no block of its own for a large allocation; -1: the heap is never trimmed.
    kept = bool(libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, -1))
    _ask_for_large_pages(libc)
    return kept


def _ask_for_large_pages(libc: ctypes.CDLL) -> None:
    """Have the kernel back the heap to come with 2 MB pages: with small ones a default step takes 5 % longer.

    The heap grows by addresses for half of the machine's memory, which takes none of it.
    """
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if block := libc.malloc(size):  # where so many addresses are not to be had, pages stay small
        libc.madvise(-(-block // _HUGE) * _HUGE, size - _HUGE, _HUGEPAGE)
        libc.free(block)
