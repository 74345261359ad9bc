"""The raw files of data sets: found in a folder, opened plain or as .gz, and known by their content."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fgrpo_jax.config import DataConfig
from fgrpo_jax.data.datasets import DataError


def sha256(path: Path) -> str:
    """Of the content, decompressed: a file and its .gz are the same raw file."""
    digest = hashlib.sha256()
    with open_raw(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def open_raw(path: Path) -> Iterator[Any]:
    """A binary stream, decompressed where the name ends in .gz.

    Raises DataError, here or while it is read, for a .gz that is no gzip file, ends early or is
    damaged, and for what the file system refuses.
    """
    opened = gzip.open if path.name.endswith(".gz") else open
    try:
        with opened(path, "rb") as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path} is truncated, damaged or not compressed ({error}): copy it again, or take .gz off the name "
            "of a plain file"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): restore it, or set data.manual_dir") from error


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and UTF-8 lines. Raises DataError on bytes that are not UTF-8."""
    with open_raw(path) as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, line {number}: not UTF-8 ({error.reason})") from error


def find_one(folder: Path, matches: Callable[[str], bool], deep: bool = True) -> Path | None:
    """The one file in `folder` (deep: or below) whose name without .gz matches.

    None when there is none. Several with the same content count as one; raises DataError
    when they differ.
    """
    paths = folder.rglob("*") if deep else folder.glob("*")
    found = sorted(p for p in paths if p.is_file() and matches(p.name.removesuffix(".gz")))
    if len(found) > 1 and len({sha256(p) for p in found}) > 1:
        names = ", ".join(str(p) for p in found)
        raise DataError(f"several different files for the same thing: {names}; leave only one")
    return found[0] if found else None


def find_splits(
    folder: Path | None,
    needed: str,
    names: Mapping[str, Callable[[str], bool]],
    usable: Callable[[str, Path], bool] = lambda split, path: True,
) -> dict[str, Path]:
    """The raw file of every split that has one, by what their names match (`find_one`).

    needed: the files in words. Raises DataError where there is none that is usable.
    """
    folder = manual_folder(folder, needed)
    paths = {split: find_one(folder, matches) for split, matches in names.items()}
    found = {split: path for split, path in paths.items() if path and usable(split, path)}
    if not found:
        raise DataError(f"{folder} and its sub-folders hold no usable file; expected {needed}")
    return found


def folder_of(config: DataConfig) -> Path | None:
    return Path(config.manual_dir).expanduser() if config.manual_dir else None


def manual_folder(folder: Path | None, needed: str) -> Path:
    """The folder of raw files. Raises DataError when it is not given or not there."""
    if folder is None:
        raise DataError(f"data.manual_dir is not set; it must hold {needed}")
    if not folder.is_dir():
        raise DataError(f"data.manual_dir={folder} is not a folder; it must hold {needed}")
    return folder
