"""What the planned cascade was worth as served, beside every single graph. Pure, no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from calibration.pages.page import percent
from calibration.pages.recipe_words import recipe_words
from perf.spread import Spread

from .systems import ADAPTIVE, HIGH, LOW, RUNG

Summary = Mapping[str, Any]


def summarise_plan(
    recipes: Mapping[str, str],
    rungs: tuple[str, str],
    certificate: Mapping[str, Any],
    agreement: Mapping[str, float],
    throughput: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """The entry `plan` of summary.json.

    Args:
        recipes: of each system that is a graph.
        rungs: recipes of the cheap rung and of the graph that the router escalates to.
        certificate: of the calibration.
        agreement: share of crops that each system answers as the full model does.
        throughput: images per second of each system, saturated, one value per turn.
    """
    speedups = {
        system: Spread.of(_ratios(values, throughput[HIGH]))
        for system, values in throughput.items()
    }
    own = speedups[ADAPTIVE]
    return {
        "low": rungs[0],
        "high": rungs[1],
        "reference": recipes[HIGH],
        "signal": certificate["signal"],
        "max_risk": certificate["epsilon"],
        "speedup_vs_high": own.median,
        "speedup_spread": {"min": own.min, "max": own.max},
        "agreement_with_high": agreement[ADAPTIVE],
        "recipes": dict(recipes),
        "throughput_per_s": {
            system: Spread.of(values).median for system, values in throughput.items()
        },
        "speedup": {system: spread.median for system, spread in speedups.items()},
        "agreement": dict(agreement),
        "best_alternative": _best_alternative(agreement, throughput),
    }


def _best_alternative(
    agreement: Mapping[str, float], throughput: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """The cheapest alternative that agrees with the full model at least as often as the plan.

    The cheap rung is part of the cascade, and alone not certified, so it is none. The full model
    itself is one, so there always is one.
    """
    reaching = [
        system
        for system in throughput
        if system not in (ADAPTIVE, LOW) and agreement[system] >= agreement[ADAPTIVE]
    ]
    plan = throughput[ADAPTIVE]
    ratios = {system: Spread.of(_ratios(plan, throughput[system])).median for system in reaching}
    best = min(ratios, key=lambda system: ratios[system])
    return {"name": best, "agreement": agreement[best], "cost_ratio_to_plan": ratios[best]}


def _ratios(fast: Sequence[float], slow: Sequence[float]) -> list[float]:
    """How many times as fast one is as the other, turn by turn."""
    return [one / other for one, other in zip(fast, slow, strict=True)]


def served_rows(plan: Summary) -> list[dict[str, str]]:
    """Every system for people, the fastest first.

    Args:
        plan: what `summarise_plan` returned.
    """
    throughput, speedup = plan["throughput_per_s"], plan["speedup"]
    return [
        {
            "system": system,
            "words": _words(plan, system),
            "agreement": percent(plan["agreement"][system]),
            "throughput": f"{throughput[system]:.1f}",
            "speedup": f"{speedup[system]:.2f}×",
        }
        for system in sorted(throughput, key=lambda system: -throughput[system])
    ]


def speedup_sentence(plan: Summary) -> str:
    """How much faster the cascade is, as measured."""
    low, high = plan["speedup_spread"]["min"], plan["speedup_spread"]["max"]
    return (
        f"Saturated, the planned cascade answers {plan['speedup_vs_high']:.2f} times as many "
        f"images as the full model ({low:.2f} to {high:.2f} over the turns)."
    )


def best_sentence(plan: Summary) -> str:
    """What the cascade has to beat, and by how much it does."""
    best = plan["best_alternative"]
    alone = plan["throughput_per_s"][ADAPTIVE] / plan["throughput_per_s"][LOW]
    return (
        "Of the alternatives that agree with the full model at least as often as the cascade "
        f"({percent(plan['agreement_with_high'])}), the cheapest is {_words(plan, best['name'])}: "
        f"it agrees on {percent(best['agreement'])} and costs {best['cost_ratio_to_plan']:.2f} "
        "times as much. The cheap rung alone, for which nothing is certified, agrees "
        f"on {percent(plan['agreement'][LOW])} and costs {alone:.2f} of the cascade."
    )


def _words(plan: Summary, system: str) -> str:
    if system == ADAPTIVE:
        return "the planned cascade"
    words = recipe_words(plan["recipes"][system])
    roles = {LOW: "the cheap rung", RUNG: "the full rung", HIGH: "the full model"}
    return f"{roles[system]} ({words})" if system in roles else words
