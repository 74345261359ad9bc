"""Attention in blocks against one softmax over all keys, written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit

from fgrpo_jax.models import attention, attention_blocks

B, S, G, T, H, J, E = 2, 21, 3, 5, 4, 2, 8
LENGTHS = jnp.array([0, 13])  # of the prefix: nothing of it is seen, or a part


def random(shape, seed, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def plain(q_BXHE, k_BYJE, v_BYJE, seen_BXY):
    """Softmax over all keys at once, in float32; heads repeated."""
    q, k, v = (x.astype(jnp.float32) for x in (q_BXHE, k_BYJE, v_BYJE))
    k, v = (jnp.repeat(x, H // J, 2) for x in (k, v))
    score = jnp.einsum("bxhe,byhe->bhxy", q, k) / np.sqrt(E)
    weight = jax.nn.softmax(jnp.where(seen_BXY[:, None], score, -jnp.inf), -1)
    return jnp.einsum("bhxy,byhe->bxhe", weight, v)


def plain_causal(q, k, v, window=S):
    before = jnp.arange(q.shape[1])[:, None] - jnp.arange(q.shape[1])
    return plain(q, k, v, ((before >= 0) & (before < window))[None])


def plain_shared_prefix(q_BGTHE, k_BSJE, v_BSJE, k_BGUJE, v_BGUJE, first=0, window=S + T):
    """Every rollout with its own copy of the prefix, joined with its own keys."""
    shape = k_BGUJE.shape[:2] + k_BSJE.shape[1:]
    k, v = (
        jnp.concatenate([jnp.broadcast_to(x[:, None], shape), y], 2).reshape(B * G, -1, J, E)
        for x, y in ((k_BSJE, k_BGUJE), (v_BSJE, v_BGUJE))
    )
    length, own = q_BGTHE.shape[2], k_BGUJE.shape[2]
    number = first + jnp.arange(length)[:, None]
    in_prefix = jnp.broadcast_to(jnp.arange(S) < LENGTHS[:, None, None], (B, length, S))
    in_prefix &= jnp.arange(S) > LENGTHS[:, None, None] + number - window
    in_own = (number >= jnp.arange(own)) & (jnp.arange(own) > number - window)
    seen = jnp.repeat(jnp.concatenate([in_prefix, jnp.broadcast_to(in_own, (B, length, own))], -1), G, 0)
    return plain(q_BGTHE.reshape(B * G, length, H, E), k, v, seen).reshape(q_BGTHE.shape)


def shared_prefix(q, k, v, k_own, v_own, kind="auto", window=None):
    return attention.shared_prefix(q, k, v, LENGTHS, k_own, v_own, kind, window)


def windowed(computed, plain, size, kind="auto"):
    """Both with a window, whose size the computed one finds out when it runs."""

    def ours(*args):
        return computed(*args, kind=kind, window=jnp.int32(size) + 0 * args[0].astype(jnp.int32).min())

    return ours, functools.partial(plain, window=size)


PROMPT = [random((B, S, n, E), i) for i, n in enumerate((H, J, J))]
ROLLOUTS = [random((B, G, T, n, E), 3 + i) for i, n in enumerate((H, J, J))]
SHARED = [ROLLOUTS[0], *PROMPT[1:], *ROLLOUTS[1:]]
CASES = {
    "causal": (attention.causal, plain_causal, PROMPT),
    "shared": (shared_prefix, plain_shared_prefix, SHARED),
    "causal, window": (*windowed(attention.causal, plain_causal, 6), PROMPT),
    "shared, window": (*windowed(shared_prefix, plain_shared_prefix, 4), SHARED),  # shorter than a rollout
}


def with_gradients(f, args):
    def both(args):
        out, back = jax.vjp(f, *args)
        return out, back(random(out.shape, 9, out.dtype))

    return quick_jit(both)(args)


def set_blocks(monkeypatch, scores, stretch):
    monkeypatch.setattr(attention_blocks, "BLOCK_SCORES", scores)
    monkeypatch.setattr(attention_blocks, "LEAST_ROWS", 1)
    monkeypatch.setattr(attention_blocks, "STRETCH", stretch)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scores, stretch", [(1, 4), (500, 7), (1300, 21), (10**6, 1000)])
def test_blocks_change_nothing(case, scores, stretch, monkeypatch):
    """Values and gradients, from one row a block, over parts that divide nothing, to one block."""
    set_blocks(monkeypatch, scores, stretch)
    blocks, one, args = CASES[case]
    found, wanted = with_gradients(blocks, args), with_gradients(one, args)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), found, wanted)


@pytest.mark.parametrize("case", ["causal", "shared"])
def test_bfloat16_is_near_float32(case, monkeypatch):
    """Outputs of size 1 to 0.02 (8 bits of mantissa), gradients of up to 5 to 0.1."""
    set_blocks(monkeypatch, 500, 7)
    assert_bfloat16_is_near_float32(*CASES[case])


def assert_bfloat16_is_near_float32(blocks, one, args):
    half = [x.astype(jnp.bfloat16) for x in args]
    (out, grads), (near, near_grads) = with_gradients(blocks, half), with_gradients(one, half)
    assert out.dtype == jnp.bfloat16 and all(g.dtype == jnp.bfloat16 for g in grads)
    np.testing.assert_allclose(out.astype(np.float32), near.astype(np.float32), atol=0.02)
    for x, y in zip(grads, near_grads, strict=True):
        np.testing.assert_allclose(x.astype(np.float32), y.astype(np.float32), atol=0.1)


def test_what_is_not_seen_changes_nothing(monkeypatch):
    """Keys and values beyond the prefix may hold anything finite, and get no gradient."""
    set_blocks(monkeypatch, 500, 7)
    beyond = (jnp.arange(S) >= LENGTHS[:, None])[..., None, None]
    other = list(SHARED)
    other[1], other[2] = (jnp.where(beyond, 1e4, x) for x in SHARED[1:3])
    one, two = with_gradients(shared_prefix, SHARED), with_gradients(shared_prefix, other)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), one, two)
    for gradient in one[1][1:3]:
        assert not jnp.where(beyond, gradient, 0).any()


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("window", [None, 2, 6])
def test_one_token_at_a_time(scale, window):
    """Decoding: token t of every rollout, own keys beyond it not written yet. One part may outweigh the other."""

    def decode(q, k, v, k_own, v_own, t):
        k, v = (jnp.pad(x[:, :-1], [(0, 0), (1, 0), (0, 0), (0, 0)]) for x in (k, v))
        token = jnp.arange(S) - 1  # of a slot; of slot 0 none
        far = (token <= LENGTHS[:, None] + t - (window or S + T)) & (token >= 0)
        bias = attention.bias((token < LENGTHS[:, None]) & ~far)
        own = k_own.transpose(0, 3, 1, 4, 2), v_own.transpose(0, 3, 1, 2, 4)
        return attention.decode(q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), bias, *own, t, window)

    args = [scale * ROLLOUTS[0][:, :, :1], *SHARED[1:]]
    for t in (0, 3):
        wanted = quick_jit(functools.partial(plain_shared_prefix, window=window or S + T))(*args, jnp.int32(t))
        np.testing.assert_allclose(quick_jit(decode)(*args, jnp.int32(t)), wanted, atol=2e-5)


def test_scores_of_a_block_are_all_there_is(monkeypatch):
    """The programs of a longer prompt need memory for inputs and outputs, not for [S,S]."""
    set_blocks(monkeypatch, 2**14, 64)

    def temporary(size):
        shapes = [jax.ShapeDtypeStruct((1, size, n, E), jnp.float32) for n in (H, J, J)]
        gradient = jax.grad(lambda *args: attention.causal(*args).sum(), (0, 1, 2))
        return quick_jit(gradient).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    one, two = temporary(512), temporary(1024)
    assert two < 2.5 * one and two < 4 * H * 1024 * 1024 / 4
