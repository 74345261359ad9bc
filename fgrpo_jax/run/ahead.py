"""What the host prepares while the devices compute."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The next item is made by another thread while one is used: programs run without Python's lock.

    They stay on the main thread, because only its heap keeps the memory of one for the next (launch.py).
    An item may not be None.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item
