"""Rewards of rollouts: `(lists, query, frozen) -> [B,G]` float32.

Coverage rewards read the whole slate as a set, utility rewards the top k of the ranking.
Both are the very functions that evaluation reports (metrics.py). `frozen` is for rewards that
are learned. To add a reward, write a function of k that returns it and add one line to COVERAGE
or UTILITY; or have a configuration name it where it is (run/own_rewards.py).

Sources: coverage trains generation and utility trains ranking as in F-GRPO (arXiv
2605.12995). Its k and its format penalty are unspecified in the paper: both are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax.numpy as jnp

from fgrpo_jax import metrics
from fgrpo_jax.types import PHASES, Array, Credit, Lists, Outcome, PyTree

Reward = Callable[[Lists, PyTree, PyTree], Array]


def _coverage(metric: metrics.Metric) -> Callable[[int], Reward]:
    """The metric of the whole slate as a set: cut at the slate's own length, k is not read."""

    def reward(lists: Lists, query: PyTree, frozen: PyTree) -> Array:
        pool_B1C = query.relevance[:, None, :]
        size_BG = (lists.slate >= 0).sum(-1)
        return metric(metrics.take_gains(pool_B1C, lists.slate), pool_B1C, size_BG).astype(jnp.float32)

    return lambda k: reward


def _utility(metric: metrics.Metric) -> Callable[[int], Reward]:
    """The metric of the ranking, cut at k."""

    def build(k: int) -> Reward:
        def reward(lists: Lists, query: PyTree, frozen: PyTree) -> Array:
            pool_B1C = query.relevance[:, None, :]
            return metric(metrics.take_gains(pool_B1C, lists.ranking), pool_B1C, k).astype(jnp.float32)

        return reward

    return build


COVERAGE: dict[str, Callable[[int], Reward]] = {
    "recall": _coverage(metrics.recall),
    "precision": _coverage(metrics.precision),
    "f1": _coverage(metrics.f1),
}


def _alpha_ndcg(k: int) -> Reward:
    """nDCG of the ranking, in which relevant items of a topic are worth less each time."""

    def reward(lists: Lists, query: PyTree, frozen: PyTree) -> Array:
        pool_B1C, topics_B1C = query.relevance[:, None, :], query.topics[:, None, :]
        gains_BGK = metrics.take_gains(pool_B1C, lists.ranking)
        topics_BGK = metrics.take_topics(topics_B1C, lists.ranking)
        return metrics.alpha_ndcg(gains_BGK, pool_B1C, k, topics_BGK, topics_B1C).astype(jnp.float32)

    return reward


UTILITY: dict[str, Callable[[int], Reward]] = {
    "ndcg": _utility(metrics.ndcg),
    "mrr": _utility(metrics.mrr),
    "hit": _utility(metrics.hit),
}
REWARDS: dict[str, Callable[[int], Reward]] = {**COVERAGE, **UTILITY}
# Not of every query: a policy whose queries hold `topics` [B,C], -1 for none, offers these in Policy.rewards.
TOPICAL: dict[str, Callable[[int], Reward]] = {"alpha_ndcg": _alpha_ndcg}


# --------------------------------------------------------------------- item by item


def _recall_of_items(pool_BC: Array, k: int, size: int) -> Array:
    relevant_BC = (pool_BC > 0).astype(jnp.float32)
    share_BC = relevant_BC / jnp.maximum(relevant_BC.sum(-1, keepdims=True), 1)
    return jnp.broadcast_to(share_BC[:, None], (len(pool_BC), size, pool_BC.shape[-1]))


def _ndcg_of_items(pool_BC: Array, k: int, size: int) -> Array:
    ideal_B = metrics.dcg(jnp.flip(jnp.sort(pool_BC, -1), -1), k)
    place_X = jnp.arange(size)
    discount_X = jnp.where(place_X < k, 1.0 / jnp.log2(place_X + 2.0), 0.0)
    share_BC = pool_BC / jnp.where(ideal_B > 0, ideal_B, 1.0)[:, None]
    return share_BC[:, None] * discount_X[:, None]


