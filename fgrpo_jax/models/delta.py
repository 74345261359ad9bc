"""The gated delta rule: a recurrent mixer whose state has the same size after any number of tokens.

    memory_t = a_t memory_{t-1} + beta_t k_t (v_t - a_t memory_{t-1}' k_t)'        out_t = memory_t' q_t

(arXiv 2412.06464, eq. 10; keys [E], values [F], memory [E,F] per head, a_t = exp(g_t) a decay). It runs in
chunks, as the paper's section 3.3: within a chunk all tokens at once, by a triangular system, from the memory
before it. Around it, as Qwen3.5 has it: a short causal convolution of queries, keys and values with silu,
queries and keys of length one, and a norm of the result gated by silu. All in float32 but the projections.

A state is that of some tokens, which need not be all that are given: `live` says how many, and those beyond
touch nothing, so right padding may hold anything.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from fgrpo_jax.models.layers import linear, rms_norm
from fgrpo_jax.shards import over_tensor, tensor_parts
from fgrpo_jax.types import Array, Param, PyTree

KEPT = "projection of the delta rule"  # checkpoint name of what the backward pass should find

CHUNK = 64
_WIDE, _EXACT = jnp.float32, jax.lax.Precision.HIGHEST


class Sizes(NamedTuple):
    """Heads of keys, each serving values // keys heads of values; widths of both; tokens of the convolution."""

    keys: int
    values: int
    key_width: int
    value_width: int
    tokens: int = 4

    @property
    def channels(self) -> int:
        """Of queries, keys and values together."""
        return 2 * self.keys * self.key_width + self.values * self.value_width


@flax.struct.dataclass
class State:
    """What is left of the tokens so far; leading axes [B] or [B,G]."""

    tail: Array  # [...,tokens-1,C] the last inputs of the convolution
    memory: Array  # [...,H,E,F] float32


def table(sizes: Sizes, layers: int, width: int) -> dict[str, Param]:
    """The parameters of `layers` layers, by the names that `mix` reads."""
    heads, values, stack = ("heads", sizes.values), ("head_dim", sizes.value_width), ("layers", layers)
    to_model = ("embed", width)

    def param(init: str, *dims: tuple[str, int]) -> Param:
        axes, shape = zip(stack, *dims, strict=True)
        return Param(shape, axes, init, decay=init == "normal")

    return {
        "qkv": param("normal", to_model, ("channels", sizes.channels)),
        "z": param("normal", to_model, heads, values),
        "b": param("normal", to_model, heads),
        "a": param("normal", to_model, heads),
        "conv": param("normal", ("channels", sizes.channels), ("position", sizes.tokens)),
        "dt_bias": param("ones", heads),
        "a_log": param("log_uniform", heads),
        "out_norm": param("ones", ("norm", sizes.value_width)),
        "o": param("normal", heads, values, to_model),
    }


def empty(sizes: Sizes, lead: tuple[int, ...], dtype: Any) -> State:
    tail = jnp.zeros((*lead, sizes.tokens - 1, sizes.channels), dtype)
    return State(tail, jnp.zeros((*lead, sizes.values, sizes.key_width, sizes.value_width), _WIDE))


class Projected(NamedTuple):
    """What tokens [...] are to the rule: [...,C], [...,H,F], [...,H], [...,H]."""

    qkv: Array
    z: Array
    b: Array
    a: Array


def project(layer: PyTree, normed: Array) -> Projected:
    return Projected(*(checkpoint_name(linear(normed, layer[name]), KEPT) for name in ("qkv", "z", "b", "a")))


def mix(sizes: Sizes, eps: float, layer: PyTree, x: Projected, before: State, live: Array) -> tuple[Array, State]:
    """[N,X,H,F] for tokens [N,X] after the state `before`, and the state after the first live [N] of them.

    What comes out of the others means nothing, and reaches no one.
    """
    mixed, tail = _convolve(layer["conv"], x.qkv, before.tail, live)
    is_live = (jnp.arange(mixed.shape[1]) < live[:, None])[..., None]
    beta = jnp.where(is_live, jax.nn.sigmoid(x.b.astype(_WIDE)), 0.0)
    decay = -jnp.exp(layer["a_log"].astype(_WIDE)) * jax.nn.softplus(x.a.astype(_WIDE) + layer["dt_bias"].astype(_WIDE))
    out, memory = _by_heads(sizes, mixed, jnp.where(is_live, decay, 0.0), beta, before.memory)
    out = rms_norm(out, layer["out_norm"], eps) * jax.nn.silu(x.z.astype(_WIDE))
    return out.astype(x.z.dtype), State(tail, memory)


