"""What GoalRank is compared with: rerankers of the pool, generator-evaluators; and reward models that are wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit
from tiny_ranker import SPEC, make_params, make_query, padded

from fgrpo_jax.policies.ranker import ensemble, generator, network, policy, rerankers, scorers
from fgrpo_jax.policies.ranker.proposals import Setting
from fgrpo_jax.types import RANK, map_params

SMALL = SPEC._replace(num_layers=1, list_layers=1)
SETTING = Setting(SMALL)
L = SMALL.list_length
evaluator_logits = quick_jit(scorers.evaluator_logits, static_argnums=0)


def random_params(table, seed=0):
    rng = np.random.default_rng(seed)
    return map_params(lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape), jnp.float32), table)


# --------------------------------------------------------------------- rerankers


@pytest.fixture(scope="module", params=["dlcm", "prm"])
def reranker(request):
    table, logits = rerankers.SCORERS[request.param]
    logits = quick_jit(logits, static_argnums=0)
    return lambda query, params=random_params(table(SMALL)): np.asarray(logits(SMALL, params, query))


def test_scores_belong_to_candidates_wherever_they_stand(reranker):
    """In another order of the pool, and beside padding, every candidate keeps its score."""
    query = make_query(full=True)
    score = reranker(query)
    order = np.random.default_rng(1).permutation(8)
    moved = {name: getattr(query, name)[:, order] for name in ("candidates", "retrieval", "popularity", "topics")}
    np.testing.assert_allclose(reranker(query.replace(**moved)), score[:, order], atol=1e-5)
    query = make_query(batch=6)
    there = np.asarray(network.present(query))
    np.testing.assert_allclose(reranker(padded(query))[:, :8][there], reranker(query)[there], atol=1e-5)


def test_scores_depend_on_the_other_candidates(reranker):
    query = make_query(full=True)
    changed = query.replace(candidates=query.candidates.at[:, 7].set(query.candidates[:, 7] % 40 + 1))
    moved = np.abs(reranker(changed) - reranker(query))[:, :7]
    assert (moved.max(1) > 1e-3).all()


def test_the_recurrent_context_by_hand():
    """One candidate after the other, the last of the first stage first."""
    query, params = make_query(batch=6), random_params(rerankers.dlcm_table(SMALL))
    found = np.asarray(quick_jit(rerankers.dlcm_logits, static_argnums=0)(SMALL, params, query))
    trunk = {name: value for name, value in params.items() if name not in ("gru", "context", "context_bias")}
    alone = SMALL._replace(list_layers=0)
    features = network.candidates(alone, trunk, query)[:, :, None]
    read = np.asarray(network.beside_history(alone, trunk, query, features, jnp.ones((1, 1, 1, 1), bool))[:, :, 0])
    w = jax.tree.map(np.asarray, params)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    for b in range(6):
        n = int(query.n_candidates[b])
        order = np.argsort(-np.asarray(query.retrieval)[b, :n], kind="stable")
        state, outputs = np.zeros(SMALL.hidden_size), {}
        for c in order[::-1]:
            z, r, new = ((read[b, c] @ w["gru"][f"{g}_in"], w["gru"][f"{g}_state"], w["gru"][f"{g}_bias"])
                         for g in ("update", "reset", "new"))  # fmt: skip
            z, r = (sigmoid(x + state @ u + bias) for x, u, bias in (z, r))
            state = z * state + (1 - z) * np.tanh(new[0] + (r * state) @ new[1] + new[2])
            outputs[c] = state
        context = np.tanh(state @ w["context"] + w["context_bias"])
        expected = [(outputs[c] * context) @ w["score"] + 10 * w["bias"][0] for c in range(n)]
        np.testing.assert_allclose(found[b, :n], expected, atol=1e-4)


# --------------------------------------------------------------------- generator-evaluators


@pytest.fixture(scope="module")
def three():
    return ensemble.init(SMALL, 3, jax.random.key(5))


def member(params, m):
    return jax.tree.map(lambda x: x[m], params)


def test_an_ensemble_is_its_generators(three):
    """Likelihood of each member's own targets, and its gradient, which no other member has."""
    made, alone = ensemble.make_ensemble(SMALL, 3, "relevance"), policy.make_generator(SMALL, SETTING)
    query = make_query()
    rollout, _ = made.sources["logged"](1)(three, {}, query, jax.random.key(1))
    assert rollout.actions.shape == (4, 3, L) and len(np.unique(rollout.actions, axis=1)[0]) > 1

    def total(params):
        logp = made.logprobs(params, {}, query, rollout)
        return logp.sum(), logp

    (_, logp), gradient = quick_jit(jax.value_and_grad(total, has_aux=True))(three)
    for m in range(3):
        own = jax.tree.map(lambda x, m=m: x[:, m : m + 1], rollout)

        def one(params, own=own):
            logp = alone.logprobs(params, {}, query, own)
            return logp.sum(), logp

        (_, expected), slope = quick_jit(jax.value_and_grad(one, has_aux=True))(member(three, m))
        np.testing.assert_allclose(logp[:, m : m + 1], expected, atol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), member(gradient, m), slope)


