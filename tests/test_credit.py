"""Schemes of credit against the enumerated expectation: pools of four, slates of two, rankings of two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumerated import (
    BROKEN,
    JOINT,
    POOL,
    SIZE,
    TERMS,
    UNBIASED,
    WORLDS,
    difference,
    enumerated_slopes,
    expected_slopes,
    gradient,
    groups_of,
    rollout_of,
    size,
    slopes,
    world,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_ranker import make_query

from fgrpo_jax.algorithm import rewards
from fgrpo_jax.algorithm.advantages import dead_groups, make_batch
from fgrpo_jax.algorithm.credit import SCHEMES
from fgrpo_jax.types import OK, RANK, SLATE, Credit, Lists, Outcome


@pytest.mark.parametrize("scheme", UNBIASED)
@pytest.mark.parametrize("name", WORLDS, ids=" ".join)
def test_the_expected_gradient_is_that_of_the_enumerated_expectation(name, scheme):
    made = world(name)
    wanted = enumerated_slopes(made, TERMS)
    found = expected_slopes(made, Credit(TERMS, scheme=scheme, shrinkage=0.5))
    assert size(gradient(made, wanted)) > 0.1 or name[1] == "none"
    assert difference(made, found, wanted) < 3e-6


@pytest.mark.parametrize("terms", [TERMS, JOINT], ids=["F-GRPO", "GRPO"])
def test_the_group_mean_scales_the_gradient_of_its_own_terms(terms):
    """By (G - 1) / G; and GRPO's is of another expectation, in which slates have the ranking's reward too."""
    made = world(("ranker", "graded"))
    found = [2 * x for x in expected_slopes(made, Credit(terms))]
    wanted, other = (enumerated_slopes(made, t) for t in (terms, JOINT if terms is TERMS else TERMS))
    assert difference(made, found, wanted) < 3e-6 and difference(made, other, wanted) > 0.01


# --------------------------------------------------------------------- what a baseline may see


def returns(made, credit, actions):
    """What each action of the ranker's transcripts is credited with, before any baseline: [transcript, T]."""
    gains = np.asarray(made.query.relevance[0], np.float64)
    slate, ranking = gains[actions[:, :SIZE]] > 0, gains[actions[:, SIZE:]]
    brought = np.concatenate([slate / (gains > 0).sum(), 0.7 * ranking / np.log2([2, 3]) / ideal(gains)], -1)
    by_phase = brought.reshape(-1, 2, SIZE)
    if not SCHEMES[credit.scheme].by_item:
        return np.repeat(by_phase.sum(-1), SIZE, -1)
    return np.cumsum(by_phase[..., ::-1], -1)[..., ::-1].reshape(brought.shape)


def ideal(gains):
    best = np.sort(gains)[::-1][:SIZE]
    return (best / np.log2([2, 3])).sum()


def seen_by_baselines(made, credit):
    """[own, sibling, T]: what is subtracted; for exact, the value of every choice beside it."""
    size = len(made.actions)
    pairs = np.stack(np.meshgrid(*[np.arange(size)] * 2, indexing="ij"), -1).reshape(-1, 2)
    batch = groups_of(made, credit, pairs)
    if batch.value is not None:
        return np.asarray(batch.value[:, 0]).reshape(size, size, -1, POOL)
    own = np.asarray(batch.advantage[:, 0], np.float64).reshape(size, size, -1)
    return (returns(made, credit, made.actions)[:, None] - own)[..., None]


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "labels"])  # which has none
@pytest.mark.parametrize("gains", ["one", "graded"])
def test_a_baseline_does_not_depend_on_the_action_it_judges(gains, scheme):
    """Of transcripts that are the same before an action, with the same sibling; `group` includes the rollout."""
    made = world(("ranker", gains))
    seen = seen_by_baselines(made, Credit(TERMS, scheme=scheme))
    spread = 0.0
    for t in np.flatnonzero(made.phase[0]):
        prefixes = np.unique(made.actions[:, :t], axis=0, return_inverse=True)[1].reshape(-1)
        for prefix in range(prefixes.max() + 1):
            alike = seen[prefixes == prefix, :, t]
            spread = max(spread, float((alike.max(0) - alike.min(0)).max()))
    assert (spread > 0.1) if scheme == "group" else (spread < 1e-6)
    assert np.ptp(seen[..., 0, 0], axis=1).max() > 0.1  # it does depend on the sibling


def test_the_advantage_of_exact_is_the_return_less_the_value_of_the_action():
    made = world(("ranker", "graded"))
    pairs = np.asarray([[i, (7 * i + 3) % 24] for i in range(24)])
    batch = groups_of(made, Credit(TERMS, scheme="exact"), pairs)
    of_action = np.take_along_axis(np.asarray(batch.value[:, 0]), made.actions[..., None], -1)[..., 0]
    wanted = np.where(made.phase > 0, returns(made, Credit(TERMS, scheme="exact"), made.actions) - of_action, 0)
    np.testing.assert_allclose(batch.advantage[:, 0], wanted, atol=1e-6)


