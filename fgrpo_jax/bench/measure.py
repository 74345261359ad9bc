"""The programs that bench.py times, and how they are timed.

Random weights and random prompts of an exact length; every rollout samples an exact number of
tokens from the full vocabulary with the sampler's own prefill, decoding step and choice; the
update is the one training uses. Times are of synchronised calls after a warm-up; compilation
is reported apart.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import jit
from jax.sharding import Mesh

from fgrpo_jax import __version__, shards
from fgrpo_jax.algorithm.objectives import clipped_pg
from fgrpo_jax.algorithm.update import make_optimizer, make_update
from fgrpo_jax.bench.flops import Shape
from fgrpo_jax.models import decoder, draw, head
from fgrpo_jax.models.layers import linear
from fgrpo_jax.policies.llm import sampling, transcript
from fgrpo_jax.policies.llm.query import Query
from fgrpo_jax.run.sharding import make_mesh
from fgrpo_jax.types import (
    SLATE,
    Array,
    Batch,
    PyTree,
    Rollout,
    TrainState,
)

_W1 = decoder.DecoderSpec(
    vocab_size=8192, hidden_size=256, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=32, mlp_size=768,
    logit_chunk=512,
)  # fmt: skip
_SMALL = decoder.DecoderSpec(
    vocab_size=1024, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_size=192
)
_QWEN = decoder.DecoderSpec(
    vocab_size=151_936, hidden_size=1024, num_layers=28, num_heads=16, num_kv_heads=8, head_dim=128,
    mlp_size=3072, rope_theta=1e6, logit_chunk=256,
)  # fmt: skip
_SMOLLM2 = decoder.DecoderSpec(
    vocab_size=49_152, hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, mlp_size=1536,
    rope_theta=1e5, norm_eps=1e-5, qk_norm=False, logit_chunk=512,
)  # fmt: skip
WORKLOADS = {
    "w1": (_W1, Shape(2, 1024, 8, 64)),
    "default": (_SMALL, Shape(32, 192, 8, 33)),
    "next_item": (_SMALL, Shape(64, 64, 8, 18)),
    "long": (_W1, Shape(1, 8192, 8, 64)),
    "smollm2": (_SMOLLM2, Shape(1, 480, 8, 72)),
    "qwen3-0.6b": (_QWEN, Shape(2, 2048, 8, 64)),
    "qwen3-4b": (
        _QWEN._replace(hidden_size=2560, num_layers=36, num_heads=32, mlp_size=9728),
        Shape(2, 2048, 8, 64),
    ),
}
PRESETS = {"cpu": ("w1", "float32"), "gpu": ("qwen3-0.6b", "bfloat16")}
PARTS = ("prefill", "products")  # of a rollout, timed on their own
SIZES = {
    "layers": "layers of the model",
    "batch": "queries",
    "prompt": "tokens of a prompt",
    "group": "rollouts of a query",
    "length": "tokens of a rollout",
}
_WARM_UP = 2
_GRAMMAR = transcript.Grammar((), (2,), (3,), 1, 1, 1, 1, 1)  # unconstrained sampling never reads it


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def add_sizes(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """A flag for each of SIZES, read by `sized`."""
    for name, meaning in SIZES.items():
        default = defaults.get(name)
        told = f"{meaning}; default: {default or 'that of the workload'}"
        parser.add_argument(f"--{name}", type=positive, default=default, metavar="N", help=told)


def sized(args: argparse.Namespace) -> tuple[decoder.DecoderSpec, Shape]:
    """The workload args.workload with the sizes given."""
    spec, shape = WORKLOADS[args.workload]
    shape = Shape(*(getattr(args, name) or size for name, size in shape._asdict().items()))
    return spec._replace(num_layers=args.layers or spec.num_layers), shape


class Programs(NamedTuple):
    """One workload, ready to run: `update(state, batch)`, `rollout(params, query, key)`, and the
    parts of a rollout asked for: `prefill(params, query)`; `products(params, query)`, which prefills too."""

    rollout: Callable
    update: Callable
    parts: dict[str, Callable]
    state: TrainState
    batch: Batch
    compile_s: dict[str, float]


# --------------------------------------------------------------------- what is run


def make_query(spec: decoder.DecoderSpec, shape: Shape, prompts: int) -> Query:
    """`prompts` random prompts, dealt out evenly to shape.batch queries."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, spec.vocab_size, (prompts, shape.prompt)).repeat(shape.batch // prompts, 0)
    n = shape.batch
    return Query(
        prompt=jnp.asarray(prompt, jnp.int32),
        prompt_len=jnp.full(n, shape.prompt, jnp.int32),
        identifiers=jnp.zeros((n, 1, 1), jnp.int32),
        relevance=jnp.zeros((n, 1)),
        n_candidates=jnp.ones(n, jnp.int32),
    )


