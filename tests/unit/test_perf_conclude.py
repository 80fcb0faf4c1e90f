"""What follows from a summary: the cheapest rival, the verdict, and only believable ratios."""

import math
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perf.figures import NOT_BELIEVED, cheapest_rival, conclude
from tests.unit.perf_summary import around, sample_summary, spread

DOUBTED = ("c1",), ("saturated",), ("c1", "saturated")


def rival_of(summary):
    answers = summary["answers"]
    return cheapest_rival(
        {name: answer["agreement_with_high"] for name, answer in answers.items()},
        {name: answer["cost_ratio"] for name, answer in answers.items()},
        [name for name in answers if name.startswith("static-") and name != "static-high"],
    )


def test_the_rival_is_the_cheapest_that_agrees_as_often_turn_by_turn():
    summary = sample_summary()
    like = summary["answers"]["static-168"]
    summary["answers"]["static-196"] = like | {"cost_ratio": around(0.8)}
    name, costs = rival_of(summary)
    assert name == "static-168"
    ours, theirs = (summary["answers"][n]["cost_ratio"]["values"] for n in ("adaptive", name))
    expected = [b / a for a, b in zip(ours, theirs, strict=True)]
    assert costs["values"] == pytest.approx(expected)
    assert costs["median"] == pytest.approx(median(expected))
    summary["answers"]["static-140"]["agreement_with_high"] = 0.95  # as adaptive: that is enough
    assert rival_of(summary)[0] == "static-140"
    cut = summary["answers"]["static-140"]["cost_ratio"] = spread(0.5)
    ours = summary["answers"]["adaptive"]["cost_ratio"]["median"]
    assert rival_of(summary)[1]["values"] == [cut["median"] / ours]


def test_there_is_no_rival_where_none_agrees_as_often_or_ours_was_not_measured():
    summary = sample_summary()
    summary["answers"]["adaptive"]["agreement_with_high"] = 0.98
    assert rival_of(summary) is None
    del summary["answers"]["adaptive"]
    assert rival_of(summary) is None
    assert cheapest_rival({"a": 1.0}, {"a": spread(1.0)}, ["a"], ours="b") is None


@pytest.mark.parametrize(
    ("speed", "rival_cost", "case"),
    [
        (None, None, "not_measured"),
        (spread(2.31, 2.38), None, "faster"),
        (spread(2.31, 2.38), around(0.40, share=0.01), "slower"),
        (spread(2.31, 2.38), spread(0.40, 0.42, 0.44, 0.46), "unclear"),
        (spread(0.95, 0.97), None, "slower"),
        (spread(0.95, 1.05), None, "unclear"),
    ],
)
def test_the_verdict_holds_adaptive_against_the_full_rung_and_the_cheapest_rival(
    speed, rival_cost, case
):
    summary = sample_summary() | {"speedup_c1": speed, "doubts": {"c1": []}}
    if rival_cost is not None:
        summary["answers"]["static-168"]["cost_ratio"] = rival_cost
    assert conclude(summary)["verdict"]["case"] == case


def test_without_alternatives_the_full_rung_decides():
    summary = sample_summary()
    assert conclude(summary)["alternatives"]
    for name in ("static-low", "static-140", "static-168"):
        del summary["answers"][name]
    found = conclude(summary)
    assert found["verdict"]["case"] == "faster" and found["rival"] is None
    assert not found["alternatives"]
    nothing = conclude({})
    assert nothing["verdict"]["case"] == "not_measured" and "answers" not in nothing


def test_what_is_believed_stays_as_it_was_and_the_summary_is_not_touched():
    summary, whole = sample_summary(), sample_summary()
    found = conclude(summary)
    assert summary == whole and {key: found[key] for key in summary} == whole
    busy = summary | {"doubts": {"c1": ["a reason"]}}
    assert conclude(busy)["verdict"]["case"] == "too_busy"
    assert conclude(busy)["answers"]["adaptive"]["cost_ratio"] == NOT_BELIEVED
    assert busy["answers"]["adaptive"]["cost_ratio"]["runs"] == 4


@given(st.sampled_from(DOUBTED), st.floats(0.1, 9.0), st.integers(1, 5))
def test_no_number_of_a_doubted_ratio_survives(loads, size, runs):
    """Every ratio is a mark that nothing else in the summary equals."""
    marks = iter(1000 + size + 0.25 * i for i in range(1000))

    def marked(doubted):
        values = [next(marks) for _ in range(runs)]
        (bad if doubted else good).extend(values)
        return spread(*values)

    good, bad = [], []
    doubts = {load: ["a reason"] if load in loads else [] for load in ("c1", "saturated")}
    summary = sample_summary() | {"doubts": doubts}
    of_c1 = ("ensemble_over_router", "router_overhead_c1")
    for name in [name for name in summary if name.endswith(("_c1", "_saturated")) or name in of_c1]:
        is_c1 = name in of_c1 or name.endswith("_c1")
        summary[name] = marked(("c1" if is_c1 else "saturated") in loads)
    for answer in summary["answers"].values():
        answer["cost_ratio"] = marked("c1" in loads)
    found = list(numbers_in(conclude(summary)))
    assert not set(bad) & set(found)
    assert all(any(math.isclose(value, other) for other in found) for value in good)


def numbers_in(content):
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        for item in content:
            yield from numbers_in(item)
    elif isinstance(content, float):
        yield content
