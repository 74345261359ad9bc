"""Attention of rows of queries to one part of the keys, some rows at a time, and its gradient: see attention.py."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from fgrpo_jax.types import Array

_MASKED = -1e30  # finite, so that a fully masked part merges without nan
WIDE = jnp.float32

BLOCK_SCORES = 2**21  # scores of a block, over all queries and kv heads of the batch
LEAST_ROWS = 256  # of a block all the same: of many queries, products of fewer rows are slow
STRETCH, STRETCHES = 128, 8  # least positions and largest number of the stretches of `causal`


def bias(visible: Array) -> Array:
    """What to add to scores, which must be finite: 0 where visible.

    A sum and not a choice, because XLA CPU fuses sums into matrix products.
    """
    return jnp.where(visible, 0.0, _MASKED)


def _stretches(is_causal: bool, rows: int, keys: int) -> list[tuple[int, int, int]]:
    """(first row, end row, keys seen): what lies above the diagonal is skipped by the stretch."""
    if not is_causal:
        return [(0, rows, keys)]
    size = max(STRETCH, -(-keys // STRETCHES))
    ends = [*range(size, keys, size), keys]
    per_key = rows // keys
    return [(start * per_key, end * per_key, end) for start, end in zip([0, *ends], ends)]


def _over_chunks(block, keys: int, by_row: list[Array], summed):
    """Run `block(*rows) -> (by row, summed)` a few rows at a time; join the one, add the other.

    by_row: arrays [..., rows, E] or [..., rows], the leading axes those of by_row[0] or 1;
    rows may be 1 too, for what is every row's.
    """
    lead = by_row[0].shape[:-2]
    rows = by_row[0].shape[-2]
    at = len(lead)
    budget = max(LEAST_ROWS, BLOCK_SCORES // (keys * math.prod(lead)))
    chunks = -(-rows // budget)
    if chunks == 1:
        return block(*by_row)
    size = -(-rows // chunks)

    def cut(x: Array) -> Array:
        if x.shape[at] == 1:
            return jnp.broadcast_to(x, (chunks, *x.shape))
        x = jnp.pad(x, [(0, chunks * size - rows if axis == at else 0) for axis in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:at], chunks, size, *x.shape[at + 1 :]), at, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, at)
        x = x.reshape(*x.shape[:at], chunks * size, *x.shape[at + 2 :])
        return jax.lax.slice_in_dim(x, 0, rows, axis=at)

    def step(total, chunk):
        joined, added = block(*chunk)
        return jax.tree.map(jnp.add, total, added), joined

    total, joined = jax.lax.scan(step, summed, [cut(x) for x in by_row])
    return jax.tree.map(join, joined), total


def in_sight(key: Array, last: Array, first: Array | None) -> Array:
    return key <= last if first is None else (key <= last) & (key >= first)


def _cut_rows(start: int, end: int, *by_row: Array | None) -> list[Array]:
    """Those that there are."""
    return [x[..., start:end] for x in by_row if x is not None]


def part_forward(
    is_causal: bool, q: Array, k: Array, v: Array, last: Array, first: Array | None = None
) -> tuple[Array, Array]:
    """Attention to one part alone, and its log-sum-exp."""
    some = []
    for start, end, seen in _stretches(is_causal, q.shape[-2], k.shape[-2]):
        k_seen, v_seen = k[..., :seen, :], v[..., :seen, :]

        def block(q, last, first=None):
            score = product("...me,...ke->...mk", q, k_seen)
            score += bias(in_sight(jnp.arange(seen), last[..., None], None if first is None else first[..., None]))
            peak = score.max(-1, keepdims=True)
            weight = jnp.exp(score - peak)
            total = weight.sum(-1, keepdims=True)
            out = product("...mk,...ke->...me", weight.astype(v_seen.dtype), v_seen) / total
            return (out, (peak + jnp.log(total))[..., 0]), ()

        some.append(_over_chunks(block, seen, [q[..., start:end, :], *_cut_rows(start, end, last, first)], ())[0])
    out, lse = zip(*some)
    return jnp.concatenate(out, -2), jnp.concatenate(lse, -1)


def part_backward(is_causal, q, d_out, lse, delta, k, v, last, first=None) -> tuple[Array, Array, Array]:
    """Gradients of rows, keys and values of one part, from the log-sum-exp over all parts."""
    d_q, total = [], []
    keys = k.shape[-2]
    for start, end, seen in _stretches(is_causal, q.shape[-2], keys):
        k_seen, v_seen = k[..., :seen, :], v[..., :seen, :]
        k_across = jax.lax.optimization_barrier(jnp.swapaxes(k_seen, -1, -2))

        def block(q, d_out, lse, delta, last, first=None):
            score = product("...ke,...me->...km", k_seen, q)
            first = None if first is None else first[..., None, :]
            score += bias(in_sight(jnp.arange(seen)[:, None], last[..., None, :], first))
            weight = jnp.exp(score - lse[..., None, :])
            d_weight = product("...ke,...me->...km", v_seen, d_out)
            d_score = (weight * (d_weight - delta[..., None, :])).astype(q.dtype)
            d_v = product("...km,...me->...ke", weight.astype(q.dtype), d_out)
            d_k = product("...km,...me->...ke", d_score, q)
            d_q = jax.lax.optimization_barrier(product("...ek,...km->...em", k_across, d_score))
            return jnp.swapaxes(d_q, -1, -2), (d_k, d_v)

        zero = jnp.zeros(k_seen.shape, WIDE)
        by_row = [q[..., start:end, :], d_out[..., start:end, :]]
        by_row += _cut_rows(start, end, lse, delta, last, first)
        rows, summed = _over_chunks(block, seen, by_row, (zero, zero))
        d_q.append(rows)
        total.append([jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, keys - seen), (0, 0)]) for x in summed])
    return jnp.concatenate(d_q, -2), sum(t[0] for t in total), sum(t[1] for t in total)


def product(spec: str, one: Array, other: Array) -> Array:
    return jnp.einsum(spec, one, other, preferred_element_type=WIDE)
