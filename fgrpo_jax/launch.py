"""How a program starts."""

from __future__ import annotations

import glob
import os
import sys

_TUNABLES = "GLIBC_TUNABLES"
_DEVICES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")  # NVIDIA, AMD, twice TPU
_HOSTS = {"pdb", "debugpy", "pydevd", "IPython"}
_SETTING = "glibc.malloc.hugetlb=1"


def prefer_huge_pages() -> None:
    """Start this program again with huge pages for large allocations (CPU, Linux, GNU libc).

    XLA CPU takes fresh memory for the temporaries of every step, and the first touch of each 4 kB
    page goes through the kernel (what that costs: README, Speed). With 2 MB pages it hardly shows.

    The C library (from glibc 2.35) reads the setting when a process starts, so the program is
    executed once more, same process id, same arguments; its child processes do not inherit it.
    Not where JAX_PLATFORMS or /dev announce an accelerator, under a debugger or in a notebook,
    which would start again too, or where the environment sets GLIBC_TUNABLES (GLIBC_TUNABLES=
    turns it off).
    """
    if os.environ.get(_TUNABLES) == _SETTING:
        del os.environ[_TUNABLES]  # started again
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
