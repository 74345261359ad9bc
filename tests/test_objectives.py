"""Objectives against numpy loops, REINFORCE, joint GRPO, and any split into microbatches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fgrpo_jax.algorithm.advantages import WEIGHTINGS, action_weights, group_advantage, make_batch, per_action
from fgrpo_jax.algorithm.objectives import OBJECTIVES, RATIOS, clipped_pg, nll, options
from fgrpo_jax.types import PHASES, Batch, Credit, Rollout

B, G, T = 4, 3, 8
CREDIT = Credit((("slate", "recall", 1.0), ("rank", "ndcg", 0.5)))


def spread(batch, advantage_BGP):
    return per_action(advantage_BGP, batch.rollout.phase)


def make(seed=0, weighting="token", credit=CREDIT, old=0.0, ref=0.0):
    """A batch and the trainer's log-probs; old and ref: their distance, 0 for None."""
    rng = np.random.default_rng(seed)
    phase = np.zeros((B, G, T), np.int32)
    for b in range(B):
        for g in range(G):
            n, k = rng.integers(1, 4, 2)
            phase[b, g, :n], phase[b, g, n : n + k] = 1, 2
    phase[rng.random((B, G, T)) < 0.2] = 0  # forced actions inside a phase
    logp = jnp.asarray(-rng.random((B, G, T)), jnp.float32)
    reward = rng.integers(0, 5, (B, G, len(credit.terms))).astype(np.float32) / 4
    rollout = Rollout(jnp.zeros((B, G, T), jnp.int32), jnp.asarray(phase), logp)
    near = [jnp.asarray(logp + d * rng.standard_normal((B, G, T)), jnp.float32) if d else None for d in (old, ref)]
    batch = make_batch(None, rollout, jnp.asarray(reward), credit, weighting)
    return batch.replace(old_logp=near[0], ref_logp=near[1]), logp


def gradient(objective, logp, batch):
    return np.asarray(jax.grad(lambda x: objective(x, batch)[0])(logp))


def loss_by_loop(batch, logp, level, low, high, kl_weight):
    """Token by token, in float64; the metrics' sums and counts too."""
    logp, weight, phase = (
        np.asarray(logp, float),
        np.asarray(batch.weight, float),
        np.asarray(batch.rollout.phase),
    )
    old, ref = np.asarray(batch.old_logp, float), np.asarray(batch.ref_logp, float)
    total, clipped, trained, kl = 0.0, np.zeros(3), np.zeros(3), 0.0
    for b, g, t in zip(*np.nonzero(weight), strict=True):
        mine = {
            "token": np.arange(T) == t,
            "phase": (weight[b, g] > 0) & (phase[b, g] == phase[b, g, t]),
            "sequence": weight[b, g] > 0,
        }[level]
        ratio = np.exp((logp - old)[b, g, mine].mean())
        a = float(batch.advantage[b, g, t])
        gain = min(ratio * a, np.clip(ratio, 1 - low, 1 + high) * a)
        d = ref[b, g, t] - logp[b, g, t]
        k3 = np.exp(d) - d - 1
        total += weight[b, g, t] * (kl_weight * k3 - gain)
        kl += weight[b, g, t] * k3
        trained[phase[b, g, t]] += 1
        clipped[phase[b, g, t]] += gain != ratio * a
    return total, kl, clipped, trained


