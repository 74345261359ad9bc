"""Raw files of interactions, in the layouts their owners publish: MovieLens-1M, and KGAT's Amazon-Book.

Both are read from a folder or from the zip as downloaded.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fgrpo_jax.data.datasets import DataError, one_line
from fgrpo_jax.data.raw_files import find_one, open_raw

# In the order of MovieLens's README.
GENRES = (
    "Action|Adventure|Animation|Children's|Comedy|Crime|Documentary|Drama|Fantasy|Film-Noir|Horror|Musical|"
    "Mystery|Romance|Sci-Fi|Thriller|War|Western"
).split("|")


class Interactions(NamedTuple):
    """sequences: items of each user, oldest first, none twice. texts: of every item. topics: of every item, or {}."""

    sequences: dict[str, list[str]]
    texts: dict[str, str]
    topics: dict[str, int]


def find_files(folder: Path, names: tuple[str, ...], zips: str) -> dict[str, Path]:
    """{name: file} where the folder, or one below, holds all of `names`; else {"zip": the zip whose name starts so}.

    {} when neither is there. Raises DataError where there are several that differ.
    """
    found = {name: find_one(folder, name.__eq__) for name in names}
    if all(found.values()):
        return found
    archive = find_one(folder, lambda name: name.startswith(zips) and name.endswith(".zip"))
    return {"zip": archive} if archive else {}


def lines_of(files: dict[str, Path], name: str, encoding: str) -> Iterator[tuple[str, str]]:
    """Where each line stands, for error messages, and the line. Raises DataError for what cannot be read."""
    with _opened(files, name) as (where, file):
        for number, line in enumerate(file, 1):
            try:
                yield f"{where}, line {number}", line.decode(encoding).rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(f"{where}, line {number}: not {encoding} ({error.reason})") from error


@contextlib.contextmanager
def _opened(files: dict[str, Path], name: str) -> Iterator[tuple[str, Any]]:
    if name in files:
        with open_raw(files[name]) as file:
            yield str(files[name]), file
        return
    path = files["zip"]
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.namelist() if member.rsplit("/", 1)[-1] == name]
            if len(members) != 1:
                raise DataError(f"{path} holds {len(members)} files called {name}, not one: download it again")
            with archive.open(members[0]) as file:
                yield f"{path}, {members[0]}", file
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise DataError(f"{path} is damaged or not a zip file ({error}): download it again") from error


# ---------------------------------------------------------------------- MovieLens-1M

MOVIELENS = ("ratings.dat", "movies.dat")


def read_movielens(files: dict[str, Path]) -> Interactions:
    """Every rating is an interaction, whatever its stars; equal timestamps stay in the order of the file.

    Topic: the first genre. Raises DataError naming file and line for what is malformed, a movie or
    a genre that is not listed, a title or a pair of user and movie that occurs twice.
    """
    texts, topics, titles = {}, {}, set()
    for where, line in lines_of(files, "movies.dat", "latin-1"):
        fields = line.split("::")
        genre = fields[-1].split("|")[0]
        title = one_line(fields[1]) if len(fields) == 3 else ""
        if not title or title in titles or fields[0] in texts or genre not in GENRES:
            raise DataError(
                f"{where}: expected `MovieID::Title (Year)::Genre|...`, an id and a title not used before and a genre "
                f"of MovieLens, found {line!r}"
            )
        texts[fields[0]], topics[fields[0]] = title, GENRES.index(genre)
        titles.add(title)
    rated: dict[str, dict[str, int]] = {}
    for where, line in lines_of(files, "ratings.dat", "latin-1"):
        fields = line.split("::")
        if len(fields) != 4 or not fields[3].isdecimal():
            raise DataError(f"{where}: expected `UserID::MovieID::Rating::Timestamp`, found {line!r}")
        user, movie, _, time = fields
        if movie not in texts:
            raise DataError(f"{where}: movie {movie!r} is not in movies.dat: the two files do not belong together")
        if movie in rated.setdefault(user, {}):
            raise DataError(f"{where}: user {user!r} rated movie {movie!r} before")
        rated[user][movie] = int(time)
    return Interactions({user: sorted(times, key=times.get) for user, times in rated.items()}, texts, topics)


# ---------------------------------------------------------------------- KGAT's form

KGAT = ("train.txt", "test.txt", "item_list.txt")


def read_kgat(files: dict[str, Path]) -> Interactions:
    """Items of a user in the order of train.txt and then of test.txt; texts are the original ids (ASINs).

    Raises DataError naming file and line for what is malformed, an item that item_list.txt lacks, a user
    with two lines in a file, and an item that a user has twice.
    """
    texts = {}
    for number, (where, line) in enumerate(lines_of(files, "item_list.txt", "utf-8")):
        fields = line.split()
        if number and (len(fields) < 2 or fields[1] in texts):
            raise DataError(f"{where}: expected `org_id remap_id ...` with a remap_id not used before, found {line!r}")
        if number:
            texts[fields[1]] = fields[0]
    if len(set(texts.values())) != len(texts):
        raise DataError(f"{where}: an org_id occurs twice above")
    sequences: dict[str, list[str]] = {}
    for name in KGAT[:2]:
        seen = set()
        for where, line in lines_of(files, name, "utf-8"):
            user, *items = line.split() or [""]
            taken = sequences.setdefault(user, [])
            if unknown := [item for item in items if item not in texts]:
                raise DataError(
                    f"{where}: item {unknown[0]!r} is not in item_list.txt: the files do not belong together"
                )
            if not user or user in seen or len(set(items) | set(taken)) != len(items) + len(taken):
                raise DataError(
                    f"{where}: expected `user item item ...`, user and items not used before: {line[:80]!r}"
                )
            seen.add(user)
            taken += items
    return Interactions(sequences, texts, {})
