"""Baselines on hand-made worlds small enough to count on paper."""

import dataclasses

import numpy as np
import pytest

from fgrpo_jax.evaluation import evaluate
from fgrpo_jax.evaluation.baselines import BASELINES, NotApplicable
from fgrpo_jax.evaluation.baselines.bm25 import bm25_scores
from fgrpo_jax.evaluation.baselines.covisitation import sequences
from fgrpo_jax.types import RankingExample


def example(query_id, history, candidates, relevant, query=""):
    return RankingExample(
        query_id=query_id,
        query=query,
        candidates=tuple((item, f"item {item}") for item in candidates),
        relevance=tuple(float(item in relevant) for item in candidates),
        history=tuple((item, f"item {item}") for item in history),
    )


def windows(walks, width=10):
    """Training rows as the data sets give them: a window of history, and the next item."""
    return [
        example(f"{w}-{i}", walk[max(0, i - width) : i], [walk[i]], [walk[i]])
        for w, walk in enumerate(walks)
        for i in range(len(walk))
    ]


CATALOGUE = tuple((item, f"item {item}") for item in "abcdefgh")
WALKS = ["abc", "abd", "cb", "e"]


def fitted(name, walks=WALKS, width=10):
    return BASELINES[name](windows(walks, width), CATALOGUE, "recommendation", 0)


def test_popularity_counts_every_answer_once():
    (scores,) = fitted("popularity")([example("q", "", "abcdeh", "a")])
    np.testing.assert_array_equal(scores, [2, 3, 2, 1, 1, 0])


def test_random_depends_on_seed_and_query_id_alone():
    queries = [example("q1", "a", "bcd", "b"), example("q2", "a", "bcd", "b"), example("q1", "", "efg", "e")]
    fit = BASELINES["random"]
    first, second, again = fit([], (), "qa", 0)(queries)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, fit([], (), "qa", 1)(queries)[0])


def test_random_meets_its_closed_form():
    """20 candidates, 1 relevant: R@3 is 3/20, R@5 is 5/20, nDCG@5 is sum 1/log2(i+1) / 20."""
    pool = [f"c{i}" for i in range(20)]
    queries = [example(f"q{i}", "", pool, [pool[i % 20]]) for i in range(4000)]
    scores = BASELINES["random"]([], (), "recommendation", 0)(queries)
    rank = np.array([(s > s[i % 20]).sum() for i, s in enumerate(scores)])
    gain = np.where(rank < 5, 1 / np.log2(rank + 2), 0)
    for values, expected in ((rank < 3, 0.15), (rank < 5, 0.25), (gain, 0.1474)):
        error = np.std(values) / np.sqrt(len(values))
        assert abs(np.mean(values) - expected) < 3 * error


def test_retrieval_is_the_order_of_the_first_stage_where_there_is_one():
    plain = example("q", "a", "bcd", "b")
    ranked = dataclasses.replace(plain, retrieval=(0.5, -1.0, 2.0))
    fit = BASELINES["retrieval"]
    np.testing.assert_array_equal(fit([], (), "qa", 0)([ranked])[0], [0.5, -1.0, 2.0])
    predictions, left_out = evaluate.run_baselines(["retrieval", "random"], [], (), "qa", 0, [ranked], 2, 2)
    assert predictions["retrieval"][0].ranking == (2, 0) and not left_out
    predictions, left_out = evaluate.run_baselines(["retrieval", "random"], [], (), "qa", 0, [plain], 2, 2)
    assert set(predictions) == {"random"} and "no first stage" in left_out["retrieval"]


@pytest.mark.parametrize("order", ["as written", "shuffled"])
@pytest.mark.parametrize("shortest", [0, 3])
def test_sequences_join_windows_again(order, shortest):
    walks = ["abcdefgh", "hgfedcba", "bdfh", "badc"]
    rows = [row for row in windows(walks, width=3) if len(row.history) >= shortest]
    if order == "shuffled":
        rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    assert sorted("".join(walk) for walk in sequences(rows)) == sorted(walks)


