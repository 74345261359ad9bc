"""Metrics of ranked lists, on the last axis; rewards and evaluation use these same functions.

Every metric is `(gains_xK, pool_xC, k) -> [x]`:

    gains_xK  gain of the listed items in order, 0 in empty slots (see `take_gains`)
    pool_xC   gain of every candidate of the pool, 0 where padded or not relevant
    k         cut-off: an int, an integer array of the leading axes x, or None (the whole list)

An item is relevant when its gain is above 0. What could have been found (ideal DCG, number of
relevant items) comes from the pool, never from the list, so a list shorter than k loses what
it leaves out. A query without relevant items scores 0 everywhere. Values equal
trec_eval's (linear gain in nDCG, binary relevance elsewhere). Leading axes broadcast: lists
[B,G,K] meet pools [B,1,C]. numpy in, numpy out; JAX in, JAX out, also inside jit.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = Any  # numpy or JAX
Metric = Callable[[Array, Array, Any], Array]


def _xp(*arrays: Array) -> ModuleType:
    return jnp if any(isinstance(a, jax.Array) for a in arrays) else np


def _ratio(numerator_x: Array, denominator_x: Array) -> Array:
    """numerator / denominator, and 0 where the denominator is 0."""
    xp = _xp(numerator_x, denominator_x)
    some_x = denominator_x > 0
    return xp.where(some_x, numerator_x / xp.where(some_x, denominator_x, 1), 0.0)


def _first(values_xK: Array, k: Any) -> Array:
    """values in the first k slots, 0 after them; None keeps all."""
    if k is None:
        return values_xK
    xp = _xp(values_xK, k)
    return xp.where(xp.arange(values_xK.shape[-1]) < xp.asarray(k)[..., None], values_xK, 0)


def _relevant(gains_xK: Array, pool_xC: Array, k: Any) -> tuple[Array, Array]:
    """Relevant slots among the first k as 0/1 [x,K], and the number of relevant candidates [x]."""
    xp = _xp(gains_xK, pool_xC)
    relevant_xK = _first((xp.asarray(gains_xK) > 0) * 1.0, k)
    return relevant_xK, ((xp.asarray(pool_xC) > 0) * 1.0).sum(-1)


def take_gains(relevance_xC: Array, list_xK: Array) -> Array:
    """Gain of each listed candidate [x,K]; a slot of -1 is empty and gains 0."""
    xp = _xp(relevance_xC, list_xK)
    relevance_xC, list_xK = xp.asarray(relevance_xC), xp.asarray(list_xK)
    gains_xK = xp.take_along_axis(relevance_xC, xp.maximum(list_xK, 0), axis=-1)
    return xp.where(list_xK >= 0, gains_xK, 0)


def dcg(gains_xK: Array, k: Any = None) -> Array:
    """sum_i gain_i / log2(i + 1), i from 1 to k."""
    xp = _xp(gains_xK)
    gains_xK = _first(xp.asarray(gains_xK), k)
    return (gains_xK / xp.log2(xp.arange(gains_xK.shape[-1]) + 2.0)).sum(-1)


def ndcg(gains_xK: Array, pool_xC: Array, k: Any = None) -> Array:
    """DCG over that of the pool sorted by gain, both cut at k."""
    xp = _xp(gains_xK, pool_xC)
    best_xC = xp.flip(xp.sort(xp.asarray(pool_xC), axis=-1), axis=-1)
    return _ratio(dcg(gains_xK, k), dcg(best_xC, k))


def recall(gains_xK: Array, pool_xC: Array, k: Any = None) -> Array:
    """Share of the pool's relevant candidates that stand in the first k."""
    relevant_xK, total_x = _relevant(gains_xK, pool_xC, k)
    return _ratio(relevant_xK.sum(-1), total_x)


