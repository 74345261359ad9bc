"""First stage of a two-stage recommender: k-core filtering, and a matrix factorisation that proposes items.

The factorisation is implicit-feedback ALS (Hu, Koren and Volinsky, ICDM 2008) of the library `implicit`,
on one thread from a fixed seed: the same interactions give the same pools on the same kind of machine. Another
processor may round otherwise, so a run that moves takes its prepared data along (rows that an earlier version wrote
are not read).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse

from fgrpo_jax.data.datasets import DataError

FACTORS, ITERATIONS, REGULARISATION, ALPHA, SEED = 32, 15, 0.05, 1.0, 0
FOLDS = 4  # groups of users, see FoldedRetriever
BLOCK = 1024  # queries scored at once


def core(sequences: Mapping[str, Sequence[str]], k: int) -> dict[str, list[str]]:
    """The largest part in which every user has k items and every item k users, in the order given."""
    kept = {user: list(items) for user, items in sequences.items()}
    while True:
        counts = Counter(item for items in kept.values() for item in items)
        smaller = {user: [i for i in items if counts[i] >= k] for user, items in kept.items()}
        smaller = {user: items for user, items in smaller.items() if len(items) >= k}
        if sum(map(len, smaller.values())) == sum(map(len, kept.values())):
            return smaller
        kept = smaller


class Retriever:
    """Item factors fitted to training sequences; a query is embedded from its history alone.

    Raises DataError where the library is missing.
    """

    def __init__(self, walks: Sequence[np.ndarray], n_items: int):
        """walks: item indices of each user."""
        try:
            from implicit.cpu.als import AlternatingLeastSquares
        except ImportError as error:
            raise DataError(
                f"the pools of this data set need the library implicit ({error}): pip install 'fgrpo_jax[baselines]'"
            ) from error
        self._n_items = n_items
        with _one_thread():
            self._model = AlternatingLeastSquares(
                factors=min(FACTORS, n_items),
                regularization=REGULARISATION,
                alpha=ALPHA,
                iterations=ITERATIONS,
                num_threads=1,
                random_state=SEED,
            )
            self._model.fit(_matrix(walks, n_items), show_progress=False)

    def scores(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """[queries, items] float32: higher is better, -inf for the items of the history."""
        rows_QI = _matrix(histories, self._n_items)
        with _one_thread():
            user_QE = self._model.recalculate_user(np.arange(len(histories)), rows_QI)
            score_QI = np.asarray(user_QE @ self._model.item_factors.T, np.float32)
        score_QI[rows_QI.nonzero()] = -np.inf
        return score_QI


class FoldedRetriever:
    """Retrievers of all users and, for training queries, of all but each group of users.

    Factors that have seen a query's targets retrieve them too well: a policy that trains on such pools learns to
    trust scores that are worse at evaluation.
    """

    def __init__(self, walks: Sequence[np.ndarray], n_items: int):
        """walks: item indices of each user that precede all targets of evaluation."""
        self._walks, self._n_items = walks, n_items

    def scored(self, tasks: Sequence[Any], unseen: bool) -> Iterator[tuple[Any, np.ndarray]]:
        """Every task (with a `user`, and item indices as `history`) and the scores of all items.

        unseen: by factors fitted without its user, group after group; otherwise in the order given.
        """
        for fold in range(FOLDS) if unseen else (None,):
            mine = [task for task in tasks if fold is None or task.user % FOLDS == fold]
            for start in range(0, len(mine), BLOCK):
                block = mine[start : start + BLOCK]
                yield from zip(block, self._fitted(fold).scores([task.history for task in block]), strict=True)

    @functools.cache  # noqa: B019 - a builder lives as long as the preparation
    def _fitted(self, fold: int | None) -> Retriever:
        known = [walk for user, walk in enumerate(self._walks) if fold is None or user % FOLDS != fold]
        if not known:
            raise DataError(
                f"matrix factorisation scores a user's training queries by factors of others, in {FOLDS} groups; "
                "there are too few users for two: give more, or candidates of another kind"
            )
        return Retriever(known, self._n_items)


def pool_of(targets: np.ndarray, score_I: np.ndarray, size: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Item indices of a pool, best score first, and of the targets outside of it; ties by index.

    kind: "closed": targets take the places of the lowest-ranked other items; "open": nothing is done.
    """
    ranked = np.argsort(-score_I, kind="stable")
    ranked = ranked[np.isfinite(score_I[ranked])]  # a user who took nearly everything has a smaller pool
    if kind == "open":
        pool = ranked[:size]
        return pool, np.setdiff1d(targets, pool)
    others = ranked[~np.isin(ranked, targets)]
    pool = np.concatenate([others[: max(size - len(targets), 0)], targets])
    return pool[np.argsort(-score_I[pool], kind="stable")], targets[:0]


def _matrix(walks: Sequence[np.ndarray], n_items: int) -> scipy.sparse.csr_matrix:
    start = np.cumsum([0, *map(len, walks)])
    values = np.ones(start[-1], np.float32)
    return scipy.sparse.csr_matrix((values, np.concatenate(walks), start), shape=(len(walks), n_items))


def _one_thread():
    """Sums in one order: the same factors however many cores there are (and what the library asks for)."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, "blas")
