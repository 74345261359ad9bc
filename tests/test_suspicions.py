"""Every suspicion, on a data set that deserves it and on one that does not."""

import dataclasses
import random

import numpy as np
import pytest

from fgrpo_jax.data.datasets import Dataset, Note, in_memory
from fgrpo_jax.evaluation import suspicions
from fgrpo_jax.evaluation.suspicions import auc, find, first
from fgrpo_jax.types import Missed, RankingExample

N, POOL = 60, 8


def padded(rng, i):
    """A text of its own, of any length."""
    return str(i).rjust(rng.randint(5, 20), "x")


def example(rng, query_id, ids=range(100, 1000), **fields):
    """Random items, two of which are relevant, with a history and scores of a first stage that knows a little."""
    items = [(str(i), padded(rng, i)) for i in rng.sample(ids, POOL + 5)]
    gains = [1.0, 0.5, *[0.0] * (POOL - 2)]
    rng.shuffle(gains)
    scores = tuple(rng.random() + gain for gain in gains)
    return dataclasses.replace(
        RankingExample(query_id, "", tuple(items[:POOL]), tuple(gains), tuple(items[POOL:]), scores), **fields
    )


def split(seed, name, change=lambda rng, e: e):
    rng = random.Random(seed)
    return [change(rng, example(rng, f"{name}-{n}")) for n in range(N)]


def dataset(train=None, test=None, **fields):
    splits = {"train": in_memory(train or split(0, "train")), "test": in_memory(test or split(1, "test"))}
    return Dataset("made", "recommendation", "", (), splits, False, {})._replace(**fields)


SCORES = {"random": 0.3, "popularity": 0.5, "covisitation": 0.6}


def names(made, scores=SCORES):
    return [name for name, _ in find(made, list(made.splits["test"]), scores, "ndcg@5")]


def ordered(rng, e):
    """The history's items in the order of their ids, all but one pair."""
    history = sorted(e.history, key=lambda item: int(item[0]))
    return dataclasses.replace(
        e,
        history=tuple(history[:1] + history[2:3] + history[1:2] + history[3:])
        if rng.random() < 0.3
        else tuple(history),
    )


def by(value, highest=True):
    """The two best candidates by a value are the relevant ones, but in a few queries."""

    def change(rng, e):
        if rng.random() < 0.1:
            return e
        best = sorted(e.candidates, key=lambda item: value(e, item), reverse=highest)[:2]
        return dataclasses.replace(e, relevance=tuple(float(item in best) for item in e.candidates))

    return change


def next_id(rng, e):
    """One relevant candidate, the nearest above the history's last, whose id is about in the middle."""
    last = int(e.history[-1][0])
    above = [int(item) for item, _ in e.candidates if int(item) > last]
    best = str(min(above)) if above else e.candidates[0][0]
    return dataclasses.replace(e, relevance=tuple(float(item == best) for item, _ in e.candidates))


def first_place(rng, e):
    place = 2 if rng.random() < 0.8 else rng.randrange(POOL)
    return dataclasses.replace(e, relevance=tuple(float(c == place) for c in range(POOL)))


def copies(rng, e):
    """The text of an answer is that of a candidate that is none, in some pools."""
    if rng.random() < 0.9:
        return e
    answer, other = (next(c for c, gain in enumerate(e.relevance) if (gain > 0) is wanted) for wanted in (True, False))
    pool = list(e.candidates)
    pool[other] = pool[other][0], pool[answer][1]
    return dataclasses.replace(e, candidates=tuple(pool))


def in_history(rng, e):
    best = tuple(item for item, gain in zip(e.candidates, e.relevance) if gain)
    return dataclasses.replace(e, history=e.history + best)


def negatives_in_history(rng, e):
    rest = tuple(item for item, gain in zip(e.candidates, e.relevance) if not gain)
    return dataclasses.replace(e, history=e.history + rest)


