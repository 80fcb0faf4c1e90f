"""What an answer costs against how often it will do: the figure of a plan and of a measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .figures import Axis, Rule, Series, chart

Point = Mapping[str, Any]


class Look(NamedTuple):
    """How points of one kind are drawn: `name` is for the legend, `above` draws over others."""

    name: str
    colour: str
    marker: str
    size: float = 13
    above: bool = False


def frontier(
    points: Sequence[Point],
    looks: Mapping[str, Look],
    lines: Sequence[tuple[str, str, Sequence[Point]]],
    x: Axis,
    y: str,
    rule: Rule,
    beaten_by: Sequence[Point],
    beaten: str,
    size: tuple[float, float],
) -> str:
    """Draw points that have a `mark`, a `kind`, a `cost` with its `spread`, and are `acceptable`.

    Kinds without a look are not marked. Each of `lines` has a name, a colour and the points that
    it joins; what lies right of a point in `beaten_by` and no higher is shaded.
    """
    series = [
        Series(name, *_places(joined), colour, line="-", width=1)
        for name, colour, joined in lines
        if joined
    ]
    for kind, look in looks.items():
        if some := [point for point in points if point["kind"] == kind]:
            series.append(
                Series(
                    look.name,
                    *_places(some),
                    look.colour,
                    look.marker,
                    size=look.size,
                    x_spread=[point["spread"] for point in some],
                    numbers=[point["mark"] for point in some],
                    above=look.above,
                )
            )
    lowest = min(point["acceptable"] for point in points)
    if rule.across:
        lowest = min(lowest, rule.at)
    room = max(1 - lowest, 0.02)
    limits = (lowest - 0.12 * room, 1 + 0.1 * room)
    shaded = [(point["cost"], point["acceptable"]) for point in beaten_by]
    return chart(series, x, Axis(y, percent=True, limits=limits), [rule], shaded, beaten, size=size)


def _places(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [point["cost"] for point in points], [point["acceptable"] for point in points]
