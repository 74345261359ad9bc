"""interactions: who took what and when, and a table of the items: your own logs.

data.manual_dir holds two tables (tables.py: CSV, TSV, JSON lines or Parquet), whose columns may be called anything
(config.InteractionsConfig):

    interactions   user, item, time and, if you like, rating
    items          id, text; further columns may be joined to the text, as title and genres

Every user's interactions are put in order of time. A query is what a user took before, and the `targets` items taken
next are relevant, with gain 1 or their rating.

**leave_one_out**: the last `targets` of every user are those of test, the ones before of validation, the ones before
of up to `windows` training queries, the newest first to be kept. **time**: test is what happened after a moment that
leaves a share of held_out[1] of all interactions behind it, validation the share of held_out[0] before. A query of
these has the first `targets` items of a user in that span, and all before the span as its history; training queries
end before it. No interaction of later times is a target or counts in popularity; `kcore` looks at all of them.

**Pools** of data.pool_size. `uniform`, `popularity`: drawn uniformly or by 1 + how often the training span took an
item; once for evaluation, from what the user never took, and anew every epoch for training, from what is neither in the
query's history nor wanted (what the user took later, or before the history that is kept, can be drawn: to leave it out
would tell of the future). `als`, `file`: what a
first stage proposed, without the history; targets that it lacks are missed (data.pool="open"), or take the places of
its last items, and then the *reversed* order of retrieval finds them: see goalrank.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fgrpo_jax.config import DataConfig, InteractionsConfig
from fgrpo_jax.data import events, tables
from fgrpo_jax.data.builder import RankingBuilder
from fgrpo_jax.data.datasets import DataError, Item, Note
from fgrpo_jax.data.raw_files import folder_of, manual_folder
from fgrpo_jax.data.retriever import FoldedRetriever, pool_of
from fgrpo_jax.types import Missed, RankingExample

SPLITS = ("train", "validation", "test")
SEED = 20131
_FILES = "interactions_file", "items_file", "candidates_file"
_LIST = "split", "user", "item", "score"  # columns of candidates_file


class Task(NamedTuple):
    """A query before its pool: items of user number `user` before `start` are its history, [start, end) its targets."""

    user: int
    start: int
    end: int
    history: np.ndarray


class Interactions(RankingBuilder, skip_registration=True):
    MANUAL_DOWNLOAD_INSTRUCTIONS = "a table `interactions` and a table `items` (see fgrpo_jax/data/interactions.py)"
    instruction = "Choose and rank the items this user takes next."

    @classmethod
    def files_of(cls, config: DataConfig) -> dict[str, Path]:
        folder, c = manual_folder(folder_of(config), cls.MANUAL_DOWNLOAD_INSTRUCTIONS), config.interactions
        stems = {"interactions": c.interactions_file, "items": c.items_file}
        if c.candidates == "file":
            stems["candidates"] = c.candidates_file
        return {stem: tables.find(folder, name, stem, f"data.interactions.{stem}_file") for stem, name in stems.items()}

    @classmethod
    def options_of(cls, config: DataConfig) -> dict[str, Any]:
        found = {name: value for name, value in vars(config.interactions).items() if name not in _FILES}
        return {**found, "pool_size": config.pool_size, "pool": config.pool}

    def __init__(self, files: dict[str, Path], given: tuple[Item, ...] | None, options: dict[str, Any], **kwargs: Any):
        names = {field.name for field in dataclasses.fields(InteractionsConfig)}
        self._c = InteractionsConfig(**{name: value for name, value in options.items() if name in names})
        self.sampled_negatives = self._c.candidates in ("uniform", "popularity")
        self.optional = () if self.sampled_negatives else ("retrieval", "missed")
        super().__init__(files, given, options=options, **kwargs)
        self._check()

    def _check(self) -> None:
        """That every split has queries; what is left out is noted."""
        for split in SPLITS:
            if not self._tasks[split]:
                raise DataError(
                    f"{self.files['interactions']}: no user has enough interactions for a {split} query (of "
                    f"{len(self._events.users):,}, the longest has {max(map(len, self._events.walks))}): lower "
                    "data.interactions.targets, min_history or held_out, or give more data"
                )
        held = [(task, self._events.times[task.user]) for split in SPLITS[1:] for task in self._tasks[split]]
        if tied := sum(times[task.start - 1] == times[task.start] for task, times in held):
            text = f"{tied:,} of {len(held):,} held-out queries have a target at the time of their last history item"
            self.notes.append(Note("time", text))
        if not self.sampled_negatives:
            return
        most = max(len(walk) for walk in self._events.walks)
        short = sum(len(self._events.items) - len(walk) < self._negatives for walk in self._events.walks)
        if short:
            raise DataError(
                f"{self.files['items']}: {len(self._events.items):,} items are too few for data.pool_size="
                f"{self.options['pool_size']}: {short:,} users took so many (up to {most:,}) that not enough others "
                "are left to draw; lower it"
            )

    @property
    def _negatives(self) -> int:
        """The most that a pool draws: with split `time` a query may have one target only."""
        return self.options["pool_size"] - (1 if self._c.split == "time" else self._c.targets)

    @cached_property
    def _events(self) -> events.Events:
        found = events.read(self.files["interactions"], self.files["items"], self._c)
        self.notes += found.notes
        return found

    # ------------------------------------------------------------------ splits

    @cached_property
    def _tasks(self) -> dict[str, list[Task]]:
        spans = self._by_time() if self._c.split == "time" else self._by_order()
        found: dict[str, list[Task]] = {split: [] for split in SPLITS}
        for user, (walk, (train, held)) in enumerate(zip(self._events.walks, list(spans), strict=True)):
            for split, (start, end) in (*(("train", span) for span in self._windows(train)), *held.items()):
                if start >= self._c.min_history and end > start:
                    found[split].append(Task(user, start, end, walk[:start]))
        return found

    def _windows(self, end: int) -> list[tuple[int, int]]:
        """Of targets that end before `end`, oldest first."""
        n = self._c.targets
        return [(end - n * (i + 1), end - n * i) for i in range(self._c.windows) if end >= n * (i + 1)][::-1]

    def _by_order(self) -> Iterator[tuple[int, dict[str, tuple[int, int]]]]:
        n, least = self._c.targets, 2 * self._c.targets + self._c.min_history
        short = sum(len(walk) < least for walk in self._events.walks)
        if short:
            of = f"{short:,} of {len(self._events.walks):,} users have no query"
            self.notes.append(Note("data", f"{of}: fewer than {least} interactions (two lists of targets, a history)"))
        for walk in self._events.walks:
            size = len(walk)
            held = {"validation": (size - 2 * n, size - n), "test": (size - n, size)} if size >= least else {}
            yield (size - 2 * n if held else 0), held

    def _by_time(self) -> Iterator[tuple[int, dict[str, tuple[int, int]]]]:
        n, low, high = self._c.targets, *self._moments()
        lost = 0
        for times in self._events.times:
            first, second = np.searchsorted(times, (low, high)).tolist()
            held = {"validation": (first, min(first + n, second)), "test": (second, min(second + n, len(times)))}
            lost += sum(end > start and start < self._c.min_history for start, end in held.values())
            yield first, held
        if lost:
            why = f"of users with a history of fewer than {self._c.min_history} items before the span"
            self.notes.append(Note("data", f"{lost:,} queries are left out: {why}"))

    def _moments(self) -> tuple[float, float]:
        """When validation and when test begin. Raises DataError where times do not tell them apart."""
        time = np.sort(np.concatenate(self._events.times))
        validation, test = self._c.held_out
        ends = (int(len(time) * (1 - share)) for share in (validation + test, test))
        low, high = (float(time[min(end, len(time) - 1)]) for end in ends)
        if not time[0] < low < high:
            raise DataError(
                f"{self.files['interactions']}: times do not split by data.interactions.held_out={self._c.held_out}: "
                f"they go from {time[0]:.15g} to {time[-1]:.15g}, and validation and test would begin at {low:.15g} "
                f"and {high:.15g}; give real times, other shares, or set data.interactions.split to leave_one_out"
            )
        return low, high

    @cached_property
    def _known(self) -> list[np.ndarray]:
        """What first stage and popularity may count: of every user, what precedes the targets of evaluation."""
        ends = [len(walk) for walk in self._events.walks]
        if self._c.split == "time":
            low, _ = self._moments()
            ends = [int(np.searchsorted(times, low)) for times in self._events.times]
        for task in self._tasks["validation"]:
            ends[task.user] = min(ends[task.user], task.start)
        return [walk[:end] for walk, end in zip(self._events.walks, ends)]

    # ------------------------------------------------------------------ what builders define

    def split_names(self) -> tuple[str, ...]:
        return SPLITS

    def catalogue(self) -> tuple[Item, ...]:
        return self._events.items

    @cached_property
    def _counts(self) -> np.ndarray:
        return np.bincount(np.concatenate(self._known), minlength=len(self._events.items))

    def weights(self) -> tuple[float, ...]:
        return tuple((1.0 + self._counts).tolist()) if self._c.candidates == "popularity" else ()

    def examples(self, split: str) -> Iterator[RankingExample]:
        if not self.sampled_negatives:
            yield from self._retrieved(split)
            return
        share = np.array(self.weights()) / sum(self.weights()) if self.weights() else None
        n_items = len(self._events.items)
        for task in self._tasks[split]:
            targets = self._events.walks[task.user][task.start : task.end]
            pool = targets
            if split != "train":
                rng = np.random.default_rng([SEED, task.user, SPLITS.index(split)])
                taken = self._events.walks[task.user]
                others = self.options["pool_size"] - len(targets)
                order = rng.choice(n_items, min(others + len(taken), n_items), replace=False, p=share)
                drawn = order[~np.isin(order, taken)][:others]
                pool = rng.permutation(np.concatenate([targets, drawn]))
            yield self._example(split, task, pool)

    def _retrieved(self, split: str) -> Iterator[RankingExample]:
        size, kind, empty = self.options["pool_size"], self.options["pool"], 0
        for task, score_I in self._scored(split):
            targets = self._events.walks[task.user][task.start : task.end]
            pool, missed = pool_of(targets, score_I, size, kind)
            empty += not len(pool)
            if not len(pool):
                continue
            finite = np.where(np.isfinite(score_I), score_I, score_I[np.isfinite(score_I)].min(initial=0.0) - 1)
            rng = np.random.default_rng([SEED, task.user, SPLITS.index(split), task.start])
            yield self._example(split, task, rng.permutation(pool), finite, missed)
        if empty:
            text = f"{empty:,} {split} queries are left out: their lists hold nothing but the history"
            self.notes.append(Note("data", text))

    def _scored(self, split: str) -> Iterator[tuple[Task, np.ndarray]]:
        """Every query with the first stage's scores of all items; -inf: not proposed."""
        if self._c.candidates == "als":
            yield from self._first_stage.scored(self._tasks[split], unseen=split == "train")
            return
        lacking = 0
        for task in self._tasks[split]:
            found = self._lists.get((split, self._events.users[task.user]))
            if found is None and split != "train":
                raise DataError(
                    f"{self.files['candidates']}: no list for user {self._events.users[task.user]!r} of split "
                    f"{split!r}: add it, or remove the user's interactions"
                )
            lacking += found is None
            if found is not None:
                score_I = np.full(len(self._events.items), -np.inf, np.float32)
                score_I[found[0]] = found[1]
                score_I[task.history] = -np.inf
                yield task, score_I
        if lacking:
            text = f"{lacking:,} train queries are left out: candidates_file has no list for them"
            self.notes.append(Note("data", text))

    @cached_property
    def _first_stage(self) -> FoldedRetriever:
        return FoldedRetriever(self._known, len(self._events.items))

    @cached_property
    def _lists(self) -> dict[tuple[str, str], tuple[list[int], list[float]]]:
        """Item indices and scores of the lists of candidates_file, by split and user."""
        path = self.files["candidates"]
        table = tables.read(path, dict.fromkeys(_LIST, "its header: a list has split, user, item and score"))
        index = {item: number for number, (item, _) in enumerate(self._events.items)}
        lists: dict[tuple[str, str], dict[int, float]] = {}
        known, strange, users = set(events.read_items(self.files["items"], self._c)), 0, set(self._events.users)
        for row in range(len(table.rows)):
            split, user, item = (tables.identifier(table.columns[c][row], table.where(row, c)) for c in _LIST[:3])
            if split not in SPLITS:
                raise DataError(f"{table.where(row, 'split')}: {split!r} is not one of {', '.join(SPLITS)}")
            if item not in known:
                raise DataError(f"{table.where(row, 'item')}: item {item!r} is not in {self.files['items']}")
            score = tables.number(table.columns["score"][row], table.where(row, "score"))
            if item not in index or user not in users:  # left out of the interactions
                strange += 1
                continue
            mine = lists.setdefault((split, user), {})
            if index[item] in mine:
                raise DataError(f"{table.where(row, 'item')}: item {item!r} is in this list twice")
            mine[index[item]] = score
        if strange:
            text = f"{strange:,} rows of {path.name} are left out: their item or user has no interaction left"
            self.notes.append(Note("data", text))
        return {key: (list(found), list(found.values())) for key, found in lists.items()}

    def _example(self, split: str, task: Task, pool: np.ndarray, score_I=None, missed=()) -> RankingExample:
        items, walk, gains = self._events.items, self._events.walks[task.user], self._events.gains[task.user]
        gain = dict(zip(walk[task.start : task.end].tolist(), gains[task.start : task.end].tolist()))
        user = f"{split}-{self._events.users[task.user]}"
        return RankingExample(
            # Training queries of a user share a sequence, see batches.subset_key.
            query_id=f"train-{task.user:05d}-{task.start:06d}" if split == "train" else user,
            query="",
            candidates=tuple(items[i] for i in pool),
            relevance=tuple(gain.get(i, 0.0) for i in pool.tolist()),
            history=tuple(items[i] for i in task.history[-self._c.history :]),
            retrieval=() if score_I is None else tuple(score_I[pool].tolist()),
            missed=tuple(Missed(items[i][0], gain[i]) for i in map(int, missed)),
        )

    def frozen(self, split: str) -> dict[str, Any]:
        made = {
            "uniform": "uniform over the items the user never took; pool shuffled",
            "popularity": "by 1 + training count over the items the user never took; pool shuffled",
            "als": f"retrieved by ALS from the history, {self.options['pool']}; pool shuffled",
            "file": f"the lists of {self._c.candidates_file or 'candidates'}, {self.options['pool']}; pool shuffled",
        }
        return {"seed": SEED, "negatives": made[self._c.candidates]}
