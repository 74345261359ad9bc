"""Write a run's model for other programs: a language model as a Hugging Face directory that `transformers` loads.

    python -m fgrpo_jax.export RUN_DIR OUT_DIR [--stage rl] [--form adapter]

Of a run that trained adapters (model.lora), `model` is the base with them merged in, `adapter` what `peft` loads.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated

import jax
import tyro

from fgrpo_jax.config import ConfigError, MeshConfig
from fgrpo_jax.errors import UserError
from fgrpo_jax.files import path_of
from fgrpo_jax.run import directory, experiment
from fgrpo_jax.run.finished import best_params, prompts_of
from fgrpo_jax.stages import stages


def export(
    run_dir: Annotated[str, tyro.conf.Positional],
    out_dir: Annotated[str, tyro.conf.Positional],
    stage: str = "rl",
    form: str = "model",
) -> None:
    """Export the best checkpoint of a finished stage, with what is needed to use it."""
    run_dir, out_dir = path_of(run_dir), path_of(out_dir)
    config = directory.read_config(run_dir)
    if stage not in stages(config):
        raise ConfigError(f"{run_dir} has no stage {stage!r}, only {', '.join(stages(config))}")
    if note := directory.earlier_version(run_dir):
        print(f"note: {note}")
    experiment.prepare_process(config)
    everywhere = MeshConfig(data=1, fsdp=jax.device_count())  # which need not be the run's
    built = experiment.assemble(dataclasses.replace(config, mesh=everywhere), prompts_of(config, run_dir), run_dir)
    policy = built.policy(stage)
    if not policy.files.exports:
        raise ConfigError("a ranker has no form for other programs: read its Orbax checkpoint and items.json")
    if form not in policy.files.exports:
        raise ConfigError(f"form={form!r}: this run has only {', '.join(policy.files.exports)}")
    policy.files.exports[form](out_dir, best_params(built, run_dir, stage), built.base(policy))
    print(f"wrote {out_dir}")


if __name__ == "__main__":
    try:
        tyro.cli(export, description=__doc__)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
