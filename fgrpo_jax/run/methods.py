"""What a run, or an export of one, has to rank queries with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fgrpo_jax import policies
from fgrpo_jax.config import ConfigError, RunConfig, StageConfig
from fgrpo_jax.files import check_reachable
from fgrpo_jax.run import directory
from fgrpo_jax.run import experiment as experiments
from fgrpo_jax.run.experiment import Experiment
from fgrpo_jax.run.finished import best_params, finished_places, last_finished, prompts_for, prompts_of
from fgrpo_jax.stages import stages
from fgrpo_jax.types import PyTree
from fgrpo_jax.types_of_policies import Policy


class Method(NamedTuple):
    """How lists are made: greedily, and by drawing where that is possible; see types_of_policies.Policy.

    policy: that encodes the queries. params: what the functions take; table: their Params.
    sampled: (lists of a query) -> (params, frozen, query, key) -> (Rollout, Lists).
    """

    name: str
    policy: Policy
    params: PyTree
    table: PyTree
    greedy: Callable
    sampled: Callable[[int], Callable] | None


def read_config(run_dir: Path) -> RunConfig:
    """The configuration of a run, or what an exported directory says of it. Raises ConfigError for what is neither."""
    check_reachable(run_dir)
    found = policies.exported(run_dir)
    return found[0] if found else directory.read_config(run_dir)


def open_method(config: RunConfig, run_dir: Path, stage: str) -> tuple[Experiment, Method]:
    """Of a finished stage or a selection ("": the last stage), or of an export. Raises ConfigError for another."""
    if found := policies.exported(run_dir):
        if stage:
            raise ConfigError(f"stage={stage!r}: {run_dir} is an export, of one stage; leave it empty")
        experiment = experiments.assemble(config, prompts_for(config, found[1]), run_dir)
        (policy,) = experiment.policies.values()
        params = experiments.initial_params(experiment, policy)
        return experiment, _generating("export", policy, params, StageConfig())
    stage = stage or last_finished(config, run_dir)
    experiment = experiments.assemble(config, prompts_of(config, run_dir), run_dir)
    return experiment, _method(experiment, finished_places(config, run_dir), stage)


def _method(experiment: Experiment, finished: dict[str, Path], name: str) -> Method:
    """Raises ConfigError for a name that is no finished stage, and no selection among such ones."""
    config = experiment.config
    selections = policies.selections(config, experiment.policies)
    allowed = {other: one for other, one in selections.items() if set(one.stages) <= set(finished)}
    if name in finished:
        params = best_params(experiment, finished[name], name)
        return _generating(name, experiment.policy(name), params, stages(config)[name])
    if name not in allowed:
        raise ConfigError(f"stage={name!r} is not finished here; choose one of {', '.join([*finished, *allowed])}")
    of = allowed[name].stages
    params = {other: best_params(experiment, finished[other], other) for other in of}
    table = {other: experiment.policy(other).table for other in of}
    return Method(name, experiment.policy(of[0]), params, table, allowed[name].greedy, None)


def _generating(name: str, policy: Policy, params: PyTree, stage: StageConfig) -> Method:
    source = policy.sources.get("sampled")
    sampled = source and (lambda count: source(dataclasses.replace(stage, group_size=count)))
    return Method(name, policy, params, policy.table, policy.greedy, sampled)
