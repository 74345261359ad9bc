"""Which mesh to choose before renting it: a step compiled for TPUs that are not here, beside what it takes at least.

    python -m fgrpo_jax.bench plan --topology v5e:8x8 --workload qwen3-4b [--mesh DATA,FSDP,TENSOR ...]
                              [--microbatches N] [--compile N] [--remat] [--layers N] [--batch N] [--prompt N]
                              [--group N] [--length N] [--json FILE]

Meshes are ranked by closed forms (bounds.py), and the best are compiled, rollout and update, by
XLA's TPU compiler, which libtpu holds and which needs no TPU (pip install libtpu, of the version that
jax[tpu] asks for). What a program keeps in memory is the compiler's word; what chips exchange is counted
in it (hlo.py). Times are rooflines: no chip ran anything.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from fgrpo_jax import shards
from fgrpo_jax.bench import bounds, compiled, measure
from fgrpo_jax.bench.bounds import Estimate, Plan, Slice
from fgrpo_jax.bench.compiled import Report
from fgrpo_jax.bench.flops import Shape
from fgrpo_jax.config import ConfigError
from fgrpo_jax.models import decoder

QUERIES = 64  # of a step, by default
_TINY = 5e5  # bytes; rows of less are left out

# --------------------------------------------------------------------- reported


def described(plan: Plan) -> str:
    parts = f", {plan.microbatches} microbatches" if plan.microbatches > 1 else ""
    return f"data {plan.data} x fsdp {plan.fsdp} x tensor {plan.tensor}{parts}"


def table(found: Report) -> str:
    """The report of one plan, for people."""
    programs, names = found.programs, ("rollout", "update")
    took = " + ".join(f"{programs[name].compile_s:.0f}" for name in names)
    lines = [f"{described(found.plan)} (compiled in {took} s)", f"{'':34}{'rollout':>16}{'update':>16}"]

    def row(label: str, cells: Sequence[str]) -> None:
        lines.append(f"  {label:32}" + "".join(f"{cell:>16}" for cell in cells))

    if found.refused:
        return "\n".join([lines[0], f"  does not fit: {found.refused}"])
    for label in ("arguments", "resident", "temporaries", "outputs"):
        row(f"GiB {label}", [f"{dataclasses.asdict(programs[name])[label] / 2**30:.2f}" for name in names])
    row(f"GiB in all, of {found.where.chip.hbm_gib}", [f"{programs[name].memory / 2**30:.2f}" for name in names])
    both = {name: (programs[name].moved, found.least[name]) for name in names}
    for key in sorted({key for moved, least in both.values() for key in (*moved, *least)}):
        cells = [(moved.get(key, 0), least.get(key, 0)) for moved, least in both.values()]
        if max(*cells[0], *cells[1]) > _TINY:
            row("MB " + " ".join(key), [_beside(*cell) for cell in cells])
    row("MB in all (at least)", [_beside(sum(m.values()), sum(n.values())) for m, n in both.values()])
    row("ms of links", [f"{sum(programs[name].moved.values()) / found.where.ici_gbytes / 1e6:.0f}" for name in names])
    for name, (by_flops, by_memory) in found.phases.items():
        lines.append(f"  ms of {name:8} {1e3 * by_flops:6.0f} by FLOPs, {1e3 * by_memory:6.0f} by memory")
    lines.append(
        f"  a step: {1e3 * found.chip_s:.0f} ms on the chip + {1e3 * found.ici_s:.0f} ms of links, nothing overlapping"
    )
    for name in names:
        for one, bytes_moved in programs[name].far[:3]:
            if bytes_moved > 0.02 * sum(programs[name].moved.values()):
                times = f"{one.times} x " if one.times != 1 else ""
                lines.append(f"  more than it must: {name} {one.kind} {times}{one.shape[:60]} from {one.op_name[-90:]}")
    return "\n".join(lines)


def _beside(moved: float, least: float) -> str:
    return f"{moved / 1e6:,.0f} ({least / 1e6:,.0f})"


# --------------------------------------------------------------------- command line


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fgrpo_jax.bench plan", description=__doc__.splitlines()[0])
    parser.add_argument("--topology", required=True, metavar="CHIP:AxB", help="as v5e:4x4, v5e:8x8, v5p:4x4x4")
    parser.add_argument("--workload", choices=measure.WORKLOADS, default="qwen3-0.6b", help="sizes")
    measure.add_sizes(parser, batch=QUERIES)
    parser.add_argument("--mesh", action="append", metavar="DATA,FSDP,TENSOR", help="compile this one; may be repeated")
    parser.add_argument("--microbatches", type=measure.positive, metavar="N", help="of an update; default: the best")
    parser.add_argument("--compile", type=int, default=2, metavar="N", help="how many of the best to compile (0: none)")
    parser.add_argument("--remat", action="store_true", help="keep the inputs of layers only")
    parser.add_argument("--json", metavar="FILE", help="write everything found")
    return parser.parse_args(argv)


def chosen(
    args: argparse.Namespace, spec: decoder.DecoderSpec, shape: Shape, where: Slice, ranks: list[Estimate]
) -> list[Plan]:
    """The plans to compile: those of --mesh, or the best; of one mesh only one.

    Raises ConfigError for a mesh that is not three numbers, or does not split the step.
    """
    plans = [e.plan for e in ranks if args.microbatches in (None, e.plan.microbatches)]
    if not args.mesh:
        best = {plan[:3]: plan for plan in reversed(plans)}
        return sorted(best.values(), key=plans.index)[: args.compile]
    asked = []
    for text in args.mesh:
        if not re.fullmatch(r"\d+,\d+,\d+", text):
            raise ConfigError(f"--mesh {text}: give data,fsdp,tensor, as 1,16,4")
        sizes = tuple(int(n) for n in text.split(","))
        of_mesh = [plan for plan in plans if plan[:3] == sizes]
        if not of_mesh:
            parts = f" with {args.microbatches} microbatches" if args.microbatches else ""
            raise ConfigError(
                f"--mesh {text}{parts}: data x fsdp x tensor must be the {where.size} chips, data x fsdp x "
                f"microbatches divide the {shape.batch} queries, and tensor the {spec.num_kv_heads} key/value heads"
            )
        asked.append(of_mesh[0])
    return asked


def main(argv: list[str]) -> int:
    try:
        return run(parse(argv))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    where = bounds.parse_slice(args.topology)
    spec, shape = measure.sized(args)
    spec = spec._replace(dtype="bfloat16", remat=args.remat)
    ranks = bounds.ranked(spec, shape, where)
    plans = chosen(args, spec, shape, where, ranks)
    print(head(args.workload, spec, shape, where, ranks), flush=True)
    found = []
    devices = compiled.devices_of(args.topology) if plans else ()
    for plan in plans:
        found.append(compiled.report(spec, shape, plan, where, devices))
        print("\n" + table(found[-1]), flush=True)
    fitting = [one for one in found if not one.refused]
    if fitting:
        best = min(fitting, key=lambda one: one.chip_s + one.ici_s).plan
        flags = " ".join(f"--mesh.{axis} {size}" for axis, size in zip(shards.AXES, best[:3], strict=True))
        print(f"\nof these: {flags} --rl.microbatches {best.microbatches}")
    elif found:
        print("\nnone of these fits: more --microbatches, --remat, or a larger slice")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(as_json(args.workload, spec, shape, where, ranks, found), file, indent=1)
    return 0


def head(name: str, spec: decoder.DecoderSpec, shape: Shape, where: Slice, ranks: list[Estimate]) -> str:
    """What is asked, and the best by closed forms."""
    chip = where.chip
    figures = (
        f"{chip.hbm_gib} GiB, {chip.tflops:.0f} TFLOP/s, {chip.hbm_gbytes:.0f} GB/s, links {where.ici_gbytes:.0f} GB/s"
    )
    lines = [
        f"{name}, {decoder.num_params(spec) / 1e9:.2f}e9 parameters, {spec.dtype}: {shape.batch} queries of "
        f"{shape.prompt} tokens, {shape.group} rollouts of {shape.length}",
        f"{where.name}: {where.size} chips of {figures}",
        "at least, by closed forms: GiB, ms on the chip + ms of links",
    ]
    for e in ranks[:8]:
        lines.append(f"  {described(e.plan):48}{e.gib:6.1f}{1e3 * e.chip_s:8.0f} +{1e3 * e.ici_s:6.0f}")
    return "\n".join(lines)


def as_json(
    name: str, spec: decoder.DecoderSpec, shape: Shape, where: Slice, ranks: list[Estimate], found: list[Report]
) -> dict[str, Any]:
    def keyed(moved: compiled.Moved) -> dict[str, float]:
        return {" ".join(key): n for key, n in moved.items()}

    def program(one: Report, name: str) -> dict[str, Any]:
        made = one.programs[name]
        told = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
        far = [
            {"kind": c.kind, "shape": c.shape, "op_name": c.op_name, "times": c.times, "bytes": n} for c, n in made.far
        ]
        return told | {"moved": keyed(made.moved), "least": keyed(one.least[name]), "far": far, "memory": made.memory}

    return {
        "workload": name,
        "spec": spec._asdict(),
        "shape": shape._asdict(),
        "topology": where.name,
        "estimates": [e._asdict() | {"plan": e.plan._asdict()} for e in ranks],
        "compiled": [
            {
                "plan": one.plan._asdict(),
                "refused": one.refused,
                "phases": one.phases,
                "chip_s": one.chip_s,
                "ici_s": one.ici_s,
                "programs": {name: program(one, name) for name in one.programs},
            }
            for one in found
        ],
    }
