"""Finished stages: what the next one, an evaluation or an export takes parameters from."""

from __future__ import annotations

from pathlib import Path

from fgrpo_jax.config import Config, ConfigError
from fgrpo_jax.models import decoder
from fgrpo_jax.policies.llm import tokenizers
from fgrpo_jax.run import directory
from fgrpo_jax.run.checkpoint import Checkpoints, placed
from fgrpo_jax.run.experiment import Experiment, saved_spec
from fgrpo_jax.types import PyTree


def source_of(config: Config, run_dir: Path, name: str) -> tuple[Path, str] | None:
    """The finished stage whose best parameters stage `name` starts from; None: the initial ones."""
    if name == "rl" and config.sft.steps:
        return run_dir, "sft"
    if name == "rl" and config.start_from:
        return directory.start_dir(run_dir, config), "sft"
    return None


def best_params(experiment: Experiment, run_dir: Path, name: str) -> PyTree:
    """Parameters of a finished stage's best checkpoint on validation, in their places.

    Raises ConfigError when the stage is not finished, or is of another model.
    """
    theirs = _check_fits(experiment, run_dir, name)
    wanted = placed(decoder.shapes(experiment.spec), experiment.param_shardings)
    with Checkpoints(run_dir / name / "checkpoints", theirs.checkpoint.keep, read_only=True) as checkpoints:
        best = directory.read_done(run_dir, name)["best_step"]
        return checkpoints.restore_part(best, {"params": wanted})["params"]


def _check_fits(experiment: Experiment, run_dir: Path, name: str) -> Config:
    """The configuration of a run whose stage is finished and of this experiment's model."""
    theirs = directory.read_config(run_dir)
    if not directory.is_done(run_dir, name):
        raise ConfigError(f"{run_dir} has no finished {name} stage to take parameters from")
    spec = saved_spec(run_dir, theirs.model)
    if spec is None:
        raise ConfigError(f"{run_dir} holds no model.json: give its training command again, which writes it")
    described, ours = spec._asdict(), experiment.spec._asdict()
    if differing := [
        f"{name}: {described[name]} -> {ours[name]}" for name in decoder.SHAPING if described[name] != ours[name]
    ]:
        raise ConfigError(f"{run_dir} holds another model: {'; '.join(differing)}")
    return theirs


def check_start(experiment: Experiment, run_dir: Path) -> None:
    """Refuse a `start_from` that is not there, or whose model is not this experiment's.

    Raises ConfigError, also when it was trained on since this run started from it.
    """
    start = directory.start_dir(run_dir, experiment.config)
    _check_fits(experiment, start, "sft")
    theirs = tokenizers.from_directory(str(start / "tokenizer"))
    if theirs.get_vocab() != experiment.tokenizer.get_vocab():
        raise ConfigError(f"start_from={start} has another tokenizer, so its model cannot read these data")
    if lacking := directory.lacking_start(run_dir, experiment.config):
        raise ConfigError(f"start_from: {lacking}")
