"""The result on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from perf.figures import TOO_BUSY
from perf.systems import ADAPTIVE, HIGH, LOW
from report.terminal import table
from report.words import recipe_words

from .plan_summary import best_sentence, served_rows, speedup_sentence

Summary = Mapping[str, Any]


def result_table(summary: Summary) -> Table:
    """One request in flight: accuracy, latency, throughput."""
    how = "planned" if "plan" in summary else f"at {summary['low_px']}/{summary['high_px']} px"
    full = _full(summary)
    names = {LOW: "cheap rung always", HIGH: f"{full} always", ADAPTIVE: "adaptive"}
    rows = [
        (
            name,
            f"{summary['accuracy'][key]:.1%}",
            f"{summary['latency_ms_p50'][key]:.1f} ms",
            f"{summary['throughput_per_s'][key]:.1f}",
            "–" if summary["cpu_ms"][key] is None else f"{summary['cpu_ms'][key]:.1f} ms",
        )
        for key, name in names.items()
    ]
    title = f"{summary['images']} unseen crops, {summary['backbone']} {how}"
    return table(title, ("", "accuracy", "p50 latency", "images/s", "CPU/image"), rows)


def plan_table(summary: Summary) -> Table:
    """Saturated: everything that was served, the fastest first."""
    served = served_rows(summary["plan"])
    keys = ("words", "agreement", "throughput", "cpu", "speedup")
    rows = [tuple(row[key] for key in keys) for row in served]
    bold = [number for number, row in enumerate(served) if row["system"] == ADAPTIVE]
    headings = ("", "agrees with full", "images/s", "CPU ms/image", "speed-up")
    return table("the same crops, saturated, each on the same cores", headings, rows, bold)


def sentences(summary: Summary) -> list[str]:
    """What the figures mean, one line each."""
    full, certificate = _full(summary), summary["certificate"]
    said = [
        speed_sentence(summary),
        f"{summary['escalation_rate']:.1%} escalated; {summary['agreement_with_high']:.1%} "
        f"answered as the {full}",
        f"certified before: risk at most {certificate['epsilon']:.0%} with confidence "
        f"{certificate['confidence']:.0%}; seen on these crops: {summary['realised_risk']:.1%}"
        if certificate["certified"]
        else "nothing is certified: every image goes to the full rung",
    ]
    if "plan" not in summary:
        return said
    plan = summary["plan"]
    low, high = recipe_words(plan["low"]), recipe_words(plan["high"])
    chosen = f"planned: {low}, escalating by {plan['signal']} to {high}"
    return [chosen, *said, speedup_sentence(plan), best_sentence(plan)]


def speed_sentence(summary: Summary) -> str:
    """How much faster the cascade is, or that the machine was too busy to say."""
    if summary["doubts"]:
        return f"one request in flight, {TOO_BUSY}: {'; '.join(summary['doubts'])}"
    cpu = summary["cpu_speedup_vs_high"]
    return (
        f"{summary['speedup_vs_high']:.2f}x as fast as the {_full(summary)}"
        f"{'' if cpu is None else f', {cpu:.2f}x by CPU time'} (bound "
        f"{summary['cascade_bound']:.2f}x, efficiency {summary['cascade_efficiency']:.2f}); "
        f"router overhead {summary['router_overhead']:.2f}"
    )


def _full(summary: Summary) -> str:
    """What answers are held against; what the router escalates to may be another graph."""
    return "full model" if "plan" in summary else "full rung"
