"""summary.json: what was measured so far, section by section, so that a cut-off run keeps it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bundle.graphs import GraphSet
from calibration.fidelity import Fidelity
from routing import Calibration

from .figures import Spread
from .harness import Answer, Paired
from .memory import MemoryUse
from .systems import ADAPTIVE, ENSEMBLE, HIGH, LOW, System

SCHEMA_VERSION = 1
NAME = "summary.json"


def write(summary: dict[str, Any], path: Path) -> None:
    """Write it in one piece: a run that is killed while writing leaves the last one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    os.replace(partial, path)


def model_section(rung_set: GraphSet) -> dict[str, Any]:
    """What is served; `reference` where the full rung is not the full model."""
    reference = rung_set.reference_record
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
            "recipe": system.recipe,
            "agreement_with_high": paired.agreement(system.name, disagrees),
            "escalation_rate": paired.escalation_rate(system.name),
            "accuracy": _accuracy(paired, system.name, labels),
            "cost_ms": paired.cost(system.name).to_dict(),
            "cpu_ms": _or_none(paired.cpu_cost(system.name)),
            "cost_ratio": paired.cost_ratio(system.name).to_dict(),
        }
        for system in systems
    }


def _or_none(spread: Spread | None) -> dict[str, Any] | None:
    return None if spread is None else spread.to_dict()


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
    found = {"router_overhead_c1": paired.router_overhead().to_dict(), **_figures(paired, "c1")}
    if has_ensemble:
        found["ensemble_over_router"] = paired.cost_ratio(ENSEMBLE, to=ADAPTIVE).to_dict()
    return found


def saturated_figures(paired: Paired, cores: int, in_flight: int) -> dict[str, Any]:
    """The figures of saturated spans, every system on the same cores, one value per turn.

    Args:
        paired: what was measured.
        cores: that the server had.
        in_flight: requests that were always unanswered.
    """
    systems = {
        name: {
            "cost_ms": paired.cost(name).to_dict(),
            "cpu_ms": _or_none(paired.cpu_cost(name)),
            "escalation_rate": paired.escalation_rate(name),
        }
        for name in paired.shares[0]
    }
    section = {"cores": cores, "in_flight": in_flight, "systems": systems}
    return {"saturated": section, **_figures(paired, "saturated")}


def _figures(paired: Paired, load: str) -> dict[str, Any]:
    found = {
        f"speedup_{load}": paired.speedup(),
        f"bound_{load}": paired.bound(),
        f"cascade_efficiency_{load}": paired.efficiency(),
    }
    cpu = paired.cpu_speedup()
    if cpu is not None:
        found[f"cpu_speedup_{load}"] = cpu
    return {name: spread.to_dict() for name, spread in found.items()}


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
    pss_mib = [[use.to_dict()["peak_pss_mib"] for use in turn] for turn in turns]
    ratios = [adaptive / (low + high) for adaptive, low, high in pss_mib]
    return {"memory": memory, "peak_memory_ratio": Spread.of(ratios).to_dict()}
