"""What figures share: a figure, its style, and its way into a page."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from report.page import data_uri

GREY, RED, INK = "#999999", "#b3261e", "#222222"
LEGEND = {"frameon": False, "fontsize": 8.5}
STYLE: Any = {  # matplotlib types its keys as literals
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "svg.hashsalt": "calibration",  # equal figures give equal bytes
}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches; make its axes within `matplotlib.rc_context(STYLE)`."""
    return Figure(figsize=(width, height), layout="constrained")


def svg(figure: Figure) -> str:
    """The figure as the address of an embedded file."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return data_uri("image/svg+xml", buffer.getvalue())
