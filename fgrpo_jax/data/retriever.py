"""First stage of a two-stage recommender: k-core filtering, and a matrix factorisation that proposes items.

The factorisation is implicit-feedback ALS (Hu, Koren and Volinsky, ICDM 2008) of the library `implicit`,
on one thread from a fixed seed: the same interactions give the same pools on the same kind of machine. Another
processor may round otherwise, so a run that moves takes its prepared data along.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.sparse

from fgrpo_jax.data.datasets import DataError

FACTORS, ITERATIONS, REGULARISATION, ALPHA, SEED = 32, 15, 0.05, 1.0, 0


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


def _matrix(walks: Sequence[np.ndarray], n_items: int) -> scipy.sparse.csr_matrix:
    start = np.cumsum([0, *map(len, walks)])
    values = np.ones(start[-1], np.float32)
    return scipy.sparse.csr_matrix((values, np.concatenate(walks), start), shape=(len(walks), n_items))


def _one_thread():
    """Sums in one order: the same factors however many cores there are (and what the library asks for)."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, "blas")