def closed(rng, e):
    """Relevant candidates were put into the pool, below all that was retrieved."""
    scores = (score - 10 * (gain > 0) for score, gain in zip(e.retrieval, e.relevance))
    return dataclasses.replace(e, retrieval=tuple(scores))


def drawn_by_the_answer(rng, e):
    """One relevant item out of thirty, whose negatives are always the same."""
    answer = rng.randrange(30)
    ids = [answer, *random.Random(answer).sample(range(30, 200), POOL - 1)]
    rng.shuffle(ids)
    pool = tuple((str(i), padded(rng, i)) for i in ids)
    return RankingExample(e.query_id, "", pool, tuple(float(i == answer) for i in ids), e.history)


def drawn_freely(rng, e):
    answer = rng.randrange(30)
    ids = [answer, *rng.sample([i for i in range(200) if i != answer], POOL - 1)]
    rng.shuffle(ids)
    pool = tuple((str(i), padded(rng, i)) for i in ids)
    return RankingExample(e.query_id, "", pool, tuple(float(i == answer) for i in ids))


SUSPICIOUS = {
    "order_by_id": ordered,
    "same_text": copies,
    "same_place": first_place,
    "largest_id": by(lambda e, item: int(item[0])),
    "smallest_id": by(lambda e, item: int(item[0]), highest=False),
    "next_id": next_id,
    "longest_text": by(lambda e, item: len(item[1])),
    "shortest_text": by(lambda e, item: len(item[1]), highest=False),
    "in_history": in_history,
    "not_in_history": negatives_in_history,
    "reversed_retrieval": closed,
    "pool_overlap": drawn_by_the_answer,
}


def test_a_sound_data_set_raises_no_suspicion():
    assert names(dataset()) == []


@pytest.mark.parametrize("name, change", SUSPICIOUS.items(), ids=SUSPICIOUS)
def test_what_gives_the_answers_away_is_named(name, change):
    made = dataset(split(0, "train", change), split(1, "test", change))
    found = names(made)
    assert name in found and set(found) <= {name, *ALSO.get(name, ())}, found


# What gives the answers away in more than one way: answers below all negatives have the smallest ids too.
ALSO = {"pool_overlap": ("smallest_id",), "next_id": ("order_by_id",)}


def test_few_queries_say_nothing():
    few = in_memory(split(1, "test", first_place)[: suspicions.FEWEST - 1])
    assert names(dataset()._replace(splits={"test": few})) == []


def test_pools_that_are_drawn_freely_do_not_overlap_by_their_answer():
    assert "pool_overlap" not in names(dataset(split(0, "train", drawn_freely), split(1, "test", drawn_freely)))


def test_a_first_stage_that_finds_the_answers_is_none():
    def good(rng, e):
        return dataclasses.replace(e, retrieval=tuple(10 * gain + rng.random() for gain in e.relevance))

    assert names(dataset(test=split(1, "test", good))) == []


def test_times_that_the_builder_doubts_are_named():
    made = dataset(notes=(Note("time", "all times are 0"), Note("data", "3 items are left out")))
    assert find(made, [], SCORES, "ndcg@5") == [("time", "all times are 0")]


@pytest.mark.parametrize(
    "scores, wins",
    [
        ({"random": 0.3, "popularity": 0.5, "covisitation": 0.6}, False),
        ({"random": 0.3, "popularity": 0.5, "covisitation": 0.4, "bm25": 0.45}, True),
        ({"random": 0.3, "popularity": 0.35, "covisitation": 0.3}, False),  # hardly ahead of chance
        ({"random": 0.3, "bm25": 0.5}, False),  # no items that recur
        ({"random": 0.3, "popularity": 0.5}, False),
    ],
)
def test_popularity_that_wins_alone(scores, wins):
    assert names(dataset(), scores) == ["popularity"] * wins


