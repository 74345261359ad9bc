"""What can be said of a data set before anything is trained: sizes, baselines, and what is suspicious of it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from fgrpo_jax.config import RunConfig
from fgrpo_jax.data.batches import evaluation_examples
from fgrpo_jax.data.datasets import Dataset, Split
from fgrpo_jax.evaluation.evaluate import run_baselines, score
from fgrpo_jax.evaluation.suspicions import find

QUERIES = 1000  # judged at most, evenly spaced
BASELINES = ("random", "popularity", "covisitation", "covisitation_ordered", "retrieval", "bm25")


def sizes(dataset: Dataset) -> list[str]:
    """A table: queries, pools, relevant candidates, histories and missed items of every split."""
    head = f"{'split':12}{'queries':>10}  {'pool':>12}  {'relevant':>12}  {'none':>8}  {'missed':>8}  {'history':>12}"
    return [head, *(_row(name, split) for name, split in dataset.splits.items())]


def _row(name: str, split: Split) -> str:
    pool, relevant, history, missed = [], [], [], 0
    for example in split:
        pool.append(len(example.candidates))
        relevant.append(sum(gain > 0 for gain in example.relevance))
        history.append(len(example.history))
        missed += len(example.missed)
    lost = missed / max(1, missed + sum(relevant))
    none = f"{sum(not n for n in relevant) / len(relevant):.1%}"
    return (
        f"{name:12}{len(split):>10,}  {_range(pool):>12}  {_range(relevant):>12}  {none:>8}  {lost:>8.1%}  "
        f"{_range(history):>12}"
    )


def _range(values: Sequence[int]) -> str:
    """Least, median and most."""
    low, middle, high = min(values), int(np.median(values)), max(values)
    return str(low) if low == high else f"{low}-{middle}-{high}"


def judged_split(config: RunConfig, dataset: Dataset) -> str:
    """validation, or where there is none the split that evaluations read, or the last one."""
    names = [name for name in ("validation", config.eval.split) if name in dataset.splits]
    return names[0] if names else list(dataset.splits)[-1]


def _chosen(queries: int) -> list[int]:
    return np.unique(np.linspace(0, queries - 1, QUERIES).astype(int)).tolist()


def baselines(config: RunConfig, dataset: Dataset) -> tuple[list[str], dict[str, float], str]:
    """A table of baselines and how long each took; their scores by name, and what these are."""
    split, k = judged_split(config, dataset), max(config.eval.cutoffs)
    every = evaluation_examples(dataset, config, split)
    examples = [every[i] for i in _chosen(len(every))]
    train, found, skipped = dataset.splits.get("train", ()), {}, []
    lines = [
        f"{len(examples):,} queries of {split}, percent",
        f"{'':24}{f'ndcg@{k}':>10}{f'recall@{k}':>11}{'seconds':>9}",
    ]
    for name in BASELINES:
        started = time.perf_counter()
        predicted, left_out = run_baselines(
            (name,), train, dataset.catalogue, dataset.kind, config.seed, examples, *config.limits()
        )
        if name in left_out:
            skipped.append(f"{name}: {left_out[name]}")
            continue
        means = {metric: float(value.mean()) for metric, value in score(examples, predicted[name], (k,)).items()}
        found[name] = means[f"ndcg@{k}"]
        took = time.perf_counter() - started
        lines.append(f"{name:24}{100 * found[name]:>10.1f}{100 * means[f'recall@{k}']:>11.1f}{took:>9.1f}")
    return lines + skipped, found, f"ndcg@{k}"


def suspicions(config: RunConfig, dataset: Dataset, scores: dict[str, float], metric: str) -> list[str]:
    """What is suspicious, a line each."""
    split = dataset.splits[judged_split(config, dataset)]
    rows = split.rows(_chosen(len(split)))
    return [f"{name}: {text}" for name, text in find(dataset, rows, scores, metric)]