def test_the_first_members_do_not_depend_on_how_many_there_are(three):
    jax.tree.map(np.testing.assert_array_equal, member(three, 1), member(ensemble.init(SMALL, 2, jax.random.key(5)), 1))
    assert not np.array_equal(three["items"][0], three["items"][1])


def test_selection_by_the_evaluator():
    """Of two generators' greedy lists, and of more: the one with the highest score."""
    query, evaluator = make_query(), make_params("evaluator", SMALL)
    generators = jax.tree.map(lambda *x: jnp.stack(x), *(make_params("generator", SMALL, seed) for seed in (0, 4, 5)))
    encode = [generator.encode(SMALL, member(generators, m), query) for m in range(2)]
    list_BGT = jnp.concatenate([generator.sample(SMALL, one, None, 1)[1].ranking for one in encode], 1)
    score = scorers.reward_of_lists(SMALL, evaluator, query, list_BGT)
    assert len(set(np.asarray(score).argmax(-1).tolist())) == 2
    best = quick_jit(ensemble.best_of, static_argnums=(0, 1, 2, 3))
    found = best(SMALL, SETTING, 2, 1, generators, evaluator, query)
    expected = np.asarray(list_BGT)[np.arange(4), np.asarray(score).argmax(-1)]
    np.testing.assert_array_equal(found.ranking[:, 0], expected)
    more = best(SMALL, SETTING, 2, 8, generators, evaluator, query).ranking
    again = scorers.reward_of_lists(SMALL, evaluator, query, more)[:, 0]
    assert (again >= score.max(1) - 1e-5).all() and (again > score.max(1) + 1e-3).any()
    alone = best(SMALL, SETTING, 2, 8, generators, evaluator, jax.tree.map(lambda x: x[1:2], query)).ranking
    np.testing.assert_array_equal(alone[0], more[1])  # whatever else is in the batch


# --------------------------------------------------------------------- reward models that are wrong


@pytest.fixture(scope="module")
def reward():
    params, of_lists = make_params("evaluator", SMALL), quick_jit(scorers.reward_of_lists, static_argnums=(0, 4, 5))

    def call(query, list_BGT, kind="none", weight=0.0, k=None):
        return np.asarray(of_lists(SMALL, params, query, list_BGT, k, (kind, weight)))

    call.p = lambda query, list_BGT, shift=0.0: np.asarray(
        jax.nn.sigmoid(evaluator_logits(SMALL, params, query, list_BGT) + shift)
    )
    return call


def lists_of(query, count, seed=0):
    rng = np.random.default_rng(seed)
    pools = [int(n) for n in query.n_candidates]
    return jnp.asarray([[rng.permutation(n)[:L] for _ in range(count)] for n in pools], jnp.int32)


