"""lastfm: the listening sequences of LLaRA, with S-DPO's 20 candidates for evaluation.

Raw files, searched under data.manual_dir in all sub-folders, each plain or .gz:

    id2name.txt                         `id::artist name` a line, ids 0, 1, …
    train_data.jsonl                    {"seq": [10 ids, oldest first, padded at the end],
    val_data.jsonl, test_data.jsonl      "len_seq": n, "next": id} a line
    lastfm-{train,val,test}.json        S-DPO: a list of {"historyList": "A::B::C",
                                         "itemList": [20 names], "trueSelection": name}

(The original `.df` files are pickled data frames: `pandas.read_pickle(f).to_json(g,
orient="records", lines=True)`.) Queries are the rows with at least 3 items of history
(S-DPO). Evaluation pools come from `lastfm-val.json` and `lastfm-test.json`, or are remade
from the rows by S-DPO's recipe (`sdpo_pool`), which gives the same pools.

Deviation from S-DPO: its training candidates are never used. They are a function of the
answer, so "which candidate's training pools overlap this pool" finds the answer without
reading the history. Training negatives are drawn when a batch is made (data.py).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from fgrpo_jax.data.builder import RankingBuilder
from fgrpo_jax.data.datasets import DataError, Item, one_line
from fgrpo_jax.data.raw_files import find_one, manual_folder, numbered_lines, open_raw
from fgrpo_jax.types import RankingExample

HISTORY_MIN, HISTORY_MAX, NEGATIVES = 3, 10, 19
ALIASES = {"Florence and the Machine": "Florence + the Machine", "Plus 44": "+44"}
"""Artists that S-DPO's files call otherwise than id2name.txt."""

_NAMES = {"train": "train", "validation": "val", "test": "test"}  # of splits, in file names and query ids


class Row(NamedTuple):
    """One step of a sequence, as positions in the catalogue; pool () where it is not given."""

    history: tuple[int, ...]
    answer: int
    pool: tuple[int, ...] = ()


class Lastfm(RankingBuilder, skip_registration=True):
    MANUAL_DOWNLOAD_INSTRUCTIONS = "the LastFM files of LLaRA (id2name.txt, train_data.jsonl, …) or of S-DPO"
    takes_catalogue = True
    instruction = "Choose and rank the artists this user listens to next."
    sampled_negatives = True

    @classmethod
    def find(cls, folder: Path | None) -> dict[str, Path]:
        folder = manual_folder(folder, cls.MANUAL_DOWNLOAD_INSTRUCTIONS)
        found = {"catalogue": find_one(folder, "id2name.txt".__eq__)}
        for split, short in _NAMES.items():
            names = [{f"{short}_data.jsonl", f"{short.capitalize()}_data.jsonl"}, {f"lastfm-{short}.json"}]
            first, second = names if split == "train" else reversed(names)
            found[split] = find_one(folder, first.__contains__) or find_one(folder, second.__contains__)
        found = {role: path for role, path in found.items() if path}
        if not set(found) & set(_NAMES):
            raise DataError(
                f"{folder} and its sub-folders hold no sequences; expected {cls.MANUAL_DOWNLOAD_INSTRUCTIONS}"
            )
        return found

    def split_names(self) -> tuple[str, ...]:
        return tuple(split for split in _NAMES if split in self.files)

    @cached_property
    def _items(self) -> tuple[Item, ...]:
        if "catalogue" in self.files:
            return read_catalogue(self.files["catalogue"])
        if self.given is None:
            raise DataError(
                "there is no id2name.txt under data.manual_dir, and no run whose catalogue could be used: add the file"
            )
        return self.given

    def catalogue(self) -> tuple[Item, ...]:
        return self._items

    def rows(self, split: str) -> Iterator[Row]:
        """All queries of a split, in file order."""
        path, items = self.files[split], self._items
        if path.name.removesuffix(".gz").endswith(".json"):
            yield from read_pools(path, {text: n for n, (_, text) in enumerate(items)})
        else:
            yield from (row for row in read_steps(path, len(items)) if len(row.history) >= HISTORY_MIN)

    def examples(self, split: str) -> Iterator[RankingExample]:
        items, sequence, newest = self._items, -1, None
        for number, row in enumerate(self.rows(split)):
            if split == "train":  # a row that does not continue the one before starts a sequence
                sequence += row.history != newest
                newest = (*row.history, row.answer)[-HISTORY_MAX:]
                query_id, pool = f"train-{sequence:05d}-{number:06d}", (row.answer,)
            else:
                query_id = f"{_NAMES[split]}-{number:06d}"
                pool = row.pool or sdpo_pool(row.history, row.answer, len(items))
            yield RankingExample(
                query_id=query_id,
                query="",
                candidates=tuple(items[i] for i in pool),
                relevance=tuple(float(i == row.answer) for i in pool),
                history=tuple(items[i] for i in row.history),
            )

    def frozen(self, split: str) -> dict[str, Any]:
        return {
            "seed": "the id of the answer",
            "negatives": f"S-DPO: {NEGATIVES} uniform over the items not in the history, by Python's random",
        }


