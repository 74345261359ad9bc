"""Batches: which queries step t reads, with which negatives, in which order.

    batches = make_batches(dataset, cfg, "rl", cfg.rl)
    examples = batches.batch_at(step)        # the GLOBAL batch, the same on every host

Everything is a function of `(cfg.seed, stage, step)`: nothing is carried from one step to
the next, so resuming needs no state. Queries are reshuffled every epoch by grain. Random
numbers come from SHA-256 of their names, never from Python's `hash`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence

import numpy as np

from fgrpo_jax.config import RunConfig, StageConfig
from fgrpo_jax.data.datasets import DataError, Dataset, Item, Split, in_memory
from fgrpo_jax.types import LoggedList, RankingExample

_SEQUENCE_ROW = re.compile(r"(train-\d+)-\d+")


def seed_of(*parts: int | str) -> int:
    """128 bits from names and numbers: the same in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:16], "little")


def generator(*parts: int | str) -> np.random.Generator:
    return np.random.default_rng(seed_of(*parts))


def subset_key(query_id: str) -> str:
    """What a training query is split by: its user's sequence `train-<seq>`, or the query itself.

    Rows of one sequence overlap in their histories, so they must stay on one side.
    """
    match = _SEQUENCE_ROW.fullmatch(query_id)
    return match[1] if match else query_id


def in_subset(query_id: str, subset: tuple[float, float]) -> bool:
    """Whether the hash of `subset_key`, read as a fraction, lies in [low, high)."""
    fraction = seed_of("subset", subset_key(query_id)) / 2.0**128
    return subset[0] <= fraction < subset[1]


def negatives(
    catalogue: Sequence[Item],
    seen: set[str],
    count: int,
    rng: np.random.Generator,
    query_id: str,
    share: np.ndarray | None = None,
) -> tuple[Item, ...]:
    """`count` different items whose id is not in `seen`, one after the other: uniform, or by `share` (sum 1).

    A prefix of a random ordering, with the seen items left out, is such a draw.
    Raises DataError when the catalogue has too few unseen items.
    """
    length = min(count + len(seen), len(catalogue))
    order = rng.choice(len(catalogue), length, replace=False, p=share)
    unseen = [catalogue[i] for i in order if catalogue[i][0] not in seen][:count]
    if len(unseen) < count:
        raise DataError(
            f"query {query_id!r}: only {len(unseen)} of {len(catalogue)} items are unseen, "
            f"{count} negatives are needed; lower data.pool_size"
        )
    return tuple(unseen)


