"""Tokens of several rollouts in one row per query, as many of each as it has to be fed.

A decoding step that reads up to W tokens of every rollout would, on a grid [G,W], mostly compute padding:
rollouts have one token here and five there. What acts on tokens one by one (projections, norms, MLP, attention to
the prompt) therefore runs on a row of N; only what tells rollouts apart (their own keys) unpacks it to the grid.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from fgrpo_jax.types import Array


@flax.struct.dataclass
class Packing:
    """Which tokens of which rollouts a row holds: first all of rollout 0, then all of rollout 1, and so on.

    Beyond its tokens a row, and beyond a rollout's the grid, repeat some that are there.
    """

    first: Array  # [B,G] the number of its first token here in its rollout
    count: Array  # [B,G] tokens of the rollout, 0 to W
    place: Array  # [B,N] in the grid, g * W + w
    number: Array  # [B,N] the token's number in its rollout
    column: Array  # [B,G,W] in the row

    @property
    def last(self) -> Array:
        """[B,G]: columns of the rollouts' last tokens; column 0 for one that has none."""
        return jnp.take_along_axis(self.column, jnp.maximum(self.count - 1, 0)[..., None], -1)[..., 0]


def pack(first_BG: Array, count_BG: Array, width: int, size: int) -> Packing:
    """width: W, size: N; a query's counts may not exceed W, nor their sum N."""
    end_BG = jnp.cumsum(count_BG, -1)
    start_BG = end_BG - count_BG
    column_N = jnp.arange(size)
    rollout_BN = (column_N[:, None] >= end_BG[:, None]).sum(-1)
    rollout_BN = jnp.minimum(rollout_BN, end_BG.shape[1] - 1)
    within_BN = column_N - jnp.take_along_axis(start_BG, rollout_BN, 1)
    within_BN = jnp.clip(within_BN, 0, width - 1)
    column_BGW = jnp.minimum(start_BG[..., None] + jnp.arange(width), size - 1)
    number_BN = jnp.take_along_axis(first_BG, rollout_BN, 1) + within_BN
    return Packing(first_BG, count_BG, rollout_BN * width + within_BN, number_BN, column_BGW)


def pick(x_BX: Array, index_B: Array) -> Array:
    """`x[b, index[b]]` for arrays [B,X,...] and indices [B,...]."""
    return jax.vmap(lambda x, index: x.at[index].get(mode="promise_in_bounds"))(x_BX, index_B)


def share(want_BG: Array, done_BG: Array, size: int) -> Array:
    """How many of the tokens that they have every rollout may feed, [B,G], so that no sum exceeds `size` >= G.

    One each (of those that have any), and the rest first to those furthest behind, which the loop waits for.
    """
    one_BG = jnp.minimum(want_BG, 1)
    more_BG = want_BG - one_BG
    group = want_BG.shape[1]
    order_BG = done_BG * group + jnp.arange(group)
    before_BGG = order_BG[:, None, :] < order_BG[:, :, None]
    taken_BG = jnp.where(before_BGG, more_BG[:, None, :], 0).sum(-1)
    spare_B1 = size - one_BG.sum(-1, keepdims=True)
    return one_BG + jnp.clip(spare_B1 - taken_BG, 0, more_BG)
