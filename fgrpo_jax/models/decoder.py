"""A decoder of several families that encodes a prompt once for the whole group of its rollouts.

Parameters are a plain pytree. `param_table` declares each of them once (shape, logical
axes, initialisation) and thereby serves initialisation, sharding, import and export.
Layers are stacked on axis L and run by `lax.scan`.

Three computations share one block:

    completions   prompt [B,S] and completions [B,G,T] together, differentiable
    prefill       keys and values of the prompt, for decoding
    decode_step   one token of every rollout against both caches; decode_packed: several

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
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fgrpo_jax import shards
from fgrpo_jax.models import attention, delta, head
from fgrpo_jax.models.layers import (
    ACTIVATIONS,
    Adapted,
    RowsFirst,
    apply_rope,
    linear,
    rms_norm,
    rope_tables,
    rows_first,
)
from fgrpo_jax.models.lora import Lora, adapted
from fgrpo_jax.models.packing import Packing, pick
from fgrpo_jax.types import Array, Param, PyTree, is_param, map_params
from fgrpo_jax.types import num_params as table_size

KEPT = "result of a projection"
FULL, LOCAL, DELTA = "full_attention", "sliding_attention", "linear_attention"  # kinds of layers
_OF_ATTENTION = ("q", "k", "v", "o", "q_norm", "k_norm", "q_bias", "k_bias", "v_bias")  # weights
_OF_DELTA = "delta_"  # what names of weights of the delta rule begin with, in a stack
_FAR = 2**30  # a window that leaves out nothing


class DecoderSpec(NamedTuple):
    """Sizes and numerics; hashable, so it is a static argument of jit. lora: parameters are then base and adapters."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    rope_theta: float = 10_000.0
    rope_scaling: tuple[float, ...] = ()  # layers.rope_tables
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    qk_norm: bool = True  # RMS norm of each head's query and key
    qkv_bias: bool = False
    activation: str = "silu"  # or "gelu_pytorch_tanh": layers.ACTIVATIONS
    norm_plus_one: bool = False  # norms multiply by 1 + their weight
    post_norms: bool = False  # norms of what attention and MLP add, too
    scale_embeddings: bool = False  # by the root of hidden_size
    query_scalar: float | None = None  # scores are divided by its root; None: head_dim
    attention_gate: bool = False  # attention is multiplied by the sigmoid of what else q projects to
    rotary_fraction: float = 1.0  # of a head that is rotated, its first channels
    pattern: tuple[str, ...] = (FULL,)  # kinds of layers, repeated: full, sliding_ or linear_attention
    window: int = 0  # tokens that a sliding_attention layer sees, itself included
    local_rope_theta: float = 10_000.0  # of sliding_attention layers, which scale nothing
    delta: tuple[int, ...] = ()  # delta.Sizes of linear_attention layers
    init_std: float = 0.02
    dtype: str = "float32"
    param_dtype: str = "float32"
    lora: Lora | None = None
    remat: bool = False
    attention: str = "auto"  # or "blocks", "flash": attention._implementation
    logit_chunk: int = 4096
    rows_first: bool = False  # decode with large weights laid out as XLA CPU reads them best (unstack)


# What parameters must agree in to be this model's; the rest is how it is computed.
SHAPING = (
    "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_size",
    "rope_theta", "rope_scaling", "norm_eps", "tie_embeddings", "qk_norm", "qkv_bias", "param_dtype", "lora",
    "activation", "norm_plus_one", "post_norms", "scale_embeddings", "query_scalar", "pattern", "window",
    "local_rope_theta", "attention_gate", "rotary_fraction", "delta",
)  # fmt: skip


def layer_kinds(spec: DecoderSpec) -> tuple[str, ...]:
    """Of every layer: FULL, LOCAL or DELTA."""
    return tuple(spec.pattern[i % len(spec.pattern)] for i in range(spec.num_layers))


def pattern_of(kinds: Sequence[str]) -> tuple[str, ...]:
    """`DecoderSpec.pattern` for the kinds of all layers: the fewest that repeat."""
    every = range(len(kinds))
    return tuple(kinds[: next(n for n in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % n] for i in every))])


def holders(spec: DecoderSpec, name: str) -> tuple[int, ...]:
    """The layers that have a weight, in the order of its stack."""
    kinds = enumerate(layer_kinds(spec))
    if name.startswith(_OF_DELTA):
        return tuple(i for i, kind in kinds if kind == DELTA)
    return tuple(i for i, kind in kinds if kind != DELTA or name not in _OF_ATTENTION)


