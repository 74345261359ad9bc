"""Where the queries of a method were lost, as a stream that grows thinner; and what was within reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fgrpo_jax.evaluation.evaluate import Evaluation, counted, from_scores, score
from fgrpo_jax.evaluation.report_page import charts
from fgrpo_jax.evaluation.report_page.charts import Reach
from fgrpo_jax.evaluation.report_page.markup import escape, tag, void

# In the order in which `evaluate.error_class` asks: what leaves the stream, and the class of its colour.
GATES = (
    ("no_relevant", "nothing to find", "c7"),
    ("malformed", "malformed", "c4"),
    ("slate_miss", "slate miss", "c1"),
    ("rank_drop", "rank drop", "c3"),
)
_WIDTH, _HEIGHT, _THICK, _TOP, _GATE = 460, 190, 84, 26, 100
_APART = 80  # middles of labels, at least: the widest is "nothing to find"
_LOW, _END, _TURN = _HEIGHT - 34, _WIDTH - 26, 26  # where branches end, and the stream; the radius of a branch


def flow(method: str, errors: Mapping[str, int]) -> str:
    """The stream of a method's queries from left to right: at every gate a part of them leaves downward."""
    total, branches = sum(errors.values()), []
    labelled = -_APART
    left, edge = total, f"M0,{_TOP} V{_TOP + _THICK}"  # of the stream, along its lower side
    for i, (name, said, colour) in enumerate(GATES):
        x, count = (i + 0.45) * _GATE, errors[name]
        left -= count
        low, leaves = _TOP + left / total * _THICK, count / total * _THICK
        edge += f" H{x:.1f} V{low:.1f}"
        if count:
            branches.append(_branch(x, low, max(leaves, 1.5), colour))
            labelled = max(x + _TURN + leaves / 2, labelled + _APART)
            branches.append(_label(labelled, _LOW + 14, said, _percent(count, total)))
    parts = [void("path", d=f"{edge} H{_END} V{_TOP} Z", class_="stream"), *branches]
    parts.append(void("rect", x=_END, y=_TOP, width=12, height=f"{left / total * _THICK:.1f}", class_="c2"))
    parts.append(_text(_END + 12, _TOP - 9, f"ok {_percent(left, total)}", "end"))
    parts.append(_text(0, _TOP - 9, f"{total:,} queries", "start"))
    what = ", ".join(f"{said} {errors[name]}" for name, said, _ in GATES)
    label = f"{method}: of {total} queries {what}, ok {errors['ok']}"
    drawn = tag("svg", "".join(parts), viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=label)
    return tag("figure", tag("figcaption", tag("b", escape(method))) + drawn, class_="flow")


def _percent(count: int, total: int) -> str:
    return f"{100 * count / total:.1f} %"


def _branch(x: float, y: float, thick: float, style: str) -> str:
    """A quarter of a turn to the right and down, `thick` wide, from the lower edge of the stream."""
    outer, inner = _TURN + thick, _TURN
    down = y + thick + inner
    path = (
        f"M{x:.1f},{y:.1f} A{outer:.1f},{outer:.1f} 0 0 1 {x + outer:.1f},{y + outer:.1f} V{_LOW} "
        f"H{x + inner:.1f} V{down:.1f} A{inner:.1f},{inner:.1f} 0 0 0 {x:.1f},{y + thick:.1f} Z"
    )
    return void("path", d=path, class_=style)


def _label(x: float, y: float, first: str, second: str) -> str:
    return _text(x, y, first, "middle") + _text(x, y + 14, second, "middle")


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return tag("text", escape(text), x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_="name")


# --------------------------------------------------------------------- ceilings


def ceilings(evaluation: Evaluation) -> list[Reach]:
    """NDCG at the largest cut-off of every method, of its slate in the best order, and of the best slate.

    The best slate holds as many candidates as the longest that any method wrote; what the pool missed stays missed.
    """
    examples, k = evaluation.examples, max(evaluation.summary["cutoffs"])
    longest = max((len(counted(p)[0]) for found in evaluation.predictions.values() for p in found), default=0)
    ideal = [from_scores(np.array(e.relevance), max(longest, 1), k) for e in examples]
    best = float(score(examples, ideal, (k,), ("ndcg",))[f"ndcg@{k}"].mean())
    found = []
    for method, predicted in evaluation.predictions.items():
        means = {name: float(v.mean()) for name, v in score(examples, predicted, (k,), ("ndcg", "slate_ndcg")).items()}
        found.append(Reach(method, means[f"ndcg@{k}"], means[f"slate_ndcg@{k}"], best))
    return found


def rows_of(reaches: Sequence[Reach], k: int) -> list[list[str]]:
    """The same as cells, in percent."""
    head = ["", f"ndcg@{k}", "best order of the slate", "best slate", "lost by the slate", "lost by the order"]
    rows = []
    for one in reaches:
        values = (one.got, one.slate, one.best, one.best - one.slate, one.slate - one.got)
        rows.append([one.label, *(f"{100 * value:.1f}" for value in values)])
    return [head, *rows]


def figure(reaches: Sequence[Reach], k: int) -> str:
    return charts.reaches(f"NDCG@{k}, percent", reaches)
