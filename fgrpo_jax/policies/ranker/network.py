"""What the three networks of the ranker share: sizes, tables of parameters, attention, the trunk.

A query is encoded once. Its history is read by self-attention; what is to be scored (the pool, the lists
of a group) attends to the history in every layer and, by a mask, to itself: history tokens never see what
is scored, so one pass over them serves all lists. Axes beyond those of types: H item of the history
(also: head, last but one of queries, keys and values), S what is attended to.

    generator   the pool attends to all of itself; then layers over the steps of a list (generator.py)
    point-wise  every candidate sees the history and itself: scores do not depend on other candidates
    evaluator   the items of a list, with their positions, see each other in both directions

Of one RankerSpec all three have as many layers, so they differ by a few vectors in their number of
parameters. Blocks: pre-norm, RMS norm, SwiGLU, no biases. Norms and softmax run in float32.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fgrpo_jax import shards
from fgrpo_jax.models import layers
from fgrpo_jax.models.layers import linear, rms_norm
from fgrpo_jax.policies.ranker.query import RankerQuery
from fgrpo_jax.types import Array, Param, PyTree, is_param

# Added to the scores of what is not seen. Finite: where a query sees nothing (a history of no items) its
# result is of no use, but not nan.
_UNSEEN = -1e30


class RankerSpec(NamedTuple):
    """Sizes and numerics; hashable, so it is a static argument of jit.

    num_items: of the catalogue; item 0 is padding.
    history_max: items of the history that are read, the last ones.
    list_length: items of a list, L.
    num_layers: of the trunk. list_layers: of the generator, over the steps of a list; the other networks
        have as many more in the trunk.
    sees_retrieval: whether the first stage's score is a feature of a candidate.
    causal_history: an item of the history sees the ones before it only.
    two_phase: a list is written twice, as a slate and then in the order of the ranking (T = 2 L).
    remat: layers keep their input alone for the backward pass.
    """

    num_items: int
    history_max: int
    list_length: int
    hidden_size: int = 128
    num_layers: int = 2
    list_layers: int = 1
    num_heads: int = 4
    mlp_size: int = 256
    sees_retrieval: bool = True
    causal_history: bool = False
    two_phase: bool = False
    norm_eps: float = 1e-6
    init_std: float = 0.02
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: bool = False

    @property
    def steps(self) -> int:
        """T: the actions of a list."""
        return self.list_length * (2 if self.two_phase else 1)


# --------------------------------------------------------------------- tables of parameters


def _vector(spec: RankerSpec) -> Param:
    return Param((spec.hidden_size,), ("embed",), "normal", decay=False)


def _scale(spec: RankerSpec) -> Param:
    return Param((spec.hidden_size,), ("norm",), "ones", decay=False)


def _positions(spec: RankerSpec, size: int) -> Param:
    return Param((size, spec.hidden_size), ("position", "embed"), "normal", decay=False)


def _layers(spec: RankerSpec, count: int) -> PyTree:
    width, heads, mlp = spec.hidden_size, spec.num_heads, spec.mlp_size
    per_head = width // heads
    to_heads = Param((count, width, heads, per_head), ("layers", "embed", "heads", "head_dim"), "normal", decay=True)
    from_heads = Param((count, heads, per_head, width), ("layers", "heads", "head_dim", "embed"), "normal", decay=True)
    to_mlp = Param((count, width, mlp), ("layers", "embed", "mlp"), "normal", decay=True)
    norm = Param((count, width), ("layers", "norm"), "ones", decay=False)
    return {
        "attn_norm": norm, "q": to_heads, "k": to_heads, "v": to_heads, "o": from_heads,
        "mlp_norm": norm, "gate": to_mlp, "up": to_mlp,
        "down": Param((count, mlp, width), ("layers", "mlp", "embed"), "normal", decay=True),
    }  # fmt: skip


def _trunk(spec: RankerSpec, num_layers: int) -> PyTree:
    if spec.hidden_size % spec.num_heads:
        raise ValueError(f"hidden_size={spec.hidden_size} is not divided by num_heads={spec.num_heads}")
    table = {
        "items": Param((spec.num_items + 1, spec.hidden_size), ("vocab", "embed"), "normal", decay=True),
        "recency": _positions(spec, spec.history_max),
        "candidate": _vector(spec),
        "popularity": _vector(spec),
        "match": _scale(spec),
        "layers": _layers(spec, num_layers),
        "norm": _scale(spec),
    }
    return table | ({"retrieval": _vector(spec)} if spec.sees_retrieval else {})


def generator_table(spec: RankerSpec) -> PyTree:
    """Every parameter of the generator, once. Raises ValueError where heads do not divide the width."""
    return _trunk(spec, spec.num_layers) | {
        "start": _vector(spec),
        "step": _positions(spec, spec.steps),
        "list_layers": _layers(spec, spec.list_layers),
        "list_norm": _scale(spec),
    }


def pointwise_table(spec: RankerSpec) -> PyTree:
    """Of the point-wise network."""
    bias = Param((1,), ("norm",), "normal", decay=False)
    return _trunk(spec, spec.num_layers + spec.list_layers) | {"score": _vector(spec), "bias": bias}


def evaluator_table(spec: RankerSpec) -> PyTree:
    """Of the list-wise reward model."""
    return pointwise_table(spec) | {"position": _positions(spec, spec.list_length)}


def init(spec: RankerSpec, table: PyTree, key: Array) -> PyTree:
    """Random weights: normal of `init_std`, norms at one; a key per parameter."""
    leaves, treedef = jax.tree.flatten(table, is_leaf=is_param)
    made = []
    for i, p in enumerate(leaves):
        if p.init == "ones":
            made.append(jnp.ones(p.shape, spec.param_dtype))
        else:
            normal = jax.random.normal(jax.random.fold_in(key, i), p.shape, jnp.float32)
            made.append((spec.init_std * normal).astype(spec.param_dtype))
    return jax.tree.unflatten(treedef, made)


def whole(spec: RankerSpec, table: PyTree, params: PyTree) -> PyTree:
    """Weights in the compute type, gathered from the devices that hold parts of them."""
    return shards.whole(table, params, spec.dtype)


# --------------------------------------------------------------------- layers


class Seen(NamedTuple):
    """Keys and values, and which of them are seen.

    k, v: [B,S,H,E] of a query, shared by its lists, or [B,G,S,H,E] of every list.
    mask: bool, broadcast to [B,G,T,S].
    """

    k: Array
    v: Array
    mask: Array


def attend(q_BGTHE: Array, *seen: Seen) -> Array:
    """One softmax over all that is seen: [B,G,T,H,E].

    The sum is divided by at the end, so no weights are put together or taken apart, forward or backward.
    """
    scaled = q_BGTHE / q_BGTHE.shape[-1] ** 0.5
    names = ["bgshe" if x.k.ndim == 5 else "bshe" for x in seen]
    scores = [
        jnp.einsum(f"bgthe,{name}->bhgts", scaled, x.k, preferred_element_type=jnp.float32)
        + jnp.where(x.mask, 0.0, _UNSEEN)[:, None]
        for name, x in zip(names, seen, strict=True)
    ]
    peak = jax.lax.stop_gradient(functools.reduce(jnp.maximum, [x.max(-1, keepdims=True) for x in scores]))
    total, result = 0.0, 0.0
    for name, x, score in zip(names, seen, scores, strict=True):
        weight = jnp.exp(score - peak)
        total += weight.sum(-1)
        result += jnp.einsum(f"bhgts,{name}->bhgte", weight.astype(x.v.dtype), x.v, preferred_element_type=jnp.float32)
    return jnp.moveaxis((result / total[..., None]).astype(q_BGTHE.dtype), 1, 3)


def unstack(layers: PyTree) -> list[PyTree]:
    """A list of layers. Loops over them are unrolled: there are few, and nobody reads the last one's history."""
    return [jax.tree.map(lambda x, i=i: x[i], layers) for i in range(layers["attn_norm"].shape[0])]


