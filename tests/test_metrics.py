"""Metrics against hand-made numbers, against ir_measures, and numpy against jit."""

import itertools

import hypothesis.strategies as st
import ir_measures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from fgrpo_jax import metrics


def test_numbers_by_hand():
    pool = np.array([2.0, 0.0, 1.0, 0.0])
    gains = np.array([0.0, 1.0, 0.0])  # the item of gain 1 second, that of gain 2 left out
    ideal = 2 + 1 / np.log2(3)
    expected = {
        ("ndcg", 3): (1 / np.log2(3)) / ideal,
        ("ndcg", 1): 0.0,
        ("recall", 2): 0.5,
        ("precision", 2): 0.5,
        ("precision", 5): 0.2,  # over k, though the list is shorter
        ("f1", 2): 0.5,
        ("hit", 1): 0.0,
        ("hit", 2): 1.0,
        ("mrr", None): 0.5,
        ("mrr", 1): 0.0,
        ("map", None): 0.25,
        ("list_auc", None): 0.5,
        ("pool_auc", None): (1 + 0) / 4,
    }
    for (name, k), value in expected.items():
        assert metrics.METRICS[name](gains, pool, k) == pytest.approx(value), (name, k)


def test_ideal_comes_from_the_pool_not_from_the_list():
    pool, short = np.array([1.0, 1.0, 1.0, 0.0]), np.array([1.0])
    assert metrics.ndcg(short, pool, 3) == pytest.approx(1 / (1 + 1 / np.log2(3) + 0.5))
    assert metrics.recall(short, pool, 3) == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", metrics.METRICS)
def test_zero_without_relevant_items_or_slots(name):
    metric = metrics.METRICS[name]
    for k in (None, 1, 5, np.array(0), np.array(3)):
        assert metric(np.zeros(3), np.zeros(4), k) == 0
        assert metric(jnp.zeros(3), jnp.zeros(4), k) == 0
    assert metric(np.zeros(2), np.array([1.0, 0.0]), np.array(0)) in (0, 0.5)  # all tied: AUC of the pool


def test_take_gains_reads_empty_slots_as_zero():
    relevance = np.array([[3.0, 0.0, 1.0]])
    lists = np.array([[[2, -1], [0, 2]]])
    np.testing.assert_array_equal(metrics.take_gains(relevance[:, None], lists), [[[1, 0], [3, 1]]])


@pytest.mark.parametrize("name", metrics.METRICS)
def test_jit_equals_numpy_and_leading_axes_broadcast(name):
    rng = np.random.default_rng(0)
    pool_B1C = rng.integers(0, 3, (4, 1, 7)).astype(np.float32)
    list_BGK = np.stack([[rng.permutation(7)[:5] for _ in range(3)] for _ in range(4)])
    list_BGK[:, 0, 3:] = -1
    size_BG = (list_BGK >= 0).sum(-1)
    gains_BGK = metrics.take_gains(pool_B1C, list_BGK)
    metric = metrics.METRICS[name]
    for k in (1, 9, size_BG):
        expected = metric(gains_BGK, pool_B1C, k)
        assert expected.shape == (4, 3)
        one_by_one = [
            metric(gains_BGK[b, g], pool_B1C[b, 0], k if isinstance(k, int) else k[b, g])
            for b, g in itertools.product(range(4), range(3))
        ]
        np.testing.assert_array_equal(expected.ravel(), one_by_one)
        jitted = jax.jit(metric)(jnp.asarray(gains_BGK), jnp.asarray(pool_B1C), jnp.asarray(k))
        np.testing.assert_allclose(jitted, expected, rtol=1e-5, atol=1e-6)


@st.composite
def _ranked_pools(draw):
    """Gains of a pool, and a list of distinct candidates of it."""
    gains = draw(st.lists(st.integers(0, 3), min_size=1, max_size=12))
    order = draw(st.permutations(range(len(gains))))
    return gains, order[: draw(st.integers(1, len(gains)))]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(pools=st.lists(_ranked_pools(), min_size=1, max_size=4), k=st.integers(1, 8))
def test_equal_to_ir_measures(pools, k):
    judged = [
        ir_measures.Qrel(f"q{q}", f"d{c}", gain) for q, (gains, _) in enumerate(pools) for c, gain in enumerate(gains)
    ]
    run = [
        ir_measures.ScoredDoc(f"q{q}", f"d{c}", float(len(ranked) - i))
        for q, (_, ranked) in enumerate(pools)
        for i, c in enumerate(ranked)
    ]
    names = {
        "ndcg": ir_measures.nDCG @ k,
        "recall": ir_measures.R @ k,
        "precision": ir_measures.P @ k,
        "hit": ir_measures.Success @ k,
        "map": ir_measures.AP @ k,
        "mrr": ir_measures.RR @ k,
    }
    for name, measure in names.items():  # one call each: ir_measures mixes up some of them
        theirs = {row.query_id: row.value for row in ir_measures.iter_calc([measure], judged, run)}
        for q, (gains, ranked) in enumerate(pools):
            pool = np.array(gains, float)
            ours = metrics.METRICS[name](metrics.take_gains(pool, np.array(ranked)), pool, k)
            assert ours == pytest.approx(theirs[f"q{q}"], abs=1e-9), (name, gains, ranked)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=_ranked_pools())
def test_auc_counts_pairs_in_the_right_order(case):
    gains, ranked = case
    pool = np.array(gains, float)
    listed = metrics.take_gains(pool, np.array(ranked))
    place = {c: ranked.index(c) if c in ranked else len(ranked) for c in range(len(gains))}

    def share(items):
        pairs = [(place[a], place[b]) for a in items for b in items if pool[a] > 0 and pool[b] == 0]
        return np.mean([(a < b) + 0.5 * (a == b) for a, b in pairs]) if pairs else 0.0

    assert metrics.list_auc(listed, pool) == pytest.approx(share(ranked))
    assert metrics.pool_auc(listed, pool) == pytest.approx(share(range(len(gains))))
    f1 = metrics.f1(listed, pool)
    p, r = metrics.precision(listed, pool), metrics.recall(listed, pool)
    assert f1 == pytest.approx(2 * p * r / (p + r) if p + r else 0.0)
