"""The kernels, interpreted, against the blocks and against one softmax written out."""

import contextlib
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_attention
from helpers import quick_jit, run_on_8_devices
from test_attention import (
    PROMPT,
    SHARED,
    H,
    J,
    assert_bfloat16_is_near_float32,
    plain_causal,
    plain_shared_prefix,
    random,
    windowed,
    with_gradients,
)

from fgrpo_jax.config import Config, ConfigError, ModelConfig
from fgrpo_jax.models import attention, attention_blocks, flash
from fgrpo_jax.policies.llm.checks import check_training
from fgrpo_jax.policies.llm.files import attention_of

causal = functools.partial(attention.causal, kind="flash")


shared_prefix = functools.partial(test_attention.shared_prefix, kind="flash")
CASES = {"causal": (causal, plain_causal, PROMPT), "shared": (shared_prefix, plain_shared_prefix, SHARED)}
WINDOWED = {
    "causal, window": (*windowed(attention.causal, plain_causal, 3, "flash"), PROMPT),
    "shared, window": (*windowed(test_attention.shared_prefix, plain_shared_prefix, 4, "flash"), SHARED),
}


@pytest.mark.parametrize(
    "case, lengths",
    [
        ("causal", None),
        ("shared", [0, 13]),
        ("shared", [21, 16]),
        ("causal, window", None),
        ("shared, window", [0, 13]),
        ("shared, window", [21, 16]),
    ],
)
def test_kernels_are_one_softmax(case, lengths, monkeypatch):
    """42 or 30 rows in blocks of 32, 21 keys in blocks of 16; of a prefix none, some, a block, all."""
    monkeypatch.setattr(test_attention, "LENGTHS", jnp.array(lengths or [21, 21]))
    ours, one, args = (CASES | WINDOWED)[case]
    found, wanted = with_gradients(ours, args), with_gradients(one, args)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), found, wanted)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_near_float32(case):
    """As the same test of the blocks."""
    assert_bfloat16_is_near_float32(*CASES[case])


# --------------------------------------------------------------------- one part


ROWS, KEYS, WIDTH = 50, 45, 24


def part(*limits):
    """(arguments of the forward, of the backward pass) whose rows see keys up to `last`, perhaps from `first`."""
    q, d_out = (random((2, 2, ROWS, WIDTH), seed) for seed in (0, 1))
    k, v = (random((2, 2, KEYS, WIDTH), seed) for seed in (2, 3))
    q *= WIDTH**-0.5
    lse, delta = 3 + random((2, 2, ROWS), 4), random((2, 2, ROWS), 5)
    return (q, k, v, *limits), (q, d_out, lse, delta, k, v, *limits)


def kernels(forward, backward):
    forward_now = quick_jit(functools.partial(flash.part_forward, flash.INTERPRET))
    backward_now = quick_jit(functools.partial(flash.part_backward, flash.INTERPRET))
    return forward_now(*forward), backward_now(*backward)


@pytest.mark.parametrize("from_anywhere", [False, True])
def test_rows_in_any_order_see_any_number_of_keys(from_anywhere):
    last = jnp.asarray(np.random.default_rng(6).integers(-1, KEYS, (2, 1, ROWS)), jnp.int32)
    last = last.at[1, 0, 32:].set(-1)  # a block that sees nothing at all
    first = last - np.random.default_rng(7).integers(-1, 20, last.shape) if from_anywhere else jnp.zeros_like(last)
    forward, backward = part(last, first) if from_anywhere else part(last)
    (out, lse), grads = kernels(forward, backward)
    wanted_out, wanted_lse = quick_jit(functools.partial(attention_blocks.part_forward, False))(*forward)
    sees = jnp.broadcast_to((last >= 0) & (first <= last), lse.shape)
    np.testing.assert_allclose(out[sees], wanted_out[sees], atol=2e-5)
    np.testing.assert_allclose(lse[sees], wanted_lse[sees], atol=2e-5)
    assert np.isfinite(out).all() and (lse[~sees] < -1e29).all() and not np.any(grads[0][~sees])
    wanted = quick_jit(functools.partial(attention_blocks.part_backward, False))(*backward)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=5e-5), grads, wanted)


