"""The ranker's generator beside the same generator in PyTorch: lists/s sampled, steps/s trained, and how both grow.

    python -m fgrpo_jax.bench ranker [--batch N] [--group N] [--pool N] [--history N] [--length N] [--width N]
                                     [--layers N] [--list-layers N] [--heads N] [--mlp N] [--items N]
                                     [--repeats N] [--threads N] [--no-growth] [--json FILE]

A step is GoalRank's on given lists and rewards: forward, loss, backward, clip, AdamW. Both implementations start
from the same parameters and read the same queries (torch_ranker.py; a test holds their logits and updates
equal). PyTorch has a process of its own, so that neither's threads disturb the other; both keep memory alike
(launch.keep_memory), and are called in turns, so what slows the machine slows both. Random weights, full
pools and histories. Needs the `parity` extra, and measures CPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fgrpo_jax.algorithm.group_softmax import group_softmax
from fgrpo_jax.algorithm.update import make_optimizer, make_update
from fgrpo_jax.bench import flops
from fgrpo_jax.bench.flops import RankerSizes
from fgrpo_jax.bench.measure import positive, versions
from fgrpo_jax.config import ConfigError
from fgrpo_jax.policies.ranker import generator, network
from fgrpo_jax.policies.ranker.network import RankerSpec
from fgrpo_jax.policies.ranker.query import RankerQuery
from fgrpo_jax.run.launch import keep_memory
from fgrpo_jax.types import RANK, Batch, PyTree, Rollout, TrainState

MEANINGS = {
    "batch": "queries", "group": "lists of a query", "pool": "candidates of a query", "history": "items of a history",
    "length": "items of a list", "width": "numbers of an encoding", "layers": "layers of the trunk",
    "list_layers": "layers over the steps of a list", "heads": "heads", "mlp": "width inside an MLP",
    "items": "items of the catalogue",
}  # fmt: skip
GROWTH = {"group": (8, 20, 50), "pool": (20, 50, 100)}
JOBS = {"sample": "sampling", "step": "training step"}
_WARM_UP = 3
_RATE, _BETAS, _EPS, _DECAY, _CLIP = 1e-3, (0.9, 0.98), 1e-8, 0.01, 1.0

FLOPS = {"sample": flops.ranker_sample_flops, "step": flops.ranker_step_flops}

# --------------------------------------------------------------------- what both are given


class Inputs(NamedTuple):
    """Of numpy arrays."""

    params: PyTree
    query: RankerQuery
    actions: np.ndarray  # [B,G,T]
    reward: np.ndarray  # [B,G]


def spec_of(n: RankerSizes) -> RankerSpec:
    return RankerSpec(
        num_items=n.items, history_max=n.history, list_length=n.length, hidden_size=n.width, num_layers=n.layers,
        list_layers=n.list_layers, num_heads=n.heads, mlp_size=n.mlp,
    )  # fmt: skip


def make_inputs(n: RankerSizes) -> Inputs:
    rng = np.random.default_rng(0)
    shape = n.batch, n.pool
    query = RankerQuery(
        history=rng.integers(1, n.items + 1, (n.batch, n.history)).astype(np.int32),
        history_len=np.full(n.batch, n.history, np.int32),
        candidates=rng.integers(1, n.items + 1, shape).astype(np.int32),
        n_candidates=np.full(n.batch, n.pool, np.int32),
        relevance=np.zeros(shape, np.float32),
        retrieval=rng.normal(size=shape).astype(np.float32),
        popularity=rng.random(shape).astype(np.float32),
        topics=np.full(shape, -1, np.int32),
        logged_items=np.full((n.batch, 1, n.length), -1, np.int32),
        logged_feedback=np.zeros((n.batch, 1, n.length), np.float32),
    )
    spec = spec_of(n)
    init = jax.jit(lambda key: network.init(spec, network.generator_table(spec), key))
    params = jax.tree.map(np.asarray, init(jax.random.key(0)))
    actions = rng.random((n.batch, n.group, n.pool)).argsort(-1)[..., : n.length]
    return Inputs(params, query, actions.astype(np.int32), rng.normal(size=(n.batch, n.group)).astype(np.float32))


# --------------------------------------------------------------------- the two implementations

Programs = dict[str, Callable[[], Any]]  # by JOBS; a call has ended when it returns


def ours(n: RankerSizes, inputs: Inputs) -> Programs:
    """Compiled sampling and update, put together as training does on one device."""
    spec, given = spec_of(n), jax.tree.map(jnp.asarray, inputs)
    optimizer = make_optimizer(_RATE, 1, 0, "constant", *_BETAS, _EPS, _DECAY, _CLIP, True)

    def logprobs(params, frozen, query, rollout):
        return generator.logprobs(spec, generator.encode(spec, params, query), rollout)

    def sample(params, query, key):
        return generator.sample(spec, generator.encode(spec, params, query), key, n.group)

    shape = given.actions.shape
    rollout = Rollout(given.actions, jnp.full(shape, RANK), jnp.zeros(shape))
    batch = Batch(given.query, rollout, given.reward[..., None], jnp.zeros(shape), jnp.full(shape, 1 / np.prod(shape)))
    state, key = TrainState(jnp.int32(0), given.params, optimizer.init(given.params)), jax.random.key(0)
    update = jax.jit(make_update(logprobs, group_softmax(), optimizer), donate_argnums=0)
    sampling = jax.jit(sample).lower(given.params, given.query, key).compile()
    updating = update.lower(state, {}, batch).compile()
    params = jax.tree.map(jnp.copy, given.params)  # the update takes the others

    def step():
        nonlocal state
        state, metrics = updating(state, {}, batch)
        return metrics["loss"].value()

    return {"sample": lambda: jax.block_until_ready(sampling(params, given.query, key)), "step": step}


def theirs(n: RankerSizes, given: Inputs, threads: int) -> Programs:
    """PyTorch's; to be called in a process of its own."""
    import torch

    from fgrpo_jax.bench import torch_ranker

    torch.set_num_threads(threads)
    spec = spec_of(n)
    params, query = torch_ranker.parameters(given.params), torch_ranker.tensors(given.query)
    actions, reward = torch.tensor(given.actions).long(), torch.tensor(given.reward)
    rng = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(torch_ranker.leaves(params), _RATE, _BETAS, _EPS, _DECAY, fused=True)
    return {
        "sample": lambda: torch_ranker.sample(spec, params, query, n.group, rng),
        "step": lambda: torch_ranker.training_step(spec, params, optimizer, query, actions, reward),
    }