def project(spec: RankerSpec, layer: PyTree, x: Array, names: str = "qkv") -> list[Array]:
    """Queries, keys and values, or those of them that are named, [..., H,E] each."""
    normed = rms_norm(x, layer["attn_norm"], spec.norm_eps)
    return [linear(normed, layer[name]) for name in names]


def finish_layer(spec: RankerSpec, layer: PyTree, x: Array, attended: Array) -> Array:
    x = x + linear(attended, layer["o"], axes_in=2)
    normed = rms_norm(x, layer["mlp_norm"], spec.norm_eps)
    return x + linear(jax.nn.silu(linear(normed, layer["gate"])) * linear(normed, layer["up"]), layer["down"])


def rematerialized(spec: RankerSpec, function):
    return jax.checkpoint(function) if spec.remat else function


# --------------------------------------------------------------------- the trunk


def present(query: RankerQuery) -> Array:
    """Which candidates there are, [B,C] bool."""
    return jnp.arange(query.candidates.shape[1]) < query.n_candidates[:, None]


def take(x_BCD: Array, index_BGT: Array) -> Array:
    """What belongs to the candidates of lists, [B,G,T,D]; the first candidate's where an index is -1."""
    return jax.vmap(layers.take)(x_BCD, jnp.maximum(index_BGT, 0))


