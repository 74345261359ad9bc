"""Where a method gains over others: paired differences by fields of the configuration, as a table and a plot.

    python -m fgrpo_jax.evaluation.gains --a runs/study/pool_{40,60}:rl runs/s0:rl --names grpo sft \
        --b runs/study/pool_{40,60}+grpo:rl runs/grpo0:rl runs/study/pool_{40,60}:sft runs/s0:sft \
        --by data.synthetic.pool --base runs/s0 --plot gains.svg

Every pair of `a` and `b` is compared on its own queries, which, other than in fgrpo_jax.evaluation.study, need not be
those of the next pair: another world has others. A panel shows the runs that of the fields given differ from the base
in its own alone; in which others they differ is noted. ± is the standard deviation over seeds, "dead slates" the share
of slate groups without signal in the first logged steps of a's stage.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fgrpo_jax.config import ConfigError
from fgrpo_jax.evaluation import figures
from fgrpo_jax.evaluation.seeds import command, fields_of, interval, read, same_queries, spread
from fgrpo_jax.files import path_of, read_rows

DEAD = "dead_groups/slate"
OWN = ("seed", "run_dir", "start_from", "data.prepared_dir")


class Gain(NamedTuple):
    """Of one value of a field, in percent. of_a: its mean; less_SQ: of every seed and query, a less b."""

    value: Any
    of_a: float
    dead: float | None  # slate groups of a's stage that had no signal when it began
    less_SQ: np.ndarray

    def interval(self, resamples: int, seed: int) -> tuple[float, float]:
        """95 %, over queries."""
        return interval(self.less_SQ.mean(0), resamples, seed)


def gains(a: tuple[str, ...], b: tuple[str, ...], by: tuple[str, ...], base: str, scores: Callable) -> dict:
    """{field: [Gain, ...]} of the runs of `a` that of the fields `by` differ from `base` in that one alone.

    scores: those of an entry, by query. Runs of one value are its seeds. Numbers are in order, other values as their
    runs are. Raises ConfigError.
    """
    usual = _values(base, by)
    found: dict[str, list[Gain]] = {}
    for field in by:
        of_value: dict[Any, list[tuple[str, str]]] = {}
        for pair in zip(a, b, strict=True):
            values = _values(run_of(pair[0]), by)
            if all(values[other] == usual[other] for other in by if other != field):
                of_value.setdefault(values[field], []).append(pair)
        if not of_value:
            raise ConfigError(f"by={field}: of the fields given no run of a differs from {base} in this one alone")
        rows = [_gain(value, pairs, scores) for value, pairs in of_value.items()]
        numbers = all(isinstance(row.value, (int, float)) for row in rows)
        found[field] = sorted(rows, key=lambda row: row.value) if numbers else rows
    return found


def run_of(entry: str) -> str:
    """Raises ConfigError for what is no `RUN_DIR:METHOD`."""
    run_dir, _, method = entry.rpartition(":")
    if not run_dir or not method:
        raise ConfigError(f"{entry}: give RUN_DIR:METHOD of an evaluated run")
    return run_dir


def _values(run_dir: str, by: tuple[str, ...]) -> dict[str, Any]:
    fields = fields_of(run_dir)
    if unknown := [field for field in by if field not in fields]:
        raise ConfigError(f"by={unknown[0]!r} is no field of {run_dir}/config.json; give one as data.synthetic.pool")
    return {field: fields[field] for field in by}


def other_differences(run_dir: str, base: str, by: tuple[str, ...]) -> list[str]:
    """The fields in which a run differs from the base, but for `by` and what makes it a run of its own."""
    ours, usual = fields_of(run_dir), fields_of(base)
    names = sorted(ours.keys() | usual.keys())
    return [name for name in names if name not in (*by, *OWN) and ours.get(name) != usual.get(name)]


def _gain(value: Any, pairs: list[tuple[str, str]], scores: Callable) -> Gain:
    ids = same_queries({entry: scores(entry) for pair in pairs for entry in pair})
    of_a, less, dead = [], [], []
    for one, other in pairs:
        left, right = (np.array([scores(entry)[i][0] for i in ids]) for entry in (one, other))
        of_a.append(100 * left)
        less.append(of_a[-1] - 100 * right)
        dead.append(_dead(*one.rpartition(":")[::2]))
    known = [share for share in dead if share is not None]
    return Gain(value, float(np.mean(of_a)), float(np.mean(known)) if known else None, np.array(less))


def _dead(run_dir: str, stage: str) -> float | None:
    """The first share of dead slate groups that the stage logged, in percent; None where it logged none."""
    rows = read_rows(path_of(run_dir) / "metrics.jsonl")
    return next((100 * row[DEAD] for row in rows if row["stage"] == stage and DEAD in row), None)


def compare(
    a: tuple[str, ...],
    b: tuple[str, ...],
    by: tuple[str, ...],
    base: str,
    names: tuple[str, ...] = ("b",),
    metric: str = "ndcg@5",
    split: str = "test",
    plot: str = "",
    resamples: int = 2000,
    seed: int = 0,
) -> str:
    """A table for each field: mean of a at each of its values, and what that is above each of b.

    Args:
        a: evaluated methods, `RUN_DIR:METHOD`.
        b: as many, paired with those of a in order; or several such lists, one after the other.
        by: fields of the configuration of a's runs, as data.synthetic.pool.
        base: the run directory that the others are variants of.
        names: of the lists of b.
        metric: a column of their per_query.jsonl.
        split: the split they were evaluated on.
        plot: a file to write, .svg or .png, with a panel for each field; empty: none.
        resamples: bootstrap resamples behind the 95 % intervals, over queries.
        seed: of the bootstrap.
    """
    if not a or not by or len(b) != len(names) * len(a):
        raise ConfigError(
            f"{len(a)} of --a, {len(b)} of --b and {len(names)} --names: give a list as long as a for each"
        )
    if plot:
        figures.check_name(plot)
    parts = [b[i : i + len(a)] for i in range(0, len(b), len(a))]
    scores = functools.cache(lambda entry: read(entry, split, (metric,)))  # a's are compared with every list's
    found = {name: gains(a, part, by, base, scores) for name, part in zip(names, parts)}
    lines = [f"{metric}, percent: a, and a less the others"]
    for field in by:
        head = "".join(f"   {f'a - {name}':24}" for name in names)
        lines += ["", f"{field:22} {'seeds':>5} {'dead slates':>12} {'a':>6}{head}"]
        lines += [_line(rows, resamples, seed) for rows in zip(*(of_name[field] for of_name in found.values()))]
    if plot:
        _plot(plot, found, by, metric, resamples, seed)
    lines.append("")
    for entry in dict.fromkeys(map(run_of, a)):
        if others := other_differences(entry, base, by):
            lines += [f"note: {entry} differs from {base} in {', '.join(others)} too"]
    return "\n".join(lines).rstrip()


def _line(rows: tuple[Gain, ...], resamples: int, seed: int) -> str:
    first = rows[0]
    dead = "" if first.dead is None else f"{first.dead:.0f} %"
    cells = []
    for row in rows:
        low, high = row.interval(resamples, seed)
        over_seeds = f" ±{spread(row.less_SQ.mean(1)):.1f}" * (len(row.less_SQ) > 1)
        cells.append(f"   {f'{row.less_SQ.mean():+.1f}{over_seeds} [{low:+.1f}, {high:+.1f}]':24}")
    return f"{first.value!s:22} {len(first.less_SQ):>5} {dead:>12} {first.of_a:>6.1f}{''.join(cells)}".rstrip()


def _plot(plot: str, found: dict, by: tuple[str, ...], metric: str, resamples: int, seed: int) -> None:
    figure, panels = figures.panels(len(by), (3.2, 3.2))
    for axes, field in zip(panels, by):
        for name, of_name in found.items():
            mean = np.array([row.less_SQ.mean() for row in of_name[field]])
            low, high = np.array([row.interval(resamples, seed) for row in of_name[field]]).T
            axes.errorbar(range(len(mean)), mean, yerr=[mean - low, high - mean], marker="o", capsize=3, label=name)
        axes.set_xticks(range(len(mean)), [str(row.value) for row in of_name[field]])
        axes.axhline(0.0, color="0.5", linewidth=0.8)
        axes.set_xlabel(field)
    panels[0].set_ylabel(f"{metric}: a less the other, points")
    panels[-1].legend()
    figures.save(figure, plot)


if __name__ == "__main__":
    command(compare, __doc__)
