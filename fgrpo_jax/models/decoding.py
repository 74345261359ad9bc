"""Decoding: a prompt's cache, and steps of one or several tokens of every rollout against it and their own."""

from __future__ import annotations

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from fgrpo_jax.models import attention, blocks, delta, head
from fgrpo_jax.models.layers import Adapted, RowsFirst, rows_first
from fgrpo_jax.models.packing import Packing, pick
from fgrpo_jax.models.parameters import DELTA, FULL, LOCAL, DecoderSpec, layer_kinds
from fgrpo_jax.types import Array, PyTree


@flax.struct.dataclass
class PromptCache:
    """Keys and values of the prompt, one pair per layer, shared by the group; states of recurrent layers.

    They lie as the matrix products of a decoding step read them, or every step would lay
    them out again. Slot 0 is zero and stands for a rollout's own keys (attention.decode),
    slot s holds token s - 1; the prompt's last token has none, rollouts feed it themselves.
    """

    k: tuple[Array | None, ...]  # L x [B,J,E,S], J kv heads; None: a recurrent layer
    v: tuple[Array | None, ...]  # L x [B,J,S,E]
    bias_BS: Array  # what to add to scores: 0 in the slots seen
    prompt_len: Array  # [B]
    states: tuple[delta.State | None, ...]  # L x [B,...], before the prompt's last token; None: a layer that attends


def prefill(spec: DecoderSpec, params: PyTree, prompt_BS: Array, prompt_len_B: Array) -> PromptCache:
    """Encode every prompt once. `params` comes from `whole`."""
    positions = jnp.broadcast_to(jnp.arange(prompt_BS.shape[1]), prompt_BS.shape)
    ropes = blocks.ropes(spec, positions)
    layers = blocks.split(spec, params["layers"])

    def attend(kind: str, is_last: bool, layer: PyTree, normed: Array, is_local: Array | None):
        rope, window = blocks.of_layer(spec, ropes, kind, is_local)
        k, v = blocks.keys_values(spec, layer, normed, rope)
        if is_last:
            return None, as_cached(k, v)
        q, gate = blocks.queries(spec, layer, normed, rope)
        return blocks.gated(attention.causal(q, k, v, spec.attention, window), gate), as_cached(k, v)

    def as_cached(k: Array, v: Array) -> tuple[Array, Array]:
        k, v = (jnp.pad(x[:, :-1], [(0, 0), (1, 0), (0, 0), (0, 0)]) for x in (k, v))
        return jnp.moveaxis(k, 1, 3), jnp.moveaxis(v, 1, 2)

    def recur(kind: str, is_last: bool, layer: PyTree, normed: Array, is_local: None):
        sizes = delta.Sizes(*spec.delta)
        none = delta.empty(sizes, prompt_len_B.shape, spec.dtype)
        return delta.mix(sizes, spec.norm_eps, layer, delta.project(layer, normed), none, prompt_len_B - 1)

    def block(kind: str, is_last: bool, x_BSD: Array, layer: PyTree, is_local: Array | None = None):
        normed = blocks.norm(spec, x_BSD, layer["attn_norm"])
        mixed, kept = (recur if kind == DELTA else attend)(kind, is_last, layer, normed, is_local)
        return None if is_last else blocks.finish_block(spec, layer, x_BSD, mixed), kept

    def several(x_BSD: Array, some: tuple[tuple[PyTree, ...], Array | None]):
        kept = []
        for kind, layer in zip(layers.kinds, some[0], strict=True):
            x_BSD, of_layer = block(kind, False, x_BSD, layer, some[1])
            kept.append(of_layer)
        return x_BSD, kept

    x_BSD, kept = blocks.embed(spec, params, prompt_BS), []
    if layers.kinds:
        x_BSD, stacked = jax.lax.scan(several, x_BSD, layers.scanned)
        leaves, tree = jax.tree.flatten(stacked)
        kept = [one for each in zip(*leaves, strict=True) for one in jax.tree.unflatten(tree, each)]
    for i, (kind, layer) in enumerate(layers.rest):
        x_BSD, of_layer = block(kind, i == len(layers.rest) - 1, x_BSD, layer)
        kept.append(of_layer)
    bias_BS = attention.bias(positions < prompt_len_B[:, None])
    kinds = layer_kinds(spec)
    k, v = ([None if kind == DELTA else x[n] for kind, x in zip(kinds, kept, strict=True)] for n in (0, 1))
    states = tuple(x if kind == DELTA else None for kind, x in zip(kinds, kept, strict=True))
    return PromptCache(tuple(k), tuple(v), bias_BS, prompt_len_B, states)


_FEW = 64  # tokens; a layer's products gain little with more, and lose from 256 on; the head's gain with any


