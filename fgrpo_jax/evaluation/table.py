"""The tables of an evaluation: their numbers as they are shown, and as the text of the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fgrpo_jax.evaluation.evaluate import ERRORS, Evaluation


class Block(NamedTuple):
    """Numbers as they are shown. rows: of cells, the head first, with the methods in the first column."""

    title: str
    rows: list[list[str]]


def table(evaluation: Evaluation, left_out: Mapping[str, str]) -> str:
    """Methods as rows: metrics in percent with half of their 95 % interval, differences, errors."""
    parts = [heading(evaluation.summary)]
    for title, rows in blocks(evaluation.summary):
        parts.append((f"{title}\n" if title else "") + align(rows))
    parts += [f"left out: {name}: {reason}" for name, reason in left_out.items()]
    return "\n\n".join(parts) + "\n"


def heading(summary: Mapping[str, object]) -> str:
    return f"{summary['queries']} queries, percent, ± half of the 95 % bootstrap interval"


def blocks(summary: Mapping[str, object]) -> list[Block]:
    """Of an evaluation's summary: the metrics (no title), paired differences, learned rewards, errors."""
    cutoffs, versus = summary["cutoffs"], summary["versus"]
    found = list(summary["methods"][versus])
    cut = list(dict.fromkeys(name.split("@")[0] for name in found if "@" in name))
    groups = [[f"{name}@{k}" for name in cut[i : i + 2] for k in cutoffs] for i in range(0, len(cut), 2)]
    whole = [name for name in found if "@" not in name and name not in summary.get("rewards", {})]
    made = []
    for names in (*groups, whole):
        rows = [
            [method, *(_plus_minus(values[name]) for name in names)] for method, values in summary["methods"].items()
        ]
        made.append(Block("", [["", *names], *rows]))
    if summary["paired"]:
        names = [f"{name}@{max(cutoffs)}" for name in ("ndcg", "alpha_ndcg", "recall")] + ["recall@1", *whole]
        names = [name for name in names if name in summary["methods"][versus]]
        rows = [
            [method, *(_difference(values[name]) for name in names)] for method, values in summary["paired"].items()
        ]
        made.append(Block(f"difference to {versus}, paired, [95 % interval]", [["", *names], *rows]))
    if "rewards" in summary:
        made.append(_rewards(summary))
    total = summary["queries"]
    rows = [
        [method, *(f"{100 * counts[name] / total:.1f}" for name in ERRORS)]
        for method, counts in summary["errors"].items()
    ]
    return [*made, Block(f"errors at {max(cutoffs)}, percent of queries", [["", *ERRORS], *rows])]


def _rewards(summary: Mapping[str, object]) -> Block:
    """Learned rewards, which are no percentages, and their differences."""
    versus, rows = summary["versus"], []
    for method, values in summary["methods"].items():
        cells = []
        for name in summary["rewards"]:
            half = (values[name]["high"] - values[name]["low"]) / 2
            apart = summary["paired"].get(method, {}).get(name)
            apart = "{difference:+.3f} [{low:+.3f}, {high:+.3f}]".format(**apart) if apart else "-"
            cells += [f"{values[name]['mean']:.3f} ±{half:.3f}", apart]
        rows.append([method, *cells])
    cut = ", ".join(f"{name} of the first {k}" for name, k in summary["rewards"].items())
    names = [column for name in summary["rewards"] for column in (name, f"less {versus}")]
    return Block(f"learned rewards, not in percent: {cut}; paired differences", [["", *names], *rows])


def _plus_minus(interval: Mapping[str, float]) -> str:
    half = (interval["high"] - interval["low"]) / 2
    return f"{100 * interval['mean']:.1f} ±{100 * half:.1f}"


def _difference(interval: Mapping[str, float]) -> str:
    values = (100 * interval[key] for key in ("difference", "low", "high"))
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*values)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first to the left and the others to the right."""
    widths = [max(len(row[j]) for row in rows) for j in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:]))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
