"""Rewards of one's own: functions in files or modules of the user's, which a configuration names.

    reward=RewardConfig(own=(("first_hit", "rank", "my_rewards.py:first_hit"),))
    credit=CreditConfig(terms=(("slate", "recall", 1.0), ("rank", "first_hit", 0.5)))      # of a stage

or --reward.own first_hit rank my_rewards.py:first_hit. my_rewards.py lies in the working directory; all of it:

    import jax.numpy as jnp

    from fgrpo_jax import metrics


    def first_hit(k):
        '''1 where the first item of the ranking is relevant, else 0; k is reward.k, which it does not read.'''

        def reward(lists, query, frozen):
            gains_BGK = metrics.take_gains(query.relevance[:, None], lists.ranking)
            return (gains_BGK[..., 0] > 0).astype(jnp.float32)

        return reward

The function of k is called on the host. What it returns runs under jit: it must be jax.numpy, treat queries one
by one (every device has only its own) and give finite float32 [B,G].

    lists    types.Lists: slate [B,G,N] and ranking [B,G,K], indices of candidates, -1 where there is none
    query    relevance [B,C], n_candidates [B] (those behind are padding, of relevance 0), and what the policy's own has
    frozen   what lies beside the trained parameters, as those of the stages in frozen_from, by name

The phase in `own` says which list it reads. As other rewards it counts only where the rollout kept the rules: with
"slate" those of the slate, with "rank" all of them; elsewhere stands reward.broken.

Only training calls it, and a run that is resumed needs it unchanged, which nobody checks; evaluating the run, ranking
with it and exporting it do not need it. A file stands alone: others beside it are not found; all hosts have the same,
which is checked. A module (my_package.rewards:first_hit) is one that `import` finds on all hosts, where it is not.
"""

from __future__ import annotations

import importlib
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fgrpo_jax.algorithm.rewards import Reward
from fgrpo_jax.config import ConfigError, CreditConfig, RunConfig
from fgrpo_jax.data.batches import make_batches
from fgrpo_jax.files import reason
from fgrpo_jax.run.experiment import Experiment
from fgrpo_jax.stages import stages
from fgrpo_jax.types import Credit, Lists, PyTree, map_params

_B, _G = 3, 2  # of the trial: unequal, so that axes that are exchanged show


def credit_of(config: RunConfig, c: CreditConfig) -> Credit:
    """What the algorithm takes of a stage's credit."""
    of_slate = tuple(name for name, phase, _ in config.reward.own if phase == "slate")
    return Credit(c.terms, c.normalise, c.scheme, c.shrinkage, of_slate)


def load(config: RunConfig) -> dict[str, Callable[[int], Reward]]:
    """The configuration's own rewards by name, beside rewards.REWARDS.

    Raises ConfigError for a file or module that is not there or cannot be imported, and for what is no function in it.
    """
    return {name: _function(f"reward.own: {name!r}", place) for name, _, place in config.reward.own}


def _function(what: str, place: str) -> Callable[[int], Reward]:
    where, _, function = place.rpartition(":")
    path = Path(where).expanduser()
    if path.suffix == ".py" and not path.is_file():
        raise ConfigError(
            f"{what}: there is no file {path.absolute()}: mend the path, or go to the folder it begins at"
        )
    try:
        names = runpy.run_path(str(path)) if path.suffix == ".py" else vars(importlib.import_module(where))
    except Exception as error:  # whatever the user's code raises
        raise ConfigError(f"{what}: {where} cannot be imported ({_said(error)}): mend it") from error
    if not callable(found := names.get(function)):
        raise ConfigError(f"{what}: {where} has no function {function!r}: name one of k that returns the reward")
    return found


def text(config: RunConfig) -> str:
    """The text of the files, of which hosts may have different ones."""
    files = [where for _, _, place in config.reward.own if (where := place.rpartition(":")[0]).endswith(".py")]
    return "\n".join(Path(where).expanduser().read_text(encoding="utf-8") for where in files)


def check(experiment: Experiment) -> None:
    """Try every own reward that a stage is credited with, on the shapes of its first queries; nothing is computed.

    Raises ConfigError for one that cannot be traced, or returns another shape or type.
    """
    config = experiment.config
    own = load(config)
    for name, stage in stages(config).items():
        used = dict.fromkeys(term[1] for term in stage.credit.terms if term[1] in own)
        if stage.steps and stage.source != "logged" and used:
            examples = make_batches(experiment.dataset, config, name, stage).batch_at(0)
            query = experiment.policy(name).encode((list(examples) * _B)[:_B])
            for reward in used:
                what = f"{name}.credit.terms: {reward!r}, of reward.own,"
                _try(what, own[reward], config, query, _beside(experiment, name))


def _try(what: str, build: Callable[[int], Any], config: RunConfig, query: PyTree, frozen: PyTree) -> None:
    slate, ranking, outcome = (
        jax.ShapeDtypeStruct((_B, _G, *size), jnp.int32) for size in (*((n,) for n in config.limits()), ())
    )
    try:
        made = jax.eval_shape(build(config.reward.k), Lists(slate, ranking, outcome), query, frozen)
    except Exception as error:  # whatever the user's code raises
        raise ConfigError(f"{what} cannot be traced ({_said(error)}): write it in jax.numpy, as under jit") from error
    if not isinstance(made, jax.ShapeDtypeStruct) or (made.shape, made.dtype) != (outcome.shape, jnp.float32):
        raise ConfigError(f"{what} must return float32 [B,G], here {list(outcome.shape)}, and returns {made}")


def _beside(experiment: Experiment, name: str) -> dict[str, PyTree]:
    """The shapes of what lies frozen beside a stage."""
    base = experiment.policy(name).base
    others = stages(experiment.config)[name].frozen_from
    shapes = {other: experiment.policy(other).shapes() for other in others}
    if base:
        shapes["base"] = map_params(lambda p: jax.ShapeDtypeStruct(p.shape, base.dtype), base.table)
    return shapes


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {reason(error)}"
