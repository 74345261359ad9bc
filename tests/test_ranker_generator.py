"""The generator: steps against whole lists, masks, padding, search."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_ranker import SPEC, make_params, make_query, padded

from fgrpo_jax.policies.ranker import generator, network
from fgrpo_jax.types import RANK, SLATE, UNTRAINED, Rollout, map_params, num_params

G = 24  # as many as a pool of four has lists
TWO_PHASE = SPEC._replace(two_phase=True)


@functools.partial(quick_jit, static_argnums=(0, 4))
def decoded(spec, params, query, key, group):
    """What was sampled, what greedy decoding finds, and what whole lists say of both."""
    encoded = generator.encode(spec, params, query)
    found = generator.sample(spec, encoded, key, group), generator.sample(spec, encoded, None, 1)
    return *found, *(generator.logprobs(spec, encoded, rollout) for rollout, _ in found)


@functools.partial(quick_jit, static_argnums=0)
def read(spec, params, query, rollout):
    """Logits, what was allowed, and log-probabilities of whole lists."""
    encoded = generator.encode(spec, params, query)
    is_open = generator.allowed(spec, encoded.present_BC, rollout.actions)
    return generator.logits(spec, encoded, rollout.actions), is_open, generator.logprobs(spec, encoded, rollout)


@functools.partial(quick_jit, static_argnums=(0, 3))
def searched(spec, params, query, width):
    return generator.beam(spec, generator.encode(spec, params, query), width)


@pytest.fixture(scope="module")
def params():
    return make_params("generator")


@pytest.fixture(scope="module")
def every():
    """All lists of four candidates, for each query."""
    orders = jnp.asarray(list(itertools.permutations(range(4))), jnp.int32)
    actions = jnp.broadcast_to(orders, (4, *orders.shape))
    return Rollout(actions, jnp.full(actions.shape, RANK), jnp.zeros(actions.shape))


@pytest.mark.parametrize("spec", [SPEC, TWO_PHASE], ids=["one phase", "two phases"])
def test_steps_agree_with_whole_lists(spec):
    """The sampler's log-probabilities are the trainer's, forced steps included."""
    query = make_query()
    sampled, greedy, *trained = decoded(spec, make_params("generator", spec), query, jax.random.key(0), G)
    for (rollout, lists), logp in zip((sampled, greedy), trained, strict=True):
        np.testing.assert_allclose(rollout.logp, logp, atol=1e-5)
        assert float(jnp.abs(logp).max()) > 1
        assert (lists.outcome == 0).all()
    rollout, lists = sampled
    forced = np.asarray(query.n_candidates)[:, None] - np.arange(SPEC.list_length) == 1
    if spec.two_phase:
        last = np.arange(SPEC.list_length) == SPEC.list_length - 1
        forced = np.concatenate([forced, np.broadcast_to(last, forced.shape)], 1)
    labels = [SLATE] * (spec.steps - SPEC.list_length) + [RANK] * SPEC.list_length
    expected = np.broadcast_to(np.where(forced, 0, labels)[:, None], rollout.phase.shape)
    np.testing.assert_array_equal(rollout.phase, expected)
    if spec.two_phase:
        np.testing.assert_array_equal(np.sort(lists.slate), np.sort(lists.ranking))
        assert (lists.slate != lists.ranking).any()
    else:
        np.testing.assert_array_equal(lists.slate, rollout.actions)
        np.testing.assert_array_equal(lists.ranking, rollout.actions)


@pytest.mark.parametrize("group", [7, 24])  # of which 7 and 8 attend as one
def test_lists_do_not_see_each_other(params, every, group):
    query = make_query().replace(n_candidates=jnp.full(4, 4, jnp.int32))
    some = jax.tree.map(lambda x: x[:, :group], every)
    changed = some.replace(actions=some.actions.at[:, 1:].set(some.actions[:, 1:][:, ::-1]))
    logit, other = (read(SPEC, params, query, rollout)[0] for rollout in (some, changed))
    np.testing.assert_allclose(other[:, 0], logit[:, 0], atol=1e-5)
    np.testing.assert_allclose(other[:, 1:], logit[:, 1:][:, ::-1], atol=1e-5)
    assert np.abs(other - logit).max() > 0.1


def test_lists_of_one_item():
    """There is no step after the first: what is sampled, found by a beam, and read agree."""
    spec = SPEC._replace(list_length=1)
    params = make_params("generator", spec)
    query = make_query()
    (rollout, _), (greedy, _), *trained = decoded(spec, params, query, jax.random.key(0), G)
    for found, logp in zip((rollout, greedy), trained, strict=True):
        np.testing.assert_allclose(found.logp, logp, atol=1e-5)
    best, _ = searched(spec, params, query, 3)
    np.testing.assert_array_equal(best.actions[:, :1], greedy.actions)
    assert len(np.unique(rollout.actions[0])) > 1


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_items_are_distinct_and_of_the_pool(seed):
    query = make_query(seed)
    (rollout, lists), (_, greedy), *_ = decoded(SPEC, make_params("generator"), query, jax.random.key(seed), G)
    for found in (lists, greedy):
        for b, g in np.ndindex(found.ranking.shape[:2]):
            items = found.ranking[b, g].tolist()
            assert len(set(items)) == SPEC.list_length and set(items) <= set(range(int(query.n_candidates[b])))


def test_a_pool_that_ends_before_the_list(params):
    """Cannot be encoded, but padding rows of a batch may look so."""
    query = make_query().replace(n_candidates=jnp.array([2, 1, 8, 8], jnp.int32))
    (rollout, lists), _, logp, _ = decoded(SPEC, params, query, jax.random.key(0), G)
    assert (lists.ranking[0, :, 2:] == -1).all() and (lists.ranking[1, :, 1:] == -1).all()
    assert (rollout.phase[0] == jnp.array([RANK, 0, 0, 0])).all() and (rollout.phase[1] == UNTRAINED).all()
    np.testing.assert_allclose(rollout.logp, logp, atol=1e-5)
    assert np.isfinite(logp).all() and (rollout.actions >= 0).all()


def test_probabilities_of_all_lists_sum_to_one(params, every):
    """A list's log-probability is the sum over its steps; a used item has none."""
    query = make_query().replace(n_candidates=jnp.full(4, 4, jnp.int32))
    _, _, logp = read(SPEC, params, query, every)
    np.testing.assert_allclose(jnp.exp(logp.sum(-1)).sum(-1), 1.0, rtol=1e-5)
    used = every.replace(actions=every.actions.at[:, 0, 1].set(every.actions[:, 0, 0]))
    assert (read(SPEC, params, query, used)[2][:, 0, 1] == -jnp.inf).all()


