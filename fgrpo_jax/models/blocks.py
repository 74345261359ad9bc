"""What the layers of a decoder compute, whoever runs them: training (decoder.py) or decoding (decoding.py)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fgrpo_jax import shards
from fgrpo_jax.models import attention, delta
from fgrpo_jax.models.layers import ACTIVATIONS, apply_rope, linear, rms_norm, rope_tables, take
from fgrpo_jax.models.parameters import (
    DELTA,
    FULL,
    LOCAL,
    OF_ATTENTION,
    OF_DELTA,
    DecoderSpec,
    holders,
    layer_kinds,
    param_table,
)
from fgrpo_jax.types import Array, PyTree

KEPT = "result of a projection"
_FAR = 2**30  # a window that leaves out nothing


def embed(spec: DecoderSpec, params: PyTree, tokens: Array) -> Array:
    x = take(params["embed"], tokens)
    return x * jnp.asarray(spec.hidden_size**0.5, x.dtype) if spec.scale_embeddings else x


def norm(spec: DecoderSpec, x: Array, scale: Array) -> Array:
    return rms_norm(x, scale.astype(jnp.float32) + 1 if spec.norm_plus_one else scale, spec.norm_eps)


def ropes(spec: DecoderSpec, positions: Array) -> dict[str, tuple[Array, Array]]:
    """Rotary tables of each kind of layer that attends."""
    given = {FULL: (spec.rope_theta, spec.rope_scaling), LOCAL: (spec.local_rope_theta,)}
    rotated = int(spec.head_dim * spec.rotary_fraction)
    return {kind: rope_tables(positions, rotated, *given[kind]) for kind in given if kind in layer_kinds(spec)}


def of_layer(spec: DecoderSpec, ropes: PyTree, kind: str, is_local: Array | None) -> tuple[PyTree, Array | int | None]:
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
    return norm(spec, x, layer[name]) if spec.qk_norm else x


def queries(spec: DecoderSpec, layer: PyTree, normed: Array, rope) -> tuple[Array, Array | None]:
    """Queries, and their gates: the second half of what a head projects to."""
    q, gate = _project(spec, layer, "q", normed), None
    if spec.attention_gate:
        q, gate = jnp.split(q, 2, -1)
    q = apply_rope(_head_norm(spec, layer, "q_norm", q), rope)
    return q if spec.query_scalar is None else q * (spec.head_dim / spec.query_scalar) ** 0.5, gate


def gated(attended: Array, gate: Array | None) -> Array:
    return attended if gate is None else attended * jax.nn.sigmoid(gate).reshape(attended.shape)


def keys_values(spec: DecoderSpec, layer: PyTree, normed: Array, rope) -> tuple[Array, Array]:
    k, v = _project(spec, layer, "k", normed), _project(spec, layer, "v", normed)
    return apply_rope(_head_norm(spec, layer, "k_norm", k), rope), v


def finish_block(spec: DecoderSpec, layer: PyTree, x: Array, attended: Array) -> Array:
    x = checkpoint_name(x + _added(spec, layer, "attn_out_norm", linear(attended, layer["o"], axes_in=2)), KEPT)
    normed = norm(spec, x, layer["mlp_norm"])
    gate = checkpoint_name(linear(normed, layer["gate"]), KEPT)
    up = checkpoint_name(linear(normed, layer["up"]), KEPT)
    return x + _added(spec, layer, "mlp_out_norm", linear(ACTIVATIONS[spec.activation](gate) * up, layer["down"]))


def _added(spec: DecoderSpec, layer: PyTree, name: str, x: Array) -> Array:
    """What attention or MLP adds."""
    return norm(spec, checkpoint_name(x, KEPT), layer[name]) if spec.post_norms else x


def remat(spec: DecoderSpec, fn):
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
        return {name.removeprefix(OF_DELTA): name for name in stack if name not in OF_ATTENTION}
    return {name: name for name in stack if not name.startswith(OF_DELTA)}


def layer_table(spec: DecoderSpec, kind: str) -> PyTree:
    stack = param_table(spec)["layers"]
    return {name: stack[stored] for name, stored in _of_kind(stack, kind).items()}


def weights_of(spec: DecoderSpec, stack: PyTree, layer: int) -> PyTree:
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


def split(spec: DecoderSpec, stack: PyTree) -> _Layers:
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
    rest = [(kinds[i], weights_of(spec, stack, i)) for i in range(size * times, spec.num_layers)]
    return _Layers((places, flags), kinds[: len(places)], rest)
