"""The grammar of a transcript, as one state machine over token ids, inside jit.

    <SLATE>[7] > [12] > [3]</SLATE><RANK>[12] > [7]</RANK><eos>

The prompt ends with the opening tag, so a transcript starts inside the slate. `advance`
reads one token of every rollout; from the state it keeps follow the parse (`Lists`), the
phase of every token, and (masks.py) the tokens that may come next. Nothing is repaired:
the first violation is recorded as the outcome and ends the transcript.

Conventions. A token is labelled with the phase it was written in, so separators and
`</SLATE><RANK>` belong to the slate and `</RANK><eos>` to the ranking; so does the token
that breaks a rule. An identifier is complete as soon as no other candidate of the pool
continues it; if one does, the next token decides. Duplicates and items outside the slate
are told apart by matching against the whole pool, also the items already used.

Limits are per query: `slate_min` and `slate_max` clamp to the pool, `rank_min` and
`rank_max` to the slate written.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from fgrpo_jax.policies.llm.grammar import CODE, OUTCOMES, Grammar, check_grammar, check_identifiers, render
from fgrpo_jax.policies.llm.query import Query
from fgrpo_jax.types import RANK, SLATE, UNTRAINED, Array, Lists, PyTree

__all__ = [
    "CODE", "OUTCOMES", "Grammar", "check_grammar", "check_identifiers", "render",
    "IDENTIFIER", "LITERAL", "END", "FINISHED", "State", "start", "advance", "finish", "parse",
    "lengths", "identifier_token", "limits",
]  # fmt: skip

_RUNNING = -1

IDENTIFIER, LITERAL, END, FINISHED = range(4)  # what the next token belongs to


@flax.struct.dataclass
class State:
    """Where every rollout stands. `alive` are candidates the identifier so far still fits."""

    at: Array  # [B,G] IDENTIFIER, LITERAL, END (eos expected) or FINISHED
    phase: Array  # [B,G] SLATE or RANK
    pos: Array  # [B,G] tokens of the current identifier or literal read so far
    alive: Array  # [B,G,C]
    is_separator: Array  # [B,G] the literal so far fits the separator
    is_close: Array  # [B,G] ... fits the closing tag
    used: Array  # [B,G,C] items of the current list
    in_slate: Array  # [B,G,C]
    count: Array  # [B,G] items of the current list
    slate: Array  # [B,G,N]
    ranking: Array  # [B,G,K]
    outcome: Array  # [B,G] OUTCOMES code, or _RUNNING


def start(grammar: Grammar, query: Query, group: int) -> State:
    """The state right after the opening tag, for `group` rollouts of every query."""
    batch, n_candidates, _ = query.identifiers.shape
    shape = (batch, group)
    zeros, false = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool)
    none_BGC = jnp.zeros((*shape, n_candidates), bool)
    return State(
        at=zeros + IDENTIFIER,
        phase=zeros + SLATE,
        pos=zeros,
        alive=jnp.broadcast_to(_present(query)[:, None], none_BGC.shape),
        is_separator=false,
        is_close=false,
        used=none_BGC,
        in_slate=none_BGC,
        count=zeros,
        slate=jnp.full((*shape, grammar.slate_max), -1, jnp.int32),
        ranking=jnp.full((*shape, grammar.rank_max), -1, jnp.int32),
        outcome=zeros + _RUNNING,
    )


def advance(grammar: Grammar, query: Query, state: State, token_BG: Array) -> tuple[State, Array]:
    """Read one token of every rollout: the next state and the token's phase label [B,G]."""
    label_BG = jnp.where(state.at == FINISHED, UNTRAINED, state.phase)
    at_identifier = state.at == IDENTIFIER
    fits_BGC = state.alive & (identifier_token(query, state.pos) == token_BG[..., None])
    fits_any = at_identifier & fits_BGC.any(-1)
    # A candidate that ends here while another continues: only the next token could tell.
    ended_BGC = state.alive & (lengths(query)[:, None] == state.pos[..., None]) & (state.pos > 0)[..., None]
    decided_late = at_identifier & ~fits_any & ended_BGC.any(-1)
    ends_now_BGC = fits_BGC & (lengths(query)[:, None] == state.pos[..., None] + 1)
    decided_now = fits_any & ends_now_BGC.any(-1) & (fits_BGC.sum(-1) == 1)

    item_BG = jnp.argmax(jnp.where(decided_late[..., None], ended_BGC, ends_now_BGC), -1)
    listed = _append(grammar, state, item_BG, decided_now | decided_late)
    broken = listed.outcome != _RUNNING

    # With an empty separator an identifier or the closing tag may follow an item.
    unfit = at_identifier & ~fits_any & ~decided_late
    opens_close = unfit & (state.pos == 0) & (state.count > 0) & (token_BG == _first_of_close(grammar, state))
    opens_close &= not grammar.separator
    starts = (decided_late & ~broken) | opens_close
    after = _read_literal(grammar, query, listed, token_BG, starts)

    # Between two identifiers stands a literal, or nothing when the separator is empty.
    next_item = decided_now & ~broken
    after_item = IDENTIFIER if not grammar.separator else LITERAL
    continues = fits_any & ~decided_now
    after = after.replace(
        at=jnp.where(next_item, after_item, after.at),
        pos=jnp.where(next_item, 0, jnp.where(continues, state.pos + 1, after.pos)),
        alive=jnp.where(
            next_item[..., None],
            _present(query)[:, None],
            jnp.where(continues[..., None], fits_BGC, after.alive),
        ),
        is_separator=jnp.where(next_item, bool(grammar.separator), after.is_separator),
        is_close=after.is_close | next_item,
    )
    after = _fail(after, unfit & ~opens_close, _unfit_code(grammar, state, token_BG))
    at_end = state.at == END
    after = _fail(after, at_end & (token_BG != grammar.eos), CODE["trailing_text"])
    after = _fail(after, at_end & (token_BG == grammar.eos), CODE["ok"])
    return after, label_BG


