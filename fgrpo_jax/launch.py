"""Memory of a process that computes on the CPU."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of mallopt, from the C library's malloc.h


def keep_memory() -> bool:
    """Let this process keep what memory it has taken until it ends; whether it will.

    XLA CPU takes a step's temporaries from malloc, which by default returns large blocks to the
    kernel as soon as they are freed: every step then pays for its page faults again (README,
    Speed). Here malloc takes blocks of all sizes from the heap and gives none of it back. Only
    the main thread's heap can hold blocks of any size, so XLA also runs its programs on the thread
    that calls them: the host no longer prepares a batch while a step is under way. With several
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
    return bool(libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, -1))
