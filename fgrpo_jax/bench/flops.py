"""What a step has to compute and read: closed forms that times are compared with.

Useful work only. A multiplication with its addition counts two. Counted are matrix products
of projections, attention, states (token by token) and head; norms, convolutions, softmax, rotary
embedding and the optimizer are not. Counted once is what a step needs once: the prompt of a query
(for its whole group), each pair of positions a causal mask and a window let through. Not counted is
what it need not compute: logits of the prompt, and queries, output projection and MLP of the prompt
in the last layer, whose keys and values, or state, alone are needed. A backward pass is twice its
forward pass; anything computed again there is not useful work.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fgrpo_jax.models.decoder import DELTA, FULL, LOCAL, DecoderSpec, layer_kinds
from fgrpo_jax.models.delta import Sizes


class Shape(NamedTuple):
    """Of one step: B queries of S prompt tokens, G rollouts of T tokens each."""

    batch: int
    prompt: int
    group: int
    length: int


class _Layer(NamedTuple):
    """Multiplications for a token: with the weights of keys and values, or of what a state is made of, and with all
    others; and with a state, to change it and to read it."""

    kept: int
    others: int
    change: int = 0
    read: int = 0


def _layers(spec: DecoderSpec) -> list[_Layer]:
    width, head = spec.hidden_size, spec.head_dim
    mlp = 3 * width * spec.mlp_size
    attends = _Layer(
        2 * width * spec.num_kv_heads * head, (3 if spec.attention_gate else 2) * width * spec.num_heads * head + mlp
    )
    kinds = layer_kinds(spec)
    if DELTA not in kinds:
        return [attends] * len(kinds)
    n = Sizes(*spec.delta)
    keys, values, state = n.keys * n.key_width, n.values * n.value_width, n.values * n.key_width * n.value_width
    recurs = _Layer(width * (keys + values + 2 * n.values), width * (keys + 2 * values) + mlp, 2 * state, state)
    return [recurs if kind == DELTA else attends for kind in kinds]


def _pairs(spec: DecoderSpec, first: int, tokens: int) -> list[int]:
    """Pairs of query and key in every layer, of tokens at positions `first` and on; each sees itself too."""
    seen = 1 + first + np.arange(tokens)
    near = int(np.minimum(seen, spec.window).sum()) if LOCAL in spec.pattern else 0
    pairs = {FULL: int(seen.sum()), LOCAL: near, DELTA: 0}
    return [pairs[kind] for kind in layer_kinds(spec)]


def prefill_flops(spec: DecoderSpec, shape: Shape) -> int:
    """The prompts' forward pass, each prompt once."""
    layers = _layers(spec)
    pairs = sum(_pairs(spec, 0, shape.prompt)[:-1])
    per_token = sum(n.kept + n.change for n in layers) + sum(n.others + n.read for n in layers[:-1])
    return shape.batch * 2 * (shape.prompt * per_token + pairs * 2 * spec.num_heads * spec.head_dim)


def completion_flops(spec: DecoderSpec, shape: Shape) -> int:
    """The rollouts' forward pass with its logits, given the prompts' keys and values.

    The first token fed is the prompt's last, so a rollout sees prompt - 1 keys of the prompt
    and its own T.
    """
    length = shape.length
    pairs = sum(_pairs(spec, shape.prompt - 1, length))
    per_token = sum(map(sum, _layers(spec))) + spec.hidden_size * spec.vocab_size
    return shape.batch * shape.group * 2 * (length * per_token + pairs * 2 * spec.num_heads * spec.head_dim)


def rollout_flops(spec: DecoderSpec, shape: Shape) -> int:
    return prefill_flops(spec, shape) + completion_flops(spec, shape)


def update_flops(spec: DecoderSpec, shape: Shape) -> int:
    return 3 * rollout_flops(spec, shape)


def repeated(shape: Shape) -> Shape:
    """The same rollouts, each with a prompt of its own."""
    return Shape(shape.batch * shape.group, shape.prompt, 1, shape.length)


def decode_step_bytes(spec: DecoderSpec, shape: Shape) -> int:
    """Bytes one decoding step reads: weights, prompt caches, states and, on average, half the own caches.

    Of a window, what is in it.
    """
    width = np.dtype(np.uint16 if spec.dtype == "bfloat16" else np.float32).itemsize
    layers, kinds = _layers(spec), layer_kinds(spec)
    weights = sum(n.kept + n.others for n in layers) + spec.hidden_size * spec.vocab_size
    full = shape.prompt + shape.group * shape.length // 2
    near = min(shape.prompt, spec.window) + shape.group * min(shape.length, 2 * spec.window) // 2
    tokens = sum({FULL: full, LOCAL: near, DELTA: 0}[kind] for kind in kinds)
    cached = shape.batch * tokens * 2 * spec.num_kv_heads * spec.head_dim
    states = 4 * shape.batch * shape.group * sum(n.read for n in layers)
    return width * (weights + cached) + states


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

    Of a history's last layer only keys and values are needed; the first step is the same for all lists of a query.
    """
    keys_values, rest = 2 * n.width * 2 * n.width, 2 * n.width * 2 * n.width + 2 * 3 * n.width * n.mlp
    pair = 2 * 2 * n.width  # score and value
    history = n.layers * n.history * keys_values + (n.layers - 1) * n.history * (rest + n.history * pair)
    pool = n.layers * n.pool * (keys_values + rest + (n.history + n.pool) * pair) + n.list_layers * n.pool * keys_values

    def steps(count: int, seen: int) -> int:
        return n.list_layers * (count * (keys_values + rest) + seen * pair) + count * 2 * n.width * n.pool

    later = n.length - 1
    one_list = steps(later, later * (n.pool + 1) + later * (later + 1) // 2)
    return n.batch * (history + pool + steps(1, n.pool + 1) + n.group * one_list)


def ranker_step_flops(n: RankerSizes) -> int:
    """Of a training step: a backward pass is twice its forward pass."""
    return 3 * ranker_sample_flops(n)
