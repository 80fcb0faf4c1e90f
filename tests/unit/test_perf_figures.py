"""The formulas of the report on cases done by hand, spreads, and figures that cannot be true."""

import pytest

from perf.figures import Spread, cascade_bound, doubts, doubts_of
from tests.unit.perf_summary import sample_summary, spread


@pytest.mark.parametrize(
    ("low", "high", "rate", "bound"),
    [
        (25.0, 100.0, 0.0, 4.0),  # nothing escalates: r
        (25.0, 100.0, 0.25, 2.0),  # 1 / (1/4 + 1/4)
        (25.0, 100.0, 1.0, 0.8),  # everything does: the cheap rung's cost is lost
        (50.0, 100.0, 0.5, 1.0),
    ],
)
def test_the_cascade_bound_is_what_the_two_rungs_one_after_the_other_allow(low, high, rate, bound):
    assert cascade_bound(low, high, rate) == pytest.approx(bound)


def test_the_bound_is_the_speedup_of_a_router_that_costs_nothing():
    low, high, rate = 31.0, 104.0, 0.13
    assert high / (low + rate * high) == pytest.approx(cascade_bound(low, high, rate))
    # Under load a cost is one over the throughput.
    assert cascade_bound(1 / 40, 1 / 10, 0.25) == pytest.approx(2.0)


def test_the_figures_of_the_script_this_began_with_lie_below_their_own_parts():
    # 2.8 + 0.095 x 9.6 ms; published were 2.894.
    assert 9.6 / cascade_bound(2.8, 9.6, 0.095) == pytest.approx(3.712)


# --- spread ------------------------------------------------------------------------------------


def test_a_spread_keeps_every_run_in_order():
    assert Spread.of([3, 1, 2, 10]).to_dict() == {
        "median": 2.5,
        "min": 1.0,
        "max": 10.0,
        "runs": 4,
        "values": [3.0, 1.0, 2.0, 10.0],
    }


def test_a_spread_of_one_run_is_that_run():
    one = Spread.of([7])
    assert (one.median, one.min, one.max) == (7.0, 7.0, 7.0)
    assert one.to_dict()["runs"] == 1


def test_a_spread_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one value"):
        Spread.of([])


# --- which figures can be true ------------------------------------------------------------------


@pytest.mark.parametrize(
    "measured",
    [
        (2.55, 0.971, 1.25, 2.5),  # README's, on a quiet machine
        (2.55, 0.971, None, None),  # a server elsewhere, or a GPU
        (3.9, 1.04, 0.97, 3.5),  # noise, all three
        (1.15, 0.9, 1.2, 1.0),
        (1.0, 0.9, 1.2, 1.15),
    ],
)
def test_what_can_be_true_is_believed(measured):
    assert doubts(*measured) == []


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        # Printed by an earlier demo: on a busy machine, and on a quiet one.
        ((4.02, 4.02 / 1.94), "efficiency of 2.07"),
        ((2.93, 2.93 / 2.65), "efficiency of 1.11"),
        ((2.0, 0.9, 8.8 / 14.5), "took 0.61 of the time of its own cheap rung"),
        ((2.0, 0.9, 1.2, 1.7), "2.00 by the clock and 1.70 by CPU time"),
        ((1.7, 0.9, 1.2, 2.0), "1.70 by the clock and 2.00 by CPU time"),
    ],
)
def test_what_cannot_be_true_is_not_and_it_is_said_why(figures, said):
    (reason,) = doubts(*figures)
    assert said in reason


def test_every_reason_is_given():
    assert len(doubts(4.0, 2.0, 0.5, 2.0)) == 3


def test_a_summary_of_earlier_code_is_judged_by_its_figures():
    summary = sample_summary()
    assert doubts_of(summary, "c1") == doubts_of(summary, "saturated") == []
    summary["cascade_efficiency_saturated"] = spread(1.2, 1.3, 1.4)
    assert "1.30" in doubts_of(summary, "saturated")[0] and doubts_of(summary, "c1") == []
    summary["doubts"] = {"c1": ["noted by the run"], "saturated": []}
    assert doubts_of(summary, "c1") == ["noted by the run"]
    assert doubts_of(summary, "saturated") == []


def test_the_two_medians_that_are_printed_side_by_side_are_held_against_each_other():
    summary = sample_summary() | {"speedup_c1": spread(2.6), "bound_c1": spread(2.2)}
    summary["cascade_efficiency_c1"] = spread(1.02)
    assert "an efficiency of 1.18" in doubts_of(summary, "c1")[0]


def test_nothing_is_doubted_that_was_not_measured():
    assert doubts_of({"doubts": {}}, "c1") == []