def precision(gains_xK: Array, pool_xC: Array, k: Any = None) -> Array:
    """Relevant items among the first k, over k (K when k is None), however short the list."""
    relevant_xK, _ = _relevant(gains_xK, pool_xC, k)
    size = relevant_xK.shape[-1] if k is None else k
    return _ratio(relevant_xK.sum(-1), _xp(relevant_xK, k).asarray(size))


def f1(gains_xK: Array, pool_xC: Array, k: Any = None) -> Array:
    """Harmonic mean of precision and recall: 2 found / (k + relevant)."""
    relevant_xK, total_x = _relevant(gains_xK, pool_xC, k)
    size = relevant_xK.shape[-1] if k is None else k
    return _ratio(2.0 * relevant_xK.sum(-1), total_x + size)


def hit(gains_xK: Array, pool_xC: Array, k: Any = None) -> Array:
    """1 where a relevant item stands in the first k (trec_eval's success)."""
    relevant_xK, _ = _relevant(gains_xK, pool_xC, k)
    return (relevant_xK.sum(-1) > 0) * 1.0


def mrr(gains_xK: Array, pool_xC: Array, k: Any = None) -> Array:
    """1 / rank of the first relevant item; 0 when none stands in the first k."""
    relevant_xK, _ = _relevant(gains_xK, pool_xC, k)
    xp = _xp(relevant_xK)
    return (relevant_xK / (xp.arange(relevant_xK.shape[-1]) + 1.0)).max(-1, initial=0.0)


def average_precision(gains_xK: Array, pool_xC: Array, k: Any = None) -> Array:
    """Precision at each relevant item of the first k, summed, over the number of relevant candidates."""
    relevant_xK, total_x = _relevant(gains_xK, pool_xC, k)
    xp = _xp(relevant_xK)
    precision_xK = xp.cumsum(relevant_xK, axis=-1) / (xp.arange(relevant_xK.shape[-1]) + 1.0)
    return _ratio((relevant_xK * precision_xK).sum(-1), total_x)


def list_auc(gains_xK: Array, pool_xC: Array, k: Any = None) -> Array:
    """Share of (relevant, other) pairs *of the list* that stand in the right order.

    0 where the list lacks either kind. Empty slots within k count as other items: give the
    lists' lengths as k. AUC of a short list is not that of its pool: see `pool_auc`.
    """
    relevant_xK, _ = _relevant(gains_xK, pool_xC, k)
    xp = _xp(relevant_xK)
    other_xK = _first(xp.ones_like(relevant_xK), k) - relevant_xK
    after_xK = other_xK.sum(-1, keepdims=True) - xp.cumsum(other_xK, axis=-1)
    return _ratio((relevant_xK * after_xK).sum(-1), relevant_xK.sum(-1) * other_xK.sum(-1))


def pool_auc(gains_xK: Array, pool_xC: Array, k: Any = None) -> Array:
    """Share of (relevant, other) pairs *of the pool* in the right order, unlisted items tied last.

    0 where the pool lacks either kind. The list holds k items (its length when k is None), so
    give the lists' lengths as k where slots are empty; every slot of the pool counts as a candidate.
    """
    relevant_xK, total_x = _relevant(gains_xK, pool_xC, k)
    xp = _xp(relevant_xK)
    listed_xK = _first(xp.ones_like(relevant_xK), k) - relevant_xK
    others_x = pool_xC.shape[-1] - total_x
    below_xK = others_x[..., None] - xp.cumsum(listed_xK, axis=-1)
    unlisted_x = (total_x - relevant_xK.sum(-1)) * (others_x - listed_xK.sum(-1))
    return _ratio((relevant_xK * below_xK).sum(-1) + 0.5 * unlisted_x, total_x * others_x)


# --------------------------------------------------------------------- redundancy


def take_topics(topics_xC: Array, list_xK: Array) -> Array:
    """Topic of each listed candidate [x,K]; an empty slot has none, -1."""
    xp = _xp(topics_xC, list_xK)
    topics_xC, list_xK = xp.asarray(topics_xC), xp.asarray(list_xK)
    return xp.where(list_xK >= 0, xp.take_along_axis(topics_xC, xp.maximum(list_xK, 0), axis=-1), -1)


