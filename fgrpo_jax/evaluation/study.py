"""One metric over several runs, by a field of their configuration: a table, and a plot.

    python -m fgrpo_jax.evaluation.study --runs runs/w16 runs/w32 runs/w64 --methods goalrank mg_e_3 \
        --x network.hidden_size --metric ndcg@6 --split test --plot widths.png

Runs of one value of `x` are its seeds: the score of a query is its mean over them, and what else they differ in
is noted. A method is shown of the runs that have it. Every value is compared with the first one, query by query
(95 % percentile bootstrap over queries, as in fgrpo_jax.evaluation.seeds), and the spread over seeds stands beside
each mean.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fgrpo_jax.config import ConfigError
from fgrpo_jax.config_files import config_of_run
from fgrpo_jax.evaluation import figures
from fgrpo_jax.evaluation.seeds import command, fields_of, interval, read, same_queries, spread
from fgrpo_jax.files import path_of, read_json

COSTS = ("parameters", "flops")  # of a list, by method, in metrics.json
_OF_A_SEED = {"seed", "run_dir", "start_from"}


class Cell(NamedTuple):
    """A method at a value of x; in percent. scores_RQ: of every run and query."""

    x: Any
    scores_RQ: np.ndarray


def value_of(run_dir: str, x: str, method: str, split: str) -> Any:
    """What `x` is in a run: "run", its folder's name; "parameters" or "flops" behind a method's list; or a field.

    Raises ConfigError where the run has no such thing.
    """
    if x == "run":
        return path_of(run_dir).name
    if x in COSTS:
        path = _summary(run_dir, split)
        found = read_json(path).get(x, {})
        if method not in found:
            known = f"only of {', '.join(found)}" if found else "nor of others: evaluate again, if that was long ago"
            raise ConfigError(f"{path} knows no number of {x} of {method!r}, {known} (flops are counted of rankers)")
        return found[method]
    value = read_json(config_of_run(path_of(run_dir)))
    for name in x.split("."):
        if isinstance(value, list):
            value = dict(zip(map(str, range(len(value))), value, strict=True))
        if not isinstance(value, dict) or name not in value:
            raise ConfigError(f"x={x!r} is no field of {run_dir}/config.json; give one as network.hidden_size")
        value = value[name]
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def cells(runs: tuple[str, ...], method: str, x: str, metric: str, split: str) -> tuple[list[str], list[Cell]]:
    """The queries, and the values of x in the order of their runs. Raises ConfigError where queries differ."""
    scores = {run_dir: read(f"{run_dir}:{method}", split, (metric,)) for run_dir in runs}
    ids = same_queries({f"{run_dir}:{method}": one for run_dir, one in scores.items()})
    found: dict[Any, list[dict[str, list[float]]]] = {}
    for run_dir in runs:
        found.setdefault(value_of(run_dir, x, method, split), []).append(scores[run_dir])
    return ids, [
        Cell(value, 100 * np.array([[one[i][0] for i in ids] for one in of_value])) for value, of_value in found.items()
    ]


def _having(runs: tuple[str, ...], method: str, split: str) -> tuple[str, ...]:
    """The runs whose evaluation has a method; all of them where none has, so that reading it says what there is."""
    paths = {run: _summary(run, split) for run in runs}
    having = tuple(run for run, path in paths.items() if path.is_file() and method in read_json(path)["methods"])
    return having or runs


def _summary(run_dir: str, split: str) -> Path:
    return path_of(run_dir) / "eval" / split / "metrics.json"


def _differing(runs: tuple[str, ...], method: str, x: str, split: str) -> list[str]:
    """Fields in which runs of one value of x differ beside their seed: lines to be shown."""
    first: dict[Any, tuple[str, dict[str, Any]]] = {}
    notes = []
    for run_dir in runs:
        fields = fields_of(run_dir)
        other, known = first.setdefault(value_of(run_dir, x, method, split), (run_dir, fields))
        names = [name for name in sorted({*fields, *known} - _OF_A_SEED) if fields.get(name) != known.get(name)]
        if names:
            notes.append(f"note: {other} and {run_dir} count as seeds of one {x}, and differ in {', '.join(names)}")
    return notes


def study(
    runs: tuple[str, ...],
    methods: tuple[str, ...],
    x: str = "run",
    metric: str = "ndcg@5",
    split: str = "test",
    plot: str = "",
    resamples: int = 2000,
    seed: int = 0,
) -> str:
    """A table: mean and spread of every method at every value of x, and its difference to the first value.

    Args:
        runs: evaluated run directories; those of one value of x are its seeds.
        methods: rows of their evaluations.
        x: "run" (the folder's name), "parameters" (those that a method reads to make a list), "flops" (what it
            computes for one, padding included; of rankers), or a field of the configuration, as
            network.hidden_size, or goalrank.subset.1 of a list.
        metric: a column of their per_query.jsonl.
        split: the split they were evaluated on.
        plot: a file to write, .svg or .png; empty: none. Needs an x that is a number.
        resamples: bootstrap resamples behind the intervals.
        seed: of the bootstrap.
    """
    if not runs or not methods:
        raise ConfigError("give --runs and --methods")
    if plot:
        figures.check_name(plot)
    of_method = {method: _having(runs, method, split) for method in methods}
    queries, table = {}, {}
    for method, having in of_method.items():
        queries[f"{having[0]}:{method}"], table[method] = cells(having, method, x, metric, split)
    lines = [f"{metric}, percent, {len(same_queries(queries))} queries"]
    lines.append(f"{x:24} {'method':14} {'seeds':>5} {'mean':>13}   less the first")
    drawn = {}
    for method, row in table.items():
        drawn[method] = []
        for cell in row:
            low_high = interval(cell.scores_RQ.mean(0), resamples, seed)
            drawn[method].append((cell.x, cell.scores_RQ.mean(), *low_high))
            lines.append(_line(cell, row[0], method, resamples, seed))
    if plot:
        _plot(plot, drawn, x, metric)
    notes = [note for method, having in of_method.items() for note in _differing(having, method, x, split)]
    return "\n".join([*lines, *dict.fromkeys(notes)])


def _line(cell: Cell, first: Cell, method: str, resamples: int, seed: int) -> str:
    mean = f"{cell.scores_RQ.mean():.1f} ±{spread(cell.scores_RQ.mean(1)):.1f}"
    line = f"{cell.x!s:24} {method:14} {len(cell.scores_RQ):>5} {mean:>13}"
    if cell is first:
        return line
    difference_Q = cell.scores_RQ.mean(0) - first.scores_RQ.mean(0)
    low, high = interval(difference_Q, resamples, seed)
    return f"{line}   {difference_Q.mean():+.2f} [{low:+.2f}, {high:+.2f}]"


def _plot(plot: str, drawn: dict[str, list[tuple]], x: str, metric: str) -> None:
    values = [value for points in drawn.values() for value, *_ in points]
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        raise ConfigError(f"x={x!r} is no number in these runs ({json.dumps(values, default=str)}): leave --plot out")
    figure, (axes,) = figures.panels(1, (6, 4))
    for method, points in drawn.items():
        at, mean, low, high = np.array(sorted(points), float).T
        axes.errorbar(at, mean, yerr=[mean - low, high - mean], marker="o", capsize=3, label=method)
    if min(values) > 0 and max(values) >= 8 * min(values):
        axes.set_xscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(f"{metric}, percent")
    axes.legend()
    figures.save(figure, plot)


if __name__ == "__main__":
    command(study, __doc__)
