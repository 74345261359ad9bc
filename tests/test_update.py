"""The update: any split of a batch gives the same step, and a bad gradient gives none."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit

from fgrpo_jax.algorithm import advantages, rewards
from fgrpo_jax.algorithm.objectives import clipped_pg
from fgrpo_jax.algorithm.update import _apply_in_place, _apply_or_keep, describe, make_optimizer, make_update
from fgrpo_jax.models import decoder
from fgrpo_jax.policies.llm import sampling
from fgrpo_jax.policies.llm.query import Query
from fgrpo_jax.policies.llm.transcript import CODE, OUTCOMES
from fgrpo_jax.types import RANK, UNTRAINED, Credit, Lists, Rollout, TrainState, map_params

B, G, T, V = 8, 3, 4, 6
CREDIT = Credit((("slate", "recall", 1.0), ("rank", "ndcg", 0.5)))


def optimizer_of(learning_rate=0.1, updates=100, warmup=0, decay="constant", weight_decay=0.0, clip=1e9, decayed=True):
    return make_optimizer(learning_rate, updates, warmup, decay, 0.9, 0.98, 1e-8, weight_decay, clip, decayed)


def table_logprobs(params, frozen, query, rollout):
    """A policy of B*V numbers: softmax over tokens, for every query's first prompt token."""
    logp_BV = jax.nn.log_softmax(params["table"][query.prompt[:, 0]])
    return jnp.take_along_axis(logp_BV[:, None, None], rollout.actions[..., None], -1)[..., 0]


TABLE = SimpleNamespace(logprobs=table_logprobs)


@pytest.fixture(scope="module")
def table():
    return {"table": jnp.asarray(np.random.default_rng(0).normal(size=(B, V)), jnp.float32)}


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    ints = jnp.arange(B, dtype=jnp.int32)
    query = Query(ints[:, None], ints * 0 + 1, ints[:, None, None], jnp.ones((B, 1)), ints * 0 + 1)
    actions, phase = rng.integers(0, V, (B, G, T)), rng.integers(UNTRAINED, RANK + 1, (B, G, T))
    rollout = Rollout(jnp.asarray(actions), jnp.asarray(phase), jnp.asarray(-rng.random((B, G, T)), jnp.float32))
    reward = jnp.asarray(rng.random((B, G, 2)), jnp.float32)
    old = jnp.asarray(-1.5 + 0.3 * rng.normal(size=(B, G, T)), jnp.float32)
    return advantages.make_batch(query, rollout, reward, CREDIT, "token").replace(old_logp=old)


def run(params, batch, optimizer=None, policy=TABLE, **options):
    optimizer = optimizer or optimizer_of()
    state = TrainState(jnp.int32(7), params, optimizer.init(params))
    return quick_jit(make_update(policy.logprobs, clipped_pg(), optimizer, **options))(state, {}, batch)


def assert_close(one, other, rtol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7), one, other)


# --------------------------------------------------------------------- splits and epochs


def test_microbatches_change_nothing(table, batch):
    state, metrics = run(table, batch)
    assert int(state.step) == 8
    for n in (2, 4, 8):
        other_state, other_metrics = run(table, batch, microbatches=n)
        assert_close(state, other_state)
        assert_close(metrics, other_metrics)


@pytest.mark.parametrize("microbatches", [1, 4])
def test_the_loss_that_is_logged_is_the_mean_by_weight(table, batch, microbatches):
    """Also where the weights do not sum to one, as constant ones do not."""
    _, expected = run(table, batch)
    _, metrics = run(table, batch.replace(weight=batch.weight / 3), microbatches=microbatches)
    assert metrics["loss"].value() == pytest.approx(expected["loss"].value(), rel=1e-4)
    assert float(metrics["loss"].sum) == pytest.approx(float(expected["loss"].sum) / 3, rel=1e-4)


def test_epochs_are_updates_one_after_the_other(table, batch):
    optimizer = optimizer_of()
    twice, metrics = run(table, batch, optimizer, epochs=2)
    update = quick_jit(make_update(TABLE.logprobs, clipped_pg(), optimizer))
    once, _ = update(TrainState(jnp.int32(7), table, optimizer.init(table)), {}, batch)
    again, last = update(once, {}, batch)
    assert_close((twice.params, twice.opt_state), (again.params, again.opt_state))
    assert [float(m.pop("nonfinite").sum) for m in (metrics, last)] == [0, 0]
    assert_close(metrics, last)
    assert int(twice.step) == 8  # one rollout batch


