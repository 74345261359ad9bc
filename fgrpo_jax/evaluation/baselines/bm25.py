"""BM25 of the query's words against the candidates' (data/bm25.py).

The query is the example's text or, where it has none, the texts of its history. Word statistics come
from the pool alone, so that every method sees the same input.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fgrpo_jax.data.bm25 import Bm25
from fgrpo_jax.evaluation.baselines.base import Method
from fgrpo_jax.types import RankingExample


def bm25_scores(query: str, texts: Sequence[str]) -> np.ndarray:
    """Score of every text; 0 where it shares no word with the query."""
    return Bm25(texts).scores(query)


def fit_bm25(train_examples: Sequence[RankingExample], catalogue: Sequence, kind: str, seed: int) -> Method:
    """Learns nothing: the query's words against each candidate's."""

    def scores(example: RankingExample) -> np.ndarray:
        query = example.query or " ".join(text for _, text in example.history)
        return bm25_scores(query, [text for _, text in example.candidates])

    return lambda examples: [scores(example) for example in examples]
