"""About what a device holds beside parameters and moments while a step runs, in bytes: closed forms.

Compilers need somewhat more or less (bench/README.md says how far off); they are there to see, before anything is
compiled, whether a configuration can fit.
"""

from __future__ import annotations

import jax.numpy as jnp

from fgrpo_jax.models.decoder import DELTA, DecoderSpec, holders
from fgrpo_jax.models.delta import CHUNK, Sizes


def width(dtype: str) -> int:
    """Bytes of a number."""
    return jnp.dtype(dtype).itemsize


def caches(spec: DecoderSpec, queries: int, prompt: int, group: int, length: int, tensor: int = 1) -> float:
    """Keys and values that decoding keeps: of every prompt once, and of every rollout's own tokens; and the states
    of prompts and rollouts, in float32."""
    attending = len(holders(spec, "k"))
    per_token = 2 * spec.num_kv_heads * spec.head_dim * attending / tensor
    kept = queries * (prompt + group * length) * per_token * width(spec.dtype)
    if attending == spec.num_layers:
        return kept
    n = Sizes(*spec.delta)
    state = 4 * n.values * n.key_width * n.value_width / tensor
    return kept + queries * (1 + group) * (spec.num_layers - attending) * state


def activations(spec: DecoderSpec, queries: int, prompt: int, group: int, length: int, tensor: int = 1) -> float:
    """What the forward pass of these queries (a microbatch's) keeps for the backward pass, and what that makes.

    Of every layer its input, and, without spec.remat, the results of its projections. The backward pass makes
    these again for one layer at a time, with activations and MLP between them, and the gradient of each. Of recurrent
    layers, which compute in float32, a whole repeat of the pattern is counted, as XLA's CPU compiler keeps it.
    """
    tokens = queries * (prompt + group * length)
    queries_output = (3 if spec.attention_gate else 2) * spec.num_heads
    projections = {"q": (queries_output + 2 * spec.num_kv_heads) * spec.head_dim + 2 * spec.mlp_size}
    if spec.delta:
        n = Sizes(*spec.delta)
        projections["delta_qkv"] = n.channels * tensor + 2 * n.values * n.value_width + 2 * spec.mlp_size  # whole
    of_layers = spec.num_layers * spec.hidden_size * (1 if spec.remat else 2)
    of_layers += (
        0 if spec.remat else sum(size * len(holders(spec, name)) for name, size in projections.items()) / tensor
    )
    at_once = 2 * (2 * spec.hidden_size + (max(projections.values()) + spec.mlp_size) / tensor)
    recurrent = spec.pattern.count(DELTA) * _of_rule(Sizes(*spec.delta), tensor) if spec.delta else 0
    return tokens * ((of_layers + at_once) * width(spec.dtype) + 4 * recurrent)


def _of_rule(sizes: Sizes, tensor: int) -> float:
    """Numbers of a token in one layer: of the convolution, of queries, keys and values by heads, of chunks' triangles.
    How many of each is fitted to what XLA's CPU compiler keeps."""
    by_heads = sizes.values * (2 * sizes.key_width + sizes.value_width)
    return 11 * sizes.channels + (10 * by_heads + 6 * sizes.values * CHUNK) / tensor
