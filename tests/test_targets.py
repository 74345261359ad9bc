"""What SFT imitates: lists from labels, and the transcripts that say them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit

from fgrpo_jax.policies.llm import transcript
from fgrpo_jax.policies.llm.query import Query
from fgrpo_jax.policies.llm.targets import rollout as target_rollout
from fgrpo_jax.policies.llm.targets import target_lists
from fgrpo_jax.types import UNTRAINED

B = 600
relevances = [(0, 2, 0, 1, 0), (1, 1, 1, 1, 0), (0, 0, 0, 0, 3), (1, 0), (0, 2, 1), (0, 0, 0, 0, 0)]


@pytest.fixture(scope="module")
def labelled():
    """B x 6 queries: more relevant candidates than slots, ties, a pool below slate_min + 1."""
    relevance = np.zeros((6, 5), np.float32)
    for b, gains in enumerate(relevances):
        relevance[b, : len(gains)] = gains
    n = np.tile([len(gains) for gains in relevances], B).astype(np.int32)
    identifiers = np.where(np.arange(5) < n[:, None], np.arange(10, 15), -1).astype(np.int32)[..., None]
    ones = jnp.ones(6 * B, jnp.int32)
    return Query(ones[:, None], ones, jnp.asarray(identifiers), jnp.tile(relevance, (B, 1)), jnp.asarray(n))


def grammar_of(slate_min=2):
    return transcript.Grammar(
        separator=(), slate_close=(3,), rank_close=(4,), eos=1,
        slate_min=slate_min, slate_max=3, rank_min=2, rank_max=2,
    )  # fmt: skip


@pytest.mark.parametrize("fill", ["first", "shuffled"])
def test_targets(labelled, fill):
    lists = quick_jit(target_lists, static_argnums=(0, 3))(grammar_of(3), labelled, jax.random.key(0), fill)
    slate, ranking = jax.device_get(lists)
    assert slate.shape == (6 * B, 1, 3) and ranking.shape == (6 * B, 1, 2)
    orders = [set() for _ in relevances]
    for b in range(6 * B):
        gains = relevances[b % 6]
        items, ranked = ([c for c in x[b, 0].tolist() if c >= 0] for x in (slate, ranking))
        assert len(items) == min(3, len(gains)) and len(ranked) == min(2, len(items))
        assert len(set(items)) == len(items) and set(ranked) <= set(items) <= set(range(len(gains)))
        best = sorted(gains, reverse=True)
        assert sorted((gains[c] for c in items), reverse=True) == best[: len(items)]
        assert [gains[c] for c in ranked] == best[: len(ranked)]  # the relevant ones, then fill
        if fill == "first":
            assert [gains[c] for c in items] == best[: len(items)]
            assert ranked == items[: len(ranked)]
        orders[b % 6].add(tuple(items))
    # Ties and fill are drawn: all orders there can be occur.
    assert [len(o) for o in orders] == ([3, 24, 12, 1, 1, 60] if fill == "first" else [18, 24, 36, 2, 6, 60])


def test_slates_grow_with_the_relevant_candidates(labelled):
    slate, _ = quick_jit(target_lists, static_argnums=(0, 3))(grammar_of(2), labelled, jax.random.key(0), "first")
    assert (slate[:6, 0] >= 0).sum(-1).tolist() == [2, 3, 2, 2, 2, 2]


@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("train_fill", [True, False])
def test_logged_rollouts(labelled, constrained, train_fill):
    """All read back as ok; forced tokens (constrained) and fill (on request) are not trained."""
    grammar = grammar_of(3)
    write = target_rollout(grammar, constrained, "first", train_fill)
    rollout, lists = jax.device_get(quick_jit(write)({}, {}, labelled, jax.random.key(0)))
    assert (lists.outcome == 0).all() and (rollout.logp == 0).all()
    for b, gains in enumerate(relevances):
        n, items = len(gains), [c for c in lists.slate[b, 0] if c >= 0]
        expected = []
        for t, c in enumerate(items):
            forced = constrained and n - t == 1
            expected.append(0 if forced or (not train_fill and gains[c] == 0) else 1)
        expected += [0 if constrained else 1]  # slates are as long as they can be: the tag is forced
        for t, c in enumerate(lists.ranking[b, 0]):
            forced = constrained and len(items) - t == 1
            expected.append(0 if forced or (not train_fill and gains[c] == 0) else 2)
        expected += [0, 0] if constrained else [2, 2]
        assert rollout.phase[b, 0].tolist() == expected + [UNTRAINED] * (rollout.phase.shape[-1] - len(expected))