def param_table(spec: DecoderSpec) -> PyTree:
    """Every parameter of the model, once."""
    layers, width, mlp = spec.num_layers, spec.hidden_size, spec.mlp_size
    heads, kv_heads, head = spec.num_heads, spec.num_kv_heads, spec.head_dim

    def matrix(*sizes: tuple[str, int]) -> Param:
        axes, shape = zip(*sizes, strict=True)
        return Param(shape, axes, "normal", decay=True)

    def scale(*sizes: tuple[str, int]) -> Param:
        axes, shape = zip(*sizes, strict=True)
        return Param(shape, axes, "zeros" if spec.norm_plus_one else "ones", decay=False)

    stack, to_model, per_head = ("layers", layers), ("embed", width), ("head_dim", head)
    attending = ("layers", len(holders(spec, "q")))
    per_query = ("head_dim", 2 * head if spec.attention_gate else head)
    table = {
        "embed": matrix(("vocab", spec.vocab_size), to_model),
        "layers": {
            "attn_norm": scale(stack, ("norm", width)),
            "q": matrix(attending, to_model, ("heads", heads), per_query),
            "k": matrix(attending, to_model, ("kv_heads", kv_heads), per_head),
            "v": matrix(attending, to_model, ("kv_heads", kv_heads), per_head),
            "o": matrix(attending, ("heads", heads), per_head, to_model),
            "mlp_norm": scale(stack, ("norm", width)),
            "gate": matrix(stack, to_model, ("mlp", mlp)),
            "up": matrix(stack, to_model, ("mlp", mlp)),
            "down": matrix(stack, ("mlp", mlp), to_model),
        },
        "final_norm": scale(("norm", width)),
    }
    if spec.qk_norm:
        table["layers"] |= {name: scale(attending, ("norm", head)) for name in ("q_norm", "k_norm")}
    if spec.post_norms:
        table["layers"] |= {name: scale(stack, ("norm", width)) for name in ("attn_out_norm", "mlp_out_norm")}
    if spec.qkv_bias:
        for name, of_heads in (("q", ("heads", heads)), ("k", ("kv_heads", kv_heads)), ("v", ("kv_heads", kv_heads))):
            table["layers"][f"{name}_bias"] = scale(attending, of_heads, per_head)._replace(init="zeros")
    if DELTA in layer_kinds(spec):
        own = delta.table(delta.Sizes(*spec.delta), len(holders(spec, _OF_DELTA)), width)
        table["layers"] |= {_OF_DELTA + name: param for name, param in own.items()}
    if not spec.tie_embeddings:
        table["head"] = matrix(("vocab", spec.vocab_size), to_model)
    return adapted(table, spec.lora) if spec.lora else table


def shapes(spec: DecoderSpec) -> PyTree:
    dtype = jnp.dtype(spec.param_dtype)
    return map_params(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), param_table(spec))


def num_params(spec: DecoderSpec) -> int:
    return table_size(param_table(spec))


_CONSTANTS = {"ones": 1, "zeros": 0}


def init(spec: DecoderSpec, key: Array) -> PyTree:
    """Random weights: normal of `init_std`, norms multiply by one, biases are zero; a key per parameter path."""
    dtype = jnp.dtype(spec.param_dtype)
    leaves, treedef = jax.tree.flatten(param_table(spec), is_leaf=is_param)
    made = []
    for i, p in enumerate(leaves):
        if p.init in _CONSTANTS:
            made.append(jnp.full(p.shape, _CONSTANTS[p.init], dtype))
        elif p.init == "log_uniform":  # decays of the delta rule, drawn as in Mamba 2
            drawn = jax.random.uniform(jax.random.fold_in(key, i), p.shape, jnp.float32, 0.01, 16.0)
            made.append(jnp.log(drawn).astype(dtype))
        else:
            normal = jax.random.normal(jax.random.fold_in(key, i), p.shape, jnp.float32)
            made.append((spec.init_std * normal).astype(dtype))
    return jax.tree.unflatten(treedef, made)


# --------------------------------------------------------------------- the block


def _embed(spec: DecoderSpec, params: PyTree, tokens: Array) -> Array:
    x = params["embed"][tokens]
    return x * jnp.asarray(spec.hidden_size**0.5, x.dtype) if spec.scale_embeddings else x


