"""Labels beside points, placed so that they cover neither each other nor points and lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

_DISTANCES = (
    7.0,
    14.0,
    24.0,
    38.0,
    54.0,
    72.0,
    96.0,
    124.0,
)  # from the point to the label's edge, in points
_DIRECTIONS = 16
_LEADER_FROM = 20.0  # further away than this a thin line tells which point is meant
_MARKER = 6.0  # half width kept free around a point, in points
_GAP = 2.0  # between labels, in points


@dataclass(frozen=True)
class Label:
    """What to write beside a point.

    Attributes:
        at: the point, in data coordinates.
        text: of the label.
        style: of the text.
    """

    at: tuple[float, float]
    text: str
    style: dict[str, Any] = field(default_factory=dict)


def place(
    axes: Axes, labels: Sequence[Label], lines: Sequence[NDArray[np.float64]] = ()
) -> list[Annotation]:
    """Write labels, those that come first having the first choice.

    Freezes the figure's layout, because a place is free only at the size it was looked up at.

    Args:
        axes: with its limits set.
        labels: of the points.
        lines: (n, 2) corners in data coordinates, to be crossed by no label if possible.
    """
    figure = axes.figure
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    unit = figure.dpi / 72  # pixels of a point
    points = axes.transData.transform([label.at for label in labels])
    room = _Room(
        frame=axes.bbox,
        markers=[_box(point, np.full(2, _MARKER * unit)) for point in points],
        lines=[_along(axes.transData.transform(line)) for line in lines],
    )
    written = []
    for label, point in zip(labels, points, strict=True):
        note = axes.annotate(
            label.text,
            label.at,
            (0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            zorder=6,
            **label.style,
        )
        half = np.array(note.get_window_extent().size) / 2
        places = [
            _place(point, half, distance * unit, turn, distance > _LEADER_FROM)
            for distance in _DISTANCES
            for turn in range(_DIRECTIONS)
        ]
        best = min(places, key=lambda place: place.distance + room.trouble(place))
        note.set_position(tuple((best.centre - point) / unit))
        room.take(best, _GAP * unit)
        if len(best.leader):
            ends = axes.transData.inverted().transform(best.leader[[0, -1]])
            shade = label.style.get("color", "#222222")
            axes.plot(*ends.T, color=shade, linewidth=0.6, zorder=2)
        written.append(note)
    return written


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a label could stand, in pixels; `leader` is empty where it needs none."""

    distance: float
    centre: NDArray[np.float64]
    box: Bbox
    leader: NDArray[np.float64]


def _place(
    point: NDArray[np.float64],
    half: NDArray[np.float64],
    distance: float,
    turn: int,
    needs_leader: bool,
) -> _Place:
    angle = 2 * math.pi * turn / _DIRECTIONS
    centre = point + np.array([math.cos(angle), math.sin(angle)]) * (half + distance)
    edge = np.clip(point, centre - half, centre + half)
    leader = _along(np.array([edge, point])) if needs_leader else np.empty((0, 2))
    return _Place(distance, centre, _box(centre, half), leader)


@dataclass
class _Room:
    """What is taken, in pixels."""

    frame: Bbox
    markers: list[Bbox]
    lines: list[NDArray[np.float64]]
    labels: list[Bbox] = field(default_factory=list)

    def trouble(self, place: _Place) -> float:
        """How bad a place is: covering a label is worse than a point, that worse than a line."""
        box = place.box
        outside = not (self.frame.contains(*box.min) and self.frame.contains(*box.max))
        hidden = sum(box.overlaps(other) for other in self.labels)
        struck = sum(_inside(place.leader, other) for other in self.labels)
        covered = sum(box.overlaps(marker) for marker in self.markers)
        crossed = sum(_inside(line, box) for line in self.lines)
        return 1e5 * (hidden + outside) + 1e3 * (covered + struck) + 40 * crossed

    def take(self, place: _Place, gap: float) -> None:
        """Let nothing else stand there."""
        self.labels.append(place.box.padded(gap))
        if len(place.leader):
            self.lines.append(place.leader)


def _box(centre: NDArray[np.float64], half: NDArray[np.float64]) -> Bbox:
    return Bbox([centre - half, centre + half])


def _inside(line: NDArray[np.float64], box: Bbox) -> bool:
    return bool(((line > box.min) & (line < box.max)).all(axis=1).any())


def _along(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points on a line, close enough together that no label slips between two."""
    steps = np.linspace(0, 1, 100)[:, None]
    pairs = zip(corners[:-1], corners[1:], strict=True)
    return np.concatenate([start + steps * (end - start) for start, end in pairs] or [corners])
