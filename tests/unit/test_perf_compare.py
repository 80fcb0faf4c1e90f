import io
import json
from math import comb

import pytest
from rich.console import Console

from perf.compare import (
    CHANGED,
    DIFFERS,
    DISTURBED,
    EQUAL,
    ONLY_AFTER,
    ONLY_BEFORE,
    SAME,
    TOO_FEW,
    compare,
    load_summary,
    render,
    warnings,
)
from perf.figures import PerfError
from tests.unit.perf_summary import around, sample_summary, spread


def only(name, before, after):
    (change,) = (change for change in compare(before, after) if change.name == name)
    return change


def verdict(before, after, key="router_overhead_c1"):
    """Of one derived figure with these spreads."""
    return only(key, sample_summary() | {key: before}, sample_summary() | {key: after}).verdict


def printed(before, after):
    console = Console(width=200, file=io.StringIO())
    for part in render(compare(before, after), warnings(before, after)):
        console.print(part)
    return console.file.getvalue()


def test_an_identical_pair_says_that_nothing_changed():
    changes = compare(sample_summary(), sample_summary())
    assert {change.verdict for change in changes} == {EQUAL}
    text = printed(sample_summary(), sample_summary())
    assert text.startswith("nothing changed\n") and "note:" not in text


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (spread(1, 2, 3, 4), spread(4.1, 5, 6, 7), CHANGED),
        (spread(4.1, 5, 6, 7), spread(1, 2, 3, 4), CHANGED),
        (spread(1, 2, 3, 4), spread(4, 5, 6, 7), SAME),  # they touch
        (spread(1, 2, 3, 9), spread(4, 5, 6, 7), SAME),
        (spread(1, 2, 3), spread(4, 5, 6, 7), TOO_FEW),
        (spread(1, 2, 3, 4), spread(7, 8), TOO_FEW),
        (spread(1), spread(1), EQUAL),
    ],
)
def test_a_figure_changed_if_ranges_of_four_runs_lie_apart(before, after, expected):
    assert verdict(before, after) == expected


def test_shares_that_were_counted_differ_if_they_differ_at_all():
    before, after = sample_summary(), sample_summary()
    after["answers"]["adaptive"] |= {"agreement_with_high": 0.951, "escalation_rate": 0.126}
    assert only("agreement, adaptive", before, after).verdict == DIFFERS
    assert only("escalated, adaptive", before, after).verdict == DIFFERS
    assert only("agreement, static-low", before, after).verdict == EQUAL
    assert "+0.1 points" in printed(before, after)


def test_memory_that_was_measured_once_proves_nothing():
    before, after = sample_summary(), sample_summary()
    after["memory"]["adaptive"]["peak_pss_mib"] = 900.0
    assert only("peak PSS, MiB, adaptive", before, after).verdict == TOO_FEW


def test_only_what_took_turns_is_compared():
    before, after = sample_summary(), sample_summary()
    for found in after["systems"]:  # perf_analyzer's passes, each by itself
        found["throughput_per_s"] = around(2 * found["throughput_per_s"]["median"])
    assert {change.verdict for change in compare(before, after)} == {EQUAL}
    names = [change.name for change in compare(before, after)]
    assert len(names) == len(set(names)) and not any("throughput" in name for name in names)


@pytest.mark.parametrize(
    ("load", "figure", "other"),
    [
        ("c1", "router_overhead_c1", "speedup_saturated"),
        ("c1", "cost / static high's, adaptive", "peak_memory_ratio"),
        ("c1", "ensemble_over_router", "standin_over_ort_b1"),
        ("saturated", "speedup_saturated", "speedup_c1"),
    ],
)
def test_figures_of_a_disturbed_run_are_listed_unjudged(load, figure, other):
    before, after = sample_summary(), sample_summary() | {"doubts": {load: ["a reason"]}}
    assert only(figure, before, after).verdict == DISTURBED
    assert only(other, before, after).verdict == EQUAL
    assert DISTURBED in printed(before, after) and figure in printed(before, after)


