"""Adapters: what they compute."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit, run_on_8_devices

from fgrpo_jax.models import decoder, lora
from fgrpo_jax.models.lora import Lora
from fgrpo_jax.policies.llm import sampling

ALL = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.fixture(scope="module")
def small(spec):
    """A model with adapters that say something: spec, base, adapters."""
    spec = spec._replace(lora=Lora(2, 3.0, ALL))
    _, table = lora.split(decoder.param_table(spec))
    base = quick_jit(decoder.init, static_argnums=0)(spec._replace(lora=None), jax.random.key(0))
    adapters = lora.init(table, jax.random.key(1), "float32")
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda x: x + jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), adapters)
    return spec, base, adapters


def merged(base, adapters, settings):
    """The weights of a model without adapters that computes the same."""
    layers = lora.join(base, adapters, settings)["layers"]
    for name in adapters["layers"]:
        layers[name] = jnp.stack(
            [lora.merged(jax.tree.map(lambda x: x[n], layers[name])) for n in range(len(base["layers"][name]))]
        )
    return {**base, "layers": layers}


def test_sampler_and_trainer_compute_what_merged_weights_do(small, grammar, query):
    spec, base, adapters = small
    joined = lora.join(base, adapters, spec.lora)
    sampler = sampling.Sampler(spec, grammar, True)
    rollout, _ = quick_jit(sampling.sample, static_argnums=(0, 4))(sampler, joined, query, jax.random.key(0), 3)
    logp = quick_jit(sampling.logprobs, static_argnums=0)(sampler, joined, query, rollout)
    np.testing.assert_allclose(logp, rollout.logp, atol=2e-5)
    plain = sampling.Sampler(spec._replace(lora=None), grammar, True)
    of = quick_jit(sampling.logprobs, static_argnums=0)
    np.testing.assert_allclose(of(plain, merged(base, adapters, spec.lora), query, rollout), logp, atol=2e-5)
    assert np.abs(of(plain, base, query, rollout) - logp).max() > 0.1  # they do say something


def test_as_drawn_they_change_nothing_and_all_can_learn(small, grammar, query):
    spec, base, _ = small
    _, table = lora.split(decoder.param_table(spec))
    adapters = lora.init(table, jax.random.key(1), "float32")
    rollout, _ = quick_jit(sampling.sample, static_argnums=(0, 4))(
        sampling.Sampler(spec._replace(lora=None), grammar, True), base, query, jax.random.key(0), 3
    )

    def loss(adapters):
        joined = lora.join(base, adapters, spec.lora)
        logp = sampling.logprobs(sampling.Sampler(spec, grammar, True), joined, query, rollout)
        return (logp * jnp.arange(logp.size).reshape(logp.shape)).sum(), logp

    grads, logp = quick_jit(jax.grad(loss, has_aux=True))(adapters)
    np.testing.assert_allclose(logp, rollout.logp, atol=2e-5)
    for name, of in grads["layers"].items():
        assert np.abs(of["b"]).max() > 0, name
        assert np.abs(of["a"]).max() == 0, name  # B is zero


@pytest.mark.parametrize("name", ["q", "o", "down"])
def test_with_full_rank_a_first_step_is_that_of_full_fine_tuning(small, grammar, query, name):
    """A the identity, scale 1: B's gradient is the weight's, and so is what an SGD step does."""
    spec, base, _ = small
    weight = base["layers"][name]
    axes_in = lora.AXES_IN.get(name, 1)
    size = int(np.prod(weight.shape[1 : 1 + axes_in]))
    spec = spec._replace(lora=Lora(size, float(size), (name,)))
    eye = jnp.broadcast_to(jnp.eye(size), (spec.num_layers, size, size))
    a = eye.reshape(spec.num_layers, *weight.shape[1 : 1 + axes_in], size)
    b = jnp.zeros((spec.num_layers, size, *weight.shape[1 + axes_in :]))
    rollout, _ = quick_jit(sampling.sample, static_argnums=(0, 4))(
        sampling.Sampler(spec._replace(lora=None), grammar, True), base, query, jax.random.key(0), 2
    )

    def loss(spec, params):
        return sampling.logprobs(sampling.Sampler(spec, grammar, True), params, query, rollout).sum()

    def full(weight):
        return loss(spec._replace(lora=None), {**base, "layers": {**base["layers"], name: weight}})

    def low(adapter):
        return loss(spec, lora.join(base, {"layers": {name: adapter}}, spec.lora))

    wanted, found = quick_jit(jax.grad(full))(weight), quick_jit(jax.grad(low))({"a": a, "b": b})
    np.testing.assert_allclose(found["b"].reshape(weight.shape), wanted, rtol=1e-4, atol=1e-5)
    stepped = jax.tree.map(lambda x, g: x - 0.1 * g, {"a": a, "b": b}, found)
    changed = merged(base, {"layers": {name: stepped}}, spec.lora)["layers"][name]
    np.testing.assert_allclose(changed, weight - 0.1 * wanted, rtol=1e-4, atol=1e-5)


MESH = """
    import dataclasses, sys
    sys.path.append({tests!r})
    import jax, jax.numpy as jnp, numpy as np
    jax.config.update("jax_disable_most_optimizations", True)
    from conftest import GRAMMAR, SPEC
    from fgrpo_jax.models import decoder, lora
    from fgrpo_jax.policies.llm import sampling, targets
    from fgrpo_jax.policies.llm.query import Query
    from fgrpo_jax.run.sharding import make_mesh, param_shardings, shard_batch
    from fgrpo_jax.shards import by_query, summed

    spec = SPEC._replace(num_layers=2, lora=lora.Lora(2, 3.0, ("q", "o", "down")))
    base_table, table = lora.split(decoder.param_table(spec))
    rng = np.random.default_rng(0)
    draw = lambda p: (0.3 * rng.normal(size=p.shape)).astype(np.float32)
    base, adapters = (jax.tree.map(draw, t, is_leaf=lambda x: hasattr(x, "decay")) for t in (base_table, table))
    names = np.tile(np.array([(10, 11), (10, 12), (13, -1), (14, 10), (15, -1)], np.int32), (8, 1, 1))
    query = Query(rng.integers(7, 32, (8, 8)).astype(np.int32), np.full(8, 6, np.int32), names,
                  rng.integers(0, 2, (8, 5)).astype(np.float32), np.full(8, 5, np.int32))
    sampler = sampling.Sampler(spec, GRAMMAR, True)
    rollout, _ = jax.jit(lambda p, q: sampling.sample(sampler, p, q, jax.random.key(0), 2))(
        lora.join(base, adapters, spec.lora), query)

    def loss(params, frozen, query, rollout):
        return sampling.logprobs(sampler, lora.join(frozen["base"], params, spec.lora), query, rollout).sum()

    def on(data, fsdp, tensor, devices):
        mesh = make_mesh(data, fsdp, tensor, devices)
        at, base_at = param_shardings(mesh, table), param_shardings(mesh, base_table)
        gradient = jax.jit(summed(mesh, table, jax.value_and_grad(loss), {{"base": base_table}}))
        return gradient(jax.device_put(adapters, at), {{"base": jax.device_put(base, base_at)}},
                        *(shard_batch(mesh, jax.tree.map(np.asarray, x), 8) for x in (query, rollout)))

    alone, together = on(1, 1, 1, jax.devices()[:1]), on(2, 2, 2, jax.devices())
    ok = jax.tree.map(lambda x, y: np.allclose(x, np.asarray(y), rtol=1e-4, atol=1e-5), alone, together)
    print(len(jax.tree.leaves(ok)), all(jax.tree.leaves(ok)))
"""


def test_on_eight_devices_their_gradient_is_the_same():
    assert run_on_8_devices(MESH.format(tests=str(Path(__file__).parent))) == ["7", "True"]