def _repeats(before_xKK: Array, gains_xK: Array, topics_xK: Array) -> Array:
    """How many relevant items of its own topic come before each one; [i,j] of `before`: j comes before i."""
    same_xKK = (topics_xK[..., :, None] == topics_xK[..., None, :]) & (topics_xK[..., :, None] >= 0)
    return (before_xKK & same_xKK & (gains_xK[..., None, :] > 0)).sum(-1)


def alpha_dcg(gains_xK: Array, topics_xK: Array, k: Any = None, alpha: float = 0.5) -> Array:
    """DCG with a gain multiplied by (1 - alpha) for every relevant item of its topic before it."""
    xp = _xp(gains_xK, topics_xK)
    gains_xK, topics_xK = xp.asarray(gains_xK), xp.asarray(topics_xK)
    place_K = xp.arange(gains_xK.shape[-1])
    repeats_xK = _repeats(place_K[None, :] < place_K[:, None], gains_xK, topics_xK)
    return dcg(gains_xK * (1.0 - alpha) ** repeats_xK, k)


def alpha_ndcg(
    gains_xK: Array, pool_xC: Array, k: Any, topics_xK: Array, topics_xC: Array, alpha: float = 0.5
) -> Array:
    """Alpha-DCG over that of the best list of the pool (Clarke et al., SIGIR 2008; alpha 0.5 as there).

    topics: of the listed items and of the pool; -1: none, never redundant.

    Deviations: a gain counts as it is, where theirs is 0 or 1, and an item has one topic at most, where
    theirs may answer several. With one topic the best list, which they approximate greedily, is exact: within
    a topic the larger gain comes first, which fixes what each item adds; the additions are sorted.
    """
    xp = _xp(gains_xK, pool_xC, topics_xK, topics_xC)
    pool_xC, topics_xC = xp.asarray(pool_xC), xp.asarray(topics_xC)
    place_C = xp.arange(pool_xC.shape[-1])
    mine_xCC, other_xCC = pool_xC[..., :, None], pool_xC[..., None, :]
    earlier_xCC = (other_xCC > mine_xCC) | ((other_xCC == mine_xCC) & (place_C[None, :] < place_C[:, None]))
    adds_xC = pool_xC * (1.0 - alpha) ** _repeats(earlier_xCC, pool_xC, topics_xC)
    best_xC = xp.flip(xp.sort(adds_xC, axis=-1), axis=-1)
    return _ratio(alpha_dcg(gains_xK, topics_xK, k, alpha), dcg(best_xC, k))


def diversity(gains_xK: Array, pool_xC: Array, k: Any, topics_xK: Array, topics_xC: Array) -> Array:
    """Different topics among the first k, relevant or not, over k (K when k is None); -1 is no topic."""
    xp = _xp(topics_xK, k)
    topics_xK = xp.asarray(topics_xK)
    place_K = xp.arange(topics_xK.shape[-1])
    again_xK = _repeats(place_K[None, :] < place_K[:, None], xp.ones_like(topics_xK), topics_xK) > 0
    new_xK = _first((topics_xK >= 0) * 1.0 * ~again_xK, k)
    return _ratio(new_xK.sum(-1), xp.asarray(topics_xK.shape[-1] if k is None else k))


METRICS: dict[str, Metric] = {
    "ndcg": ndcg,
    "recall": recall,
    "precision": precision,
    "f1": f1,
    "hit": hit,
    "mrr": mrr,
    "map": average_precision,
    "list_auc": list_auc,
    "pool_auc": pool_auc,
}
# Of lists whose items have topics: (gains_xK, pool_xC, k, topics_xK, topics_xC) -> [x].
TOPIC_METRICS: dict[str, Callable[[Array, Array, Any, Array, Array], Array]] = {
    "alpha_ndcg": alpha_ndcg,
    "diversity": diversity,
}
