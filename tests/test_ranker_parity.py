"""The generator against its twin in PyTorch: logits, gradients, greedy lists, a few updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import quick_jit
from tiny_ranker import SPEC, make_params, make_query

from fgrpo_jax.policies.ranker import generator
from fgrpo_jax.types import RANK, Rollout

torch = pytest.importorskip("torch")
from fgrpo_jax.bench import torch_ranker  # noqa: E402

G = 3


@pytest.fixture(scope="module")
def world():
    query = make_query().replace(n_candidates=jnp.array([8, 6, 7, 5], jnp.int32))
    rng = np.random.default_rng(0)
    actions = np.stack([[rng.permutation(n)[:4] for _ in range(G)] for n in query.n_candidates.tolist()])
    return query, jnp.asarray(actions, jnp.int32), torch_ranker.tensors(query), torch.tensor(actions)


CAUSAL = SPEC._replace(causal_history=True, sees_retrieval=False)


@pytest.mark.parametrize("spec", [SPEC, CAUSAL], ids=["full", "causal"])
def test_logits_are_equal(world, spec):
    query, actions, tensors, torch_actions = world
    params = make_params("generator", spec)
    ours = quick_jit(lambda p, q, a: generator.logits(spec, generator.encode(spec, p, q), a))(params, query, actions)
    theirs, present = torch_ranker.logits(spec, torch_ranker.parameters(params), tensors, torch_actions)
    there = np.broadcast_to(present.numpy()[:, None, None], ours.shape)
    np.testing.assert_allclose(ours[there], theirs.detach().numpy()[there], rtol=1e-5, atol=1e-5)
    assert float(ours.std()) > 0.5


def test_greedy_lists_are_equal(world):
    query, _, tensors, _ = world
    params = make_params("generator")
    ours, _ = quick_jit(lambda p, q: generator.sample(SPEC, generator.encode(SPEC, p, q), None, 1))(params, query)
    theirs = torch_ranker.sample(SPEC, torch_ranker.parameters(params), tensors, 1)
    np.testing.assert_array_equal(ours.actions, theirs)
    drawn = torch_ranker.sample(SPEC, torch_ranker.parameters(params), tensors, 50, torch.Generator().manual_seed(0))
    assert all(len(set(x)) == 4 for x in drawn.reshape(-1, 4).tolist()) and len(drawn[0].unique(dim=0)) > 10


def test_updates_are_equal(world):
    """Five steps of AdamW on GoalRank's loss: the same losses and parameters."""
    query, actions, tensors, torch_actions = world
    spec = SPEC._replace(num_layers=1, list_layers=1)
    params = make_params("generator", spec)
    reward = np.random.default_rng(1).normal(size=(4, G)).astype(np.float32)
    reward[2] = 0.5  # a group without differences
    rollout = Rollout(actions, jnp.full(actions.shape, RANK), jnp.zeros(actions.shape))
    standardised = (reward - reward.mean(1, keepdims=True)) / np.maximum(reward.std(1, keepdims=True), 1e-9)
    target = jax.nn.softmax(standardised) * np.array([1, 1, 0, 1])[:, None] / 4
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, 0.9, 0.98, 1e-8, weight_decay=0.01))

    def loss(params):
        logp = generator.logprobs(spec, generator.encode(spec, params, query), rollout)
        return -(target * logp.sum(-1)).sum()

    @quick_jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return value, optax.apply_updates(params, updates), state

    twin = torch_ranker.parameters(params)
    other = torch.optim.AdamW(torch_ranker.leaves(twin), 1e-2, (0.9, 0.98), 1e-8, weight_decay=0.01)
    state = optimizer.init(params)
    for _ in range(5):
        value, params, state = step(params, state)
        theirs = torch_ranker.training_step(spec, twin, other, tensors, torch_actions, torch.tensor(reward))
        np.testing.assert_allclose(value, theirs, rtol=2e-4)
    np.testing.assert_allclose(params["layers"]["q"], twin["layers"]["q"].detach(), atol=2e-3)
