"""How a program starts."""

from __future__ import annotations

import os
import sys

_TUNABLES = "GLIBC_TUNABLES"
_MALLOC = {
    "hugetlb": 1,  # 2 MB pages (madvise), from glibc 2.35
    "mmap_max": 0,  # large allocations too come from the heap, ...
    "trim_threshold": 2**40,  # ... which gives nothing back, ...
    "arena_max": 1,  # ... and all threads, XLA's own among them, use it: other arenas end at 64 MB
}


def tune_malloc() -> None:
    """Start this program again with memory that is kept from step to step (Linux, GNU libc).

    On CPU, XLA allocates the temporaries of every step anew. By default malloc takes them from
    the kernel, a page fault for every 4 kB, and gives them back afterwards: a tenth of a training
    step, more where a virtual machine hands free memory on to its host (README, Speed). Kept in
    2 MB pages they cost no fault at all; the process then stays as large as it ever was.
    The C library reads the settings when a process starts, so the program is executed once
    more, same process id, same arguments. Not under a debugger or in a notebook, which would
    start again too, and not where the environment sets GLIBC_TUNABLES (GLIBC_TUNABLES= turns
    it off).
    """
    if sys.platform != "linux" or _TUNABLES in os.environ or not _is_plain():
        return
    os.environ[_TUNABLES] = ":".join(f"glibc.malloc.{name}={value}" for name, value in _MALLOC.items())
    try:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    except OSError:  # it is only about speed
        del os.environ[_TUNABLES]


def _is_plain() -> bool:
    """Whether the command line that started Python is this program's own and nobody watches it."""
    hosts = {"pdb", "debugpy", "IPython"} & set(sys.modules)
    script, arguments = sys.argv[0], sys.argv[1:]
    own = script in sys.orig_argv or "-m" in sys.orig_argv
    ours = sys.orig_argv[len(sys.orig_argv) - len(arguments) :] == arguments
    return own and ours and not hosts and not sys.gettrace() and bool(sys.executable)
