"""The grammars that an export gives other engines: all lists of a pool, each once, and no others."""

import json
import re

import numpy as np
import pytest
from bpe import train_bpe
from hypothesis import given, settings
from hypothesis import strategies as st
from test_serving import engine, engine_tokenizer
from tiny import changed, tiny_config

from fgrpo_jax.config import TranscriptConfig
from fgrpo_jax.policies.llm import exported, serving
from fgrpo_jax.policies.llm.policy import make_grammar


def said_of(separator, lengths, identifier="index"):
    """What ranking.json says of a transcript, for a tokenizer of single bytes."""
    tokenizer = train_bpe(["bytes"], 262)
    config = changed(
        tiny_config("", "", ""),
        {"transcript": TranscriptConfig(identifier, True, "(", separator, "]", ")", *lengths)},
    )
    config = changed(config, {"data.prompt_buckets": (8,)})
    return exported.describe(config, make_grammar(config, tokenizer), "qa", ""), tokenizer


def every(after, eos, so_far=()):
    """All transcripts that a function of the tokens so far allows."""
    for token in after(so_far):
        if token == eos:
            yield (*so_far, token)
        else:
            yield from every(after, eos, (*so_far, token))


CASES = [(",", (2, 3, 1, 2)), (",", (1, 3, 1, 3)), ("", (1, 2, 1, 1)), (", ", (5, 6, 2, 3))]


@pytest.mark.parametrize("separator, lengths", CASES)
def test_what_is_allowed_is_every_list_once(separator, lengths):
    """Counted: slates without repetition, and rankings of them, within the limits clamped to pool and slate."""
    from math import perm

    said, tokenizer = said_of(separator, lengths, "text")
    texts = ["a", "b", "c"] + ["ab"] * bool(separator)  # one name begins another
    n, (slate_min, slate_max, rank_min, rank_max) = len(texts), lengths
    expected = sum(
        perm(n, s) * perm(s, r)
        for s in range(min(slate_min, n), min(slate_max, n) + 1)
        for r in range(min(rank_min, s), min(rank_max, s) + 1)
    )
    pattern = re.compile(serving.regex(said, texts))
    found, lists = [*every(serving.allowed(said, texts, tokenizer), said["transcript"]["eos"])], set()
    for tokens in found:
        text = tokenizer.decode(tokens[:-1])
        assert pattern.fullmatch(text) and not pattern.fullmatch(text + ")") and not pattern.fullmatch(text[:-1])
        slate, ranking = serving.lists(said, texts, tokenizer, tokens)
        assert set(ranking) <= set(slate) and len(set(slate)) == len(slate)
        lists.add((*slate, -1, *ranking))
    assert len(lists) == len(found) == expected


@pytest.mark.parametrize("separator, lengths", CASES)
def test_llguidance_reads_the_grammars(separator, lengths):
    """At every token: Lark allows what `allowed` does; regex and EBNF all of it, and repeats."""
    llguidance = engine()

    said, tokenizer = said_of(separator, lengths, "text")
    texts = ["a", "b", "c"] + ["ab"] * bool(separator)
    vocabulary = engine_tokenizer(tokenizer)
    after, eos = serving.allowed(said, texts, tokenizer), said["transcript"]["eos"]
    grammars = {"lark": serving.lark(said, texts, tokenizer)}
    grammars["regex"] = llguidance.LLMatcher.grammar_from_regex(serving.regex(said, texts))
    grammars["ebnf"] = llguidance.grammar_from("gbnf", serving.ebnf(said, texts))
    for name, grammar in grammars.items():
        matcher = llguidance.LLMatcher(vocabulary, grammar)
        assert not matcher.is_error(), matcher.get_error()

        def check(so_far, matcher):
            mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            found = set(np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist())
            assert (found == set(after(so_far))) if name == "lark" else (found >= set(after(so_far))), (name, so_far)
            for token in after(so_far)[:2]:
                if token != eos:
                    deeper = matcher.deep_copy()
                    assert deeper.consume_token(token)
                    check((*so_far, token), deeper)

        check((), matcher)
    repeated = tokenizer.encode("b" + separator + "b", add_special_tokens=False)
    for name, taken in (("lark", False), ("regex", True), ("ebnf", True)):
        assert llguidance.LLMatcher(vocabulary, grammars[name]).consume_tokens(repeated) == taken


@pytest.mark.parametrize("lengths", [(2, 3, 1, 2), (1, 3, 2, 3), (4, 4, 2, 2)])
def test_the_grammars_in_the_file_are_those_of_a_full_pool(lengths):
    said, _ = said_of(" > ", lengths, "text")
    texts = [f"a.{n}" for n in range(6)]
    names = "|".join(text.replace(".", "\\.") for text in texts)
    assert said["regex"].replace(serving.ITEM, names) == serving.regex(said, texts)
    assert said["ebnf"].replace(serving.ITEM, " | ".join(f'"{text}"' for text in texts)) == serving.ebnf(said, texts)


@settings(deadline=None, max_examples=60)
@given(text=st.text(r"a.\[](){}*+?|^$\"-/", min_size=1, max_size=6))
def test_names_are_escaped(text):
    said, _ = said_of(",", (1, 1, 1, 1), "text")
    assert re.fullmatch(serving.regex(said, [text]), f"{text}]{text})")
    assert json.loads(serving._quoted(text)) == text


def test_pools_that_no_grammar_can_tell_apart_are_refused():
    said, tokenizer = said_of(",", (1, 1, 1, 1), "text")
    with pytest.raises(ValueError, match="the same identifier"):
        serving.allowed(said, ["a", "a "], tokenizer)
    with pytest.raises(ValueError, match="65 candidates; the grammar can hold 64"):
        serving.lark(said, [str(n) for n in range(65)], tokenizer)
    for tokens, message in (([6], "is not allowed there"), ([], "does not end")):
        with pytest.raises(ValueError, match=message):
            serving.lists(said, ["a", "b"], tokenizer, tokens)
