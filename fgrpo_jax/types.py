"""Axes and types: the legend every other module is read with.

Array names end in their axes, one letter each:

    B query (of the global batch)      S prompt token      L layer
    G rollout of a query's group       C candidate         D model width
    T action (token of a transcript)   W identifier token  V vocabulary
    P phase (0 slate, 1 rank)          N slate slot        M choice of the next token
    R credit term                      K rank slot         U token that can be a choice
                                       E head width        H head, J key/value head

`advantage_BGP` is an advantage for each query, rollout and phase. The group stays an
axis: it is never flattened into the batch and recovered by reshape.

Two numberings of phases meet in `Rollout.phase`: labels of actions are 0 untrained, 1 slate,
2 rank, while the P axis holds only the two trained phases, slate at 0 and rank at 1: PHASES
names them in order and TRAINED holds their labels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax

UNTRAINED, SLATE, RANK = 0, 1, 2
PHASES, TRAINED = ("slate", "rank"), (SLATE, RANK)  # the P axis, in order: names, labels of actions

Array = jax.Array
PyTree = Any


class Param(NamedTuple):
    """A parameter, declared once: initialisation, optimizer, shardings and files all read it here.

    shape: of the whole array. axes: a logical axis (shards.RULES) for each dimension.
    init: "normal", "ones", "zeros" or "log_uniform". decay: whether weight decay applies to it.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: str
    decay: bool


def is_param(leaf: Any) -> bool:
    return isinstance(leaf, Param)


def map_params(function: Callable, table: PyTree, *trees: PyTree) -> PyTree:
    """`function(param, *leaves)` for every Param of a table and the leaves in its place."""
    return jax.tree.map(function, table, *trees, is_leaf=is_param)


def num_params(table: PyTree) -> int:
    """The numbers in a table of Param."""
    return sum(math.prod(p.shape) for p in jax.tree.leaves(table, is_leaf=is_param))


class LoggedList(NamedTuple):
    """A list that was shown, and what the user did with it.

    items: indices into the example's candidates, in the order shown, distinct.
    feedback: of each position, from 0 (passed over) to 1 (taken); as long as `items`.
    """

    items: tuple[int, ...]
    feedback: tuple[float, ...]


class Missed(NamedTuple):
    """A relevant item that the pool lacks: no list can hold it, and it counts in what could have been found."""

    item: str  # its id
    gain: float
    topic: int = -1  # -1: none


@dataclasses.dataclass(frozen=True)
class RankingExample:
    """One query and its pool, on the host.

    query_id: unique within a split.
    query: free text (a question); empty when the history is the query.
    candidates: the pool, `(id, text)` each; ids are unique within a pool, texts need not be.
    relevance: graded gain of each candidate, >= 0, finite; 0 is not relevant.
    history: items the user consumed before, oldest first, `(id, text)` each.

    What only some data sets have, () elsewhere:
    retrieval: score of each candidate by the first stage that proposed the pool, finite, higher is better.
    topics: group of each candidate (a genre), >= 0, for redundancy and diversity.
    logged: lists of candidates that were shown.
    missed: relevant items that the pool lacks.
    """

    query_id: str
    query: str
    candidates: tuple[tuple[str, str], ...]
    relevance: tuple[float, ...]
    history: tuple[tuple[str, str], ...] = ()
    retrieval: tuple[float, ...] = ()
    topics: tuple[int, ...] = ()
    logged: tuple[LoggedList, ...] = ()
    missed: tuple[Missed, ...] = ()


@flax.struct.dataclass
class Rollout:
    """Groups of transcripts. `logp` is the sampling policy's own log-probability."""

    actions: Array  # [B,G,T] int32; eos after the end
    phase: Array  # [B,G,T] int32: UNTRAINED, SLATE or RANK
    logp: Array  # [B,G,T] float32; 0 where untrained


@flax.struct.dataclass
class Lists:
    """What the rollouts say, as candidate indices; -1 is an empty slot.

    A list holds the items completed before the first violation, so a slate that broke
    may be non-empty: whether it counts is decided by `outcome`, never by the length.
    """

    slate: Array  # [B,G,N] int32
    ranking: Array  # [B,G,K] int32
    outcome: Array  # [B,G] int32, index into the policy's outcomes


class Outcome(NamedTuple):
    """How a rollout ended. `breaks` is the phase whose rule it broke; None: it is well-formed.

    What broke in the slate leaves nothing that counts, what broke in the rank phase its slate.
    """

    name: str
    breaks: str | None


OK = Outcome("ok", None)


@flax.struct.dataclass
class Turns:
    """What the actions of rollouts are in the lists that they write.

    A token that several candidates' identifiers share names all of them that it leaves possible.
    """

    place: Array  # [B,G,T] int32: items that the current phase's list had before
    named: Array  # [B,G,T,C] bool: the candidates that the action leaves possible as the next item; none: a literal
    open: Array  # [B,G,T] bool: whether it could have named one


@flax.struct.dataclass
class Batch:
    """Everything an update needs. `old_logp`, `ref_logp` and `value` are None unless used."""

    query: PyTree
    rollout: Rollout
    reward: Array  # [B,G,R] float32: one per credit term, unweighted
    advantage: Array  # [B,G,T] float32
    weight: Array  # [B,G,T] float32, normalised over the global batch
    old_logp: Array | None = None  # [B,G,T]: several epochs per rollout batch
    ref_logp: Array | None = None  # [B,G,T]: KL to a frozen reference
    value: Array | None = None  # [B,G,T,C]: of naming each candidate, where credit.scheme says so


class Credit(NamedTuple):
    """Which reward trains which phase, and what of it an action gets. Hashable, so it can be a static argument.

    terms: `(phase, reward name, weight)` each, phase being "slate" or "rank".
    normalise: "none" (centred, Dr. GRPO), "each" (every reward centred and divided by
        its group's population std, then weighted and summed), "sum" (weighted, summed,
        then centred and divided).
    scheme, shrinkage: see algorithm/credit.py.
    of_slate: rewards that read the whole slate, beside rewards.COVERAGE.
    """

    terms: tuple[tuple[str, str, float], ...]
    normalise: str = "none"
    scheme: str = "group"
    shrinkage: float = 1.0
    of_slate: tuple[str, ...] = ()


@flax.struct.dataclass
class TrainState:
    """`step` counts rollout batches; the optimizer keeps its own count of updates."""

    step: Array  # [] int32
    params: PyTree
    opt_state: PyTree


@flax.struct.dataclass
class Mean:
    """A sum and a count, so microbatches and hosts add exactly; 0/0 reads as 0."""

    sum: Array
    count: Array

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.sum + other.sum, self.count + other.count)

    def value(self) -> float:
        count = float(self.count)
        return float(self.sum) / count if count else 0.0


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