def _append(grammar: Grammar, state: State, item_BG: Array, when: Array) -> State:
    """Put the completed item on the current list, or record why it may not be there."""
    in_slate_phase = state.phase == SLATE
    used = _at(state.used, item_BG)
    limit = jnp.where(in_slate_phase, grammar.slate_max, grammar.rank_max)
    state = _fail(state, when & used, _phased(state, "duplicate"))
    foreign = ~in_slate_phase & ~_at(state.in_slate, item_BG)
    state = _fail(state, when & foreign, CODE["rank_not_in_slate"])
    state = _fail(state, when & (state.count >= limit), _phased(state, "too_long"))
    add = when & (state.outcome == _RUNNING)

    def put(list_BGX: Array, here: Array) -> Array:
        slot = jnp.arange(list_BGX.shape[-1]) == state.count[..., None]
        return jnp.where(slot & here[..., None], item_BG[..., None].astype(jnp.int32), list_BGX)

    is_item = jnp.arange(state.used.shape[-1]) == item_BG[..., None]
    return state.replace(
        used=state.used | (is_item & add[..., None]),
        count=state.count + add,
        slate=put(state.slate, add & in_slate_phase),
        ranking=put(state.ranking, add & ~in_slate_phase),
    )


def _read_literal(grammar: Grammar, query: Query, state: State, token_BG: Array, starts: Array) -> State:
    """One token of a separator or closing tag; `starts`: a literal begins where none was due yet."""
    when = (state.at == LITERAL) | starts
    pos = jnp.where(starts, 0, state.pos)
    in_slate_phase = state.phase == SLATE
    close = jnp.where(in_slate_phase, _literal_token(grammar.slate_close, pos), _literal_token(grammar.rank_close, pos))
    close_len = jnp.where(in_slate_phase, len(grammar.slate_close), len(grammar.rank_close))
    separates = when & (state.is_separator | starts) & (_literal_token(grammar.separator, pos) == token_BG)
    closes = when & (state.is_close | starts) & (close == token_BG)
    separated = separates & (pos + 1 == len(grammar.separator))
    closed = closes & (pos + 1 == close_len)

    state = _fail(state, when & ~separates & ~closes, _phased(state, "missing_tag"))
    low, _ = limits(grammar, query, state)
    state = _fail(state, closed & (state.count < low), _phased(state, "too_short"))
    slate_done = closed & in_slate_phase & (state.outcome == _RUNNING)
    rank_done = closed & ~in_slate_phase & (state.outcome == _RUNNING)
    to_identifier = separated | slate_done
    return state.replace(
        at=jnp.where(
            state.at == FINISHED,
            FINISHED,
            jnp.where(to_identifier, IDENTIFIER, jnp.where(rank_done, END, jnp.where(when, LITERAL, state.at))),
        ),
        pos=jnp.where(to_identifier | rank_done, 0, jnp.where(when, pos + 1, state.pos)),
        alive=jnp.where(to_identifier[..., None], _present(query)[:, None], state.alive),
        is_separator=jnp.where(when, separates & ~separated, state.is_separator),
        is_close=jnp.where(when, closes & ~closed, state.is_close),
        phase=jnp.where(slate_done, RANK, state.phase),
        in_slate=jnp.where(slate_done[..., None], state.used, state.in_slate),
        used=state.used & ~slate_done[..., None],
        count=jnp.where(slate_done, 0, state.count),
    )


