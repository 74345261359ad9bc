"""What a transcript is: its literals and limits, its outcomes, how one is written.

    <SLATE>[7] > [12] > [3]</SLATE><RANK>[12] > [7]</RANK><eos>

Everything is built piece by piece (identifier, separator, tag) from token ids; a transcript
is never decoded to text and tokenised again. `transcript.py` reads what is written here.
Whether the pieces can be told apart is checked on the host, before anything is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from fgrpo_jax.policies.llm.query import Query
from fgrpo_jax.types import OK, Array, Outcome

_SLATE_RULES = "empty", "duplicate", "out_of_pool", "too_short", "too_long", "missing_tag", "truncated"
_RANK_RULES = "empty", "duplicate", "out_of_pool", "not_in_slate", "too_short", "too_long", "missing_tag", "truncated"
OUTCOMES = (
    OK,
    *(Outcome(f"slate_{rule}", "slate") for rule in _SLATE_RULES),
    *(Outcome(f"rank_{rule}", "rank") for rule in _RANK_RULES),
    Outcome("trailing_text", "rank"),
)
CODE = {outcome.name: i for i, outcome in enumerate(OUTCOMES)}


class Grammar(NamedTuple):
    """Literals as token ids and list limits; hashable, so it is a static argument of jit."""

    separator: tuple[int, ...]
    slate_close: tuple[int, ...]
    rank_close: tuple[int, ...]
    eos: int
    slate_min: int
    slate_max: int
    rank_min: int
    rank_max: int

    def length(self, n_candidates: int, width: int) -> int:
        """T: the longest transcript over pools of `n_candidates` identifiers of `width` tokens."""
        n = min(self.slate_max, n_candidates)
        k = min(self.rank_max, n)
        separators = (n - 1 + k - 1) * len(self.separator)
        return (n + k) * width + separators + len(self.slate_close) + len(self.rank_close) + 1


def render(grammar: Grammar, query: Query, slate_BGN: Array, ranking_BGK: Array) -> tuple[Array, Array]:
    """The transcript that says these lists: actions [B,G,T], eos beyond the end.

    Also, for every token, the candidate index it names, or -1 in literals. Lists hold
    candidate indices, -1 in empty slots, which must be the last ones.
    """
    batch, n_candidates, width = query.identifiers.shape
    group = slate_BGN.shape[1]

    def literal(tokens: tuple[int, ...], present: Array) -> Array:
        return jnp.where(present[..., None], jnp.array(tokens, jnp.int32), -1)

    def items(list_BGX: Array) -> tuple[Array, Array]:
        which = jnp.maximum(list_BGX, 0)
        ident = query.identifiers[jnp.arange(batch)[:, None, None], which]
        ident = jnp.where((list_BGX >= 0)[..., None], ident, -1)
        between = (list_BGX >= 0) & (jnp.arange(list_BGX.shape[-1]) > 0)
        separator = literal(grammar.separator, between)
        both = jnp.concatenate([separator, ident], -1)
        names = jnp.concatenate([jnp.full(separator.shape, -1), jnp.broadcast_to(list_BGX[..., None], ident.shape)], -1)
        return both.reshape(batch, group, -1), names.reshape(batch, group, -1)

    always = jnp.ones((batch, group), bool)
    slate, slate_names = items(slate_BGN)
    ranking, ranking_names = items(ranking_BGK)
    close = literal(grammar.slate_close, always)
    end = literal((*grammar.rank_close, grammar.eos), always)
    loose = jnp.concatenate([slate, close, ranking, end], -1)
    names = jnp.concatenate([slate_names, jnp.full_like(close, -1), ranking_names, jnp.full_like(end, -1)], -1)
    length = grammar.length(n_candidates, width)
    slot = jnp.where(loose >= 0, jnp.cumsum(loose >= 0, -1) - 1, length)
    rows = jnp.arange(batch)[:, None, None], jnp.arange(group)[None, :, None]

    def packed(values: Array, empty: int) -> Array:
        return jnp.full((batch, group, length), empty, jnp.int32).at[(*rows, slot)].set(values, mode="drop")

    return packed(loose, grammar.eos), packed(names, -1)


# --------------------------------------------------------------------- border checks (host)


def check_grammar(grammar: Grammar) -> None:
    """Raises ValueError when a literal is no token or holds eos, or when two cannot be told apart."""
    for name in ("separator", "slate_close", "rank_close"):
        if grammar.eos in getattr(grammar, name):
            raise ValueError(f"transcript.{name} contains eos, which ends a transcript: choose another literal")
    for name in ("slate_close", "rank_close"):
        close = getattr(grammar, name)
        if not close:
            raise ValueError(f"transcript.{name} is encoded to no token by this tokenizer: choose another literal")
        shorter = min(len(close), len(grammar.separator))
        if grammar.separator and close[:shorter] == grammar.separator[:shorter]:
            raise ValueError(
                f"transcript.separator and transcript.{name} cannot be told apart: one is a prefix of the "
                f"other as token ids ({grammar.separator} and {close}); change one of them"
            )


def check_identifiers(
    grammar: Grammar, query_id: str, ids: Sequence[str], identifiers: Sequence[Sequence[int]]
) -> None:
    """Refuse a pool whose identifiers (token ids) the grammar cannot tell apart.

    Raises ValueError naming the query and both candidates.
    """
    closes = {grammar.slate_close[0], grammar.rank_close[0]}
    decisive = closes | set(grammar.separator[:1])
    seen: dict[tuple[int, ...], str] = {}
    for name, tokens in zip(ids, identifiers, strict=True):
        key = tuple(tokens)
        if not key:
            raise ValueError(f"query {query_id}: candidate {name} has an empty identifier")
        if grammar.eos in key:
            raise ValueError(f"query {query_id}: the identifier of candidate {name} contains eos")
        if key in seen:
            raise ValueError(
                f"query {query_id}: candidates {seen[key]} and {name} have the same identifier: give them texts that "
                "differ"
            )
        if not grammar.separator and key[0] in closes:
            raise ValueError(
                f"query {query_id}: the identifier of candidate {name} starts like a closing tag, "
                "which an empty transcript.separator cannot tell apart; set a separator"
            )
        seen[key] = name
    for key, name in seen.items():
        for cut in range(1, len(key)):
            if key[:cut] in seen and (not grammar.separator or key[cut] in decisive):
                raise ValueError(
                    f"query {query_id}: the identifier of candidate {seen[key[:cut]]} is a prefix of that of "
                    f"{name}, and what follows cannot be told from a separator or tag; "
                    "set another transcript.separator, or transcript.identifier='index'"
                )
