"""The sentences of the report, computed from its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from report.words import count_of, percent

from ..figures import TOO_BUSY, doubts_of
from ..figures import Spread as Runs
from .words import (
    Spread,
    Summary,
    amount,
    between,
    fine,
    judged,
    ratio,
    short_name,
    times,
)

# The figure, how it is written, its words, and the load whose doubts are its own.
FACTS = (
    ("speedup_c1", times, "speed-up over always running the full rung", "c1"),
    ("bound_c1", times, "cascade bound: the best possible here", "c1"),
    ("cascade_efficiency_c1", ratio, "cascade efficiency: speed-up / bound", "c1"),
    ("cascade_efficiency_saturated", ratio, "the same with the server saturated", "saturated"),
    ("router_overhead_c1", ratio, "router overhead: never escalating / cheap rung", "c1"),
    ("peak_memory_ratio", ratio, "peak memory: cascade's server / two servers of a rung each", ""),
)


def verdict(summary: Summary) -> dict[str, str]:
    """The first thing on the page: state (a class of the page's style), heading and sentence."""
    speed = summary.get("speedup_c1")
    if speed is None:
        return {
            "state": "unasked",
            "heading": "Faster than the alternatives? Not measured",
            "sentence": "The speed-up over always running the full rung was not measured.",
        }
    reasons = doubts_of(summary, "c1")
    if reasons:
        return {
            "state": "unasked",
            "heading": "Faster than the alternatives? The machine was too busy to say",
            "sentence": f"What was measured cannot be true: {'; '.join(reasons)}. Measure again "
            "while nothing else runs.",
        }
    rival = cheapest_rival(summary)
    costs = None if rival is None else rival[1]
    beaten = speed["max"] < 1 or (costs is not None and costs["max"] < 1)
    faster = speed["min"] > 1 and (costs is None or costs["min"] > 1)
    state, heading = "unasked", "Faster than the alternatives? Not clearly"
    if beaten:
        state, heading = "refused", "Faster than the alternatives? No"
    elif faster:
        state, heading = "certified", "Faster than the alternatives? Yes"
    return {
        "state": state,
        "heading": heading,
        "sentence": f"{_speed_sentence(summary, speed)} {_rival_sentence(summary, rival)}",
    }


def _speed_sentence(summary: Summary, speed: Spread) -> str:
    adaptive = (summary.get("answers") or {}).get("adaptive") or {}
    agreement = adaptive.get("agreement_with_high")
    agrees = (
        "; its agreement with the full rung was not measured"
        if agreement is None
        else f" at {percent(agreement)} agreement with it"
    )
    return (
        f"Adaptive is {ratio(speed['median'])} times as fast as always running the full rung"
        f"{agrees}."
    )


def cheapest_rival(summary: Summary) -> tuple[str, Spread] | None:
    """The cheapest static system that agrees at least as often, and its cost / adaptive's.

    Static high, which agrees always, is not a rival: the speed-up is over it. None where no static
    system agrees as often or nothing was measured.
    """
    answers = judged(summary)
    adaptive = answers.get("adaptive")
    if adaptive is None:
        return None
    rivals = [
        name
        for name in _rivals(summary)
        if answers[name]["agreement_with_high"] >= adaptive["agreement_with_high"]
    ]
    if not rivals:
        return None
    best = min(rivals, key=lambda name: answers[name]["cost_ratio"]["median"])
    return best, _quotient(answers[best]["cost_ratio"], adaptive["cost_ratio"])


def _rivals(summary: Summary) -> list[str]:
    return [
        name for name in judged(summary) if name.startswith("static-") and name != "static-high"
    ]


def _quotient(above: Spread, below: Spread) -> Spread:
    """Round by round, as both were measured in the same rounds."""
    if above["runs"] != below["runs"]:  # cut short within a round
        return Runs.of([above["median"] / below["median"]]).to_dict()
    pairs = zip(above["values"], below["values"], strict=True)
    return Runs.of([a / b for a, b in pairs]).to_dict()


def _rival_sentence(summary: Summary, rival: tuple[str, Spread] | None) -> str:
    if not _rivals(summary) or "adaptive" not in judged(summary):
        return "No static alternative was measured beside it."
    if rival is None:
        return "No static alternative below the full rung agrees as often."
    name, costs = rival
    named = short_name(name, summary)
    factor = f"{ratio(costs['median'])} times as much"
    if costs["min"] > 1:
        return (
            f"Of the static alternatives that agree at least as often, the cheapest, {named}, "
            f"costs {factor}."
        )
    if costs["max"] < 1:
        return (
            f"But a static alternative, {named}, agrees at least as often and costs only {factor}."
        )
    spread = between(costs, ratio)
    return (
        f"Of the static alternatives that agree at least as often, the cheapest, {named}, costs "
        f"about the same: {factor}{f' ({spread})' if spread else ''}."
    )


def promise(summary: Summary) -> str:
    """What the certificate says, or that there is none."""
    certificate = summary.get("certificate")
    if certificate is None:
        return "No certificate: nothing is guaranteed about the agreement on other images."
    kind = "Certificate" if certificate.get("certified") else "Not certified"
    return f"{kind}: {certificate['statement']}"


def agreement(summary: Summary) -> str:
    """What agreement means in this run, and how finely it was counted."""
    sentences = []
    if summary.get("fidelity"):
        sentences.append(
            "Held against the full rung's answer, right or wrong, an answer agrees if it "
            f"{summary['fidelity']}."
        )
    sets = (summary.get("images") or {}).get("sets") or {}
    images = (sets.get("mixed") or {}).get("images")
    if images:
        sentences.append(
            f"Counted on exactly the {count_of(images, 'image')} that were timed, one of which is "
            f"{percent(1 / images)}."
        )
    return " ".join(sentences)


def frontier(summary: Summary) -> str:
    """What the frontier plot shows."""
    low = judged(summary).get("static-low")
    start = (
        f"The cheap rung alone agrees in {percent(low['agreement_with_high'])} of the images. "
        if low
        else ""
    )
    return (
        f"{start}Further left is cheaper, further up agrees more often: the better line is the "
        "upper left one. Cost is the time of a request relative to the full rung's, one in flight, "
        "the systems taking turns image by image; thin bars span all rounds."
    )


def time_spent(attribution: Mapping[str, Any]) -> str:
    """Where the time of an average request goes."""
    average = attribution.get("all")
    if not average or average["total_ms"] <= 0:
        return ""
    total = average["total_ms"]
    largest = sorted(average["parts"], key=lambda part: -part["ms"])[:3]
    named = ", ".join(f"{part['name']} {percent(part['ms'] / total)}" for part in largest)
    return f"Of the {amount(total)} ms of an average request: {named}."


def disturbed(summary: Summary) -> list[str]:
    """For each load whose figures cannot be true a sentence that says so, and why."""
    loads = {"c1": "With one request in flight", "saturated": "Saturated"}
    return [
        f"{words} {TOO_BUSY}: {'; '.join(reasons)}. The tables below hold the times "
        "that were measured, and no ratio of them."
        for load, words in loads.items()
        if (reasons := doubts_of(summary, load))
    ]


def above_one(summary: Summary) -> str:
    """Why a cascade efficiency a little above 1 is possible; empty where none is believed."""
    reasons = {
        "saturated": "in the cascade fewer images share a batch of the full rung, and smaller "
        "batches may cost less per image",
        "c1": "the bound charges an escalated image two whole requests, but client and network "
        "are paid once",
    }
    words = {"saturated": "saturated efficiency", "c1": "efficiency with one request in flight"}
    sentences = []
    for load, reason in reasons.items():
        efficiency = summary.get(f"cascade_efficiency_{load}")
        if efficiency is None or efficiency["median"] <= 1 or doubts_of(summary, load):
            continue
        sentences.append(f"The {words[load]} is {fine(efficiency['median'])}, above 1: {reason}.")
    return " ".join(sentences)


def title(summary: Summary) -> str:
    """The line under the heading: model, rungs, device."""
    model = summary.get("model") or {}
    environment = summary.get("environment") or {}
    full = "static-escalation" if "reference" in model else "static-high"
    rungs = "; ".join(short_name(system, summary) for system in ("static-low", full) if model)
    named = [model.get("backbone"), rungs, environment.get("device")]
    return " · ".join(part for part in named if part) or "model and machine not recorded"