# --------------------------------------------------------------------- nothing to learn, or nothing to trust


@pytest.mark.parametrize("way", [_apply_or_keep, _apply_in_place])
def test_an_update_is_made_or_not(way):
    """Of the two ways a program holds only that of its platform."""
    optimizer = make_optimizer(1e-2, 10, 0, "constant", 0.9, 0.98, 1e-8, 0.1, 1.0, True)
    params, grads = {"w": jnp.arange(3.0)}, {"w": jnp.array([3.0, -4.0, 0.0])}
    old = params, optimizer.init(params)
    kept, made = (way(optimizer, jnp.array(finite), old, grads) for finite in (False, True))
    jax.tree.map(np.testing.assert_array_equal, kept, old)
    updates, expected = optimizer.update(grads, old[1], params)
    jax.tree.map(np.testing.assert_allclose, made, ({"w": params["w"] + updates["w"]}, expected))


@pytest.mark.parametrize("options", [{}, {"microbatches": 2}, {"epochs": 2}])
def test_a_nonfinite_gradient_changes_nothing(table, batch, options):
    poisoned = batch.replace(old_logp=batch.old_logp.at[0, 0].set(jnp.nan))
    optimizer = optimizer_of(weight_decay=0.1)
    state, metrics = run(table, poisoned, optimizer, **options)
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (table, optimizer.init(table)))
    assert float(metrics["nonfinite"].sum) == options.get("epochs", 1)
    _, metrics = run(table, batch, optimizer, **options)
    assert float(metrics["nonfinite"].sum) == 0


def test_groups_without_signal_move_nothing(table, batch):
    """A group of equal rewards has no gradient; where all are, the step is exactly zero."""
    reward = batch.reward.at[0].set(0.3)
    some = advantages.make_batch(batch.query, batch.rollout, reward, CREDIT, "token")
    state, _ = run(table, some)
    np.testing.assert_array_equal(state.params["table"][0], table["table"][0])
    assert (state.params["table"][1:] != table["table"][1:]).any(-1).all()
    none = advantages.make_batch(batch.query, batch.rollout, 0 * reward + 0.3, CREDIT, "token")
    state, metrics = run(table, none)
    np.testing.assert_array_equal(state.params["table"], table["table"])
    assert float(metrics["grad_norm"].sum) == 0


# --------------------------------------------------------------------- the optimizer


def learning_rates(optimizer, steps, params=None):
    """Under a constant gradient, the size of Adam's step is the learning rate."""
    params = params or {"w": jnp.zeros(1)}

    def step(state, _):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        return state, -jax.tree.leaves(updates)[0].ravel()[0]

    return quick_jit(lambda: jax.lax.scan(step, optimizer.init(params), length=steps)[1])()


@pytest.mark.parametrize(
    "decay, after",
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("cosine", (1 + np.cos(np.pi * np.arange(4) / 4)) / 2),
    ],
)
def test_warm_up_and_decay(decay, after):
    """The first step already moves; the last one of a decay is not yet zero."""
    rates = learning_rates(optimizer_of(0.1, updates=8, warmup=4, decay=decay), 8)
    np.testing.assert_allclose(rates, 0.1 * np.array([0.25, 0.5, 0.75, 1.0, *after]), rtol=1e-4)


@pytest.mark.parametrize("warmup", [0, 1])
def test_little_or_no_warm_up(warmup):
    np.testing.assert_allclose(learning_rates(optimizer_of(0.1, warmup=warmup), 3), 0.1, rtol=1e-4)


def test_weight_decay_spares_norms(spec, params):
    table = decoder.param_table(spec)
    assert_decays(params, map_params(lambda p: p.decay, table))
    assert jax.tree.leaves(map_params(lambda p: p.decay, table)) == [
        "norm" not in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]


def test_weight_decay_follows_the_declaration_and_no_name(table):
    assert_decays({"normal": table["table"], "scale": table["table"]}, {"normal": True, "scale": False})


