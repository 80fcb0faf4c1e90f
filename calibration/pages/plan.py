"""`plan.html`: what a plan serves and promises, and everything it was chosen over.

One self-contained file made from plan.json alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from report.words import percent, recipe_words, setting

from . import plan_figures, plan_readings
from .page import write
from .plan_points import (
    Content,
    cascade_marks,
    graph_marks,
    graph_words,
    is_chosen,
    points,
)
from .plan_readings import milliseconds

_ROLES = {
    "reference": "full model",
    "low": "cheap candidate",
    "high": "full candidate",
    "beside": "alternative",
}
_PARTS = {
    "align": "taught the graphs (alignments, ranges of int8)",
    "fit": "taught the signals and made the shortlist",
    "certify": "tested the shortlist",
    "test": "measured what this page shows; decided nothing",
}
_NONE = "–"
_NOT_BELIEVED = "not believed"


def write_plan(path: Path, content: Mapping[str, Any]) -> None:
    """Write the page.

    Args:
        path: file to write.
        content: of plan.json.
    """
    shown = points(content)
    aligned = {n: g["alignment"] for n, g in content["graphs"].items() if g["alignment"]}
    write(
        path,
        "plan.html.j2",
        content=content,
        verdict=_verdict(content),
        facts=_facts(content),
        warnings=plan_readings.warnings(content),
        loss=plan_readings.loss(content),
        reference=recipe_words(content["reference"]),
        frontier=None  # its axis is a ratio of costs
        if content["disturbed"]
        else plan_figures.frontier(shown, content["goal"]["max_risk"]),
        growth=_growth(content, aligned),
        readings={
            "served": plan_readings.served(content),
            "frontier": plan_readings.frontier(content, shown),
            "left_out": plan_readings.left_out(content),
        },
        batch=plan_readings.batch(content),
        tested=_tested(content),
        graphs=_graphs(content),
        pairs=_pairs(content),
        candidates=[_candidate(content, candidate) for candidate in content["candidates"]],
        aligned=[plan_readings.grown(content, name, found) for name, found in aligned.items()],
        not_helping=[
            plan_readings.not_helping(content, name)
            for name, found in aligned.items()
            if not found["helps"]
        ],
        given_back=plan_readings.given_back(content),
        enough=plan_readings.enough(content),
        parts=[
            {"name": name, "images": f"{content['images'][name]:,}", "words": words}
            for name, words in _PARTS.items()
        ],
    )


def _verdict(content: Content) -> dict[str, Any]:
    """The first thing on the page."""
    chosen = content["chosen"]
    if chosen is None:
        return {
            "state": "unasked",
            "heading": "Nothing beats the full model",
            "statement": "Keep serving the full model; no cascade was chosen.",
            "readings": [plan_readings.why_nothing(content)],
        }
    return {
        "state": "certified",
        "heading": "Certified",
        "statement": chosen["certificate"]["statement"],
        "readings": [plan_readings.saved(content), plan_readings.alternative(content)],
    }


def _facts(content: Content) -> list[tuple[str, str]]:
    goal, chosen = content["goal"], content["chosen"]
    asked = [
        ("ε: limit on the risk", setting(goal["max_risk"])),
        ("confidence", setting(goal["confidence"])),
    ]
    if goal["latency_budget_ms"] is not None:
        asked.append(("latency budget", milliseconds(goal["latency_budget_ms"])))
    if chosen is None:
        return asked
    test, best = chosen["test"], content["best_alternative"]
    costs, ms = [("cheaper than the full model", _NOT_BELIEVED)], []
    if not content["disturbed"]:
        ratio = f"{best['cost_ratio_to_plan']:.2f}×"
        costs = [
            ("cheaper than the full model", f"{test['speedup']:.2f}×"),
            ("cheaper than the best single graph that agrees as often", ratio),
        ]
        ms = [("an image, without the router", milliseconds(test["ms_per_image"]))]
    return [
        *costs,
        ("acceptable answers, test images", percent(test["acceptable"])),
        ("escalated, test images", percent(test["escalation_rate"])),
        *ms,
        *asked,
        ("signal", chosen["signal"]),
    ]


def _graphs(content: Content) -> list[dict[str, str]]:
    """Rows of the graphs, the cheapest first."""
    rows = []
    for name, mark in graph_marks(content).items():
        graph = content["graphs"][name]
        cost, by_batch = graph["cost_ratio"], graph["ms_per_image_by_batch"]
        measured = by_batch[str(plan_readings.batch(content))]["median"]
        doubted = content["disturbed"]
        rows.append(
            {
                "mark": mark,
                "words": graph_words(content, name),
                "ms": milliseconds(measured if doubted else graph["ms_per_image"]),
                "ratio": _NONE if doubted else f"{cost['median']:.3f}",
                "spread": "" if doubted else f"[{cost['min']:.3f}, {cost['max']:.3f}]",
                "acceptable": percent(graph["acceptable"]),
                "latency": milliseconds(graph["latency_ms"]["median"]),
                "roles": ", ".join(_ROLES[role] for role in graph["roles"]),
                "kind": "reference" if "reference" in graph["roles"] else "",
            }
        )
    return rows


def _tested(content: Content) -> list[dict[str, str]]:
    """Rows of the cascades that were tested."""
    marks = cascade_marks(content)
    return [
        {
            "mark": marks[entry["low"], entry["high"]],
            "low": plan_readings.named(content, entry["low"]),
            "high": plan_readings.named(content, entry["high"]),
            "signal": entry["signal"],
            "predicted": percent(entry["predicted"]["escalation_rate"]),
            "certify": percent(entry["certify"]["escalation_rate"]),
            "test": percent(entry["test"]["escalation_rate"]),
            "certified": "yes" if entry["certified"] else "no",
            "errors": _errors(entry["certificate"]),
            "acceptable": percent(entry["test"]["acceptable"]),
            "ms": _NONE if content["disturbed"] else milliseconds(entry["test"]["ms_per_image"]),
            "speedup": _NONE if content["disturbed"] else f"{entry['test']['speedup']:.2f}×",
            "kind": "chosen" if is_chosen(content, entry) else "",
        }
        for entry in content["tested"]
    ]


def _errors(certificate: Mapping[str, Any]) -> str:
    allowed = certificate["allowed"]
    return f"{certificate['errors']:,} / {f'{allowed:,}' if allowed >= 0 else 'none'}"


def _pairs(content: Content) -> list[dict[str, str]]:
    """Rows of the pairs of graphs, each with its best signal, the cheapest predicted first."""
    best: dict[tuple[str, str], Mapping[str, Any]] = {}
    for candidate in content["candidates"]:
        best.setdefault((candidate["low"], candidate["high"]), candidate)
    tested = {(entry["low"], entry["high"]): entry for entry in content["tested"]}
    return [
        _candidate(content, candidate)
        | {
            "outcome": _outcome(content, candidate, tested.get(pair)),
            "kind": "chosen" if pair in tested and is_chosen(content, tested[pair]) else "",
        }
        for pair, candidate in best.items()
    ]


def _outcome(
    content: Content, candidate: Mapping[str, Any], tested: Mapping[str, Any] | None
) -> str:
    if tested is not None:
        return "certified" if tested["certified"] else "tested, not certified"
    if candidate["escalation"] is None:
        return "not tested: no escalation is enough"
    graphs, budget = content["graphs"], content["goal"]["latency_budget_ms"]
    latency = sum(graphs[candidate[key]]["latency_ms"]["median"] for key in ("low", "high"))
    if budget is not None and latency > budget:
        return f"not tested: {milliseconds(latency)} is over the latency budget"
    return "not tested: others are predicted to be cheaper"


def _candidate(content: Content, candidate: Mapping[str, Any]) -> dict[str, str]:
    escalation, ms = candidate["escalation"], candidate["ms_per_image"]
    return {
        "low": plan_readings.named(content, candidate["low"]),
        "high": plan_readings.named(content, candidate["high"]),
        "signal": candidate["signal"],
        "escalation": _NONE if escalation is None else percent(escalation),
        "ms": _NONE if ms is None or content["disturbed"] else milliseconds(ms),
    }


def _growth(content: Content, aligned: Mapping[str, Any]) -> str | None:
    curves = [
        plan_figures.Curve(graph_words(content, name), found["helps"], found["growth"])
        for name, found in aligned.items()
    ]
    return plan_figures.growth(curves) if curves else None
