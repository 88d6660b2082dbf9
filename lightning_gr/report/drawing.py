"""Drawings of the report: SVG whose colours are the page's, so that they follow its light and dark mode.

A colour is drawn as one that nobody would choose and then replaced by a CSS variable. Of a user's text only a drawing's
title gets here, escaped; other names are the page's, in HTML.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 380, 210
"""In CSS pixels, where a figure has its natural size."""

COLOURS = 8
DASHES = ("solid", "6 3", "2 2", "8 2 2 2")
"""Of lines, as SVG has them; with the colour, what tells one line from another."""

_TEXT_SIZE = 11.5
_TEXT, _GRID, _GROUND = "#0a0b01", "#0a0b02", "#0a0b03"
_VARIABLES = {_TEXT: "currentColor", _GRID: "var(--grid)", _GROUND: "var(--card)"}
_VARIABLES |= {f"#0a0c0{i}": f"var(--c{i})" for i in range(COLOURS)}
_POINTS_WITH_MARKERS = 30


@dataclass
class Line:
    """A line of a chart.

    Args:
        x: ascending.
        y: one each; NaN leaves a gap.
        colour: number of the colour.
        dash: number of the dash pattern.
        faint: whether it stands behind another one.
    """

    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dash: int = 0
    faint: bool = False


def line_chart(
    lines: Sequence[Line],
    *,
    name: str,
    title: str,
    y_text: Callable[[float], str],
    x_label: str = "step",
    low: float | None = None,
) -> str:
    """Lines over a common axis.

    Args:
        lines: at least one point in all.
        name: unique in the page; ids in the SVG begin with it.
        title: what is read out to those who do not see it.
        y_text: how a value is written at the axis.
        x_label: what the horizontal axis is.
        low: where the vertical axis begins at the latest; None lets it begin at the lowest value.
    """
    with _axes() as (figure, axes):
        for line in lines:
            axes.plot(
                line.x,
                line.y,
                color=_colour(line.colour),
                linestyle=_dash(line.dash),
                linewidth=1.0 if line.faint else 1.8,
                alpha=0.35 if line.faint else 1.0,
                marker="o" if len(line.x) <= _POINTS_WITH_MARKERS and not line.faint else None,
                markersize=3.5,
                solid_capstyle="round",
            )
        _format(axes.yaxis, y_text)
        _format(axes.xaxis, short, integer=x_label == "step")
        _no_narrower_than_precision(axes)
        if low is not None:
            axes.set_ylim(bottom=min(low, axes.dataLim.y0))
        axes.set_xlabel(x_label, loc="right", labelpad=2)
        return _svg(figure, name, title)


def bar_chart(
    groups: Sequence[Sequence[float]],
    labels: Sequence[str],
    *,
    name: str,
    title: str,
    y_text: Callable[[float], str],
    x_label: str,
) -> str:
    """Bars beside each other, one of each group at each label.

    Args:
        groups: by colour, the heights.
        labels: below the bars, in plain ASCII of this package.
        name: unique in the page.
        title: what is read out.
        y_text: how a value is written at the axis.
        x_label: what the horizontal axis is.
    """
    with _axes() as (figure, axes):
        width = 0.84 / len(groups)
        for number, heights in enumerate(groups):
            places = [i + (number - (len(groups) - 1) / 2) * width for i in range(len(heights))]
            axes.bar(places, heights, width * 0.94, color=_colour(number))
        every = -(-len(labels) // 6)  # more labels would run into each other
        shown = range(0, len(labels), every)
        axes.set_xticks(list(shown), [labels[i] for i in shown])
        axes.set_ylim(bottom=0)
        _format(axes.yaxis, y_text)
        axes.set_xlabel(x_label, loc="right", labelpad=2)
        return _svg(figure, name, title)


def share_chart(rows: Sequence[Sequence[float]], labels: Sequence[str], *, name: str, title: str) -> str:
    """Horizontal bars of parts that add up to 1, with the percentage written where there is room.

    Args:
        rows: by bar, its parts, each of which has a colour.
        labels: beside the bars, in plain ASCII of this package.
        name: unique in the page.
        title: what is read out.
    """
    with _axes(height=60 + 38 * len(rows)) as (figure, axes):
        for row, parts in enumerate(rows):
            left = 0.0
            for number, part in enumerate(parts):
                axes.barh(row, part, 0.62, left=left, color=_colour(number))
                if part >= 0.12:
                    axes.text(
                        left + part / 2, row, f"{part:.0%}", ha="center", va="center", color=_GROUND, weight="bold"
                    )
                left += part
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)
        _format(axes.xaxis, percent)
        return _svg(figure, name, title)


def short(value: float) -> str:
    """``1.25M``, ``320k``, ``0.05``: at most three or four digits."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:.4g}"


def percent(value: float) -> str:
    """``12.5%``, ``3%``, ``0.02%``."""
    return f"{100 * value:.3g}%"


@contextmanager
def _axes(height: float = HEIGHT) -> Iterator[tuple[Figure, Axes]]:
    """Of a figure of its own, which no window and no other figure knows of."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",
        "font.size": _TEXT_SIZE,
        "font.family": "sans-serif",
        "text.usetex": False,
        "text.parse_math": False,
        "axes.unicode_minus": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.edgecolor": _GRID,
        "axes.labelcolor": _TEXT,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.xmargin": 0.02,
        "grid.color": _GRID,
        "grid.linewidth": 0.8,
        "text.color": _TEXT,
        "xtick.color": _TEXT,
        "ytick.color": _TEXT,
        "xtick.major.size": 0.0,
        "ytick.major.size": 0.0,
        "figure.dpi": 72,
        "savefig.dpi": "figure",
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own style is not for this page
        matplotlib.rcParams.update(settings)
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        yield figure, figure.add_subplot()


def _format(axis: Any, text: Callable[[float], str], *, integer: bool = False) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=integer))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def _no_narrower_than_precision(axes: Axes) -> None:
    """Widens the vertical axis of a line that is flat, whose ticks would all be the same text."""
    low, high = axes.get_ylim()
    middle, least = (low + high) / 2, 2e-2 * max(abs(low), abs(high))
    if high - low < least:
        axes.set_ylim(middle - least / 2, middle + least / 2)


def _colour(number: int) -> str:
    return f"#0a0c0{number % COLOURS}"


def _dash(number: int) -> Any:
    dash = DASHES[number % len(DASHES)]
    return "-" if dash == "solid" else (0, [float(x) / 1.8 for x in dash.split()])


def _svg(figure: Figure, name: str, title: str) -> str:
    """The figure's SVG element, to stand inside a page: no size of its own, ids of its own, colours of the page."""
    import matplotlib

    written = io.StringIO()
    matplotlib.rcParams["svg.hashsalt"] = name  # or ids would be random
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for drawn, variable in _VARIABLES.items():
        text = text.replace(drawn, variable)
    text = re.sub(
        r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL
    )  # it would hold for the whole page
    text = re.sub(r"font-family: [^;]*;", "", text)
    opened = f'<svg role="img" aria-labelledby="{name}-title" '
    text = text.replace("<svg ", opened, 1)
    return text.replace(">", f'><title id="{name}-title">{html.escape(title)}</title>', 1)
