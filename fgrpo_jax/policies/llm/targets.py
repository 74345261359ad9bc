"""Transcripts written from the relevance labels: SFT as the loop's other source of rollouts."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fgrpo_jax import shards
from fgrpo_jax.policies.llm import masks, transcript
from fgrpo_jax.policies.llm.query import Query
from fgrpo_jax.types import UNTRAINED, Array, Lists, Rollout


def target_lists(grammar: transcript.Grammar, query: Query, key: Array, fill: str) -> tuple[Array, Array]:
    """The lists to imitate: slate [B,1,N] and ranking [B,1,K] of candidate indices.

    The slate is the relevant candidates (the most relevant ones if they exceed slate_max),
    filled uniformly from the rest of the pool up to slate_min; in gain order ("first") or
    "shuffled". The ranking is the slate's relevant items in gain order, then fill up to
    rank_min. Ties of gain are broken at random.
    """
    batch, n_candidates = query.relevance.shape
    order_key, shuffle_key = jax.random.split(key)
    present = jnp.arange(n_candidates) < query.n_candidates[:, None]
    gain_BC = jnp.where(present, query.relevance, -1.0)
    tie_BC = shards.uniform(order_key, gain_BC.shape, axis=0)
    by_gain_BC = jnp.lexsort((tie_BC, -gain_BC), axis=-1)  # padding candidates come last
    n_relevant = (gain_BC > 0).sum(-1)

    def length(low: int, high: int, available: Array) -> Array:
        return jnp.minimum(jnp.clip(n_relevant, low, high), available)

    def cut(order_BX: Array, size: int, n: Array) -> Array:
        order_BX = jnp.pad(order_BX, ((0, 0), (0, max(0, size - order_BX.shape[1]))))[:, :size]
        return jnp.where(jnp.arange(size) < n[:, None], order_BX, -1)

    n_slate = length(grammar.slate_min, grammar.slate_max, query.n_candidates)
    n_rank = length(grammar.rank_min, grammar.rank_max, n_slate)
    ranking_BK = cut(by_gain_BC, grammar.rank_max, n_rank)
    slate_BN = cut(by_gain_BC, grammar.slate_max, n_slate)
    if fill == "shuffled":
        chance = shards.uniform(shuffle_key, slate_BN.shape, axis=0)
        order = jnp.argsort(jnp.where(slate_BN >= 0, chance, 2.0), -1)
        slate_BN = jnp.take_along_axis(slate_BN, order, -1)
    return slate_BN[:, None], ranking_BK[:, None]


def rollout(grammar: transcript.Grammar, constrained: bool, fill: str, train_fill: bool) -> Callable:
    """Target transcripts as a source of rollouts, G = 1.

    Labelled UNTRAINED: tokens with a single allowed choice, and fill items unless
    `train_fill`. `logp` is 0: a target was not sampled from any policy.
    """

    def write(params, frozen, query: Query, key) -> tuple[Rollout, Lists]:
        slate, ranking = target_lists(grammar, query, key, fill)
        actions, named = transcript.render(grammar, query, slate, ranking)
        if constrained:
            lists, phase, decided = masks.parse(grammar, query, masks.choices(grammar, query), actions)
            phase = jnp.where(decided.allowed.sum(-1) == 1, UNTRAINED, phase)
        else:
            lists, phase, _ = transcript.parse(grammar, query, actions)
        if not train_fill:
            gain = jnp.take_along_axis(query.relevance[:, None], jnp.maximum(named, 0), -1)
            phase = jnp.where((named >= 0) & (gain == 0), UNTRAINED, phase)
        return Rollout(actions, phase, jnp.zeros(actions.shape, jnp.float32)), lists

    return write
