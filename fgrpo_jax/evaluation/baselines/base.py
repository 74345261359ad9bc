"""What a baseline is.

    fit(train_examples, catalogue, kind, seed) -> method
    method(examples) -> one array of scores [n_candidates] per example, higher is better

`train_examples` are those of the training split: candidates hold at least the relevant items,
history all the items shown. `catalogue` is every item there is, `(id, text)` each. `fit` or `method` raises
`NotApplicable` where the baseline makes no sense for the data; its message is printed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fgrpo_jax.types import RankingExample

Method = Callable[[Sequence[RankingExample]], list[np.ndarray]]
Fit = Callable[[Sequence[RankingExample], Sequence[tuple[str, str]], str, int], Method]


class NotApplicable(ValueError):
    """The baseline makes no sense for this data; the message says why."""


def interactions(example: RankingExample) -> tuple[str, ...]:
    """Ids of the relevant candidates: what the user took, in the order given."""
    return tuple(item for (item, _), gain in zip(example.candidates, example.relevance) if gain > 0)


def require_interactions(train_examples: Sequence[RankingExample], kind: str) -> None:
    """Raise NotApplicable unless the same items occur in many training queries."""
    if kind != "recommendation":
        raise NotApplicable(f"needs items shared between queries; a {kind} pool is its query's own")
    if not len(train_examples):
        raise NotApplicable("there is no training split to count in")
