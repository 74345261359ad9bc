"""Figures as SVG. Colours are classes of page.css (c0 to c7), so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from fgrpo_jax.evaluation.report_page.markup import cut, escape, tag, void

COLOURS, DASHES = 8, ("", " dashed", " dotted")
_WIDTH, _HEIGHT = 340, 180
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 8, 8, 24  # margins of a plot


class Series(NamedTuple):
    """points: (x, y), by ascending x. colour: from 0 to COLOURS - 1. dash: how it is drawn, an index of DASHES."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int
    dash: int = 0


def short(value: float) -> str:
    """Four digits that count."""
    text = f"{value:.4g}"
    return f"{value:,.0f}" if "e+" in text else text


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers, within [low, high]."""
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if (high - low) / (step * m) <= count + 0.5)
    first = math.ceil(low / step - 1e-9)
    return [i * step + 0.0 for i in range(first, math.floor(high / step + 1e-9) + 1)]


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """Of an axis: a little more than the values; a constant has some room too."""
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return (low if low == 0 else low - room), high + room


def lines(title: str, series: Sequence[Series], x_name: str) -> str:
    """A figure of lines over a common x, with a legend that says the last value of each."""
    x_low, x_high = (f(x for one in series for x, _ in one.points) for f in (min, max))
    x_high = x_high if x_high > x_low else x_low + 1
    y_low, y_high = bounds([y for one in series for _, y in one.points])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        up = (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return _LEFT + across, _HEIGHT - _BOTTOM - up

    parts = []
    for y in ticks(y_low, y_high):
        at = f"{place(x_low, y)[1]:.1f}"
        parts.append(void("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(_text(_LEFT - 5, float(at) + 3.5, short(y), "end"))
    for x in ticks(x_low, x_high):
        parts.append(_text(place(x, y_low)[0], _HEIGHT - 7, short(x), "middle"))
    for one in series:
        parts.append(_line([place(x, y) for x, y in one.points], one))
    what = "; ".join(f"{s.label} {_range(s)}" for s in series)
    drawn = tag(
        "svg", "".join(parts), viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img",
        aria_label=f"{title} over {x_name}: {what}", data_x=f"{x_low:g} {x_high:g}", data_y=f"{y_low:.6g} {y_high:.6g}",
    )  # fmt: skip
    return tag("figure", tag("figcaption", tag("b", escape(title)) + _legend(series)) + drawn, class_="plot")


def _line(places: Sequence[tuple[float, float]], one: Series) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    drawn = void("polyline", points=points, class_=f"line c{one.colour}{DASHES[one.dash]}", data_label=one.label)
    if len(places) > 30:
        return drawn
    return drawn + "".join(
        void("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=2, class_=f"c{one.colour}") for x, y in places
    )


def _range(one: Series) -> str:
    (x_first, first), (x_last, last) = one.points[0], one.points[-1]
    if len(one.points) == 1:
        return f"{short(last)} at {x_last:g}"
    return f"from {short(first)} at {x_first:g} to {short(last)} at {x_last:g}"


def _legend(series: Sequence[Series]) -> str:
    entries = []
    for one in series:
        style = f"line c{one.colour}{DASHES[one.dash]}"
        sign = tag("svg", void("line", x1=0, x2=18, y1=5, y2=5, class_=style), viewBox="0 0 18 10",
                   width=18, height=10, aria_hidden="true")  # fmt: skip
        entries.append(tag("li", sign + escape(one.label) + " " + tag("span", short(one.points[-1][1]), class_="last")))
    return tag("ul", "".join(entries), class_="legend")


def _text(x: float, y: float, text: str, anchor: str = "start", style: str = "tick") -> str:
    return tag("text", escape(text), x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=style)


# --------------------------------------------------------------------- intervals, marks on a line


class Interval(NamedTuple):
    label: str
    low: float
    point: float
    high: float


def intervals(title: str, rows: Sequence[Interval], unit: str) -> str:
    """A row for each: its point, its interval, and where zero lies."""
    low, high = bounds([0.0, *(row.low for row in rows), *(row.high for row in rows)])
    left, right, line, top = 128, 12, 22, 6
    width, height = 500, top + line * len(rows) + 22

    def across(value: float) -> float:
        return left + (value - low) / (high - low) * (width - left - right)

    bottom = height - 20
    parts = []
    for value in ticks(low, high, 5):
        x = f"{across(value):.1f}"
        parts.append(void("line", x1=x, x2=x, y1=top, y2=bottom, class_="zero" if abs(value) < 1e-12 else "grid"))
        parts.append(_text(float(x), height - 6, f"{value:+.3g}" if value else "0", "middle"))
    for i, row in enumerate(rows):
        y = top + line * (i + 0.5)
        apart = "c2" if row.low > 0 else "c4" if row.high < 0 else "c7"
        parts.append(_text(left - 8, y + 4, cut(row.label, 19), "end", "name"))
        parts.append(void("line", x1=f"{across(row.low):.1f}", x2=f"{across(row.high):.1f}", y1=y, y2=y,
                          class_=f"line {apart}"))  # fmt: skip
        parts.append(void("circle", cx=f"{across(row.point):.1f}", cy=y, r=4, class_=apart))
    what = "; ".join(f"{row.label} {row.point:+.2f} [{row.low:+.2f}, {row.high:+.2f}]" for row in rows)
    drawn = tag("svg", "".join(parts), viewBox=f"0 0 {width} {height}", role="img", aria_label=f"{title}: {what}")
    return tag("figure", tag("figcaption", tag("b", escape(title)) + " " + escape(unit)) + drawn, class_="wide")


class Reach(NamedTuple):
    """What a method got, what its slate allowed, and what any slate would have, from 0 to 1."""

    label: str
    got: float
    slate: float
    best: float


def reaches(title: str, rows: Sequence[Reach]) -> str:
    """Three marks for each method, on a line from 0 to 100 %."""
    left, right, line, top = 128, 14, 24, 6
    width, height = 500, top + line * len(rows) + 22

    def across(value: float) -> float:
        return left + value * (width - left - right)

    bottom = height - 20
    parts = []
    for value in (0, 0.2, 0.4, 0.6, 0.8, 1):
        x = f"{across(value):.1f}"
        parts.append(void("line", x1=x, x2=x, y1=top, y2=bottom, class_="grid"))
        parts.append(_text(float(x), height - 6, f"{100 * value:.0f}", "middle"))
    for i, row in enumerate(rows):
        y = top + line * (i + 0.5)
        got, slate, best = (f"{across(v):.1f}" for v in (row.got, row.slate, row.best))
        parts.append(_text(left - 8, y + 4, cut(row.label, 19), "end", "name"))
        parts.append(void("line", x1=slate, x2=best, y1=y, y2=y, class_="lost-slate"))
        parts.append(void("line", x1=got, x2=slate, y1=y, y2=y, class_="lost-rank"))
        parts.append(void("circle", cx=got, cy=y, r=5, class_="c0"))
        parts.append(void("rect", x=f"{float(slate) - 1.5:.1f}", y=y - 7, width=3, height=14, class_="c3"))
        parts.append(void("rect", x=f"{float(best) - 1.5:.1f}", y=y - 7, width=3, height=14, class_="c7"))
    what = "; ".join(f"{r.label} {100 * r.got:.1f}, {100 * r.slate:.1f}, {100 * r.best:.1f}" for r in rows)
    drawn = tag("svg", "".join(parts), viewBox=f"0 0 {width} {height}", role="img", aria_label=f"{title}: {what}")
    signs = [("c0", "got"), ("c3", "its slate in the best order"), ("c7", "the best slate")]
    legend = "".join(tag("li", tag("span", "", class_=f"dot {c}") + escape(text)) for c, text in signs)
    caption = tag("figcaption", tag("b", escape(title)) + tag("ul", legend, class_="legend"))
    return tag("figure", caption + drawn, class_="wide")