class Batches:
    """The batches of one stage.

    rows: the indices of the training rows it reads; skipped: how many rows of its subset have no relevant candidate
    (nor, for a system that learns from them, shown lists) and are left out.
    """

    def __init__(self, dataset: Dataset, cfg: RunConfig, stage_name: str, stage: StageConfig):
        import grain

        if "train" not in dataset.splits:
            raise DataError(f"data set {dataset.name!r} has no training split: its raw file is not in data.manual_dir")
        self._split = _by_index(dataset.splits["train"])
        self._dataset, self._data, self._size = dataset, cfg.data, stage.batch_queries
        self._seed, self._stage = cfg.seed, stage_name
        self._share = np.array(dataset.weights) / sum(dataset.weights) if dataset.weights else None
        mine = [i for i, q in enumerate(self._split.query_ids) if in_subset(q, stage.subset)]
        teaches = self._split.trainable if cfg.SHOWN_LISTS else self._split.relevant
        self.rows = np.array([i for i in mine if teaches[i]], np.int64)
        self.skipped = len(mine) - len(self.rows)
        if not len(self.rows):
            raise DataError(
                f"stage {stage_name!r} has nothing to train on: subset {stage.subset} of data set "
                f"{dataset.name!r} holds {len(mine)} queries, "
                f"{self.skipped} of them without a relevant candidate"
            )
        shuffle = seed_of(cfg.seed, stage_name, "order") % 2**32
        self._order = grain.MapDataset.source(self.rows).shuffle(seed=shuffle).repeat()

    def batch_at(self, step: int) -> list[RankingExample]:
        """The `stage.batch_queries` examples of a step, ready for a prompt."""
        rng = generator(self._seed, self._stage, "present", step)
        positions = range(step * self._size, (step + 1) * self._size)
        read = self._split.rows([int(self._order[position]) for position in positions])
        batch = []
        for position, example in zip(positions, read, strict=True):
            if self._dataset.sampled_negatives:
                example = self._with_negatives(example, epoch=position // len(self.rows))
            order = rng.permutation(len(example.candidates))
            history = self._shown(example.history, rng)
            batch.append(_arranged(example, order, history))
        return batch

    def _with_negatives(self, example: RankingExample, epoch: int) -> RankingExample:
        """Fills the pool by (seed, query id, epoch), never by the answer.

        Raises DataError where the relevant items are too many, or have scores or topics: drawn ones have none.
        """
        if example.retrieval or example.topics:
            raise DataError(
                f"query {example.query_id!r} has retrieval scores or topics of its candidates, but its negatives "
                "are drawn, and drawn items have neither: give whole pools (sampled_negatives = False)"
            )
        rng = generator(self._seed, "negatives", example.query_id, epoch)
        seen = {item for item, _ in (*example.history, *example.candidates)}
        count = self._data.pool_size - len(example.candidates)
        if count < 0:
            raise DataError(
                f"query {example.query_id!r} has {len(example.candidates)} relevant items, more than "
                f"data.pool_size={self._data.pool_size}; raise it"
            )
        drawn = negatives(self._dataset.catalogue, seen, count, rng, example.query_id, self._share)
        return dataclasses.replace(
            example, candidates=example.candidates + drawn, relevance=example.relevance + (0.0,) * count
        )

    def _shown(self, history: tuple[Item, ...], rng: np.random.Generator) -> tuple[Item, ...]:
        """The newest `history_max` items, each but the newest dropped by `history_dropout`."""
        history = history[-self._data.history_max :]
        if not self._data.history_dropout:
            return history
        kept = rng.random(len(history)) >= self._data.history_dropout
        kept[-1:] = True
        return tuple(item for item, keep in zip(history, kept, strict=True) if keep)


def make_batches(dataset: Dataset, cfg: RunConfig, stage_name: str, stage: StageConfig) -> Batches:
    """Raises DataError when the stage has nothing to train on."""
    return Batches(dataset, cfg, stage_name, stage)


def evaluation_examples(dataset: Dataset, cfg: RunConfig, split: str) -> list[RankingExample]:
    """A split, or `eval.queries` of it: frozen pools, shown in an order drawn from (seed, query id).

    Those of it are the same for every seed, in an order of their own, as files may be sorted: so the first of
    them are a fair sample too. Queries without a relevant candidate are kept. Raises DataError for a split that is
    absent.
    """
    if split not in dataset.splits:
        raise DataError(
            f"data set {dataset.name!r} has no split {split!r}, only {', '.join(dataset.splits)}: "
            "put its raw file into data.manual_dir, or choose another split"
        )
    rows = _by_index(dataset.splits[split])
    if cfg.eval.queries:
        chosen = sorted(range(len(rows)), key=lambda i: seed_of("evaluated", rows.query_ids[i]))[: cfg.eval.queries]
        rows = rows.rows(chosen)
    return [shown(example, cfg)[0] for example in rows]


def _by_index(split: Sequence[RankingExample]) -> Split:
    return split if isinstance(split, Split) else in_memory(split)


def shown(example: RankingExample, cfg: RunConfig) -> tuple[RankingExample, np.ndarray]:
    """A query as an evaluation shows it to a policy, and which candidate each place shows, [C]."""
    order = generator(cfg.seed, "evaluation", example.query_id).permutation(len(example.candidates))
    return _arranged(example, order, example.history[-cfg.data.history_max :]), order


def _arranged(example: RankingExample, order: np.ndarray, history: tuple[Item, ...]) -> RankingExample:
    """The candidates in another order: place p shows candidate order[p]; all that is said of them follows."""
    places, order = np.argsort(order).tolist(), order.tolist()

    def arranged(values: tuple) -> tuple:
        return tuple(map(values.__getitem__, order))

    return dataclasses.replace(
        example,
        candidates=arranged(example.candidates),
        relevance=arranged(example.relevance),
        history=history,
        retrieval=arranged(example.retrieval) if example.retrieval else (),
        topics=arranged(example.topics) if example.topics else (),
        logged=tuple(LoggedList(tuple(map(places.__getitem__, x.items)), x.feedback) for x in example.logged),
    )


def round_up(n: int) -> int:
    """A multiple of 4 from 4 on, so that few array shapes (and programs) occur."""
    return n if n < 4 else -(-n // 4) * 4


def bucket(length: int, buckets: Sequence[int], query_id: str) -> int:
    """The smallest bucket that holds `length` prompt tokens; prompts are never cut.

    Raises DataError naming the query when none does.
    """
    for size in sorted(buckets):
        if length <= size:
            return size
    raise DataError(
        f"query {query_id!r} has a prompt of {length} tokens, longer than the largest of "
        f"data.prompt_buckets={tuple(buckets)}: add a larger bucket, or show less history, fewer candidates or "
        "less of their texts (prompt.text_tokens)"
    )
