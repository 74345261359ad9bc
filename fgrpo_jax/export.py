"""Write a run's model as a Hugging Face directory that `transformers` loads.

    python -m fgrpo_jax.export RUN_DIR OUT_DIR [--stage rl]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fgrpo_jax import experiment, run
from fgrpo_jax.models import hf
from fgrpo_jax.stage import best_params


def export(
    run_dir: Annotated[Path, tyro.conf.Positional],
    out_dir: Annotated[Path, tyro.conf.Positional],
    stage: Literal["sft", "rl"] = "rl",
) -> None:
    """Export the best checkpoint of a finished stage, with the run's tokenizer."""
    config = run.read_config(run_dir)
    built = experiment.assemble(config, None, run_dir)
    source = Path(config.model.checkpoint, "config.json") if config.model.checkpoint else None
    kept = json.loads(source.read_text(encoding="utf-8")) if source else None
    hf.save(out_dir, built.spec, best_params(built, run_dir, stage), kept, built.tokenizer)
    print(f"wrote {out_dir}")


if __name__ == "__main__":
    try:
        tyro.cli(export, description=__doc__)
    except ValueError as error:  # ConfigError and DataError
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
