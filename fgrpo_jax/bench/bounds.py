"""What a step on many chips takes at least: closed forms of memory, bytes moved and time, by the mesh.

The counterpart of flops.py for a mesh of data x fsdp x tensor chips. Every quantity is of
one chip. What is compiled is compared with it in plan.py.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh

from fgrpo_jax import shards
from fgrpo_jax.bench import flops
from fgrpo_jax.bench.flops import Shape
from fgrpo_jax.config import ConfigError
from fgrpo_jax.models import decoder
from fgrpo_jax.models.memory import activations, caches, width
from fgrpo_jax.types import is_param


class Chip(NamedTuple):
    """A chip's public figures; hbm_gib: what XLA has of its memory, by its own word. ici_gbytes: GB/s
    received over all its links together.

    wraps: from how many chips on a side the links of a slice close to rings.
    """

    tflops: float
    hbm_gib: float
    hbm_gbytes: float
    ici_gbytes: float
    wraps: int


# cloud.google.com/tpu/docs/v5e and /v5p, read in November 2026; half of the "bidirectional" ICI bandwidth is
# received. wraps: jax-ml.github.io/scaling-book/tpus.
CHIPS = {
    "v5e": Chip(197, 15.75, 819, 200, 16),
    "v5p": Chip(459, 95.74, 2765, 600, 4),
}


class Slice(NamedTuple):
    """A slice of a pod: `name` as given, as v5e:4x4; its chip; how many; GB/s a chip receives at least."""

    name: str
    chip: Chip
    size: int
    ici_gbytes: float


def parse_slice(name: str) -> Slice:
    """Raises ConfigError unless `name` is CHIP:AxB or CHIP:AxBxC of a chip known here.

    A chip at the corner of a slice that does not close to a ring along a side has one link there
    instead of two, and sets the pace of what all take part in.
    """
    kind, _, sizes = name.partition(":")
    if kind not in CHIPS or not all(n.isdigit() and int(n) for n in sizes.split("x")):
        raise ConfigError(
            f"--topology {name}: give a chip of {', '.join(CHIPS)} and its sides, as v5e:4x4 or v5p:4x4x4"
        )
    sides = [int(n) for n in sizes.split("x")]
    links = [2 if n >= CHIPS[kind].wraps else 1 for n in sides]
    share = sum(links) / (2 * len(sides))
    return Slice(name, CHIPS[kind], math.prod(sides), CHIPS[kind].ici_gbytes * share)


# --------------------------------------------------------------------- meshes


class Plan(NamedTuple):
    """How a step is split: chips along the axes of the mesh, parts of the batch in an update."""

    data: int
    fsdp: int
    tensor: int
    microbatches: int

    @property
    def mesh(self) -> AbstractMesh:
        return AbstractMesh(self[:3], shards.AXES)

    def local(self, shape: Shape) -> Shape:
        """The queries of one chip."""
        return shape._replace(batch=shape.batch // (self.data * self.fsdp))


def plans(spec: decoder.DecoderSpec, shape: Shape, chips: int) -> Iterator[Plan]:
    """Every split of the queries and heads without remainder."""
    divisors = [n for n in range(1, chips + 1) if chips % n == 0]
    for tensor in (n for n in divisors if spec.num_kv_heads % n == 0 and spec.mlp_size % n == 0):
        for fsdp in (n for n in divisors if chips // tensor % n == 0):
            data = chips // tensor // fsdp
            if shape.batch % (data * fsdp) == 0:
                rows = shape.batch // (data * fsdp)
                yield from (Plan(data, fsdp, tensor, n) for n in range(1, rows + 1) if rows % n == 0)


# --------------------------------------------------------------------- weights


class _Weights(NamedTuple):
    """Numbers in the weights of one tensor shard: those split over fsdp too, and the others."""

    layers: int
    ends: int  # embedding and head, of which all queries need all
    others: int  # norms

    @property
    def split(self) -> int:
        return self.layers + self.ends


def _weights(spec: decoder.DecoderSpec, mesh: AbstractMesh) -> _Weights:
    table = decoder.param_table(spec)
    sums = {"layers": 0, "ends": 0, "others": 0}
    for p in jax.tree.leaves(table, is_leaf=is_param):
        place = shards.place(mesh, p.axes, p.shape)
        part = "others" if "fsdp" not in place else "layers" if "layers" in p.axes else "ends"
        sums[part] += math.prod(p.shape) // (mesh.shape["tensor"] if "tensor" in place else 1)
    return _Weights(**sums)


# --------------------------------------------------------------------- bytes moved


def traffic(
    spec: decoder.DecoderSpec, shape: Shape, plan: Plan, scatters: int = 1
) -> dict[str, dict[tuple[str, str], float]]:
    """Bytes a chip receives at least, in the rollout and the update, by kind and axes of the mesh.

    Rollout: all weights gathered once. Update: a layer's weights gathered for the forward and for the
    backward pass of every microbatch, but the last layer's, embedding and head once for both; gradients, in
    the type of the parameters, reduce-scattered over fsdp (`scatters` times: update.py, which keeps no whole
    gradient, does it for every microbatch) and then summed over data. Tensor parallelism: the
    results of two products a layer, and of the embedding, summed over the tensor axis, and the
    gradients of the inputs of as many.
    """
    weights, compute, stored = _weights(spec, plan.mesh), width(spec.dtype), width(spec.param_dtype)
    here, layers = plan.local(shape), spec.num_layers
    own = here.batch * here.group * here.length
    both = here.batch * here.prompt + own
    # Of the last layer the prompt needs keys and values only; the head's input is of rollouts.
    prefill = here.batch * here.prompt * (2 * (layers - 1) + 1)
    decode = own * (2 * layers + 1)
    update = both * (4 * (layers - 1) + 2) + own * (3 + 1)
    per_token = spec.hidden_size * compute
    passes = plan.microbatches * (weights.layers * (2 * layers - 1) // layers + weights.ends)
    return {
        "rollout": _received(
            plan,
            ("all-gather", ("fsdp",), weights.split * compute),
            ("all-reduce", ("tensor",), (prefill + decode) * per_token),
        ),
        "update": _received(
            plan,
            ("all-gather", ("fsdp",), passes * compute),
            ("reduce-scatter", ("fsdp",), scatters * weights.split * stored),
            ("all-reduce", ("data",), weights.split // plan.fsdp * stored),
            ("all-reduce", ("data", "fsdp"), weights.others * stored),
            ("all-reduce", ("tensor",), update * per_token),
        ),
    }


def _received(plan: Plan, *exchanges: tuple[str, tuple[str, ...], int]) -> dict[tuple[str, str], float]:
    """Of exchanges (kind, axes, bytes of the whole array), by hlo.Collective.traffic; axes of one chip are free."""
    total: dict[tuple[str, str], float] = defaultdict(float)
    for kind, among, size in exchanges:
        axes = [axis for axis in among if plan.mesh.shape[axis] > 1]
        if axes:
            chips = math.prod(plan.mesh.shape[axis] for axis in axes)
            total[kind, "+".join(axes)] += size * (chips - 1) / chips * (2 if kind == "all-reduce" else 1)
    return dict(total)


# --------------------------------------------------------------------- memory


def memory(spec: decoder.DecoderSpec, shape: Shape, plan: Plan) -> dict[str, float]:
    """About what a chip holds at once, in bytes: the state, and what a rollout or an update needs beside it.

    A compiler needs more; it is there to choose what to compile.
    """
    weights, compute, stored = _weights(spec, plan.mesh), width(spec.dtype), width(spec.param_dtype)
    here = plan.local(shape)
    kept = weights.split / plan.fsdp + weights.others
    part = here._replace(batch=here.batch // plan.microbatches)
    largest = 2 * weights.layers / spec.num_layers + weights.ends
    accumulated = kept * stored * (1 if plan.microbatches == 1 else 2)
    return {
        "state": 3 * kept * stored,
        "rollout": weights.split * compute + caches(spec, *here, plan.tensor),
        "update": accumulated + largest * (compute + stored) + activations(spec, *part, plan.tensor),
    }


# --------------------------------------------------------------------- time


def seconds_on_chip(spec: decoder.DecoderSpec, shape: Shape, plan: Plan, chip: Chip) -> dict[str, tuple[float, float]]:
    """Seconds of each phase by its FLOPs at the chip's peak, and by the bytes its memory must deliver.

    FLOPs: the useful ones, and with spec.remat one more forward pass of an update. Memory, at least:
        prefill reads the weights once, a decoding step weights and caches; an update the
    weights of every pass twice, and parameters, moments and gradient for the optimizer.
    """
    here, chips = plan.local(shape), plan.data * plan.fsdp * plan.tensor
    weights = _weights(spec, plan.mesh)
    read = weights.split * width(spec.dtype)
    kept = (weights.split / plan.fsdp + weights.others) * width(spec.param_dtype)
    phases = {
        "prefill": (flops.prefill_flops(spec, shape), read),
        "decode": (
            flops.completion_flops(spec, shape),
            shape.length * flops.decode_step_bytes(spec, here) / plan.tensor,
        ),
        "update": (
            (4 if spec.remat else 3) * flops.rollout_flops(spec, shape),
            2 * plan.microbatches * read + 7 * kept,
        ),
    }
    return {
        name: (flops / chips / (chip.tflops * 1e12), moved / (chip.hbm_gbytes * 1e9))
        for name, (flops, moved) in phases.items()
    }


class Estimate(NamedTuple):
    """A plan by closed forms: GiB needed, seconds on the chip (the longer of FLOPs and memory, by phase), of links."""

    plan: Plan
    gib: float
    chip_s: float
    ici_s: float


def estimate(spec: decoder.DecoderSpec, shape: Shape, plan: Plan, where: Slice) -> Estimate:
    need = memory(spec, shape, plan)
    moved = sum(sum(kinds.values()) for kinds in traffic(spec, shape, plan, plan.microbatches).values())
    on_chip = sum(max(times) for times in seconds_on_chip(spec, shape, plan, where.chip).values())
    gib = (need["state"] + max(need["rollout"], need["update"])) / 2**30
    return Estimate(plan, gib, on_chip, moved / (where.ici_gbytes * 1e9))


def ranked(spec: decoder.DecoderSpec, shape: Shape, where: Slice) -> list[Estimate]:
    """All plans: those that seem to fit first, by time without overlap; then the others, by memory."""

    def order(found: Estimate) -> tuple[bool, float]:
        fits = found.gib < _SEEMS_TO_FIT * where.chip.hbm_gib
        return not fits, found.chip_s + found.ici_s if fits else found.gib

    return sorted((estimate(spec, shape, plan, where) for plan in plans(spec, shape, where.size)), key=order)


_SEEMS_TO_FIT = 0.75  # of the memory; programs compiled took up to a third more than `memory`
