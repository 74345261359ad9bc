"""How a program starts."""

from __future__ import annotations

import os
import sys

_TUNABLES = "GLIBC_TUNABLES"


def prefer_huge_pages() -> None:
    """Start this program again with huge pages for large allocations (Linux, GNU libc).

    On CPU, XLA takes fresh memory for the temporaries of every step, and the first touch of
    each 4 kB page goes through the kernel: 7 % of W1's update (bench), 12 % of the default's. With 2 MB pages it hardly
    shows. The C library (from glibc 2.35) reads the setting when a process starts, so the
    program is executed once more, same process id, same arguments. Not under a debugger or in a
    notebook, which would start again too, and not where the environment sets GLIBC_TUNABLES
    (GLIBC_TUNABLES= turns it off).
    """
    if sys.platform != "linux" or _TUNABLES in os.environ or not _is_plain():
        return
    os.environ[_TUNABLES] = "glibc.malloc.hugetlb=1"
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