def fixed_rollout(
    spec: decoder.DecoderSpec, group: int, length: int, params: PyTree, query: Query, key: Array
) -> Rollout:
    """Sampling as in sampling.sample, of exactly `length` tokens: nothing ends a rollout."""
    params = decoder.whole(spec, params)
    prompt = decoder.prefill(spec, params, query.prompt, query.prompt_len)
    weights = decoder.unstack(spec, params, query.prompt.shape[0] * group)
    last_B = jnp.take_along_axis(query.prompt, query.prompt_len[:, None] - 1, 1)
    shape = (query.prompt.shape[0], group, length)

    def body(t: Array, carry):
        token, cache, actions, logp = carry
        hidden_BGD, cache = decoder.decode_step(spec, weights, prompt, cache, token, t)
        token, chosen = draw.choose_token(head.logits(weights, hidden_BGD), jax.random.fold_in(key, t))
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=t, axis=2)
        return token, cache, put(actions, token), put(logp, chosen)

    first = jnp.broadcast_to(last_B, shape[:2]), decoder.empty_cache(spec, *shape)
    carry = (*first, jnp.zeros(shape, jnp.int32), jnp.zeros(shape))
    _, _, actions, logp = jax.lax.fori_loop(0, length, body, carry)
    return Rollout(actions, jnp.full(shape, SLATE, jnp.int32), logp)


def decode_products(spec: decoder.DecoderSpec, group: int, steps: int, params: PyTree, query: Query) -> Array:
    """The matrix products of `steps` decoding steps and nothing else: about what those steps cost at best.

    Same operands in the same layout, chained so that none can be left out; the values mean
    nothing. Left out are the products with a rollout's own keys and values, which are small.
    """
    params = decoder.whole(spec, params)
    prompt = decoder.prefill(spec, params, query.prompt, query.prompt_len)
    weights = decoder.unstack(spec, params, query.prompt.shape[0] * group)
    batch, kv_heads = query.prompt.shape[0], spec.num_kv_heads

    def body(_, x_ND):
        for layer, k, v in zip(weights["layers"], prompt.k, prompt.v, strict=True):
            new = linear(x_ND, layer["k"]) + linear(x_ND, layer["v"])
            q = linear(x_ND, layer["q"]) + new.mean()
            attended = q.reshape(batch, kv_heads, -1, spec.head_dim) @ k @ v
            x_ND = linear(attended.reshape(q.shape), layer["o"], axes_in=2)
            inner = linear(x_ND, layer["gate"]) + linear(x_ND, layer["up"])
            x_ND = linear(inner, layer["down"])
        logit = head.logits(weights, x_ND)
        return (x_ND + logit.max(-1, keepdims=True)).astype(spec.dtype)

    first = jnp.ones((batch * group, spec.hidden_size), spec.dtype)
    return jax.lax.fori_loop(0, steps, body, first)


class Functions(NamedTuple):
    """Of a step, to be jitted: `start(key) -> state`, `rollout(params, query, key)`, `update(state, batch)`."""

    optimizer: optax.GradientTransformation
    start: Callable
    rollout: Callable
    update: Callable


def functions(spec: decoder.DecoderSpec, shape: Shape, mesh: Mesh, microbatches: int = 1) -> Functions:
    """A workload's on a mesh, as train.py puts them together."""
    sampler, table = sampling.Sampler(spec, _GRAMMAR, constrained=False), decoder.param_table(spec)

    def logprobs(params, frozen, query, rollout):
        return sampling.logprobs(sampler, params, query, rollout)

    def one_rollout(params, frozen, query, key):
        return fixed_rollout(spec, shape.group, shape.length, params, query, key)

    optimizer = make_optimizer(1e-5, 1000, 0, "constant", 0.9, 0.98, 1e-8, 0.0, 1.0, True)
    over_shards = functools.partial(shards.summed, mesh, table)
    update = make_update(logprobs, clipped_pg(), optimizer, microbatches, over_shards=over_shards)
    sample = shards.by_query(mesh, table, one_rollout)

    def start(key: Array) -> TrainState:
        params = decoder.init(spec, key)
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    def rollout_step(params: PyTree, query: Query, key: Array) -> Rollout:  # profiles show these names
        return sample(params, {}, query, key)

    def update_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        return update(state, {}, batch)

    return Functions(optimizer, start, rollout_step, update_step)


