"""The ranker's networks as policies: the generator, the evaluator, and those that score candidates.

`frozen` maps the names of finished stages to their parameters: "evaluator" and "pointwise". Everything here
is pure and treats queries one by one, so it can run on the shards of a batch (fgrpo_jax.shards).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fgrpo_jax import shards
from fgrpo_jax.algorithm.rewards import TOPICAL
from fgrpo_jax.policies.ranker import generator, network, proposals, scorers
from fgrpo_jax.policies.ranker.network import RankerSpec
from fgrpo_jax.policies.ranker.query import RankerQuery
from fgrpo_jax.policies.ranker.rerankers import SCORERS
from fgrpo_jax.types import OK, RANK, UNTRAINED, Array, Lists, Outcome, PyTree, Rollout

Source = Callable[[PyTree, PyTree, RankerQuery, Array], tuple[Rollout, Lists]]
LABELS = ("relevance", "feedback")


class Parts(NamedTuple):
    """What a policy is made of, but for `encode` and `blank` (query.py), which know the catalogue.

    spec: its sizes. table: its Params.
    sources: by name, (group size) -> ((params, frozen, query, key) -> (Rollout, Lists)).
    logprobs: (params, frozen, query, rollout) -> [B,G,T]. greedy: (params, frozen, query) -> as a source, G = 1.
    rewards: by name, (k) -> ((lists, query, frozen) -> [B,G]). fit: as Policy's.
    turns, choices: as Policy's; None where no lists are written.
    """

    spec: RankerSpec
    table: PyTree
    sources: dict[str, Callable[[int], Source]]
    logprobs: Callable
    greedy: Callable
    rewards: dict[str, Callable]
    turns: Callable | None = None
    choices: Callable | None = None
    outcomes: tuple[Outcome, ...] = (OK,)  # decoding cannot break a rule
    fit: Callable | None = None


def learned_rewards(setting: proposals.Setting) -> dict[str, Callable]:
    """Rewards of rankings, cut at k: what frozen networks say of them, and those that read topics."""

    def build(stage: str, of_lists: Callable) -> Callable:
        biased = functools.partial(of_lists, bias=setting.bias) if stage == "evaluator" else of_lists

        def at(k: int) -> Callable:
            return lambda lists, query, frozen: biased(setting.judge, frozen[stage], query, lists.ranking, k)

        return at

    return TOPICAL | {name: build(*reads) for name, reads in scorers.REWARDS.items()}


# --------------------------------------------------------------------- the generator


def make_generator(
    spec: RankerSpec, setting: proposals.Setting, mix: tuple[tuple[str, int], ...] = (), labels: str = "relevance",
    beam: int = 1,
) -> Parts:  # fmt: skip
    """The generator of lists.

    setting: of the proposals, which also names the sizes of evaluator and point-wise network.
    mix: the proposals of a "mixed" group, (name, number) each; the rest of it are own samples, which come first.
    labels: what the "logged" source imitates: candidates by "relevance", or by the best "feedback" in logged lists.
    beam: lists kept by `greedy`, which returns the best.

    Raises ValueError on an unknown name or label, and for a group without room for an own sample.
    """
    if unknown := [name for name, _ in mix if name not in proposals.PROPOSALS]:
        raise ValueError(f"no proposal is called {', '.join(unknown)}; there are {', '.join(proposals.PROPOSALS)}")
    _check_labels(labels)
    table = network.generator_table(spec)

    def sampled(group: int) -> Source:
        def source(params, frozen, query, key):
            return generator.sample(spec, generator.encode(spec, params, query), key, group)

        return source

    def logged(group: int) -> Source:
        def source(params, frozen, query, key):
            return target_lists(spec, query, key, group, labels)

        return source

    def logprobs(params, frozen, query, rollout):
        return generator.logprobs(spec, generator.encode(spec, params, query), rollout)

    def choices(params, frozen, query, rollout):
        return generator.choices(spec, generator.encode(spec, params, query), rollout)

    def greedy(params, frozen, query):
        encoded = generator.encode(spec, params, query)
        if beam == 1:
            return generator.sample(spec, encoded, None, 1)
        return jax.tree.map(lambda x: x[:, :1], generator.beam(spec, encoded, beam))

    sources = {"sampled": sampled, "logged": logged, "mixed": functools.partial(_mixed, spec, setting, mix)}
    rewards = learned_rewards(setting)
    turns = functools.partial(generator.turns, spec)
    return Parts(spec, table, sources, logprobs, greedy, rewards, turns, choices)


def _mixed(spec: RankerSpec, setting: proposals.Setting, mix: tuple[tuple[str, int], ...], group: int) -> Source:
    """Own samples, then proposals; `logp` is the generator's own for both, though it sampled only the former."""
    own = group - sum(count for _, count in mix)
    if own < 1:
        raise ValueError(f"a group of {group} has no room for own samples beside {group - own} proposals")

    def source(params, frozen, query, key):
        encoded = generator.encode(spec, params, query)
        rollout, lists = generator.sample(spec, encoded, jax.random.fold_in(key, 0), own)
        proposed = proposals.propose(setting, mix, frozen, query, jax.random.fold_in(key, 1), lists.ranking)
        others, other_lists = generator.written_by_others(spec, encoded.present_BC, proposed)
        others = others.replace(logp=generator.logprobs(spec, encoded, others))
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), (rollout, lists), (others, other_lists))

    return source