def unstack(spec: DecoderSpec, params: PyTree, tokens: int) -> PyTree:
    """Weights as decoding `tokens` rollouts at a time reads them: a list of layers, so that no step copies a slice."""

    def laid_out(name: str, w: Array | Adapted) -> Array | RowsFirst | Adapted:
        if isinstance(w, Adapted):
            return w.replace(base=laid_out(name, w.base))
        if not spec.rows_first or name.endswith(("norm", "bias", "conv", "log")) or tokens > _FEW:
            return w
        return rows_first(w, axes_in=2 if name == "o" else 1)

    of_layer = [blocks.weights_of(spec, params["layers"], i) for i in range(spec.num_layers)]
    layers = [{name: laid_out(name, w) for name, w in layer.items()} for layer in of_layer]
    head_DV = head.rows(params).T
    return {**params, "layers": layers, "head_DV": rows_first(head_DV) if spec.rows_first else head_DV}


def empty_cache(spec: DecoderSpec, batch: int, group: int, length: int) -> list[tuple[Array, Array] | delta.State]:
    """Per layer, room for the rollouts' own keys [B,J,G,E,T] and values [B,J,G,T,E]; or for their states, which
    begin as the prompt's with their first token."""
    lead = batch, spec.num_kv_heads, group
    k = jnp.zeros((*lead, spec.head_dim, length), spec.dtype)
    v = jnp.zeros((*lead, length, spec.head_dim), spec.dtype)
    kinds = layer_kinds(spec)
    state = delta.empty(delta.Sizes(*spec.delta), (batch, group), spec.dtype) if DELTA in kinds else None
    return [state if kind == DELTA else (k, v) for kind in kinds]


def decode_step(
    spec: DecoderSpec, params: PyTree, prompt: PromptCache, cache: list, token_BG: Array, t: Array
) -> tuple[Array, list]:
    """Feed token number `t` of every rollout: final hidden state [B,G,D] and the new cache.

    `params` comes from `unstack`. The prompt's cache is read in place, never tiled to G.
    """
    position_BG = jnp.broadcast_to((prompt.prompt_len - 1 + t)[:, None], token_BG.shape)
    bias_BS = {FULL: prompt.bias_BS, LOCAL: prompt.bias_BS + _beyond(spec, prompt, position_BG[:, 0])}

    def attend(i: int, q: Array, k: Array, v: Array, k_own: Array, v_own: Array, window: int | None):
        q, k, v = (x[:, :, None] for x in (q, k, v))  # [B,G,1,H,E] and [B,G,1,J,E]
        k_own = jax.lax.dynamic_update_slice_in_dim(k_own, k.transpose(0, 3, 1, 4, 2), t, axis=4)
        v_own = jax.lax.dynamic_update_slice_in_dim(v_own, v.transpose(0, 3, 1, 2, 4), t, axis=3)
        seen = prompt.k[i], prompt.v[i], bias_BS[layer_kinds(spec)[i]], k_own, v_own
        return attention.decode(q, *seen, t, window)[:, :, 0], k_own, v_own

    def recur(i: int, layer: PyTree, x: delta.Projected, own: delta.State) -> tuple[Array, delta.State]:
        x = jax.tree.map(lambda y: y[:, None], x)
        out, own = _continue(
            spec, layer, x, prompt.states[i], own, jnp.full(token_BG.shape, t), jnp.ones_like(token_BG)
        )
        return out[:, 0], own

    return _decode(spec, params, cache, token_BG, position_BG, attend, recur)


def decode_packed(
    spec: DecoderSpec, params: PyTree, prompt: PromptCache, cache: list, token_BN: Array, packing: Packing
) -> tuple[Array, list]:
    """Feed several tokens of every rollout: the hidden state [B,G,D] of its last one here, and the new cache.

    Rollouts stand at different tokens; a key is written where the token's number says. (By a choice for every slot
    of the cache: attention reads all of it anyway, and a scatter is a loop over the rollouts on CPU and TPU.)
    """
    position_BN = prompt.prompt_len[:, None] - 1 + packing.number
    slots = next((own[0].shape[-1] for own in cache if not isinstance(own, delta.State)), 0)
    within_BGU = (jnp.arange(slots) - packing.first[..., None])[:, None]
    bias = {FULL: prompt.bias_BS, LOCAL: prompt.bias_BS[:, None] + _beyond(spec, prompt, position_BN)}

    def write(own: Array, x: Array, slots: int) -> Array:
        """x [B,N,J,E] into a cache whose axis `slots`, one of the two last, is that of tokens."""
        x_BJGWE = jnp.moveaxis(pick(x, packing.column), 3, 1)
        for w in range(packing.column.shape[2]):
            here = jnp.expand_dims(within_BGU == w, -3 - slots)
            own = jnp.where(here, jnp.expand_dims(x_BJGWE[..., w, :], slots), own)
        return own

    def attend(i: int, q: Array, k: Array, v: Array, k_own: Array, v_own: Array, window: int | None):
        k_own, v_own = write(k_own, k, -1), write(v_own, v, -2)
        seen, kind = (prompt.k[i], prompt.v[i]), layer_kinds(spec)[i]
        if i < spec.num_layers - 1:
            return attention.decode_packed(q, *seen, bias[kind], k_own, v_own, packing, window), k_own, v_own
        last_BG11 = (packing.first + packing.count - 1)[:, None, :, None, None]
        of_last = bias[kind] if kind == FULL else pick(bias[kind], packing.last)
        return attention.decode(q[:, :, None], *seen, of_last, k_own, v_own, last_BG11, window)[:, :, 0], k_own, v_own

    def recur(i: int, layer: PyTree, x: delta.Projected, own: delta.State) -> tuple[Array, delta.State]:
        """On the grid of rollouts and their tokens here, which come one after the other."""
        batch, group, width = packing.column.shape

        def on_grid(y: Array) -> Array:
            y = pick(y.reshape(batch, -1, *y.shape[1:]), packing.column)
            return y.reshape(batch * group, width, *y.shape[3:])

        x = jax.tree.map(on_grid, x)
        out, own = _continue(spec, layer, x, prompt.states[i], own, packing.first, packing.count)
        out = pick(out.reshape(batch, group * width, *out.shape[2:]), packing.place)
        out = out.reshape(-1, *out.shape[2:])
        return last(out) if i == spec.num_layers - 1 else out, own

    def last(x: Array) -> Array:
        """Of [B*N,...], what belongs to the rollouts' last tokens: [B*G,...]."""
        x = pick(x.reshape(*token_BN.shape, *x.shape[1:]), packing.last)
        return x.reshape(-1, *x.shape[2:])

    return _decode(spec, params, cache, token_BN, position_BN, attend, recur, last)


