"""BM25 over texts (Lucene's variant, library bm25s)."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import numpy as np


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


class Bm25:
    def __init__(self, texts: Sequence[str]):
        import bm25s  # a heavy import, only here

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs every index it builds
        documents = [words(text) for text in texts]
        self._vocabulary: set[str] = set().union(*documents)
        self._index, self._size = bm25s.BM25(), len(texts)
        if self._vocabulary:
            self._index.index(documents, show_progress=False)

    def scores(self, query: str) -> np.ndarray:
        """Of every text, float64; 0 where it shares no word with the query."""
        known = [word for word in words(query) if word in self._vocabulary]
        if not known:
            return np.zeros(self._size)
        return np.asarray(self._index.get_scores(known), np.float64)

    def search(self, query: str, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the k best texts, best first, ties in their order; and the scores of all."""
        score = self.scores(query)
        k = min(k, len(score))
        least = np.partition(score, len(score) - k)[len(score) - k]
        found = np.flatnonzero(score >= least)
        return found[np.argsort(-score[found], kind="stable")][:k], score
