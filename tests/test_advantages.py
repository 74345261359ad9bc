"""Advantages and weights against numpy loops; groups without signal; the rows of the credit table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fgrpo_jax.algorithm.advantages import (
    NORMALISE,
    WEIGHTINGS,
    action_weights,
    dead_groups,
    group_advantage,
    make_batch,
)
from fgrpo_jax.types import PHASES, Credit, Rollout

B, G, T, R = 5, 4, 7, 3
TERMS = (("slate", "recall", 1.0), ("rank", "ndcg", 0.5), ("rank", "mrr", 2.0))
advantage = jax.jit(group_advantage, static_argnums=1)


def by_loop(reward, credit):
    out = np.zeros((*reward.shape[:2], 2))
    for b in range(reward.shape[0]):
        for p, phase in enumerate(PHASES):
            own = [(reward[b, :, r].astype(float), w) for r, (ph, _, w) in enumerate(credit.terms) if ph == phase]
            if credit.normalise == "each":
                parts = [w * (x - x.mean()) / x.std() if x.max() > x.min() else 0 * x for x, w in own]
                out[b, :, p] = sum(parts)
            else:
                total = sum(w * x for x, w in own)
                scale = total.std() if credit.normalise == "sum" and total.max() > total.min() else 1.0
                out[b, :, p] = (total - total.mean()) / scale
    return out


@pytest.mark.parametrize("normalise", NORMALISE)
def test_equals_loop(normalise):
    rng = np.random.default_rng(0)
    reward = rng.integers(0, 4, (B, G, R)).astype(np.float32) / 4
    reward[0, :, 0] = 0.75
    credit = Credit(TERMS, normalise)
    result = advantage(jnp.asarray(reward), credit)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, by_loop(reward, credit), atol=2e-6)
    np.testing.assert_allclose(result.mean(1), 0, atol=1e-6)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.floats(-100, 100, width=32, allow_subnormal=False), st.sampled_from(NORMALISE), st.integers(0, B - 1))
def test_group_without_signal_is_exactly_zero(value, normalise, b):
    """0.1 eight times has a mean that is not 0.1 in floats: dead groups are compared, not summed."""
    rng = np.random.default_rng(b)
    reward = rng.random((B, G, R)).astype(np.float32)
    reward[b, :, 0] = value
    credit = Credit(TERMS, normalise)
    result, dead = advantage(jnp.asarray(reward), credit), dead_groups(jnp.asarray(reward), credit)
    assert (np.asarray(result[b, :, 0]) == 0).all()
    assert (np.asarray(result[b, :, 1]) != 0).any()  # dead in one phase, alive in the other
    expected = np.zeros((B, 2), bool)
    expected[b, 0] = True
    np.testing.assert_array_equal(dead, expected)


def test_terms_that_cancel_are_dead_unless_normalised_each():
    reward = jnp.asarray([[[0.25, 0.75], [0.5, 0.5], [0.75, 0.25]]])
    terms = (("rank", "ndcg", 1.0), ("rank", "mrr", 1.0))
    for normalise in ("none", "sum"):
        assert dead_groups(reward, Credit(terms, normalise)).all()
        assert (group_advantage(reward, Credit(terms, normalise)) == 0).all()
    np.testing.assert_array_equal(dead_groups(reward, Credit(terms, "each")), [[True, False]])


def test_constant_term_adds_nothing_to_a_live_one():
    """Standardising a term whose rounded mean is not its value would make noise as large as signal."""
    reward = np.random.default_rng(3).random((B, 7, R)).astype(np.float32)
    reward[..., 2] = np.array([0.1, 0.3, 0.7, 1.1, 2.3], np.float32)[:, None]  # mrr, the same in each group
    assert (reward[..., 2] - jnp.asarray(reward)[..., 2].mean(1, keepdims=True) != 0).any()
    both = advantage(jnp.asarray(reward), Credit(TERMS, "each"))
    np.testing.assert_array_equal(both, advantage(jnp.asarray(reward), Credit(TERMS[:2], "each")))


def test_no_terms_no_advantage():
    assert (group_advantage(jnp.zeros((B, G, 0)), Credit(())) == 0).all()
    assert dead_groups(jnp.zeros((B, G, 0)), Credit(())).all()


def test_phases_do_not_leak():
    rng = np.random.default_rng(1)
    reward = rng.random((B, G, R)).astype(np.float32)
    other = reward.copy()
    other[..., 1:] = rng.random((B, G, 2))
    for normalise in NORMALISE:
        a, b = (advantage(jnp.asarray(x), Credit(TERMS, normalise)) for x in (reward, other))
        np.testing.assert_array_equal(a[..., 0], b[..., 0])


def test_gdpo_row_keeps_the_weight_where_grpo_loses_it():
    """GDPO: each reward standardised on its own, so scaling one changes nothing; its weight does."""
    rng = np.random.default_rng(2)
    reward = rng.random((B, G, 2)).astype(np.float32)
    terms = tuple((phase, name, w) for phase in PHASES for name, w in (("recall", 1.0), ("ndcg", 0.5)))
    four = np.concatenate([reward, reward], -1)
    scaled = four * np.array([1, 8, 1, 8], np.float32)
    gdpo = advantage(jnp.asarray(four), Credit(terms, "each"))
    np.testing.assert_allclose(gdpo, advantage(jnp.asarray(scaled), Credit(terms, "each")), atol=1e-5)
    np.testing.assert_array_equal(gdpo[..., 0], gdpo[..., 1])
    standard = (reward - reward.mean(1, keepdims=True)) / reward.std(1, keepdims=True)
    np.testing.assert_allclose(gdpo[..., 0], standard[..., 0] + 0.5 * standard[..., 1], atol=1e-5)
    summed = advantage(jnp.asarray(four), Credit(terms, "sum"))
    assert np.abs(summed - advantage(jnp.asarray(scaled), Credit(terms, "sum"))).max() > 0.1


def random_phases(rng):
    phase = np.zeros((B, G, T), np.int32)
    for b in range(B):
        for g in range(G):
            n, k = rng.integers(0, 4, 2)
            phase[b, g, :n], phase[b, g, n : n + k] = 1, 2
    return phase


def weights_by_loop(phase, weighting):
    out, active = np.zeros(phase.shape), phase > 0
    cells = [(b, g, p) for b in range(B) for g in range(G) for p in (1, 2)]
    cells = [(c, active[c[0], c[1]] & (phase[c[0], c[1]] == c[2])) for c in cells]
    pairs = sum(mask.any() for _, mask in cells)
    for (b, g, _), mask in cells:
        if mask.any():
            share = {
                "token": 1 / active.sum(),
                "phase": 1 / (pairs * mask.sum()),
                "constant": 1 / active.size,
            }
            out[b, g, mask] = share[weighting]
    return out


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_equal_loop(weighting):
    rng = np.random.default_rng(3)
    phase = np.where(rng.random((B, G, T)) < 0.7, random_phases(rng), 0)  # with gaps: forced actions
    weight = action_weights(jnp.asarray(phase), weighting)
    np.testing.assert_allclose(weight, weights_by_loop(phase, weighting), rtol=1e-5)
    if weighting != "constant":
        np.testing.assert_allclose(weight.sum(), 1, rtol=1e-5)
    nothing = action_weights(jnp.zeros((B, G, T), jnp.int32), weighting)
    assert (nothing == 0).all()


def test_batch_holds_rewards_advantages_and_weights():
    rng = np.random.default_rng(4)
    reward = jnp.asarray(rng.random((B, G, R)), jnp.float32)
    rollout = Rollout(jnp.zeros((B, G, T), jnp.int32), jnp.asarray(random_phases(rng)), jnp.zeros((B, G, T)))
    batch = make_batch(None, rollout, reward, Credit(TERMS), "phase")
    np.testing.assert_array_equal(batch.reward, reward)
    group = np.asarray(group_advantage(reward, Credit(TERMS)))
    padded = np.concatenate([np.zeros((B, G, 1)), group], -1)  # by label: untrained, slate, rank
    np.testing.assert_array_equal(batch.advantage, np.take_along_axis(padded, np.asarray(rollout.phase), -1))
    np.testing.assert_array_equal(batch.weight, action_weights(rollout.phase, "phase"))
    assert batch.old_logp is batch.ref_logp is batch.value is None


def test_dead_groups_stay_in_the_denominator():
    rng = np.random.default_rng(5)
    phase = jnp.asarray(random_phases(rng))
    rollout = Rollout(jnp.zeros((B, G, T), jnp.int32), phase, jnp.zeros((B, G, T)))
    alive = rng.random((B, G, R)).astype(np.float32)
    dead = alive.copy()
    dead[0] = 0.5
    weights = [make_batch(None, rollout, jnp.asarray(r), Credit(TERMS), "token").weight for r in (alive, dead)]
    np.testing.assert_array_equal(*weights)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="normalise='std'"):
        group_advantage(jnp.zeros((B, G, R)), Credit(TERMS, "std"))
    with pytest.raises(KeyError, match="tokens"):
        action_weights(jnp.zeros((B, G, T), jnp.int32), "tokens")
