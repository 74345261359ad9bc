"""Write a run's model as a Hugging Face directory that `transformers` loads.

python -m fgrpo_jax.export RUN_DIR OUT_DIR [--stage rl]
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from fgrpo_jax.config import MeshConfig
from fgrpo_jax.models import hf
from fgrpo_jax.run import directory as run
from fgrpo_jax.run import experiment
from fgrpo_jax.run.finished import best_params


def export(
    run_dir: Annotated[Path, tyro.conf.Positional],
    out_dir: Annotated[Path, tyro.conf.Positional],
    stage: Literal["sft", "rl"] = "rl",
) -> None:
    """Export the best checkpoint of a finished stage, with the run's tokenizer."""
    config = run.read_config(run_dir)
    if note := run.earlier_version(run_dir):
        print(f"note: {note}")
    experiment.prepare_process(config)
    everywhere = MeshConfig(data=1, fsdp=jax.device_count())  # which need not be the run's
    built = experiment.assemble(dataclasses.replace(config, mesh=everywhere), None, run_dir)
    kept = experiment.original_config(config, run_dir)
    hf.save(out_dir, built.spec, best_params(built, run_dir, stage), kept, built.tokenizer)
    print(f"wrote {out_dir}")


if __name__ == "__main__":
    try:
        tyro.cli(export, description=__doc__)
    except (ValueError, OSError) as error:  # ConfigError and DataError
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
