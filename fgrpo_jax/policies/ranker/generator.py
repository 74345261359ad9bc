"""The generator: a list written item by item, each a masked softmax over the candidates not yet used.

The pool is encoded once per query (`encode`), whatever the number of lists, and so is the first step, a
learned start, which all lists of a query share. A list is then read by a few causal layers over its own
steps, which also attend to the encoded pool; step t is fed the encoding of the item chosen at t - 1. A
candidate's logit is the scaled product of its encoding with the step's state.

Two computations share the layers: `logits` of whole lists (teacher forcing, differentiable) and decoding,
a scan over the steps with a cache. Temperature is 1 and the support is every unused candidate, so what is
sampled is what `logprobs` says. A step with one choice or none (a pool as small as the list) is labelled
UNTRAINED; where there is none its action is 0 and its slot in Lists is -1.

With `two_phase` the first L steps write a slate of the pool, the next L a ranking of that slate.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fgrpo_jax.models import draw
from fgrpo_jax.models.layers import rms_norm
from fgrpo_jax.policies.ranker import network
from fgrpo_jax.policies.ranker.network import RankerSpec, Seen
from fgrpo_jax.policies.ranker.query import RankerQuery
from fgrpo_jax.types import RANK, SLATE, UNTRAINED, Array, Lists, PyTree, Rollout, Turns

# Steps of sampling that are compiled apart: XLA CPU then lays the pool out once for all of them, which saves a tenth.
_UNROLLED = 8
# At most so many steps attend as one. With fewer, a CPU spends more time starting products than computing them; with
# many more, most scores are masked ones (bench ranker).
_ROWS = 25


class Encoded(NamedTuple):
    """Weights in the compute type, and what decoding reads of every query."""

    weights: PyTree
    layers: list[PyTree]  # those over the steps of a list
    pool_BCD: Array
    seen: list[Seen]  # the pool and the start, for each of these layers
    present_BC: Array
    first_BC: Array  # logits of the first step


def encode(spec: RankerSpec, params: PyTree, query: RankerQuery) -> Encoded:
    """Histories, pools and the first step, once per query; differentiable."""
    weights = network.whole(spec, network.generator_table(spec), params)
    present_BC = network.present(query)
    mask = present_BC[:, None, None]  # [B,1,1,C]
    features = network.candidates(spec, weights, query)[:, None]
    pool_BCD = network.beside_history(spec, weights, query, features, mask)[:, 0]
    start = weights["start"] + weights["step"][0]
    x_B11D = jnp.broadcast_to(start, (pool_BCD.shape[0], 1, 1, spec.hidden_size))
    with_start = jnp.pad(mask, [(0, 0)] * 3 + [(0, 1)], constant_values=True)
    layers, seen = network.unstack(weights["list_layers"]), []
    for layer in layers:
        k, v = network.project(spec, layer, pool_BCD, "kv")
        q_start, k_start, v_start = network.project(spec, layer, x_B11D)
        k, v = jnp.concatenate([k, k_start[:, 0]], 1), jnp.concatenate([v, v_start[:, 0]], 1)
        seen.append(Seen(k, v, with_start))
        x_B11D = network.finish_layer(spec, layer, x_B11D, network.attend(q_start, seen[-1]))
    first_B11C = _logits(spec, weights, pool_BCD, x_B11D)
    return Encoded(weights, layers, pool_BCD, seen, present_BC, first_B11C[:, 0, 0])


# --------------------------------------------------------------------- what may be chosen


def _first_open(present_BC: Array, group: int) -> Array:
    return jnp.broadcast_to(present_BC[:, None], (present_BC.shape[0], group, present_BC.shape[1]))


def _next_open(spec: RankerSpec, present_BC: Array, open_BGC: Array, pick_BG: Array, t: Array) -> Array:
    """What may be chosen at step t + 1: no used item; the slate, once it is complete."""
    open_BGC &= jnp.arange(open_BGC.shape[-1]) != pick_BG[..., None]
    if not spec.two_phase:
        return open_BGC
    return jnp.where(t + 1 == spec.list_length, present_BC[:, None] & ~open_BGC, open_BGC)


def allowed(spec: RankerSpec, present_BC: Array, actions_BGT: Array) -> Array:
    """What could be chosen at every step of whole lists, [B,G,T,C] bool."""

    def step(open_BGC: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
        pick_BG, t = at
        return _next_open(spec, present_BC, open_BGC, pick_BG, t), open_BGC

    steps = jnp.moveaxis(actions_BGT, -1, 0), jnp.arange(spec.steps)
    _, open_TBGC = jax.lax.scan(step, _first_open(present_BC, actions_BGT.shape[1]), steps)
    return jnp.moveaxis(open_TBGC, 0, 2)


def _labels(spec: RankerSpec) -> Array:
    """The phase of every step, [T]."""
    t = jnp.arange(spec.steps)
    return jnp.where(t < spec.steps - spec.list_length, SLATE, RANK).astype(jnp.int32)


def as_rollout(spec: RankerSpec, actions_BGT: Array, logp_BGT: Array, choices_BGT: Array) -> tuple[Rollout, Lists]:
    """What was written, given its log-probabilities and the number of choices there were at each step."""
    phase_BGT = jnp.where(choices_BGT > 1, _labels(spec), UNTRAINED)
    rollout = Rollout(actions_BGT, phase_BGT, jnp.where(phase_BGT == UNTRAINED, 0.0, logp_BGT))
    listed_BGT = jnp.where(choices_BGT > 0, actions_BGT, -1)
    outcome = jnp.zeros(actions_BGT.shape[:2], jnp.int32)
    return rollout, Lists(listed_BGT[..., : spec.list_length], listed_BGT[..., -spec.list_length :], outcome)


def written_by_others(spec: RankerSpec, present_BC: Array, list_BGT: Array) -> tuple[Rollout, Lists]:
    """Lists [B,G,L] of distinct candidates (-1 padded where a pool ends) as if written; `logp` is 0.

    With `two_phase` the slate has the order of its ranking.
    """
    actions_BGT = jnp.tile(jnp.maximum(list_BGT, 0), spec.steps // spec.list_length)
    choices_BGT = allowed(spec, present_BC, actions_BGT).sum(-1)
    return as_rollout(spec, actions_BGT, jnp.zeros(actions_BGT.shape), choices_BGT)


# --------------------------------------------------------------------- whole lists


def logits(spec: RankerSpec, encoded: Encoded, actions_BGT: Array) -> Array:
    """[B,G,T,C] float32: of every candidate at every step, given the steps before; nothing is masked."""
    batch, group, steps = actions_BGT.shape
    first_BG1C = jnp.broadcast_to(encoded.first_BC[:, None, None], (batch, group, 1, encoded.first_BC.shape[1]))
    if steps == 1:
        return first_BG1C
    x_BGTD = network.take(encoded.pool_BCD, actions_BGT[..., :-1]) + encoded.weights["step"][1:]
    # Several lists attend as one, X of Y steps, each by a mask to itself.
    x_BXYD = x_BGTD.reshape(batch, -1, _together(group, steps - 1) * (steps - 1), spec.hidden_size)
    list_Y, step_Y = jnp.divmod(jnp.arange(x_BXYD.shape[2]), steps - 1)
    before = ((list_Y == list_Y[:, None]) & (step_Y <= step_Y[:, None]))[None, None]

    def block(x: Array, layer: PyTree, seen: Seen) -> Array:
        q, k, v = network.project(spec, layer, x)
        return network.finish_layer(spec, layer, x, network.attend(q, seen, Seen(k, v, before)))

    for layer, seen in zip(encoded.layers, encoded.seen, strict=True):
        x_BXYD = network.rematerialized(spec, block)(x_BXYD, layer, seen)
    later_BGTC = _logits(spec, encoded.weights, encoded.pool_BCD, x_BXYD.reshape(x_BGTD.shape))
    return jnp.concatenate([first_BG1C, later_BGTC], 2)


def _together(group: int, steps: int) -> int:
    """How many lists of `steps` attend as one: a divisor of the group."""
    return max(n for n in range(1, group + 1) if group % n == 0 and (n == 1 or n * steps <= _ROWS))


def _logits(spec: RankerSpec, weights: PyTree, pool_BCD: Array, x_BGTD: Array) -> Array:
    state_BGTD = rms_norm(x_BGTD, weights["list_norm"], spec.norm_eps)
    product = jnp.einsum("bgtd,bcd->bgtc", state_BGTD, pool_BCD, preferred_element_type=jnp.float32)
    return product / spec.hidden_size**0.5


def logprobs(spec: RankerSpec, encoded: Encoded, rollout: Rollout) -> Array:
    """[B,G,T] log-probabilities of the rollouts' actions; differentiable.

    0 where a step is untrained; -inf where an item was used before (or is outside the slate).
    """
    return choices(spec, encoded, rollout)[0]


def choices(spec: RankerSpec, encoded: Encoded, rollout: Rollout) -> tuple[Array, Array]:
    """`logprobs`, and the probability of every candidate at every step, [B,G,T,C]."""
    trained_BGT = rollout.phase != UNTRAINED
    open_BGTC = allowed(spec, encoded.present_BC, rollout.actions)
    # Untrained steps may choose anything: keep them finite, so their gradient is 0, not nan.
    logit = jnp.where(open_BGTC | ~trained_BGT[..., None], logits(spec, encoded, rollout.actions), -jnp.inf)
    # Not taken along the axis, whose gradient is a scatter: see layers.take.
    is_action = jnp.arange(logit.shape[-1]) == rollout.actions[..., None]
    chosen = jnp.where(is_action, logit, 0.0).sum(-1)
    return jnp.where(trained_BGT, chosen - jax.nn.logsumexp(logit, -1), 0.0), jax.nn.softmax(logit)


def turns(spec: RankerSpec, query: RankerQuery, rollout: Rollout) -> Turns:
    """Every step names one candidate, the next item of its phase's list."""
    place_T = jnp.arange(spec.steps) % spec.list_length
    named_BGTC = jnp.arange(query.candidates.shape[1]) == rollout.actions[..., None]
    return Turns(
        place=jnp.broadcast_to(place_T, rollout.actions.shape),
        named=named_BGTC,
        open=jnp.ones(rollout.actions.shape, bool),
    )


