"""What makes a stage's configuration impossible: the part of validation.py that is about one stage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fgrpo_jax.config import CreditConfig, ObjectiveConfig, OptimConfig, StageConfig
from fgrpo_jax.run.validation_of_data import unknown

if TYPE_CHECKING:
    from fgrpo_jax.run.validation import Registries


def check_stage(name: str, s: StageConfig, known: Registries) -> list[str]:
    problems = []
    if s.steps < 0:
        problems.append(f"{name}.steps={s.steps} is negative; 0 skips the stage")
    if not s.steps:
        return problems
    for field in ("batch_queries", "group_size", "microbatches", "eval_every"):
        if getattr(s, field) < 1:
            problems.append(f"{name}.{field}={getattr(s, field)} must be at least 1")
    if s.microbatches >= 1 and s.batch_queries % s.microbatches:
        problems.append(
            f"{name}.batch_queries={s.batch_queries} is not divisible by {name}.microbatches={s.microbatches}"
        )
    problems += unknown(f"{name}.objective.name", [s.objective.name], frozenset(known.objectives))
    if s.source == "logged" and (s.group_size != 1 or s.objective.name != "nll"):
        problems.append(f"{name}.source='logged' needs {name}.group_size=1 and {name}.objective.name='nll'")
    if s.source != "logged":
        problems += _check_credit(name, s, known)
    if s.source != "logged" and s.metric:
        problems.append(f"{name}.metric={s.metric!r} is of logged rollouts, {name}.source={s.source!r}: leave it empty")
    problems += _check_scheme(name, s, known)
    if not 0 <= s.subset[0] < s.subset[1] <= 1:
        problems.append(f"{name}.subset={s.subset}: need 0 <= low < high <= 1")
    if s.objective.epochs < 1:
        problems.append(f"{name}.objective.epochs={s.objective.epochs} must be at least 1")
    if s.patience < 0:
        problems.append(f"{name}.patience={s.patience} must not be negative; 0: never stop early")
    o = s.objective
    if not 0 <= o.kl_weight < math.inf:
        problems.append(f"{name}.objective.kl_weight={o.kl_weight} must be >= 0 and finite; 0: no KL term")
    if not 0 <= o.clip_low < 1:
        problems.append(f"{name}.objective.clip_low={o.clip_low} must be in [0, 1), as ratios are clipped at 1 less it")
    if not o.clip_high >= 0:
        problems.append(f"{name}.objective.clip_high={o.clip_high} must be >= 0; inf: ratios are not clipped above")
    if o.kl_reference != "start" and not o.kl_weight:
        problems.append(
            f"{name}.objective.kl_reference={o.kl_reference!r}: only a KL term reads it; set {name}.objective.kl_weight"
        )
    if not 0 <= o.sigma < math.inf:
        problems.append(f"{name}.objective.sigma={o.sigma} must be >= 0 and finite")
    problems += _unread_options(f"{name}.objective", o, o.name, known.objectives)
    return problems + _check_optim(f"{name}.optim", s.optim)


def _unread_options(where: str, o: ObjectiveConfig | CreditConfig, name: str, known: Mapping) -> list[str]:
    """Options of others than `name`, set although this one does not read them."""
    if name not in known:
        return []
    others = {option for options in known.values() for option in options} - {*known[name]}
    values = {option: (getattr(o, option), getattr(type(o)(), option)) for option in sorted(others)}
    return [
        f"{where}.{option}={value!r}: {name!r} has no such term or option: leave it at {default!r}"
        for option, (value, default) in values.items()
        if value != default
    ]


def _check_optim(where: str, o: OptimConfig) -> list[str]:
    problems = []
    for field in ("learning_rate", "clip_norm", "eps"):
        value = getattr(o, field)
        if not (math.isfinite(value) and value > 0):
            problems.append(f"{where}.{field}={value} must be positive")
    if not (0 <= o.b1 < 1 and 0 <= o.b2 < 1):
        problems.append(f"{where}: b1={o.b1} and b2={o.b2} must be in [0, 1)")
    if o.warmup_steps < 0:
        problems.append(f"{where}.warmup_steps={o.warmup_steps} must not be negative; 0: none")
    if not 0 <= o.weight_decay < math.inf:
        problems.append(f"{where}.weight_decay={o.weight_decay} must be finite and not negative; 0: none")
    return problems


def _check_credit(name: str, s: StageConfig, known: Registries) -> list[str]:
    problems = []
    if s.group_size == 1 and s.objective.name == "group_softmax":
        problems.append(f"{name}.group_size=1: the softmax over a group of one list is always 1; use 2 or more")
    elif s.group_size == 1 and s.credit.scheme not in known.imitating:
        problems.append(f"{name}.group_size=1: an advantage centred by its group is then always 0; use 2 or more")
    if s.objective.name == "nll":
        problems.append(f"{name}.objective.name='nll' ignores rewards; sampled rollouts need 'clipped_pg'")
    if s.objective.name == "group_softmax" and len(s.credit.terms) > 1:
        problems.append(
            f"{name}.objective.name='group_softmax' reads one reward: name one in {name}.credit.terms, not "
            f"{len(s.credit.terms)}"
        )
    if s.objective.name == "group_softmax" and (
        s.credit.normalise != "none" or any(weight != 1 for _, _, weight in s.credit.terms)
    ):
        problems.append(
            f"{name}.objective.name='group_softmax' reads the reward as it is: leave {name}.credit.normalise at 'none' "
            "and the term's weight at 1 (objective.normalised and sigma are its own)"
        )
    if not s.credit.terms:
        problems.append(f"{name}.credit.terms is empty: nothing would be trained")
    for phase, reward, weight in s.credit.terms:
        if phase not in ("slate", "rank"):
            problems.append(f"{name}.credit.terms: phase {phase!r} is not slate or rank")
        problems += unknown(f"{name}.credit.terms", [reward], known.rewards)
        if not math.isfinite(weight):
            problems.append(f"{name}.credit.terms: weight {weight} is not finite")
    return problems


def _check_scheme(name: str, s: StageConfig, known: Registries) -> list[str]:
    """Whether what the scheme of credit needs is there."""
    c, where = s.credit, f"{name}.credit.scheme={s.credit.scheme!r}"
    problems = _unread_options(f"{name}.credit", c, c.scheme, known.schemes)
    if not 0 < c.shrinkage < math.inf:
        problems.append(f"{name}.credit.shrinkage={c.shrinkage} must be positive and finite")
    if c.scheme == CreditConfig().scheme:
        return problems
    if s.objective.name != "clipped_pg":
        problems.append(f"{where} needs {name}.objective.name='clipped_pg', not {s.objective.name!r}")
    if s.source != "sampled":
        problems.append(f"{where}: it judges what the policy itself wrote; use {name}.source='sampled'")
    if c.scheme in known.by_item:
        allowed = ", ".join(f"({phase}, {reward})" for reward, phase in known.sums.items())
        problems += [
            f"{where}: ({phase}, {reward}) is not one of the terms that are sums over the phase's items: {allowed}"
            for phase, reward, _ in c.terms
            if known.sums.get(reward) != phase
        ]
    if c.scheme in known.imitating:
        problems += [
            f"{where} imitates what weights above 0 say is wanted, and that of ({phase}, {reward}) is {weight}: "
            f"raise it, or leave the term out of {name}.credit.terms"
            for phase, reward, weight in c.terms
            if weight <= 0
        ]
    if c.scheme in known.by_choice and s.objective.epochs > 1:
        problems.append(f"{where} is on policy: {name}.objective.epochs must be 1, not {s.objective.epochs}")
    return problems
