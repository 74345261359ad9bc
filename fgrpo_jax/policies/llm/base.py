"""What adapters (model.lora) are trained on: a checkpoint's weights, which a run never holds itself.

A run directory says which they were (base.json), so that its adapters are never read with other ones. They are
looked for in the run directory as `base`, a copy or a link, for runs that were moved to where model.checkpoint
is not; else at model.checkpoint.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path

from fgrpo_jax.config import Config, ConfigError, ModelConfig
from fgrpo_jax.files import read_json, write_atomically
from fgrpo_jax.models import gguf
from fgrpo_jax.models.lora import Lora

FILE, _BLOCK, _BLOCKS = "base.json", 1 << 16, 64


def make_lora(model: ModelConfig) -> Lora | None:
    """What the configuration asks for; None: the whole model is trained."""
    lora = model.lora
    return Lora(lora.rank, lora.alpha, tuple(lora.projections)) if lora.rank else None


def weights_of(config: Config, run_dir: Path) -> str:
    """Where the base's weights are."""
    own = run_dir / "base"
    return str(own) if own.exists() else str(gguf.locate(config.model.checkpoint))


def save(config: Config, run_dir: Path) -> None:
    """Raises ConfigError as `check` where the run has begun."""
    if (run_dir / FILE).is_file():
        check(config, run_dir, run_dir)
    else:
        said = {"checkpoint": config.model.checkpoint, "weights": fingerprint(weights_of(config, run_dir))}
        write_atomically(run_dir / FILE, json.dumps(said, indent=1) + "\n")


def check(config: Config, ours: Path, theirs: Path) -> None:
    """Refuse adapters of the run `theirs` where the base that the run `ours` reads has other weights.

    Raises ConfigError, also where the base is not there.
    """
    said = read_json(theirs / FILE, ("checkpoint", "weights"))
    where = weights_of(config, ours)
    if not os.path.exists(where):
        raise ConfigError(
            f"{theirs} holds adapters of {said['checkpoint']}, and {where} is not there: put that checkpoint, or a "
            f"link to it, at {ours / 'base'}"
        )
    if fingerprint(where) != said["weights"]:
        raise ConfigError(
            f"{theirs} holds adapters of {said['checkpoint']}, and {where} has other weights: put the checkpoint that "
            f"they were trained on, or a link to it, at {ours / 'base'}"
        )


def fingerprint(where: str) -> str:
    """Of the files that hold weights: their names, sizes and some blocks of each; whole files would take minutes."""
    return _fingerprint(os.path.realpath(where))


@functools.cache
def _fingerprint(where: str) -> str:
    place, digest = Path(where), hashlib.sha256()
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name if place.is_dir() else ''} {size}\n".encode())
        with file.open("rb") as opened:
            for start in sorted({size * i // _BLOCKS for i in range(_BLOCKS)}):
                opened.seek(start)
                digest.update(opened.read(_BLOCK))
    return digest.hexdigest()
