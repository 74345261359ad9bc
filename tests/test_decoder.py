"""The decoder against one plain forward over [prompt; completion] for every rollout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit

from fgrpo_jax.models import decoder, head, layers
from fgrpo_jax.models.layers import rms_norm
from fgrpo_jax.types import Param

B, G, T = 3, 2, 6


@pytest.fixture(scope="module")
def actions(spec):
    return jnp.asarray(np.random.default_rng(1).integers(0, spec.vocab_size, (B, G, T)), jnp.int32)


# --------------------------------------------------------------------- the plain forward


def plain_norm(x, scale, eps):
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + eps) * scale


def plain_rope(x_THE, theta):
    """Rotate the complex numbers x[i] + 1j x[i + E/2] by position * theta^(-2i/E)."""
    half = x_THE.shape[-1] // 2
    turn = jnp.arange(len(x_THE))[:, None] * theta ** (-jnp.arange(half) / half)
    z = (x_THE[..., :half] + 1j * x_THE[..., half:]) * jnp.exp(1j * turn)[:, None]
    return jnp.concatenate([z.real, z.imag], -1)


def plain_logits(spec, params, tokens_T):
    """Logits [T,V] of one sequence; a Python loop over layers."""
    x = params["embed"][tokens_T]
    seen = jnp.tril(jnp.ones((len(tokens_T), len(tokens_T)), bool))
    for i in range(spec.num_layers):
        w = {name: value[i] for name, value in params["layers"].items()}
        normed = plain_norm(x, w["attn_norm"], spec.norm_eps)
        q, k, v = (jnp.einsum("td,dhe->the", normed, w[name]) for name in "qkv")
        q = plain_rope(plain_norm(q, w["q_norm"], spec.norm_eps), spec.rope_theta)
        k = plain_rope(plain_norm(k, w["k_norm"], spec.norm_eps), spec.rope_theta)
        k, v = (jnp.repeat(y, spec.num_heads // spec.num_kv_heads, 1) for y in (k, v))
        score = jnp.einsum("the,she->hts", q, k) / np.sqrt(spec.head_dim)
        attended = jnp.einsum("hts,she->the", jax.nn.softmax(jnp.where(seen, score, -jnp.inf), -1), v)
        x += jnp.einsum("the,hed->td", attended, w["o"])
        normed = plain_norm(x, w["mlp_norm"], spec.norm_eps)
        x += (jax.nn.silu(normed @ w["gate"]) * (normed @ w["up"])) @ w["down"]
    head = params["embed"] if spec.tie_embeddings else params["head"]
    return plain_norm(x, params["final_norm"], spec.norm_eps) @ head.T


def plain_logprobs(spec, params, query, actions_BGT):
    """The repeated prompt: every rollout is read with its own copy of it."""

    def one(prompt_S, prompt_len, actions_T):
        room = jnp.zeros(len(prompt_S) + len(actions_T), jnp.int32).at[: len(prompt_S)].set(prompt_S)
        tokens = jax.lax.dynamic_update_slice(room, actions_T, (prompt_len,))
        logits = plain_logits(spec, params, tokens)
        rows = logits[prompt_len - 1 + jnp.arange(len(actions_T))]
        return jax.nn.log_softmax(rows)[jnp.arange(len(actions_T)), actions_T]

    over_group = jax.vmap(one, (None, None, 0))
    return jax.vmap(over_group)(query.prompt, query.prompt_len, actions_BGT)


def shared_logprobs(spec, params, query, actions_BGT):
    hidden = decoder.completions(spec, params, query.prompt, query.prompt_len, actions_BGT)
    return head.action_logprobs(spec, params, hidden, actions_BGT)


plain = quick_jit(plain_logprobs, static_argnums=0)
shared = quick_jit(shared_logprobs, static_argnums=0)
init = quick_jit(decoder.init, static_argnums=0)


@functools.partial(quick_jit, static_argnums=(0, 1))
def with_gradient(logprobs, spec, params, query, actions):
    """Log-probabilities, and the gradient of a sum of them with random weights."""
    weight = jax.random.normal(jax.random.key(2), actions.shape)

    def loss(params):
        logp = logprobs(spec, params, query, actions)
        return (weight * logp).sum(), logp

    gradient, logp = jax.grad(loss, has_aux=True)(params)
    return logp, gradient


def assert_trees_close(one, other, rtol=1e-4):
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(one))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale), one, other)


# --------------------------------------------------------------------- one prompt for the group


def test_shared_prompt_equals_repeated_prompt(spec, params, query, actions):
    """Values and gradients; prompts of one token, of five, and of a full bucket."""
    one, one_gradient = with_gradient(shared_logprobs, spec, params, query, actions)
    other, other_gradient = with_gradient(plain_logprobs, spec, params, query, actions)
    np.testing.assert_allclose(one, other, atol=2e-4)
    assert float(one.std()) > 0.5  # the model is not near uniform
    assert_trees_close(one_gradient, other_gradient)


@pytest.mark.parametrize("layers, tied", [(1, True), (2, False)])
def test_one_layer_and_an_untied_head(spec, query, actions, layers, tied):
    spec = spec._replace(num_layers=layers, tie_embeddings=tied)
    params = init(spec, jax.random.key(0))
    assert ("head" in params) is not tied
    np.testing.assert_allclose(shared(spec, params, query, actions), plain(spec, params, query, actions), atol=2e-4)


def test_the_gradient_of_a_norm():
    rng = np.random.default_rng(3)
    x, scale, ahead = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((2, 5, 3, 8), (8,), (2, 5, 3, 8)))

    def gradient(norm):
        return jax.grad(lambda x, scale: (norm(x, scale, 1e-6) * ahead).sum(), (0, 1))(x, scale)

    for found, expected in zip(gradient(rms_norm), gradient(plain_norm), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_rollouts_do_not_see_each_other(spec, params, query, actions):
    changed = actions.at[:, 1].set(0)
    before, after = shared(spec, params, query, actions), shared(spec, params, query, changed)
    np.testing.assert_array_equal(before[:, 0], after[:, 0])


def test_padding_of_the_prompt_changes_nothing(spec, params, query, actions):
    """Another bucket, and other token values in the padding."""
    beyond = jnp.arange(8) >= query.prompt_len[:, None]
    wider = query.replace(prompt=jnp.pad(jnp.where(beyond, 9, query.prompt), ((0, 0), (0, 4)), constant_values=3))
    np.testing.assert_allclose(shared(spec, params, query, actions), shared(spec, params, wider, actions), atol=2e-5)


def test_remat_changes_nothing(spec, params, query, actions):
    remat = spec._replace(remat=True)
    assert_trees_close(
        with_gradient(shared_logprobs, spec, params, query, actions),
        with_gradient(shared_logprobs, remat, params, query, actions),
    )


def test_bfloat16_is_near_float32(spec, params, query, actions):
    """Log-probabilities of several nats agree to 0.1 on average, 0.5 at worst (bf16: 8 bits)."""
    half = spec._replace(dtype="bfloat16")
    gap = jnp.abs(shared(half, params, query, actions) - shared(spec, params, query, actions))
    assert 0 < gap.mean() < 0.1 and gap.max() < 0.5
    assert shared(half, params, query, actions).dtype == jnp.float32


# --------------------------------------------------------------------- decoding


@functools.partial(quick_jit, static_argnums=0)
def decoded_hidden(spec, params, query, actions_BGT):
    """The hidden states of given actions, one `decode_step` after the other."""
    params = decoder.whole(spec, params)
    prompt = decoder.prefill(spec, params, query.prompt, query.prompt_len)
    weights = decoder.unstack(spec, params, B * G)
    last_B = jnp.take_along_axis(query.prompt, query.prompt_len[:, None] - 1, 1)[:, 0]

    def step(carry, t):
        token, cache = carry
        hidden, cache = decoder.decode_step(spec, weights, prompt, cache, token, t)
        return (actions_BGT[..., t], cache), hidden

    first = jnp.broadcast_to(last_B[:, None], actions_BGT.shape[:2]), decoder.empty_cache(spec, *actions_BGT.shape)
    _, hidden_TBGD = jax.lax.scan(step, first, jnp.arange(actions_BGT.shape[-1]))
    return jnp.moveaxis(hidden_TBGD, 0, 2)


@pytest.mark.parametrize("layers", [1, 3])
def test_cached_decode_equals_full_forward(spec, params, query, actions, layers):
    if layers == 1:
        spec = spec._replace(num_layers=1)
        params = init(spec, jax.random.key(0))
    full = quick_jit(decoder.completions, static_argnums=0)(spec, params, query.prompt, query.prompt_len, actions)
    np.testing.assert_allclose(decoded_hidden(spec, params, query, actions), full, atol=5e-5)


def test_decoding_with_weights_laid_out_rows_first(spec, params, query, actions, monkeypatch):
    """As a large model's are on a CPU; here every weight is large."""
    monkeypatch.setattr(layers, "_LARGE", 1)
    leaves = jax.tree.leaves(decoder.unstack(spec, params, B * G), is_leaf=lambda x: isinstance(x, layers.RowsFirst))
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    spec = spec._replace(rows_first=True)
    laid_out = decoder.unstack(spec, params, B * G)
    assert all(isinstance(laid_out["layers"][0][name], layers.RowsFirst) for name in ("q", "v", "o", "up", "down"))
    assert isinstance(laid_out["head_DV"], layers.RowsFirst)
    full = quick_jit(decoder.completions, static_argnums=0)(spec, params, query.prompt, query.prompt_len, actions)
    decoded = decoded_hidden(spec, params, query, actions)
    np.testing.assert_allclose(decoded, full, atol=5e-5)
    logits = [head.logits(weights, full) for weights in (params, laid_out)]
    np.testing.assert_allclose(*logits, atol=5e-5)
    many = decoder.unstack(spec, params, 1000)
    assert isinstance(many["head_DV"], layers.RowsFirst) and isinstance(many["layers"][0]["q"], jax.Array)


