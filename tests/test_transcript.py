"""The state machine against a plain parser that reads one transcript at a time."""

import itertools

import jax
import numpy as np
from helpers import quick_jit
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_parser import plain_parse
from transcript_cases import (
    CASES,
    EOS,
    RANK_CLOSE,
    SEPARATOR,
    SLATE_CLOSE,
    TEXT,
    B,
    G,
    each_case,
    length_of,
    make_query,
    written,
)

from fgrpo_jax.policies.llm import transcript
from fgrpo_jax.policies.llm.transcript import OUTCOMES

render = quick_jit(transcript.render, static_argnums=0)
parse = quick_jit(transcript.parse, static_argnums=0)


def check(case, strings_BG):
    """The state machine reads all strings as the plain parser does; returns the outcomes."""
    length = length_of(case)
    actions = np.full((B, G, length), EOS, np.int32)
    for b, strings in enumerate(strings_BG):
        for g, tokens in enumerate(strings):
            actions[b, g, : len(tokens)] = tokens[:length]
    lists, labels, _ = jax.device_get(parse(case.grammar, make_query(case.pools), actions))
    seen = []
    for b, names in enumerate(case.pools):
        for g in range(G):
            slate, ranking, outcome, label = plain_parse(case.grammar, names, actions[b, g])
            got = (
                [c for c in lists.slate[b, g].tolist() if c >= 0],
                [c for c in lists.ranking[b, g].tolist() if c >= 0],
                OUTCOMES[lists.outcome[b, g]].name,
                labels[b, g].tolist(),
            )
            assert got == (slate, ranking, outcome, label), f"names {names}, tokens {actions[b, g].tolist()}"
            seen.append(outcome)
    return seen


# --------------------------------------------------------------------- equal to the plain parser


def nearly_valid(case, names, rng):
    """A transcript of lists that often break a rule, changed in up to three places."""
    g = case.grammar
    slate = rng.choice(len(names), rng.integers(1, g.slate_max + 2), replace=bool(rng.random() < 0.2) or len(names) < 6)
    if rng.random() < 0.7:
        slate = list(dict.fromkeys(slate.tolist()))
    ranking = rng.permutation(slate)[: rng.integers(1, g.rank_max + 2)].tolist()
    if rng.random() < 0.7:
        ranking = list(dict.fromkeys(ranking))
    if rng.random() < 0.2:
        ranking[rng.integers(len(ranking))] = int(rng.integers(len(names)))
    tokens = written(g, names, slate, ranking)
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        at, other = rng.integers(len(tokens), size=2)
        change = rng.integers(6)
        if change == 0:
            del tokens[at]
        elif change == 1:
            tokens.insert(at, tokens[at])
        elif change == 2:
            tokens[at], tokens[other] = tokens[other], tokens[at]
        elif change == 3:
            tokens = tokens[: max(1, at)]
        elif change == 4:
            tokens[at:at] = [int(rng.choice(case.alphabet))]
        else:
            tokens[at] = int(rng.choice(case.alphabet))
        tokens = tokens or [EOS]
    if rng.random() < 0.2:  # never ends: truncated
        tokens = [t for t in tokens if t != EOS] + [TEXT] * length_of(case)
    if rng.random() < 0.1:
        tokens = tokens[:-1] + rng.choice(case.alphabet, 3).tolist() + [EOS]
    return tokens


@each_case
def test_mutated_transcripts_read_as_by_the_plain_parser(case):
    rng, seen = np.random.default_rng(0), []
    for _ in range(5):
        seen += check(case, [[nearly_valid(case, names, rng) for _ in range(G)] for names in case.pools])
    assert seen.count("ok") > 50 and len(set(seen)) >= 11  # the strings are worth reading


@each_case
@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_random_strings_read_as_by_the_plain_parser(case, data):
    string = st.lists(st.sampled_from(case.alphabet), max_size=length_of(case))
    check(case, [data.draw(st.lists(string, max_size=8)) for _ in range(B)])


# --------------------------------------------------------------------- every outcome, by hand

