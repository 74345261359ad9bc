"""The ranker as a system: see policies/__init__.py."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from fgrpo_jax.algorithm.rewards import TOPICAL
from fgrpo_jax.config import ConfigError
from fgrpo_jax.data.datasets import DataError, Dataset
from fgrpo_jax.policies.ranker import ensemble, network, policy, proposals, scorers
from fgrpo_jax.policies.ranker.config import RankerConfig
from fgrpo_jax.policies.ranker.files import Catalogue, policy_files, saved_catalogue
from fgrpo_jax.policies.ranker.network import RankerSpec
from fgrpo_jax.policies.ranker.query import RankerQuery, blank, encoder
from fgrpo_jax.policies.ranker.rerankers import SCORERS
from fgrpo_jax.policies.ranker.validation import problems
from fgrpo_jax.stages import stages
from fgrpo_jax.types import RANK, PyTree, num_params
from fgrpo_jax.types_of_policies import Policy, Selection

__all__ = ["REWARDS", "policies", "problems", "selected", "selections"]

_OPTIONAL = {"retrieval": "first-stage scores", "topics": "topics"}  # of candidates
_FIRST = 1000  # training queries that are looked at before training
REWARDS = frozenset(scorers.REWARDS) | frozenset(TOPICAL)


def policies(config: RankerConfig, dataset: Dataset | None, run_dir: Path) -> dict[str, Policy]:
    """Generator, its two-phase form, evaluator and point-wise network, which read the same queries.

    The catalogue is the run's own once it has one. Raises ConfigError for a run directory that lacks it and
    comes without data.
    """
    catalogue = saved_catalogue(run_dir) or _catalogue(dataset)
    spec, n = make_spec(config, len(catalogue.items)), config.network
    setting = make_setting(config, spec)
    writing = setting, config.proposals.mix, n.labels, n.beam
    made = {
        "generator": policy.make_generator(spec, *writing),
        "two_phase": policy.make_generator(spec._replace(two_phase=True), *writing),
        "generators": ensemble.make_ensemble(spec, config.selection.generators, n.labels),
        "evaluator": policy.make_evaluator(spec, setting.bias),
        **{name: policy.make_scorer(spec, name, n.labels) for name in SCORERS},
    }
    inits = {"generators": functools.partial(ensemble.init, spec, config.selection.generators)}
    numbers = {item: number for number, item in enumerate(catalogue.items, start=1)}
    counts = np.concatenate([[0.0], np.log1p(np.asarray(catalogue.counts, np.float64))]).astype(np.float32)
    encode = encoder(numbers, counts, config.data.history_max, n.list_length)
    # All read the same queries, so one of them asks whether these are sound.
    needs = {
        "retrieval": _needs_scores(config),
        "topics": "selection.mmr asks for them" if config.selection.mmr else "",
    }
    checks = {"generator": functools.partial(_check_queries, encode, _needs_lists(config), needs)}
    return {
        name: _policy(parts, inits.get(name), encode, catalogue, checks.get(name, _no_check))
        for name, parts in made.items()
    }


def make_spec(config: RankerConfig, num_items: int) -> RankerSpec:
    """The fields of `network` that are sizes have the same names in both."""
    sizes = {name: value for name, value in vars(config.network).items() if name in RankerSpec._fields}
    return RankerSpec(num_items=num_items, history_max=config.data.history_max, **sizes)


def make_setting(config: RankerConfig, spec: RankerSpec) -> proposals.Setting:
    bias = config.bias.kind, config.bias.weight
    return proposals.Setting(spec, config.proposals.noise, config.proposals.mmr_lambda, bias)


def selections(config: RankerConfig, policies: dict[str, Policy]) -> dict[str, Selection]:
    """`g_e`, `mg_e_3`: the evaluator's best of what one generator, or the first three, would write. And `mmr_0.8`."""
    items = policies["generator"].table["items"].shape[0] - 1
    spec = make_spec(config, items)
    setting = make_setting(config, spec)

    def select(count: int, params: PyTree, frozen: PyTree, query: RankerQuery):
        each = max(config.selection.lists // count, 1)
        return None, ensemble.best_of(spec, setting, count, each, params["generators"], params["evaluator"], query)

    def diversify(weight: float, params: PyTree, frozen: PyTree, query: RankerQuery):
        return policy.as_given(proposals.diversified(spec, params["pointwise"], query, weight), RANK)

    sizes = {name: num_params(policies[name].table) for name in ("generator", "evaluator", "pointwise")}
    reads, made = selected(config), {}
    for count in config.selection.sizes:
        read = count * sizes["generator"] + sizes["evaluator"]
        made[_row(count)] = Selection(reads[_row(count)], functools.partial(select, count), read)
    for weight in config.selection.mmr:
        name = _mmr_row(weight)
        made[name] = Selection(reads[name], functools.partial(diversify, weight), sizes["pointwise"])
    return made


def selected(config: RankerConfig) -> dict[str, tuple[str, ...]]:
    """Rows of `selections`, and the stages that each reads."""
    s = config.selection
    by_evaluator = {_row(count): ("generators", "evaluator") for count in s.sizes}
    return by_evaluator | {_mmr_row(weight): ("pointwise",) for weight in s.mmr}


def unprompted(config: RankerConfig) -> str:
    return "a ranker of items is asked nothing in words: leave it empty"


def _row(count: int) -> str:
    return "g_e" if count == 1 else f"mg_e_{count}"


def _mmr_row(weight: float) -> str:
    return f"mmr_{weight:g}"


def _needs_lists(config: RankerConfig) -> bool:
    """Whether something is trained that learns from shown lists alone."""
    trained = {stage.policy for stage in stages(config).values() if stage.steps and stage.source == "logged"}
    return "evaluator" in trained or bool(trained) and config.network.labels == "feedback"


def _needs_scores(config: RankerConfig) -> str:
    """What is trained on first-stage scores, in words; "" for nothing. Elsewhere they may be missing, and count 0."""
    trained = [stage for stage in stages(config).values() if stage.steps]
    if any(stage.policy == "dlcm" for stage in trained):
        return "dlcm reads pools in their order"
    proposed = {name for name, _ in config.proposals.mix} & proposals.BY_RETRIEVAL
    if proposed and any(stage.source == "mixed" for stage in trained):
        return f"proposals.mix asks for {' and '.join(sorted(proposed))}"
    return ""


def _check_queries(
    encode: Callable, needs_lists: bool, needs: dict[str, str], mesh: Mesh, dataset: Dataset, ends_on: str
) -> None:
    """See Policy.check: all queries but those of a large training split, which are read in their turn.

    needs: why each of _OPTIONAL is needed, in words; "" where it is not. Raises DataError.
    """
    for name, split in dataset.splits.items():
        if name != "train":
            encode(list(split))
    first = dataset.splits["train"][:_FIRST] if "train" in dataset.splits else []
    if first and not dataset.sampled_negatives:
        encode(first)
    if first and needs_lists and not any(row.logged for row in first):
        raise DataError(
            f"data set {dataset.name!r} has no shown lists (`logged`) in its first {len(first)} training "
            "queries, and evaluator, or network.labels='feedback', learn from nothing else"
        )
    for name, reason in needs.items():
        if reason and (bare := next((row for row in first if not getattr(row, name)), None)):
            raise DataError(
                f"query {bare.query_id!r} of data set {dataset.name!r} has no {_OPTIONAL[name]} (`{name}`), and "
                f"{reason}: give {_OPTIONAL[name].split()[-1]}, or leave that out"
            )


def _no_check(mesh: Mesh, dataset: Dataset, ends_on: str) -> None:
    return None


def _policy(
    parts: policy.Parts, make: Callable | None, encode: Callable, catalogue: Catalogue, check: Callable
) -> Policy:
    """make: (key) -> its random start, where that is not one network's."""
    spec, make = parts.spec, make or functools.partial(network.init, parts.spec, parts.table)

    def init(key: jax.Array, shardings: PyTree) -> PyTree:
        return jax.jit(make, out_shardings=shardings)(key)

    def sizes(query: RankerQuery) -> dict[str, int]:
        return {"S": query.history.shape[1] + query.candidates.shape[1], "T": spec.steps}

    def of_group(source):
        return lambda stage: source(stage.group_size)

    return Policy(
        table=parts.table,
        dtype=spec.param_dtype,
        init=init,
        outcomes=parts.outcomes,
        encode=encode,
        blank=blank(spec.list_length),
        sources={name: of_group(source) for name, source in parts.sources.items()},
        logprobs=parts.logprobs,
        greedy=parts.greedy,
        turns=parts.turns,
        choices=parts.choices,
        rewards=parts.rewards,
        summary=(
            f"{num_params(parts.table):,} parameters: width {spec.hidden_size}, {spec.num_items:,} items, "
            f"lists of {spec.list_length}"
        ),
        sizes=sizes,
        check=check,
        files=policy_files(spec, catalogue),
        fit=parts.fit,
    )


def _catalogue(dataset: Dataset | None) -> Catalogue:
    """The items of a data set, in its order, and how often each was consumed in training queries.

    As a positive candidate or in a history; queries of one user repeat their histories, and count again.

    A training query's own positives are among them, and are to be: so the feature is one number for each item in
    every query, and beside the item's embedding, learnt from the same labels, it tells nothing of a query. Without
    the query's own, the number would be smaller just where an item is positive, and an embedding, which can hold the
    count, would read the label from the difference, in training only.
    """
    if dataset is None:
        raise ConfigError("the run directory describes no ranker (items.json): give its training command again")
    counts: Counter[str] = Counter()
    for example in dataset.splits.get("train", ()):
        relevant = (item for item, gain in zip(example.candidates, example.relevance, strict=True) if gain > 0)
        counts.update(item for item, _ in (*example.history, *relevant))
    items = [item for item, _ in dataset.catalogue] or _items_of(dataset)
    return Catalogue(tuple(items), tuple(counts[item] for item in items))


def _items_of(dataset: Dataset) -> list[str]:
    """Every item of the given pools and histories, as they come: of data whose pools are given."""
    every: dict[str, None] = {}
    for split in dataset.splits.values():
        for example in split:
            every |= dict.fromkeys(item for item, _ in (*example.candidates, *example.history))
    return list(every)