def _norm(spec: DecoderSpec, x: Array, scale: Array) -> Array:
    return rms_norm(x, scale.astype(jnp.float32) + 1 if spec.norm_plus_one else scale, spec.norm_eps)


def _ropes(spec: DecoderSpec, positions: Array) -> dict[str, tuple[Array, Array]]:
    """Rotary tables of each kind of layer that attends."""
    given = {FULL: (spec.rope_theta, spec.rope_scaling), LOCAL: (spec.local_rope_theta,)}
    rotated = int(spec.head_dim * spec.rotary_fraction)
    return {kind: rope_tables(positions, rotated, *given[kind]) for kind in given if kind in layer_kinds(spec)}


def _of_layer(spec: DecoderSpec, ropes: PyTree, kind: str, is_local: Array | None) -> tuple[PyTree, Array | int | None]:
    """A layer's rotary tables and its window. Layers that differ in no more are told apart by a number, so that one
    program scans over all of them; windows leave out keys, not work, but in the kernels of flash.py."""
    if is_local is None:
        return (ropes[LOCAL], spec.window) if kind == LOCAL else (ropes[FULL], None)
    rope = jax.tree.map(lambda local, full: jnp.where(is_local, local, full), ropes[LOCAL], ropes[FULL])
    return rope, jnp.where(is_local, spec.window, _FAR)


def _project(spec: DecoderSpec, layer: PyTree, name: str, normed: Array) -> Array:
    """Queries, keys or values [..., H, E]."""
    x = linear(normed, layer[name])
    return checkpoint_name(x + layer[f"{name}_bias"] if spec.qkv_bias else x, KEPT)


def _head_norm(spec: DecoderSpec, layer: PyTree, name: str, x: Array) -> Array:
    return _norm(spec, x, layer[name]) if spec.qk_norm else x


def _queries(spec: DecoderSpec, layer: PyTree, normed: Array, rope) -> tuple[Array, Array | None]:
    """Queries, and their gates: the second half of what a head projects to."""
    q, gate = _project(spec, layer, "q", normed), None
    if spec.attention_gate:
        q, gate = jnp.split(q, 2, -1)
    q = apply_rope(_head_norm(spec, layer, "q_norm", q), rope)
    return q if spec.query_scalar is None else q * (spec.head_dim / spec.query_scalar) ** 0.5, gate


def _gated(attended: Array, gate: Array | None) -> Array:
    return attended if gate is None else attended * jax.nn.sigmoid(gate).reshape(attended.shape)


def _keys_values(spec: DecoderSpec, layer: PyTree, normed: Array, rope) -> tuple[Array, Array]:
    k, v = _project(spec, layer, "k", normed), _project(spec, layer, "v", normed)
    return apply_rope(_head_norm(spec, layer, "k_norm", k), rope), v


def _finish_block(spec: DecoderSpec, layer: PyTree, x: Array, attended: Array) -> Array:
    x = checkpoint_name(x + _added(spec, layer, "attn_out_norm", linear(attended, layer["o"], axes_in=2)), KEPT)
    normed = _norm(spec, x, layer["mlp_norm"])
    gate = checkpoint_name(linear(normed, layer["gate"]), KEPT)
    up = checkpoint_name(linear(normed, layer["up"]), KEPT)
    return x + _added(spec, layer, "mlp_out_norm", linear(ACTIVATIONS[spec.activation](gate) * up, layer["down"]))


def _added(spec: DecoderSpec, layer: PyTree, name: str, x: Array) -> Array:
    """What attention or MLP adds."""
    return _norm(spec, checkpoint_name(x, KEPT), layer[name]) if spec.post_norms else x


def _remat(spec: DecoderSpec, fn):
    """What the backward pass of a layer finds: results of matrix products, or its input alone.

    Norms, rotations and activations are always computed again: that is cheaper than to write
    and read them.
    """
    names = () if spec.remat else (KEPT, attention.KEPT, delta.KEPT)
    return jax.checkpoint(fn, policy=jax.checkpoint_policies.save_only_these_names(*names))


def whole(spec: DecoderSpec, params: PyTree) -> PyTree:
    """Weights in the compute type, gathered from the devices that hold parts of them; once per rollout."""
    return shards.whole(param_table(spec), params, spec.dtype)


def whole_ends(spec: DecoderSpec, params: PyTree) -> PyTree:
    """The same of embedding, last norm and head; layers stay in parts until `completions` comes to them."""
    ends = {name: x for name, x in params.items() if name != "layers"}
    table = param_table(spec)
    return shards.whole({name: table[name] for name in ends}, ends, spec.dtype) | {"layers": params["layers"]}


