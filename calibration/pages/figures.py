"""The figures of the report and the analysis: arrays in, an embedded SVG out."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from report.page import data_uri
from report.words import setting

from .. import metrics
from .decisions import Decisions, UnitBin
from .page import HIGH_COLOUR, LOW_COLOUR

FloatVector = NDArray[np.float64]
BoolVector = NDArray[np.bool_]

MAX_POINTS = 2000  # of a scatter: more make the page heavy and the eye no wiser
_GREY, _RED, _INK = "#999999", "#b3261e", "#222222"
REFERENCES = {  # what signals are held against
    "random": "chance",
    "oracle": "the measured change, known once both rungs have run",
}
_OTHERS = ("#4c78a8", "#b279a2", "#d99a2b", "#5fa8a1", "#9d755d", "#7a7fd0")
_STYLE = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "calibration",  # equal figures give equal bytes
}
_LEGEND = {"frameon": False, "fontsize": 8.5}


@dataclass(frozen=True)
class Dot:
    """A value with its interval; both None where they are undefined."""

    name: str
    value: float | None
    interval: Sequence[float] | None


def risk_escalation(decisions: Decisions, epsilon: float | None) -> str:
    """Risk against escalation for every signal, with the chosen point."""
    figure, axes = _figure(6.6, 4.8)
    styles = zip(sorted(set(decisions.values) - {decisions.signal}), _OTHERS, strict=False)
    for name, colour in styles:
        _curve(axes, decisions, decisions.values[name], label=name, color=colour, linewidth=1.2)
    constant = np.zeros(len(decisions))
    references = {
        "random": (constant, {"color": _GREY, "linestyle": "--"}),
        "oracle L2": (decisions.oracle, {"color": _GREY, "linestyle": ":", "linewidth": 2}),
        "perfect knowledge of the loss": (
            decisions.loss.astype(np.float64),
            {"color": _GREY, "linestyle": "-", "linewidth": 0.9},
        ),
    }
    _curve(
        axes,
        decisions,
        decisions.values[decisions.signal],
        label=f"{decisions.signal} (chosen)",
        color=_INK,
        linewidth=2.4,
    )
    for name, (values, style) in references.items():
        _curve(axes, decisions, values, label=name, **style)
    if epsilon is not None:
        axes.axhline(epsilon, color=_RED, linewidth=1, label=f"risk limit ε = {setting(epsilon)}")
    axes.plot(
        decisions.escalation,
        decisions.risk,
        "o",
        color=HIGH_COLOUR,
        markeredgecolor="white",
        markersize=10,
        clip_on=False,
        zorder=5,
        label="this calibration",
    )
    axes.set(
        xlim=(0, 1),
        ylim=(0, 1.1 * max(decisions.base_risk, epsilon or 0, 1 / len(decisions))),
        xlabel="escalated: share of the test images",
        ylabel="risk: share kept low with a loss",
    )
    axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    figure.legend(loc="outside lower center", ncols=3, **_LEGEND)
    return _svg(figure)


def dots(rows: Sequence[Dot], chosen: str, chance: float, label: str) -> str:
    """Values with intervals, one line each, from top to bottom."""
    figure, axes = _figure(6.6, 0.9 + 0.3 * len(rows))
    axes.axvline(chance, color=_GREY, linestyle="--", linewidth=1)
    for height, row in enumerate(rows):
        colour = HIGH_COLOUR if row.name == chosen else _GREY if row.name in REFERENCES else _INK
        if row.interval is not None:
            axes.plot(row.interval, [height, height], color=colour, linewidth=1.5)
        if row.value is not None:
            axes.plot(row.value, height, "o", color=colour, markersize=6)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if row.name == chosen else "normal")
    axes.set(xlabel=label, ylim=(len(rows) - 0.5, -0.5))
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
    return _svg(figure)


def thinned(count: int) -> NDArray[np.intp]:
    """Which of `count` points a scatter draws: all, or `MAX_POINTS` chosen with seed 0."""
    if count <= MAX_POINTS:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, MAX_POINTS, replace=False))


def score_against_oracle(decisions: Decisions) -> str:
    """Predicted against measured change, losses in colour, the threshold as a line."""
    figure, axes = _figure(5.6, 4.0)
    rows = thinned(len(decisions))
    # Losses last: they are the few that must be seen.
    for lost, colour, label in ((False, LOW_COLOUR, "no loss"), (True, HIGH_COLOUR, "loss")):
        some = rows[decisions.loss[rows] == lost]
        axes.plot(
            decisions.scores[some],
            decisions.oracle[some],
            "o",
            color=colour,
            alpha=0.75 if lost else 0.45,
            markersize=4,
            markeredgewidth=0,
            label=label,
        )
    _threshold_line(axes, decisions)
    axes.set(xlabel="score: predicted L2 change", ylabel="oracle: measured L2 change")
    _legend_above(axes)
    return _svg(figure)


def unit_calibration(bins: Sequence[UnitBin]) -> str:
    """Mean measured against mean predicted change, bin by bin, with the diagonal."""
    figure, axes = _figure(5.6, 4.0)
    x = np.array([b.score for b in bins])
    y = np.array([b.oracle for b in bins])
    half_width = np.array([b.half_width for b in bins])
    ends = [min(x.min(), (y - half_width).min()), max(x.max(), (y + half_width).max())]
    axes.plot(ends, ends, color=_GREY, linestyle="--", label="predicted = measured")
    axes.errorbar(x, y, half_width, fmt="o", color=_INK, capsize=3, label="mean, 95 % interval")
    axes.set(xlabel="mean score of the bin", ylabel="mean oracle L2 of the bin")
    _legend_above(axes)
    return _svg(figure)


def deltas(values: FloatVector, loss: BoolVector, label: str) -> str:
    """A histogram of (n,) values, stacked by whether the image has a loss."""
    figure, axes = _figure(5.6, 3.4)
    axes.hist(
        [values[~loss], values[loss]],
        bins=np.histogram_bin_edges(values, 40),
        stacked=True,
        color=[LOW_COLOUR, HIGH_COLOUR],
        label=["no loss", "loss"],
    )
    axes.set(xlabel=label, ylabel="images")
    _legend_above(axes)
    return _svg(figure)


def loss_by_tenth(series: Mapping[str, Sequence[Dot]]) -> str:
    """Loss rates of the tenths of the images, from least to most changed.

    Args:
        series: for each loss the rate with its interval in each tenth.
    """
    figure, axes = _figure(5.6, 3.4)
    shift = np.linspace(-0.08, 0.08, len(series)) if len(series) > 1 else [0.0]
    markers = (("o", HIGH_COLOUR), ("s", "#4c78a8"))
    for offset, (name, rows), (marker, colour) in zip(shift, series.items(), markers, strict=False):
        x = np.arange(len(rows)) + 1 + offset
        for at, row in zip(x, rows, strict=True):
            axes.plot([at, at], row.interval, color=colour, linewidth=1.3)
        rates = [row.value for row in rows]
        axes.plot(x, rates, marker, color=colour, markersize=5, clip_on=False, label=name)
    first = next(iter(series.values()))
    axes.set_xticks(range(1, len(first) + 1), [row.name for row in first])
    axes.set(ylim=(0, None), xlabel="largest L2 change of each group", ylabel="share with a loss")
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    _legend_above(axes)
    return _svg(figure)


def _curve(axes: Axes, decisions: Decisions, values: FloatVector, **style: object) -> None:
    axes.plot(*metrics.risk_curve(values, decisions.loss, decisions.high_loss), **style)


def _threshold_line(axes: Axes, decisions: Decisions) -> None:
    threshold = decisions.threshold
    if threshold is None:
        return
    margin = 0.1 * max(float(np.ptp(decisions.scores)), 1e-9)
    near = decisions.scores.min() - margin <= threshold <= decisions.scores.max() + margin
    if near:  # a line far from every score would squeeze the points together
        axes.axvline(threshold, color=_INK, linestyle="--", label="threshold: escalate right of it")


def _legend_above(axes: Axes) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, columnspacing=1.2, **_LEGEND)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots()


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return data_uri("image/svg+xml", buffer.getvalue())
