"""Drawing from logits, at temperature 1 and with full support; or the most probable choice.

Draws invert the distribution function: of up to _BLOCK choices by one uniform number, of more by
two, for the block and within it. Gumbel noise takes one for every logit, which costs more than the
logits. Probabilities are met to 2^-24, and what has none is never drawn.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fgrpo_jax import shards
from fgrpo_jax.types import Array

_BLOCK = 128  # choices


def choose(logit_BGX: Array, key: Array | None) -> tuple[Array, Array]:
    """An index of the last axis and its log-probability, [B,G] each; the argmax where `key` is None."""
    return choose_by(logit_BGX, numbers(logit_BGX.shape, key))


def choose_by(logit_BGX: Array, u: Array | None) -> tuple[Array, Array]:
    """`choose`, by uniform numbers that were drawn before."""
    peak = logit_BGX.max(-1, keepdims=True)
    weight = jnp.exp(logit_BGX - peak)
    size = logit_BGX.shape[-1]
    if u is None:
        pick = _first(logit_BGX == peak)
    elif size <= _BLOCK:
        pick = _draw(weight, u)
    else:
        blocks = jnp.pad(weight, [(0, 0), (0, 0), (0, -size % _BLOCK)]).reshape(*weight.shape[:-1], -1, _BLOCK)
        block = _draw(blocks.sum(-1), u[0])
        within = jnp.take_along_axis(blocks, block[..., None, None], -2)[..., 0, :]
        pick = jnp.minimum(block * _BLOCK + _draw(within, u[1]), size - 1)  # nan must not lead beyond
    chosen = jnp.take_along_axis(logit_BGX - peak, pick[..., None], -1)[..., 0]
    return pick, chosen - jnp.log(weight.sum(-1))


def choose_token(logit_BGV: Array, key: Array | None) -> tuple[Array, Array]:
    """`choose` of the whole vocabulary, which on a mesh lies in parts on the tensor axis."""
    size = logit_BGV.shape[-1]
    if size <= _BLOCK or shards.tensor_parts(size) == 1:
        return choose(logit_BGV, key)
    parts, whole = PartitionSpec(None, None, "tensor"), PartitionSpec()
    together = shards.over_tensor(functools.partial(_choose_part, size), (parts, whole), (whole, whole))
    return together(logit_BGV, numbers(logit_BGV.shape, key))


def numbers(shape: tuple[int, ...], key: Array | None) -> Array | None:
    """The uniform numbers of a draw from logits [B,G,X]: [B,G], or [2,B,G] for more than a block."""
    if key is None:
        return None
    lead = shape[:-1]
    few = shape[-1] <= _BLOCK
    return shards.uniform(key, lead, axis=0) if few else shards.uniform(key, (2, *lead), axis=1)


def _choose_part(size: int, logit_BGX: Array, u: Array | None) -> tuple[Array, Array]:
    """`choose` by the devices of the tensor axis together: each holds consecutive logits of `size`.

    The blocks are those of one device, so the draws are: a block on two devices is a sum of two.
    What crosses is a number a block and the weights of the block that was drawn, not the logits.
    """
    mine = logit_BGX.shape[-1]
    start = jax.lax.axis_index("tensor") * mine
    total = functools.partial(jax.lax.psum, axis_name="tensor")
    peak = jax.lax.pmax(logit_BGX.max(-1), "tensor")[..., None]
    weight = jnp.exp(logit_BGX - peak)
    if u is None:
        here = jnp.where(logit_BGX == peak, start + jnp.arange(mine), size - 1).min(-1)
        pick = jax.lax.pmin(here, "tensor").astype(jnp.int32)
    else:
        lead, first = logit_BGX.shape[:-1], start // _BLOCK
        count = (mine + 2 * _BLOCK - 2) // _BLOCK  # blocks that `mine` consecutive logits may touch
        laid = jnp.zeros((*lead, count * _BLOCK))
        laid = jax.lax.dynamic_update_slice_in_dim(laid, weight, start % _BLOCK, -1)
        blocks = laid.reshape(*lead, count, _BLOCK)
        sums = jnp.zeros((*lead, -(-size // _BLOCK) + count))
        sums = jax.lax.dynamic_update_slice_in_dim(sums, blocks.sum(-1), first, -1)
        block = _draw(total(sums)[..., : -(-size // _BLOCK)], u[0])
        within = jnp.where((jnp.arange(count) == (block - first)[..., None])[..., None], blocks, 0.0).sum(-2)
        pick = jnp.minimum(block * _BLOCK + _draw(total(within), u[1]), size - 1)
    is_pick = start + jnp.arange(mine) == pick[..., None]
    chosen = total(jnp.where(is_pick, logit_BGX - peak, 0.0).sum(-1))
    return pick, chosen - jnp.log(total(weight.sum(-1)))


def _draw(weight: Array, u: Array) -> Array:
    """The index whose share of the weights [..., n] the number u in [0, 1) falls into."""
    total = _running_sums(weight)
    u = u + 2.0**-24  # amid the multiples of 2^-23 that are drawn: 0 would find any first weight
    # Sums taken in another order round differently, so one may be below the one before: ask for a positive weight too.
    reached = (total > u[..., None] * total[..., -1:]) & (weight > 0)
    return jnp.where(reached.any(-1), _first(reached), _first(weight == weight.max(-1, keepdims=True)))


def _running_sums(x: Array) -> Array:
    """Along the last axis. Of few numbers by a product with a triangle: XLA CPU is 3 times slower at jnp.cumsum."""
    size = x.shape[-1]
    if size > _BLOCK:
        return jnp.cumsum(x, -1)
    return jnp.matmul(x, jnp.triu(jnp.ones((size, size), x.dtype)), precision=jax.lax.Precision.HIGHEST)


def _first(true: Array) -> Array:
    """Index of the first True. jnp.argmax reduces two arrays at once: 6 times slower on CPU."""
    last = true.shape[-1] - 1
    return jnp.where(true, jnp.arange(last + 1), last).min(-1).astype(jnp.int32)
