"""Metrics of lists whose items have topics: by hand, by search through all lists, and inside jit."""

import itertools
from functools import partial
from types import SimpleNamespace

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from fgrpo_jax import metrics
from fgrpo_jax.algorithm.rewards import TOPICAL
from fgrpo_jax.types import Lists


def plain_alpha_dcg(gains, topics, k, alpha=0.5):
    """One slot after the other, as the definition reads."""
    total, met = 0.0, {}
    for slot, (gain, topic) in enumerate(zip(gains[:k], topics[:k])):
        total += gain * (1 - alpha) ** met.get(topic, 0) / np.log2(slot + 2)
        if gain > 0 and topic >= 0:
            met[topic] = met.get(topic, 0) + 1
    return total


def test_numbers_by_hand():
    gains, topics = np.array([1.0, 1.0, 0.0, 1.0]), np.array([7, 7, 3, 3])
    pool, pool_topics = np.array([1.0, 1.0, 0.0, 1.0]), np.array([7, 7, 3, 3])
    discount = 1 / np.log2(np.arange(4) + 2)
    found = discount @ [1, 0.5, 0, 1]  # the item of topic 3 that is not relevant does not make the other redundant
    best = discount @ [1, 1, 0.5, 0]
    assert metrics.alpha_dcg(gains, topics) == pytest.approx(found)
    assert metrics.alpha_ndcg(gains, pool, 4, topics, pool_topics) == pytest.approx(found / best)
    assert metrics.alpha_ndcg(gains, pool, 1, topics, pool_topics) == 1
    assert metrics.alpha_ndcg(gains * 0, pool * 0, 4, topics, pool_topics) == 0
    found = [metrics.diversity(gains, pool, k, topics, pool_topics) for k in (1, 2, 3, 4, None)]
    assert found == [1, 0.5, 2 / 3, 0.5, 0.5]
    assert metrics.diversity(gains, pool, 4, np.array([2, -1, -1, 5]), pool_topics) == 0.5


def test_without_topics_it_is_ndcg_and_with_alpha_0_too():
    rng = np.random.default_rng(0)
    pool = rng.integers(0, 4, (20, 9)).astype(float)
    listed = metrics.take_gains(pool, np.tile(rng.permutation(9)[:5], (20, 1)))
    plain = metrics.ndcg(listed, pool, 4)
    one = np.zeros((20, 9), int)
    np.testing.assert_allclose(metrics.alpha_ndcg(listed, pool, 4, one[:, :5] - 1, one - 1), plain)
    np.testing.assert_allclose(metrics.alpha_ndcg(listed, pool, 4, one[:, :5], one, alpha=0.0), plain)


@st.composite
def _pools(draw):
    size = draw(st.integers(1, 6))
    gains = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    topics = draw(st.lists(st.integers(-1, 2), min_size=size, max_size=size))
    return np.array(gains, float), np.array(topics), draw(st.integers(1, 4))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=_pools())
def test_the_ideal_is_the_best_of_all_lists(case):
    pool, topics, k = case
    best = max(
        plain_alpha_dcg(pool[list(order)], topics[list(order)], k)
        for order in itertools.permutations(range(len(pool)), min(k, len(pool)))
    )
    order = np.random.default_rng(0).permutation(len(pool))
    found = metrics.alpha_ndcg(pool[order], pool, k, topics[order], topics)
    expected = plain_alpha_dcg(pool[order], topics[order], k) / best if best else 0.0
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("name", metrics.TOPIC_METRICS)
def test_jit_equals_numpy_and_leading_axes_broadcast(name):
    rng = np.random.default_rng(1)
    pool_B1C = rng.integers(0, 3, (4, 1, 7)).astype(np.float32)
    topics_B1C = rng.integers(-1, 3, (4, 1, 7))
    list_BGK = np.stack([[rng.permutation(7)[:5] for _ in range(3)] for _ in range(4)])
    list_BGK[:, 0, 3:] = -1
    gains_BGK, topics_BGK = metrics.take_gains(pool_B1C, list_BGK), metrics.take_topics(topics_B1C, list_BGK)
    assert (topics_BGK[:, 0, 3:] == -1).all()
    metric = metrics.TOPIC_METRICS[name]
    for k in (1, 9, (list_BGK >= 0).sum(-1)):
        expected = metric(gains_BGK, pool_B1C, k, topics_BGK, topics_B1C)
        one_by_one = [
            metric(
                gains_BGK[i], pool_B1C[i[0], 0], k if isinstance(k, int) else k[i], topics_BGK[i], topics_B1C[i[0], 0]
            )
            for i in itertools.product(range(4), range(3))
        ]
        np.testing.assert_allclose(expected.ravel(), one_by_one, rtol=1e-6)
        arrays = map(jnp.asarray, (gains_BGK, pool_B1C, k, topics_BGK, topics_B1C))
        np.testing.assert_allclose(jax.jit(metric)(*arrays), expected, rtol=1e-5, atol=1e-6)


def test_the_reward_reads_topics_of_the_ranking():
    rng = np.random.default_rng(2)
    relevance_BC, topics_BC = rng.integers(0, 3, (2, 6)).astype(np.float32), rng.integers(-1, 2, (2, 6))
    ranking_BGK = np.stack([[rng.permutation(6)[:4] for _ in range(3)] for _ in range(2)])
    ranking_BGK[0, 0, 2:] = -1
    lists = Lists(ranking_BGK, ranking_BGK, np.zeros((2, 3), np.int32))
    query = SimpleNamespace(relevance=jnp.asarray(relevance_BC), topics=jnp.asarray(topics_BC))
    reward_BG = TOPICAL["alpha_ndcg"](3)(lists, query, {})
    assert reward_BG.dtype == jnp.float32 and reward_BG.shape == (2, 3)
    for b, g in itertools.product(range(2), range(3)):
        items = [i for i in ranking_BGK[b, g] if i >= 0]
        best = max(
            plain_alpha_dcg(relevance_BC[b][list(order)], topics_BC[b][list(order)], 3)
            for order in itertools.permutations(range(6), 3)
        )
        expected = plain_alpha_dcg(relevance_BC[b][items], topics_BC[b][items], 3) / best
        assert reward_BG[b, g] == pytest.approx(expected, rel=1e-5)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(pools=st.lists(_pools(), min_size=1, max_size=3), k=st.integers(1, 6))
def test_equal_to_ndeval_where_gains_are_binary(pools, k):
    pytest.importorskip("pyndeval", reason="ndeval, for alpha-nDCG, is not installed: pip install pyndeval")
    import ir_measures

    judged, run = [], []
    for q, (gains, topics, _) in enumerate(pools):
        for c, (gain, topic) in enumerate(zip(gains, topics)):
            subtopic = str(topic) if topic >= 0 else f"own{c}"
            judged.append(ir_measures.Qrel(f"q{q}", f"d{c}", int(gain > 0), subtopic))
            run.append(ir_measures.ScoredDoc(f"q{q}", f"d{c}", float(len(gains) - c)))
    measure = ir_measures.alpha_nDCG(alpha=0.5) @ k
    theirs = {row.query_id: row.value for row in ir_measures.iter_calc([measure], judged, run)}
    for q, (gains, topics, _) in enumerate(pools):
        ours = partial(metrics.alpha_ndcg, alpha=0.5)((gains > 0) * 1.0, (gains > 0) * 1.0, k, topics, topics)
        assert ours == pytest.approx(theirs.get(f"q{q}", 0.0), abs=1e-6)