def test_queries_that_two_splits_share():
    train, test = split(0, "train"), split(1, "test")
    again = [dataclasses.replace(e, query_id=f"again-{e.query_id}") for e in train[3:5]]
    (found,) = suspicions.duplicates(dataset(train, test + again))
    assert found.text.startswith(
        "2 of 62 queries of test occur in another split too (as 'again-train-3' is 'train-3' of"
    )
    other = [dataclasses.replace(e, relevance=e.relevance[::-1]) for e in again]  # other answers to the same history
    assert suspicions.duplicates(dataset(train, test + other)) == []
    asked = [dataclasses.replace(e, query="who?", history=()) for e in (train[0], test[0])]
    assert suspicions.duplicates(dataset([asked[0]], [asked[1]]))  # the same question, whatever the pool
    twice = dataset([train[0], dataclasses.replace(train[0], query_id="b")], test)
    assert suspicions.duplicates(twice) == []  # within a split
    lost = [
        dataclasses.replace(e, relevance=(0.0,) * POOL, missed=(Missed(m, 1.0),))
        for e, m in ((again[0], "a"), (again[0], "b"))
    ]
    assert suspicions.duplicates(dataset([lost[0]], [lost[1]])) == []


@pytest.mark.parametrize(
    "scores, relevance, value",
    [
        ([3, 2, 1], [1, 0, 0], 1.0),
        ([1, 2, 3], [1, 0, 0], 0.0),
        ([1, 1, 1], [1, 0, 0], 0.5),
        ([3, 1, 2, 0], [0, 2, 1, 0], 0.5),
    ],
)
def test_auc(scores, relevance, value):
    assert auc(scores, np.array(relevance) > 0) == value


@pytest.mark.parametrize("scores, value", [([3, 2, 1], 1.0), ([1, 2, 0], 0.0), ([2, 2, 1], 0.5), ([1, 1, 1], 1 / 3)])
def test_the_first_of_a_cue_with_ties_shared_out(scores, value):
    assert first(scores, np.array([True, False, False])) == value


def test_queries_without_both_kinds_of_candidates_are_left_out():
    def one_kind(rng, e):
        gain = float(rng.random() < 0.5)
        return e if rng.random() < 0.3 else dataclasses.replace(e, relevance=(gain,) * POOL)

    assert names(dataset(test=split(1, "test", one_kind))) == []


def walks(order):
    """100 users, a user's five windows one after the other; eight of twenty items each, in some order."""
    rng, rows = random.Random(0), []
    for user in range(100):
        items = [(f"i{n}", f"Item {n}") for n in order(rng, rng.sample(range(20), 8))]
        for n in range(3, 8):
            rows.append(RankingExample(f"train-{user:03d}-{n}", "", (items[n],), (1.0,), tuple(items[:n])))
    return rows


@pytest.mark.parametrize("by, named", [(None, False), (lambda n: 7 * n % 20, True), (lambda n: -n, True)])
def test_a_hidden_order_of_items_is_named(by, named):
    """Windows of one user count once, or every order would be confirmed by the windows that repeat it."""

    def order(rng, items):
        return items if by is None else sorted(items, key=by)

    made = dataset(walks(order), sampled_negatives=True)
    assert names(made) == ["fixed_order"] * named


def test_half_of_the_answers_inserted_below_what_was_retrieved_are_seen_at_the_end():
    """As on closed pools whose other targets were retrieved well: the AUC of the reversed order is a half."""

    def half(rng, e):
        best, *_ = (place for place, gain in enumerate(e.relevance) if gain)
        scores = [score + 5 * (gain > 0) for score, gain in zip(e.retrieval, e.relevance)]
        scores[best] = -10.0
        return dataclasses.replace(e, retrieval=tuple(scores))

    assert names(dataset(test=split(1, "test", half))) == ["reversed_retrieval"]


def test_ids_of_many_digits_are_no_numbers():
    """Python refuses to read more than 4,300 of them."""
    made = dataset()
    long = [
        dataclasses.replace(e, candidates=tuple(("9" * 5000 + item, text) for item, text in e.candidates))
        for e in made.splits["test"]
    ]
    assert names(dataset(test=long)) == names(made)
