"""Programs of several devices: each shard of the queries computes alone, and what crosses is written here.

    data    queries
    fsdp    queries and parameters
    tensor  heads, MLP and vocabulary

A rollout, log-probabilities and a gradient are functions of (params, frozen, batch) that treat
queries one by one. `by_query` and `summed` run them on every shard of the queries (data x fsdp,
`shard_map`'s manual axes). Inside, a model asks for the weights it is about to use with `whole`:
that, its transpose (a gradient is reduce-scattered to where its parameter lies) and the sums at
the end are all that shards exchange. A decoding loop ends on each shard by itself. Leaving this to
XLA's partitioner (constraints on activations) would cost a collective in every decoding step, for
the end of the loop, and its choices change with versions.

The tensor axis is XLA's: it splits matrix products by where the weights lie. On one device, and
outside these wrappers, everything here does nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from fgrpo_jax.types import Array, Param, PyTree, map_params

AXES = ("data", "fsdp", "tensor")
QUERY_AXES = ("data", "fsdp")

# Logical axis of a parameter -> mesh axis, None: replicated.
RULES: dict[str, str | None] = {
    "layers": None,
    "member": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "norm": None,
    "channels": None,
    "position": None,
    "rank": None,
}


def place(mesh: Any, axes: Sequence[str], shape: Sequence[int]) -> PartitionSpec:
    """Where a parameter of these logical axes lies on a mesh (or abstract mesh).

    A dimension its mesh axis does not divide is replicated (fewer key-value heads than tensor
    shards), and so is the second one to name a mesh axis. Raises KeyError on an unknown logical
    axis, ValueError when the shape has other axes.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} logical axes {tuple(axes)} for a parameter of shape {tuple(shape)}")
    places: list[str | None] = []
    for axis, size in zip(axes, shape, strict=True):
        where = RULES[axis]
        if where is not None and (size % mesh.shape[where] or where in places):
            where = None
        places.append(where)
    return PartitionSpec(*places)


# --------------------------------------------------------------------- around the shards


def by_query(mesh: Mesh, table: PyTree, function: Callable, beside: dict[str, PyTree] | None = None) -> Callable:
    """`function(params, frozen, *batch)`, run by every query shard on its own queries.

    table: the policy's Params. frozen: a dict of trees of parameters; beside: the Params of those that
    are not like params, by name. batch: pytrees of arrays [B, ...], and random keys, which all shards
    get. The results are arrays [B, ...].
    """
    return _mapped(mesh, table, beside, function, lambda params_at: PartitionSpec(QUERY_AXES))


def summed(mesh: Mesh, table: PyTree, function: Callable, beside: dict[str, PyTree] | None = None) -> Callable:
    """As `by_query`, for `function -> (values, gradient)`, which are summed over all queries.

    The gradient, a tree like params, comes to lie where the parameters do.
    """

    several = [axis for axis in QUERY_AXES if mesh.shape[axis] > 1]

    def add(params: PyTree, frozen: PyTree, *batch: PyTree):
        values, gradient = function(params, frozen, *batch)

        def over_others(p: Param, x: Array) -> Array:
            added = {"fsdp"} & set(place(mesh, p.axes, p.shape))  # by the transpose of `whole`
            return jax.lax.psum(x, [axis for axis in several if axis not in added])

        return jax.lax.psum(values, several), map_params(over_others, table, gradient)

    own = add if mesh.size > 1 else function
    return _mapped(mesh, table, beside, own, lambda params_at: (PartitionSpec(), params_at))


def _mapped(
    mesh: Mesh, table: PyTree, beside: dict[str, PyTree] | None, function: Callable, out_specs: Callable
) -> Callable:
    if mesh.size == 1:
        return function

    def manual(table: PyTree) -> PyTree:
        return map_params(lambda p: _manual(place(mesh, p.axes, p.shape)), table)

    params_at, beside_at = manual(table), {name: manual(other) for name, other in (beside or {}).items()}
    # An axis of one is ours too: kernels can only be where nothing is left for XLA to split.
    ours = {*QUERY_AXES, *(axis for axis in AXES if mesh.shape[axis] == 1)}

    def place_of(name: str, tree: PyTree) -> PyTree:
        return beside_at.get(name, params_at) if jax.tree.leaves(tree) else tree  # no parameters lie nowhere

    @functools.wraps(function)
    def mapped(params: PyTree, frozen: PyTree, *batch: PyTree):
        rows = jax.tree.map(lambda x: PartitionSpec() if _is_key(x) else PartitionSpec(QUERY_AXES), batch)
        return jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(params_at, {name: place_of(name, tree) for name, tree in frozen.items()}, *rows),
            out_specs=out_specs(params_at),
            axis_names=ours,
            check_vma=False,  # see over_tensor
        )(params, frozen, *batch)

    return mapped


