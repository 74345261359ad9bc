"""What GoalRank owes to each of its parts, in the world of configs/goalrank.py: one stage, changed in one thing.

    python train.py configs/goalrank_study.py:VARIANT

Networks are those of the run that it starts from, runs/goalrank; `goalrank` (and `grpo`, where the reward
model is wrong on purpose) is trained anew. VARIANT: see VARIANTS. For another seed: --seed, --start-from a run
of that seed, and --run-dir.
"""

import dataclasses
import runpy
from pathlib import Path

from fgrpo_jax.config import ConfigError
from fgrpo_jax.policies.ranker.config import BiasConfig, ProposalsConfig, RankerConfig
from fgrpo_jax.stages import stages

# Of a group of 20, eight lists are own samples and twelve proposals: about the same shares at every size.
_MIXES = {
    4: (("pointwise", 1), ("perturbed", 1)),
    8: (("pointwise", 1), ("mmr_pointwise", 1), ("perturbed", 3)),
    20: (("pointwise", 2), ("mmr_pointwise", 3), ("perturbed", 7)),
    50: (("pointwise", 5), ("mmr_pointwise", 8), ("perturbed", 17)),
    100: (("pointwise", 10), ("mmr_pointwise", 15), ("perturbed", 35)),
}
_ERRORS = {
    "noise": (0.1, 0.3, 0.5, 0.9),
    "popularity": (0.1, 0.3, 0.9),
    "position": (0.3, 0.9),
    "shift": (-1.0, 1.0),
}


def _stage(**fields):
    return lambda config: dataclasses.replace(config, goalrank=dataclasses.replace(config.goalrank, **fields))


def _objective(**fields):
    return lambda c: _stage(objective=dataclasses.replace(c.goalrank.objective, **fields))(c)


def _group(size: int):
    def change(config: RankerConfig) -> RankerConfig:
        config = _stage(group_size=size)(config)
        return dataclasses.replace(config, proposals=ProposalsConfig(mix=_MIXES[size]))

    return change


def _error(kind: str, weight: float):
    def change(config: RankerConfig) -> RankerConfig:
        grpo = dataclasses.replace(config.grpo, steps=config.goalrank.steps)
        return dataclasses.replace(config, bias=BiasConfig(kind, weight), grpo=grpo)

    return change


VARIANTS = {
    "as_it_is": lambda config: config,
    "no_proposals": _stage(source="sampled"),
    "not_normalised": _objective(normalised=False),
    **{f"group_{size}": _group(size) for size in _MIXES},
    **{f"sigma_{sigma}": _objective(sigma=sigma) for sigma in (0.5, 1.0, 1.5)},
    **{f"{kind}_{weight}": _error(kind, weight) for kind, weights in _ERRORS.items() for weight in weights},
}


def get_config(variant: str = "as_it_is") -> RankerConfig:
    if variant not in VARIANTS:
        raise ConfigError(f"{variant!r} is not one of {', '.join(VARIANTS)}")
    base = runpy.run_path(str(Path(__file__).with_name("goalrank.py")))["get_config"]()
    idle = {name: dataclasses.replace(stage, steps=0) for name, stage in stages(base).items() if name != "goalrank"}
    start = {"run_dir": f"runs/study/{variant}", "start_from": "runs/goalrank"}
    return VARIANTS[variant](dataclasses.replace(base, **start, **idle))