def make_batch(spec: decoder.DecoderSpec, shape: Shape, query: Query) -> Batch:
    """Random actions and advantages for the queries."""
    size = (shape.batch, shape.group, shape.length)
    actions = jnp.asarray(np.random.default_rng(1).integers(0, spec.vocab_size, size), jnp.int32)
    rollout = Rollout(actions, jnp.full(size, SLATE, jnp.int32), jnp.zeros(size))
    advantage = jnp.asarray(np.random.default_rng(2).normal(size=size), jnp.float32)
    return Batch(query, rollout, advantage[..., :2], advantage, jnp.full(size, 1 / np.prod(size)))


def build(spec: decoder.DecoderSpec, shape: Shape, prompts: int, parts: tuple[str, ...] = PARTS) -> Programs:
    """Compile rollout, its `parts`, and update of a workload, for one device; the state has been through none."""
    step = functions(spec, shape, make_mesh(1, 1, 1, jax.local_devices()[:1]))
    query = make_query(spec, shape, prompts)

    def prefill(params, query):
        return decoder.prefill(spec, decoder.whole(spec, params), query.prompt, query.prompt_len)

    state, batch = jit(step.start)(jax.random.key(0)), make_batch(spec, shape, query)
    products = functools.partial(decode_products, spec, shape.group, shape.length)
    of_rollout = {"prefill": prefill, "products": products}
    jobs = {name: (of_rollout[name], (state.params, query), ()) for name in parts} | {
        "rollout": (step.rollout, (state.params, query, jax.random.key(1)), ()),
        "update": (step.update, (state, batch), (0,)),
    }
    compiled, compile_s = {}, {}
    for name, (fn, args, donated) in jobs.items():
        begin = time.perf_counter()
        compiled[name] = jit(fn, donate_argnums=donated).lower(*args).compile()
        compile_s[name] = time.perf_counter() - begin
    rollout, update = compiled.pop("rollout"), compiled.pop("update")
    return Programs(rollout, update, compiled, state, batch, compile_s)


# --------------------------------------------------------------------- measuring


def timed(fn: Callable, *args) -> tuple[float, Any]:
    begin = time.perf_counter()
    out = jax.block_until_ready(fn(*args))
    return time.perf_counter() - begin, out


def summary(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "min": min(seconds), "n": len(seconds)}


def measure(programs: Programs, repeats: int, profile: str = "") -> dict[str, dict]:
    """Seconds of rollout, update and both together, and of the parts of a rollout that were built.

    The first _WARM_UP rounds are dropped: until then the process still grows.
    """
    state, batch = programs.state, programs.batch
    times: dict[str, list[float]] = {name: [] for name in (*programs.parts, "rollout", "update", "total")}
    for i in range(_WARM_UP + repeats):
        last = i == _WARM_UP + repeats - 1
        if profile and last:
            jax.profiler.start_trace(profile)
        seconds = [timed(part, state.params, batch.query)[0] for part in programs.parts.values()]
        rollout_s, rollout = timed(programs.rollout, state.params, batch.query, jax.random.key(1))
        update_s, (state, _) = timed(programs.update, state, batch.replace(rollout=rollout))
        if profile and last:
            jax.profiler.stop_trace()
        seconds += [rollout_s, update_s, rollout_s + update_s]
        if i >= _WARM_UP:
            for name, s in zip(times, seconds, strict=True):
                times[name].append(s)
    return {name: summary(s) for name, s in times.items()}


def versions(*packages: str) -> dict[str, str]:
    """Of what was measured, and of this project as it is imported, installed or not."""
    return {package: importlib.metadata.version(package) for package in packages} | {"fgrpo_jax": __version__}


def peak_gib() -> float:
    """Most memory so far: of the device where it tells, else of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"] / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
