"""Files that are there whole or not at all, here or at an address, and one line for what a write is refused for.

An address (gs://bucket/…) is an epath.Path, which reads, writes and lists as a pathlib.Path does. It is a store of
objects, not a file system: an object appears whole, by one request; a folder is there once something lies in it, and
nothing can be renamed or appended to. What differs for that reason is here, and in `run.checkpoint`.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import json
import os
import posixpath
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from fgrpo_jax.config import ConfigError
from fgrpo_jax.errors import UserError

_NUMBERS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT,
    errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN,
)  # fmt: skip
_SCHEME = "gs://"
_LIBRARIES = ("gcsfs", "aiohttp", "google", "requests")  # which raise kinds of their own
_STATUS = re.compile(r"(PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|NOT_FOUND)\b")  # of TensorStore
TRIAL = ".trial"  # what check_writable writes at an address


# --------------------------------------------------------------------- paths and addresses


def is_address(path: Path | str) -> bool:
    return str(path).startswith(_SCHEME)


def path_of(text: Path | str) -> Path:
    """What a configuration or a command line calls a file or folder: a pathlib.Path, or for gs://… an epath.Path."""
    if not is_address(text):
        return Path(text).expanduser()
    _list_anew()
    return epath.Path(text)


@functools.cache
def _list_anew() -> None:
    """Without this gcsfs never lists a folder twice, and does not see what Orbax and other hosts wrote."""
    import fsspec.config

    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False


def resolved(path: Path) -> Path:
    """The path from the root on; an address as it is."""
    return path if is_address(path) else path.resolve()


def relative(path: Path, folder: Path) -> str:
    """Where `path` lies, seen from `folder`; as it is where only one of them is an address. `follow` goes back."""
    if is_address(path) != is_address(folder):
        return str(resolved(path))
    return os.path.relpath(*(str(resolved(p)).replace(_SCHEME, "/", 1) for p in (path, folder)))


def follow(folder: Path, place: str) -> Path:
    """The inverse of `relative`."""
    if is_address(place) or not is_address(folder):
        return path_of(place) if is_address(place) else (folder / place).resolve()
    joined = posixpath.normpath(posixpath.join(str(folder).replace(_SCHEME, "/", 1), place))
    return Path(place) if posixpath.isabs(place) else path_of(_SCHEME + joined.lstrip("/"))


def check_reachable(path: Path) -> None:
    """Raises ConfigError for an address that cannot be asked whether there is something."""
    if not is_address(path):
        return
    try:
        path.exists()
    except Exception as error:  # of several libraries
        raise ConfigError(
            f"{path} cannot be reached ({reason(error)}): addresses need `pip install gcsfs`, a bucket that is there, "
            "and credentials (gcloud auth application-default login)"
        ) from error


# --------------------------------------------------------------------- writing


class StorageError(UserError, OSError):
    """Something could not be written; the message says what, why, and what to do."""


@contextlib.contextmanager
def storing(what: Path | str, *kinds: type[Exception]) -> Iterator[None]:
    """Inside, what the file system refuses is raised as a StorageError that names `what`.

    kinds: besides OSError, of libraries that raise their own with the system's words in the text, or at an
    address those of its store; without them an error is something else, and stays what it is.
    """
    try:
        yield
    except StorageError:
        raise
    except (OSError, *kinds) as error:
        if not (isinstance(error, OSError) or _words(error) or (is_address(what) and _of_store(error))):
            raise
        raise StorageError(
            f"{what} could not be written ({reason(error)}): what was complete before is whole; mend it, and "
            "give the same command again"
        ) from error


def reason(error: Exception) -> str:
    """In the system's words where they are known, otherwise the first line of the error."""
    return _words(error) or str(error).split("\n")[0] or type(error).__name__


def _words(error: Exception) -> str:
    return next((words for words in map(os.strerror, _NUMBERS) if words in str(error)), "")


def _of_store(error: Exception) -> bool:
    return type(error).__module__.split(".")[0] in _LIBRARIES or bool(_STATUS.search(str(error)))