@pytest.mark.parametrize("large", [1, 2**20])
def test_logits_of_a_bfloat16_model_are_not_rounded(spec, params, large, monkeypatch):
    monkeypatch.setattr(layers, "_LARGE", large)
    spec = spec._replace(rows_first=True)
    half = decoder.whole(spec._replace(dtype="bfloat16"), params)
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(B, G, spec.hidden_size)), jnp.bfloat16)
    expected = hidden.astype(np.float32) @ head.rows(half).astype(np.float32).T
    for weights in (half, decoder.unstack(spec, half, B * G)):
        logits = head.logits(weights, hidden)
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    "lead, shape_in, shape_out", [((5,), (512,), (2048,)), ((2, 3), (16, 64), (1024,)), ((7,), (1024,), (32, 64))]
)
def test_a_product_with_rows_first_is_the_same_product(lead, shape_in, shape_out):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (lead + shape_in, shape_in + shape_out))
    laid_out = layers.rows_first(w, len(shape_in))
    assert isinstance(laid_out, layers.RowsFirst)
    expected = np.tensordot(x, w, len(shape_in))
    np.testing.assert_allclose(layers.linear(x, laid_out, len(shape_in)), expected, atol=1e-3)
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    half = layers.linear(x, layers.rows_first(w, len(shape_in)), len(shape_in))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), expected, atol=2.0)  # of 30: 8 bits


