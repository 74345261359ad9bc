"""Objectives: `(logp_BGT, batch) -> (loss [], {name: Mean})`, built from plain numbers.

A loss is a plain sum over `batch.weight`, which is normalised over the global batch: the
losses (and gradients) of microbatches add up to those of the whole. Untrained actions
(weight 0) are masked before any arithmetic; their log-probability may be any finite number.
(An infinite one would still give NaN gradients inside the model, where its own backward
pass multiplies infinities by the zeros sent from here.)

Every logged value is a `Mean`, so microbatches and hosts add exactly. "loss" is the mean by
action weight: the optimised value itself where the weights sum to 1 (token, phase).

To add an objective, write its builder and add one line to OBJECTIVES. A builder's keywords are its
options (`options`), each a field of config.ObjectiveConfig. One that has `ratio` reads `batch.old_logp`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fgrpo_jax.algorithm.group_softmax import group_softmax
from fgrpo_jax.types import PHASES, TRAINED, Array, Batch, Mean

Objective = Callable[[Array, Batch], tuple[Array, dict[str, Mean]]]

# Log-ratios are cut here: exp stays finite, and a zero advantage times it stays zero.
_MAX_LOG_RATIO = 20.0


# --------------------------------------------------------------------- ratio levels


def _mean_where(x_BGT: Array, where_BGT: Array) -> Array:
    """Mean over a rollout's actions where the mask holds, `[B,G,1]`; 0 if there are none."""
    count_BG1 = where_BGT.sum(-1, keepdims=True)
    return jnp.where(where_BGT, x_BGT, 0.0).sum(-1, keepdims=True) / jnp.maximum(count_BG1, 1)


def _token_level(log_ratio_BGT: Array, phase_BGT: Array, trained_BGT: Array) -> Array:
    return log_ratio_BGT


def _phase_level(log_ratio_BGT: Array, phase_BGT: Array, trained_BGT: Array) -> Array:
    level_BGT = jnp.zeros_like(log_ratio_BGT)
    for label in TRAINED:
        in_phase_BGT = trained_BGT & (phase_BGT == label)
        level_BGT = jnp.where(in_phase_BGT, _mean_where(log_ratio_BGT, in_phase_BGT), level_BGT)
    return level_BGT


def _sequence_level(log_ratio_BGT: Array, phase_BGT: Array, trained_BGT: Array) -> Array:
    return jnp.where(trained_BGT, _mean_where(log_ratio_BGT, trained_BGT), 0.0)


RATIOS = {"token": _token_level, "phase": _phase_level, "sequence": _sequence_level}


def _ratio(logp_BGT: Array, old_BGT: Array, phase_BGT: Array, trained_BGT: Array, level: str) -> Array:
    """Importance ratio seen by every action; its gradient reaches the action's own logp only.

    Geometric mean over the level's trained actions (GSPO, arXiv 2507.18071), written as
    that paper's token form, stop_gradient(ratio) · exp(logp − stop_gradient(logp)). Where
    an advantage is shared by a whole level it has the gradient of the mean itself; where
    phases differ, no action is moved by the other phase's advantage.
    """
    fixed_BGT = jax.lax.stop_gradient(logp_BGT)
    level_BGT = RATIOS[level](fixed_BGT - old_BGT, phase_BGT, trained_BGT)
    return jnp.exp(jnp.clip(level_BGT, -_MAX_LOG_RATIO, _MAX_LOG_RATIO) + (logp_BGT - fixed_BGT))


# --------------------------------------------------------------------- objectives


def _weighted_mean(x_BGT: Array, weight_BGT: Array) -> Mean:
    return Mean((weight_BGT * x_BGT).sum(), weight_BGT.sum())


def _count_mean(x_BGT: Array, where_BGT: Array) -> Mean:
    return Mean(jnp.where(where_BGT, x_BGT, 0.0).sum(), where_BGT.sum().astype(jnp.float32))


