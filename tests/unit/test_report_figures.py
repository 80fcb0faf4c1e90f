"""Figures hold what they are given: every point, number and name, and nothing loaded."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from report import figures
from report.figures import Axis, Rule, Series
from report.markers import APART, steps_aside
from tests.unit.pages import drawn_words, svg_of

X, Y = Axis("cost", percent=True, log=True), Axis("agreement", percent=True)


def frontier(**changes):
    points = Series("graphs", [0.1, 0.5], [0.8, 0.9], "#123456", "o", size=13, numbers=["7", "19"])
    line = Series("a line", [0.1, 1.0], [0.8, 1.0], "#654321", line="-")
    return figures.chart([points, line], X, Y, [Rule(0.95, "limit", across=True)], **changes)


def test_a_chart_names_its_series_and_writes_a_number_into_each_marker():
    written = drawn_words(frontier())
    for text in ("7", "19", "graphs", "a line", "limit", "cost", "agreement", "10 %", "50 %"):
        assert written.count(text.replace(" %", "\N{NO-BREAK SPACE}%")) + written.count(text), text


def test_equal_numbers_give_equal_bytes():
    assert frontier() == frontier()


def test_what_is_beaten_is_shaded():
    assert "#f3f0e4" not in svg_of(frontier())
    assert "#f3f0e4" in svg_of(frontier(beaten_by=[(0.2, 0.9), (0.4, 0.95)], beaten="beaten"))


def test_a_hollow_marker_is_white_inside():
    full, empty = (
        svg_of(figures.chart([Series("", [1], [1], "#123456", "o", hollow=[hollow])], Y, Y))
        for hollow in (False, True)
    )
    assert "fill: #ffffff; stroke: #123456" in empty and "fill: #ffffff; stroke: #123" not in full


def test_spreads_are_lines_through_their_points():
    one = Series("", [0.5], [0.5], "#123456", "o", x_spread=[(0.2, 0.8)], y_spread=[(0.4, 0.6)])
    plain = Series("", [0.5], [0.5], "#123456", "o")
    drawn = [svg_of(figures.chart([s], Y, Y)).count("stroke: #123456") for s in (plain, one)]
    assert drawn[1] == drawn[0] + 2


def test_a_band_is_shaded_and_a_gap_in_it_is_not():
    ends = [(0.4, 0.6), (0.4, 0.6), (math.nan, math.nan), (0.4, 0.6), (0.3, 0.7)]
    line = [0.5, 0.5, math.nan, 0.5, 0.5]
    for band, shades in ((ends, 2), ((), 0)):
        one = Series("", [1, 2, 3, 4, 5], line, "#123456", line="-", band=band)
        drawn = svg_of(figures.chart([one], Y, Y))
        assert len(re.findall("fill: #123456; fill-opacity|fill-opacity: 0.15", drawn)) == shades


def test_a_rule_far_from_every_value_is_left_out():
    rules = [Rule(1.0, "near"), Rule(50.0, "far")]
    assert figures.near(rules, [0.0, 2.0]) == rules[:1]
    written = drawn_words(
        figures.histogram({"kept": [0.0, 2.0], "lost": []}, "score", "crops", rules)
    )
    assert "near" in written and "far" not in written and "crops" in written


def test_bars_name_each_part_once_and_write_what_fits():
    rows = {"kept": {"queue": 0.1, "cheap": 5.0}, "all": {"cheap": 5.0, "full": -1.0}}
    written = drawn_words(figures.bars(rows, [5.1, 4.0], {"cheap": "#123456"}, "ms"))
    assert [written.count(name) for name in ("queue", "cheap", "full")] == [1, 1, 1]
    assert written.count("5.00") == 2 and "0.10" not in written
    assert [text for text in written if text.strip() in ("5.10 ms", "4.00 ms")]


@given(st.integers(0, 2**32 - 1), st.integers(1, 19))
def test_no_marker_with_a_number_covers_another(seed, count):
    rng = np.random.default_rng(seed)
    centres, sizes = rng.normal(100, 12, (count, 2)), rng.uniform(11, 16, count)
    places = centres + steps_aside(centres, sizes.tolist())
    for i in range(count):
        for j in range(i):
            assert np.hypot(*(places[i] - places[j])) > APART * (sizes[i] + sizes[j])


def test_a_marker_that_has_its_place_to_itself_stays_there_and_others_are_led_to_theirs():
    centres = np.array([[0.0, 0.0], [3.0, 0.0], [90.0, 0.0]])
    first, second, third = steps_aside(centres, [13.0, 13.0, 13.0])
    assert first == third == (0.0, 0.0) and second == pytest.approx((0.0, 15.0))


@pytest.mark.parametrize("entries", [1, 4, 12])
def test_a_legend_stays_within_its_figure(entries):
    long = "cheap graph: 112 px, 9 blocks, 4 tokens merged per block, int8, aligned"
    some = [Series(f"{long} {i}", [i], [i], "#123456", "o") for i in range(entries)]
    svg = svg_of(figures.chart(some, Axis("x"), Axis("y")))
    width = float(re.search(r'<svg [^>]*width="([\d.]+)pt"', svg)[1])
    legend = svg[svg.index('id="legend_1"') :]
    places = [float(x) for x in re.findall(r"translate\(([-\d.]+) [-\d.]+\) scale", legend)]
    assert len(places) == entries and 0 <= min(places) and max(places) < width / 2
