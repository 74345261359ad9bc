"""The ranker as a system: see policies/__init__.py."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import jax
import numpy as np

from fgrpo_jax.algorithm.rewards import TOPICAL
from fgrpo_jax.config import ConfigError
from fgrpo_jax.data.datasets import DataError, Dataset
from fgrpo_jax.policies.ranker import network, policy, proposals, validation
from fgrpo_jax.policies.ranker.config import RankerConfig
from fgrpo_jax.policies.ranker.files import Catalogue, policy_files, saved_catalogue
from fgrpo_jax.policies.ranker.network import RankerSpec
from fgrpo_jax.policies.ranker.query import RankerQuery, blank, encoder
from fgrpo_jax.policies.ranker.validation import problems
from fgrpo_jax.stages import stages
from fgrpo_jax.types import Policy, PyTree, Selection

__all__ = ["REWARDS", "policies", "problems", "selections"]

_FIRST = 1000  # training queries that are looked at before training
REWARDS = frozenset(validation.REWARDS) | frozenset(TOPICAL)


def policies(config: RankerConfig, dataset: Dataset | None, run_dir: Path) -> dict[str, Policy]:
    """Generator, its two-phase form, evaluator and point-wise network, which read the same queries.

    The catalogue is the run's own once it has one. Raises ConfigError for a run directory that lacks it and
    comes without data.
    """
    catalogue = saved_catalogue(run_dir) or _catalogue(dataset)
    spec = make_spec(config, len(catalogue.items))
    labels, setting = config.network.labels, make_setting(config, spec)
    two = spec._replace(two_phase=True)
    made = {
        "generator": policy.make_generator(spec, setting, config.proposals.mix, labels, config.network.beam),
        "two_phase": policy.make_generator(two, setting, (), labels, config.network.beam),
        "evaluator": policy.make_evaluator(spec),
        "pointwise": policy.make_pointwise(spec, labels),
    }
    numbers = {item: number for number, item in enumerate(catalogue.items, start=1)}
    counts = np.concatenate([[0.0], np.log1p(np.asarray(catalogue.counts, np.float64))]).astype(np.float32)
    encode = encoder(numbers, counts, config.data.history_max, config.network.list_length)
    del made["two_phase"].sources["mixed"]  # proposals are rankings
    trained = {stage.policy for stage in stages(config).values() if stage.steps}
    by_feedback = {"evaluator"} | ({"pointwise", "generator", "two_phase"} if labels == "feedback" else set())
    return {
        name: _policy(two if name == "two_phase" else spec, parts, encode, catalogue, name in by_feedback & trained)
        for name, parts in made.items()
    }


def make_spec(config: RankerConfig, num_items: int) -> RankerSpec:
    n = config.network
    return RankerSpec(
        num_items=num_items,
        history_max=config.data.history_max,
        list_length=n.list_length,
        hidden_size=n.hidden_size,
        num_layers=n.num_layers,
        list_layers=n.list_layers,
        num_heads=n.num_heads,
        mlp_size=n.mlp_size,
        sees_retrieval=n.sees_retrieval,
        causal_history=n.causal_history,
        init_std=n.init_std,
        dtype=n.dtype,
        param_dtype=n.param_dtype,
        remat=n.remat,
    )


def make_setting(config: RankerConfig, spec: RankerSpec) -> proposals.Setting:
    p = config.proposals
    return proposals.Setting(spec.list_length, spec, spec, p.noise, p.mmr_lambda)


def selections(config: RankerConfig, policies: dict[str, Policy]) -> dict[str, Selection]:
    """`g_e`, `mg_e`: the evaluator's best of what one generator, or several, would write."""
    items = policies["generator"].table["items"].shape[0] - 1
    spec = make_spec(config, items)
    setting = make_setting(config, spec)

    def select(generators: tuple[str, ...], params: PyTree, frozen: PyTree, query: RankerQuery):
        each = config.selection.lists // len(generators)
        of_each = [params[name] for name in generators]
        return None, policy.best_of(spec, setting, each, of_each, params["evaluator"], query)

    rows = {"g_e": config.selection.few, "mg_e": config.selection.several}
    return {
        name: Selection((*generators, "evaluator"), functools.partial(select, generators))
        for name, generators in rows.items()
        if generators
    }


def _policy(spec: RankerSpec, parts: policy.Parts, encode, catalogue: Catalogue, needs_lists: bool) -> Policy:
    def init(key: jax.Array, shardings: PyTree) -> PyTree:
        return jax.jit(parts.init, out_shardings=shardings)(key)

    def sizes(query: RankerQuery) -> dict[str, int]:
        return {"S": query.history.shape[1] + query.candidates.shape[1], "T": spec.steps}

    def check(mesh, dataset: Dataset, split: str) -> None:
        for name, split in dataset.splits.items():
            few = name == "train"  # which may be large: its other queries are read in their turn
            rows = split[:_FIRST] if few else list(split)
            if not (dataset.sampled_negatives and few):
                encode(rows)
            if few and needs_lists and not any(row.logged for row in rows):
                raise DataError(
                    f"data set {dataset.name!r} has no shown lists (`logged`) in its first {len(rows)} training "
                    "queries, and evaluator, or network.labels='feedback', learn from nothing else"
                )

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
        rewards=parts.rewards,
        summary=(
            f"{network.num_params(parts.table):,} parameters: width {spec.hidden_size}, {spec.num_items:,} items, "
            f"lists of {spec.list_length}"
        ),
        sizes=sizes,
        check=check,
        files=policy_files(spec, parts.table, catalogue),
    )


def _catalogue(dataset: Dataset | None) -> Catalogue:
    """The items of a data set, in its order, and how often each was consumed in training queries.

    As a positive candidate or in a history; queries of one user repeat their histories, and count again.
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
