"""Files that are there whole or not at all, and one line for what the file system refuses."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fgrpo_jax.config import ConfigError
from fgrpo_jax.errors import UserError

_NUMBERS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT,
    errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN,
)  # fmt: skip


class StorageError(UserError, OSError):
    """Something could not be written; the message says what, why, and what to do."""


@contextlib.contextmanager
def storing(what: Path | str, *kinds: type[Exception]) -> Iterator[None]:
    """Inside, what the file system refuses is raised as a StorageError that names `what`.

    kinds: besides OSError, of libraries that raise their own with the system's words in the text;
    without them an error is something else, and stays what it is.
    """
    try:
        yield
    except StorageError:
        raise
    except (OSError, *kinds) as error:
        if not (isinstance(error, OSError) or _words(error)):
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


def check_writable(folder: Path) -> None:
    """Make a folder, unless it is there, and try whether files can be. Raises StorageError."""
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def write_atomically(path: Path, content: str | bytes) -> None:
    """The file is there whole or not at all, also when the process is killed. Raises StorageError."""
    partial = partial_of(path)
    with storing(path):
        try:
            partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
            os.replace(partial, path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def read_json(path: Path, names: Iterable[str] = ()) -> dict[str, Any]:
    """A JSON object that a run wrote. Raises ConfigError where it is damaged, or has not all these names."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of json, and of a text that is no UTF-8
        raise ConfigError(f"{path} is damaged ({error}): copy it again from where the run was made") from None
    if missing := [name for name in names if not isinstance(value, dict) or name not in value]:
        raise ConfigError(f"{path} is damaged (it holds no {missing[0]!r}): copy it again from where the run was made")
    return value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, `{"stage", "step", name: number, ...}` each, in file order; none where there is no file.

    A last line without its end is being written, or was when the run was killed, and is left out.
    Raises ConfigError, naming the line, where any other line is not such a row.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.is_file() else (), 1):
        try:
            row = json.loads(line.decode("utf-8"))
            fits = _is_row(row)
        except ValueError:  # of json, and of a text that is no UTF-8
            fits = False
        if not fits:
            raise ConfigError(
                f"{path}, line {number}, is not a row of metrics: {line[:60]!r}; copy the file again from where the "
                "run was made, or remove the line"
            )
        rows.append(row)
    return rows


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or type(row.get("step")) is not int or not isinstance(row.get("stage"), str):
        return False
    return all(type(value) in (int, float) for name, value in row.items() if name != "stage")


def partial_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")
