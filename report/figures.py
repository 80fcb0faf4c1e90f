"""The kinds of figure of every page: numbers in, the address of an embedded SVG out.

Equal numbers give equal bytes. What stands where several things are shown is said by a legend and
by numbers inside the markers, which a table beside the figure names.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator, PercentFormatter
from matplotlib.transforms import offset_copy

from .markers import steps_aside
from .page import HIGH_COLOUR, LOW_COLOUR, data_uri
from .words import amount, setting

GREY, INK = "#999999", "#222222"
OTHERS = ("#4c78a8", "#b279a2", "#d99a2b", "#5fa8a1", "#9d755d", "#7a7fd0", "#7f9a3b", "#96588a")
_BEATEN = "#f3f0e4"
_LOG_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)  # of shares
_STYLE: Any = {  # matplotlib types its keys as literals
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "svg.hashsalt": "report",
}
_LEGEND: Any = {"frameon": False, "fontsize": 8.5, "columnspacing": 1.2}
_LEGEND_CHARACTERS = 14.5  # that fit into an inch of a legend
_LEGEND_MARKER = 6  # characters that a marker and the gap to the next column take
_LEGEND_LINE = 0.17  # inches
_USUAL_WIDTH = 6.6  # inches
_LEAST_WRITTEN = 0.06  # share of the longest bar below which its number does not fit inside


@dataclass(frozen=True)
class Axis:
    """How an axis is labelled and scaled.

    Attributes:
        label: what it shows, and in which unit.
        percent: whether its numbers are shares.
        log: whether equal steps are equal factors.
        limits: its ends; None leaves room for all that is drawn.
        ticks: texts at 1, 2, ... instead of numbers.
    """

    label: str
    percent: bool = False
    log: bool = False
    limits: tuple[float | None, float | None] | None = None
    ticks: Sequence[str] = ()


@dataclass(frozen=True)
class Series:
    """Points that are drawn alike.

    Attributes:
        name: in the legend; empty for none.
        x, y: of the n points.
        marker, line: of matplotlib's; empty for none.
        size: of the markers, in points.
        x_spread: for each point the ends of a thin line through it.
        y_spread: the same, upright.
        band: for each point the ends of a shade around the line; a NaN leaves a gap.
        numbers: for each point the text inside its marker.
        hollow: which markers are empty.
        above: whether it is drawn over the others.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    marker: str = ""
    line: str = ""
    width: float = 1.2
    size: float = 6
    x_spread: Sequence[tuple[float, float]] = ()
    y_spread: Sequence[tuple[float, float]] = ()
    band: Sequence[tuple[float, float]] = ()
    numbers: Sequence[str] = ()
    hollow: Sequence[bool] = ()
    alpha: float = 1.0
    above: bool = False


@dataclass(frozen=True)
class Rule:
    """A straight line through the whole figure.

    Attributes:
        at: its place on the axis that it crosses.
        name: in the legend; empty for none.
        across: whether it runs from left to right.
        line: of matplotlib's.
    """

    at: float
    name: str = ""
    across: bool = False
    colour: str = INK
    line: str = "--"


def chart(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    rules: Sequence[Rule] = (),
    beaten_by: Sequence[tuple[float, float]] = (),
    beaten: str = "",
    size: tuple[float, float] = (_USUAL_WIDTH, 4.2),
) -> str:
    """Points and lines over two axes.

    Args:
        series: in the order in which they are drawn and named.
        x: the axis to the right.
        y: the axis upwards.
        rules: straight lines.
        beaten_by: points; what lies right of one and no higher is shaded.
        beaten: name of the shade in the legend.
        size: width and height in inches, without the legend above.
    """
    figure, axes = _figure(*size)
    for one in series:
        _draw(axes, one)
    for rule in rules:
        line = axes.axhline if rule.across else axes.axvline
        label = rule.name or None
        line(rule.at, color=rule.colour, linestyle=rule.line, linewidth=1, label=label, zorder=1)
    _scale(axes, "x", x)
    _scale(axes, "y", y)
    axes.grid(color="#eeeeee")
    if beaten_by:
        _shade(axes, beaten_by, beaten)
    _legend(figure, axes)
    _write_numbers(figure, axes, series)
    return _svg(figure)


