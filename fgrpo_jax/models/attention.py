"""Attention over a prompt that a group of rollouts shares.

Two functions are all a model needs: `causal` within the prompt, and `shared_prefix`, where
every rollout attends to the one copy of its query's prompt and causally to itself. Both are
grouped-query: J key/value heads, each serving H/J query heads. Softmax runs in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fgrpo_jax.types import Array

_MASKED = -1e30  # finite, so that a fully masked part merges without nan


def _grouped(q: Array, kv_heads: int) -> Array:
    """[..., H, E] -> [..., J, R, E], scaled by E^-1/2."""
    scaled = q * (q.shape[-1] ** -0.5)
    return scaled.reshape(*q.shape[:-2], kv_heads, q.shape[-2] // kv_heads, q.shape[-1])


def causal(q_BSHE: Array, k_BSJE: Array, v_BSJE: Array) -> Array:
    """Causal self-attention of right-padded prompts: [B,S,H,E].

    No length mask is needed: padding comes last, so only padded queries see padded keys.
    """
    size = q_BSHE.shape[1]
    q = _grouped(q_BSHE, k_BSJE.shape[2])
    score = jnp.einsum("bsjre,bkje->bjrsk", q, k_BSJE, preferred_element_type=jnp.float32)
    seen = jnp.arange(size)[:, None] >= jnp.arange(size)
    weight = jax.nn.softmax(jnp.where(seen, score, _MASKED), -1).astype(v_BSJE.dtype)
    return jnp.einsum("bjrsk,bkje->bsjre", weight, v_BSJE).reshape(q_BSHE.shape)


def shared_prefix(
    q_BGTHE: Array,
    k_BSJE: Array,
    v_BSJE: Array,
    prefix_len_B: Array,
    k_BGUJE: Array,
    v_BGUJE: Array,
    first: Array | int = 0,
) -> Array:
    """Attention of rollouts to the shared prefix and causally to their own keys: [B,G,T,H,E].

    Query t of a rollout sees prefix keys s < prefix_len and own keys u <= first + t. The
    prefix is read in place: its scores are one matrix product per query and kv head, over
    the tokens of the whole group.
    """
    kv_heads, own = k_BSJE.shape[2], k_BGUJE.shape[2]
    q = _grouped(q_BGTHE, kv_heads)
    wide = jnp.float32
    to_prefix = jnp.einsum("bgtjre,bsje->bgjrts", q, k_BSJE, preferred_element_type=wide)
    to_own = jnp.einsum("bgtjre,bguje->bgjrtu", q, k_BGUJE, preferred_element_type=wide)
    in_prefix = jnp.arange(k_BSJE.shape[1]) < prefix_len_B[:, None]
    seen = first + jnp.arange(q_BGTHE.shape[2])[:, None] >= jnp.arange(own)
    to_prefix = jnp.where(in_prefix[:, None, None, None, None], to_prefix, _MASKED)
    to_own = jnp.where(seen, to_own, _MASKED)
    # One softmax over both parts, without joining the score arrays.
    peak = jax.lax.stop_gradient(jnp.maximum(to_prefix.max(-1), to_own.max(-1)))[..., None]
    e_prefix, e_own = jnp.exp(to_prefix - peak), jnp.exp(to_own - peak)
    total = e_prefix.sum(-1) + e_own.sum(-1)
    out = jnp.einsum("bgjrts,bsje->bgtjre", e_prefix.astype(v_BSJE.dtype), v_BSJE, preferred_element_type=wide)
    out += jnp.einsum("bgjrtu,bguje->bgtjre", e_own.astype(v_BSJE.dtype), v_BGUJE, preferred_element_type=wide)
    out = out / jnp.moveaxis(total, -1, 2)[..., None]  # [b,g,j,r,t] -> [b,g,t,j,r]
    return out.reshape(q_BGTHE.shape).astype(v_BSJE.dtype)
