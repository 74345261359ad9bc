"""The page, put together: see report_page."""

from __future__ import annotations

import base64
import hashlib
import string
from collections.abc import Mapping, Sequence
from importlib import resources
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from fgrpo_jax.evaluation import fit
from fgrpo_jax.evaluation import table as tables
from fgrpo_jax.evaluation.evaluate import Evaluation
from fgrpo_jax.evaluation.report_page import browser, charts, losses, markup, training
from fgrpo_jax.evaluation.report_page.browser import Transcripts
from fgrpo_jax.evaluation.report_page.charts import Interval
from fgrpo_jax.evaluation.report_page.markup import escape, tag

_NOTHING: Mapping = MappingProxyType({})


class Beside(NamedTuple):
    """What the page shows beside the evaluation itself.

    logs: rows of metrics.jsonl, of the run ("") and of others by what their rows begin with.
    transcripts: of some queries, step by step, by method; None where none were asked for.
    """

    logs: Mapping[str, training.Rows] = _NOTHING
    transcripts: Transcripts | None = None


ALONE = Beside()


def render(
    evaluation: Evaluation,
    manifest: Mapping[str, object],
    left_out: Mapping[str, str],
    fits: Mapping[str, Mapping[str, object]] = _NOTHING,
    beside: Beside = ALONE,
) -> str:
    """The text of report.html: the same arguments give the same text."""
    summary, config = evaluation.summary, manifest.get("config", {})
    metric = main_metric(evaluation, config)
    parts = {
        "summary": ("Summary", _summary(evaluation, left_out, fits, metric, tuple(beside.logs))),
        "training": ("Training", training.section(beside.logs)),
        "errors": ("Where queries are lost", _errors(evaluation)),
        "ceilings": ("What was within reach", _ceilings(evaluation)),
        "queries": ("Queries", _file("queries.html").substitute(steps=escape(_steps_said(beside)))),
        "about": ("Configuration and manifest", _about(manifest)),
    }
    parts = {name: part for name, part in parts.items() if part[1]}
    sections = [
        tag("section", tag("h2", title, id=f"{name}-title") + body, id=name, aria_labelledby=f"{name}-title")
        for name, (title, body) in parts.items()
    ]
    style, script = (_file(name).template for name in ("page.css", "page.js"))
    split = next(iter(manifest.get("data", ())), "")
    title = f"{config.get('data', {}).get('name', '')} {split}".strip() or "evaluation"
    text = _file("page.html").substitute(
        title=escape(title),
        facts=escape(f"{summary['queries']:,} queries · {len(summary['methods'])} methods"),
        policy=f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}",
        style=style,
        script=script,
        contents="".join(tag("li", tag("a", title, href=f"#{name}")) for name, (title, _) in parts.items()),
        sections="\n".join(sections),
        data=markup.data(browser.content(evaluation, metric, beside.transcripts or {})),
    )
    return text.encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair can be in JSON, not in a file


def main_metric(evaluation: Evaluation, config: Mapping[str, object]) -> str:
    """The one that chose the checkpoints, or where it was not measured NDCG, or the first."""
    found = evaluation.summary["methods"][evaluation.summary["versus"]]
    wanted = [config.get("eval", {}).get("metric"), f"ndcg@{max(evaluation.summary['cutoffs'])}"]
    return next(name for name in (*wanted, *found) if name in found)


def _file(name: str) -> string.Template:
    """A file beside this one, which may have $names."""
    return string.Template(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))


