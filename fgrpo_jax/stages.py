"""The stages of a configuration, in their order, and where each takes parameters from."""

from __future__ import annotations

import dataclasses

from fgrpo_jax.config import RunConfig, StageConfig


def stages(config: RunConfig) -> dict[str, StageConfig]:
    """The stages by name, in their order: every field that is one."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: value for name, value in values.items() if isinstance(value, StageConfig)}


def start_of(config: RunConfig, name: str) -> str | None:
    """The stage whose best parameters stage `name` starts from; None: its policy's own start.

    That stage is trained in this run if it has steps, and else in `config.start_from`.
    """
    known = stages(config)
    wanted = known[name].starts_from
    if wanted == "initial":
        return None
    if wanted != "previous":
        return wanted
    before = list(known)[: list(known).index(name)]
    same = [other for other in before if known[other].policy == known[name].policy]
    trained = [other for other in same if known[other].steps]
    return (trained or (same if config.start_from else []) or [None])[-1]


def from_start(config: RunConfig) -> tuple[str, ...]:
    """The stages whose parameters are taken from the run `start_from`: those read here and not trained here."""
    if not config.start_from:
        return ()
    known = stages(config)
    trained = [name for name, stage in known.items() if stage.steps]
    read = {start_of(config, name) for name in trained}.union(*(known[name].frozen_from for name in trained))
    return tuple(name for name in known if name in read and name not in trained)


def reference_of(stage: StageConfig) -> str | None:
    """What its KL term holds a stage to, `objective.kl_reference`; None where it has no such term."""
    return stage.objective.kl_reference if stage.objective.kl_weight else None


def credited(config: RunConfig, reward: str) -> str | None:
    """The first stage that is trained here and credited with a reward, so that it has frozen what the reward reads."""
    for name, stage in stages(config).items():
        if stage.steps and stage.source != "logged" and reward in (term[1] for term in stage.credit.terms):
            return name
    return None
