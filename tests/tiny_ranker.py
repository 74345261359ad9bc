"""One small ranker and queries for it, for the tests of policies/ranker."""

import jax
import jax.numpy as jnp
import numpy as np

from fgrpo_jax.policies.ranker import network
from fgrpo_jax.policies.ranker.network import RankerSpec
from fgrpo_jax.policies.ranker.query import RankerQuery
from fgrpo_jax.types import map_params

SPEC = RankerSpec(
    num_items=40,
    history_max=5,
    list_length=4,
    hidden_size=16,
    num_layers=2,
    list_layers=2,
    num_heads=2,
    mlp_size=24,
    init_std=0.3,  # far from uniform, so that a wrong mask or position shows
)
TABLES = {
    "generator": network.generator_table,
    "evaluator": network.evaluator_table,
    "pointwise": network.pointwise_table,
}


def make_params(name, spec=SPEC, seed=0):
    """Random weights; the norms are moved away from one, so that leaving one out shows."""
    rng = np.random.default_rng(seed)

    def made(p):
        centre = 1.0 if p.init == "ones" else 0.0
        return jnp.asarray(centre + spec.init_std * rng.normal(size=p.shape), jnp.float32)

    return map_params(made, TABLES[name](spec))


def make_query(seed=0, batch=4, pool=8, history=5, lists=2, spec=SPEC, full=False, n_min=0):
    """Histories of none, of one and of more items; pools of several sizes, one as small as a list.

    Padding holds the values that encoding gives it. full: all pools and histories are as large
    as can be. n_min: of the candidates.
    """
    rng = np.random.default_rng(seed)
    n = rng.integers(spec.list_length, pool + 1, batch)
    n[0], n[-1] = pool, spec.list_length
    n = np.full(batch, pool) if full else np.maximum(n, n_min)
    history_len = rng.integers(0, history + 1, batch)
    history_len[: min(3, batch)] = [history, 0, 1][:batch]
    history_len = np.full(batch, history) if full else history_len
    there = np.arange(pool) < n[:, None]
    items = np.stack([rng.permutation(spec.num_items)[:pool] + 1 for _ in range(batch)])
    seen = np.arange(history) < history_len[:, None]
    logged = np.stack([[rng.permutation(k)[: spec.list_length] for _ in range(lists)] for k in n])
    lengths = rng.integers(1, spec.list_length + 1, (batch, lists))
    shown = np.arange(spec.list_length) < lengths[..., None]
    shown[0, -1] = False  # a query with fewer lists
    made = RankerQuery(
        history=np.where(seen, rng.integers(1, spec.num_items + 1, seen.shape), 0).astype(np.int32),
        history_len=history_len.astype(np.int32),
        candidates=np.where(there, items, 0).astype(np.int32),
        n_candidates=n.astype(np.int32),
        relevance=np.where(there, rng.integers(0, 3, there.shape), 0).astype(np.float32),
        retrieval=np.where(there, rng.normal(size=there.shape), 0).astype(np.float32),
        popularity=np.where(there, rng.random(there.shape) * 5, 0).astype(np.float32),
        topics=np.where(there, rng.integers(0, 3, there.shape), -1).astype(np.int32),
        logged_items=np.where(shown, logged, -1).astype(np.int32),
        logged_feedback=np.where(shown, rng.integers(0, 5, shown.shape) / 4, 0).astype(np.float32),
    )
    return jax.tree.map(jnp.asarray, made)


def padded(query, history=3, pool=2, lists=1):
    """The same queries in larger arrays."""

    def pad(x, sizes, value):
        widths = [(0, 0), *((0, size) for size in sizes), *[(0, 0)] * (x.ndim - 1 - len(sizes))]
        return jnp.pad(x, widths, constant_values=value)

    return query.replace(
        history=pad(query.history, [history], 0),
        candidates=pad(query.candidates, [pool], 0),
        relevance=pad(query.relevance, [pool], 0),
        retrieval=pad(query.retrieval, [pool], 0),
        popularity=pad(query.popularity, [pool], 0),
        topics=pad(query.topics, [pool], -1),
        logged_items=pad(query.logged_items, [lists], -1),
        logged_feedback=pad(query.logged_feedback, [lists], 0),
    )