def clipped_pg(
    ratio: str = "phase", clip_low: float = 0.2, clip_high: float = 0.2, kl_weight: float = 0.0
) -> Objective:
    """Clipped policy gradient, − Σ w·min(r·A, clip(r, 1 − clip_low, 1 + clip_high)·A).

    PPO's pessimistic form with DAPO's asymmetric clip (arXiv 2503.14476). F-GRPO calls its
    objective "sequence-level" without saying over what: `ratio` offers token, phase and
    sequence. Without `batch.old_logp` the old policy is the current one (ratio exactly 1),
    and the gradient is REINFORCE's, − Σ w·A·∇logp, at every level and clip range.

    kl_weight: of the KL to `batch.ref_logp` by the k3 estimator, e^d − d − 1 with
        d = ref_logp − logp, per action and by the same weights.
    Metrics: loss, ratio, drift (of the sampler's log-probabilities from the trainer's),
    clip_fraction_slate, clip_fraction_rank, and kl if there is a reference. Raises ValueError on an
    unknown ratio level, or when the KL has no reference.
    """
    if ratio not in RATIOS:
        raise ValueError(f"ratio={ratio!r} is not one of {', '.join(RATIOS)}")

    def objective(logp_BGT: Array, batch: Batch) -> tuple[Array, dict[str, Mean]]:
        if kl_weight and batch.ref_logp is None:
            raise ValueError(f"kl_weight={kl_weight} needs batch.ref_logp, the frozen policy's log-probabilities")
        phase_BGT, weight_BGT = batch.rollout.phase, batch.weight
        trained_BGT = weight_BGT > 0
        logp_BGT = jnp.where(trained_BGT, logp_BGT, 0.0)
        old_BGT = logp_BGT if batch.old_logp is None else jnp.where(trained_BGT, batch.old_logp, 0.0)
        ratio_BGT = _ratio(logp_BGT, jax.lax.stop_gradient(old_BGT), phase_BGT, trained_BGT, ratio)
        advantage_BGT = batch.advantage

        # The min of PPO, spelled out: at a tie `jnp.minimum` would halve the gradient.
        high_BGT = (advantage_BGT > 0) & (ratio_BGT > 1 + clip_high)
        low_BGT = (advantage_BGT < 0) & (ratio_BGT < 1 - clip_low)
        clipped_BGT = trained_BGT & (high_BGT | low_BGT)
        bound_BGT = jnp.where(high_BGT, 1 + clip_high, 1 - clip_low)
        loss_BGT = -advantage_BGT * jnp.where(clipped_BGT, bound_BGT, ratio_BGT)

        # How far the sampler's log-probabilities are from the trainer's: 0 but for rounding.
        drift_BGT = jnp.abs(jax.lax.stop_gradient(old_BGT) - batch.rollout.logp)
        metrics = {"ratio": _count_mean(ratio_BGT, trained_BGT), "drift": _count_mean(drift_BGT, trained_BGT)}
        for name, label in zip(PHASES, TRAINED, strict=True):
            metrics[f"clip_fraction_{name}"] = _count_mean(clipped_BGT, trained_BGT & (phase_BGT == label))
        if batch.ref_logp is not None:
            d_BGT = jnp.where(trained_BGT, batch.ref_logp - logp_BGT, 0.0)
            kl_BGT = jnp.expm1(d_BGT) - d_BGT
            loss_BGT += kl_weight * kl_BGT
            metrics["kl"] = _weighted_mean(kl_BGT, weight_BGT)
        metrics["loss"] = _weighted_mean(loss_BGT, weight_BGT)
        return metrics["loss"].sum, metrics

    return objective


def with_values(
    objective: Objective, value_by: Callable[[Array], Array]
) -> Callable[[tuple[Array, Array], Batch], tuple[Array, dict[str, Mean]]]:
    """An objective less the values of choices, − Σ w·Σ_c value(c)·value_by(π(c)): credit.exact and credit.labels.

    It reads ((logp_BGT, probability_BGTC), batch), as Policy.choices gives them. On policy: it is not clipped.
    Metric more: value, the inner sum by weight (of `exact` the expected value of the actions); "loss" holds it too.
    """

    def both(scores: tuple[Array, Array], batch: Batch) -> tuple[Array, dict[str, Mean]]:
        logp_BGT, probability_BGTC = scores
        loss, metrics = objective(logp_BGT, batch)
        value_BGT = (batch.value * value_by(probability_BGTC)).sum(-1)
        value = _weighted_mean(jnp.where(batch.weight > 0, value_BGT, 0.0), batch.weight)
        whole = Mean(metrics["loss"].sum - value.sum, metrics["loss"].count)
        return loss - value.sum, metrics | {"loss": whole, "value": value}

    return both


def nll() -> Objective:
    """Weighted negative log-likelihood, − Σ w·logp: supervised fine-tuning on logged lists.

    Metrics: loss.
    """

    def objective(logp_BGT: Array, batch: Batch) -> tuple[Array, dict[str, Mean]]:
        loss = _weighted_mean(-jnp.where(batch.weight > 0, logp_BGT, 0.0), batch.weight)
        return loss.sum, {"loss": loss}

    return objective


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "clipped_pg": clipped_pg,
    "nll": nll,
    "group_softmax": group_softmax,
}


def reads_old_logp(name: str) -> bool:
    """Whether it weighs actions by how probable they were before the first of several updates: it has the option
    `ratio`, and reads `batch.old_logp`, which is not computed for others."""
    return "ratio" in options(name)


def options(name: str) -> tuple[str, ...]:
    """The keywords that the builder of this name takes. Raises KeyError on one that OBJECTIVES lacks."""
    return tuple(inspect.signature(OBJECTIVES[name]).parameters)