def _of_kind(stack: PyTree, kind: str) -> dict[str, str]:
    """The names in a stack of the weights that layers of a kind have, by those that their mixer reads."""
    if kind == DELTA:
        return {name.removeprefix(_OF_DELTA): name for name in stack if name not in _OF_ATTENTION}
    return {name: name for name in stack if not name.startswith(_OF_DELTA)}


def _layer_table(spec: DecoderSpec, kind: str) -> PyTree:
    stack = param_table(spec)["layers"]
    return {name: stack[stored] for name, stored in _of_kind(stack, kind).items()}


def _weights_of(spec: DecoderSpec, stack: PyTree, layer: int) -> PyTree:
    return {
        name: jax.tree.map(lambda x: x[holders(spec, stored).index(layer)], stack[stored])
        for name, stored in _of_kind(stack, layer_kinds(spec)[layer]).items()
    }


class _Layers(NamedTuple):
    """Layers to scan over, as many at a time as differ in their weights, and the others one by one: the last at least.

    scanned: of each place among those at a time, its layers' weights on axis R; and [R] whether they are local,
    where not all are alike. kinds: of the places.
    """

    scanned: tuple[tuple[PyTree, ...], Array | None]
    kinds: tuple[str, ...]
    rest: list[tuple[str, PyTree]]  # kind and weights


def _split(spec: DecoderSpec, stack: PyTree) -> _Layers:
    kinds = layer_kinds(spec)
    size = len(spec.pattern) if DELTA in kinds else 1
    times = (spec.num_layers - 1) // size
    alike = size > 1 or len(set(kinds[:times])) < 2

    def at_place(place: int) -> PyTree:
        found = {}
        for name, stored in _of_kind(stack, kinds[place]).items():
            have = holders(spec, stored)
            first, step = have.index(place), sum(i < size for i in have)
            found[name] = jax.tree.map(lambda x, a=first, n=step: x[a : n * times : n], stack[stored])
        return found

    flags = None if alike else jnp.array([kind == LOCAL for kind in kinds[:times]])
    places = tuple(at_place(place) for place in range(size if times else 0))
    rest = [(kinds[i], _weights_of(spec, stack, i)) for i in range(size * times, spec.num_layers)]
    return _Layers((places, flags), kinds[: len(places)], rest)


# --------------------------------------------------------------------- training: both streams