def _draw(axes: Axes, one: Series) -> None:
    order = 5 if one.above else 3
    for ends, at in zip(one.x_spread, one.y, strict=False):
        axes.plot(ends, [at, at], color=one.colour, linewidth=1.2, zorder=2)
    for ends, at in zip(one.y_spread, one.x, strict=False):
        axes.plot([at, at], ends, color=one.colour, linewidth=1.2, zorder=2)
    if one.band:
        low, high = zip(*one.band, strict=True)
        axes.fill_between(one.x, low, high, color=one.colour, alpha=0.15, linewidth=0, zorder=1)
    name = one.name or None
    if one.line:
        label = None if one.marker else name
        style: Any = {"color": one.colour, "linewidth": one.width, "zorder": order}
        axes.plot(one.x, one.y, one.line, label=label, **style)
    if not one.marker:
        return
    if one.numbers:  # the marker that is seen is drawn once there is a scale
        axes.plot(one.x, one.y, "o", color=one.colour, markersize=3, linestyle="", zorder=order)
        axes.plot([], [], one.marker, color=one.colour, label=name, markersize=8, linestyle="")
        return
    for is_empty in (False, True):
        rows = [i for i in range(len(one.x)) if _is_hollow(one, i) == is_empty]
        if rows:
            points = ([one.x[i] for i in rows], [one.y[i] for i in rows])
            axes.plot(*points, label=name, **_marker(one, is_empty))
            name = None  # named once


def _is_hollow(one: Series, row: int) -> bool:
    return bool(one.hollow) and one.hollow[row]


def _marker(one: Series, is_empty: bool) -> dict[str, Any]:
    """How a marker is drawn."""
    edge = one.colour if one.hollow else "white"
    return {
        "marker": one.marker,
        "linestyle": "",
        "color": one.colour,
        "markersize": one.size,
        "markeredgecolor": edge if one.alpha == 1 else "none",
        "markerfacecolor": "white" if is_empty else one.colour,
        "alpha": one.alpha,
        "zorder": 6 if one.above else 4,
        "clip_on": False,
    }


def _write_numbers(figure: Figure, axes: Axes, series: Sequence[Series]) -> None:
    """Draw the markers that have numbers, each where it covers no other one.

    A marker that finds its place taken steps aside, and a line leads to the place. Freezes the
    layout, because a place is free only at the size at which it was looked up.
    """
    numbered = [one for one in series if one.numbers]
    if not numbered:
        return
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    drawn = [
        (one, row)
        for one in sorted(numbered, key=lambda one: (not one.above, -one.size))
        for row in range(len(one.numbers))
    ]
    centres = axes.transData.transform([(one.x[row], one.y[row]) for one, row in drawn])
    steps = steps_aside(centres * 72 / figure.dpi, [one.size for one, _ in drawn])
    for (one, row), step in zip(drawn, steps, strict=True):
        _write_number(figure, axes, one, row, step)


def _write_number(
    figure: Figure, axes: Axes, one: Series, row: int, aside: tuple[float, float]
) -> None:
    place = (one.x[row], one.y[row])
    moved = offset_copy(axes.transData, figure, *aside, units="points")
    style = _marker(one, _is_hollow(one, row))
    axes.plot(*([value] for value in place), transform=moved, **style)
    axes.annotate(
        one.numbers[row],
        place,
        aside,
        textcoords="offset points",
        ha="center",
        va="center_baseline",
        fontsize=min(8.0, 0.6 * one.size),
        fontweight="bold",
        color=one.colour if _is_hollow(one, row) else "white",
        zorder=style["zorder"] + 0.5,
        arrowprops={"arrowstyle": "-", "color": one.colour, "linewidth": 0.8, "zorder": 3}
        if any(aside)
        else None,
    )


def _shade(axes: Axes, points: Sequence[tuple[float, float]], name: str) -> None:
    costs, heights = np.array(sorted(points)).T
    best = np.maximum.accumulate(heights)
    end, (bottom, _) = axes.get_xlim()[1], axes.get_ylim()
    axes.fill_between(
        [*costs, end],
        bottom,
        [*best, best[-1]],
        step="post",
        color=_BEATEN,
        linewidth=0,
        zorder=0,
        label=name or None,
    )


