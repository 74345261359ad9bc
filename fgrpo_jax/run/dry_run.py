"""What a training would begin with, told without a step: `train.py --dry-run`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import jax
import optax

from fgrpo_jax import policies
from fgrpo_jax.data.batches import make_batches
from fgrpo_jax.run.checkpoint import placed
from fgrpo_jax.run.experiment import Experiment
from fgrpo_jax.stages import stages
from fgrpo_jax.types import Policy, PyTree, RankingExample, TrainState

Optimizers = Mapping[str, tuple[optax.GradientTransformation, TrainState]]


def lines(experiment: Experiment, optimizers: Optimizers) -> Iterator[str]:
    """Shapes and memory of every stage that would be trained, then an example.

    optimizers: of these stages, and where the parts of a train state lie (train.make_step).
    Raises DataError and ConfigError for a query that cannot be encoded.
    """
    for name, (optimizer, state_at) in optimizers.items():
        stage, policy = stages(experiment.config)[name], experiment.policy(name)
        batch = make_batches(experiment.dataset, experiment.config, name, stage).batch_at(0)
        yield f"\n{name}"
        yield from (f"  {line}" for line in (*_memory(policy, optimizer, state_at), *_arrays(policy.encode(batch))))
    yield from ["", "example", *_example(experiment)]
    yield "\nnothing was trained or written to the run directory; without --dry-run this would start"


def _memory(policy: Policy, optimizer: optax.GradientTransformation, state_at: TrainState) -> Iterator[str]:
    """Of what is there through every step, on each device."""
    shapes = policy.shapes()
    moments = placed(jax.eval_shape(optimizer.init, shapes), state_at.opt_state)
    weights, moments = _bytes(placed(shapes, state_at.params)), _bytes(moments)
    yield (
        f"memory on each device: {size(2 * weights + moments)} = weights {size(weights)}, as much for their gradient, "
        f"optimizer {size(moments)}"
    )
    if policy.base:
        yield f"  besides, what adapters are added to: {size(_bytes(policy.base.table))}, before it is split"
    yield "  activations and caches are not in it: they depend on the compiler"


def _bytes(tree: PyTree) -> int:
    """On one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total


def size(count: float) -> str:
    """`1.5 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def _arrays(query: PyTree) -> Iterator[str]:
    yield "first batch:"
    for path, array in jax.tree_util.tree_leaves_with_path(query):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        yield f"  {name} {array.dtype} {list(array.shape)}"


def _example(experiment: Experiment) -> list[str]:
    """A training query as its policy is shown it, and what it would imitate; or as it is."""
    seen = policies.preview(experiment.config, experiment.dataset, 1)
    if seen:
        (prompt, transcript), *_ = seen.shown
        return [prompt, f"--- and the transcript to imitate, from the labels, {'-' * 20}", transcript]
    split = "train" if "train" in experiment.dataset.splits else next(iter(experiment.dataset.splits))
    return as_it_is(experiment.dataset.splits[split][0])


def as_it_is(example: RankingExample) -> list[str]:
    """Its texts, and the gain of each candidate."""
    said = [f"query {example.query_id}: {example.query}".rstrip(": ")]
    if example.history:
        said.append(f"history: {', '.join(text for _, text in example.history)}")
    rows = zip(example.candidates, example.relevance, strict=True)
    return said + [f"  {gain:g}  {text}" for (_, text), gain in rows]
