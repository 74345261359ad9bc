"""Generator, evaluator and point-wise network as policies: sources, rewards, selection; and what they learn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import quick_jit, run_on_8_devices
from tiny import ROOT
from tiny_ranker import SPEC, make_params, make_query

from fgrpo_jax.algorithm.advantages import make_batch
from fgrpo_jax.algorithm.group_softmax import group_softmax
from fgrpo_jax.metrics import take_gains
from fgrpo_jax.policies.ranker import network, policy, scorers
from fgrpo_jax.policies.ranker.proposals import Setting
from fgrpo_jax.types import RANK, SLATE, UNTRAINED, Credit, Lists

SMALL = SPEC._replace(num_layers=1, list_layers=1)
SETTING = Setting(SMALL)
MIX = (("retriever", 1), ("pointwise", 1), ("perturbed", 2))
L, G = SMALL.list_length, 7

pointwise_logits = quick_jit(scorers.pointwise_logits, static_argnums=0)
evaluator_logits = quick_jit(scorers.evaluator_logits, static_argnums=0)
reward_of_lists = quick_jit(scorers.reward_of_lists, static_argnums=0)


@pytest.fixture(scope="module")
def frozen():
    return {"evaluator": make_params("evaluator", SMALL), "pointwise": make_params("pointwise", SMALL, 1)}


@pytest.fixture(scope="module")
def params():
    return make_params("generator", SMALL)


@pytest.fixture(scope="module")
def parts():
    return policy.make_generator(SMALL, SETTING, MIX)


# --------------------------------------------------------------------- the generator's sources


def test_a_mixed_group_is_own_samples_and_proposals(parts, params, frozen):
    query = make_query(n_min=L + 1)
    rollout, lists = quick_jit(parts.sources["mixed"](G))(params, frozen, query, jax.random.key(0))
    assert rollout.actions.shape == (4, G, L)
    np.testing.assert_array_equal(lists.ranking, rollout.actions)
    np.testing.assert_array_equal(lists.slate, rollout.actions)
    assert all(len(set(x)) == L for x in lists.ranking.reshape(-1, L).tolist())
    assert (lists.ranking < query.n_candidates[:, None, None]).all() and (rollout.phase == RANK).all()
    by_score = np.argsort(-np.where(network.present(query), query.retrieval, -np.inf), -1, kind="stable")
    np.testing.assert_array_equal(lists.ranking[:, 3], by_score[:, :L])
    np.testing.assert_allclose(rollout.logp, quick_jit(parts.logprobs)(params, frozen, query, rollout), atol=1e-5)
    reward = quick_jit(parts.rewards["reward_model"](L))(lists, query, frozen)
    best = np.asarray(lists.ranking)[np.arange(4), np.asarray(reward)[:, :5].argmax(-1)]
    differ = (np.asarray(lists.ranking)[:, 5:] != best[:, None]).sum(-1)
    np.testing.assert_array_equal(differ, [[1, 2]] * 4)  # an item replaced; two swapped


def test_two_phases_take_lists_of_others(frozen):
    spec = SMALL._replace(two_phase=True)
    parts = policy.make_generator(spec, SETTING, (("random", 2),))
    query = make_query(n_min=L + 1)
    rollout, lists = quick_jit(parts.sources["mixed"](3))(make_params("generator", spec), {}, query, jax.random.key(0))
    np.testing.assert_array_equal(lists.slate[:, 1:], lists.ranking[:, 1:])
    np.testing.assert_array_equal(rollout.actions[:, 1:], jnp.tile(lists.ranking[:, 1:], 2))
    assert rollout.phase[0, 1].tolist() == [SLATE] * L + [RANK] * (L - 1) + [UNTRAINED]
    target, _ = policy.target_lists(spec, query, jax.random.key(0), 1, "relevance")
    for b in range(4):
        n = min(L, int((query.relevance[b] > 0).sum()))
        last = UNTRAINED if n == L else RANK  # the only one left of the slate
        expected = [SLATE] * n + [UNTRAINED] * (L - n) + ([RANK] * n + [UNTRAINED] * (L - n))
        expected[-1] = last if n == L else UNTRAINED
        assert target.phase[b, 0].tolist() == expected


@pytest.mark.parametrize("labels", policy.LABELS)
def test_lists_to_imitate(labels):
    """The positive candidates by gain, ties in every order; the rest is not trained."""
    query = make_query(n_min=L + 1)
    gain = np.array(query.relevance)
    if labels == "feedback":
        gain[:] = 0
        for b, j, t in np.argwhere(np.asarray(query.logged_items) >= 0):
            at = int(query.logged_items[b, j, t])
            gain[b, at] = max(gain[b, at], float(query.logged_feedback[b, j, t]))
    rollout, lists = policy.target_lists(SMALL, query, jax.random.key(0), 200, labels)
    found = np.asarray(take_gains(gain[:, None], lists.ranking))
    for b in range(4):
        n = min(L, int((gain[b] > 0).sum()))
        assert (found[b] == np.sort(gain[b])[::-1][:L]).all()
        assert (rollout.phase[b, :, :n] == RANK).all() and (rollout.phase[b, :, n:] == UNTRAINED).all()
        assert all(len(set(x)) == L for x in lists.ranking[b].tolist())
        tied = len(gain[b]) - len(set(gain[b].tolist()))
        assert len({tuple(x) for x in lists.ranking[b].tolist()}) > (1 if tied else 0)
    assert (rollout.logp == 0).all()


def test_what_is_refused():
    for wrong, message in (
        (dict(mix=(("greedy", 1),)), "no proposal is called greedy; there are retriever"),
        (dict(labels="clicks"), "labels='clicks' is not one of relevance, feedback"),
    ):
        with pytest.raises(ValueError, match=message):
            policy.make_generator(SMALL, SETTING, **wrong)
    with pytest.raises(ValueError, match="a group of 4 has no room for own samples beside 4 proposals"):
        policy.make_generator(SMALL, SETTING, MIX).sources["mixed"](4)
    with pytest.raises(ValueError, match="labels='x'"):
        policy.make_scorer(SMALL, "pointwise", "x")


# --------------------------------------------------------------------- those that judge


def test_rewards_of_rankings(parts, frozen):
    query = make_query()
    ranking = jnp.asarray([[[0, 1, 2, 3], [3, 2, -1, -1]]] * 4)
    lists = Lists(ranking, ranking, jnp.zeros((4, 2), jnp.int32))
    p = jax.nn.sigmoid(pointwise_logits(SMALL, frozen["pointwise"], query))
    found = quick_jit(parts.rewards["pointwise_reward"](3))(lists, query, frozen)
    weight = 1 / np.log2(np.arange(3) + 2.0)
    np.testing.assert_allclose(found, np.stack([p[:, :3] @ weight, p[:, [3, 2]] @ weight[:2]], 1), rtol=1e-5)
    p = jax.nn.sigmoid(evaluator_logits(SMALL, frozen["evaluator"], query, ranking))
    found = quick_jit(parts.rewards["reward_model"](3))(lists, query, frozen)
    np.testing.assert_allclose(found, np.stack([p[:, 0, :3].sum(-1), p[:, 1, :2].sum(-1)], 1), rtol=1e-5)


def test_likelihood_of_logged_feedback(frozen):
    query = make_query()
    for made, name in (
        (policy.make_evaluator(SMALL), "evaluator"),
        (policy.make_scorer(SMALL, "pointwise", "feedback"), "pointwise"),
        (policy.make_scorer(SMALL, "pointwise", "relevance"), "pointwise"),
    ):
        rollout, lists = made.sources["logged"](1)(frozen[name], {}, query, jax.random.key(0))
        logp = quick_jit(made.logprobs)(frozen[name], {}, query, rollout)
        if rollout.actions.shape[1] == 1:  # all candidates
            trained, label = network.present(query)[:, None], (query.relevance > 0)[:, None]
        else:
            trained, label = query.logged_items >= 0, query.logged_feedback
            np.testing.assert_array_equal(lists.ranking, query.logged_items)
        np.testing.assert_array_equal(rollout.phase == RANK, trained)
        if name == "evaluator":
            logit = evaluator_logits(SMALL, frozen[name], query, query.logged_items)
        else:
            logit = pointwise_logits(SMALL, frozen[name], query)
            logit = jnp.take_along_axis(logit[:, None], rollout.actions, -1)
        p, weight = jax.nn.sigmoid(logit), jnp.where(trained, jnp.exp(logit), 0)
        expected = label * jnp.log(p) + (1 - label) * jnp.log(1 - p)
        expected += label * jnp.log(jnp.exp(logit) / weight.sum((1, 2), keepdims=True))
        np.testing.assert_allclose(logp, jnp.where(trained, expected, 0), rtol=1e-4, atol=1e-5)


def test_the_evaluator_is_shown_prefixes_too():
    """Half of the lists are cut, after at least one item; what is left is as it was shown."""
    query = make_query(0, batch=32, lists=8, full=True)
    source = quick_jit(policy.make_evaluator(SMALL).sources["logged"](1))
    rollout, lists = source({}, {}, query, jax.random.key(0))
    kept, shown = np.asarray(lists.ranking) >= 0, np.asarray(query.logged_items)
    np.testing.assert_array_equal(np.asarray(lists.ranking)[kept], shown[kept])
    lengths, before = kept.sum(-1), (shown >= 0).sum(-1)
    assert (kept == (np.arange(L) < lengths[..., None])).all() and (lengths[before > 0] >= 1).all()
    cut = (lengths < before)[before > 1].mean()
    assert 0.2 < cut < 0.5  # a cut after the last item leaves a list whole
    np.testing.assert_array_equal(np.asarray(rollout.phase) != UNTRAINED, kept)


def test_greedy_lists_of_those_that_judge(frozen):
    query = make_query()
    rollout, lists = quick_jit(policy.make_scorer(SMALL, "pointwise").greedy)(frozen["pointwise"], {}, query)
    score = pointwise_logits(SMALL, frozen["pointwise"], query)
    by_score = np.argsort(-np.where(network.present(query), score, -np.inf), -1, kind="stable")[:, None, :L]
    np.testing.assert_array_equal(lists.ranking, by_score)
    assert (rollout.phase == UNTRAINED).all() and rollout.actions.shape == (4, 1, L)
    _, lists = quick_jit(policy.make_evaluator(SMALL).greedy)(frozen["evaluator"], {}, query)
    assert all(len(set(x)) == L for x in lists.ranking.reshape(-1, L).tolist())


# --------------------------------------------------------------------- learning


def test_the_evaluator_learns_what_order_does():
    """Feedback that depends on the item before: no point-wise score can say it."""
    query = make_query(0, batch=32, lists=8, full=True)
    rng = np.random.default_rng(0)
    items = jnp.asarray([[rng.permutation(8)[:L] for _ in range(8)] for _ in range(32)], jnp.int32)
    shown = jnp.take_along_axis(query.candidates[:, None], items, -1)
    before = jnp.pad(shown, ((0, 0), (0, 0), (1, 0)))[..., :-1]
    query = query.replace(logged_items=items, logged_feedback=((shown + before) % 2).astype(jnp.float32))
    losses = {}
    for name, made in (
        ("evaluator", policy.make_evaluator(SMALL)),
        ("pointwise", policy.make_scorer(SMALL, "pointwise", "feedback")),
    ):
        params = make_params(name, SMALL)
        rollout, _ = made.sources["logged"](1)(params, {}, query, jax.random.key(0))
        optimizer = optax.adam(0.01)

        def loss(params, made=made, rollout=rollout):
            return -made.logprobs(params, {}, query, rollout).mean()

        @quick_jit
        def step(params, state, loss=loss, optimizer=optimizer):
            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradient, state)
            return value, optax.apply_updates(params, updates), state

        state = optimizer.init(params)
        for _ in range(150):
            _, params, state = step(params, state)
        learnt = jnp.where(rollout.phase != UNTRAINED, rollout.actions, -1)
        logit, label, known = made.fit(params, {}, query.replace(logged_items=learnt))
        losses[name] = optax.sigmoid_binary_cross_entropy(logit, label)[known].mean()
    assert losses["evaluator"] < 0.25 and losses["pointwise"] > 0.4, losses


def test_groups_teach_the_generator_what_the_reward_prefers(parts, params, frozen):
    """Updates on mixed groups raise the evaluator's score of greedy lists above that of every proposal."""
    query = make_query(batch=8)
    source, reward_of = parts.sources["mixed"](G), parts.rewards["reward_model"](L)
    objective, optimizer = group_softmax(), optax.adam(0.003)

    @quick_jit
    def step(params, state, key):
        rollout, lists = source(params, frozen, query, key)
        reward = reward_of(lists, query, frozen)[..., None]
        batch = make_batch(query, rollout, reward, Credit((("rank", "reward_model", 1.0),)), "phase")
        gradient = jax.grad(lambda p: objective(parts.logprobs(p, frozen, query, rollout), batch)[0])(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, reward[:, G - sum(n for _, n in MIX) :, 0].max(1)

    @quick_jit
    def score(params):
        return reward_of(parts.greedy(params, frozen, query)[1], query, frozen)[:, 0]

    first, state, best = score(params), optimizer.init(params), []
    for i in range(150):
        params, state, proposed = step(params, state, jax.random.key(i))
        best.append(proposed)
    last = score(params)
    assert last.mean() > first.mean() + 0.1 and last.mean() > jnp.stack(best[:50]).mean()


# --------------------------------------------------------------------- shards

SHARDS = """
    import sys
    sys.path[:0] = [{root!r}, {root!r} + "/tests"]
    import jax, numpy as np
    from jax.sharding import AxisType
    from fgrpo_jax import shards
    from test_ranker_policy import SETTING, SMALL, make_params, make_query, policy

    jax.config.update("jax_compilation_cache_dir", {cache!r})
    jax.config.update("jax_disable_most_optimizations", True)
    frozen = {{"evaluator": make_params("evaluator", SMALL), "pointwise": make_params("pointwise", SMALL, 1)}}
    params, query, key = make_params("generator", SMALL), make_query(batch=8), jax.random.key(0)
    parts = policy.make_generator(SMALL, SETTING, (("pointwise", 1), ("random", 1)))
    judges = {{"evaluator": policy.make_evaluator(SMALL), "pointwise": policy.make_scorer(SMALL, "pointwise")}}
    beside = {{name: made.table for name, made in judges.items()}}

    def work(params, frozen, query, key):
        rollout, lists = parts.sources["mixed"](4)(params, frozen, query, key)
        return rollout, parts.logprobs(params, frozen, query, rollout), parts.rewards["reward_model"](4)(
            lists, query, frozen
        )

    found = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        mesh = jax.make_mesh(sizes, shards.AXES, (AxisType.Auto,) * 3, devices=jax.devices()[: np.prod(sizes)])
        with jax.set_mesh(mesh):
            found.append(jax.device_get(jax.jit(shards.by_query(mesh, parts.table, work, beside))(
                params, frozen, query, key
            )))
    (one, logp, reward), (other, other_logp, other_reward) = found
    np.testing.assert_array_equal(one.actions, other.actions)
    np.testing.assert_allclose(logp, other_logp, atol=1e-5)
    np.testing.assert_allclose(reward, other_reward, atol=1e-5)
    print("equal")
"""


def test_shards_write_the_lists_of_one_device():
    assert run_on_8_devices(SHARDS.format(root=str(ROOT), cache=jax.config.jax_compilation_cache_dir)) == ["equal"]
