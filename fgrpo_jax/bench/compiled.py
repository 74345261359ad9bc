"""Programs of a step compiled for TPUs that are not here: the memory they keep and the bytes they exchange.

XLA's TPU compiler is in libtpu and needs no TPU. What a program keeps in memory is the compiler's word;
what chips exchange is counted in its text (hlo.py) and set beside what they must (bounds.py).
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import jit
from jax.sharding import Mesh

from fgrpo_jax import shards
from fgrpo_jax.algorithm.update import state_shardings
from fgrpo_jax.bench import bounds, hlo, measure
from fgrpo_jax.bench.bounds import Plan, Slice
from fgrpo_jax.bench.flops import Shape
from fgrpo_jax.config import ConfigError
from fgrpo_jax.models import decoder
from fgrpo_jax.run.sharding import make_mesh, param_shardings, query_sharding, replicated
from fgrpo_jax.types import PyTree

FAR = 1.3  # times what is least: bytes beyond are explained
Moved = dict[tuple[str, str], float]  # bytes a chip receives, by kind of collective and axes of the mesh

# libtpu would look for the TPU of this machine, and for another program that uses it.
_NO_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
}

# --------------------------------------------------------------------- compiling


def devices_of(name: str) -> Sequence[Any]:
    """Descriptions of the chips of a slice, which programs can be compiled for.

    Raises ConfigError without libtpu, and for a slice it does not know.
    """
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    os.environ.update(_NO_TPU)
    try:
        return topologies.get_topology_desc(name, platform="tpu").devices
    except Exception as error:  # of the plug-in's own kinds
        raise ConfigError(
            f"--topology {name}: {str(error).splitlines()[0]} (the compiler is in libtpu: pip install 'fgrpo_jax[tpu]')"
        ) from None


def lowered(spec: decoder.DecoderSpec, shape: Shape, mesh: Mesh, microbatches: int) -> dict[str, jax.stages.Lowered]:
    """Rollout and update of a workload on a mesh, whose devices need not be there."""
    step = measure.functions(spec, shape, mesh, microbatches)
    elsewhere, places = replicated(mesh), param_shardings(mesh, decoder.param_table(spec))
    state_at = state_shardings(step.optimizer, decoder.shapes(spec), places, elsewhere)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = _at(state_at, jax.eval_shape(step.start, key))
    batch = jax.eval_shape(lambda: measure.make_batch(spec, shape, measure.make_query(spec, shape, shape.batch)))
    batch = _at(jax.tree.map(lambda _: query_sharding(mesh), batch), batch)
    update = jit(step.update, donate_argnums=0, out_shardings=(state_at, elsewhere))
    return {
        "rollout": jit(step.rollout).lower(state.params, batch.query, _at(elsewhere, key)),
        "update": update.lower(state, batch),
    }


def _at(places: PyTree, arrays: PyTree) -> PyTree:
    return jax.tree.map(lambda place, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), places, arrays)


@dataclasses.dataclass(frozen=True)
class Program:
    """What a compiled program takes of one chip, in bytes.

    resident: what lies there besides, the optimizer's state in a rollout. moved: received, by kind and axes.
    far: the collectives over axes that carry more than FAR times the least, largest first, and what
    each moves. refused: the compiler's word where it does not fit; then there is nothing else.
    """

    compile_s: float
    resident: int
    arguments: int = 0
    temporaries: int = 0
    outputs: int = 0
    moved: Moved = dataclasses.field(default_factory=dict)
    far: tuple[tuple[hlo.Collective, float], ...] = ()
    refused: str = ""

    @property
    def memory(self) -> int:
        return self.resident + self.arguments + self.temporaries + self.outputs


def compiled(program: jax.stages.Lowered, plan: Plan, least: Moved, resident: int) -> Program:
    begin = time.perf_counter()
    try:
        made = program.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
        return Program(time.perf_counter() - begin, resident, refused=said)
    seconds, size = time.perf_counter() - begin, made.memory_analysis()
    return Program(
        seconds,
        resident,
        size.argument_size_in_bytes,
        size.temp_size_in_bytes + size.generated_code_size_in_bytes,
        size.output_size_in_bytes - size.alias_size_in_bytes,
        *exchanged(hlo.collectives(made.as_text()), plan, least),
    )


def exchanged(
    found: Sequence[hlo.Collective], plan: Plan, least: Moved
) -> tuple[Moved, tuple[tuple[hlo.Collective, float], ...]]:
    """Bytes by kind and axes, and what runs over axes that carry far more than the least."""
    moved, by_axes, least_by_axes = defaultdict(float), defaultdict(list), defaultdict(float)
    for (_, axes), bytes_moved in least.items():
        least_by_axes[axes] += bytes_moved
    for one in found:
        if one.times is None:
            raise ValueError(f"{one.kind} {one.name} runs in a loop of unknown length: {one.op_name}")
        axes, bytes_moved = axes_of(one.group, plan), one.traffic * one.times
        moved[one.kind, axes] += bytes_moved
        by_axes[axes].append((one, bytes_moved))
    far = [
        pair
        for axes, pairs in by_axes.items()
        if sum(bytes_moved for _, bytes_moved in pairs) > FAR * least_by_axes[axes]
        for pair in pairs
    ]
    return dict(moved), tuple(sorted(far, key=lambda pair: -pair[1]))


def axes_of(group: Sequence[int], plan: Plan) -> str:
    """The axes of the mesh that devices of a group differ in, as data+fsdp."""
    places = np.unravel_index(np.array(group), plan[:3])
    return "+".join(axis for axis, at in zip(shards.AXES, places, strict=True) if len(set(at)) > 1)


# --------------------------------------------------------------------- a plan


@dataclasses.dataclass(frozen=True)
class Report:
    """A plan compiled: its programs by name, what they move at least, and seconds of the chip by phase."""

    plan: Plan
    programs: dict[str, Program]
    least: dict[str, Moved]
    phases: dict[str, tuple[float, float]]
    where: Slice

    @property
    def refused(self) -> str:
        """Why it does not fit, or nothing."""
        for name, program in self.programs.items():
            if program.refused:
                return f"{name}: {program.refused}"
            if program.memory > self.where.chip.hbm_gib * 2**30:
                return f"{name}: {program.memory / 2**30:.1f} GiB with the optimizer's state"
        return ""

    @property
    def chip_s(self) -> float:
        return sum(max(times) for times in self.phases.values())

    @property
    def ici_s(self) -> float:
        moved = sum(sum(program.moved.values()) for program in self.programs.values())
        return moved / (self.where.ici_gbytes * 1e9)


def report(spec: decoder.DecoderSpec, shape: Shape, plan: Plan, where: Slice, devices: Sequence[Any]) -> Report:
    """Compiles both programs of a plan."""
    least = bounds.traffic(spec, shape, plan)
    state = bounds.memory(spec, shape, plan)["state"]
    beside = {"rollout": int(state * 2 / 3), "update": 0}
    programs = lowered(spec, shape, make_mesh(*plan[:3], devices=devices), plan.microbatches)
    made = {name: compiled(program, plan, least[name], beside[name]) for name, program in programs.items()}
    return Report(plan, made, least, bounds.seconds_on_chip(spec, shape, plan, where.chip), where)