def sdpo_pool(history: Sequence[int], answer: int, n_items: int) -> tuple[int, ...]:
    """S-DPO's candidates, for evaluation only: the same answer always meets similar negatives.

    Python's `random`, seeded by the answer's id, draws 19 of the unseen items in id order;
    seeded again in the same way, it shuffles them with the answer.
    """
    unseen = [i for i in range(n_items) if i != answer and i not in history]
    pool = [*random.Random(answer).sample(unseen, NEGATIVES), answer]
    random.Random(answer).shuffle(pool)
    return tuple(pool)


# ---------------------------------------------------------------------- reading


def read_catalogue(path: Path) -> tuple[Item, ...]:
    """id2name.txt. Raises DataError unless ids count up from 0 and names differ."""
    items, seen = [], set()
    for number, line in numbered_lines(path):
        item, separator, name = line.partition("::")
        name = one_line(name)
        if not separator or item != str(len(items)) or not name or name in seen:
            raise DataError(
                f"{path}, line {number}: expected `{len(items)}::name` with a name not used before, found {line!r}"
            )
        seen.add(name)
        items.append((item, name))
    return tuple(items)


def read_steps(path: Path, n_items: int) -> Iterator[Row]:
    """train_data, val_data, test_data: also the rows with short histories.

    Padding is the id `n_items`; `len_seq` is 1 for an empty history too, so it is not used
    beyond being checked. Raises DataError naming file and line.
    """
    for number, line in numbered_lines(path):
        try:
            row = json.loads(line)
            sequence, length, answer = row["seq"], row["len_seq"], row["next"]
            history = tuple(i for i in sequence if i != n_items)
            sound = (
                all(type(i) is int and 0 <= i < n_items for i in (*history, answer))
                and sequence[: len(history)] == list(history)
                and len(history) <= HISTORY_MAX
                and length == max(1, len(history))
                and answer not in history
            )
        except (ValueError, KeyError, TypeError) as error:
            reason = f"not a row with seq, len_seq and next ({error!r})"
            raise DataError(f"{path}, line {number}: {reason}") from error
        if not sound:
            raise DataError(
                f"{path}, line {number}: expected ids below {n_items}, padded at the end with {n_items}, "
                f"and a next item that is not in seq; found {line[:200]}"
            )
        yield Row(history, answer)


def read_pools(path: Path, position: dict[str, int]) -> Iterator[Row]:
    """S-DPO's JSON list. Raises DataError naming file, row (from 0) and artist."""
    with open_raw(path) as file:
        try:
            rows = json.load(file)
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a JSON list of objects, found {type(rows).__name__}")

    def find(name: Any, number: int) -> int:
        known = one_line(name) if isinstance(name, str) else ""  # no artist has an empty name
        known = ALIASES.get(known, known) if known not in position else known
        if known not in position:
            raise DataError(f"{path}, row {number}: artist {name!r} is not in the catalogue (id2name.txt)")
        return position[known]

    for number, row in enumerate(rows):
        try:
            history, names, answer = row["historyList"], row["itemList"], row["trueSelection"]
            history = history.split("::") if history else []
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}, row {number}: not an object with historyList, itemList and trueSelection ({error!r})"
            ) from error
        if not isinstance(names, list):
            raise DataError(f"{path}, row {number}: itemList is not a list")
        pool = tuple(find(name, number) for name in names)
        chosen = find(answer, number)
        if len(set(pool)) != len(pool) or chosen not in pool:
            raise DataError(f"{path}, row {number}: itemList must hold {answer!r}, and no artist twice")
        yield Row(tuple(find(name, number) for name in history), chosen, pool)