class Sum(NamedTuple):
    """A reward that is a sum over the items of a phase's list.

    gains: (pool_BC, k, size) -> [B,X,C]: what each candidate adds at each of the first `size` places.
    """

    phase: str
    gains: Callable[[Array, int, int], Array]


SUMS: dict[str, Sum] = {"recall": Sum("slate", _recall_of_items), "ndcg": Sum("rank", _ndcg_of_items)}


class Broken(NamedTuple):
    """What rollouts are worth that broke a rule, by outcome code; hashable, static under jit."""

    value: tuple[float, ...]  # of every term of the phases that do not count
    keeps_slate: tuple[bool, ...]  # whether coverage counts all the same


def broken_values(default: float, rules: tuple[tuple[str, float], ...], outcomes: tuple[Outcome, ...]) -> Broken:
    """`default` for every outcome of a policy that broke a rule, or what `rules` say of it.

    Raises ValueError when a rule names no outcome, or one that is well-formed.
    """
    own, names = dict(rules), [outcome.name for outcome in outcomes if outcome.breaks]
    if unknown := sorted(set(own) - set(names)):
        raise ValueError(f"no broken outcome is called {', '.join(unknown)}; there are {', '.join(names)}")
    value = tuple(float(own.get(outcome.name, default)) if outcome.breaks else 0.0 for outcome in outcomes)
    return Broken(value, tuple(outcome.breaks != "slate" for outcome in outcomes))


def covers(credit: Credit, name: str) -> bool:
    """Whether a reward reads the slate, so that it counts where only the rank phase broke."""
    return name in COVERAGE or name in credit.of_slate


def term_rewards(
    credit: Credit,
    lists: Lists,
    query: PyTree,
    frozen: PyTree,
    k: int,
    broken: Broken,
    learned: Mapping[str, Callable[[int], Reward]] = MappingProxyType({}),
) -> Array:
    """The reward of each credit term, `reward_BGR` in the order of `credit.terms`, unweighted.

    A rollout that broke in the slate gets its outcome's value in every term: it never reached a
    ranking. One that broke in the rank phase keeps its coverage rewards and gets the value in the
    utility ones.

    credit, k, broken: static under jit. broken: see `broken_values`. learned: a policy's or a user's own
    rewards, beside REWARDS.
    """
    value_BG = jnp.asarray(broken.value, jnp.float32)[lists.outcome]
    keeps_slate_BG, ok_BG = jnp.asarray(broken.keeps_slate)[lists.outcome], lists.outcome == 0
    known, distinct = REWARDS | dict(learned), {}
    for name in dict.fromkeys(name for _, name, _ in credit.terms):  # in their order: a set has another on every host
        counts_BG = keeps_slate_BG if covers(credit, name) else ok_BG
        distinct[name] = jnp.where(counts_BG, known[name](k)(lists, query, frozen), value_BG)
    columns = [distinct[name] for _, name, _ in credit.terms]
    return jnp.stack(columns, -1) if columns else jnp.zeros((*lists.outcome.shape, 0), jnp.float32)


def outcome_rewards(reward_BGR: Array, credit: Credit, lists: Lists, broken: Broken) -> Array:
    """What the lists are worth without the penalties of broken ones, [B,G,R]: those found nothing, 0.

    Groups are judged by these: a penalty must not make one look alive in which no slate found anything.
    """
    keeps_slate_BG, ok_BG = jnp.asarray(broken.keeps_slate)[lists.outcome], lists.outcome == 0
    counts = [keeps_slate_BG if covers(credit, name) else ok_BG for _, name, _ in credit.terms]
    return jnp.where(jnp.stack(counts, -1), reward_BGR, 0.0) if counts else reward_BGR


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
            totals[0 if covers(credit, name) else 1] += weight * reward_BGR[..., r]
        seen.add(name)
    return jnp.stack(totals, -1)
