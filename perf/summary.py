"""summary.json: what was measured so far, section by section, so that a cut-off run keeps it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from calibration.fidelity import Fidelity
from routing import Calibration, RungSet

from . import derive
from .measure.asking import Answer
from .measure.levels import saturated
from .measure.loads import Measured
from .measure.memory import MemoryUse
from .measure.paired import Paired
from .measure.systems import ADAPTIVE, ENSEMBLE, ESCALATION, HIGH, LOW, System
from .spread import Spread

SCHEMA_VERSION = 1
NAME = "summary.json"


def write(summary: dict[str, Any], path: Path) -> None:
    """Write it in one piece: a run that is killed while writing leaves the last one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    os.replace(partial, path)


def model_section(rung_set: RungSet) -> dict[str, Any]:
    """What is served; `reference` where the full rung is not the full model."""
    reference = rung_set.reference
    return {
        **({} if reference is None else {"reference": reference.recipe}),
        "backbone": rung_set.backbone,
        "image_shape": list(rung_set.image_shape),
        "low": rung_set.rungs["vit_low"].recipe,
        "high": rung_set.rungs["vit_high"].recipe,
        "embedding_dim": rung_set.embedding_dim,
        "classes": rung_set.classes,
    }


def fidelity_words(calibration: Calibration) -> str:
    """What agreeing with static high means here, to be read after "an answer that"."""
    return Fidelity.of(calibration).agreement()


def answers_section(
    paired: Paired,
    systems: Sequence[System],
    disagrees: Callable[[Answer, Answer], bool],
    labels: Sequence[int] | None,
) -> dict[str, Any]:
    """Each system's agreement, escalation, accuracy and cost on exactly the same images.

    Args:
        paired: what was measured.
        systems: what was asked.
        disagrees: whether an answer is not acceptable in place of static high's.
        labels: class index of each answered image in the order of `paired`, or None.
    """
    return {
        system.name: {
            "title": system.title,
            "agreement_with_high": paired.agreement(system.name, disagrees),
            "escalation_rate": paired.escalation_rate(system.name),
            "accuracy": _accuracy(paired, system.name, labels),
            "cost_ms": paired.cost(system.name).to_dict(),
            "cost_ratio": paired.cost_ratio(system.name).to_dict(),
        }
        for system in systems
    }


def _accuracy(paired: Paired, system: str, labels: Sequence[int] | None) -> float | None:
    if labels is None:
        return None
    answers = [answer for share in paired.shares for answer in share[system]]
    right = [
        int(answer.logits.argmax()) == label
        for answer, label in zip(answers, labels, strict=True)
        if answer.logits is not None
    ]
    return sum(right) / len(right) if right else None


def paired_figures(paired: Paired, has_ensemble: bool) -> dict[str, Any]:
    """The figures with one request in flight."""
    found = {
        "router_overhead_c1": paired.router_overhead(),
        "cascade_efficiency_c1": paired.efficiency(),
        "speedup_c1": paired.speedup(),
        "bound_c1": paired.bound(),
    }
    if has_ensemble:
        found["ensemble_over_router"] = paired.cost_ratio(ENSEMBLE, to=ADAPTIVE)
    return {name: spread.to_dict() for name, spread in found.items()}


def saturated_figures(measured: Sequence[Measured], escalation_rate: float) -> dict[str, Any]:
    """The figures under the highest closed-loop load, one value per turn.

    Args:
        measured: the closed loops.
        escalation_rate: of the images that were sent, 0..1.
    """
    entries = saturated(measured)
    if not {LOW, HIGH, ADAPTIVE} <= set(entries):
        return {}
    names = (ADAPTIVE, LOW, HIGH, ESCALATION if ESCALATION in entries else HIGH)
    turns = zip(*([1 / t for t in entries[name].throughput.values] for name in names), strict=True)
    speedups, bounds, efficiencies = [], [], []
    for cost, low, high, escalated in turns:
        speedups.append(derive.speedup(cost, high))
        costs = (low, high, escalation_rate, escalated)
        bounds.append(derive.cascade_bound(*costs))
        efficiencies.append(derive.cascade_efficiency(cost, *costs))
    return {
        "speedup_saturated": Spread.of(speedups).to_dict(),
        "bound_saturated": Spread.of(bounds).to_dict(),
        "cascade_efficiency_saturated": Spread.of(efficiencies).to_dict(),
    }


def memory_figures(peaks: Mapping[str, Sequence[MemoryUse]]) -> dict[str, Any]:
    """Peak memory of each system, the medians of its runs, and adaptive's over the static ones'.

    Args:
        peaks: for each system one entry per run; the runs of one turn belong together.
    """
    memory = {}
    for name, uses in peaks.items():
        entries = [use.to_dict() for use in uses]
        memory[name] = {
            field: None if entries[0][field] is None else median(e[field] for e in entries)
            for field in entries[0]
        }
    turns = zip(*(peaks[name] for name in (ADAPTIVE, LOW, HIGH)), strict=True)
    ratios = [
        derive.memory_ratio(*(use.to_dict()["peak_pss_mib"] for use in turn)) for turn in turns
    ]
    return {"memory": memory, "peak_memory_ratio": Spread.of(ratios).to_dict()}
