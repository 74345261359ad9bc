"""HTML from Python: everything that is not markup is escaped here."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # HTML may not hold them


def escape(text: object) -> str:
    return html.escape(_CONTROL.sub("\ufffd", str(text)), quote=True)


def cut(text: str, size: int) -> str:
    """At most so many characters, the last one an ellipsis where it is longer."""
    return text if len(text) <= size else text[: size - 1] + "…"


def tag(name: str, content: str = "", **attributes: object) -> str:
    """An element; `content` is markup. Attributes are escaped; `class_` is class, `_` in a name is `-`."""
    return f"<{name}{_written(attributes)}>{content}</{name}>"


def void(name: str, **attributes: object) -> str:
    """An element of SVG without content."""
    return f"<{name}{_written(attributes)}/>"


def _written(attributes: Mapping[str, object]) -> str:
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    return "".join(f' {names[name]}="{escape(value)}"' for name, value in attributes.items())


def table(caption: str, rows: Sequence[Sequence[str]], best: bool = False) -> str:
    """The head of the columns first; the first cell of a row is its head. best: mark the greatest of each column."""
    head, *body = rows
    greatest = [_greatest([row[j] for row in body]) if best and j else None for j in range(len(head))]
    made, cells = [], "".join(tag("th", escape(cell), scope="col") for cell in head)
    for row in body:
        others = []
        for j, cell in enumerate(row[1:], 1):
            top = greatest[j] is not None and _number(cell) == greatest[j]
            others.append(tag("td", tag("strong", escape(cell)) if top else escape(cell)))
        made.append(tag("tr", tag("th", escape(row[0]), scope="row") + "".join(others)))
    named = tag("caption", tag("span", escape(caption)))
    named += tag("thead", tag("tr", cells)) + tag("tbody", "".join(made))
    return tag("div", tag("table", named), class_="scroll", role="region", aria_label=caption, tabindex=0)


def _number(cell: str) -> float:
    return float(cell.split()[0])


def _greatest(cells: Sequence[str]) -> float | None:
    """None where there is nothing to compare."""
    found = {_number(cell) for cell in cells}
    return max(found) if len(found) > 1 else None


def data(value: object) -> str:
    """JSON that no HTML parser can take for markup, inside a script element or elsewhere."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for mark in "<>&\u2028\u2029":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text