def _by_heads(sizes: Sizes, mixed: Array, g: Array, beta: Array, memory: Array) -> tuple[Array, Array]:
    """`rule` of all heads, or on each device of the tensor axis of its own, where channels are whole.

    Written out, since XLA would cut the channels anew to get at heads: by collectives in every decoding step, for which
    shards that have ended would be waited for.
    """

    def some(count: int, first: Array | int, mixed: Array, *rest: Array) -> tuple[Array, Array]:
        at = sizes.keys * sizes.key_width
        q, k, v = jnp.split(mixed, (at, 2 * at), -1)
        q, k = (_unit(y.reshape(*y.shape[:2], sizes.keys, -1)) for y in (q, k))
        q, k = (jnp.repeat(y, sizes.values // sizes.keys, 2) for y in (q * sizes.key_width**-0.5, k))
        v = v.reshape(*v.shape[:2], sizes.values, -1)
        return rule(*(jax.lax.dynamic_slice_in_dim(y, first, count, 2) for y in (q, k, v)), *rest)

    if (parts := tensor_parts(sizes.values)) == 1:
        return some(sizes.values, 0, mixed, g, beta, memory)

    def own(*arrays: Array) -> tuple[Array, Array]:
        count = sizes.values // parts
        return some(count, count * jax.lax.axis_index("tensor"), *arrays)

    of_tokens, of_memory = PartitionSpec(None, None, "tensor"), PartitionSpec(None, "tensor")
    places = PartitionSpec(), of_tokens, of_tokens, of_memory
    return over_tensor(own, places, (of_tokens, of_memory))(mixed, g, beta, memory)


def _convolve(weight_CT: Array, x_NXC: Array, tail: Array, live: Array) -> tuple[Array, Array]:
    """The causal convolution of every channel with its silu, and the last inputs up to the first live ones."""
    joined = jnp.concatenate([tail, x_NXC], 1)
    size, weight = x_NXC.shape[1], weight_CT.astype(_WIDE)
    total = sum(weight[:, i] * joined[:, i : i + size].astype(_WIDE) for i in range(weight.shape[1]))
    rows = live[:, None] + jnp.arange(tail.shape[1])
    return jax.nn.silu(total), jnp.take_along_axis(joined, rows[..., None], 1)


def _unit(x: Array) -> Array:
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def rule(q: Array, k: Array, v: Array, g: Array, beta: Array, memory: Array) -> tuple[Array, Array]:
    """The recurrence over tokens X: q, k [N,X,H,E], v [N,X,H,F], g and beta [N,X,H], memory [N,H,E,F].

    Gives [N,X,H,F] and the memory after all of them. A token with g = beta = 0 leaves it as it is.
    """
    batch, length, heads, _ = q.shape
    chunk = min(CHUNK, length)

    def cut(x: Array) -> Array:
        """[chunks,N,H,c,...]"""
        x = jnp.pad(x, [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), (1, 3), (0, 2))

    memory, out = jax.lax.scan(_chunk, memory, tuple(cut(x) for x in (q, k, v, g, beta)))
    out = jnp.moveaxis(out, (0, 2), (1, 3)).reshape(batch, -1, heads, v.shape[-1])
    return out[:, :length], memory


def _chunk(memory: Array, x: tuple[Array, ...]) -> tuple[Array, Array]:
    """One chunk: q, k [N,H,c,E], v [N,H,c,F], g, beta [N,H,c]. What tokens write depends on what earlier ones wrote:
    (I + A) written = beta v - beta exp(g) k memory, with A strictly lower triangular."""
    q, k, v, g, beta = x
    g = jnp.cumsum(g, -1)
    lower = jnp.tril(jnp.ones((g.shape[-1],) * 2, bool))
    decay = jnp.exp(jnp.where(lower, g[..., :, None] - g[..., None, :], 0.0)) * lower
    grown = jnp.exp(g)[..., None]
    to_write = beta[..., None] * (v - _product("nhce,nhef->nhcf", grown * k, memory))
    system = jnp.tril(beta[..., None] * _product("nhce,nhde->nhcd", k, k) * decay, -1)
    written = jax.lax.linalg.triangular_solve(
        system + jnp.eye(g.shape[-1]), to_write, left_side=True, lower=True, unit_diagonal=True
    )
    out = _product("nhce,nhef->nhcf", grown * q, memory)
    out += _product("nhcd,nhdf->nhcf", _product("nhce,nhde->nhcd", q, k) * decay, written)
    end = g[..., -1:]
    memory = jnp.exp(end)[..., None] * memory
    return memory + _product("nhce,nhcf->nhef", jnp.exp(end - g)[..., None] * k, written), out


def _product(spec: str, one: Array, other: Array) -> Array:
    return jnp.einsum(spec, one, other, precision=_EXACT)
