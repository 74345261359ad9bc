"""The mesh, the table and the split of queries; 8 simulated devices in a process of their own."""

import jax
import numpy as np
import pytest
from helpers import run_on_8_devices

from fgrpo_jax.config import ConfigError
from fgrpo_jax.run.sharding import check_divisible, local_rows, make_mesh, shard_batch


def test_shardings_on_8_devices():
    out = run_on_8_devices("""
        import jax, numpy as np
        from jax.sharding import PartitionSpec as P
        from fgrpo_jax.models import decoder
        from fgrpo_jax.run.sharding import (
            check_divisible, local_rows, make_mesh, param_shardings, query_sharding, shard_batch
        )
        from fgrpo_jax.types import Param
        assert make_mesh(-1, 1, 1).shape == dict(data=8, fsdp=1, tensor=1)
        assert make_mesh(2, -1, 2).shape == dict(data=2, fsdp=2, tensor=2)
        assert all(t == jax.sharding.AxisType.Auto for t in make_mesh(2, 2, 2).axis_types)
        mesh = make_mesh(1, 2, 4)

        param = lambda *sizes: Param(*zip(*((size, axis) for axis, size in sizes)), "ones", False)
        table = {"a": param(("vocab", 10), ("embed", 6)), "c": param(("norm", 8)),
                 "b": param(("layers", 3), ("embed", 8), ("kv_heads", 2), ("head_dim", 4)),
                 "d": param(("mlp", 4), ("heads", 8))}
        specs = jax.tree.map(lambda s: s.spec, param_shardings(mesh, table))
        assert specs["a"] == P(None, "fsdp"), specs  # 10 tokens over 4: replicated
        assert specs["b"] == P(None, "fsdp", None, None), specs  # 2 key-value heads over 4
        assert specs["c"] == P(None) and specs["d"] == P("tensor", None), specs

        spec = decoder.DecoderSpec(vocab_size=16, hidden_size=8, num_layers=2, num_heads=4, num_kv_heads=2,
                                   head_dim=4, mlp_size=16)
        where = param_shardings(make_mesh(2, 2, 2), decoder.param_table(spec))
        params = jax.jit(lambda k: decoder.init(spec, k), out_shardings=where)(jax.random.key(0))
        assert params["layers"]["gate"].addressable_shards[0].data.shape == (2, 4, 8)
        alone = jax.jit(lambda k: decoder.init(spec, k))(jax.random.key(0))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, alone)

        x = np.arange(24).reshape(8, 3)
        for sizes in ((8, 1, 1), (2, 2, 2), (1, 4, 2)):
            mesh = make_mesh(*sizes)
            y = shard_batch(mesh, {"x": x}, 8)["x"]
            np.testing.assert_array_equal(y, x)
            assert y.sharding.is_equivalent_to(query_sharding(mesh), 2)
            assert y.addressable_shards[0].data.shape == (8 // (sizes[0] * sizes[1]), 3)
            np.testing.assert_array_equal(local_rows(mesh, 8), np.arange(8))
        print("fine")
    """)
    assert out == ["fine"]


def test_loss_and_gradient_do_not_depend_on_the_mesh():
    out = run_on_8_devices("""
        import jax, jax.numpy as jnp, numpy as np
        from fgrpo_jax.algorithm.advantages import make_batch
        from fgrpo_jax.algorithm.objectives import clipped_pg
        from fgrpo_jax.run.sharding import make_mesh, shard_batch
        from fgrpo_jax.types import Credit, Rollout
        rng = np.random.default_rng(0)
        B, G, T = 8, 4, 6
        phase = rng.integers(0, 3, (B, G, T)).astype(np.int32)
        logp, old = -rng.random((2, B, G, T)).astype(np.float32)
        reward = rng.random((B, G, 2)).astype(np.float32)
        credit = Credit((("slate", "recall", 1.0), ("rank", "ndcg", 1.0)), "each")

        @jax.jit
        def step(phase, logp, old, reward):
            def loss(x):
                batch = make_batch(None, Rollout(phase, phase, logp), reward, credit, "phase")
                return clipped_pg()(x, batch.replace(old_logp=old))[0]
            return jax.value_and_grad(loss)(logp)

        one = step(phase, logp, old, reward)
        for sizes in ((8, 1, 1), (2, 2, 2)):
            many = step(*shard_batch(make_mesh(*sizes), (phase, logp, old, reward), B))
            np.testing.assert_allclose(many[0], one[0], rtol=1e-5, atol=1e-7)  # a sum of advantages, which cancel
            np.testing.assert_allclose(many[1], one[1], rtol=1e-5, atol=1e-8)
        print("fine")
    """)
    assert out == ["fine"]