def target_lists(spec: RankerSpec, query: RankerQuery, key: Array, group: int, labels: str) -> tuple[Rollout, Lists]:
    """Lists to imitate: the positive candidates in the order of their gains, ties at random, then others.

    The others only fill the list: their steps are UNTRAINED. `logp` is 0.
    """
    gain_BC = query.relevance if labels == "relevance" else _feedback(query)
    gain_B1C = jnp.where(network.present(query), gain_BC, -1.0)[:, None]  # padding comes last
    tie_BGC = shards.uniform(key, (gain_B1C.shape[0], group, gain_B1C.shape[2]), axis=0)
    by_gain_BGC = jnp.lexsort((tie_BGC, jnp.broadcast_to(-gain_B1C, tie_BGC.shape)), axis=-1)
    place = jnp.arange(spec.list_length)
    list_BGT = by_gain_BGC[..., : spec.list_length].astype(jnp.int32)
    list_BGT = jnp.where(place < query.n_candidates[:, None, None], list_BGT, -1)
    rollout, lists = generator.written_by_others(spec, network.present(query), list_BGT)
    positive_B1T = jnp.tile(place < (gain_B1C > 0).sum(-1, keepdims=True), spec.steps // spec.list_length)
    return rollout.replace(phase=jnp.where(positive_B1T, rollout.phase, UNTRAINED)), lists


def _feedback(query: RankerQuery) -> Array:
    """[B,C]: the best feedback that each candidate had in a logged list; 0 where it was in none."""

    def one(items_X: Array, feedback_X: Array) -> Array:
        beyond = jnp.where(items_X >= 0, items_X, query.candidates.shape[1])
        return jnp.zeros(query.candidates.shape[1]).at[beyond].max(feedback_X, mode="drop")

    batch = query.logged_items.shape[0]
    return jax.vmap(one)(query.logged_items.reshape(batch, -1), query.logged_feedback.reshape(batch, -1))


# --------------------------------------------------------------------- those that judge


def _check_labels(labels: str) -> None:
    if labels not in LABELS:
        raise ValueError(f"labels={labels!r} is not one of {', '.join(LABELS)}")


def as_given(list_BGT: Array, phase: int) -> tuple[Rollout, Lists]:
    """Lists that nobody wrote, -1 padded, whose actions have this label; `logp` is 0."""
    there = list_BGT >= 0
    logp = jnp.zeros(list_BGT.shape, jnp.float32)
    rollout = Rollout(jnp.maximum(list_BGT, 0), jnp.where(there, phase, UNTRAINED).astype(jnp.int32), logp)
    return rollout, Lists(list_BGT, list_BGT, jnp.zeros(list_BGT.shape[:2], jnp.int32))


def _logged(group: int) -> Source:
    """The query's logged lists, [B,J,T]: as many as it has, whatever the group size."""

    def source(params, frozen, query, key):
        return as_given(query.logged_items, RANK)

    return source


def _logged_and_cut(group: int) -> Source:
    """As `_logged`, half of the lists cut after a position drawn uniformly: the evaluator judges prefixes too."""

    def source(params, frozen, query, key):
        list_BJT = query.logged_items
        u = shards.uniform(key, (2, *list_BJT.shape[:2], 1), axis=1)
        length_BJ1 = (list_BJT >= 0).sum(-1, keepdims=True)
        kept_BJ1 = jnp.where(u[0] < 0.5, length_BJ1, 1 + (u[1] * length_BJ1).astype(jnp.int32))
        return as_given(jnp.where(jnp.arange(list_BJT.shape[-1]) < kept_BJ1, list_BJT, -1), RANK)

    return source


def make_evaluator(spec: RankerSpec, bias: tuple[str, float] = scorers.UNBIASED) -> Parts:
    """The list-wise reward model: its log-probabilities are the likelihood of feedback to logged lists.

    A feedback y from 0 to 1 has y log p + (1 - y) log(1 - p). `greedy` builds a list under the evaluator.
    """
    table = network.evaluator_table(spec)

    def logprobs(params, frozen, query, rollout):
        trained = rollout.phase != UNTRAINED
        list_BJT = jnp.where(trained, rollout.actions, -1)
        logit = scorers.evaluator_logits(spec, params, query, list_BJT)
        return scorers.log_likelihood(logit, query.logged_feedback, trained)

    def greedy(params, frozen, query):
        return as_given(scorers.evaluator_greedy(spec, params, query, spec.list_length, bias), UNTRAINED)

    def fit(params, frozen, query):
        list_BJT = query.logged_items
        return scorers.evaluator_logits(spec, params, query, list_BJT), query.logged_feedback, list_BJT >= 0

    return Parts(spec, table, {"logged": _logged_and_cut}, logprobs, greedy, {}, fit=fit)


def make_scorer(spec: RankerSpec, name: str, labels: str = "relevance") -> Parts:
    """A network that scores candidates (rerankers.SCORERS): the likelihood of labels, one by one; `greedy` is the
    order of its scores.

    labels: "relevance" (the source "logged" then gives all candidates, [B,1,C], positive where relevant) or
        "feedback" (the logged lists). Raises ValueError on another.
    """
    _check_labels(labels)
    table, logits = SCORERS[name]

    def logged(group: int) -> Source:
        if labels == "feedback":
            return _logged(group)

        def source(params, frozen, query, key):
            every_BC = jnp.where(network.present(query), jnp.arange(query.candidates.shape[1]), -1)
            return as_given(every_BC[:, None].astype(jnp.int32), RANK)

        return source

    def logits_of(params, query, index_BGT):
        return network.take(logits(spec, params, query)[..., None], index_BGT)[..., 0]

    def logprobs(params, frozen, query, rollout):
        logit_BGT = logits_of(params, query, rollout.actions)
        label = query.logged_feedback if labels == "feedback" else (query.relevance > 0)[:, None].astype(jnp.float32)
        return scorers.log_likelihood(logit_BGT, label, rollout.phase != UNTRAINED)

    def greedy(params, frozen, query):
        score_B1C = logits(spec, params, query)[:, None]
        return as_given(proposals.order(query, score_B1C, spec.list_length), UNTRAINED)

    def fit(params, frozen, query):
        list_BJT = query.logged_items
        return logits_of(params, query, jnp.maximum(list_BJT, 0)), query.logged_feedback, list_BJT >= 0

    return Parts(spec, table(spec), {"logged": logged}, logprobs, greedy, {}, fit=fit)
