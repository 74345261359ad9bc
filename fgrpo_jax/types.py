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
    init: "normal" or "ones". decay: whether weight decay applies to it.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: str
    decay: bool


def map_params(function: Callable, table: PyTree, *trees: PyTree) -> PyTree:
    """`function(param, *leaves)` for every Param of a table and the leaves in its place."""
    return jax.tree.map(function, table, *trees, is_leaf=lambda x: isinstance(x, Param))


class TrainingError(RuntimeError):
    """Training cannot go on; nothing bad was written into parameters or checkpoints."""


@dataclasses.dataclass(frozen=True)
class RankingExample:
    """One query and its pool, on the host.

    query_id: unique within a split.
    query: free text (a question); empty when the history is the query.
    candidates: the pool, `(id, text)` each; ids and texts are unique within a pool.
    relevance: graded gain of each candidate, >= 0, finite; 0 is not relevant.
    history: items the user consumed before, oldest first, `(id, text)` each.
    """

    query_id: str
    query: str
    candidates: tuple[tuple[str, str], ...]
    relevance: tuple[float, ...]
    history: tuple[tuple[str, str], ...] = ()


@flax.struct.dataclass
class Query:
    """A batch of encoded queries, on the device.

    Prompts are right-padded; a mask always comes from `prompt_len`, never from a token
    value. `identifiers` and `relevance` are padded with -1 and 0 beyond `n_candidates`.
    """

    prompt: Array  # [B,S] int32
    prompt_len: Array  # [B] int32, >= 1
    identifiers: Array  # [B,C,W] int32, -1 padded: how each candidate is named
    relevance: Array  # [B,C] float32
    n_candidates: Array  # [B] int32, >= 1


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
class Batch:
    """Everything an update needs. `old_logp` and `ref_logp` are None unless used."""

    query: Query
    rollout: Rollout
    reward: Array  # [B,G,R] float32: one per credit term, unweighted
    advantage: Array  # [B,G,T] float32
    weight: Array  # [B,G,T] float32, normalised over the global batch
    old_logp: Array | None = None  # [B,G,T]: several epochs per rollout batch
    ref_logp: Array | None = None  # [B,G,T]: KL to a frozen reference


class Credit(NamedTuple):
    """Which reward trains which phase. Hashable, so it can be a static argument.

    terms: `(phase, reward name, weight)` each, phase being "slate" or "rank".
    normalise: "none" (centred, Dr. GRPO), "each" (every reward centred and divided by
        its group's population std, then weighted and summed), "sum" (weighted, summed,
        then centred and divided).
    """

    terms: tuple[tuple[str, str, float], ...]
    normalise: str = "none"


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


class Policy(NamedTuple):
    """What training and evaluation know of a policy.

    `frozen` holds what is never updated (a reference policy); it is always passed explicitly.

    outcomes: what Lists.outcome counts in; the first is OK.
    encode: (list of RankingExample) -> Query, as numpy arrays as small as these examples
        allow; raises DataError naming the query id.
    blank: a Query of numpy arrays [1,...]: what each array may be padded with, so that hosts
        that encode parts of a batch can make their shapes equal.
    rollout: (params, frozen, query, key) -> (Rollout, Lists); pure, to be jitted. As logprobs and
        greedy it sees the queries of one shard (shards.by_query), and treats them one by one: it
        asks for weights with shards.whole and for random numbers with shards.uniform.
    logprobs: (params, frozen, query, rollout) -> [B,G,T] float32; differentiable.
    greedy: as rollout with G = 1 and the most probable action everywhere.
    """

    outcomes: tuple[Outcome, ...]
    encode: Any
    blank: Query
    rollout: Any
    logprobs: Any
    greedy: Any
