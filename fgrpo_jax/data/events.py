"""Interactions out of tables: read, checked, in order of time; what was found is noted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fgrpo_jax.config import InteractionsConfig
from fgrpo_jax.data import tables
from fgrpo_jax.data.datasets import DataError, Item, Note, one_line
from fgrpo_jax.data.jsonl import GAIN_MAX
from fgrpo_jax.data.retriever import core

_OPTION = "data.interactions."


class Events(NamedTuple):
    """users: ids. items: those that occur, in the order of their table. Of every user, oldest first and no item
    twice: walks, item indices; times; gains. notes: what was found, and what was left out."""

    users: list[str]
    items: tuple[Item, ...]
    walks: list[np.ndarray]
    times: list[np.ndarray]
    gains: list[np.ndarray]
    notes: list[Note]


def read(interactions: Path, items: Path, c: InteractionsConfig) -> Events:
    """Raises DataError naming file, line and column for what cannot be used."""
    texts = read_items(items, c)
    raw = _read_rows(interactions, items, set(texts), c)
    notes = _time_notes(raw)
    kept = raw.sorted()
    kept, before = kept.where(kept.rating >= c.min_rating) if c.rating else kept, len(kept.time)
    if len(kept.time) < before:
        notes.append(_left_out(before - len(kept.time), before, f"rated below {_OPTION}min_rating={c.min_rating:g}"))
    first = kept.first_of_pairs()
    if repeats := len(kept.time) - int(first.sum()):
        notes.append(_left_out(repeats, len(kept.time), "an item that its user took before: the first time counts"))
    kept = kept.where(first)
    if c.kcore > 1:
        kept = _in_core(kept, c.kcore, notes)
    if not len(kept.time):
        raise DataError(f"{interactions}: no interaction is left: lower {_OPTION}kcore or {_OPTION}min_rating")
    return _by_user(kept, texts, c, notes)


def _left_out(count: int, of: int, why: str) -> Note:
    return Note("data", f"{count:,} of {of:,} interactions are left out: {why}")


# ---------------------------------------------------------------------- items


def read_items(path: Path, c: InteractionsConfig) -> dict[str, str]:
    """Text by id, in the order of the file. Raises DataError for an id or a text that occurs twice, or is empty."""
    asked = dict.fromkeys(c.text, f"{_OPTION}text") | {c.item_id: f"{_OPTION}item_id"}
    table = tables.read(path, asked)
    texts: dict[str, str] = {}
    owner: dict[str, str] = {}
    for row, raw in enumerate(table.columns[c.item_id]):
        item = tables.identifier(raw, table.where(row, c.item_id))
        if item in texts:
            raise DataError(f"{table.where(row)}: item {item!r} occurs twice: keep one of its rows")
        parts = [_text(table.columns[name][row], table.where(row, name)) for name in c.text]
        text = one_line(", ".join(part for part in parts if part))
        if not parts[0]:
            raise DataError(f"{table.where(row, c.text[0])}: item {item!r} has no text: write one, or remove the item")
        if (other := owner.setdefault(text, item)) != item:
            raise DataError(
                f"{table.where(row)}: items {other!r} and {item!r} have the same text {text!r}: a pool could not tell "
                f"them apart; add a column to {_OPTION}text that does, as the id"
            )
        texts[item] = text
    return texts


def _text(value: object, where: str) -> str:
    if value is not None and not isinstance(value, (str, int, float)) or isinstance(value, bool):
        raise DataError(f"{where}: {value!r} is no text")
    return "" if value is None else str(value).strip()


# ---------------------------------------------------------------------- rows


class _Rows(NamedTuple):
    """As columns: number of the user and of the item, seconds or whatever unit, stars or nothing but ones."""

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    rating: np.ndarray
    users: list[str]
    items: list[str]

    def where(self, keep: np.ndarray) -> _Rows:
        columns = (self.user, self.item, self.time, self.rating)
        return _Rows(*(column[keep] for column in columns), self.users, self.items)

    def sorted(self) -> _Rows:
        """By user, then time; equal times in the order of the file."""
        return self.where(np.lexsort((self.time, self.user)))

    def first_of_pairs(self) -> np.ndarray:
        """For sorted rows, whether each is the first of its user and item."""
        pairs = self.user * len(self.items) + self.item
        first = np.zeros(len(pairs), bool)
        first[np.unique(pairs, return_index=True)[1]] = True
        return first


def _read_rows(path: Path, items_path: Path, known: set[str], c: InteractionsConfig) -> _Rows:
    names = {c.user: "user", c.item: "item", c.time: "time"} | ({c.rating: "rating"} if c.rating else {})
    table = tables.read(path, {name: _OPTION + option for name, option in names.items()})
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    columns: dict[str, list[float]] = {name: [] for name in ("user", "item", "time", "rating")}
    unknown: Counter[str] = Counter()
    place = ""  # of the first of these
    for row in range(len(table.rows)):
        user = tables.identifier(table.columns[c.user][row], table.where(row, c.user))
        item = tables.identifier(table.columns[c.item][row], table.where(row, c.item))
        if item not in known:
            place = place or table.where(row, c.item)
            unknown[item] += 1
        columns["user"].append(users.setdefault(user, len(users)))
        columns["item"].append(items.setdefault(item, len(items)))
        columns["time"].append(tables.moment(table.columns[c.time][row], table.where(row, c.time)))
        if c.rating:
            columns["rating"].append(_rating(table.columns[c.rating][row], table.where(row, c.rating), c))
    if unknown:
        first = next(iter(unknown))
        raise DataError(
            f"{place}: item {first!r} is not in {items_path} ({len(unknown):,} such items in "
            f"{unknown.total():,} rows): add it there, or remove its rows"
        )
    rating = np.array(columns["rating"]) if c.rating else np.ones(len(table.rows))
    numbers = np.array(columns["user"], np.int64), np.array(columns["item"], np.int64)
    return _Rows(*numbers, np.array(columns["time"]), rating, list(users), list(items))


def _rating(value: object, where: str, c: InteractionsConfig) -> float:
    found = tables.number(value, where)
    if c.gain == "rating" and found >= c.min_rating and not 0 < found <= GAIN_MAX:
        raise DataError(
            f"{where}: a rating of {found:g} cannot be a gain, which is above 0 and up to {GAIN_MAX:g}: raise "
            f"{_OPTION}min_rating, or set {_OPTION}gain to one"
        )
    return found


def _in_core(rows: _Rows, k: int, notes: list[Note]) -> _Rows:
    sequences: dict[int, list[int]] = {}
    for user, item in zip(rows.user.tolist(), rows.item.tolist()):
        sequences.setdefault(user, []).append(item)
    found = core(sequences, k)
    kept_items = {item for items in found.values() for item in items}
    keep = np.isin(rows.user, list(found)) & np.isin(rows.item, list(kept_items))
    if lost := int((~keep).sum()):
        why = f"outside of the core of {_OPTION}kcore={k} ({len(found):,} users, {len(kept_items):,} items)"
        notes.append(_left_out(lost, len(keep), why))
    return rows.where(keep)


def _by_user(rows: _Rows, texts: dict[str, str], c: InteractionsConfig, notes: list[Note]) -> Events:
    present = {rows.items[number] for number in np.unique(rows.item)}
    kept = [item for item in texts if item in present]
    if others := len(texts) - len(kept):
        text = f"{others:,} of {len(texts):,} items have no interaction left, and are no candidates"
        notes.append(Note("data", text))
    index = {item: number for number, item in enumerate(kept)}
    renumber = np.array([index.get(item, -1) for item in rows.items])
    ends = np.flatnonzero(np.diff(rows.user)) + 1
    users = [rows.users[rows.user[start]] for start in (0, *ends)]
    gains = rows.rating if c.gain == "rating" else np.ones(len(rows.rating))
    split = (np.split(column, ends) for column in (renumber[rows.item], rows.time, gains))
    return Events(users, tuple((item, texts[item]) for item in kept), *split, notes)


# ---------------------------------------------------------------------- time


def _time_notes(rows: _Rows) -> list[Note]:
    """What is doubtful about times: all equal, equal within a user, not in the order of the file."""
    notes = []
    if rows.time.min() == rows.time.max():
        same = f"all {len(rows.time):,} times are {rows.time[0]:.15g}"
        return [Note("time", f"{same}: the order of the file is taken for that of time, and nothing else supports it")]
    order = np.lexsort((rows.time, rows.user))
    user, time = rows.user[order], rows.time[order]
    mine = user[1:] == user[:-1]
    if ties := int((mine & (np.diff(time) == 0)).sum()):
        share = ties / mine.sum()
        constant = _constant_users(user, time)
        whole = f"; {constant:,} users have one time only" if constant else ""
        text = f"{ties:,} of {mine.sum():,} neighbours of a user ({share:.1%}) have equal times{whole}"
        notes.append(Note("time", f"{text}: they stay in the order of the file"))
    in_file = np.argsort(rows.user, kind="stable")
    backwards = (np.diff(rows.user[in_file]) == 0) & (np.diff(rows.time[in_file]) < 0)
    if backwards.any():
        count = len(np.unique(rows.user[in_file][1:][backwards]))
        notes.append(
            Note("data", f"rows of {count:,} of {len(rows.users):,} users are not in order of time: they were sorted")
        )
    return notes


def _constant_users(user: np.ndarray, time: np.ndarray) -> int:
    """Users with three interactions or more at one time."""
    starts = np.flatnonzero(np.r_[True, np.diff(user) != 0])
    low, high = np.minimum.reduceat(time, starts), np.maximum.reduceat(time, starts)
    return int(((low == high) & (np.diff(np.r_[starts, len(user)]) > 2)).sum())