def test_draws_do_not_depend_on_the_mesh():
    """From a vocabulary that lies in parts on several devices; 1,000 has a block cut short.

    Parts that are no whole blocks too; and of one device no logits are sent to another.
    """
    out = run_on_8_devices("""
        import jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from fgrpo_jax.models.draw import choose_token
        from fgrpo_jax.run.sharding import make_mesh
        from fgrpo_jax.shards import by_query

        def sample(params, frozen, logit, key):
            return choose_token(logit, key), choose_token(logit, None)

        key = jax.random.key(1)
        for size in (96, 1000, 1192, 2048):
            logit = 3 * np.random.default_rng(0).normal(size=(8, 16, size)).astype(np.float32)
            one, best = jax.jit(sample)({}, {}, logit, key)
            assert len(np.unique(one[0])) > 20
            for sizes in ((8, 1, 1), (2, 2, 2), (1, 1, 8)):
                mesh = make_mesh(*sizes)
                split = jax.device_put(logit, NamedSharding(mesh, P(("data", "fsdp"), None, "tensor")))
                many = jax.jit(by_query(mesh, {}, sample)).lower({}, {}, split, key).compile()
                assert size == 96 or "all-gather" not in many.as_text()
                many, many_best = many({}, {}, split, key)
                np.testing.assert_array_equal(many[0], one[0])
                np.testing.assert_allclose(many[1], one[1], rtol=1e-5)
                jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), many_best, best)
        print("fine")
    """)
    assert out == ["fine"]


def test_the_gradient_of_a_norm_is_summed_where_it_lies():
    """Queries and heads lie on different axes of the mesh; no device needs the others' heads."""
    out = run_on_8_devices("""
        import jax, jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec as P
        from fgrpo_jax.models.layers import rms_norm
        from fgrpo_jax.run.sharding import make_mesh
        place = NamedSharding(make_mesh(2, 2, 2), P(("data", "fsdp"), None, "tensor"))
        x = jax.ShapeDtypeStruct((8, 4, 16, 8), jnp.float32, sharding=place)
        grad = jax.jit(jax.grad(lambda scale, x: (rms_norm(x, scale, 1e-6) ** 2).sum()))
        text = grad.lower(jax.ShapeDtypeStruct((8,), jnp.float32), x).compile().as_text()
        assert "all-reduce" in text and "all-gather" not in text, text
        print("fine")
    """)
    assert out == ["fine"]


def test_one_device():
    mesh = make_mesh(-1, 1, 1, jax.devices()[:1])
    x = np.arange(6).reshape(3, 2)
    np.testing.assert_array_equal(shard_batch(mesh, x, 3), x)
    np.testing.assert_array_equal(local_rows(mesh, 3), [0, 1, 2])
    with pytest.raises(ValueError, match="2 rows given, this process holds 3"):
        shard_batch(mesh, x[:2], 3)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((-1, -1, 1), "at most one may be -1"),
        ((0, 1, 1), "must be positive"),
        ((-1, 3, 1), "3 does not divide the 8 device"),
        ((2, 2, 1), "uses 4 of 8 devices"),
    ],
)
def test_impossible_meshes_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(*sizes, devices=[object()] * 8)


def test_indivisible_batches_are_refused():
    class Fake:
        shape = {"data": 4, "fsdp": 2, "tensor": 1}

    check_divisible(Fake, 64, 2, "rl")
    with pytest.raises(ConfigError, match="set rl.batch_queries to 48 or 64"):
        check_divisible(Fake, 60, 2, "rl")
    with pytest.raises(ConfigError, match="set sft.batch_queries to 16,"):
        check_divisible(Fake, 8, 2, "sft")