def _serve(line: Connection, threads: int) -> None:
    """The other process: given sizes and inputs it prepares them, given a job it says how long that took."""
    keep_memory()
    programs = {}
    while (asked := line.recv()) is not None:
        if isinstance(asked, tuple):
            programs = theirs(*asked, threads)
            line.send(None)
        else:
            line.send(_seconds(programs[asked]))


def _seconds(program: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    program()
    return time.perf_counter() - begin


@contextlib.contextmanager
def torch_process(threads: int) -> Iterator[Callable[[tuple[RankerSizes, Inputs] | str], float]]:
    """Asks it, and waits for the answer."""
    # Threads that spin while they wait make PyTorch 10 to 20 times slower once another program shares the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when the process starts
    context = multiprocessing.get_context("spawn")
    line, end = context.Pipe()
    process = context.Process(target=_serve, args=(end, threads), daemon=True)
    process.start()
    end.close()  # so that its death is noticed here

    def ask(what: tuple[RankerSizes, Inputs] | str) -> float:
        line.send(what)
        return line.recv()

    try:
        yield ask
        line.send(None)
    finally:
        line.close()
        process.join()


# --------------------------------------------------------------------- measured


def measure(n: RankerSizes, repeats: int, ask: Callable[[tuple[RankerSizes, Inputs] | str], float]) -> dict[str, Any]:
    """{"ours" and "torch": {job: seconds}} of calls in turns, the first ones dropped; and the FLOPs of a job."""
    inputs = make_inputs(n)
    programs = ours(n, inputs)
    ask((n, inputs))
    times = {name: {job: [] for job in JOBS} for name in ("ours", "torch")}
    for _ in range(_WARM_UP + repeats):
        for job in JOBS:
            times["ours"][job].append(_seconds(programs[job]))
            times["torch"][job].append(ask(job))
    found = {name: {job: spread(x[_WARM_UP:]) for job, x in jobs.items()} for name, jobs in times.items()}
    return n._asdict() | found | {"flops": {job: count(n) for job, count in FLOPS.items()}}


def spread(seconds: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [*seconds] * 3
    return {"median": middle, "low": low, "high": high, "min": min(seconds), "n": len(seconds)}


def growth(rows: list[dict]) -> list[str]:
    """Time over FLOPs from the smallest to each larger size of GROWTH; below 1.00 it grows less than its FLOPs."""
    lines = []
    for axis in GROWTH:
        some = sorted((x for x in rows if x["grows"] == axis), key=lambda x: x[axis])
        for end in some[1:]:
            for job, meaning in JOBS.items():
                by_flops = end["flops"][job] / some[0]["flops"][job]
                each = []
                for name in ("ours", "torch"):
                    by_time = end[name][job]["median"] / some[0][name][job]["median"]
                    each.append(f"{name} {by_time:5.2f} times ({by_time / by_flops:4.2f} of FLOPs)")
                head = f"{axis} {some[0][axis]} -> {end[axis]}, {meaning}:"
                lines.append(f"{head:38} FLOPs {by_flops:5.2f} times, {', '.join(each)}")
    return lines


def table(found: dict[str, Any]) -> str:
    """The comparison for people."""
    lines = [", ".join(f"{MEANINGS[name]} {found[name]}" for name in RankerSizes._fields)]
    lists = found["batch"] * found["group"]
    per_second = {"sample": (lists, "lists/s"), "step": (1, "steps/s")}
    for job, (count, unit) in per_second.items():
        for name in ("ours", "torch"):
            x = found[name][job]
            rate = found["flops"][job] / x["median"] / 1e9
            seconds = (
                f"{1e3 * x['median']:8.1f} ms (quartiles {1e3 * x['low']:.1f} to {1e3 * x['high']:.1f}, n={x['n']})"
            )
            lines.append(f"{JOBS[job]:14}{name:6}{count / x['median']:10.1f} {unit}{seconds}, {rate:.0f} GFLOP/s")
        ratio = found["torch"][job]["median"] / found["ours"][job]["median"]
        lines.append(f"{'':14}ratio {ratio:10.2f}")
    return "\n".join(lines)


# --------------------------------------------------------------------- command line


def parse(argv: list[str]) -> tuple[argparse.Namespace, RankerSizes]:
    parser = argparse.ArgumentParser(prog="python -m fgrpo_jax.bench ranker", description=__doc__.splitlines()[0])
    for name, default in RankerSizes()._asdict().items():
        told = f"{MEANINGS[name]}; default: {default}"
        parser.add_argument(f"--{name.replace('_', '-')}", type=positive, default=default, metavar="N", help=told)
    parser.add_argument("--repeats", type=positive, default=20, metavar="N", help="timed calls after the warm-up")
    threads_help = "of PyTorch; default: one for each core"
    parser.add_argument("--threads", type=positive, default=os.cpu_count(), metavar="N", help=threads_help)
    parser.add_argument("--no-growth", action="store_true", help="these sizes only, no others beside them")
    parser.add_argument("--json", metavar="FILE", help="write everything measured")
    args = parser.parse_args(argv)
    n = RankerSizes(**{name: value for name, value in vars(args).items() if name in RankerSizes._fields})
    if n.width % n.heads:
        parser.error(f"--width {n.width} is not divided by --heads {n.heads}")
    if n.pool < n.length:
        parser.error(f"--pool {n.pool} is smaller than a list, --length {n.length}")
    return args, n


def compare(n: RankerSizes, repeats: int, threads: int, with_growth: bool) -> dict[str, Any]:
    """Everything measured; raises ConfigError without PyTorch."""
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("bench ranker compares with PyTorch: pip install 'fgrpo_jax[parity]'")
    with torch_process(threads) as ask:
        found = measure(n, repeats, ask)
        print(table(found), flush=True)
        if with_growth:
            found["growth"] = [
                measure(n._replace(**{axis: size}), repeats, ask) | {"grows": axis}
                for axis, sizes in GROWTH.items()
                for size in sizes
                if axis != "pool" or size >= n.length
            ]
            print("\n".join(growth(found["growth"])))
    return found | {"threads": threads, "versions": versions("jax", "jaxlib", "torch")}


def main(argv: list[str]) -> int:
    args, n = parse(argv)
    keep_memory()
    try:
        found = compare(n, args.repeats, args.threads, not args.no_growth)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
    return 0