def test_samples_follow_the_probabilities(params):
    query = make_query()
    drawn = [decoded(SPEC, params, query, jax.random.key(i), G)[0][0] for i in range(300)]
    actions = np.concatenate([rollout.actions[-1] for rollout in drawn])  # of four candidates
    logp = np.concatenate([rollout.logp[-1].sum(-1) for rollout in drawn])
    _, first, counts = np.unique(actions @ np.array([64, 16, 4, 1]), return_index=True, return_counts=True)
    assert np.exp(logp[first]).sum() > 0.99
    np.testing.assert_allclose(counts / len(actions), np.exp(logp[first]), atol=0.02)


def test_padding_changes_nothing(params, every):
    query = make_query()
    wide = padded(query)
    logit, is_open, logp = read(SPEC, params, query, every)
    there = np.broadcast_to(network.present(query)[:, None, None], logit.shape)
    beyond = jnp.arange(wide.candidates.shape[1]) >= wide.n_candidates[:, None]
    ended = jnp.arange(wide.history.shape[1]) >= wide.history_len[:, None]
    other = wide.replace(  # whatever stands in the padding
        candidates=jnp.where(beyond, 7, wide.candidates),
        popularity=jnp.where(beyond, 9.0, wide.popularity),
        history=jnp.where(ended, 3, wide.history),
    )
    for changed in (wide, other):
        wide_logit, wide_open, wide_logp = read(SPEC, params, changed, every)
        assert not wide_open[..., 8:].any()
        np.testing.assert_array_equal(is_open, wide_open[..., :8])
        np.testing.assert_allclose(logit[there], wide_logit[..., :8][there], atol=1e-5)
        np.testing.assert_allclose(logp, wide_logp, atol=1e-5)


