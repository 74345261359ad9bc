"""Which tokens may come next in a transcript.

A mask is over *choices* (axis M), never over the vocabulary: for every candidate the token of
its identifier that is due, then the literals and eos. Where choices that are open are the same
token, one of them represents it. Costs grow in proportion to the tokens of the pool's identifiers.
"""

from __future__ import annotations

import itertools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from fgrpo_jax.models.layers import take
from fgrpo_jax.policies.llm import transcript
from fgrpo_jax.policies.llm.grammar import Grammar
from fgrpo_jax.policies.llm.query import Query
from fgrpo_jax.types import RANK, SLATE, Array, Lists, Rollout, Turns


@flax.struct.dataclass
class Choices:
    """The tokens a query's grammar can ever allow (axis U: all tokens of identifiers, then the literals).

    Which of them are the choices of a state, `due` tells; which of those are open, `allowed`.
    """

    tokens: Array  # [B,U] int32, -1 where an identifier has ended
    twin: Array  # [B,W,C] int32: the first candidate whose identifier has the same token at this position


def choices(grammar: Grammar, query: Query) -> Choices:
    """U = W*C identifier tokens, then separator, both closing tags, and eos."""
    name_BWC = jnp.moveaxis(query.identifiers, -1, 1)
    literals_BX = jnp.broadcast_to(_literals(grammar), (len(name_BWC), len(_literals(grammar))))
    tokens_BU = jnp.concatenate([name_BWC.reshape(len(name_BWC), -1), literals_BX], axis=1)
    order_BWC = jnp.argsort(name_BWC, axis=-1, stable=True)
    sorted_BWC = jnp.take_along_axis(name_BWC, order_BWC, -1)
    starts_BWC = jnp.pad(sorted_BWC[..., 1:] != sorted_BWC[..., :-1], [(0, 0), (0, 0), (1, 0)])
    first_BWC = jax.lax.cummax(jnp.where(starts_BWC, jnp.arange(name_BWC.shape[-1]), 0), axis=2)
    twin_BWC = jnp.take_along_axis(order_BWC, first_BWC, -1)
    return Choices(tokens_BU, jnp.take_along_axis(twin_BWC, jnp.argsort(order_BWC, axis=-1), -1))


def due(query: Query, pos: Array, of_tokens: Array) -> Array:
    """[...,U] -> [...,M]: what belongs to the choices where `pos` [...] tokens of an identifier were read."""
    _, n_candidates, width = query.identifiers.shape
    of_names, of_literals = jnp.split(of_tokens, [width * n_candidates], axis=-1)
    if width > 1:
        here = jnp.arange(width) == pos[..., None]
        of_names = of_names.reshape(*of_names.shape[:-1], width, n_candidates)
        of_names = jnp.where(here[..., None], of_names, 0).sum(-2)
    return jnp.concatenate([of_names, of_literals], -1)


def due_tokens(grammar: Grammar, query: Query, state: transcript.State) -> Array:
    """[B,G,M] int32: the choices; -1 where an identifier has ended."""
    name_BGC = transcript.identifier_token(query, state.pos)
    literals_BGX = jnp.broadcast_to(_literals(grammar), (*state.pos.shape, len(_literals(grammar))))
    return jnp.concatenate([name_BGC, literals_BGX], -1)


def allowed(grammar: Grammar, query: Query, options: Choices, state: transcript.State) -> Array:
    """[B,G,M] mask of the choices that keep the transcript well-formed; never empty.

    No two of those allowed are the same token.
    """
    going_on_BGC, literal_BGX = _possible(grammar, query, state)
    return jnp.concatenate([_distinct(query, options, state, going_on_BGC), literal_BGX], -1)


def forced(grammar: Grammar, query: Query, state: transcript.State) -> tuple[Array, Array]:
    """Whether a single token is allowed next, and which, [B,G] each; far cheaper than `allowed` to find."""
    possible_BGM = jnp.concatenate(_possible(grammar, query, state), -1)
    tokens_BGM = due_tokens(grammar, query, state)
    token_BG = jnp.where(possible_BGM, tokens_BGM, -1).max(-1)
    return (~possible_BGM | (tokens_BGM == token_BG[..., None])).all(-1), token_BG


def _possible(grammar: Grammar, query: Query, state: transcript.State) -> tuple[Array, Array]:
    """`allowed`, with all candidates [B,G,C] that the next token may go on naming; and the literals [B,G,X]."""
    low, high = transcript.limits(grammar, query, state)
    lengths = transcript.lengths(query)[:, None]
    at_identifier = state.at == transcript.IDENTIFIER
    open_BGC = _open(grammar, query, state)
    ended = (open_BGC & (lengths == state.pos[..., None]) & (state.pos > 0)[..., None]).any(-1)

    at_literal = state.at == transcript.LITERAL
    may_separate = jnp.where(ended, state.count + 1 < high, at_literal & state.is_separator & (state.count < high))
    may_close = jnp.where(ended, state.count + 1 >= low, at_literal & state.is_close & (state.count >= low))
    if not grammar.separator:
        may_close |= at_identifier & (state.pos == 0) & (state.count > 0) & (state.count >= low)
    pos = jnp.where(ended, 0, state.pos)[..., None]

    def literal(tokens: tuple[int, ...], may: Array) -> Array:
        return may[..., None] & (jnp.arange(len(tokens)) == pos)

    def close(tokens: tuple[int, ...], may: Array) -> Array:
        """A closing tag, but for the tokens that the separator already stands for."""
        shared = [a == b for a, b in itertools.zip_longest(tokens, grammar.separator[: len(tokens)])]
        return literal(tokens, may) & ~(may_separate[..., None] & np.array(shared))

    at_eos = (state.at == transcript.END) | (state.at == transcript.FINISHED)
    literals = [
        literal(grammar.separator, may_separate),
        close(grammar.slate_close, may_close & (state.phase == SLATE)),
        close(grammar.rank_close, may_close & (state.phase == RANK)),
        at_eos[..., None],
    ]
    return open_BGC & (lengths > state.pos[..., None]), jnp.concatenate(literals, -1)


