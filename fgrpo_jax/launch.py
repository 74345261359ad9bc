"""How a program starts."""

from __future__ import annotations

import glob
import os
import sys

_TUNABLES = "GLIBC_TUNABLES"
_DEVICES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")  # NVIDIA, AMD, twice TPU
_HOSTS = {"pdb", "debugpy", "pydevd", "IPython"}
# 2 MB pages; large blocks on the heap too; the heap is never given back while the program runs.
_SETTING = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776"


def keep_memory() -> None:
    """Start this program again so that it keeps its memory from step to step (CPU, Linux, GNU libc).

    XLA CPU takes a step's temporaries from malloc, which returns large blocks to the kernel as
    soon as they are freed: every step pays for page faults again (README, Speed). Kept, in 2 MB
    pages, they cost nothing after the first steps.

    That takes two things. The C library (2 MB pages need glibc 2.35) reads its setting when a
    process starts, so the program is executed once more, same process id, same arguments; its
    child processes do not inherit it. And only the heap of the main thread can hold blocks of any
    size, so XLA runs its programs on the thread that calls them instead of handing them to
    another: the host no longer prepares a batch while a step is under way. With several devices
    in a process XLA uses other threads all the same, and memory is kept in part.

    Not where JAX_PLATFORMS or /dev announce an accelerator, under a debugger or in a notebook,
    which would start again too, or where the environment sets GLIBC_TUNABLES (GLIBC_TUNABLES=
    turns it off). To be called before JAX looks for devices.
    """
    if os.environ.get(_TUNABLES) == _SETTING:  # started again
        del os.environ[_TUNABLES]
        import jax  # not before the second start: the first shall cost nothing

        jax.config.update("jax_cpu_enable_async_dispatch", False)
        return
    if sys.platform != "linux" or _TUNABLES in os.environ or _has_accelerator() or not _is_plain():
        return
    os.environ[_TUNABLES] = _SETTING
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