def test_noise_belongs_to_the_list(reward):
    """It is normal, and the same in any batch and beside any padding; another order or query has another."""
    query = make_query(batch=8, full=True)
    list_BGT = lists_of(query, 200)
    noise = reward(query, list_BGT, "noise", 2.0) - reward(query, list_BGT)
    assert abs(noise.mean()) < 0.2 and abs(noise.std() - 2) < 0.15 and abs((np.abs(noise) < 2).mean() - 0.683) < 0.05
    larger = reward(padded(query), list_BGT, "noise", 2.0) - reward(padded(query), list_BGT)
    np.testing.assert_allclose(larger, noise, atol=1e-4)
    turned = list_BGT[..., ::-1]
    assert np.abs(reward(query, turned, "noise", 2.0) - reward(query, turned) - noise).min(1).max() > 1e-3
    older = query.replace(history=query.history.at[:, 0].set(query.history[:, 0] % 40 + 1))
    assert np.abs(reward(older, list_BGT, "noise", 2.0) - reward(older, list_BGT) - noise).mean() > 1


def test_other_errors_by_hand(reward):
    query = make_query(batch=6)
    list_BGT = lists_of(query, 3).at[:, 1, L - 1].set(-1)
    there, p = np.asarray(list_BGT) >= 0, reward.p(query, list_BGT)
    index = np.arange(6)[:, None, None], np.maximum(np.asarray(list_BGT), 0)
    mass = np.where(there, p, 0)
    np.testing.assert_allclose(reward(query, list_BGT), mass.sum(-1), atol=1e-5)
    weights = 1 + 0.5 * np.linspace(1, -1, L)
    np.testing.assert_allclose(reward(query, list_BGT, "position", 0.5), mass @ weights, atol=1e-5)
    shifted = np.where(there, reward.p(query, list_BGT, 0.5), 0).sum(-1)
    np.testing.assert_allclose(reward(query, list_BGT, "shift", 0.5), shifted, atol=1e-5)
    pools = [np.asarray(query.popularity)[b, : int(n)] for b, n in enumerate(query.n_candidates)]
    score = np.zeros(query.popularity.shape)
    for b, x in enumerate(pools):
        score[b, : len(x)] = (x - x.mean()) / x.std()
    popular = np.where(there, score[index], 0)
    expected = mass.sum(-1) + 0.5 * popular.sum(-1) / there.sum(-1)
    np.testing.assert_allclose(reward(query, list_BGT, "popularity", 0.5), expected, atol=1e-5)
    expected = mass[..., :2].sum(-1) + 0.5 * popular[..., :2].mean(-1)
    np.testing.assert_allclose(reward(query, list_BGT, "popularity", 0.5, k=2), expected, atol=1e-5)


def test_who_chooses_by_the_reward_model_is_misled_with_it():
    """Greedy lists under it, the choice among generators, and the reward that stages learn from."""
    query, evaluator = make_query(full=True), make_params("evaluator", SMALL)
    wrong = "popularity", 50.0
    setting = SETTING._replace(bias=wrong)
    popular = np.argsort(-np.asarray(query.popularity), -1, kind="stable")[:, :L]
    _, lists = policy.make_evaluator(SMALL, wrong).greedy(evaluator, {}, query)
    np.testing.assert_array_equal(np.sort(lists.ranking[:, 0]), np.sort(popular))
    rewards = policy.make_generator(SMALL, setting).rewards
    of_lists = rewards["reward_model"](L)(lists, query, {"evaluator": evaluator})
    plain = policy.make_generator(SMALL, SETTING).rewards["reward_model"](L)(lists, query, {"evaluator": evaluator})
    assert (of_lists > plain + 10).all()
    worst = jnp.asarray(np.argsort(np.asarray(query.popularity), -1, kind="stable")[:, None, :L], jnp.int32)
    both = jnp.concatenate([worst, jnp.asarray(popular[:, None], jnp.int32)], 1)
    from_both = ensemble.proposals.best(setting, evaluator, query, both)
    np.testing.assert_array_equal(from_both[:, 0], popular)
    assert (policy.as_given(from_both, RANK)[0].phase == RANK).all()
