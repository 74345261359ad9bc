"""What a policy is to training and evaluation, which know no model: the part of types.py that is about policies."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax

from fgrpo_jax.types import Outcome, PyTree, map_params


class Selection(NamedTuple):
    """A way to make lists with what several finished stages learnt, as a generator-evaluator does.

    stages: whose parameters it reads. greedy: ({stage: params}, {}, query) -> (Rollout or None, Lists), G = 1.
    parameters: how many it reads.
    """

    stages: tuple[str, ...]
    greedy: Callable
    parameters: int


class PolicyFiles(NamedTuple):
    """What describes a policy in a run directory, so that the directory can be moved and used alone.

    save: (run_dir) -> None: writes what is not there yet.
    check: (run_dir) -> None: raises ConfigError where that run's policy is another one, so that its
        parameters do not fit or mean something else.
    exports: by form, (out_dir, params, frozen) -> None: for other programs. frozen: as Policy's, the base alone.
    """

    save: Callable
    check: Callable
    exports: dict[str, Callable]


class Base(NamedTuple):
    """Parameters of a policy that no stage trains: `frozen` holds them as "base", whatever the stage.

    table: a tree of Param. dtype: of the stored ones. load: (shardings) -> the parameters, in their places.
    bare: what the policy's functions take for `params` where the base is to compute alone: a tree without leaves.
    """

    table: PyTree
    dtype: str
    load: Callable
    bare: PyTree


class Footprint(NamedTuple):
    """What a policy knows of the memory that it needs beside parameters and moments, of one device.

    beside: (an encoded query, queries of a device, group size, microbatches, size of the tensor axis) -> bytes of
        "activations" that an update keeps, and of "caches" and "copies" of weights that sampling keeps; estimates.
    lighter_state, lighter_step: settings of its own that make parameters and moments, or the rest, smaller.
    """

    beside: Callable
    lighter_state: str
    lighter_step: str


class Policy(NamedTuple):
    """What training and evaluation know of a policy: everything that only it knows is behind these.

    `frozen` holds what is never updated, by name: "reference", the parameters that a KL term
    holds it to, where it has one, those of the stages in `frozen_from`, and "base". It is always passed explicitly.

    table: its parameters, a tree of Param. dtype: of the stored ones.
    init: (key, shardings) -> params, in their places: random ones, or those of a checkpoint.
    outcomes: what Lists.outcome counts in; the first is OK.
    encode: (list of RankingExample) -> a query: a pytree of numpy arrays [B,...] as small as these
        examples allow, with `relevance` [B,C] and `n_candidates` [B] among them; raises DataError
        naming the query id. Two threads may call it at once.
    blank: a query of numpy arrays [1,...]: what each array may be padded with, so that hosts
        that encode parts of a batch can make their shapes equal.
    sources: where rollouts come from, by name: (a stage's configuration) -> (params, frozen, query,
        key) -> (Rollout, Lists); pure, to be jitted. As logprobs and greedy that sees the queries of
        one shard (shards.by_query), and treats them one by one: it asks for weights with
        shards.whole and for random numbers with shards.uniform.
    logprobs: (params, frozen, query, rollout) -> [B,G,T] float32; differentiable.
    greedy: (params, frozen, query) -> (Rollout, Lists) with G = 1, the most probable action everywhere.
    turns: (query, rollout) -> Turns; None where actions write no lists.
    choices: (params, frozen, query, rollout) -> (as logprobs, the probability [B,G,T,C] that an action names
        each candidate: that of a token shared out evenly among the candidates it leaves possible); differentiable;
        None where actions write no lists, or choices are not those of a grammar.
    rewards: learned ones by name, beside rewards.REWARDS: k -> (lists, query, frozen) -> [B,G].
    summary: its size in words, for the plan.
    sizes: (query) -> {"S": ..., "T": ...}: how long an encoded query and a rollout are.
    check: (mesh, dataset, split) -> None: refuses, before anything compiles, what it cannot be
        trained on: raises ConfigError for this machine, DataError for queries of any split; `split`
        is the one that the run ends on.
    files: how a run directory describes it.
    base: what it reads of its own and never trains.
    write: (params, frozen, prompt [B,S] right-padded, prompt_len [B], most) -> [B,most] tokens that it goes on with,
        greedily; as sources, but that `most` is a number; None where it writes no text.
    prompted: by name, (examples, write) -> (slate, ranking, Outcome) of each, on the host: lists that its start, not
        trained yet, gives when it is asked; there, write: (token ids of prompts, most) -> those of the answers.
    footprint: the memory that a step needs; None where it is small beside what a device has.
    fit: of a model of feedback to lists that were shown: (params, frozen, query) -> (logit, feedback, shown),
        [B,J,T] each of J lists: of positive feedback as it sees them, what it was, and where there is a position.
    """

    table: PyTree
    dtype: str
    init: Callable
    outcomes: tuple[Outcome, ...]
    encode: Callable
    blank: PyTree
    sources: dict[str, Callable]
    logprobs: Callable
    greedy: Callable
    turns: Callable | None
    choices: Callable | None
    rewards: dict[str, Callable]
    summary: str
    sizes: Callable
    check: Callable
    files: PolicyFiles
    fit: Callable | None = None
    base: Base | None = None
    write: Callable | None = None
    prompted: dict[str, Callable] | None = None
    footprint: Footprint | None = None

    def shapes(self) -> PyTree:
        """Its parameters as ShapeDtypeStructs."""
        return map_params(lambda p: jax.ShapeDtypeStruct(p.shape, self.dtype), self.table)
