"""`data.prompt_buckets="auto"`: padded prompt lengths chosen from the data, once for a run, which keeps them.

Shorter buckets are those that hold half and nine tenths of the prompts of SAMPLE training queries, so most padding is
saved with few programs; the largest holds the longest prompt of every split, and that of the longest texts that may
be drawn together (by characters: rare words can have more tokens). A function of data, seed and prompt settings.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from fgrpo_jax.config import Config, ConfigError, StageConfig
from fgrpo_jax.data.batches import evaluation_examples, make_batches
from fgrpo_jax.data.datasets import Dataset
from fgrpo_jax.files import read_json, write_atomically
from fgrpo_jax.types import RankingExample
from fgrpo_jax.types_of_policies import PolicyFiles

SAMPLE, AT_ONCE = 2048, 512  # training queries looked at for the shorter buckets; prompts encoded in one call
QUANTILES = (0.5, 0.9)
CLOSE = 1.15  # a bucket that the next one exceeds by less is left out
_FILE = "prompt_buckets.json"

Lengths = Callable[[Sequence[RankingExample]], list[int]]


def resolve(config: Config, lengths: Lengths, dataset: Dataset | None, run_dir: Path) -> Config:
    """The configuration with buckets in place of "auto": those the run has, or those of the data.

    lengths: of the prompts of examples, in tokens. dataset: None where no query is to be encoded, and "auto" stays.
    Raises ConfigError for a file of the run that holds no buckets.
    """
    if config.data.prompt_buckets != "auto":
        return config
    path = run_dir / _FILE
    if path.is_file():
        buckets = read_json(path, ("prompt_buckets",))["prompt_buckets"]
        if not isinstance(buckets, list) or not buckets or not all(type(size) is int and size > 0 for size in buckets):
            raise ConfigError(f"{path} holds no prompt buckets: restore it, or set data.prompt_buckets")
    elif dataset is None:
        return config
    else:
        buckets = choose(*measure(config, lengths, dataset))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, prompt_buckets=tuple(buckets)))


def recorded(files: PolicyFiles, buckets: Sequence[int]) -> PolicyFiles:
    """The files of a policy, and the buckets that were chosen for it."""

    def save(run_dir: Path) -> None:
        files.save(run_dir)
        if not (run_dir / _FILE).is_file():
            write_atomically(run_dir / _FILE, json.dumps({"prompt_buckets": list(buckets)}) + "\n")

    return files._replace(save=save)


def measure(config: Config, lengths: Lengths, dataset: Dataset) -> tuple[list[int], int]:
    """Prompt lengths of training queries (of the first other split where there are none), and of the longest prompt."""
    whole = dataclasses.replace(config, data=dataclasses.replace(config.data, history_dropout=0.0))
    if "train" in dataset.splits:
        size = min(SAMPLE, sum(dataset.splits["train"].trainable)) or 1
        sample = make_batches(dataset, whole, "prompt_buckets", StageConfig(batch_queries=size)).batch_at(0)
    else:
        sample = evaluation_examples(dataset, whole, next(iter(dataset.splits)))[:SAMPLE]
    found = lengths(sample)
    rows = _every(config, dataset)
    longest = max(found)
    while part := list(itertools.islice(rows, AT_ONCE)):
        longest = max(longest, *lengths(part))
    return found, longest


def _every(config: Config, dataset: Dataset) -> Iterator[RankingExample]:
    """All queries with given pools, and the longest that may be drawn: a long text may have few tokens."""
    newest = config.data.history_max
    for name, split in dataset.splits.items():
        if not (dataset.sampled_negatives and name == "train"):
            yield from (dataclasses.replace(example, history=example.history[-newest:]) for example in split)
    if dataset.sampled_negatives:  # any items may meet
        items = sorted(dataset.catalogue, key=lambda item: len(item[1]), reverse=True)
        pool = tuple(items[: config.data.pool_size])
        yield RankingExample("the longest items", "", pool, (0.0,) * len(pool), tuple(items[:newest]))


def choose(lengths: Sequence[int], longest: int) -> tuple[int, ...]:
    """Ascending sizes, the last of which holds `longest`."""
    wanted = [int(np.quantile(lengths, share, method="inverted_cdf")) for share in QUANTILES]
    sizes = sorted({_round_up(length) for length in (*wanted, longest)})
    return tuple(size for size, larger in zip(sizes, [*sizes[1:], None]) if larger is None or size * CLOSE <= larger)


def _round_up(length: int) -> int:
    """To a multiple of 8, of 64 from 256 on, of 256 from 2,048 on."""
    step = 8 if length <= 256 else 64 if length <= 2048 else 256
    return -(-length // step) * step
