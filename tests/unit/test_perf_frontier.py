"""The frontier plot: which systems it joins, what it calls them, and what it shades."""

import base64
import re

from matplotlib.figure import Figure

from perf.pages.frontier import draw_static, frontier, shade_beaten
from perf.pages.words import judged
from tests.unit.pages import squeeze
from tests.unit.perf_summary import around, sample_summary


def words_in(summary):
    """What is written in the plot; matplotlib leaves words as comments beside their outlines."""
    svg = base64.b64decode(frontier(summary).partition(",")[2]).decode()
    return [squeeze(word) for word in re.findall(r"<!-- (.*?) -->", svg, re.S)]


def with_alternatives(low="px=112", **costs):
    """A summary in which alternatives of these slugs agree in 96 % and cost this share."""
    summary = sample_summary()
    summary["model"]["low"] = low
    like = summary["answers"]["static-168"] | {"agreement_with_high": 0.96}
    for slug, cost in costs.items():
        name = f"static-{slug.replace('_', '-')}"
        summary["answers"][name] = like | {"cost_ratio": around(cost, share=0.01)}
    return summary


def test_the_frontier_names_alternatives_by_their_recipes():
    summary = with_alternatives(
        tome4=0.8, tome8=0.7, int8static=0.5, **{"112_int8static_align": 0.2}, depth9_tome4=0.6
    )
    words = words_in(summary)
    for label in ("r=4", "r=8", "int8", "112 px, int8, aligned", "static, merged tokens"):
        assert label in words, label
    assert "9 blocks, 4 tokens merged per block" in words
    assert words.count("static, other") == 1
    assert "static, fewer blocks" not in words


def static_lines(summary):
    """The lines that join static systems in the frontier plot, by legend: their corners' costs."""
    axes = Figure().subplots()
    draw_static(axes, judged(summary), summary)
    return {
        line.get_label(): [round(cost, 2) for cost in line.get_xdata()]
        for line in axes.lines
        if not line.get_label().startswith("_")
    }


def test_only_alternatives_that_differ_in_one_number_are_joined_and_end_at_the_full_model():
    low, mid, full = round(30 / 105, 2), [round(43 / 105, 2), round(60 / 105, 2)], 1.0
    tokens = {"tome8": 0.7, "tome4": 0.8}
    others = {"int8static": 0.5, "140_tome4": 0.3, "112_int8static_align": 0.2}
    assert static_lines(with_alternatives(**tokens, **others)) == {
        "static, fewer pixels": [low, *mid, full],
        "static, merged tokens": [0.7, 0.8, full],
        "static, other": [0.2, 0.3, 0.5],
    }
    # A cheap rung that is more than a resolution stands for itself.
    lines = static_lines(with_alternatives(low="px=112,int8=static,align", depth9=0.75))
    assert lines == {"static, fewer pixels": [*mid, full], "static, fewer blocks": [0.75, full]}


def beaten(summary, cost, agreement):
    """Whether a point of the frontier plot lies in what is shaded."""
    axes = Figure().subplots()
    axes.set(xlim=(0, 2), ylim=(0, 1.1))
    adaptive = [a for name, a in judged(summary).items() if name.startswith("adaptive")]
    places = [(a["cost_ratio"]["median"], a["agreement_with_high"]) for a in adaptive]
    shade_beaten(axes, places)
    (area,) = axes.collections
    return bool(area.get_paths()[0].contains_point((cost, agreement)))


def test_shaded_is_what_costs_more_than_an_adaptive_system_and_agrees_no_more_often():
    summary = sample_summary()  # adaptive: 0.43 at 95 %, 0.60 at 97.5 %, 1.3 at 100 %
    assert beaten(summary, 0.44, 0.94) and beaten(summary, 0.62, 0.97)
    assert not beaten(summary, 0.42, 0.94)  # cheaper
    assert not beaten(summary, 0.59, 0.96)  # agrees more often than what costs less
    assert not beaten(summary, 1.0, 1.0)  # the full rung
