"""A decoder of several families that encodes a prompt once for the whole group of its rollouts.

Parameters are a plain pytree. `param_table` declares each of them once (shape, logical
axes, initialisation) and thereby serves initialisation, sharding, import and export.
Layers are stacked on axis L and run by `lax.scan`.

Three computations share one block:

    completions   prompt [B,S] and completions [B,G,T] together, differentiable
    prefill       keys and values of the prompt, for decoding
    decode_step   one token of every rollout against both caches; decode_packed: several

`completions` is here, what layers compute in blocks.py, decoding in decoding.py, sizes and parameters in
parameters.py; all of it is reached through this module.

The completion stream is fed `[last prompt token, a_0 .. a_{T-2}]`, so it starts at position
`prompt_len - 1` and sees prompt keys strictly before that. Hence the prompt needs no logits,
and its last layer only keys and values.

Source: the architecture of Llama (arXiv 2302.13971): grouped-query attention, rotary embedding, SwiGLU,
RMS norms. What other families add is a field of the spec each (families.py): Qwen3's per-head norm of
queries and keys (arXiv 2505.09388), Qwen2's biases (arXiv 2407.10671), Gemma 3's norms, scales and
sliding windows (arXiv 2503.19786), Qwen3.5's gates and its recurrent layers (delta.py). Layers of which some
are recurrent have no weights in common with the others but norms and MLP: the pattern of them is scanned over.
Norms and softmax run in float32.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fgrpo_jax import shards
from fgrpo_jax.models import attention, blocks, delta
from fgrpo_jax.models.blocks import whole, whole_ends
from fgrpo_jax.models.decoding import PromptCache, decode_packed, decode_step, empty_cache, prefill, unstack
from fgrpo_jax.models.parameters import (
    DELTA,
    FULL,
    LOCAL,
    SHAPING,
    DecoderSpec,
    holders,
    init,
    layer_kinds,
    num_params,
    param_table,
    pattern_of,
    shapes,
)
from fgrpo_jax.types import Array, PyTree

__all__ = [
    "DELTA", "FULL", "LOCAL", "SHAPING", "DecoderSpec", "PromptCache", "completions", "decode_packed", "decode_step",
    "empty_cache", "holders", "init", "layer_kinds", "num_params", "param_table", "pattern_of", "prefill", "shapes",
    "unstack", "whole", "whole_ends",
]  # fmt: skip


class _Streams(NamedTuple):
    """One stream of prompt + group * length tokens a query, so that every projection is one matrix product."""

    prompt: int
    group: int
    length: int

    def split(self, x: Array) -> tuple[Array, Array]:
        """[B,X,...] -> the prompt's [B,S,...] and the rollouts' [B,G,T,...]."""
        return x[:, : self.prompt], x[:, self.prompt :].reshape(-1, self.group, self.length, *x.shape[2:])

    def join(self, of_prompt: Array, own: Array) -> Array:
        return jnp.concatenate([of_prompt, own.reshape(len(own), -1, *own.shape[3:])], 1)


def _one_stream(prompt_BS: Array, prompt_len_B: Array, actions_BGT: Array) -> tuple[Array, Array]:
    """What is fed, and at which positions: [B,X] each."""
    batch, group, length = actions_BGT.shape
    last_B = jnp.take_along_axis(prompt_BS, prompt_len_B[:, None] - 1, 1)
    last_BG1 = jnp.broadcast_to(last_B[:, None], (batch, group, 1))
    fed_BGT = jnp.concatenate([last_BG1, actions_BGT[..., :-1]], -1)
    own = prompt_len_B[:, None, None] - 1 + jnp.broadcast_to(jnp.arange(length), actions_BGT.shape)
    prompt_positions = jnp.broadcast_to(jnp.arange(prompt_BS.shape[1]), prompt_BS.shape)
    both = (prompt_BS, fed_BGT), (prompt_positions, own)
    return tuple(jnp.concatenate([of_prompt, x.reshape(batch, -1)], 1) for of_prompt, x in both)


def _recurrent(
    spec: DecoderSpec, streams: _Streams, prompt_len_B: Array, layer: PyTree, normed: Array
) -> tuple[Array, Array]:
    """The delta rule over prompts [B,S,H,F] and over rollouts [B,G,T,H,F]: these begin with their prompt's state."""
    sizes, x = delta.Sizes(*spec.delta), delta.project(layer, normed)
    x_prompt, x_own = (jax.tree.map(lambda y: streams.split(y)[i], x) for i in (0, 1))
    none = delta.empty(sizes, prompt_len_B.shape, spec.dtype)
    over_prompt, state = delta.mix(sizes, spec.norm_eps, layer, x_prompt, none, prompt_len_B - 1)
    rows = len(prompt_len_B) * streams.group
    x_own = jax.tree.map(lambda y: y.reshape(rows, *y.shape[2:]), x_own)
    state = jax.tree.map(lambda y: jnp.repeat(y, streams.group, 0), state)
    out, _ = delta.mix(sizes, spec.norm_eps, layer, x_own, state, jnp.full(rows, streams.length))
    return over_prompt, out.reshape(-1, streams.group, *out.shape[1:])


