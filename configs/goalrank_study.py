"""What GoalRank owes to each of its parts, and how it grows, in the world of configs/goalrank.py.

    python train.py configs/goalrank_study.py:VARIANT

PARTS change one thing of `goalrank`, which is trained anew (and `grpo`, where the reward model is wrong on purpose)
beside the networks of the run that it starts from, runs/goalrank. SCALES train from the beginning, with networks of
another width or fewer queries (of whose items all queries are counted: popularity is an input), what GoalRank and the
generator-evaluators need; mg_e_100 and longer_generators what the latter need alone. For another seed: --seed,
--run-dir, and for PARTS --start-from a run of that seed.
"""

import dataclasses
import runpy
from pathlib import Path

from fgrpo_jax.config import ConfigError
from fgrpo_jax.policies.ranker.config import BiasConfig, ProposalsConfig, RankerConfig, SelectionConfig
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


def _only(*trained: str):
    """No other stage is trained."""

    def change(config: RankerConfig) -> RankerConfig:
        idle = {name: dataclasses.replace(stage, steps=0) for name, stage in stages(config).items()}
        return dataclasses.replace(config, **{name: stage for name, stage in idle.items() if name not in trained})

    return change


def _scaled(**network: int):
    needed = _only("evaluator", "pointwise", "imitation", "generators", "goalrank")
    return lambda config: needed(dataclasses.replace(config, network=dataclasses.replace(config.network, **network)))


def _fewer_queries(share: float):
    def change(config: RankerConfig) -> RankerConfig:
        config = _scaled()(config)
        seen = {name: dataclasses.replace(stage, subset=(0.0, share)) for name, stage in stages(config).items()}
        return dataclasses.replace(config, **seen)

    return change


def _selected(versus: str, steps: int, **selection):
    """What the generator-evaluators need alone."""

    def change(config: RankerConfig) -> RankerConfig:
        eval = dataclasses.replace(config.eval, versus=versus, rewards=())
        generators = dataclasses.replace(config.generators, steps=steps)
        changed = dataclasses.replace(config, selection=SelectionConfig(**selection), eval=eval, generators=generators)
        return _only("evaluator", "generators")(changed)

    return change


PARTS = {
    "as_it_is": lambda config: config,
    "no_proposals": _stage(source="sampled"),
    "not_normalised": _objective(normalised=False),
    **{f"group_{size}": _group(size) for size in _MIXES},
    **{f"sigma_{sigma}": _objective(sigma=sigma) for sigma in (0.5, 1.0, 1.5)},
    **{f"{kind}_{weight}": _error(kind, weight) for kind, weights in _ERRORS.items() for weight in weights},
}
SCALES = {
    **{f"width_{width}": _scaled(hidden_size=width, mlp_size=2 * width) for width in (16, 32, 128, 256)},
    **{f"queries_{share}": _fewer_queries(share) for share in (0.1, 0.25, 0.5)},
    # The best of a hundred lists, whoever wrote them (of three generators: 99).
    "mg_e_100": _selected("mg_e_100", 200, generators=100, sizes=(1, 3, 20, 100), lists=100),
    # As many steps as GoalRank's generator has in its two stages, of 128 queries where its second has 64.
    "longer_generators": _selected("mg_e_3", 500),
}
VARIANTS = PARTS | SCALES


def get_config(variant: str = "as_it_is") -> RankerConfig:
    if variant not in VARIANTS:
        raise ConfigError(f"{variant!r} is not one of {', '.join(VARIANTS)}")
    base = runpy.run_path(str(Path(__file__).with_name("goalrank.py")))["get_config"]()
    base = dataclasses.replace(base, run_dir=f"runs/study/{variant}")
    if variant in PARTS:
        base = _only("goalrank")(dataclasses.replace(base, start_from="runs/goalrank"))
    return VARIANTS[variant](base)
