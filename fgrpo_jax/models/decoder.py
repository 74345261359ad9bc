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
sliding windows (arXiv 2503.19786). Norms and softmax run in float32.
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
from fgrpo_jax.models import attention, head
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
FULL, LOCAL = "full_attention", "sliding_attention"  # kinds of layers
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
    pattern: tuple[str, ...] = (FULL,)  # kinds of layers, repeated: full_attention, sliding_attention
    window: int = 0  # tokens that a sliding_attention layer sees, itself included
    local_rope_theta: float = 10_000.0  # of sliding_attention layers, which scale nothing
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
    "local_rope_theta",
)  # fmt: skip


def layer_kinds(spec: DecoderSpec) -> tuple[str, ...]:
    """Of every layer: FULL or LOCAL."""
    return tuple(spec.pattern[i % len(spec.pattern)] for i in range(spec.num_layers))


def pattern_of(kinds: Sequence[str]) -> tuple[str, ...]:
    """`DecoderSpec.pattern` for the kinds of all layers: the fewest that repeat."""
    every = range(len(kinds))
    return tuple(kinds[: next(n for n in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % n] for i in every))])


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
    table = {
        "embed": matrix(("vocab", spec.vocab_size), to_model),
        "layers": {
            "attn_norm": scale(stack, ("norm", width)),
            "q": matrix(stack, to_model, ("heads", heads), per_head),
            "k": matrix(stack, to_model, ("kv_heads", kv_heads), per_head),
            "v": matrix(stack, to_model, ("kv_heads", kv_heads), per_head),
            "o": matrix(stack, ("heads", heads), per_head, to_model),
            "mlp_norm": scale(stack, ("norm", width)),
            "gate": matrix(stack, to_model, ("mlp", mlp)),
            "up": matrix(stack, to_model, ("mlp", mlp)),
            "down": matrix(stack, ("mlp", mlp), to_model),
        },
        "final_norm": scale(("norm", width)),
    }
    if spec.qk_norm:
        table["layers"] |= {"q_norm": scale(stack, ("norm", head)), "k_norm": scale(stack, ("norm", head))}
    if spec.post_norms:
        table["layers"] |= {name: scale(stack, ("norm", width)) for name in ("attn_out_norm", "mlp_out_norm")}
    if spec.qkv_bias:
        for name, of_heads in (("q", ("heads", heads)), ("k", ("kv_heads", kv_heads)), ("v", ("kv_heads", kv_heads))):
            table["layers"][f"{name}_bias"] = scale(stack, of_heads, per_head)._replace(init="zeros")
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
    """Rotary tables of each kind of layer."""
    given = {FULL: (spec.rope_theta, spec.rope_scaling), LOCAL: (spec.local_rope_theta,)}
    return {kind: rope_tables(positions, spec.head_dim, *given[kind]) for kind in dict.fromkeys(layer_kinds(spec))}


def _of_layer(spec: DecoderSpec, ropes: PyTree, is_local: Array | bool) -> tuple[PyTree, Array | int | None]:
    """A layer's rotary tables and its window. Layers that differ are told apart by a number, so that one program
    scans over all of them; windows leave out keys, not work, but in the kernels of flash.py."""
    if isinstance(is_local, bool):
        return (ropes[LOCAL], spec.window) if is_local else (ropes[FULL], None)
    rope = jax.tree.map(lambda local, full: jnp.where(is_local, local, full), ropes[LOCAL], ropes[FULL])
    return rope, jnp.where(is_local, spec.window, _FAR)


def _project(spec: DecoderSpec, layer: PyTree, name: str, normed: Array) -> Array:
    """Queries, keys or values [..., H, E]."""
    x = linear(normed, layer[name])
    return checkpoint_name(x + layer[f"{name}_bias"] if spec.qkv_bias else x, KEPT)


def _head_norm(spec: DecoderSpec, layer: PyTree, name: str, x: Array) -> Array:
    return _norm(spec, x, layer[name]) if spec.qk_norm else x


