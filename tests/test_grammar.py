"""What a grammar and the identifiers of a pool must be to be told apart."""

import pytest
from transcript_cases import CASES, EOS, SEPARATOR, SLATE_CLOSE, each_case

from fgrpo_jax.policies.llm import transcript

SEPARATED, BARE = CASES["characters"].grammar, CASES["single"].grammar


@pytest.mark.parametrize(
    "grammar, message",
    [
        (SEPARATED._replace(separator=SLATE_CLOSE[:2]), "transcript.separator and transcript.slate_close"),
        (SEPARATED._replace(rank_close=SEPARATOR[:1]), "transcript.separator and transcript.rank_close"),
        (SEPARATED._replace(slate_close=()), "transcript.slate_close is encoded to no token"),
        (SEPARATED._replace(rank_close=()), "transcript.rank_close is encoded to no token"),
        (SEPARATED._replace(rank_close=(30, EOS)), "transcript.rank_close contains eos"),
        (SEPARATED._replace(separator=(EOS,)), "transcript.separator contains eos"),
    ],
)
def test_grammars_refused(grammar, message):
    with pytest.raises(ValueError, match=message):
        transcript.check_grammar(grammar)


@pytest.mark.parametrize(
    "grammar, names, message",
    [
        (SEPARATED, [[5], []], "candidate y has an empty identifier"),
        (SEPARATED, [[5], [5]], "candidates x and y have the same identifier"),
        (SEPARATED, [[5], [6, EOS]], "candidate y contains eos"),
        (SEPARATED, [[5], [5, 20]], "identifier of candidate x is a prefix of that of y"),
        (SEPARATED, [[5, 30, 7], [5]], "identifier of candidate y is a prefix of that of x"),
        (BARE, [[5], [5, 6]], "identifier of candidate x is a prefix of that of y"),
        (BARE, [[5], [30, 6]], "candidate y starts like a closing tag"),
    ],
)
def test_identifiers_refused(grammar, names, message):
    with pytest.raises(ValueError, match=f"query q7: .*{message}"):
        transcript.check_identifiers(grammar, "q7", ["x", "y"], names)


@each_case
def test_the_cases_are_accepted(case):
    transcript.check_grammar(case.grammar)
    transcript.check_identifiers(case.grammar, "q", [str(i) for i in range(len(case.names))], case.names)