def completions(spec: DecoderSpec, params: PyTree, prompt_BS: Array, prompt_len_B: Array, actions_BGT: Array) -> Array:
    """Final hidden states [B,G,T,D] whose head gives the distribution of each action.

    The prompt is encoded once per query; gradients reach it once, from all its rollouts.
    `params` comes from `whole_ends`: each layer is gathered when its turn comes, in the forward and
    again in the backward pass, so no device ever holds all of them.
    """
    batch, group, length = actions_BGT.shape
    prompt_size = prompt_BS.shape[1]
    last_B = jnp.take_along_axis(prompt_BS, prompt_len_B[:, None] - 1, 1)
    last_BG1 = jnp.broadcast_to(last_B[:, None], (batch, group, 1))
    fed_BGT = jnp.concatenate([last_BG1, actions_BGT[..., :-1]], -1)
    # One stream of S + G*T tokens a query, so that every projection is one matrix product.
    tokens_BX = jnp.concatenate([prompt_BS, fed_BGT.reshape(batch, -1)], 1)
    own = prompt_len_B[:, None, None] - 1 + jnp.broadcast_to(jnp.arange(length), (batch, group, length))
    prompt_positions = jnp.broadcast_to(jnp.arange(prompt_size), prompt_BS.shape)
    ropes = _ropes(spec, jnp.concatenate([prompt_positions, own.reshape(batch, -1)], 1))
    ropes_own = jax.tree.map(lambda r: r[:, prompt_size:], ropes)
    layers = _split(spec, params["layers"])

    def split(x: Array) -> tuple[Array, Array]:
        return x[:, :prompt_size], x[:, prompt_size:].reshape(batch, group, length, *x.shape[2:])

    def over_prefix_and_own(q: Array, k: Array, v: Array, k_own: Array, v_own: Array, window) -> Array:
        return attention.shared_prefix(q, k, v, prompt_len_B - 1, k_own, v_own, spec.attention, window)

    def attend(kind: str, is_last: bool, layer: PyTree, normed: Array, is_local: Array | None) -> Array:
        rope, window = _of_layer(spec, ropes, kind, is_local)
        if is_last:
            rope_own, _ = _of_layer(spec, ropes_own, kind, is_local)
            q, gate = _queries(spec, layer, normed[:, prompt_size:], rope_own)
        else:
            q, gate = _queries(spec, layer, normed, rope)
            q_prompt, q_own = split(q)
        k, v = _keys_values(spec, layer, normed, rope)
        (k_prompt, k_own), (v_prompt, v_own) = split(k), split(v)
        if is_last:
            q_own = q.reshape(batch, group, length, *q.shape[2:])
            return _gated(over_prefix_and_own(q_own, k_prompt, v_prompt, k_own, v_own, window), gate)
        over_prompt = attention.causal(q_prompt, k_prompt, v_prompt, spec.attention, window)
        over_both = over_prefix_and_own(q_own, k_prompt, v_prompt, k_own, v_own, window)
        return _gated(jnp.concatenate([over_prompt, over_both.reshape(batch, -1, *over_both.shape[3:])], 1), gate)

    def recur(kind: str, is_last: bool, layer: PyTree, normed: Array, is_local: None) -> Array:
        """The state after the prompt is that of all its rollouts."""
        sizes, x = delta.Sizes(*spec.delta), delta.project(layer, normed)
        none = delta.empty(sizes, (batch,), spec.dtype)
        over_prompt, state = delta.mix(
            sizes, spec.norm_eps, layer, jax.tree.map(lambda y: y[:, :prompt_size], x), none, prompt_len_B - 1
        )
        own = jax.tree.map(lambda y: y[:, prompt_size:].reshape(batch * group, length, *y.shape[2:]), x)
        state = jax.tree.map(lambda y: jnp.repeat(y, group, 0), state)
        out, _ = delta.mix(sizes, spec.norm_eps, layer, own, state, jnp.full(batch * group, length))
        if is_last:
            return out.reshape(batch, group, length, *out.shape[2:])
        return jnp.concatenate([over_prompt, out.reshape(batch, -1, *out.shape[2:])], 1)

    def block(kind: str, is_last: bool, x_BXD: Array, layer: PyTree, is_local: Array | None = None) -> Array:
        layer = shards.whole(_layer_table(spec, kind), layer, spec.dtype)
        normed = _norm(spec, x_BXD, layer["attn_norm"])
        mixed = (recur if kind == DELTA else attend)(kind, is_last, layer, normed, is_local)
        return _finish_block(spec, layer, split(x_BXD)[1] if is_last else x_BXD, mixed)

    def several(x_BXD: Array, some: tuple[tuple[PyTree, ...], Array | None]):
        for kind, layer in zip(layers.kinds, some[0], strict=True):
            x_BXD = _remat(spec, functools.partial(block, kind, False))(x_BXD, layer, some[1])
        return x_BXD, None

    x_BXD, rest = _embed(spec, params, tokens_BX), layers.rest
    if layers.kinds:
        x_BXD, _ = jax.lax.scan(several, x_BXD, layers.scanned)
    for i, (kind, layer) in enumerate(rest):
        x_BXD = _remat(spec, functools.partial(block, kind, i == len(rest) - 1))(x_BXD, layer)
    return _norm(spec, x_BXD, params["final_norm"])


# --------------------------------------------------------------------- sampling: two caches


@flax.struct.dataclass
class PromptCache:
    """Keys and values of the prompt, one pair per layer, shared by the group; states of recurrent layers.

    They lie as the matrix products of a decoding step read them, or every step would lay
    them out again. Slot 0 is zero and stands for a rollout's own keys (attention.decode),
    slot s holds token s - 1; the prompt's last token has none, rollouts feed it themselves.
    """

    k: tuple[Array | None, ...]  # L x [B,J,E,S], J kv heads; None: a recurrent layer
    v: tuple[Array | None, ...]  # L x [B,J,S,E]
    bias_BS: Array  # what to add to scores: 0 in the slots seen
    prompt_len: Array  # [B]
    states: tuple[delta.State | None, ...]  # L x [B,...], before the prompt's last token; None: a layer that attends


