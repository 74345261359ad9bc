"""What makes a configuration impossible: checked before anything compiles, all at once.

`validate` is handed the names that exist (`Registries`), so nothing above is imported here.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from fgrpo_jax import policies
from fgrpo_jax.config import (
    ConfigError,
    EvalConfig,
    RewardConfig,
    RunConfig,
)
from fgrpo_jax.files import is_address
from fgrpo_jax.run.validation_of_data import data_problems, own_data_problems, unknown, unread
from fgrpo_jax.run.validation_of_stages import check_stage
from fgrpo_jax.stages import credited, from_start, stages


class Registries(NamedTuple):
    """The names that exist, handed to `validate` by train.py."""

    datasets: frozenset[str]
    raw_files: Callable[[str], str | None]  # those that a data set needs, in words; None: it is made
    rewards: frozenset[str]
    objectives: Mapping[str, Sequence[str]]  # with the options each one reads
    schemes: Mapping[str, Sequence[str]]  # of credit, with the options that each one reads
    by_item: frozenset[str]  # those that need rewards that are sums over items
    by_choice: frozenset[str]  # those that need the probability of every choice
    imitating: frozenset[str]  # those that need no group, and gains that are positive
    sums: Mapping[str, str]  # rewards that are sums over items, with the phase whose items they are
    baselines: frozenset[str]
    cut_metrics: frozenset[str]  # of the first k, without cut-off: as "ndcg"
    whole_metrics: frozenset[str]
    more_whole_metrics: frozenset[str]  # measured only where eval.metrics names them


def wrong_types(config: Any, where: str = "") -> list[str]:
    """What is wrong with each field whose value is not of its annotated type."""
    problems, kinds = [], typing.get_type_hints(type(config))
    for name in (field.name for field in dataclasses.fields(config)):
        kind = kinds[name]
        value, path = getattr(config, name), f"{where}.{name}" if where else name
        if dataclasses.is_dataclass(kind) and isinstance(value, kind):
            problems += wrong_types(value, path)
        elif dataclasses.is_dataclass(kind) or not _is_a(value, kind):
            wanted = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
            problems.append(f"{path}={value!r} must be of type {wanted}")
    return problems


def _is_a(value: Any, kind: Any) -> bool:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in inner
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(value, one) for one in inner)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return len(kinds) == len(value) and all(map(_is_a, value, kinds))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is kind


def validate(config: RunConfig, known: Registries) -> None:
    """Refuse a config that cannot run, before anything compiles.

    known: without the learned rewards of the system's own policies.

    Raises ConfigError listing every problem found, each with what to change.
    """
    _refuse(problems_of(config, known))


def problems_of(config: RunConfig, known: Registries) -> list[str]:
    """What is wrong with a configuration, each problem with what to change; empty where it can run."""
    if problems := wrong_types(config):
        return problems
    there = known.rewards | policies.learned_rewards(config)
    own = [name for name, _, _ in config.reward.own]
    return _impossible(config, known._replace(rewards=there.union(own))) + _check_own(config.reward, there)


def check_types(config: RunConfig) -> None:
    """Raises ConfigError naming every field of the wrong type: a configs/*.py file can hold anything."""
    _refuse(wrong_types(config))


def check_data(config: RunConfig, known: Registries) -> None:
    """As `validate`, of what reading and judging data need, `data` and `eval`, and of the types of all fields."""
    check_types(config)
    _refuse(data_problems(config, known) + own_data_problems(config) + _check_eval(config.eval, known))


def check_evaluation(config: RunConfig, known: Registries) -> None:
    """As `validate`, of what an evaluation changes: `data` and `eval`."""
    problems = data_problems(config, known) + unread(config.data, ["pool"])
    _refuse([*problems, *_check_eval(config.eval, known), *_check_rewards(config), *_check_prompted(config)])


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ConfigError("this configuration cannot run:\n" + "\n".join(f"  - {p}" for p in problems))


def _impossible(config: RunConfig, known: Registries) -> list[str]:
    problems = [
        *_check_versus(config),
        *policies.problems(config),
        *data_problems(config, known),
        *own_data_problems(config),
        *_check_eval(config.eval, known),
        *_check_rewards(config),
        *_check_prompted(config),
        *_check_reward(config.reward),
        *(line for name, stage in stages(config).items() for line in check_stage(name, stage, known)),
        *_check_starts(config),
    ]
    if config.seed < 0:
        problems.append(f"seed={config.seed} must not be negative")
    problems += _check_places(config)
    c = config.checkpoint
    counts = {"log_every": config.log_every, "checkpoint.every": c.every, "checkpoint.keep": c.keep}
    return problems + [f"{name}={value} must be at least 1" for name, value in counts.items() if value < 1]


def _check_places(config: RunConfig) -> list[str]:
    """Whether each thing can lie where it is said to."""
    problems, places = [], {"run_dir": config.run_dir, "start_from": config.start_from}
    places |= {"data.prepared_dir": config.data.prepared_dir, "compilation_cache": config.compilation_cache}
    for name, place in places.items():
        if "://" in place and not is_address(place):
            problems.append(f"{name}={place!r}: only a folder or a gs:// address can be one")
    if "://" in config.data.manual_dir:
        problems.append(f"data.manual_dir={config.data.manual_dir!r}: no address; copy the raw files to all hosts")
    if config.trackers and is_address(config.run_dir):
        problems.append(f"trackers={config.trackers} write to no address: leave them out, or set run_dir to a folder")
    return problems


def _check_versus(config: RunConfig) -> list[str]:
    trained = [name for name, stage in stages(config).items() if stage.steps]
    here = {*trained, *from_start(config)}
    rows = [row for row, read in policies.selected(config).items() if here.issuperset(read)]
    methods = [*here, *rows, *config.eval.baselines, *config.eval.prompted]
    return unknown("eval.versus", [config.eval.versus], frozenset(methods))


def _check_starts(config: RunConfig) -> list[str]:
    """Whether the stages are trained from, and with, what there is by then."""
    problems, known = [], stages(config)
    trained = [name for name, stage in known.items() if stage.steps]
    if not trained:
        problems.append(f"{', '.join(f'{name}.steps' for name in known)} are all 0: nothing would be trained; set one")
    if config.start_from and not from_start(config):
        first = trained[0] if trained else next(iter(known))
        problems.append(f"start_from replaces the {first} stage: set {first}.steps=0, or leave start_from empty")
    for name in trained:
        stage, before = known[name], list(known)[: list(known).index(name)]
        earlier = {f"{name}.frozen_from": stage.frozen_from}
        if stage.starts_from not in ("previous", "initial"):
            earlier[f"{name}.starts_from"] = (stage.starts_from,)
        for field, others in earlier.items():
            problems += unknown(field, others, frozenset(before))
            if not config.start_from:
                skipped = [other for other in others if other in before and not known[other].steps]
                problems += [f"{field}: stage {other!r} is skipped, its steps are 0" for other in skipped]
        if stage.starts_from in before and known[stage.starts_from].policy != stage.policy:
            problems.append(f"{name}.starts_from={stage.starts_from!r} trains another policy than {stage.policy!r}")
    return problems


def _check_eval(e: EvalConfig, known: Registries) -> list[str]:
    problems = unknown("eval.metrics", e.metrics, known.cut_metrics | known.more_whole_metrics)
    cut = {f"{name}@{k}" for name in known.cut_metrics.intersection(e.metrics) for k in e.cutoffs}
    whole = known.whole_metrics | known.more_whole_metrics.intersection(e.metrics)
    problems += unknown("eval.metric", [e.metric], whole | cut)
    problems += unknown("eval.baselines", e.baselines, known.baselines)
    for least, meaning, names in (
        (1, "", ("batch_queries", "bootstrap")),
        (0, "; 0: all of them", ("queries", "train_queries")),
        (0, "; 0: none", ("transcripts",)),
    ):
        values = {name: getattr(e, name) for name in names}
        problems += [f"eval.{n}={v} must be at least {least}{meaning}" for n, v in values.items() if v < least]
    if not e.cutoffs or min(e.cutoffs) < 1:
        problems.append(f"eval.cutoffs={e.cutoffs} must hold positive numbers")
    return problems


def _check_prompted(config: RunConfig) -> list[str]:
    why = policies.unprompted(config) if config.eval.prompted else ""
    return [f"eval.prompted={config.eval.prompted}: {why}"] if why else []


def _check_rewards(config: RunConfig) -> list[str]:
    learned, asked = policies.learned_rewards(config), config.eval.rewards
    if asked and not learned:
        return [f"eval.rewards={asked}: there are no learned rewards here: leave it empty"]
    return unknown("eval.rewards", asked, learned) + [
        f"eval.rewards: no stage that is trained has {name!r} in its credit.terms, which would say what it reads"
        for name in asked
        if name in learned and credited(config, name) is None
    ]


def _check_own(r: RewardConfig, there: frozenset[str]) -> list[str]:
    """there: the names of the other rewards."""
    problems, names = [], [name for name, _, _ in r.own]
    for name, _, place in r.own:
        if name in there or names.count(name) > 1:
            problems.append(f"reward.own: another reward is called {name!r} too: choose another name")
        where, _, function = place.rpartition(":")
        if not where or not function.isidentifier():
            problems.append(f"reward.own: {name!r} is at {place!r}: write FILE.py:FUNCTION or MODULE:FUNCTION")
    return problems


def _check_reward(r: RewardConfig) -> list[str]:
    problems = []
    if r.k < 1:
        problems.append(f"reward.k={r.k} must be at least 1")
    for outcome, value in (("broken", r.broken), *r.rules):
        if not math.isfinite(value):
            problems.append(f"the reward of {outcome!r}, {value}, is not finite: see reward.broken, reward.rules")
    return problems