def check_writable(folder: Path) -> None:
    """Make a folder, unless it is there, and try whether files can be. Raises StorageError."""
    with storing(folder, Exception):
        if is_address(folder):
            (folder / TRIAL).write_bytes(b"")
            (folder / TRIAL).unlink()
            return
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def write_atomically(path: Path, content: str | bytes) -> None:
    """The file is there whole or not at all, also when the process is killed. Raises StorageError."""
    content = content.encode("utf-8") if isinstance(content, str) else content
    partial = partial_of(path)
    with storing(path, Exception):
        if is_address(path):
            path.write_bytes(content)
            return
        try:
            partial.write_bytes(content)
            os.replace(partial, path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def append(path: Path, text: str) -> None:
    """Add to the end of a file; an object at an address is written anew. Raises StorageError."""
    with storing(path, Exception):
        if is_address(path):
            path.write_bytes((path.read_bytes() if path.exists() else b"") + text.encode("utf-8"))
            return
        with path.open("a", encoding="utf-8") as file:
            file.write(text)


def read_json(path: Path, names: Iterable[str] = ()) -> dict[str, Any]:
    """A JSON object that a run wrote. Raises ConfigError where it is damaged, or has not all these names."""
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except ValueError as error:  # of json, and of a text that is no UTF-8
        raise ConfigError(f"{path} is damaged ({error}): copy it again from where the run was made") from None
    if missing := [name for name in names if not isinstance(value, dict) or name not in value]:
        raise ConfigError(f"{path} is damaged (it holds no {missing[0]!r}): copy it again from where the run was made")
    return value


def is_of_a_step(row: Any) -> bool:
    """Whether it is `{"stage", "step", ...}`, as a row of samples.jsonl."""
    return isinstance(row, dict) and type(row.get("step")) is int and isinstance(row.get("stage"), str)


def is_metrics(row: Any) -> bool:
    """Whether it is `{"stage", "step", name: number, ...}`, as a row of metrics.jsonl."""
    return is_of_a_step(row) and all(type(value) in (int, float) for name, value in row.items() if name != "stage")


def read_rows(path: Path, is_row: Callable[[Any], bool] = is_metrics) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl or samples.jsonl, in file order; none where there is no file.

    A last line without its end is being written, or was when the run was killed, and is left out.
    Raises ConfigError, naming the line, where any other line is not such a row.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.is_file() else (), 1):
        try:
            row = json.loads(line.decode("utf-8"))
            fits = is_row(row)
        except ValueError:  # of json, and of a text that is no UTF-8
            fits = False
        if not fits:
            raise ConfigError(
                f"{path}, line {number}, is not a row of {path.stem}: {line[:60]!r}; copy the file again from where "
                "the run was made, or remove the line"
            )
        rows.append(row)
    return rows


def partial_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


# --------------------------------------------------------------------- folders at an address


@contextlib.contextmanager
def local_copy(folder: Path) -> Iterator[Path]:
    """The folder, for libraries that read no address: a copy of it that is gone afterwards, or itself."""
    if not is_address(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as here:
        fetch(folder, Path(here, folder.name))
        yield Path(here, folder.name)


def scratch() -> Path:
    """A folder that is gone when the process ends."""
    folder = tempfile.mkdtemp(prefix="fgrpo_jax-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def fetch(folder: Path, target: Path) -> None:
    """Copy all below a folder, from an address."""
    target.mkdir(parents=True)
    for path in folder.iterdir():
        if path.is_dir():
            fetch(path, target / path.name)
        else:
            with path.open("rb") as source, (target / path.name).open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)


def send(folder: Path, target: Path, last: str) -> None:
    """Copy all below a folder to an address; the file `last` of it comes last, and tells that the others are there.

    Raises StorageError.
    """
    paths = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: (p == folder / last, p))
    for path in paths:
        with storing(target, Exception), path.open("rb") as source:
            with (target / path.relative_to(folder).as_posix()).open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)


def is_whole(folder: Path, last: str) -> bool:
    """Whether a folder is there that appeared by one rename or, at an address, by `send`."""
    return (folder / last).exists() if is_address(folder) else folder.is_dir()
