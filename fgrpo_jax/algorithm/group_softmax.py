"""GoalRank's objective: imitate the reference policy that a group's rewards define (arXiv 2509.22046, Eq. 3-5)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fgrpo_jax.types import Array, Batch, Mean

# Upper edges of the logged shares of groups by their gap of rewards; a last share has no edge.
GAPS = (0.0, 0.01, 0.1, 1.0)


def reference_policy(reward_BG: Array, sigma: float, normalised: bool) -> tuple[Array, Array]:
    """Eq. 3 and 4: what the model is to say of each list of a group, `[B,G]`, and which groups are kept, `[B]`.

    kept: max - min > sigma (compared, never summed: equal rewards are found exactly). In groups that are
    not kept the distribution is 0 everywhere.
    normalised: softmax of rewards less their mean over their population standard deviation (the paper's
    "std"; how it divides is left open there); else of the rewards themselves, at temperature 1.
    """
    kept_B = reward_BG.max(1) - reward_BG.min(1) > sigma
    score_BG = reward_BG
    if normalised:
        centred_BG = reward_BG - reward_BG.mean(1, keepdims=True)
        std_B1 = jnp.sqrt((centred_BG**2).mean(1, keepdims=True))
        score_BG = centred_BG / jnp.where(std_B1 > 0, std_B1, 1.0)
    return jnp.where(kept_B[:, None], jax.nn.softmax(score_BG, 1), 0.0), kept_B


def group_softmax(sigma: float = 0.0, normalised: bool = True) -> Callable[[Array, Batch], tuple[Array, dict]]:
    """GoalRank, L = - E_B sum_l pi_ref(l | B) log pi_theta(l), l being the lists of a group B (Eq. 5).

    This is KL(pi_ref || pi_theta) up to the entropy of pi_ref, which is constant: forward, mass-covering.
    pi_ref is a distribution over the group (`reference_policy`); pi_theta(l) is the model's probability of
    the whole list, the product over its trained actions, and is not renormalised over the group. A list
    that occurs twice in a group counts twice.

    E_B is a mean over all groups of the batch: those that Eq. 3 filters have no gradient and stay in the
    denominator, as dead groups do elsewhere. (The paper writes an expectation over groups that passed the
    filter; that differs by a factor, and would need their number in the whole batch.) The mean is taken
    by `batch.weight`: a group's share of it is that of its actions, which is 1 / B where weights are by
    phase, or where all lists have as many trained actions.

    Metrics: loss, kept_groups, gap (of rewards, max - min), gap_to_X (share of groups whose gap is at most
    X and above the edge before), gap_above_X, entropy (of pi_ref, kept groups).
    Raises ValueError where the batch has another number of rewards than one, or sigma is negative.
    """
    if sigma < 0:
        raise ValueError(f"sigma={sigma} must be 0 or more")

    def objective(logp_BGT: Array, batch: Batch) -> tuple[Array, dict[str, Mean]]:
        if batch.reward.shape[-1] != 1:
            raise ValueError(f"group_softmax reads one reward, not {batch.reward.shape[-1]}: name one credit term")
        reward_BG = batch.reward[..., 0]
        reference_BG, kept_B = reference_policy(reward_BG, sigma, normalised)
        logp_BG = jnp.where(batch.weight > 0, logp_BGT, 0.0).sum(-1)
        share_B = batch.weight.sum((1, 2))
        loss = Mean(-(share_B * (reference_BG * logp_BG).sum(1)).sum(), share_B.sum())
        gap_B = reward_BG.max(1) - reward_BG.min(1)
        entropy_B = -jax.scipy.special.xlogy(reference_BG, reference_BG).sum(1)
        groups, kept = jnp.float32(kept_B.size), kept_B.sum().astype(jnp.float32)
        metrics = {"loss": loss, "kept_groups": Mean(kept, groups), "entropy": Mean(entropy_B.sum(), kept)}
        metrics["gap"] = Mean(gap_B.sum(), groups)
        below_B = jnp.zeros(gap_B.shape, bool)
        for edge in GAPS:
            here_B = (gap_B <= edge) & ~below_B
            metrics[f"gap_to_{edge:g}"] = Mean(here_B.sum().astype(jnp.float32), groups)
            below_B |= here_B
        metrics[f"gap_above_{GAPS[-1]:g}"] = Mean((~below_B).sum().astype(jnp.float32), groups)
        return loss.sum, metrics

    return objective
