"""Attention over a prompt that a group of rollouts shares.

Three functions are all a model needs: `causal` within the prompt; `shared_prefix`, where
every rollout attends to the one copy of its query's prompt and causally to itself; and
`decode`, the same for one new token. All are grouped-query: J key/value heads, each serving
R = H/J query heads. Softmax runs in float32. With a `window`, a number that may be traced, a token sees
no more than the last so many, itself included.

The first two are the same computation: rows of queries attend to one or two *parts*, each a
stretch of keys of which a row sees the first few (or, in a window, some in the middle). It is done in
blocks of rows, so that the scores of one block exist at a time, and differentiated by hand: the backward
pass makes the scores again from the log-sum-exp of each row, the only thing kept besides inputs and output
(FlashAttention-2, arXiv 2307.08691, at the grain of whole matrix products). Every part's
backward pass needs only the row's output and log-sum-exp over *all* parts, so parts never
have to be joined. On GPU and TPU the part that a group shares, where nearly all scores are, is
done by the kernels of flash.py instead; blocks are in attention_blocks.py.

Layout. Rows of a kv head are its query heads and positions together, [B,J,(position,R),E],
so every score is part of one matrix product per query and kv head. The backward pass works
on transposed scores [keys, rows]: two of its three sums then run over the last axis of the
scores, as CPU matrix products want (the others are 5 times slower there).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fgrpo_jax.models import flash
from fgrpo_jax.models.attention_blocks import WIDE, bias, in_sight, part_backward, part_forward, product
from fgrpo_jax.models.packing import Packing, pick
from fgrpo_jax.types import Array

KEPT = "attention"  # checkpoint name of what the backward pass should find


def causal(q_BSHE: Array, k_BSJE: Array, v_BSJE: Array, kind: str = "auto", window: Array | int | None = None) -> Array:
    """Causal self-attention of right-padded prompts: [B,S,H,E]. `kind`: see `_implementation`.

    No length mask is needed: padding comes last, so only padded queries see padded keys.
    """
    q = _rows(q_BSHE[:, None], k_BSJE.shape[2])
    last = jnp.repeat(jnp.arange(q_BSHE.shape[1]), q_BSHE.shape[2] // k_BSJE.shape[2])
    first = None if window is None else (last - window + 1)[None, None]
    out = _attend(True, kind, q, ((_heads_first(k_BSJE), _heads_first(v_BSJE), last[None, None], first),))
    return _unrows(out, q_BSHE[:, None].shape)[:, 0]


def shared_prefix(
    q_BGTHE: Array,
    k_BSJE: Array,
    v_BSJE: Array,
    prefix_len_B: Array,
    k_BGUJE: Array,
    v_BGUJE: Array,
    kind: str = "auto",
    window: Array | int | None = None,
) -> Array:
    """Attention of rollouts to the shared prefix and causally to their own keys: [B,G,T,H,E].

    Query t of a rollout, at position prefix_len + t, sees prefix keys s < prefix_len and own keys u <= t.
    The prefix is read in place: its scores are one matrix product per query and kv head, over the tokens
    of the whole group.
    """
    batch, group, length, heads, _ = q_BGTHE.shape
    kv_heads = k_BSJE.shape[2]
    q = _rows(q_BGTHE, kv_heads)
    prefix = _heads_first(k_BSJE), _heads_first(v_BSJE), prefix_len_B[:, None, None] - 1
    last = jnp.repeat(jnp.arange(length), heads // kv_heads)
    own = _heads_first(k_BGUJE), _heads_first(v_BGUJE), last[None, None, None]
    first = first_own = None
    if window is not None:
        first_own = (last - window + 1)[None, None, None]
        first = prefix_len_B[:, None, None] + jnp.tile(last - window + 1, group)
    return _unrows(_attend(False, kind, q, ((*prefix, first), (*own, first_own))), q_BGTHE.shape)


def decode(
    q_BG1HE: Array, k_BJES: Array, v_BJSE: Array, bias_BS: Array, k_BJGEU: Array, v_BJGUE: Array, t: Array,
    window: int | None = None,
) -> Array:  # fmt: skip
    """Attention of every rollout's token t to the prompt's cache and own keys u <= t: [B,G,1,H,E].

    What `shared_prefix` gives, by one softmax instead of two. A rollout's own keys enter the
    prompt's softmax as one key more, in slot 0 (whose key and value are zero): its score is
    their log-sum-exp, its value their attention. Joining two softmaxes would need each row's
    maximum as a result; as it is only used inside, XLA CPU makes product, bias, maximum and
    exponential in one pass. The window of the prompt's keys is in `bias_BS`.
    """
    q = _rows(q_BG1HE, k_BJES.shape[1])  # [B,J,G,R,E]
    own, lse = (_rows_like(x, k_BJES) for x in _own(q, k_BJGEU, v_BJGUE, t, window))
    out = _with_prompt(_rows_like(q, k_BJES), k_BJES, v_BJSE, bias_BS, own, lse)
    return _unrows(out.astype(q.dtype).reshape(q.shape), q_BG1HE.shape)


def decode_packed(
    q_BNHE: Array, k_BJES: Array, v_BJSE: Array, bias_BS: Array, k_BJGEU: Array, v_BJGUE: Array, packing: Packing,
    window: int | None = None,
) -> Array:  # fmt: skip
    """`decode` for several tokens of a rollout: [B,N,H,E]. The own keys of all of them are in place."""
    batch, size, heads, head = q_BNHE.shape
    kv_heads, group, width = k_BJES.shape[1], *packing.column.shape[1:]
    number_BGW = packing.first[..., None] + jnp.arange(width)
    last = jnp.repeat(number_BGW, heads // kv_heads, -1)[:, None, :, :, None]  # [B,1,G,(W,R),1]
    own, lse = _own(_rows(pick(q_BNHE, packing.column), kv_heads), k_BJGEU, v_BJGUE, last, window)
    both = jnp.concatenate([own, lse], -1).reshape(batch, kv_heads, group * width, -1, head + 1)
    both = jnp.moveaxis(pick(jnp.moveaxis(both, 2, 1), packing.place), 1, 2).reshape(batch, kv_heads, -1, head + 1)
    q = _rows(q_BNHE[:, None], kv_heads)
    out = _with_prompt(_rows_like(q, k_BJES), k_BJES, v_BJSE, bias_BS, both[..., :head], both[..., head:])
    return _unrows(out.astype(q.dtype).reshape(q.shape), (batch, 1, size, heads, head))[:, 0]


def _own(q: Array, k_BJGEU: Array, v_BJGUE: Array, last: Array, window: int | None) -> tuple[Array, Array]:
    """Attention of rows [B,J,G,M,E] to own keys u <= last, and its log-sum-exp [B,J,G,M,1]."""
    first = None if window is None else last - window + 1
    score = product("...re,...eu->...ru", q, k_BJGEU) + bias(in_sight(jnp.arange(k_BJGEU.shape[-1]), last, first))
    peak = score.max(-1, keepdims=True)
    weight = jnp.exp(score - peak)
    total = weight.sum(-1, keepdims=True)
    own = product("...ru,...ue->...re", weight.astype(v_BJGUE.dtype), v_BJGUE) / total
    return own, peak + jnp.log(total)


def _with_prompt(q: Array, k_BJES: Array, v_BJSE: Array, bias_BS: Array, own: Array, lse: Array) -> Array:
    """Attention of rows [B,J,M,E] to the prompt, and to their own keys by what `_own` found for them.

    bias_BS: of all tokens, or [B,X,S] of each.
    """
    if bias_BS.ndim == 2:
        bias_BS = bias_BS[:, None]
    else:
        bias_BS = jnp.repeat(bias_BS, q.shape[2] // bias_BS.shape[1], 1)
    score = product("...me,...es->...ms", q, k_BJES)
    score += bias_BS[:, None] + (jnp.arange(k_BJES.shape[3]) == 0) * lse
    weight = jnp.exp(score - score.max(-1, keepdims=True))
    out = product("...ms,...se->...me", weight.astype(v_BJSE.dtype), v_BJSE) + weight[..., :1] * own
    return out / weight.sum(-1, keepdims=True)


# --------------------------------------------------------------------- layout


def _rows(q_BGTHE: Array, kv_heads: int) -> Array:
    """[B,J,G,(T,R),E], scaled by E^-1/2."""
    batch, group, length, heads, head = q_BGTHE.shape
    q = (q_BGTHE * head**-0.5).reshape(batch, group, length, kv_heads, -1, head)
    return jnp.moveaxis(q, 3, 1).reshape(batch, kv_heads, group, -1, head)


def _unrows(out: Array, shape: tuple[int, ...]) -> Array:
    batch, group, length, heads, head = shape
    out = out.reshape(batch, out.shape[1], group, length, -1, head)
    return jnp.moveaxis(out, 1, 3).reshape(shape)


def _heads_first(x: Array) -> Array:
    """[B,S,J,E] -> [B,J,S,E]; [B,G,U,J,E] -> [B,J,G,U,E]."""
    return jnp.moveaxis(x, -2, 1)


# --------------------------------------------------------------------- rows over parts


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(is_causal: bool, kind: str, q: Array, parts: tuple) -> Array:
    """Softmax attention of rows q [B,J,G,M,E] to the keys of all parts together.

    A part is (k, v, last, first): keys and values [B,J,S,E] shared by the group or [B,J,G,U,E] of a
    rollout, and the indices of the last key a row sees (before 0: none) and of the first (None: 0), both
    [B,J,M] or [B,J,G,M] with any axis 1.
    `is_causal` promises that `last` of row m is m // (rows per key).
    """
    return _attend_forward(is_causal, kind, q, parts)[0]


def _attend_forward(is_causal: bool, kind: str, q: Array, parts: tuple):
    some = []
    for k, v, last, first in parts:
        forward = _implementation(kind, is_causal, k, part_forward, flash.part_forward)
        out, lse = forward(_rows_like(q, k), k, v, last, first)
        some.append((out.reshape(q.shape), lse.reshape(q.shape[:-1])))
    out, lse = some[0]
    for other, other_lse in some[1:]:
        both = jnp.logaddexp(lse, other_lse)
        out = out * jnp.exp(lse - both)[..., None] + other * jnp.exp(other_lse - both)[..., None]
        lse = both
    out, lse = checkpoint_name(out.astype(q.dtype), KEPT), checkpoint_name(lse, KEPT)
    return out, (q, parts, out, lse)


def _attend_backward(is_causal: bool, kind: str, kept, d_out: Array):
    q, parts, out, lse = kept
    delta = jnp.einsum("...me,...me->...m", d_out, out, preferred_element_type=WIDE)
    d_q, d_parts = jnp.zeros(q.shape, WIDE), []
    for k, v, last, first in parts:
        rows = [_rows_like(x, k) for x in (q, d_out)]
        scalars = [x.reshape(rows[0].shape[:-1]) for x in (lse, delta)]
        backward = _implementation(kind, is_causal, k, part_backward, flash.part_backward)
        d_q_part, d_k, d_v = backward(*rows, *scalars, k, v, last, first)
        d_q += d_q_part.reshape(q.shape)
        d_parts.append((d_k.astype(k.dtype), d_v.astype(v.dtype), None, None))
    return d_q.astype(q.dtype), tuple(d_parts)


_attend.defvjp(_attend_forward, _attend_backward)


def _implementation(kind: str, is_causal: bool, k: Array, blocks, kernels):
    """What computes a part with keys k: `blocks`, or the Pallas `kernels`.

    kind: "blocks"; "flash", which a CPU interprets, for tests; or "auto": flash on GPU and TPU.
    A rollout's own keys are few and stay with blocks. It is decided where the program is lowered,
    so programs can be compiled for devices that are not there.
    """
    blocks = functools.partial(blocks, is_causal)
    if kind == "blocks" or k.ndim > 4:
        return blocks
    gpu, tpu, interpreted = (functools.partial(kernels, to) for to in (flash.GPU, flash.TPU, flash.INTERPRET))
    others = {"auto": {"default": blocks}, "flash": {"cpu": interpreted}}[kind]
    return functools.partial(jax.lax.platform_dependent, cuda=gpu, tpu=tpu, **others)


def _rows_like(q: Array, k: Array) -> Array:
    """Rows with the leading axes of the part's keys: the group's rows together, or apart."""
    return q.reshape(*k.shape[:-2], -1, q.shape[-1])
