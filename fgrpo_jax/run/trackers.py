"""Where else a run's numbers and samples go: TensorBoard, Weights & Biases.

To add one: a function (run directory, what the run is) -> Tracker, and a line in TRACKERS and in config.RunConfig.
"""

from __future__ import annotations

import html
import importlib
import importlib.util
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from fgrpo_jax.config import ConfigError
from fgrpo_jax.files import reason, write_atomically

EXTRA = "pip install -e '.[log]'"


class Tracker(NamedTuple):
    """scalars: (stage, step, values by name). text: (stage, step, plain text). close: what is left is written."""

    scalars: Callable[[str, int, Mapping[str, float]], None]
    text: Callable[[str, int, str], None]
    close: Callable[[], None]


def _tensorboard(package: ModuleType, run_dir: Path, about: Mapping[str, Any]) -> Tracker:
    """In RUN_DIR/tensorboard."""
    board = package.SummaryWriter(str(run_dir / "tensorboard"))

    def scalars(stage: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            board.add_scalar(f"{stage}/{name}", value, step)

    def text(stage: str, step: int, said: str) -> None:
        code = "".join(f"    {line}\n" for line in said.splitlines())  # Markdown's way to leave it alone
        board.add_text(f"{stage}/samples", code, step)

    return Tracker(scalars, text, board.close)


def _wandb(package: ModuleType, run_dir: Path, about: Mapping[str, Any]) -> Tracker:
    """One run of W&B for a run directory, whose id is in RUN_DIR/wandb_id; WANDB_MODE=offline needs no account."""
    place = run_dir / "wandb_id"
    if not place.is_file():
        write_atomically(place, uuid.uuid4().hex[:16])
    project = os.environ.get("WANDB_PROJECT", "fgrpo_jax")
    try:
        run = package.init(
            dir=str(run_dir), id=place.read_text(), name=run_dir.name, project=project, config=dict(about),
            resume="allow",
        )  # fmt: skip
    except package.errors.Error as error:  # no account, no network
        raise ConfigError(
            f"trackers: wandb does not start ({reason(error)}): `wandb login`, or set WANDB_MODE=offline"
        ) from None
    counted = set()

    def log(stage: str, step: int, values: Mapping[str, Any]) -> None:
        if stage not in counted:  # every stage begins at 0, and W&B's own step only grows
            counted.add(stage)
            run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        run.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in values.items()}})

    def text(stage: str, step: int, said: str) -> None:
        log(stage, step, {"samples": package.Html(f"<pre>{html.escape(said)}</pre>")})

    return Tracker(log, text, run.finish)


TRACKERS = {"tensorboard": ("tensorboardX", _tensorboard), "wandb": ("wandb", _wandb)}


def check(names: Sequence[str]) -> None:
    """Raises ConfigError for a tracker whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(TRACKERS[name][0]) is None:
            raise ConfigError(f"trackers: {name} needs the `log` extra: {EXTRA}")


def start(names: Sequence[str], run_dir: Path, about: Mapping[str, Any]) -> list[Tracker]:
    """about: the configuration, JSON-ready. Raises ConfigError where one does not start."""
    check(names)
    started = []
    for name in dict.fromkeys(names):
        package, make = TRACKERS[name]
        started.append(make(importlib.import_module(package), run_dir, about))
    return started
