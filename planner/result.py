"""plan.json: everything a plan found, as JSON types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from calibration.certify import images_needed
from report.plan_page import cascade_marks, latency_words, reference_name
from report.words import milliseconds, setting

from .adapting import figures
from .plan import Planned, budget_latency_ms
from .request import LATENCY_PERCENTILE
from .select import Candidate, Tested, cascade_ms

SCHEMA_VERSION = 3  # 2 had an align and a test split always
_PRICED = ("latency_ms", "cost_ratio", "cpu_cost_ratio", "disturbed", "per_image")
PROCEDURE = (
    "The shortlist was made on the fit split; each of its cascades was tested on the certify split "
    "at an equal share of delta (Bonferroni), thresholds within a cascade as a fixed sequence with "
    "exact binomial p-values. So with the stated confidence all certificates hold at once, and "
    "that of the chosen cascade holds whatever it was chosen by."
)
_ADAPTED = (
    " Weights were adapted to images of neither split, nor to any that look like one of theirs."
)


def to_dict(planned: Planned, notes: list[str]) -> dict[str, Any]:
    """The content of plan.json.

    Args:
        planned: what was found.
        notes: one line each.
    """
    request, parts = planned.request, planned.parts
    content = {
        "schema_version": SCHEMA_VERSION,
        "backbone": planned.graphs.backbone,
        "reference": planned.graphs.reference.record.recipe,
        "goal": {
            "max_risk": request.goal.max_risk,
            "confidence": request.goal.confidence,
            "method": request.goal.method,
            **planned.fidelity.to_dict(),
            "loss": planned.fidelity.words("full model"),  # to be read after "an answer that"
            "latency_budget_ms": request.latency_budget_ms,
            "latency_percentile": LATENCY_PERCENTILE,  # where it depends on the image
            "certify_images_needed": images_needed(request.goal),  # if none of them is lost
            "procedure": PROCEDURE + (_ADAPTED if planned.states else ""),
        },
        "images": {
            "source": request.source.title,
            **({"adapt": len(parts.set_aside)} if parts.set_aside else {}),
            **{name: len(rows) for name, rows in parts.splits.items()},
        },
        "adaptation": _adaptation(planned),
        "measured_on": parts.measured,  # fit: cross-fitted
        "served": {
            "instances": request.instances,
            "threads": request.threads,
            "batch": planned.prices[planned.full]["batch"],
        },
        "disturbed": bool(planned.doubted),
        "doubts": _doubts(planned),
        "graphs": {name: _graph(planned, name) for name in planned.prices},
        "candidates": [_candidate(candidate) for candidate in planned.candidates],
        "tested": [_tested(planned, entry) for entry in planned.tested],
        "chosen": None if planned.chosen is None else _tested(planned, planned.chosen),
        "best_alternative": _best_alternative(planned),
        "notes": notes,
    }
    return content | {"outcome": outcome(content)}


def outcome(content: Mapping[str, Any]) -> dict[str, str]:
    """What became of the plan: the case, and a sentence for the terminal and the page.

    Args:
        content: of plan.json, without its outcome.

    Returns:
        `case`: `chosen`; `doubted` or `dearer` where what is certified costs no less than the full
        model, by CPU time or by the clock; `nothing_certified`; `over_budget` where every cascade
        that could meet the limit takes too long; `never` where none could. And its `sentence`.
    """
    goal, tested = content["goal"], content["tested"]
    limit = f"a risk of at most {setting(goal['max_risk'])}"
    certified = [entry for entry in tested if entry["certified"]]
    if content["chosen"] is not None:
        return {"case": "chosen", "sentence": content["chosen"]["certificate"]["statement"]}
    if certified and content["disturbed"]:
        case = "doubted"
        sentence = (
            f"Cascades were certified ({len(certified)}), but by CPU time none of them costs less "
            "than the full model."
        )
    elif certified:
        case = "dearer"
        best = min(certified, key=lambda entry: entry["certify"]["ms_per_image"])
        full = content["graphs"][reference_name(content)]["ms_per_image"]
        sentence = (
            f"Cascade {cascade_marks(content)[best['low'], best['high']]} is the cheapest that was "
            f"certified, and costs {milliseconds(best['certify']['ms_per_image'])} per image where "
            f"the full model costs {milliseconds(full)}. That is a result, not a failure."
        )
    elif tested:
        case = "nothing_certified"
        sentence = (
            f"Not one of the cascades that were tested ({len(tested)}) could be certified for "
            f"{limit}. That is a result, not a failure: without proof the full model answers."
        )
    elif any(candidate["escalation"] is not None for candidate in content["candidates"]):
        case = "over_budget"
        sentence = (
            f"Every cascade that could meet {limit} takes longer than the latency budget of "
            f"{milliseconds(goal['latency_budget_ms'])} for an image that runs through both "
            f"graphs{latency_words(content)}, so none was tested."
        )
    else:
        case = "never"
        sentence = (
            f"By the fit split no cascade would ever be certified for {limit}, so none was tested."
        )
    return {"case": case, "sentence": sentence}


def _adaptation(planned: Planned) -> dict[str, Any] | None:
    """What was trained for the plan; None: nothing was to be."""
    if planned.request.adapt_minutes is None:
        return None
    return {
        "minutes": planned.request.adapt_minutes,
        "trained": [
            {
                "recipe": str(found.recipe),
                "adapted": None if found.state is None else found.state.key,
                "line": found.line,
            }
            for found in planned.trained
        ],
    }


def _best_alternative(planned: Planned) -> dict[str, Any] | None:
    """The cheapest single graph that agrees with the reference at least as often as the cascade.

    Among the full graphs, those to compare with and the full model itself; cheap graphs are parts
    of cascades and stand in the frontier. On the split that measures, the cascade's cost with its
    escalation there and without the router. None where nothing was chosen.
    """
    if planned.chosen is None:
        return None
    figures = _tested(planned, planned.chosen)["measured"]
    reaching = [
        name
        for name in dict.fromkeys([*planned.beside, *planned.highs, planned.full])
        if planned.agreement[name] >= figures["acceptable"]
    ]
    best = min(reaching, key=lambda name: planned.ms[name])
    return {
        "name": best,
        "recipe": planned.graphs.graphs[best].record.recipe,
        "agreement": planned.agreement[best],
        "cost_ratio_to_plan": _believed(planned, planned.ms[best] / figures["ms_per_image"]),
    }


def _doubts(planned: Planned) -> list[str]:
    """Why no ratio of costs can be believed; usually nothing."""
    if not planned.doubted:
        return []
    recipes = "; ".join(planned.graphs.graphs[name].record.recipe for name in planned.doubted)
    return [
        f"the machine was too busy for a figure: clock and CPU time of {recipes} are more than "
        "15 % apart, twice. The cascades were put in order by CPU time; what is certified is "
        "certified all the same, and what it saves shows on a quiet machine"
    ]


def _graph(planned: Planned, name: str) -> dict[str, Any]:
    roles = {
        "low": name in planned.lows,
        "high": name in planned.highs,
        "beside": name in planned.beside,
        "reference": name == planned.full,
    }
    aligned, price = planned.aligned.get(name), planned.prices[name]
    state = planned.states.get(planned.graphs.graphs[name].recipe.adapted or "")
    return {
        "recipe": planned.graphs.graphs[name].record.recipe,
        "roles": [role for role, plays in roles.items() if plays],
        "acceptable": planned.agreement[name],  # of images that measure, if it answers alone
        "ms_per_image": planned.ms[name],
        **{key: price[key] for key in _PRICED},
        "budget_latency_ms": budget_latency_ms(price),
        "alignment": None if aligned is None else aligned.to_dict(),
        "adapted": None if state is None else figures(state),
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    """What a cascade is predicted to cost; where it is never certified, it has no escalation."""
    escalation = candidate.escalation
    return {
        "low": candidate.low,
        "high": candidate.high,
        "signal": candidate.signal,
        "escalation": None if math.isinf(escalation) else escalation,
        "ms_per_image": candidate.ms_per_image,
        "chance": candidate.chance,
    }


def _tested(planned: Planned, entry: Tested) -> dict[str, Any]:
    """A shortlisted cascade: predicted, certified, and measured on other images."""
    candidate, calibration = entry.candidate, entry.fit.calibration
    rate, risk = (calibration.metrics[key] for key in ("escalation_rate", "risk"))
    ms, graphs = planned.ms, planned.graphs.graphs

    def costs(escalation: float, ms_per_image: float) -> dict[str, Any]:
        return {
            "escalation_rate": escalation,
            "ms_per_image": ms_per_image,
            "speedup": _believed(planned, ms[planned.full] / ms_per_image),
        }

    measured_ms = cascade_ms(ms[candidate.low], ms[candidate.high], rate)
    return {
        "low": candidate.low,
        "high": candidate.high,
        "low_recipe": graphs[candidate.low].record.recipe,
        "high_recipe": graphs[candidate.high].record.recipe,
        "signal": candidate.signal,
        "threshold": calibration.threshold,
        "certified": entry.certified,
        "certificate": dict(calibration.certificate or {}),
        "chance": candidate.chance,
        "outlook": calibration.metrics["outlook"],
        "predicted": costs(candidate.escalation, candidate.ms_per_image),
        "certify": costs(entry.escalation, entry.ms_per_image),
        "measured": costs(rate, measured_ms) | {"risk": risk, "acceptable": 1 - risk},
    }


def _believed(planned: Planned, ratio: float) -> float | None:
    """A ratio of costs; None where the costs cannot be believed."""
    return None if planned.doubted else ratio