def test_the_order_of_the_pool_does_not_matter(params):
    query = make_query(full=True)
    order = jnp.asarray(np.random.default_rng(0).permutation(8))
    moved = query.replace(**{n: getattr(query, n)[:, order] for n in ("candidates", "retrieval", "popularity")})
    (_, lists), (_, moved_lists) = (decoded(SPEC, params, q, jax.random.key(0), G)[1] for q in (query, moved))
    np.testing.assert_array_equal(lists.ranking, order[moved_lists.ranking])


def test_the_order_of_the_history_matters(params, every):
    query = make_query()
    turned = query.replace(history=query.history.at[0].set(query.history[0, ::-1]))
    gap = jnp.abs(read(SPEC, params, query, every)[0] - read(SPEC, params, turned, every)[0]).max((1, 2, 3))
    assert gap[0] > 1e-3 and (gap[1:] == 0).all()


def test_a_beam_of_one_is_greedy(params):
    query = make_query()
    _, (greedy, greedy_lists), *_ = decoded(SPEC, params, query, jax.random.key(0), G)
    rollout, lists = searched(SPEC, params, query, 1)
    np.testing.assert_array_equal(rollout.actions, greedy.actions)
    np.testing.assert_allclose(rollout.logp, greedy.logp, atol=1e-5)
    np.testing.assert_array_equal(lists.ranking, greedy_lists.ranking)


def test_a_wide_beam_finds_the_best_lists(params):
    """Of 24 lists (and more elsewhere) a beam as wide finds the order of all; a wider one repeats the best."""
    query = make_query()
    rollout, lists = searched(SPEC, params, query, 30)
    total = np.asarray(rollout.logp.sum(-1))
    every = [tuple(x) for x in rollout.actions[-1].tolist()]
    assert set(every) == set(itertools.permutations(range(4))) and every[24:] == [every[0]] * 6
    assert (np.diff(total[-1, :24]) <= 1e-6).all() and (total[:3, 0] >= total[:3].max(1)).all()
    assert len({tuple(x) for x in rollout.actions[0].tolist()}) == 30
    _, (greedy, _), logp, _ = decoded(SPEC, params, query, jax.random.key(0), G)
    assert (total[:, 0] >= np.asarray(greedy.logp.sum(-1))[:, 0] - 1e-5).all()


def test_networks_of_one_spec_are_as_large():
    spec = network.RankerSpec(num_items=3000, history_max=50, list_length=6)
    tables = network.generator_table, network.pointwise_table, network.evaluator_table
    sizes = [num_params(table(spec)) for table in tables]
    assert max(sizes) / min(sizes) < 1.02 and 5e5 < min(sizes) < 1e6
    with pytest.raises(ValueError, match="hidden_size=16 is not divided by num_heads=3"):
        network.generator_table(SPEC._replace(num_heads=3))


def test_random_weights():
    table = network.generator_table(SPEC)
    params = quick_jit(lambda key: network.init(SPEC, table, key))(jax.random.key(0))
    assert (params["norm"] == 1).all() and abs(float(params["items"].std()) / SPEC.init_std - 1) < 0.1
    assert not np.allclose(params["layers"]["k"], params["layers"]["v"])
    found = jax.tree.leaves(map_params(lambda p, x: p.shape == x.shape and len(p.axes) == x.ndim, table, params))
    assert all(found)


def test_bfloat16_is_near_float32(params, every):
    logit, half = (read(spec, params, make_query(), every)[0] for spec in (SPEC, SPEC._replace(dtype="bfloat16")))
    assert half.dtype == jnp.float32
    gap = jnp.abs(logit - half)
    assert 0 < gap.mean() < 0.05 and float(logit.std()) > 0.5


def test_remat_changes_nothing(params, every):
    spec = SPEC._replace(num_layers=1, list_layers=1)
    params = params | {name: {k: x[:1] for k, x in params[name].items()} for name in ("layers", "list_layers")}

    def gradient(spec):
        return quick_jit(jax.grad(lambda p: read.__wrapped__(spec, p, make_query(), every)[2][:3].sum()))(params)

    one, other = gradient(spec), gradient(spec._replace(remat=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), one, other)