def _unfit_code(grammar: Grammar, state: State, token_BG: Array) -> Array:
    """Why a token fits no identifier: the list is empty, the text ended, or it is foreign."""
    empty = (state.pos == 0) & (state.count == 0) & (token_BG == _first_of_close(grammar, state))
    code = jnp.where(token_BG == grammar.eos, _phased(state, "missing_tag"), _phased(state, "out_of_pool"))
    return jnp.where(empty, _phased(state, "empty"), code)


def _first_of_close(grammar: Grammar, state: State) -> Array:
    return jnp.where(state.phase == SLATE, grammar.slate_close[0], grammar.rank_close[0])


def _phased(state: State, rule: str) -> Array:
    return jnp.where(state.phase == SLATE, CODE[f"slate_{rule}"], CODE[f"rank_{rule}"])


def _fail(state: State, when: Array, code: Array | int) -> State:
    """Finish with an outcome where `when`; the first outcome stays."""
    when = when & (state.outcome == _RUNNING)
    return state.replace(outcome=jnp.where(when, code, state.outcome), at=jnp.where(when, FINISHED, state.at))


# --------------------------------------------------------------------- whole transcripts


def finish(state: State) -> Lists:
    """The lists read so far; a transcript that never ended is truncated."""
    outcome = jnp.where(state.outcome == _RUNNING, _phased(state, "truncated"), state.outcome)
    return Lists(slate=state.slate, ranking=state.ranking, outcome=outcome)


def parse(
    grammar: Grammar, query: Query, actions_BGT: Array, watch: Callable[[State, Array], PyTree] | None = None
) -> tuple[Lists, Array, PyTree]:
    """Read whole transcripts: lists, phase labels [B,G,T], and what `watch` saw.

    watch: (state, token_BG) before every token -> arrays [B,G,...], returned as [B,G,T,...].
    """

    def step(state: State, token_BG: Array):
        seen = watch(state, token_BG) if watch else None
        state, label_BG = advance(grammar, query, state, token_BG)
        return state, (label_BG, seen)

    state = start(grammar, query, actions_BGT.shape[1])
    state, steps = jax.lax.scan(step, state, jnp.moveaxis(actions_BGT, -1, 0))
    label_BGT, seen = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), steps)
    return finish(state), label_BGT, seen


# --------------------------------------------------------------------- small readers


def _present(query: Query) -> Array:
    return jnp.arange(query.identifiers.shape[1]) < query.n_candidates[:, None]  # [B,C]


def lengths(query: Query) -> Array:
    return (query.identifiers >= 0).sum(-1)  # [B,C]


def identifier_token(query: Query, pos_BG: Array) -> Array:
    """[B,G,C]: each candidate's token at a position; -1 beyond its end."""
    width = query.identifiers.shape[2]
    here = jnp.arange(width) == pos_BG[..., None]
    return jnp.where(here[:, :, None], query.identifiers[:, None], -1).max(-1)


def _literal_token(tokens: tuple[int, ...], pos_BG: Array) -> Array:
    """The literal's token at a position; -2, which no token equals, beyond its end."""
    table = jnp.array(np.array((*tokens, -2), np.int32))
    return table[jnp.minimum(pos_BG, len(tokens))]


def _at(mask_BGC: Array, item_BG: Array) -> Array:
    return jnp.take_along_axis(mask_BGC, item_BG[..., None], -1)[..., 0]


def limits(grammar: Grammar, query: Query, state: State) -> tuple[Array, Array]:
    """Least and most items of the current list, [B,G], clamped to the pool or the slate."""
    available = jnp.where(state.phase == SLATE, query.n_candidates[:, None], state.in_slate.sum(-1))
    low = jnp.where(state.phase == SLATE, grammar.slate_min, grammar.rank_min)
    high = jnp.where(state.phase == SLATE, grammar.slate_max, grammar.rank_max)
    return jnp.minimum(low, available), jnp.minimum(high, available)
