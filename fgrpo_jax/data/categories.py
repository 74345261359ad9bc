"""categories: choose, of 12 common words, those of two kinds, and put the first kind first.

    Question: fruits, then tools           relevant: apple 1.0, pear 1.0, hammer 0.5

Who knows English can do it; and only who does: the categories of the validation and test splits, with all their
words, occur nowhere in training, not even as wrong answers, so a model from random weights can learn the form and
nothing of the answers. Categories and words: category_words.py, general knowledge compiled for this data set.

A query draws two categories and one or two words of each (gain 1.0 the first, 0.5 the second). Its other candidates
come from further categories of the split, again one or two words of each, so neither groups within a pool nor the
order (shuffled), nor how often a word occurs gives an answer away. All of it comes from SEED, whatever the run's seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fgrpo_jax.data.builder import RankingBuilder
from fgrpo_jax.data.category_words import CATEGORIES
from fgrpo_jax.types import RankingExample

SEED = 24061
QUERIES = {"train": 8000, "validation": 300, "test": 300}
HELD_OUT = {"validation": 15, "test": 16}  # categories; the others are for training
POOL = 12
GAINS = (1.0, 0.5)


class Categories(RankingBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.1.0")  # raise it when words change
    instruction = "Choose the words of the two kinds, those of the first kind first."

    def split_names(self) -> tuple[str, ...]:
        return tuple(QUERIES)

    def frozen(self, split: str) -> dict[str, Any]:
        return {"seed": SEED, "negatives": "one or two words each of further categories of the split; pool shuffled"}

    def examples(self, split: str) -> Iterator[RankingExample]:
        names = categories_of(split)
        rng = np.random.default_rng([SEED, 1, tuple(QUERIES).index(split)])
        for number in range(QUERIES[split]):
            drawn = _groups(rng, names)
            pool = [word for _, words in drawn for word in words]
            gains = dict(zip(pool, np.repeat([*GAINS, 0.0], _sizes(drawn))))
            shuffled = [pool[i] for i in rng.permutation(POOL)]
            yield RankingExample(
                query_id=f"{split}-{number:04d}",
                query=f"{drawn[0][0]}, then {drawn[1][0]}",
                candidates=tuple((word, word) for word in shuffled),
                relevance=tuple(float(gains[word]) for word in shuffled),
            )


def categories_of(split: str) -> list[str]:
    """The names of a split's categories, which no other split has."""
    shuffled = [[*CATEGORIES][i] for i in np.random.default_rng([SEED, 0]).permutation(len(CATEGORIES))]
    start = {"validation": 0, "test": HELD_OUT["validation"], "train": sum(HELD_OUT.values())}[split]
    return shuffled[start : start + HELD_OUT.get(split, len(shuffled))]


def _groups(rng: np.random.Generator, names: list[str]) -> list[tuple[str, list[str]]]:
    """Categories with one or two of their words, POOL words in all; the first two are asked for.

    Numbers of words are drawn until they add up: to cut the last would make pairs likelier among the first.
    """
    sizes = np.zeros(0, int)
    while sizes.sum() != POOL or len(sizes) > len(names):
        drawn = rng.integers(1, 3, POOL)
        sizes = drawn[drawn.cumsum() <= POOL]
    chosen = [names[i] for i in rng.choice(len(names), len(sizes), replace=False)]
    return [(name, rng.choice(CATEGORIES[name], size, replace=False).tolist()) for name, size in zip(chosen, sizes)]


def _sizes(groups: list[tuple[str, list[str]]]) -> list[int]:
    """Words of the first kind, of the second, and of all others."""
    first, second, *others = (len(words) for _, words in groups)
    return [first, second, sum(others)]
