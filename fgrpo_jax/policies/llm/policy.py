"""The language model as a policy: an action is a token.

`encode` is the only place where text becomes arrays; what cannot be encoded is refused
there, by query id.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import numpy as np

from fgrpo_jax.config import Config, ConfigError
from fgrpo_jax.data.batches import bucket
from fgrpo_jax.data.datasets import DataError
from fgrpo_jax.models import decoder
from fgrpo_jax.policies.llm import prompts, sampling, transcript
from fgrpo_jax.types import Policy, Query, RankingExample

_REMEMBERED = 100_000  # identifier texts whose token ids are kept


def make_grammar(config: Config, tokenizer) -> transcript.Grammar:
    """The transcript's literals as token ids. Raises ConfigError when they are ambiguous."""
    t = config.transcript

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False)) if text else ()

    if tokenizer.eos_token_id is None:
        raise ConfigError(f"tokenizer {config.tokenizer!r} has no eos token; transcripts end with it")
    grammar = transcript.Grammar(
        separator=ids(t.separator),
        slate_close=ids(t.slate_close),
        rank_close=ids(t.rank_close),
        eos=tokenizer.eos_token_id,
        slate_min=t.slate_min,
        slate_max=t.slate_max,
        rank_min=t.rank_min,
        rank_max=t.rank_max,
    )
    if t.separator and not grammar.separator:
        raise ConfigError("transcript.separator is encoded to no token by this tokenizer: choose another")
    try:
        transcript.check_grammar(grammar)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return grammar


def warn_of_merges(config: Config, tokenizer, example: RankingExample) -> None:
    """Warn where the tokenizer, given a whole transcript, merges across a piece boundary.

    Transcripts are built piece by piece; a model that was never fine-tuned on them prefers
    the merged form, so its unconstrained zero-shot output will break the grammar there. The
    catalogue, in which every piece is a word, only ever reads pieces.
    """
    t = config.transcript
    if config.tokenizer == "catalogue":
        return
    names = prompts.identifier_texts(example, t.identifier)[: t.slate_min]
    ranked = names[: t.rank_min]
    pieces = [t.slate_open]
    for items, close in ((names, t.slate_close), (ranked, t.rank_close)):
        for i, name in enumerate(items):
            pieces += [t.separator] * bool(i and t.separator) + [name]
        pieces.append(close)
    for left, right in zip(pieces, pieces[1:]):
        apart = [*tokenizer.encode(left, add_special_tokens=False), *tokenizer.encode(right, add_special_tokens=False)]
        if tokenizer.encode(left + right, add_special_tokens=False) != apart:
            warnings.warn(
                f"the tokenizer merges {left!r} and {right!r} when they meet; transcripts keep them apart, "
                "which a model not yet fine-tuned does not expect (see transcript.separator and the tags)",
                stacklevel=2,
            )
            return


def make(config: Config, spec: decoder.DecoderSpec, tokenizer, kind: str, instruction: str, group_size: int) -> Policy:
    """The policy for one stage; `kind` and `instruction` describe the data set's prompts."""
    grammar = make_grammar(config, tokenizer)
    sampler = sampling.Sampler(spec, grammar, config.transcript.constrained)

    def rollout(params, frozen, query, key):
        return sampling.sample(sampler, params, query, key, group_size)

    def logprobs(params, frozen, query, rollout):
        return sampling.logprobs(sampler, params, query, rollout)

    def greedy(params, frozen, query):
        return sampling.sample(sampler, params, query, None, 1)

    blank = Query(
        prompt=np.full((1, 1), grammar.eos, np.int32),
        prompt_len=np.ones(1, np.int32),
        identifiers=np.full((1, 1, 1), -1, np.int32),
        relevance=np.zeros((1, 1), np.float32),
        n_candidates=np.ones(1, np.int32),
    )
    encode = functools.partial(
        _encode, config, grammar, tokenizer, kind, config.prompt.instruction or instruction, blank, {}
    )
    return Policy(transcript.OUTCOMES, encode, blank, rollout, logprobs, greedy)


def _encode(
    config: Config, grammar: transcript.Grammar, tokenizer, kind: str, instruction: str,
    blank: Query, known: dict[str, list[int]], examples: Sequence[RankingExample],
) -> Query:  # fmt: skip
    """Arrays of a batch, or of a host's part of one, whose shapes depend on these examples alone.

    Raises DataError naming the query when a prompt fits no bucket, or when the grammar
    cannot tell two candidates apart.
    """
    t = config.transcript
    texts = [prompts.render(e, kind, instruction, t.identifier, t.slate_open) for e in examples]
    tokens = prompts.encode_prompts(tokenizer, texts, config.prompt.chat, [e.query_id for e in examples])
    size = max(bucket(len(ids), config.data.prompt_buckets, e.query_id) for ids, e in zip(tokens, examples))
    names = [_identifiers(grammar, tokenizer, t.identifier, known, e) for e in examples]
    n_candidates = np.array([len(e.candidates) for e in examples], np.int32)
    width = _round_up(max(len(name) for pool in names for name in pool))
    most = _round_up(int(n_candidates.max()))
    prompt = np.full((len(examples), size), blank.prompt)
    identifiers = np.full((len(examples), most, width), blank.identifiers)
    relevance = np.full((len(examples), most), blank.relevance)
    for i, example in enumerate(examples):
        prompt[i, : len(tokens[i])] = tokens[i]
        relevance[i, : n_candidates[i]] = example.relevance
        for j, name in enumerate(names[i]):
            identifiers[i, j, : len(name)] = name
    lengths = np.array([len(ids) for ids in tokens], np.int32)
    return Query(prompt, lengths, identifiers, relevance, n_candidates)


def _identifiers(
    grammar: transcript.Grammar, tokenizer, identifier: str, known: dict[str, list[int]], example: RankingExample
) -> list[list[int]]:
    """Token ids naming each candidate; `known` remembers texts, which recur in most data sets."""
    texts = prompts.identifier_texts(example, identifier)
    if new := [text for text in texts if text not in known]:
        if len(known) > _REMEMBERED:
            known.clear()
            new = texts
        known.update(zip(new, tokenizer(new, add_special_tokens=False)["input_ids"], strict=True))
    names = [known[text] for text in texts]
    try:
        transcript.check_identifiers(grammar, example.query_id, [c for c, _ in example.candidates], names)
    except ValueError as error:
        raise DataError(str(error)) from None
    return names


def _round_up(n: int) -> int:
    """A multiple of 4 from 4 on, so that few array shapes (and programs) occur."""
    return n if n < 4 else -(-n // 4) * 4
