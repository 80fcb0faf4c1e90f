"""What the report's figures share: a figure, its style, and its way into the page."""

from __future__ import annotations

import io

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from report.page import HIGH_COLOUR, LOW_COLOUR, data_uri

from .words import resolution

GREY, INK = "#999999", "#222222"
LEGEND = {"frameon": False, "fontsize": 8.5}
_STYLE = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "svg.hashsalt": "perf",  # equal figures give equal bytes
}
_COLOURS = {
    "static-low": LOW_COLOUR,
    "static-high": HIGH_COLOUR,
    "static-escalation": "#c98b7a",
    "adaptive": INK,
    "ensemble": "#7a7fd0",
    "adaptive-0": "#5fa8a1",
    "adaptive-30": "#d99a2b",
    "adaptive-100": "#9d755d",
}
_OTHERS = ("#4c78a8", "#b279a2", "#7f9a3b", "#999999")  # the alternatives


def colour(system: str) -> str:
    """Of a system, the same in every figure."""
    if system in _COLOURS or not system.startswith("static-"):
        return _COLOURS.get(system, GREY)
    pixels = resolution(system)
    if pixels is not None:
        return _OTHERS[pixels // 14 % len(_OTHERS)]  # neighbouring resolutions differ by a patch
    return _OTHERS[sum(system.encode()) % len(_OTHERS)]


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of that many inches, and its axes."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots()


def svg(figure: Figure) -> str:
    """The figure as the address of an embedded file."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return data_uri("image/svg+xml", buffer.getvalue())
