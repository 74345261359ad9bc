"""Greedy transcripts step by step: what each step chose among, with which probabilities; for report.html."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from fgrpo_jax import shards
from fgrpo_jax.evaluation.report_page.browser import LIKELY, Step
from fgrpo_jax.run import sharding
from fgrpo_jax.run.experiment import Experiment, encoded_parts
from fgrpo_jax.run.judge import Opened
from fgrpo_jax.types import PHASES, TRAINED, PyTree, Rollout, Turns
from fgrpo_jax.types_of_policies import Policy


def steppable(run: Opened) -> list[str]:
    """The finished stages whose policies write lists by choices with probabilities."""
    return [name for name in run.places if run.experiment.policy(name).choices]


def transcripts(run: Opened, name: str, queries: Sequence[int]) -> list[list[Step]]:
    """The steps of the finished stage `name` for these of the queries, candidates in the order shown."""
    experiment, policy = _small(run.experiment, len(queries)), run.experiment.policy(name)
    program, params, frozen = _program(experiment, policy), run.params(name), experiment.base(policy)
    found: list[list[Step]] = []
    for start, part, query in encoded_parts(experiment, policy, [run.shown[q] for q in queries]):
        made = jax.device_get(program(params, frozen, query))
        for i in range(min(len(part), len(queries) - start)):
            found.append(_steps(len(part[i].candidates), *jax.tree.map(lambda x: x[i, 0], made)))
    return found


def _small(experiment: Experiment, queries: int) -> Experiment:
    """With batches that are no larger than they need to be."""
    config = experiment.config
    settings = dataclasses.replace(config.eval, batch_queries=min(queries, config.eval.batch_queries))
    return experiment._replace(config=dataclasses.replace(config, eval=settings))


def _program(experiment: Experiment, policy: Policy):
    """(params, frozen, query) -> (Rollout, Turns, log-probabilities [B,1,T], probabilities [B,1,T,C])."""

    def of_shard(params: PyTree, frozen: PyTree, query: PyTree):
        rollout, _ = policy.greedy(params, frozen, query)
        return rollout, policy.turns(query, rollout), *policy.choices(params, frozen, query, rollout)

    of_shard = shards.by_query(experiment.mesh, policy.table, of_shard, experiment.beside(policy))
    return jax.jit(of_shard, out_shardings=sharding.replicated(experiment.mesh))


def _steps(size: int, rollout: Rollout, turns: Turns, logp_T: np.ndarray, probability_TC: np.ndarray) -> list[Step]:
    """Of one transcript about a pool of `size`; where there was one choice only, there was no step."""
    found = []
    for t in np.flatnonzero(np.isin(rollout.phase, TRAINED)).tolist():
        share_C = probability_TC[t, :size].astype(np.float64)
        order = np.argsort(-share_C, kind="stable")[:LIKELY].tolist()
        likely = tuple((c, float(share_C[c])) for c in order if share_C[c] > 0)
        total = float(share_C.sum())
        found.append(
            Step(
                phase=PHASES[TRAINED.index(int(rollout.phase[t]))],
                place=int(turns.place[t]),
                named=tuple(np.flatnonzero(turns.named[t, :size]).tolist()),
                probability=float(np.exp(logp_T[t])),
                open=likely,
                others=max(0.0, total - sum(p for _, p in likely)),
                literal=max(0.0, 1 - total),
            )
        )
    return found
