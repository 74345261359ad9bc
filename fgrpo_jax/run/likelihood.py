"""How likely a policy finds what a stage learns from, on queries that it is not trained on."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fgrpo_jax import shards
from fgrpo_jax.algorithm.update import by_parts
from fgrpo_jax.data.datasets import DataError
from fgrpo_jax.run import sharding
from fgrpo_jax.run.experiment import Experiment, encoded_ahead, random_key
from fgrpo_jax.stages import stages
from fgrpo_jax.types import UNTRAINED, Array, PyTree, RankingExample


class Likelihood:
    """The mean log-likelihood of the trained actions of a stage's logged rollouts, in nats: minus the usual loss.

    An action counts the same in whichever rollout it is. Batches are as large as those that are trained on, and what
    a rollout leaves to chance is drawn from the stage and the batch's number: so neither the mesh nor
    eval.batch_queries changes what is measured, and every time it is measured on the same rollouts.
    """

    def __init__(self, experiment: Experiment, name: str):
        self._experiment, self._name, self._policy = experiment, name, experiment.policy(name)
        stage, policy, mesh = stages(experiment.config)[name], self._policy, experiment.mesh
        self._size = stage.batch_queries  # a multiple of the shards and of the microbatches
        source = policy.sources["logged"](stage)
        logprobs = functools.partial(by_parts, policy.logprobs, stage.microbatches)

        def of_shard(params: PyTree, frozen: PyTree, query: PyTree, key: Array) -> tuple[Array, Array]:
            rollout, _ = source(params, frozen, query, key)
            logp_BGT = logprobs(params, frozen, query, rollout)
            trained_BGT = rollout.phase != UNTRAINED
            return jnp.where(trained_BGT, logp_BGT, 0.0).sum((1, 2)), trained_BGT.sum((1, 2))

        beside = experiment.beside(policy, stage.frozen_from)
        mapped = shards.by_query(mesh, policy.table, of_shard, beside)
        self._sums = jax.jit(mapped, out_shardings=sharding.replicated(mesh))

    def __call__(self, params: PyTree, frozen: PyTree, examples: Sequence[RankingExample]) -> float:
        """Raises DataError where there is nothing to learn from in any of the examples."""
        total, count = 0.0, 0
        parts = [list(examples[start : start + self._size]) for start in range(0, len(examples), self._size)]
        whole = (part + [part[-1]] * (self._size - len(part)) for part in parts)
        encoded = encoded_ahead(self._experiment, self._policy, whole)
        for number, (part, (_, query)) in enumerate(zip(parts, encoded, strict=True)):
            key = random_key(self._experiment.config.seed, self._name, "likelihood", number)
            logp_B, trained_B = (np.asarray(x)[: len(part)] for x in self._sums(params, frozen, query, key))
            total, count = total + float(logp_B.sum(dtype=np.float64)), count + int(trained_B.sum())
        if not count:
            raise DataError(
                f"{self._name}.metric='likelihood': none of the {len(examples)} validation queries looked at holds "
                f"anything that {self._name} learns from: add it to them, or set {self._name}.metric to ''"
            )
        return total / count
