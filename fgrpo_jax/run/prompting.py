"""Rows of an evaluation that nothing trains: what a policy's start answers when it is asked in words."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np

from fgrpo_jax import shards
from fgrpo_jax.evaluation.evaluate import Prediction
from fgrpo_jax.run import sharding
from fgrpo_jax.run.experiment import Experiment, batches_of, initial_params
from fgrpo_jax.types import RankingExample
from fgrpo_jax.types_of_policies import Policy

_STEP = 64  # padded lengths of prompts are multiples of it, so that few programs are compiled


def answered(
    experiment: Experiment, names: Sequence[str], shown: Sequence[RankingExample]
) -> dict[str, list[Prediction]]:
    """Predictions of each method of Policy.prompted, as indices into the candidates as shown.

    Raises ModelFilesError where what the policy starts from is not there any more.
    """
    if not names:
        return {}
    policy = next(policy for policy in experiment.policies.values() if policy.prompted)
    write = _writer(experiment, policy)
    return {name: [Prediction(*said) for said in policy.prompted[name](shown, write)] for name in names}


def _writer(experiment: Experiment, policy: Policy):
    """(token ids of prompts, most tokens) -> token ids of the answers; batches as an evaluation's."""
    mesh, frozen = experiment.mesh, experiment.base(policy)
    params = initial_params(experiment, policy)

    @functools.cache
    def program(most: int):
        def of_shard(params, frozen, prompt, prompt_len):
            return policy.write(params, frozen, prompt, prompt_len, most)

        mapped = shards.by_query(mesh, policy.table, of_shard, experiment.beside(policy))
        return jax.jit(mapped, out_shardings=sharding.replicated(mesh))

    def write(prompts: Sequence[Sequence[int]], most: int) -> list[list[int]]:
        width = -(-max(map(len, prompts)) // _STEP) * _STEP
        found: list[list[int]] = []
        for start, rows in batches_of(experiment, prompts):
            tokens = np.zeros((len(rows), width), np.int32)
            for i, ids in enumerate(rows):
                tokens[i, : len(ids)] = ids
            mine = sharding.local_rows(mesh, len(rows))
            given = tokens[mine], np.array([len(ids) for ids in rows], np.int32)[mine]
            written = program(most)(params, frozen, *sharding.shard_batch(mesh, given, len(rows)))
            found += np.asarray(written)[: len(prompts) - start].tolist()
        return found

    return write