def _queries(spec: DecoderSpec, layer: PyTree, normed: Array, rope) -> Array:
    q = apply_rope(_head_norm(spec, layer, "q_norm", _project(spec, layer, "q", normed)), rope)
    return q if spec.query_scalar is None else q * (spec.head_dim / spec.query_scalar) ** 0.5


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
    names = () if spec.remat else (KEPT, attention.KEPT)
    return jax.checkpoint(fn, policy=jax.checkpoint_policies.save_only_these_names(*names))


def whole(spec: DecoderSpec, params: PyTree) -> PyTree:
    """Weights in the compute type, gathered from the devices that hold parts of them; once per rollout."""
    return shards.whole(param_table(spec), params, spec.dtype)


def whole_ends(spec: DecoderSpec, params: PyTree) -> PyTree:
    """The same of embedding, last norm and head; layers stay in parts until `completions` comes to them."""
    ends = {name: x for name, x in params.items() if name != "layers"}
    table = param_table(spec)
    return shards.whole({name: table[name] for name in ends}, ends, spec.dtype) | {"layers": params["layers"]}


def _split_last(spec: DecoderSpec, layers: PyTree) -> tuple[PyTree, PyTree]:
    """All layers but the last, to scan over, each with whether it is local (a bool where all of them are
    alike); and the last with the same."""
    *inner, last = (kind == LOCAL for kind in layer_kinds(spec))
    flags = jnp.array(inner) if len(set(inner)) > 1 else None
    alike = last if not inner else inner[0]
    x = jax.tree.map(lambda x: x[:-1], layers), flags
    return x, alike, (jax.tree.map(lambda x: x[-1], layers), last)


# --------------------------------------------------------------------- training: both streams


def completions(spec: DecoderSpec, params: PyTree, prompt_BS: Array, prompt_len_B: Array, actions_BGT: Array) -> Array:
    """Final hidden states [B,G,T,D] whose head gives the distribution of each action.

    The prompt is encoded once per query; gradients reach it once, from all its rollouts.
    `params` comes from `whole_ends`: each layer is gathered when its turn comes, in the forward and
    again in the backward pass, so no device ever holds all of them.
    """
    layer_table = param_table(spec)["layers"]
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
    inner, alike, (last, last_is_local) = _split_last(spec, params["layers"])

    def split(x: Array) -> tuple[Array, Array]:
        return x[:, :prompt_size], x[:, prompt_size:].reshape(batch, group, length, *x.shape[2:])

    def over_prefix_and_own(q: Array, k: Array, v: Array, k_own: Array, v_own: Array, window) -> Array:
        return attention.shared_prefix(q, k, v, prompt_len_B - 1, k_own, v_own, spec.attention, window)

    @functools.partial(_remat, spec)
    def block(x_BXD: Array, one: tuple[PyTree, Array | None]):
        layer, is_local = one
        rope, window = _of_layer(spec, ropes, alike if is_local is None else is_local)
        layer = shards.whole(layer_table, layer, spec.dtype)
        normed = _norm(spec, x_BXD, layer["attn_norm"])
        q_prompt, q_own = split(_queries(spec, layer, normed, rope))
        k, v = _keys_values(spec, layer, normed, rope)
        (k_prompt, k_own), (v_prompt, v_own) = split(k), split(v)
        over_prompt = attention.causal(q_prompt, k_prompt, v_prompt, spec.attention, window)
        over_both = over_prefix_and_own(q_own, k_prompt, v_prompt, k_own, v_own, window)
        attended = jnp.concatenate([over_prompt, over_both.reshape(batch, -1, *over_both.shape[3:])], 1)
        return _finish_block(spec, layer, x_BXD, attended), None

    @functools.partial(_remat, spec)
    def last_block(x_BXD: Array, layer: PyTree) -> Array:
        (rope, window), (rope_own, _) = (_of_layer(spec, tables, last_is_local) for tables in (ropes, ropes_own))
        layer = shards.whole(layer_table, layer, spec.dtype)
        normed = _norm(spec, x_BXD, layer["attn_norm"])
        q = _queries(spec, layer, normed[:, prompt_size:], rope_own)
        k, v = _keys_values(spec, layer, normed, rope)
        (k_prompt, k_own), (v_prompt, v_own) = split(k), split(v)
        q_own = q.reshape(batch, group, length, *q.shape[2:])
        over_both = over_prefix_and_own(q_own, k_prompt, v_prompt, k_own, v_own, window)
        return _finish_block(spec, layer, split(x_BXD)[1], over_both)

    x_BXD, _ = jax.lax.scan(block, _embed(spec, params, tokens_BX), inner)
    return _norm(spec, last_block(x_BXD, last), params["final_norm"])


