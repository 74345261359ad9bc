"""The language model as a system: see policies/__init__.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fgrpo_jax.config import Config, StageConfig
from fgrpo_jax.data.datasets import Dataset
from fgrpo_jax.policies.llm import buckets, fitting
from fgrpo_jax.policies.llm.encode import prompt_tokens
from fgrpo_jax.policies.llm.files import has_tokenizer, keeping_beginning, load_tokenizer, make_spec
from fgrpo_jax.policies.llm.policy import make
from fgrpo_jax.policies.llm.prompted import unprompted
from fgrpo_jax.policies.llm.validation import problems
from fgrpo_jax.types import RankingExample
from fgrpo_jax.types_of_policies import Policy, Selection

__all__ = ["REWARDS", "policies", "problems", "selected", "selections", "unprompted"]

REWARDS = frozenset()


def policies(config: Config, dataset: Dataset | None, run_dir: Path) -> dict[str, Policy]:
    """The one policy of a language model's run, under the name that its stages have by default.

    dataset: None for a run that has its tokenizer, where no query is to be encoded.
    Raises ConfigError when tokenizer, transcript and model do not fit each other, DataError for a
    catalogue that cannot be a vocabulary, ModelFilesError for a checkpoint that cannot be read.
    """
    tokenizer = load_tokenizer(config, dataset, run_dir)
    config = keeping_beginning(config, tokenizer, run_dir)
    spec = make_spec(config.model, len(tokenizer), run_dir)
    if config.model.checkpoint:
        fitting.check_size(config, tokenizer, spec.vocab_size)
        if not has_tokenizer(run_dir):
            fitting.check_own(config, tokenizer)
    kind, instruction = (dataset.kind, dataset.instruction) if dataset else ("", "")
    used = buckets.resolve(config, prompt_lengths(config, tokenizer, kind, instruction), dataset, run_dir)
    policy = make(used, spec, tokenizer, kind, instruction, run_dir)
    if used != config:
        policy = policy._replace(files=buckets.recorded(policy.files, used.data.prompt_buckets))
    return {StageConfig().policy: policy}


def prompt_lengths(config: Config, tokenizer, kind: str, instruction: str) -> buckets.Lengths:
    """In tokens, of examples in the order in which they show their candidates."""

    def lengths(examples: Sequence[RankingExample]) -> list[int]:
        return [
            len(ids)
            for ids in prompt_tokens(config, tokenizer, kind, config.prompt.instruction or instruction, examples)
        ]

    return lengths


def selections(config: Config, policies: dict[str, Policy]) -> dict[str, Selection]:
    return {}


def selected(config: Config) -> dict[str, tuple[str, ...]]:
    return {}
