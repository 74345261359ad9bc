"""synthetic: a generated world of readers with several interests, of which a visit is about one.

An article is named by two words that it is about ("robin salmon"), both of one shelf; SHELVES says what stands on
each, category_words.py has the words. A third of the words please no one much, a third please, a third please a lot
(0, 1, 2), and an article pleases as the word does that it begins with. A reader has `interests` shelves, with shares
of attention from a Dirichlet distribution of `concentration`. Articles of the history are drawn by

    shelf ~ shares,   article of the shelf ~ exp(TASTE x how much it pleases)

and the visit is about one shelf, by the same shares. The pool holds some articles of each of the reader's shelves,
`wanted` says from how many to how many, drawn evenly for each, and others from all other shelves, all of them uniformly
of what was not read. Relevant are those of the shelf that is meant, with a gain of 1, 3 or 7 (GAINS) as they please;
nothing but the history tells which shelf that is, and the whole of it only how likely each is. The best slate covers
several; the best ranking weighs how likely an article is meant by its gain.

An imitator of transcripts learns neither. Each of those is about one interest, so what it has written itself tells
it, wrongly, which one is meant (Ortega et al., arXiv 2110.10819, call it a delusion), and more of them make it surer.

Training sees KNOWN articles of every shelf, and histories hold no others. An article of an evaluation pool is, with
probability NEW_SHARE, one of NEW others, made of the same words: who counted articles knows nothing of these, who
learnt words does. All of it comes from data.synthetic.seed, whatever the seed of the run. Constants and the settings
of configs/synthetic.py were chosen on earlier forms of the worlds of seeds 1 and 2; the default world chose nothing.

On its test queries, who knows the world, and of the visit what was read, gets an NDCG@5 of 55.9 and a slate recall of
80.5 (articles by the probability of their shelf, times gain over that shelf's ideal DCG, or over its relevant
articles); who stays with the likeliest shelf gets 39.8 and 43.8.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from fgrpo_jax.config import DataConfig, SyntheticConfig
from fgrpo_jax.config_files import fingerprint
from fgrpo_jax.data.builder import RankingBuilder
from fgrpo_jax.data.category_words import CATEGORIES
from fgrpo_jax.data.datasets import Item
from fgrpo_jax.types import RankingExample

QUERIES = {"train": 12_000, "validation": 1000, "test": 1000}
KNOWN, NEW, NEW_SHARE = 400, 200, 1 / 3  # articles of a shelf
WORDS = 14  # of each category of a shelf
HISTORY, TASTE = 10, 1.0
GAINS = np.array([1.0, 3.0, 7.0])  # of an article that pleases 0, 1, 2

SHELVES = (
    ("fruits", "vegetables", "herbs and spices"),
    ("birds", "wild animals", "insects"),
    ("fish", "sea animals", "boats and ships"),
    ("trees", "flowers", "parts of a plant"),
    ("clothes", "fabrics", "gems"),
    ("furniture", "parts of a house", "electrical appliances"),
    ("road vehicles", "parts of a car", "metals"),
    ("countries", "cities", "rivers"),
    ("professions", "tools", "office supplies"),
    ("sports", "games", "dances"),
    ("drinks", "desserts", "things for cooking and eating"),
    ("weather", "land forms", "bodies of water"),
    ("school subjects", "things in space", "units of measure"),
    ("musical instruments", "kinds of music", "composers"),
    ("painters", "writers", "kinds of writing"),
    ("royal titles", "weapons", "Greek gods"),
)
"""The categories (category_words.py) of each."""


class Articles(NamedTuple):
    """Numbered shelf by shelf, KNOWN + NEW on each, of which training sees the first KNOWN.

    pleasing [A]: 0, 1 or 2.
    """

    pleasing: np.ndarray
    names: tuple[str, ...]

    @property
    def shelf(self) -> np.ndarray:
        return np.arange(len(self.names)) // (KNOWN + NEW)

    @property
    def known(self) -> np.ndarray:
        return np.arange(len(self.names)) % (KNOWN + NEW) < KNOWN


class Visit(NamedTuple):
    """Article numbers of a history, oldest first, and of a pool, with gains."""

    history: np.ndarray
    pool_C: np.ndarray
    gain_C: np.ndarray


class Synthetic(RankingBuilder, skip_registration=True):
    VERSION = tfds.core.Version("2.1.0")  # raise it when the same settings and constants make another world
    instruction = "Choose and rank the articles this reader wants now."

    @classmethod
    def options_of(cls, config: DataConfig) -> dict[str, Any]:
        return {**vars(config.synthetic), "constants": _constants()}

    def __init__(self, files: dict[str, Path], given: tuple[Item, ...] | None, options: dict[str, Any], **kwargs: Any):
        super().__init__(files, given, options=options, **kwargs)
        names = {field.name for field in dataclasses.fields(SyntheticConfig)}
        self._config = SyntheticConfig(**{name: value for name, value in options.items() if name in names})

    def split_names(self) -> tuple[str, ...]:
        return tuple(QUERIES)

    def catalogue(self) -> tuple[Item, ...]:
        return tuple((str(i), name) for i, name in enumerate(self._articles.names))

    def frozen(self, split: str) -> dict[str, Any]:
        others = "articles of the reader's other interests and of other shelves, uniform; a third are new"
        return {"seed": self._config.seed, "negatives": others}

    @cached_property
    def _articles(self) -> Articles:
        return make_articles(self._config.seed)

    def examples(self, split: str) -> Iterator[RankingExample]:
        items = self.catalogue()
        for number, visit in enumerate(make_visits(self._articles, self._config, split)):
            yield RankingExample(
                query_id=f"{split}-{number:06d}",
                query="",
                candidates=tuple(items[i] for i in visit.pool_C),
                relevance=tuple(visit.gain_C.tolist()),
                history=tuple(items[i] for i in visit.history),
            )


def _constants() -> dict[str, Any]:
    """What a world depends on beside its settings."""
    words = [words_of(category) for shelf in SHELVES for category in shelf]
    return {
        "queries": QUERIES, "articles": (KNOWN, NEW, NEW_SHARE), "history": (HISTORY, TASTE), "gains": GAINS.tolist(),
        "words": fingerprint(words),
    }  # fmt: skip


def make_articles(seed: int) -> Articles:
    """KNOWN and then NEW articles of each shelf: two different words of it, in either order."""
    rng = np.random.default_rng([seed, 0])
    names, pleasing = [], []
    for categories in SHELVES:
        words = [word for category in categories for word in words_of(category)]
        pleases = rng.permutation(len(words)) % len(GAINS)
        pairs = np.argwhere(np.triu(np.ones((len(words), len(words)), bool), 1))
        for pair in pairs[rng.permutation(len(pairs))[: KNOWN + NEW]]:
            first, second = rng.permutation(pair)
            names.append(f"{words[first]} {words[second]}")
            pleasing.append(pleases[first])
    return Articles(np.array(pleasing), tuple(names))


def words_of(category: str) -> list[str]:
    """The first WORDS of a category that are one word."""
    return [word for word in CATEGORIES[category] if " " not in word][:WORDS]


def make_visits(articles: Articles, config: SyntheticConfig, split: str) -> Iterator[Visit]:
    """The visits of a split, each by a reader of its own; those of `train` know no new article."""
    rng = np.random.default_rng([config.seed, 1, tuple(QUERIES).index(split)])
    noise = np.random.default_rng([config.seed, 2])  # of its own: the same visits, whatever is misplaced
    for _ in range(QUERIES[split]):
        visit = _visit(rng, articles, config, NEW_SHARE if split != "train" else 0.0)
        yield _misplaced(noise, visit, config.misplaced) if split == "train" else visit


def _visit(rng: np.random.Generator, articles: Articles, config: SyntheticConfig, new_share: float) -> Visit:
    shelves = rng.permutation(len(SHELVES))
    shares = rng.dirichlet([config.concentration] * config.interests)
    low, high = config.wanted
    sizes = rng.integers(low, high + 1, size=config.interests)
    read = rng.choice(config.interests, HISTORY, p=shares)  # interests, article by article
    history, pool = np.zeros(HISTORY, int), []
    for interest, (shelf, size) in enumerate(zip(shelves, sizes, strict=False)):
        known, new = _on(shelf)
        # With Gumbel noise, the best first: draws by exp(TASTE x pleasing), none of them twice.
        order = np.argsort(-(TASTE * articles.pleasing[known] + rng.gumbel(size=KNOWN)))
        places = np.flatnonzero(read == interest)
        history[places] = known[order[: len(places)]]
        pool.append(_draw(rng, known[order[len(places) :]], new, size, new_share))
    known, new = (numbers.ravel() for numbers in _on(shelves[config.interests :, None]))
    pool.append(_draw(rng, known, new, config.pool - sizes.sum(), new_share))
    pool_C = rng.permutation(np.concatenate(pool))
    meant = pool_C // (KNOWN + NEW) == shelves[rng.choice(config.interests, p=shares)]
    return Visit(history, pool_C, meant * GAINS[articles.pleasing[pool_C]])


def _on(shelf: Any) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the known and of the new articles of a shelf, or of several, [S,1]."""
    start = shelf * (KNOWN + NEW)
    return start + np.arange(KNOWN), start + np.arange(KNOWN, KNOWN + NEW)


def _draw(rng: np.random.Generator, known: np.ndarray, new: np.ndarray, count: int, new_share: float) -> np.ndarray:
    n_new = rng.binomial(count, new_share)
    parts = (rng.choice(new, n_new, replace=False), rng.choice(known, count - n_new, replace=False))
    return np.concatenate(parts)


def _misplaced(rng: np.random.Generator, visit: Visit, share: float) -> Visit:
    """That share of the gains, by chance, on other articles of the pool."""
    gain_C = visit.gain_C.copy()
    wrong = np.flatnonzero((gain_C > 0) & (rng.random(gain_C.shape) < share))
    others = rng.choice(np.flatnonzero(gain_C == 0), len(wrong), replace=False)
    gain_C[others], gain_C[wrong] = gain_C[wrong], 0.0
    return visit._replace(gain_C=gain_C)
