"""Families whose layers differ in kind, on eight devices: what they sample and how they learn is as on one."""

from pathlib import Path

import pytest
from helpers import run_on_8_devices

MODEL = """
    import sys
    sys.path.append({tests!r})
    import jax, jax.numpy as jnp, numpy as np
    jax.config.update("jax_disable_most_optimizations", True)
    from conftest import GRAMMAR, SPEC
    from fgrpo_jax.models import decoder
    from fgrpo_jax.models.decoder import DELTA, FULL, LOCAL
    from fgrpo_jax.models.families import FAMILIES
    from fgrpo_jax.policies.llm import sampling
    from fgrpo_jax.policies.llm.query import Query
    from fgrpo_jax.run.sharding import make_mesh, param_shardings, shard_batch
    from fgrpo_jax.shards import by_query, summed

    kinds = {{
        "llama": {{}},
        "gemma3_text": dict(pattern=(LOCAL, FULL), window=4, local_rope_theta=1e3, num_layers=3),
        "qwen3_5_text": dict(pattern=(DELTA, FULL), delta=(2, 4, 8, 6, 4), rotary_fraction=0.25, num_layers=3),
    }}
    spec = SPEC._replace(**FAMILIES[{family!r}].spec | kinds[{family!r}])
    table, rng = decoder.param_table(spec), np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + (0.1 * rng.normal(size=x.shape)).astype(np.float32),
                          decoder.init(spec, jax.random.key(0)))
    names = np.tile(np.array([(10, 11), (10, 12), (13, -1), (14, 10), (15, -1)], np.int32), (8, 1, 1))
    query = Query(rng.integers(7, 32, (8, 12)).astype(np.int32), rng.integers(2, 13, 8).astype(np.int32), names,
                  rng.integers(0, 2, (8, 5)).astype(np.float32), np.full(8, 5, np.int32))
    sampler = sampling.Sampler(spec, GRAMMAR, True)

    def sample(params, frozen, query, key):
        return sampling.sample(sampler, params, query, key, 2)

    def loss(params, frozen, query, rollout):
        logp = sampling.logprobs(sampler, params, query, rollout)
        return (logp * (1 + jnp.arange(logp.shape[1])[:, None])).sum()

    def on(devices, *sizes):
        mesh = make_mesh(*sizes, devices)
        here = jax.device_put(params, param_shardings(mesh, table))
        batch = shard_batch(mesh, query, 8)
        rollout, _ = jax.jit(by_query(mesh, table, sample))(here, {{}}, batch, jax.random.key(1))
        value, gradient = jax.jit(summed(mesh, table, jax.value_and_grad(loss)))(here, {{}}, batch, rollout)
        return jax.device_get(rollout), jax.device_get(value), jax.device_get(gradient)

    rollout, value, gradient = on(jax.devices()[:1], 1, 1, 1)
    assert len(np.unique(rollout.actions.reshape(16, -1), axis=0)) > 8
    for sizes in ((2, 2, 2), (1, 4, 2), (2, 4, 1)):
        drawn, other, of_mesh = on(jax.devices(), *sizes)
        np.testing.assert_array_equal(drawn.actions, rollout.actions)
        np.testing.assert_allclose(drawn.logp, rollout.logp, atol=2e-5)
        np.testing.assert_allclose(other, value, rtol=1e-5)
        for path, x in jax.tree_util.tree_leaves_with_path(gradient):
            found = of_mesh
            for key in path:
                found = found[key.key]
            assert np.abs(x).max() > 1e-3, path
            np.testing.assert_allclose(found, x, rtol=1e-3, atol=1e-4 * np.abs(x).max(), err_msg=str((sizes, path)))
    print("fine")
"""


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_5_text"])
def test_on_eight_devices_rollouts_and_gradients_are_those_of_one(family):
    assert run_on_8_devices(MODEL.format(tests=str(Path(__file__).parent), family=family)) == ["fine"]
