"""The head: from hidden states to logits and log-probabilities.

The full [tokens, V] array of a batch never exists: constrained policies read the rows of the
choices alone, the others go through the vocabulary a chunk of tokens at a time.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fgrpo_jax.models.layers import linear, take
from fgrpo_jax.types import Array, PyTree


def rows(params: PyTree) -> Array:
    """[V,D]: the output embedding, tied or not."""
    return params["head"] if "head" in params else params["embed"]


def logits(params: PyTree, hidden: Array) -> Array:
    """Full-vocabulary logits [..., V] in float32; `params` may come from `unstack`."""
    rows_DV = params["head_DV"] if "head_DV" in params else rows(params).T
    return linear(hidden, rows_DV, dtype=jnp.float32)


def choice_rows(params: PyTree, tokens_BU: Array) -> Array:
    """The head's rows [B,U,D] of the choices; read once, where the vocabulary may lie on several devices."""
    return take(rows(params), jnp.maximum(tokens_BU, 0))


def choice_logits(rows_BUD: Array, hidden_BGXD: Array) -> Array:
    """Logits [B,G,...,U] of the choices alone, in float32."""
    return jnp.einsum("bg...d,bud->bg...u", hidden_BGXD, rows_BUD, preferred_element_type=jnp.float32)


def action_logprobs(spec: Any, params: PyTree, hidden_BGTD: Array, actions_BGT: Array) -> Array:
    """Full-vocabulary log-probabilities of actions [B,G,T], `logit_chunk` tokens at a time.

    The logits of a chunk are recomputed in the backward pass, so no [tokens, V] array of the
    whole batch ever exists.
    """
    rows_VD = rows(params).astype(spec.dtype)
    batch, group, length, width = hidden_BGTD.shape
    per_chunk = min(length, max(1, spec.logit_chunk // (batch * group)))
    n_chunks = -(-length // per_chunk)
    padding = n_chunks * per_chunk - length

    def chunked(x: Array) -> Array:  # [B,G,T,...] -> [n,B,G,t,...]
        x = jnp.pad(x, [(0, 0), (0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 3))
        return jnp.moveaxis(x.reshape(batch, group, n_chunks, per_chunk, *x.shape[3:]), 2, 0)

    @jax.checkpoint
    def one(_: Any, chunk: tuple[Array, Array]):
        hidden, action = chunk
        logit = jnp.einsum("bgtd,vd->bgtv", hidden, rows_VD, preferred_element_type=jnp.float32)
        chosen = jnp.take_along_axis(logit, action[..., None], -1)[..., 0]
        return None, chosen - jax.nn.logsumexp(logit, -1)

    _, logp = jax.lax.scan(one, None, (chunked(hidden_BGTD), chunked(actions_BGT)))
    return jnp.moveaxis(logp, 0, 2).reshape(batch, group, -1)[..., :length]
