"""Decoding steps and seconds of constrained rollouts: token by token, and jumping ahead of what is forced.

    python -m fgrpo_jax.bench jump [--workload titles|smollm2] [--batch N] [--group N] [--prompt N]
                                   [--most N] [--size N] [--repeats N] [--json FILE]

titles    a small model from scratch, items named by titles of 3 to 8 words
smollm2   the shape of SmolLM2-135M, items named `[7]` with a token a digit, as its tokenizer does

Random weights, prompts and names; 20 candidates, slates of 10, rankings of 5. Both ways are timed in turns, by the
clock and by what the process spent of all cores (where others use the machine too, the better measure). Decisions,
tokens that are not forced, are what steps cannot go below.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import jit

from fgrpo_jax.bench import measure
from fgrpo_jax.models import decoder
from fgrpo_jax.policies.llm import jump, sampling
from fgrpo_jax.policies.llm.grammar import Grammar
from fgrpo_jax.policies.llm.query import Query
from fgrpo_jax.types import UNTRAINED, Array, PyTree, Rollout

POOL, SLATE, RANK = 20, 10, 5
_EOS, _SEPARATOR, _SLATE_CLOSE, _RANK_CLOSE, _OPEN, _SHUT, _DIGIT, _WORD = 1, 2, 3, 10, 14, 15, 16, 32


class Workload(NamedTuple):
    spec: decoder.DecoderSpec
    grammar: Grammar
    batch: int
    group: int
    prompt: int


def _grammar(separator: int, slate_close: int, rank_close: int) -> Grammar:
    """Literals of so many tokens."""
    literals = (
        tuple(range(first, first + n))
        for first, n in ((_SEPARATOR, separator), (_SLATE_CLOSE, slate_close), (_RANK_CLOSE, rank_close))
    )
    return Grammar(*literals, _EOS, SLATE, SLATE, RANK, RANK)


WORKLOADS = {
    "titles": Workload(measure.WORKLOADS["default"][0], _grammar(1, 1, 1), batch=64, group=8, prompt=256),
    "smollm2": Workload(
        decoder.DecoderSpec(
            vocab_size=49_152, hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
            mlp_size=1536, rope_theta=1e5, norm_eps=1e-5, qk_norm=False,
        ),
        _grammar(0, 7, 4), batch=1, group=8, prompt=480,
    ),
}  # fmt: skip


def names(workload: str, vocab_size: int, batch: int) -> list[list[tuple[int, ...]]]:
    """The identifiers of every pool as token ids."""
    if workload == "smollm2":
        digits = [[int(d) for d in str(n)] for n in range(1, POOL + 1)]
        return [[(_OPEN, *(_DIGIT + d for d in number), _SHUT) for number in digits]] * batch
    rng = np.random.default_rng(0)
    words = 1 / np.arange(1, vocab_size - _WORD + 1)  # Zipf's law: titles share common words
    pools = []
    for _ in range(batch):
        pool: dict[tuple[int, ...], None] = {}
        while len(pool) < POOL:
            title = rng.choice(len(words), rng.integers(3, 9), p=words / words.sum())
            pool[tuple((_WORD + title).tolist())] = None
        pools.append([*pool])
    return pools


def make_query(workload: str, sizes: Workload) -> Query:
    rng = np.random.default_rng(0)
    pools = names(workload, sizes.spec.vocab_size, sizes.batch)
    width = max(len(name) for pool in pools for name in pool)
    identifiers = np.full((sizes.batch, POOL, width), -1, np.int32)
    for b, pool in enumerate(pools):
        for c, name in enumerate(pool):
            identifiers[b, c, : len(name)] = name
    return Query(
        prompt=jnp.asarray(rng.integers(0, sizes.spec.vocab_size, (sizes.batch, sizes.prompt)), jnp.int32),
        prompt_len=jnp.full(sizes.batch, sizes.prompt, jnp.int32),
        identifiers=jnp.asarray(identifiers),
        relevance=jnp.zeros((sizes.batch, POOL)),
        n_candidates=jnp.full(sizes.batch, POOL, jnp.int32),
    )


def by_token(sizes: Workload, params: PyTree, query: Query, key: Array) -> tuple[Rollout, Array]:
    sampler = sampling.Sampler(sizes.spec, sizes.grammar, constrained=True, ahead=False)
    rollout, _ = sampling.sample(sampler, params, query, key, sizes.group)
    ended = jnp.argmax(rollout.actions == sizes.grammar.eos, -1) + 1
    return rollout, ended.max()


def jumping(sizes: Workload, pace: jump.Pace, params: PyTree, query: Query, key: Array) -> tuple[Rollout, Array]:
    rollout, _, steps = jump.sample(sizes.spec, sizes.grammar, pace, params, query, key, sizes.group)
    return rollout, steps


def report(workload: str, sizes: Workload, pace: jump.Pace, repeats: int) -> dict[str, Any]:
    """Both ways, in turns: steps, seconds, and the share of rollouts that are the same."""
    spec = sizes.spec
    query, params = make_query(workload, sizes), jit(functools.partial(decoder.init, spec))(jax.random.key(0))
    key = jax.random.key(1)

    def prefill(params, query, key):
        return decoder.prefill(spec, decoder.whole(spec, params), query.prompt, query.prompt_len)

    jobs = {
        "prefill": prefill,
        "by_token": functools.partial(by_token, sizes),
        "jumping": functools.partial(jumping, sizes, pace),
    }
    compiled, compile_s, out = {}, {}, {}
    for name, fn in jobs.items():
        begin = time.perf_counter()
        compiled[name] = jit(fn).lower(params, query, key).compile()
        compile_s[name] = time.perf_counter() - begin
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    cpu_s: dict[str, list[float]] = {name: [] for name in jobs}
    for i in range(1 + repeats):
        for name, program in compiled.items():
            begin = time.process_time()
            s, out[name] = measure.timed(program, params, query, key)
            if i:
                seconds[name].append(s)
                cpu_s[name].append(time.process_time() - begin)
    (one, steps), (other, fewer) = jax.device_get((out["by_token"], out["jumping"]))
    decided = (one.phase != UNTRAINED).sum(-1)
    return {
        "workload": workload,
        "sizes": sizes._asdict(),
        "pace": pace._asdict(),
        "device": f"{jax.local_devices()[0].platform} {jax.local_devices()[0].device_kind}",
        "seconds": {name: measure.summary(s) for name, s in seconds.items()},
        "cpu_s": {name: measure.summary(s) for name, s in cpu_s.items()},
        "compile_s": compile_s,
        "steps": {"by_token": int(steps), "jumping": int(fewer)},
        "decisions": {"mean": float(decided.mean()), "most": int(decided.max())},
        "same": float((one.actions == other.actions).all(-1).mean()),
    }


def table(found: dict[str, Any]) -> str:
    """The report for people."""
    sizes, pace = found["sizes"], found["pace"]
    lines = [
        f"{found['workload']} on {found['device']}: B {sizes['batch']}, G {sizes['group']}, S {sizes['prompt']}; "
        f"up to {pace['most']} tokens of a rollout a step, {pace['size']} of a query",
        f"{'':12}{'steps':>8}{'seconds':>10}{'min':>9}{'CPU s':>9}{'min':>9}{'compile s':>11}",
    ]
    for name in ("prefill", "by_token", "jumping"):
        wall, cpu = found["seconds"][name], found["cpu_s"][name]
        times = "".join(f"{x:9.3f}" for x in (wall["min"], cpu["median"], cpu["min"]))
        steps = found["steps"].get(name, "")
        lines.append(
            f"{name:12}{steps:>8}{wall['median']:10.3f}{times}{found['compile_s'][name]:11.1f}   n={wall['n']}"
        )
    few, many = found["steps"]["jumping"], found["steps"]["by_token"]
    lines.append(f"{many / few:.2f} times fewer steps")
    for what, name in (("the clock", "seconds"), ("CPU seconds", "cpu_s")):
        prefill, before, after = (found[name][job]["median"] for job in ("prefill", "by_token", "jumping"))
        decoding = (before - prefill) / (after - prefill)
        lines.append(f"by {what}: a rollout {before / after:.2f} times as fast, decoding alone {decoding:.2f} times")
    mean, most = found["decisions"]["mean"], found["decisions"]["most"]
    lines.append(f"decisions: {mean:.1f} a rollout, {most} at most; {found['same']:.1%} of the rollouts are the same")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m fgrpo_jax.bench jump", description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=WORKLOADS, default="titles")
    for name in ("batch", "group", "prompt"):
        parser.add_argument(f"--{name}", type=measure.positive, metavar="N", help="default: the workload's")
    parser.add_argument("--most", type=measure.positive, metavar="N", help="tokens of a rollout a step")
    parser.add_argument("--size", type=measure.positive, metavar="N", help="tokens of a query a step")
    parser.add_argument("--repeats", type=measure.positive, default=5, metavar="N", help="timed runs after the warm-up")
    parser.add_argument("--json", metavar="FILE", help="write everything measured")
    args = parser.parse_args(argv)
    sizes = WORKLOADS[args.workload]
    sizes = sizes._replace(**{k: getattr(args, k) for k in ("batch", "group", "prompt") if getattr(args, k)})
    sizes = sizes._replace(spec=sizes.spec._replace(rows_first=jax.default_backend() == "cpu"))
    width = make_query(args.workload, sizes._replace(prompt=1)).identifiers.shape[2]
    pace = jump.pace(sizes.grammar, width, sizes.group)
    pace = jump.Pace(args.most or pace.most, args.size or pace.size)
    found = report(args.workload, sizes, pace, args.repeats)
    print(table(found), flush=True)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
    return 0
