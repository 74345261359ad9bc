"""GoalRank's objective against numbers worked out by hand, a loop, and any split of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit

from fgrpo_jax.algorithm.advantages import WEIGHTINGS, make_batch
from fgrpo_jax.algorithm.group_softmax import GAPS, group_softmax, reference_policy
from fgrpo_jax.types import RANK, SLATE, Credit, Rollout

B, G, T = 4, 3, 5
CREDIT = Credit((("rank", "ndcg", 1.0),))


def make(seed=0, weighting="phase", untrained=0.3, reward=None):
    """A batch with two phases, and the trainer's log-probabilities."""
    rng = np.random.default_rng(seed)
    phase = np.where(np.arange(T) < 2, SLATE, RANK) * (rng.random((B, G, T)) >= untrained)
    phase[..., 0], phase[..., -1] = SLATE, RANK
    logp = jnp.asarray(-rng.random((B, G, T)), jnp.float32)
    reward = rng.random((B, G)) if reward is None else np.asarray(reward)
    rollout = Rollout(jnp.zeros((B, G, T), jnp.int32), jnp.asarray(phase, jnp.int32), logp)
    return make_batch(None, rollout, jnp.asarray(reward, jnp.float32)[..., None], CREDIT, weighting), logp


def run(objective, logp, batch):
    """Loss, metrics and gradient."""

    @quick_jit
    def both(logp, batch):
        return jax.value_and_grad(objective, has_aux=True)(logp, batch)

    (loss, metrics), found = both(logp, batch)
    return loss, metrics, np.asarray(found)


def gradient(objective, logp, batch):
    return run(objective, logp, batch)[2]


def test_by_hand():
    """Rewards 0 and 2: scores -1 and 1, reference 1/(1+e^2) and e^2/(1+e^2) = 0.1192 and 0.8808."""
    reference, kept = reference_policy(jnp.array([[0.0, 2.0], [0.5, 0.5]]), 0.0, True)
    np.testing.assert_allclose(reference, [[0.1192029, 0.8807971], [0, 0]], rtol=1e-6)
    assert kept.tolist() == [True, False]
    phase = jnp.full((2, 2, 3), RANK)
    logp = jnp.array([[[-1.0, -0.5, -0.5], [-0.25, -0.25, 0.0]], [[-1.0, 0.0, 0.0], [-3.0, 0.0, 0.0]]])
    rollout = Rollout(jnp.zeros((2, 2, 3), jnp.int32), phase, logp)
    batch = make_batch(None, rollout, jnp.array([[[0.0], [2.0]], [[0.5], [0.5]]]), CREDIT, "constant")
    loss, metrics, _ = run(group_softmax(), logp, batch)
    np.testing.assert_allclose(loss, (0.1192029 * 2 + 0.8807971 * 0.5 + 0) / 2, rtol=1e-6)
    assert metrics["kept_groups"].value() == 0.5 and metrics["gap"].value() == 1.0
    entropy = -(0.1192029 * np.log(0.1192029) + 0.8807971 * np.log(0.8807971))
    np.testing.assert_allclose(metrics["entropy"].value(), entropy, rtol=1e-5)


def test_without_normalisation():
    reference, _ = reference_policy(jnp.array([[0.0, np.log(3.0), 0.0]]), 0.0, False)
    np.testing.assert_allclose(reference, [[0.2, 0.6, 0.2]], rtol=1e-6)


def test_scale_and_shift_of_rewards_do_not_matter():
    reward = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)), jnp.float32)
    for changed in (3 * reward + 7, 1e-3 * reward):
        np.testing.assert_allclose(
            reference_policy(reward, 0.0, True)[0], reference_policy(changed, 0.0, True)[0], rtol=1e-3
        )


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("normalised", [True, False])
def test_equals_a_loop(weighting, normalised):
    batch, logp = make(1, weighting)
    total = 0.0
    for b in range(B):
        r = np.asarray(batch.reward[b, :, 0], float)
        if r.max() - r.min() <= 0.4:
            continue
        score = np.exp((r - r.mean()) / r.std() if normalised else r)
        for g in range(G):
            trained = np.asarray(batch.rollout.phase[b, g]) > 0
            total -= batch.weight[b].sum() * score[g] / score.sum() * np.asarray(logp[b, g])[trained].sum()
    loss, _, _ = run(group_softmax(0.4, normalised), logp, batch)
    np.testing.assert_allclose(loss, total, rtol=1e-5)
    if weighting == "phase":  # the mean over groups
        np.testing.assert_allclose(batch.weight.sum((1, 2)), 1 / B, rtol=1e-6)