def _is_key(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _manual(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*(axis if axis in QUERY_AXES else None for axis in spec))


# --------------------------------------------------------------------- inside a shard


def _is_mapped() -> bool:
    return "fsdp" in jax.sharding.get_abstract_mesh().manual_axes


def whole(table: PyTree, params: PyTree, dtype: Any) -> PyTree:
    """Parameters in the compute type, gathered from the shards that hold parts of them (FSDP).

    table: their Params, or those of stacked layers for one layer's parameters. What crosses is of
    type `dtype`; gradients are summed in the parameters' own type and end where these lie.
    """
    if not _is_mapped():
        return jax.tree.map(lambda x: x.astype(dtype), params)
    mesh = jax.sharding.get_abstract_mesh()

    def one(p: Param, x: Array) -> Array:
        beyond = len(p.shape) - x.ndim  # the axis of layers
        spec = place(mesh, p.axes[beyond:], p.shape[beyond:])
        if "fsdp" not in spec or mesh.shape["fsdp"] == 1:
            return x.astype(dtype)
        return _gather(tuple(spec), jnp.dtype(dtype), x)

    return map_params(one, table, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(spec: tuple[str | None, ...], dtype: Any, x: Array) -> Array:
    axis = spec.index("fsdp")
    return _beside_tensor(spec, lambda x: jax.lax.all_gather(x.astype(dtype), "fsdp", axis=axis, tiled=True), x)


def _gather_fwd(spec, dtype, x):
    return _gather(spec, dtype, x), jnp.zeros((0,), x.dtype)


def _gather_bwd(spec, dtype, like, grad):
    axis = spec.index("fsdp")

    def scatter(grad: Array) -> Array:
        return jax.lax.psum_scatter(grad.astype(like.dtype), "fsdp", scatter_dimension=axis, tiled=True)

    return (_beside_tensor(spec, scatter, grad),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def _beside_tensor(spec: tuple[str | None, ...], function: Callable, x: Array) -> Array:
    """`function`, by each tensor shard on its part: XLA would gather those first."""
    if jax.sharding.get_abstract_mesh().shape["tensor"] == 1:
        return function(x)
    parts = PartitionSpec(*(axis if axis == "tensor" else None for axis in spec))
    return over_tensor(function, parts, parts)(x)


def over_tensor(function: Callable, places: PyTree, results: PyTree) -> Callable:
    """`function` of what each device of the tensor axis holds; where that is, as PartitionSpecs."""
    # Kernels do not tell over which mesh axes their results vary, so that cannot be checked.
    return jax.shard_map(function, in_specs=places, out_specs=results, axis_names={"tensor"}, check_vma=False)


def tensor_parts(size: int) -> int:
    """Into how many equal parts the tensor axis splits an axis of this size, inside a shard; 1: it does not."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = mesh.shape["tensor"] if "tensor" in mesh.auto_axes else 1
    return 1 if size % parts else parts


def uniform(key: Array, shape: tuple[int, ...], axis: int) -> Array:
    """Uniform numbers in [0, 1), this shard's of the ones drawn for all queries.

    shape: of this shard; `axis` is that of the queries. So draws do not depend on the mesh. Every
    shard draws them all and takes its own: two numbers a rollout, where a step reads the weights.
    """
    if not _is_mapped():
        return jax.random.uniform(key, shape)
    rows, shards = shape[axis], jax.lax.axis_size(QUERY_AXES)
    drawn = jax.random.uniform(key, (*shape[:axis], rows * shards, *shape[axis + 1 :]))
    return jax.lax.dynamic_slice_in_dim(drawn, jax.lax.axis_index(QUERY_AXES) * rows, rows, axis)