def prefill(spec: DecoderSpec, params: PyTree, prompt_BS: Array, prompt_len_B: Array) -> PromptCache:
    """Encode every prompt once. `params` comes from `whole`."""
    positions = jnp.broadcast_to(jnp.arange(prompt_BS.shape[1]), prompt_BS.shape)
    ropes = _ropes(spec, positions)
    layers = _split(spec, params["layers"])

    def attend(kind: str, is_last: bool, layer: PyTree, normed: Array, is_local: Array | None):
        rope, window = _of_layer(spec, ropes, kind, is_local)
        k, v = _keys_values(spec, layer, normed, rope)
        if is_last:
            return None, as_cached(k, v)
        q, gate = _queries(spec, layer, normed, rope)
        return _gated(attention.causal(q, k, v, spec.attention, window), gate), as_cached(k, v)

    def as_cached(k: Array, v: Array) -> tuple[Array, Array]:
        k, v = (jnp.pad(x[:, :-1], [(0, 0), (1, 0), (0, 0), (0, 0)]) for x in (k, v))
        return jnp.moveaxis(k, 1, 3), jnp.moveaxis(v, 1, 2)

    def recur(kind: str, is_last: bool, layer: PyTree, normed: Array, is_local: None):
        sizes = delta.Sizes(*spec.delta)
        none = delta.empty(sizes, prompt_len_B.shape, spec.dtype)
        return delta.mix(sizes, spec.norm_eps, layer, delta.project(layer, normed), none, prompt_len_B - 1)

    def block(kind: str, is_last: bool, x_BSD: Array, layer: PyTree, is_local: Array | None = None):
        normed = _norm(spec, x_BSD, layer["attn_norm"])
        mixed, kept = (recur if kind == DELTA else attend)(kind, is_last, layer, normed, is_local)
        return None if is_last else _finish_block(spec, layer, x_BSD, mixed), kept

    def several(x_BSD: Array, some: tuple[tuple[PyTree, ...], Array | None]):
        kept = []
        for kind, layer in zip(layers.kinds, some[0], strict=True):
            x_BSD, of_layer = block(kind, False, x_BSD, layer, some[1])
            kept.append(of_layer)
        return x_BSD, kept

    x_BSD, kept = _embed(spec, params, prompt_BS), []
    if layers.kinds:
        x_BSD, stacked = jax.lax.scan(several, x_BSD, layers.scanned)
        leaves, tree = jax.tree.flatten(stacked)
        kept = [one for each in zip(*leaves, strict=True) for one in jax.tree.unflatten(tree, each)]
    for i, (kind, layer) in enumerate(layers.rest):
        x_BSD, of_layer = block(kind, i == len(layers.rest) - 1, x_BSD, layer)
        kept.append(of_layer)
    bias_BS = attention.bias(positions < prompt_len_B[:, None])
    kinds = layer_kinds(spec)
    k, v = ([None if kind == DELTA else x[n] for kind, x in zip(kinds, kept, strict=True)] for n in (0, 1))
    states = tuple(x if kind == DELTA else None for kind, x in zip(kinds, kept, strict=True))
    return PromptCache(tuple(k), tuple(v), bias_BS, prompt_len_B, states)


_FEW = 64  # tokens; a layer's products gain little with more, and lose from 256 on; the head's gain with any


def unstack(spec: DecoderSpec, params: PyTree, tokens: int) -> PyTree:
    """Weights as decoding `tokens` rollouts at a time reads them: a list of layers, so that no step copies a slice."""

    def laid_out(name: str, w: Array | Adapted) -> Array | RowsFirst | Adapted:
        if isinstance(w, Adapted):
            return w.replace(base=laid_out(name, w.base))
        if not spec.rows_first or name.endswith(("norm", "bias", "conv", "log")) or tokens > _FEW:
            return w
        return rows_first(w, axes_in=2 if name == "o" else 1)

    of_layer = [_weights_of(spec, params["layers"], i) for i in range(spec.num_layers)]
    layers = [{name: laid_out(name, w) for name, w in layer.items()} for layer in of_layer]
    head_DV = head.rows(params).T
    return {**params, "layers": layers, "head_DV": rows_first(head_DV) if spec.rows_first else head_DV}


def empty_cache(spec: DecoderSpec, batch: int, group: int, length: int) -> list[tuple[Array, Array] | delta.State]:
    """Per layer, room for the rollouts' own keys [B,J,G,E,T] and values [B,J,G,T,E]; or for their states, which
    begin as the prompt's with their first token."""
    lead = batch, spec.num_kv_heads, group
    k = jnp.zeros((*lead, spec.head_dim, length), spec.dtype)
    v = jnp.zeros((*lead, length, spec.head_dim), spec.dtype)
    kinds = layer_kinds(spec)
    state = delta.empty(delta.Sizes(*spec.delta), (batch, group), spec.dtype) if DELTA in kinds else None
    return [state if kind == DELTA else (k, v) for kind in kinds]