def test_filtered_groups_have_no_gradient_and_stay_in_the_mean():
    batch, logp = make(2, reward=[[0.1, 0.1, 0.1], [0.0, 0.3, 0.1], [0.0, 0.31, 0.2], [0.7, 0.7, 0.7]])
    for sigma, alive in ((0.0, [1, 2]), (0.305, [2]), (1.0, [])):
        found = gradient(group_softmax(sigma), logp, batch)
        assert np.isfinite(found).all()
        assert [b for b in range(B) if (found[b] != 0).any()] == alive
    np.testing.assert_allclose(-gradient(group_softmax(), logp, batch)[1].min(-1).sum(), 1 / B, rtol=1e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_any_split_adds_up(weighting):
    batch, logp = make(3, weighting, reward=[[0, 0, 0], [0, 0.005, 0], [0.2, 0, 0.5], [3, 0, 1]])
    loss, metrics, whole = run(group_softmax(), logp, batch)
    parts = [(jax.tree.map(lambda x, s=s: x[s], batch), logp[s]) for s in (slice(0, 1), slice(1, 4))]
    found = [run(group_softmax(), x, part) for part, x in parts]
    np.testing.assert_allclose(sum(f[0] for f in found), loss, rtol=1e-5)
    np.testing.assert_allclose(np.concatenate([f[2] for f in found]), whole, rtol=1e-6)
    for key, mean in metrics.items():
        np.testing.assert_allclose((found[0][1][key] + found[1][1][key]).value(), mean.value(), rtol=1e-5)
    shares = {key: mean.value() for key, mean in metrics.items() if key.startswith("gap_")}
    expected = {"gap_to_0": 0.25, "gap_to_0.01": 0.25, "gap_to_0.1": 0, "gap_to_1": 0.25, "gap_above_1": 0.25}
    assert shares == expected and len(shares) == len(GAPS) + 1


def test_untrained_actions_may_hold_anything():
    batch, logp = make(4)
    off = batch.weight == 0
    loss, _, expected = run(group_softmax(), logp, batch)
    for value in (-1e30, jnp.inf, jnp.nan):
        changed_loss, _, found = run(group_softmax(), jnp.where(off, value, logp), batch)
        assert changed_loss == loss
        np.testing.assert_array_equal(found, expected)


def test_at_its_minimum_the_policy_is_the_reference():
    """Over groups that hold all lists there are: descending the loss ends at pi_ref, in the forward KL."""
    reward = jnp.array([[0.0, 1.0, 3.0]] * B)
    phase = jnp.full((B, G, 1), RANK)
    rollout = Rollout(jnp.zeros((B, G, 1), jnp.int32), phase, jnp.zeros((B, G, 1)))
    batch = make_batch(None, rollout, reward[..., None], CREDIT, "token")
    logit, loss = jnp.zeros((B, G)), group_softmax()
    step = quick_jit(jax.grad(lambda x: loss(jax.nn.log_softmax(x)[..., None], batch)[0]))
    for _ in range(300):
        logit -= 4 * B * step(logit) / 4
    np.testing.assert_allclose(jax.nn.softmax(logit), reference_policy(reward, 0.0, True)[0], atol=1e-3)


def test_what_is_refused():
    batch, logp = make()
    with pytest.raises(ValueError, match="reads one reward, not 2"):
        group_softmax()(logp, batch.replace(reward=jnp.zeros((B, G, 2))))
    with pytest.raises(ValueError, match="sigma=-1 must be 0 or more"):
        group_softmax(-1)
