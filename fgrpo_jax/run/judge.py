"""What the finished stages of a run say: their lists, what its learned rewards say of anybody's, and of those shown."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fgrpo_jax import policies, shards
from fgrpo_jax.evaluation.evaluate import Prediction, counted
from fgrpo_jax.evaluation.fit import Shown, fit
from fgrpo_jax.run import sharding
from fgrpo_jax.run.experiment import Experiment, Predictor, encoded_parts
from fgrpo_jax.run.finished import best_params
from fgrpo_jax.run.processes import note, warn
from fgrpo_jax.run.progress import announced, telling
from fgrpo_jax.stages import credited, stages
from fgrpo_jax.types import Array, Lists, PyTree, RankingExample, is_param, num_params
from fgrpo_jax.types_of_policies import Policy


class Opened(NamedTuple):
    """A run whose finished stages are evaluated, and the queries as it shows them."""

    experiment: Experiment
    places: dict[str, Path]  # of the finished stages: the run directories that hold them
    shown: list[RankingExample]

    def params(self, name: str) -> PyTree:
        return best_params(self.experiment, self.places[name], name)


def predict(run: Opened, rows: Sequence[str]) -> tuple[dict[str, list[Prediction]], dict[str, int]]:
    """Predictions with the best parameters of a run's finished stages, by name, then of these of its selections.

    And the FLOPs behind one, of those whose programs say how many.
    """
    experiment, programs, flops, predicted = run.experiment, {}, {}, {}

    def make(name: str, program: Predictor, params: PyTree) -> None:
        predicted[name] = program(params, run.shown)
        flops[name] = program.flops

    for name in run.places:
        policy = stages(experiment.config)[name].policy
        if policy not in programs:  # shared by the stages of a policy
            programs[policy] = _telling(Predictor(experiment, experiment.policy(name)), f"the lists of {name}")
        make(name, programs[policy], run.params(name))
    selections = policies.selections(experiment.config, experiment.policies) if rows else {}
    for name in rows:
        selection = selections[name]
        table = {other: experiment.policy(other).table for other in selection.stages}
        policy = experiment.policy(selection.stages[0])
        program = _telling(Predictor(experiment, policy, selection.greedy, table), f"the lists of {name}")
        make(name, program, {other: run.params(other) for other in selection.stages})
    return predicted, {name: count for name, count in flops.items() if count is not None}


def _telling(predictor: Predictor, what: str) -> Predictor:
    """Which says when it compiles, beside the table, not in it."""
    compiling = functools.partial(telling, "evaluation", what, warn)
    predictor.program = announced(predictor.program, 2, compiling)
    return predictor


def parameters_of(run: Opened, rows: Sequence[str]) -> dict[str, int]:
    """How many parameters a list of each finished stage is made with, and of these of the run's selections."""
    experiment = run.experiment
    selections = policies.selections(experiment.config, experiment.policies) if rows else {}
    own = {name: _read_by(experiment.policy(name)) for name in run.places}
    return own | {name: selections[name].parameters for name in rows}


def _read_by(policy: Policy) -> int:
    """An ensemble's lists are one member's: its axis is the first of every parameter."""
    members = {p.shape[0] for p in jax.tree.leaves(policy.table, is_leaf=is_param) if p.axes[0] == "member"} or {1}
    base = num_params(policy.base.table) if policy.base else 0
    return base + num_params(policy.table) // max(members)


def rewards_of(run: Opened, predictions: dict[str, list[Prediction]]) -> dict[str, dict[str, np.ndarray]]:
    """The learned rewards that eval.rewards names, of every method, with the parameters of this run."""
    found: dict[str, dict[str, np.ndarray]] = {}
    config = run.experiment.config
    for reward in config.eval.rewards:
        name = credited(config, reward)
        if lacking := [other for other in stages(config)[name].frozen_from if other not in run.places]:
            note(f"no column {reward}: {name} reads it from {' and '.join(lacking)}, not finished here")
            continue
        frozen = {other: run.params(other) for other in stages(config)[name].frozen_from}
        for method, values in Judge(run.experiment, name, (reward,))(frozen, run.shown, predictions).items():
            found[method] = found.get(method, {}) | values
    return found