def completions(spec: DecoderSpec, params: PyTree, prompt_BS: Array, prompt_len_B: Array, actions_BGT: Array) -> Array:
    """Final hidden states [B,G,T,D] whose head gives the distribution of each action.

    The prompt is encoded once per query; gradients reach it once, from all its rollouts.
    `params` comes from `whole_ends`: each layer is gathered when its turn comes, in the forward and
    again in the backward pass, so no device ever holds all of them.
    """
    group, length = actions_BGT.shape[1:]
    streams = _Streams(prompt_BS.shape[1], group, length)
    split, joined = streams.split, streams.join
    tokens_BX, positions_BX = _one_stream(prompt_BS, prompt_len_B, actions_BGT)
    ropes = blocks.ropes(spec, positions_BX)
    ropes_own = jax.tree.map(lambda r: r[:, prompt_BS.shape[1] :], ropes)
    layers = blocks.split(spec, params["layers"])

    def over_prefix_and_own(q: Array, k: Array, v: Array, k_own: Array, v_own: Array, window) -> Array:
        return attention.shared_prefix(q, k, v, prompt_len_B - 1, k_own, v_own, spec.attention, window)

    def attend(kind: str, is_last: bool, layer: PyTree, normed: Array, is_local: Array | None) -> Array:
        rope, window = blocks.of_layer(spec, ropes, kind, is_local)
        if is_last:
            rope_own, _ = blocks.of_layer(spec, ropes_own, kind, is_local)
            q, gate = blocks.queries(spec, layer, normed[:, prompt_BS.shape[1] :], rope_own)
        else:
            q, gate = blocks.queries(spec, layer, normed, rope)
            q_prompt, q_own = split(q)
        k, v = blocks.keys_values(spec, layer, normed, rope)
        (k_prompt, k_own), (v_prompt, v_own) = split(k), split(v)
        if is_last:
            q_own = q.reshape(-1, group, length, *q.shape[2:])
            return blocks.gated(over_prefix_and_own(q_own, k_prompt, v_prompt, k_own, v_own, window), gate)
        over_prompt = attention.causal(q_prompt, k_prompt, v_prompt, spec.attention, window)
        over_both = over_prefix_and_own(q_own, k_prompt, v_prompt, k_own, v_own, window)
        return blocks.gated(joined(over_prompt, over_both), gate)

    def recur(kind: str, is_last: bool, layer: PyTree, normed: Array, is_local: None) -> Array:
        over_prompt, out = _recurrent(spec, streams, prompt_len_B, layer, normed)
        return out if is_last else joined(over_prompt, out)

    def block(kind: str, is_last: bool, x_BXD: Array, layer: PyTree, is_local: Array | None = None) -> Array:
        layer = shards.whole(blocks.layer_table(spec, kind), layer, spec.dtype)
        normed = blocks.norm(spec, x_BXD, layer["attn_norm"])
        mixed = (recur if kind == DELTA else attend)(kind, is_last, layer, normed, is_local)
        return blocks.finish_block(spec, layer, split(x_BXD)[1] if is_last else x_BXD, mixed)

    def several(x_BXD: Array, some: tuple[tuple[PyTree, ...], Array | None]):
        for kind, layer in zip(layers.kinds, some[0], strict=True):
            x_BXD = blocks.remat(spec, functools.partial(block, kind, False))(x_BXD, layer, some[1])
        return x_BXD, None

    x_BXD, rest = blocks.embed(spec, params, tokens_BX), layers.rest
    if layers.kinds:
        x_BXD, _ = jax.lax.scan(several, x_BXD, layers.scanned)
    for i, (kind, layer) in enumerate(rest):
        x_BXD = blocks.remat(spec, functools.partial(block, kind, i == len(rest) - 1))(x_BXD, layer)
    return blocks.norm(spec, x_BXD, params["final_norm"])
