"""Files of plots: SVG or PNG, the same bytes for the same numbers. matplotlib is imported here, when one is drawn."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from fgrpo_jax.config import ConfigError
from fgrpo_jax.files import path_of, write_atomically


def check_name(plot: str) -> None:
    """Raises ConfigError for a name of another kind of file."""
    if Path(plot).suffix not in (".svg", ".png"):
        raise ConfigError(f"a plot, {plot!r}, must end in .svg or .png")


def panels(count: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    """A figure, and its panels side by side, of one y axis; size: of each, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * count, size[1]), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for panel in axes:
        panel.grid(alpha=0.3)
    return figure, list(axes)


def save(figure: Any, plot: str) -> None:
    """Without the date, and names drawn from the plot alone."""
    import matplotlib

    picture, kind = io.BytesIO(), Path(plot).suffix[1:]
    with matplotlib.rc_context({"svg.hashsalt": "fgrpo_jax"}):
        figure.savefig(picture, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None})
    write_atomically(path_of(plot), picture.getvalue())
