"""Pools and grammars that the tests of transcripts share."""

import itertools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from fgrpo_jax.policies.llm.query import Query
from fgrpo_jax.policies.llm.transcript import Grammar

EOS, TEXT = 1, 2  # TEXT: a token that occurs in no literal and no name
B, G = 4, 64


class Case(NamedTuple):
    grammar: Grammar
    names: tuple[tuple[int, ...], ...]

    @property
    def pools(self):
        """B pools of different sizes: all names, all but one, two, one."""
        return [self.names, self.names[1:], self.names[-2:], self.names[:1]]

    @property
    def alphabet(self):
        g = self.grammar
        return sorted({*itertools.chain(*self.names), *g.separator, *g.slate_close, *g.rank_close, EOS, TEXT})


LIMITS = dict(eos=EOS, slate_min=2, slate_max=4, rank_min=1, rank_max=3)
SEPARATOR, SLATE_CLOSE, RANK_CLOSE = (20, 21), (30, 31, 32), (30, 31, 33)
CASES = {
    # [1] [2] [12] [3] with one token per character
    "characters": Case(
        Grammar(SEPARATOR, SLATE_CLOSE, RANK_CLOSE, **LIMITS), ((5, 6, 9), (5, 7, 9), (5, 6, 7, 9), (5, 8, 9))
    ),
    # the same with "[1" and "12" as tokens of their own: names of different lengths
    "merged": Case(Grammar((20,), (30, 31), (33,), **LIMITS), ((40, 9), (5, 7, 9), (5, 41, 9), (5, 42))),
    "single": Case(Grammar((), (30,), (33,), **LIMITS), ((5,), (6,), (7,), (8,), (9,))),
    # no separator, names that share beginnings, and tags that begin with the same token
    "unseparated": Case(Grammar((), SLATE_CLOSE, RANK_CLOSE, **LIMITS), ((5, 6), (5, 7, 31), (8, 5), (9,), (6, 30))),
    # every name continues another one
    "prefixes": Case(
        Grammar((20, 21), (30, 31), (33, 34), **LIMITS), ((5,), (5, 6), (5, 6, 7), (6,), (6, 5, 21), (6, 5))
    ),
    # separator and tags share two tokens, and names start with them too
    "trie": Case(
        Grammar((30, 31, 32), (30, 31, 33), (30, 34), **LIMITS), ((30, 31, 32), (31,), (32, 31), (31, 32), (33,))
    ),
    # fixed lengths, as in the defaults of the config
    "fixed": Case(
        Grammar((), (30,), (33,), EOS, slate_min=3, slate_max=3, rank_min=2, rank_max=2), ((5,), (6,), (7,), (8,))
    ),
}  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def make_query(pools):
    most, width = max(map(len, pools)), max(len(name) for pool in pools for name in pool)
    identifiers = np.full((len(pools), most, width), -1, np.int32)
    for b, pool in enumerate(pools):
        for c, name in enumerate(pool):
            identifiers[b, c, : len(name)] = name
    ones = jnp.ones(len(pools), jnp.int32)
    n_candidates = jnp.array([len(pool) for pool in pools], jnp.int32)
    return Query(ones[:, None], ones, jnp.asarray(identifiers), jnp.zeros((len(pools), most)), n_candidates)


def length_of(case):
    """T of the tests: room for a transcript of the greatest length and some text after it."""
    return case.grammar.length(len(case.names), max(map(len, case.names))) + 4


def written(grammar, names, slate, ranking):
    """A transcript from its pieces; nothing is checked."""

    def between(items):
        return [t for i, c in enumerate(items) for t in (*(grammar.separator if i else ()), *names[c])]

    return [*between(slate), *grammar.slate_close, *between(ranking), *grammar.rank_close, grammar.eos]
