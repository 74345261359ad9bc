"""Random order, training counts, and the order of the first stage."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from fgrpo_jax.evaluation.baselines.base import Method, NotApplicable, interactions, require_interactions
from fgrpo_jax.types import RankingExample


def fit_random(train_examples: Sequence[RankingExample], catalogue: Sequence, kind: str, seed: int) -> Method:
    """Uniform scores, a function of (seed, query id) alone."""

    def scores(example: RankingExample) -> np.ndarray:
        digest = hashlib.sha256(f"{seed}\0{example.query_id}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:16])).random(len(example.candidates))

    return lambda examples: [scores(example) for example in examples]


def fit_popularity(train_examples: Sequence[RankingExample], catalogue: Sequence, kind: str, seed: int) -> Method:
    """How often a candidate was the answer of a training query (histories are not counted again)."""
    require_interactions(train_examples, kind)
    counts = Counter(item for example in train_examples for item in interactions(example))
    return lambda examples: [
        np.array([counts[item] for item, _ in example.candidates], np.float64) for example in examples
    ]


def fit_retrieval(train_examples: Sequence[RankingExample], catalogue: Sequence, kind: str, seed: int) -> Method:
    """The scores of the first stage that proposed the pool: learns nothing."""

    def scores(example: RankingExample) -> np.ndarray:
        if not example.retrieval:
            raise NotApplicable(f"no first stage has scored these pools (query {example.query_id})")
        return np.array(example.retrieval)

    return lambda examples: [scores(example) for example in examples]
