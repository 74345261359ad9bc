"""What every layer of the decoder is made of: RMS norm, rotary embedding, matrix product."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from fgrpo_jax.types import Array


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


def rope_tables(positions: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """cos and sin of shape [..., 1, E/2]; the added axis is the head's."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions.astype(jnp.float32)[..., None, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: Array, rope: tuple[Array, Array]) -> Array:
    """Rotate pairs (i, i + E/2) of [..., H, E]."""
    cos, sin = rope
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def linear(x: Array, w: Array, axes_in: int = 1) -> Array:
    """`x [..., in] @ w [in, out]`, both sides possibly several axes, as one plain matrix product.

    Written as an einsum over several token axes, the same product's gradient runs 2-3 times
    slower on CPU: XLA then lays the weight gradient's operands out transposed.
    """
    lead, shape_in, shape_out = x.shape[: x.ndim - axes_in], w.shape[:axes_in], w.shape[axes_in:]
    size_in, size_out = math.prod(shape_in), math.prod(shape_out)
    return (x.reshape(-1, size_in) @ w.reshape(size_in, size_out)).reshape(*lead, *shape_out)
