"""Which figures can be true. Pure: the rule by which a measurement is called disturbed.

A machine that does something else meanwhile gives speed-ups that no cascade can have. What the
figures say of each other shows it: a cascade cannot be faster than its parts allow, and the time by
the clock and the CPU time of the same requests tell the same story where nothing disturbs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOST_EFFICIENCY = 1.05
LEAST_OVER_LOW = 1 / 1.05  # of the cascade's cost to its own cheap rung's: noise below 1
MOST_APART = 0.15  # of the speed-up by the clock and by CPU time

TOO_BUSY = "the machine was too busy for a figure"


def doubts(
    speedup: float,
    efficiency: float,
    cost_over_low: float | None = None,
    cpu_speedup: float | None = None,
) -> list[str]:
    """Why a measurement cannot be believed, one clause each; empty where it can be.

    Args:
        speedup: of the cascade over static high, by the clock.
        efficiency: that speed-up / the cascade bound.
        cost_over_low: the cascade's cost / its own cheap rung's, which is a part of it.
        cpu_speedup: the same speed-up by CPU time; None where that cannot be compared, as on a GPU.
    """
    found = []
    if efficiency > MOST_EFFICIENCY:
        found.append(f"an efficiency of {efficiency:.2f} is more than the rungs allow")
    if cost_over_low is not None and cost_over_low < LEAST_OVER_LOW:
        found.append(f"the cascade took {cost_over_low:.2f} of the time of its own cheap rung")
    if cpu_speedup is not None and apart(speedup, cpu_speedup) > MOST_APART:
        found.append(
            f"the speed-up is {speedup:.2f} by the clock and {cpu_speedup:.2f} by CPU time"
        )
    return found


def apart(one: float, other: float) -> float:
    """How much larger the larger of two ratios is than the smaller one, 0 where they are equal."""
    smaller = min(one, other)
    return max(one, other) / smaller - 1 if smaller > 0 else float("inf")


def doubts_of(summary: Mapping[str, Any], load: str) -> list[str]:
    """Why a summary's figures under a load, `c1` or `saturated`, cannot be believed.

    What the run itself noted, else what its figures say: summaries of earlier code noted nothing.
    """
    noted = (summary.get("doubts") or {}).get(load)
    if noted is not None:
        return list(noted)
    names = (f"speedup_{load}", f"cascade_efficiency_{load}", f"bound_{load}")
    speedup, efficiency, bound = (
        None if (spread := summary.get(name)) is None else float(spread["median"]) for name in names
    )
    if speedup is None or efficiency is None:
        return []
    return doubts(speedup, efficiency if bound is None else max(efficiency, speedup / bound))


def load_of(figure: str) -> str | None:
    """The load whose doubts a derived figure of a summary shares; None: it is of its own kind."""
    if figure.endswith("_saturated"):
        return "saturated"
    return "c1" if figure.endswith("_c1") or figure == "ensemble_over_router" else None
