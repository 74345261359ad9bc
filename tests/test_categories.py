"""The data set of words and categories: what is held out is nowhere else, and only meaning gives answers away."""

from collections import Counter

import numpy as np
import pytest

from fgrpo_jax.config import DataConfig
from fgrpo_jax.data import categories, datasets
from fgrpo_jax.data.category_words import CATEGORIES

OF = {word: name for name, words in CATEGORIES.items() for word in words}


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(categories, "QUERIES", {"train": 600, "validation": 300, "test": 300})
        config = DataConfig(name="categories", prepared_dir=str(tmp_path_factory.mktemp("prepared")))
        return {name: list(split) for name, split in datasets.load(config).splits.items()}


def test_the_lists():
    assert len(CATEGORIES) >= 60 and all(len(words) >= 15 for words in CATEGORIES.values())
    assert len(OF) == sum(map(len, CATEGORIES.values()))  # no word is in two
    assert all(word == word.strip(",.:") and word.isascii() for word in OF)


def test_categories_are_of_one_split():
    parts = [set(categories.categories_of(split)) for split in categories.QUERIES]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(CATEGORIES)


def test_queries(splits):
    """What is asked for is what is relevant, with its gain; and no word of another split is seen."""
    for split, rows in splits.items():
        known = set(categories.categories_of(split))
        for row in rows:
            words = [text for _, text in row.candidates]
            assert len(set(words)) == len(words) == categories.POOL
            assert {OF[word] for word in words} <= known
            asked = dict(zip(row.query.split(", then "), categories.GAINS, strict=True))
            assert row.relevance == tuple(asked.get(OF[word], 0.0) for word in words)
            assert max(Counter(OF[word] for word in words).values()) <= 2
            assert set(row.relevance) == {1.0, 0.5, 0.0}
        assert len({row.candidates for row in rows}) == len(rows)


def test_neither_place_nor_group_nor_frequency_tells(splits):
    """Within 3.5 standard errors: relevant words are spread over the pool, and come in pairs as often as others."""
    for rows in splits.values():
        gains = np.array([row.relevance for row in rows]) > 0
        share, error = gains.mean(), np.sqrt(gains.mean() * (1 - gains.mean()) / len(rows))
        assert np.abs(gains.mean(0) - share).max() < 3.5 * error  # the largest of twelve
        sizes = {True: [], False: []}
        for row in rows:
            asked = row.query.split(", then ")
            for name, size in Counter(OF[text] for _, text in row.candidates).items():
                sizes[name in asked].append(size)
        assert abs(np.mean(sizes[True]) - np.mean(sizes[False])) < 3.5 * 0.5 / np.sqrt(len(sizes[True]))
    rows = splits["train"]
    shown = Counter(text for row in rows for _, text in row.candidates)
    right = Counter(text for row in rows for (_, text), gain in zip(row.candidates, row.relevance) if gain)
    by_word = {word: right[word] / shown[word] for word in shown if shown[word] >= 10}
    assert np.std([*by_word.values()]) < 0.15  # that of chance, at these counts