def _hash(text: str) -> str:
    """What the page's policy calls an element with exactly this text."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


# --------------------------------------------------------------------- sections


def _summary(
    evaluation: Evaluation, left_out: Mapping[str, str], fits: Mapping, metric: str, prefixes: Sequence[str]
) -> str:
    summary = evaluation.summary
    heading = tables.heading(summary)
    parts = [_tiles(summary, metric), tag("p", escape(f"{heading}. The greatest of a column is bold."))]
    blocks = [markup.table(t or f"metrics: {', '.join(r[0][1:])}", r, best=not t) for t, r in tables.blocks(summary)]
    parts.append(tag("div", "".join(blocks), class_="tables"))
    if rows := _over_runs(evaluation, prefixes):
        said = "mean of the compared runs that have this stage ± their standard deviation, percent"
        parts.append(markup.table(f"{said} (whatever they differ in)", rows))
    if summary["paired"]:
        parts.append(_forest(summary, metric))
    notes = [f"left out: {name}: {reason}" for name, reason in left_out.items()]
    if parameters := summary.get("parameters"):
        notes.append("parameters: " + ", ".join(f"{name} {count:,}" for name, count in parameters.items()))
    notes.append(
        f"intervals: percentile bootstrap over queries, {summary['resamples']:,} resamples, seed {summary['seed']}; "
        "every method sees the same resamples, so differences are paired"
    )
    if fits:
        parts.append(tag("h3", "Fit of the models of feedback") + tag("pre", escape(fit.lines(fits)), tabindex=0))
    return "".join(parts) + tag("ul", "".join(tag("li", escape(note)) for note in notes), class_="notes")


def _over_runs(evaluation: Evaluation, prefixes: Sequence[str]) -> list[list[str]]:
    """Of stages that several runs have: how much a metric varies with the run, a seed for example."""
    methods = evaluation.summary["methods"]
    own = [name for name in evaluation.summary.get("parameters", {}) if prefixes and name in methods]
    alike = {name: [p + name for p in prefixes if p + name in own] for name in own}
    alike = {name: found for name, found in alike.items() if len(found) > 1}
    rewards = evaluation.summary.get("rewards", {})
    names = [name for name in methods[evaluation.summary["versus"]] if name not in rewards]
    rows = []
    for name, found in alike.items():
        means = np.array([[100 * methods[one][metric]["mean"] for metric in names] for one in found])
        cells = [f"{m:.1f} ±{s:.1f}" for m, s in zip(means.mean(0), means.std(0, ddof=1))]
        rows.append([f"{name}, {len(found)} runs", *cells])
    return [["", *names], *rows] if rows else []


def _tiles(summary: Mapping, metric: str) -> str:
    """The main metric of what was trained."""
    tiles = []
    for method in summary.get("parameters", {}):
        found, apart = summary["methods"][method][metric], summary["paired"].get(method, {}).get(metric)
        half = 100 * (found["high"] - found["low"]) / 2
        said = f"{apart_text(apart)} to {summary['versus']}" if apart else "differences are taken to it"
        tiles.append(
            tag("dt", escape(method))
            + tag("dd", tag("b", f"{100 * found['mean']:.1f}") + f" ±{half:.1f} " + tag("span", escape(said)))
        )
    tiles = [tag("div", tile) for tile in tiles]
    title = tag("p", f"{escape(metric)}, percent", class_="tiles-title")
    return title + tag("dl", "".join(tiles), class_="tiles") if tiles else ""


def apart_text(interval: Mapping[str, float]) -> str:
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * interval[key] for key in ("difference", "low", "high")))


def _forest(summary: Mapping, metric: str) -> str:
    rows = []
    for method, found in summary["paired"].items():
        one = found[metric]
        rows.append(Interval(method, 100 * one["low"], 100 * one["difference"], 100 * one["high"]))
    title = f"{metric}: difference to {summary['versus']}"
    return charts.intervals(title, rows, "points of percent, paired, 95 % interval")


def _errors(evaluation: Evaluation) -> str:
    k = max(evaluation.summary["cutoffs"])
    said = (
        f"At {k}: a slate miss is a query of which a relevant candidate never entered the slate, a rank drop one whose "
        "slate held them all and whose ranking did not put them first, malformed one whose transcript broke a rule."
    )
    flows = "".join(losses.flow(method, errors) for method, errors in evaluation.summary["errors"].items())
    broken = {
        method: {name: count for name, count in found.items() if name != "ok"}
        for method, found in evaluation.summary["outcomes"].items()
    }
    names = sorted({name for found in broken.values() for name in found})
    rows = [["", *names], *([method, *(str(found.get(n, 0)) for n in names)] for method, found in broken.items())]
    rules = markup.table("broken rules, queries", rows) if names else ""
    return tag("p", escape(said)) + tag("div", flows, class_="flows") + rules


def _ceilings(evaluation: Evaluation) -> str:
    k, reach = max(evaluation.summary["cutoffs"]), losses.ceilings(evaluation)
    said = (
        "What the ranking made of the slate, what its best order would give, and what the best slate of the pool "
        "would. The gap to the first is lost by the order, that between them by the slate."
    )
    rows = losses.rows_of(reach, k)
    return tag("p", escape(said)) + losses.figure(reach, k) + markup.table(f"NDCG@{k} within reach, percent", rows)


def _steps_said(beside: Beside) -> str:
    if beside.transcripts is None:
        return "No transcript is shown step by step: none were asked for (eval.transcripts=0)."
    if not beside.transcripts:
        return (
            "No transcript is shown step by step: no method here writes lists by choices with probabilities "
            "(a language model does with transcript.constrained)."
        )
    places = {q for of_method in beside.transcripts.values() for q in of_method}
    return (
        f"Of {len(places)} queries, some of every kind of error, there are transcripts step by step "
        f"({', '.join(beside.transcripts)}); eval.transcripts sets how many."
    )


def _about(manifest: Mapping[str, object]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "config"}
    made = [("Manifest", rest), ("Configuration", manifest.get("config", {}))]
    return "".join(tag("details", tag("summary", title) + _tree(value)) for title, value in made)


def _tree(value: object) -> str:
    """Nested names and values as nested lists."""
    if not isinstance(value, Mapping):
        shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        return tag("code", escape("–" if shown in ("", None) else shown))
    entries = []
    for name, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            entries.append(tag("li", tag("span", escape(name)) + _tree(inner)))
        else:
            entries.append(tag("li", tag("span", escape(name)) + " " + _tree(inner if inner != {} else "")))
    return tag("ul", "".join(entries), class_="tree")
