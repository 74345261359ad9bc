"""What the ranker reads: histories and pools as items of a catalogue; and how it is made, on the host.

The only place where item ids become numbers: what cannot be encoded is refused here, by query id.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence

import flax.struct
import numpy as np

from fgrpo_jax.data.batches import round_up
from fgrpo_jax.data.datasets import DataError
from fgrpo_jax.types import Array, RankingExample


@flax.struct.dataclass
class RankerQuery:
    """A batch of encoded queries, on the device. Items count from 1; 0 is padding, at the end.

    Axes: H item of the history, oldest first; C candidate; J logged list; T its position.
    """

    history: Array  # [B,H] int32
    history_len: Array  # [B] int32
    candidates: Array  # [B,C] int32
    n_candidates: Array  # [B] int32, >= 1
    relevance: Array  # [B,C] float32, 0 padded
    retrieval: Array  # [B,C] float32: first-stage score, standardised over the pool; 0 where there is none
    popularity: Array  # [B,C] float32: log(1 + count), 0 padded
    topics: Array  # [B,C] int32, -1 where there is none
    logged_items: Array  # [B,J,T] int32: candidate indices, -1 padded
    logged_feedback: Array  # [B,J,T] float32, from 0 to 1; 0 padded


def blank(list_length: int) -> RankerQuery:
    """A query of arrays [1, ...]: what each may be padded with."""
    return RankerQuery(
        history=np.zeros((1, 1), np.int32),
        history_len=np.zeros(1, np.int32),
        candidates=np.zeros((1, 1), np.int32),
        n_candidates=np.ones(1, np.int32),
        relevance=np.zeros((1, 1), np.float32),
        retrieval=np.zeros((1, 1), np.float32),
        popularity=np.zeros((1, 1), np.float32),
        topics=np.full((1, 1), -1, np.int32),
        logged_items=np.full((1, 1, list_length), -1, np.int32),
        logged_feedback=np.zeros((1, 1, list_length), np.float32),
    )


def encoder(
    catalogue: Mapping[str, int], popularity: np.ndarray, history_max: int, list_length: int
) -> Callable[[Sequence[RankingExample]], RankerQuery]:
    """`encode`: examples -> RankerQuery of numpy arrays, whose shapes depend on these examples alone.

    catalogue: item id -> its number, from 1.
    popularity: log(1 + count) in the training data, by item number; [items + 1], 0 for padding.
    history_max: items of the history that are kept, the last ones.
    list_length: items of a list.

    `encode` raises DataError naming the query: on an item that the catalogue lacks, a pool smaller than a
    list, an empty history, a logged list longer than a list.
    Raises ValueError when popularity is of another size.
    """
    size = max(catalogue.values(), default=0) + 1
    if popularity.shape != (size,):
        raise ValueError(f"popularity has shape {popularity.shape}; the catalogue's numbers need ({size},)")
    return functools.partial(_encode, catalogue, popularity, history_max, list_length)


def _encode(
    catalogue: Mapping[str, int], popularity: np.ndarray, history_max: int, list_length: int,
    examples: Sequence[RankingExample],
) -> RankerQuery:  # fmt: skip
    for example in examples:
        _check(example, list_length)
    histories = [_numbers(catalogue, e, e.history[-history_max:], "history") for e in examples]
    pools = [_numbers(catalogue, e, e.candidates, "candidates") for e in examples]
    shown = [[x.items for x in e.logged] for e in examples]
    scores = _standardised([e.retrieval for e in examples])
    empty = blank(list_length)

    def rows(values: Sequence[Sequence], like: np.ndarray, width: int = 1) -> np.ndarray:
        """As wide as the longest, or as `width` is."""
        lengths = np.fromiter(map(len, values), np.int32, len(values))
        made = np.full((len(values), round_up(max(width, *lengths))), like.flat[0], like.dtype)
        there = np.arange(made.shape[1]) < lengths[:, None]
        made[there] = np.fromiter(itertools.chain.from_iterable(values), like.dtype, lengths.sum())
        return made

    def lists(values: Sequence[Sequence[Sequence]], like: np.ndarray) -> np.ndarray:
        """One list after the other, `list_length` places each."""
        each = rows([x for of_query in values for x in of_query] or [()], like, list_length)[:, :list_length]
        counts = np.fromiter(map(len, values), np.int32, len(values))
        made = np.full((len(values), round_up(max(1, *counts)), list_length), like.flat[0], like.dtype)
        made[np.arange(made.shape[1]) < counts[:, None]] = each[: counts.sum()]
        return made

    width = round_up(max(map(len, pools)))
    of_pools = functools.partial(rows, width=width)  # as wide as the pools, also where no example has such values

    candidates = of_pools(pools, empty.candidates)
    return RankerQuery(
        history=rows(histories, empty.history),
        history_len=np.array([len(x) for x in histories], np.int32),
        candidates=candidates,
        n_candidates=np.array([len(x) for x in pools], np.int32),
        relevance=of_pools([e.relevance for e in examples], empty.relevance),
        retrieval=of_pools(scores, empty.retrieval),
        popularity=popularity[candidates].astype(np.float32),
        topics=of_pools([e.topics for e in examples], empty.topics),
        logged_items=lists(shown, empty.logged_items),
        logged_feedback=lists([[x.feedback for x in e.logged] for e in examples], empty.logged_feedback),
    )


def _check(example: RankingExample, list_length: int) -> None:
    where = f"query {example.query_id!r}"
    if len(example.candidates) < list_length:
        raise DataError(
            f"{where} has {len(example.candidates)} candidates, fewer than the {list_length} items of a list: "
            "give larger pools or shorten the list"
        )
    if not example.history:
        raise DataError(f"{where} has no history, and the ranker knows its user by nothing else: leave it out")
    longest = max((len(shown.items) for shown in example.logged), default=0)
    if longest > list_length:
        raise DataError(
            f"{where} has a logged list of {longest} items; lists have {list_length}: cut it, or raise the list length"
        )


def _numbers(catalogue: Mapping[str, int], example: RankingExample, items: Sequence, where: str) -> list[int]:
    try:
        return [catalogue[item] for item, _ in items]
    except KeyError as error:
        raise DataError(
            f"query {example.query_id!r}: item {error.args[0]!r} of its {where} is not in the catalogue that the "
            "ranker was made for; train on data with this item, or leave it out"
        ) from None


def _standardised(scores: Sequence[Sequence[float]]) -> list[np.ndarray]:
    """Mean 0 and standard deviation 1 over each pool (scales of first stages differ); 0 where all are equal."""
    made: list[np.ndarray] = [np.zeros(len(of_pool), np.float32) for of_pool in scores]
    for size in set(map(len, scores)) - {0}:
        mine = [i for i, of_pool in enumerate(scores) if len(of_pool) == size]
        x = np.array([scores[i] for i in mine], np.float64)
        std = x.std(1, keepdims=True)
        equal = x.max(1, keepdims=True) == x.min(1, keepdims=True)
        result = np.where(equal, 0.0, x - x.mean(1, keepdims=True)) / np.where(equal, 1.0, std)
        for i, of_pool in zip(mine, result.astype(np.float32), strict=True):
            made[i] = of_pool
    return made
