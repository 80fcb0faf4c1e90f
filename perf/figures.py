"""What figures are made of: spreads, the formulas of the report, and which figures can be true.

Pure: nothing here measures. A cost is time per image: latency with one request in flight,
1 / throughput under load. The costs of one formula come from the same run, taken in turn, so that
a machine whose speed drifts changes all of them alike.

A machine that does something else meanwhile gives speed-ups that no cascade can have. What the
figures say of each other shows it: a cascade cannot be faster than its parts allow, and the time by
the clock and the CPU time of the same requests tell the same story where nothing disturbs.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_EFFICIENCY = 1.05
LEAST_OVER_LOW = 1 / 1.05  # of the cascade's cost to its own cheap rung's: noise below 1
MOST_APART = 0.15  # of the speed-up by the clock and by CPU time

TOO_BUSY = "the machine was too busy for a figure"


class PerfError(ValueError):
    """Measuring cannot start or go on. The message is one line that says what to do."""


@dataclass(frozen=True)
class Spread:
    """A figure that was measured several times, one value per run in the order of the runs.

    Attributes:
        values: at least one.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("a spread needs at least one value")

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """A spread of any sequence of numbers."""
        return cls(tuple(float(value) for value in values))

    @property
    def median(self) -> float:
        """The median over the runs."""
        return statistics.median(self.values)

    @property
    def min(self) -> float:
        """The smallest of the runs."""
        return min(self.values)

    @property
    def max(self) -> float:
        """The largest of the runs."""
        return max(self.values)

    def to_dict(self) -> dict[str, Any]:
        """The spread as it stands in summary.json; `runs` is the number of values."""
        return {
            "median": self.median,
            "min": self.min,
            "max": self.max,
            "runs": len(self.values),
            "values": list(self.values),
        }


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
        cost_low: the cost of static low.
        cost_high: the cost of static high.
        escalation_rate: p, of the images that were measured.
        cost_escalated: the cost of the rung that escalated images go to, where that is not static
            high.
    """
    ratio = 1.0 if cost_escalated is None else cost_escalated / cost_high
    return 1.0 / (cost_low / cost_high + escalation_rate * ratio)


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


NOT_BELIEVED = {"not_believed": True}  # stands where a ratio was that cannot be true


def cheapest_rival(
    agreement: Mapping[str, float],
    costs: Mapping[str, Mapping[str, Any]],
    among: Collection[str],
    ours: str = "adaptive",
) -> tuple[str, dict[str, Any]] | None:
    """The cheapest system that agrees with the full model at least as often as ours.

    Args:
        agreement: share of images answered as the full model does, by system.
        costs: spread of the cost of each system over the same turns, by system.
        among: which systems count as alternatives.
        ours: the system that is held against them.

    Returns:
        Its name, and the spread of its cost over that of ours, turn by turn; None where no system
        agrees as often, or ours was not measured.
    """
    if ours not in agreement or ours not in costs:
        return None
    rivals = [
        name
        for name in among
        if name in costs and name in agreement and agreement[name] >= agreement[ours]
    ]
    if not rivals:
        return None
    best = min(rivals, key=lambda name: float(costs[name]["median"]))
    above, below = costs[best], costs[ours]
    if above["runs"] != below["runs"]:  # cut short within a turn
        return best, Spread.of([above["median"] / below["median"]]).to_dict()
    pairs = zip(above["values"], below["values"], strict=True)
    return best, Spread.of([a / b for a, b in pairs]).to_dict()


def conclude(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A summary as its page shows it: what follows from its figures, and only believed ratios.

    Args:
        summary: content of summary.json; any section may be missing or None.

    Returns:
        A copy with `doubts` of both loads; `rival`, the cheapest static system that agrees at least
        as often as adaptive, its `title` and the spread of its `cost_ratio` to adaptive's, or None;
        `alternatives`, whether any static system but the full one was measured; and `verdict`, a
        case: `not_measured`, `too_busy`, `faster`, `slower` or `unclear`. Every ratio of costs that
        cannot be true is replaced by `NOT_BELIEVED`.
    """
    found = dict(summary)
    found["doubts"] = {load: doubts_of(summary, load) for load in ("c1", "saturated")}
    answers = {name: dict(answer) for name, answer in (summary.get("answers") or {}).items()}
    judged = {
        name: answer
        for name, answer in answers.items()
        if answer.get("agreement_with_high") is not None and answer.get("cost_ratio") is not None
    }
    statics = [name for name in judged if name.startswith("static-") and name != "static-high"]
    rival = cheapest_rival(
        {name: answer["agreement_with_high"] for name, answer in judged.items()},
        {name: answer["cost_ratio"] for name, answer in judged.items()},
        statics,
    )
    found["alternatives"] = bool(statics) and "adaptive" in judged
    found["rival"] = rival and {"title": answers[rival[0]]["title"], "cost_ratio": rival[1]}
    found["verdict"] = {"case": _verdict(found, rival and rival[1])}
    for name, value in found.items():
        load = load_of(name)
        if load is not None and value is not None and found["doubts"][load]:
            found[name] = NOT_BELIEVED
    if found["doubts"]["c1"]:
        for answer in answers.values():
            answer["cost_ratio"] = answer.get("cost_ratio") and NOT_BELIEVED
        found["rival"] = found["rival"] and found["rival"] | {"cost_ratio": NOT_BELIEVED}
    if summary.get("answers"):
        found["answers"] = answers
    return found


def _verdict(summary: Mapping[str, Any], rival: Mapping[str, Any] | None) -> str:
    """Whether adaptive is faster than always the full rung, and than the cheapest rival."""
    speed = summary.get("speedup_c1")
    if speed is None:
        return "not_measured"
    if summary["doubts"]["c1"]:
        return "too_busy"
    if speed["max"] < 1 or (rival is not None and rival["max"] < 1):
        return "slower"
    if speed["min"] > 1 and (rival is None or rival["min"] > 1):
        return "faster"
    return "unclear"
