"""The device mesh, and what lies where on it. What happens inside a program: shards.py.

Queries are split over data x fsdp and groups are never split, so group statistics need no
collective. The same calls serve one CPU and a pod of many processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fgrpo_jax.config import ConfigError
from fgrpo_jax.shards import AXES, QUERY_AXES, place
from fgrpo_jax.types import Array, PyTree, map_params

# --------------------------------------------------------------------- the mesh


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices (of all processes); one size may be -1, what remains.

    Raises ConfigError when the sizes do not multiply up to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes, count = [data, fsdp, tensor], len(devices)
    asked = ", ".join(f"mesh.{name}={size}" for name, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ConfigError(f"{asked}: sizes must be positive, and at most one may be -1 (what remains)")
    known = int(np.prod([size for size in sizes if size != -1]))
    if count % known:
        raise ConfigError(f"{asked}: {known} does not divide the {count} device(s); change a size")
    sizes = [count // known if size == -1 else size for size in sizes]
    if (used := int(np.prod(sizes))) != count:
        raise ConfigError(f"{asked} uses {used} of {count} devices: set one size to -1, or enlarge one")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def query_shards(mesh: Mesh) -> int:
    """Into how many parts the query axis is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_divisible(mesh: Mesh, batch_queries: int, microbatches: int, where: str) -> None:
    """Raises ConfigError unless every microbatch splits evenly; `where`: the stage, as "rl"."""
    shards = query_shards(mesh)
    if batch_queries % (unit := shards * microbatches):
        lower = batch_queries // unit * unit
        near = f"{lower} or {lower + unit}" if lower else f"{unit}"
        raise ConfigError(
            f"{where}.batch_queries={batch_queries} does not split into {where}.microbatches={microbatches} "
            f"x {shards} query shards (mesh.data={mesh.shape['data']} x mesh.fsdp={mesh.shape['fsdp']}): "
            f"set {where}.batch_queries to {near}, or change microbatches or the mesh"
        )


# --------------------------------------------------------------------- what lies where


def param_shardings(mesh: Mesh, table: PyTree) -> PyTree:
    """A NamedSharding for every Param of a table, by `shards.place`."""
    return map_params(lambda p: NamedSharding(mesh, place(mesh, p.axes, p.shape)), table)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def query_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis B over data x fsdp, everything else replicated."""
    return NamedSharding(mesh, PartitionSpec(QUERY_AXES))


def local_rows(mesh: Mesh, global_batch: int) -> np.ndarray:
    """Rows of the global batch this process must supply, ascending.

    Read off the mesh, not off the process index: where the tensor axis spans processes, they
    hold the same rows; where the mesh reorders devices, a process's rows are not its turn's.
    """
    slices = query_sharding(mesh).addressable_devices_indices_map((global_batch,)).values()
    return np.unique(np.concatenate([np.arange(global_batch)[s] for s in slices]))


def shard_batch(mesh: Mesh, host: PyTree, global_batch: int) -> PyTree:
    """Global arrays, split by query, from each process's own rows (`local_rows`, in that order).

    host: a pytree of numpy arrays `[B of this process, ...]`; other dimensions must be equal
    on all hosts, or they would compile different programs and hang.
    Raises ValueError when a leading dimension is not this process's share.
    """
    sharding, rows = query_sharding(mesh), len(local_rows(mesh, global_batch))

    def place(x: np.ndarray) -> Array:
        if x.shape[0] != rows:
            raise ValueError(f"{x.shape[0]} rows given, this process holds {rows} of {global_batch}")
        return jax.make_array_from_process_local_data(sharding, x, (global_batch, *x.shape[1:]))

    return jax.tree.map(place, host)