@pytest.mark.parametrize("level", RATIOS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_clipped_pg_equals_loop(level, weighting):
    batch, logp = make(1, weighting, old=0.3, ref=0.5)
    loss, metrics = clipped_pg(level, 0.06, 0.12, 0.4)(logp, batch)
    total, kl, clipped, trained = loss_by_loop(batch, logp, level, 0.06, 0.12, 0.4)
    np.testing.assert_allclose(loss, total, atol=1e-6)
    np.testing.assert_allclose(metrics["kl"].sum, kl, rtol=1e-4)
    assert clipped.sum() > 0
    for p, name in enumerate(PHASES, 1):
        mean = metrics[f"clip_fraction_{name}"]
        assert (mean.sum, mean.count) == (clipped[p], trained[p])


@pytest.mark.parametrize("level", RATIOS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_ratio_one_gives_the_reinforce_gradient(level, weighting):
    batch, logp = make(2, weighting)
    reinforce = -np.asarray(batch.weight * batch.advantage)
    assert np.abs(reinforce).max() > 0
    for clip in (0.0, 0.2):  # a clip range of nothing changes nothing either
        objective = clipped_pg(level, clip, clip, 0.0)
        np.testing.assert_allclose(gradient(objective, logp, batch), reinforce, rtol=1e-6)
        given = batch.replace(old_logp=logp)
        np.testing.assert_allclose(gradient(objective, logp, given), reinforce, rtol=1e-6)
    assert clipped_pg(level)(logp, batch)[1]["ratio"].value() == 1


@pytest.mark.parametrize("level", ["phase", "sequence"])
def test_gradient_is_that_of_the_geometric_mean(level):
    """GSPO: with one advantage and one weight per level, as differentiating its ratio itself."""
    credit = CREDIT if level == "phase" else Credit((("slate", "recall", 1.0), ("rank", "recall", 1.0)))
    batch, logp = make(3, credit=credit, old=0.3)
    if level == "sequence":
        batch = batch.replace(advantage=jnp.repeat(group_advantage(batch.reward, credit)[..., :1], T, -1))
    trained = np.asarray(batch.weight) > 0

    def direct(logp):
        loss = 0.0
        for labels in ((1,), (2,)) if level == "phase" else ((1, 2),):
            mine = jnp.asarray(trained & np.isin(batch.rollout.phase, labels))
            mean = (mine * (logp - batch.old_logp)).sum(-1) / jnp.maximum(mine.sum(-1), 1)
            a = group_advantage(batch.reward, credit)[..., labels[0] - 1]
            gain = jnp.minimum(jnp.exp(mean) * a, jnp.clip(jnp.exp(mean), 0.9, 1.1) * a)
            loss -= ((mine * batch.weight).sum(-1) * gain).sum()
        return loss

    objective = clipped_pg(level, 0.1, 0.1)
    np.testing.assert_allclose(objective(logp, batch)[0], direct(logp), rtol=1e-5)
    np.testing.assert_allclose(gradient(objective, logp, batch), jax.grad(direct)(logp), rtol=1e-4, atol=1e-7)


def test_kl_gradient():
    """k3's gradient is 1 − e^d per action; 0 at the reference itself."""
    batch, logp = make(4, ref=0.3)
    batch = batch.replace(advantage=jnp.zeros_like(batch.advantage))
    expected = 0.7 * batch.weight * (1 - jnp.exp(batch.ref_logp - logp))
    np.testing.assert_allclose(gradient(clipped_pg(kl_weight=0.7), logp, batch), expected, rtol=1e-4, atol=1e-8)
    np.testing.assert_array_equal(gradient(clipped_pg(kl_weight=0.7), logp, batch.replace(ref_logp=logp)), 0)


def credit_of(name):
    return Credit(CREDIT.terms[1:]) if name == "group_softmax" else CREDIT  # which reads one reward


def built(name, **given):
    """With those of the given options that it has."""
    return OBJECTIVES[name](**{option: given[option] for option in options(name) if option in given})


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_any_split_adds_up(name, weighting):
    batch, logp = make(5, weighting, credit_of(name), old=0.2, ref=0.2)
    objective = built(name, ratio="phase", clip_low=0.1, clip_high=0.2, kl_weight=0.1)
    loss, metrics = objective(logp, batch)
    whole = gradient(objective, logp, batch)
    for cuts in ([0, 1, 4], [0, 2, 3, 4]):
        parts = [(jax.tree.map(lambda x, s=s: x[s], batch), logp[s]) for s in map(slice, cuts, cuts[1:])]
        found = [objective(x, part) for part, x in parts]
        np.testing.assert_allclose(sum(f[0] for f in found), loss, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(np.concatenate([gradient(objective, x, p) for p, x in parts]), whole, rtol=1e-6)
        for key, mean in metrics.items():
            total = sum((f[1][key] for f in found[1:]), found[0][1][key])
            np.testing.assert_allclose(total.value(), mean.value(), rtol=1e-4, atol=1e-7)


def test_shared_credit_with_phase_blind_weights_is_grpo():
    """F-GRPO whose phases share every reward == GRPO with one advantage for all tokens."""
    rng = np.random.default_rng(6)
    recall, ndcg = (rng.integers(0, 5, (B, G)).astype(np.float32) / 4 for _ in range(2))
    terms = tuple((phase, name, w) for phase in PHASES for name, w in (("recall", 1.0), ("ndcg", 0.5)))
    batch, logp = make(6, old=0.2)
    reward = jnp.asarray(np.stack([recall, ndcg, recall, ndcg], -1))
    for normalise in ("none", "sum"):
        shared = batch.replace(advantage=spread(batch, group_advantage(reward, Credit(terms, normalise))))
        joint = recall + 0.5 * ndcg
        a = joint - joint.mean(1, keepdims=True)
        if normalise == "sum":
            a /= np.where(joint.std(1, keepdims=True) > 0, joint.std(1, keepdims=True), 1)

        def grpo(logp, a=a):  # Shao et al.: the token ratio, clipped, over all tokens of the batch
            trained = batch.weight > 0
            ratio = jnp.exp(logp - batch.old_logp)
            gain = jnp.minimum(ratio * a[..., None], jnp.clip(ratio, 0.8, 1.2) * a[..., None])
            return -(trained * gain).sum() / trained.sum()

        objective = clipped_pg("token", 0.2, 0.2)
        np.testing.assert_allclose(objective(logp, shared)[0], grpo(logp), rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(gradient(objective, logp, shared), jax.grad(grpo)(logp), rtol=1e-4, atol=1e-7)


def test_each_token_follows_its_own_phase():
    """Changing the rank advantage moves no gradient of the slate, at any ratio level."""
    batch, logp = make(7, old=0.05)
    group = group_advantage(batch.reward, CREDIT)
    other = batch.replace(advantage=spread(batch, group.at[..., 1].multiply(-3.0)))
    slate = np.asarray(batch.rollout.phase) == 1
    for level in RATIOS:
        a, b = (gradient(clipped_pg(level, 0.9, 9.0), logp, x) for x in (batch, other))
        np.testing.assert_array_equal(a[slate], b[slate])
        assert (a[~slate] != b[~slate]).any()


def test_dead_group_has_no_gradient():
    batch, logp = make(8, old=0.3)
    reward = batch.reward.at[1].set(0.1)
    batch = batch.replace(advantage=spread(batch, group_advantage(reward, CREDIT)))
    found = gradient(clipped_pg(), logp, batch)
    assert (found[1] == 0).all() and (found[0] != 0).any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_untrained_actions_may_hold_anything(name):
    batch, logp = make(9, credit=credit_of(name), old=0.2, ref=0.2)
    objective = built(name, ratio="sequence", kl_weight=0.1)
    off = batch.weight == 0
    wild = batch.replace(
        old_logp=jnp.where(off, jnp.nan, batch.old_logp), ref_logp=jnp.where(off, -jnp.inf, batch.ref_logp)
    )
    for value in (-1e30, 0.0, jnp.inf):
        changed = jnp.where(off, value, logp)
        np.testing.assert_array_equal(objective(changed, wild)[0], objective(logp, batch)[0])
        np.testing.assert_array_equal(gradient(objective, changed, wild), gradient(objective, logp, batch))


def test_far_policies_stay_finite():
    batch, logp = make(10)
    far = batch.replace(old_logp=logp - 1e3)
    for level in RATIOS:
        assert np.isfinite(clipped_pg(level)(logp, far)[0])
        assert np.isfinite(gradient(clipped_pg(level), logp, far)).all()


def test_nll_is_the_weighted_mean():
    batch, logp = make(11)
    trained = np.asarray(batch.weight) > 0
    loss, metrics = nll()(logp, batch)
    np.testing.assert_allclose(loss, -np.asarray(logp)[trained].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"].value(), loss, rtol=1e-5)
    np.testing.assert_allclose(gradient(nll(), logp, batch), -np.asarray(batch.weight))
    empty = Batch(None, batch.rollout, batch.reward, batch.advantage, action_weights(batch.rollout.phase * 0, "token"))
    assert nll()(logp, empty)[0] == 0 and nll()(logp, empty)[1]["loss"].value() == 0


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="ratio='group'"):
        clipped_pg(ratio="group")
    batch, logp = make(12)
    with pytest.raises(ValueError, match="ref_logp"):
        clipped_pg(kl_weight=0.1)(logp, batch)
