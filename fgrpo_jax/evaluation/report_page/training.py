"""What metrics.jsonl says of every stage, as small figures. Nothing is drawn of what was not logged.

The loss of a policy gradient is not shown: its value is 0 by construction wherever the ratio is 1, whatever is
learnt; `value` is what credit by choices adds to it. That of a stage that imitates (no rewards were logged) is a
negative log-likelihood, and is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from fgrpo_jax.evaluation.report_page.charts import COLOURS, DASHES, Series, lines, short
from fgrpo_jax.evaluation.report_page.markup import escape, tag

Rows = Sequence[Mapping[str, object]]
OPEN = 3  # stages whose figures are shown at once, the last ones
MOST = 200  # points of a line; longer ones are shown by means of as many parts


class Panel(NamedTuple):
    """names: (names of metrics logged of the stage) -> those to draw."""

    title: str
    names: Callable[[set[str]], list[str]]


def _given(*wanted: str) -> Callable[[set[str]], list[str]]:
    return lambda logged: [name for name in wanted if name in logged]


def _loss(logged: set[str]) -> list[str]:
    return [] if any(name.startswith("reward/") for name in logged) else _given("loss")(logged)


def _validation(logged: set[str]) -> list[str]:
    """NDCG and recall at their largest cut-off, and recall of the slate."""
    shown = []
    for metric in ("eval/ndcg@", "eval/alpha_ndcg@", "eval/recall@"):
        cutoffs = [int(name.removeprefix(metric)) for name in logged if name.startswith(metric)]
        shown += [f"{metric}{max(cutoffs)}"] if cutoffs else []
    return shown + _given("eval/slate_recall")(logged)


PANELS = (
    Panel("reward", _given("reward/slate", "reward/rank")),
    Panel("negative log-likelihood", _loss),
    Panel("value of the choices, by credit.scheme", _given("value")),
    Panel("validation", _validation),
    Panel("validation log-likelihood", _given("eval/likelihood")),
    Panel("dead groups", _given("dead_groups/slate", "dead_groups/rank")),
    Panel("entropy of a choice, nats", _given("entropy/slate", "entropy/rank")),
    Panel("entropy of a group, nats", _given("entropy")),
    Panel("gradient norm", _given("grad_norm")),
    Panel("length of the lists", _given("slate_length", "rank_length")),
    Panel("well-formed transcripts", _given("outcome/ok")),
    Panel("throughput, queries/s", _given("queries_per_s")),
    Panel("throughput, trained tokens/s", _given("tokens_per_s")),
)


def stages(logs: Mapping[str, Rows]) -> dict[str, str]:
    """The figures of every stage, by its name; of several runs (by what their rows are called after) together."""
    names = dict.fromkeys(row["stage"] for rows in logs.values() for row in rows)
    found = {}
    for stage in names:
        runs = {prefix: [row for row in rows if row["stage"] == stage] for prefix, rows in logs.items()}
        runs = {prefix: rows for prefix, rows in runs.items() if rows}
        drawn = [(panel, series) for panel in PANELS if (series := _series(panel, runs))]
        figures = [lines(panel.title, series, "steps") for panel, series in drawn if not _constant(series)]
        still = [f"{s.label} {short(s.points[-1][1])}" for _, series in drawn if _constant(series) for s in series]
        said = tag("p", escape(f"Constant: {', '.join(still)}."), class_="past") if still else ""
        if figures or still:
            found[stage] = tag("div", "".join(figures), class_="plots") + said
    return found


def _constant(series: Sequence[Series]) -> bool:
    """Whether there is nothing to see: lines of several points that all keep one value."""
    return all(len(one.points) > 1 and len({y for _, y in one.points}) == 1 for one in series)


def _series(panel: Panel, runs: Mapping[str, Rows]) -> list[Series]:
    """Of one run a colour for each metric; of several a colour for each run, and dashes."""
    series = []
    for r, (prefix, rows) in enumerate(runs.items()):
        logged = {name for row in rows for name in row}
        for m, name in enumerate(panel.names(logged)):
            colour, dash = (m, 0) if len(runs) == 1 else (r % COLOURS, min(m, len(DASHES) - 1))
            said = name.split("/")[-1].replace("_", " ")
            points = thinned(points_of(rows, name))
            if name.startswith("entropy/") and not any(y for _, y in points):
                continue  # a phase that this policy does not have
            if points:
                run = prefix.rstrip(".") or "this run"
                series.append(Series(said if len(runs) == 1 else f"{run}: {said}", points, colour, dash))
    return series


def points_of(rows: Rows, name: str) -> list[tuple[float, float]]:
    """Where a run was resumed, the last row of a step counts."""
    return sorted({row["step"]: row[name] for row in rows if name in row}.items())


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST points: the means of equally many parts, each at the last step of its part."""
    n = len(points)
    if n <= MOST:
        return list(points)
    edges = [n * i // MOST for i in range(MOST + 1)]
    parts = [points[a:b] for a, b in zip(edges, edges[1:])]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def section(logs: Mapping[str, Rows]) -> str:
    """Markup of all stages; "" where nothing was logged."""
    found, parts = stages(logs), []
    for i, (name, figures) in enumerate(found.items()):
        shown = {"open": ""} if len(found) - i <= OPEN else {}
        parts.append(tag("details", tag("summary", tag("h3", escape(name))) + figures, **shown))
    return "".join(parts)
