"""The gated delta rule in chunks against one token after the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit

from fgrpo_jax.models import delta

SIZES = delta.Sizes(keys=2, values=4, key_width=3, value_width=5, tokens=4)
N, X, D = 2, 11, 6


def random(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def one_by_one(q, k, v, g, beta, memory):
    out = []
    for t in range(q.shape[1]):
        memory = jnp.exp(g[:, t])[..., None, None] * memory
        found = jnp.einsum("nhe,nhef->nhf", k[:, t], memory)
        memory += jnp.einsum("nhe,nhf->nhef", k[:, t], beta[:, t, :, None] * (v[:, t] - found))
        out.append(jnp.einsum("nhe,nhef->nhf", q[:, t], memory))
    return jnp.stack(out, 1), memory


ARGS = (
    *(random((N, X, 4, 3), seed) for seed in (0, 1)), random((N, X, 4, 5), 2), -jnp.abs(random((N, X, 4), 3)),
    jax.nn.sigmoid(random((N, X, 4), 4)), random((N, 4, 3, 5), 5),
)  # fmt: skip


def with_gradients(f):
    def both(args):
        found, back = jax.vjp(f, *args)
        return found, back(jax.tree.map(lambda x: random(x.shape, 9), found))

    return quick_jit(both)(ARGS)


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_chunks_change_nothing(chunk, monkeypatch):
    monkeypatch.setattr(delta, "CHUNK", chunk)
    found, wanted = with_gradients(lambda *args: delta.rule(*args)), with_gradients(one_by_one)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), found, wanted)


@pytest.fixture(scope="module")
def layer():
    table = delta.table(SIZES, 1, D)
    return {name: random(p.shape[1:], i) for i, (name, p) in enumerate(table.items())}


@functools.partial(quick_jit, static_argnums=3)
def mixed(layer, x, before, size, live):
    """Of the first `size` tokens, and the state after `live` of them."""
    x = jax.tree.map(lambda y: y[:, :size], delta.project(layer, x))
    return delta.mix(SIZES, 1e-6, layer, x, before, live)


@pytest.mark.parametrize("live", [[0, 2], [3, 7]])
def test_a_state_is_all_that_is_left_of_tokens(layer, live, monkeypatch):
    """Prompts of different lengths, padded with anything; shorter than the convolution too."""
    monkeypatch.setattr(delta, "CHUNK", 4)
    x, none = random((N, X, D), 20), delta.empty(SIZES, (N,), "float32")
    whole, _ = mixed(layer, x, none, X, jnp.full(N, X))
    live = jnp.array(live)
    padded = jnp.where(jnp.arange(X)[:, None] < live[:, None, None], x, 1e3)
    out, state = mixed(layer, padded, none, 8, live)
    _, again = mixed(layer, jnp.where(padded == 1e3, -7.0, padded), none, X, live)
    jax.tree.map(np.testing.assert_array_equal, state.tail, again.tail)
    np.testing.assert_allclose(state.memory, again.memory, atol=1e-6)
    rest = jnp.stack([jnp.roll(x[n], -int(live[n]), 0) for n in range(N)])
    after, _ = mixed(layer, rest, state, X, jnp.full(N, X))
    for n, size in enumerate(live):
        np.testing.assert_allclose(out[n, :size], whole[n, :size], atol=1e-5)
        np.testing.assert_allclose(after[n, : X - size], whole[n, size:], atol=1e-5)
