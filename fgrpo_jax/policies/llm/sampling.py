"""Grouped decoding: one prefill per query, then one loop for all its rollouts.

Temperature is 1 and the support is full, so the sampling policy is the model's own
distribution (masked by the grammar when `constrained`); anything else would make the
policy gradient a gradient of something else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fgrpo_jax.models import decoder, draw, head
from fgrpo_jax.policies.llm import jump, masks, transcript
from fgrpo_jax.policies.llm.query import Query
from fgrpo_jax.types import UNTRAINED, Array, Lists, PyTree, Rollout


class Sampler(NamedTuple):
    """What decoding depends on besides arrays; hashable."""

    spec: decoder.DecoderSpec
    grammar: transcript.Grammar
    constrained: bool
    ahead: bool = True  # read forced tokens at once (jump.py), where that takes fewer steps


class _Loop(NamedTuple):
    t: Array
    token: Array  # [B,G] fed next
    cache: Any
    state: transcript.State
    actions: Array
    phase: Array
    logp: Array


def sample(sampler: Sampler, params: PyTree, query: Query, key: Array | None, group: int) -> tuple[Rollout, Lists]:
    """`group` transcripts of every query; greedy where `key` is None.

    A token with a single allowed choice is labelled UNTRAINED: it carries no decision.
    The loop ends as soon as every rollout has ended.
    """
    spec, grammar, constrained, ahead = sampler
    if constrained and ahead and (pace := jump.pace(grammar, query.identifiers.shape[2], group)):
        return jump.sample(spec, grammar, pace, params, query, key, group)[:2]
    params = decoder.whole(spec, params)
    prompt = decoder.prefill(spec, params, query.prompt, query.prompt_len)
    batch, n_candidates, width = query.identifiers.shape
    weights = decoder.unstack(spec, params, batch * group)
    length = grammar.length(n_candidates, width)
    options = masks.choices(grammar, query)
    rows_BUD = head.choice_rows(params, options.tokens) if constrained else None

    def body(loop: _Loop) -> _Loop:
        hidden_BGD, cache = decoder.decode_step(spec, weights, prompt, loop.cache, loop.token, loop.t)
        step_key = None if key is None else jax.random.fold_in(key, loop.t)
        token, logp, forced = _next_token(sampler, weights, query, options, rows_BUD, loop.state, hidden_BGD, step_key)
        token = jnp.where(loop.state.at == transcript.FINISHED, grammar.eos, token)
        state, label = transcript.advance(grammar, query, loop.state, token)
        label = jnp.where(forced, UNTRAINED, label)

        def put(buffer: Array, value: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(buffer, value[..., None], loop.t, axis=2)

        return _Loop(
            t=loop.t + 1,
            token=token,
            cache=cache,
            state=state,
            actions=put(loop.actions, token),
            phase=put(loop.phase, label),
            logp=put(loop.logp, jnp.where(label == UNTRAINED, 0.0, logp)),
        )

    def unfinished(loop: _Loop) -> Array:
        return (loop.t < length) & (loop.state.at != transcript.FINISHED).any()

    done = jax.lax.while_loop(unfinished, body, _begin(spec, grammar, query, (batch, group, length)))
    return Rollout(done.actions, done.phase, done.logp), transcript.finish(done.state)


def _begin(spec: decoder.DecoderSpec, grammar: transcript.Grammar, query: Query, shape: tuple[int, int, int]) -> _Loop:
    """Before the first token; shape: [B,G,T] of the transcripts."""
    last_B = jnp.take_along_axis(query.prompt, query.prompt_len[:, None] - 1, 1)[:, 0]
    return _Loop(
        t=jnp.int32(0),
        token=jnp.broadcast_to(last_B[:, None], shape[:2]),
        cache=decoder.empty_cache(spec, *shape),
        state=transcript.start(grammar, query, shape[1]),
        actions=jnp.full(shape, grammar.eos, jnp.int32),
        phase=jnp.full(shape, UNTRAINED, jnp.int32),
        logp=jnp.zeros(shape, jnp.float32),
    )


def _next_token(
    sampler: Sampler, weights: PyTree, query: Query, options: masks.Choices, rows_BUD: Array | None,
    state: transcript.State, hidden_BGD: Array, key: Array | None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """The token of every rollout, its log-probability, and whether there was no other: [B,G] each."""
    if not sampler.constrained:
        token, logp = draw.choose_token(head.logits(weights, hidden_BGD), key)
        return token, logp, jnp.zeros(token.shape, bool)
    mask = masks.allowed(sampler.grammar, query, options, state)
    logit = masks.due(query, state.pos, head.choice_logits(rows_BUD, hidden_BGD))
    pick, logp = draw.choose(jnp.where(mask, logit, -jnp.inf), key)
    tokens_BGM = masks.due_tokens(sampler.grammar, query, state)
    token = jnp.take_along_axis(tokens_BGM, pick[..., None], -1)[..., 0]
    return token, logp, mask.sum(-1) == 1


def logprobs(sampler: Sampler, params: PyTree, query: Query, rollout: Rollout) -> Array:
    """[B,G,T] log-probabilities of the rollouts' actions under `params`; differentiable.

    With `constrained` the same masks apply as in sampling, found by reading the actions
    again: -inf where one was not allowed. 0 where the rollout is untrained.
    """
    spec, grammar, constrained, _ = sampler
    params = decoder.whole_ends(spec, params)
    hidden = decoder.completions(spec, params, query.prompt, query.prompt_len, rollout.actions)
    trained = rollout.phase != UNTRAINED
    if not constrained:
        logp = head.action_logprobs(spec, params, hidden, rollout.actions)
        return jnp.where(trained, logp, 0.0)
    logit, chosen = _choice_logits(sampler, params, query, masks.choices(grammar, query), rollout, hidden)
    return jnp.where(trained, chosen - jax.nn.logsumexp(logit, -1), 0.0)


def choices(sampler: Sampler, params: PyTree, query: Query, rollout: Rollout) -> tuple[Array, Array]:
    """`logprobs`, and the probability that a token names each candidate, [B,G,T,C]: see Policy.choices.

    Of constrained transcripts only: the choices are those of the grammar.
    """
    params = decoder.whole_ends(sampler.spec, params)
    hidden = decoder.completions(sampler.spec, params, query.prompt, query.prompt_len, rollout.actions)
    options = masks.choices(sampler.grammar, query)
    logit, chosen = _choice_logits(sampler, params, query, options, rollout, hidden)
    logp = jnp.where(rollout.phase != UNTRAINED, chosen - jax.nn.logsumexp(logit, -1), 0.0)
    return logp, masks.shared_out(sampler.grammar, query, options, rollout, jax.nn.softmax(logit))


def _choice_logits(
    sampler: Sampler, params: PyTree, query: Query, options: masks.Choices, rollout: Rollout, hidden: Array
) -> tuple[Array, Array]:
    """Of every choice [B,G,T,M], -inf where it was not allowed, and of the action [B,G,T]."""
    trained = rollout.phase != UNTRAINED
    _, _, decided = masks.parse(sampler.grammar, query, options, rollout.actions)
    logit = head.choice_logits(head.choice_rows(params, options.tokens), hidden)
    logit = masks.due(query, decided.pos, logit)
    # Untrained positions may allow anything: keep them finite, so their gradient is 0, not nan.
    logit = jnp.where(decided.allowed | ~trained[..., None], logit, -jnp.inf)
    is_action = jnp.arange(logit.shape[-1]) == decided.taken[..., None]
    return logit, jnp.where(decided.taken < 0, -jnp.inf, jnp.where(is_action, logit, 0.0).sum(-1))