def _decode(
    spec: DecoderSpec, params: PyTree, cache: list, token_BX: Array, position_BX: Array, attend: Callable,
    recur: Callable, wanted: Callable[[Array], Array] = lambda x: x,
) -> tuple[Array, list]:  # fmt: skip
    """Tokens [B,X] through all layers: final hidden states [B,G,D] and the new cache.

    attend: (layer, q [B,X,H,E], k, v [B,X,J,E], own keys, own values, window) -> [B,X,H,E], both caches with k and v.
    recur: (layer, its weights, tokens as the delta rule sees them, states) -> what it says of tokens, and new states.
    wanted: of arrays of all tokens, what belongs to those whose hidden states are asked for; of the
    others the last layer gives keys and values alone.
    """
    batch, kinds = len(token_BX), layer_kinds(spec)
    ropes = blocks.ropes(spec, position_BX.reshape(-1))
    # Tokens on one axis: XLA CPU fuses activations into the products of plain matrices.
    x_ND = blocks.embed(spec, params, token_BX.reshape(-1))
    grown = []
    for i, (layer, own) in enumerate(zip(params["layers"], cache, strict=True)):
        normed = blocks.norm(spec, x_ND, layer["attn_norm"])
        if kinds[i] == DELTA:
            mixed, own = recur(i, layer, delta.project(layer, normed), own)
            x_ND = wanted(x_ND) if i == spec.num_layers - 1 else x_ND
            x_ND = blocks.finish_block(spec, layer, x_ND, mixed)
            grown.append(own)
            continue
        rope, window = blocks.of_layer(spec, ropes, kinds[i], None)
        k, v = (x.reshape(batch, -1, *x.shape[1:]) for x in blocks.keys_values(spec, layer, normed, rope))
        if i == spec.num_layers - 1:
            x_ND, normed, *rope = (wanted(x) for x in (x_ND, normed, *rope))
        q, gate = blocks.queries(spec, layer, normed, rope)
        attended, *own = attend(i, q.reshape(batch, -1, *q.shape[1:]), k, v, *own, window)
        x_ND = blocks.finish_block(spec, layer, x_ND, blocks.gated(attended.reshape(-1, *attended.shape[2:]), gate))
        grown.append(tuple(own))
    return blocks.norm(spec, x_ND, params["final_norm"]).reshape(batch, -1, spec.hidden_size), grown


def _continue(
    spec: DecoderSpec, layer: PyTree, x: delta.Projected, of_prompt: delta.State, own: delta.State,
    first_BG: Array, count_BG: Array,
) -> tuple[Array, delta.State]:  # fmt: skip
    """The delta rule over tokens [B*G,W] of rollouts, of which `count` are there, from token number `first` on."""
    fresh = first_BG.reshape(-1) == 0
    group = first_BG.shape[1]

    def begin(of_prompt: Array, own: Array) -> Array:
        own = own.reshape(-1, *own.shape[2:])
        chosen = fresh.reshape(-1, *[1] * (own.ndim - 1))
        return jnp.where(chosen, jnp.repeat(of_prompt, group, 0), own)

    before = jax.tree.map(begin, of_prompt, own)
    out, after = delta.mix(delta.Sizes(*spec.delta), spec.norm_eps, layer, x, before, count_BG.reshape(-1))
    return out, jax.tree.map(lambda y: y.reshape(*first_BG.shape, *y.shape[1:]), after)


def _beyond(spec: DecoderSpec, prompt: PromptCache, position: Array) -> Array:
    """As `attention.bias`, of the prompt's slots that have left the window of a token at this position [B,...]."""
    token = jnp.arange(prompt.bias_BS.shape[1]) - 1
    return attention.bias((token < 0) | (token > position[..., None] - spec.window))
