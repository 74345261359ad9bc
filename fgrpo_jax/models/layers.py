"""What every layer of the decoder is made of: RMS norm, rotary embedding, activations, matrix product."""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from fgrpo_jax.types import Array

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_pytorch_tanh": jax.nn.gelu}


@jax.custom_vjp
def take(table: Array, index: Array) -> Array:
    """Rows [..., D] of a table [V, D].

    The gradients of a row are added in float32, whatever the table's type: a token that occurs a thousand times
    would lose most of its gradient in bfloat16. And in an order that is always the same, as they are not where a
    GPU adds with atomic operations: a resumed run would not be the one that was not stopped.
    """
    return table[index]


def _take_fwd(table: Array, index: Array) -> tuple[Array, tuple[Array, Array]]:
    return table[index], (index, jnp.zeros((table.shape[0], 0), table.dtype))


def _take_bwd(kept: tuple[Array, Array], grad: Array) -> tuple[Array, None]:
    index, like = kept
    rows = len(like)
    index = jnp.where(index < 0, index + rows, index)  # as indexing counts them
    grad = grad.astype(jnp.float32).reshape(-1, grad.shape[-1])
    scattered, in_order = (functools.partial(add, rows) for add in (add_scattered, add_in_order))
    total = jax.lax.platform_dependent(index.reshape(-1), grad, cuda=in_order, rocm=in_order, default=scattered)
    return total.astype(like.dtype), None


take.defvjp(_take_fwd, _take_bwd)


def add_scattered(rows: int, index_N: Array, x_ND: Array) -> Array:
    """[rows, D]: the sum of what belongs to each row."""
    return jnp.zeros((rows, x_ND.shape[1]), x_ND.dtype).at[index_N].add(x_ND)


def add_in_order(rows: int, index_N: Array, x_ND: Array) -> Array:
    """The same without a scatter: sums over the runs of sorted indices."""
    order = jnp.argsort(index_N, stable=True)
    index_N, x_ND = index_N[order], x_ND[order]
    starts_N1 = jnp.pad(index_N[1:] != index_N[:-1], (1, 0), constant_values=True)[:, None]

    def add(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
        return jnp.where(other[1], other[0], one[0] + other[0]), one[1] | other[1]

    total_ND, _ = jax.lax.associative_scan(add, (x_ND, starts_N1))
    last = jnp.maximum(jnp.searchsorted(index_N, jnp.arange(rows), side="right") - 1, 0)
    return jnp.where((index_N[last] == jnp.arange(rows))[:, None], total_ND[last], 0.0)


@jax.custom_vjp
def _scaled(x: Array, scale: Array) -> Array:
    """`x [..., D] * scale [D]`, with the gradient of `scale` summed by a matrix product.

    It is a sum over all tokens. As a reduction over the leading axes XLA CPU transposes its
    operand first, which cost about 5 % of an update of W1's model (bench) with 512 tokens.
    """
    return x * scale


def _scaled_fwd(x: Array, scale: Array) -> tuple[Array, tuple[Array, Array]]:
    return x * scale, (x, scale)


def _scaled_bwd(kept: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, scale = kept
    # The leading axes are contracted, not merged: queries and heads may lie on different mesh axes.
    ones = jnp.ones(x.shape[:-1], x.dtype)
    return grad * scale, jnp.tensordot(ones, x * grad, x.ndim - 1, precision=jax.lax.Precision.HIGHEST)


_scaled.defvjp(_scaled_fwd, _scaled_bwd)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """RMS norm over the last axis, in float32, back in the type of `x`."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    return _scaled(normed, scale.astype(jnp.float32)).astype(x.dtype)


def rope_tables(positions: Array, head_dim: int, theta: float, scaling: tuple[float, ...] = ()) -> tuple[Array, Array]:
    """cos and sin of shape [..., 1, E/2]; the added axis is the head's.

    scaling: (factor,) divides all frequencies (arXiv 2306.15595). (factor, low, high, length), as Llama 3
    (arXiv 2407.21783), divides those that turn less than `low` times over `length` positions, leaves those
    that turn more than `high` times, and goes from one to the other linearly in the number of turns.
    """
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling:
        factor, *turns = scaling
        kept = 0.0
        if turns:
            low, high, length = turns
            kept = jnp.clip((length * frequency / (2 * math.pi) - low) / (high - low), 0, 1)
        frequency = frequency * (kept + (1 - kept) / factor)
    angle = positions.astype(jnp.float32)[..., None, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: Array, rope: tuple[Array, Array]) -> Array:
    """Rotate pairs (i, i + E/2) of [..., H, E]; of wider heads, the first channels."""
    cos, sin = rope
    if (rotated := 2 * cos.shape[-1]) < x.shape[-1]:
        return jnp.concatenate([apply_rope(x[..., :rotated], rope), x[..., rotated:]], -1)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


@flax.struct.dataclass
class RowsFirst:
    """A weight laid out for products with few tokens, by `rows_first`; `linear` takes it for a weight."""

    halves: Array  # [2, out/2, in]
    shape_out: tuple[int, ...] = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Adapted:
    """A weight with its low-rank adapter (models/lora.py); `linear` takes it for a weight."""

    base: Any  # [in, out]: an array, or RowsFirst
    a: Array  # [in, rank]
    b: Array  # [rank, out]
    scale: float = flax.struct.field(pytree_node=False)


_LARGE = 2**20  # numbers in a weight; at 10**5 decoding with W1's model (bench) took 3 to 8 % longer


def rows_first(w: Array, axes_in: int = 1) -> Array | RowsFirst:
    """The weight `w [in, out]`, both sides possibly several axes, as a decoding step best reads it.

    XLA CPU multiplies a large weight [out, in] by 8 to 32 tokens [in, N] almost twice as fast as
    the tokens by [in, out]; from 256 tokens on it is slower. It turns such a product round again
    where the result is transposed right after; as a batch of two halves it stays. For small weights
    or an odd number of rows, `w` itself.
    """
    size_in, shape_out = math.prod(w.shape[:axes_in]), w.shape[axes_in:]
    if w.size < _LARGE or math.prod(shape_out) % 2:
        return w
    return RowsFirst(w.reshape(size_in, -1).T.reshape(2, -1, size_in), shape_out)


def linear(x: Array, w: Array | RowsFirst | Adapted, axes_in: int = 1, dtype: Any = None) -> Array:
    """`x [..., in] @ w [in, out]`, both sides possibly several axes, as one plain matrix product.

    dtype: what it accumulates in and returns; None: that of its operands.

    Written as an einsum over several token axes, the same product's gradient runs 2-3 times
    slower on CPU: XLA then lays the weight gradient's operands out transposed.
    """
    if isinstance(w, Adapted):
        low = w.scale * linear(x, w.a, axes_in)
        return linear(x, w.base, axes_in, dtype) + linear(low, w.b, 1, dtype)
    lead, shape_in = x.shape[: x.ndim - axes_in], x.shape[x.ndim - axes_in :]
    x = x.reshape(-1, math.prod(shape_in))
    if isinstance(w, RowsFirst):
        both = jnp.broadcast_to(x, (2, *x.shape))
        out = jax.lax.dot_general(w.halves, both, (((2,), (2,)), ((0,), (0,))), preferred_element_type=dtype)
        return out.transpose(2, 0, 1).reshape(*lead, *w.shape_out)  # [2, out/2, N] before
    shape_out = w.shape[axes_in:]
    out = jnp.matmul(x, w.reshape(x.shape[1], math.prod(shape_out)), preferred_element_type=dtype)
    return out.reshape(*lead, *shape_out)
