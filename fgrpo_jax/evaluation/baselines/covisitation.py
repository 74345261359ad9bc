"""Item co-visitation: which items follow or accompany each other in training sequences.

With n_i the occurrences of item i and n_ij a weighted count of its meetings with j, at distance
d in a sequence, a candidate c scores, over the history items h of age a (1 = newest),

    s(c) = sum_h recency(a) * n_hc / sqrt(n_h * n_c)

    name                   n_hc counts                              recency
    covisitation           both orders, any distance                1       plain cosine
    covisitation_window    both orders, d <= 10                     1
    covisitation_ordered   c after h only, each weighted by 1/d     1/a

Candidates that never met the history score 0 and keep the pool's order.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse

from fgrpo_jax.evaluation.baselines.base import Fit, Method, interactions, require_interactions
from fgrpo_jax.types import RankingExample


class Formula(NamedTuple):
    """`distance` and `age` are arrays of whole numbers >= 1; both functions return weights."""

    meeting: Callable[[np.ndarray], np.ndarray]
    recency: Callable[[np.ndarray], np.ndarray]
    both_orders: bool


PLAIN = Formula(meeting=np.ones_like, recency=np.ones_like, both_orders=True)
WINDOW = Formula(meeting=lambda distance: (distance <= 10) * 1.0, recency=np.ones_like, both_orders=True)
ORDERED = Formula(meeting=lambda distance: 1 / distance, recency=lambda age: 1 / age, both_orders=False)


def sequences(examples: Sequence[RankingExample]) -> list[tuple[str, ...]]:
    """Item sequences behind training rows that each show a window of one.

    A row whose history is the end of another row's history + answers continues it, so every
    interaction occurs once. Rows in sequence order are preferred where two could continue.
    """
    rows = [(tuple(item for item, _ in example.history), interactions(example)) for example in examples]
    width = max((len(history) for history, _ in rows), default=0)
    tails = [(history + answers)[-width:] if width else () for history, answers in rows]
    waiting = defaultdict(deque)
    for i, (history, _) in enumerate(rows):
        if history:
            waiting[history].append(i)
    seen, known_tails = [False] * len(rows), set(tails)

    def following(i: int) -> int | None:
        if i + 1 < len(rows) and not seen[i + 1] and tails[i] and rows[i + 1][0] == tails[i]:
            return i + 1
        queue = waiting[tails[i]]
        while queue and seen[queue[0]]:
            queue.popleft()
        return queue[0] if queue else None

    found = []
    # Rows that continue nothing come first: only they can start a sequence.
    for start in sorted(range(len(rows)), key=lambda i: bool(rows[i][0]) and rows[i][0] in known_tails):
        if seen[start]:
            continue
        sequence, i = list(rows[start][0]), start
        while i is not None:
            seen[i] = True
            sequence += rows[i][1]
            i = following(i)
        found.append(tuple(sequence))
    return found


def _similarity(walks: list[np.ndarray], n_items: int, formula: Formula) -> scipy.sparse.csr_array:
    """n_hc / sqrt(n_h n_c) as [history item, candidate item]."""
    before, after, weight = [], [], []
    for walk in walks:
        i, j = np.triu_indices(len(walk), k=1)
        w = np.asarray(formula.meeting((j - i).astype(np.float64)))
        kept = w > 0
        before.append(walk[i[kept]])
        after.append(walk[j[kept]])
        weight.append(w[kept])
    where = (np.concatenate(before), np.concatenate(after))
    meetings = scipy.sparse.coo_array((np.concatenate(weight), where), shape=(n_items, n_items)).tocsr()
    if formula.both_orders:
        meetings = meetings + meetings.T
    counts = np.bincount(np.concatenate(walks), minlength=n_items)
    scale = scipy.sparse.diags_array(1 / np.sqrt(np.maximum(counts, 1.0)))
    return (scale @ meetings @ scale).tocsr()


def fit_covisitation(formula: Formula) -> Fit:
    """The baseline of a formula."""

    def fit(train_examples: Sequence[RankingExample], catalogue: Sequence, kind: str, seed: int) -> Method:
        require_interactions(train_examples, kind)
        walks = sequences(train_examples)
        names = dict.fromkeys([item for item, _ in catalogue] + [item for walk in walks for item in walk])
        index = {item: i for i, item in enumerate(names)}
        walks = [np.array([index[item] for item in walk], np.int64) for walk in walks]
        similarity = _similarity(walks, len(index), formula)

        def scores(example: RankingExample) -> np.ndarray:
            ages = range(len(example.history), 0, -1)
            known = [(index[item], age) for (item, _), age in zip(example.history, ages) if item in index]
            columns = np.array([index.get(item, -1) for item, _ in example.candidates])
            if not known:
                return np.zeros(len(columns))
            items, age = np.array(known, np.float64).T
            row = formula.recency(age) @ similarity[items.astype(int)]
            return np.where(columns >= 0, row[columns], 0.0)

        return lambda examples: [scores(example) for example in examples]

    return fit
