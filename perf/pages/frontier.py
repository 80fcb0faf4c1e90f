"""The frontier plot: how often each system agrees with static high, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from calibration.pages.page import HIGH_COLOUR, percent

from .drawing import GREY, INK, LEGEND, colour, new_figure, svg
from .labels import Label, place
from .words import Summary, judged, short_name

Answer = Mapping[str, Any]


def frontier(summary: Summary) -> str | None:
    """Draw it; None where no system's agreement and cost were both measured."""
    answers = judged(summary)
    if not answers:
        return None
    static = [name for name in answers if name.startswith("static-")]
    adaptive = [name for name in answers if name.startswith("adaptive")]
    static.sort(key=lambda name: _at(answers[name])[0])
    adaptive.sort(key=lambda name: answers[name].get("escalation_rate") or 0.0)
    figure, axes = new_figure(5.6, 4.0)
    lines = [
        _line(axes, answers, static, "s", GREY, "one static rung"),
        _line(axes, answers, adaptive, "o", INK, "adaptive, by share escalated"),
    ]
    for name in set(answers) - set(static) - set(adaptive):
        style = {"color": colour(name), "markeredgecolor": "white", "markersize": 8, "zorder": 6}
        axes.plot(*_at(answers[name]), "D", **style)
    if "adaptive" in answers:
        axes.plot(
            *_at(answers["adaptive"]),
            "o",
            color=HIGH_COLOUR,
            markeredgecolor="white",
            markersize=12,
            zorder=5,
            label="as calibrated",
        )
    _frame(axes, answers)
    figure.legend(loc="outside upper left", ncols=3, columnspacing=1.2, **LEGEND)
    place(axes, [_label(name, summary) for name in _first(answers)], [*lines, *_bars(answers)])
    return svg(figure)


def _at(answer: Answer) -> tuple[float, float]:
    return answer["cost_ratio"]["median"], answer["agreement_with_high"]


def _line(
    axes: Axes,
    answers: Mapping[str, Answer],
    names: list[str],
    marker: str,
    line_colour: str,
    label: str,
) -> np.ndarray:
    """Draw the systems joined by a line; return its corners, (n, 2)."""
    corners = np.array([_at(answers[name]) for name in names]).reshape(-1, 2)
    if names:
        axes.plot(*corners.T, f"{marker}-", color=line_colour, markersize=6, zorder=3, label=label)
    return corners


def _bars(answers: Mapping[str, Answer]) -> list[np.ndarray]:
    """The ends of each system's spread of costs."""
    return [
        np.array([[cost["min"], answer["agreement_with_high"]], [cost["max"], _at(answer)[1]]])
        for answer in answers.values()
        for cost in [answer["cost_ratio"]]
    ]


def _frame(axes: Axes, answers: Mapping[str, Answer]) -> None:
    """Limits that leave room for labels, and the spreads."""
    for name, bar in zip(answers, _bars(answers), strict=True):
        axes.plot(*bar.T, color=colour(name), linewidth=1.2, zorder=2)
    lowest = min(answer["agreement_with_high"] for answer in answers.values())
    most = max(answer["cost_ratio"]["max"] for answer in answers.values())
    room = max(1 - lowest, 0.05)
    limits = (lowest - 0.2 * room, 1 + 0.15 * room)
    axes.set(
        xlim=(0, 1.15 * most),
        ylim=limits,
        xlabel="cost: time of a request / the full rung's",
        ylabel="agreement with the full rung",
    )
    axes.axvline(1, color=GREY, linewidth=0.8, linestyle=":", zorder=1)
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= 1])
    axes.set_ylim(limits)  # once more: setting ticks widens them
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.grid(color="#eeeeee")


def _first(answers: Mapping[str, Answer]) -> list[str]:
    """Systems in the order of how much their label matters."""
    important = ("adaptive", "static-low", "static-high", "ensemble")
    return sorted(answers, key=lambda name: (name not in important, name))


def _label(name: str, summary: Summary) -> Label:
    answer = judged(summary)[name]
    rate = answer.get("escalation_rate")
    if name == "ensemble":
        text = "from image bytes"
    elif name.startswith("adaptive"):
        text = "adaptive" if rate is None else f"{percent(rate)} escalated"
    else:
        text = short_name(name, summary)
    style: dict[str, Any] = {"fontsize": 8.5, "color": colour(name)}
    if name == "adaptive" and rate is not None:
        text = f"adaptive:\n{text}"
    if name == "adaptive":
        style = {"fontsize": 9.5, "color": HIGH_COLOUR, "fontweight": "bold"}
    elif name.startswith("adaptive"):
        style["color"] = INK
    elif name.startswith("static"):
        style["color"] = "#666666"
    return Label(_at(answer), text, style)
