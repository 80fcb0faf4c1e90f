"""The frontier plot: how often each system agrees with static high, and what that costs.

Alternatives that differ in one number only, such as resolutions, are joined by a line that ends at
the full model. What the adaptive ones beat is shaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from report.page import HIGH_COLOUR
from report.words import percent

from .drawing import GREY, INK, LEGEND, colour, new_figure, svg
from .labels import Label, place
from .words import Summary, cheaper_ways, judged, recipe_of, rung_words, short_name

Answer = Mapping[str, Any]

# The one part of a recipe by which members of a family differ: legend, colour, marker.
_FAMILIES = {
    "px": ("static, fewer pixels", "#777777", "s"),
    "tome": ("static, merged tokens", "#4c78a8", "^"),
    "depth": ("static, fewer blocks", "#7f9a3b", "v"),
}
_OTHERS = ("static, other", "#96588a", "P")
_RUNGS = ("static-low", "static-high")
_BEATEN = "#f3f0e4"
_USUAL_LABELS = 9  # that fit into a figure of the usual height, in inches
_HEIGHT, _PER_LABEL = 4.2, 0.12


def frontier(summary: Summary) -> str | None:
    """Draw it; None where no system's agreement and cost were both measured."""
    answers = judged(summary)
    if not answers:
        return None
    height = _HEIGHT + _PER_LABEL * max(0, len(answers) - _USUAL_LABELS)
    figure, axes = new_figure(5.6, height)
    adaptive = [name for name in answers if name.startswith("adaptive")]
    adaptive.sort(key=lambda name: answers[name].get("escalation_rate") or 0.0)
    lines = draw_static(axes, answers, summary)
    lines.append(_line(axes, answers, adaptive, "o", INK, "adaptive, by share escalated"))
    if "ensemble" in answers:
        style: dict[str, Any] = {"markeredgecolor": "white", "markersize": 8, "zorder": 6}
        axes.plot(*_at(answers["ensemble"]), "D", color=colour("ensemble"), **style)
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
    _frame(axes, answers, summary)
    shade_beaten(axes, [_at(answers[name]) for name in adaptive])
    figure.legend(loc="outside upper left", ncols=3, columnspacing=1.2, **LEGEND)
    place(axes, [_label(name, summary) for name in _first(answers)], [*lines, *_bars(answers)])
    return svg(figure)


def draw_static(
    axes: Axes, answers: Mapping[str, Answer], summary: Summary
) -> list[NDArray[np.float64]]:
    """Draw the families and the single points; return the corners of the lines, (n, 2) each."""
    static = sorted(
        (name for name in answers if name.startswith("static-")),
        key=lambda name: _at(answers[name])[0],
    )
    families = {name: _family(name, summary) for name in static}
    lines, drawn = [], set(_RUNGS)
    for family, (label, shade, marker) in _FAMILIES.items():
        if family in families.values():
            joined = [name for name in static if families[name] in (family, "full")]
            lines.append(_line(axes, answers, joined, marker, shade, label))
            drawn.update(joined)
    label, shade, marker = _OTHERS
    single = np.array([_at(answers[name]) for name in static if name not in drawn])
    if len(single):
        axes.plot(*single.T, marker, color=shade, markersize=7, zorder=4, label=label)
    for name in [name for name in _RUNGS if name in answers]:  # over the lines that they end
        axes.plot(*_at(answers[name]), "s", color=colour(name), markersize=7, zorder=5)
    return lines


def _family(system: str, summary: Summary) -> str | None:
    """A key of `_FAMILIES`, `full` for the full model, which each of them ends at, or None."""
    ways = cheaper_ways(system, summary)
    if ways is None or len(ways) > 1:
        return None
    (way,) = ways or ("full",)
    return way if way in (*_FAMILIES, "full") else None


def _at(answer: Answer) -> tuple[float, float]:
    return answer["cost_ratio"]["median"], answer["agreement_with_high"]


def _line(
    axes: Axes,
    answers: Mapping[str, Answer],
    names: list[str],
    marker: str,
    line_colour: str,
    label: str,
) -> NDArray[np.float64]:
    """Draw the systems joined by a line; return its corners, (n, 2)."""
    corners = np.array([_at(answers[name]) for name in names]).reshape(-1, 2)
    if names:
        axes.plot(*corners.T, f"{marker}-", color=line_colour, markersize=6, zorder=3, label=label)
    return corners


def _bars(answers: Mapping[str, Answer]) -> list[NDArray[np.float64]]:
    """The ends of each system's spread of costs."""
    return [
        np.array([[cost["min"], answer["agreement_with_high"]], [cost["max"], _at(answer)[1]]])
        for answer in answers.values()
        for cost in [answer["cost_ratio"]]
    ]


def _frame(axes: Axes, answers: Mapping[str, Answer], summary: Summary) -> None:
    """Limits that leave room for labels, and the spreads."""
    for name, bar in zip(answers, _bars(answers), strict=True):
        axes.plot(*bar.T, color=_shade(name, summary), linewidth=1.2, zorder=2)
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


def shade_beaten(axes: Axes, adaptive: Sequence[tuple[float, float]]) -> None:
    """Shade where a system costs more than an adaptive one and agrees no more often."""
    if not adaptive:
        return
    costs, agreements = np.array(sorted(adaptive)).T
    best = np.maximum.accumulate(agreements)
    end, (bottom, _) = axes.get_xlim()[1], axes.get_ylim()
    axes.fill_between(
        [*costs, end],
        bottom,
        [*best, best[-1]],
        step="post",
        color=_BEATEN,
        linewidth=0,
        zorder=0,
        label="beaten by adaptive",
    )


def _first(answers: Mapping[str, Answer]) -> list[str]:
    """Systems in the order of how much their label matters."""
    important = ("adaptive", *_RUNGS, "ensemble")
    return sorted(answers, key=lambda name: (name not in important, name))


def _shade(name: str, summary: Summary) -> str:
    """The colour of a system's marker."""
    if not name.startswith("static-") or name in _RUNGS:
        return colour(name)
    family = _family(name, summary)
    return _FAMILIES[family][1] if family in _FAMILIES else _OTHERS[1]


def _label(name: str, summary: Summary) -> Label:
    answer = judged(summary)[name]
    rate = answer.get("escalation_rate")
    style: dict[str, Any] = {"fontsize": 8.5, "color": _shade(name, summary)}
    if name == "ensemble":
        text = "from image bytes"
    elif name.startswith("adaptive"):
        text = "adaptive" if rate is None else f"{percent(rate)} escalated"
        style["color"] = INK
    else:
        text = _static_text(name, summary)
    if name == "adaptive":
        text = text if rate is None else f"adaptive:\n{text}"
        style = {"fontsize": 9.5, "color": HIGH_COLOUR, "fontweight": "bold"}
    return Label(_at(answer), text, style)


def _static_text(name: str, summary: Summary) -> str:
    """The recipe; of a family's member what the legend does not say already."""
    recipe = recipe_of(name, summary)
    if recipe is None or name in _RUNGS:
        return short_name(name, summary)
    ways = cheaper_ways(name, summary) or {}
    return f"r={ways['tome']}" if [*ways] == ["tome"] else rung_words(recipe)