# --------------------------------------------------------------------- decoding


class _Writing(NamedTuple):
    """Lists that are being written: what the next step reads."""

    last: Array  # [B,G]: the item chosen last
    cache: list[tuple[Array, Array]]  # keys and values [B,G,T-1,H,E] of each layer, of the steps after the first
    open: Array  # [B,G,C]


def _begin(spec: RankerSpec, encoded: Encoded, group: int) -> tuple[Array, _Writing]:
    """Logits [B,G,C] of the first step, and lists without an item."""
    (batch, pool), heads = encoded.present_BC.shape, spec.num_heads
    shape = (batch, group, max(spec.steps - 1, 1), heads, spec.hidden_size // heads)
    cache = [(jnp.zeros(shape, spec.dtype), jnp.zeros(shape, spec.dtype)) for _ in encoded.layers]
    writing = _Writing(jnp.zeros((batch, group), jnp.int32), cache, _first_open(encoded.present_BC, group))
    return jnp.broadcast_to(encoded.first_BC[:, None], (batch, group, pool)), writing


def _step(spec: RankerSpec, encoded: Encoded, writing: _Writing, t: Array) -> tuple[Array, _Writing]:
    """Logits [B,G,C] of step t, which is not the first; and the lists with t's keys and values."""
    x = network.take(encoded.pool_BCD, writing.last[..., None]) + encoded.weights["step"][t]
    grown = []
    for layer, seen, (k_own, v_own) in zip(encoded.layers, encoded.seen, writing.cache, strict=True):
        q, k, v = network.project(spec, layer, x)
        k_own = jax.lax.dynamic_update_slice_in_dim(k_own, k, t - 1, axis=2)
        v_own = jax.lax.dynamic_update_slice_in_dim(v_own, v, t - 1, axis=2)
        before = (jnp.arange(k_own.shape[2]) < t)[None, None, None]
        x = network.finish_layer(spec, layer, x, network.attend(q, seen, Seen(k_own, v_own, before)))
        grown.append((k_own, v_own))
    return _logits(spec, encoded.weights, encoded.pool_BCD, x)[:, :, 0], writing._replace(cache=grown)


def _where_open(writing: _Writing, logit_BGC: Array) -> Array:
    """-inf where closed, unless all are."""
    return jnp.where(writing.open | ~writing.open.any(-1, keepdims=True), logit_BGC, -jnp.inf)


def _put(spec: RankerSpec, encoded: Encoded, writing: _Writing, pick_BG: Array, t: Array) -> _Writing:
    return writing._replace(last=pick_BG, open=_next_open(spec, encoded.present_BC, writing.open, pick_BG, t))


def sample(spec: RankerSpec, encoded: Encoded, key: Array | None, group: int) -> tuple[Rollout, Lists]:
    """`group` lists of every query; the most probable item at each step where `key` is None (greedy)."""

    def choose(writing: _Writing, logit_BGC: Array, t: Array) -> tuple[_Writing, tuple[Array, ...]]:
        choices_BG = writing.open.sum(-1)
        t_key = None if key is None else jax.random.fold_in(key, t)
        pick_BG, logp_BG = draw.choose(_where_open(writing, logit_BGC), t_key)
        pick_BG = jnp.where(choices_BG > 0, pick_BG, 0)
        return _put(spec, encoded, writing, pick_BG, t), (pick_BG, logp_BG, choices_BG)

    def step(writing: _Writing, t: Array) -> tuple[_Writing, tuple[Array, ...]]:
        logit_BGC, writing = _step(spec, encoded, writing, t)
        return choose(writing, logit_BGC, t)

    logit_BGC, writing = _begin(spec, encoded, group)
    writing, first = choose(writing, logit_BGC, jnp.int32(0))
    _, later = jax.lax.scan(step, writing, jnp.arange(1, spec.steps), unroll=max(min(spec.steps - 1, _UNROLLED), 1))
    written = (jnp.concatenate([x[None], xs]) for x, xs in zip(first, later, strict=True))
    return as_rollout(spec, *(jnp.moveaxis(x, 0, -1) for x in written))


def beam(spec: RankerSpec, encoded: Encoded, width: int) -> tuple[Rollout, Lists]:
    """The `width` most probable lists that a beam of that width finds, G = width, the best one first.

    A beam of 1 is greedy decoding. Where a pool has fewer lists than the beam, the best one fills it.
    """
    batch, pool = encoded.present_BC.shape

    def choose(carry: tuple, logit_BGC: Array, t: Array) -> tuple:
        writing, total_BG, written = carry
        choices_BG = writing.open.sum(-1)
        logp_BGC = jax.nn.log_softmax(_where_open(writing, logit_BGC))
        # Lists that have ended go on with their only continuation.
        logp_BGC = jnp.where(choices_BG[..., None] > 0, logp_BGC, jnp.where(jnp.arange(pool) == 0, 0.0, -jnp.inf))
        total_BX = (total_BG[..., None] + logp_BGC).reshape(batch, -1)
        total_BG, best_BG = jax.lax.top_k(total_BX, width)
        parent_BG, pick_BG = best_BG // pool, (best_BG % pool).astype(jnp.int32)

        def of_parent(x: Array) -> Array:
            return jax.vmap(lambda x, parent: x[parent])(x, parent_BG)

        now = (pick_BG, jnp.take_along_axis(logp_BGC.reshape(batch, -1), best_BG, 1), of_parent(choices_BG))
        writing, written = jax.tree.map(of_parent, (writing, written))
        written = tuple(x.at[..., t].set(y) for x, y in zip(written, now, strict=True))
        return _put(spec, encoded, writing, pick_BG, t), total_BG, written

    def step(carry: tuple, t: Array) -> tuple[tuple, None]:
        logit_BGC, writing = _step(spec, encoded, carry[0], t)
        return choose((writing, *carry[1:]), logit_BGC, t), None

    shape = (batch, width, spec.steps)
    nothing = jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros(shape, jnp.int32)
    total_BG = jnp.where(jnp.arange(width) == 0, 0.0, -jnp.inf)  # one list to begin with, not `width` equal ones
    logit_BGC, writing = _begin(spec, encoded, width)
    first = choose((writing, jnp.broadcast_to(total_BG, (batch, width)), nothing), logit_BGC, jnp.int32(0))
    (_, total_BG, written), _ = jax.lax.scan(step, first, jnp.arange(1, spec.steps))
    none_BG1 = (total_BG == -jnp.inf)[..., None]
    return as_rollout(spec, *(jnp.where(none_BG1, x[:, :1], x) for x in written))