def assert_decays(params, declared):
    optimizer = optimizer_of(0.1, weight_decay=0.5, decayed=declared)

    def decayed(params):
        zero = jax.tree.map(jnp.zeros_like, params)
        return optimizer.update(zero, optimizer.init(params), params)[0]

    for change, decays in zip(*map(jax.tree.leaves, (quick_jit(decayed)(params), declared)), strict=True):
        assert (np.abs(change) > 0).mean() > 0.9 if decays else (np.abs(change) == 0).all()


def test_the_gradient_is_clipped_by_its_global_norm(table, batch):
    plain, metrics = run(table, batch)
    norm = metrics["grad_norm"].value()
    clipped, same_metrics = run(table, batch, optimizer_of(clip=norm / 4))
    assert_close(metrics, same_metrics)  # the norm is reported before the clip
    mean = [state.opt_state[1][0].mu["table"] for state in (plain, clipped)]
    np.testing.assert_allclose(mean[1], mean[0] / 4, rtol=1e-5)


# --------------------------------------------------------------------- what a step reports


def test_describe(batch):
    lists = Lists(
        slate=jnp.full((B, G, 3), -1).at[:, :, :2].set(0),
        ranking=jnp.full((B, G, 2), -1).at[:, 0, 0].set(0),
        outcome=jnp.zeros((B, G), jnp.int32).at[0].set(CODE["rank_empty"]),
    )
    reward_BGP = rewards.phase_rewards(batch.reward, CREDIT)
    dead_BP = jnp.array([[True, False]] * 2 + [[False, False]] * 6)
    values = {name: mean.value() for name, mean in describe(lists, batch, reward_BGP, dead_BP, OUTCOMES).items()}
    assert values["dead_groups/slate"] == 0.25 and values["dead_groups/rank"] == 0
    assert values["outcome/rank_empty"] == 1 / B and values["outcome/ok"] == 1 - 1 / B
    assert sum(v for name, v in values.items() if name.startswith("outcome/")) == 1
    assert values["slate_length"] == 2 and values["rank_length"] == pytest.approx(1 / G)
    assert values["tokens_trained"] == pytest.approx(float((batch.rollout.phase != UNTRAINED).sum()) / (B * G))
    assert values["reward/slate"] == pytest.approx(float(batch.reward[..., 0].mean()), rel=1e-5)
    assert values["reward/rank"] == pytest.approx(0.5 * float(batch.reward[..., 1].mean()), rel=1e-5)


# --------------------------------------------------------------------- the golden step


def test_golden_step(spec, grammar, params, query):
    """Sampling, rewards, advantages, objective and update of a decoder; numbers seen once, then pinned.

    A change here is a change of results: of the random streams, the model or the algorithm.
    """
    sampler = sampling.Sampler(spec, grammar, constrained=True)
    policy = SimpleNamespace(
        logprobs=lambda params, frozen, query, rollout: sampling.logprobs(sampler, params, query, rollout)
    )
    optimizer = optimizer_of(0.01, clip=1.0)
    update = make_update(policy.logprobs, clipped_pg(), optimizer)

    @quick_jit
    def step(params, query, key):
        rollout, lists = sampling.sample(sampler, params, query, key, 4)
        broken = rewards.broken_values(-0.1, (), OUTCOMES)
        reward_BGR = rewards.term_rewards(CREDIT, lists, query, {}, 5, broken)
        batch = advantages.make_batch(query, rollout, reward_BGR, CREDIT, "token")
        state, metrics = update(TrainState(jnp.int32(0), params, optimizer.init(params)), {}, batch)
        sums = [
            sum(jnp.abs(x).sum() for x in jax.tree.leaves(tree)) for tree in (state.params, state.opt_state[1][0].mu)
        ]
        return reward_BGR.mean((0, 1)), lists.slate[:, 0], metrics, sums

    reward_R, slate_BN, metrics, sums = step(params, query, jax.random.key(5))
    assert slate_BN.tolist() == [[2, 4, -1], [2, 3, 1], [1, 0, -1]]
    assert metrics["drift"].value() < 1e-5
    seen = [*reward_R.tolist(), metrics["loss"].value(), metrics["grad_norm"].value(), *map(float, sums)]
    assert seen == pytest.approx([0.5833334, 0.4617210, -0.00388971, 0.4106376, 2309.271, 2.015056], rel=2e-5)
