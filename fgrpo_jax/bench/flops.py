"""What a step has to compute and read: closed forms that times are compared with.

Useful work only. A multiplication with its addition counts two. Counted are matrix products
of projections, attention and head; norms, softmax, rotary embedding and the optimizer are
not. Counted once is what a step needs once: the prompt of a query (for its whole group),
each pair of positions a causal mask and a window let through. Not counted is what it need not compute:
logits of the prompt, and queries, output projection and MLP of the prompt in the last layer,
whose keys and values alone are needed. A backward pass is twice its forward pass; anything
computed again there is not useful work.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fgrpo_jax.models.decoder import LOCAL, DecoderSpec, layer_kinds


class Shape(NamedTuple):
    """Of one step: B queries of S prompt tokens, G rollouts of T tokens each."""

    batch: int
    prompt: int
    group: int
    length: int


def _per_token(spec: DecoderSpec) -> tuple[int, int]:
    """FLOPs a layer spends on a token: in keys and values, and in everything else but attention."""
    keys_values = 2 * spec.hidden_size * 2 * spec.num_kv_heads * spec.head_dim
    queries_output = 2 * spec.hidden_size * 2 * spec.num_heads * spec.head_dim
    return keys_values, queries_output + 2 * 3 * spec.hidden_size * spec.mlp_size


def _pairs(spec: DecoderSpec, first: int, tokens: int) -> list[int]:
    """Pairs of query and key in every layer, of tokens at positions `first` and on; each sees itself too."""
    seen = 1 + first + np.arange(tokens)
    near = int(np.minimum(seen, spec.window).sum()) if LOCAL in spec.pattern else 0
    return [near if kind == LOCAL else int(seen.sum()) for kind in layer_kinds(spec)]


def prefill_flops(spec: DecoderSpec, shape: Shape) -> int:
    """The prompts' forward pass, each prompt once."""
    keys_values, rest = _per_token(spec)
    pairs = sum(_pairs(spec, 0, shape.prompt)[:-1])
    per_pair = 4 * spec.num_heads * spec.head_dim
    inner = spec.num_layers - 1
    one = spec.num_layers * shape.prompt * keys_values + inner * shape.prompt * rest + pairs * per_pair
    return shape.batch * one


def completion_flops(spec: DecoderSpec, shape: Shape) -> int:
    """The rollouts' forward pass with its logits, given the prompts' keys and values.

    The first token fed is the prompt's last, so a rollout sees prompt - 1 keys of the prompt
    and its own T.
    """
    length = shape.length
    pairs = sum(_pairs(spec, shape.prompt - 1, length))
    layers = spec.num_layers * length * sum(_per_token(spec)) + pairs * 4 * spec.num_heads * spec.head_dim
    head = length * 2 * spec.hidden_size * spec.vocab_size
    return shape.batch * shape.group * (layers + head)


def rollout_flops(spec: DecoderSpec, shape: Shape) -> int:
    return prefill_flops(spec, shape) + completion_flops(spec, shape)


def update_flops(spec: DecoderSpec, shape: Shape) -> int:
    return 3 * rollout_flops(spec, shape)


def repeated(shape: Shape) -> Shape:
    """The same rollouts, each with a prompt of its own."""
    return Shape(shape.batch * shape.group, shape.prompt, 1, shape.length)


def decode_step_bytes(spec: DecoderSpec, shape: Shape) -> int:
    """Bytes one decoding step reads: weights, prompt caches and half the own caches on average; of windows, theirs."""
    width = np.dtype(np.uint16 if spec.dtype == "bfloat16" else np.float32).itemsize
    keys_values, rest = _per_token(spec)
    weights = spec.num_layers * (keys_values + rest) // 2 + spec.hidden_size * spec.vocab_size
    full = shape.prompt + shape.group * shape.length // 2
    near = min(shape.prompt, spec.window) + shape.group * min(shape.length, 2 * spec.window) // 2
    tokens = sum(near if kind == LOCAL else full for kind in layer_kinds(spec))
    cached = shape.batch * tokens * 2 * spec.num_kv_heads * spec.head_dim
    return width * (weights + cached)


# --------------------------------------------------------------------- the ranker


class RankerSizes(NamedTuple):
    """Of one step."""

    batch: int = 64
    group: int = 20
    pool: int = 50
    history: int = 20
    length: int = 6
    width: int = 64
    layers: int = 1
    list_layers: int = 1
    heads: int = 4
    mlp: int = 128
    items: int = 3000


def ranker_sample_flops(n: RankerSizes) -> int:
    """Matrix products of sampling a step's lists, or of reading them: useful work.

    Of a history's last layer only keys and values are needed.
    """
    keys_values, rest = 2 * n.width * 2 * n.width, 2 * n.width * 2 * n.width + 2 * 3 * n.width * n.mlp
    pair = 2 * 2 * n.width  # score and value
    history = n.layers * n.history * keys_values + (n.layers - 1) * n.history * (rest + n.history * pair)
    pool = n.layers * n.pool * (keys_values + rest + (n.history + n.pool) * pair) + n.list_layers * n.pool * keys_values
    seen = n.length * n.pool + n.length * (n.length + 1) // 2
    one_list = n.list_layers * (n.length * (keys_values + rest) + seen * pair) + n.length * 2 * n.width * n.pool
    return n.batch * (history + pool + n.group * one_list)


def ranker_step_flops(n: RankerSizes) -> int:
    """Of a training step: a backward pass is twice its forward pass."""
    return 3 * ranker_sample_flops(n)
