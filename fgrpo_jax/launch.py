"""How a program starts, before anything is imported that allocates."""

from __future__ import annotations

import os
import sys

_TUNABLES = "GLIBC_TUNABLES"


def prefer_huge_pages() -> None:
    """Start this program again with huge pages for large allocations (Linux, GNU libc).

    On CPU, XLA takes fresh memory for the temporaries of every step, and the first touch of
    each 4 kB page goes through the kernel: 5 to 15 % of an update. With 2 MB pages it hardly
    shows. The C library reads the setting when a process starts, so the program is executed
    once more, same process id, same arguments. Does nothing elsewhere, and where the
    environment sets GLIBC_TUNABLES already (GLIBC_TUNABLES= turns it off).
    """
    if sys.platform != "linux" or _TUNABLES in os.environ:
        return
    os.environ[_TUNABLES] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