# --------------------------------------------------------------------- sampling: two caches


@flax.struct.dataclass
class PromptCache:
    """Keys and values of the prompt, one pair per layer, shared by the group.

    They lie as the matrix products of a decoding step read them, or every step would lay
    them out again. Slot 0 is zero and stands for a rollout's own keys (attention.decode),
    slot s holds token s - 1; the prompt's last token has none, rollouts feed it themselves.
    """

    k: tuple[Array, ...]  # L x [B,J,E,S], J kv heads
    v: tuple[Array, ...]  # L x [B,J,S,E]
    bias_BS: Array  # what to add to scores: 0 in the slots seen
    prompt_len: Array  # [B]


def prefill(spec: DecoderSpec, params: PyTree, prompt_BS: Array, prompt_len_B: Array) -> PromptCache:
    """Encode every prompt once. `params` comes from `whole`."""
    positions = jnp.broadcast_to(jnp.arange(prompt_BS.shape[1]), prompt_BS.shape)
    ropes = _ropes(spec, positions)
    inner, alike, (last, last_is_local) = _split_last(spec, params["layers"])

    def block(x_BSD: Array, one: tuple[PyTree, Array | None]):
        layer, is_local = one
        rope, window = _of_layer(spec, ropes, alike if is_local is None else is_local)
        normed = _norm(spec, x_BSD, layer["attn_norm"])
        k, v = _keys_values(spec, layer, normed, rope)
        attended = attention.causal(_queries(spec, layer, normed, rope), k, v, spec.attention, window)
        return _finish_block(spec, layer, x_BSD, attended), as_cached(k, v)

    def as_cached(k: Array, v: Array) -> tuple[Array, Array]:
        k, v = (jnp.pad(x[:, :-1], [(0, 0), (1, 0), (0, 0), (0, 0)]) for x in (k, v))
        return jnp.moveaxis(k, 1, 3), jnp.moveaxis(v, 1, 2)

    x_BSD, (k_LBJES, v_LBJSE) = jax.lax.scan(block, _embed(spec, params, prompt_BS), inner)
    normed = _norm(spec, x_BSD, last["attn_norm"])
    k_last, v_last = as_cached(*_keys_values(spec, last, normed, _of_layer(spec, ropes, last_is_local)[0]))
    bias_BS = attention.bias(positions < prompt_len_B[:, None])
    return PromptCache((*k_LBJES, k_last), (*v_LBJSE, v_last), bias_BS, prompt_len_B)


_FEW = 64  # tokens; a layer's products gain little with more, and lose from 256 on; the head's gain with any


def unstack(spec: DecoderSpec, params: PyTree, tokens: int) -> PyTree:
    """Weights as decoding `tokens` rollouts at a time reads them: a list of layers, so that no step copies a slice."""

    def laid_out(name: str, w: Array | Adapted) -> Array | RowsFirst | Adapted:
        if isinstance(w, Adapted):
            return w.replace(base=laid_out(name, w.base))
        if not spec.rows_first or name.endswith(("norm", "bias")) or tokens > _FEW:
            return w
        return rows_first(w, axes_in=2 if name == "o" else 1)

    stacked = params["layers"]
    of_layer = [jax.tree.map(lambda x: x[i], stacked) for i in range(spec.num_layers)]
    layers = [{name: laid_out(name, w) for name, w in layer.items()} for layer in of_layer]
    head_DV = head.rows(params).T
    return {**params, "layers": layers, "head_DV": rows_first(head_DV) if spec.rows_first else head_DV}


