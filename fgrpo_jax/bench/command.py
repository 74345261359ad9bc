"""How fast a step is, and how near to what the machine can do.

    python -m fgrpo_jax.bench [--preset cpu|gpu] [--workload w1|default|next_item|long|smollm2|qwen3-0.6b|qwen3-4b]
                              [--layers N] [--batch N] [--prompt N] [--group N] [--length N]
                              [--attention auto|blocks|flash] [--repeats N] [--no-repeated] [--scan]
                              [--json FILE] [--png FILE] [--no-keep-memory] [--profile DIR]
    python -m fgrpo_jax.bench plan --topology v5e:8x8 ...     (plan.py)
    python -m fgrpo_jax.bench ranker ...                      (ranker.py)
    python -m fgrpo_jax.bench credit RUN_DIR ...              (credit.py)
    python -m fgrpo_jax.bench trl ...                         (trl.py)
    python -m fgrpo_jax.bench jump ...                        (jump.py)

`shared` encodes each query's prompt once; `repeated` is the same code given every rollout's
prompt separately (B*G queries with G = 1). `--scan` times both over prompt length and group
size, and draws them. What runs is in measure.py, what it should cost in flops.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import typing
from typing import Any

import jax

from fgrpo_jax.bench import ceilings, credit, flops, jump, measure, plan, ranker, trl
from fgrpo_jax.bench.flops import Shape
from fgrpo_jax.bench.measure import PRESETS, WORKLOADS
from fgrpo_jax.config import ConfigError, ModelConfig
from fgrpo_jax.evaluation import figures
from fgrpo_jax.models import decoder
from fgrpo_jax.policies.llm.checks import check_attention
from fgrpo_jax.policies.llm.files import attention_of
from fgrpo_jax.run.launch import keep_memory

# --------------------------------------------------------------------- one workload, reported


def compare(
    spec: decoder.DecoderSpec,
    shape: Shape,
    repeats: int,
    with_repeated: bool,
    profile: str = "",
    parts: tuple[str, ...] = measure.PARTS,
) -> dict[str, Any]:
    """The shared path and, when asked, the repeated one after it (so peaks are the path's own)."""
    found: dict[str, Any] = {}
    for path, sizes in (("shared", shape), ("repeated", flops.repeated(shape))):
        if path == "repeated" and not with_repeated:
            continue
        programs = measure.build(spec, sizes, shape.batch, parts)
        found[path] = measure.measure(programs, repeats, profile if path == "shared" else "")
        temporary = programs.update.memory_analysis().temp_size_in_bytes / 2**30
        found[path] |= {
            "compile_s": programs.compile_s,
            "peak_gib": measure.peak_gib(),
            "update_temporary_gib": temporary,
        }
        del programs
    apart, together = (flops.update_flops(spec, s) for s in (flops.repeated(shape), shape))
    found["flop_ratio"] = apart / together
    if with_repeated:
        found["update_ratio"] = found["repeated"]["update"]["median"] / found["shared"]["update"]["median"]
    return found


def report(
    name: str, spec: decoder.DecoderSpec, shape: Shape, repeats: int, with_repeated: bool, profile: str = ""
) -> dict:
    """Everything about one workload; the keys are those written by --json."""
    rate, bandwidth = ceilings.ceilings(spec.dtype)
    found = compare(spec, shape, repeats, with_repeated, profile)
    shared = found["shared"]
    update_gflop = flops.update_flops(spec, shape) / 1e9
    rollout_gflop = flops.rollout_flops(spec, shape) / 1e9
    step, products = (
        (shared[name]["median"] - shared["prefill"]["median"]) / shape.length for name in ("rollout", "products")
    )
    step_gflop = flops.completion_flops(spec, shape) / shape.length / 1e9
    read_s = flops.decode_step_bytes(spec, shape) / (bandwidth * 1e9)
    device = jax.local_devices()[0]
    return found | {
        "workload": name,
        "spec": spec._asdict(),
        "shape": shape._asdict(),
        "device": f"{device.platform} {device.device_kind}",
        "versions": measure.versions("jax", "jaxlib"),
        "matmul_gflops": rate,
        "copy_gbytes_per_s": bandwidth,
        "update_gflop": update_gflop,
        "rollout_gflop": rollout_gflop,
        "update_share": update_gflop / shared["update"]["median"] / rate,
        "rollout_share": rollout_gflop / shared["rollout"]["median"] / rate,
        "decode_step_s": step,
        "decode_bandwidth_share": read_s / step,
        "decode_matmul_share": step_gflop / rate / step,
        "decode_products_s": products,
        "sampled_tokens_per_s": shape.batch * shape.group * shape.length / shared["rollout"]["median"],
        "trained_tokens_per_s": shape.batch * (shape.prompt + shape.group * shape.length)
        / shared["update"]["median"],
        "peak_gib": shared["peak_gib"],
    }  # fmt: skip


def table(found: dict) -> str:
    """The report for people."""
    sizes = ", ".join(f"{key} {value}" for key, value in found["shape"].items())
    sizes = f"{found['spec']['num_layers']} layers, {sizes}"
    heads = ("prefill", "rollout", "update", "total", "min", "peak GiB", "compile")
    lines = [f"{found['workload']} on {found['device']}, {found['spec']['dtype']}: {sizes}"]
    lines.append(f"{'seconds':10}" + "".join(f"{head:>10}" for head in heads))
    for path in ("shared", "repeated"):
        if path in found:
            row = found[path]
            cells = [row[name]["median"] for name in ("prefill", "rollout", "update", "total")]
            cells += [row["total"]["min"], row["peak_gib"], sum(row["compile_s"].values())]
            lines.append(f"{path:10}" + "".join(f"{x:10.3f}" for x in cells) + f"   n={row['total']['n']}")
    rate, bandwidth = found["matmul_gflops"], found["copy_gbytes_per_s"]
    lines.append(f"matmul {rate:.0f} GFLOP/s, copy {bandwidth:.1f} GB/s")
    for name in ("rollout", "update"):
        share = found[f"{name}_share"]
        lines.append(f"{name}: {found[f'{name}_gflop']:.1f} useful GFLOP, {share:.1%} of the matmul rate")
    step, read, computed = (found[f"decode_{x}"] for x in ("step_s", "bandwidth_share", "matmul_share"))
    shares = f"{read:.1%} of the copy bandwidth, {computed:.1%} of the matmul rate"
    products = found["decode_products_s"]
    lines.append(f"decoding step {step * 1e3:.2f} ms: {shares}")
    times = f"the step takes {step / products:.2f} times as long"
    lines.append(f"its matrix products alone {products * 1e3:.2f} ms: {times}")
    sampled, trained = found["sampled_tokens_per_s"], found["trained_tokens_per_s"]
    lines.append(f"{sampled:.0f} tokens/s sampled, {trained:.0f} tokens/s trained")
    if "update_ratio" in found:
        ratio, by_flops = found["update_ratio"], found["flop_ratio"]
        share = ratio / by_flops
        lines.append(f"repeated / shared update: {ratio:.2f}, by FLOPs {by_flops:.2f} ({share:.0%})")
    return "\n".join(lines)


# --------------------------------------------------------------------- over prompt length and group size


def scan(spec: decoder.DecoderSpec, shape: Shape, repeats: int, with_repeated: bool) -> list[dict]:
    """`compare` for prompts of 1/4 to 2 times the workload's and half to twice its group."""
    rows = []
    for prompt in (shape.prompt // 4, shape.prompt // 2, shape.prompt, 2 * shape.prompt):
        for group in (shape.group // 2, shape.group, 2 * shape.group):
            here = shape._replace(prompt=prompt, group=group)
            found = compare(spec, here, repeats, with_repeated, parts=())
            rows.append(here._asdict() | {"gflop": flops.update_flops(spec, here) / 1e9} | found)
            print(scan_line(rows[-1]), flush=True)
    return rows


SCAN_HEAD = "     S   G  rollout   update  GFLOP/s  temp GiB  repeated  ratio by FLOPs share"


def scan_line(row: dict) -> str:
    rollout, update = (row["shared"][name]["median"] for name in ("rollout", "update"))
    temporary = row["shared"]["update_temporary_gib"]
    line = f"{row['prompt']:6}{row['group']:4}{rollout:9.3f}{update:9.3f}{row['gflop'] / update:9.1f}{temporary:10.3f}"
    if "repeated" in row:
        repeated, ratio, by_flops = row["repeated"]["update"]["median"], row["update_ratio"], row["flop_ratio"]
        line += f"{repeated:10.3f}{ratio:7.2f}{by_flops:9.2f}{ratio / by_flops:6.0%}"
    return line


def growth(rows: list[dict]) -> list[str]:
    """What the scan is for: time over FLOPs as the group or the prompt grows; 1.00 is in proportion."""

    def change(start: dict, end: dict) -> str:
        seconds = end["shared"]["update"]["median"] / start["shared"]["update"]["median"]
        by_flops = end["gflop"] / start["gflop"]
        return f"update {seconds:.2f} times, FLOPs {by_flops:.2f} times: {seconds / by_flops:.2f}"

    at = {(row["prompt"], row["group"]): row for row in rows}
    lengths, groups = (sorted({key[i] for key in at}) for i in (0, 1))
    lines = [f"G {groups[0]} -> {groups[-1]} at S {s}: {change(at[s, groups[0]], at[s, groups[-1]])}" for s in lengths]
    lines += [
        f"S {one} -> {two} at G {g}: {change(at[one, g], at[two, g])}"
        for one, two in itertools.pairwise(lengths)
        for g in groups
    ]
    return lines


def draw(rows: list[dict], path: str) -> None:
    """Update time over prompt length, a line per group size; dashed: the repeated prompt."""
    figure, (axes,) = figures.panels(1, (6, 4))
    lengths = sorted({row["prompt"] for row in rows})
    for i, group in enumerate(sorted({row["group"] for row in rows})):
        some = [row for row in rows if row["group"] == group]
        for name, style in (("shared", "-o"), ("repeated", "--x")):
            if name in some[0]:
                seconds = [row[name]["update"]["median"] for row in some]
                axes.plot(lengths, seconds, style, color=f"C{i}", label=f"G={group} {name}")
    axes.set(xlabel="prompt length S", ylabel="seconds per update", xscale="log", yscale="log")
    axes.set_xticks(lengths, lengths)
    axes.minorticks_off()
    axes.legend(fontsize="small")
    figures.save(figure, path)


# --------------------------------------------------------------------- command line


def parse(argv: list[str]) -> tuple[argparse.Namespace, decoder.DecoderSpec, Shape]:
    parser = argparse.ArgumentParser(prog="python -m fgrpo_jax.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="default workload and number type")
    parser.add_argument("--workload", choices=WORKLOADS, help="sizes; default: the preset's")
    measure.add_sizes(parser)
    kinds = typing.get_args(typing.get_type_hints(ModelConfig)["attention"])
    parser.add_argument("--attention", choices=kinds, default="auto", help="as model.attention; default: auto")
    parser.add_argument("--repeats", type=measure.positive, default=5, metavar="N", help="timed runs after the warm-up")
    parser.add_argument("--no-repeated", action="store_true", help="leave out the repeated-prompt reference")
    scan_help = "also scan prompt length and group size, with one query (w1 on two cores: 15 minutes)"
    parser.add_argument("--scan", action="store_true", help=scan_help)
    memory_help = "as the config's keep_memory (CPU); default: on"
    parser.add_argument("--keep-memory", action=argparse.BooleanOptionalAction, default=True, help=memory_help)
    parser.add_argument("--json", metavar="FILE", help="write everything measured")
    parser.add_argument("--png", metavar="FILE", default="bench.png", help="the scan's picture")
    parser.add_argument("--profile", metavar="DIR", default="", help="write a jax.profiler trace of one step")
    args = parser.parse_args(argv)
    workload, dtype = PRESETS[args.preset]
    args.workload = args.workload or workload
    spec, shape = measure.sized(args)
    spec = spec._replace(dtype=dtype)
    if args.scan and (shape.prompt < 4 or shape.group < 2):
        parser.error("--scan goes down to a quarter of the prompt and half of the group: they are too small")
    try:
        figures.check_name(args.png)
    except ConfigError as error:
        parser.error(f"--png: {error}")
    return args, spec, shape


def as_computed_here(spec: decoder.DecoderSpec, attention: str = "auto") -> decoder.DecoderSpec:
    """By the devices there are. Raises ConfigError for kernels that they do not run."""
    model = ModelConfig(attention=attention)
    check_attention(model)
    return spec._replace(attention=attention_of(model), rows_first=jax.default_backend() == "cpu")


def main(argv: list[str]) -> int:
    if argv[:1] == ["plan"]:
        return plan.main(argv[1:])
    if argv[:1] == ["ranker"]:
        return ranker.main(argv[1:])
    if argv[:1] == ["credit"]:
        return credit.main(argv[1:])
    if argv[:1] == ["trl"]:
        return trl.main(argv[1:])
    if argv[:1] == ["jump"]:
        return jump.main(argv[1:])
    args, spec, shape = parse(argv)
    if args.keep_memory:
        keep_memory()
    try:
        spec = as_computed_here(spec, args.attention)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = report(args.workload, spec, shape, args.repeats, not args.no_repeated, args.profile)
    print(table(found), flush=True)
    if args.scan:
        print(SCAN_HEAD)
        found["scan"] = scan(spec, shape._replace(batch=1), args.repeats // 2 + 1, not args.no_repeated)
        print("\n".join(growth(found["scan"])))
        draw(found["scan"], args.png)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
    return 0
