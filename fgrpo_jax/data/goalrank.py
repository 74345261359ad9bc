"""goalrank_ml1m and goalrank_book: lists of six out of what a first stage retrieves, after GoalRank's protocol.

GoalRank (arXiv 2509.22046): k-core filtering, a matrix factorisation proposes the top 50, a user's last
six interactions are the target list. What its text leaves open is chosen here:

**Splits**, by order within a user; every user is in all of them. Of a user's interactions x_1..x_n

    test         targets x_n-5..x_n, history all before them
    validation   the six before those
    train        up to WINDOWS windows of six before those, one behind the other, the newest first to be kept

Histories hold at least one item, so a user needs 19 interactions; users with fewer are dropped and counted.
At most HISTORY items of a history are stored. k-core filtering sees all interactions, as is usual.

**Retrieval.** ALS (retriever.py), fitted to what precedes the validation targets; the user of a query is
embedded from its history alone. Training queries are scored by factors fitted without their users (FOLDS
groups): factors that had seen the targets would retrieve 36 instead of 30 % of them, and a ranker would learn
to trust scores that are worse at evaluation. The `data.retrieved` best items that the history lacks are proposed.

**Pools** (`data.pool`). "open", the default: the pool is what was retrieved. Targets outside of it are `missed`
and count in recall, nDCG, MAP and F1 as relevant items that were not listed. Of MovieLens-1M's test targets
27 % are in the pool; retrieval order has NDCG@6 5.2.
"closed": targets that were not retrieved take the places of the lowest-ranked items. **Insertion shows**: the
inserted have the lowest scores of the pool. *Reversed* retrieval order has NDCG@6 82.3 and hit@6 99.3 there, and
retrieval order 5.2, so whatever learns to score as the first stage does can do the opposite: numbers on closed
pools say little about ranking. It is there because published ones may have been made so.

**Shown lists** (`logged`), to fit models of feedback to: the pool in retrieval order with Gumbel noise (closed
ones in any order, as theirs tells the targets), in pages of six, with feedback 1 for targets. Nobody was really
shown these: they stand for exposure that the data do not record, and what is taken from a page does not depend on
what else is on it. (Pages of targets alone would let a model of feedback read the answer off the page: its
probabilities were high, and lists built by them random.)

Every interaction counts as relevant with gain 1, whatever its rating.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fgrpo_jax.config import DataConfig
from fgrpo_jax.data import published
from fgrpo_jax.data.builder import RankingBuilder
from fgrpo_jax.data.datasets import DataError, Item
from fgrpo_jax.data.raw_files import manual_folder
from fgrpo_jax.data.retriever import FoldedRetriever, core, pool_of
from fgrpo_jax.types import LoggedList, Missed, RankingExample

LENGTH, WINDOWS, HISTORY = 6, 4, 50
SHOWN_NOISE = 10.0  # Gumbel noise, in ranks
SEED = 46
SHORTEST = 3 * LENGTH + 1
_OFFSETS = {"train": range(2, 2 + WINDOWS), "validation": range(1, 2), "test": range(1)}


class Task(NamedTuple):
    """A query before retrieval: item indices, oldest first; offset: windows of six after its targets."""

    user: int
    offset: int
    history: np.ndarray
    targets: np.ndarray


class _Retrieved(RankingBuilder, skip_registration=True):
    """What both data sets share; a subclass says where interactions are read."""

    instruction = "Choose and rank the items this user takes next."
    names: tuple[str, ...]  # of the raw files
    zips: str  # how the name of the zip they come in starts

    @classmethod
    def find(cls, folder: Path | None) -> dict[str, Path]:
        folder = manual_folder(folder, cls.MANUAL_DOWNLOAD_INSTRUCTIONS)
        found = published.find_files(folder, cls.names, cls.zips)
        if not found:
            raise DataError(f"{folder} and its sub-folders do not hold {cls.MANUAL_DOWNLOAD_INSTRUCTIONS}")
        return found

    @classmethod
    def options_of(cls, config: DataConfig) -> dict[str, Any]:
        return {"kcore": config.kcore, "retrieved": config.retrieved, "pool": config.pool}

    def split_names(self) -> tuple[str, ...]:
        return tuple(_OFFSETS)

    def interactions(self) -> published.Interactions:
        raise NotImplementedError

    @cached_property
    def _raw(self) -> published.Interactions:
        return self.interactions()

    @cached_property
    def _core(self) -> dict[str, list[str]]:
        kept = core(self._raw.sequences, self.options["kcore"])
        long = {user: items for user, items in kept.items() if len(items) >= SHORTEST}
        where = f"data.kcore={self.options['kcore']}"
        if not long:
            raise DataError(
                f"{self.name}: of {len(self._raw.sequences)} users none is left with {where} and the {SHORTEST} "
                "interactions that three target lists and a history need: lower data.kcore, or give more data"
            )
        if dropped := len(kept) - len(long):
            logging.getLogger(__name__).warning(
                "%s: %d of the %d users that %s leaves have fewer than %d interactions and are dropped",
                self.name, dropped, len(kept), where, SHORTEST,
            )  # fmt: skip
        return long

    @cached_property
    def _items(self) -> list[str]:
        """Ids, in the order of the raw file."""
        kept = {item for items in self._core.values() for item in items}
        found = [item for item in self._raw.texts if item in kept]
        if len(found) < self.options["retrieved"] + LENGTH:
            raise DataError(
                f"{self.name}: {len(found)} items are left, too few to retrieve data.retrieved="
                f"{self.options['retrieved']}: lower it or data.kcore, or give more data"
            )
        return found

    def catalogue(self) -> tuple[Item, ...]:
        return tuple((item, self._raw.texts[item]) for item in self._items)

    @cached_property
    def _walks(self) -> list[np.ndarray]:
        index = {item: i for i, item in enumerate(self._items)}
        return [np.array([index[item] for item in items]) for items in self._core.values()]

    def _tasks(self, split: str) -> list[Task]:
        tasks = []
        for user, walk in enumerate(self._walks):
            for offset in reversed(_OFFSETS[split]):  # oldest first
                end = len(walk) - LENGTH * offset
                if end > LENGTH:
                    tasks.append(Task(user, offset, walk[: end - LENGTH], walk[end - LENGTH : end]))
        return tasks

    @cached_property
    def _retriever(self) -> FoldedRetriever:
        """Fitted to what precedes the validation targets."""
        return FoldedRetriever([walk[: -2 * LENGTH] for walk in self._walks], len(self._items))

    def examples(self, split: str) -> Iterator[RankingExample]:
        items = self.catalogue()
        topics = [self._raw.topics[item] for item, _ in items] if self._raw.topics else None
        for task, score_I in self._retriever.scored(self._tasks(split), unseen=split == "train"):
            pool, missed = pool_of(task.targets, score_I, self.options["retrieved"], self.options["pool"])
            rng = np.random.default_rng([SEED, task.user, task.offset])
            pool = rng.permutation(pool)
            relevant = np.isin(pool, task.targets)
            yield RankingExample(
                query_id=f"{split}-{task.user:05d}-{task.offset:06d}",
                query="",
                candidates=tuple(items[i] for i in pool),
                relevance=tuple(relevant.astype(float).tolist()),
                history=tuple(items[i] for i in task.history[-HISTORY:]),
                retrieval=tuple(score_I[pool].tolist()),
                topics=tuple(topics[i] for i in pool) if topics else (),
                logged=shown_lists(relevant, score_I[pool] * (self.options["pool"] == "open"), rng),
                missed=tuple(Missed(items[i][0], 1.0, topics[i] if topics else -1) for i in missed),
            )

    def frozen(self, split: str) -> dict[str, Any]:
        return {"seed": SEED, "negatives": f"retrieved by ALS from the history, {self.options}"}


def shown_lists(relevant_C: np.ndarray, retrieval_C: np.ndarray, rng: np.random.Generator) -> tuple[LoggedList, ...]:
    """The whole pool in noisy order of its scores (in any order where all are equal), in pages of LENGTH: indices."""
    rank_C = np.argsort(np.argsort(-retrieval_C, kind="stable"))
    order = np.argsort(rank_C - SHOWN_NOISE * rng.gumbel(size=len(rank_C)), kind="stable")
    pages = (order[start : start + LENGTH] for start in range(0, len(order), LENGTH))
    return tuple(LoggedList(tuple(page.tolist()), tuple(relevant_C[page].astype(float).tolist())) for page in pages)


class GoalrankMl1m(_Retrieved, skip_registration=True):
    MANUAL_DOWNLOAD_INSTRUCTIONS = "MovieLens-1M: ml-1m.zip, or ratings.dat and movies.dat out of it"
    optional = ("retrieval", "topics", "logged", "missed")
    names, zips = published.MOVIELENS, "ml-1m"

    def interactions(self) -> published.Interactions:
        return published.read_movielens(self.files)


class GoalrankBook(_Retrieved, skip_registration=True):
    """Items whose order is not documented as that of time: for the protocol, not for predicting what comes next."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Amazon-Book as released with KGAT: train.txt, test.txt and item_list.txt, or a zip of them, amazon-book*.zip"
    )
    optional = ("retrieval", "logged", "missed")
    names, zips = published.KGAT, "amazon-book"

    def interactions(self) -> published.Interactions:
        return published.read_kgat(self.files)