def test_exact_with_one_relevant_candidate_is_the_formula():
    """Values: the gain of d and b where d is missing, nothing after it; b is the mean of siblings that miss it too."""
    made = world(("ranker", "one"))  # candidate 1
    slates = [(0, 1), (0, 2), (2, 1), (1, 3)]  # by all four, in one group
    index = np.asarray([[int(np.flatnonzero((made.slate == slate).all(-1))[0]) for slate in slates]])
    batch = groups_of(made, Credit(TERMS, scheme="exact", shrinkage=1e-6), index)
    value, advantage = np.asarray(batch.value[0]), np.asarray(batch.advantage[0])
    # First place, of (0, 1): of the siblings that miss 1 there, (0, 2) has 0 to come and (2, 1) has 1.
    np.testing.assert_allclose(value[0, 0], [0.5, 1, 0.5, 0.5], atol=1e-5)
    np.testing.assert_allclose(advantage[0, 0], 1 - 0.5, atol=1e-5)
    # Of (0, 2): both siblings that miss it have 1 to come.
    np.testing.assert_allclose(value[1, 0], [1, 1, 1, 1], atol=1e-5)
    np.testing.assert_allclose(advantage[1, 0], 0 - 1, atol=1e-5)
    # Second place: nothing can come after; once 1 is placed, nothing is worth anything.
    np.testing.assert_allclose(value[:3, 1], [[0, 1, 0, 0]] * 3, atol=1e-5)
    np.testing.assert_allclose(value[3, 1][[0, 2, 3]], 0, atol=1e-5)
    np.testing.assert_allclose(advantage[:, 1], 0, atol=1e-5)


# --------------------------------------------------------------------- labels of own states


@pytest.mark.parametrize("name", WORLDS, ids=" ".join)
def test_labels_pull_towards_what_is_wanted_in_every_state(name):
    """By the logits of a softmax: w(a) - sum(w) pi(a), w what the open candidates bring; siblings do not matter."""
    made = world(name)
    size = len(made.actions)
    index = np.stack([np.arange(size), (7 * np.arange(size) + 3) % size], -1)
    batch, share = groups_of(made, Credit(TERMS, scheme="labels"), index), np.asarray(made.share[index], np.float64)
    of_logp, of_share = slopes(batch, (made.logp[index], made.share[index]), SCHEMES["labels"].value_by)
    assert not np.any(of_logp) and np.any(batch.value) == (name[1] != "none")
    pull = share * (np.asarray(of_share) - (share * of_share).sum(-1, keepdims=True))
    wanted = np.asarray(batch.value) * (share > 0) * (np.asarray(batch.weight) > 0)[..., None]
    np.testing.assert_allclose(pull, wanted - wanted.sum(-1, keepdims=True) * share, atol=1e-5)
    others = np.stack([index[:, 0], (5 * index[:, 0] + 1) % size], -1)
    same = np.asarray(groups_of(made, Credit(TERMS, scheme="labels"), others).value)
    np.testing.assert_array_equal(batch.value[:, 0], same[:, 0])


def test_labels_are_the_gains_at_the_place():
    """Of (slate, ranking) (0, 1), (1, 0): a share of recall in the slate, of the ideal DCG in the ranking."""
    made, credit = world(("ranker", "graded")), Credit(TERMS, scheme="labels")
    gains = np.asarray(made.query.relevance[0], np.float64)
    index = np.flatnonzero((made.actions == [0, 1, 1, 0]).all(-1))[:, None].repeat(2, 1)
    rollout = rollout_of(made, index)
    rollout = rollout.replace(phase=jnp.asarray([SLATE, SLATE, RANK, RANK]) + 0 * rollout.phase)  # none is forced
    lists = Lists(jnp.asarray(made.slate[index]), jnp.asarray(made.ranking[index]), jnp.zeros(index.shape, jnp.int32))
    reward = rewards.term_rewards(credit, lists, made.query, {}, SIZE, BROKEN)
    batch = make_batch(made.query, rollout, reward, credit, "constant")
    batch = SCHEMES["labels"].assign(credit, SIZE, BROKEN, batch, lists, made.turns(made.query, rollout))
    of_slate, of_rank = (gains > 0) / (gains > 0).sum(), 0.7 * gains / ideal(gains)
    np.testing.assert_allclose(batch.value[0, 0], [of_slate, of_slate, of_rank, of_rank / np.log2(3)], atol=1e-6)
    assert not batch.advantage.any()


