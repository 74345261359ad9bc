"""BM25 of the query's words against the candidates' (Lucene's variant, library bm25s).

The query is the example's text or, where it has none, the texts of its history. Word statistics come
from the pool alone, so that every method sees the same input.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import numpy as np

from fgrpo_jax.evaluation.baselines.base import Method
from fgrpo_jax.types import RankingExample


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def bm25_scores(query: str, texts: Sequence[str]) -> np.ndarray:
    """Score of every text; 0 where it shares no word with the query."""
    import bm25s  # a heavy import, only here

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs every index it builds
    documents = [_words(text) for text in texts]
    vocabulary = set().union(*documents)
    words = [word for word in _words(query) if word in vocabulary]
    if not words:
        return np.zeros(len(texts))
    index = bm25s.BM25()
    index.index(documents, show_progress=False)
    return np.asarray(index.get_scores(words), np.float64)


def fit_bm25(train_examples: Sequence[RankingExample], catalogue: Sequence, kind: str, seed: int) -> Method:
    """Learns nothing: the query's words against each candidate's."""

    def scores(example: RankingExample) -> np.ndarray:
        query = example.query or " ".join(text for _, text in example.history)
        return bm25_scores(query, [text for _, text in example.candidates])

    return lambda examples: [scores(example) for example in examples]
