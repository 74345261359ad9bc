"""What only training needs, asked before anything is written or compiled."""

from __future__ import annotations

from pathlib import Path

from fgrpo_jax.data.datasets import DataError
from fgrpo_jax.run import memory, own_rewards, trackers
from fgrpo_jax.run.checkpoint import steps_in
from fgrpo_jax.run.directory import is_done
from fgrpo_jax.run.experiment import Experiment
from fgrpo_jax.run.finished import check_start
from fgrpo_jax.run.sharding import check_divisible
from fgrpo_jax.stages import from_start, reference_of, stages, start_of


def check_training(experiment: Experiment, run_dir: Path) -> None:
    """Refuse what these data, this mesh and this machine cannot train.

    Raises ConfigError for trackers that are not installed, batches that do not fit the mesh, a start that does not
    fit, for what a policy refuses (Policy.check) or no device has room for and for rewards that cannot be computed,
    DataError for splits that are not there.
    """
    config, dataset = experiment.config, experiment.dataset
    trackers.check(config.trackers)
    has = f"data set {dataset.name!r} has only {', '.join(dataset.splits)}: add its raw file, or"
    for name, stage in stages(config).items():
        if stage.steps:
            check_divisible(experiment.mesh, stage.batch_queries, stage.microbatches, name)
            memory.check(experiment, name)
        if stage.steps and stage.patience and "validation" not in dataset.splits:
            raise DataError(f"{name}.patience needs a validation split, and {has} set {name}.patience=0")
    if config.eval.split not in dataset.splits:
        raise DataError(f"eval.split={config.eval.split!r}: the run ends on it, and {has} choose another")
    if any(_reads_start(experiment, run_dir, name) for name in stages(config)):
        check_start(experiment, run_dir)
    for policy in experiment.policies.values():
        policy.check(experiment.mesh, dataset, config.eval.split)
    own_rewards.check(experiment)


def _reads_start(experiment: Experiment, run_dir: Path, name: str) -> bool:
    """Whether a stage is still to read parameters of the run `start_from`: to start, or to keep beside it."""
    stage, elsewhere = stages(experiment.config)[name], from_start(experiment.config)
    if not stage.steps or is_done(run_dir, name):
        return False
    begun = bool(steps_in(run_dir / name / "checkpoints"))
    starts = start_of(experiment.config, name) in elsewhere and (not begun or reference_of(stage) == "start")
    return starts or any(other in elsewhere for other in stage.frozen_from)
