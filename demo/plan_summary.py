"""What the planned cascade was worth as served, beside every single graph. Pure, no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perf.cascade import Measured
from perf.figures import TOO_BUSY, Spread, cheapest_rival
from perf.systems import ADAPTIVE, ESCALATION, HIGH, LOW
from report.words import percent, recipe_words

Summary = Mapping[str, Any]


def summarise_plan(
    recipes: Mapping[str, str],
    rungs: tuple[str, str],
    certificate: Mapping[str, Any],
    agreement: Mapping[str, float],
    saturated: Measured,
) -> dict[str, Any]:
    """The entry `plan` of summary.json.

    Args:
        recipes: of each system that is a graph.
        rungs: recipes of the cheap rung and of the graph that the router escalates to.
        certificate: of the calibration.
        agreement: share of crops that each system answers as the full model does.
        saturated: what `serve.measure_saturated` returned; ratios are taken turn by turn.
    """
    paired = saturated.paired
    own, cpu_speedup = paired.speedup(), paired.cpu_speedup()
    costs = {system: paired.cost(system) for system in agreement}
    cpu = {system: paired.cpu_cost(system) for system in agreement}
    counts = saturated.cpu_counts

    def is_disturbed(system: str, to: str) -> bool:
        return paired.disturbed(system, to, counts)

    best = _best_alternative(agreement, costs)
    return {
        "low": rungs[0],
        "high": rungs[1],
        "reference": recipes[HIGH],
        "signal": certificate["signal"],
        "max_risk": certificate["epsilon"],
        "disturbed": bool(saturated.doubts),
        "doubts": list(saturated.doubts),
        "speedup_vs_high": own.median,
        "speedup_spread": {"min": own.min, "max": own.max},
        "cpu_speedup_vs_high": None if cpu_speedup is None else cpu_speedup.median,
        "cascade_bound": paired.bound().median,
        "agreement_with_high": agreement[ADAPTIVE],
        "recipes": dict(recipes),
        "throughput_per_s": {system: 1e3 / cost.median for system, cost in costs.items()},
        "cpu_ms": {
            system: None if spread is None else spread.median for system, spread in cpu.items()
        },
        "speedup": {system: paired.cost_ratio(HIGH, to=system).median for system in agreement},
        "agreement": dict(agreement),
        "disturbed_systems": [system for system in agreement if is_disturbed(system, HIGH)],
        "best_alternative": best | {"disturbed": is_disturbed(best["name"], ADAPTIVE)},
        "low_disturbed": is_disturbed(LOW, ADAPTIVE),
        "low_cost_ratio_to_plan": paired.cost_ratio(LOW, to=ADAPTIVE).median,
    }


def _best_alternative(
    agreement: Mapping[str, float], costs: Mapping[str, Spread]
) -> dict[str, Any]:
    """The cheapest alternative that agrees with the full model at least as often as the plan.

    The cheap rung is part of the cascade, and alone not certified, so it is none. The full model
    itself is one, so there always is one.
    """
    among = [system for system in agreement if system not in (ADAPTIVE, LOW)]
    spreads = {system: cost.to_dict() for system, cost in costs.items()}
    found = cheapest_rival(agreement, spreads, among, ADAPTIVE)
    assert found is not None
    best, ratio = found
    return {"name": best, "agreement": agreement[best], "cost_ratio_to_plan": ratio["median"]}


def served_rows(plan: Summary) -> list[dict[str, str]]:
    """Every system for people, the fastest first.

    Args:
        plan: what `summarise_plan` returned.
    """
    throughput, speedup = plan["throughput_per_s"], plan["speedup"]
    doubted = throughput if plan["disturbed"] else plan["disturbed_systems"]
    return [
        {
            "system": system,
            "words": _words(plan, system),
            "agreement": percent(plan["agreement"][system]),
            "throughput": f"{throughput[system]:.1f}",
            "cpu": "–" if plan["cpu_ms"][system] is None else f"{plan['cpu_ms'][system]:.1f}",
            "speedup": "–" if system in doubted else f"{speedup[system]:.2f}×",
        }
        for system in sorted(throughput, key=lambda system: -throughput[system])
    ]


def speedup_sentence(plan: Summary) -> str:
    """How much faster the cascade is, as measured, or that nothing can be said."""
    if plan["disturbed"]:
        return f"Saturated, {TOO_BUSY}: {'; '.join(plan['doubts'])}."
    low, high = plan["speedup_spread"]["min"], plan["speedup_spread"]["max"]
    cpu = plan["cpu_speedup_vs_high"]
    by_cpu = "" if cpu is None else f"; by CPU time {cpu:.2f}"
    return (
        f"Saturated, on the same cores, the planned cascade answers {plan['speedup_vs_high']:.2f} "
        f"times as many images as the full model ({low:.2f} to {high:.2f} over the turns{by_cpu})."
    )


def best_sentence(plan: Summary) -> str:
    """What the cascade has to beat, and by how much it does."""
    best = plan["best_alternative"]
    costs = f" and costs {best['cost_ratio_to_plan']:.2f} times as much"
    of_cascade = f" and costs {plan['low_cost_ratio_to_plan']:.2f} of the cascade"
    if plan["disturbed"] or best["disturbed"]:
        costs = ""
    if plan["disturbed"] or plan["low_disturbed"]:
        of_cascade = ""
    return (
        "Of the alternatives that agree with the full model at least as often as the cascade "
        f"({percent(plan['agreement_with_high'])}), the cheapest is {_words(plan, best['name'])}: "
        f"it agrees on {percent(best['agreement'])}{costs}. The cheap rung alone, for which "
        f"nothing is certified, agrees on {percent(plan['agreement'][LOW])}{of_cascade}."
    )


def _words(plan: Summary, system: str) -> str:
    if system == ADAPTIVE:
        return "the planned cascade"
    words = recipe_words(plan["recipes"][system])
    roles = {LOW: "the cheap rung", ESCALATION: "the full rung", HIGH: "the full model"}
    return f"{roles[system]} ({words})" if system in roles else words