def histogram(
    groups: Mapping[str, Sequence[float]],
    label: str,
    things: str = "images",
    rules: Sequence[Rule] = (),
    size: tuple[float, float] = (5.6, 3.2),
) -> str:
    """How often values occur, stacked: of those without a loss, then of those with one.

    `things` are what is counted. A rule that is far from every value is left out. The size is in
    inches, without the legend above.
    """
    figure, axes = _figure(*size)
    values = np.concatenate([np.asarray(group, np.float64) for group in groups.values()])
    axes.hist(
        list(groups.values()),
        bins=np.histogram_bin_edges(values, 40).tolist(),
        stacked=True,
        color=[LOW_COLOUR, HIGH_COLOUR][: len(groups)],
        label=list(groups),
    )
    for rule in near(rules, values.tolist()):
        axes.axvline(rule.at, color=rule.colour, linestyle=rule.line, label=rule.name)
    axes.set(xlabel=label, ylabel=things)
    _legend(figure, axes)
    return _svg(figure)


def near(rules: Sequence[Rule], values: Sequence[float]) -> list[Rule]:
    """The rules that lie near the values: one far away would squeeze them together."""
    least, most = min(values), max(values)
    margin = 0.1 * max(most - least, 1e-9)
    return [rule for rule in rules if least - margin <= rule.at <= most + margin]


def bars(
    rows: Mapping[str, Mapping[str, float]],
    totals: Sequence[float],
    colours: Mapping[str, str],
    label: str,
) -> str:
    """Stacked bars, one above the other: each named on the left, its total at its end.

    Each bar's parts have names, which `colours` knows.
    """
    figure, axes = _figure(5.6, 0.8 + 0.75 * len(rows))
    longest = max(totals)
    named: set[str] = set()
    for height, (parts, total) in enumerate(zip(rows.values(), totals, strict=True)):
        left = 0.0
        for name, value in parts.items():
            width = max(value, 0.0)  # a difference of two measurements can fall below 0
            shown = None if name in named else name
            named.add(name)
            colour = colours.get(name, GREY)
            axes.barh(height, width, left=left, height=0.62, color=colour, label=shown)
            if width > _LEAST_WRITTEN * longest:
                middle = left + width / 2
                axes.text(middle, height, amount(width), ha="center", va="center", color="white")
            left += width
        axes.text(left, height, f" {amount(total)} ms", va="center", fontweight="bold")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set(xlabel=label, ylim=(len(rows) - 0.5, -0.5), xlim=(0, 1.2 * longest))
    axes.grid(axis="x", color="#eeeeee")
    _legend(figure, axes)
    return _svg(figure)


def _scale(axes: Axes, name: str, scale: Axis) -> None:
    axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set_label_text(scale.label)
    if scale.log:
        (axes.set_xscale if name == "x" else axes.set_yscale)("log")
        axis.set_minor_locator(NullLocator())
        if scale.percent:
            axis.set_major_locator(FixedLocator(_LOG_TICKS))
            axis.set_major_formatter(FuncFormatter(lambda share, _: setting(round(share, 4))))
        else:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    elif scale.percent:
        axis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    if scale.ticks:
        axis.set_ticks(range(1, len(scale.ticks) + 1), labels=scale.ticks)
    if scale.limits is not None:
        (axes.set_xlim if name == "x" else axes.set_ylim)(*scale.limits)


def _legend(figure: Figure, axes: Axes) -> None:
    """Name everything above the axes, in as many columns as there is room for."""
    names = axes.get_legend_handles_labels()[1]
    if not names:
        return
    width, height = figure.get_size_inches()
    room = int(_LEGEND_CHARACTERS * width // (max(map(len, names)) + _LEGEND_MARKER))
    columns = max(1, min(4, room))
    figure.set_size_inches(width, height + _LEGEND_LINE * -(-len(names) // columns))
    figure.legend(loc="outside upper left", ncols=columns, **_LEGEND)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots()


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return data_uri("image/svg+xml", buffer.getvalue())
