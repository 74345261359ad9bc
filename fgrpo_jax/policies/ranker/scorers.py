"""The two networks that judge: the point-wise one candidates, the evaluator (reward model) whole lists.

Both say a logit of positive feedback. The evaluator's is for each position of an ordered list, whose items
see each other in both directions: it knows what an item is shown with, and where. GoalRank (arXiv
2509.22046) leaves the reward model's form open; its released code has no other reward than `list_score`
of point-wise scores, which is kept as "pointwise_reward" to compare with.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fgrpo_jax.policies.ranker import network
from fgrpo_jax.policies.ranker.network import RankerSpec
from fgrpo_jax.policies.ranker.query import RankerQuery
from fgrpo_jax.types import Array, PyTree


def _score(weights: PyTree, x: Array) -> Array:
    product = jnp.einsum("...d,d->...", x, weights["score"], preferred_element_type=jnp.float32)
    return product + weights["bias"][0].astype(jnp.float32)


def pointwise_logits(spec: RankerSpec, params: PyTree, query: RankerQuery) -> Array:
    """[B,C] float32: of every candidate, whatever the other candidates are."""
    weights = network.whole(spec, network.pointwise_table(spec), params)
    alone_BC1D = network.candidates(spec, weights, query)[:, :, None]
    itself = jnp.ones((1, 1, 1, 1), bool)
    return _score(weights, network.beside_history(spec, weights, query, alone_BC1D, itself)[:, :, 0])


def evaluator_logits(spec: RankerSpec, params: PyTree, query: RankerQuery, list_BGT: Array) -> Array:
    """[B,G,T] float32: of every position of ordered lists of candidate indices, -1 padded at the end.

    Positions that are padded have logits of no meaning. Raises ValueError where T is beyond list_length.
    """
    length = list_BGT.shape[-1]
    if length > spec.list_length:
        raise ValueError(f"lists of {length} positions; the evaluator was made for {spec.list_length}")
    weights = network.whole(spec, network.evaluator_table(spec), params)
    shown_BGTD = network.take(network.candidates(spec, weights, query), list_BGT) + weights["position"][:length]
    among = (list_BGT >= 0)[:, :, None]  # [B,G,1,T]
    return _score(weights, network.beside_history(spec, weights, query, shown_BGTD, among))


def list_score(p_BGT: Array, list_BGT: Array, k: int | None = None) -> Array:
    """sum_i p_i / log2(i + 1) over the first k positions, i from 1; [B,G] float32. Slots of -1 count nothing."""
    counts = list_BGT >= 0
    if k is not None:
        counts &= jnp.arange(list_BGT.shape[-1]) < k
    discount = jnp.log2(jnp.arange(list_BGT.shape[-1]) + 2.0)
    return jnp.where(counts, p_BGT / discount, 0.0).sum(-1)


def reward_of_lists(
    spec: RankerSpec, params: PyTree, query: RankerQuery, list_BGT: Array, k: int | None = None
) -> Array:
    """What the evaluator expects of lists: the positive feedback of their first k positions, [B,G].

    A plain sum: its probabilities are of items at their positions, so how far positions are examined is in
    them. (`list_score` discounts point-wise ones, which know of no position.)
    """
    counts = list_BGT >= 0
    if k is not None:
        counts &= jnp.arange(list_BGT.shape[-1]) < k
    p_BGT = jax.nn.sigmoid(evaluator_logits(spec, params, query, list_BGT))
    return jnp.where(counts, p_BGT, 0.0).sum(-1)


def pointwise_reward_of_lists(
    spec: RankerSpec, params: PyTree, query: RankerQuery, list_BGT: Array, k: int | None = None
) -> Array:
    """The released code's reward: `list_score` of point-wise probabilities; blind to what stands beside an item."""
    p_BC = jax.nn.sigmoid(pointwise_logits(spec, params, query))
    p_BGT = jax.vmap(lambda p, index: p[index])(p_BC, jnp.maximum(list_BGT, 0))
    return list_score(p_BGT, list_BGT, k)


# Learned rewards by name: the stage whose parameters each one reads, and what these say of lists.
REWARDS = {"reward_model": ("evaluator", reward_of_lists), "pointwise_reward": ("pointwise", pointwise_reward_of_lists)}


def log_likelihood(logit: Array, label: Array) -> Array:
    """y log p + (1 - y) log(1 - p) of a label y from 0 to 1."""
    return label * jax.nn.log_sigmoid(logit) + (1 - label) * jax.nn.log_sigmoid(-logit)


def evaluator_greedy(spec: RankerSpec, params: PyTree, query: RankerQuery, length: int) -> Array:
    """[B,1,T] lists built greedily: at each position the candidate with which the list so far scores best.

    Every step scores a list for each candidate: `length` times C lists a query. -1 where a pool has ended.
    """
    batch, pool = query.candidates.shape
    place = jnp.arange(length)

    def step(list_B1T: Array, t: Array) -> tuple[Array, None]:
        with_each_BCT = jnp.where(place == t, jnp.arange(pool)[:, None], list_B1T)
        score_BC = reward_of_lists(spec, params, query, with_each_BCT)
        used_BC = (list_B1T == jnp.arange(pool)[:, None]).any(-1)
        is_open = network.present(query) & ~used_BC
        best_B = jnp.where(is_open.any(-1), jnp.argmax(jnp.where(is_open, score_BC, -jnp.inf), -1), -1)
        return jnp.where(place == t, best_B[:, None, None].astype(jnp.int32), list_B1T), None

    list_B1T, _ = jax.lax.scan(step, jnp.full((batch, 1, length), -1, jnp.int32), place)
    return list_B1T