def decode_step(
    spec: DecoderSpec, params: PyTree, prompt: PromptCache, cache: list, token_BG: Array, t: Array
) -> tuple[Array, list]:
    """Feed token number `t` of every rollout: final hidden state [B,G,D] and the new cache.

    `params` comes from `unstack`. The prompt's cache is read in place, never tiled to G.
    """
    position_BG = jnp.broadcast_to((prompt.prompt_len - 1 + t)[:, None], token_BG.shape)
    bias_BS = {FULL: prompt.bias_BS, LOCAL: prompt.bias_BS + _beyond(spec, prompt, position_BG[:, 0])}

    def attend(i: int, q: Array, k: Array, v: Array, k_own: Array, v_own: Array, window: int | None):
        q, k, v = (x[:, :, None] for x in (q, k, v))  # [B,G,1,H,E] and [B,G,1,J,E]
        k_own = jax.lax.dynamic_update_slice_in_dim(k_own, k.transpose(0, 3, 1, 4, 2), t, axis=4)
        v_own = jax.lax.dynamic_update_slice_in_dim(v_own, v.transpose(0, 3, 1, 2, 4), t, axis=3)
        seen = prompt.k[i], prompt.v[i], bias_BS[layer_kinds(spec)[i]], k_own, v_own
        return attention.decode(q, *seen, t, window)[:, :, 0], k_own, v_own

    def recur(i: int, layer: PyTree, x: delta.Projected, own: delta.State) -> tuple[Array, delta.State]:
        x = jax.tree.map(lambda y: y[:, None], x)
        out, own = _continue(
            spec, layer, x, prompt.states[i], own, jnp.full(token_BG.shape, t), jnp.ones_like(token_BG)
        )
        return out[:, 0], own

    return _decode(spec, params, cache, token_BG, position_BG, attend, recur)


def decode_packed(
    spec: DecoderSpec, params: PyTree, prompt: PromptCache, cache: list, token_BN: Array, packing: Packing
) -> tuple[Array, list]:
    """Feed several tokens of every rollout: the hidden state [B,G,D] of its last one here, and the new cache.

    Rollouts stand at different tokens; a key is written where the token's number says. (By a choice for every slot
    of the cache: attention reads all of it anyway, and a scatter is a loop over the rollouts on CPU and TPU.)
    """
    position_BN = prompt.prompt_len[:, None] - 1 + packing.number
    slots = next((own[0].shape[-1] for own in cache if not isinstance(own, delta.State)), 0)
    within_BGU = (jnp.arange(slots) - packing.first[..., None])[:, None]
    bias = {FULL: prompt.bias_BS, LOCAL: prompt.bias_BS[:, None] + _beyond(spec, prompt, position_BN)}

    def write(own: Array, x: Array, slots: int) -> Array:
        """x [B,N,J,E] into a cache whose axis `slots`, one of the two last, is that of tokens."""
        x_BJGWE = jnp.moveaxis(pick(x, packing.column), 3, 1)
        for w in range(packing.column.shape[2]):
            here = jnp.expand_dims(within_BGU == w, -3 - slots)
            own = jnp.where(here, jnp.expand_dims(x_BJGWE[..., w, :], slots), own)
        return own

    def attend(i: int, q: Array, k: Array, v: Array, k_own: Array, v_own: Array, window: int | None):
        k_own, v_own = write(k_own, k, -1), write(v_own, v, -2)
        seen, kind = (prompt.k[i], prompt.v[i]), layer_kinds(spec)[i]
        if i < spec.num_layers - 1:
            return attention.decode_packed(q, *seen, bias[kind], k_own, v_own, packing, window), k_own, v_own
        last_BG11 = (packing.first + packing.count - 1)[:, None, :, None, None]
        of_last = bias[kind] if kind == FULL else pick(bias[kind], packing.last)
        return attention.decode(q[:, :, None], *seen, of_last, k_own, v_own, last_BG11, window)[:, :, 0], k_own, v_own

    def recur(i: int, layer: PyTree, x: delta.Projected, own: delta.State) -> tuple[Array, delta.State]:
        """On the grid of rollouts and their tokens here, which come one after the other."""
        batch, group, width = packing.column.shape

        def on_grid(y: Array) -> Array:
            y = pick(y.reshape(batch, -1, *y.shape[1:]), packing.column)
            return y.reshape(batch * group, width, *y.shape[3:])

        x = jax.tree.map(on_grid, x)
        out, own = _continue(spec, layer, x, prompt.states[i], own, packing.first, packing.count)
        out = pick(out.reshape(batch, group * width, *out.shape[2:]), packing.place)
        out = out.reshape(-1, *out.shape[2:])
        return last(out) if i == spec.num_layers - 1 else out, own

    def last(x: Array) -> Array:
        """Of [B*N,...], what belongs to the rollouts' last tokens: [B*G,...]."""
        x = pick(x.reshape(*token_BN.shape, *x.shape[1:]), packing.last)
        return x.reshape(-1, *x.shape[2:])

    return _decode(spec, params, cache, token_BN, position_BN, attend, recur, last)