def _open(grammar: Grammar, query: Query, state: transcript.State) -> Array:
    """[B,G,C]: the candidates that what was read so far may still name, or has named."""
    _, high = transcript.limits(grammar, query, state)
    eligible_BGC = ~state.used & (state.in_slate | (state.phase == SLATE)[..., None])
    at_identifier = (state.at == transcript.IDENTIFIER) & (state.count < high)
    return state.alive & eligible_BGC & at_identifier[..., None]


def _distinct(query: Query, options: Choices, state: transcript.State, open_BGC: Array) -> Array:
    """One candidate, the first twin, for every token that open candidates have next."""
    _, n_candidates, width = query.identifiers.shape
    if width == 1:  # equal identifiers are refused (check_identifiers)
        return open_BGC
    here = jnp.arange(width) == state.pos[..., None]
    twin_BGC = jnp.where(here[..., None], options.twin[:, None], 0).sum(2)

    def merge(twin_C: Array, open_C: Array) -> Array:
        return jnp.zeros(n_candidates, bool).at[twin_C].max(open_C, mode="promise_in_bounds")

    return jax.vmap(jax.vmap(merge))(twin_BGC, open_BGC)


# --------------------------------------------------------------------- whole transcripts


@flax.struct.dataclass
class Decisions:
    """What could be chosen at every token of whole transcripts, and what was."""

    allowed: Array  # [B,G,T,M] bool
    pos: Array  # [B,G,T] int32: tokens of an identifier read before; `due` asks for it
    taken: Array  # [B,G,T] int32: the choice that the token is; -1 where it is none of those allowed


def parse(grammar: Grammar, query: Query, options: Choices, actions_BGT: Array) -> tuple[Lists, Array, Decisions]:
    """`transcript.parse`, and what was decided at every token."""

    def decide(state: transcript.State, token_BG: Array) -> Decisions:
        mask_BGM = allowed(grammar, query, options, state)
        is_token = mask_BGM & (due_tokens(grammar, query, state) == token_BG[..., None])
        taken_BG = jnp.where(is_token.any(-1), jnp.argmax(is_token, -1), -1).astype(jnp.int32)
        return Decisions(mask_BGM, state.pos, taken_BG)

    return transcript.parse(grammar, query, actions_BGT, decide)


def _going_on(grammar: Grammar, query: Query, state: transcript.State) -> Array:
    """[B,G,C]: the candidates that the next token may go on naming."""
    return _open(grammar, query, state) & (transcript.lengths(query)[:, None] > state.pos[..., None])


def turns(grammar: Grammar, query: Query, rollout: Rollout) -> Turns:
    """See Policy.turns."""

    def watch(state: transcript.State, token_BG: Array) -> Turns:
        open_BGC = _going_on(grammar, query, state)
        named_BGC = open_BGC & (transcript.identifier_token(query, state.pos) == token_BG[..., None])
        return Turns(place=state.count, named=named_BGC, open=open_BGC.any(-1))

    return transcript.parse(grammar, query, rollout.actions, watch)[2]


def shared_out(grammar: Grammar, query: Query, options: Choices, rollout: Rollout, probability_BGTM: Array) -> Array:
    """[B,G,T,C]: the probability of every choice, in equal shares for the candidates that it leaves possible."""

    def watch(state: transcript.State, token_BG: Array) -> tuple[Array, Array]:
        return _going_on(grammar, query, state), state.pos

    _, _, (open_BGTC, pos_BGT) = transcript.parse(grammar, query, rollout.actions, watch)
    _, n_candidates, width = query.identifiers.shape
    of_token_BGTC = probability_BGTM[..., :n_candidates]
    if width == 1:
        return jnp.where(open_BGTC, of_token_BGTC, 0.0)
    here = jnp.arange(width) == pos_BGT[..., None]
    twin_BGTC = jnp.where(here[..., None], options.twin[:, None, None], 0).sum(-2)

    def share(twin_C: Array, open_C: Array, of_token_C: Array) -> Array:
        count_C = jnp.zeros(n_candidates, jnp.int32).at[twin_C].add(open_C, mode="promise_in_bounds")
        return jnp.where(open_C, take(of_token_C[:, None], twin_C)[:, 0] / jnp.maximum(count_C[twin_C], 1), 0.0)

    return jax.vmap(jax.vmap(jax.vmap(share)))(twin_BGTC, open_BGTC, of_token_BGTC)


def _literals(grammar: Grammar) -> Array:
    return jnp.array((*grammar.separator, *grammar.slate_close, *grammar.rank_close, grammar.eos), jnp.int32)
