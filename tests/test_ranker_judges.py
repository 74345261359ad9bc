"""Point-wise network, evaluator and proposals: what they see, what they are called, what they learn from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit
from tiny_ranker import SPEC, make_params, make_query, padded

from fgrpo_jax.metrics import dcg
from fgrpo_jax.policies.ranker import network, proposals, scorers
from fgrpo_jax.policies.ranker.proposals import PROPOSALS, Setting

JUDGE = SPEC._replace(num_layers=1, list_layers=1)
SETTING = Setting(JUDGE)
L = JUDGE.list_length

pointwise_logits = quick_jit(scorers.pointwise_logits, static_argnums=0)
evaluator_logits = quick_jit(scorers.evaluator_logits, static_argnums=0)


@pytest.fixture(scope="module")
def evaluator():
    return make_params("evaluator", JUDGE)


@pytest.fixture(scope="module")
def pointwise():
    return make_params("pointwise", JUDGE, 1)


def lists_of(query, count=3, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray([[rng.permutation(n)[:L] for _ in range(count)] for n in query.n_candidates.tolist()], jnp.int32)


# --------------------------------------------------------------------- what they see


def test_pointwise_scores_do_not_depend_on_other_candidates(pointwise):
    query = make_query(full=True)
    base = pointwise_logits(JUDGE, pointwise, query)
    other = query.replace(
        candidates=query.candidates.at[:, 3].set(40), popularity=query.popularity.at[:, 3].add(2.0),
        n_candidates=query.n_candidates - 1,
    )  # fmt: skip
    changed = pointwise_logits(JUDGE, pointwise, other)
    np.testing.assert_allclose(jnp.delete(base, 3, 1), jnp.delete(changed, 3, 1), atol=1e-6)
    assert (jnp.abs(base - changed)[:, 3] > 1e-3).all()
    turned = query.replace(history=query.history[:, ::-1])
    assert (jnp.abs(pointwise_logits(JUDGE, pointwise, turned) - base).max(-1) > 1e-3).all()


def test_the_evaluator_sees_order_and_neighbours(evaluator):
    query = make_query()
    lists = lists_of(query)
    base = evaluator_logits(JUDGE, evaluator, query, lists)
    swapped = evaluator_logits(JUDGE, evaluator, query, lists[..., jnp.array([1, 0, 2, 3])])
    assert (jnp.abs(swapped[..., jnp.array([1, 0, 2, 3])] - base) > 1e-5).all()  # everywhere: all see all
    score, other = (scorers.list_score(jax.nn.sigmoid(x), lists) for x in (base, swapped))
    assert (score != other).all()
    without = evaluator_logits(JUDGE, evaluator, query, lists.at[..., 3].set(-1))
    assert (jnp.abs(without - base)[..., :3].max(-1) > 1e-4).all()
    np.testing.assert_array_equal(  # lists do not see each other
        evaluator_logits(JUDGE, evaluator, query, lists.at[:, 1].set(lists[:, 0]))[:, [0, 2]], base[:, [0, 2]]
    )
    with pytest.raises(ValueError, match="lists of 5 positions; the evaluator was made for 4"):
        scorers.evaluator_logits(JUDGE, evaluator, query, jnp.zeros((4, 1, 5), jnp.int32))


def test_padding_changes_no_score(evaluator, pointwise):
    query = make_query()
    wide, lists = padded(query), lists_of(query)
    there = np.asarray(network.present(query))
    ours, theirs = (pointwise_logits(JUDGE, pointwise, q)[:, : there.shape[1]] for q in (query, wide))
    np.testing.assert_allclose(ours[there], theirs[there], atol=1e-5)
    ours, theirs = (evaluator_logits(JUDGE, evaluator, q, lists) for q in (query, wide))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_list_score():
    p = jnp.asarray([[[0.5, 0.25, 0.75, 1.0]]])
    listed = jnp.asarray([[[3, 0, 2, -1]]])
    expected = 0.5 + 0.25 / np.log2(3) + 0.75 / 2
    np.testing.assert_allclose(scorers.list_score(p, listed), [[expected]], rtol=1e-6)
    np.testing.assert_allclose(scorers.list_score(p, listed, 2), [[0.5 + 0.25 / np.log2(3)]], rtol=1e-6)
    np.testing.assert_allclose(scorers.list_score(p, jnp.asarray([[[0, 1, 2, 3]]])), dcg(p), rtol=1e-6)


def test_likelihood_of_fractions():
    logit = jnp.asarray([-30.0, -1.0, 0.0, 2.0, 20.0])
    p = 1 / (1 + np.exp(-np.float64(logit)))
    known = jnp.asarray([True, True, False, True, True])
    among = np.float64(logit) - np.log(np.exp(np.float64(logit))[known].sum())
    for y in (0.0, 0.25, 1.0):
        expected = np.where(known, y * np.log(p) + (1 - y) * np.log1p(-p) + y * among, 0)
        found = scorers.log_likelihood(logit[None, None], jnp.full((1, 1, 5), y), known[None, None])
        np.testing.assert_allclose(found[0, 0], expected, rtol=1e-4, atol=1e-6)


def test_the_reward_model_expects_a_sum(evaluator):
    """Its probabilities are of items at their positions, so that nothing is discounted again."""
    query = make_query()
    lists = jnp.asarray([[[0, 1, 2, -1]]] * 4, jnp.int32)
    p = jax.nn.sigmoid(evaluator_logits(JUDGE, evaluator, query, lists))[..., :3]
    score = quick_jit(scorers.reward_of_lists, static_argnums=(0, 4))
    np.testing.assert_allclose(score(JUDGE, evaluator, query, lists, None), p.sum(-1), rtol=1e-5)
    np.testing.assert_allclose(score(JUDGE, evaluator, query, lists, 2), p[..., :2].sum(-1), rtol=1e-5)


def test_greedy_lists_under_the_evaluator(evaluator):
    """Each item is the one with which the list so far scores best: by a loop over candidates."""
    query = make_query()
    found = quick_jit(scorers.evaluator_greedy, static_argnums=(0, 3))(JUDGE, evaluator, query, L)
    score = quick_jit(scorers.reward_of_lists, static_argnums=0)
    chosen = np.full((4, 1, L), -1)
    for t in range(L):
        tried = np.repeat(chosen, 8, 1)
        tried[:, :, t] = np.arange(8)
        value = np.array(score(JUDGE, evaluator, query, jnp.asarray(tried, jnp.int32)))
        for b in range(4):
            value[b, int(query.n_candidates[b]) :] = -np.inf
            value[b, chosen[b, 0, :t]] = -np.inf
        chosen[:, 0, t] = value.argmax(-1)
    np.testing.assert_array_equal(found, chosen)


# --------------------------------------------------------------------- proposals


@functools.partial(quick_jit, static_argnums=0)
def proposed(wanted, frozen, query, key):
    nothing = jnp.zeros((query.candidates.shape[0], 0, L), jnp.int32)
    return proposals.propose(SETTING, wanted, frozen, query, key, nothing)


WANTED = (
    ("retriever", 2), ("popularity", 1), ("pointwise", 2), ("mmr_topics", 2), ("mmr_items", 1),
    ("mmr_pointwise", 1), ("random", 3), ("evaluator", 1), ("perturbed", 4),
)  # fmt: skip
PLACES = dict(zip((name for name, _ in WANTED), np.cumsum([0] + [n for _, n in WANTED]).tolist(), strict=False))


@pytest.fixture(scope="module")
def frozen(evaluator, pointwise):
    return {"evaluator": evaluator, "pointwise": pointwise}


def orders(query, score):
    """Candidates by score, by a sort in numpy."""
    return [np.argsort(-np.asarray(score)[b, :n], kind="stable")[:L].tolist() for b, n in enumerate(query.n_candidates)]


def plain_mmr(relevance, similarity, weight):
    """Maximal marginal relevance of one query, as in its definition."""
    span = relevance.max() - relevance.min()
    relevance, chosen = (relevance - relevance.min()) / span, []
    while len(chosen) < L:
        value = {
            c: weight * relevance[c] - (1 - weight) * max((similarity[c, s] for s in chosen), default=0.0)
            for c in range(len(relevance))
            if c not in chosen
        }
        chosen.append(max(value, key=value.get))
    return chosen


@pytest.mark.parametrize("seed", [0, 1])
def test_proposals_are_what_they_are_called(frozen, seed):
    assert {name for name, _ in WANTED} == set(PROPOSALS)
    query = make_query(seed)
    lists = np.asarray(proposed(WANTED, frozen, query, jax.random.key(seed)))
    assert lists.shape == (4, sum(n for _, n in WANTED), L)
    for b, n in enumerate(query.n_candidates.tolist()):
        assert all(len(set(x)) == L and set(x) <= set(range(n)) for x in lists[b].tolist())
    for name, score in (
        ("retriever", query.retrieval),
        ("popularity", query.popularity),
        ("pointwise", pointwise_logits(JUDGE, frozen["pointwise"], query)),
    ):
        assert lists[:, PLACES[name]].tolist() == orders(query, score)
    assert (lists[:, PLACES["retriever"]] != lists[:, PLACES["retriever"] + 1]).any()  # the second is drawn
    greedy = quick_jit(scorers.evaluator_greedy, static_argnums=(0, 3))(JUDGE, frozen["evaluator"], query, L)
    np.testing.assert_array_equal(lists[:, PLACES["evaluator"]], greedy[:, 0])
    items = np.asarray(frozen["pointwise"]["items"])
    for b, n in enumerate(query.n_candidates.tolist()):
        score, topics = np.asarray(query.retrieval)[b, :n], np.asarray(query.topics)[b, :n]
        same = (topics[:, None] == topics) * 1.0
        assert lists[b, PLACES["mmr_topics"]].tolist() == plain_mmr(score, same, SETTING.mmr_lambda)
        scored = np.asarray(pointwise_logits(JUDGE, frozen["pointwise"], query))[b, :n]
        assert lists[b, PLACES["mmr_pointwise"]].tolist() == plain_mmr(scored, same, SETTING.mmr_lambda)
        x = items[np.asarray(query.candidates)[b, :n]]
        near = np.maximum(x @ x.T / np.outer(*[np.linalg.norm(x, axis=1)] * 2), 0)
        assert lists[b, PLACES["mmr_items"]].tolist() == plain_mmr(score, near, SETTING.mmr_lambda)


def test_perturbed_lists_are_near_the_best(frozen):
    query = make_query()
    lists = proposed(WANTED, frozen, query, jax.random.key(2))
    before, changed = lists[:, : PLACES["perturbed"]], np.asarray(lists[:, PLACES["perturbed"] :])
    best = quick_jit(proposals.best, static_argnums=0)(SETTING, frozen["evaluator"], query, before)
    score = quick_jit(scorers.reward_of_lists, static_argnums=0)(JUDGE, frozen["evaluator"], query, before)
    at = np.asarray(score).argmax(-1)
    np.testing.assert_array_equal(best[:, 0], np.asarray(before)[np.arange(4), at])
    differ = (changed != np.asarray(best)).sum(-1)
    small = np.asarray(query.n_candidates) == L  # nothing to replace an item with
    expected = np.where(small[:, None], 2, [1, 2, 1, 2])
    np.testing.assert_array_equal(differ, expected)


def test_topics_that_are_missing_are_not_shared():
    query = make_query().replace(topics=jnp.array([[-1, -1, 0, 0, 1, -1, -1, -1]] * 4))
    same = proposals.same_topic(SETTING, proposals.Asked(query, {}, None, 1, None))
    assert same[0].tolist() == [[float(a == b >= 0) for b in query.topics[0]] for a in query.topics[0]]


def test_diversified_scores_are_the_first_proposal_of_that_weight(frozen):
    query = make_query(full=True)
    for weight in (0.4, 1.0):
        lists = proposals.diversified(JUDGE, frozen["pointwise"], query, weight)
        setting = SETTING._replace(mmr_lambda=weight)
        asked = proposals.propose(setting, (("mmr_pointwise", 2),), frozen, query, jax.random.key(3), lists[:, :0])
        np.testing.assert_array_equal(lists[:, 0], asked[:, 0])
    by_score = np.argsort(-np.asarray(pointwise_logits(JUDGE, frozen["pointwise"], query)), -1)
    np.testing.assert_array_equal(lists[:, 0], by_score[:, : JUDGE.list_length])


def test_pools_that_end_before_the_list(frozen):
    query = make_query().replace(n_candidates=jnp.array([2, 1, 8, 8], jnp.int32))
    lists = np.asarray(proposed(WANTED, frozen, query, jax.random.key(0)))
    for b, n in enumerate((2, 1)):
        assert (np.sort(lists[b], -1)[:, -n:] == np.arange(n)).all() and (lists[b, :, n:] == -1).all()


def test_proposals_that_cannot_be_made(frozen):
    query, key = make_query(), jax.random.key(0)
    for wanted, message in (
        ((("evaluator", 2),), "greedy list is one, not 2"),
        ((("perturbed", 1),), "perturbed lists need a list before them"),
    ):
        with pytest.raises(ValueError, match=message):
            proposed(wanted, frozen, query, key)
