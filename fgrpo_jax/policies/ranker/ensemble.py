"""Several generators that differ in their random starts alone, and the evaluator's choice among their lists.

The generator-evaluators that GoalRank is compared with (arXiv 2509.22046: one generator, 3, 20 and 100 of them;
how theirs differ is not said). The generators of an ensemble are one policy, whose parameters have a leading
axis M: one stage trains, saves and resumes them all, at the step that is best by eval.metric for the first (or, with
the stage's metric "likelihood", by their mean). They learn by imitation, each with its own ties among the
targets. The gradient is clipped by the norm of all; Adam's steps do not depend on its scale, so apart from
clipping each is trained as it would be alone.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from fgrpo_jax.policies.ranker import generator, network, proposals
from fgrpo_jax.policies.ranker.network import RankerSpec
from fgrpo_jax.policies.ranker.policy import Parts, Source, as_given, target_lists
from fgrpo_jax.policies.ranker.query import RankerQuery
from fgrpo_jax.types import RANK, Array, Lists, PyTree, map_params


def make_ensemble(spec: RankerSpec, members: int, labels: str) -> Parts:
    """`members` generators by imitation of `labels` (see policy.make_generator); `greedy` is the first one's."""
    table = map_params(
        lambda p: p._replace(shape=(members, *p.shape), axes=("member", *p.axes)), network.generator_table(spec)
    )

    def logged(group: int) -> Source:
        """A target list for each member, [B,M,T], whatever the group size."""

        def source(params, frozen, query, key):
            return target_lists(spec, query, key, members, labels)

        return source

    def logprobs(params, frozen, query, rollout):
        def of_member(one: tuple) -> Array:
            own, lists = one
            lists = jax.tree.map(lambda x: x[:, None], lists)
            return generator.logprobs(spec, generator.encode(spec, own, query), lists)[:, 0]

        by_member = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), rollout)
        return jnp.moveaxis(jax.lax.map(of_member, (params, by_member)), 0, 1)

    def greedy(params, frozen, query):
        first = jax.tree.map(lambda x: x[0], params)
        return generator.sample(spec, generator.encode(spec, first, query), None, 1)

    return Parts(spec, table, {"logged": logged}, logprobs, greedy, {})


def init(spec: RankerSpec, members: int, key: Array) -> PyTree:
    """Random weights, those of each member from a key of its own: the first ones do not depend on `members`."""
    one = functools.partial(network.init, spec, network.generator_table(spec))
    return jax.vmap(lambda member: one(jax.random.fold_in(key, member)))(jnp.arange(members))


def best_of(
    spec: RankerSpec, setting: proposals.Setting, count: int, each: int, generators: PyTree, evaluator: PyTree,
    query: RankerQuery,
) -> Lists:  # fmt: skip
    """Generator-evaluator selection: of the lists of the first `count` generators, the evaluator's best, G = 1.

    each: lists of every generator, the most probable ones that a beam of this width finds: nothing is drawn,
    so a query's list does not depend on the others of its batch.
    """

    def lists_of(params: PyTree) -> Array:
        return generator.beam(spec, generator.encode(spec, params, query), each)[1].ranking

    list_MBGT = jax.lax.map(lists_of, jax.tree.map(lambda x: x[:count], generators))
    list_BGT = jnp.moveaxis(list_MBGT, 0, 1).reshape(list_MBGT.shape[1], -1, spec.list_length)
    return as_given(proposals.best(setting, evaluator, query, list_BGT), RANK)[1]
