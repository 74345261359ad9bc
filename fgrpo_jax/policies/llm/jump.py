"""Constrained decoding that jumps ahead: what the grammar forces is not waited for.

Most tokens of a transcript are no decision: brackets, separators, tags, the rest of a title once it is
the only one. A step chooses one token of a rollout and reads at once all that must follow; the next step
feeds them to the model together, up to `Pace.most` of a rollout and `Pace.size` of a query's group. So the
steps are about as many as decisions, and rollouts stand at different tokens. What is chosen, and with
which probability, is what one token after the other gives: a token is drawn by numbers that belong to
its place in the transcript.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fgrpo_jax.models import decoder, draw, head, packing
from fgrpo_jax.policies.llm import masks, transcript
from fgrpo_jax.policies.llm.grammar import Grammar
from fgrpo_jax.policies.llm.query import Query
from fgrpo_jax.types import UNTRAINED, Array, Lists, PyTree, Rollout


class Pace(NamedTuple):
    """How many tokens a decoding step may feed: `most` of a rollout, `size` of a query's group together."""

    most: int
    size: int


MOST = 6  # tokens of a rollout: more cost a CPU more time, in wider grids, than steps that they save (bench jump)


def pace(grammar: Grammar, width: int, group: int) -> Pace | None:
    """For identifiers of up to `width` tokens; None where these and the literals have one, so that little is forced.

    Rollouts seldom all have an item's most tokens at once: a row has room for three fifths of that.
    """
    of_item = width + len(grammar.separator)
    most = max(of_item, len(grammar.slate_close), len(grammar.rank_close))
    if most == 1:
        return None
    return Pace(min(most, MOST), max(2, -(-3 * min(of_item, MOST) // 5)) * group)


class _Loop(NamedTuple):
    steps: Array
    cache: Any
    state: transcript.State  # after all tokens known
    tokens: Array  # [B,G,1+T] the prompt's last, then the transcript's; eos where not known yet
    phase: Array  # [B,G,T]
    logp: Array  # [B,G,T]
    known: Array  # [B,G] tokens known
    fed: Array  # [B,G] of these, how many the cache holds


def sample(
    spec: decoder.DecoderSpec, grammar: Grammar, pace: Pace, params: PyTree, query: Query, key: Array | None, group: int
) -> tuple[Rollout, Lists, Array]:
    """As `sampling.sample` of a constrained policy; and the decoding steps it took."""
    params = decoder.whole(spec, params)
    prompt = decoder.prefill(spec, params, query.prompt, query.prompt_len)
    batch, n_candidates, width = query.identifiers.shape
    weights = decoder.unstack(spec, params, batch * pace.size)
    length = grammar.length(n_candidates, width)
    options = masks.choices(grammar, query)
    rows_BUD = head.choice_rows(params, options.tokens)
    numbers = _numbers((batch, group, rows_BUD.shape[1] - (width - 1) * n_candidates), key, length)

    def body(loop: _Loop) -> _Loop:
        running = loop.state.at != transcript.FINISHED
        waiting = jnp.where(running, jnp.minimum(loop.known - loop.fed, pace.most), 0)
        row = packing.pack(loop.fed, packing.share(waiting, loop.fed, pace.size), pace.most, pace.size)
        token_BN = _fed(loop.tokens, row)
        hidden_BGD, cache = decoder.decode_packed(spec, weights, prompt, loop.cache, token_BN, row)
        fed = loop.fed + row.count
        logit = masks.due(query, loop.state.pos, head.choice_logits(rows_BUD, hidden_BGD))
        u = None if numbers is None else _at(numbers, loop.known - 1)
        loop = loop._replace(steps=loop.steps + 1, cache=cache, fed=fed)
        loop = _choose(grammar, query, options, loop, running & (fed == loop.known), logit, u)
        return _follow(grammar, query, pace.most - 1, loop)

    def unfinished(loop: _Loop) -> Array:
        return (loop.steps < length) & (loop.state.at != transcript.FINISHED).any()

    shape = (batch, group, length)
    last_B = jnp.take_along_axis(query.prompt, query.prompt_len[:, None] - 1, 1)
    nothing = jnp.full(shape, grammar.eos, jnp.int32)
    first = _Loop(
        steps=jnp.int32(0),
        cache=decoder.empty_cache(spec, *shape),
        state=transcript.start(grammar, query, group),
        tokens=jnp.concatenate([jnp.broadcast_to(last_B[:, None], (batch, group, 1)), nothing], -1),
        phase=jnp.full(shape, UNTRAINED, jnp.int32),
        logp=jnp.zeros(shape, jnp.float32),
        known=jnp.ones(shape[:2], jnp.int32),
        fed=jnp.zeros(shape[:2], jnp.int32),
    )
    first = _follow(grammar, query, pace.most - 1, first)
    done = jax.lax.while_loop(unfinished, body, first)
    return Rollout(done.tokens[..., 1:], done.phase, done.logp), transcript.finish(done.state), done.steps


def _choose(
    grammar: Grammar, query: Query, options: masks.Choices, loop: _Loop, when: Array, logit: Array, u: Array | None
) -> _Loop:
    """Choose the next token, `when` [B,G] all those before it were fed."""
    mask = masks.allowed(grammar, query, options, loop.state)
    pick, logp = draw.choose_by(jnp.where(mask, logit, -jnp.inf), u)
    trained = when & (mask.sum(-1) > 1)
    here = (jnp.arange(loop.phase.shape[-1]) == loop.known[..., None] - 1) & trained[..., None]
    due_BGM = masks.due_tokens(grammar, query, loop.state)
    token = jnp.take_along_axis(due_BGM, pick[..., None], -1)[..., 0]
    loop, label = _read(grammar, query, loop, when, token)
    return loop._replace(
        phase=jnp.where(here, label[..., None], loop.phase), logp=jnp.where(here, logp[..., None], loop.logp)
    )


def _follow(grammar: Grammar, query: Query, most: int, loop: _Loop) -> _Loop:
    """Read what must come next, up to `most` tokens: they stay untrained, as the buffers begin."""

    def one(_: int, loop: _Loop) -> _Loop:
        forced, token = masks.forced(grammar, query, loop.state)
        return _read(grammar, query, loop, forced & (loop.state.at != transcript.FINISHED), token)[0]

    cache, loop = loop.cache, loop._replace(cache=())
    return jax.lax.fori_loop(0, most, one, loop)._replace(cache=cache)


def _read(grammar: Grammar, query: Query, loop: _Loop, when: Array, token: Array) -> tuple[_Loop, Array]:
    """Take a token [B,G] for the next one, `when`; and its phase."""
    after, label = transcript.advance(grammar, query, loop.state, token)

    def where(new: Array, old: Array) -> Array:
        return jnp.where(when.reshape(*when.shape, *[1] * (old.ndim - 2)), new, old)

    here = (jnp.arange(loop.tokens.shape[-1]) == loop.known[..., None]) & when[..., None]
    read = loop._replace(
        state=jax.tree.map(where, after, loop.state),
        tokens=jnp.where(here, token[..., None], loop.tokens),
        known=loop.known + when,
    )
    return read, label


def _fed(tokens_BGX: Array, row: packing.Packing) -> Array:
    """[B,N]: the tokens of a row."""
    group, size = tokens_BGX.shape[1:]
    rollout_BN = row.place // row.column.shape[2]
    index_BN = rollout_BN * size + jnp.minimum(row.number, size - 1)
    return packing.pick(tokens_BGX.reshape(-1, group * size), index_BN)


def _numbers(shape: tuple[int, ...], key: Array | None, length: int) -> Array | None:
    """[T,...]: what `draw.numbers` gives for every token of a transcript."""
    if key is None:
        return None
    return jax.vmap(lambda t: draw.numbers(shape, jax.random.fold_in(key, t)))(jnp.arange(length))


def _at(numbers: Array, t_BG: Array) -> Array:
    """[T,...,B,G] -> [...,B,G]: those of the token that every rollout stands at."""
    index = jnp.clip(t_BG, 0, numbers.shape[0] - 1)
    return jnp.take_along_axis(numbers, jnp.broadcast_to(index, (1, *numbers.shape[1:])), 0)[0]
