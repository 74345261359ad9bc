"""A start is warned of where candidates are tokens that no training query has."""

import warnings
from types import SimpleNamespace

import pytest
from tiny import changed

from fgrpo_jax.config import Config
from fgrpo_jax.policies.llm.checks import warn_of_untrained
from fgrpo_jax.types import RankingExample


def example(items, history=()):
    candidates, seen = (tuple((i, f"item {i}") for i in ids) for ids in (items, history))
    return RankingExample("q", "", candidates, (1.0,) + (0.0,) * (len(items) - 1), seen)


def dataset(test, sampled=False):
    train = [example("abc", "d"), example("ef")]
    return SimpleNamespace(
        sampled_negatives=sampled, splits={"train": train, "test": [example(test[:10]), example(test[10:])]}
    )


def test_many_candidates_that_training_never_names():
    seen, new = "abcdef" * 6, "xyz"
    with pytest.warns(UserWarning, match=r"8\.3% of the candidates of test are in no training query"):
        warn_of_untrained(Config(), dataset(seen[:33] + new), "test")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_untrained(Config(), dataset(seen + new[:1]), "test")  # few
        warn_of_untrained(Config(), dataset(seen + new, sampled=True), "test")  # may be drawn
        warn_of_untrained(changed(Config(), {"tokenizer": "words"}), dataset(seen + new), "test")  # are read
        warn_of_untrained(Config(), dataset(seen + new), "train")