A, BB, C, D = range(4)  # candidates of the case "characters"
SEP, CLOSE, END = list(SEPARATOR), list(SLATE_CLOSE), list(RANK_CLOSE)
N = [list(name) for name in CASES["characters"].names]
SLATE = N[A] + SEP + N[BB] + CLOSE
BY_HAND = {
    "ok": SLATE + N[BB] + END + [EOS],
    "slate_empty": CLOSE + N[A] + END + [EOS],
    "slate_duplicate": N[A] + SEP + N[BB] + SEP + N[A] + CLOSE,
    "slate_out_of_pool": N[A] + SEP + [5, 5, 9] + CLOSE,
    "slate_too_short": N[A] + CLOSE + N[A] + END + [EOS],
    "slate_too_long": N[A] + SEP + N[BB] + SEP + N[C] + SEP + N[D] + SEP + [5, 8, 8, 9] + CLOSE,
    "slate_missing_tag": N[A] + SEP + N[BB] + [EOS],
    "slate_truncated": N[A] + SEP + N[BB] + SEP + N[C] + SEP + N[D] + SEP + [5, 8, 8],
    "rank_empty": SLATE + END + [EOS],
    "rank_duplicate": SLATE + N[A] + SEP + N[A] + END + [EOS],
    "rank_out_of_pool": SLATE + [TEXT] + END + [EOS],
    "rank_not_in_slate": SLATE + N[C] + END + [EOS],
    "rank_too_short": SLATE + N[A] + END + [EOS],
    "rank_too_long": N[A] + SEP + N[BB] + SEP + N[C] + CLOSE + N[A] + SEP + N[BB] + SEP + N[C] + END + [EOS],
    "rank_missing_tag": SLATE + N[A] + CLOSE + [EOS],
    "rank_truncated": N[A] + SEP + N[BB] + SEP + N[C] + CLOSE + N[BB] + SEP + N[A][:-1],
    "trailing_text": SLATE + N[A] + END + [TEXT, EOS],
}


def test_every_outcome_by_hand():
    case = CASES["characters"]
    fifth = (*case.names[:3], (5, 8, 9), (5, 8, 8, 9))
    query = make_query([fifth])
    exactly_two = case.grammar._replace(rank_min=2, rank_max=2)
    cut, of_two = ("slate_truncated", "rank_truncated"), ("rank_too_short", "rank_too_long")
    rest = [outcome.name for outcome in OUTCOMES if outcome.name not in cut + of_two]
    assert BY_HAND.keys() == {outcome.name for outcome in OUTCOMES}
    for grammar, outcomes in ((case.grammar, cut), (exactly_two, of_two), (case.grammar, rest)):
        length = max(len(BY_HAND[outcome]) for outcome in outcomes)
        actions = np.full((1, len(outcomes), length), EOS, np.int32)
        for g, outcome in enumerate(outcomes):
            actions[0, g, : len(BY_HAND[outcome])] = BY_HAND[outcome]
        lists, _, _ = parse(grammar, query, actions)
        for g, outcome in enumerate(outcomes):
            assert OUTCOMES[int(lists.outcome[0, g])].name == outcome
            assert plain_parse(grammar, fifth, actions[0, g].tolist())[2] == outcome


def test_labels_and_lists_of_a_broken_ranking():
    """The slate of a transcript whose ranking breaks is kept; the breaking token is trained."""
    case = CASES["characters"]
    tokens = SLATE + N[A] + SEP + N[A] + END + [EOS]
    query = make_query([case.names])
    lists, labels, _ = parse(case.grammar, query, np.array([[tokens]], np.int32))
    assert lists.slate[0, 0].tolist() == [A, BB, -1, -1]
    assert lists.ranking[0, 0].tolist() == [A, -1, -1]
    # [1] may go on as [12] until its last token, so the second [1] is complete at "]"
    assert labels[0, 0].tolist() == [1] * len(SLATE) + [2] * (2 * len(N[A]) + len(SEP)) + [0] * (len(END) + 1)


# --------------------------------------------------------------------- writing


@each_case
def test_what_is_written_reads_back(case):
    g, rng = case.grammar, np.random.default_rng(0)
    slate = np.full((B, G, g.slate_max), -1, np.int32)
    ranking = np.full((B, G, g.rank_max), -1, np.int32)
    for b, names in enumerate(case.pools):
        for i in range(G):
            n = rng.integers(min(g.slate_min, len(names)), min(g.slate_max, len(names)) + 1)
            k = rng.integers(min(g.rank_min, n), min(g.rank_max, n) + 1)
            slate[b, i, :n] = rng.permutation(len(names))[:n]
            ranking[b, i, :k] = rng.permutation(slate[b, i, :n])[:k]
    query = make_query(case.pools)
    actions, named = jax.device_get(render(g, query, slate, ranking))
    assert actions.shape[-1] == g.length(*query.identifiers.shape[1:])
    padded = np.pad(actions, ((0, 0), (0, 0), (0, length_of(case) - actions.shape[-1])), constant_values=EOS)
    lists, _, _ = jax.device_get(parse(g, query, padded))
    assert (lists.outcome == 0).all()
    np.testing.assert_array_equal(lists.slate, slate)
    np.testing.assert_array_equal(lists.ranking, ranking)
    for b, names in enumerate(case.pools):
        for i in range(G):
            items = [c for c in slate[b, i] if c >= 0], [c for c in ranking[b, i] if c >= 0]
            tokens = written(g, names, *items)
            assert actions[b, i].tolist() == tokens + [EOS] * (actions.shape[-1] - len(tokens))
            of_items = [t for c in itertools.chain(*items) for t in names[c]]
            assert actions[b, i][named[b, i] >= 0].tolist() == of_items
            assert named[b, i][named[b, i] >= 0].tolist() == [c for c in itertools.chain(*items) for _ in names[c]]
