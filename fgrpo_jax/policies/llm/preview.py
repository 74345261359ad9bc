"""What a language model would be shown and would imitate, before anything is trained."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from fgrpo_jax.config import Config, StageConfig
from fgrpo_jax.data.batches import evaluation_examples, make_batches
from fgrpo_jax.data.datasets import Dataset
from fgrpo_jax.policies.llm import buckets, checks, prompts, serving, targets, tokenizers
from fgrpo_jax.policies.llm.encode import encode
from fgrpo_jax.policies.llm.policy import make_grammar
from fgrpo_jax.policies.llm.system import prompt_lengths
from fgrpo_jax.types import RankingExample

_AT_ONCE = 4096  # texts that are encoded in one call


class Preview(NamedTuple):
    """lengths: of sampled training prompts, in tokens. longest: that may occur. buckets: that "auto" chooses.
    widest: tokens of the longest identifier. cut, of: texts that prompt.text_tokens cuts, of how many different ones.
    shown: prompts and their target transcripts, as text."""

    lengths: list[int]
    longest: int
    buckets: tuple[int, ...]
    widest: int
    cut: int
    of: int
    shown: list[tuple[str, str]]


def preview(config: Config, dataset: Dataset, count: int) -> Preview:
    """Raises ConfigError and DataError as the start of a training does: for a tokenizer, a text, a pool."""
    tokenizer = tokenizers.load(config.tokenizer, dataset, config.transcript, config.prompt)
    lengths, longest = buckets.measure(
        config, prompt_lengths(config, tokenizer, dataset.kind, dataset.instruction), dataset
    )
    if config.transcript.identifier == "text":
        checks.check_names(dataset, tokenizer)
    widest = _widest(config.transcript.identifier, dataset, tokenizer)
    shown = examples_of(config, dataset, count, tokenizer)
    cut, of = _cut(config.prompt.text_tokens, dataset, tokenizer)
    return Preview(lengths, longest, buckets.choose(lengths, longest), widest, cut, of, shown)


def _widest(identifier: str, dataset: Dataset, tokenizer: Any) -> int:
    """Of the pools of all splits, and where negatives are drawn of the catalogue."""
    texts = {text for _, text in dataset.catalogue} if identifier == "text" and dataset.sampled_negatives else set()
    for split in dataset.splits.values():
        for example in split:
            texts.update(prompts.identifier_texts(example, identifier))
    return max(map(len, serving.encoded(sorted(texts), tokenizer)))


def _cut(most: int, dataset: Dataset, tokenizer: Any) -> tuple[int, int]:
    """Different texts of candidates and histories, of all splits and the catalogue: those that are cut, and all."""
    if not most:
        return 0, 0
    texts = {text for _, text in dataset.catalogue}
    for split in dataset.splits.values():
        for example in split:
            texts.update(text for _, text in (*example.candidates, *example.history))
    found, count = sorted(texts), 0
    for start in range(0, len(found), _AT_ONCE):
        part = found[start : start + _AT_ONCE]
        count += sum(a != b for a, b in zip(part, serving.beginnings(part, most, tokenizer), strict=True))
    return count, len(found)


def examples_of(config: Config, dataset: Dataset, count: int, tokenizer: Any = None) -> list[tuple[str, str]]:
    """Prompts and their target transcripts, of some queries alone. tokenizer: the configured one, if it is at hand."""
    tokenizer = tokenizer or tokenizers.load(config.tokenizer, dataset, config.transcript, config.prompt)
    instruction = config.prompt.instruction or dataset.instruction
    if "train" in dataset.splits:
        examples = make_batches(dataset, config, "preview", StageConfig(batch_queries=count)).batch_at(0)
    else:
        examples = evaluation_examples(dataset, config, next(iter(dataset.splits)))[:count]
    longest = max(prompt_lengths(config, tokenizer, dataset.kind, dataset.instruction)(examples))
    used = dataclasses.replace(config, data=dataclasses.replace(config.data, prompt_buckets=(longest,)))
    grammar = make_grammar(config, tokenizer)
    query = encode(used, grammar, tokenizer, dataset.kind, instruction, {}, examples)
    slate, ranking = targets.target_lists(grammar, query, jax.random.key(config.seed), config.sft.target.fill)
    examples = prompts.shortened(examples, config.prompt.text_tokens, tokenizer)
    return [
        (
            prompts.render(e, dataset.kind, instruction, config.transcript.identifier, config.transcript.slate_open),
            _transcript(config, e, np.asarray(slate[i, 0]), np.asarray(ranking[i, 0])),
        )
        for i, e in enumerate(examples)
    ]


def _transcript(config: Config, example: RankingExample, slate_N: np.ndarray, ranking_K: np.ndarray) -> str:
    """What follows the prompt."""
    t = config.transcript
    names = prompts.identifier_texts(example, t.identifier)
    # Names of the catalogue are tokens, and stand beside each other with nothing between them.
    between = t.separator or " | "
    slate, ranking = (between.join(names[i] for i in items if i >= 0) for items in (slate_N, ranking_K))
    return f"{slate}{t.slate_close}{ranking}{t.rank_close}"
