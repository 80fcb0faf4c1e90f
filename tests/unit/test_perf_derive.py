"""The formulas of the report, on cases done by hand."""

import pytest

from perf.derive import (
    cascade_bound,
    cascade_efficiency,
    memory_ratio,
    router_overhead,
    speedup,
)
from perf.spread import Spread


def test_a_speedup_is_static_highs_cost_over_the_systems():
    assert speedup(cost=25.0, cost_high=100.0) == 4.0


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
    assert speedup(low + rate * high, high) == pytest.approx(cascade_bound(low, high, rate))
    assert cascade_efficiency(low + rate * high, low, high, rate) == pytest.approx(1.0)


def test_the_cascade_efficiency_is_the_speedup_over_the_bound():
    # Bound 2, speed-up 100 / 62.5 = 1.6.
    assert cascade_efficiency(62.5, 25.0, 100.0, 0.25) == pytest.approx(0.8)


def test_under_load_the_cost_is_one_over_the_throughput():
    # Images per second: low 40, high 10, adaptive 16, one in four escalated; 16 / 20 of the bound.
    assert cascade_efficiency(1 / 16, 1 / 40, 1 / 10, 0.25) == pytest.approx(0.8)


def test_the_router_overhead_is_what_it_adds_to_static_low():
    assert router_overhead(cost_never_escalating=31.2, cost_low=30.0) == pytest.approx(1.04)


def test_the_memory_ratio_is_against_both_static_servers_together():
    assert memory_ratio(adaptive=770.0, low=300.0, high=400.0) == pytest.approx(1.1)


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
    spread = Spread.of([7])
    assert (spread.median, spread.min, spread.max) == (7.0, 7.0, 7.0)
    assert spread.to_dict()["runs"] == 1


def test_a_spread_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one value"):
        Spread.of([])
