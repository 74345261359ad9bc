"""The systems: each makes the policies of its runs, and knows what its configuration may not be.

To add one: a package here, called as the system, with a `system` module that has the functions below
and REWARDS; and its configuration in config_files.SYSTEMS.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgrpo_jax.config import RunConfig

if TYPE_CHECKING:
    from fgrpo_jax.data.datasets import Dataset
    from fgrpo_jax.policies.llm.preview import Preview
    from fgrpo_jax.types_of_policies import Policy, Selection

_PREVIEWS = {"llm": "fgrpo_jax.policies.llm.preview"}  # of the systems that read text


def _of(config: RunConfig) -> Any:
    """The module of the configuration's system: only the one that is used is imported."""
    return importlib.import_module(f"{__name__}.{config.SYSTEM}.system")


def make(config: RunConfig, dataset: Dataset | None, run_dir: Path) -> dict[str, Policy]:
    """The policies that stages name, of the run's own description once it has one.

    dataset: None where no query is to be encoded, for a run that describes its policies.
    Raises ConfigError, DataError or ModelFilesError where the parts do not fit each other.
    """
    return _of(config).policies(config, dataset, run_dir)


def exported(folder: Path) -> tuple[RunConfig, str] | None:
    """What a directory that `fgrpo_jax.export` wrote is ranked with, and its kind of prompts; None for another."""
    if not (folder / "ranking.json").is_file():
        return None
    return importlib.import_module(f"{__name__}.llm.exported").read(folder)


def problems(config: RunConfig) -> list[str]:
    """What is impossible in the settings of the system's own, each with what to change."""
    return _of(config).problems(config)


def preview(config: RunConfig, dataset: Dataset, count: int) -> Preview | None:
    """What its policies would be shown of `count` training queries, as text; None where they read no text."""
    if config.SYSTEM not in _PREVIEWS:
        return None
    return importlib.import_module(_PREVIEWS[config.SYSTEM]).preview(config, dataset, count)


def example(config: RunConfig, dataset: Dataset) -> tuple[str, str] | None:
    """A training query as text, and the transcript to imitate; None where its policies read no text."""
    if config.SYSTEM not in _PREVIEWS:
        return None
    return importlib.import_module(_PREVIEWS[config.SYSTEM]).examples_of(config, dataset, 1)[0]


def unprompted(config: RunConfig) -> str:
    """Why no model can be asked in words here; empty where one can."""
    return _of(config).unprompted(config)


def learned_rewards(config: RunConfig) -> frozenset[str]:
    """Names of the rewards that its policies have (Policy.rewards)."""
    return _of(config).REWARDS


def selections(config: RunConfig, policies: dict[str, Policy]) -> dict[str, Selection]:
    """Rows of an evaluation that no stage trains: lists made with the parameters of several stages."""
    return _of(config).selections(config, policies)


def selected(config: RunConfig) -> dict[str, tuple[str, ...]]:
    """The names of the selections, and the stages that each reads."""
    return _of(config).selected(config)
