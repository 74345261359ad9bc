"""Where a method gains over others: paired differences by fields of the configuration, as a table and a plot.

    python -m fgrpo_jax.evaluation.gains --a runs/study/pool_{40,60}:rl runs/s0:rl --names grpo sft \
        --b runs/study/pool_{40,60}+grpo:rl runs/grpo0:rl runs/study/pool_{40,60}:sft runs/s0:sft \
        --by data.synthetic.pool --base runs/s0 --plot gains.svg

Every pair of `a` and `b` is compared on its own queries, which, other than in fgrpo_jax.evaluation.study, need not be
those of the next pair: another world has others. A panel shows the runs that differ from the base in its field alone.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro

from fgrpo_jax.config import ConfigError
from fgrpo_jax.evaluation.evaluate import resampled_means
from fgrpo_jax.evaluation.seeds import read, spread
from fgrpo_jax.evaluation.study import value_of
from fgrpo_jax.files import path_of, write_atomically

DEAD = "dead_groups/slate"


class Gain(NamedTuple):
    """Of one value of a field, in percent. of_a: its mean; less_SQ: of every seed and query, a less b."""

    value: Any
    of_a: float
    dead: float | None  # slate groups of a's stage that had no signal when it began
    less_SQ: np.ndarray

    def interval(self, resamples: int, seed: int) -> tuple[float, float]:
        """95 %, over queries."""
        low, high = np.percentile(resampled_means(self.less_SQ.mean(0)[:, None], resamples, seed), (2.5, 97.5))
        return float(low), float(high)


def gains(a: tuple[str, ...], b: tuple[str, ...], by: tuple[str, ...], base: str, metric: str, split: str) -> dict:
    """{field: [Gain, ...]} of the runs of `a` that differ from `base` in that field alone, and of the base.

    Runs of one value are its seeds. Numbers are in order, other values as their runs are. Raises ConfigError.
    """
    usual = _values(base, by, split)
    found: dict[str, list[Gain]] = {}
    for field in by:
        of_value: dict[Any, list[tuple[str, str]]] = {}
        for pair in zip(a, b, strict=True):
            values = _values(pair[0].rpartition(":")[0], by, split)
            if all(values[other] == usual[other] for other in by if other != field):
                of_value.setdefault(values[field], []).append(pair)
        rows = [_gain(value, pairs, metric, split) for value, pairs in of_value.items()]
        numbers = all(isinstance(row.value, (int, float)) for row in rows)
        found[field] = sorted(rows, key=lambda row: row.value) if numbers else rows
    return found


def _values(run_dir: str, by: tuple[str, ...], split: str) -> dict[str, Any]:
    return {field: value_of(run_dir, field, "", split) for field in by}


def _gain(value: Any, pairs: list[tuple[str, str]], metric: str, split: str) -> Gain:
    of_a, less, dead = [], [], []
    for one, other in pairs:
        left, right = (read(entry, split, (metric,)) for entry in (one, other))
        if left.keys() != right.keys() or (less and len(left) != len(less[0])):
            raise ConfigError(f"{one} and {other} were not evaluated on the same queries")
        of_a.append(100 * np.array([left[i][0] for i in sorted(left)]))
        less.append(of_a[-1] - 100 * np.array([right[i][0] for i in sorted(left)]))
        dead.append(_dead(*one.rpartition(":")[::2]))
    known = [share for share in dead if share is not None]
    return Gain(value, float(np.mean(of_a)), float(np.mean(known)) if known else None, np.array(less))


def _dead(run_dir: str, stage: str) -> float | None:
    """The first share of dead slate groups that the stage logged, in percent; None where it logged none."""
    path = path_of(run_dir) / "metrics.jsonl"
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines()) if path.is_file() else ()
    return next((100 * row[DEAD] for row in rows if row.get("stage") == stage and DEAD in row), None)


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
    if plot and Path(plot).suffix not in (".svg", ".png"):
        raise ConfigError(f"plot={plot!r} must end in .svg or .png")
    parts = [b[i : i + len(a)] for i in range(0, len(b), len(a))]
    found = {name: gains(a, part, by, base, metric, split) for name, part in zip(names, parts)}
    lines = [f"{metric}, percent: a, and a less the others"]
    for field in by:
        head = "".join(f"   {f'a - {name}':24}" for name in names)
        lines += ["", f"{field:22} {'seeds':>5} {'dead slates':>12} {'a':>6}{head}"]
        lines += [_line(rows, resamples, seed) for rows in zip(*(of_name[field] for of_name in found.values()))]
    if plot:
        _plot(Path(plot), found, by, metric, resamples, seed)
    return "\n".join(lines)


def _line(rows: tuple[Gain, ...], resamples: int, seed: int) -> str:
    first = rows[0]
    dead = "" if first.dead is None else f"{first.dead:.0f} %"
    cells = []
    for row in rows:
        low, high = row.interval(resamples, seed)
        over_seeds = f" ±{spread(row.less_SQ.mean(1)):.1f}" * (len(row.less_SQ) > 1)
        cells.append(f"   {f'{row.less_SQ.mean():+.1f}{over_seeds} [{low:+.1f}, {high:+.1f}]':24}")
    return f"{first.value!s:22} {len(first.less_SQ):>5} {dead:>12} {first.of_a:>6.1f}{''.join(cells)}".rstrip()


def _plot(path: Path, found: dict, by: tuple[str, ...], metric: str, resamples: int, seed: int) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, only here
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(by), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(by), sharey=True, squeeze=False)[0]
    for axes, field in zip(all_axes, by):
        for name, of_name in found.items():
            mean = np.array([row.less_SQ.mean() for row in of_name[field]])
            low, high = np.array([row.interval(resamples, seed) for row in of_name[field]]).T
            axes.errorbar(range(len(mean)), mean, yerr=[mean - low, high - mean], marker="o", capsize=3, label=name)
        axes.set_xticks(range(len(mean)), [str(row.value) for row in of_name[field]])
        axes.axhline(0.0, color="0.5", linewidth=0.8)
        axes.set_xlabel(field)
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel(f"{metric}: a less the other, points")
    all_axes[-1].legend()
    picture, kind = io.BytesIO(), path.suffix[1:]
    with matplotlib.rc_context({"svg.hashsalt": "gains"}):  # so that the same numbers give the same file
        figure.savefig(picture, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None})
    write_atomically(path, picture.getvalue())


if __name__ == "__main__":
    try:
        print(tyro.cli(compare, description=__doc__))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
