"""Rewards against sets and loops in Python, and what may not change them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fgrpo_jax.algorithm.rewards import COVERAGE, REWARDS, UTILITY, broken_values, phase_rewards, term_rewards
from fgrpo_jax.policies.llm.query import Query
from fgrpo_jax.policies.llm.transcript import OUTCOMES
from fgrpo_jax.types import Credit, Lists

B, G, C, N, K = 3, 4, 8, 5, 3
ALL_TERMS = tuple(("slate", name, 1.0) for name in COVERAGE) + tuple(("rank", name, 1.0) for name in UTILITY)
BROKEN = broken_values(-0.1, (("slate_duplicate", -0.5), ("rank_truncated", -0.25)), OUTCOMES)


def make_query(relevance_BC):
    b, c = relevance_BC.shape
    zeros = jnp.zeros((b, 1), jnp.int32)
    return Query(zeros, zeros[:, 0] + 1, jnp.zeros((b, c, 1), jnp.int32), jnp.asarray(relevance_BC), zeros[:, 0] + c)


def random_lists(rng):
    slate, ranking = np.full((B, G, N), -1), np.full((B, G, K), -1)
    for b in range(B):
        for g in range(G):
            n, k = rng.integers(1, N + 1), rng.integers(1, K + 1)
            slate[b, g, :n] = rng.permutation(C)[:n]
            k = min(n, k)
            ranking[b, g, :k] = rng.permutation(slate[b, g, :n])[:k]
    return slate.astype(np.int32), ranking.astype(np.int32)


def random_relevance(rng):
    relevance = rng.choice([0, 0, 0, 1, 2], size=(B, C)).astype(np.float32)
    relevance[0] = 0  # a query without relevant candidates scores 0
    return relevance


def by_loop(name, items, gains, k):
    items = [i for i in items if i >= 0]
    relevant = {i for i, gain in enumerate(gains) if gain > 0}
    found = len(relevant & set(items))
    if name == "recall":
        return found / len(relevant) if relevant else 0.0
    if name == "precision":
        return found / len(items)
    if name == "f1":
        return 2 * found / (len(items) + len(relevant))
    top = [gains[i] for i in items[:k]]
    if name == "hit":
        return float(any(gain > 0 for gain in top))
    if name == "mrr":
        return next((1 / (i + 1) for i, gain in enumerate(top) if gain > 0), 0.0)
    ideal = sorted(gains, reverse=True)[:k]
    best = sum(gain / math.log2(i + 2) for i, gain in enumerate(ideal))
    return sum(gain / math.log2(i + 2) for i, gain in enumerate(top)) / best if best else 0.0


@pytest.mark.parametrize("name", REWARDS)
def test_equals_loop(name):
    rng = np.random.default_rng(0)
    (slate, ranking), relevance = random_lists(rng), random_relevance(rng)
    read = slate if name in COVERAGE else ranking
    expected = [[by_loop(name, read[b, g], relevance[b], 2) for g in range(G)] for b in range(B)]
    lists = Lists(jnp.asarray(slate), jnp.asarray(ranking), jnp.zeros((B, G), jnp.int32))
    reward_BG = REWARDS[name](2)(lists, make_query(relevance), {})
    assert reward_BG.dtype == jnp.float32
    np.testing.assert_allclose(reward_BG, expected, atol=1e-6)


_terms = jax.jit(term_rewards, static_argnums=(0, 4, 5))


def rewards_of(slate, ranking, outcome, relevance, k=2):
    lists = Lists(jnp.asarray(slate), jnp.asarray(ranking), jnp.asarray(outcome))
    return np.asarray(_terms(Credit(ALL_TERMS), lists, make_query(relevance), {}, k, BROKEN))


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.integers(0, 2**31))
def test_relabelling_candidates_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    (slate, ranking), relevance = random_lists(rng), random_relevance(rng)
    outcome = rng.integers(0, len(OUTCOMES), (B, G)).astype(np.int32)
    new = np.stack([rng.permutation(C) for _ in range(B)]).astype(np.int32)  # old label -> new label
    relabelled = np.zeros_like(relevance)
    np.put_along_axis(relabelled, new, relevance, axis=1)

    def relabel(x):
        return np.where(x >= 0, np.take_along_axis(new[:, None], np.maximum(x, 0), axis=2), -1).astype(np.int32)

    np.testing.assert_array_equal(
        rewards_of(slate, ranking, outcome, relevance),
        rewards_of(relabel(slate), relabel(ranking), outcome, relabelled),
    )


def test_coverage_ignores_order_and_utility_reads_it():
    relevance = np.array([[2, 1, 0, 0, 0, 0, 0, 0]] * B, np.float32)
    slate = np.tile(np.array([0, 1, 2, 3, 4], np.int32), (B, G, 1))
    ranking, outcome = slate[..., :K], np.zeros((B, G), np.int32)
    before = rewards_of(slate, ranking, outcome, relevance)
    after = rewards_of(slate[..., ::-1], ranking[..., ::-1], outcome, relevance)
    np.testing.assert_array_equal(before[..., : len(COVERAGE)], after[..., : len(COVERAGE)])
    assert (before[..., len(COVERAGE) :] > after[..., len(COVERAGE) :]).sum() >= 2 * B * G


@pytest.mark.parametrize("code", range(1, len(OUTCOMES)))
def test_broken_phase_gets_its_own_value(code):
    rng = np.random.default_rng(1)
    (slate, ranking), relevance = random_lists(rng), random_relevance(rng)
    fine = rewards_of(slate, ranking, np.zeros((B, G), np.int32), relevance)
    outcome = np.zeros((B, G), np.int32)
    outcome[1, 2] = code
    reward = rewards_of(slate, ranking, outcome, relevance)
    value = {"slate_duplicate": -0.5, "rank_truncated": -0.25}.get(OUTCOMES[code].name, -0.1)
    expected, n = fine.copy(), len(COVERAGE)
    expected[1, 2, n:] = value  # the ranking is lost in any case
    if OUTCOMES[code].breaks == "slate":
        expected[1, 2, :n] = value
    np.testing.assert_allclose(reward, expected, atol=1e-7)


def test_phase_rewards_count_each_reward_once():
    rng = np.random.default_rng(2)
    reward = rng.random((B, G, 2)).astype(np.float32)
    separate = Credit((("slate", "recall", 1.0), ("rank", "ndcg", 0.5)))
    joint = Credit(tuple((p, r, w) for p in ("slate", "rank") for _, r, w in separate.terms))
    expected = np.stack([reward[..., 0], 0.5 * reward[..., 1]], -1)
    np.testing.assert_allclose(phase_rewards(jnp.asarray(reward), separate), expected)
    twice = jnp.asarray(np.concatenate([reward, reward], -1))
    np.testing.assert_allclose(phase_rewards(twice, joint), expected)


def test_bad_broken_values_are_refused():
    with pytest.raises(ValueError, match="slate_wrong"):
        broken_values(0.0, (("slate_wrong", 1.0),), OUTCOMES)
    with pytest.raises(ValueError, match="called ok"):
        broken_values(0.0, (("ok", 1.0),), OUTCOMES)


def test_a_reward_may_read_what_is_frozen(monkeypatch):
    """A learned one does."""
    monkeypatch.setitem(
        REWARDS, "learned", lambda k: lambda lists, query, frozen: frozen["model"] * lists.slate.sum(-1)
    )
    lists = Lists(jnp.ones((1, 2, 3), jnp.int32), jnp.ones((1, 2, 1), jnp.int32), jnp.zeros((1, 2), jnp.int32))
    credit = Credit((("rank", "learned", 1.0),))
    reward = term_rewards(credit, lists, make_query(np.ones((1, 4), np.float32)), {"model": 0.5}, 1, BROKEN)
    np.testing.assert_array_equal(reward, [[[1.5], [1.5]]])
