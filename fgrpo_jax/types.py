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
