"""The figures that are derived from costs. Pure: the formulas of the report, and nothing else.

A cost is time per image: latency with one request in flight, 1 / throughput under load. The costs
of one formula come from the same run, taken in turn, so that a machine whose speed drifts changes
all of them alike.
"""

from __future__ import annotations


def speedup(cost: float, cost_high: float) -> float:
    """How many times as fast as static high."""
    return cost_high / cost


def cascade_bound(
    cost_low: float,
    cost_high: float,
    escalation_rate: float,
    cost_escalated: float | None = None,
) -> float:
    """The best possible speed-up over static high, 1 / (1/r + p) with r = cost_high / cost_low.

    It holds where the rungs run one after the other: p of the images cost the full rung on top of
    the cheap one.

    Args:
        cost_low: of static low.
        cost_high: of static high.
        escalation_rate: p, of the images that were measured.
        cost_escalated: of the rung that escalated images go to, where that is not static high.
    """
    ratio = 1.0 if cost_escalated is None else cost_escalated / cost_high
    return 1.0 / (cost_low / cost_high + escalation_rate * ratio)


def cascade_efficiency(
    cost: float,
    cost_low: float,
    cost_high: float,
    escalation_rate: float,
    cost_escalated: float | None = None,
) -> float:
    """Measured speed-up / cascade bound; 1 is a router that costs nothing."""
    bound = cascade_bound(cost_low, cost_high, escalation_rate, cost_escalated)
    return speedup(cost, cost_high) / bound


def router_overhead(cost_never_escalating: float, cost_low: float) -> float:
    """Adaptive at 0 % escalation / static low."""
    return cost_never_escalating / cost_low


def memory_ratio(adaptive: float, low: float, high: float) -> float:
    """Adaptive's peak memory / (static low's + static high's)."""
    return adaptive / (low + high)
