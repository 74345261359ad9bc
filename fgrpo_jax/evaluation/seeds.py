"""Compare two methods over several seeds, from the evaluations their runs wrote.

    python -m fgrpo_jax.evaluation.seeds --a runs/f0:rl runs/f1:rl runs/f2:rl --b runs/f0:sft runs/f1:sft runs/f2:sft

The i-th run of `a` is paired with the i-th of `b`, and every query with itself. The score of
a query is its mean over seeds; the 95 % interval of the difference is a percentile bootstrap
over queries, so it is about the queries and not about seeds: how much those vary is the
standard deviation printed beside each mean.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from fgrpo_jax.config import ConfigError
from fgrpo_jax.config_files import config_of_run
from fgrpo_jax.evaluation.evaluate import resampled_means
from fgrpo_jax.files import path_of, read_json

METRICS = ("ndcg@5", "recall@1", "recall@3", "recall@5", "mrr", "slate_recall")


def read(entry: str, split: str, metrics: tuple[str, ...], skip: int = 0) -> dict[str, list[float]]:
    """Query id -> metrics of `RUN_DIR:METHOD`, without the first `skip`.

    Raises ConfigError for what was not evaluated.
    """
    run_dir, _, method = entry.rpartition(":")
    path = path_of(run_dir) / "eval" / split / "per_query.jsonl"
    if not run_dir or not path.is_file():
        raise ConfigError(f"{entry}: give RUN_DIR:METHOD of an evaluated run; there is no {path}")
    found = {}
    for row in _rows(path)[skip:]:
        if method not in row["methods"]:
            raise ConfigError(f"{entry}: {path} has no method {method!r}, only {', '.join(row['methods'])}")
        scores = row["methods"][method]["metrics"]
        if missing := [name for name in metrics if name not in scores]:
            raise ConfigError(f"{entry}: {path} has no {', '.join(missing)}, only {', '.join(scores)}")
        found[row["query_id"]] = [scores[name] for name in metrics]
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}): evaluate the run again, which writes it") from None


def fields_of(run_dir: str) -> dict[str, Any]:
    """Every field of a run's configuration, by its name with dots; lists as JSON. Raises ConfigError."""
    return _flat(read_json(config_of_run(path_of(run_dir))))


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: json.dumps(value) if isinstance(value, list) else value}
    return {key: one for part, of in value.items() for key, one in _flat(of, f"{name}.{part}".lstrip(".")).items()}


def same_queries(evaluated: Mapping[str, Collection[str]]) -> list[str]:
    """The ids, sorted, of the queries that all of these were evaluated on, by `RUN_DIR:METHOD`.

    Raises ConfigError where one was evaluated on others than the first.
    """
    first, *others = evaluated
    ids = set(evaluated[first])
    for other in others:
        if differing := ids.symmetric_difference(evaluated[other]):
            raise ConfigError(
                f"{first} and {other} were not evaluated on the same queries ({len(ids):,} and "
                f"{len(evaluated[other]):,}; {len(differing):,} of one alone, as {min(differing)!r}): evaluate both "
                "runs again on the same data (eval.py, --split and --eval.queries), or leave one out"
            )
    return sorted(ids)


def compare(
    a: tuple[str, ...],
    b: tuple[str, ...],
    split: str = "validation",
    metrics: tuple[str, ...] = METRICS,
    skip: int = 0,
    resamples: int = 2000,
    seed: int = 0,
) -> str:
    """A table: mean and standard deviation over seeds of both, and their paired difference, in percent.

    Args:
        a: evaluated methods, `RUN_DIR:METHOD`, one for each seed.
        b: as many, paired with those of `a` in order.
        split: the split they were evaluated on.
        metrics: columns of their per_query.jsonl.
        skip: queries left out from the start of the split, as the eval.train_queries that a
            checkpoint was chosen on.
        resamples: bootstrap resamples behind the interval.
        seed: of the bootstrap.
    """
    if len(a) != len(b) or not a:
        raise ConfigError(f"{len(a)} runs in a and {len(b)} in b: give as many of both, paired by seed")
    sides = [[read(entry, split, metrics, skip) for entry in side] for side in (a, b)]
    ids = same_queries({entry: run for names, side in zip((a, b), sides) for entry, run in zip(names, side)})
    a_RQM, b_RQM = (100 * np.array([[run[i] for i in ids] for run in side]) for side in sides)
    difference_QM = (a_RQM - b_RQM).mean(0)
    low, high = np.percentile(resampled_means(difference_QM, resamples, seed), (2.5, 97.5), axis=0)
    lines = [f"{len(a)} seeds, {len(ids)} queries, percent", f"{'':14}{'a':>14}{'b':>14}   a - b"]
    for m, name in enumerate(metrics):
        cells = [f"{x[..., m].mean():.1f} ±{spread(x[..., m].mean(1)):.1f}" for x in (a_RQM, b_RQM)]
        paired = f"{difference_QM[:, m].mean():+.2f} [{low[m]:+.2f}, {high[m]:+.2f}]"
        lines.append(f"{name:14}{cells[0]:>14}{cells[1]:>14}   {paired}")
    return "\n".join(lines)


def interval(score_Q: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """The 95 % percentile bootstrap of the mean over queries."""
    low, high = np.percentile(resampled_means(score_Q[:, None], resamples, seed), (2.5, 97.5))
    return float(low), float(high)


def spread(means: np.ndarray) -> float:
    """Standard deviation over seeds; 0 of one."""
    return float(means.std(ddof=1)) if len(means) > 1 else 0.0


def command(function: Callable[..., str], description: str) -> None:
    """A program that prints what the function says of the flags; exit code 2 where it cannot."""
    try:
        print(tyro.cli(function, description=description))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    command(compare, __doc__)
