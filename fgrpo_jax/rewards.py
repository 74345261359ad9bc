"""Rewards of rollouts, read off their lists: `(list_BGX, relevance_BC, k) -> [B,G]` float32.

Coverage rewards read the whole slate as a set, utility rewards the top k of the ranking.
Both are the very functions that evaluation reports (metrics.py). To add a reward, write the
function and add one line to COVERAGE or UTILITY.

Sources: coverage trains generation and utility trains ranking as in F-GRPO (arXiv
2605.12995). Its k and its format penalty are unspecified in the paper: both are arguments.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from fgrpo_jax import metrics
from fgrpo_jax.transcript import FIRST_RANK_CODE, OUTCOMES
from fgrpo_jax.types import PHASES, Array, Credit, Lists, Query

Reward = Callable[[Array, Array, int], Array]


def _coverage(metric: metrics.Metric) -> Reward:
    """The metric of the whole slate as a set: cut at the slate's own length, k is not read."""

    def reward(slate_BGN: Array, relevance_BC: Array, k: int) -> Array:
        del k
        pool_B1C = relevance_BC[:, None, :]
        size_BG = (slate_BGN >= 0).sum(-1)
        return metric(metrics.take_gains(pool_B1C, slate_BGN), pool_B1C, size_BG).astype(jnp.float32)

    return reward


def _utility(metric: metrics.Metric) -> Reward:
    """The metric of the ranking, cut at k."""

    def reward(ranking_BGK: Array, relevance_BC: Array, k: int) -> Array:
        pool_B1C = relevance_BC[:, None, :]
        return metric(metrics.take_gains(pool_B1C, ranking_BGK), pool_B1C, k).astype(jnp.float32)

    return reward


COVERAGE: dict[str, Reward] = {
    "recall": _coverage(metrics.recall),
    "precision": _coverage(metrics.precision),
    "f1": _coverage(metrics.f1),
}
UTILITY: dict[str, Reward] = {
    "ndcg": _utility(metrics.ndcg),
    "mrr": _utility(metrics.mrr),
    "hit": _utility(metrics.hit),
}
REWARDS: dict[str, Reward] = {**COVERAGE, **UTILITY}


def broken_values(default: float, rules: tuple[tuple[str, float], ...]) -> tuple[float, ...]:
    """The reward of every outcome that broke a rule, by outcome code; entry 0 (ok) is unused.

    Raises ValueError when a rule names no outcome, or "ok".
    """
    own = dict(rules)
    if unknown := sorted(set(own) - set(OUTCOMES[1:])):
        raise ValueError(
            f"no broken outcome is called {', '.join(unknown)}; there are {', '.join(OUTCOMES[1:])}"
        )
    return (0.0, *(float(own.get(name, default)) for name in OUTCOMES[1:]))


def term_rewards(credit: Credit, lists: Lists, query: Query, k: int, broken: tuple[float, ...]) -> Array:
    """The reward of each credit term, `reward_BGR` in the order of `credit.terms`, unweighted.

    A transcript that broke in the slate gets `broken[outcome]` in every term: it never
    reached a ranking. One that broke in the rank phase keeps its coverage rewards and gets
    `broken[outcome]` in the utility ones.

    credit, k, broken: static under jit. broken: see `broken_values`.
    Raises ValueError when `broken` has another length than OUTCOMES.
    """
    if len(broken) != len(OUTCOMES):
        raise ValueError(f"{len(broken)} broken values for {len(OUTCOMES)} outcomes: use broken_values()")
    broken_BG = jnp.asarray(broken, jnp.float32)[lists.outcome]
    distinct = {}
    for name in dict.fromkeys(name for _, name, _ in credit.terms):  # in their order: a set has another on every host
        if name in COVERAGE:
            list_BGX, ok_BG = lists.slate, (lists.outcome == 0) | (lists.outcome >= FIRST_RANK_CODE)
        else:
            list_BGX, ok_BG = lists.ranking, lists.outcome == 0
        distinct[name] = jnp.where(ok_BG, REWARDS[name](list_BGX, query.relevance, k), broken_BG)
    columns = [distinct[name] for _, name, _ in credit.terms]
    return jnp.stack(columns, -1) if columns else jnp.zeros((*lists.outcome.shape, 0), jnp.float32)


def phase_rewards(reward_BGR: Array, credit: Credit) -> Array:
    """For the log: the weighted rewards of each phase by what they measure, `reward_BGP`.

    Coverage counts to the slate and utility to the rank phase whichever phase a term
    trains, and a reward that several terms name counts once (with the first one's weight):
    GRPO, which gives both phases the joint reward, and F-GRPO log comparable numbers.
    """
    totals = [jnp.zeros(reward_BGR.shape[:-1], jnp.float32) for _ in PHASES]
    seen = set()
    for r, (_, name, weight) in enumerate(credit.terms):
        if name not in seen:
            totals[0 if name in COVERAGE else 1] += weight * reward_BGR[..., r]
        seen.add(name)
    return jnp.stack(totals, -1)