def fits_of(run: Opened) -> dict[str, dict[str, object]]:
    """How the run's models of feedback fit the lists that were shown of these queries, by stage."""
    found, config = {}, run.experiment.config
    for name in run.places:
        if run.experiment.policy(name).fit:
            shown = seen(run.experiment, name, run.params(name), run.shown)
            found[name] = fit(shown, config.eval.bootstrap, config.seed)
    return {name: value for name, value in found.items() if value}


class Judge:
    """Learned rewards as the stage `name` of an experiment reads them; compiled once per shape."""

    def __init__(self, experiment: Experiment, name: str, rewards: Sequence[str]):
        self._experiment, self._policy, self.rewards = experiment, experiment.policy(name), tuple(rewards)
        of_k = [self._policy.rewards[reward](experiment.config.reward.k) for reward in rewards]

        def of_shard(_: PyTree, frozen: PyTree, lists: Lists, query: PyTree) -> Array:
            return jnp.stack([reward(lists, query, frozen) for reward in of_k], -1)

        beside = experiment.beside(self._policy, stages(experiment.config)[name].frozen_from)
        mapped = shards.by_query(experiment.mesh, {}, of_shard, beside)
        self._reward = jax.jit(mapped, out_shardings=sharding.replicated(experiment.mesh))

    def __call__(
        self, frozen: PyTree, examples: Sequence[RankingExample], predictions: Mapping[str, Sequence[Prediction]]
    ) -> dict[str, dict[str, np.ndarray]]:
        """Method -> reward -> [Q] float64. The lists of all methods are the rollouts of a query.

        frozen: by stage. predictions: of every method, for every example. What broke a rule counts as empty.
        """
        found = []
        slate_max, rank_max = self._experiment.config.limits()
        for start, part, query in encoded_parts(self._experiment, self._policy, examples):
            rows = [min(start + i, len(examples) - 1) for i in range(len(part))]
            of_row = [[counted(predicted[q]) for predicted in predictions.values()] for q in rows]
            slate, ranking = (
                np.array([[_padded(both[i], size) for both in row] for row in of_row], np.int32)
                for i, size in enumerate((slate_max, rank_max))
            )
            mine = sharding.local_rows(self._experiment.mesh, len(part))
            lists = Lists(slate[mine], ranking[mine], np.zeros((len(mine), len(predictions)), np.int32))
            lists = sharding.shard_batch(self._experiment.mesh, lists, len(part))
            found.append(np.asarray(self._reward({}, frozen, lists, query)))
        reward_QMR = np.concatenate(found)[: len(examples)].astype(np.float64)
        return {
            method: {name: reward_QMR[:, m, r] for r, name in enumerate(self.rewards)}
            for m, method in enumerate(predictions)
        }


def _padded(items: Sequence[int], size: int) -> list[int]:
    return [*items, *[-1] * (size - len(items))]


def seen(experiment: Experiment, name: str, params: PyTree, examples: Sequence[RankingExample]) -> Shown:
    """What the stage `name`, whose policy has a `fit`, says of the lists that were shown of these queries."""
    policy = experiment.policy(name)
    mapped = shards.by_query(experiment.mesh, policy.table, policy.fit)
    program = jax.jit(mapped, out_shardings=sharding.replicated(experiment.mesh))
    found, lists = [], 0
    for start, part, query in encoded_parts(experiment, policy, examples):
        own = min(len(part), len(examples) - start)
        logit, feedback, shown = (np.asarray(x)[:own] for x in program(params, {}, query))
        q, j, _ = np.nonzero(shown)
        found.append((logit[shown], feedback[shown], start + q, lists + q * shown.shape[1] + j))
        lists += own * shown.shape[1]
    return Shown(*map(np.concatenate, zip(*found, strict=True)))