def test_blocks_out_of_sight_are_not_visited():
    """What holds nan there would spread it, masked or not."""
    last = jnp.broadcast_to(jnp.minimum(jnp.arange(ROWS) // 2, 20), (1, 1, ROWS))
    (q, k, v, _), (_, d_out, lse, delta, *_) = part(last)
    k, v = (x.at[:, :, 32:].set(jnp.nan) for x in (k, v))  # beyond the second block of 16
    (out, _), (d_q, _, _) = kernels((q, k, v, last), (q, d_out, lse, delta, k, v, last))
    assert np.isfinite(out).all() and np.isfinite(d_q).all()
    q, d_out = (x.at[:, :, :16].set(jnp.nan) for x in (q, d_out))  # rows that see keys up to 7
    last = last.at[..., 16:].set(KEYS - 1)
    _, (_, d_k, d_v) = kernels((q, k, v, last), (q, d_out, lse, delta, *part(last)[0][1:3], last))
    assert np.isfinite(d_k[:, :, 32:]).all() and np.isfinite(d_v[:, :, 32:]).all()
    assert np.isnan(d_k[:, :, :8]).any()


def test_blocks_before_a_window_are_not_visited():
    """Rows 0 to 31 see keys 16 to 31 at most, the others keys 32 and more."""
    row = jnp.arange(ROWS)
    last = jnp.where(row < 32, 16 + row // 2, KEYS - 1)[None, None]
    first = jnp.where(row < 32, 16, 32)[None, None]
    (q, k, v, *_), (_, d_out, lse, delta, *_) = part(last, first)
    far_k, far_v = (x.at[:, :, :16].set(jnp.nan) for x in (k, v))
    limits = last, first
    (out, _), (d_q, _, _) = kernels((q, far_k, far_v, *limits), (q, d_out, lse, delta, far_k, far_v, *limits))
    assert np.isfinite(out).all() and np.isfinite(d_q).all()
    q, d_out = (x.at[:, :, 32:].set(jnp.nan) for x in (q, d_out))
    _, (_, d_k, d_v) = kernels((q, k, v, *limits), (q, d_out, lse, delta, k, v, *limits))
    assert np.isfinite(d_k[:, :, :32]).all() and np.isfinite(d_v[:, :, :32]).all()
    assert np.isnan(d_k[:, :, 32:]).any()


@pytest.mark.parametrize("target", [flash.GPU, flash.TPU], ids=["gpu", "tpu"])
@pytest.mark.parametrize("dtype, near", [("float32", 2e-5), ("bfloat16", 0.03)])
def test_the_blocks_of_devices(target, dtype, near):
    """Theirs are larger, and narrower for wide heads: several blocks of rows and keys, the last not full."""
    interpreted = target._replace(interpret=True, params=lambda size: None, scalars=None)
    q, d_out = (random((1, 1, 600, 128), seed, dtype) for seed in (0, 1))
    k, v = (random((1, 1, 300, 128), seed, dtype) for seed in (2, 3))
    q, last = q * 128**-0.5, jnp.arange(600) // 2
    lse, delta = 6 + random((1, 1, 600), 4), random((1, 1, 600), 5)
    forward, backward = (q, k, v, last[None, None]), (q, d_out, lse, delta, k, v, last[None, None])
    for ours, theirs, args in (
        (flash.part_forward, attention_blocks.part_forward, forward),
        (flash.part_backward, attention_blocks.part_backward, backward),
    ):
        found = quick_jit(functools.partial(ours, interpreted))(*args)
        wanted = quick_jit(functools.partial(theirs, False))(*args)
        scale = [max(1.0, float(jnp.abs(x).max())) for x in wanted]
        jax.tree.map(
            lambda x, y, s: np.testing.assert_allclose(x / s, y / s, atol=near), list(found), list(wanted), scale
        )


# --------------------------------------------------------------------- where it runs


def as_if_there_were_a_gpu():
    """From 0.11 on JAX asks which one before it lowers a kernel (and says that Triton will leave it)."""
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_platforms():
    """Decided where the program is lowered: no GPU or TPU is needed to compile for one."""
    args = [jax.ShapeDtypeStruct((2, 300, n, 32), jnp.bfloat16) for n in (H, J, J)]

    def lowered(kind, platform):
        gradient = jax.grad(lambda *args: attention.causal(*args, kind).astype(jnp.float32).sum(), (0, 1, 2))
        with as_if_there_were_a_gpu() if platform == "cuda" else contextlib.nullcontext():
            return jax.jit(gradient).trace(*args).lower(lowering_platforms=(platform,)).as_text()

    for platform, name in (("cuda", "triton"), ("tpu", "tpu_custom_call")):
        assert lowered("auto", platform).count(name) >= 3 and name not in lowered("blocks", platform)
    assert "custom_call" not in lowered("auto", "cpu")


class Device(NamedTuple):
    platform: str
    device_kind: str = ""
    compute_capability: str = ""


@pytest.mark.parametrize(
    "device, runs",
    [
        (Device("cpu", "cpu"), False),
        (Device("gpu", "NVIDIA H100 80GB HBM3", "9.0"), True),
        (Device("gpu", "NVIDIA A100", "8.0"), True),
        (Device("gpu", "Tesla T4", "7.5"), False),
        (Device("gpu", "AMD Instinct MI300X", "gfx942"), False),
        (Device("tpu", "TPU v5 lite"), True),
        (Device("tpu", "TPU v4"), False),
    ],
)
def test_where_it_runs(device, runs, monkeypatch):
    assert flash.runs_on(device) == runs
    monkeypatch.setattr(jax, "devices", lambda: [device])
    for kind in ("auto", "flash", "blocks"):
        assert attention_of(ModelConfig(attention=kind)) == (kind if runs else "blocks")


def test_training_with_it_on_a_cpu_is_refused():
    """Evaluation and export of what it trained are not: they attend in blocks."""
    config = Config(model=ModelConfig(attention="flash"))
    with pytest.raises(ConfigError, match="model.attention='flash' needs an NVIDIA GPU .* and this is a cpu"):
        check_training(config, None, None, None, None, "validation")


def test_devices_share_queries_and_heads():
    """Values and gradients as on one device, and no operand is gathered; 3 heads stay whole."""
    out = run_on_8_devices("""
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from fgrpo_jax.models import attention
        from fgrpo_jax.run.sharding import make_mesh
        from fgrpo_jax.shards import by_query

        def gradients(params, frozen, q, k, v):
            return jax.grad(lambda *x: (attention.causal(*x, "flash") ** 2).sum(), (0, 1, 2))(q, k, v)

        rng, mesh = np.random.default_rng(0), make_mesh(2, 2, 2)
        queries = "data", "fsdp"
        for heads, place in (((4, 2, 2), P(queries, None, "tensor")), ((6, 3, 3), P(queries))):
            args = [jnp.asarray(rng.normal(size=(8, 20, n, 16)), jnp.float32) for n in heads]
            split = jax.device_put(args, NamedSharding(mesh, place))
            compiled = jax.jit(by_query(mesh, {}, gradients)).lower({}, {}, *split).compile()
            assert "all-gather" not in compiled.as_text() and "all-to-all" not in compiled.as_text()
            for x, y in zip(compiled({}, {}, *split), jax.jit(gradients)({}, {}, *args)):
                np.testing.assert_allclose(x, y, atol=2e-5)
        print("fine")
    """)
    assert out == ["fine"]


def test_kernels_are_lowered_for_every_mesh():
    """The devices are simulated; what is lowered is the program of TPUs."""
    out = run_on_8_devices("""
        import jax, jax.numpy as jnp
        from fgrpo_jax.models import attention
        from fgrpo_jax.run.sharding import make_mesh, query_sharding
        from fgrpo_jax.shards import by_query

        def gradients(params, frozen, q, k, v):
            return jax.grad(lambda *x: attention.causal(*x).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

        for sizes in ((8, 1, 1), (2, 4, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)):
            mesh = make_mesh(*sizes)
            place = query_sharding(mesh)
            args = [jax.ShapeDtypeStruct((8, 300, n, 32), jnp.bfloat16, sharding=place) for n in (4, 2, 2)]
            traced = jax.jit(by_query(mesh, {}, gradients)).trace({}, {}, *args)
            assert traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") >= 3
        print("fine")
    """)
    assert out == ["fine"]
