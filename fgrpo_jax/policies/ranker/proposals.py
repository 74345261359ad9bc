"""Lists that others would make: the auxiliary policies M of GoalRank's groups (arXiv 2509.22046, section 4).

The paper asks for heuristics and light neural rankers beside the model's own lists, and does not say which
or how many; the released code has none. Each here is named, so a group's make-up is a tuple of
(name, number of lists):

    retriever   by first-stage score          pointwise   by point-wise score   frozen["pointwise"]
    popularity  by popularity                 mmr_topics  maximal marginal relevance over the retriever's scores:
    random      uniform                       mmr_items     redundancy by topic, or by item embeddings
    mmr_pointwise  the same over point-wise scores, by topic
    evaluator   built greedily under the evaluator                              frozen["evaluator"]
    perturbed   the best list before it with an item replaced, or two swapped   frozen["evaluator"]

Of a number of lists from scores the first is the order itself; the others are Plackett-Luce draws around it
(`noise`). All lists are [B,G,L] distinct candidates, -1 padded where a pool is smaller.

To add one, write a function and a line in PROPOSALS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fgrpo_jax import shards
from fgrpo_jax.policies.ranker import network, scorers
from fgrpo_jax.policies.ranker.network import RankerSpec
from fgrpo_jax.policies.ranker.query import RankerQuery
from fgrpo_jax.types import Array, PyTree


class Setting(NamedTuple):
    """What proposals depend on besides arrays; hashable.

    judge: sizes of evaluator and point-wise network.
    noise: scale of the Gumbel noise of further lists, in standard deviations of a pool's scores.
    mmr_lambda: weight of relevance against redundancy (Carbonell and Goldstein, 1998).
    bias: of the evaluator: scorers.reward_of_lists.
    """

    judge: RankerSpec
    noise: float = 0.5
    mmr_lambda: float = 0.7
    bias: tuple[str, float] = scorers.UNBIASED


class Asked(NamedTuple):
    """What one proposal is asked for."""

    query: RankerQuery
    frozen: PyTree
    key: Array
    count: int
    before: Array  # [B,G,L]: the lists of the group so far


# --------------------------------------------------------------------- orders by scores


def order(query: RankerQuery, score_BGC: Array, length: int) -> Array:
    """[B,G,L]: the candidates of the highest scores, ties by index."""
    score_BGC = jnp.where(network.present(query)[:, None], score_BGC, -jnp.inf)
    _, list_BGT = jax.lax.top_k(score_BGC, length)
    return jnp.where(jnp.arange(length) < query.n_candidates[:, None, None], list_BGT, -1).astype(jnp.int32)


def _gumbel(asked: Asked) -> Array:
    """[B,G,C], G being the number of lists that is asked for."""
    batch, pool = asked.query.candidates.shape
    u = shards.uniform(asked.key, (batch, asked.count, pool), axis=0) + 2.0**-24  # 0 has no logarithm
    return -jnp.log(-jnp.log(u))


def _noisy(setting: Setting, asked: Asked, score_BC: Array) -> Array:
    """Standardised scores [B,G,C]: as they are for the first list, with noise for the others."""
    noise_BGC = jnp.where(jnp.arange(asked.count)[:, None] > 0, setting.noise * _gumbel(asked), 0.0)
    return scorers.standardised(asked.query, score_BC)[:, None] + noise_BGC


def _by(score: Callable[[Setting, Asked], Array]) -> Callable[[Setting, Asked], Array]:
    def propose(setting: Setting, asked: Asked) -> Array:
        return order(asked.query, _noisy(setting, asked, score(setting, asked)), setting.judge.list_length)

    return propose


def _random(setting: Setting, asked: Asked) -> Array:
    return order(asked.query, _gumbel(asked), setting.judge.list_length)


def _retrieval(setting: Setting, asked: Asked) -> Array:
    return asked.query.retrieval


def _pointwise(setting: Setting, asked: Asked) -> Array:
    return scorers.pointwise_logits(setting.judge, asked.frozen["pointwise"], asked.query)


# --------------------------------------------------------------------- maximal marginal relevance


def by_marginal_relevance(
    query: RankerQuery, score_BGC: Array, similarity_BCC: Array, weight: float, length: int
) -> Array:
    """[B,G,L]: each time the candidate of the greatest weight * score - (1 - weight) * similarity.

    Scores are brought to 0..1 over the pool; similarity, 0..1, is the greatest to an item chosen before.
    """
    there = jnp.broadcast_to(network.present(query)[:, None], score_BGC.shape)
    low = jnp.where(there, score_BGC, jnp.inf).min(-1, keepdims=True)
    span = jnp.where(there, score_BGC, -jnp.inf).max(-1, keepdims=True) - low
    relevance_BGC = jnp.where(span > 0, (score_BGC - low) / jnp.where(span > 0, span, 1.0), 0.0)

    def step(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
        closest_BGC, open_BGC = carry
        value_BGC = weight * relevance_BGC - (1 - weight) * closest_BGC
        pick_BG = jnp.argmax(jnp.where(open_BGC, value_BGC, -jnp.inf), -1)
        closest_BGC = jnp.maximum(closest_BGC, network.take(similarity_BCC, pick_BG))
        picked_BG = jnp.where(open_BGC.any(-1), pick_BG, -1).astype(jnp.int32)
        return (closest_BGC, open_BGC & (jnp.arange(open_BGC.shape[-1]) != pick_BG[..., None])), picked_BG

    _, list_TBG = jax.lax.scan(step, (jnp.zeros(score_BGC.shape), there), None, length=length)
    return jnp.moveaxis(list_TBG, 0, -1)


def same_topic(setting: Setting, asked: Asked) -> Array:
    """[B,C,C]: 1 for candidates of one topic; those without any are like none."""
    topics_BC = asked.query.topics
    return ((topics_BC[:, :, None] == topics_BC[:, None]) & (topics_BC[:, None] >= 0)).astype(jnp.float32)


def diversified(spec: RankerSpec, pointwise: PyTree, query: RankerQuery, weight: float) -> Array:
    """[B,1,L]: as "mmr_pointwise" proposes first, of another weight."""
    asked = Asked(query, {"pointwise": pointwise}, jax.random.key(0), 1, jnp.zeros(0))  # the first list has no noise
    return PROPOSALS["mmr_pointwise"](Setting(spec, mmr_lambda=weight), asked)


def near_items(setting: Setting, asked: Asked) -> Array:
    """[B,C,C]: cosine of the point-wise network's item embeddings, from 0 (negative ones too) to 1."""
    table = {"items": network.pointwise_table(setting.judge)["items"]}
    items = network.whole(setting.judge, table, {"items": asked.frozen["pointwise"]["items"]})["items"]
    x_BCD = items[asked.query.candidates].astype(jnp.float32)
    x_BCD /= jnp.maximum(jnp.linalg.norm(x_BCD, axis=-1, keepdims=True), 1e-12)
    return jnp.clip(jnp.einsum("bcd,bed->bce", x_BCD, x_BCD), 0.0, 1.0)


