"""From rewards to what the objective needs: group-relative advantages and action weights.

Three choices that are data: `Credit.terms` (which reward trains which phase),
`Credit.normalise`, and the action weighting. F-GRPO (arXiv 2605.12995) is slate <- coverage,
rank <- utility with normalise="none"; GRPO gives both phases the same terms; GDPO (arXiv
2601.05242) is that with normalise="each" (we leave out its second, batch-wide normalisation).

Weights are normalised here, once, over the global batch, so that losses are plain sums and
any split into microbatches or shards gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from fgrpo_jax.types import PHASES, TRAINED, UNTRAINED, Array, Batch, Credit, PyTree, Rollout

NORMALISE = ("none", "each", "sum")


# --------------------------------------------------------------------- advantages


def _equal(x_BG: Array) -> Array:
    """Groups whose values are all the same, `[B,1]`: compared, never summed, so exact."""
    return x_BG.max(1, keepdims=True) == x_BG.min(1, keepdims=True)


def _centred(x_BG: Array) -> Array:
    return jnp.where(_equal(x_BG), 0.0, x_BG - x_BG.mean(1, keepdims=True))


def _standardised(x_BG: Array) -> Array:
    """Centred and divided by the population standard deviation of the group."""
    centred_BG = _centred(x_BG)
    std_B1 = jnp.sqrt((centred_BG**2).mean(1, keepdims=True))
    return jnp.where(std_B1 > 0, centred_BG / jnp.where(std_B1 > 0, std_B1, 1.0), 0.0)


def _terms(credit: Credit, phase: str) -> list[tuple[int, float]]:
    return [(r, weight) for r, (p, _, weight) in enumerate(credit.terms) if p == phase and weight != 0]


def _weighted(reward_BGR: Array, terms: list[tuple[int, float]], each: Callable = lambda x_BG: x_BG) -> Array:
    total_BG = jnp.zeros(reward_BGR.shape[:2], jnp.float32)
    for r, weight in terms:
        total_BG += weight * each(reward_BGR[..., r])
    return total_BG


def phase_totals(reward_BGR: Array, credit: Credit) -> Array:
    """The weighted sum of the terms of each phase, `[B,G,P]`."""
    return jnp.stack([_weighted(reward_BGR, _terms(credit, phase)) for phase in PHASES], -1)


def _check(credit: Credit) -> None:
    if credit.normalise not in NORMALISE:
        raise ValueError(f"credit.normalise={credit.normalise!r} is not one of {', '.join(NORMALISE)}")


def dead_groups(reward_BGR: Array, credit: Credit) -> Array:
    """Groups without signal, `dead_BP` bool: all rollouts have exactly the same reward.

    A group can be dead in one phase and alive in the other. It is dead when each of the
    phase's terms is constant, and, unless normalise is "each", also when their weighted sum
    is. A phase no term trains is dead in every group. `credit` is static under jit.
    """
    _check(credit)
    dead = []
    for phase in PHASES:
        terms = _terms(credit, phase)
        dead_B1 = jnp.ones((reward_BGR.shape[0], 1), bool)
        for r, _ in terms:
            dead_B1 &= _equal(reward_BGR[..., r])
        if credit.normalise != "each":
            dead_B1 |= _equal(_weighted(reward_BGR, terms))
        dead.append(dead_B1)
    return jnp.concatenate(dead, -1)


def group_advantage(reward_BGR: Array, credit: Credit) -> Array:
    """Advantage of every rollout over its group, per phase: `advantage_BGP` float32.

    none: weighted sum of the phase's terms, centred (no division by std: Dr. GRPO, arXiv
        2503.20783). each: every term centred and divided by the population std of its
        group, then weighted and summed. sum: weighted, summed, centred, then divided.
    Exactly 0 in dead groups. No epsilon in the division: constant groups are told apart by
    max == min instead. `credit` is static under jit. Raises ValueError on its normalise.
    """
    _check(credit)
    advantage = []
    for phase in PHASES:
        terms = _terms(credit, phase)
        if credit.normalise == "each":
            advantage.append(_weighted(reward_BGR, terms, _standardised))
        else:
            finish = _centred if credit.normalise == "none" else _standardised
            advantage.append(finish(_weighted(reward_BGR, terms)))
    advantage_BGP = jnp.stack(advantage, -1)
    return jnp.where(dead_groups(reward_BGR, credit)[:, None, :], 0.0, advantage_BGP)


def per_action(advantage_BGP: Array, phase_BGT: Array) -> Array:
    """The advantage of each action's own phase, `advantage_BGT`; 0 where untrained."""
    spread_BGT = jnp.zeros(phase_BGT.shape, advantage_BGP.dtype)
    for p, label in enumerate(TRAINED):
        spread_BGT = jnp.where(phase_BGT == label, advantage_BGP[..., p : p + 1], spread_BGT)
    return spread_BGT


# --------------------------------------------------------------------- action weights


def _token_weights(phase_BGT: Array, trained_BGT: Array) -> Array:
    return jnp.where(trained_BGT, 1.0 / jnp.maximum(trained_BGT.sum(), 1), 0.0)


def _phase_weights(phase_BGT: Array, trained_BGT: Array) -> Array:
    in_phase_BGTP = trained_BGT[..., None] & (phase_BGT[..., None] == jnp.asarray(TRAINED))
    size_BG1P = in_phase_BGTP.sum(2, keepdims=True)
    pairs = (size_BG1P > 0).sum()
    return (in_phase_BGTP / (jnp.maximum(size_BG1P, 1) * jnp.maximum(pairs, 1))).sum(-1)


def _constant_weights(phase_BGT: Array, trained_BGT: Array) -> Array:
    return jnp.where(trained_BGT, 1.0 / max(trained_BGT.size, 1), 0.0)


WEIGHTINGS: dict[str, Callable[[Array, Array], Array]] = {
    "token": _token_weights,
    "phase": _phase_weights,
    "constant": _constant_weights,
}


def action_weights(phase_BGT: Array, weighting: str) -> Array:
    """Loss weight of every action, `weight_BGT` float32, 0 where untrained.

    token: 1 / trained tokens of the batch. phase: each phase of each rollout sums to
    1 / ((rollout, phase) pairs that have trained tokens). constant: 1 / (B·G·T) (Dr. GRPO); T is what
    the transcripts of this batch are padded to.
    Advantages play no part: a dead group stays in the denominator.

    phase_BGT: of the global batch; inside jit the array may be sharded. Actions labelled
        UNTRAINED (also those with a single allowed choice) count in no mean.
    weighting: static under jit. Raises KeyError on one that WEIGHTINGS lacks.
    """
    return WEIGHTINGS[weighting](phase_BGT, phase_BGT != UNTRAINED).astype(jnp.float32)


def make_batch(query: PyTree, rollout: Rollout, reward_BGR: Array, credit: Credit, weighting: str) -> Batch:
    """What every update needs, from rollouts and their rewards; the global batch.

    credit, weighting: static under jit.
    """
    return Batch(
        query=query,
        rollout=rollout,
        reward=reward_BGR,
        advantage=per_action(group_advantage(reward_BGR, credit), rollout.phase),
        weight=action_weights(rollout.phase, weighting),
    )