def _decode(
    spec: DecoderSpec, params: PyTree, cache: list, token_BX: Array, position_BX: Array, attend: Callable,
    recur: Callable, wanted: Callable[[Array], Array] = lambda x: x,
) -> tuple[Array, list]:  # fmt: skip
    """Tokens [B,X] through all layers: final hidden states [B,G,D] and the new cache.

    attend: (layer, q [B,X,H,E], k, v [B,X,J,E], own keys, own values, window) -> [B,X,H,E], both caches with k and v.
    recur: (layer, its weights, tokens as the delta rule sees them, states) -> what it says of tokens, and new states.
    wanted: of arrays of all tokens, what belongs to those whose hidden states are asked for; of the
    others the last layer gives keys and values alone.
    """
    batch, kinds = len(token_BX), layer_kinds(spec)
    ropes = _ropes(spec, position_BX.reshape(-1))
    # Tokens on one axis: XLA CPU fuses activations into the products of plain matrices.
    x_ND = _embed(spec, params, token_BX.reshape(-1))
    grown = []
    for i, (layer, own) in enumerate(zip(params["layers"], cache, strict=True)):
        normed = _norm(spec, x_ND, layer["attn_norm"])
        if kinds[i] == DELTA:
            mixed, own = recur(i, layer, delta.project(layer, normed), own)
            x_ND = wanted(x_ND) if i == spec.num_layers - 1 else x_ND
            x_ND = _finish_block(spec, layer, x_ND, mixed)
            grown.append(own)
            continue
        rope, window = _of_layer(spec, ropes, kinds[i], None)
        k, v = (x.reshape(batch, -1, *x.shape[1:]) for x in _keys_values(spec, layer, normed, rope))
        if i == spec.num_layers - 1:
            x_ND, normed, *rope = (wanted(x) for x in (x_ND, normed, *rope))
        q, gate = _queries(spec, layer, normed, rope)
        attended, *own = attend(i, q.reshape(batch, -1, *q.shape[1:]), k, v, *own, window)
        x_ND = _finish_block(spec, layer, x_ND, _gated(attended.reshape(-1, *attended.shape[2:]), gate))
        grown.append(tuple(own))
    return _norm(spec, x_ND, params["final_norm"]).reshape(batch, -1, spec.hidden_size), grown


def _continue(
    spec: DecoderSpec, layer: PyTree, x: delta.Projected, of_prompt: delta.State, own: delta.State,
    first_BG: Array, count_BG: Array,
) -> tuple[Array, delta.State]:  # fmt: skip
    """The delta rule over tokens [B*G,W] of rollouts, of which `count` are there, from token number `first` on."""
    fresh = first_BG.reshape(-1) == 0
    group = first_BG.shape[1]

    def begin(of_prompt: Array, own: Array) -> Array:
        own = own.reshape(-1, *own.shape[2:])
        chosen = fresh.reshape(-1, *[1] * (own.ndim - 1))
        return jnp.where(chosen, jnp.repeat(of_prompt, group, 0), own)

    before = jax.tree.map(begin, of_prompt, own)
    out, after = delta.mix(delta.Sizes(*spec.delta), spec.norm_eps, layer, x, before, count_BG.reshape(-1))
    return out, jax.tree.map(lambda y: y.reshape(*first_BG.shape, *y.shape[1:]), after)


def _beyond(spec: DecoderSpec, prompt: PromptCache, position: Array) -> Array:
    """As `attention.bias`, of the prompt's slots that have left the window of a token at this position [B,...]."""
    token = jnp.arange(prompt.bias_BS.shape[1]) - 1
    return attention.bias((token < 0) | (token > position[..., None] - spec.window))