def _mmr(
    score: Callable[[Setting, Asked], Array], similarity: Callable[[Setting, Asked], Array]
) -> Callable[[Setting, Asked], Array]:
    def propose(setting: Setting, asked: Asked) -> Array:
        score_BGC = _noisy(setting, asked, score(setting, asked))
        close_BCC = similarity(setting, asked)
        return by_marginal_relevance(asked.query, score_BGC, close_BCC, setting.mmr_lambda, setting.judge.list_length)

    return propose


# --------------------------------------------------------------------- with the evaluator


def best(setting: Setting, evaluator: PyTree, query: RankerQuery, list_BGT: Array) -> Array:
    """[B,1,L]: of a group of lists, the one the evaluator expects most of."""
    score_BG = scorers.reward_of_lists(setting.judge, evaluator, query, list_BGT, bias=setting.bias)
    return jnp.take_along_axis(list_BGT, jnp.argmax(score_BG, -1)[:, None, None], 1)


def _evaluator(setting: Setting, asked: Asked) -> Array:
    if asked.count > 1:
        raise ValueError(f"the evaluator's greedy list is one, not {asked.count}: ask for perturbed ones beside it")
    evaluator = asked.frozen["evaluator"]
    return scorers.evaluator_greedy(setting.judge, evaluator, asked.query, setting.judge.list_length, setting.bias)


