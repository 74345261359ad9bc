"""Encoding for the ranker: what becomes of examples, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest

from fgrpo_jax.data.datasets import DataError
from fgrpo_jax.policies.ranker.query import blank, encoder
from fgrpo_jax.types import LoggedList, RankingExample

CATALOGUE = {f"i{n}": n for n in range(1, 31)}
POPULARITY = np.log1p(np.arange(31)).astype(np.float32)


def item(n):
    return f"i{n}", f"title {n}"


LONG = RankingExample(
    query_id="q0",
    query="",
    candidates=tuple(item(n) for n in (5, 1, 9, 30, 2)),
    relevance=(0.0, 2.0, 0.0, 1.0, 0.0),
    history=tuple(item(n) for n in (11, 12, 13, 14, 15, 16)),
    retrieval=(1.0, 2.0, 3.0, 4.0, 5.0),
    topics=(0, 1, 0, 2, 2),
    logged=(LoggedList((1, 0, 3), (1.0, 0.0, 0.5)), LoggedList((4,), (0.25,))),
)
SHORT = RankingExample("q1", "", tuple(item(n) for n in (3, 4, 6)), (1.0, 0.0, 0.0), (item(20),))


@pytest.fixture(scope="module")
def encode():
    return encoder(CATALOGUE, POPULARITY, history_max=5, list_length=3)


def test_arrays(encode):
    query = encode([LONG, SHORT])
    assert query.history.tolist() == [[12, 13, 14, 15, 16, 0, 0, 0], [20] + [0] * 7]  # the last ones; rounded up
    assert query.history_len.tolist() == [5, 1]
    assert query.candidates.tolist() == [[5, 1, 9, 30, 2, 0, 0, 0], [3, 4, 6, 0, 0, 0, 0, 0]]
    assert query.n_candidates.tolist() == [5, 3]
    assert query.relevance.tolist() == [[0, 2, 0, 1, 0, 0, 0, 0], [1] + [0] * 7]
    np.testing.assert_allclose(query.retrieval[0, :5], np.array([-2, -1, 0, 1, 2]) / np.sqrt(2), rtol=1e-6)
    assert (query.retrieval[0, 5:] == 0).all() and (query.retrieval[1] == 0).all()
    np.testing.assert_array_equal(query.popularity, POPULARITY[query.candidates])
    assert query.topics.tolist() == [[0, 1, 0, 2, 2, -1, -1, -1], [-1] * 8]
    assert query.logged_items.tolist() == [[[1, 0, 3], [4, -1, -1]], [[-1] * 3] * 2]
    assert query.logged_feedback.tolist() == [[[1, 0, 0.5], [0.25, 0, 0]], [[0] * 3] * 2]


def test_lists_of_any_number_and_length():
    """Of six places, which are not a multiple of four; a query without lists, one with an empty one, one with five."""
    encode = encoder(CATALOGUE, POPULARITY, history_max=5, list_length=6)
    pool = dataclasses.replace(LONG, candidates=tuple(item(n) for n in range(1, 8)), relevance=(1.0,) * 7)
    pool = dataclasses.replace(pool, retrieval=(), topics=())
    shown = [(), ((),), ((6, 5, 4, 3, 2, 1), (0,), (1, 2), (), (3, 4, 5))]
    rows = [
        dataclasses.replace(pool, query_id=f"q{n}", logged=tuple(LoggedList(x, (1.0,) * len(x)) for x in lists))
        for n, lists in enumerate(shown)
    ]
    query = encode(rows)
    assert query.logged_items.shape == query.logged_feedback.shape == (3, 8, 6)
    for lists, items, feedback in zip(shown, query.logged_items, query.logged_feedback, strict=True):
        for j in range(8):
            expected = [*lists[j]] if j < len(lists) else []
            assert items[j].tolist() == expected + [-1] * (6 - len(expected))
            assert feedback[j].tolist() == [1.0] * len(expected) + [0.0] * (6 - len(expected))
    assert encode(rows[:1]).logged_items.tolist() == [[[-1] * 6]]


def test_shapes_depend_on_the_examples_alone(encode):
    query, like = encode([SHORT]), blank(3)
    assert query.candidates.shape == query.topics.shape == (1, 3)
    assert query.history.shape == (1, 1) and query.logged_items.shape == (1, 1, 3)
    for x, fill in zip(jax.tree.leaves(query), jax.tree.leaves(like), strict=True):
        assert x.dtype == fill.dtype and x.ndim == fill.ndim
    equal = dataclasses.replace(SHORT, retrieval=(2.0, 2.0, 2.0))
    assert (encode([equal]).retrieval == 0).all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"candidates": (item(3), item(4), item(31))}, "query 'q1': item 'i31' of its candidates is not in"),
        ({"history": (item(77),)}, "query 'q1': item 'i77' of its history is not in"),
        ({"candidates": (item(3), item(4)), "relevance": (1.0, 0.0)}, "2 candidates, fewer than the 3 items of a list"),
        ({"history": ()}, "query 'q1' has no history, and the ranker knows"),
        ({"logged": (LoggedList((0, 1, 2, 3), (1.0,) * 4),)}, "logged list of 4 items; lists have 3"),
    ],
)  # fmt: skip
def test_what_is_refused(encode, changes, message):
    with pytest.raises(DataError, match=message):
        encode([LONG, dataclasses.replace(SHORT, **changes)])


def test_popularity_is_the_items_alone(encode):
    """In whichever query, relevant or not: or it would say, in training only, which of them are."""
    other = dataclasses.replace(SHORT, query_id="q2", relevance=(0.0, 1.0, 2.0), history=(item(3), item(4)))
    query = encode([SHORT, other])
    np.testing.assert_array_equal(query.popularity[0], query.popularity[1])


def test_popularity_of_another_catalogue():
    with pytest.raises(ValueError, match=r"popularity has shape \(30,\); the catalogue's numbers need \(31,\)"):
        encoder(CATALOGUE, POPULARITY[1:], 5, 3)
