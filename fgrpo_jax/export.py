"""Write a run's model for other programs: a language model as a Hugging Face directory that `transformers` loads.

    python -m fgrpo_jax.export RUN_DIR OUT_DIR [--stage sft] [--form adapter]

A stage is a finished one, of the run or of the one that it started from; without --stage it is the last of the run.
Of a run that trained adapters (model.lora), `model` is the base with them merged in, `adapter` what `peft` loads.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import jax
import tyro

from fgrpo_jax.config import ConfigError, MeshConfig
from fgrpo_jax.errors import UserError
from fgrpo_jax.files import path_of
from fgrpo_jax.run import directory, experiment
from fgrpo_jax.run.finished import best_params, finished_places, last_finished, prompts_of


def export(
    run_dir: Annotated[str, tyro.conf.Positional],
    out_dir: Annotated[str, tyro.conf.Positional],
    stage: str = "",
    form: str = "model",
) -> None:
    """Export the best checkpoint of a finished stage, with what is needed to use it."""
    run_dir, out_dir = path_of(run_dir), path_of(out_dir)
    config = directory.read_config(run_dir)
    if note := directory.earlier_version(run_dir):
        print(f"note: {note}")
    experiment.prepare_process(config)
    everywhere = MeshConfig(data=1, fsdp=jax.device_count())  # which need not be the run's
    built = experiment.assemble(dataclasses.replace(config, mesh=everywhere), prompts_of(config, run_dir), run_dir)
    _check_form(built, run_dir, form)
    stage, finished = stage or last_finished(config, run_dir), finished_places(config, run_dir)
    if stage not in finished:
        listed = ", ".join(finished) or "none yet"
        raise ConfigError(f"stage={stage!r} is not finished in {run_dir}: choose one that is ({listed})")
    policy = built.policy(stage)
    policy.files.exports[form](out_dir, best_params(built, finished[stage], stage), built.base(policy))
    print(f"wrote {out_dir}: {stage} of {run_dir}")


def _check_form(built: experiment.Experiment, run_dir: Path, form: str) -> None:
    forms = {name: None for policy in built.policies.values() for name in policy.files.exports}
    if not forms:
        raise ConfigError(
            f"{run_dir} is of a ranker, which has no form for other programs: rank with it "
            "(fgrpo_jax.rank), or read its Orbax checkpoint and items.json"
        )
    if form not in forms:
        raise ConfigError(f"form={form!r}: this run has only {', '.join(forms)}")


if __name__ == "__main__":
    try:
        tyro.cli(export, description=__doc__)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