def _perturbed(setting: Setting, asked: Asked) -> Array:
    """Of the best list before: the first with an item replaced, the second with two swapped, and so on."""
    if not asked.before.shape[1]:
        raise ValueError("perturbed lists need a list before them: name another proposal first")
    query, count = asked.query, asked.count
    list_B1T = best(setting, asked.frozen["evaluator"], query, asked.before)
    where_key, item_key = jax.random.split(asked.key)
    u = shards.uniform(where_key, (2, list_B1T.shape[0], count, 1), axis=1)
    size = (list_B1T >= 0).sum(-1, keepdims=True)
    i = jnp.minimum((u[0] * size).astype(jnp.int32), size - 1)
    j = (i + 1 + jnp.minimum((u[1] * (size - 1)).astype(jnp.int32), size - 2)) % size
    place = jnp.arange(setting.judge.list_length)
    at_i, at_j = (jnp.take_along_axis(jnp.broadcast_to(list_B1T, (*x.shape[:2], place.size)), x, -1) for x in (i, j))
    swapped = jnp.where(place == i, at_j, jnp.where(place == j, at_i, list_B1T))

    unused_BC = network.present(query) & ~(list_B1T == jnp.arange(query.candidates.shape[1])[:, None]).any(-1)
    chance = shards.uniform(item_key, (*at_i.shape[:2], unused_BC.shape[1]), axis=0)
    other = jnp.argmax(jnp.where(unused_BC[:, None], chance, -1.0), -1)[..., None].astype(jnp.int32)
    replaced = jnp.where(place == i, other, list_B1T)
    can_replace, can_swap = unused_BC.any(-1)[:, None, None], size > 1
    first_choice = (jnp.arange(count) % 2 == 0)[:, None]
    changed = jnp.where(can_replace & (first_choice | ~can_swap), replaced, swapped)
    return jnp.where(can_replace | can_swap, changed, list_B1T)


PROPOSALS: dict[str, Callable[[Setting, Asked], Array]] = {
    "retriever": _by(_retrieval),
    "popularity": _by(lambda setting, asked: asked.query.popularity),
    "random": _random,
    "pointwise": _by(_pointwise),
    "mmr_topics": _mmr(_retrieval, same_topic),
    "mmr_items": _mmr(_retrieval, near_items),
    "mmr_pointwise": _mmr(_pointwise, same_topic),
    "evaluator": _evaluator,
    "perturbed": _perturbed,
}
BY_RETRIEVAL = {"retriever", "mmr_topics", "mmr_items"}  # by first-stage scores
# The frozen networks that some of them read.
READS = {
    "pointwise": "pointwise",
    "mmr_items": "pointwise",
    "mmr_pointwise": "pointwise",
    "evaluator": "evaluator",
    "perturbed": "evaluator",
}


def propose(
    setting: Setting, wanted: tuple[tuple[str, int], ...], frozen: PyTree, query: RankerQuery, key: Array,
    before_BGT: Array,
) -> Array:  # fmt: skip
    """The lists that are wanted, (name, number) each, after those of a group so far: [B,G,L].

    wanted: static under jit. before_BGT: [B,0,L] for none.
    """
    lists = before_BGT
    for i, (name, count) in enumerate(wanted):
        asked = Asked(query, frozen, jax.random.fold_in(key, i), count, lists)
        lists = jnp.concatenate([lists, PROPOSALS[name](setting, asked)], 1)
    return lists[:, before_BGT.shape[1] :]
