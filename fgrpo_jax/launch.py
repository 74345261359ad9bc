"""How a program starts."""

from __future__ import annotations

import glob
import os
import sys

_TUNABLES = "GLIBC_TUNABLES"
_DEVICES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")  # NVIDIA, AMD, twice TPU
_HOSTS = {"pdb", "debugpy", "pydevd", "IPython"}
_MALLOC = {
    "hugetlb": 1,  # 2 MB pages (madvise), from glibc 2.35
    "mmap_max": 0,  # large allocations too come from the heap, ...
    "trim_threshold": 2**40,  # ... which gives nothing back, ...
    "arena_max": 1,  # ... and all threads, XLA's own among them, use it: other arenas end at 64 MB
}


def tune_malloc() -> None:
    """Start this program again with memory that is kept from step to step (CPU, Linux, GNU libc).

    XLA CPU allocates the temporaries of every step anew. By default malloc takes them from the
    kernel, a page fault for every 4 kB, and gives them back afterwards (what that costs: README,
    Speed). Kept, in 2 MB pages, they cost no fault. The price: the process stays as large as it ever
    was, and free blocks between others may make it larger than it need be.

    The C library reads the settings when a process starts, so the program is executed once more,
    same process id, same arguments; its child processes do not inherit them. Not where
    JAX_PLATFORMS or /dev announce an accelerator, under a debugger or in a notebook, which would
    start again too, or where the environment sets GLIBC_TUNABLES (GLIBC_TUNABLES= turns it off).
    """
    setting = ":".join(f"glibc.malloc.{name}={value}" for name, value in _MALLOC.items())
    if os.environ.get(_TUNABLES) == setting:
        del os.environ[_TUNABLES]  # started again
        return
    if sys.platform != "linux" or _TUNABLES in os.environ or _has_accelerator() or not _is_plain():
        return
    os.environ[_TUNABLES] = setting
    try:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    except OSError:  # it is only about speed
        del os.environ[_TUNABLES]


def _has_accelerator() -> bool:
    """Whether JAX will not compute on the CPU, as far as one sees without starting it."""
    wanted = os.environ.get("JAX_PLATFORMS")
    return wanted.split(",")[0] != "cpu" if wanted else any(glob.glob(path) for path in _DEVICES)


def _is_plain() -> bool:
    """Whether the command line that started Python is this program's own and nobody watches it."""
    script, arguments, given = sys.argv[0], sys.argv[1:], sys.orig_argv
    spec = sys.modules["__main__"].__spec__  # of what `python -m` runs; scripts have none
    if spec:
        own = "-m" in given and given[given.index("-m") + 1] in (spec.name, spec.parent)
    else:
        own = script in given and script != "-" and "-m" not in given[: given.index(script)]
    ours = given[len(given) - len(arguments) :] == arguments
    watched = sys.gettrace() or not _HOSTS.isdisjoint(sys.modules)
    return own and ours and not watched and bool(sys.executable)
