"""Finished stages: what the next one, an evaluation or an export takes parameters from."""

from __future__ import annotations

from pathlib import Path

from fgrpo_jax.config import ConfigError, RunConfig
from fgrpo_jax.data.datasets import Dataset, builder_class
from fgrpo_jax.run import directory
from fgrpo_jax.run.checkpoint import Checkpoints, placed
from fgrpo_jax.run.experiment import Experiment
from fgrpo_jax.stages import from_start, stages, start_of
from fgrpo_jax.types import PyTree
from fgrpo_jax.types_of_policies import Policy


def place_of(config: RunConfig, run_dir: Path, name: str) -> Path | None:
    """The run directory that a stage's results are in: this one's, or where it is not trained that of `start_from`."""
    if stages(config)[name].steps:
        return run_dir
    return directory.start_dir(run_dir, config) if config.start_from else None


def finished_places(config: RunConfig, run_dir: Path) -> dict[str, Path]:
    """Where the results of every finished stage lie, in the order of stages; also those taken from `start_from`."""
    places = {name: place_of(config, run_dir, name) for name in stages(config)}
    return {name: place for name, place in places.items() if place and directory.is_done(place, name)}


def last_finished(config: RunConfig, run_dir: Path) -> str:
    """The last stage that was trained here and is finished. Raises ConfigError where there is none."""
    own = [name for name in finished_places(config, run_dir) if stages(config)[name].steps]
    if not own:
        raise nothing_finished(run_dir)
    return own[-1]


def nothing_finished(run_dir: Path) -> ConfigError:
    return ConfigError(f"{run_dir} has no finished stage yet: let train.py run to its end")


def source_of(config: RunConfig, run_dir: Path, name: str) -> tuple[Path, str] | None:
    """The finished stage whose best parameters stage `name` starts from; None: the initial ones."""
    start = start_of(config, name)
    place = place_of(config, run_dir, start) if start else None
    return (place, start) if place else None


def prompts_of(config: RunConfig, run_dir: Path) -> Dataset:
    """What a run's policies must know of its data to be shown new queries: how prompts are made; no split.

    Raises ConfigError where nothing was trained in the run directory.
    """
    return prompts_for(config, directory.read_kind(run_dir))


def prompts_for(config: RunConfig, kind: str) -> Dataset:
    return Dataset(config.data.name, kind, builder_class(config.data.name).instruction, (), {}, False, {})


def best_params(experiment: Experiment, run_dir: Path, name: str) -> PyTree:
    """Parameters of a finished stage's best checkpoint on validation, in their places.

    Raises ConfigError when the stage is not finished, or is of another model.
    """
    policy = experiment.policy(name)
    theirs = _check_fits(policy, stages(experiment.config)[name].policy, run_dir, name)
    wanted = placed(policy.shapes(), experiment.shardings(policy))
    with Checkpoints(run_dir / name / "checkpoints", theirs.checkpoint.keep, read_only=True) as checkpoints:
        best = directory.read_done(run_dir, name)["best_step"]
        return checkpoints.restore_part(best, {"params": wanted})["params"]


def frozen_params(experiment: Experiment, run_dir: Path, name: str) -> dict[str, PyTree]:
    """The parameters that stage `name` reads and never changes, by the names of the stages they are of."""
    others = stages(experiment.config)[name].frozen_from
    places = {other: place_of(experiment.config, run_dir, other) for other in others}
    return {other: best_params(experiment, place, other) for other, place in places.items()}


def _check_fits(policy: Policy, trained: str, run_dir: Path, name: str) -> RunConfig:
    """The configuration of a run whose stage is finished, and trained this policy, called `trained`."""
    theirs = directory.read_config(run_dir)
    if not directory.is_done(run_dir, name):
        raise ConfigError(
            f"{run_dir} has no finished {name} stage to take parameters from: let train.py run to its end there"
        )
    if name in stages(theirs) and stages(theirs)[name].policy != trained:
        raise ConfigError(f"{run_dir}: its stage {name} trained {stages(theirs)[name].policy!r}, not {trained!r}")
    policy.files.check(run_dir)
    return theirs


def check_start(experiment: Experiment, run_dir: Path) -> None:
    """Refuse a `start_from` that is not there, or whose policies are not this experiment's.

    Raises ConfigError, also when it was trained on since this run started from it.
    """
    config = experiment.config
    start = directory.start_dir(run_dir, config)
    for name in from_start(config):
        try:
            _check_fits(experiment.policy(name), stages(config)[name].policy, start, name)
        except ConfigError as error:
            raise ConfigError(f"start_from: {error}") from None
    if lacking := directory.lacking_start(run_dir, config):
        raise ConfigError(f"start_from: {lacking}")
