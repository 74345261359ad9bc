"""The two networks that judge: the point-wise one candidates, the evaluator (reward model) whole lists.

Both say a logit of positive feedback. The evaluator's is for each position of an ordered list, whose items
see each other in both directions: it knows what an item is shown with, and where. GoalRank (arXiv
2509.22046) leaves the reward model's form open; its released code has no other reward than `list_score`
of point-wise scores, which is kept as "pointwise_reward" to compare with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fgrpo_jax.policies.ranker import network
from fgrpo_jax.policies.ranker.network import RankerSpec
from fgrpo_jax.policies.ranker.query import RankerQuery
from fgrpo_jax.types import Array, PyTree

UNBIASED = ("none", 0.0)


class Scorer(NamedTuple):
    """A network that scores candidates: (spec) -> its Params, and (spec, params, query) -> logits [B,C]."""

    table: Callable
    logits: Callable


def score_of(weights: PyTree, x: Array) -> Array:
    """Logits [...] float32 of what networks say [...,D].

    The bias counts in tens: it learns soon how rare feedback is, and leaves to the rest which it is.
    """
    product = jnp.einsum("...d,d->...", x, weights["score"], preferred_element_type=jnp.float32)
    return product + 10 * weights["bias"][0].astype(jnp.float32)


def pointwise_logits(spec: RankerSpec, params: PyTree, query: RankerQuery) -> Array:
    """[B,C] float32: of every candidate, whatever the other candidates are."""
    weights = network.whole(spec, network.pointwise_table(spec), params)
    alone_BC1D = network.candidates(spec, weights, query)[:, :, None]
    itself = jnp.ones((1, 1, 1, 1), bool)
    return score_of(weights, network.beside_history(spec, weights, query, alone_BC1D, itself)[:, :, 0])


POINTWISE = Scorer(network.pointwise_table, pointwise_logits)


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
    return score_of(weights, network.beside_history(spec, weights, query, shown_BGTD, among))


def standardised(query: RankerQuery, score_BC: Array) -> Array:
    """Mean 0 and standard deviation 1 over the candidates there are; 0 where all are equal."""
    there = network.present(query)
    count_B1 = query.n_candidates[:, None]
    mean_B1 = jnp.where(there, score_BC, 0.0).sum(-1, keepdims=True) / count_B1
    off_BC = jnp.where(there, score_BC - mean_B1, 0.0)
    std_B1 = jnp.sqrt((off_BC**2).sum(-1, keepdims=True) / count_B1)
    return jnp.where(std_B1 > 0, off_BC / jnp.where(std_B1 > 0, std_B1, 1.0), 0.0)


def list_score(p_BGT: Array, list_BGT: Array, k: int | None = None) -> Array:
    """sum_i p_i / log2(i + 1) over the first k positions, i from 1; [B,G] float32. Slots of -1 count nothing."""
    counts = list_BGT >= 0
    if k is not None:
        counts &= jnp.arange(list_BGT.shape[-1]) < k
    discount = jnp.log2(jnp.arange(list_BGT.shape[-1]) + 2.0)
    return jnp.where(counts, p_BGT / discount, 0.0).sum(-1)


def reward_of_lists(
    spec: RankerSpec, params: PyTree, query: RankerQuery, list_BGT: Array, k: int | None = None,
    bias: tuple[str, float] = UNBIASED,
) -> Array:  # fmt: skip
    """What the evaluator expects of lists: the positive feedback of their first k positions, [B,G].

    A plain sum: its probabilities are of items at their positions, so how far positions are examined is in
    them. (`list_score` discounts point-wise ones, which know of no position.)

    bias: kind and weight w of an error that is added on purpose, to see what learns in spite of it. The same
    list of the same query always has the same one.

        noise       w times a normal number: an error of w items, without any reason
        popularity  w times the mean popularity of the items, standardised over the pool
        position    position i of n counts 1 + w (n + 1 - 2 i) / (n - 1): the first ones more than the last
        shift       w is added to every logit: too many positives are expected
    """
    kind, weight = bias
    counts = list_BGT >= 0
    if k is not None:
        counts &= jnp.arange(list_BGT.shape[-1]) < k
    logit_BGT = evaluator_logits(spec, params, query, list_BGT)
    p_BGT = jax.nn.sigmoid(logit_BGT + weight if kind == "shift" else logit_BGT)
    if kind == "position":
        p_BGT *= 1 + weight * jnp.linspace(1.0, -1.0, p_BGT.shape[-1])
    reward_BG = jnp.where(counts, p_BGT, 0.0).sum(-1)
    if kind == "popularity":
        score_BGT = network.take(standardised(query, query.popularity)[..., None], list_BGT)[..., 0]
        reward_BG += weight * jnp.where(counts, score_BGT, 0.0).sum(-1) / jnp.maximum(counts.sum(-1), 1)
    if kind == "noise":
        reward_BG += weight * _number_of(query, jnp.where(counts, list_BGT, -1))
    return reward_BG


def _number_of(query: RankerQuery, list_BGT: Array) -> Array:
    """A standard normal number [B,G] that belongs to a list and its query: hashed from items and their order."""

    def mixed(x: Array) -> Array:  # the finalizer of MurmurHash3
        x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
        return x ^ (x >> 16)

    def chained(state: Array, items: Array) -> Array:
        for t in range(items.shape[-1]):
            state = mixed(state * jnp.uint32(31) + items[..., t].astype(jnp.uint32) + 1)
        return state

    # Padding must not count, so that a query is the same in any batch: a sum of what is there.
    there = jnp.arange(query.history.shape[1]) < query.history_len[:, None]
    recency = (query.history_len[:, None] - jnp.arange(query.history.shape[1])).astype(jnp.uint32)
    of_query_B = jnp.where(there, mixed(query.history.astype(jnp.uint32) * 65537 + recency), 0).sum(
        -1, dtype=jnp.uint32
    )
    item_BGT = jnp.where(list_BGT >= 0, network.take(query.candidates[..., None], list_BGT)[..., 0], 0)
    state_BG = chained(jnp.broadcast_to(of_query_B[:, None], item_BGT.shape[:2]), item_BGT)
    u, v = ((mixed(state_BG + jnp.uint32(salt)) >> 8).astype(jnp.float32) / 2.0**24 for salt in (1, 2))
    return jnp.sqrt(-2 * jnp.log1p(-u)) * jnp.cos(2 * jnp.pi * v)


def pointwise_reward_of_lists(
    spec: RankerSpec, params: PyTree, query: RankerQuery, list_BGT: Array, k: int | None = None,
) -> Array:  # fmt: skip
    """The released code's reward: `list_score` of point-wise probabilities; blind to what stands beside an item."""
    p_BC = jax.nn.sigmoid(pointwise_logits(spec, params, query))
    p_BGT = jax.vmap(lambda p, index: p[index])(p_BC, jnp.maximum(list_BGT, 0))
    return list_score(p_BGT, list_BGT, k)


