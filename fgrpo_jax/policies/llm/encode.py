"""Queries as arrays: the only place where text becomes token ids.

What cannot be encoded is refused here, by query id.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fgrpo_jax.config import Config
from fgrpo_jax.data.batches import bucket, round_up
from fgrpo_jax.data.datasets import DataError
from fgrpo_jax.policies.llm import prompts, serving, transcript
from fgrpo_jax.policies.llm.query import Query
from fgrpo_jax.types import RankingExample

_REMEMBERED = 100_000  # identifier texts whose token ids are kept
LONGEST_NAME = 256  # tokens: transcripts of a whole batch are as wide as its longest name


def blank(grammar: transcript.Grammar) -> Query:
    """A query of nothing, as numpy arrays [1,...]: what arrays are padded with."""
    return Query(
        prompt=np.full((1, 1), grammar.eos, np.int32),
        prompt_len=np.ones(1, np.int32),
        identifiers=np.full((1, 1, 1), -1, np.int32),
        relevance=np.zeros((1, 1), np.float32),
        n_candidates=np.ones(1, np.int32),
    )


def encode(
    config: Config,
    grammar: transcript.Grammar,
    tokenizer,
    kind: str,
    instruction: str,
    known: dict[str, list[int]],
    examples: Sequence[RankingExample],
) -> Query:
    """Arrays of a batch, or of a host's part of one, whose shapes depend on these examples alone.

    kind, instruction: of the data set's prompts. known: remembers identifiers from call to call.

    Raises DataError naming the query when a prompt fits no bucket, or when the grammar
    cannot tell two candidates apart.
    """
    t = config.transcript
    tokens = prompt_tokens(config, tokenizer, kind, instruction, examples)
    size = max(bucket(len(ids), config.data.prompt_buckets, e.query_id) for ids, e in zip(tokens, examples))
    names = [_identifiers(grammar, tokenizer, t.identifier, known, e) for e in examples]
    n_candidates = np.array([len(e.candidates) for e in examples], np.int32)
    width = round_up(max(t.identifier_width, *(len(name) for pool in names for name in pool)))
    most = round_up(int(n_candidates.max()))
    nothing = blank(grammar)
    prompt = np.full((len(examples), size), nothing.prompt)
    identifiers = np.full((len(examples), most, width), nothing.identifiers)
    relevance = np.full((len(examples), most), nothing.relevance)
    for i, example in enumerate(examples):
        prompt[i, : len(tokens[i])] = tokens[i]
        relevance[i, : n_candidates[i]] = example.relevance
        for j, name in enumerate(names[i]):
            identifiers[i, j, : len(name)] = name
    lengths = np.array([len(ids) for ids in tokens], np.int32)
    return Query(prompt, lengths, identifiers, relevance, n_candidates)


def prompt_tokens(
    config: Config, tokenizer, kind: str, instruction: str, examples: Sequence[RankingExample]
) -> list[list[int]]:
    """Token ids of the examples' prompts. Raises DataError naming the query, see `prompts.encode_prompts`."""
    t = config.transcript
    shown = prompts.shortened(examples, config.prompt.text_tokens, tokenizer)
    texts = [prompts.render(e, kind, instruction, t.identifier, t.slate_open) for e in shown]
    begins = prompts.beginning(config.prompt, tokenizer)
    return prompts.encode_prompts(tokenizer, texts, config.prompt.chat, [e.query_id for e in examples], begins)


def _identifiers(
    grammar: transcript.Grammar, tokenizer, identifier: str, known: dict[str, list[int]], example: RankingExample
) -> list[list[int]]:
    """Token ids naming each candidate; `known` remembers texts, which recur in most data sets."""
    texts = prompts.identifier_texts(example, identifier)
    mine = {text: known.get(text) for text in texts}  # a copy, as another thread may clear what is known
    if new := [text for text, name in mine.items() if name is None]:
        mine.update(zip(new, serving.encoded(new, tokenizer), strict=True))
        if len(known) > _REMEMBERED:
            known.clear()
        known.update((text, mine[text]) for text in new)
    names = [mine[text] for text in texts]
    for (item, _), name in zip(example.candidates, names):
        check_width(example.query_id, item, name)
    try:
        transcript.check_identifiers(grammar, example.query_id, [c for c, _ in example.candidates], names)
    except ValueError as error:
        raise DataError(str(error)) from None
    return names


def check_width(query_id: str, item: str, name: Sequence[int]) -> None:
    """Raises DataError for a name of more than LONGEST_NAME tokens."""
    if len(name) > LONGEST_NAME:
        raise DataError(
            f"query {query_id!r}: the text of candidate {item!r}, which names it, has {len(name):,} tokens, more than "
            f"{LONGEST_NAME}: shorten it, or train with transcript.identifier='index'"
        )