def test_small_or_odd_weights_stay_as_they_are():
    for shape in ((64, 64), (2**11, 513)):
        w = jnp.zeros(shape)
        assert layers.rows_first(w) is w


def test_bfloat16_decoding_is_near_the_full_forward(spec, params, query, actions):
    """Both round, in different places: hidden states of size 1 to 0.05 (8 bits of mantissa, 3 layers)."""
    spec = spec._replace(dtype="bfloat16")
    half = decoder.whole_ends(spec, params)
    full = quick_jit(decoder.completions, static_argnums=0)(spec, half, query.prompt, query.prompt_len, actions)
    decoded = decoded_hidden(spec, params, query, actions)
    assert full.dtype == decoded.dtype == jnp.bfloat16
    np.testing.assert_allclose(decoded.astype(np.float32), full.astype(np.float32), atol=0.05)


# --------------------------------------------------------------------- the head


@pytest.mark.parametrize("chunk", [1, 8, 4096])
def test_chunked_logprobs_equal_full_logits(spec, params, actions, chunk):
    """Chunks of one token, of a part of T that does not divide it, and of everything."""
    spec = spec._replace(logit_chunk=chunk * B * G // 2 if chunk == 8 else chunk)
    hidden = jnp.asarray(np.random.default_rng(3).normal(size=(B, G, T, spec.hidden_size)), jnp.float32)

    def full(hidden):
        logp = jax.nn.log_softmax(head.logits(params, hidden))
        return jnp.take_along_axis(logp, actions[..., None], -1)[..., 0]

    def chunked(hidden):
        return head.action_logprobs(spec, params, hidden, actions)

    for one, other in zip(*(jax.vjp(f, hidden) for f in (full, chunked)), strict=True):
        if callable(one):
            one, other = one(jnp.ones((B, G, T))), other(jnp.ones((B, G, T)))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, other)


@pytest.mark.parametrize("shape", [(B, G), (B, G, T)])
def test_choice_logits_are_columns_of_the_full_logits(spec, params, shape):
    rng = np.random.default_rng(4)
    hidden = jnp.asarray(rng.normal(size=(*shape, spec.hidden_size)), jnp.float32)
    tokens_BM = rng.integers(0, spec.vocab_size, (B, 7))
    full = np.asarray(head.logits(params, hidden))
    some = head.choice_logits(head.choice_rows(params, jnp.asarray(tokens_BM)), hidden)
    for b in range(B):
        np.testing.assert_allclose(some[b], full[b][..., tokens_BM[b]], atol=1e-5)


# --------------------------------------------------------------------- the table of parameters


@pytest.mark.parametrize("tied", [True, False])
def test_the_table_describes_the_parameters(spec, tied):
    spec = spec._replace(tie_embeddings=tied, param_dtype="bfloat16")
    made, shapes, table = init(spec, jax.random.key(0)), decoder.shapes(spec), decoder.param_table(spec)
    for x, like in zip(jax.tree.leaves(made), jax.tree.leaves(shapes), strict=True):
        assert (x.shape, x.dtype) == (like.shape, like.dtype)
    params = jax.tree.leaves(table, is_leaf=lambda x: isinstance(x, Param))
    assert [len(p.axes) for p in params] == [x.ndim for x in jax.tree.leaves(made)]
    assert decoder.num_params(spec) == sum(x.size for x in jax.tree.leaves(made))


def test_weights_of_different_parameters_differ(spec):
    made = init(spec, jax.random.key(0))
    assert not np.allclose(made["layers"]["k"], made["layers"]["v"])
    assert abs(float(made["embed"].std()) / spec.init_std - 1) < 0.1