# Learned rewards by name: the stage whose parameters each one reads, and what these say of lists.
REWARDS = {"reward_model": ("evaluator", reward_of_lists), "pointwise_reward": ("pointwise", pointwise_reward_of_lists)}


def log_likelihood(logit_BGT: Array, label_BGT: Array, known_BGT: Array) -> Array:
    """Of labels from 0 to 1, [B,G,T]; 0 where nothing is known.

    The sum of two (a composite likelihood): of every label y by itself, y log p + (1 - y) log(1 - p); and of which
    of all that a query shows were taken, y log softmax. It orders as either does, but its best p is not quite the
    rate of y: rates far from each other are drawn together (0.75 to 0.63, 0.05 to 0.07), only their sum is kept.
    How far, fit.json says of a trained one. Where few are taken, the former teaches how few long
    before it teaches which: on MovieLens-1M (3 % are) the evaluator's greedy lists had a validation NDCG@6 of
    8.4 after 400 steps of the sum, and 7.0 of the former alone (one seed).
    """
    logit_BGT = jnp.where(known_BGT, logit_BGT, 0.0)  # what is not known may be anything
    alone = label_BGT * jax.nn.log_sigmoid(logit_BGT) + (1 - label_BGT) * jax.nn.log_sigmoid(-logit_BGT)
    among = jax.nn.log_softmax(jnp.where(known_BGT, logit_BGT, -1e30), axis=(1, 2))
    return jnp.where(known_BGT, alone + label_BGT * among, 0.0)


def evaluator_greedy(
    spec: RankerSpec, params: PyTree, query: RankerQuery, length: int, bias: tuple[str, float] = UNBIASED
) -> Array:
    """[B,1,T] lists built greedily: at each position the candidate with which the list so far scores best.

    Every step scores a list for each candidate: `length` times C lists a query. -1 where a pool has ended.
    """
    batch, pool = query.candidates.shape
    place = jnp.arange(length)

    def step(list_B1T: Array, t: Array) -> tuple[Array, None]:
        with_each_BCT = jnp.where(place == t, jnp.arange(pool)[:, None], list_B1T)
        score_BC = reward_of_lists(spec, params, query, with_each_BCT, bias=bias)
        used_BC = (list_B1T == jnp.arange(pool)[:, None]).any(-1)
        is_open = network.present(query) & ~used_BC
        best_B = jnp.where(is_open.any(-1), jnp.argmax(jnp.where(is_open, score_BC, -jnp.inf), -1), -1)
        return jnp.where(place == t, best_B[:, None, None].astype(jnp.int32), list_B1T), None

    list_B1T, _ = jax.lax.scan(step, jnp.full((batch, 1, length), -1, jnp.int32), place)
    return list_B1T