def candidates(spec: RankerSpec, params: PyTree, query: RankerQuery) -> Array:
    """Features of every candidate, [B,C,D]. `params` comes from `whole`, here and below.

    Among them how it matches the history: the product, number by number, of its embedding and the mean
    embedding of the history, each normed. Attention learns this comparison too, but slowly: without it
    the networks read no history in their first thousand steps.
    """
    items_BCD = layers.take(params["items"], query.candidates)
    there_BH = jnp.arange(query.history.shape[1]) < query.history_len[:, None]
    history_BHD = jnp.where(there_BH[..., None], layers.take(params["items"], query.history), 0.0)
    mean_BD = history_BHD.sum(1) / jnp.maximum(query.history_len, 1)[:, None].astype(items_BCD.dtype)
    normed_BD = rms_norm(mean_BD, params["match"], spec.norm_eps)
    x_BCD = items_BCD + params["candidate"]
    x_BCD += rms_norm(items_BCD, jnp.ones_like(params["match"]), spec.norm_eps) * normed_BD[:, None]
    x_BCD += query.popularity[..., None].astype(x_BCD.dtype) * params["popularity"]
    if spec.sees_retrieval:
        x_BCD += query.retrieval[..., None].astype(x_BCD.dtype) * params["retrieval"]
    return x_BCD


def beside_history(spec: RankerSpec, params: PyTree, query: RankerQuery, x_BGTD: Array, mask: Array) -> Array:
    """The trunk: what is to be scored, after all layers and the last norm, [B,G,T,D].

    mask: which tokens of its own row [B,G] a token sees, bool, broadcast to [B,G,T,T].
    """
    place = jnp.arange(query.history.shape[1])
    recency_BH = jnp.clip(query.history_len[:, None] - 1 - place, 0, spec.history_max - 1)
    history_BHD = layers.take(params["items"], query.history) + layers.take(params["recency"], recency_BH)
    history_B1HD = history_BHD[:, None]
    there = (place < query.history_len[:, None])[:, None, None]  # [B,1,1,H]
    among = there & (place <= place[:, None]) if spec.causal_history else there

    def block(history: Array, x: Array, layer: PyTree) -> tuple[Array, Array]:
        q_past, k_past, v_past = project(spec, layer, history)
        q, k, v = project(spec, layer, x)
        attended = attend(q, Seen(k_past[:, 0], v_past[:, 0], there), Seen(k, v, mask))
        attended_past = attend(q_past, Seen(k_past, v_past, among))
        return finish_layer(spec, layer, history, attended_past), finish_layer(spec, layer, x, attended)

    for layer in unstack(params["layers"]):
        history_B1HD, x_BGTD = rematerialized(spec, block)(history_B1HD, x_BGTD, layer)
    return rms_norm(x_BGTD, params["norm"], spec.norm_eps)
