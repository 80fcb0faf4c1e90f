"""The figures of a plan: the frontier, and how alignments grow with the number of images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter
from matplotlib.transforms import Bbox

from report.page import HIGH_COLOUR, LOW_COLOUR
from report.words import setting

from .drawing import GREY, INK, LEGEND, RED, STYLE, new_figure, svg
from .plan_points import FAMILIES, Point

_BEATEN = "#f3f0e4"
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5)  # of the cost
_DISTANCES, _DIRECTIONS = (9.0, 13.0, 18.0, 25.0, 34.0), 16  # where a mark may stand, in points
_MARK, _MARKER = (5.0, 5.0), (4.5, 4.5)  # half width and height, in points
_LEADER_FROM = 13.0  # further away than this a thin line tells which point is meant
_PANELS = 3  # in a row
_TITLE = 42  # characters in a line over a panel


class _Look(NamedTuple):
    marker: str
    colour: str
    label: str


_LOOKS = {
    "chosen": _Look("*", HIGH_COLOUR, "cascade, chosen"),
    "certified": _Look("D", HIGH_COLOUR, "cascade, certified"),
    "refused": _Look("X", RED, "cascade, not certified"),
    "low": _Look("o", LOW_COLOUR, "cheap candidate alone"),
    "high": _Look("s", "#7a5230", "full candidate alone"),
    "reference": _Look("s", INK, "full model"),
    "px": _Look("v", "#777777", "alternative, fewer pixels"),
    "tome": _Look("^", "#4c78a8", "alternative, merged tokens"),
    "other": _Look("P", "#96588a", "alternative, other"),
}


@dataclass(frozen=True)
class Curve:
    """An alignment's worth by the number of images it was fitted on, the first without any.

    Attributes:
        title: of the graph.
        helps: whether it does.
        growth: `images` and `acceptable` of each fit.
    """

    title: str
    helps: bool
    growth: Sequence[Mapping[str, Any]]


def frontier(points: Sequence[Point], max_risk: float) -> str:
    """Cost and agreement of every graph alone and of every tested cascade.

    Args:
        points: the full model among them.
        max_risk: what a cascade's answers may lose.
    """
    figure = new_figure(8.8, 5.4)
    with matplotlib.rc_context(STYLE):
        axes = figure.subplots()
    for family in FAMILIES:
        joined = [p for p in points if p.family == family]
        joined += [p for p in points if p.kind == "reference" and joined]
        costs, shares = [p.cost for p in joined], [p.acceptable for p in joined]
        axes.plot(costs, shares, color=_LOOKS[family].colour, linewidth=1, zorder=2)
    for kind, look in _LOOKS.items():
        _scatter(axes, [p for p in points if p.kind == kind], look)
    limit = f"risk limit ε = {setting(max_risk)}"
    axes.axhline(1 - max_risk, color=RED, linewidth=1, linestyle="--", zorder=1, label=limit)
    _frame(axes, points, 1 - max_risk)
    _shade_beaten(axes, points)
    figure.legend(loc="outside upper left", ncols=4, columnspacing=1.2, **LEGEND)
    _write_marks(figure, axes, sorted(points, key=lambda p: not p.is_cascade))
    return svg(figure)


def growth(curves: Sequence[Curve]) -> str:
    """One panel for each alignment, all on one scale; red where it does not help."""
    columns, rows = min(_PANELS, len(curves)), math.ceil(len(curves) / _PANELS)
    figure = new_figure(0.4 + 3.1 * columns, 0.3 + 2.4 * rows)
    with matplotlib.rc_context(STYLE):
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    panels = grid.ravel().tolist()
    for axes, curve in zip(panels, curves, strict=False):
        colour = LOW_COLOUR if curve.helps else RED
        without, *fits = curve.growth
        images, shares = [f["images"] for f in fits], [f["acceptable"] for f in fits]
        axes.axhline(without["acceptable"], color=GREY, linestyle="--", linewidth=1)
        axes.plot(images, shares, "o-", color=colour, markersize=5, clip_on=False)
        title = "\n".join(wrap(curve.title, _TITLE))  # a panel cuts what is wider than itself
        axes.set_title(title, color=INK if curve.helps else RED, fontsize=9, loc="left")
        axes.set_xlim(0, 1.05 * max(images))
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        axes.grid(color="#eeeeee")
    for axes in panels[len(curves) :]:
        axes.remove()
    figure.supxlabel("images to learn from", fontsize=9.5)
    figure.supylabel("acceptable if it answers alone", fontsize=9.5)
    return svg(figure)


def _scatter(axes: Axes, some: Sequence[Point], look: _Look) -> None:
    if not some:
        return
    for point in some:
        ends = [point.acceptable] * 2
        axes.plot(point.spread, ends, color=look.colour, linewidth=1.2, zorder=3)
    axes.plot(
        [point.cost for point in some],
        [point.acceptable for point in some],
        look.marker,
        color=look.colour,
        markeredgecolor="white",
        markersize=17 if look.marker == "*" else 8,
        linestyle="none",
        zorder=5 if some[0].is_cascade else 4,
        label=look.label,
    )


def _frame(axes: Axes, points: Sequence[Point], limit: float) -> None:
    """Limits that leave room for the marks, on a scale where equal steps are equal factors."""
    least = min(p.spread[0] for p in points)
    most = max(p.spread[1] for p in points)
    lowest = min(limit, *(p.acceptable for p in points))
    room = max(1 - lowest, 0.02)
    axes.set_xscale("log")
    axes.set(
        xlim=(0.8 * least, 1.2 * most),
        ylim=(lowest - 0.12 * room, 1 + 0.1 * room),
        xlabel="cost of an image, of the full model's (logarithmic)",
        ylabel="acceptable answers, of the test images",
    )
    axes.xaxis.set_major_locator(FixedLocator(_TICKS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: setting(round(share, 4))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.grid(color="#eeeeee")


def _shade_beaten(axes: Axes, points: Sequence[Point]) -> None:
    """Shade where a graph costs more than the chosen cascade and agrees no more often."""
    for chosen in (p for p in points if p.kind == "chosen"):
        (_, right), (bottom, _) = axes.get_xlim(), axes.get_ylim()
        ends = [chosen.cost, right]
        label = "beaten by the chosen cascade"
        axes.fill_between(
            ends, bottom, chosen.acceptable, color=_BEATEN, linewidth=0, zorder=0, label=label
        )


def _write_marks(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Write each point's mark beside it, the first ones having the first choice of a place.

    Freezes the figure's layout, because a place is free only at the size it was looked up at.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    unit = figure.dpi / 72  # pixels of a point
    places = axes.transData.transform([(p.cost, p.acceptable) for p in points])
    taken = [_box(place, _MARKER, unit) for place in places] + [_whisker(axes, p) for p in points]
    for point, place in zip(points, places, strict=True):
        offsets = [
            (distance * math.cos(angle), distance * math.sin(angle))
            for distance in _DISTANCES
            for angle in math.pi / 2 + np.linspace(0, 2 * math.pi, _DIRECTIONS, endpoint=False)
        ]
        boxes = [_box(place + unit * np.array(offset), _MARK, unit) for offset in offsets]
        trouble = [_trouble(axes.bbox, box, taken) for box in boxes]
        best = int(np.argmin(trouble))  # the nearest of those that cover least
        far = math.hypot(*offsets[best]) > _LEADER_FROM
        colour = _LOOKS[point.kind].colour
        axes.annotate(
            point.mark,
            (point.cost, point.acceptable),
            offsets[best],
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=10.5 if point.is_cascade else 8.5,
            fontweight="bold",
            color=colour,
            zorder=6,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6} if far else None,
        )
        taken.append(boxes[best])


def _trouble(frame: Bbox, box: Bbox, taken: Sequence[Bbox]) -> int:
    outside = not (frame.contains(*box.min) and frame.contains(*box.max))
    return outside + sum(box.overlaps(other) for other in taken)


def _whisker(axes: Axes, point: Point) -> Bbox:
    return Bbox(axes.transData.transform([(cost, point.acceptable) for cost in point.spread]))


def _box(centre: Any, half: tuple[float, float], unit: float) -> Bbox:
    reach = unit * np.array(half)
    return Bbox([centre - reach, centre + reach])
