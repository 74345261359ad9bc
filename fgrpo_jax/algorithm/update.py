"""One update: gradient, accumulation, clipping, AdamW; and the numbers a step reports."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fgrpo_jax.types import PHASES, TRAINED, UNTRAINED, Array, Batch, Lists, Mean, Outcome, PyTree, TrainState


def make_optimizer(
    learning_rate: float,
    updates: int,
    warmup: int,
    decay: str,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float,
    decayed: PyTree,
) -> optax.GradientTransformation:
    """AdamW behind a global-norm clip; `updates` is the length of warm-up and decay together.

    warmup, updates: optimizer updates, so epochs times the steps of a stage.
    decayed: booleans, a tree like params or a prefix of one: what weight decay applies to.
    """
    rest = max(1, updates - warmup)
    after = {
        "constant": optax.constant_schedule(learning_rate),
        "linear": optax.linear_schedule(learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(learning_rate, rest),
    }[decay]
    # Counted from 1: the first update must not have a learning rate of zero.
    before = optax.linear_schedule(learning_rate / max(1, warmup), learning_rate, max(1, warmup - 1))
    schedule = optax.join_schedules([before, after], [warmup]) if warmup else after
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed),
    )


def state_shardings(
    optimizer: optax.GradientTransformation, params: PyTree, param_shardings: PyTree, elsewhere: Any
) -> TrainState:
    """Where every part of a train state lies: the optimizer's moments where their parameters do.

    params: arrays or ShapeDtypeStructs. elsewhere: the sharding of counts.
    """
    opt_state = jax.eval_shape(optimizer.init, params)
    moments = optax.tree.map_params(
        optimizer, lambda _, place: place, opt_state, param_shardings, transform_non_params=lambda _: elsewhere
    )
    return TrainState(elsewhere, param_shardings, moments)


def _split(tree: PyTree, parts: int) -> PyTree:
    """[B, ...] -> [parts, B / parts, ...]; part i takes rows i, i + parts, ..., so every device
    keeps its own rows."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), tree)


def by_parts(logprobs: Callable, parts: int, params: PyTree, frozen: PyTree, query: PyTree, rollout: PyTree) -> Array:
    """`logprobs(params, frozen, query, rollout)`, a part of the batch at a time, as the update does it."""
    if parts == 1:
        return logprobs(params, frozen, query, rollout)
    found = jax.lax.map(lambda part: logprobs(params, frozen, *part), _split((query, rollout), parts))
    return jnp.moveaxis(found, 0, 1).reshape(-1, *found.shape[2:])


def _added_up(function: Callable, parts: int) -> Callable:
    """`function(params, frozen, batch)` of every part of a batch, one after the other, and the results added."""
    if parts == 1:
        return function

    def added(params: PyTree, frozen: PyTree, batch: Batch):
        split = _split(batch, parts)

        def add(total, part):
            return jax.tree.map(jnp.add, total, function(params, frozen, part)), None

        one = jax.eval_shape(function, params, frozen, jax.tree.map(lambda x: x[0], split))
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one)
        return jax.lax.scan(add, zero, split)[0]

    return added


def _apply(optimizer: optax.GradientTransformation, old: tuple[PyTree, PyTree], grads: PyTree):
    params, opt_state = old
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def _apply_or_keep(optimizer: optax.GradientTransformation, finite: Array, old: tuple[PyTree, PyTree], grads: PyTree):
    """Parameters and optimizer state after the gradient where `finite`, else `old`."""
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), _apply(optimizer, old, grads), old)


def _apply_in_place(optimizer: optax.GradientTransformation, finite: Array, old: tuple[PyTree, PyTree], grads: PyTree):
    """The same as a loop of one round or none: for a choice XLA CPU copies the moments (5 ms of W1's 18).

    Compiled for GPU and TPU the choice takes no more memory than the loop, whose number of rounds a
    host may have to wait for.
    """
    return jax.lax.fori_loop(0, finite.astype(jnp.int32), lambda _, old: _apply(optimizer, old, grads), old)


