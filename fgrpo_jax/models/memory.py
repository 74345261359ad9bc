"""About what a device holds beside parameters and moments while a step runs, in bytes: closed forms.

Compilers need somewhat more or less (README says how far off); they are there to see, before anything is
compiled, whether a configuration can fit.
"""

from __future__ import annotations

import numpy as np

from fgrpo_jax.models.decoder import DecoderSpec


def width(dtype: str) -> int:
    """Bytes of a number."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def caches(spec: DecoderSpec, queries: int, prompt: int, group: int, length: int, tensor: int = 1) -> float:
    """Keys and values that decoding keeps: of every prompt once, and of every rollout's own tokens."""
    per_token = 2 * spec.num_kv_heads * spec.head_dim * spec.num_layers / tensor
    return queries * (prompt + group * length) * per_token * width(spec.dtype)


def activations(spec: DecoderSpec, queries: int, prompt: int, group: int, length: int, tensor: int = 1) -> float:
    """What the forward pass of these queries (a microbatch's) keeps for the backward pass, and what that makes.

    Of every layer its input, and, without spec.remat, the results of its projections. The backward pass makes
    these again for one layer at a time, with activations and MLP between them, and the gradient of each.
    """
    tokens = queries * (prompt + group * length)
    projections = (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim + 2 * spec.mlp_size
    of_layer = spec.hidden_size + (0 if spec.remat else spec.hidden_size + projections / tensor)
    at_once = 2 * (2 * spec.hidden_size + (projections + spec.mlp_size) / tensor)
    return tokens * (of_layer * spec.num_layers + at_once) * width(spec.dtype)