def empty_cache(spec: DecoderSpec, batch: int, group: int, length: int) -> list[tuple[Array, Array]]:
    """Room for the rollouts' own keys [B,J,G,E,T] and values [B,J,G,T,E], per layer."""
    lead = batch, spec.num_kv_heads, group
    k = jnp.zeros((*lead, spec.head_dim, length), spec.dtype)
    v = jnp.zeros((*lead, length, spec.head_dim), spec.dtype)
    return [(k, v) for _ in range(spec.num_layers)]


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

    return _decode(spec, params, cache, token_BG, position_BG, attend)


def decode_packed(
    spec: DecoderSpec, params: PyTree, prompt: PromptCache, cache: list, token_BN: Array, packing: Packing
) -> tuple[Array, list]:
    """Feed several tokens of every rollout: the hidden state [B,G,D] of its last one here, and the new cache.

    Rollouts stand at different tokens; a key is written where the token's number says. (By a choice for every slot
    of the cache: attention reads all of it anyway, and a scatter is a loop over the rollouts on CPU and TPU.)
    """
    position_BN = prompt.prompt_len[:, None] - 1 + packing.number
    within_BGU = (jnp.arange(cache[0][0].shape[-1]) - packing.first[..., None])[:, None]
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

    def last(x: Array) -> Array:
        """Of [B*N,...], what belongs to the rollouts' last tokens: [B*G,...]."""
        x = pick(x.reshape(*token_BN.shape, *x.shape[1:]), packing.last)
        return x.reshape(-1, *x.shape[2:])

    return _decode(spec, params, cache, token_BN, position_BN, attend, last)


def _decode(
    spec: DecoderSpec, params: PyTree, cache: list, token_BX: Array, position_BX: Array, attend: Callable,
    wanted: Callable[[Array], Array] = lambda x: x,
) -> tuple[Array, list]:  # fmt: skip
    """Tokens [B,X] through all layers: final hidden states [B,G,D] and the new cache.

    attend: (layer, q [B,X,H,E], k, v [B,X,J,E], own keys, own values, window) -> [B,X,H,E], both caches with k and v.
    wanted: of arrays of all tokens, what belongs to those whose hidden states are asked for; of the
    others the last layer gives keys and values alone.
    """
    batch, kinds = len(token_BX), layer_kinds(spec)
    ropes = _ropes(spec, position_BX.reshape(-1))
    # Tokens on one axis: XLA CPU fuses activations into the products of plain matrices.
    x_ND = _embed(spec, params, token_BX.reshape(-1))
    grown = []
    for i, (layer, own) in enumerate(zip(params["layers"], cache, strict=True)):
        rope, window = _of_layer(spec, ropes, kinds[i] == LOCAL)
        normed = _norm(spec, x_ND, layer["attn_norm"])
        k, v = (x.reshape(batch, -1, *x.shape[1:]) for x in _keys_values(spec, layer, normed, rope))
        if i == spec.num_layers - 1:
            x_ND, normed, *rope = (wanted(x) for x in (x_ND, normed, *rope))
        q = _queries(spec, layer, normed, rope)
        attended, *own = attend(i, q.reshape(batch, -1, *q.shape[1:]), k, v, *own, window)
        x_ND = _finish_block(spec, layer, x_ND, attended.reshape(-1, *attended.shape[2:]))
        grown.append(tuple(own))
    return _norm(spec, x_ND, params["final_norm"]).reshape(batch, -1, spec.hidden_size), grown


def _beyond(spec: DecoderSpec, prompt: PromptCache, position: Array) -> Array:
    """As `attention.bias`, of the prompt's slots that have left the window of a token at this position [B,...]."""
    token = jnp.arange(prompt.bias_BS.shape[1]) - 1
    return attention.bias((token < 0) | (token > position[..., None] - spec.window))