def test_the_proportion_of_expected_gains_is_the_maximum():
    """Of one state, with labels that are one of two sets: by the expected w, no other share is better."""
    log, w = SCHEMES["labels"].value_by, np.array([[0.5, 0.5, 0, 0], [0, 0, 1, 0]])
    chance = np.array([0.3, 0.7])
    best = chance @ w / (chance @ w).sum()

    def worth(share):
        return float((chance @ w @ np.asarray(log(jnp.asarray(share)))).sum())

    rng = np.random.default_rng(0)
    assert all(worth(best) > worth(share) for share in rng.dirichlet(np.ones(4), 200).astype(np.float32))


def test_what_is_all_but_impossible_has_a_finite_gradient():
    log = SCHEMES["labels"].value_by
    chances = jnp.asarray([0.0, 1e-37, 1e-30, 1e-20, 0.5])
    slope = jax.grad(lambda p: log(p).sum())(chances)
    np.testing.assert_allclose(slope, [0, 1e30, 5e29, 1e20, 2], rtol=1e-5)
    assert log(chances)[0] == 0 and log(chances)[1] < -69


# --------------------------------------------------------------------- rewards, item by item


@settings(derandomize=True, deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 7), name=st.sampled_from(sorted(rewards.SUMS)))
def test_sums_over_items_are_the_rewards(seed, k, name):
    rng = np.random.default_rng(seed)
    batch, group, size, pool = 3, 4, 5, 8
    relevance = rng.integers(0, 3, (batch, pool)).astype(np.float32) * 0.5
    relevance[0] = 0
    length = rng.integers(1, size + 1, (batch, group, 1))
    items = rng.permuted(np.tile(np.arange(pool), (batch, group, 1)), axis=-1)[..., :size]
    items = np.where(np.arange(size) < length, items, -1)
    query = make_query(batch=batch, pool=pool, full=True).replace(relevance=jnp.asarray(relevance))
    lists = Lists(jnp.asarray(items), jnp.asarray(items), jnp.zeros((batch, group), jnp.int32))
    gains = np.asarray(rewards.SUMS[name].gains(query.relevance, k, size))
    summed = np.zeros((batch, group))
    for b, g, x in np.ndindex(items.shape):
        summed[b, g] += gains[b, x, items[b, g, x]] if items[b, g, x] >= 0 else 0
    np.testing.assert_allclose(rewards.REWARDS[name](k)(lists, query, {}), summed, atol=1e-6)


# --------------------------------------------------------------------- broken transcripts


BREAKS = (OK, Outcome("slate_empty", "slate"), Outcome("rank_empty", "rank"))


@pytest.mark.parametrize("scheme", UNBIASED)  # labels are of what the grammar allows: nothing breaks there
def test_a_broken_rollout_is_credited_with_its_penalty(scheme):
    """Of four rollouts that found nothing else one broke in its slate and one in its ranking, after a hit."""
    made = world(("ranker", "one"))
    index = np.asarray([[int(np.flatnonzero((made.slate == s).all(-1))[0]) for s in [(0, 2), (2, 3), (0, 3), (0, 1)]]])
    credit, broken = Credit(TERMS, scheme=scheme), rewards.broken_values(-0.5, (), BREAKS)
    outcome = jnp.asarray([[0, 1, 0, 2]])
    lists = Lists(jnp.asarray(made.slate[index]), jnp.asarray(made.ranking[index]), outcome)
    reward = rewards.term_rewards(credit, lists, made.query, {}, SIZE, broken)
    np.testing.assert_allclose(reward[0], [[0, 0], [-0.5, -0.5], [0, 0], [1, -0.5]])
    batch = make_batch(made.query, rollout_of(made, index), reward, credit, "constant")
    batch = SCHEMES[scheme].assign(credit, SIZE, broken, batch, lists, made.turns(made.query, batch.rollout))
    slate, rank = np.asarray(batch.advantage[0, :, 1]), np.asarray(batch.advantage[0, :, 2])
    assert slate[1] < min(slate[0], slate[2]) and slate[1] < -0.3 and rank[3] < -0.2
    assert np.isfinite(batch.advantage).all()


def test_a_penalty_does_not_make_a_group_alive():
    """Judged by outcome: nothing found is nothing found, whatever the penalty."""
    credit, broken = Credit(TERMS), rewards.broken_values(-0.5, (), BREAKS)
    outcome = jnp.asarray([[0, 1, 0], [0, 1, 0], [2, 2, 2]])
    broke, missed, hit = [-0.5, -0.5], [0.0, 0.0], [1.0, 0.0]
    reward = jnp.asarray([[missed, broke, missed], [hit, broke, hit], [[1.0, -0.5], [0.0, -0.5], [1.0, -0.5]]])
    lists = Lists(jnp.zeros((3, 3, 1), jnp.int32), jnp.zeros((3, 3, 1), jnp.int32), outcome)
    judged = rewards.outcome_rewards(reward, credit, lists, broken)
    np.testing.assert_array_equal(dead_groups(judged, credit), [[True, True], [False, True], [False, True]])
    assert not dead_groups(reward, credit)[0].any()  # by spread: and it is trained to write what it should
