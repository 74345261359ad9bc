"""The memory that this machine has for the process: what is available, and no more than its control groups leave it.

A container, a batch job or a service has a limit of its own, beyond which it is killed, whatever the machine has
(https://docs.kernel.org/admin-guide/cgroup-v2.html).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class _Files(NamedTuple):
    """How a version of control groups calls a limit, what is used of it, and in memory.stat what of that is a mere
    cache of files, which the kernel gives up."""

    limit: str
    usage: str
    cached: str


_FIRST = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_SECOND = _Files("memory.max", "memory.current", "inactive_file")


def available(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes; None where the system does not say."""
    try:
        rows = (line.split(":") for line in (proc / "meminfo").read_text().splitlines())
        found = [1024 * int(value.split()[0]) for name, value in rows if name == "MemAvailable"]
    except OSError:
        return None
    return min([*found, *_left(proc, groups)], default=None)


def _left(proc: Path, groups: Path) -> Iterator[int]:
    """What every control group of this process that has a limit leaves it: those around it limit it as well."""
    for folder, names in _own(proc, groups):
        for group in (folder, *folder.parents):
            if group.is_relative_to(groups) and (left := _left_of(group, names)) is not None:
                yield left


def _left_of(group: Path, names: _Files) -> int | None:
    """None without a limit: of the outermost group, and of those outside a container, which are not seen in it."""
    try:
        limit, used = ((group / name).read_text().strip() for name in (names.limit, names.usage))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    return None if limit == "max" else max(0, int(limit) - int(used) + int(stat.get(names.cached, 0)))


def _own(proc: Path, groups: Path) -> Iterator[tuple[Path, _Files]]:
    """The innermost control groups of this process that limit memory."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield groups / path.lstrip("/"), _SECOND
        elif "memory" in controllers.split(","):
            yield groups / "memory" / path.lstrip("/"), _FIRST