def test_figures_of_one_run_only_are_listed():
    before, after = sample_summary(), sample_summary()
    del before["bound_c1"], after["answers"]["static-140"]
    assert only("bound_c1", before, after).verdict == ONLY_AFTER
    assert only("agreement, static-140", before, after).verdict == ONLY_BEFORE
    text = " ".join(printed(before, after).split())
    assert f"{ONLY_AFTER} (1): bound_c1" in text
    assert f"{ONLY_BEFORE} (2): agreement, static-140; cost / static high's, static-140" in text
    assert "nothing changed beyond noise" in text


@pytest.mark.parametrize("key", ["answers", "systems", "memory", "locust", "bound_c1"])
def test_a_section_may_be_missing(key):
    before, after = sample_summary(), sample_summary() | {key: None}
    verdicts = {change.verdict for change in compare(before, after)}
    assert not verdicts & {CHANGED, DIFFERS, SAME}
    assert (ONLY_BEFORE in verdicts) == (key not in ("locust", "systems"))


def test_the_table_shows_the_changed_first_and_how_many_were_compared():
    before, after = sample_summary(), sample_summary()
    after["router_overhead_c1"] = spread(1.08, 1.09, 1.1, 1.11)
    after["bound_c1"] = spread(2.42, 2.43, 2.44, 2.46)
    after["peak_memory_ratio"] = spread(1.5)
    text = printed(before, after)
    lines = text.splitlines()
    rows = [line for line in lines if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows] == [
        *("router_overhead_c1", "bound_c1", "peak_memory_ratio"),
    ]
    assert "1.033 (1.03 to 1.04)" in rows[0] and "1.095 (1.08 to 1.11)" in rows[0]
    assert "+6.0%" in rows[0] and rows[0].rstrip(" │").endswith(CHANGED)
    assert SAME in rows[1] and TOO_FEW in rows[2]
    assert "2 figures compared by the ranges of their runs" in text
    assert "up to 0.1 of them" in text


def test_chance_is_that_of_ranges_lying_apart():
    before, after = sample_summary(), sample_summary()
    after["bound_c1"] = spread(2.42, 2.43, 2.44, 2.46)
    assert only("bound_c1", before, after).chance == pytest.approx(2 / 70)
    after["bound_c1"] = spread(2.42, 2.43, 2.44, 2.46, 2.5, 2.6)
    assert only("bound_c1", before, after).chance == pytest.approx(2 / comb(10, 4))
    after["bound_c1"] = spread(2.42, 2.43)
    assert only("bound_c1", before, after).chance == 0


def test_runs_that_were_not_made_alike_are_told():
    before, after = sample_summary(), sample_summary()
    after["environment"] |= {"cores": 4}
    after["model"] |= {"low": "px=140"}
    after["certificate"] = None
    after["complete"] = False
    lines = warnings(before, after)
    assert "environment cores differs: 2 against 4" in lines
    assert "model low differs: px=112 against px=140" in lines
    assert any(line.startswith("certificate differs: ") for line in lines)
    assert "the second run was cut short" in lines and len(lines) == 4
    assert "note: model low differs: px=112 against px=140" in printed(before, after)


def test_a_summary_is_read_from_its_file_or_its_folder(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(sample_summary()))
    assert load_summary(tmp_path) == sample_summary()
    assert load_summary(tmp_path / "summary.json") == sample_summary()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; `python -m perf run` writes one"),
        ("{", "not a readable JSON file"),
        ("[1]", "not a JSON object"),
        ('{"schema_version": 1}', "not a summary that `python -m perf run` wrote"),
        (
            json.dumps(sample_summary() | {"schema_version": 2}),
            "has schema version 2, this code reads 1; measure again",
        ),
    ],
)
def test_a_file_that_is_no_summary_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "summary.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(PerfError) as error:
        load_summary(path)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(path) in str(error.value)
