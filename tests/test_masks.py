"""What may come next, against all transcripts there are; what it costs as pools grow."""

import functools
import itertools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit
from plain_parser import plain_parse
from transcript_cases import CASES, EOS, LIMITS, Case, G, each_case, make_query, written

from fgrpo_jax.policies.llm import masks, transcript
from fgrpo_jax.policies.llm.transcript import Grammar

# Names of two tokens only: every token stands for several candidates, used, open or beyond the prefix.
CROWDED = Case(Grammar((20, 21), (20, 22), (20, 33), **LIMITS), ((5, 5), (6, 5, 5), (5, 6), (6, 6, 5), (6, 5, 6), (5,)))


@functools.partial(quick_jit, static_argnums=0)
def parse(grammar, query, actions_BGT):
    """Lists, decisions, and the tokens that are the choices [B,G,T,M]."""
    options = masks.choices(grammar, query)
    lists, _, decided = masks.parse(grammar, query, options, actions_BGT)
    tokens_BGTU = jnp.broadcast_to(options.tokens[:, None, None], (*actions_BGT.shape, options.tokens.shape[1]))
    return lists, decided, masks.due(query, decided.pos, tokens_BGTU)


def everything(grammar, names):
    """All transcripts the grammar allows over one pool."""
    low, high = min(grammar.slate_min, len(names)), min(grammar.slate_max, len(names))
    for n in range(low, high + 1):
        for slate in itertools.permutations(range(len(names)), n):
            for k in range(min(grammar.rank_min, n), min(grammar.rank_max, n) + 1):
                for ranking in itertools.permutations(slate, k):
                    yield tuple(written(grammar, names, slate, ranking))


@pytest.mark.parametrize("name", [*CASES, "crowded"])
def test_the_mask_allows_exactly_what_can_be_completed(name):
    case = CASES.get(name, CROWDED)
    grammar = case.grammar._replace(slate_min=1, slate_max=3, rank_min=1, rank_max=2)
    if name == "fixed":
        grammar = case.grammar
    chosen = {"unseparated": (0, 1, 4), "crowded": range(6)}.get(name, range(3))
    names = [case.names[c] for c in chosen]
    valid = sorted(everything(grammar, names))
    length = grammar.length(len(names), max(map(len, names)))
    assert max(map(len, valid)) <= length
    actions = np.full((1, len(valid), length), EOS, np.int32)
    for g, tokens in enumerate(valid):
        actions[0, g, : len(tokens)] = tokens
    lists, decided, choices = jax.device_get(parse(grammar, make_query([names]), actions))
    assert (lists.outcome == 0).all()
    follows = {}
    for tokens in valid:
        for t in range(len(tokens)):
            follows.setdefault(tokens[:t], set()).add(tokens[t])
    for g, tokens in enumerate(valid):
        for t in range(length):
            allowed = choices[0, g, t][decided.allowed[0, g, t]].tolist()
            assert len(allowed) == len(set(allowed))
            assert set(allowed) == (follows[tokens[:t]] if t < len(tokens) else {EOS}), (tokens, t)
            taken = decided.taken[0, g, t]
            assert decided.allowed[0, g, t, taken] and choices[0, g, t, taken] == actions[0, g, t]


@functools.partial(quick_jit, static_argnums=(0, 2, 3))
def walk(grammar, query, group, length, key):
    """Uniform choices under the mask: actions and the least number of choices met."""
    options = masks.choices(grammar, query)

    def step(state, key):
        mask = masks.allowed(grammar, query, options, state)
        pick = jax.random.categorical(key, jnp.where(mask, 0.0, -jnp.inf))
        token = jnp.take_along_axis(masks.due_tokens(grammar, query, state), pick[..., None], -1)[..., 0]
        state, _ = transcript.advance(grammar, query, state, token)
        return state, (token, mask.sum(-1))

    state, (tokens, n_allowed) = jax.lax.scan(
        step, transcript.start(grammar, query, group), jax.random.split(key, length)
    )
    return jnp.moveaxis(tokens, 0, -1), transcript.finish(state), n_allowed.min()


@each_case
def test_random_walks_under_the_mask_end_well(case):
    query = make_query(case.pools)
    length = case.grammar.length(*query.identifiers.shape[1:])
    tokens, lists, least = jax.device_get(walk(case.grammar, query, G, length, jax.random.key(0)))
    assert least >= 1
    assert (lists.outcome == 0).all()
    for b, names in enumerate(case.pools):
        for g in range(G):
            assert plain_parse(case.grammar, names, tokens[b, g])[2] == "ok"


# --------------------------------------------------------------------- what it costs


def arrays(jaxpr):
    """Every array that a program makes, those inside its loops and branches too."""
    for equation in jaxpr.eqns:
        yield from (var.aval for var in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from arrays(inner)


def cost(n_candidates, width):
    """(largest array, FLOPs of a token) of a pool's choices and masks."""
    grammar = CASES["characters"].grammar
    names = np.random.default_rng(0).integers(5, 15, (2, n_candidates, width))
    query = make_query([[tuple(name) for name in pool] for pool in names.tolist()])

    def once(query):
        return masks.choices(grammar, query), transcript.start(grammar, query, 3)

    def token(query, options, state):
        of_tokens = jnp.broadcast_to(options.tokens[:, None], (2, 3, options.tokens.shape[1]))
        return masks.allowed(grammar, query, options, state), masks.due(query, state.pos, of_tokens)

    start = jax.eval_shape(once, query)
    programs = jax.make_jaxpr(once)(query), jax.make_jaxpr(token)(query, *start)
    largest = max(array.size for program in programs for array in arrays(program.jaxpr))
    return largest, quick_jit(token).lower(query, *start).compile().cost_analysis()["flops"]


def test_costs_grow_in_proportion_to_the_tokens_of_the_pool():
    """Not with their square: pools of a hundred passages named by sixteen tokens are to fit."""
    for small, large in (((6, 4), (24, 4)), ((6, 4), (6, 16))):
        (size, flops), (more_size, more_flops) = cost(*small), cost(*large)
        assert 3 * size < more_size <= 4 * size, (size, more_size)
        assert more_flops <= 4 * flops, (flops, more_flops)