def make_update(
    logprobs: Callable,
    objective: Callable,
    optimizer: optax.GradientTransformation,
    microbatches: int = 1,
    epochs: int = 1,
    over_shards: Callable[[Callable], Callable] = lambda function: function,
) -> Callable[[TrainState, PyTree, Batch], tuple[TrainState, dict[str, Mean]]]:
    """The pure function `(state, frozen, batch) -> (state, metrics)`; jit it with `state` donated.

    The weights of a batch are normalised over the whole of it, so losses and gradients of
    microbatches are plainly added. Microbatch i takes rows i, i + n, ...: every device keeps
    its own rows. `epochs` updates are made on the batch; the metrics are the last one's.

    logprobs: the policy's, or its choices: what the objective reads.
    over_shards: runs `(params, frozen, batch) -> ((loss, metrics), gradient)` on every shard of the
    queries and adds the results (shards.summed); on one device there is nothing to do.

    A non-finite loss or gradient leaves parameters and optimizer as they were; the metric
    `nonfinite` then counts 1, and the caller is to stop.
    """

    def loss_fn(params: PyTree, frozen: PyTree, part: Batch) -> tuple[Array, dict[str, Mean]]:
        logp_BGT = logprobs(params, frozen, part.query, part.rollout)
        return objective(logp_BGT, part)

    gradient = _added_up(jax.value_and_grad(loss_fn, has_aux=True), microbatches)

    def one_update(carry, _, frozen, batch):
        params, opt_state = carry
        (loss, metrics), grads = over_shards(gradient)(params, frozen, batch)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        in_place, choice = (functools.partial(way, optimizer) for way in (_apply_in_place, _apply_or_keep))
        new = jax.lax.platform_dependent(finite, carry, grads, cpu=in_place, default=choice)
        one = jnp.float32(1)
        metrics |= {"grad_norm": Mean(norm, one), "nonfinite": Mean(jnp.where(finite, 0.0, 1.0), one)}
        return new, metrics

    def update(state: TrainState, frozen: PyTree, batch: Batch):
        (params, opt_state), metrics = jax.lax.scan(
            lambda carry, x: one_update(carry, x, frozen, batch), (state.params, state.opt_state), length=epochs
        )
        last = jax.tree.map(lambda m: m[-1], metrics)
        last["nonfinite"] = jax.tree.map(jnp.sum, metrics["nonfinite"])
        return TrainState(state.step + 1, params, opt_state), last

    return update


def describe(
    lists: Lists, batch: Batch, reward_BGP: Array, dead_BP: Array, outcomes: Sequence[Outcome], sampled: bool = True
) -> dict[str, Mean]:
    """What the rollouts of a step were like: rewards, dead groups, outcomes, lengths, entropy of a choice.

    reward_BGP: coverage and utility by what they measure (rewards.phase_rewards), so that
    runs of different credit log comparable numbers. sampled: whether the policy wrote all of them; then minus the
    mean log-probability of what it chose estimates the entropy of a choice, in nats.
    """
    metrics = {}

    def mean(name: str, values: Array) -> None:
        metrics[name] = Mean(values.sum(dtype=jnp.float32), jnp.float32(values.size))

    for p, phase in enumerate(PHASES):
        mean(f"reward/{phase}", reward_BGP[..., p])
        mean(f"dead_groups/{phase}", dead_BP[:, p])
    for phase, label in zip(PHASES, TRAINED) if sampled else ():
        chosen = batch.rollout.phase == label
        metrics[f"entropy/{phase}"] = Mean(
            -jnp.where(chosen, batch.rollout.logp, 0.0).sum(), chosen.sum(dtype=jnp.float32)
        )
    for code, outcome in enumerate(outcomes):
        mean(f"outcome/{outcome.name}", lists.outcome == code)
    mean("tokens_trained", (batch.rollout.phase != UNTRAINED).sum(-1))
    mean("slate_length", (lists.slate >= 0).sum(-1))
    mean("rank_length", (lists.ranking >= 0).sum(-1))
    return metrics
