"""What a decoder is: its sizes, and its parameters, each declared once (shape, logical axes, initialisation)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fgrpo_jax.models import delta
from fgrpo_jax.models.lora import Lora, adapted
from fgrpo_jax.types import Array, Param, PyTree, is_param, map_params
from fgrpo_jax.types import num_params as table_size

FULL, LOCAL, DELTA = "full_attention", "sliding_attention", "linear_attention"  # kinds of layers
OF_ATTENTION = ("q", "k", "v", "o", "q_norm", "k_norm", "q_bias", "k_bias", "v_bias")  # weights
OF_DELTA = "delta_"  # what names of weights of the delta rule begin with, in a stack


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
    if name.startswith(OF_DELTA):
        return tuple(i for i, kind in kinds if kind == DELTA)
    return tuple(i for i, kind in kinds if kind != DELTA or name not in OF_ATTENTION)


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
        own = delta.table(delta.Sizes(*spec.delta), len(holders(spec, OF_DELTA)), width)
        table["layers"] |= {OF_DELTA + name: param for name, param in own.items()}
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