def test_sequences_prefer_the_next_row_where_two_continue():
    walks = ["abcd", "abce", "abcf"]
    assert ["".join(walk) for walk in sequences(windows(walks, width=2))] == walks
    walks = ["abce", "zabcd"]  # without its first rows, abce looks like the rest of zabcd
    rows = [row for row in windows(walks, width=3) if len(row.history) == 3]
    assert sorted("".join(walk) for walk in sequences(rows)) == walks


def test_sequences_end_in_spite_of_a_cycle():
    rows = [example("1", "ab", "a", "a"), example("2", "ba", "b", "b")]
    assert sum(map(len, sequences(rows))) == 4
    assert sequences([]) == []


def test_plain_covisitation_is_the_cosine_of_counts():
    (scores,) = fitted("covisitation")([example("q", "ah", "bcdeh", "b")])
    n = dict(a=2, b=3, c=2, d=1)
    met = dict(b=2, c=1, d=1)
    expected = [met[item] / np.sqrt(n["a"] * n[item]) for item in "bcd"]
    np.testing.assert_allclose(scores, [*expected, 0, 0])


def test_window_covisitation_forgets_what_is_far():
    walk = "a" + "h" * 10 + "b"
    assert fitted("covisitation", [walk])([example("q", "a", "b", "b")])[0][0] > 0
    assert fitted("covisitation_window", [walk])([example("q", "a", "b", "b")])[0][0] == 0


def test_ordered_covisitation_follows_the_direction_and_the_distance():
    method = fitted("covisitation_ordered")
    (scores,) = method([example("q", "b", "acd", "c")])
    np.testing.assert_allclose(scores, [0, 1 / np.sqrt(3 * 2), 1 / np.sqrt(3 * 1)])  # a comes before b
    (scores,) = method([example("q", "ab", "c", "c")])
    np.testing.assert_allclose(scores, [(1 / 2) * (1 / 2) / np.sqrt(2 * 2) + 1 / np.sqrt(3 * 2)])


@pytest.mark.parametrize("name", ["covisitation", "covisitation_window", "covisitation_ordered"])
def test_covisitation_of_strangers_is_zero(name):
    shown = (("", "ab", "a"), ("z", "yb", "b"), ("a", "zy", "z"))
    queries = [example(f"q{i}", *parts) for i, parts in enumerate(shown)]
    for scores in fitted(name)(queries):
        np.testing.assert_array_equal(scores, 0)
    assert fitted(name, ["a", "b"])([example("q", "a", "b", "b")])[0][0] == 0  # nobody met anybody


@pytest.mark.parametrize("name", ["popularity", "covisitation", "covisitation_window", "covisitation_ordered"])
def test_counting_baselines_say_why_they_do_not_apply(name):
    with pytest.raises(NotApplicable, match="qa pool"):
        BASELINES[name](windows(WALKS), (), "qa", 0)
    with pytest.raises(NotApplicable, match="training split"):
        BASELINES[name]([], CATALOGUE, "recommendation", 0)


def test_bm25_prefers_the_texts_that_share_rare_words():
    texts = ["the river rises", "the mountain", "river and river bank", "nothing here"]
    scores = bm25_scores("Where does the RIVER rise?", texts)
    assert scores[0] > scores[2] > scores[1] > scores[3] == 0


def test_bm25_reads_the_question_or_else_the_history():
    pool = (("1", "Radiohead"), ("2", "Thom Yorke"), ("3", "!!!"))
    asked = RankingExample("q", "Who is Yorke?", pool, (0.0, 1.0, 0.0), history=(("1", "Radiohead"),))
    seen = RankingExample("q", "", pool, (0.0, 1.0, 0.0), history=(("9", "Radiohead live"),))
    method = BASELINES["bm25"]([], (), "qa", 0)
    assert [int(np.argmax(scores)) for scores in method([asked, seen])] == [1, 0]


@pytest.mark.parametrize("query, texts", [("", ["a b"]), ("x", ["", "!!!"]), ("x", ["y", "z"])])
def test_bm25_without_a_shared_word_is_zero(query, texts):
    np.testing.assert_array_equal(bm25_scores(query, texts), np.zeros(len(texts)))
