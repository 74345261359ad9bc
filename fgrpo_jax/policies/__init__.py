"""The systems: each makes the policies of its runs, and knows what its configuration may not be.

To add one: a package here with `policy.policies`, `validation.problems` and `validation.REWARDS` as
llm/ has them, a configuration (config.SYSTEMS), and a line in SYSTEMS.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgrpo_jax.config import RunConfig

if TYPE_CHECKING:
    from fgrpo_jax.data.datasets import Dataset
    from fgrpo_jax.types import Policy

# Packages, by name: only the one that is used is imported.
SYSTEMS = {"llm": "fgrpo_jax.policies.llm", "ranker": "fgrpo_jax.policies.ranker"}


def _module(config: RunConfig, name: str) -> Any:
    return importlib.import_module(f"{SYSTEMS[config.SYSTEM]}.{name}")


def make(config: RunConfig, dataset: Dataset | None, run_dir: Path) -> dict[str, Policy]:
    """The policies that stages name, of the run's own description once it has one.

    dataset: None where no query is to be encoded, for a run that describes its policies.
    Raises ConfigError, DataError or ModelFilesError where the parts do not fit each other.
    """
    return _module(config, "policy").policies(config, dataset, run_dir)


def problems(config: RunConfig) -> list[str]:
    """What is impossible in the settings of the system's own, each with what to change."""
    return _module(config, "validation").problems(config)


def learned_rewards(config: RunConfig) -> frozenset[str]:
    """Names of the rewards that its policies have."""
    return _module(config, "validation").REWARDS
