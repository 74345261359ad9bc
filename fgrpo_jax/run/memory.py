"""The memory that a stage needs of every device, against what there is: told before anything compiles.

Parameters, moments and gradients are counted; what a step keeps beside them is the policy's estimate.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from fgrpo_jax.config import ConfigError
from fgrpo_jax.run import host_memory, sharding
from fgrpo_jax.stages import reference_of, stages
from fgrpo_jax.types import PyTree, is_param

if TYPE_CHECKING:
    from fgrpo_jax.run.experiment import Experiment


def of_device(device: jax.Device) -> int | None:
    """Bytes that programs may use of a device: a CPU device has its share of what the process can have of the
    machine's. None where nobody says."""
    if stats := device.memory_stats():
        return stats.get("bytes_limit")
    if device.platform != "cpu" or (here := host_memory.available()) is None:
        return None
    return here // jax.local_device_count()


def state(experiment: Experiment, name: str) -> dict[str, int]:
    """Bytes of a device that a stage's parameters take, trained and frozen ones, and the optimizer's two moments."""
    policy, stage = experiment.policy(name), stages(experiment.config)[name]
    trained = _bytes(experiment, policy.table, policy.dtype)
    frozen = trained * (reference_of(stage) == "start")
    frozen += sum(_bytes(experiment, p.table, p.dtype) for p in map(experiment.policy, stage.frozen_from))
    if policy.base:
        frozen += _bytes(experiment, policy.base.table, policy.base.dtype)
    return {"parameters": trained + frozen, "moments": 2 * trained}


def _bytes(experiment: Experiment, table: PyTree, dtype: str) -> int:
    places = jax.tree.leaves(sharding.param_shardings(experiment.mesh, table))
    shapes = [p.shape for p in jax.tree.leaves(table, is_leaf=is_param)]
    numbers = sum(math.prod(place.shard_shape(shape)) for place, shape in zip(places, shapes, strict=True))
    return numbers * jnp.dtype(dtype).itemsize


def check(experiment: Experiment, name: str) -> None:
    """Raises ConfigError where not even parameters and moments of a stage fit a device."""
    has, need = of_device(experiment.mesh.local_devices[0]), state(experiment, name)
    if has is None or sum(need.values()) <= has:
        return
    footprint = experiment.policy(name).footprint
    own = f"{footprint.lighter_state}, or " if footprint else ""
    raise ConfigError(
        f"{name}: {_told(need)} take {size(sum(need.values()))} of every device, which has {size(has)}: set "
        f"{own}a larger mesh.fsdp (now {experiment.mesh.shape['fsdp']}; it splits them over devices)"
    )


def of_stage(experiment: Experiment, name: str, query: PyTree) -> str:
    """A line for the plan. query: an encoded batch, which gives the sizes."""
    stage, policy, mesh = stages(experiment.config)[name], experiment.policy(name), experiment.mesh
    need = state(experiment, name)
    gradients = need["moments"] // 2 * (2 if stage.microbatches > 1 else 1)
    beside = {"activations": 0.0, "caches": 0.0, "copies": 0.0}
    if policy.footprint:
        queries = stage.batch_queries // sharding.query_shards(mesh)
        beside = policy.footprint.beside(query, queries, stage.group_size, stage.microbatches, mesh.shape["tensor"])
    if stage.source == "logged":
        beside |= {"caches": 0.0, "copies": 0.0}
    # Either a rollout runs or an update.
    total = sum(need.values()) + max(gradients + beside["activations"], beside["caches"] + beside["copies"])
    has = of_device(mesh.local_devices[0])
    of = "" if has is None else f" of {size(has)}"
    told = _told(need | {"gradients": gradients}) + (f"; estimated: {_told(beside)}" if policy.footprint else "")
    line = f"memory of a device: about {size(total)}{of} ({told})"
    if has is not None and total > has:
        lighter = f", {policy.footprint.lighter_step}" if policy.footprint else ""
        line += f"; may not fit: more {name}.microbatches, fewer {name}.batch_queries{lighter}"
    return line


def _told(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {size(count)}" for name, count in parts.items() if count)


def size(count: float) -> str:
    """`1.5 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
